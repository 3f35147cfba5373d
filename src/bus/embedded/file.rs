//! The stream's file: rows by the position of their first message, and a few numbers.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use redb::{Database, ReadableDatabase as _, ReadableTable as _, Table, TableDefinition};
use tokio::sync::watch;

use super::EmbeddedError;
use super::row::{self, RowWriter};
use crate::bus::{Ack, Batch, Message, Start, Wanted};
use crate::clock::Clock;
use crate::envelope::MessageId;
use crate::errors::ErrorCode;
use crate::recent::Recent;
use crate::redb_file::{FileError, NUMBERS, RedbFile};

const ROWS: TableDefinition<'static, u64, &[u8]> = TableDefinition::new("rows");

/// Of this layout. A file with a higher one is left alone; rows of the one before are read as they are.
pub(super) const FORMAT: u64 = 3;

/// A row is closed at this size, whatever still waits for the same commit.
const LARGEST_ROW: usize = 4 << 20;

/// How much one read brings, in bytes of rows.
const READ_BYTES: usize = 1 << 20;

/// Ids are also bounded by number: this many take some 100 MiB.
const MOST_IDS: usize = 4_000_000;

/// What bounds the stream.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    pub(super) max_age: Duration,
    pub(super) max_bytes: u64,
    pub(super) duplicate_window: Duration,
}

pub(super) struct StreamFile {
    file: RedbFile,
    /// `None` after a failed write, until it is read again.
    tail: Mutex<Option<Tail>>,
    head: watch::Sender<u64>,
    created_ns: u64,
    bounds: Bounds,
    clock: Clock,
}

/// What the next commit needs to know of those before.
struct Tail {
    known: Recent<u64>,
    last_position: u64,
    last_stored_at: Timestamp,
    bytes: u64,
}

impl StreamFile {
    pub(super) fn open(path: &Path, bounds: Bounds, clock: Clock) -> Result<Self, EmbeddedError> {
        let now = clock.now();
        let file = RedbFile::open(path, FORMAT)?;
        let created_ns = file.change(|database| prepare(database, now))?;
        let tail = file.with(|database| recover(database, bounds, now))?;
        let (head, _) = watch::channel(tail.last_position);
        Ok(Self { file, tail: Mutex::new(Some(tail)), head, created_ns, bounds, clock })
    }

    pub(super) fn created_ns(&self) -> u64 {
        self.created_ns
    }

    /// The last position, and its changes.
    pub(super) fn head(&self) -> watch::Receiver<u64> {
        self.head.subscribe()
    }

    /// Appends what is not known yet, durably, in one commit; the acks come in the order of `messages`. Also
    /// drops what the bounds no longer allow; with no messages it does only that.
    pub(super) fn append(&self, messages: &[&Message]) -> Result<Vec<Ack>, EmbeddedError> {
        let mut guard = self.tail.lock().unwrap_or_else(PoisonError::into_inner);
        let now = self.clock.now();
        let mut tail = match guard.take() {
            Some(tail) => tail,
            None => self.file.with(|database| recover(database, self.bounds, now))?,
        };
        // What a failed write leaves is not known before it is read.
        let acks = self.file.change(|database| commit(database, &mut tail, messages, self.bounds, now))?;
        self.head.send_if_modified(|head| std::mem::replace(head, tail.last_position) != tail.last_position);
        *guard = Some(tail);
        Ok(acks)
    }

    /// The first position that is still held; behind the last, if none is.
    pub(super) fn first_position(&self) -> Result<u64, EmbeddedError> {
        let head = *self.head.borrow();
        self.file.with(|database| {
            let rows =
                database.begin_read().map_err(FileError::read)?.open_table(ROWS).map_err(FileError::read)?;
            Ok(rows.first().map_err(FileError::read)?.map_or(head + 1, |(first, _)| first.value()))
        })
    }

    /// The position at which following from `start` begins.
    pub(super) fn position_of(&self, start: Start) -> Result<u64, EmbeddedError> {
        match start {
            Start::Position(position) => Ok(position),
            Start::Last => Ok(*self.head.borrow()),
            Start::End => Ok(*self.head.borrow() + 1),
            Start::Time(time) => self.file.with(|database| position_at(database, time)),
        }
    }

    /// Messages from `position` on, and the position behind them.
    pub(super) fn read(&self, position: u64, content: Wanted) -> Result<(Batch, u64), EmbeddedError> {
        // Read before the rows are: everything up to it is among them.
        let head = *self.head.borrow();
        self.file.with(|database| {
            let rows =
                database.begin_read().map_err(FileError::read)?.open_table(ROWS).map_err(FileError::read)?;
            let from = match rows.range(..=position).map_err(FileError::read)?.next_back() {
                Some(found) => found.map_err(FileError::read)?.0.value(),
                None => position,
            };
            let mut batch = Batch::default();
            let mut is_end = true;
            let mut next = position;
            let mut bytes = 0;
            for found in rows.range(from..).map_err(FileError::read)? {
                let (first, value) = found.map_err(FileError::read)?;
                let (first, row) = (first.value(), value.value());
                // Rows follow each other without a gap, unless there is damage between them.
                next = next.max(first);
                if bytes >= READ_BYTES {
                    is_end = false;
                    break;
                }
                bytes += row.len();
                let Some(stored) = row::messages(row, first, content) else {
                    // The rest of the stream is worth more than a halt.
                    tracing::error!(error_code = %ErrorCode::StreamDamaged, position = first, "a damaged row of the embedded stream was passed over");
                    continue;
                };
                next = next.max(first + stored.len() as u64);
                batch.messages.extend(stored.into_iter().filter(|stored| stored.position >= position));
            }
            // Positions whose rows are gone by age or size are passed over.
            let next = if is_end { next.max(head + 1) } else { next };
            batch.behind = (head + 1).saturating_sub(next);
            batch.up_to = next.saturating_sub(1);
            Ok((batch, next))
        })
    }
}

/// Makes what a new file lacks; returns when it was created. Nothing is written where nothing is lacking: the disk may be
/// full.
fn prepare(database: &Database, now: Timestamp) -> Result<u64, EmbeddedError> {
    let reading = database.begin_read().map_err(FileError::read)?;
    let numbers = reading.open_table(NUMBERS).map_err(FileError::read)?;
    if let Some(created_ns) = numbers.get("created_ns").map_err(FileError::read)? {
        return Ok(created_ns.value());
    }
    let created_ns = u64::try_from(now.as_nanosecond()).unwrap_or_default();
    let writing = database.begin_write().map_err(FileError::write)?;
    {
        let mut numbers = writing.open_table(NUMBERS).map_err(FileError::write)?;
        numbers.insert("created_ns", created_ns).map_err(FileError::write)?;
        writing.open_table(ROWS).map_err(FileError::write)?;
    }
    writing.commit().map_err(FileError::write)?;
    Ok(created_ns)
}

/// Reads back what appending needs: the last position, and the ids of the duplicate window.
fn recover(database: &Database, bounds: Bounds, now: Timestamp) -> Result<Tail, EmbeddedError> {
    let reading = database.begin_read().map_err(FileError::read)?;
    let numbers = reading.open_table(NUMBERS).map_err(FileError::read)?;
    let number = |name: &str| -> Result<u64, EmbeddedError> {
        Ok(numbers.get(name).map_err(FileError::read)?.map_or(0, |number| number.value()))
    };
    let mut tail = Tail {
        known: Recent::new(bounds.duplicate_window, MOST_IDS),
        last_position: number("last_position")?,
        last_stored_at: Timestamp::UNIX_EPOCH,
        bytes: number("bytes")?,
    };
    let oldest = now - bounds.duplicate_window;
    let rows = reading.open_table(ROWS).map_err(FileError::read)?;
    let mut first_in_window = u64::MAX;
    for found in rows.iter().map_err(FileError::read)?.rev() {
        let (first, value) = found.map_err(FileError::read)?;
        // What is damaged says nothing, neither of the time nor of the rows before it.
        let Some(header) = row::header(value.value(), first.value()) else { continue };
        tail.last_stored_at = tail.last_stored_at.max(header.stored_at);
        if header.stored_at < oldest {
            break;
        }
        first_in_window = first.value();
    }
    for found in rows.range(first_in_window..).map_err(FileError::read)? {
        let (first, value) = found.map_err(FileError::read)?;
        for stored in row::messages(value.value(), first.value(), Wanted::Headers).unwrap_or_default() {
            if let Some(id) = stored.id {
                tail.known.insert(key(id), stored.position, stored.stored_at);
            }
        }
    }
    Ok(tail)
}

fn commit(
    database: &Database,
    tail: &mut Tail,
    messages: &[&Message],
    bounds: Bounds,
    now: Timestamp,
) -> Result<Vec<Ack>, EmbeddedError> {
    // Times in the stream never step back, so that a time can be found by halving.
    let now = now.max(tail.last_stored_at);
    tail.known.forget_old(now);
    let mut position = tail.last_position;
    let mut rows = vec![(position + 1, RowWriter::new(now))];
    let mut added = HashMap::new();
    let mut acks = Vec::with_capacity(messages.len());
    for message in messages {
        let id = key(message.id);
        if let Some(known) = tail.known.get(id).or_else(|| added.get(&id).copied()) {
            acks.push(Ack { position: known, duplicate: true });
            continue;
        }
        if rows.last().is_none_or(|(_, row)| row.len() >= LARGEST_ROW) {
            rows.push((position + 1, RowWriter::new(now)));
        }
        position += 1;
        if let Some((_, row)) = rows.last_mut() {
            row.push(message);
        }
        added.insert(id, position);
        acks.push(Ack { position, duplicate: false });
    }
    let rows: Vec<_> = rows
        .into_iter()
        .filter(|(_, row)| row.count() > 0)
        .map(|(first, row)| (first, row.finish(first)))
        .collect();
    tail.bytes = write(database, &rows, (position, tail.bytes), bounds, now)?;
    for (id, position) in added {
        tail.known.insert(id, position, now);
    }
    tail.last_position = position;
    tail.last_stored_at = now;
    Ok(acks)
}

/// The commit itself: new rows in, rows beyond the bounds out; returns the bytes that are left.
fn write(
    database: &Database,
    new: &[(u64, Vec<u8>)],
    (last_position, bytes_before): (u64, u64),
    bounds: Bounds,
    now: Timestamp,
) -> Result<u64, EmbeddedError> {
    let added: u64 = new.iter().map(|(_, row)| row.len() as u64).sum();
    let writing = database.begin_write().map_err(FileError::write)?;
    let bytes = {
        let mut rows = writing.open_table(ROWS).map_err(FileError::write)?;
        for (first, row) in new {
            rows.insert(first, row.as_slice()).map_err(FileError::write)?;
        }
        let bytes = drop_beyond(&mut rows, bounds, bytes_before + added, now)?;
        let mut numbers = writing.open_table(NUMBERS).map_err(FileError::write)?;
        numbers.insert("last_position", last_position).map_err(FileError::write)?;
        numbers.insert("bytes", bytes).map_err(FileError::write)?;
        bytes
    };
    if new.is_empty() && bytes == bytes_before {
        writing.abort().map_err(FileError::write)?;
    } else {
        writing.commit().map_err(FileError::write)?;
    }
    Ok(bytes)
}

fn drop_beyond(
    rows: &mut Table<'_, u64, &'static [u8]>,
    bounds: Bounds,
    mut bytes: u64,
    now: Timestamp,
) -> Result<u64, EmbeddedError> {
    let oldest = now - bounds.max_age;
    loop {
        let Some((length, too_old)) = rows.first().map_err(FileError::read)?.map(|(first, row)| {
            let row = row.value();
            // It is looked at in every commit and nearly always stays: only then is the whole of it read. One that nobody
            // can read is of no use to anybody.
            let may_stay =
                row::unchecked_header(row).is_some_and(|head| (oldest..=now).contains(&head.stored_at));
            let is_older = |header: row::RowHeader| header.stored_at < oldest;
            (row.len() as u64, !may_stay && row::header(row, first.value()).is_none_or(is_older))
        }) else {
            return Ok(0);
        };
        if !too_old && bytes <= bounds.max_bytes {
            return Ok(bytes);
        }
        rows.pop_first().map_err(FileError::write)?;
        bytes = bytes.saturating_sub(length);
    }
}

/// First position stored at or after `time`, by halving. A damaged row counts as not older: too much is read rather than too
/// little.
fn position_at(database: &Database, time: Timestamp) -> Result<u64, EmbeddedError> {
    let rows = database.begin_read().map_err(FileError::read)?.open_table(ROWS).map_err(FileError::read)?;
    let (Some((first, _)), Some((last, row))) =
        (rows.first().map_err(FileError::read)?, rows.last().map_err(FileError::read)?)
    else {
        return Ok(0);
    };
    let mut low = first.value();
    let mut high = last.value() + row::header(row.value(), last.value()).map_or(1, |header| header.count);
    while low < high {
        let middle = low + (high - low) / 2;
        let Some(found) = rows.range(..=middle).map_err(FileError::read)?.next_back() else {
            break;
        };
        let (row_first, value) = found.map_err(FileError::read)?;
        let header = row::header(value.value(), row_first.value());
        match header.filter(|header| header.stored_at < time) {
            Some(header) => low = row_first.value() + header.count,
            None => high = row_first.value(),
        }
    }
    Ok(low)
}

/// Ids of events and of dead letters share a map: a dead letter's is the complement of its event's.
fn key(id: MessageId) -> u128 {
    if id.is_dead_letter { !id.event.as_u128() } else { id.event.as_u128() }
}

#[cfg(test)]
mod tests;
