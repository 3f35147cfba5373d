//! A file to look at: redb mends what it opens, and here what it writes stays in memory.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::{Mutex, MutexGuard, PoisonError};

use redb::StorageBackend;

const BLOCK: usize = 4096;

/// The file with what was written over it.
#[derive(Debug)]
pub(super) struct Untouched {
    file: File,
    over: Mutex<Over>,
}

#[derive(Debug)]
struct Over {
    len: u64,
    /// What of the file shows through; it was cut here at the shortest.
    shown: u64,
    blocks: BTreeMap<u64, Box<[u8; BLOCK]>>,
}

impl Untouched {
    pub(super) fn new(file: File) -> io::Result<Self> {
        let len = file.metadata()?.len();
        Ok(Self { file, over: Mutex::new(Over { len, shown: len, blocks: BTreeMap::new() }) })
    }

    fn over(&self) -> MutexGuard<'_, Over> {
        self.over.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn block(&self, over: &Over, index: u64) -> io::Result<Box<[u8; BLOCK]>> {
        if let Some(block) = over.blocks.get(&index) {
            return Ok(block.clone());
        }
        let mut block = Box::new([0; BLOCK]);
        let start = index * BLOCK as u64;
        let shown = usize::try_from(over.shown.saturating_sub(start)).unwrap_or(BLOCK).min(BLOCK);
        self.file.read_exact_at(&mut block[..shown], start)?;
        Ok(block)
    }

    /// The blocks of a stretch: index, where in the block it begins, and how much of it.
    fn stretch(offset: u64, length: usize) -> impl Iterator<Item = (u64, usize, usize)> {
        let mut done = 0;
        std::iter::from_fn(move || {
            let at = offset + done as u64;
            let begin = usize::try_from(at % BLOCK as u64).unwrap_or_default();
            let part = (length - done).min(BLOCK - begin);
            done += part;
            (part > 0).then_some((at / BLOCK as u64, begin, part))
        })
    }
}

impl StorageBackend for Untouched {
    fn len(&self) -> io::Result<u64> {
        Ok(self.over().len)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let over = self.over();
        if offset.checked_add(out.len() as u64).is_none_or(|end| end > over.len) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut done = 0;
        for (index, begin, part) in Self::stretch(offset, out.len()) {
            out[done..done + part].copy_from_slice(&self.block(&over, index)?[begin..begin + part]);
            done += part;
        }
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut over = self.over();
        if len < over.len {
            over.shown = over.shown.min(len);
            over.blocks.split_off(&len.div_ceil(BLOCK as u64));
            let rest = usize::try_from(len % BLOCK as u64).unwrap_or_default();
            if let Some(block) = over.blocks.get_mut(&(len / BLOCK as u64)).filter(|_| rest > 0) {
                block[rest..].fill(0);
            }
        }
        over.len = len;
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut over = self.over();
        let mut done = 0;
        for (index, begin, part) in Self::stretch(offset, data.len()) {
            let mut block = self.block(&over, index)?;
            block[begin..begin + part].copy_from_slice(&data[done..done + part]);
            over.blocks.insert(index, block);
            done += part;
        }
        over.len = over.len.max(offset + data.len() as u64);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn it_is_a_file_and_the_file_stays_as_it_was(
            before in prop::collection::vec(any::<u8>(), 0..20_000),
            steps in prop::collection::vec((0..30_000_u64, prop::collection::vec(any::<u8>(), 0..9_000), any::<bool>()), 1..12),
        ) {
            let file = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(file.path(), &before).unwrap();
            let untouched = Untouched::new(File::open(file.path()).unwrap()).unwrap();
            let mut model = before.clone();
            for (offset, data, cuts) in steps {
                if cuts {
                    untouched.set_len(offset).unwrap();
                    model.resize(usize::try_from(offset).unwrap(), 0);
                } else if !data.is_empty() {
                    untouched.write(offset, &data).unwrap();
                    let end = usize::try_from(offset).unwrap() + data.len();
                    model.resize(model.len().max(end), 0);
                    model[end - data.len()..end].copy_from_slice(&data);
                }
                let mut read = vec![0; model.len()];
                prop_assert_eq!(untouched.len().unwrap(), model.len() as u64);
                untouched.read(0, &mut read).unwrap();
                prop_assert!(read == model);
                prop_assert!(untouched.read(1, &mut read).is_err() || model.is_empty());
            }
            prop_assert_eq!(std::fs::read(file.path()).unwrap(), before);
        }
    }
}
