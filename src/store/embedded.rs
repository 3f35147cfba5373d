//! The embedded store: a file in `DATA_DIR`, for a machine without any server.
//!
//! Group commit, as in the embedded stream: what was asked while the last commit ran goes into the next one. A
//! durable commit costs the same for one document as for a thousand.

mod file;

use std::path::Path;
use std::sync::Arc;

use futures_util::future::BoxFuture;
use futures_util::{FutureExt as _, Stream, StreamExt as _, stream};
use jiff::Timestamp;
use thiserror::Error;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{broadcast, mpsc, oneshot};

use super::{
    Change, Changes, Collection, Document, DocumentStore, Edits, Fields, Name, StoreError, Version, Write,
    WriteRefusal, document,
};
use crate::data_dir;
use crate::redb_file::{self, FileError};
use crate::telemetry::logs::with_causes;
use file::{Outcome, StoreFile};

/// The file's name in `DATA_DIR`.
pub const FILE_NAME: &str = "users.redb";

/// Calls that wait for the writer; the next one waits for a place.
const WAITING_CALLS: usize = 256;

/// Documents in one commit, about: a group is closed when it has as many.
const LARGEST_COMMIT: usize = 10_000;

/// Changes that a follower may lag behind before it has to follow again.
const CHANGES_KEPT: usize = 1024;

/// Why the file cannot be used.
#[derive(Debug, Error)]
pub enum EmbeddedStoreError {
    /// The file cannot be opened, read or written; or it is of a later version of Inlet.
    #[error("the embedded store {0}")]
    File(#[from] FileError),
    /// The folder cannot be made.
    #[error("the data folder cannot be used")]
    Folder(#[source] std::io::Error),
    /// The system gives no thread.
    #[error("the embedded store's writer could not be started")]
    Writer(#[source] std::io::Error),
    /// A task that read was ended, or the writer.
    #[error("the embedded store is being closed")]
    Ended,
}

impl EmbeddedStoreError {
    /// Whether trying again can help: a full disk can be emptied.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::File(error) => error.is_transient(),
            Self::Ended => true,
            Self::Folder(_) | Self::Writer(_) => false,
        }
    }
}

impl From<&EmbeddedStoreError> for StoreError {
    fn from(error: &EmbeddedStoreError) -> Self {
        let message = with_causes(error);
        match error {
            _ if error.is_transient() => Self::Away(message),
            _ => Self::Refused { code: "UNREADABLE", message },
        }
    }
}

/// A store in a file.
pub struct EmbeddedStore {
    file: Arc<StoreFile>,
    writer: mpsc::Sender<Call>,
    changes: broadcast::Sender<Arc<Changed>>,
}

/// A document that was written, or `None` where it was deleted.
type Changed = (Name, Option<Document>);

/// Outcomes in the order of the writes, or why there are none.
type Answer = Result<Vec<Result<Version, WriteRefusal>>, StoreError>;

struct Call {
    writes: Vec<Write>,
    answer: oneshot::Sender<Answer>,
}

impl EmbeddedStore {
    /// Whether the store in `folder` could be opened, or made. Nothing is.
    pub fn look(folder: &Path) -> Result<(), EmbeddedStoreError> {
        Ok(redb_file::look(&folder.join(FILE_NAME), file::FORMAT)?)
    }

    /// Opens the store in `folder`, or makes it.
    pub fn open(folder: &Path) -> Result<Self, EmbeddedStoreError> {
        data_dir::make(folder).map_err(EmbeddedStoreError::Folder)?;
        let file = Arc::new(StoreFile::open(&folder.join(FILE_NAME))?);
        let (writer, calls) = mpsc::channel(WAITING_CALLS);
        let (changes, _) = broadcast::channel(CHANGES_KEPT);
        let thread = Writer { file: Arc::clone(&file), calls, changes: changes.clone() };
        // A thread of its own: a commit waits for the disk. It ends when the store is gone.
        std::thread::Builder::new()
            .name("store-writer".into())
            .spawn(move || thread.run())
            .map_err(EmbeddedStoreError::Writer)?;
        Ok(Self { file, writer, changes })
    }
}

impl DocumentStore for EmbeddedStore {
    fn get_many<'a>(&'a self, names: &'a [Name]) -> BoxFuture<'a, Result<Vec<Option<Document>>, StoreError>> {
        let names = names.to_vec();
        read(Arc::clone(&self.file), move |file| file.get(&names)).boxed()
    }

    fn write_many(&self, writes: Vec<Write>) -> BoxFuture<'_, Answer> {
        async move {
            let ended = || StoreError::from(&EmbeddedStoreError::Ended);
            let (answer, answered) = oneshot::channel();
            self.writer.send(Call { writes, answer }).await.map_err(|_| ended())?;
            answered.await.map_err(|_| ended())?
        }
        .boxed()
    }

    fn list(
        &self,
        collection: Collection,
        after: Option<Arc<str>>,
        limit: usize,
    ) -> BoxFuture<'_, Result<Vec<(Name, Document)>, StoreError>> {
        read(Arc::clone(&self.file), move |file| file.list(&collection, after.as_deref(), limit)).boxed()
    }

    fn edits(&self, since: Timestamp) -> BoxFuture<'_, Result<Edits, StoreError>> {
        let file = Arc::clone(&self.file);
        // Before what is stored is read, so that nothing falls between the two.
        let changes = self.changes.subscribe();
        async move {
            let stored = read(file, move |file| {
                file.find(&Collection::Users, document::EDITED_AT, |fields| is_edited_after(fields, since))
            })
            .await?;
            let wanted = move |(name, document): &Changed| {
                let document = document.as_ref().filter(|found| is_edited_after(&found.fields, since))?;
                (name.collection == Collection::Users).then(|| (name.clone(), document.clone()))
            };
            Ok(stream::once(async { Ok(stored) }).chain(following(changes, wanted)).boxed())
        }
        .boxed()
    }

    fn follow(&self, collection: Collection) -> BoxFuture<'_, Result<Changes, StoreError>> {
        let file = Arc::clone(&self.file);
        let changes = self.changes.subscribe();
        async move {
            let whole = collection.clone();
            let stored = read(file, move |file| file.list(&whole, None, usize::MAX)).await?;
            let stored = stored.into_iter().map(|(name, document)| (name, Some(document))).collect();
            let wanted =
                move |changed: &Changed| (changed.0.collection == collection).then(|| changed.clone());
            Ok(stream::once(async { Ok(stored) }).chain(following(changes, wanted)).boxed())
        }
        .boxed()
    }
}

/// Runs a read where it may wait for the disk.
async fn read<T: Send + 'static>(
    file: Arc<StoreFile>,
    work: impl FnOnce(&StoreFile) -> Result<T, EmbeddedStoreError> + Send + 'static,
) -> Result<T, StoreError> {
    let done = tokio::task::spawn_blocking(move || work(&file)).await;
    done.map_err(|_| EmbeddedStoreError::Ended).flatten().map_err(|error| StoreError::from(&error))
}

fn is_edited_after(fields: &Fields, since: Timestamp) -> bool {
    document::read_edited_at(fields).is_some_and(|at| at > since)
}

/// What is `wanted` of the changes, until an error.
fn following<T: Send + 'static>(
    changes: broadcast::Receiver<Arc<Changed>>,
    wanted: impl Fn(&Changed) -> Option<T> + Send + 'static,
) -> impl Stream<Item = Result<Vec<T>, StoreError>> + Send {
    stream::unfold((Some(changes), wanted), async |(changes, wanted)| {
        // `None` is what is left after an error.
        let mut changes = changes?;
        loop {
            let error = match changes.recv().await {
                Ok(change) => match wanted(&change) {
                    Some(found) => return Some((Ok(vec![found]), (Some(changes), wanted))),
                    None => continue,
                },
                Err(RecvError::Lagged(missed)) => {
                    StoreError::Away(format!("{missed} changes came faster than they were taken"))
                }
                Err(RecvError::Closed) => StoreError::from(&EmbeddedStoreError::Ended),
            };
            return Some((Err(error), (None, wanted)));
        }
    })
}

struct Writer {
    file: Arc<StoreFile>,
    calls: mpsc::Receiver<Call>,
    changes: broadcast::Sender<Arc<Changed>>,
}

impl Writer {
    fn run(mut self) {
        while let Some(call) = self.calls.blocking_recv() {
            self.commit(call);
        }
    }

    /// One commit for this call and those that wait behind it.
    fn commit(&mut self, call: Call) {
        let mut writes = call.writes;
        let mut answers = vec![(writes.len(), call.answer)];
        while writes.len() < LARGEST_COMMIT
            && let Ok(call) = self.calls.try_recv()
        {
            answers.push((call.writes.len(), call.answer));
            writes.extend(call.writes);
        }
        match self.file.write(&writes) {
            Ok(outcomes) => {
                let mut settled =
                    writes.iter().zip(outcomes).map(|(write, outcome)| self.settle(write, outcome));
                for (count, answer) in answers {
                    let outcomes = settled.by_ref().take(count).collect();
                    // Whoever no longer waits takes what was written as unknown.
                    drop(answer.send(Ok(outcomes)));
                }
            }
            Err(error) => {
                for (_, answer) in answers {
                    drop(answer.send(Err(StoreError::from(&error))));
                }
            }
        }
    }

    fn settle(&self, write: &Write, outcome: Outcome) -> Result<Version, WriteRefusal> {
        let (version, document) = match outcome {
            Outcome::Conflict => return Err(WriteRefusal::Conflict),
            Outcome::Written(document) => (document.version, Some(document)),
            Outcome::Deleted => (Version(0), None),
        };
        // Of users there are too many for anybody to follow: operators' edits alone are told.
        let is_told = match &write.change {
            Change::Set(fields) => {
                write.name.collection != Collection::Users || fields.contains_key(document::EDITED_AT)
            }
            Change::Delete => true,
        };
        if is_told {
            // An error says that nobody follows.
            drop(self.changes.send(Arc::new((write.name.clone(), document))));
        }
        Ok(version)
    }
}
