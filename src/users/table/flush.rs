//! What is to be written of the table, and what became of it.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;

use super::entry::{Base, Known, Noted, Refused};
use super::{Stream, Table};
use crate::store::Version;
use crate::store::document::{Profile, User};
use crate::users::fold::Kind;

/// Refusals of a document in a row, and for how long, until what it does not count is given up.
const MOST_REFUSALS: u32 = 8;
const LONGEST_REFUSED: Duration = Duration::from_mins(10);

/// Streams of one name whose positions stay in a document: more than there are instances with a stream of their own beside one
/// store.
const STREAMS_OF_A_NAME: usize = 64;

/// A user's new state on its way to the store.
pub(in crate::users) struct Flushing {
    pub(in crate::users) key: Arc<str>,
    /// `None`: the document does not exist.
    pub(in crate::users) version: Option<Version>,
    pub(in crate::users) user: User,
    pub(in crate::users) profile: Option<Profile>,
    sessions_before: u64,
    /// Events that it counts.
    events: usize,
}

/// What a write changed.
pub(in crate::users) struct Counted {
    /// It created the document.
    pub(in crate::users) is_new: bool,
    /// Sessions that nobody had written before.
    pub(in crate::users) sessions: u64,
}

impl Table {
    /// Users to be written now: quiet for `idle`, or waiting for `longest`; those of whom only others' events were seen
    /// after twice that time. In the order of how long they wait.
    pub(in crate::users) fn due(
        &mut self,
        now: Timestamp,
        idle: Duration,
        longest: Duration,
    ) -> Vec<Arc<str>> {
        let mut due = Vec::new();
        for key in &self.dirty {
            let Some(entry) = self.entries.get_mut(key) else { continue };
            // A clock that was set back must not keep anybody waiting.
            entry.first_noted_at = entry.first_noted_at.min(now);
            entry.last_noted_at = entry.last_noted_at.min(now);
            let factor = if entry.is_own { 1 } else { 2 };
            let is_due = since(entry.last_noted_at, now) >= idle * factor
                || since(entry.first_noted_at, now) >= longest * factor;
            if is_due && !entry.is_being_written {
                due.push((entry.first_noted_at, Arc::clone(key)));
            }
        }
        due.sort_unstable();
        due.into_iter().map(|(_, key)| key).collect()
    }

    /// What to write of a user; `None` if nothing is, or the user has to be read first.
    pub(in crate::users) fn flush(&mut self, key: &Arc<str>) -> Option<Flushing> {
        let gap = self.gap;
        let entry = self.entries.get_mut(key).filter(|entry| !entry.noted.is_empty())?;
        let (mut user, version) = match &entry.base {
            Base::Unknown => return None,
            Base::Absent => (User::default(), None),
            Base::Known(known) => (known.user.clone(), Some(known.version)),
        };
        let sessions_before = user.history.session_count;
        user.history = entry.fold_all(key, entry.noted.iter().map(|noted| noted.seen), gap);
        user.message_count += entry.noted.iter().filter(|noted| counts(noted)).count() as u64;
        for stream in self.streams.iter().filter(|stream| stream.position > 0) {
            if let Some((_, applied)) = user.applied.iter_mut().find(|(name, _)| *name == stream.identity) {
                *applied = stream.position.max(*applied);
            } else {
                // Nearly always the only one.
                user.applied.reserve_exact(1);
                user.applied.push((Arc::clone(&stream.identity), stream.position));
            }
        }
        drop_old(&mut user.applied, &self.streams);
        entry.is_being_written = true;
        let profile = entry.profile.as_deref().cloned();
        let events = entry.noted.len();
        Some(Flushing { key: Arc::clone(key), version, user, profile, sessions_before, events })
    }

    /// It was written.
    pub(in crate::users) fn flushed(&mut self, flushing: Flushing, version: Version) -> Counted {
        let Flushing { key, version: before, user, profile, sessions_before, events } = flushing;
        let sessions = user.history.session_count - sessions_before.min(user.history.session_count);
        let counted = Counted { is_new: before.is_none(), sessions };
        let Some(entry) = self.entries.get_mut(&key) else { return counted };
        entry.is_being_written = false;
        entry.refused = None;
        if entry.profile.as_deref() == profile.as_ref() {
            entry.profile = None;
        }
        if let Base::Known(known) = &entry.base
            && known.version > version
        {
            return counted;
        }
        // Forgotten meanwhile, so that the head was folded without them.
        let is_whole = entry.noted.len() >= events;
        let head = entry.head.take().filter(|_| is_whole && before.is_some());
        self.rebase(&key, Base::Known(Box::new(Known { user, version })));
        if let Some(entry) = self.entries.get_mut(&key) {
            // The same events folded over the same base, a part of them earlier. With nothing pending, the base says it.
            entry.head = head.filter(|_| entry.is_needed());
            entry.is_own = !entry.in_flight.is_empty();
        }
        counted
    }

    /// It was not written, or nobody knows: the document is read again before the next attempt.
    pub(in crate::users) fn not_flushed(&mut self, key: &Arc<str>) {
        if let Some(entry) = self.entries.get_mut(key) {
            entry.is_being_written = false;
        }
        self.forget_base(key);
    }

    /// The store refuses the document as it is. After so many refusals in a row what is noted of the user is given up, or
    /// one document would hold back what is counted of everybody; how many messages that are.
    pub(in crate::users) fn refused(&mut self, key: &Arc<str>, now: Timestamp) -> usize {
        self.postpone(key, now);
        let Some(entry) = self.entries.get_mut(key) else { return 0 };
        let refused = entry.refused.get_or_insert_with(|| Box::new(Refused { times: 0, since: now }));
        refused.times = refused.times.saturating_add(1);
        if refused.times < MOST_REFUSALS || since(refused.since, now) < LONGEST_REFUSED {
            return 0;
        }
        let given_up = std::mem::take(&mut entry.noted);
        self.dirty.remove(key);
        self.noted -= given_up.len();
        given_up.iter().filter(|noted| counts(noted)).count()
    }

    /// The store did not take it, for a reason of this document alone: tried again when a user is usually written.
    pub(in crate::users) fn postpone(&mut self, key: &Arc<str>, now: Timestamp) {
        self.not_flushed(key);
        if let Some(entry) = self.entries.get_mut(key) {
            (entry.first_noted_at, entry.last_noted_at) = (now, now);
        }
    }
}

/// Every stream that is made anew leaves its position in every document; an earlier one of the same name can be followed no
/// longer. Others of the name may be followed elsewhere: each instance's embedded stream is called the same.
fn drop_old(applied: &mut Vec<(Arc<str>, u64)>, followed: &[Stream]) {
    if applied.len() <= STREAMS_OF_A_NAME {
        return;
    }
    let all: Vec<_> = applied.iter().map(|(stream, _)| Arc::clone(stream)).collect();
    applied.retain(|(stream, _)| {
        let (name, created) = name_and_creation(stream);
        let is_newer = |other: &&Arc<str>| {
            let (other_name, other_created) = name_and_creation(other);
            other_name == name && other_created > created
        };
        all.iter().filter(is_newer).count() < STREAMS_OF_A_NAME
            || followed.iter().any(|followed| followed.identity == *stream)
    });
}

/// Of `<name>@<created>`.
fn name_and_creation(stream: &str) -> (&str, Option<u64>) {
    stream.rsplit_once('@').map_or((stream, None), |(name, created)| (name, created.parse().ok()))
}

fn counts(noted: &Noted) -> bool {
    noted.seen.kind == Kind::Message
}

fn since(then: Timestamp, now: Timestamp) -> Duration {
    Duration::try_from(now.duration_since(then)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::envelope::id::event_id;
    use crate::store::{Document, Fields};
    use crate::users::fold::Seen;

    fn table() -> Table {
        let mut table = Table::new(Duration::from_mins(1), 100, 1_000);
        table.begin("S@9", 0);
        table
    }

    fn note(table: &mut Table, key: &Arc<str>, position: u64) {
        let seen =
            Seen { id: event_id(&position.to_string()), kind: Kind::Message, at: Timestamp::UNIX_EPOCH };
        table.note(key, seen, position, Timestamp::UNIX_EPOCH);
        table.followed_to(position);
    }

    fn counted_to(table: &Table) -> u64 {
        table.counted_to().map_or(0, |(_, position)| position)
    }

    #[test]
    fn a_document_that_is_refused_for_good_holds_nobody_back_for_ever() {
        let (mut table, key, other) = (table(), Arc::from("twitch:1"), Arc::from("twitch:2"));
        note(&mut table, &key, 1);
        note(&mut table, &key, 2);
        let now = Timestamp::UNIX_EPOCH + LONGEST_REFUSED;
        // Neither often in no time, as at the end of a run, nor seldom.
        for round in 0..MOST_REFUSALS * 2 {
            table.loaded(&key, None);
            assert!(table.flush(&key).is_some());
            assert_eq!((table.refused(&key, Timestamp::UNIX_EPOCH), counted_to(&table)), (0, 0), "{round}");
        }
        assert_eq!(table.refused(&key, now), 2);
        assert_eq!((counted_to(&table), table.noted(), table.dirty()), (2, 0, 0));
        // Who was refused so often is not waited for again, and is counted as soon as the document can be written.
        note(&mut table, &other, 3);
        note(&mut table, &key, 4);
        assert_eq!((table.refused(&key, now), counted_to(&table)), (1, 2));
        note(&mut table, &key, 5);
        table.loaded(&key, None);
        let flushing = table.flush(&key).unwrap();
        assert_eq!((flushing.user.message_count, &*flushing.user.applied), (1, &[("S@9".into(), 5)][..]));
        table.flushed(flushing, Version(1));
        note(&mut table, &key, 6);
        assert_eq!(table.refused(&key, now), 0);
    }

    #[test]
    fn of_the_streams_of_a_name_the_newest_stay_and_those_that_are_followed() {
        let (mut table, key) = (table(), Arc::from("twitch:1"));
        let streams = (10..100).map(|n| format!("S@{n}")).chain(["T@1".to_owned(), "plain".to_owned()]);
        let applied: serde_json::Map<_, _> = streams.map(|stream| (stream, 7.into())).collect();
        let fields = Fields::from_iter([("applied".to_owned(), applied.into())]);
        note(&mut table, &key, 1);
        table.loaded(&key, Some(&Document { fields, version: Version(1) }));
        let flushing = table.flush(&key).unwrap();
        let mut left: Vec<_> = flushing.user.applied.iter().map(|(stream, _)| &**stream).collect();
        left.sort_unstable();
        let newest = (100 - STREAMS_OF_A_NAME..100).map(|n| format!("S@{n}"));
        let mut expected: Vec<_> = newest.chain(["S@9", "T@1", "plain"].map(str::to_owned)).collect();
        expected.sort_unstable();
        assert_eq!(left, expected);
    }
}
