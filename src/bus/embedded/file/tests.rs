//! The stream's file does as a list would, and trusts nothing that is not what was written.

use std::path::PathBuf;
use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::envelope::id::event_id;

const KIND: &str = "external.chat.message.v1";
const SUBJECT: &str = "internal.ingress.v1";
const WINDOW_MS: i64 = 10_000;
const AGE_MS: i64 = 30_000;

fn at(milliseconds: i64) -> Timestamp {
    Timestamp::from_millisecond(1_700_000_000_000 + milliseconds).unwrap()
}

fn message(id: u8) -> Message {
    Message {
        subject: Arc::from(SUBJECT),
        id: MessageId { event: event_id(&id.to_string()), is_dead_letter: false },
        kind: KIND.into(),
        by_user: None,
        payload: vec![id; 40].into(),
    }
}

struct Scene {
    path: PathBuf,
    bounds: Bounds,
    clock: Clock,
    file: Option<StreamFile>,
    _folder: tempfile::TempDir,
}

impl Scene {
    fn new(max_bytes: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let milliseconds = |of: i64| Duration::from_millis(of.unsigned_abs());
        let bounds =
            Bounds { max_age: milliseconds(AGE_MS), max_bytes, duplicate_window: milliseconds(WINDOW_MS) };
        let path = folder.path().join("stream.redb");
        let mut scene = Self { path, bounds, clock: Clock::by_hand(at(0)), file: None, _folder: folder };
        scene.reopen();
        scene
    }

    fn reopen(&mut self) {
        self.file = None;
        self.file = Some(StreamFile::open(&self.path, self.bounds, self.clock.clone()).unwrap());
    }

    fn file(&self) -> &StreamFile {
        self.file.as_ref().unwrap()
    }

    fn append(&self, ids: &[u8]) -> Vec<Ack> {
        let messages: Vec<_> = ids.iter().map(|id| message(*id)).collect();
        self.file().append(&messages.iter().collect::<Vec<_>>()).unwrap()
    }

    /// Positions and ids from there on.
    fn read(&self, position: u64) -> Vec<(u64, u8)> {
        let (batch, _) = self.file().read(position, Wanted::Whole).unwrap();
        batch.messages.iter().map(|stored| (stored.position, stored.payload[0])).collect()
    }

    /// Changes the bytes of the row at `first`.
    fn spoil(&self, first: u64, spoil: impl FnOnce(&mut Vec<u8>)) {
        let spoiled = self.file().file.change(|database| {
            let writing = database.begin_write().map_err(FileError::write)?;
            {
                let mut rows = writing.open_table(ROWS).map_err(FileError::write)?;
                let mut row = rows.get(first).map_err(FileError::read)?.unwrap().value().to_vec();
                spoil(&mut row);
                rows.insert(first, &*row).map_err(FileError::write)?;
            }
            writing.commit().map_err(FileError::write)
        });
        spoiled.unwrap();
    }
}

#[test]
fn a_time_that_is_not_what_was_written_misleads_nobody() {
    // In the time, little-endian behind the checksum: a day ahead, and beyond what there is.
    for bytes in [[0, 0, 0, 8], [0, 0, 0, 0x70]] {
        let mut scene = Scene::new(1 << 20);
        for id in 1..=3 {
            scene.append(&[id]);
            scene.clock.step(1_000);
        }
        for first in [2, 3] {
            scene.spoil(first, |row| row[8..12].iter_mut().zip(bytes).for_each(|(byte, flip)| *byte ^= flip));
        }
        scene.reopen();
        assert_eq!(
            scene.append(&[1, 4]),
            [Ack { position: 1, duplicate: true }, Ack { position: 4, duplicate: false }]
        );
        assert_eq!(scene.read(1), [(1, 1), (4, 4)], "neither age nor a gap takes what is sound");
        for (time, expected) in [(at(0), vec![(1, 1), (4, 4)]), (at(500), vec![(4, 4)])] {
            let position = scene.file().position_of(Start::Time(time)).unwrap();
            assert_eq!(scene.read(position), expected);
        }
    }
}

#[test]
fn a_row_that_lies_elsewhere_than_it_was_written_is_damaged() {
    let scene = Scene::new(1 << 20);
    scene.append(&[1]);
    let mut other = RowWriter::new(at(0));
    other.push(&message(9));
    let row = other.finish(7);
    scene.spoil(1, |bytes| *bytes = row);
    assert!(scene.read(1).is_empty());
}

#[test]
fn a_file_of_the_format_before_is_read_and_gone_on_with() {
    let mut scene = Scene::new(1 << 20);
    scene.append(&[1, 2]);
    scene.spoil(1, |row| {
        let checksum = crc32fast::hash(&row[4..]);
        row[..4].copy_from_slice(&checksum.to_le_bytes());
    });
    let before = scene.file().file.change(|database| {
        let writing = database.begin_write().map_err(FileError::write)?;
        writing
            .open_table(NUMBERS)
            .map_err(FileError::write)?
            .insert("format", 2)
            .map_err(FileError::write)?;
        writing.commit().map_err(FileError::write)
    });
    before.unwrap();
    scene.reopen();
    assert_eq!(
        scene.append(&[2, 3]),
        [Ack { position: 2, duplicate: true }, Ack { position: 3, duplicate: false }]
    );
    assert_eq!(scene.read(1), [(1, 1), (2, 2), (3, 3)]);
}

/// A commit: its first position, when, and whose.
struct Row {
    first: u64,
    at: Timestamp,
    ids: Vec<u8>,
}

impl Row {
    fn bytes(&self) -> u64 {
        let each = 16 + 1 + 1 + KIND.len() + 2 + SUBJECT.len() + 4 + 40;
        (4 + 8 + 4 + self.ids.len() * each) as u64
    }

    fn messages(&self) -> impl Iterator<Item = (u64, u8)> {
        (self.first..).zip(self.ids.iter().copied())
    }
}

/// What the file is to hold.
struct Model {
    rows: Vec<Row>,
    last: u64,
    last_at: Timestamp,
    /// The latest time that the clock showed: what was out of the window then may be forgotten, though the clock goes back.
    latest: Timestamp,
    /// Whatever was ever taken in, and where.
    taken: Vec<(u64, u8)>,
}

impl Model {
    fn append(&mut self, scene: &Scene, ids: &[u8]) {
        let now = scene.clock.now().max(self.last_at);
        self.latest = self.latest.max(now);
        let mut new = Row { first: self.last + 1, at: now, ids: vec![] };
        for (id, ack) in ids.iter().zip(scene.append(ids)) {
            let is_theirs = |row: &Row| row.ids.contains(id);
            let is_in_window = self
                .rows
                .iter()
                .chain([&new])
                .filter(|row| is_theirs(row))
                .any(|row| (self.latest - row.at).total(jiff::Unit::Millisecond).unwrap() <= 10_000.0);
            if ack.duplicate {
                // Ids may be known for longer, and of rows that are gone.
                assert!(self.taken.contains(&(ack.position, *id)), "{id}");
            } else {
                assert!(!is_in_window, "{id} is taken again");
                self.taken.push((ack.position, *id));
                new.ids.push(*id);
                assert_eq!(ack.position, self.last + new.ids.len() as u64);
            }
        }
        self.last += new.ids.len() as u64;
        self.last_at = now;
        if !new.ids.is_empty() {
            self.rows.push(new);
        }
        let oldest = now - scene.bounds.max_age;
        while self.rows.first().is_some_and(|row| {
            row.at < oldest || self.rows.iter().map(Row::bytes).sum::<u64>() > scene.bounds.max_bytes
        }) {
            self.rows.remove(0);
        }
    }

    fn check(&self, scene: &Scene) {
        let all: Vec<_> = self.rows.iter().flat_map(Row::messages).collect();
        for position in [0, self.last / 2, self.last, self.last + 1] {
            let expected: Vec<_> = all.iter().copied().filter(|found| found.0 >= position).collect();
            assert_eq!(scene.read(position), expected, "from {position}");
        }
        for row in &self.rows {
            let later = self.rows.iter().filter(|other| other.at >= row.at).flat_map(Row::messages);
            let position = scene.file().position_of(Start::Time(row.at)).unwrap();
            assert_eq!(scene.read(position), later.collect::<Vec<_>>(), "from {}", row.at);
        }
        let first = self.rows.first().map_or(self.last + 1, |row| row.first);
        assert_eq!(
            (scene.file().first_position().unwrap(), *scene.file().head().borrow()),
            (first, self.last)
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, ..ProptestConfig::default() })]

    /// Each step: ids to append, how far the clock goes, and whether the file is opened anew behind it.
    #[test]
    fn it_does_as_a_list_would(
        steps in prop::collection::vec(
            (prop::collection::vec(0..12_u8, 0..6), prop_oneof![Just(-500_i64), 0..12_000_i64], prop::bool::weighted(0.2)),
            1..25,
        )
    ) {
        let mut scene = Scene::new(1_500);
        let start = Timestamp::UNIX_EPOCH;
        let mut model = Model { rows: vec![], last: 0, last_at: start, latest: start, taken: vec![] };
        for (ids, later, is_reopened) in steps {
            scene.clock.step(later);
            model.append(&scene, &ids);
            if is_reopened {
                scene.reopen();
                model.last_at = model.rows.last().map_or(Timestamp::UNIX_EPOCH, |row| row.at);
            }
            model.check(&scene);
        }
    }
}
