//! One user in memory.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use uuid::Uuid;

use super::{Stream, Visit};
use crate::store::Version;
use crate::store::document::{History, Profile, User};
use crate::users::fold::{Folded, Seen, fold};

/// What the store is known to say.
#[derive(Debug, Default)]
pub(super) enum Base {
    /// Not read, or out of date.
    #[default]
    Unknown,
    /// There is no document.
    Absent,
    /// The document as last read or written.
    Known(Box<Known>),
}

#[derive(Debug)]
pub(super) struct Known {
    pub(super) user: User,
    pub(super) version: Version,
}

/// An event that the projection brought.
#[derive(Debug, Clone, Copy)]
pub(super) struct Noted {
    pub(super) seen: Seen,
    /// Which of the streams followed in this run.
    pub(super) stream: usize,
    pub(super) position: u64,
}

/// An event of this instance that the projection has not brought.
#[derive(Debug, Clone, Copy)]
pub(super) struct InFlight {
    pub(super) seen: Seen,
    /// Where the stream says it is.
    pub(super) acked: Option<u64>,
    /// It is on disk, and gets into the stream whatever happens.
    pub(super) is_stored: bool,
}

/// So many pending events are looked through without a thought.
const FEW: usize = 8;

#[derive(Debug, Default)]
#[expect(clippy::struct_excessive_bools, reason = "each says something else, and users in memory are many")]
pub(super) struct Entry {
    pub(super) base: Base,
    /// The base with everything pending folded over it; `None`: to be folded when needed.
    pub(super) head: Option<Box<History>>,
    pub(super) noted: Vec<Noted>,
    pub(super) in_flight: VecDeque<InFlight>,
    /// What the platform said last, until it is written.
    pub(super) profile: Option<Box<Profile>>,
    pub(super) first_noted_at: Timestamp,
    pub(super) last_noted_at: Timestamp,
    /// An event of this instance is among those not written: others may leave the writing to it.
    pub(super) is_own: bool,
    pub(super) is_recent: bool,
    pub(super) is_being_written: bool,
    /// The store does not take the document.
    pub(super) is_refused: bool,
    /// That it refuses to write what is counted.
    pub(super) refused: Option<Box<Refused>>,
}

/// Refusals of a document in a row.
#[derive(Debug)]
pub(super) struct Refused {
    pub(super) times: u32,
    /// When the first one was.
    pub(super) since: Timestamp,
}

impl Entry {
    /// Whether the entry may not be evicted.
    pub(super) fn is_needed(&self) -> bool {
        !self.noted.is_empty() || !self.in_flight.is_empty() || self.is_being_written
    }

    /// Notes that this instance takes part in the user's events.
    pub(super) fn own(&mut self, visit: &Visit<'_>) {
        self.is_own = true;
        match &mut self.profile {
            Some(profile) if visit.is_of(profile) => {}
            profile => *profile = Some(Box::new(visit.profile())),
        }
    }

    /// Whether this very event is pending.
    pub(super) fn is_pending(&self, seen: &Seen) -> bool {
        let in_flight = self.in_flight.iter().rev().map(|event| &event.seen);
        let noted = self.noted.iter().rev().map(|event| &event.seen);
        let is_it = |other: &Seen| other.id == seen.id;
        if self.in_flight.len() + self.noted.len() < FEW {
            return in_flight.chain(noted).any(is_it);
        }
        // Events come about in order, and live ones later than all that is pending. One that is missed for being out of
        // order is pending twice for a moment: only what is noted counts.
        let is_not_before = |other: &&Seen| other.at >= seen.at;
        in_flight.take_while(is_not_before).any(is_it) || noted.take_while(is_not_before).any(is_it)
    }

    /// Whether another event is neither acknowledged, nor on disk, nor given up.
    pub(super) fn has_under_way(&self, but: Uuid) -> bool {
        let is_under_way =
            |event: &InFlight| event.acked.is_none() && !event.is_stored && event.seen.id != but;
        self.in_flight.iter().any(is_under_way)
    }

    /// Up to where the document counts a stream; `None` where that is not known.
    pub(super) fn applied_to(&self, stream: &Arc<str>) -> Option<u64> {
        match &self.base {
            Base::Unknown => None,
            Base::Absent => Some(0),
            Base::Known(known) => {
                let is_it = |name: &Arc<str>| Arc::ptr_eq(name, stream) || name == stream;
                let applied = known.user.applied.iter().find(|(name, _)| is_it(name));
                Some(applied.map_or(0, |(_, position)| *position))
            }
        }
    }

    /// Takes events out of those in flight; what was folded over them has to be folded again.
    pub(super) fn take_in_flight(&mut self, is_taken: impl Fn(&InFlight) -> bool) {
        let before = self.in_flight.len();
        self.in_flight.retain(|event| !is_taken(event));
        if self.in_flight.len() < before {
            self.head = None;
        }
        self.give_back_room();
    }

    /// Most users are silent most of the time, and an empty queue keeps its room.
    pub(super) fn give_back_room(&mut self) {
        if self.in_flight.is_empty() {
            self.in_flight = VecDeque::new();
        }
    }

    /// Drops what the document counts already.
    pub(super) fn drop_covered(&mut self, streams: &[Stream], present: usize) {
        let applied: Vec<_> =
            streams.iter().map(|stream| self.applied_to(&stream.identity).unwrap_or(0)).collect();
        let mut noted = std::mem::take(&mut self.noted);
        noted.retain(|event| event.position > applied[event.stream]);
        let mut in_flight = std::mem::take(&mut self.in_flight);
        if let Some(applied) = applied.get(present) {
            in_flight.retain(|event| event.acked.is_none_or(|position| position > *applied));
        }
        noted.shrink_to_fit();
        (self.noted, self.in_flight) = (noted, in_flight);
    }

    /// Folds an event over everything that comes before it. The flag says whether it was pending already.
    pub(super) fn fold_over_head(
        &mut self,
        key: &Arc<str>,
        seen: &Seen,
        gap: Duration,
    ) -> (History, Folded, bool) {
        let is_known = self.is_pending(seen);
        let head = if is_known {
            self.fold_pending(key, gap, Some(seen.id))
        } else {
            let head = match self.head.take() {
                Some(head) => head,
                None => Box::new(self.fold_pending(key, gap, None)),
            };
            let history = (*head).clone();
            self.head = Some(head);
            history
        };
        let (history, folded) = fold(key, self.as_first(head, seen.id), seen, gap);
        (history, folded, is_known)
    }

    /// The base with what is pending folded over it, but for one event.
    fn fold_pending(&self, key: &Arc<str>, gap: Duration, but: Option<Uuid>) -> History {
        let noted = self.noted.iter().map(|event| event.seen);
        let pending = noted.chain(self.in_flight.iter().map(|event| event.seen));
        self.fold_all(key, pending.filter(|seen| Some(seen.id) != but), gap)
    }

    /// The base with `events` folded over it.
    pub(super) fn fold_all(
        &self,
        key: &Arc<str>,
        events: impl Iterator<Item = Seen>,
        gap: Duration,
    ) -> History {
        let base = match &self.base {
            Base::Unknown | Base::Absent => History::default(),
            Base::Known(known) => known.user.history.clone(),
        };
        events.fold(base, |history, seen| fold(key, self.as_first(history, seen.id), &seen, gap).0)
    }

    /// The first event of somebody without a document is the one that creates it.
    pub(super) fn as_first(&self, mut history: History, id: Uuid) -> History {
        if matches!(self.base, Base::Absent) {
            history.first_event_id.get_or_insert(id);
        }
        history
    }
}
