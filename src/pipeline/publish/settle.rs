//! What became of an event: in the stream, or not now, or never.

use std::sync::Arc;

use tokio::time::Instant;

use super::{Publish, largest_message};
use crate::bus::{Ack, Message, Refusal, TransientCause};
use crate::envelope::deadletter::{Original, halved};
use crate::envelope::{DeadLetter, DeadLetterReason, Outcome};
use crate::errors::ErrorCode;
use crate::pipeline::enrich::dead_letter_message;
use crate::pipeline::window;

impl Publish {
    pub(super) async fn settle(&mut self, number: u64, outcome: Result<Ack, Refusal>) {
        let (number, is_letter) = window::place(number);
        if self.window.get(number).is_none_or(|slot| slot.is_buried != is_letter) {
            // A late answer of an earlier attempt.
            return;
        }
        match outcome {
            Ok(ack) => self.acknowledge(number, ack),
            Err(Refusal::Transient(cause)) => self.window.mark_failed(number, cause),
            Err(refusal) => self.refused(number, refusal).await,
        }
    }

    pub(super) fn acknowledge(&mut self, number: u64, ack: Ack) {
        let Some(slot) = self.window.get(number) else {
            return;
        };
        let (taken_in, origin, dead_letter) =
            (slot.event.taken_in, slot.event.origin, slot.event.dead_letter);
        let (slip, row) = (slot.event.slip.take(), slot.event.row);
        match (&self.users, &slot.event.user, dead_letter) {
            (Some(users), Some(key), None) => users.acked(key, slot.event.message.id.event, ack.position),
            (Some(users), Some(key), Some(_)) => users.dead_lettered(key, slot.event.message.id.event),
            (None, _, _) | (_, None, _) => {}
        }
        let Some(since_sent) = self.window.mark_done(number) else {
            return;
        };
        let metrics = &self.metrics;
        metrics.publish_duration.observe(since_sent.as_secs_f64());
        metrics.ingest_to_ack.observe(taken_in.elapsed().as_secs_f64());
        let outcome = match dead_letter {
            // A dead letter, too: what was there before is the work of an earlier run.
            _ if ack.duplicate => Outcome::Duplicate,
            Some(_) => Outcome::DeadLettered,
            None => Outcome::Published,
        };
        match (outcome, dead_letter) {
            (Outcome::DeadLettered, Some(reason)) => metrics.dead_lettered.of(origin, reason).inc(),
            (Outcome::Published, _) => metrics.published.of(origin).inc(),
            _ => metrics.publish_duplicates.inc(),
        }
        metrics.pending.dec();
        if let Some(slip) = slip {
            slip.settle(outcome);
        }
        // That is progress, whatever was answered.
        self.unacked_since = Some(Instant::now());
        self.left_outbox(row);
    }

    fn left_outbox(&mut self, row: Option<u64>) {
        if let (Some(outbox), Some(row)) = (&mut self.outbox, row) {
            outbox.settled(row);
        }
    }

    /// A refusal that will not pass, or that has been given its chances, makes a dead letter of the event.
    async fn refused(&mut self, number: u64, refusal: Refusal) {
        let max_attempts = self.config.max_attempts;
        let Some(slot) = self.window.get(number) else {
            return;
        };
        let reason = match refusal {
            Refusal::TooLarge => DeadLetterReason::TooLarge,
            Refusal::BadSubject => DeadLetterReason::BadSubject,
            Refusal::Other(_) | Refusal::Transient(_) => {
                slot.attempts += 1;
                if slot.attempts < max_attempts {
                    return self.window.mark_failed(number, TransientCause::Unavailable);
                }
                DeadLetterReason::Refused
            }
        };
        let (id, is_unknown) = (slot.event.message.id, slot.is_unknown);
        if slot.event.dead_letter.is_some() {
            return self.letter_refused(number, refusal).await;
        }
        // An event that is known to be in the stream is never a dead letter.
        if let (Some(users), Some(key)) = (&self.users, &slot.event.user)
            && let Some(position) = users.position_of(key, id.event)
        {
            return self.acknowledge(number, Ack { position, duplicate: true });
        }
        if is_unknown && let Some(slot) = self.window.get(number) {
            // It may be there all the same. If it is not, it is refused once more.
            slot.looks_back_since = Some(Instant::now());
            return self.window.mark_failed(number, TransientCause::Unavailable);
        }
        self.bury(number, reason, refusal).await;
    }

    /// Puts a dead letter in the event's place and sends it.
    async fn bury(&mut self, number: u64, reason: DeadLetterReason, refusal: Refusal) {
        let (largest, now, subject) =
            (largest_message(&*self.bus), self.clock.now(), self.subjects.dead_letters());
        let Some(slot) = self.window.get(number) else {
            return;
        };
        let original = &slot.event.message;
        let error_code = reason.code();
        tracing::error!(%error_code, event_id = %original.id.event, error = %refusal, "the event becomes a dead letter");
        let letter = DeadLetter {
            reason,
            message: &refusal.to_string(),
            at: now,
            original_subject: &original.subject,
            attempts: slot.attempts.max(1),
            original: Original::Envelope(original.payload.clone()),
        };
        let message: Arc<Message> =
            Arc::new(dead_letter_message(&letter, original.id.event, subject, largest));
        slot.event.message = message;
        slot.event.dead_letter = Some(reason);
        (slot.is_buried, slot.attempts) = (true, 0);
        let is_writing = self.outbox.as_ref().is_some_and(|outbox| outbox.is_writing(number));
        if slot.event.row.is_some() || is_writing {
            // What lies on disk must not be sent as an event again after a crash, so it is changed there first.
            self.window.mark_held(number);
            self.buried.push(number);
        } else {
            self.send_letter(number).await;
        }
    }

    /// Sends a dead letter.
    pub(super) async fn send_letter(&mut self, number: u64) {
        if let Some(slot) = self.window.get(number) {
            let letter = slot.numbered(number);
            self.window.mark_sent(number, Instant::now());
            self.send(vec![letter]).await;
        }
    }

    /// A dead letter that is too large is cut further: the bus may take less than it last said.
    async fn letter_refused(&mut self, number: u64, refusal: Refusal) {
        let Some(slot) = self.window.get(number) else {
            return;
        };
        let letter = &slot.event.message;
        let shorter = Some(&letter.payload).filter(|_| refusal == Refusal::TooLarge).and_then(halved);
        match shorter {
            Some(payload) => {
                slot.event.message = Arc::new(Message { payload, ..Message::clone(letter) });
                self.send_letter(number).await;
            }
            None => self.give_up(number, refusal),
        }
    }

    /// Not even the dead letter is taken.
    fn give_up(&mut self, number: u64, refusal: Refusal) {
        let Some(slot) = self.window.get(number) else {
            return;
        };
        let (id, origin, row) = (slot.event.message.id, slot.event.origin, slot.event.row);
        // Its slip goes with it, unsettled: whoever waits for it hears that it was lost.
        slot.event.slip = None;
        if let (Some(users), Some(key)) = (&self.users, &slot.event.user) {
            users.dead_lettered(key, id.event);
        }
        self.window.mark_done(number);
        tracing::error!(error_code = %ErrorCode::Undeliverable, event_id = %id.event, error = %refusal, "the bus does not take the dead letter; the event is lost");
        self.metrics.dead_lettered.of(origin, DeadLetterReason::Undeliverable).inc();
        self.metrics.pending.dec();
        self.left_outbox(row);
    }
}
