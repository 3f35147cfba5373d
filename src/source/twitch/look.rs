//! A look at Twitch before anything is read from it: whether it answers, lets us in, and, of a history service, whether
//! that answers. No channel is joined: JOINs are limited per account, and a service may be using them.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::timeout;

use super::backfill::Backfill;
use super::connection::{LOGIN_TIMEOUT, hello, nick};
use super::credentials::Account;
use super::dial::dial;
use super::lines::{Line, Lines};
use super::metrics::TwitchMetrics;
use super::normalize::Normalizer;
use super::note::{NoteError, NoteFile};
use super::settings::TwitchConfig;
use super::wire;
use crate::clock::Clock;
use crate::envelope::Origin;
use crate::telemetry::logs::with_causes;

/// Why Twitch cannot be read from.
#[derive(Debug, Error)]
pub enum LookError {
    /// It does not take the account.
    #[error("the login is refused: {0}")]
    Refused(String),
    /// It cannot show who it is.
    #[error("its certificate is not trusted: {0}")]
    Untrusted(String),
    /// It is not reachable, or does not answer.
    #[error("{0}")]
    Away(String),
}

impl From<io::Error> for LookError {
    fn from(error: io::Error) -> Self {
        let is_of_tls = error.get_ref().and_then(|cause| cause.downcast_ref::<rustls::Error>()).is_some();
        let why = with_causes(&error);
        if is_of_tls { Self::Untrusted(why) } else { Self::Away(why) }
    }
}

/// Connects and logs in, and no more. The name that was taken.
pub async fn log_in(
    config: &TwitchConfig,
    tls: Option<&Arc<rustls::ClientConfig>>,
) -> Result<String, LookError> {
    let mut socket = dial(&config.address, tls).await?;
    // A stored token is the service's to keep; the one in the settings is a person's to get right.
    let account = config
        .credentials
        .given
        .as_ref()
        .map(|given| Account { username: given.username.clone(), token: given.access.clone() });
    let nick = nick(account.as_ref());
    let answered = timeout(LOGIN_TIMEOUT, async {
        socket.write_all(hello(account.as_ref(), &nick).as_bytes()).await?;
        socket.flush().await?;
        let mut lines = Lines::new();
        loop {
            if socket.read_buf(lines.buffer()).await? == 0 {
                return Err(LookError::Away(
                    "it closed the connection before the login was answered".to_owned(),
                ));
            }
            while let Some(line) = lines.next_line() {
                if is_welcome(&line)? {
                    return Ok(());
                }
            }
        }
    });
    answered.await.map_err(|_| LookError::Away("it does not answer the login".to_owned()))??;
    Ok(nick)
}

/// Whether the line lets us in; an error if it refuses to.
fn is_welcome(line: &Line) -> Result<bool, LookError> {
    let Line::Whole(bytes) = line else { return Ok(false) };
    let (text, _) = wire::text(bytes);
    let Some(parsed) = wire::parse(&text) else { return Ok(false) };
    match parsed.command.as_str() {
        "001" => Ok(true),
        "NOTICE" => Err(LookError::Refused(parsed.params.last().cloned().unwrap_or_default())),
        _ => Ok(false),
    }
}

/// Whether the note of the run before in `folder` can be read by this version. Nothing is written.
pub fn look_at_note(folder: &Path) -> Result<(), NoteError> {
    NoteFile::in_folder(folder).read().map(drop)
}

/// Asks the history service for the last second of the first channel. `None`: there is none to ask.
pub async fn ask_for_history(
    config: &TwitchConfig,
    tls: Option<Arc<rustls::ClientConfig>>,
    clock: Clock,
) -> Option<Result<(), String>> {
    let (url, channel) = (config.backfill.clone()?, config.channels.first()?);
    let metrics = match TwitchMetrics::new(&prometheus::Registry::new()) {
        Ok(metrics) => Arc::new(metrics),
        Err(error) => return Some(Err(with_causes(&error))),
    };
    let normalizer = Normalizer::new(Origin::Backfill, config.shared_chat, metrics);
    Some(match Backfill::new(url, tls, normalizer, clock) {
        Ok(backfill) => backfill.ask(channel, Duration::from_secs(1)).await,
        Err(error) => Err(with_causes(&error)),
    })
}
