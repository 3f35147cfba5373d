//! The events that were sent and are not settled, by number.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::enrich::Enriched;
use crate::bus::{Numbered, TransientCause};

/// Set in the number that a dead letter is sent under, in the place of its event: a late answer to the event is none to
/// the letter.
const LETTER: u64 = 1 << 63;

/// The place of what was sent under this number, and whether it was a dead letter in its event's place.
pub(super) fn place(number: u64) -> (u64, bool) {
    (number & !LETTER, number & LETTER != 0)
}

/// An event on its way into the stream.
pub(super) struct Slot {
    pub(super) event: Enriched,
    state: SlotState,
    /// Refusals that were neither permanent nor transient.
    pub(super) attempts: u32,
    sent_at: Instant,
    /// An attempt ended without an answer: it may be in the stream.
    pub(super) is_unknown: bool,
    /// Before it is sent again the stream is to be read, from this time on or later.
    pub(super) looks_back_since: Option<Instant>,
    /// A dead letter took the event's place.
    pub(super) is_buried: bool,
}

impl Slot {
    /// Its message, to be sent from this place.
    pub(super) fn numbered(&self, number: u64) -> Numbered {
        let number = if self.is_buried { number | LETTER } else { number };
        Numbered { number, message: Arc::clone(&self.event.message) }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum SlotState {
    Sent,
    Failed(TransientCause),
    /// Its dead letter has to be on disk before it is sent.
    Held,
    Done,
}

/// Slots in order of sending; done ones leave at the front.
#[derive(Default)]
pub(super) struct Window {
    slots: VecDeque<Slot>,
    first_number: u64,
    sent: usize,
    failed: usize,
}

impl Window {
    /// Adds an event that is being sent; returns its number.
    pub(super) fn push(&mut self, event: Enriched, now: Instant) -> u64 {
        self.slots.push_back(Slot {
            // What lay on disk may have been sent by an earlier run.
            is_unknown: event.row.is_some(),
            looks_back_since: None,
            is_buried: false,
            event,
            state: SlotState::Sent,
            attempts: 0,
            sent_at: now,
        });
        self.sent += 1;
        self.first_number + self.slots.len() as u64 - 1
    }

    /// The unsettled event of this number. A late answer of an earlier attempt finds nothing.
    pub(super) fn get(&mut self, number: u64) -> Option<&mut Slot> {
        let index = self.index(number)?;
        self.slots.get_mut(index)
    }

    /// It was sent again just now, after the look back that it waited for, if any.
    pub(super) fn mark_sent(&mut self, number: u64, now: Instant) {
        self.mark(number, SlotState::Sent);
        if let Some(slot) = self.get(number) {
            slot.sent_at = now;
            if slot.looks_back_since.take().is_some() {
                slot.is_unknown = false;
            }
        }
    }

    /// It has to be sent again.
    pub(super) fn mark_failed(&mut self, number: u64, cause: TransientCause) {
        self.mark(number, SlotState::Failed(cause));
        if let Some(slot) = self.get(number) {
            slot.is_unknown |= cause.leaves_unknown();
        }
    }

    /// It waits for the disk.
    pub(super) fn mark_held(&mut self, number: u64) {
        self.mark(number, SlotState::Held);
    }

    /// It is settled; for how long it was under way since it was last sent.
    pub(super) fn mark_done(&mut self, number: u64) -> Option<Duration> {
        let since_sent = self.get(number)?.sent_at.elapsed();
        self.mark(number, SlotState::Done);
        while self.slots.front().is_some_and(|slot| slot.state == SlotState::Done) {
            self.slots.pop_front();
            self.first_number += 1;
        }
        Some(since_sent)
    }

    /// Everything sent before `before` and not answered has failed.
    pub(super) fn expire(&mut self, before: Instant) {
        for index in 0..self.slots.len() {
            if self.slots[index].state == SlotState::Sent && self.slots[index].sent_at <= before {
                self.mark_failed(self.first_number + index as u64, TransientCause::TimedOut);
            }
        }
    }

    /// What failed, in order, and why.
    pub(super) fn failed(&self) -> impl Iterator<Item = (u64, &Slot, TransientCause)> {
        (self.first_number..).zip(&self.slots).filter_map(|(number, slot)| match slot.state {
            SlotState::Failed(cause) => Some((number, slot, cause)),
            SlotState::Sent | SlotState::Held | SlotState::Done => None,
        })
    }

    /// What is not settled and not on disk, in order.
    pub(super) fn unstored(&self) -> impl Iterator<Item = (u64, &Slot)> {
        let numbered = (self.first_number..).zip(&self.slots);
        numbered.filter(|(_, slot)| slot.state != SlotState::Done && slot.event.row.is_none())
    }

    /// When the first of those under way was sent.
    pub(super) fn oldest_sent_at(&self) -> Option<Instant> {
        self.slots.iter().find(|slot| slot.state == SlotState::Sent).map(|slot| slot.sent_at)
    }

    /// Slots taken; done ones behind the first unsettled one included.
    pub(super) fn len(&self) -> usize {
        self.slots.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// How many are under way.
    pub(super) fn sent_count(&self) -> usize {
        self.sent
    }

    /// How many have to be sent again.
    pub(super) fn failed_count(&self) -> usize {
        self.failed
    }

    fn index(&self, number: u64) -> Option<usize> {
        let index = usize::try_from(number.checked_sub(self.first_number)?).ok()?;
        self.slots.get(index).filter(|slot| slot.state != SlotState::Done).map(|_| index)
    }

    fn mark(&mut self, number: u64, state: SlotState) {
        let Some(index) = self.index(number) else { return };
        let before = std::mem::replace(&mut self.slots[index].state, state);
        for (state, added) in [(before, false), (state, true)] {
            let count = match state {
                SlotState::Sent => &mut self.sent,
                SlotState::Failed(_) => &mut self.failed,
                SlotState::Held | SlotState::Done => continue,
            };
            *count = if added { *count + 1 } else { *count - 1 };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Clock;
    use crate::envelope::SubjectTemplate;
    use crate::pipeline::Enrich;
    use crate::pipeline::tests_support::draft;

    fn event(key: &str) -> Enriched {
        let subjects = SubjectTemplate::new("", "a").unwrap();
        Enrich::new(subjects, None, Clock::system()).batch(vec![draft(key)], 1 << 20).pop().unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn slots_leave_in_order_and_the_counts_follow() {
        let mut window = Window::default();
        let now = Instant::now();
        let numbers: Vec<_> = (0..4).map(|n| window.push(event(&n.to_string()), now)).collect();
        assert_eq!((numbers.as_slice(), window.sent_count()), (&[0, 1, 2, 3][..], 4));
        assert!(window.mark_done(1).is_some() && window.len() == 4);
        window.mark_failed(2, TransientCause::Away);
        assert_eq!((window.sent_count(), window.failed_count()), (2, 1));
        assert!(window.mark_done(0).is_some() && window.len() == 2);
        assert!(window.mark_done(0).is_none() && window.get(1).is_none() && window.get(9).is_none());
        tokio::time::advance(Duration::from_secs(6)).await;
        window.expire(Instant::now() - Duration::from_secs(5));
        let failed: Vec<_> =
            window.failed().map(|(number, slot, cause)| (number, slot.is_unknown, cause)).collect();
        assert_eq!(failed, [(2, false, TransientCause::Away), (3, true, TransientCause::TimedOut)]);
        window.mark_sent(2, Instant::now());
        assert!(window.mark_done(2).is_some() && window.mark_done(3).is_some() && window.is_empty());
        assert_eq!((window.sent_count(), window.failed_count()), (0, 0));
    }
}
