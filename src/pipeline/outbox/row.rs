//! One row of the outbox: the finished bytes of events, with all that is needed to send them and to settle them.
//!
//! ```text
//! crc32 u32 | row's number u64 | stored at, Unix ms, i64 | count u32 | count × event
//! event = id 16 B | flags u8 | source u8+bytes | taken in, Unix ms, i64 | not published before, Unix ms, i64
//!       | reason u8+bytes, of a dead letter | type u8+bytes | subject u16+bytes | key u16+bytes, of a user
//!       | occurred at, Unix ms, i64, where it is counted | payload u32+bytes
//! ```
//! Flags: 1 a dead letter, 2 of a user, 4 counted. Integers are little-endian; the checksum is over everything behind it.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Buf as _, BufMut as _, Bytes};
use jiff::{SignedDuration, Timestamp};
use uuid::Uuid;

use crate::bus::{ByUser, Message};
use crate::envelope::deadletter::DEAD_LETTER_TYPE;
use crate::envelope::{DeadLetterReason, EventType, MessageId, Origin};
use crate::pipeline::enrich::Enriched;
use crate::redb_file::row;
use crate::telemetry::metrics::Label;

const HEADER: usize = row::CHECKSUM + 8 + 8 + 4;

const DEAD_LETTER: u8 = 1;
const OF_USER: u8 = 2;
const COUNTED: u8 = 4;

/// The same moment on both clocks, to get from one to the other.
#[derive(Debug, Clone, Copy)]
pub(super) struct Moment {
    pub(super) at: Timestamp,
    pub(super) instant: Instant,
}

impl Moment {
    fn time_of(self, instant: Instant) -> Timestamp {
        let ago =
            SignedDuration::try_from(self.instant.saturating_duration_since(instant)).unwrap_or_default();
        self.at.checked_sub(ago).unwrap_or(Timestamp::UNIX_EPOCH)
    }

    fn instant_of(self, time: Timestamp) -> Instant {
        let ago = Duration::try_from(self.at.duration_since(time)).unwrap_or_default();
        // The monotonic clock may not reach back as far: it was another boot.
        self.instant.checked_sub(ago).unwrap_or(self.instant)
    }
}

/// Writes a row.
#[derive(Debug)]
pub(super) struct RowWriter {
    row: row::RowWriter,
    moment: Moment,
}

impl RowWriter {
    pub(super) fn new(number: u64, stored_at: Timestamp, moment: Moment) -> Self {
        Self { row: row::RowWriter::new(&[number.cast_signed(), stored_at.as_millisecond()]), moment }
    }

    pub(super) fn push(&mut self, event: &Enriched) {
        let message = &*event.message;
        let flags = [
            (message.id.is_dead_letter, DEAD_LETTER),
            (event.user.is_some(), OF_USER),
            (message.by_user.is_some(), COUNTED),
        ];
        let bytes = self.row.begin_event();
        bytes.put_slice(message.id.event.as_bytes());
        bytes.put_u8(flags.iter().filter(|(is_set, _)| *is_set).map(|(_, flag)| flag).sum());
        row::put_short(bytes, event.origin.as_str());
        bytes.put_i64_le(self.moment.time_of(event.taken_in).as_millisecond());
        bytes.put_i64_le(event.not_published_before.as_millisecond());
        if message.id.is_dead_letter {
            row::put_short(bytes, event.dead_letter.map_or("", Label::as_str));
        }
        row::put_short(bytes, &message.kind);
        row::put_long(bytes, &message.subject);
        if let Some(key) = &event.user {
            row::put_long(bytes, key);
        }
        if let Some(by_user) = &message.by_user {
            bytes.put_i64_le(by_user.occurred_at.as_millisecond());
        }
        row::put_payload(bytes, &message.payload);
    }

    pub(super) fn count(&self) -> u32 {
        self.row.count()
    }

    pub(super) fn finish(self) -> Vec<u8> {
        self.row.finish()
    }
}

/// What a row takes with nothing in it, and an event in it, in bytes: no less than it will be.
pub(super) const EMPTY_ROW: usize = HEADER;

/// The same of an event.
pub(super) fn size_of(event: &Enriched) -> usize {
    const FIXED: usize = 256;
    let key = event.user.as_ref().map_or(0, |key| key.len());
    FIXED + event.message.kind.len() + event.message.subject.len() + key + event.message.payload.len()
}

/// A row as it was written.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) number: u64,
    pub(super) stored_at: Timestamp,
    pub(super) events: Vec<Enriched>,
}

/// Reads a row back; `None` if it is not what was written. The events share its bytes.
pub(super) fn read(bytes: &Bytes, moment: Moment) -> Option<Row> {
    let mut rest = bytes.clone();
    row::checked(&rest)?;
    rest.advance(row::CHECKSUM);
    let number = rest.try_get_u64_le().ok()?;
    let stored_at = Timestamp::from_millisecond(rest.try_get_i64_le().ok()?).ok()?;
    let count = rest.try_get_u32_le().ok()?;
    let mut events = Vec::new();
    // Nearly always the same for all of them.
    let mut last_subject: Arc<str> = Arc::from("");
    for _ in 0..count {
        events.push(event(&mut rest, &mut last_subject, (number, moment))?);
    }
    Some(Row { number, stored_at, events })
}

fn event(rest: &mut Bytes, last_subject: &mut Arc<str>, (row, moment): (u64, Moment)) -> Option<Enriched> {
    let id = Uuid::from_slice(&take(rest, 16)?).ok()?;
    let flags = rest.try_get_u8().ok()?;
    let origin = label(&short(rest)?).unwrap_or(Origin::Twitch);
    let taken_in = moment.instant_of(time(rest)?);
    let not_published_before = time(rest)?;
    let is_dead_letter = flags & DEAD_LETTER != 0;
    let dead_letter =
        if is_dead_letter { Some(label(&short(rest)?).unwrap_or(DeadLetterReason::Refused)) } else { None };
    let kind = kind(&short(rest)?)?;
    let subject = long(rest)?;
    if last_subject.as_bytes() != subject {
        *last_subject = Arc::from(std::str::from_utf8(&subject).ok()?);
    }
    let user: Option<Arc<str>> =
        if flags & OF_USER == 0 { None } else { Some(Arc::from(std::str::from_utf8(&long(rest)?).ok()?)) };
    let by_user = if flags & COUNTED == 0 {
        None
    } else {
        Some(ByUser { key: Arc::clone(user.as_ref()?), occurred_at: time(rest)? })
    };
    let payload_length = usize::try_from(rest.try_get_u32_le().ok()?).ok()?;
    let payload = take(rest, payload_length)?;
    let message = Message {
        subject: Arc::clone(last_subject),
        id: MessageId { event: id, is_dead_letter },
        kind,
        by_user,
        payload,
    };
    Some(Enriched {
        origin,
        taken_in,
        finished: moment.instant.into(),
        not_published_before,
        message: Arc::new(message),
        user,
        dead_letter,
        slip: None,
        row: Some(row),
    })
}

/// Types are a few, known ones; another is one of a later version.
fn kind(text: &[u8]) -> Option<Cow<'static, str>> {
    let of_events =
        [EventType::ChatMessage, EventType::ChatNotice, EventType::ChatModeration, EventType::SourceGap];
    let mut known = of_events.iter().map(|kind| kind.as_str()).chain([DEAD_LETTER_TYPE]);
    match known.find(|known| known.as_bytes() == text) {
        Some(known) => Some(Cow::Borrowed(known)),
        None => Some(Cow::Owned(std::str::from_utf8(text).ok()?.to_owned())),
    }
}

fn label<L: Label>(text: &[u8]) -> Option<L> {
    L::ALL.iter().copied().find(|label| label.as_str().as_bytes() == text)
}

fn time(rest: &mut Bytes) -> Option<Timestamp> {
    Timestamp::from_millisecond(rest.try_get_i64_le().ok()?).ok()
}

fn short(rest: &mut Bytes) -> Option<Bytes> {
    let length = usize::from(rest.try_get_u8().ok()?);
    take(rest, length)
}

fn long(rest: &mut Bytes) -> Option<Bytes> {
    let length = usize::from(rest.try_get_u16_le().ok()?);
    take(rest, length)
}

fn take(rest: &mut Bytes, length: usize) -> Option<Bytes> {
    (rest.len() >= length).then(|| rest.split_to(length))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::envelope::id::event_id;
    use proptest::prelude::*;

    pub(in crate::pipeline::outbox) fn moment() -> Moment {
        Moment { at: Timestamp::from_millisecond(1_700_000_100_000).unwrap(), instant: Instant::now() }
    }

    /// What an event of a test is: key, payload, whether a dead letter, whether counted.
    pub(in crate::pipeline::outbox) type Kind = (u32, Vec<u8>, bool, bool);

    pub(in crate::pipeline::outbox) fn event_of(
        (key, payload, is_dead_letter, is_counted): &Kind,
    ) -> Enriched {
        let id = event_id(&format!("test:{key}"));
        let user: Arc<str> = format!("twitch:{}", key % 7).into();
        let occurred_at = Timestamp::from_millisecond(1_700_000_000_000 + i64::from(*key)).unwrap();
        let by_user =
            (*is_counted && !is_dead_letter).then(|| ByUser { key: Arc::clone(&user), occurred_at });
        Enriched {
            origin: if key % 2 == 0 { Origin::Twitch } else { Origin::Replay },
            taken_in: moment().instant,
            finished: moment().instant.into(),
            not_published_before: occurred_at,
            message: Arc::new(Message {
                subject: "internal.ingress.v1".into(),
                id: MessageId { event: id, is_dead_letter: *is_dead_letter },
                kind: if *is_dead_letter { DEAD_LETTER_TYPE } else { "external.of.tomorrow.v1" }.into(),
                by_user,
                payload: payload.clone().into(),
            }),
            user: is_counted.then_some(user),
            dead_letter: is_dead_letter.then_some(DeadLetterReason::TooLarge),
            slip: None,
            row: None,
        }
    }

    pub(in crate::pipeline::outbox) fn assert_same(read: &Enriched, written: &Enriched) {
        let of = |event: &Enriched| {
            let Message { subject, id, kind, by_user, payload } = (*event.message).clone();
            let about = (event.origin, event.not_published_before, event.user.clone(), event.dead_letter);
            (about, subject, id, kind, by_user, payload)
        };
        assert_eq!(of(read), of(written));
        let apart = read.taken_in.max(written.taken_in) - read.taken_in.min(written.taken_in);
        assert!(apart < Duration::from_secs(1), "{apart:?}");
    }

    proptest! {
        #[test]
        fn rows_come_back_as_written(kinds in prop::collection::vec(any::<Kind>(), 1..20), number in any::<u64>()) {
            let moment = moment();
            let written: Vec<_> = kinds.iter().map(event_of).collect();
            let mut writer = RowWriter::new(number, moment.at, moment);
            for event in &written {
                writer.push(event);
            }
            prop_assert_eq!(writer.count() as usize, written.len());
            let bytes = Bytes::from(writer.finish());
            prop_assert!(bytes.len() <= EMPTY_ROW + written.iter().map(size_of).sum::<usize>());
            let row = read(&bytes, moment).unwrap();
            prop_assert_eq!((row.number, row.stored_at, row.events.len()), (number, moment.at, written.len()));
            for (read, written) in row.events.iter().zip(&written) {
                prop_assert_eq!(read.row, Some(number));
                assert_same(read, written);
            }
        }

        #[test]
        fn damage_is_noticed_and_never_a_panic(
            kind in any::<Kind>(),
            place in any::<prop::sample::Index>(),
            bit in 0..8_u8,
            cut in any::<prop::sample::Index>(),
        ) {
            let mut writer = RowWriter::new(1, moment().at, moment());
            writer.push(&event_of(&kind));
            let row = writer.finish();
            let mut flipped = row.clone();
            flipped[place.index(row.len())] ^= 1 << bit;
            prop_assert!(read(&flipped.into(), moment()).is_none());
            prop_assert!(read(&Bytes::copy_from_slice(&row[..cut.index(row.len())]), moment()).is_none());
        }
    }
}
