//! What the simulator is told, and why it may refuse to start.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use thiserror::Error;

use super::faults::{JoinRefusal, LoginRefusal};
use super::session::is_login;

/// What to simulate. [`SimConfig::new`] has defaults for everything but the clock.
#[derive(Debug, Clone)]
pub struct SimConfig {
    /// Channels that get messages; any other may be joined and stays silent. With `replay`: where its lines go in
    /// turn; none: each to the channel it names.
    pub channels: Vec<String>,
    /// Messages per second over all channels together; 0: as fast as the slowest reader takes them.
    pub rate: u32,
    /// How many messages in all. `None`: without end, or a replayed file once.
    pub count: Option<u64>,
    /// How many viewers write (1 to 1,000,000).
    pub users: u32,
    /// Exponent of the Zipf curve over the viewers; 0: all write alike.
    pub zipf: f64,
    /// The same seed makes the same messages, but for their time.
    pub seed: u64,
    /// Chat with all that happens on Twitch (subs, raids, bans, replies, shared chat, …) instead of messages alone.
    pub lifelike: bool,
    /// Of lifelike chat: how many times more often than on Twitch something other than a message happens (1 to 50).
    pub happenings: u32,
    /// Lines to send instead of made-up ones.
    pub replay: Option<PathBuf>,
    /// Replayed lines keep their `id` and `tmi-sent-ts`.
    pub keep_ids: bool,
    /// Where to log what was sent, as JSON lines.
    pub sent_file: Option<PathBuf>,
    /// How many of the last records `Simulator::sent` can tell.
    pub sent_kept: usize,
    /// Speak TLS, with a certificate for `localhost` and `127.0.0.1` from an authority made at the start.
    pub tls: bool,
    /// Answer every login with this.
    pub refuse_login: Option<LoginRefusal>,
    /// Channels whose JOIN is never answered.
    pub ignore_joins: Vec<String>,
    /// Channels whose JOIN is refused.
    pub refuse_joins: Vec<(String, JoinRefusal)>,
    /// Answer so many JOINs of an account in any ten seconds; the others vanish, as on Twitch. 0: answer all.
    pub join_limit: u32,
    /// Of a thousand lines, so many more are bad ones.
    pub bad_permille: u32,
    /// Each line whose number this divides is sent twice; 0: none.
    pub duplicate_every: u32,
    /// Write so many bytes per second to each connection; 0: as fast as they are read.
    pub slow: u64,
    /// A connection whose queue has had no room for so long is cut, as by Twitch; `None`: the stream waits for it.
    pub cut_after: Option<Duration>,
    /// How long a connection stays open after its RECONNECT, if the command does not say.
    pub reconnect_grace: Duration,
    /// How often each connection is sent a PING; one silent for three of them is closed.
    pub ping_every: Duration,
    /// The wall clock, Unix milliseconds.
    pub now: fn() -> i64,
}

impl SimConfig {
    /// One channel `sim`, 10 messages a second from 500 viewers, no end, nothing recorded.
    pub fn new(now: fn() -> i64) -> Self {
        Self {
            channels: vec!["sim".to_owned()],
            rate: 10,
            count: None,
            users: 500,
            zipf: 1.0,
            seed: 1,
            lifelike: false,
            happenings: 1,
            replay: None,
            keep_ids: false,
            sent_file: None,
            sent_kept: 0,
            tls: false,
            refuse_login: None,
            ignore_joins: Vec::new(),
            refuse_joins: Vec::new(),
            join_limit: 0,
            bad_permille: 0,
            duplicate_every: 0,
            slow: 0,
            cut_after: Some(Duration::from_secs(10)),
            reconnect_grace: Duration::from_secs(10),
            ping_every: Duration::from_mins(1),
            now,
        }
    }
}

/// Why the simulator could not start.
#[derive(Debug, Error)]
pub enum SimError {
    /// A channel's name that Twitch could not have.
    #[error("`{0}` cannot be a channel: 1 to 25 letters, digits or underscores")]
    Channel(String),
    /// Neither channels nor a file to replay.
    #[error("no channel to send to")]
    NoChannel,
    /// A Zipf exponent that makes no curve.
    #[error("the Zipf exponent must be a number from 0 to 10")]
    Zipf,
    /// The socket.
    #[error("cannot listen")]
    Listen(#[source] io::Error),
    /// A file to replay, to log to, or for the certificate.
    #[error("cannot open {path}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The certificate.
    #[error("cannot make a certificate")]
    Certificate(#[from] rcgen::Error),
    /// The TLS settings.
    #[error("cannot set up TLS")]
    Tls(#[from] rustls::Error),
    /// The terminal.
    #[error("cannot write to standard output")]
    Output(#[source] io::Error),
}

/// Channels as Twitch writes them, each once; refuses what cannot be simulated.
pub(super) fn checked(mut config: SimConfig) -> Result<SimConfig, SimError> {
    config.channels = names(&config.channels)?;
    config.ignore_joins = names(&config.ignore_joins)?;
    for (channel, _) in &mut config.refuse_joins {
        *channel = channel_name(channel)?;
    }
    if config.channels.is_empty() && config.replay.is_none() {
        return Err(SimError::NoChannel);
    }
    if !(0.0..=10.0).contains(&config.zipf) {
        return Err(SimError::Zipf);
    }
    Ok(config)
}

fn names(given: &[String]) -> Result<Vec<String>, SimError> {
    let mut names = Vec::new();
    for name in given {
        let login = channel_name(name)?;
        if !names.contains(&login) {
            names.push(login);
        }
    }
    Ok(names)
}

/// A channel's name without `#`, in lower case.
pub(super) fn channel_name(name: &str) -> Result<String, SimError> {
    let login = name.trim().trim_start_matches('#').to_ascii_lowercase();
    if is_login(&login) { Ok(login) } else { Err(SimError::Channel(name.to_owned())) }
}
