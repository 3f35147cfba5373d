//! What a run leaves in `DATA_DIR` for the next one: who it is, up to when each channel was heard, and the gaps that
//! are not in the stream yet.

use std::collections::BTreeMap;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::gap::Gap;
use crate::errors::ErrorCode;

const FILE_NAME: &str = "twitch.json";
const FORMAT: u32 = 1;

/// Why the note cannot be used.
#[derive(Debug, Error)]
pub enum NoteError {
    /// Written by a later version, and left as it is.
    #[error("{} has format {format}, this version reads up to {FORMAT}", path.display())]
    NewerFormat {
        /// The file.
        path: PathBuf,
        /// Its format.
        format: u32,
    },
}

/// The note.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Note {
    format: u32,
    /// Random, the same for all runs on this folder.
    pub(super) instance: String,
    /// Up to when each channel was heard.
    pub(super) channels: BTreeMap<String, Timestamp>,
    /// Not in the stream yet, as far as is known.
    pub(super) gaps: Vec<Gap>,
}

impl Note {
    pub(super) fn new(instance: String, channels: BTreeMap<String, Timestamp>, gaps: Vec<Gap>) -> Self {
        Self { format: FORMAT, instance, channels, gaps }
    }
}

/// Where the note lies.
#[derive(Debug, Clone)]
pub(super) struct NoteFile(PathBuf);

impl NoteFile {
    pub(super) fn in_folder(folder: &Path) -> Self {
        Self(folder.join(FILE_NAME))
    }

    /// The last run's note. One that is torn or foreign is as good as none: it is said, and written anew.
    pub(super) fn read(&self) -> Result<Option<Note>, NoteError> {
        #[derive(Deserialize)]
        struct Head {
            format: u32,
        }
        let text = match std::fs::read(&self.0) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => {
                tracing::warn!(error_code = %ErrorCode::NoteUnusable, path = %self.0.display(), error = %error, "the last run's note cannot be read");
                return Ok(None);
            }
        };
        let head = serde_json::from_slice::<Head>(&text);
        if let Ok(Head { format }) = head
            && format > FORMAT
        {
            return Err(NoteError::NewerFormat { path: self.0.clone(), format });
        }
        match serde_json::from_slice(&text) {
            Ok(note) => Ok(Some(note)),
            Err(error) => {
                tracing::warn!(error_code = %ErrorCode::NoteUnusable, path = %self.0.display(), error = %error, "the last run's note is damaged");
                Ok(None)
            }
        }
    }

    /// Puts a note in the place of the one before, whole or not at all. Not flushed to the disk: a machine that goes
    /// down leaves an older note or none, which only makes a gap longer.
    pub(super) fn write(&self, note: &Note) -> io::Result<()> {
        let text = serde_json::to_vec(note)?;
        let beside = self.0.with_extension("json.new");
        std::fs::File::create(&beside)?.write_all(&text)?;
        std::fs::rename(&beside, &self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::envelope::draft::GapCause;

    #[test]
    fn a_note_is_read_back_and_a_damaged_one_is_as_good_as_none() {
        let folder = tempfile::tempdir().unwrap();
        let file = NoteFile::in_folder(folder.path());
        assert_eq!(file.read().unwrap(), None);
        let at = |second| Timestamp::from_second(second).unwrap();
        let gap = Gap { channel: "a".to_owned(), from: at(1), to: at(2), cause: GapCause::Silence };
        let note = Note::new("x".to_owned(), BTreeMap::from([("a".to_owned(), at(3))]), vec![gap]);
        for _ in 0..2 {
            file.write(&note).unwrap();
            assert_eq!(file.read().unwrap(), Some(note.clone()));
        }
        let whole = std::fs::read(folder.path().join(FILE_NAME)).unwrap();
        for length in 0..whole.len() {
            std::fs::write(folder.path().join(FILE_NAME), &whole[..length]).unwrap();
            assert_eq!(file.read().unwrap(), None, "{length} bytes of it");
        }
    }

    #[test]
    fn a_later_versions_note_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(FILE_NAME), br#"{"format":2,"what":"ever"}"#).unwrap();
        let read = NoteFile::in_folder(folder.path()).read();
        assert!(matches!(read, Err(NoteError::NewerFormat { format: 2, .. })), "{read:?}");
    }
}
