//! What operators do with users: look at them, say something of them, keep them out, forget them, take them back. The
//! same for the operator's HTTP and for commands.

mod list;

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Deserializer, Serialize};
use thiserror::Error;
use tokio::time::sleep;

use super::barred::{self, Bar, Mark};
use super::meet::identify;
use crate::clock::Clock;
use crate::envelope::id;
use crate::errors::{Coded, ErrorCode};
use crate::store::document::{
    EDITED_AT, LONGEST_NOTES, LONGEST_STATUS, LONGEST_TAGS, TAG_OVERHEAD, shown_time,
};
use crate::store::measured::Store;
use crate::store::{Change, Condition, Document, Fields, Name, StoreError, Write, WriteRefusal};

pub use list::{Filter, LONGEST_PAGE, Page, list};

/// For one call of the store.
const PATIENCE: Duration = Duration::from_secs(5);

/// How often somebody else may come first.
const MOST_CONFLICTS: u32 = 5;

/// By then every instance has heard that somebody is forgotten, and a write that was under way has ended.
const HEARD_BY_ALL: Duration = Duration::from_secs(3);
/// How often a document that comes back is deleted.
const MOST_RETURNS: u32 = 5;

/// The platform that an id without one belongs to.
const USUAL_PROVIDER: &str = "twitch";
/// Digits of a platform's id of a user.
const LONGEST_ID: usize = 20;

/// Key of a user's document: `twitch:<id>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UserKey(Arc<str>);

impl UserKey {
    fn user(&self) -> Name {
        Name::user(Arc::clone(&self.0))
    }

    fn barred(&self) -> Name {
        barred::name(Arc::clone(&self.0))
    }
}

impl fmt::Display for UserKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for UserKey {
    type Err = UserError;

    /// `twitch:123`, or the id alone.
    fn from_str(text: &str) -> Result<Self, UserError> {
        let id = text.strip_prefix("twitch:").unwrap_or(text);
        let is_id = (1..=LONGEST_ID).contains(&id.len()) && id.bytes().all(|byte| byte.is_ascii_digit());
        if is_id { Ok(Self(id::user_key(USUAL_PROVIDER, id).into())) } else { Err(UserError::NoKey) }
    }
}

/// Why an operation was not done.
#[derive(Debug, Error)]
pub enum UserError {
    /// Not the name of a user.
    #[error(
        "a user is named by the platform's id, as twitch:12345 or 12345: a login can change hands; `inlet user list --login NAME` finds the id"
    )]
    NoKey,
    /// What was to be written is not fit.
    #[error("{0}")]
    Unfit(String),
    /// The labels would be too long.
    #[error("the labels of {0} would be longer than {LONGEST_TAGS} bytes")]
    TooManyTags(UserKey),
    /// There is no document.
    #[error("nothing is known of {0}")]
    Unknown(UserKey),
    /// The user is not kept out in that way.
    #[error("{0} is not {kind}", kind = .1.as_str())]
    NotBarred(UserKey, Bar),
    /// The user is not to be known.
    #[error("{0} is forgotten, and nothing can be said of them; `inlet user unforget {0}` takes them back")]
    Forgotten(UserKey),
    /// Somebody else always came first.
    #[error("{0} is being changed by somebody else; try again")]
    Contended(UserKey),
    /// The document came back again and again.
    #[error(
        "the document of {0} is made again and again, by a service that does not know they are forgotten; stop that, then do this again"
    )]
    Returned(UserKey),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Coded for UserError {
    fn code(&self) -> ErrorCode {
        match self {
            Self::NoKey | Self::Unfit(_) => ErrorCode::BadRequest,
            Self::Unknown(_) | Self::NotBarred(..) => ErrorCode::NotFound,
            Self::TooManyTags(_) | Self::Forgotten(_) | Self::Contended(_) | Self::Returned(_) => {
                ErrorCode::Conflict
            }
            Self::Store(error) if error.is_transient() => ErrorCode::StoreUnavailable,
            Self::Store(_) => ErrorCode::StoreRefused,
        }
    }
}

/// What a store has of a user.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct UserView {
    /// Key of the documents.
    pub key: String,
    /// Why they are not taken in, where they are not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub barred: Option<BarredView>,
    /// The document, as it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub document: Option<Fields>,
}

/// That a user is not taken in.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq)]
pub struct BarredView {
    /// `ignored` or `forgotten`.
    pub kind: String,
    /// Since when.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub at: Option<Timestamp>,
}

impl UserView {
    fn new(key: &str, document: Option<Document>, barred: Option<&Document>) -> Self {
        let barred = barred.and_then(|document| {
            let kind = Mark::read(&document.fields).bar?.as_str().to_owned();
            Some(BarredView { kind, at: barred::read_at(&document.fields) })
        });
        Self { key: key.to_owned(), barred, document: document.map(|document| document.fields) }
    }
}

/// What is to be said of a user. What is left out stays as it is.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Edit {
    /// Notes; `null` or empty removes them.
    #[serde(default, deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    pub notes: Option<String>,
    /// A word on how they stand; `null` or empty removes it.
    #[serde(default, deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    pub status: Option<String>,
    /// All labels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tags: Option<Vec<String>>,
    /// Labels to add.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub add_tags: Vec<String>,
    /// Labels to take away.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub remove_tags: Vec<String>,
}

/// `null` is a text without letters; what is left out is none.
fn given<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    Option::<String>::deserialize(deserializer).map(|text| Some(text.unwrap_or_default()))
}

impl Edit {
    /// Whether it can be written at all.
    pub fn check(&self) -> Result<(), UserError> {
        let unfit = |what: String| Err(UserError::Unfit(what));
        let texts = [("notes", &self.notes, LONGEST_NOTES), ("status", &self.status, LONGEST_STATUS)];
        for (name, text, longest) in texts {
            let text = text.as_deref().unwrap_or_default();
            if text.len() > longest {
                return unfit(format!("{name}: longer than {longest} bytes"));
            }
            if text.contains(char::is_control) {
                return unfit(format!("{name}: holds control characters"));
            }
        }
        let tags = self.tags.iter().flatten().chain(&self.add_tags).chain(&self.remove_tags);
        for tag in tags {
            if tag.is_empty() || tag.contains(char::is_control) {
                return unfit("tags: one is empty, or holds control characters".to_owned());
            }
        }
        let added = self.tags.iter().flatten().chain(&self.add_tags);
        if bytes_of(added) > LONGEST_TAGS {
            return unfit(format!("tags: all together longer than {LONGEST_TAGS} bytes"));
        }
        let is_nothing = self.notes.is_none()
            && self.status.is_none()
            && self.tags.is_none()
            && self.add_tags.is_empty()
            && self.remove_tags.is_empty();
        if is_nothing {
            return unfit("nothing to change: give notes, status, tags, addTags or removeTags".to_owned());
        }
        Ok(())
    }

    /// The operator's fields as they will be; no other is named. `None`: with what is stored, it is too much.
    fn fields(&self, now: Timestamp, stored: Option<&Fields>) -> Option<Fields> {
        let mut fields = Fields::new();
        for (name, text) in [("notes", &self.notes), ("status", &self.status)] {
            if let Some(text) = text {
                let text = Some(text.as_str()).filter(|text| !text.is_empty());
                fields.insert(name.to_owned(), text.into());
            }
        }
        if self.tags.is_some() || !self.add_tags.is_empty() || !self.remove_tags.is_empty() {
            let stored = stored.and_then(|fields| fields.get("tags")?.as_array());
            let stored = stored.into_iter().flatten().filter_map(|tag| tag.as_str().map(str::to_owned));
            let mut tags: Vec<_> = self.tags.clone().unwrap_or_else(|| stored.collect());
            tags.extend(self.add_tags.iter().cloned());
            tags.retain(|tag| !self.remove_tags.contains(tag));
            tags.sort_unstable();
            tags.dedup();
            if bytes_of(tags.iter()) > LONGEST_TAGS {
                return None;
            }
            fields.insert("tags".to_owned(), tags.into());
        }
        fields.insert(EDITED_AT.to_owned(), shown_time(now));
        Some(fields)
    }
}

fn bytes_of<'a>(tags: impl Iterator<Item = &'a String>) -> usize {
    tags.map(|tag| tag.len() + TAG_OVERHEAD).sum()
}

/// What became of a user who was to be forgotten.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Forgotten {
    /// Key of the documents.
    pub key: String,
    /// Since when they are not to be known.
    pub at: Timestamp,
    /// Whether there was a document.
    pub had_document: bool,
}

/// Everything a store has of a user.
pub async fn show(store: &Store, key: &UserKey) -> Result<UserView, UserError> {
    let (document, barred) = read(store, key).await?;
    let view = UserView::new(&key.0, document, barred.as_ref());
    if view.document.is_none() && view.barred.is_none() {
        return Err(UserError::Unknown(key.clone()));
    }
    Ok(view)
}

async fn read(store: &Store, key: &UserKey) -> Result<(Option<Document>, Option<Document>), StoreError> {
    let mut found = store.get_many(&[key.user(), key.barred()], PATIENCE).await?.into_iter();
    Ok((found.next().flatten(), found.next().flatten()))
}

/// Says something of a user, which stands in their next envelope after two seconds. Of somebody who has not been seen, a
/// document is made that waits for them.
pub async fn edit(store: &Store, clock: &Clock, key: &UserKey, edit: &Edit) -> Result<UserView, UserError> {
    edit.check()?;
    for _ in 0..MOST_CONFLICTS {
        let (document, barred) = read(store, key).await?;
        if bar_of(barred.as_ref()) == Some(Bar::Forgotten) {
            return Err(UserError::Forgotten(key.clone()));
        }
        let stored = document.as_ref().map(|document| &document.fields);
        let written = edit.fields(clock.now(), stored);
        let mut written = written.ok_or_else(|| UserError::TooManyTags(key.clone()))?;
        if document.is_none() {
            identify(&mut written, &key.0, None);
        }
        let version = document.as_ref().map(|document| document.version);
        match store.write(Write::over(key.user(), version, written.clone()), PATIENCE).await {
            Ok(version) => {
                if document.is_none() && is_forgotten(store, key).await? {
                    // By somebody else, while this made a document of them. A running service that hears of it deletes
                    // it, too.
                    let condition = Condition::At(version);
                    let delete = Write { name: key.user(), change: Change::Delete, condition };
                    return Err(match store.write(delete, PATIENCE).await {
                        Ok(_) | Err(WriteRefusal::Conflict) => UserError::Forgotten(key.clone()),
                        Err(WriteRefusal::Failed(error)) => error.into(),
                    });
                }
                let mut now = document.map(|document| document.fields).unwrap_or_default();
                now.extend(written);
                return Ok(UserView::new(&key.0, Some(Document { fields: now, version }), barred.as_ref()));
            }
            Err(WriteRefusal::Conflict) => {}
            Err(WriteRefusal::Failed(error)) => return Err(error.into()),
        }
    }
    Err(UserError::Contended(key.clone()))
}

async fn is_forgotten(store: &Store, key: &UserKey) -> Result<bool, StoreError> {
    let barred = store.get(&key.barred(), PATIENCE).await?;
    Ok(bar_of(barred.as_ref()) == Some(Bar::Forgotten))
}

fn bar_of(barred: Option<&Document>) -> Option<Bar> {
    Mark::read(&barred?.fields).bar
}

/// From here on, what this user says is not taken in. Their document stays as it is.
pub async fn ignore(store: &Store, clock: &Clock, key: &UserKey) -> Result<UserView, UserError> {
    for _ in 0..MOST_CONFLICTS {
        let (document, barred) = read(store, key).await?;
        match bar_of(barred.as_ref()) {
            Some(Bar::Ignored) => return Ok(UserView::new(&key.0, document, barred.as_ref())),
            Some(Bar::Forgotten) => return Err(UserError::Forgotten(key.clone())),
            None => {}
        }
        let version = barred.map(|barred| barred.version);
        let fields = Bar::Ignored.write(clock.now());
        match store.write(Write::over(key.barred(), version, fields.clone()), PATIENCE).await {
            Ok(version) => {
                return Ok(UserView::new(&key.0, document, Some(&Document { fields, version })));
            }
            Err(WriteRefusal::Conflict) => {}
            Err(WriteRefusal::Failed(error)) => return Err(error.into()),
        }
    }
    Err(UserError::Contended(key.clone()))
}

/// Takes an ignored user in again, as they were.
pub async fn unignore(store: &Store, key: &UserKey) -> Result<UserView, UserError> {
    // Who had come back before they were ignored is still no older than that.
    let as_before = |mark: Mark| match mark.returned_at {
        Some(at) => Change::Set(Mark::write_returned(at)),
        None => Change::Delete,
    };
    let_in(store, key, Bar::Ignored, as_before).await
}

/// Takes a forgotten user in again, as somebody new: what they say from a moment on by which every instance has heard.
pub async fn unforget(store: &Store, clock: &Clock, key: &UserKey) -> Result<UserView, UserError> {
    let as_new = |_| Change::Set(Mark::write_returned(clock.now() + HEARD_BY_ALL));
    let_in(store, key, Bar::Forgotten, as_new).await
}

async fn let_in(
    store: &Store,
    key: &UserKey,
    from: Bar,
    change: impl Fn(Mark) -> Change,
) -> Result<UserView, UserError> {
    for _ in 0..MOST_CONFLICTS {
        let (document, barred) = read(store, key).await?;
        let Some(barred) = barred.filter(|barred| bar_of(Some(barred)) == Some(from)) else {
            return Err(UserError::NotBarred(key.clone(), from));
        };
        let (change, condition) = (change(Mark::read(&barred.fields)), Condition::At(barred.version));
        match store.write(Write { name: key.barred(), change, condition }, PATIENCE).await {
            Ok(_) => return Ok(UserView::new(&key.0, document, None)),
            Err(WriteRefusal::Conflict) => {}
            Err(WriteRefusal::Failed(error)) => return Err(error.into()),
        }
    }
    Err(UserError::Contended(key.clone()))
}

/// Forgets a user: their document is deleted, none is made again, and what they say is not taken in.
///
/// First it is written that they are forgotten, then the document is deleted. An instance that has not heard of it yet
/// may make one meanwhile; it will hear within two seconds, and delete it. This waits for that, looks, and deletes it
/// itself if it is there.
pub async fn forget(store: &Store, clock: &Clock, key: &UserKey) -> Result<Forgotten, UserError> {
    let (document, barred) = read(store, key).await?;
    let before = barred.filter(|barred| bar_of(Some(barred)) == Some(Bar::Forgotten));
    let at = if let Some(at) = before.and_then(|barred| barred::read_at(&barred.fields)) {
        at
    } else {
        let at = clock.now();
        write(store, Write::set(key.barred(), Bar::Forgotten.write(at))).await?;
        at
    };
    let delete = || Write { name: key.user(), change: Change::Delete, condition: Condition::Always };
    write(store, delete()).await?;
    for _ in 0..MOST_RETURNS {
        sleep(HEARD_BY_ALL).await;
        if store.get(&key.user(), PATIENCE).await?.is_none() {
            return Ok(Forgotten { key: key.to_string(), at, had_document: document.is_some() });
        }
        write(store, delete()).await?;
    }
    Err(UserError::Returned(key.clone()))
}

async fn write(store: &Store, write: Write) -> Result<(), StoreError> {
    match store.write(write, PATIENCE).await {
        Ok(_) => Ok(()),
        Err(WriteRefusal::Failed(error)) => Err(error),
        // Without a condition there is none.
        Err(WriteRefusal::Conflict) => Err(StoreError::GaveUp("it was written at the same time".to_owned())),
    }
}
