//! The embedded store: a file in `DATA_DIR`, for a machine without any server.
//!
//! Group commit, as in the embedded stream: what was asked while the last commit ran goes into the next one. A
//! durable commit costs the same for one document as for a thousand.

mod file;

use std::path::Path;
use std::sync::Arc;

use futures_util::future::BoxFuture;
use futures_util::{FutureExt as _, StreamExt as _, stream};
use jiff::Timestamp;
use thiserror::Error;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{broadcast, mpsc, oneshot};

use super::{
    Collection, Document, DocumentStore, Edits, Fields, Name, StoreError, Version, Write, WriteRefusal,
    document,
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

/// Edits that a follower may lag behind before it has to follow again.
const EDITS_KEPT: usize = 1024;

/// Why the file cannot be used.
#[derive(Debug, Error)]
pub enum EmbeddedStoreError {
    /// The file cannot be opened, read or written; or it is of a later version of Inlet.
    #[error("the embedded store {0}")]
    File(#[from] FileError),
    /// A document is not what was written.
    #[error("the embedded store is damaged at {name}")]
    Damaged {
        /// The document.
        name: String,
    },
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
            Self::Damaged { .. } | Self::Folder(_) | Self::Writer(_) => false,
        }
    }
}

impl From<&EmbeddedStoreError> for StoreError {
    fn from(error: &EmbeddedStoreError) -> Self {
        let message = with_causes(error);
        match error {
            _ if error.is_transient() => Self::Away(message),
            EmbeddedStoreError::Damaged { .. } => Self::Refused { code: "DAMAGED", message },
            _ => Self::Refused { code: "UNREADABLE", message },
        }
    }
}

/// A store in a file.
pub struct EmbeddedStore {
    file: Arc<StoreFile>,
    writer: mpsc::Sender<Call>,
    edits: broadcast::Sender<Arc<(Name, Document)>>,
}

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
        let (edits, _) = broadcast::channel(EDITS_KEPT);
        let thread = Writer { file: Arc::clone(&file), calls, edits: edits.clone() };
        // A thread of its own: a commit waits for the disk. It ends when the store is gone.
        std::thread::Builder::new()
            .name("store-writer".into())
            .spawn(move || thread.run())
            .map_err(EmbeddedStoreError::Writer)?;
        Ok(Self { file, writer, edits })
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

    fn edits(&self, since: Timestamp) -> BoxFuture<'_, Result<Edits, StoreError>> {
        let file = Arc::clone(&self.file);
        // Before what is stored is read, so that nothing falls between the two.
        let changes = self.edits.subscribe();
        async move {
            let stored = read(file, move |file| {
                file.find(Collection::Users, document::EDITED_AT, |fields| is_edited_after(fields, since))
            })
            .await?;
            let changes = stream::unfold(Some(changes), move |changes| next_edit(changes, since));
            Ok(stream::once(async { Ok(stored) }).chain(changes).boxed())
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

type Changes = broadcast::Receiver<Arc<(Name, Document)>>;

/// `None` is what is left after an error.
async fn next_edit(
    changes: Option<Changes>,
    since: Timestamp,
) -> Option<(Result<Vec<(Name, Document)>, StoreError>, Option<Changes>)> {
    let mut changes = changes?;
    loop {
        return match changes.recv().await {
            Ok(edit) if !is_edited_after(&edit.1.fields, since) => continue,
            Ok(edit) => Some((Ok(vec![Arc::unwrap_or_clone(edit)]), Some(changes))),
            Err(RecvError::Lagged(missed)) => Some((
                Err(StoreError::Away(format!("{missed} edits came faster than they were taken"))),
                None,
            )),
            Err(RecvError::Closed) => Some((Err(StoreError::from(&EmbeddedStoreError::Ended)), None)),
        };
    }
}

struct Writer {
    file: Arc<StoreFile>,
    calls: mpsc::Receiver<Call>,
    edits: broadcast::Sender<Arc<(Name, Document)>>,
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
        match outcome {
            Outcome::Conflict => Err(WriteRefusal::Conflict),
            Outcome::Written(document) => {
                let version = document.version;
                if write.name.collection == Collection::Users
                    && write.fields.contains_key(document::EDITED_AT)
                {
                    // An error says that nobody follows.
                    drop(self.edits.send(Arc::new((write.name.clone(), document))));
                }
                Ok(version)
            }
        }
    }
}
