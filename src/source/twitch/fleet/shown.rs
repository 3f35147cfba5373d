//! What is said of the connections, in the log and in `/_debug/twitch`.

use std::time::Duration;

use super::super::connection::End;
use super::super::plan::ConnectionId;
use super::super::status::{ConnectionSeen, ConnectionState, Outlook};
use super::{Berth, Fleet, Leave};
use crate::telemetry::logs::with_causes;

impl Fleet {
    /// Says that a connection ended.
    pub(super) fn note(&self, connection: ConnectionId, end: &End, channels: usize, wait: Duration) {
        let error = with_causes(end);
        let retry_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
        let error_code = end.code();
        if matches!(end, End::LoginRefused(_)) {
            tracing::error!(error_code, error, retry_ms, "Twitch refuses the login");
        } else {
            tracing::warn!(connection, channels, error_code, error, retry_ms, "not connected to Twitch");
        }
        self.shared.status.failed(error_code, error);
    }

    /// Shows how things are.
    pub(super) fn show(&self) {
        let stands = |berth: &Berth| berth.logged_in_at.is_some();
        let state = match (self.berths.values().any(stands), self.is_login_refused, self.was_connected) {
            _ if self.plan.is_empty() && self.roster.is_whole => ConnectionState::Disabled,
            (true, ..) => ConnectionState::Connected,
            (false, true, _) => ConnectionState::Error,
            (false, false, true) => ConnectionState::Reconnecting,
            (false, false, false) => ConnectionState::Connecting,
        };
        let connections = self.berths.iter().map(|(id, berth)| {
            let state = match (berth.leave != Leave::No, stands(berth)) {
                (true, _) => "closing",
                (false, true) => "connected",
                (false, false) => "connecting",
            };
            let joined = self.plan.channels().filter(|(.., on)| *on == Some(*id)).count();
            ConnectionSeen { id: *id, state, channels: self.plan.places(*id), joined }
        });
        let connections = connections.collect();
        let (channels, roster) = (&self.plan, &self.roster);
        self.shared.status.show(Outlook { state, connections, channels, roster });
    }
}
