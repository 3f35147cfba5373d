//! A time in which a channel was not heard, as an event for the stream.

use std::time::Instant;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::normalize::PLATFORM;
use crate::clock::Clock;
use crate::envelope::draft::{Content, GapCause, GapPayload, Healed, PayloadJson, SourceRef};
use crate::envelope::{Draft, Event, EventType, Origin, Slip, id};

/// What was said in `channel` between these times may be missing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Gap {
    /// The channel's login.
    pub(super) channel: String,
    /// When the last line was read on its connection.
    pub(super) from: Timestamp,
    /// When it was joined again.
    pub(super) to: Timestamp,
    /// Why.
    pub(super) cause: GapCause,
}

impl Gap {
    /// The event. An instance's gap has the same id however often it is told, with or without what was healed of it.
    pub(super) fn draft(
        &self,
        instance: &str,
        healed: Option<Healed>,
        clock: &Clock,
        slip: Slip,
    ) -> Result<Draft, serde_json::Error> {
        let Self { channel, from, to, cause } = self;
        let payload = GapPayload { channel, from: *from, to: *to, cause: *cause, healed };
        let idempotency_key = format!("gap:{instance}:{channel}:{from:.3}");
        let event = Event {
            kind: EventType::SourceGap,
            occurred_at: *to,
            source: SourceRef { platform: PLATFORM, channel: channel.clone(), channel_id: None },
            user: None,
            payload: PayloadJson::write(&payload, 256)?,
            idempotency_key,
        };
        Ok(Draft {
            origin: Origin::Gap,
            id: id::event_id(&event.idempotency_key),
            taken_in_at: clock.now(),
            taken_in: Instant::now(),
            // It may have been told before, by a run that did not live to note it.
            not_published_before: *to,
            content: Content::Event(Box::new(event)),
            slip: Some(slip),
        })
    }
}
