//! Who is not taken in, in a small file of `DATA_DIR`: for a start while the store is away.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::Bar;
use crate::data_dir::{self, NewerFormat};
use crate::errors::ErrorCode;

const FILE_NAME: &str = "barred.json";
const FORMAT: u32 = 1;
/// Keys in the file, which is written anew with each change. Those who are forgotten come first.
const MOST: usize = 100_000;

/// What stands in it.
#[derive(Default, Serialize, Deserialize)]
struct Content {
    format: u32,
    forgotten: Vec<String>,
    ignored: Vec<String>,
}

/// The file.
pub(super) struct Kept {
    path: PathBuf,
}

impl Kept {
    /// The file in `folder`, and who stands in it. One that is torn is as good as none.
    pub(super) fn open(folder: &Path) -> Result<(Self, impl Iterator<Item = (Arc<str>, Bar)>), NewerFormat> {
        let path = folder.join(FILE_NAME);
        let content = match std::fs::read(&path) {
            Ok(text) => {
                data_dir::check_format(&path, &text, FORMAT)?;
                serde_json::from_slice(&text).map_err(io::Error::from)
            }
            Err(error) => Err(error),
        };
        let Content { forgotten, ignored, .. } = content.unwrap_or_else(|error| {
            if error.kind() != io::ErrorKind::NotFound {
                tracing::warn!(error_code = %ErrorCode::NoteUnusable, path = %path.display(), error = %error, "who was not taken in before cannot be read");
            }
            Content::default()
        });
        let of = |keys: Vec<String>, bar| keys.into_iter().map(move |key| (key.into(), bar));
        Ok((Self { path }, of(ignored, Bar::Ignored).chain(of(forgotten, Bar::Forgotten))))
    }

    /// Puts them in the place of those before.
    pub(super) async fn put(&self, bars: Vec<(String, Bar)>) -> io::Result<()> {
        let path = self.path.clone();
        let writing = tokio::task::spawn_blocking(move || {
            let (forgotten, ignored): (Vec<_>, Vec<_>) =
                bars.into_iter().partition(|(_, bar)| *bar == Bar::Forgotten);
            let keys =
                |bars: Vec<(String, Bar)>, most| bars.into_iter().map(|(key, _)| key).take(most).collect();
            let forgotten: Vec<_> = keys(forgotten, MOST);
            let ignored = keys(ignored, MOST - forgotten.len());
            data_dir::replace(&path, &serde_json::to_vec(&Content { format: FORMAT, forgotten, ignored })?)
        });
        writing.await.unwrap_or_else(|error| Err(io::Error::other(error)))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[tokio::test]
    async fn it_is_its_owners_alone_and_bounded_and_a_later_versions_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let (kept, found) = Kept::open(folder.path()).unwrap();
        assert_eq!(found.count(), 0);
        let many = |bar| (0..70_000).map(move |id| (format!("twitch:{id}"), bar));
        kept.put(many(Bar::Ignored).chain(many(Bar::Forgotten)).collect()).await.unwrap();
        let path = folder.path().join(FILE_NAME);
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let found: Vec<_> = Kept::open(folder.path()).unwrap().1.collect();
        let forgotten = found.iter().filter(|(_, bar)| *bar == Bar::Forgotten).count();
        assert_eq!((found.len(), forgotten), (MOST, 70_000));
        std::fs::write(&path, "torn").unwrap();
        assert_eq!(Kept::open(folder.path()).unwrap().1.count(), 0);
        std::fs::write(&path, r#"{"format":2}"#).unwrap();
        let error = Kept::open(folder.path()).err().unwrap();
        assert!(error.to_string().contains("has format 2"), "{error}");
    }
}
