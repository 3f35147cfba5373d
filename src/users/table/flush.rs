//! What is to be written of the table, and what became of it.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;

use super::Table;
use super::entry::{Base, Known, Noted};
use crate::store::Version;
use crate::store::document::{Profile, User};
use crate::users::fold::Kind;

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

    /// The store did not take it, for a reason of this document alone: tried again when a user is usually written.
    pub(in crate::users) fn postpone(&mut self, key: &Arc<str>, now: Timestamp) {
        self.not_flushed(key);
        if let Some(entry) = self.entries.get_mut(key) {
            (entry.first_noted_at, entry.last_noted_at) = (now, now);
        }
    }
}

fn counts(noted: &Noted) -> bool {
    noted.seen.kind == Kind::Message
}

fn since(then: Timestamp, now: Timestamp) -> Duration {
    Duration::try_from(now.duration_since(then)).unwrap_or_default()
}
