//! The connection: a small state machine over one socket at a time.
//!
//! dial → capabilities, login → paced joins → read. A watchdog asks when it is silent; whatever ends it leads
//! back to the start after a wait. A refused login is a state of its own, since trying it often locks accounts.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant as StdInstant};

use thiserror::Error;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::dial::{Transport, dial};
use super::joins::{JoinFailure, Joins};
use super::lines::Lines;
use super::normalize::{Normalizer, Protocol, Reading, TakenIn};
use super::settings::TwitchConfig;
use super::status::{ConnectionState, TwitchStatus};
use crate::clock::Clock;
use crate::envelope::Origin;
use crate::pipeline::{Intake, Patience};
use crate::retry::Backoff;

/// After so much silence we ask.
const SILENCE: Duration = Duration::from_secs(5);
/// And so long after, the peer is dead, however open the socket looks.
const ANSWER: Duration = Duration::from_secs(8);
/// From the connection to the welcome.
const LOGIN_TIMEOUT: Duration = Duration::from_secs(10);
/// A request to reconnect that comes sooner after the last one is followed with a wait: logins are limited.
const BETWEEN_REQUESTS: Duration = Duration::from_secs(30);
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);
/// Waits after a refused login.
const REFUSED_FIRST: Duration = Duration::from_secs(30);
const REFUSED_LONGEST: Duration = Duration::from_mins(5);
const READ_BYTES: usize = 64 * 1024;
/// The limit of channels per account that Twitch announced in May 2024.
const CHANNELS_PER_ACCOUNT: usize = 100;

/// The source.
pub struct Twitch {
    config: TwitchConfig,
    tls: Option<Arc<rustls::ClientConfig>>,
    normalizer: Normalizer,
    status: Arc<TwitchStatus>,
    clock: Clock,
}

/// Why a connection ended.
#[derive(Debug, Error)]
enum End {
    #[error("stopped")]
    Stopped,
    #[error("Twitch asked to reconnect")]
    Asked,
    #[error("login refused: {0}")]
    LoginRefused(String),
    #[error("cannot connect")]
    Dial(#[source] io::Error),
    #[error("the connection failed")]
    Io(#[from] io::Error),
    #[error("Twitch closed the connection")]
    Closed,
    #[error("no answer from Twitch")]
    Silent,
}

impl End {
    fn code(&self) -> &'static str {
        match self {
            Self::Stopped => "stopped",
            Self::Asked => "reconnect_requested",
            Self::LoginRefused(_) => "login_failed",
            Self::Dial(_) => "connect_failed",
            Self::Io(_) => "connection_failed",
            Self::Closed => "connection_closed",
            Self::Silent => "no_answer",
        }
    }
}

/// What lives as long as one socket.
struct Session<'a> {
    source: &'a Twitch,
    intake: &'a Intake,
    joins: &'a mut Joins,
    socket: Box<dyn Transport>,
    lines: Lines,
    nick: String,
    is_logged_in: bool,
    was_connected_before: bool,
    last_heard: Instant,
    has_asked: bool,
}

impl Twitch {
    /// A source that has not started. `tls` is needed if the address asks for it.
    pub fn new(
        config: TwitchConfig,
        tls: Option<Arc<rustls::ClientConfig>>,
        normalizer: Normalizer,
        status: Arc<TwitchStatus>,
        clock: Clock,
    ) -> Self {
        Self { config, tls, normalizer, status, clock }
    }

    /// Reads chat until `stop` becomes true, connecting as often as it takes.
    pub async fn run(self, intake: Intake, mut stop: watch::Receiver<bool>) {
        if self.config.account.is_some() && self.config.channels.len() > CHANNELS_PER_ACCOUNT {
            let (channels, limit) = (self.config.channels.len(), CHANNELS_PER_ACCOUNT);
            tracing::warn!(channels, limit, "Twitch may refuse channels beyond its limit for an account");
        }
        let mut joins = Joins::new(&self.config.channels, self.config.join_rate);
        let mut backoff = Backoff::new(self.config.reconnect_first, self.config.reconnect_longest);
        let mut refused_backoff = Backoff::new(REFUSED_FIRST, REFUSED_LONGEST);
        let mut was_connected = false;
        let mut last_asked: Option<Instant> = None;
        self.status.channels(&joins);
        loop {
            let (end, logged_in) =
                self.connect_and_read(&intake, &mut joins, was_connected, stop.clone()).await;
            was_connected |= logged_in;
            if logged_in {
                backoff.reset();
                refused_backoff.reset();
            }
            joins.disconnected();
            self.status.channels(&joins);
            let wait = match &end {
                End::Stopped => {
                    return self.status.lost(ConnectionState::Disabled, end.code(), "shutting down");
                }
                End::LoginRefused(_) => refused_backoff.next_wait(),
                // At once, unless that is what it says every time.
                End::Asked if logged_in && last_asked.is_none_or(|at| at.elapsed() > BETWEEN_REQUESTS) => {
                    last_asked = Some(Instant::now());
                    Duration::ZERO
                }
                _ => backoff.next_wait(),
            };
            self.note(&end, was_connected, wait);
            tokio::select! {
                () = sleep(wait) => {}
                () = stopped(&mut stop) => {}
            }
        }
    }

    fn note(&self, end: &End, was_connected: bool, wait: Duration) {
        let state = match end {
            End::LoginRefused(_) => ConnectionState::Error,
            _ if was_connected => ConnectionState::Reconnecting,
            _ => ConnectionState::Connecting,
        };
        let message = crate::telemetry::logs::with_causes(end);
        let retry_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
        match end {
            End::LoginRefused(_) => tracing::error!(
                error_code = end.code(),
                error = message,
                retry_ms,
                "Twitch refuses the login"
            ),
            End::Asked => tracing::info!("Twitch asked to reconnect"),
            _ => {
                tracing::warn!(error_code = end.code(), error = message, retry_ms, "not connected to Twitch");
            }
        }
        self.status.lost(state, end.code(), &message);
    }

    async fn connect_and_read(
        &self,
        intake: &Intake,
        joins: &mut Joins,
        was_connected_before: bool,
        mut stop: watch::Receiver<bool>,
    ) -> (End, bool) {
        let dialed = tokio::select! {
            dialed = dial(&self.config.address, self.tls.as_ref()) => dialed,
            () = stopped(&mut stop) => return (End::Stopped, false),
        };
        let socket = match dialed {
            Ok(socket) => socket,
            Err(error) => return (End::Dial(error), false),
        };
        let nick = match &self.config.account {
            Some(account) => account.username.clone(),
            None => format!("justinfan{}", fastrand::u32(10_000..100_000)),
        };
        let mut session = Session {
            source: self,
            intake,
            joins,
            socket,
            lines: Lines::new(),
            nick,
            is_logged_in: false,
            was_connected_before,
            last_heard: Instant::now(),
            has_asked: false,
        };
        let end = match session.run(stop).await {
            Ok(never) => match never {},
            Err(end) => end,
        };
        (end, session.is_logged_in)
    }
}

impl Session<'_> {
    async fn run(&mut self, mut stop: watch::Receiver<bool>) -> Result<std::convert::Infallible, End> {
        self.log_in().await?;
        let login_due = Instant::now() + LOGIN_TIMEOUT;
        loop {
            let now = Instant::now();
            let watchdog = match (self.is_logged_in, self.has_asked) {
                (false, _) => login_due,
                (true, false) => self.last_heard + SILENCE,
                (true, true) => self.last_heard + SILENCE + ANSWER,
            };
            let join_due = if self.is_logged_in { self.joins.next_due(now) } else { None };
            self.lines.buffer().reserve(READ_BYTES);
            tokio::select! {
                biased;
                () = stopped(&mut stop) => return Err(End::Stopped),
                // Paced, so reading does not starve; behind reading it would.
                () = sleep_until(join_due.unwrap_or(now)), if join_due.is_some() => self.join_due().await?,
                read = self.socket.read_buf(self.lines.buffer()) => {
                    if read? == 0 {
                        return Err(End::Closed);
                    }
                    self.take_in().await?;
                }
                () = sleep_until(watchdog) => self.watch().await?,
            }
        }
    }

    async fn log_in(&mut self) -> Result<(), End> {
        let pass = match &self.source.config.account {
            Some(account) => format!("PASS oauth:{}\r\n", account.token.expose()),
            None => String::new(),
        };
        let nick = &self.nick;
        let hello = format!("CAP REQ :twitch.tv/tags twitch.tv/commands\r\n{pass}NICK {nick}\r\n");
        self.write(&hello).await
    }

    async fn write(&mut self, text: &str) -> Result<(), End> {
        let writing = async {
            self.socket.write_all(text.as_bytes()).await?;
            self.socket.flush().await
        };
        timeout(WRITE_TIMEOUT, writing).await.map_err(|_| End::Silent)?.map_err(End::Io)
    }

    /// Deals with every whole line in the buffer.
    async fn take_in(&mut self) -> Result<(), End> {
        let taken_in = TakenIn { at: self.source.clock.now(), instant: StdInstant::now() };
        let mut drafts = Vec::new();
        let mut end = Ok(());
        while let Some(line) = self.lines.next_line() {
            match self.source.normalizer.read(line, taken_in) {
                Reading::Draft(draft) => drafts.push(*draft),
                Reading::Protocol(protocol) => {
                    let next = self.protocol(protocol).await;
                    // Behind a request to reconnect there is more to read; a broken connection ends here.
                    let goes_on = matches!(next, Ok(()) | Err(End::Asked));
                    end = end.and(next);
                    if !goes_on {
                        break;
                    }
                }
                Reading::Empty => {}
            }
        }
        if !drafts.is_empty() {
            self.source.status.message_at(taken_in.at);
            self.intake.offer(Origin::Twitch, drafts, Patience::Bounded).await;
        }
        // After the door: while it was waited at, nobody listened.
        self.last_heard = Instant::now();
        self.has_asked = false;
        end
    }

    async fn protocol(&mut self, protocol: Protocol) -> Result<(), End> {
        let Protocol { command, params, nick, msg_id } = protocol;
        let channel = params.first().map(|channel| channel.trim_start_matches('#')).unwrap_or_default();
        let is_ours = nick.as_deref() == Some(self.nick.as_str());
        match command.as_str() {
            "PING" => {
                let token = params.last().map_or("tmi.twitch.tv", String::as_str);
                self.write(&format!("PONG :{token}\r\n")).await?;
            }
            "001" => {
                self.is_logged_in = true;
                self.source.status.connected(&self.nick, self.was_connected_before);
                tracing::info!(account = self.nick, "connected to Twitch");
                self.join_due().await?;
            }
            "JOIN" if is_ours => self.confirmed(channel),
            "ROOMSTATE" => self.confirmed(channel),
            "PART" if is_ours && self.joins.parted(channel) => {
                tracing::warn!(channel, "Twitch put us out of the channel");
                self.source.status.channels(self.joins);
            }
            "NOTICE" => self.notice(channel, params.last().map_or("", String::as_str), msg_id.as_deref())?,
            "RECONNECT" => return Err(End::Asked),
            _ => {}
        }
        Ok(())
    }

    fn notice(&mut self, channel: &str, text: &str, msg_id: Option<&str>) -> Result<(), End> {
        let why = match msg_id {
            Some("msg_banned") => JoinFailure::Banned,
            Some("msg_channel_suspended") => JoinFailure::Suspended,
            // A refused login has no id; before the welcome nothing else is said this way.
            None if !self.is_logged_in => return Err(End::LoginRefused(text.to_owned())),
            _ => return Ok(()),
        };
        if self.joins.refused(channel, why, Instant::now()) {
            tracing::warn!(channel, why = ?why, "Twitch refuses the channel");
            self.source.status.channels(self.joins);
        }
        Ok(())
    }

    fn confirmed(&mut self, channel: &str) {
        if self.joins.confirmed(channel) {
            tracing::info!(channel, "joined");
            self.source.status.channels(self.joins);
        }
    }

    async fn join_due(&mut self) -> Result<(), End> {
        let mut joins = String::new();
        while let Some(channel) = self.joins.take_due(Instant::now()) {
            joins.push_str("JOIN #");
            joins.push_str(&channel);
            joins.push_str("\r\n");
        }
        self.source.status.channels(self.joins);
        if joins.is_empty() { Ok(()) } else { self.write(&joins).await }
    }

    /// The line has been silent for too long.
    async fn watch(&mut self) -> Result<(), End> {
        if !self.is_logged_in || self.has_asked {
            return Err(End::Silent);
        }
        self.has_asked = true;
        self.write("PING :inlet\r\n").await
    }
}

/// Waits until `stop` is true, or nobody is left who could say so.
async fn stopped(stop: &mut watch::Receiver<bool>) {
    drop(stop.wait_for(|stop| *stop).await);
}
