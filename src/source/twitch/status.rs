//! How the Twitch source is: written by the connection, read by the probes and `/_debug/twitch`.

use std::sync::{Arc, Mutex, PoisonError};

use jiff::Timestamp;
use serde::Serialize;
use serde_json::{Value, json};

use super::joins::{JoinFailure, Joins};
use super::metrics::{ChannelState, TwitchMetrics};
use crate::clock::Clock;
use crate::status::Part;
use crate::telemetry::metrics::Label as _;

/// What the connection is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ConnectionState {
    /// Nothing is to be read.
    Disabled,
    /// On the way to its first login.
    Connecting,
    /// Logged in.
    Connected,
    /// Lost, on the way back.
    Reconnecting,
    /// Somebody has to do something; tried again slowly.
    Error,
}

/// One channel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Channel {
    name: String,
    #[serde(serialize_with = "as_str")]
    state: ChannelState,
    #[serde(skip_serializing_if = "Option::is_none")]
    why: Option<JoinFailure>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde hands over a reference to the field")]
fn as_str<S: serde::Serializer>(state: &ChannelState, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(state.as_str())
}

/// What was last known.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Snapshot {
    /// What the connection is doing.
    pub state: ConnectionState,
    /// Who it is logged in as.
    pub account: Option<String>,
    /// The channels.
    pub channels: Vec<Channel>,
    /// Connections that stand.
    pub connections: u32,
    /// Connections that came to stand after the first.
    pub reconnects: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    last_reconnect_at: Option<Timestamp>,
    #[serde(skip_serializing_if = "Option::is_none")]
    last_message_at: Option<Timestamp>,
    #[serde(skip_serializing_if = "Option::is_none")]
    last_error: Option<LastError>,
}

/// The last thing that went wrong.
#[derive(Debug, Clone, Serialize)]
pub struct LastError {
    code: &'static str,
    message: String,
    at: Timestamp,
}

/// The cell.
pub struct TwitchStatus {
    snapshot: Mutex<Snapshot>,
    metrics: Arc<TwitchMetrics>,
    clock: Clock,
}

impl TwitchStatus {
    /// Of a source that has not started: `disabled` for good if it never will.
    pub fn new(enabled: bool, metrics: Arc<TwitchMetrics>, clock: Clock) -> Self {
        let snapshot = Snapshot {
            state: if enabled { ConnectionState::Connecting } else { ConnectionState::Disabled },
            account: None,
            channels: Vec::new(),
            connections: 0,
            reconnects: 0,
            last_reconnect_at: None,
            last_message_at: None,
            last_error: None,
        };
        Self { snapshot: Mutex::new(snapshot), metrics, clock }
    }

    /// What is known now.
    pub fn snapshot(&self) -> Snapshot {
        self.with(|snapshot| snapshot.clone())
    }

    fn with<T>(&self, work: impl FnOnce(&mut Snapshot) -> T) -> T {
        work(&mut self.snapshot.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Logged in as `account`; `again`: after a loss.
    pub(super) fn connected(&self, account: &str, again: bool) {
        let now = self.clock.now();
        self.metrics.connected.set(1);
        self.with(|snapshot| {
            snapshot.state = ConnectionState::Connected;
            snapshot.account = Some(account.to_owned());
            snapshot.connections = 1;
            if again {
                self.metrics.reconnects.inc();
                snapshot.reconnects += 1;
                snapshot.last_reconnect_at = Some(now);
            }
        });
    }

    /// The connection is gone or never stood.
    pub(super) fn lost(&self, state: ConnectionState, code: &'static str, message: &str) {
        let at = self.clock.now();
        self.metrics.connected.set(0);
        self.with(|snapshot| {
            snapshot.state = state;
            snapshot.connections = 0;
            snapshot.last_error = Some(LastError { code, message: message.to_owned(), at });
        });
    }

    /// Something about the channels changed.
    pub(super) fn channels(&self, joins: &Joins) {
        let channels: Vec<_> =
            joins.states().map(|(name, state, why)| Channel { name: name.to_owned(), state, why }).collect();
        for state in ChannelState::ALL {
            let count = channels.iter().filter(|channel| channel.state == *state).count();
            self.metrics.channels.of(*state).set(i64::try_from(count).unwrap_or(i64::MAX));
        }
        self.with(|snapshot| snapshot.channels = channels);
    }

    /// Something was taken in.
    pub(super) fn message_at(&self, at: Timestamp) {
        self.with(|snapshot| snapshot.last_message_at = Some(at));
    }
}

impl Part for TwitchStatus {
    fn name(&self) -> &'static str {
        "twitch"
    }

    fn is_waited_for(&self) -> bool {
        self.with(|snapshot| match snapshot.state {
            ConnectionState::Disabled => false,
            ConnectionState::Connected => {
                snapshot.channels.iter().any(|channel| channel.state == ChannelState::Wanted)
            }
            ConnectionState::Connecting | ConnectionState::Reconnecting | ConnectionState::Error => true,
        })
    }

    fn describe(&self) -> Value {
        let snapshot = self.snapshot();
        let count = |state| snapshot.channels.iter().filter(|channel| channel.state == state).count();
        json!({
            "state": snapshot.state,
            "joined": count(ChannelState::Joined),
            "wanted": count(ChannelState::Wanted),
            "failed": count(ChannelState::Failed),
        })
    }
}
