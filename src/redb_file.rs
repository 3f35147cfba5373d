//! A redb file of ours, whatever it holds: its format is checked, what redb keeps in memory is bounded, and after a
//! failed write, when redb refuses everything, it is opened again.

pub mod row;
mod untouched;

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock};

use redb::{Database, DatabaseError, ReadableDatabase, ReadableTable as _, TableDefinition};
use thiserror::Error;

/// Numbers that a file keeps beside its rows; `format` is one of them.
pub const NUMBERS: TableDefinition<'static, &str, u64> = TableDefinition::new("numbers");

/// What redb may keep in memory; its own default is 1 GiB.
const CACHE_BYTES: usize = 8 << 20;

/// Why a file cannot be used. Reads on behind the name of what it is.
#[derive(Debug, Error)]
pub enum FileError {
    /// Opening or reading failed.
    #[error("cannot be read: {0}")]
    Read(Box<redb::Error>),
    /// Writing failed; usually the disk.
    #[error("cannot be written: {0}")]
    Write(Box<redb::Error>),
    /// The file is of a later version of Inlet.
    #[error("has format {found}, this version of Inlet knows up to {known}")]
    NewerFormat {
        /// The file's.
        found: u64,
        /// Ours.
        known: u64,
    },
    /// Its pages contradict each other so badly that redb gave up.
    #[error("is damaged")]
    Damaged,
}

impl FileError {
    /// Of reading.
    pub fn read(error: impl Into<redb::Error>) -> Self {
        Self::Read(Box::new(error.into()))
    }

    /// Of writing.
    pub fn write(error: impl Into<redb::Error>) -> Self {
        Self::Write(Box::new(error.into()))
    }

    /// Whether trying again can help: a full disk can be emptied.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Write(_))
    }

    /// Whether the file is of a later version of Inlet.
    pub fn is_newer_format(&self) -> bool {
        matches!(self, Self::NewerFormat { .. })
    }

    /// Whether the file is at fault, torn or foreign, and not the disk or the folder that it lies in.
    pub fn is_of_content(&self) -> bool {
        use std::io::ErrorKind;
        match self {
            Self::Damaged => true,
            Self::NewerFormat { .. } => false,
            Self::Read(error) | Self::Write(error) => match &**error {
                redb::Error::Io(error) => matches!(
                    error.kind(),
                    ErrorKind::InvalidData | ErrorKind::UnexpectedEof | ErrorKind::InvalidInput
                ),
                redb::Error::Corrupted(_)
                | redb::Error::UpgradeRequired(_)
                | redb::Error::TableTypeMismatch { .. }
                | redb::Error::TableIsMultimap(_)
                | redb::Error::TypeDefinitionChanged { .. }
                | redb::Error::TableDoesNotExist(_) => true,
                _ => false,
            },
        }
    }
}

/// An open file.
pub struct RedbFile {
    path: PathBuf,
    /// `None` only until it is opened again after a failure.
    database: RwLock<Option<Database>>,
}

impl RedbFile {
    /// Opens the file, or makes it. One of a later format than `format` is left alone.
    pub fn open(path: &Path, format: u64) -> Result<Self, FileError> {
        let database = guarded(|| {
            check_untouched(path, format)?;
            let database = open_database(path)?;
            check(&database, format)?;
            Ok(database)
        })?;
        Ok(Self { path: path.to_owned(), database: RwLock::new(Some(database)) })
    }

    /// Does something that changes nothing.
    pub fn with<T, E: From<FileError>>(&self, work: impl FnOnce(&Database) -> Result<T, E>) -> Result<T, E> {
        {
            let guard = self.database.read().unwrap_or_else(PoisonError::into_inner);
            if let Some(database) = guard.as_ref() {
                return guarded(|| work(database));
            }
        }
        // A write failed; what stood in the way may have passed.
        let mut database = self.database.write().unwrap_or_else(PoisonError::into_inner);
        if database.is_none() {
            *database = Some(guarded(|| open_database(&self.path))?);
        }
        match database.as_ref() {
            Some(database) => guarded(|| work(database)),
            None => Err(FileError::read(redb::Error::PreviousIo).into()),
        }
    }

    /// Writes; after a failure the file is opened again before it is used next, since redb would refuse everything.
    pub fn change<T, E: From<FileError>>(
        &self,
        work: impl FnOnce(&Database) -> Result<T, E>,
    ) -> Result<T, E> {
        let changed = self.with(work);
        if changed.is_err() {
            self.close();
        }
        changed
    }

    /// Gives back what the file takes of the disk and does not need.
    pub fn compact(&self) -> Result<(), FileError> {
        let mut database = self.database.write().unwrap_or_else(PoisonError::into_inner);
        guarded(|| match database.as_mut().map(Database::compact) {
            Some(Err(error)) => Err(FileError::write(error)),
            Some(Ok(_)) | None => Ok(()),
        })
    }

    /// Lets go of the file, and of its lock, until it is used next.
    pub fn close(&self) {
        let database = self.database.write().unwrap_or_else(PoisonError::into_inner).take();
        let closed = guarded(|| {
            drop(database);
            Ok::<_, FileError>(())
        });
        drop(closed);
    }
}

/// Does something with a file. redb asserts what it takes for certain, and in a damaged file nothing is.
pub fn guarded<T, E: From<FileError>>(work: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| Err(FileError::Damaged.into()))
}

fn open_database(path: &Path) -> Result<Database, FileError> {
    Database::builder().set_cache_size(CACHE_BYTES).create(path).map_err(FileError::read)
}

/// Opens a file to look at it: it stays as it is, whatever redb thinks has to be mended.
pub fn open_untouched(path: &Path) -> Result<Database, FileError> {
    let backend = File::open(path).and_then(untouched::Untouched::new).map_err(FileError::read)?;
    Database::builder().set_cache_size(CACHE_BYTES).create_with_backend(backend).map_err(FileError::read)
}

/// Whether every page of a file is what was written, and the file of no later format than `known`; one that does not exist
/// is. It stays as it is.
pub fn is_sound(path: &Path, known: u64) -> Result<bool, FileError> {
    guarded(|| {
        if std::fs::metadata(path).map_or(0, |metadata| metadata.len()) == 0 {
            return Ok(true);
        }
        let mut database = open_untouched(path)?;
        check_format(&database, known)?;
        database.check_integrity().map_err(FileError::read)
    })
}

/// Whether a file can be opened as it stands: of no later format than `known`, and of redb's making. One that does not
/// exist can; one that was not closed well is mended by whoever opens it, and may. It stays as it is.
pub fn look(path: &Path, known: u64) -> Result<(), FileError> {
    guarded(|| {
        if std::fs::metadata(path).map_or(0, |metadata| metadata.len()) == 0 {
            return Ok(());
        }
        match Database::builder().set_cache_size(CACHE_BYTES).open_read_only(path) {
            Ok(database) => check_format(&database, known),
            Err(DatabaseError::RepairAborted) => Ok(()),
            Err(error) => Err(FileError::read(error)),
        }
    })
}

/// Looks at the format without a change to the file; opening it for writing makes one. A file that was not closed well
/// can only be looked at when it is mended.
fn check_untouched(path: &Path, known: u64) -> Result<(), FileError> {
    match Database::builder().set_cache_size(CACHE_BYTES).open_read_only(path) {
        Ok(database) => check_format(&database, known),
        Err(_) => Ok(()),
    }
}

fn check_format(database: &impl ReadableDatabase, known: u64) -> Result<(), FileError> {
    match database.begin_read().map_err(FileError::read)?.open_table(NUMBERS) {
        Ok(numbers) => {
            let found = numbers.get("format").map_err(FileError::read)?.map(|number| number.value());
            known_format(found, known)
        }
        Err(_) => Ok(()),
    }
}

fn known_format(found: Option<u64>, known: u64) -> Result<(), FileError> {
    match found.filter(|found| *found > known) {
        Some(found) => Err(FileError::NewerFormat { found, known }),
        None => Ok(()),
    }
}

/// Checks the format, and writes ours where there is none or an earlier one: those are read as they are.
fn check(database: &Database, known: u64) -> Result<(), FileError> {
    let writing = database.begin_write().map_err(FileError::write)?;
    let is_ours = {
        let mut numbers = writing.open_table(NUMBERS).map_err(FileError::write)?;
        let found = numbers.get("format").map_err(FileError::read)?.map(|number| number.value());
        known_format(found, known)?;
        if found != Some(known) {
            numbers.insert("format", known).map_err(FileError::write)?;
        }
        found == Some(known)
    };
    if is_ours {
        writing.abort().map_err(FileError::write)
    } else {
        writing.commit().map_err(FileError::write)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_of_a_later_version_is_left_alone_to_the_byte() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file.redb");
        drop(RedbFile::open(&path, 4).unwrap());
        let before = std::fs::read(&path).unwrap();
        assert!(matches!(RedbFile::open(&path, 3), Err(FileError::NewerFormat { found: 4, known: 3 })));
        assert!(std::fs::read(&path).unwrap() == before);
        drop(RedbFile::open(&path, 5).unwrap());
        assert!(matches!(RedbFile::open(&path, 4), Err(FileError::NewerFormat { found: 5, known: 4 })));
    }

    #[test]
    fn what_is_no_file_of_ours_is_told_from_a_disk_that_fails() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file.redb");
        std::fs::write(&path, b"something else altogether").unwrap();
        assert!(RedbFile::open(&path, 1).err().unwrap().is_of_content());
        assert!(!RedbFile::open(folder.path(), 1).err().unwrap().is_of_content());
    }

    #[test]
    fn after_a_failed_change_it_goes_on() {
        let folder = tempfile::tempdir().unwrap();
        let file = RedbFile::open(&folder.path().join("file.redb"), 1).unwrap();
        let failed = file.change(|_| Err::<(), _>(FileError::write(redb::Error::PreviousIo)));
        assert!(failed.unwrap_err().is_transient());
        let read = |database: &Database| {
            let reading = database.begin_read().map_err(FileError::read)?;
            let numbers = reading.open_table(NUMBERS).map_err(FileError::read)?;
            Ok::<_, FileError>(numbers.get("format").map_err(FileError::read)?.map(|number| number.value()))
        };
        assert_eq!(file.with(read).unwrap(), Some(1));
    }
}
