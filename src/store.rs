//! Documents: what is known of users, and a few small notes of Inlet's own; and what every implementation of a
//! store promises.
//!
//! A store knows nothing of sessions or counts. It reads documents, each with the version it was read at, and
//! writes named fields of documents under a condition: so no write is blind, and whatever else stands in a
//! document stays as it is.

pub mod document;

use std::fmt;
use std::sync::Arc;

use futures_util::future::BoxFuture;
use futures_util::stream::BoxStream;
use jiff::Timestamp;
use serde_json::{Map, Value};
use thiserror::Error;

/// Fields by name. Times are RFC 3339 strings, in fields that [`document::is_time`] names. A name with a dot in it
/// (`profiles.twitch`) is a path: what stands beside it in the same map stays.
pub type Fields = Map<String, Value>;

/// A store of documents.
pub trait DocumentStore: Send + Sync {
    /// Reads documents, in the order of `names`; `None` for one that does not exist. All of them or an error: a
    /// document that could not be read is never reported as missing.
    fn get_many<'a>(&'a self, names: &'a [Name]) -> BoxFuture<'a, Result<Vec<Option<Document>>, StoreError>>;

    /// Writes documents, each on its own: outcomes come in the order of `writes`. No document may be in it twice.
    /// An error of the whole leaves unknown what was written, and so does dropping the future.
    fn write_many(
        &self,
        writes: Vec<Write>,
    ) -> BoxFuture<'_, Result<Vec<Result<Version, WriteRefusal>>, StoreError>>;

    /// Users whose `operatorUpdatedAt` is later than `since`: those that there are, then every change, until an
    /// error ends it.
    fn edits(&self, since: Timestamp) -> BoxFuture<'_, Result<Edits, StoreError>>;
}

/// What operators change, as it comes.
pub type Edits = BoxStream<'static, Result<Vec<(Name, Document)>, StoreError>>;

/// A document's name.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Name {
    /// Where it lies.
    pub collection: Collection,
    /// Its own name in there, escaped already.
    pub id: Arc<str>,
}

impl Name {
    /// A user's document; `key` as in the header `Inlet-User`.
    pub fn user(key: Arc<str>) -> Self {
        Self { collection: Collection::Users, id: key }
    }

    /// A note of Inlet's own.
    pub fn note(id: impl Into<Arc<str>>) -> Self {
        Self { collection: Collection::Inlet, id: id.into() }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.collection.as_str(), self.id)
    }
}

/// The collections.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Collection {
    /// Users.
    Users,
    /// Inlet's own notes: how far each stream is counted.
    Inlet,
}

impl Collection {
    /// Its name in every store.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Users => "users",
            Self::Inlet => "inlet",
        }
    }
}

/// Changes with every write of a document, and only ever grows, also when the document was deleted in between.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version(pub u64);

/// A document as it was read.
#[derive(Debug, Clone, PartialEq)]
pub struct Document {
    /// What stands in it.
    pub fields: Fields,
    /// The version that says so.
    pub version: Version,
}

/// A document to write.
#[derive(Debug, Clone)]
pub struct Write {
    /// Which.
    pub name: Name,
    /// The fields to set; no other is touched.
    pub fields: Fields,
    /// When to.
    pub condition: Condition,
}

/// What must be so for a write to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Condition {
    /// There is no such document.
    Absent,
    /// It is as it was read.
    At(Version),
    /// None: an operator's edit, which names the operator's fields alone.
    Always,
}

/// Why one document was not written.
#[derive(Debug, Error)]
pub enum WriteRefusal {
    /// The condition does not hold: somebody else wrote it. Read it again.
    #[error("the document was changed by somebody else")]
    Conflict,
    /// Something else.
    #[error(transparent)]
    Failed(StoreError),
}

/// Why a store did not do what it was asked.
#[derive(Debug, Error)]
pub enum StoreError {
    /// Not reachable, overloaded, or it did not answer in time: it will pass.
    #[error("the store is away: {0}")]
    Away(String),
    /// It answers, and refuses: a permission, a missing database, a document too large. `code` is the store's.
    #[error("the store refuses with {code}: {message}")]
    Refused {
        /// The store's code, as text.
        code: &'static str,
        /// What it says.
        message: String,
    },
}

impl StoreError {
    /// Whether trying again can help without anybody changing anything.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Away(_) => true,
            Self::Refused { .. } => false,
        }
    }
}
