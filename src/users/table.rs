//! The users in memory. For each: the base, which is the document as last read or written, and the events that it does
//! not count yet, first those the projection has noted, in stream order, then those in flight. Folding the ones over
//! the other gives the head, which decides tags.
//!
//! Everything here is done under one lock and waits for nothing.

mod entry;
mod flush;
mod positions;
#[cfg(test)]
mod tests;

use std::collections::hash_map::Entry as MapEntry;
use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use super::fold::{Folded, Seen};
use crate::envelope::draft;
use crate::envelope::id::UserRef;
use crate::store::document::{History, Operator, Profile, User};
use crate::store::{Document, Version, document};
use entry::{Base, Entry, InFlight, Known};

pub(super) use flush::Flushing;

/// Names of streams that are kept.
const MOST_NAMES: usize = 1_000;

/// Users by key.
pub(super) struct Table {
    entries: HashMap<Arc<str>, Entry>,
    /// Keys in the order in which they are considered for eviction.
    ring: VecDeque<Arc<str>>,
    /// Users with noted events: those to be written.
    dirty: HashSet<Arc<str>>,
    /// Noted events of all users.
    noted: usize,
    /// Acknowledged events that the projection has not brought, by position.
    acked: BTreeMap<u64, Arc<str>>,
    /// Streams followed in this run.
    streams: Vec<Stream>,
    /// Which of them is followed now.
    present: usize,
    /// Names of streams in documents, each once: they stand in every user's.
    names: HashSet<Arc<str>>,
    gap: Duration,
    most_users: usize,
    most_pending: usize,
    bad_values: u64,
    lost: u64,
}

/// How far a stream has been followed.
struct Stream {
    identity: Arc<str>,
    /// Everything up to it was counted before this run began to follow.
    began_at: u64,
    /// The projection's position.
    position: u64,
}

/// What a user's own event is told.
#[derive(Debug)]
pub(super) enum Entered {
    /// It is folded; it may be published.
    Met(Met),
    /// Its user is not in memory.
    Unknown,
    /// Its first sight or its opening has to be written first.
    NeedsWrite,
    /// It opens a session, and earlier events of its user are on their way.
    MustWait,
    /// Its user's document cannot be written.
    Refused,
    /// With what the document says of the user, it would be too large.
    TooLarge,
}

/// What an event finds out about its user.
#[derive(Debug, Clone)]
pub struct Met {
    /// Tags, session.
    pub folded: Folded,
    /// What operators say.
    pub operator: Option<Arc<Operator>>,
}

/// An event that comes to meet its user.
#[derive(Debug)]
pub struct Visit<'a> {
    /// Key of the user's document.
    pub key: Arc<str>,
    /// The event.
    pub seen: Seen,
    /// By how many bytes its envelope may grow; `None`: it is too large as it is.
    pub room: Option<usize>,
    /// What the platform says of the user.
    pub user: &'a draft::User,
}

impl Visit<'_> {
    fn profile(&self) -> Profile {
        Profile {
            login: self.user.name.as_str().into(),
            display_name: self.user.display_name.as_str().into(),
            roles: self.user.roles.as_slice().into(),
        }
    }

    fn is_of(&self, profile: &Profile) -> bool {
        *profile.login == *self.user.name
            && *profile.display_name == *self.user.display_name
            && *profile.roles == *self.user.roles
    }
}

/// A first sight or an opening, to be written before its event is published.
pub(super) struct Opening {
    pub(super) key: Arc<str>,
    /// `None`: the document does not exist.
    pub(super) version: Option<Version>,
    pub(super) history: History,
    pub(super) profile: Option<Profile>,
}

impl Table {
    pub(super) fn new(gap: Duration, most_users: usize, most_pending: usize) -> Self {
        Self {
            entries: HashMap::new(),
            ring: VecDeque::new(),
            dirty: HashSet::new(),
            noted: 0,
            acked: BTreeMap::new(),
            streams: Vec::new(),
            present: 0,
            names: HashSet::new(),
            gap,
            most_users,
            most_pending,
            bad_values: 0,
            lost: 0,
        }
    }

    /// Users in memory.
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Users to be written.
    pub(super) fn dirty(&self) -> usize {
        self.dirty.len()
    }

    /// Events noted and not written.
    pub(super) fn noted(&self) -> usize {
        self.noted
    }

    /// Stored values of the wrong shape since this was last asked.
    pub(super) fn take_bad_values(&mut self) -> u64 {
        std::mem::take(&mut self.bad_values)
    }

    /// Counts given up since this was last asked.
    pub(super) fn take_lost(&mut self) -> u64 {
        std::mem::take(&mut self.lost)
    }

    /// Those of `keys` that have to be read, each once, no more than `most`. They have their places from here on, so that
    /// an edit which comes while they are read is not missed.
    pub(super) fn missing<'a>(
        &mut self,
        keys: impl Iterator<Item = &'a Arc<str>>,
        most: usize,
    ) -> Vec<Arc<str>> {
        let mut asked = HashSet::new();
        let is_missing =
            |key: &&Arc<str>| self.entries.get(*key).is_none_or(|entry| matches!(entry.base, Base::Unknown));
        let missing = keys.filter(is_missing).filter(|key| asked.insert(Arc::clone(key))).take(most);
        let missing: Vec<_> = missing.cloned().collect();
        for key in &missing {
            self.entry(key).is_recent = true;
        }
        missing
    }

    /// Takes in what was read; older than what is known is nothing new. Whatever its `applied` covers is no longer
    /// pending.
    pub(super) fn loaded(&mut self, key: &Arc<str>, document: Option<&Document>) {
        let base = match document {
            None => Base::Absent,
            Some(document) => {
                let (mut user, bad) = document::read_user(&document.fields);
                for (stream, _) in &mut user.applied {
                    *stream = self.named(stream);
                }
                if !bad.is_empty() {
                    self.bad_values += bad.len() as u64;
                    tracing::warn!(user_ref = %UserRef(key), fields = ?bad, "stored values of the wrong shape are taken for absent");
                }
                Base::Known(Box::new(Known { user, version: document.version }))
            }
        };
        let is_news = match (&self.entry(key).base, document) {
            (Base::Unknown, _) | (Base::Absent, Some(_)) => true,
            (Base::Known(known), Some(document)) => known.version < document.version,
            // Asked before it was written.
            (Base::Absent | Base::Known(_), None) => false,
        };
        if is_news {
            self.rebase(key, base);
        }
    }

    /// The stream's name, which others may have already.
    fn named(&mut self, stream: &str) -> Arc<str> {
        if let Some(name) = self.names.get(stream) {
            return Arc::clone(name);
        }
        // Somebody's documents may name any number of them.
        if self.names.len() >= MOST_NAMES {
            self.names.clear();
        }
        let name = Arc::from(stream);
        self.names.insert(Arc::clone(&name));
        name
    }

    /// An operator changed a document. Users not in memory are read when they come.
    pub(super) fn edited(&mut self, key: &Arc<str>, document: &Document) {
        if self.holds(key) {
            self.loaded(key, Some(document));
        }
    }

    /// What is known of the user may be out of date: a write had no answer, or somebody else wrote.
    pub(super) fn forget_base(&mut self, key: &Arc<str>) {
        if let Some(entry) = self.entries.get_mut(key) {
            entry.base = Base::Unknown;
            entry.head = None;
        }
    }

    /// The user is not to be known: whatever is held of them is dropped, pending or not, and never written.
    pub(super) fn bar(&mut self, key: &Arc<str>) {
        if let Some(entry) = self.entries.remove(key) {
            self.noted -= entry.noted.len();
            self.dirty.remove(key);
        }
    }

    fn rebase(&mut self, key: &Arc<str>, base: Base) {
        let Self { entries, streams, present, dirty, noted, .. } = self;
        let Some(entry) = entries.get_mut(key) else { return };
        entry.base = base;
        entry.head = None;
        entry.is_refused = false;
        let before = entry.noted.len();
        entry.drop_covered(streams, *present);
        *noted -= before - entry.noted.len();
        if entry.noted.is_empty() {
            dirty.remove(key);
        }
    }

    /// One of this instance's own events meets its user, and is in flight from here on. `is_away`: nothing can be
    /// written, so that what must be, cannot be decided.
    pub(super) fn enter(&mut self, visit: &Visit<'_>, is_away: bool) -> Entered {
        let gap = self.gap;
        let entry = self.entry(&visit.key);
        entry.is_recent = true;
        let operator = match &entry.base {
            Base::Unknown => return Entered::Unknown,
            Base::Absent => None,
            Base::Known(known) => known.user.operator.clone(),
        };
        let grows_by = operator.as_ref().map_or(0, |operator| operator.size());
        if visit.room.is_none_or(|room| grows_by > room) {
            return Entered::TooLarge;
        }
        let (history, folded, is_known) = entry.fold_over_head(&visit.key, &visit.seen, gap);
        let is_absent = matches!(entry.base, Base::Absent);
        if is_absent || folded.opens {
            return if entry.is_refused {
                Entered::Refused
            } else if !is_absent && !is_away && entry.has_under_way(visit.seen.id) {
                Entered::MustWait
            } else {
                Entered::NeedsWrite
            };
        }
        entry.own(visit);
        if !is_known {
            entry.in_flight.push_back(InFlight { seen: visit.seen, acked: None, is_stored: false });
            entry.head = Some(Box::new(history));
        }
        Entered::Met(Met { folded, operator })
    }

    /// An event flows without having met its user. It is in flight all the same, and counted later.
    pub(super) fn pass(&mut self, visit: &Visit<'_>) {
        let entry = self.entry(&visit.key);
        entry.is_recent = true;
        entry.own(visit);
        if !entry.is_pending(&visit.seen) {
            entry.in_flight.push_back(InFlight { seen: visit.seen, acked: None, is_stored: false });
            entry.head = None;
        }
    }

    /// What must be written for as many of `visits`, from the front, as can be decided now: one for each user, and no more
    /// than `most`.
    pub(super) fn openings<'a>(
        &mut self,
        visits: impl Iterator<Item = &'a Visit<'a>>,
        most: usize,
    ) -> Vec<Opening> {
        let gap = self.gap;
        let mut seen_here: HashSet<&Arc<str>> = HashSet::new();
        let mut openings = Vec::new();
        for visit in visits {
            if openings.len() == most {
                break;
            }
            // A second event of the same user is decided when the first one is.
            if !seen_here.insert(&visit.key) {
                continue;
            }
            let Some(entry) = self.entries.get_mut(&visit.key) else { continue };
            let version = match &entry.base {
                Base::Unknown => continue,
                Base::Absent => None,
                Base::Known(known) => Some(known.version),
            };
            let (history, folded, _) = entry.fold_over_head(&visit.key, &visit.seen, gap);
            let is_due = version.is_none() || folded.opens && !entry.has_under_way(visit.seen.id);
            if is_due {
                let profile = version.is_none().then(|| visit.profile());
                openings.push(Opening { key: Arc::clone(&visit.key), version, history, profile });
            }
        }
        openings
    }

    /// The opening was written.
    pub(super) fn opened(&mut self, opening: Opening, version: Version) {
        let Opening { key, version: before, history, .. } = opening;
        let Some(entry) = self.entries.get(&key) else { return };
        let mut user = match &entry.base {
            Base::Known(known) if known.version > version => return,
            Base::Known(known) => known.user.clone(),
            Base::Unknown | Base::Absent if before.is_none() => User::default(),
            // Forgotten meanwhile: what else stands in the document has to be read again.
            Base::Unknown | Base::Absent => return,
        };
        user.history = history;
        self.rebase(&key, Base::Known(Box::new(Known { user, version })));
    }

    /// The store refuses to write the document; it is not asked to again until the user is read anew.
    pub(super) fn refuse(&mut self, key: &Arc<str>) {
        if let Some(entry) = self.entries.get_mut(key) {
            entry.is_refused = true;
        }
    }

    /// An event met its user on paper alone: nothing is pending, nothing will be written.
    pub(super) fn imagine(&mut self, visit: &Visit<'_>) -> Option<Folded> {
        let gap = self.gap;
        let entry = self.entry(&visit.key);
        entry.is_recent = true;
        if matches!(entry.base, Base::Unknown) {
            return None;
        }
        let (history, folded, _) = entry.fold_over_head(&visit.key, &visit.seen, gap);
        let (mut user, version) = match std::mem::replace(&mut entry.base, Base::Unknown) {
            Base::Known(known) => (known.user, known.version),
            Base::Unknown | Base::Absent => (User::default(), Version(0)),
        };
        user.history = history;
        entry.base = Base::Known(Box::new(Known { user, version }));
        Some(folded)
    }

    fn entry(&mut self, key: &Arc<str>) -> &mut Entry {
        self.make_room_for(key);
        let Self { entries, ring, .. } = self;
        place(entries, ring, key)
    }

    /// Second chance: of those that nothing is pending of, the first that was not used since it was last looked at. There
    /// is always room for one more.
    fn make_room_for(&mut self, key: &Arc<str>) {
        if self.entries.len() < self.most_users || self.entries.contains_key(key) {
            return;
        }
        let mut looks = 64;
        while self.entries.len() >= self.most_users && looks > 0 {
            looks -= 1;
            let Some(key) = self.ring.pop_front() else { return };
            match self.entries.get_mut(&key) {
                Some(entry) if entry.is_recent || entry.is_needed() => {
                    entry.is_recent = false;
                    self.ring.push_back(key);
                }
                Some(_) => drop(self.entries.remove(&key)),
                None => {}
            }
        }
    }
}

/// The user's place, a new one if there is none.
fn place<'a>(
    entries: &'a mut HashMap<Arc<str>, Entry>,
    ring: &mut VecDeque<Arc<str>>,
    key: &Arc<str>,
) -> &'a mut Entry {
    match entries.entry(Arc::clone(key)) {
        MapEntry::Occupied(held) => held.into_mut(),
        MapEntry::Vacant(free) => {
            ring.push_back(Arc::clone(key));
            free.insert(Entry::default())
        }
    }
}
