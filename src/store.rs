//! Documents: what is known of users, what operators decide, and a few small notes of Inlet's own; and what every
//! implementation of a store promises.
//!
//! A store knows nothing of sessions or counts. It reads documents, each with the version it was read at, and
//! writes named fields of documents under a condition: so no write is blind, and whatever else stands in a
//! document stays as it is.

pub mod document;
pub mod embedded;
pub mod firestore;
pub mod measured;

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use futures_util::future::BoxFuture;
use futures_util::stream::BoxStream;
use jiff::Timestamp;
use serde::Serialize;
use serde_json::{Map, Value};
use thiserror::Error;

use self::embedded::{EmbeddedStore, EmbeddedStoreError};
use self::firestore::{FirestoreArgs, FirestoreConfig, FirestoreStore};
use crate::errors::{Coded, ErrorCode};
use crate::settings::{Environment, Problems};

/// Fields by name. Times are RFC 3339 strings, in fields that [`document::is_time`] names. A name with a dot in it
/// (`profiles.twitch`) is a path: what stands beside it in the same map stays.
pub type Fields = Map<String, Value>;

/// A store of documents.
pub trait DocumentStore: Send + Sync {
    /// Reads documents, in the order of `names`; `None` for one that does not exist. All of them or an error: a
    /// document that could not be read is never reported as missing. One whose bytes are damaged has
    /// [`document::damaged`] fields, so that it spoils nothing but itself.
    fn get_many<'a>(&'a self, names: &'a [Name]) -> BoxFuture<'a, Result<Vec<Option<Document>>, StoreError>>;

    /// Writes documents, each on its own: outcomes come in the order of `writes`. No document may be in it twice.
    /// An error of the whole leaves unknown what was written, and so does dropping the future; a transient
    /// [`WriteRefusal::Failed`] leaves it unknown of that document.
    fn write_many(
        &self,
        writes: Vec<Write>,
    ) -> BoxFuture<'_, Result<Vec<Result<Version, WriteRefusal>>, StoreError>>;

    /// At most `limit` documents of a collection, in the order of their ids (by bytes), those behind `after`.
    fn list(
        &self,
        collection: Collection,
        after: Option<Arc<str>>,
        limit: usize,
    ) -> BoxFuture<'_, Result<Vec<(Name, Document)>, StoreError>>;

    /// Users whose `operatorUpdatedAt` is later than `since`: those that there are, then every change, until an
    /// error ends it. Nothing that is written after this was answered is missed; a document may come again, also
    /// for another change than an operator's.
    fn edits(&self, since: Timestamp) -> BoxFuture<'_, Result<Edits, StoreError>>;

    /// A small collection as a whole: the first batch is all there is, also when there is nothing; then come changes,
    /// until an error ends it. Whoever follows again takes the first batch for the whole truth. A document may come
    /// again unchanged. Not for users.
    fn follow(&self, collection: Collection) -> BoxFuture<'_, Result<Changes, StoreError>>;
}

/// What operators change, as it comes.
pub type Edits = BoxStream<'static, Result<Vec<(Name, Document)>, StoreError>>;

/// What changes in a collection, as it comes; `None` for a document that is gone.
pub type Changes = BoxStream<'static, Result<Vec<(Name, Option<Document>)>, StoreError>>;

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
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Collection {
    /// Users.
    Users,
    /// Inlet's own notes: how far each stream is counted.
    Inlet,
    /// Channels that operators added, by room id.
    Channels,
    /// Users who are not to be known: ignored or forgotten. Ids are those of [`Collection::Users`].
    Barred,
    /// What operators did.
    Audit,
    /// One that a setting names.
    Other(Arc<str>),
}

impl Collection {
    /// Its name in every store.
    pub fn as_str(&self) -> &str {
        match self {
            Self::Users => "users",
            Self::Inlet => "inlet",
            Self::Channels => "channels",
            Self::Barred => "barred",
            Self::Audit => "audit",
            Self::Other(name) => name,
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
    /// What to do with it.
    pub change: Change,
    /// When to.
    pub condition: Condition,
}

impl Write {
    /// A write over what was read: a document at this version, or `None` where there was none.
    pub fn over(name: Name, version: Option<Version>, fields: Fields) -> Self {
        let condition = version.map_or(Condition::Absent, Condition::At);
        Self { name, change: Change::Set(fields), condition }
    }

    /// Sets these fields whatever is there.
    pub fn set(name: Name, fields: Fields) -> Self {
        Self { name, change: Change::Set(fields), condition: Condition::Always }
    }
}

/// What a write does.
#[derive(Debug, Clone)]
pub enum Change {
    /// Sets these fields; no other is touched.
    Set(Fields),
    /// Deletes the document; where there is none, and the condition does not ask for one, that is done already. The
    /// version it is answered with is of no document.
    Delete,
}

/// What must be so for a write to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Condition {
    /// There is no such document.
    Absent,
    /// It is as it was read.
    At(Version),
    /// None: for fields that nobody else writes, as an operator's.
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
#[derive(Debug, Clone, Error)]
pub enum StoreError {
    /// Not reachable, overloaded, or it did not answer in time: it will pass.
    #[error("the store is away: {0}")]
    Away(String),
    /// It answers, and gave this request up, for contention say. What it did of it shows when it is read.
    #[error("the store gave up: {0}")]
    GaveUp(String),
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
            Self::Away(_) | Self::GaveUp(_) => true,
            Self::Refused { .. } => false,
        }
    }
}

impl Coded for StoreError {
    fn code(&self) -> ErrorCode {
        if self.is_transient() { ErrorCode::StoreUnavailable } else { ErrorCode::StoreRefused }
    }
}

impl Coded for WriteRefusal {
    fn code(&self) -> ErrorCode {
        match self {
            Self::Conflict => ErrorCode::Conflict,
            Self::Failed(error) => error.code(),
        }
    }
}

/// An answer, or that there was none in time.
async fn in_time<T>(
    within: Duration,
    answer: impl Future<Output = Result<T, StoreError>>,
) -> Result<T, StoreError> {
    match tokio::time::timeout(within, answer).await {
        Ok(answer) => answer,
        Err(_) => Err(StoreError::Away("no answer in time".to_owned())),
    }
}

/// Settings of the user store.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "User store")]
pub struct StoreArgs {
    /// `firestore` or `embedded`; left out: `firestore` if a project or an emulator is set, else `embedded`
    #[arg(long, env)]
    user_store_driver: Option<String>,
    #[command(flatten)]
    firestore: FirestoreArgs,
}

/// Which store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum StoreDriver {
    /// A file in `DATA_DIR`.
    Embedded,
    /// Cloud Firestore.
    Firestore,
}

impl fmt::Display for StoreDriver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Embedded => "embedded",
            Self::Firestore => "firestore",
        })
    }
}

/// Checked settings of the user store.
#[derive(Debug, Clone, Serialize)]
pub struct StoreConfig {
    /// The driver.
    #[serde(rename = "USER_STORE_DRIVER")]
    pub driver: StoreDriver,
    /// Firestore; `None` when the driver is another.
    #[serde(flatten)]
    pub firestore: Option<FirestoreConfig>,
}

impl StoreArgs {
    /// Checks the settings.
    pub fn check(&self, environment: &Environment, problems: &mut Problems) -> Option<StoreConfig> {
        let firestore = self.firestore.check(environment, problems);
        let is_somewhere = self.firestore.is_set();
        let driver =
            problems.parse_optional(
                "USER_STORE_DRIVER",
                self.user_store_driver.as_ref(),
                |text| match text {
                    "firestore" if !is_somewhere => Err(
                        "is firestore, but neither GOOGLE_CLOUD_PROJECT nor FIRESTORE_EMULATOR_HOST is set"
                            .to_owned(),
                    ),
                    "firestore" => Ok(StoreDriver::Firestore),
                    "embedded" => Ok(StoreDriver::Embedded),
                    _ => Err(format!("{text:?} is neither firestore nor embedded")),
                },
            );
        let usual = if is_somewhere { StoreDriver::Firestore } else { StoreDriver::Embedded };
        let driver = driver?.unwrap_or(usual);
        Some(StoreConfig {
            driver,
            firestore: if driver == StoreDriver::Firestore { firestore? } else { None },
        })
    }
}

/// The store of these settings; the embedded one is in `folder`. Needs a runtime. Whether Firestore answers shows
/// at the first call, so that a start without it succeeds.
pub fn open(config: &StoreConfig, folder: &Path) -> Result<Arc<dyn DocumentStore>, EmbeddedStoreError> {
    match &config.firestore {
        Some(firestore) => Ok(Arc::new(FirestoreStore::new(firestore))),
        None => Ok(Arc::new(EmbeddedStore::open(folder)?)),
    }
}

/// Fields as a test writes them.
#[cfg(test)]
fn fields(value: Value) -> Fields {
    let Value::Object(fields) = value else { panic!("an object") };
    fields
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// Flags as a user gives them; the process's own environment does not count.
    fn check(flags: [Option<&str>; 4]) -> Result<Value, Vec<String>> {
        let [user_store_driver, project, database, emulator] = flags.map(|flag| flag.map(str::to_owned));
        let args =
            StoreArgs { user_store_driver, firestore: FirestoreArgs::new(project, database, emulator) };
        let mut problems = Problems::default();
        match args.check(&Environment::default(), &mut problems) {
            Some(config) if problems.lines().is_empty() => Ok(json!(config)),
            _ => Err(problems.lines().to_vec()),
        }
    }

    #[test]
    fn the_driver_follows_what_is_set() {
        assert_eq!(check([None; 4]), Ok(json!({ "USER_STORE_DRIVER": "embedded" })));
        assert_eq!(
            check([None, Some("p-1"), None, Some("")]),
            Ok(json!({
                "USER_STORE_DRIVER": "firestore", "GOOGLE_CLOUD_PROJECT": "p-1",
                "FIREBASE_DATABASE_ID": "(default)", "FIRESTORE_EMULATOR_HOST": null,
            }))
        );
        assert_eq!(
            check([None, None, Some("people"), Some("http://localhost:8900")]),
            Ok(json!({
                "USER_STORE_DRIVER": "firestore", "GOOGLE_CLOUD_PROJECT": "inlet-local",
                "FIREBASE_DATABASE_ID": "people", "FIRESTORE_EMULATOR_HOST": "localhost:8900",
            }))
        );
        let embedded = Ok(json!({ "USER_STORE_DRIVER": "embedded" }));
        assert_eq!(check([Some("embedded"), Some("p-1"), None, None]), embedded);
    }

    #[test]
    fn what_cannot_be_is_said() {
        let problem = |flags| check(flags).unwrap_err().join("\n");
        assert!(problem([Some("firestore"), None, None, None]).contains("neither GOOGLE_CLOUD_PROJECT nor"));
        assert!(problem([Some("mongo"), None, None, None]).starts_with("USER_STORE_DRIVER: \"mongo\" is"));
        assert!(problem([None, Some("a/b"), None, None]).starts_with("GOOGLE_CLOUD_PROJECT: "));
        assert!(problem([None, Some("a"), Some("A b"), None]).starts_with("FIREBASE_DATABASE_ID: "));
        for host in ["localhost", "http://", "localhost:port", "a/b:1", "localhost:8080/x", "ä:1", "a@b:1"] {
            assert!(
                problem([None, None, None, Some(host)]).starts_with("FIRESTORE_EMULATOR_HOST: "),
                "{host}"
            );
        }
    }
}
