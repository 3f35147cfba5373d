//! The outbox's file: rows by number, in the order of their events.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use redb::{ReadableDatabase as _, ReadableTable as _, TableDefinition};

use super::row::{self, Moment, Row, RowWriter};
use crate::pipeline::enrich::Enriched;
use crate::redb_file::{FileError, RedbFile, guarded, is_sound, open_untouched};

const ROWS: TableDefinition<'static, u64, &[u8]> = TableDefinition::new("rows");

/// Of this layout. A file with a higher one is left alone.
pub(super) const FORMAT: u64 = 1;

/// How much one read brings, in bytes of rows; one row at least.
const READ_BYTES: usize = 2 << 20;

pub(super) struct OutboxFile {
    file: RedbFile,
}

/// What one commit does.
#[derive(Debug, Default)]
pub(super) struct Change {
    /// A new row.
    pub(super) append: Option<(u64, Vec<u8>)>,
    /// Events that take the place of those with the same id, in their rows.
    pub(super) replace: Vec<(u64, Enriched)>,
    /// Rows in which everything is settled.
    pub(super) remove: Vec<u64>,
    /// Nothing is left: the room is given back.
    pub(super) compact: bool,
}

/// A file that was not as it should be.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct SetAside {
    /// Where it is now.
    pub(super) path: PathBuf,
    /// Rows that could be read, and were taken over.
    pub(super) rescued: u64,
}

impl OutboxFile {
    /// Opens the file, or makes it. One that is torn, or none of ours, is set aside; what can be read of it is taken
    /// over.
    pub(super) fn open(path: &Path, moment: Moment) -> Result<(Self, Option<SetAside>), FileError> {
        match Self::open_sound(path) {
            Ok(file) => Ok((file, None)),
            Err(error) if error.is_of_content() => {
                let aside =
                    path.with_added_extension(format!("torn-{}", moment.at.strftime("%Y%m%dT%H%M%SZ")));
                std::fs::rename(path, &aside).map_err(FileError::write)?;
                let file = Self::open_sound(path)?;
                let rescued = file.rescue(&aside, moment);
                Ok((file, Some(SetAside { path: aside, rescued })))
            }
            Err(error) => Err(error),
        }
    }

    fn open_sound(path: &Path) -> Result<Self, FileError> {
        if !is_sound(path, FORMAT)? {
            return Err(FileError::Damaged);
        }
        let file = RedbFile::open(path, FORMAT)?;
        file.change(|database| {
            let writing = database.begin_write().map_err(FileError::write)?;
            let is_there = writing.list_tables().map_err(FileError::read)?.count() > 1;
            if is_there {
                return writing.abort().map_err(FileError::write);
            }
            writing.open_table(ROWS).map_err(FileError::write)?;
            writing.commit().map_err(FileError::write)
        })?;
        Ok(Self { file })
    }

    /// Takes over the rows of a damaged file, as far as they are found from its front and from its back.
    fn rescue(&self, damaged: &Path, moment: Moment) -> u64 {
        let taken = RefCell::new(BTreeSet::new());
        for is_from_back in [false, true] {
            let read = guarded(|| {
                let database = open_untouched(damaged)?;
                let reading = database.begin_read().map_err(FileError::read)?;
                let rows = reading.open_table(ROWS).map_err(FileError::read)?;
                let mut rows = rows.iter().map_err(FileError::read)?;
                while let Some(found) = if is_from_back { rows.next_back() } else { rows.next() } {
                    let (number, row) = found.map_err(FileError::read)?;
                    if taken.borrow_mut().insert(number.value()) {
                        let append = Some((number.value(), row.value().to_vec()));
                        self.write(&Change { append, ..Change::default() }, moment)?;
                    }
                }
                Ok::<_, FileError>(())
            });
            match read {
                Err(error) if !error.is_of_content() => {
                    tracing::debug!(error = %error, "a damaged outbox cannot be read further");
                }
                Ok(()) | Err(_) => {}
            }
        }
        taken.into_inner().len() as u64
    }

    /// Lets go of the file until it is used next.
    pub(super) fn close(&self) {
        self.file.close();
    }

    /// One durable commit. What it does may be done again: a failed one may have been written all the same.
    pub(super) fn write(&self, change: &Change, moment: Moment) -> Result<(), FileError> {
        self.file.change(|database| {
            let mut writing = database.begin_write().map_err(FileError::write)?;
            // A file that need not be mended at the next start is read as it is then, damaged rows or not.
            writing.set_quick_repair(true);
            {
                let mut rows = writing.open_table(ROWS).map_err(FileError::write)?;
                if let Some((number, row)) = &change.append {
                    rows.insert(number, row.as_slice()).map_err(FileError::write)?;
                }
                for (number, event) in &change.replace {
                    let found = rows
                        .get(number)
                        .map_err(FileError::read)?
                        .map(|row| replaced(row.value(), event, moment));
                    if let Some(Some(row)) = found {
                        rows.insert(number, row.as_slice()).map_err(FileError::write)?;
                    }
                }
                for number in &change.remove {
                    rows.remove(number).map_err(FileError::write)?;
                }
            }
            writing.commit().map_err(FileError::write)
        })?;
        if change.compact { self.file.compact() } else { Ok(()) }
    }

    /// Rows from this number on, and no more than fit into one read; a row that is not what was written is `None`.
    pub(super) fn read(
        &self,
        from: u64,
        moment: Moment,
    ) -> Result<Vec<(u64, usize, Option<Row>)>, FileError> {
        self.file.with(|database| {
            let rows =
                database.begin_read().map_err(FileError::read)?.open_table(ROWS).map_err(FileError::read)?;
            let mut read = Vec::new();
            let mut bytes = 0;
            for found in rows.range(from..).map_err(FileError::read)? {
                if bytes >= READ_BYTES {
                    break;
                }
                let (number, row) = found.map_err(FileError::read)?;
                let (number, row) = (number.value(), Bytes::copy_from_slice(row.value()));
                bytes += row.len();
                let size = row.len();
                read.push((number, size, row::read(&row, moment).filter(|row| row.number == number)));
            }
            Ok(read)
        })
    }
}

/// The row with an event in the place of the one with its id.
fn replaced(row: &[u8], event: &Enriched, moment: Moment) -> Option<Vec<u8>> {
    let row = row::read(&Bytes::copy_from_slice(row), moment)?;
    let mut writer = RowWriter::new(row.number, row.stored_at, moment);
    for stored in &row.events {
        writer.push(if stored.message.id.event == event.message.id.event { event } else { stored });
    }
    Some(writer.finish())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::pipeline::outbox::row::tests::{Kind, assert_same, event_of, moment};

    fn row_of(number: u64, kinds: &[Kind]) -> Vec<u8> {
        let mut writer = RowWriter::new(number, moment().at, moment());
        for kind in kinds {
            writer.push(&event_of(kind));
        }
        writer.finish()
    }

    /// The rows of a file, damaged ones as `None`; read in pieces as the service does.
    fn rows(file: &OutboxFile) -> BTreeMap<u64, Option<Row>> {
        let mut rows = BTreeMap::new();
        let mut next = 0;
        loop {
            let read = file.read(next, moment()).unwrap();
            let Some((last, _, _)) = read.last() else { return rows };
            next = last + 1;
            rows.extend(read.into_iter().map(|(number, _, row)| (number, row)));
        }
    }

    fn open(path: &Path) -> (OutboxFile, Option<SetAside>) {
        OutboxFile::open(path, moment()).unwrap()
    }

    fn assert_holds(file: &OutboxFile, model: &BTreeMap<u64, Vec<Kind>>) {
        let rows = rows(file);
        assert_eq!(rows.keys().collect::<Vec<_>>(), model.keys().collect::<Vec<_>>());
        for (row, kinds) in rows.values().zip(model.values()) {
            let row = row.as_ref().unwrap();
            assert_eq!(row.events.len(), kinds.len());
            row.events.iter().zip(kinds).for_each(|(event, kind)| assert_same(event, &event_of(kind)));
        }
    }

    #[derive(Debug, Clone)]
    enum Step {
        Append(Vec<Kind>),
        /// Of the rows there are, counted round.
        Remove(usize),
        Bury(usize, usize),
        /// Closed and opened.
        Reopen,
        /// The process is killed: what lies on disk at that moment is what is found.
        Kill,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => prop::collection::vec(any::<Kind>(), 1..6).prop_map(Step::Append),
            2 => any::<usize>().prop_map(Step::Remove),
            1 => any::<(usize, usize)>().prop_map(|(row, event)| Step::Bury(row, event)),
            1 => Just(Step::Reopen),
            1 => Just(Step::Kill),
        ]
    }

    fn nth(model: &BTreeMap<u64, Vec<Kind>>, index: usize) -> Option<u64> {
        model.keys().nth(index % model.len().max(1)).copied()
    }

    fn buried(kind: &Kind) -> Kind {
        (kind.0, b"a dead letter".to_vec(), true, kind.3)
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

        #[test]
        fn it_holds_what_was_written_and_not_removed(steps in prop::collection::vec(step(), 1..24)) {
            let folder = tempfile::tempdir().unwrap();
            let mut path = folder.path().join("outbox.redb");
            let mut file = open(&path).0;
            let mut model = BTreeMap::new();
            for (turn, step) in steps.into_iter().enumerate() {
                let mut change = Change::default();
                match step {
                    Step::Append(kinds) => {
                        let number = model.keys().next_back().map_or(1, |last| last + 1);
                        change.append = Some((number, row_of(number, &kinds)));
                        model.insert(number, kinds);
                    }
                    Step::Remove(index) => {
                        let number = nth(&model, index);
                        change.remove.extend(number);
                        number.map(|number| model.remove(&number));
                    }
                    Step::Bury(row, event) => {
                        if let Some(number) = nth(&model, row) {
                            let kinds = model.get_mut(&number).unwrap();
                            let index = event % kinds.len();
                            let letter = buried(&kinds[index]);
                            change.replace.push((number, event_of(&letter)));
                            // Two of a test may be the same event.
                            for kind in kinds.iter_mut().filter(|kind| kind.0 == letter.0) {
                                *kind = letter.clone();
                            }
                        }
                    }
                    Step::Reopen => {
                        drop(file);
                        let (opened, aside) = open(&path);
                        prop_assert_eq!(aside, None);
                        file = opened;
                    }
                    Step::Kill => {
                        let found = folder.path().join(format!("after-{turn}.redb"));
                        std::fs::copy(&path, &found).unwrap();
                        path = found;
                        let (opened, aside) = open(&path);
                        prop_assert_eq!(aside, None);
                        file = opened;
                    }
                }
                file.write(&change, moment()).unwrap();
                // And again, as after a failure that was none.
                file.write(&change, moment()).unwrap();
            }
            assert_holds(&file, &model);
        }

        /// A bit anywhere, in a file that was closed or was not: it opens, what it brings is what was written, and of the
        /// rest no more is lost than what stands on the page that is damaged.
        #[test]
        fn a_flipped_bit_costs_no_more_than_its_page(
            place in any::<prop::sample::Index>(),
            bit in 0..8_u8,
            was_killed in any::<bool>(),
        ) {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("outbox.redb");
            let file = open(&path).0;
            // Each on pages of its own.
            let model: BTreeMap<u64, Vec<Kind>> =
                (1..=12).map(|number| (number, vec![(u32::try_from(number).unwrap(), vec![7; 6_000], false, true)])).collect();
            for (number, kinds) in &model {
                let append = Some((*number, row_of(*number, kinds)));
                file.write(&Change { append, ..Change::default() }, moment()).unwrap();
            }
            let damaged = folder.path().join("damaged.redb");
            if was_killed {
                std::fs::copy(&path, &damaged).unwrap();
            } else {
                drop(file);
                std::fs::rename(&path, &damaged).unwrap();
            }
            let mut bytes = std::fs::read(&damaged).unwrap();
            let at = place.index(bytes.len());
            bytes[at] ^= 1 << bit;
            std::fs::write(&damaged, &bytes).unwrap();
            let (file, aside) = open(&damaged);
            let found = rows(&file);
            for (number, row) in &found {
                if let Some(row) = row {
                    assert_same(&row.events[0], &event_of(&model[number][0]));
                }
            }
            let whole = found.values().flatten().count();
            prop_assert!(whole >= model.len() - 1 || aside.is_some(), "{whole} rows, nothing was said");
            // And it takes more.
            let append = Some((99, row_of(99, &[(99, vec![1], false, false)])));
            file.write(&Change { append, ..Change::default() }, moment()).unwrap();
            prop_assert!(rows(&file)[&99].is_some());
        }
    }

    #[test]
    fn a_foreign_file_is_set_aside() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("outbox.redb");
        std::fs::write(&path, b"something else altogether").unwrap();
        let (file, aside) = open(&path);
        let aside = aside.unwrap();
        assert_eq!(
            (std::fs::read(&aside.path).unwrap().as_slice(), aside.rescued),
            (&b"something else altogether"[..], 0)
        );
        assert!(rows(&file).is_empty());
        let name = aside.path.file_name().unwrap().to_str().unwrap();
        assert_eq!(name, "outbox.redb.torn-20231114T221500Z");
    }

    #[test]
    fn what_can_be_read_of_a_torn_file_is_taken_over() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("outbox.redb");
        let file = open(&path).0;
        for number in 1..=40 {
            let kind = (u32::try_from(number).unwrap(), vec![5; 6_000], false, true);
            let append = Some((number, row_of(number, &[kind])));
            file.write(&Change { append, ..Change::default() }, moment()).unwrap();
        }
        drop(file);
        let mut bytes = std::fs::read(&path).unwrap();
        // A sector that was never written, within one of the rows.
        let row = memchr::memmem::find(&bytes, &[5; 5_000]).unwrap();
        bytes[row..row + 512].fill(0);
        std::fs::write(&path, &bytes).unwrap();
        let (file, aside) = open(&path);
        assert_eq!(aside.unwrap().rescued, 40);
        let rows = rows(&file);
        assert_eq!((rows.len(), rows.values().flatten().count()), (40, 39));
    }
}
