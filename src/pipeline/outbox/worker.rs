//! Where the outbox waits for the disk: one thread that writes and one that reads, which need not wait for each other.

use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Instant;

use prometheus::IntCounter;
use tokio::sync::mpsc;

use super::OutboxError;
use super::file::{Change, OutboxFile, SetAside};
use super::row::{Moment, Row};
use crate::clock::Clock;
use crate::errors::ErrorCode;
use crate::redb_file::FileError;

/// A row by its number, what it takes, and what it holds; `None` if it is not what was written.
pub(super) type Found = (u64, usize, Option<Row>);

/// What became of what was asked.
pub(super) enum Answer {
    Changed(Result<(), FileError>),
    Read(Result<Vec<Found>, FileError>),
}

/// Our end of the threads. They end when it is dropped.
pub(super) struct Workers {
    /// One commit each.
    pub(super) changes: mpsc::Sender<Change>,
    /// Rows from these numbers on.
    pub(super) reads: mpsc::Sender<u64>,
}

struct Disk {
    path: PathBuf,
    file: RwLock<OutboxFile>,
    clock: Clock,
    torn: IntCounter,
}

pub(super) fn moment(clock: &Clock) -> Moment {
    Moment { at: clock.now(), instant: Instant::now() }
}

/// Says that a file was set aside, and counts it.
pub(super) fn say_set_aside(aside: &SetAside, torn: &IntCounter) {
    torn.inc();
    tracing::error!(
        error_code = %ErrorCode::OutboxTorn,
        file = %aside.path.display(),
        rescued_rows = aside.rescued,
        "the outbox was torn or none of ours; it was set aside, and what could be read of it was taken over"
    );
}

/// Starts the threads. At most one thing of each kind may be asked at a time.
pub(super) fn start(
    path: PathBuf,
    file: OutboxFile,
    clock: Clock,
    torn: IntCounter,
) -> Result<(Workers, mpsc::Receiver<Answer>), OutboxError> {
    let disk = Arc::new(Disk { path, file: RwLock::new(file), clock, torn });
    let (answers, answered) = mpsc::channel(2);
    let (changes, to_change) = mpsc::channel(1);
    let (reads, to_read) = mpsc::channel(1);
    let write = |disk: &Disk, change: Change| {
        Answer::Changed(disk.again_if_damaged(|file, moment| file.write(&change, moment)))
    };
    let read =
        |disk: &Disk, from: u64| Answer::Read(disk.again_if_damaged(|file, moment| file.read(from, moment)));
    spawn("outbox-writer", Arc::clone(&disk), (to_change, answers.clone()), write)?;
    spawn("outbox-reader", disk, (to_read, answers), read)?;
    Ok((Workers { changes, reads }, answered))
}

fn spawn<T: Send + 'static>(
    name: &str,
    disk: Arc<Disk>,
    (mut asked, answers): (mpsc::Receiver<T>, mpsc::Sender<Answer>),
    work: impl Fn(&Disk, T) -> Answer + Send + 'static,
) -> Result<(), OutboxError> {
    let run = move || {
        while let Some(asked) = asked.blocking_recv() {
            if answers.blocking_send(work(&disk, asked)).is_err() {
                break;
            }
        }
        // The file is closed before its owner hears of the end.
        drop(disk);
        drop(answers);
    };
    std::thread::Builder::new().name(name.to_owned()).spawn(run).map_err(OutboxError::Thread)?;
    Ok(())
}

impl Disk {
    /// A file that turns out to be damaged is set aside, as it would be at a start.
    fn again_if_damaged<T>(
        &self,
        work: impl Fn(&OutboxFile, Moment) -> Result<T, FileError>,
    ) -> Result<T, FileError> {
        let moment = moment(&self.clock);
        let done = work(&self.file.read().unwrap_or_else(PoisonError::into_inner), moment);
        if !done.as_ref().is_err_and(FileError::is_of_content) {
            return done;
        }
        let mut file = self.file.write().unwrap_or_else(PoisonError::into_inner);
        file.close();
        let (opened, aside) = OutboxFile::open(&self.path, moment)?;
        *file = opened;
        if let Some(aside) = aside {
            say_set_aside(&aside, &self.torn);
        }
        work(&file, moment)
    }
}
