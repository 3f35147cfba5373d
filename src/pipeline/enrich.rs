//! Drafts become envelopes: checked, written once, ready to be sent.
//!
//! Users are not looked up yet; every envelope says so (`auth.reason`). What cannot be published is found out
//! here, before anything else is done for it.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use jiff::Timestamp;

use crate::bus::Message;
use crate::clock::Clock;
use crate::envelope::deadletter::{DEAD_LETTER_TYPE, Original};
use crate::envelope::draft::Content;
use crate::envelope::{
    DeadLetter, DeadLetterReason, Draft, EnvelopeV1, Event, MessageId, Origin, Slip, SubjectTemplate,
    UnmatchedReason,
};

/// An event whose bytes are final. Only enrichment makes one, and only such can be published.
#[derive(Debug)]
pub struct Enriched {
    pub(super) origin: Origin,
    pub(super) taken_in: Instant,
    pub(super) not_published_before: Timestamp,
    pub(super) message: Arc<Message>,
    /// Set when the message is a dead letter.
    pub(super) dead_letter: Option<DeadLetterReason>,
    pub(super) slip: Option<Slip>,
}

/// The stage.
pub struct Enrich {
    subjects: SubjectTemplate,
    clock: Clock,
}

impl Enrich {
    /// A stage that writes for these subjects.
    pub fn new(subjects: SubjectTemplate, clock: Clock) -> Self {
        Self { subjects, clock }
    }

    /// Makes a batch ready to be sent. A message larger than `largest` bytes becomes a dead letter.
    pub fn batch(&self, drafts: Vec<Draft>, largest: usize) -> Vec<Enriched> {
        let now = self.clock.now();
        drafts
            .into_iter()
            .map(|mut draft| Enriched { slip: draft.slip.take(), ..self.one(&draft, largest, now) })
            .collect()
    }

    fn one(&self, draft: &Draft, largest: usize, now: Timestamp) -> Enriched {
        match &draft.content {
            Content::Event(event) => self.envelope(draft, event, largest, now),
            Content::Unusable { reason, message, original } => {
                let subject = self.subjects.of("twitch", "", "");
                let original = Original::Raw(original.clone());
                let letter = DeadLetter {
                    reason: *reason,
                    message,
                    at: now,
                    original_subject: &subject,
                    attempts: 0,
                    original,
                };
                self.dead_letter(draft, &letter, largest)
            }
        }
    }

    fn envelope(&self, draft: &Draft, event: &Event, largest: usize, now: Timestamp) -> Enriched {
        let envelope = EnvelopeV1::unmatched(draft, event, UnmatchedReason::Disabled, now);
        let subject = self.subjects.of(event.source.platform, event.kind.as_str(), &event.source.channel);
        let payload = match envelope.to_json() {
            Ok(bytes) => Bytes::from(bytes),
            Err(error) => {
                let letter = DeadLetter {
                    reason: DeadLetterReason::NotNormalizable,
                    message: &error.to_string(),
                    at: now,
                    original_subject: &subject,
                    attempts: 0,
                    original: Original::Raw(Bytes::new()),
                };
                return self.dead_letter(draft, &letter, largest);
            }
        };
        let message = Message {
            subject,
            id: MessageId::of_event(draft.id),
            kind: event.kind.as_str(),
            by_user: None,
            payload,
        };
        let size = message.payload.len() + message.headers_size();
        if size > largest {
            let letter = DeadLetter {
                reason: DeadLetterReason::TooLarge,
                message: &format!("{size} bytes, the bus takes {largest}"),
                at: now,
                original_subject: &message.subject,
                attempts: 0,
                original: Original::Envelope(message.payload.clone()),
            };
            return self.dead_letter(draft, &letter, largest);
        }
        Enriched {
            origin: draft.origin,
            taken_in: draft.taken_in,
            not_published_before: draft.not_published_before,
            message: Arc::new(message),
            dead_letter: None,
            slip: None,
        }
    }

    fn dead_letter(&self, draft: &Draft, letter: &DeadLetter<'_>, largest: usize) -> Enriched {
        Enriched {
            origin: draft.origin,
            taken_in: draft.taken_in,
            not_published_before: draft.not_published_before,
            message: Arc::new(dead_letter_message(letter, draft.id, self.subjects.dead_letters(), largest)),
            dead_letter: Some(letter.reason),
            slip: None,
        }
    }
}

/// A dead letter as a message that fits into `largest` bytes.
pub(super) fn dead_letter_message(
    letter: &DeadLetter<'_>,
    event: uuid::Uuid,
    subject: Arc<str>,
    largest: usize,
) -> Message {
    let mut message = Message {
        subject,
        id: MessageId::of_dead_letter(event),
        kind: DEAD_LETTER_TYPE,
        by_user: None,
        payload: Bytes::new(),
    };
    let room = largest.saturating_sub(message.headers_size());
    match letter.to_json(room) {
        Ok(payload) => message.payload = payload,
        Err(error) => tracing::error!(%event, error = %error, "a dead letter could not be written"),
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::tests_support::{draft, unusable};
    use serde_json::Value;

    fn enrich(drafts: Vec<Draft>, largest: usize) -> Vec<Enriched> {
        let clock = Clock::by_hand(Timestamp::from_millisecond(1_700_000_000_500).unwrap());
        Enrich::new(SubjectTemplate::new("t.", "chat.{channel}").unwrap(), clock).batch(drafts, largest)
    }

    #[test]
    fn an_event_becomes_its_envelope() {
        let enriched = enrich(vec![draft("twitch:1")], 1 << 20).pop().unwrap();
        assert_eq!(&*enriched.message.subject, "t.chat.somewhere");
        let envelope: Value = serde_json::from_slice(&enriched.message.payload).unwrap();
        assert_eq!(envelope["id"], enriched.message.id.to_string());
        assert_eq!(envelope["auth"]["reason"], "disabled");
        assert_eq!(envelope["auth"]["at"], "2023-11-14T22:13:20.500Z");
        assert!(enriched.dead_letter.is_none());
    }

    #[test]
    fn what_cannot_be_published_becomes_a_dead_letter_that_fits() {
        for largest in [1_200, 1_300] {
            let mut large = draft("twitch:2");
            if let Content::Event(event) = &mut large.content {
                event.source.channel = "x".repeat(5_000);
            }
            let enriched = enrich(vec![large], largest).pop().unwrap();
            assert_eq!(enriched.dead_letter, Some(DeadLetterReason::TooLarge));
            assert_eq!(&*enriched.message.subject, "t.internal.deadletter.v1");
            assert!(enriched.message.payload.len() + enriched.message.headers_size() <= largest);
        }
        let enriched = enrich(vec![unusable(b"nonsense")], 1 << 20).pop().unwrap();
        assert_eq!(enriched.dead_letter, Some(DeadLetterReason::Unparsable));
        assert!(enriched.message.id.is_dead_letter);
    }
}
