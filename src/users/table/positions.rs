//! Where events stand in the stream: what publishing says of this instance's own, and what the projection brings of
//! everybody's.

use std::collections::BTreeMap;
use std::sync::Arc;

use jiff::Timestamp;
use uuid::Uuid;

use super::entry::{InFlight, Noted};
use super::{Stream, Table, place};
use crate::users::fold::{Seen, fold};

impl Table {
    /// The stream has an event of this instance at `position`.
    pub(in crate::users) fn acked(&mut self, key: &Arc<str>, id: Uuid, position: u64) {
        let Some(entry) = self.entries.get_mut(key) else { return };
        let Some(event) = entry.in_flight.iter_mut().find(|event| event.seen.id == id) else { return };
        // The projection may stand still for long; it will bring the event, which need not be remembered beside it.
        if self.noted + self.acked.len() >= self.most_pending {
            return entry.take_in_flight(|event| event.seen.id == id);
        }
        event.acked = Some(position);
        self.acked.insert(position, Arc::clone(key));
        if self.present().is_some_and(|stream| position <= stream.position) {
            self.settle_up_to(position);
        }
    }

    /// An event of this instance is on disk: it gets into the stream whatever happens.
    pub(in crate::users) fn stored(&mut self, key: &Arc<str>, id: Uuid) {
        let Some(entry) = self.entries.get_mut(key) else { return };
        // The latest are at the back, and of a busy user there may be many before them.
        if let Some(event) = entry.in_flight.iter_mut().rev().find(|event| event.seen.id == id) {
            event.is_stored = true;
        }
    }

    /// An event of an earlier run lies in the outbox: it is pending, in flight.
    pub(in crate::users) fn recovered(&mut self, key: &Arc<str>, seen: Seen) {
        let entry = self.entry(key);
        entry.is_own = true;
        if !entry.is_pending(&seen) {
            entry.in_flight.push_back(InFlight { seen, acked: None, is_stored: true });
            entry.head = None;
        }
    }

    /// The projection stands beyond what is acknowledged up to here, and did not note it: it was counted before, or the
    /// stream dropped it.
    fn settle_up_to(&mut self, position: u64) {
        while let Some(first) = self.acked.first_entry().filter(|first| *first.key() <= position) {
            let (position, key) = first.remove_entry();
            let Some(entry) = self.entries.get_mut(&key) else { continue };
            let before = entry.in_flight.len();
            entry.take_in_flight(|event| event.acked == Some(position));
            if let Some(stream) = self.streams.get(self.present).filter(|_| entry.in_flight.len() < before) {
                let is_counted = entry.applied_to(&stream.identity).is_none_or(|applied| position <= applied);
                let is_noted = entry.noted.iter().any(|noted| noted.position == position);
                let is_lost = position > stream.began_at && !is_counted && !is_noted;
                self.lost += u64::from(is_lost);
            }
        }
    }

    /// An event of this instance became a dead letter: it touches no count.
    pub(in crate::users) fn dead_lettered(&mut self, key: &Arc<str>, id: Uuid) {
        if let Some(entry) = self.entries.get_mut(key) {
            entry.take_in_flight(|event| event.seen.id == id);
        }
    }

    /// Where the present stream is known to hold an event.
    pub(in crate::users) fn position_of(&self, key: &Arc<str>, id: Uuid) -> Option<u64> {
        let noted = &self.entries.get(key)?.noted;
        let found = noted.iter().find(|noted| noted.seen.id == id && noted.stream == self.present);
        found.map(|noted| noted.position)
    }

    /// The projection brings an event.
    pub(in crate::users) fn note(&mut self, key: &Arc<str>, seen: Seen, position: u64, now: Timestamp) {
        // A follower may bring a stretch again.
        if self.present().is_none_or(|stream| position <= stream.position) {
            return;
        }
        let stream = self.present;
        self.make_room_for(key);
        let Self { entries, ring, streams, dirty, noted, acked, gap, .. } = self;
        let entry = place(entries, ring, key);
        let under_way = entry.in_flight.iter().position(|event| event.seen.id == seen.id);
        let head = entry.head.take();
        if let Some(index) = under_way {
            entry.in_flight.remove(index);
            entry.give_back_room();
            acked.remove(&position);
        }
        if entry.applied_to(&streams[stream].identity).is_some_and(|applied| position <= applied) {
            entry.head = head.filter(|_| under_way.is_none());
            return;
        }
        entry.head = match (head, under_way) {
            // The first in flight becomes the last noted: the order is the same, and so is the head.
            (head, Some(0)) => head,
            (Some(head), None) if entry.in_flight.is_empty() => {
                Some(Box::new(fold(key, entry.as_first(*head, seen.id), &seen, *gap).0))
            }
            _ => None,
        };
        entry.first_noted_at = if entry.noted.is_empty() { now } else { entry.first_noted_at };
        entry.last_noted_at = now;
        if entry.noted.is_empty() {
            dirty.insert(Arc::clone(key));
        }
        entry.noted.push(Noted { seen, stream, position });
        *noted += 1;
    }

    /// Whether the user is in memory, read or not.
    pub(in crate::users) fn holds(&self, key: &Arc<str>) -> bool {
        self.entries.contains_key(key)
    }

    /// The stream dropped this many positions before they were noted.
    pub(in crate::users) fn lose(&mut self, positions: u64) {
        self.lost += positions;
    }

    /// The projection stands here: everything up to it was noted.
    pub(in crate::users) fn followed_to(&mut self, position: u64) {
        if let Some(stream) = self.streams.get_mut(self.present) {
            stream.position = stream.position.max(position);
        }
        self.settle_up_to(position);
    }

    fn present(&self) -> Option<&Stream> {
        self.streams.get(self.present)
    }

    /// The projection begins to follow a stream behind `counted_to`, for the first time or anew; one that was followed
    /// before goes on where it stood. What another stream before it acknowledged, and nobody noted, is given up; what is
    /// acknowledged up to there is counted.
    pub(in crate::users) fn begin(&mut self, identity: &str, counted_to: u64) {
        let is_another = self.present().is_some_and(|stream| *stream.identity != *identity);
        let known = self.streams.iter().position(|stream| *stream.identity == *identity);
        let identity = self.named(identity);
        self.present = known.unwrap_or_else(|| {
            let stream = Stream { identity, began_at: counted_to, position: counted_to };
            self.streams.push(stream);
            self.streams.len() - 1
        });
        let mut given_up = 0;
        for entry in self.entries.values_mut() {
            let before = entry.in_flight.len();
            entry.take_in_flight(|event| {
                event.acked.is_some_and(|position| is_another || position <= counted_to)
            });
            given_up += (before - entry.in_flight.len()) as u64;
        }
        self.acked = if is_another { BTreeMap::new() } else { self.acked.split_off(&(counted_to + 1)) };
        self.lost += if is_another { given_up } else { 0 };
    }

    /// Memory is at its end and the store away: everything noted of the present stream is forgotten, to be read again
    /// from behind `counted_to`.
    pub(in crate::users) fn go_back_to(&mut self, counted_to: u64) {
        let current = self.present;
        let Some(stream) = self.streams.get_mut(current) else { return };
        let identity = Arc::clone(&stream.identity);
        stream.position = counted_to;
        stream.began_at = stream.began_at.min(counted_to);
        let Self { entries, dirty, noted, .. } = self;
        dirty.retain(|key| {
            let Some(entry) = entries.get_mut(key) else { return false };
            let before = entry.noted.len();
            entry.noted.retain(|event| event.stream != current);
            entry.noted.shrink_to_fit();
            entry.head = None;
            *noted -= before - entry.noted.len();
            !entry.noted.is_empty()
        });
        self.begin(&identity, counted_to);
    }

    /// The projection's position in the present stream, and its identity.
    pub(in crate::users) fn position(&self) -> Option<(Arc<str>, u64)> {
        self.present().map(|stream| (Arc::clone(&stream.identity), stream.position))
    }

    /// Where the projection stands in a stream that it follows or followed.
    pub(in crate::users) fn position_in(&self, identity: &str) -> Option<u64> {
        self.streams.iter().find(|stream| *stream.identity == *identity).map(|stream| stream.position)
    }

    /// Up to where everything in the present stream is counted in every user.
    pub(in crate::users) fn counted_to(&self) -> Option<(Arc<str>, u64)> {
        let first_uncounted = |key: &Arc<str>| {
            let noted = &self.entries.get(key)?.noted;
            noted.iter().find(|noted| noted.stream == self.present).map(|noted| noted.position - 1)
        };
        let stream = self.present()?;
        let to = self.dirty.iter().filter_map(first_uncounted).min().unwrap_or(stream.position);
        Some((Arc::clone(&stream.identity), to.min(stream.position)))
    }

    /// Whether an acknowledged event has not been noted yet.
    pub(in crate::users) fn awaits_notes(&self) -> bool {
        !self.acked.is_empty()
    }
}
