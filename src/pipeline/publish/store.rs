//! What goes into the outbox, and when; and what lies in it at a start.

use tokio::time::Instant;

use super::Publish;
use crate::bus::BusState;
use crate::envelope::{DeadLetterReason, Origin, Outcome};
use crate::errors::ErrorCode;
use crate::pipeline::KnownIds;
use crate::pipeline::enrich::Enriched;
use crate::pipeline::outbox::batch::{Batch, Stored};
use crate::pipeline::outbox::{Outbox, OutboxError};

impl Publish {
    /// The same with an outbox. What lies in it from earlier runs is pending from here on: `known` at the door, in flight
    /// under its users, and sent before everything else.
    pub async fn with_outbox(mut self, mut outbox: Outbox, known: &KnownIds) -> Result<Self, OutboxError> {
        let mut count = 0;
        loop {
            let recovered = outbox.next_recovered().await?;
            if recovered.is_empty() {
                break;
            }
            if let Some(users) = &self.users {
                for (event, _) in &recovered {
                    users.recovered(&event.message);
                }
            }
            known.learn(&recovered.iter().map(|(event, at)| (event.message.id, *at)).collect::<Vec<_>>());
            self.metrics.pending.add(i64::try_from(recovered.len()).unwrap_or(i64::MAX));
            count += recovered.len();
        }
        if count > 0 {
            tracing::info!(events = count, "events of an earlier run lie in the outbox; they are sent first");
        }
        self.outbox = Some(outbox);
        Ok(self)
    }

    /// Whether the bus takes nothing now, as far as is known.
    fn is_bus_away(&self) -> bool {
        self.is_bus_gone || *self.bus_state.borrow() != BusState::Up || self.silence.is_heard()
    }

    /// Whether what comes now goes into the outbox anyway.
    pub(super) fn is_behind_disk(&self) -> bool {
        !self.may_send() || self.is_bus_away()
    }

    /// When the next event has to be on disk.
    fn due_at(&self) -> Option<Instant> {
        let outbox = self.outbox.as_ref()?;
        let sent = self.window.unstored().next().map(|(_, slot)| slot.event.finished);
        let oldest = sent.or_else(|| self.waiting.front().map(|event| event.finished))?;
        let is_now = self.is_closing && self.is_bus_away() || self.waiting.len() >= self.config.max_in_flight;
        Some(if is_now { oldest } else { oldest + outbox.patience(self.is_behind_disk()) })
    }

    /// When there is something to do about the outbox.
    pub(super) fn stores_at(&self) -> Option<Instant> {
        self.outbox.as_ref()?.wakes_at(self.due_at())
    }

    /// Begins a commit, if one is due: of what is under way, and when all that is on disk, of what waits behind it.
    pub(super) async fn store_what_is_due(&mut self) {
        self.send_letters_of_memory().await;
        let is_due = self.due_at().is_some_and(|due_at| due_at <= Instant::now());
        let Some(outbox) = self.outbox.as_mut().filter(|outbox| outbox.may_write()) else { return };
        let mut filling = outbox.fill(self.is_closing);
        let mut batch = Batch::default();
        if is_due {
            for (number, slot) in self.window.unstored() {
                if !filling.push(&slot.event) {
                    break;
                }
                batch.sent.push(number);
            }
            if self.window.unstored().next().is_none() {
                while self.waiting.front().is_some_and(|event| filling.push(event)) {
                    batch.unsent.extend(self.waiting.pop_front());
                }
            }
        }
        outbox.note_room(is_due && filling.is_empty());
        let mut replace = Vec::new();
        for number in self.buried.drain(..) {
            if let Some(slot) = self.window.get(number)
                && let Some(row) = slot.event.row
            {
                batch.buried.push(number);
                replace.push((row, copy(&slot.event)));
            }
        }
        outbox.write(filling, batch, replace);
    }

    /// Dead letters whose events did not get to the disk after all need not wait for it, nor any for a disk that goes on
    /// failing: everything else waits for them.
    async fn send_letters_of_memory(&mut self) {
        let Some(outbox) = self.outbox.as_ref().filter(|_| !self.buried.is_empty()) else { return };
        let window = &mut self.window;
        let is_given_up = outbox.is_given_up();
        let is_of_disk = |number: &u64| {
            let has_row = window.get(*number).is_none_or(|slot| slot.event.row.is_some());
            outbox.is_writing(*number) || has_row && !is_given_up
        };
        let (of_disk, of_memory): (Vec<_>, Vec<_>) = self.buried.drain(..).partition(is_of_disk);
        self.buried = of_disk;
        if is_given_up && !of_memory.is_empty() {
            let events = of_memory.len();
            tracing::warn!(error_code = %ErrorCode::OutboxUnwritable, events, "the disk goes on failing: dead letters are sent unwritten, and after a crash their events may be sent too");
        }
        for number in of_memory {
            self.send_letter(number).await;
        }
    }

    /// Acts on what the outbox did.
    pub(super) async fn stored(&mut self, stored: Stored) {
        match stored {
            Stored::Written(batch, row) => {
                self.written(&batch.sent, batch.unsent, row);
                for number in batch.buried {
                    self.send_letter(number).await;
                }
            }
            Stored::Failed(batch) => {
                for event in batch.unsent.into_iter().rev() {
                    self.waiting.push_front(event);
                }
                self.buried.extend(batch.buried);
            }
            Stored::Read(events) => self.ready.extend(events),
            Stored::Torn(events) => {
                // They exist in the log alone.
                let lost = DeadLetterReason::Undeliverable;
                self.metrics.dead_lettered.of(Origin::Twitch, lost).inc_by(events);
                self.metrics.pending.sub(i64::try_from(events).unwrap_or(i64::MAX));
            }
            Stored::Nothing => {}
        }
    }

    /// These are on disk now.
    fn written(&mut self, sent: &[u64], mut unsent: Vec<Enriched>, row: u64) {
        let Some(outbox) = &mut self.outbox else { return };
        let users = self.users.as_ref();
        for number in sent {
            match self.window.get(*number) {
                Some(slot) => is_stored(&mut slot.event, row, users),
                // Settled while it was written.
                None => outbox.settled(row),
            }
        }
        for event in &mut unsent {
            is_stored(event, row, users);
        }
        // What is at hand and next need not be read back.
        let is_next = !outbox.has_unread_before(row) && self.ready.len() < self.config.max_in_flight;
        if !sent.is_empty() || is_next && !unsent.is_empty() {
            self.ready.extend(unsent);
            outbox.skip_to(row);
        }
    }

    /// Whether nothing is left to do: everything is settled, or safe in the outbox and cannot be sent now.
    pub(super) fn is_done(&self, is_open: bool) -> bool {
        let is_idle = self.outbox.as_ref().is_none_or(Outbox::is_idle);
        let is_safe = is_idle
            && self.waiting.is_empty()
            && self.buried.is_empty()
            && self.window.unstored().next().is_none();
        let is_settled = self.window.is_empty() && self.waiting.is_empty() && is_idle && self.may_send();
        match &self.outbox {
            None if self.is_bus_gone => true,
            _ if is_open && !self.is_bus_gone => false,
            Some(outbox) => {
                is_settled || is_safe && self.is_bus_away() || self.is_bus_gone && !outbox.is_well()
            }
            None => is_settled,
        }
    }
}

fn is_stored(event: &mut Enriched, row: u64, users: Option<&crate::users::Users>) {
    event.row = Some(row);
    // Whoever waits for it can go: it gets into the stream by itself.
    if let Some(slip) = event.slip.take() {
        slip.settle(Outcome::Stored);
    }
    if let (Some(users), Some(key)) = (users, &event.user) {
        users.stored(key, event.message.id.event);
    }
}

/// An event's dead letter, to be written in its place.
fn copy(event: &Enriched) -> Enriched {
    Enriched {
        message: std::sync::Arc::clone(&event.message),
        user: event.user.clone(),
        slip: None,
        ..*event
    }
}
