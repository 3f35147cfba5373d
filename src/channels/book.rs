//! What is known of channels, from the store and from Twitch; what follows from it. Pure: what is to be read is handed
//! in, what is to be written comes out, and may be written by several instances at once.
//!
//! **A login becomes a room** in two writes: the room's document is made, then the login's is deleted, each on its
//! condition. Who finds the first one done does the second. A channel that is removed leaves a mark in the place of the
//! login's document; whoever sees a room that was made in spite of it, by a write that was under way, takes the room
//! away. The mark goes when no such write can be under way any more.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use serde_json::{Value, json};

use super::record::{Key, Record, configured_as};
use super::{Change, Document, Fields, Name, RoomId, Write, fields};
use crate::source::twitch::{Roster, Sight, Sights, Wanted};
use crate::store::Version;

/// Marks of removed channels stay so long: longer than a write may be under way.
const MARK_STAYS: Duration = Duration::from_mins(1);
/// `lastSeenAt` is so exact.
const SEEN_EVERY: Duration = Duration::from_hours(24);

/// The documents, and what was made of them.
pub(super) struct Book {
    documents: BTreeMap<Arc<str>, Document>,
    fixed: Arc<[String]>,
    /// Whether the rooms of fixed channels are kept in the store.
    keeps_fixed: bool,
    /// Rooms of fixed channels.
    bound: BTreeMap<String, RoomId>,
    /// Sights up to this number are older than what the room's document says.
    outdated: BTreeMap<RoomId, u64>,
    /// All documents were read.
    is_whole: bool,
}

impl Book {
    pub(super) fn new(fixed: Arc<[String]>, keeps_fixed: bool) -> Self {
        Self {
            documents: BTreeMap::new(),
            fixed,
            keeps_fixed,
            bound: BTreeMap::new(),
            outdated: BTreeMap::new(),
            is_whole: false,
        }
    }

    /// These are all the documents there are.
    pub(super) fn replace(&mut self, all: Vec<(Name, Option<Document>)>, sights: &Sights) {
        let there: BTreeSet<_> = all.iter().map(|(name, _)| Arc::clone(&name.id)).collect();
        self.documents.retain(|id, _| there.contains(id));
        self.change(all, sights);
        self.is_whole = true;
    }

    /// These documents are so now.
    pub(super) fn change(&mut self, changes: Vec<(Name, Option<Document>)>, sights: &Sights) {
        for (name, document) in changes {
            let Some(document) = document else {
                self.documents.remove(&name.id);
                continue;
            };
            let before = self.documents.get(&name.id);
            // What was just written is newer than what the listener still has to tell.
            if before.is_some_and(|before| before.version > document.version) {
                continue;
            }
            if let Some(now) = Record::read(&name.id, &document)
                && let Key::Room(room) = now.key
                && let Some(sight) = sights.rooms.get(&room)
                && is_newer(before, (&name.id, &now), sight)
            {
                self.outdated.insert(room, sight.number);
            }
            self.documents.insert(name.id, document);
        }
        let rooms: BTreeSet<_> = self.records().filter_map(|record| record.room()).collect();
        self.outdated.retain(|room, _| rooms.contains(room));
    }

    /// A write was done.
    pub(super) fn wrote(&mut self, write: &Write, version: Version, sights: &Sights) {
        let document = match &write.change {
            Change::Delete => None,
            Change::Set(fields) => {
                let before = self.documents.get(&write.name.id);
                let mut all = before.map(|before| before.fields.clone()).unwrap_or_default();
                all.extend(fields.clone());
                Some(Document { fields: all, version })
            }
        };
        self.change(vec![(write.name.clone(), document)], sights);
    }

    /// Learns which rooms the fixed channels are.
    pub(super) fn learn(&mut self, sights: &Sights) {
        let records: Vec<_> = self.records().collect();
        for login in &*self.fixed {
            let known = configured_as(&records, login);
            let is_renamed = |record: &&Record| {
                let now = record.room().and_then(|room| self.login(room, Some(record), sights));
                now.is_some_and(|now| now != *login)
            };
            // One that is called otherwise now is the one that was meant, whoever took its login since.
            let room = match known.filter(is_renamed) {
                Some(renamed) => renamed.room(),
                None => sights.room_of(login).or_else(|| known?.room()),
            };
            if let Some(room) = room {
                self.bound.insert(login.clone(), room);
            }
        }
    }

    fn records(&self) -> impl Iterator<Item = Record> {
        self.documents.iter().filter_map(|(id, document)| Record::read(id, document))
    }

    fn record(&self, room: RoomId) -> Option<Record> {
        let id = room.to_string();
        Record::read(&id, self.documents.get(id.as_str())?)
    }

    /// Makes a room's document, also over one that cannot be read.
    fn over(&self, room: RoomId, all: Fields) -> Write {
        let name = Key::Room(room).name();
        let unreadable = self.documents.get(&name.id).map(|document| document.version);
        Write::over(name, unreadable, all)
    }

    /// Documents that cannot be read.
    pub(super) fn unreadable(&self) -> BTreeMap<Arc<str>, Version> {
        let unreadable = self.documents.iter().filter(|(id, document)| Record::read(id, document).is_none());
        unreadable.map(|(id, document)| (Arc::clone(id), document.version)).collect()
    }

    /// The login that a room is known to have by Twitch's word, if that is newer than the store's.
    fn seen(&self, room: RoomId, sights: &Sights) -> Option<(String, Timestamp)> {
        let sight = sights.rooms.get(&room)?;
        let is_new = self.outdated.get(&room).is_none_or(|outdated| *outdated < sight.number);
        is_new.then(|| (sight.login.clone(), sight.at))
    }

    /// The login that a room has now.
    fn login(&self, room: RoomId, record: Option<&Record>, sights: &Sights) -> Option<String> {
        let seen = self.seen(room, sights).map(|(login, _)| login);
        seen.or_else(|| record.map(|record| record.login.clone()))
    }

    /// All channels that are wanted.
    pub(super) fn roster(&self, sights: &Sights) -> Roster {
        let mut channels = BTreeMap::new();
        for login in &*self.fixed {
            let room = self.bound.get(login).copied();
            let record = room.and_then(|room| self.record(room));
            let now = room.and_then(|room| self.login(room, record.as_ref(), sights));
            let now = now.unwrap_or_else(|| login.clone());
            let former = record.and_then(|record| record.former_login);
            let is_fixed = now == *login;
            channels.insert(now, Wanted { room, is_fixed, since: None, former });
        }
        let (of_rooms, of_logins): (Vec<_>, Vec<_>) =
            self.records().filter(Record::is_wanted).partition(|record| record.room().is_some());
        for record in of_rooms.into_iter().chain(of_logins) {
            let room = record.room();
            let login = room.and_then(|room| self.login(room, Some(&record), sights));
            let login = login.unwrap_or(record.login);
            let room = room.or_else(|| sights.room_of(&login));
            let wanted =
                Wanted { room, is_fixed: false, since: record.added_at, former: record.former_login };
            channels.entry(login).or_insert(wanted);
        }
        Roster { channels, is_whole: self.is_whole }
    }

    /// What is to be written now: of each document one thing at a time.
    pub(super) fn writes(&self, sights: &Sights, now: Timestamp) -> Vec<Write> {
        if !self.is_whole {
            return Vec::new();
        }
        let mut writes = Vec::new();
        for record in self.records() {
            match (&record.key, record.removed_at) {
                (Key::Room(room), _) => writes.extend(self.write_of_room(*room, &record, sights)),
                (Key::Login(_), None) => writes.extend(self.write_of_login(&record, sights)),
                (Key::Login(_), Some(at)) => writes.extend(self.write_of_mark(&record, at, now)),
            }
        }
        if self.keeps_fixed {
            self.writes_of_fixed(sights, &mut writes);
        }
        let mut names = BTreeSet::new();
        writes.retain(|write| names.insert(write.name.clone()));
        writes
    }

    /// A room has another login now, or was not noted as seen for long.
    fn write_of_room(&self, room: RoomId, record: &Record, sights: &Sights) -> Option<Write> {
        let (login, at) = self.seen(room, sights)?;
        if login != record.login {
            let former = json!(record.login);
            let seen = ("lastSeenAt", json!(at));
            return Some(record.set([("login", json!(login)), ("formerLogin", former), seen]));
        }
        let is_due = record.last_seen_at.is_none_or(|last| last + SEEN_EVERY <= at);
        is_due.then(|| record.set([("lastSeenAt", json!(at))]))
    }

    /// A login has answered: it becomes a room.
    fn write_of_login(&self, record: &Record, sights: &Sights) -> Option<Write> {
        let room = sights.room_of(&record.login)?;
        let (_, at) = self.seen(room, sights)?;
        let wanted = [("login", json!(record.login)), ("addedAt", json!(record.added_at))];
        Some(match self.record(room) {
            None => {
                let [login, added] = wanted;
                let all = fields([login, added, ("lastSeenAt", json!(at))]);
                self.over(room, all)
            }
            Some(there) if there.added_at.is_none() => there.set(wanted),
            Some(_) => record.delete(),
        })
    }

    /// A login was removed before it answered: a room that was made of it in spite of that goes, and then the mark.
    fn write_of_mark(&self, mark: &Record, removed_at: Timestamp, now: Timestamp) -> Option<Write> {
        let is_of_mark = |record: &Record| {
            record.room().is_some() && record.login == mark.login && record.added_at == mark.added_at
        };
        match self.records().find(is_of_mark) {
            Some(made) => Some(made.removal(now)),
            None => (removed_at + MARK_STAYS <= now).then(|| mark.delete()),
        }
    }

    /// Notes which rooms the fixed channels are.
    fn writes_of_fixed(&self, sights: &Sights, writes: &mut Vec<Write>) {
        for (login, room) in &self.bound {
            let there = self.record(*room);
            match (&there, self.seen(*room, sights)) {
                (None, Some((now, at))) => {
                    let all =
                        [("login", json!(now)), ("configuredAs", json!(login)), ("lastSeenAt", json!(at))];
                    writes.push(self.over(*room, fields(all)));
                }
                // Another instance may name it otherwise: the first one counts.
                (Some(there), _) if there.configured_as.is_none() => {
                    writes.push(there.set([("configuredAs", json!(login))]));
                }
                (Some(_) | None, _) => {}
            }
            let is_other = |record: &Record| {
                record.configured_as.as_ref() == Some(login) && record.room() != Some(*room)
            };
            writes.extend(self.records().filter(is_other).map(|record| match record.added_at {
                Some(_) => record.set([("configuredAs", Value::Null)]),
                None => record.delete(),
            }));
        }
    }
}

/// Whether a room's document says something newer than what was seen here: another instance gave it another login, or
/// made it after that.
fn is_newer(before: Option<&Document>, (id, now): (&str, &Record), sight: &Sight) -> bool {
    match before.and_then(|before| Record::read(id, before)) {
        Some(before) => before.login != now.login,
        None => now.login != sight.login && now.last_seen_at.is_some_and(|seen| seen >= sight.at),
    }
}

#[cfg(test)]
mod tests;
