//! One connection, from its dialling to its end: a small state machine over one socket.
//!
//! dial → capabilities, login → read, and write the JOINs it is handed. A watchdog asks when it is silent. It decides
//! nothing about channels: it reports what it hears to the [fleet](super::fleet), and does what it is told.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant as StdInstant};

use jiff::Timestamp;
use thiserror::Error;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until, timeout};

use super::credentials::Account;
use super::dial::{Transport, dial};
use super::fleet::Shared;
use super::ledger::Mark;
use super::lines::Lines;
use super::normalize::{Protocol, Reading, TakenIn};
use super::plan::{ConnectionId, JoinFailure};
use super::roster::RoomId;
use crate::envelope::Origin;
use crate::errors::ErrorCode;
use crate::pipeline::{Intake, Patience};
use crate::telemetry::metrics::Label as _;

/// After so much silence we ask.
const SILENCE: Duration = Duration::from_secs(5);
/// And so long after, the peer is dead, however open the socket looks.
const ANSWER: Duration = Duration::from_secs(8);
/// From the connection to the welcome.
pub(super) const LOGIN_TIMEOUT: Duration = Duration::from_secs(10);
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);
/// A connection whose channels are all heard elsewhere is read so much longer: what Twitch sent before the new one was
/// joined may still be on its way to the old one.
const LINGER: Duration = Duration::from_secs(1);
const READ_BYTES: usize = 64 * 1024;

/// What a connection is told to do.
#[derive(Debug)]
pub(super) enum Order {
    /// To ask for this channel.
    Join(String),
    /// To leave it.
    Part(String),
    /// To read what is still under way, and close.
    Close,
}

/// What a connection tells.
#[derive(Debug)]
pub(super) struct Report {
    pub(super) connection: ConnectionId,
    pub(super) what: What,
}

/// What happened on a connection.
#[derive(Debug)]
pub(super) enum What {
    /// The login is written.
    LoggingIn { at: Instant },
    /// It is accepted.
    LoggedIn { nick: String },
    /// JOINs are written.
    Written { channels: Vec<String>, at: Instant },
    /// Twitch confirmed the channel, and may have said which room it is.
    Confirmed { channel: String, room: Option<RoomId>, at: Timestamp },
    /// Twitch refused the channel.
    Refused { channel: String, why: JoinFailure },
    /// Twitch put us out of the channel.
    Parted { channel: String },
    /// The owner of a wanted room speaks under a login that is not the one it is known by.
    Seen { room: RoomId, login: String },
    /// Twitch will close the connection soon.
    AskedToReconnect,
    /// The last word.
    Ended(End),
}

/// Why a connection ended.
#[derive(Debug, Error)]
pub(super) enum End {
    #[error("stopped")]
    Stopped,
    #[error("replaced by another connection")]
    Replaced,
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
    /// Its name in `/_debug/twitch` and in the log.
    pub(super) fn code(&self) -> &'static str {
        match self {
            Self::Stopped => "stopped",
            Self::Replaced => "replaced",
            Self::LoginRefused(_) => ErrorCode::LoginFailed.as_str(),
            Self::Dial(_) => ErrorCode::ConnectFailed.as_str(),
            Self::Io(_) => ErrorCode::ConnectionFailed.as_str(),
            Self::Closed => ErrorCode::ConnectionClosed.as_str(),
            Self::Silent => ErrorCode::NoAnswer.as_str(),
        }
    }
}

/// How far the closing of a connection has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Closing {
    No,
    /// Read on until then.
    From(Instant),
    /// Asked for a last answer, which is due then: what was sent before it has been read when it comes.
    Asked(Instant),
}

/// What a PING asks with: whether somebody is there, and whether all that was under way has arrived.
const ANYBODY: &str = "inlet";
const LAST: &str = "inlet-last";

/// A connection to be made.
pub(super) struct Connection {
    pub(super) id: ConnectionId,
    pub(super) shared: Arc<Shared>,
    pub(super) intake: Intake,
    pub(super) mark: Arc<Mark>,
    pub(super) orders: mpsc::Receiver<Order>,
    /// Full: the connection waits, its socket being the queue.
    pub(super) reports: mpsc::Sender<Report>,
}

/// What lives as long as the socket.
struct Session<'a> {
    connection: &'a mut Connection,
    socket: Box<dyn Transport>,
    lines: Lines,
    /// `None`: anonymous.
    account: Option<Account>,
    nick: String,
    is_logged_in: bool,
    last_heard: Instant,
    has_asked: bool,
    closing: Closing,
}

impl Connection {
    /// Dials, logs in and reads until the end, which is its last report.
    pub(super) async fn run(mut self, mut stop: watch::Receiver<bool>) {
        let end = tokio::select! {
            dialed = dial(&self.shared.config.address, self.shared.tls.as_ref()) => match dialed {
                Ok(socket) => self.talk(socket, stop).await,
                Err(error) => End::Dial(error),
            },
            () = stopped(&mut stop) => End::Stopped,
        };
        self.report(What::Ended(end)).await;
    }

    async fn talk(&mut self, socket: Box<dyn Transport>, stop: watch::Receiver<bool>) -> End {
        let account = self.shared.status.credentials().account();
        let nick = nick(account.as_ref());
        let mut session = Session {
            connection: self,
            socket,
            lines: Lines::new(),
            account,
            nick,
            is_logged_in: false,
            last_heard: Instant::now(),
            has_asked: false,
            closing: Closing::No,
        };
        match session.run(stop).await {
            Ok(never) => match never {},
            Err(end) => end,
        }
    }

    async fn report(&self, what: What) {
        // Nobody listens any more only when the source is stopping.
        drop(self.reports.send(Report { connection: self.id, what }).await);
    }
}

impl Session<'_> {
    async fn run(&mut self, mut stop: watch::Receiver<bool>) -> Result<std::convert::Infallible, End> {
        self.log_in().await?;
        let login_due = Instant::now() + LOGIN_TIMEOUT;
        loop {
            let silent = match (self.is_logged_in, self.has_asked) {
                (false, _) => login_due,
                (true, false) => self.last_heard + SILENCE,
                (true, true) => self.last_heard + SILENCE + ANSWER,
            };
            let (watchdog, closing) = match self.closing {
                Closing::No => (silent, false),
                Closing::From(at) | Closing::Asked(at) => (silent.min(at), at <= silent),
            };
            self.lines.buffer().reserve(READ_BYTES);
            tokio::select! {
                biased;
                () = stopped(&mut stop) => return Err(End::Stopped),
                // Paced, so reading does not starve; behind reading it would.
                order = self.connection.orders.recv() => match order {
                    Some(order) => self.obey(order).await?,
                    None => return Err(End::Stopped),
                },
                read = self.socket.read_buf(self.lines.buffer()) => {
                    if read? == 0 {
                        return Err(End::Closed);
                    }
                    self.take_in().await?;
                }
                () = sleep_until(watchdog) => if closing { self.close().await? } else { self.watch().await? },
            }
        }
    }

    async fn log_in(&mut self) -> Result<(), End> {
        let hello = hello(self.account.as_ref(), &self.nick);
        self.write(&hello).await?;
        self.connection.report(What::LoggingIn { at: Instant::now() }).await;
        Ok(())
    }

    async fn write(&mut self, text: &str) -> Result<(), End> {
        let writing = async {
            self.socket.write_all(text.as_bytes()).await?;
            self.socket.flush().await
        };
        timeout(WRITE_TIMEOUT, writing).await.map_err(|_| End::Silent)?.map_err(End::Io)
    }

    async fn obey(&mut self, order: Order) -> Result<(), End> {
        let mut channels = Vec::new();
        // In the order they came: a channel may be left and joined again.
        let mut lines = String::new();
        let mut next = Some(order);
        while let Some(order) = next {
            match order {
                Order::Join(channel) => {
                    lines.extend(["JOIN #", &channel, "\r\n"]);
                    channels.push(channel);
                }
                Order::Part(channel) => lines.extend(["PART #", &channel, "\r\n"]),
                Order::Close => self.closing = Closing::From(Instant::now() + LINGER),
            }
            next = self.connection.orders.try_recv().ok();
        }
        if lines.is_empty() {
            return Ok(());
        }
        self.write(&lines).await?;
        if !channels.is_empty() {
            self.connection.report(What::Written { channels, at: Instant::now() }).await;
        }
        Ok(())
    }

    /// Deals with every whole line in the buffer.
    async fn take_in(&mut self) -> Result<(), End> {
        let shared = Arc::clone(&self.connection.shared);
        let taken_in = TakenIn { at: shared.clock.now(), instant: StdInstant::now() };
        let mut drafts = Vec::new();
        let mut end = Ok(());
        while let Some(line) = self.lines.next_line() {
            match shared.normalizer.read(line, taken_in) {
                Reading::Draft(draft) => drafts.push(*draft),
                // What cannot be answered any more ends the connection; what was read before is taken in.
                Reading::Protocol(protocol) if end.is_ok() => {
                    end = self.protocol(protocol, taken_in.at).await;
                }
                Reading::Protocol(_) | Reading::Empty => {}
            }
        }
        if !drafts.is_empty() {
            // One word of each: who was renamed may say much.
            let seen: BTreeMap<_, _> = {
                let known = shared.known.lookup();
                let seen = drafts.iter().filter_map(|draft| known.note(draft)).collect();
                drafts.retain(|draft| !known.is_of_another(draft));
                seen
            };
            for (room, login) in seen {
                self.connection.report(What::Seen { room, login }).await;
            }
        }
        if !drafts.is_empty() {
            shared.status.message_at(taken_in.at);
            self.connection.intake.offer(Origin::Twitch, drafts, Patience::Bounded).await;
        }
        // After the door: while it was waited at, nobody listened.
        self.last_heard = Instant::now();
        self.has_asked = false;
        self.connection.mark.set(taken_in.at);
        end
    }

    async fn protocol(&mut self, protocol: Protocol, at: Timestamp) -> Result<(), End> {
        let Protocol { command, params, nick, msg_id, room } = protocol;
        let channel = params.first().map(|channel| channel.trim_start_matches('#')).unwrap_or_default();
        let is_ours = nick.as_deref() == Some(self.nick.as_str());
        match command.as_str() {
            "PING" => {
                let token = params.last().map_or("tmi.twitch.tv", String::as_str);
                self.write(&format!("PONG :{token}\r\n")).await?;
            }
            "PONG" if params.last().is_some_and(|token| token == LAST) => return Err(End::Replaced),
            "001" => {
                self.is_logged_in = true;
                if let Some(account) = &self.account {
                    self.connection.shared.status.credentials().accepted(&account.token);
                }
                tracing::info!(account = self.nick, connection = self.connection.id, "connected to Twitch");
                self.connection.report(What::LoggedIn { nick: self.nick.clone() }).await;
            }
            "JOIN" if is_ours => self.confirmed(channel, None, at).await,
            "ROOMSTATE" => self.confirmed(channel, room, at).await,
            "PART" if is_ours => {
                self.connection.report(What::Parted { channel: channel.to_owned() }).await;
            }
            "NOTICE" => {
                self.notice(channel, params.last().map_or("", String::as_str), msg_id.as_deref()).await?;
            }
            "RECONNECT" => self.connection.report(What::AskedToReconnect).await,
            _ => {}
        }
        Ok(())
    }

    async fn notice(&mut self, channel: &str, text: &str, msg_id: Option<&str>) -> Result<(), End> {
        let why = match msg_id {
            Some("msg_banned") => JoinFailure::Banned,
            Some("msg_channel_suspended") => JoinFailure::Suspended,
            // A refused login has no id; before the welcome nothing else is said this way.
            None if !self.is_logged_in => {
                if let Some(account) = &self.account {
                    self.connection.shared.status.credentials().refused(&account.token);
                }
                return Err(End::LoginRefused(text.to_owned()));
            }
            _ => return Ok(()),
        };
        self.connection.report(What::Refused { channel: channel.to_owned(), why }).await;
        Ok(())
    }

    async fn confirmed(&mut self, channel: &str, room: Option<RoomId>, at: Timestamp) {
        self.connection.report(What::Confirmed { channel: channel.to_owned(), room, at }).await;
    }

    /// The line has been silent for too long.
    async fn watch(&mut self) -> Result<(), End> {
        if !self.is_logged_in || self.has_asked {
            return Err(End::Silent);
        }
        self.has_asked = true;
        self.write(&format!("PING :{ANYBODY}\r\n")).await
    }

    /// What was still under way has had its time.
    async fn close(&mut self) -> Result<(), End> {
        match self.closing {
            Closing::From(_) => {
                self.closing = Closing::Asked(Instant::now() + ANSWER);
                self.write(&format!("PING :{LAST}\r\n")).await
            }
            Closing::Asked(_) | Closing::No => Err(End::Replaced),
        }
    }
}

/// Who to log in as: `justinfan` and a number is anybody.
pub(super) fn nick(account: Option<&Account>) -> String {
    match account {
        Some(account) => account.username.clone(),
        None => format!("justinfan{}", fastrand::u32(10_000..100_000)),
    }
}

/// The first lines of a connection.
pub(super) fn hello(account: Option<&Account>, nick: &str) -> String {
    let pass = match account {
        Some(account) => format!("PASS oauth:{}\r\n", account.token.expose()),
        None => String::new(),
    };
    format!("CAP REQ :twitch.tv/tags twitch.tv/commands\r\n{pass}NICK {nick}\r\n")
}

/// Waits until `stop` is true, or nobody is left who could say so.
pub(super) async fn stopped(stop: &mut watch::Receiver<bool>) {
    drop(stop.wait_for(|stop| *stop).await);
}
