//! The durable stream that events are published to, and what every implementation of it promises.
//!
//! Publishing is a [`Lane`]: messages go in, in order, each under a number of the sender's choice, and each
//! comes back settled exactly once, or not at all (a lost answer): deadlines and retries are the sender's, so
//! that they are the same on every bus. A message's id is its identity: the stream keeps the first of each id
//! within its duplicate window and answers every further one with the position of that first one.

mod config;
pub mod embedded;
pub mod jetstream;

use std::borrow::Cow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::future::BoxFuture;
use futures_util::stream::BoxStream;
use jiff::Timestamp;
use serde_json::{Value, json};
use thiserror::Error;
use tokio::sync::{mpsc, watch};
use uuid::Uuid;

use crate::envelope::MessageId;
use crate::errors::ErrorCode;
use crate::label;
use crate::status::Part;

pub use config::{BusArgs, BusConfig, Driver, Retention};

/// Names of the headers of every message.
pub mod header {
    /// The message id, by which the stream de-duplicates.
    pub const MESSAGE_ID: &str = "Nats-Msg-Id";
    /// The envelope's type.
    pub const TYPE: &str = "type";
    /// W3C trace context, derived from the event's id.
    pub const TRACEPARENT: &str = "traceparent";
    /// Key of the user's document.
    pub const USER: &str = "Inlet-User";
    /// When it happened, in Unix milliseconds.
    pub const AT: &str = "Inlet-At";
}

/// A durable stream.
pub trait Bus: Send + Sync {
    /// The state now, and its changes.
    fn state(&self) -> watch::Receiver<BusState>;

    /// Opens a way in. At most `window` messages may be unsettled on it at a time.
    fn open_lane(&self, window: usize) -> Lane;

    /// Follows the stream from `start`, in order, without end.
    fn follow(&self, start: Start, content: Wanted) -> BoxFuture<'_, Result<Follower, BusError>>;

    /// The stream as it was last attached to; `None` until it first was.
    fn stream(&self) -> Option<StreamInfo>;
}

/// Whether messages can be published.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BusState {
    /// Not yet attached to the stream.
    Connecting,
    /// Attached.
    Up,
    /// Not reachable; being tried again.
    Away(String),
    /// Reachable, but no stream that Inlet can use; being tried again.
    Unfit(String),
}

impl BusState {
    /// The state's name in `/healthz`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Connecting => "connecting",
            Self::Up => "up",
            Self::Away(_) => "away",
            Self::Unfit(_) => "unfit",
        }
    }

    /// Why it is not up, if that is known.
    pub fn why(&self) -> Option<&str> {
        match self {
            Self::Away(why) | Self::Unfit(why) => Some(why),
            Self::Connecting | Self::Up => None,
        }
    }
}

/// What is known of the stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamInfo {
    /// `<name>@<created, Unix nanoseconds>`: another stream has another identity.
    pub identity: String,
    /// For how long the stream knows an id.
    pub duplicate_window: Duration,
    /// For how long it keeps a message; `None`: without end.
    pub max_age: Option<Duration>,
    /// How many bytes it keeps; `None`: without end.
    pub max_bytes: Option<u64>,
    /// Largest message it takes, headers included, in bytes.
    pub largest_message: usize,
}

/// A message to publish.
#[derive(Debug, Clone)]
pub struct Message {
    /// Where to.
    pub subject: Arc<str>,
    /// Its identity in the stream.
    pub id: MessageId,
    /// Header `type`.
    pub kind: Cow<'static, str>,
    /// Whose event it is, where it is to be counted.
    pub by_user: Option<ByUser>,
    /// The bytes.
    pub payload: Bytes,
}

/// What counting needs to know of an event, in its headers: so it is counted without its payload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ByUser {
    /// Header `Inlet-User`: the key of the user's document.
    pub key: Arc<str>,
    /// Header `Inlet-At`.
    pub occurred_at: Timestamp,
}

impl Message {
    /// Header `traceparent`: the trace is the event's id, so whoever handles the event joins it.
    pub fn traceparent(&self) -> String {
        traceparent(self.id)
    }

    /// An upper bound of what the headers take on the wire, in bytes.
    pub fn headers_size(&self) -> usize {
        let by_user = self.by_user.as_ref().map_or(0, |by_user| 48 + by_user.key.len());
        "NATS/1.0\r\n".len() + 160 + self.kind.len() + by_user
    }
}

/// Header `traceparent` of the message with this id.
pub fn traceparent(id: MessageId) -> String {
    let mut buffer = Uuid::encode_buffer();
    let trace = id.event.simple().encode_lower(&mut buffer);
    ["00-", trace, "-", &trace[16..], "-01"].concat()
}

/// A way into the stream.
#[derive(Debug)]
pub struct Lane {
    /// Takes messages in order. Closing it says that no more will come.
    pub messages: mpsc::Sender<Vec<Numbered>>,
    /// Gives back what became of them. It ends when the bus is closed.
    pub settled: mpsc::Receiver<Vec<Settled>>,
}

/// A message and the sender's number for it.
#[derive(Debug, Clone)]
pub struct Numbered {
    /// Comes back in [`Settled`].
    pub number: u64,
    /// The message.
    pub message: Arc<Message>,
}

/// What became of a message.
#[derive(Debug)]
pub struct Settled {
    /// The sender's number.
    pub number: u64,
    /// In the stream, or why not.
    pub outcome: Result<Ack, Refusal>,
}

/// The message is in the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ack {
    /// Where: of a duplicate, the position of the original.
    pub position: u64,
    /// Whether the stream had it already.
    pub duplicate: bool,
}

label! {
    /// What stands in the way now, and passes by itself. Also the label in `/metrics`.
    pub enum TransientCause {
        /// The bus is not reachable.
        Away => "away",
        /// The connection was lost before the answer.
        Lost => "lost",
        /// No answer in time.
        TimedOut => "timed_out",
        /// The stream is not there.
        StreamMissing => "stream_missing",
        /// The stream is full, or its server.
        Full => "full",
        /// The bus cannot serve now: a cluster without a leader, a failing disk.
        Unavailable => "unavailable",
    }
}

impl TransientCause {
    /// Whether the message may be in the stream all the same.
    pub fn leaves_unknown(self) -> bool {
        match self {
            Self::Lost | Self::TimedOut => true,
            Self::Away | Self::StreamMissing | Self::Full | Self::Unavailable => false,
        }
    }
}

/// Why a message was not taken.
#[derive(Debug, Clone, Copy, Error, PartialEq, Eq)]
pub enum Refusal {
    /// Not now.
    #[error("not now: {0}")]
    Transient(TransientCause),
    /// Never: it is too large.
    #[error("larger than the bus takes")]
    TooLarge,
    /// Never: its subject is malformed.
    #[error("the bus does not take its subject")]
    BadSubject,
    /// Refused for another reason, which may or may not pass.
    #[error("refused by the bus with error {0}")]
    Other(u64),
}

impl Refusal {
    /// Whether it will pass by itself.
    pub fn is_transient(self) -> bool {
        matches!(self, Self::Transient(_))
    }
}

/// Where to begin following.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// At this position, or the first one after it that still exists.
    Position(u64),
    /// At the first message stored at or after this time.
    Time(Timestamp),
    /// At the last event that there is now.
    Last,
    /// At the next message to come.
    End,
}

/// How much of each message to bring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// Ids and headers; the payload is empty.
    Headers,
    /// All of it.
    Whole,
}

/// Follows the stream. Batches come in stream order; an error ends it.
pub struct Follower {
    /// Of the stream that is followed.
    pub identity: String,
    /// The first position that the stream still held when following began; behind the last, of an empty one.
    pub first_position: u64,
    /// The last position that it had given away when following began.
    pub last_position: u64,
    batches: BoxStream<'static, Result<Batch, BusError>>,
}

impl Follower {
    /// The next batch. `None`: the bus is closed.
    pub async fn next(&mut self) -> Option<Result<Batch, BusError>> {
        self.batches.next().await
    }
}

/// What a follower brings.
#[derive(Debug, Default)]
pub struct Batch {
    /// Messages on Inlet's own subjects, in stream order.
    pub messages: Vec<Stored>,
    /// How many messages, of whomever, stood behind these at that moment. Nothing follows for now where it is 0; the
    /// first batch of an empty rest is empty.
    pub behind: u64,
    /// The last position that was come to, of whomever.
    pub up_to: u64,
}

impl Batch {
    /// Whether these were all there were.
    pub fn is_end(&self) -> bool {
        self.behind == 0
    }
}

/// A message in the stream.
#[derive(Debug, Clone)]
pub struct Stored {
    /// Its position.
    pub position: u64,
    /// When the stream stored it.
    pub stored_at: Timestamp,
    /// Its id; `None` for a message on our subject that somebody else put there without one.
    pub id: Option<MessageId>,
    /// Where it was published.
    pub subject: Arc<str>,
    /// Header `type`.
    pub kind: String,
    /// Whose event it is.
    pub by_user: Option<ByUser>,
    /// The bytes.
    pub payload: Bytes,
}

/// Why a bus did not do what it was asked.
#[derive(Debug, Error)]
pub enum BusError {
    /// Not reachable, or it did not answer in time.
    #[error("the bus is away: {0}")]
    Away(String),
    /// Reachable, but it cannot serve Inlet: what to change is in the text.
    #[error("{0}")]
    Unfit(String),
    /// What follows was lost on the way; follow again from the last position seen.
    #[error("the stream was interrupted: {0}")]
    Interrupted(String),
    /// The settings do not fit.
    #[error("{0}")]
    Settings(String),
    /// The embedded stream's file.
    #[error(transparent)]
    Embedded(#[from] embedded::EmbeddedError),
}

impl BusError {
    /// Whether trying again can help without anybody changing anything.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Away(_) | Self::Interrupted(_) => true,
            Self::Unfit(_) | Self::Settings(_) => false,
            Self::Embedded(error) => error.is_transient(),
        }
    }
}

/// Whether messages are under way and none is acknowledged, which a publisher knows and says: a bus may answer everything
/// else.
#[derive(Debug, Default)]
pub struct Silence(AtomicBool);

impl Silence {
    /// Notes it, and logs it when it changes.
    pub fn say(&self, is_silent: bool) {
        match (self.0.swap(is_silent, Ordering::Relaxed), is_silent) {
            (false, true) => {
                tracing::warn!(error_code = %ErrorCode::BusUnavailable, "the bus acknowledges nothing");
            }
            (true, false) => tracing::info!("the bus acknowledges again"),
            (false, false) | (true, true) => {}
        }
    }

    /// Whether it was said.
    pub fn is_heard(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// The bus as the probes see it.
pub struct BusPart {
    /// The bus.
    pub bus: Arc<dyn Bus>,
    /// What its publisher says.
    pub silence: Arc<Silence>,
}

impl Part for BusPart {
    fn name(&self) -> &'static str {
        "bus"
    }

    fn is_waited_for(&self) -> bool {
        *self.bus.state().borrow() != BusState::Up || self.silence.is_heard()
    }

    fn describe(&self) -> Value {
        let state = self.bus.state().borrow().clone();
        let is_silent = state == BusState::Up && self.silence.is_heard();
        json!({
            "state": if is_silent { "silent" } else { state.name() },
            "why": if is_silent { Some("nothing is acknowledged") } else { state.why() },
            "stream": self.bus.stream().map(|stream| stream.identity),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::envelope::id::event_id;

    #[test]
    fn the_trace_is_the_events_id() {
        let id = MessageId::of_event(event_id("twitch:885196de-cb67-427a-baa8-82f9b0fcd05f"));
        assert_eq!(traceparent(id), "00-708dd32c85be515f817a9491a23cd8ae-817a9491a23cd8ae-01");
    }
}
