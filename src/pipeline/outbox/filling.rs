//! A row of the outbox on its way to the disk.

use jiff::Timestamp;

use super::row::{self, Moment, RowWriter};
use crate::pipeline::enrich::Enriched;

/// A row is closed at this size, whatever still waits for the same commit; a larger event has one of its own.
const LARGEST_ROW: usize = 1 << 20;

/// A row that is being put together.
pub(in crate::pipeline) struct Filling {
    row: RowWriter,
    bytes: usize,
    /// What the row may take of the disk.
    room: u64,
    stored_at: Timestamp,
}

impl Filling {
    pub(super) fn new(number: u64, room: u64, moment: Moment) -> Self {
        let row = RowWriter::new(number, moment.at, moment);
        Self { row, bytes: row::EMPTY_ROW, room, stored_at: moment.at }
    }

    /// Adds an event, if it fits.
    pub(in crate::pipeline) fn push(&mut self, event: &Enriched) -> bool {
        let size = row::size_of(event);
        let fits = disk_bytes(self.bytes + size) <= self.room
            && (self.is_empty() || self.bytes + size <= LARGEST_ROW);
        if fits {
            self.row.push(event);
            self.bytes += size;
        }
        fits
    }

    pub(in crate::pipeline) fn is_empty(&self) -> bool {
        self.row.count() == 0
    }

    pub(super) fn stored_at(&self) -> Timestamp {
        self.stored_at
    }

    pub(super) fn finish(self) -> Vec<u8> {
        self.row.finish()
    }
}

/// What a row takes of the disk: the file gives it whole pages, and twice as many each time they do not do.
pub(super) fn disk_bytes(row: usize) -> u64 {
    (row as u64 + 64).next_power_of_two().max(4096)
}
