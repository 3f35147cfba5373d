//! One row: the messages of one commit, as bytes.
//!
//! ```text
//! crc32 u32 | stored at, Unix ms, i64 | count u32 | count × message
//! message = id 16 B | flags u8 | type u8+bytes | subject u16+bytes
//!         | of a user: key u16+bytes, occurred at, Unix ms, i64
//!         | payload u32+bytes
//! ```
//! Flags: 1 is a dead letter, 2 is of a user (since format 2).
//! Integers are little-endian; the checksum is over the row's position (since format 3) and everything behind it.

use std::sync::Arc;

use bytes::{Buf, BufMut, Bytes};
use jiff::Timestamp;
use uuid::Uuid;

use crate::bus::{ByUser, Message, Stored, Wanted};
use crate::envelope::MessageId;
use crate::redb_file::row;

const DEAD_LETTER: u8 = 1;
const OF_USER: u8 = 2;

/// Writes a row.
#[derive(Debug)]
pub(super) struct RowWriter(row::RowWriter);

impl RowWriter {
    pub(super) fn new(stored_at: Timestamp) -> Self {
        Self(row::RowWriter::new(&[stored_at.as_millisecond()]))
    }

    /// Adds a message.
    pub(super) fn push(&mut self, message: &Message) {
        let bytes = self.0.begin_event();
        bytes.put_slice(message.id.event.as_bytes());
        let is_dead_letter = if message.id.is_dead_letter { DEAD_LETTER } else { 0 };
        bytes.put_u8(is_dead_letter | if message.by_user.is_some() { OF_USER } else { 0 });
        row::put_short(bytes, &message.kind);
        row::put_long(bytes, &message.subject);
        if let Some(by_user) = &message.by_user {
            row::put_long(bytes, &by_user.key);
            bytes.put_i64_le(by_user.occurred_at.as_millisecond());
        }
        row::put_payload(bytes, &message.payload);
    }

    pub(super) fn len(&self) -> usize {
        self.0.size()
    }

    pub(super) fn count(&self) -> u32 {
        self.0.count()
    }

    /// The row, to stand at the position of its first message.
    pub(super) fn finish(self, first: u64) -> Vec<u8> {
        self.0.finish_at(first)
    }
}

/// What stands at the head of a row.
#[derive(Debug, Clone, Copy)]
pub(super) struct RowHeader {
    pub(super) stored_at: Timestamp,
    pub(super) count: u64,
}

/// Reads the head of the row at `first`; `None` if the row is not what was written.
pub(super) fn header(row: &[u8], first: u64) -> Option<RowHeader> {
    head(&mut row::checked_at(first, row)?)
}

/// Reads the head of a row whether or not the row is what was written.
pub(super) fn unchecked_header(row: &[u8]) -> Option<RowHeader> {
    head(&mut row.get(4..)?)
}

fn head(row: &mut &[u8]) -> Option<RowHeader> {
    let stored_at = Timestamp::from_millisecond(row.try_get_i64_le().ok()?).ok()?;
    let count = u64::from(row.try_get_u32_le().ok()?);
    Some(RowHeader { stored_at, count })
}

/// Reads a whole row whose first message is at `first`; `None` if it is not what was written.
pub(super) fn messages(row: &[u8], first: u64, content: Wanted) -> Option<Vec<Stored>> {
    let mut rest = row::checked_at(first, row)?;
    let RowHeader { stored_at, count } = head(&mut rest)?;
    let mut messages = Vec::new();
    let mut last_subject: Arc<str> = Arc::from("");
    for position in first..first + count {
        let event = Uuid::from_slice(take(&mut rest, 16)?).ok()?;
        let flags = rest.try_get_u8().ok()?;
        let kind_length = usize::from(rest.try_get_u8().ok()?);
        let kind = std::str::from_utf8(take(&mut rest, kind_length)?).ok()?.to_owned();
        let subject_length = usize::from(rest.try_get_u16_le().ok()?);
        let subject = std::str::from_utf8(take(&mut rest, subject_length)?).ok()?;
        if *last_subject != *subject {
            last_subject = Arc::from(subject);
        }
        let by_user = if flags & OF_USER == 0 { None } else { Some(by_user(&mut rest)?) };
        let payload_length = usize::try_from(rest.try_get_u32_le().ok()?).ok()?;
        let payload = take(&mut rest, payload_length)?;
        messages.push(Stored {
            position,
            stored_at,
            id: Some(MessageId { event, is_dead_letter: flags & DEAD_LETTER != 0 }),
            subject: Arc::clone(&last_subject),
            kind,
            by_user,
            payload: match content {
                Wanted::Whole => Bytes::copy_from_slice(payload),
                Wanted::Headers => Bytes::new(),
            },
        });
    }
    Some(messages)
}

fn by_user(rest: &mut &[u8]) -> Option<ByUser> {
    let length = usize::from(rest.try_get_u16_le().ok()?);
    let key = Arc::from(std::str::from_utf8(take(rest, length)?).ok()?);
    let occurred_at = Timestamp::from_millisecond(rest.try_get_i64_le().ok()?).ok()?;
    Some(ByUser { key, occurred_at })
}

fn take<'a>(rest: &mut &'a [u8], length: usize) -> Option<&'a [u8]> {
    let (taken, left) = rest.split_at_checked(length)?;
    *rest = left;
    Some(taken)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn rows_of_the_format_before_are_read_wherever_they_stand() {
        let mut writer = RowWriter::new(Timestamp::UNIX_EPOCH);
        writer.push(&message(b"x".to_vec(), true));
        let row = writer.0.finish();
        assert_eq!(messages(&row, 7, Wanted::Whole).unwrap()[0].position, 7);
        assert_eq!(header(&row, 7).unwrap().count, 1);
    }

    fn message(payload: Vec<u8>, dead: bool) -> Message {
        let event = crate::envelope::id::event_id(&format!("test:{payload:?}"));
        Message {
            subject: Arc::from("internal.ingress.v1"),
            id: MessageId { event, is_dead_letter: dead },
            kind: "external.chat.message.v1".into(),
            by_user: dead.then(|| ByUser { key: "twitch:1".into(), occurred_at: Timestamp::UNIX_EPOCH }),
            payload: payload.into(),
        }
    }

    proptest! {
        #[test]
        fn rows_come_back_as_written(payloads in prop::collection::vec(any::<(Vec<u8>, bool)>(), 1..20), first in 1..u64::MAX / 2) {
            let at = Timestamp::from_millisecond(1_700_000_000_123).unwrap();
            let mut writer = RowWriter::new(at);
            let written: Vec<_> = payloads.into_iter().map(|(payload, dead)| message(payload, dead)).collect();
            for message in &written {
                writer.push(message);
            }
            let row = writer.finish(first);
            prop_assert!(messages(&row, first + 1, Wanted::Whole).is_none(), "it belongs elsewhere");
            let read = messages(&row, first, Wanted::Whole).unwrap();
            prop_assert_eq!(read.len(), written.len());
            for (index, (read, written)) in read.iter().zip(&written).enumerate() {
                prop_assert_eq!(read.position, first + index as u64);
                prop_assert_eq!(read.id, Some(written.id));
                prop_assert_eq!(&read.payload, &written.payload);
                prop_assert_eq!(&read.by_user, &written.by_user);
                prop_assert_eq!(&*read.subject, &*written.subject);
                prop_assert_eq!(read.stored_at, at);
            }
        }

        #[test]
        fn damage_is_noticed_and_never_a_panic(
            payload in any::<Vec<u8>>(),
            place in any::<prop::sample::Index>(),
            bit in 0..8u8,
            cut in any::<prop::sample::Index>(),
        ) {
            let mut writer = RowWriter::new(Timestamp::UNIX_EPOCH);
            writer.push(&message(payload, false));
            let row = writer.finish(1);
            let mut flipped = row.clone();
            flipped[place.index(row.len())] ^= 1 << bit;
            prop_assert!(header(&flipped, 1).is_none() && messages(&flipped, 1, Wanted::Headers).is_none());
            prop_assert!(messages(&row[..cut.index(row.len())], 1, Wanted::Headers).is_none());
        }
    }
}
