//! A channel's document, as it is read and written.

use std::collections::BTreeSet;

use jiff::Timestamp;
use serde_json::{Value, json};

use super::{Change, Channel, Collection, Condition, Document, Name, RoomId, Write, fields, is_login};
use crate::store::Version;

/// In front of the login, in the name of a document whose room is not known yet.
const LOGIN: &str = "login:";

/// Which document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Key {
    /// Of a room.
    Room(RoomId),
    /// Of a login that has not answered yet.
    Login(String),
}

impl Key {
    fn read(id: &str) -> Option<Self> {
        match id.strip_prefix(LOGIN) {
            Some(login) => Some(Self::Login(login.to_owned())),
            None => id.parse().ok().map(Self::Room),
        }
    }

    pub(super) fn name(&self) -> Name {
        let id = match self {
            Self::Room(room) => room.to_string(),
            Self::Login(login) => format!("{LOGIN}{login}"),
        };
        Name { collection: Collection::Channels, id: id.into() }
    }
}

/// A document. A value of the wrong shape is none.
#[derive(Debug, Clone)]
pub(super) struct Record {
    pub(super) key: Key,
    pub(super) version: Version,
    /// The login it was last seen under.
    pub(super) login: String,
    /// When it was added, unless a setting alone names it.
    pub(super) added_at: Option<Timestamp>,
    /// When it was removed, before its room was known. It stays for a while: somebody may be moving it.
    pub(super) removed_at: Option<Timestamp>,
    pub(super) last_seen_at: Option<Timestamp>,
    pub(super) former_login: Option<String>,
    /// The login by which `TWITCH_CHANNELS` names it.
    pub(super) configured_as: Option<String>,
}

impl Record {
    /// `None`: what stands there is no channel. A login that is none never gets into a line.
    pub(super) fn read(id: &str, document: &Document) -> Option<Self> {
        let text = |name: &str| document.fields.get(name).and_then(Value::as_str);
        let login = |name: &str| text(name).filter(|login| is_login(login)).map(str::to_owned);
        let time = |name: &str| text(name)?.parse().ok();
        let key = Key::read(id)?;
        let record = Self {
            login: login("login")?,
            version: document.version,
            added_at: time("addedAt"),
            removed_at: time("removedAt"),
            last_seen_at: time("lastSeenAt"),
            former_login: login("formerLogin"),
            configured_as: login("configuredAs"),
            key,
        };
        match &record.key {
            Key::Login(login) if *login != record.login => None,
            Key::Login(_) | Key::Room(_) => Some(record),
        }
    }

    pub(super) fn room(&self) -> Option<RoomId> {
        match self.key {
            Key::Room(room) => Some(room),
            Key::Login(_) => None,
        }
    }

    /// Whether an operator wants it.
    pub(super) fn is_wanted(&self) -> bool {
        self.added_at.is_some() && self.removed_at.is_none()
    }

    /// Sets these fields, if it still is as it was read.
    pub(super) fn set<const N: usize>(&self, pairs: [(&str, Value); N]) -> Write {
        Write::over(self.key.name(), Some(self.version), fields(pairs))
    }

    /// Takes it away, if it still is as it was read.
    pub(super) fn delete(&self) -> Write {
        let condition = Condition::At(self.version);
        Write { name: self.key.name(), change: Change::Delete, condition }
    }

    /// What makes it unwanted. In the place of a login a mark stays: an instance that is just moving it must see that.
    pub(super) fn removal(&self, now: Timestamp) -> Write {
        match self.key {
            Key::Login(_) => self.set([("removedAt", now.to_string().into())]),
            Key::Room(_) if self.configured_as.is_some() => self.set([("addedAt", Value::Null)]),
            Key::Room(_) => self.delete(),
        }
    }

    pub(super) fn shown(&self, fixed: bool) -> Channel {
        Channel {
            login: self.login.clone(),
            room_id: self.room().map(|room| room.to_string()),
            fixed,
            former_login: self.former_login.clone(),
            added_at: self.added_at,
            last_seen_at: self.last_seen_at,
        }
    }
}

/// The rooms that are wanted under this login.
pub(super) fn wanted_rooms(records: &[Record], login: &str) -> BTreeSet<RoomId> {
    let of_login = records.iter().filter(|record| record.login == login && record.is_wanted());
    of_login.filter_map(Record::room).collect()
}

/// What makes a channel unwanted, under its login and in these rooms, whatever they are called now; nothing if it is not
/// wanted.
pub(super) fn removals(
    records: &[Record],
    (login, rooms): (&str, &BTreeSet<RoomId>),
    now: Timestamp,
) -> Vec<Write> {
    let is_meant =
        |record: &&Record| record.login == login || record.room().is_some_and(|room| rooms.contains(&room));
    let wanted = || records.iter().filter(is_meant).filter(|record| record.is_wanted());
    let mut writes: Vec<_> = wanted().map(|record| record.removal(now)).collect();
    let room = wanted().find(|record| record.room().is_some());
    let mark = records.iter().find(|record| record.key == Key::Login(login.to_owned()));
    // A move of it that was begun before may still be under way.
    if let Some(room) = room
        && mark.is_none_or(|mark| !mark.is_wanted())
    {
        let all =
            fields([("login", json!(login)), ("addedAt", json!(room.added_at)), ("removedAt", json!(now))]);
        writes.push(Write::over(Key::Login(login.to_owned()).name(), mark.map(|mark| mark.version), all));
    }
    writes
}

/// The room that a setting names by this login, as far as is known: of several the one that was seen last.
pub(super) fn configured_as<'a>(records: &'a [Record], login: &str) -> Option<&'a Record> {
    let of = records.iter().filter(|record| record.configured_as.as_deref() == Some(login));
    of.max_by_key(|record| record.last_seen_at)
}
