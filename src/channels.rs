//! Channels that operators add and remove while the service runs: a document each, `channels/{room id}`, with the login
//! it was last seen under, so that a channel that is renamed is followed.
//!
//! Which room a login belongs to is known when Twitch has answered its JOIN. Until then the document is
//! `channels/login:{login}`; any instance that hears the answer moves it. What changes is heard by a listener:
//! instances that share a store agree. The channels that `TWITCH_CHANNELS` names are wanted besides, and cannot be
//! removed; of them there is a document too, once they are seen, so that a renamed one is found at the next start.

mod book;
mod follow;
mod record;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use thiserror::Error;

use crate::clock::Clock;
use crate::errors::{Coded, ErrorCode};
use crate::source::twitch::{RoomId, is_login};
use crate::store::measured::Store;
use crate::store::{Change, Collection, Condition, Document, Fields, Name, StoreError, Write, WriteRefusal};
use record::{Key, Record};

pub use follow::Follow;

/// Channels that may be added.
pub const MOST_CHANNELS: usize = 1_000;

/// Documents that are read at a time: those, what is known of fixed ones, and what is left of removed ones.
const MOST_DOCUMENTS: usize = 4 * MOST_CHANNELS;

/// For one call of the store, on behalf of somebody who waits.
const PATIENCE: Duration = Duration::from_secs(5);

/// Tries while others write the same documents.
const TRIES: usize = 5;

/// Why a channel was not added or removed.
#[derive(Debug, Error)]
pub enum ChannelError {
    /// It cannot be a channel.
    #[error("{0:?} is no login of Twitch: 1 to 25 letters, digits or underscores")]
    BadLogin(String),
    /// Nobody added it.
    #[error("there is no channel {0}")]
    Unknown(String),
    /// A setting names it.
    #[error("{0} is in TWITCH_CHANNELS: it cannot be removed while the service runs, only there")]
    Fixed(String),
    /// There are as many as may be.
    #[error("there are {MOST_CHANNELS} channels already; remove one first")]
    TooMany,
    /// Others went on changing the same channel.
    #[error("the channel is being changed by somebody else; try again")]
    Contended,
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Coded for ChannelError {
    fn code(&self) -> ErrorCode {
        match self {
            Self::BadLogin(_) => ErrorCode::BadRequest,
            Self::Unknown(_) => ErrorCode::NotFound,
            Self::Fixed(_) | Self::TooMany | Self::Contended => ErrorCode::Conflict,
            Self::Store(error) if error.is_transient() => ErrorCode::StoreUnavailable,
            Self::Store(_) => ErrorCode::StoreRefused,
        }
    }
}

/// A channel as operators see it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Channel {
    /// The login it was last seen under.
    pub login: String,
    /// Its room, once Twitch said so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub room_id: Option<String>,
    /// Whether `TWITCH_CHANNELS` names it.
    #[serde(default)]
    pub fixed: bool,
    /// The login it had before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub former_login: Option<String>,
    /// When it was added.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub added_at: Option<Timestamp>,
    /// When Twitch last said that the room has this login, to the day.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_seen_at: Option<Timestamp>,
}

/// What came of adding a channel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Added {
    /// It is new.
    New(Channel),
    /// It was there already.
    Known(Channel),
}

/// Where operators add and remove channels. Cheap to clone.
#[derive(Clone)]
pub struct Channels {
    store: Store,
    fixed: Arc<[String]>,
    clock: Clock,
}

impl Channels {
    /// Of this store, beside those that `TWITCH_CHANNELS` names.
    pub fn new(store: Store, fixed: &[String], clock: Clock) -> Self {
        Self { store, fixed: fixed.into(), clock }
    }

    /// A login as Twitch writes it, of what a person typed.
    pub fn login(typed: &str) -> Result<String, ChannelError> {
        let text = typed.trim();
        let plain = text.strip_prefix('#').unwrap_or(text).to_ascii_lowercase();
        // What is repeated of it is short.
        if is_login(&plain) {
            Ok(plain)
        } else {
            Err(ChannelError::BadLogin(typed.chars().take(40).collect()))
        }
    }

    /// Adds a channel by its login. One that is there is left as it is.
    pub async fn add(&self, login: &str) -> Result<Added, ChannelError> {
        let login = Self::login(login)?;
        for _ in 0..TRIES {
            let found = self.found().await?;
            let records = read(&found);
            if let Some(channel) = self.shown(&records).remove(&login) {
                return Ok(Added::Known(channel));
            }
            if records.iter().filter(|record| record.is_wanted()).count() >= MOST_CHANNELS {
                return Err(ChannelError::TooMany);
            }
            let now = self.clock.now();
            // What was removed lately may still lie there, and so may what cannot be read. Whatever room had the login
            // last, the one that has it now is meant.
            let key = Key::Login(login.clone()).name();
            let before = found.iter().find(|(name, _)| *name == key).map(|(_, document)| document.version);
            let fields =
                fields([("login", json!(login)), ("addedAt", json!(now)), ("removedAt", Value::Null)]);
            let write = Write::over(key, before, fields);
            if self.written(vec![write]).await? {
                let (room_id, former_login, last_seen_at) = (None, None, None);
                let channel =
                    Channel { login, room_id, fixed: false, former_login, added_at: Some(now), last_seen_at };
                return Ok(Added::New(channel));
            }
        }
        Err(ChannelError::Contended)
    }

    /// Removes a channel that was added.
    pub async fn remove(&self, login: &str) -> Result<Channel, ChannelError> {
        let login = Self::login(login)?;
        let mut removed = None;
        // The rooms that were meant: one that is renamed meanwhile is to go all the same.
        let mut rooms = None;
        for _ in 0..TRIES {
            let records = read(&self.found().await?);
            let channel = self.shown(&records).remove(&login);
            if channel.as_ref().is_some_and(|channel| channel.fixed) {
                return Err(ChannelError::Fixed(login));
            }
            let rooms = rooms.get_or_insert_with(|| record::wanted_rooms(&records, &login));
            let writes = record::removals(&records, (&login, &*rooms), self.clock.now());
            if writes.is_empty() {
                return removed.ok_or(ChannelError::Unknown(login));
            }
            removed = removed.or(channel);
            self.written(writes).await?;
        }
        Err(ChannelError::Contended)
    }

    /// All channels, by login.
    pub async fn list(&self) -> Result<Vec<Channel>, ChannelError> {
        Ok(self.shown(&read(&self.found().await?)).into_values().collect())
    }

    fn shown(&self, records: &[Record]) -> BTreeMap<String, Channel> {
        let mut shown = BTreeMap::new();
        for record in records.iter().filter(|record| record.is_wanted()) {
            let channel = record.shown(false);
            // One that is being moved is there twice: what knows more counts.
            let known = shown.entry(record.login.clone()).or_insert_with(|| channel.clone());
            if channel.room_id.is_some() {
                *known = channel;
            }
        }
        for login in &*self.fixed {
            let record = record::configured_as(records, login);
            let fixed = record.map_or_else(|| Channel::fixed(login), |record| record.shown(true));
            shown.insert(fixed.login.clone(), fixed);
        }
        shown
    }

    async fn found(&self) -> Result<Vec<(Name, Document)>, StoreError> {
        self.store.list(Collection::Channels, None, MOST_DOCUMENTS, PATIENCE).await
    }

    /// Whether all of it was written; not, where somebody else was faster.
    async fn written(&self, writes: Vec<Write>) -> Result<bool, StoreError> {
        let mut is_written = true;
        for outcome in self.store.write_many(writes, PATIENCE).await? {
            match outcome {
                Ok(_) => {}
                Err(WriteRefusal::Conflict) => is_written = false,
                Err(WriteRefusal::Failed(error)) => return Err(error),
            }
        }
        Ok(is_written)
    }
}

fn read(found: &[(Name, Document)]) -> Vec<Record> {
    found.iter().filter_map(|(name, document)| Record::read(&name.id, document)).collect()
}

impl Channel {
    fn fixed(login: &str) -> Self {
        Self {
            login: login.to_owned(),
            room_id: None,
            fixed: true,
            former_login: None,
            added_at: None,
            last_seen_at: None,
        }
    }
}

fn fields<const N: usize>(pairs: [(&str, Value); N]) -> Fields {
    pairs.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

#[cfg(test)]
mod tests;
