//! How the Twitch source is: written by the fleet, read by the probes and `/_debug/twitch`.

use std::sync::{Arc, Mutex, PoisonError};

use jiff::Timestamp;
use serde::Serialize;
use serde_json::{Value, json};

use super::credentials::{Credentials, TokenSeen, TokenState};
use super::metrics::{ChannelState, TwitchMetrics};
use super::plan::{ConnectionId, JoinFailure, Plan};
use super::roster::Roster;
use crate::clock::Clock;
use crate::status::Part;
use crate::telemetry::metrics::Label as _;

/// What the source is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ConnectionState {
    /// Nothing is to be read.
    Disabled,
    /// On the way to its first login.
    Connecting,
    /// Logged in, on one connection at least.
    Connected,
    /// Lost, on the way back.
    Reconnecting,
    /// Somebody has to do something; tried again slowly.
    Error,
}

/// One channel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Channel {
    name: String,
    /// Its room, once Twitch said so.
    #[serde(skip_serializing_if = "Option::is_none")]
    room_id: Option<String>,
    #[serde(serialize_with = "as_str")]
    state: ChannelState,
    #[serde(skip_serializing_if = "Option::is_none")]
    why: Option<JoinFailure>,
    /// Where it is heard.
    #[serde(skip_serializing_if = "Option::is_none")]
    connection: Option<ConnectionId>,
}

/// One connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ConnectionSeen {
    pub(super) id: ConnectionId,
    /// `connecting`, `connected`, or `closing`: read on until its channels are joined elsewhere.
    pub(super) state: &'static str,
    /// How many channels have their place on it.
    pub(super) channels: usize,
    /// How many are heard on it.
    pub(super) joined: usize,
}

/// How things are now.
pub(super) struct Outlook<'a> {
    pub(super) state: ConnectionState,
    pub(super) connections: Vec<ConnectionSeen>,
    pub(super) channels: &'a Plan,
    pub(super) roster: &'a Roster,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde hands over a reference to the field")]
fn as_str<S: serde::Serializer>(state: &ChannelState, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(state.as_str())
}

/// What was last known.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Snapshot {
    /// What the source is doing.
    pub state: ConnectionState,
    /// Who it last logged in as.
    pub account: Option<String>,
    /// How it stands with the token that new connections log in with.
    pub token: TokenSeen,
    /// The channels.
    pub channels: Vec<Channel>,
    /// The connections.
    pub connections: Vec<ConnectionSeen>,
    /// Connections that came to stand in the place of lost ones.
    pub reconnects: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    last_reconnect_at: Option<Timestamp>,
    #[serde(skip_serializing_if = "Option::is_none")]
    last_message_at: Option<Timestamp>,
    #[serde(skip_serializing_if = "Option::is_none")]
    last_error: Option<LastError>,
    /// Whether it is known which channels are wanted.
    #[serde(skip)]
    is_whole: bool,
}

impl Snapshot {
    /// How a channel is, as it is shown here: `state`, and `why` if it failed.
    pub fn state_of(&self, name: &str) -> Option<Value> {
        let channel = self.channels.iter().find(|channel| channel.name == name)?;
        let mut shown = json!({ "state": channel.state.as_str() });
        if let (Some(shown), Some(why)) = (shown.as_object_mut(), channel.why) {
            shown.insert("why".to_owned(), json!(why));
        }
        Some(shown)
    }
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
    credentials: Arc<Credentials>,
    metrics: Arc<TwitchMetrics>,
    clock: Clock,
}

impl TwitchStatus {
    /// Of a source that has not started: `disabled` for good if it never will.
    pub fn new(
        enabled: bool,
        metrics: Arc<TwitchMetrics>,
        credentials: Arc<Credentials>,
        clock: Clock,
    ) -> Self {
        let snapshot = Snapshot {
            state: if enabled { ConnectionState::Connecting } else { ConnectionState::Disabled },
            account: None,
            token: credentials.seen(),
            channels: Vec::new(),
            connections: Vec::new(),
            reconnects: 0,
            last_reconnect_at: None,
            last_message_at: None,
            last_error: None,
            is_whole: false,
        };
        Self { snapshot: Mutex::new(snapshot), credentials, metrics, clock }
    }

    /// Who to log in as.
    pub(super) fn credentials(&self) -> &Arc<Credentials> {
        &self.credentials
    }

    /// What is known now.
    pub fn snapshot(&self) -> Snapshot {
        let token = self.credentials.seen();
        self.with(|snapshot| Snapshot { token, ..snapshot.clone() })
    }

    fn with<T>(&self, work: impl FnOnce(&mut Snapshot) -> T) -> T {
        work(&mut self.snapshot.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Logged in as `account`; `again`: in the place of a connection that was lost.
    pub(super) fn connected(&self, account: &str, again: bool) {
        let now = self.clock.now();
        self.with(|snapshot| {
            snapshot.account = Some(account.to_owned());
            if again {
                self.metrics.reconnects.inc();
                snapshot.reconnects += 1;
                snapshot.last_reconnect_at = Some(now);
            }
        });
    }

    /// Something went wrong.
    pub(super) fn failed(&self, code: &'static str, message: String) {
        let at = self.clock.now();
        self.with(|snapshot| snapshot.last_error = Some(LastError { code, message, at }));
    }

    /// How things are now.
    pub(super) fn show(&self, Outlook { state, connections, channels, roster }: Outlook<'_>) {
        let room_id = |name| Some(roster.channels.get(name)?.room?.to_string());
        let channels: Vec<_> = channels
            .channels()
            .map(|(name, state, why, connection)| Channel {
                name: name.to_owned(),
                room_id: room_id(name),
                state,
                why,
                connection,
            })
            .collect();
        for state in ChannelState::ALL {
            let count = channels.iter().filter(|channel| channel.state == *state).count();
            self.metrics.channels.of(*state).set(i64::try_from(count).unwrap_or(i64::MAX));
        }
        self.metrics.connected.set(i64::from(state == ConnectionState::Connected));
        self.with(|snapshot| {
            snapshot.state = state;
            snapshot.connections = connections;
            snapshot.channels = channels;
            snapshot.is_whole = roster.is_whole;
        });
    }

    /// The source has stopped.
    pub(super) fn closed(&self) {
        self.metrics.connected.set(0);
        self.with(|snapshot| {
            snapshot.state = ConnectionState::Disabled;
            snapshot.connections.clear();
        });
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
                let is_wanted = |channel: &Channel| channel.state == ChannelState::Wanted;
                !snapshot.is_whole || snapshot.channels.iter().any(is_wanted)
            }
            ConnectionState::Connecting | ConnectionState::Reconnecting | ConnectionState::Error => true,
        })
    }

    fn is_degraded(&self) -> bool {
        match self.credentials.seen().state {
            TokenState::Anonymous | TokenState::Ok => false,
            TokenState::Degraded | TokenState::LoginFailed => true,
        }
    }

    fn describe(&self) -> Value {
        let snapshot = self.snapshot();
        let count = |state| snapshot.channels.iter().filter(|channel| channel.state == state).count();
        json!({
            "state": snapshot.state,
            "joined": count(ChannelState::Joined),
            "wanted": count(ChannelState::Wanted),
            "failed": count(ChannelState::Failed),
            "connections": snapshot.connections.len(),
            "token": snapshot.token.state,
        })
    }
}
