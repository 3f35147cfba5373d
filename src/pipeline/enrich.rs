//! Drafts become envelopes: they meet their users, are checked, written once, ready to be sent.
//!
//! What cannot be published is found out before it meets anybody: it becomes a dead letter and touches no user.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use jiff::Timestamp;
use tokio::sync::mpsc;

use super::intake::Door;
use crate::bus::{ByUser, Message};
use crate::clock::Clock;
use crate::envelope::deadletter::{DEAD_LETTER_TYPE, Original};
use crate::envelope::draft::{Content, User};
use crate::envelope::{
    DeadLetter, DeadLetterReason, Draft, Enrichment, EnvelopeV1, Event, EventType, MessageId, Origin, Slip,
    SubjectTemplate, UnmatchedReason,
};
use crate::errors::ErrorCode;
use crate::users::{Kind, Meeting, Met, Seen, Users, Visit};

/// An event whose bytes are final. Only enrichment makes one, and only such can be published.
#[derive(Debug)]
pub struct Enriched {
    pub(super) origin: Origin,
    pub(super) taken_in: Instant,
    /// When its bytes were. From here on it has to be acknowledged or on disk in time.
    pub(super) finished: tokio::time::Instant,
    pub(super) not_published_before: Timestamp,
    pub(super) message: Arc<Message>,
    /// Whose event it is, where it is counted.
    pub(super) user: Option<Arc<str>>,
    /// Set when the message is a dead letter.
    pub(super) dead_letter: Option<DeadLetterReason>,
    pub(super) slip: Option<Slip>,
    /// The row of the outbox that holds it.
    pub(super) row: Option<u64>,
}

/// The stage.
pub struct Enrich {
    subjects: SubjectTemplate,
    /// `None`: enrichment is off.
    users: Option<Users>,
    clock: Clock,
}

/// What an event was told of its user, if it was to meet one.
type Told = Result<Option<Met>, UnmatchedReason>;

impl Enrich {
    /// A stage that writes for these subjects.
    pub fn new(subjects: SubjectTemplate, users: Option<Users>, clock: Clock) -> Self {
        Self { subjects, users, clock }
    }

    /// Makes what passes the door ready to be sent, in order, until the door closes or nobody takes it any more. While
    /// one batch meets its users, those of the next one are read. `largest` says how large a message may be, in bytes.
    pub(super) async fn run(
        self,
        mut door: Door,
        enriched: mpsc::Sender<Vec<Enriched>>,
        largest: impl Fn() -> usize,
    ) {
        let mut next = door.next().await;
        // After the first events, not before: a door that closes without any is not waited for.
        if let (Some(users), Some(_)) = (&self.users, &next) {
            users.caught_up().await;
        }
        while let Some(drafts) = next {
            let following = async {
                let drafts = door.next().await;
                if let (Some(users), Some(drafts)) = (&self.users, &drafts) {
                    users.expect(drafts.iter().filter_map(|draft| Some(&of_user(draft)?.1.key))).await;
                }
                drafts
            };
            ((), next) = tokio::join!(self.pass_on(drafts, &enriched, &largest), following);
        }
    }

    async fn pass_on(
        &self,
        mut drafts: Vec<Draft>,
        enriched: &mpsc::Sender<Vec<Enriched>>,
        largest: &impl Fn() -> usize,
    ) {
        while !drafts.is_empty() {
            let largest = largest();
            let decided = match &self.users {
                Some(users) => self.decide(users, &drafts, largest).await,
                None => vec![Err(UnmatchedReason::Disabled); drafts.len()],
            };
            let behind = drafts.split_off(decided.len());
            let batch = self.write(std::mem::replace(&mut drafts, behind), decided, largest);
            if enriched.send(batch).await.is_err() {
                // The bus is gone; that is said where it is noticed.
                return;
            }
        }
    }

    /// What is told to drafts, from the front: to all of them, unless one has to wait for those before it.
    async fn decide(&self, users: &Users, drafts: &[Draft], largest: usize) -> Vec<Told> {
        let reason = if users.is_dry() { UnmatchedReason::DryRun } else { UnmatchedReason::NoUser };
        let mut decided: Vec<Told> = vec![Err(reason); drafts.len()];
        let (places, visits) = visits(drafts, largest);
        if visits.is_empty() {
            return decided;
        }
        let meetings = users.meet(&visits).await;
        decided.truncate(places.get(meetings.len()).copied().unwrap_or(drafts.len()));
        for (place, meeting) in places.into_iter().zip(meetings) {
            decided[place] = match meeting {
                Meeting::Met(met) => Ok(Some(met)),
                Meeting::Unmatched(reason) => Err(reason),
                Meeting::TooLarge => Ok(None),
            };
        }
        decided
    }

    /// Writes the envelopes of events that meet nobody. A message larger than `largest` bytes becomes a dead letter.
    pub fn batch(&self, drafts: Vec<Draft>, largest: usize) -> Vec<Enriched> {
        let decided = vec![Err(UnmatchedReason::Disabled); drafts.len()];
        self.write(drafts, decided, largest)
    }

    fn write(&self, drafts: Vec<Draft>, decided: Vec<Told>, largest: usize) -> Vec<Enriched> {
        let (now, finished) = (self.clock.now(), tokio::time::Instant::now());
        let pairs = drafts.into_iter().zip(decided);
        pairs
            .map(|(mut draft, told)| Enriched {
                slip: draft.slip.take(),
                finished,
                ..self.one(&draft, &told, largest, now)
            })
            .collect()
    }

    fn one(&self, draft: &Draft, told: &Told, largest: usize, now: Timestamp) -> Enriched {
        match &draft.content {
            Content::Event(event) => self.envelope(draft, event, told, (largest, now)),
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

    fn envelope(
        &self,
        draft: &Draft,
        event: &Event,
        told: &Told,
        (largest, now): (usize, Timestamp),
    ) -> Enriched {
        let by_user = self.by_user(event, told);
        let user = by_user.as_ref().map(|by_user| Arc::clone(&by_user.key));
        let is_too_large = matches!(told, Ok(None));
        let enriched = match told {
            Ok(met) => Ok(met.as_ref().map(enrichment).unwrap_or_default()),
            Err(reason) => Err(*reason),
        };
        let envelope = EnvelopeV1::new(draft, event, enriched, now);
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
                return Enriched { user, ..self.dead_letter(draft, &letter, largest) };
            }
        };
        let id = MessageId::of_event(draft.id);
        let message = Message { subject, id, kind: event.kind.as_str().into(), by_user, payload };
        let size = message.payload.len() + message.headers_size();
        if size > largest || is_too_large {
            let letter = DeadLetter {
                reason: DeadLetterReason::TooLarge,
                message: &format!("{size} bytes before what is known of its user, the bus takes {largest}"),
                at: now,
                original_subject: &message.subject,
                attempts: 0,
                original: Original::Envelope(message.payload.clone()),
            };
            // It may be in flight under its user: that ends with the dead letter.
            return Enriched { user, ..self.dead_letter(draft, &letter, largest) };
        }
        Enriched {
            origin: draft.origin,
            taken_in: draft.taken_in,
            finished: draft.taken_in.into(),
            not_published_before: draft.not_published_before,
            message: Arc::new(message),
            user,
            dead_letter: None,
            slip: None,
            row: None,
        }
    }

    /// Whose event it is to be counted as.
    fn by_user(&self, event: &Event, told: &Told) -> Option<ByUser> {
        let is_counted = self.users.as_ref().is_some_and(|users| !users.is_dry());
        let user =
            event.user.as_ref().filter(|_| is_counted && !matches!(told, Err(UnmatchedReason::NoUser)))?;
        Some(ByUser { key: Arc::clone(&user.key), occurred_at: event.occurred_at })
    }

    fn dead_letter(&self, draft: &Draft, letter: &DeadLetter<'_>, largest: usize) -> Enriched {
        tracing::debug!(event_id = %draft.id, error_code = %letter.reason.code(), "the event is a dead letter");
        Enriched {
            origin: draft.origin,
            taken_in: draft.taken_in,
            finished: draft.taken_in.into(),
            not_published_before: draft.not_published_before,
            message: Arc::new(dead_letter_message(letter, draft.id, self.subjects.dead_letters(), largest)),
            user: None,
            dead_letter: Some(letter.reason),
            slip: None,
            row: None,
        }
    }
}

/// The events among drafts that have a user, and where they stand.
fn visits(drafts: &[Draft], largest: usize) -> (Vec<usize>, Vec<Visit<'_>>) {
    let visits = drafts.iter().enumerate().filter_map(|(place, draft)| {
        let (event, user, kind) = of_user(draft)?;
        let key = Arc::clone(&user.key);
        let seen = Seen { id: draft.id, kind, at: event.occurred_at };
        let room = room(draft, event, user, largest);
        Some((place, Visit { key, seen, room, user }))
    });
    visits.unzip()
}

/// The user of an event that concerns one.
fn of_user(draft: &Draft) -> Option<(&Event, &User, Kind)> {
    let Content::Event(event) = &draft.content else { return None };
    let kind = match event.kind {
        EventType::ChatMessage => Kind::Message,
        EventType::ChatNotice => Kind::Notice,
        EventType::ChatModeration | EventType::SourceGap | EventType::UserForgotten => return None,
    };
    Some((event, event.user.as_ref()?, kind))
}

/// By how much an event's message may grow by what operators say of its user; `None` if it is too large without.
fn room(draft: &Draft, event: &Event, user: &User, largest: usize) -> Option<usize> {
    largest.checked_sub(most_bytes(event, user, &user.key)).or_else(|| {
        // The bound is a generous one: now it is worth the writing.
        let bare = EnvelopeV1::new(draft, event, Err(UnmatchedReason::StoreUnavailable), draft.taken_in_at);
        largest.checked_sub(bare.to_json().ok()?.len() + MOST_ADDED)
    })
}

/// Headers, transient tags and a session's id, in bytes, at most.
const MOST_ADDED: usize = 1_024;

/// An upper bound of an event's message, without what operators say of the user, in bytes. A letter takes six at most.
fn most_bytes(event: &Event, user: &User, key: &str) -> usize {
    const FIXED: usize = 1_600;
    let texts = [&user.id, &user.name, &user.display_name, &event.source.channel, &event.idempotency_key];
    let texts: usize = texts.into_iter().map(String::len).sum();
    FIXED + event.payload.as_bytes().len() + 6 * texts + 4 * key.len()
}

fn enrichment(met: &Met) -> Enrichment<'_> {
    let operator = met.operator.as_deref();
    Enrichment {
        transient_tags: met.folded.tags.names().collect(),
        labels: operator.map_or(&[], |operator| &operator.tags),
        notes: operator.and_then(|operator| operator.notes.as_deref()),
        status: operator.and_then(|operator| operator.status.as_deref()),
        session_id: met.folded.session_id.as_deref(),
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
        kind: DEAD_LETTER_TYPE.into(),
        by_user: None,
        payload: Bytes::new(),
    };
    let room = largest.saturating_sub(message.headers_size());
    match letter.to_json(room) {
        Ok(payload) => message.payload = payload,
        Err(error) => {
            tracing::error!(error_code = %ErrorCode::Undeliverable, %event, error = %error, "a dead letter could not be written");
        }
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
        Enrich::new(SubjectTemplate::new("t.", "chat.{channel}").unwrap(), None, clock).batch(drafts, largest)
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
