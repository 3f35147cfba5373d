//! A row of events as bytes: a checksum over everything behind it, a head, how many there are, and each of them.
//! Integers are little-endian.

use bytes::BufMut as _;

/// Bytes of the checksum, a crc32.
pub const CHECKSUM: usize = 4;

/// Writes a row.
#[derive(Debug)]
pub struct RowWriter {
    bytes: Vec<u8>,
    count_at: usize,
    count: u32,
}

impl RowWriter {
    /// A row with these numbers for a head, and nothing in it.
    pub fn new(head: &[i64]) -> Self {
        let mut bytes = Vec::with_capacity(4096);
        bytes.put_u32_le(0);
        for number in head {
            bytes.put_i64_le(*number);
        }
        let count_at = bytes.len();
        bytes.put_u32_le(0);
        Self { bytes, count_at, count: 0 }
    }

    /// Where the next event's bytes go, which is counted.
    pub fn begin_event(&mut self) -> &mut Vec<u8> {
        self.count += 1;
        &mut self.bytes
    }

    /// Bytes so far.
    pub fn size(&self) -> usize {
        self.bytes.len()
    }

    /// Events so far.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// The row.
    pub fn finish(self) -> Vec<u8> {
        self.sealed(crc32fast::hash)
    }

    /// The row, whose checksum is right at this key alone.
    pub fn finish_at(self, key: u64) -> Vec<u8> {
        self.sealed(|rest| hash_at(key, rest))
    }

    fn sealed(mut self, hash: impl FnOnce(&[u8]) -> u32) -> Vec<u8> {
        self.bytes[self.count_at..self.count_at + 4].copy_from_slice(&self.count.to_le_bytes());
        let checksum = hash(&self.bytes[CHECKSUM..]);
        self.bytes[..CHECKSUM].copy_from_slice(&checksum.to_le_bytes());
        self.bytes
    }
}

/// What stands behind the checksum, if that is right.
pub fn checked(row: &[u8]) -> Option<&[u8]> {
    checked_by(row, crc32fast::hash)
}

/// The same of a row that stands at this key. Rows made by [`RowWriter::finish`] are taken too, wherever they stand: one
/// that belongs elsewhere cannot be mistaken for such a one.
pub fn checked_at(key: u64, row: &[u8]) -> Option<&[u8]> {
    checked_by(row, |rest| hash_at(key, rest)).or_else(|| checked(row))
}

fn checked_by(row: &[u8], hash: impl FnOnce(&[u8]) -> u32) -> Option<&[u8]> {
    let (checksum, rest) = row.split_first_chunk()?;
    (hash(rest) == u32::from_le_bytes(*checksum)).then_some(rest)
}

fn hash_at(key: u64, rest: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&key.to_le_bytes());
    hasher.update(rest);
    hasher.finalize()
}

/// Text of at most 255 bytes, with its length before it.
#[expect(clippy::cast_possible_truncation, reason = "names and types are ours, and short")]
pub fn put_short(bytes: &mut Vec<u8>, text: &str) {
    bytes.put_u8(text.len() as u8);
    bytes.put_slice(text.as_bytes());
}

/// Text of less than 64 KiB, with its length before it.
#[expect(clippy::cast_possible_truncation, reason = "subjects and keys are bounded where they are made")]
pub fn put_long(bytes: &mut Vec<u8>, text: &str) {
    bytes.put_u16_le(text.len() as u16);
    bytes.put_slice(text.as_bytes());
}

/// A payload of less than 4 GiB, with its length before it: no bus takes a larger one.
#[expect(clippy::cast_possible_truncation, reason = "payloads are bounded by what the bus takes")]
pub fn put_payload(bytes: &mut Vec<u8>, payload: &[u8]) {
    bytes.put_u32_le(payload.len() as u32);
    bytes.put_slice(payload);
}
