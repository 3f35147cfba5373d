//! The embedded stream: a file in `DATA_DIR`, for a machine without any server.
//!
//! Not one row per message but one row per commit (group commit): what arrived while the last commit ran is
//! the next row. A durable commit costs the same for one message as for a thousand, and a row of a thousand is
//! ten times cheaper to write and to read than a thousand rows.

mod file;
mod row;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::stream;
use futures_util::{FutureExt as _, StreamExt as _};
use thiserror::Error;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};

use super::{
    Batch, Bus, BusError, BusState, Follower, Lane, Numbered, Refusal, Retention, Settled, Start, StreamInfo,
    TransientCause, Wanted,
};
use crate::clock::Clock;
use crate::data_dir;
use crate::envelope::SubjectTemplate;
use crate::errors::ErrorCode;
use crate::redb_file::{self, FileError};
use crate::telemetry::logs::with_causes;
use file::StreamFile;

/// The file's name in `DATA_DIR`.
pub const FILE_NAME: &str = "stream.redb";

/// The embedded stream takes what a NATS server takes by default, so that moving to one changes nothing.
const LARGEST_MESSAGE: usize = 1 << 20;

/// Most bytes kept where the settings do not say.
pub const USUAL_MAX_BYTES: u64 = 1 << 30;

/// How often an idle stream looks for what has become too old.
const RETENTION_PERIOD: Duration = Duration::from_mins(1);

/// Why the file cannot be used.
#[derive(Debug, Error)]
pub enum EmbeddedError {
    /// The file cannot be opened, read or written; or it is of a later version of Inlet.
    #[error("the embedded stream {0}")]
    File(#[from] FileError),
    /// The folder cannot be made.
    #[error("the data folder cannot be used")]
    Folder(#[source] std::io::Error),
    /// A task that read was ended.
    #[error("reading was interrupted by the end of the process")]
    Ended,
}

impl EmbeddedError {
    /// Whether trying again can help: a full disk can be emptied.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::File(error) if error.is_transient())
    }
}

/// A bus in a file.
pub struct EmbeddedBus {
    file: Arc<StreamFile>,
    info: StreamInfo,
    subjects: SubjectTemplate,
    state: watch::Sender<BusState>,
}

impl EmbeddedBus {
    /// Whether the stream in `folder` could be opened, or made. Nothing is.
    pub fn look(folder: &Path) -> Result<(), EmbeddedError> {
        Ok(redb_file::look(&folder.join(FILE_NAME), file::FORMAT)?)
    }

    /// Opens the stream in `folder`, or makes it.
    pub fn open(
        folder: &Path,
        retention: Retention,
        subjects: SubjectTemplate,
        clock: Clock,
    ) -> Result<Arc<Self>, EmbeddedError> {
        data_dir::make(folder).map_err(EmbeddedError::Folder)?;
        let bounds = file::Bounds {
            max_age: retention.max_age,
            max_bytes: retention.max_bytes.unwrap_or(USUAL_MAX_BYTES),
            duplicate_window: retention.duplicate_window(),
        };
        let file = StreamFile::open(&folder.join(FILE_NAME), bounds, clock)?;
        let info = StreamInfo {
            identity: format!("embedded@{}", file.created_ns()),
            duplicate_window: bounds.duplicate_window,
            max_age: Some(bounds.max_age),
            max_bytes: Some(bounds.max_bytes),
            largest_message: LARGEST_MESSAGE,
        };
        let (state, _) = watch::channel(BusState::Up);
        Ok(Arc::new(Self { file: Arc::new(file), info, subjects, state }))
    }
}

impl Bus for EmbeddedBus {
    fn state(&self) -> watch::Receiver<BusState> {
        self.state.subscribe()
    }

    fn open_lane(&self, window: usize) -> Lane {
        let (messages, inbox) = mpsc::channel(window);
        let (outbox, settled) = mpsc::channel(window);
        let writer = Writer { file: Arc::clone(&self.file), state: self.state.clone(), inbox, outbox };
        let runtime = Handle::current();
        // A thread of its own: a commit waits for the disk. It ends when the lane's sender is gone.
        let started =
            std::thread::Builder::new().name("stream-writer".into()).spawn(move || writer.run(&runtime));
        if let Err(error) = started {
            tracing::error!(error_code = %ErrorCode::StreamUnwritable, error = %error, "the stream's writer could not be started");
            self.state.send_replace(BusState::Away(error.to_string()));
        }
        Lane { messages, settled }
    }

    fn follow(&self, start: Start, content: Wanted) -> BoxFuture<'_, Result<Follower, BusError>> {
        let file = Arc::clone(&self.file);
        let subjects = self.subjects.clone();
        async move {
            let (position, first_position) =
                read(Arc::clone(&file), move |file| Ok((file.position_of(start)?, file.first_position()?)))
                    .await?;
            let head = file.head();
            let last_position = *head.borrow();
            let reader = Reader { file, subjects, position, content, head, is_first: true };
            let batches = stream::try_unfold(reader, Reader::next).boxed();
            let identity = self.info.identity.clone();
            Ok(Follower { identity, first_position, last_position, batches })
        }
        .boxed()
    }

    fn stream(&self) -> Option<StreamInfo> {
        Some(self.info.clone())
    }
}

/// Runs a read where it may wait for the disk.
async fn read<T: Send + 'static>(
    file: Arc<StreamFile>,
    work: impl FnOnce(&StreamFile) -> Result<T, EmbeddedError> + Send + 'static,
) -> Result<T, EmbeddedError> {
    tokio::task::spawn_blocking(move || work(&file)).await.map_err(|_| EmbeddedError::Ended)?
}

struct Writer {
    file: Arc<StreamFile>,
    state: watch::Sender<BusState>,
    inbox: mpsc::Receiver<Vec<Numbered>>,
    outbox: mpsc::Sender<Vec<Settled>>,
}

impl Writer {
    fn run(mut self, runtime: &Handle) {
        loop {
            let waited =
                runtime.block_on(async { tokio::time::timeout(RETENTION_PERIOD, self.inbox.recv()).await });
            let group = match waited {
                Ok(Some(group)) => self.with_what_is_queued(group),
                Ok(None) => return,
                Err(_) => Vec::new(),
            };
            let settled = self.commit(&group);
            if !settled.is_empty() && self.outbox.blocking_send(settled).is_err() {
                return;
            }
        }
    }

    fn with_what_is_queued(&mut self, mut group: Vec<Numbered>) -> Vec<Numbered> {
        while let Ok(more) = self.inbox.try_recv() {
            group.extend(more);
        }
        group
    }

    fn commit(&self, group: &[Numbered]) -> Vec<Settled> {
        let (fitting, too_large): (Vec<_>, Vec<_>) = group.iter().partition(|numbered| {
            numbered.message.payload.len() + numbered.message.headers_size() <= LARGEST_MESSAGE
        });
        let mut settled: Vec<_> = too_large
            .iter()
            .map(|numbered| Settled { number: numbered.number, outcome: Err(Refusal::TooLarge) })
            .collect();
        let messages: Vec<_> = fitting.iter().map(|numbered| numbered.message.as_ref()).collect();
        let answers = fitting.iter().map(|numbered| numbered.number);
        match self.file.append(&messages) {
            Ok(acks) => {
                self.say(BusState::Up);
                settled.extend(answers.zip(acks).map(|(number, ack)| Settled { number, outcome: Ok(ack) }));
            }
            Err(error) => {
                self.say(BusState::Away(with_causes(&error)));
                let refusal = Refusal::Transient(TransientCause::Unavailable);
                settled.extend(answers.map(|number| Settled { number, outcome: Err(refusal) }));
            }
        }
        settled
    }

    fn say(&self, state: BusState) {
        self.state.send_if_modified(|current| {
            let changed = *current != state;
            match &state {
                BusState::Up if changed => tracing::info!("the embedded stream can be written again"),
                BusState::Away(why) if changed => {
                    tracing::error!(error_code = %ErrorCode::StreamUnwritable, error = why, "the embedded stream cannot be written");
                }
                _ => {}
            }
            *current = state;
            changed
        });
    }
}

struct Reader {
    file: Arc<StreamFile>,
    subjects: SubjectTemplate,
    position: u64,
    content: Wanted,
    head: watch::Receiver<u64>,
    is_first: bool,
}

impl Reader {
    async fn next(mut self) -> Result<Option<(Batch, Self)>, BusError> {
        if !self.is_first && *self.head.borrow_and_update() < self.position {
            let position = self.position;
            // The writer is gone only when the process ends.
            if self.head.wait_for(|head| *head >= position).await.is_err() {
                return Ok(None);
            }
        }
        self.is_first = false;
        let (position, content) = (self.position, self.content);
        let (mut batch, next) =
            read(Arc::clone(&self.file), move |file| file.read(position, content)).await?;
        batch.messages.retain(|stored| self.subjects.owns(&stored.subject));
        self.position = next;
        Ok(Some((batch, self)))
    }
}
