//! Drafts for the unit tests of the spine.

use std::time::Instant;

use bytes::Bytes;
use jiff::Timestamp;

use crate::envelope::draft::{
    Content, ModerationAction, ModerationPayload, Pairs, PayloadJson, Raw, SourceRef,
};
use crate::envelope::{DeadLetterReason, Draft, Event, EventType, Origin, id};

fn with(key: &str, content: Content) -> Draft {
    let at = Timestamp::from_millisecond(1_700_000_000_000).unwrap();
    Draft {
        origin: Origin::Twitch,
        id: id::event_id(key),
        taken_in_at: at,
        taken_in: Instant::now(),
        not_published_before: at,
        content,
        slip: None,
    }
}

/// A small event with this idempotency key.
pub(super) fn draft(key: &str) -> Draft {
    let payload = ModerationPayload {
        action: ModerationAction::Clear,
        target_user_id: None,
        target_login: None,
        duration_seconds: None,
        target_message_id: None,
        raw: Raw { tags: Pairs(&[]), truncated: false },
    };
    let event = Event {
        kind: EventType::ChatModeration,
        occurred_at: Timestamp::from_millisecond(1_700_000_000_000).unwrap(),
        idempotency_key: key.to_owned(),
        source: SourceRef { platform: "twitch", channel: "somewhere".into(), channel_id: None },
        user: None,
        payload: PayloadJson::write(&payload, 64).unwrap(),
    };
    with(key, Content::Event(Box::new(event)))
}

/// Bytes that are no event.
pub(super) fn unusable(bytes: &'static [u8]) -> Draft {
    let content = Content::Unusable {
        reason: DeadLetterReason::Unparsable,
        message: "no line of IRC".to_owned(),
        original: Bytes::from_static(bytes),
    };
    with(&id::content_key("twitch", bytes), content)
}
