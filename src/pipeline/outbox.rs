//! The outbox: a bounded queue on disk, in front of a stream that is away or does not answer in time.
//!
//! It holds the finished bytes of events, in their order, a row for each commit. What lies in it is accepted: it gets
//! into the stream whatever happens to this process. This end of it only keeps what is to be known of the rows; the
//! bytes are read back in pieces when they are sent, so that an outage of hours costs no memory. A row goes when
//! everything in it is settled; a crash before that only sends again, under the same ids.

pub(super) mod batch;
mod config;
mod file;
mod filling;
mod row;
mod status;
mod worker;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use thiserror::Error;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::enrich::Enriched;
use crate::clock::Clock;
use crate::errors::ErrorCode;
use crate::redb_file::{self, FileError};
use crate::retry::Backoff;
use batch::{Batch, Stored};
use file::{Change, OutboxFile};
use filling::{Filling, disk_bytes};
use status::Trouble;
use worker::{Answer, Found, Workers};

pub use config::{Bounds, OutboxArgs, OutboxConfig};
pub use status::{OutboxMetrics, OutboxPart};

/// The file's name in `DATA_DIR`.
const FILE_NAME: &str = "outbox.redb";

/// What can wait for the disk, waits so long for company.
const GROUP_WAIT: Duration = Duration::from_millis(100);

/// Rows in which everything is settled are removed this much later, many at a time.
const REMOVE_AFTER: Duration = Duration::from_millis(200);

/// An empty outbox that took more than this gives it back: where `DATA_DIR` lies in memory, it is memory.
const WORTH_COMPACTING: u64 = 8 << 20;

/// Waits between attempts on a disk that fails.
const FIRST_RETRY: Duration = Duration::from_millis(250);
const LONGEST_RETRY: Duration = Duration::from_secs(4);

/// A dead letter waits so long for a disk that fails.
const LONGEST_FAILURE: Duration = Duration::from_secs(10);

/// Why there is no outbox.
#[derive(Debug, Error)]
pub enum OutboxError {
    /// Its file.
    #[error("the outbox {0}")]
    File(#[from] FileError),
    /// The system gives no thread.
    #[error("the outbox's threads could not be started")]
    Thread(#[source] std::io::Error),
    /// Its threads are gone.
    #[error("the outbox's threads ended unexpectedly")]
    Ended,
}

/// The publisher's end of the outbox.
pub struct Outbox {
    workers: Workers,
    answers: mpsc::Receiver<Answer>,
    after: Duration,
    clock: Clock,
    part: Arc<OutboxPart>,
    rows: BTreeMap<u64, Held>,
    next_row: u64,
    /// Rows before it are of earlier runs.
    first_own_row: u64,
    /// Rows before it were handed over to be sent, or are being sent.
    next_unread: u64,
    bytes: u64,
    /// Most that it held since its room was given back.
    most_bytes: u64,
    writing: Option<Writing>,
    is_reading: bool,
    /// Rows in which everything is settled, and since when the first of them is.
    removable: Vec<u64>,
    remove_at: Option<Instant>,
    backoff: Backoff,
    /// The disk failed; not before then again.
    retry_at: Option<Instant>,
    /// Since when it fails.
    failing_since: Option<Instant>,
    is_full: bool,
}

/// What is known of a row.
struct Held {
    unsettled: u64,
    bytes: u64,
    stored_at: Timestamp,
}

/// A commit under way.
#[derive(Default)]
struct Writing {
    batch: Batch,
    number: u64,
    bytes: u64,
    stored_at: Timestamp,
    removed: Vec<u64>,
}

impl Outbox {
    /// Whether the outbox in `folder` could be opened, or made. Nothing is.
    pub fn look(folder: &Path) -> Result<(), OutboxError> {
        Ok(redb_file::look(&folder.join(FILE_NAME), file::FORMAT)?)
    }

    /// Opens the outbox in `folder`, or makes it. `Outbox::next_recovered` brings what lies in it.
    pub async fn open(
        folder: &Path,
        config: &OutboxConfig,
        metrics: Arc<OutboxMetrics>,
        clock: Clock,
    ) -> Result<Self, OutboxError> {
        let bounds = config.bounds(folder);
        if bounds.is_in_memory {
            tracing::warn!(
                error_code = %ErrorCode::OutboxInMemory,
                max_bytes = bounds.max_bytes,
                "DATA_DIR lies in memory: what is in the outbox is lost with this machine"
            );
        }
        let (path, moment) = (folder.join(FILE_NAME), worker::moment(&clock));
        let opening = path.clone();
        let opened = tokio::task::spawn_blocking(move || OutboxFile::open(&opening, moment)).await;
        let (file, aside) = opened.map_err(|_| OutboxError::Ended)??;
        if let Some(aside) = aside {
            worker::say_set_aside(&aside, &metrics.torn);
        }
        let (workers, answers) = worker::start(path, file, clock.clone(), metrics.torn.clone())?;
        Ok(Self {
            workers,
            answers,
            after: config.after,
            clock,
            part: Arc::new(OutboxPart::new(metrics, bounds)),
            rows: BTreeMap::new(),
            next_row: 1,
            first_own_row: 0,
            next_unread: 0,
            bytes: 0,
            most_bytes: 0,
            writing: None,
            is_reading: false,
            removable: Vec::new(),
            remove_at: None,
            backoff: Backoff::new(FIRST_RETRY, LONGEST_RETRY),
            retry_at: None,
            failing_since: None,
            is_full: false,
        })
    }

    /// As the probes see it.
    pub fn part(&self) -> Arc<OutboxPart> {
        Arc::clone(&self.part)
    }

    /// What lies in it from earlier runs, a piece at a time, in order; empty at the end. To be called until then, before
    /// anything else.
    pub(super) async fn next_recovered(&mut self) -> Result<Vec<(Enriched, Timestamp)>, OutboxError> {
        loop {
            self.ask_for(self.next_row);
            let Some(Answer::Read(found)) = self.answers.recv().await else { return Err(OutboxError::Ended) };
            let found = found?;
            let is_end = found.is_empty();
            let mut recovered = Vec::new();
            for (number, size, row) in found {
                self.next_row = number + 1;
                self.first_own_row = self.next_row;
                if let Some(row) = row {
                    self.hold(number, (row.events.len() as u64, disk_bytes(size), row.stored_at));
                    recovered.extend(row.events.into_iter().map(|event| (event, row.stored_at)));
                } else {
                    self.part.metrics.torn.inc();
                    tracing::error!(
                        error_code = %ErrorCode::OutboxTorn,
                        row = number,
                        "a row of the outbox is not what was written; its events are lost"
                    );
                    self.removable.push(number);
                    self.remove_at = Some(Instant::now());
                }
            }
            self.part.metrics.recovered.inc_by(recovered.len() as u64);
            if is_end || !recovered.is_empty() {
                return Ok(recovered);
            }
        }
    }

    /// How long an event may be without an ack. Where others wait behind the disk already, or the bus is away, it goes
    /// there at once, but not alone.
    pub(super) fn patience(&self, is_needed_anyway: bool) -> Duration {
        if is_needed_anyway { (self.after / 2).min(GROUP_WAIT) } else { self.after }
    }

    /// Events in rows before it are of earlier runs.
    pub(super) fn first_own_row(&self) -> u64 {
        self.first_own_row
    }

    /// Whether rows lie on disk that nobody has begun to send.
    pub(super) fn has_unread(&self) -> bool {
        self.rows.range(self.next_unread..).next().is_some()
    }

    /// Whether such rows lie in front of this one.
    pub(super) fn has_unread_before(&self, number: u64) -> bool {
        self.next_unread < number && self.rows.range(self.next_unread..number).next().is_some()
    }

    /// Whether events that are not sent yet are on their way to the disk.
    pub(super) fn is_writing_unsent(&self) -> bool {
        self.writing.as_ref().is_some_and(|writing| !writing.batch.unsent.is_empty())
    }

    /// Whether this event of the window is on its way to the disk.
    pub(super) fn is_writing(&self, number: u64) -> bool {
        self.writing.as_ref().is_some_and(|writing| writing.batch.sent.contains(&number))
    }

    /// Whether nothing is on its way to the disk.
    pub(super) fn is_idle(&self) -> bool {
        self.writing.is_none()
    }

    /// Whether it takes events, as far as is known.
    pub(super) fn is_well(&self) -> bool {
        !self.is_full && self.retry_at.is_none()
    }

    /// Whether the disk fails for so long that nothing more important is to wait for it.
    pub(super) fn is_given_up(&self) -> bool {
        self.failing_since.is_some_and(|since| since.elapsed() >= LONGEST_FAILURE)
    }

    /// Whether a commit may begin now.
    pub(super) fn may_write(&self) -> bool {
        self.writing.is_none() && self.retry_at.is_none_or(|retry_at| retry_at <= Instant::now())
    }

    /// When something here is to be done without anything happening.
    pub(super) fn wakes_at(&self, due: Option<Instant>) -> Option<Instant> {
        if self.writing.is_some() {
            return None;
        }
        let due = due.filter(|_| !self.is_full);
        let wakes_at = match (due, self.remove_at) {
            (Some(due), Some(remove_at)) => Some(due.min(remove_at)),
            (due, remove_at) => due.or(remove_at),
        };
        match self.retry_at {
            // Also with nothing to do: that the disk is back is to be found out.
            Some(retry_at) => Some(wakes_at.map_or(retry_at, |at| at.max(retry_at))),
            None => wakes_at,
        }
    }

    /// A new row. `beyond_limit`: what comes now is the last, and no more than the door held.
    pub(super) fn fill(&self, beyond_limit: bool) -> Filling {
        let left = self.part.bounds.max_bytes.saturating_sub(self.bytes);
        let is_unbounded = beyond_limit || self.rows.is_empty();
        let room = if is_unbounded { u64::MAX } else { left };
        Filling::new(self.next_row, room, worker::moment(&self.clock))
    }

    /// Notes whether there was room.
    pub(super) fn note_room(&mut self, is_full: bool) {
        if self.is_full != is_full && self.retry_at.is_none() {
            self.part.say(is_full.then_some(Trouble::Full));
        }
        self.is_full = is_full;
    }

    /// Begins a commit: a new row with the events of `batch`, dead letters in the places of their events, and rows in
    /// which everything is settled out. Nothing is done for nothing.
    pub(super) fn write(&mut self, filling: Filling, batch: Batch, replace: Vec<(u64, Enriched)>) {
        let is_remove_due = self.remove_at.is_some_and(|remove_at| remove_at <= Instant::now());
        if filling.is_empty() && replace.is_empty() && !is_remove_due && self.retry_at.is_none() {
            return;
        }
        let number = self.next_row;
        let mut writing = Writing { batch, number, stored_at: filling.stored_at(), ..Writing::default() };
        let append = if filling.is_empty() {
            None
        } else {
            let row = filling.finish();
            writing.bytes = disk_bytes(row.len());
            self.next_row += 1;
            Some((number, row))
        };
        writing.removed = std::mem::take(&mut self.removable);
        self.remove_at = None;
        let compact = append.is_none()
            && self.rows.is_empty()
            && std::mem::take(&mut self.most_bytes) > WORTH_COMPACTING;
        let change = Change { append, replace, remove: writing.removed.clone(), compact };
        // There is room for one of each kind; that a thread is gone is seen where answers come from.
        if self.workers.changes.try_send(change).is_err() {
            tracing::debug!("the outbox's writer is gone");
        }
        self.writing = Some(writing);
    }

    /// Begins to read rows back that nobody has begun to send, if there are any.
    pub(super) fn read_ahead(&mut self) {
        let is_held_up = self.retry_at.is_some_and(|retry_at| retry_at > Instant::now());
        if !self.is_reading && !is_held_up && self.has_unread() {
            self.is_reading = true;
            self.ask_for(self.next_unread);
        }
    }

    fn ask_for(&self, from: u64) {
        if self.workers.reads.try_send(from).is_err() {
            tracing::debug!("the outbox's reader is gone");
        }
    }

    /// Waits for the disk. Cancel safe.
    pub(super) async fn answer(&mut self) -> Stored {
        match self.answers.recv().await {
            Some(Answer::Changed(Ok(()))) => self.written(),
            Some(Answer::Changed(Err(error))) => self.not_written(&error),
            Some(Answer::Read(Ok(found))) => self.read(found),
            Some(Answer::Read(Err(error))) => {
                self.is_reading = false;
                self.trouble(&error);
                Stored::Nothing
            }
            None => {
                let writing = self.writing.take();
                self.part.say(Some(Trouble::Unwritable(OutboxError::Ended.to_string())));
                // Not before the next start.
                self.retry_at = Some(Instant::now() + Duration::from_hours(24));
                self.failing_since.get_or_insert_with(Instant::now);
                match writing {
                    Some(writing) => Stored::Failed(writing.batch),
                    None => std::future::pending().await,
                }
            }
        }
    }

    fn written(&mut self) -> Stored {
        self.failing_since = None;
        if self.retry_at.take().is_some() {
            self.part.say(self.is_full.then_some(Trouble::Full));
        }
        self.backoff.reset();
        let Some(Writing { batch, number, bytes, stored_at, .. }) = self.writing.take() else {
            return Stored::Nothing;
        };
        if bytes > 0 {
            // Who is settled already does not count; that is said by whoever settles.
            self.hold(number, ((batch.sent.len() + batch.unsent.len()) as u64, bytes, stored_at));
        }
        Stored::Written(batch, number)
    }

    fn not_written(&mut self, error: &FileError) -> Stored {
        self.trouble(error);
        let Some(Writing { batch, number, bytes, removed, .. }) = self.writing.take() else {
            return Stored::Nothing;
        };
        if bytes > 0 {
            // The row may be there all the same: its number is used again, and then it is written over.
            self.next_row = number;
        }
        self.remove_at = (!removed.is_empty()).then(Instant::now).or(self.remove_at);
        self.removable.extend(removed);
        Stored::Failed(batch)
    }

    fn trouble(&mut self, error: &FileError) {
        self.failing_since.get_or_insert_with(Instant::now);
        self.retry_at = Some(Instant::now() + self.backoff.next_wait());
        self.part.say(Some(Trouble::Unwritable(error.to_string())));
    }

    fn read(&mut self, found: Vec<Found>) -> Stored {
        self.is_reading = false;
        let Some(last) = found.last().map(|(number, _, _)| *number).or(self.rows.keys().next_back().copied())
        else {
            return Stored::Nothing;
        };
        let mut missing: Vec<_> =
            self.rows.range(self.next_unread..=last).map(|(number, _)| *number).collect();
        let mut events = Vec::new();
        for (number, _, row) in found {
            if let Some(row) = row.filter(|_| self.rows.contains_key(&number)) {
                missing.retain(|other| *other != number);
                events.extend(row.events);
            }
        }
        if let Some(number) = missing.first() {
            // Those before it are read again, and handed over, when it is gone.
            let number = *number;
            self.part.metrics.torn.inc();
            let gone = self.rows.remove(&number).map_or(0, |held| self.let_go(number, &held));
            tracing::error!(
                error_code = %ErrorCode::OutboxTorn,
                row = number,
                events = gone,
                "a row of the outbox is not what was written; its events are lost"
            );
            return Stored::Torn(gone);
        }
        // A row may be read before it is known to be written; that is the affair of whoever wrote it.
        if let Some((number, _)) = self.rows.range(self.next_unread..=last).next_back() {
            self.next_unread = number + 1;
        }
        Stored::Read(events)
    }

    fn hold(&mut self, number: u64, (unsettled, bytes, stored_at): (u64, u64, Timestamp)) {
        self.rows.insert(number, Held { unsettled, bytes, stored_at });
        self.bytes += bytes;
        self.most_bytes = self.most_bytes.max(self.bytes);
        self.part.metrics.events.add(i64::try_from(unsettled).unwrap_or(i64::MAX));
        self.show();
    }

    /// Takes a row that is gone out of the account; how many of its events were not settled.
    fn let_go(&mut self, number: u64, held: &Held) -> u64 {
        self.bytes -= held.bytes;
        self.part.metrics.events.sub(i64::try_from(held.unsettled).unwrap_or(i64::MAX));
        self.removable.push(number);
        self.remove_at.get_or_insert(Instant::now() + REMOVE_AFTER);
        self.show();
        held.unsettled
    }

    /// An event of this row is settled.
    pub(super) fn settled(&mut self, number: u64) {
        let Some(held) = self.rows.get_mut(&number) else { return };
        held.unsettled -= 1;
        self.part.metrics.events.dec();
        if held.unsettled == 0
            && let Some(held) = self.rows.remove(&number)
        {
            self.let_go(number, &held);
        }
    }

    /// The rows up to this one are being sent already.
    pub(super) fn skip_to(&mut self, number: u64) {
        self.next_unread = number + 1;
    }

    fn show(&self) {
        let metrics = &self.part.metrics;
        metrics.bytes.set(i64::try_from(self.bytes).unwrap_or(i64::MAX));
        metrics.set_oldest(self.rows.values().next().map_or(0, |held| held.stored_at.as_millisecond()));
    }

    /// Removes what is settled, and closes the file.
    pub(super) async fn close(mut self) {
        if !self.removable.is_empty() && self.may_write() {
            self.remove_at = Some(Instant::now());
            self.write(self.fill(false), Batch::default(), Vec::new());
        }
        drop(self.workers);
        while self.answers.recv().await.is_some() {}
    }
}
