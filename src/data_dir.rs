//! `DATA_DIR`: one holder at a time, who is named to the next one.

pub mod medium;

use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::Deserialize;
use thiserror::Error;

use crate::errors::ErrorCode;

const LOCK: &str = "lock";

/// Somebody who only looks has the lock for less than this.
const LONGEST_LOOK: Duration = Duration::from_millis(500);
const BETWEEN_ATTEMPTS: Duration = Duration::from_millis(20);

/// Why the folder cannot be used.
#[derive(Debug, Error)]
pub enum DataDirError {
    /// Somebody else uses it.
    #[error("{} is in use by {holder}", path.display())]
    Held {
        /// The folder.
        path: PathBuf,
        /// Who says to hold it.
        holder: String,
    },
    /// It cannot be made or written.
    #[error("{} cannot be used", path.display())]
    Unusable {
        /// The folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Why a file in it must be left alone.
#[derive(Debug, Error)]
#[error("{} has format {format}, this version reads up to {known}", path.display())]
pub struct NewerFormat {
    path: PathBuf,
    format: u32,
    known: u32,
}

/// Fails if a later version wrote this small file of JSON.
pub fn check_format(path: &Path, text: &[u8], known: u32) -> Result<(), NewerFormat> {
    #[derive(Deserialize)]
    struct Head {
        format: u32,
    }
    match serde_json::from_slice::<Head>(text) {
        Ok(Head { format }) if format > known => Err(NewerFormat { path: path.to_owned(), format, known }),
        _ => Ok(()),
    }
}

/// Puts a small file of its owner's alone in the place of the one before, whole or not at all, and on the disk before this
/// returns.
pub fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    let beside = path.with_extension("json.new");
    // One that a crash left may have another mode.
    match std::fs::remove_file(&beside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&beside)?;
    file.write_all(content)?;
    file.sync_all()?;
    std::fs::rename(&beside, path)?;
    path.parent().map_or(Ok(()), |folder| File::open(folder)?.sync_all())
}

/// Makes the folder, if it is not there, for its owner's eyes alone: what people said and who they are lies in it. One
/// that is there is left as it is.
pub fn make(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// The folder as it stands; nothing is made or written.
#[derive(Debug)]
pub struct Seen {
    /// The folder, or what of it is there already.
    pub there: PathBuf,
    /// Who holds it.
    pub holder: Option<String>,
}

/// Looks at the folder. For a moment its lock is taken, if nobody has it.
pub fn look(path: &Path) -> Result<Seen, DataDirError> {
    let unusable = |source| DataDirError::Unusable { path: path.to_owned(), source };
    let absolute = std::path::absolute(path).map_err(unusable)?;
    // A file in its place is there as well, and no folder can be made.
    let there = absolute.ancestors().find(|path| path.exists()).unwrap_or(&absolute).to_owned();
    if !there.is_dir() {
        return Err(unusable(io::ErrorKind::NotADirectory.into()));
    }
    let mut lock = match OpenOptions::new().read(true).write(true).open(path.join(LOCK)) {
        Ok(lock) => lock,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Ok(Seen { there, holder: None });
        }
        Err(error) => return Err(unusable(error)),
    };
    match lock.try_lock() {
        Ok(()) => Ok(Seen { there, holder: None }),
        Err(TryLockError::WouldBlock) => {
            let holder = holder_in(&mut lock).map_err(unusable)?;
            Ok(Seen { there, holder: Some(holder) })
        }
        Err(TryLockError::Error(error)) => Err(unusable(error)),
    }
}

/// What the holder says in the lock.
fn holder_in(lock: &mut File) -> io::Result<String> {
    let mut holder = String::new();
    lock.read_to_string(&mut holder)?;
    Ok(if holder.is_empty() { "another process".to_owned() } else { holder })
}

/// The folder, held until this is dropped.
#[derive(Debug)]
pub struct DataDir {
    path: PathBuf,
    lock: File,
}

impl DataDirError {
    /// Whether somebody has to change the configuration; a full disk is no such thing.
    pub fn is_configuration(&self) -> bool {
        let full = [io::ErrorKind::StorageFull, io::ErrorKind::QuotaExceeded];
        !matches!(self, Self::Unusable { source, .. } if full.contains(&source.kind()))
    }
}

impl DataDir {
    /// The same for one who comes to stay: somebody may be looking at the folder just now. Blocks for that moment.
    pub fn take_for_good(path: &Path, holder: &str) -> Result<Self, DataDirError> {
        let deadline = Instant::now() + LONGEST_LOOK;
        loop {
            match Self::take(path, holder) {
                Err(DataDirError::Held { .. }) if Instant::now() < deadline => {
                    std::thread::sleep(BETWEEN_ATTEMPTS);
                }
                taken => return taken,
            }
        }
    }

    /// Takes the folder, making it if need be. `holder` is what another process that wants it is told.
    pub fn take(path: &Path, holder: &str) -> Result<Self, DataDirError> {
        let unusable = |source| DataDirError::Unusable { path: path.to_owned(), source };
        make(path).map_err(unusable)?;
        let mut lock = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path.join(LOCK))
            .map_err(unusable)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let holder = holder_in(&mut lock).map_err(unusable)?;
                return Err(DataDirError::Held { path: path.to_owned(), holder });
            }
            Err(TryLockError::Error(error)) => return Err(unusable(error)),
        }
        let mut this = Self { path: path.to_owned(), lock };
        this.say(holder);
        Ok(this)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Changes what another process that wants the folder is told. It is held all the same where that cannot be written: the
    /// disk may be full.
    pub fn say(&mut self, holder: &str) {
        let mut say = || {
            self.lock.set_len(0)?;
            self.lock.rewind()?;
            self.lock.write_all(holder.as_bytes())
        };
        if let Err(error) = say() {
            tracing::warn!(error_code = %ErrorCode::NoteUnusable, error = %error, path = %self.path.display(), "who holds the data folder cannot be written into it");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_is_told_who_the_first_is() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new");
        let first = DataDir::take(&path, "inlet serve, process 7").unwrap();
        match DataDir::take(&path, "second") {
            Err(DataDirError::Held { holder, .. }) => assert_eq!(holder, "inlet serve, process 7"),
            other => panic!("{other:?}"),
        }
        drop(first);
        assert_eq!(DataDir::take(&path, "third").unwrap().path(), path);
    }

    #[test]
    fn a_new_folder_is_for_its_owner_alone_and_an_old_one_stays_as_it_is() {
        use std::os::unix::fs::PermissionsExt as _;
        let folder = tempfile::tempdir().unwrap();
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        let path = folder.path().join("new");
        drop(DataDir::take(&path, "first").unwrap());
        assert_eq!(mode(&path), 0o700);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o750)).unwrap();
        drop(DataDir::take(&path, "second").unwrap());
        assert_eq!(mode(&path), 0o750);
    }

    #[test]
    fn a_look_tells_the_holder_and_makes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new").join("deeper");
        let seen = look(&path).unwrap();
        assert_eq!((seen.there.as_path(), seen.holder), (folder.path(), None));
        assert!(!path.exists());
        let held = DataDir::take(&path, "inlet serve, process 7").unwrap();
        assert_eq!(look(&path).unwrap().holder.as_deref(), Some("inlet serve, process 7"));
        drop(held);
        assert_eq!(look(&path).unwrap().holder, None);
        assert!(look(&path.join(LOCK)).is_err() && look(&path.join(LOCK).join("x")).is_err());
    }

    #[test]
    fn who_only_looks_keeps_nobody_out() {
        let folder = tempfile::tempdir().unwrap();
        let looking = DataDir::take(folder.path(), "somebody who looks").unwrap();
        std::thread::scope(|scope| {
            let taking = scope.spawn(|| DataDir::take_for_good(folder.path(), "inlet serve, process 7"));
            std::thread::sleep(BETWEEN_ATTEMPTS);
            drop(looking);
            assert!(taking.join().unwrap().is_ok());
        });
    }

    #[test]
    fn a_full_disk_is_no_configuration() {
        let of = |kind: io::ErrorKind| DataDirError::Unusable { path: PathBuf::new(), source: kind.into() };
        assert!(!of(io::ErrorKind::StorageFull).is_configuration());
        assert!(of(io::ErrorKind::PermissionDenied).is_configuration());
    }

    #[test]
    fn a_file_in_its_place_is_said() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(matches!(DataDir::take(file.path(), "x"), Err(DataDirError::Unusable { .. })));
    }
}
