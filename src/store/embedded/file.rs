//! The store's file: documents by name, and a few numbers.

use std::path::Path;

use std::ops::Bound;

use redb::{Database, ReadOnlyTable, ReadableDatabase as _, ReadableTable as _, Table, TableDefinition};
use serde_json::Value;

use super::EmbeddedStoreError;
use crate::errors::ErrorCode;
use crate::redb_file::{FileError, NUMBERS, RedbFile};
use crate::store::{Change, Collection, Condition, Document, Fields, Name, Version, Write, document};

/// `collection/id` to a version (eight bytes, little endian), a checksum (four) and the fields as JSON. Documents of
/// format 1 have no checksum; their version has not [`HAS_CHECKSUM`].
const DOCUMENTS: TableDefinition<'static, &str, &[u8]> = TableDefinition::new("documents");

/// The bytes of damaged documents that were written over, by the same names: a person may yet read them.
const DAMAGED: TableDefinition<'static, &str, &[u8]> = TableDefinition::new("damaged");

/// Of this layout. A file with a higher one is left alone.
pub(super) const FORMAT: u64 = 2;

/// Set in the version of a document behind which a checksum stands: over its key, its version and its fields.
const HAS_CHECKSUM: u64 = 1 << 63;

pub(super) struct StoreFile(RedbFile);

/// What became of one write.
pub(super) enum Outcome {
    Written(Document),
    Deleted,
    Conflict,
}

impl StoreFile {
    pub(super) fn open(path: &Path) -> Result<Self, EmbeddedStoreError> {
        let file = RedbFile::open(path, FORMAT)?;
        // Nothing is written where nothing is lacking: the disk may be full.
        if file.with(documents).is_err() {
            file.change(|database| {
                let writing = database.begin_write().map_err(FileError::write)?;
                writing.open_table(DOCUMENTS).map_err(FileError::write)?;
                writing.commit().map_err(FileError::write)
            })?;
        }
        Ok(Self(file))
    }

    pub(super) fn get(&self, names: &[Name]) -> Result<Vec<Option<Document>>, EmbeddedStoreError> {
        self.0.with(|database| {
            let documents = documents(database)?;
            let one = |name: &Name| match documents.get(key(name).as_str()).map_err(FileError::read)? {
                None => Ok(None),
                Some(bytes) => Ok(Some(read(name, bytes.value()))),
            };
            names.iter().map(one).collect()
        })
    }

    /// All documents of the collection whose bytes hold `needle` and that `wanted` takes.
    pub(super) fn find(
        &self,
        collection: &Collection,
        needle: &str,
        wanted: impl Fn(&Fields) -> bool,
    ) -> Result<Vec<(Name, Document)>, EmbeddedStoreError> {
        let prefix = format!("{}/", collection.as_str());
        // Spares parsing what cannot be meant: most users were never edited.
        let needle = memchr::memmem::Finder::new(needle);
        self.0.with(|database| {
            let documents = documents(database)?;
            let mut found = Vec::new();
            for entry in documents.range(prefix.as_str()..).map_err(FileError::read)? {
                let (key, bytes) = entry.map_err(FileError::read)?;
                let Some(id) = key.value().strip_prefix(&prefix) else { break };
                if is_below(id) || needle.find(bytes.value()).is_none() {
                    continue;
                }
                let name = Name { collection: collection.clone(), id: id.into() };
                let document = read(&name, bytes.value());
                if wanted(&document.fields) {
                    found.push((name, document));
                }
            }
            Ok(found)
        })
    }

    /// At most `limit` documents of the collection, behind `after`.
    pub(super) fn list(
        &self,
        collection: &Collection,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Vec<(Name, Document)>, EmbeddedStoreError> {
        let prefix = format!("{}/", collection.as_str());
        let start = format!("{prefix}{}", after.unwrap_or_default());
        self.0.with(|database| {
            let documents = documents(database)?;
            let mut found = Vec::new();
            let range = (Bound::Excluded(start.as_str()), Bound::Unbounded);
            for entry in documents.range::<&str>(range).map_err(FileError::read)? {
                let (key, bytes) = entry.map_err(FileError::read)?;
                let Some(id) = key.value().strip_prefix(&prefix).filter(|_| found.len() < limit) else {
                    break;
                };
                if is_below(id) {
                    continue;
                }
                let name = Name { collection: collection.clone(), id: id.into() };
                let document = read(&name, bytes.value());
                found.push((name, document));
            }
            Ok(found)
        })
    }

    /// Writes what may be written, durably, in one commit; outcomes come in the order of `writes`. A later write
    /// sees the earlier ones.
    pub(super) fn write(&self, writes: &[Write]) -> Result<Vec<Outcome>, EmbeddedStoreError> {
        self.0.change(|database| commit(database, writes))
    }
}

fn commit(database: &Database, writes: &[Write]) -> Result<Vec<Outcome>, EmbeddedStoreError> {
    let writing = database.begin_write().map_err(FileError::write)?;
    let mut outcomes = Vec::with_capacity(writes.len());
    {
        let mut documents = writing.open_table(DOCUMENTS).map_err(FileError::write)?;
        let mut damaged = writing.open_table(DAMAGED).map_err(FileError::write)?;
        let mut numbers = writing.open_table(NUMBERS).map_err(FileError::write)?;
        let mut version = numbers.get("version").map_err(FileError::read)?.map_or(0, |number| number.value());
        for write in writes {
            let outcome = apply(&mut documents, &mut damaged, write, Version(version + 1))?;
            version += u64::from(!matches!(outcome, Outcome::Conflict));
            outcomes.push(outcome);
        }
        numbers.insert("version", version).map_err(FileError::write)?;
    }
    writing.commit().map_err(FileError::write)?;
    Ok(outcomes)
}

fn apply(
    documents: &mut Table<'_, &'static str, &'static [u8]>,
    damaged: &mut Table<'_, &'static str, &'static [u8]>,
    write: &Write,
    version: Version,
) -> Result<Outcome, EmbeddedStoreError> {
    let key = key(&write.name);
    let before = match documents.get(key.as_str()).map_err(FileError::read)? {
        None => None,
        Some(bytes) => match decode(&write.name, bytes.value()) {
            Ok(document) => Some(document),
            Err(Damaged { version }) => {
                if matches!(write.change, Change::Set(_)) {
                    damaged.insert(key.as_str(), bytes.value()).map_err(FileError::write)?;
                }
                Some(Document { fields: Fields::new(), version })
            }
        },
    };
    let fields = match (write.condition, before) {
        (Condition::Absent | Condition::Always, None) => Fields::new(),
        (Condition::Always, Some(before)) => before.fields,
        (Condition::At(version), Some(before)) if before.version == version => before.fields,
        (Condition::Absent | Condition::At(_), _) => return Ok(Outcome::Conflict),
    };
    let Change::Set(changes) = &write.change else {
        documents.remove(key.as_str()).map_err(FileError::write)?;
        // Who is forgotten is forgotten here as well.
        damaged.remove(key.as_str()).map_err(FileError::write)?;
        return Ok(Outcome::Deleted);
    };
    let document = Document { fields: merged(fields, changes), version };
    documents.insert(key.as_str(), encode(&write.name, &document).as_slice()).map_err(FileError::write)?;
    Ok(Outcome::Written(document))
}

/// The fields with those of `changes` in their places.
fn merged(mut fields: Fields, changes: &Fields) -> Fields {
    for (path, value) in changes {
        let mut map = &mut fields;
        let (parents, last) =
            path.rsplit_once('.').map_or((None, path.as_str()), |(all, last)| (Some(all), last));
        for parent in parents.into_iter().flat_map(|parents| parents.split('.')) {
            let place = map.entry(parent).or_insert(Value::Null);
            if !place.is_object() {
                *place = Value::Object(Fields::new());
            }
            let Value::Object(inside) = place else { return fields };
            map = inside;
        }
        map.insert(last.to_owned(), value.clone());
    }
    fields
}

fn documents(database: &Database) -> Result<ReadOnlyTable<&'static str, &'static [u8]>, FileError> {
    database.begin_read().map_err(FileError::read)?.open_table(DOCUMENTS).map_err(FileError::read)
}

/// Whether it is the name of a document in a collection of its own below one of these: a token document may lie anywhere.
fn is_below(id: &str) -> bool {
    id.contains('/')
}

fn key(name: &Name) -> String {
    name.to_string()
}

fn encode(name: &Name, document: &Document) -> Vec<u8> {
    // Maps with text as keys always serialise.
    let fields = serde_json::to_vec(&document.fields).unwrap_or_default();
    let version = (document.version.0 | HAS_CHECKSUM).to_le_bytes();
    [&version[..], &checksum(name, version, &fields).to_le_bytes(), &fields].concat()
}

/// Not what was written; the version is what its bytes say.
#[derive(Debug)]
struct Damaged {
    version: Version,
}

/// The document, or in the place of a damaged one what says so.
fn read(name: &Name, bytes: &[u8]) -> Document {
    decode(name, bytes).unwrap_or_else(|Damaged { version }| {
        tracing::error!(error_code = %ErrorCode::BadStoredValue, document = %name, "a document of the embedded store is damaged; it is taken as empty");
        Document { fields: document::damaged(), version }
    })
}

fn decode(name: &Name, bytes: &[u8]) -> Result<Document, Damaged> {
    let (version, mut fields) = bytes.split_first_chunk().ok_or(Damaged { version: Version(0) })?;
    let number = u64::from_le_bytes(*version);
    let damaged = || Damaged { version: Version(number & !HAS_CHECKSUM) };
    if number & HAS_CHECKSUM != 0 {
        let (expected, rest) = fields.split_first_chunk().ok_or_else(damaged)?;
        if checksum(name, *version, rest) != u32::from_le_bytes(*expected) {
            return Err(damaged());
        }
        fields = rest;
    }
    let fields = serde_json::from_slice(fields).map_err(|_| damaged())?;
    Ok(Document { fields, version: Version(number & !HAS_CHECKSUM) })
}

fn checksum(name: &Name, version: [u8; 8], fields: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(key(name).as_bytes());
    hasher.update(&version);
    hasher.update(fields);
    hasher.finalize()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::store::fields;

    #[test]
    fn a_path_leaves_what_stands_beside_it() {
        let before = json!({ "a": { "b": { "x": 1 }, "c": 2 }, "d": 3, "e": 4 });
        let changes = json!({ "a.b": { "y": 5 }, "d": { "z": 6 }, "e.f.g": 7 });
        let after = json!({ "a": { "b": { "y": 5 }, "c": 2 }, "d": { "z": 6 }, "e": { "f": { "g": 7 } } });
        assert_eq!(merged(fields(before), &fields(changes)), fields(after));
    }

    #[test]
    fn a_document_of_the_format_before_is_read_and_a_damaged_one_is_not() {
        let name = Name::user("7".into());
        let document = Document { fields: fields(json!({ "messageCountAllTime": 12 })), version: Version(3) };
        let before = [&3_u64.to_le_bytes()[..], br#"{"messageCountAllTime":12}"#].concat();
        assert_eq!(decode(&name, &before).unwrap(), document);
        let written = encode(&name, &document);
        assert_eq!(decode(&name, &written).unwrap(), document);
        for at in 0..written.len() * 8 {
            let mut flipped = written.clone();
            flipped[at / 8] ^= 1 << (at % 8);
            assert!(decode(&name, &flipped).is_err(), "bit {at}");
        }
        assert!(decode(&Name::user("8".into()), &written).is_err(), "another's");
    }

    #[test]
    fn a_damaged_document_spoils_itself_alone_and_its_bytes_are_kept() {
        let folder = tempfile::tempdir().unwrap();
        let file = StoreFile::open(&folder.path().join("users.redb")).unwrap();
        let [torn, short, sound] = ["1", "2", "3"].map(|id| Name::user(id.into()));
        let set = |name: &Name, n: u64| Write::set(name.clone(), fields(json!({ "n": n })));
        file.write(&[set(&torn, 1), set(&short, 2), set(&sound, 3)]).unwrap();
        let mut bytes = encode(&torn, &Document { fields: fields(json!({ "n": 1 })), version: Version(1) });
        *bytes.last_mut().unwrap() ^= 1;
        file.0
            .change(|database| {
                let writing = database.begin_write().map_err(FileError::write)?;
                {
                    let mut documents = writing.open_table(DOCUMENTS).map_err(FileError::write)?;
                    documents.insert(key(&torn).as_str(), &*bytes).map_err(FileError::write)?;
                    documents.insert(key(&short).as_str(), &b"x"[..]).map_err(FileError::write)?;
                }
                writing.commit().map_err(FileError::write)
            })
            .unwrap();
        let read: Vec<_> = file.get(&[torn.clone(), short.clone(), sound]).unwrap();
        let read: Vec<_> = read.into_iter().flatten().collect();
        assert_eq!(read[0], Document { fields: document::damaged(), version: Version(1) });
        assert_eq!(read[1], Document { fields: document::damaged(), version: Version(0) });
        assert_eq!(read[2].fields, fields(json!({ "n": 3 })));
        assert_eq!(document::read_user(&read[0].fields).1, ["applied"], "it is counted as a bad value");
        let over = Write::over(torn.clone(), Some(read[0].version), fields(json!({ "n": 4 })));
        assert!(matches!(&file.write(&[over, set(&short, 5)]).unwrap()[..], [
            Outcome::Written(first),
            Outcome::Written(second),
        ] if first.fields == fields(json!({ "n": 4 })) && second.fields == fields(json!({ "n": 5 }))));
        assert_eq!((kept(&file, &torn), kept(&file, &short)), (Some(bytes), Some(b"x".to_vec())));
        let delete =
            |name: &Name| Write { name: name.clone(), change: Change::Delete, condition: Condition::Always };
        file.write(&[delete(&torn)]).unwrap();
        assert_eq!((kept(&file, &torn), kept(&file, &short)), (None, Some(b"x".to_vec())));
    }

    /// The bytes that were set aside.
    fn kept(file: &StoreFile, name: &Name) -> Option<Vec<u8>> {
        let kept = file.0.with(|database| {
            let kept = database.begin_read().map_err(FileError::read)?.open_table(DAMAGED);
            let kept = kept.map_err(FileError::read)?.get(key(name).as_str()).map_err(FileError::read)?;
            Ok::<_, FileError>(kept.map(|bytes| bytes.value().to_vec()))
        });
        kept.unwrap()
    }

    #[test]
    fn what_lies_below_a_document_is_none_of_its_collection() {
        let folder = tempfile::tempdir().unwrap();
        let file = StoreFile::open(&folder.path().join("users.redb")).unwrap();
        let below = Name { collection: Collection::Other("users/1/private".into()), id: "token".into() };
        let names = [Name::user("1".into()), below.clone(), Name::user("2".into())];
        let set = |name: &Name| Write::set(name.clone(), fields(json!({ "n": 1 })));
        file.write(&names.each_ref().map(set)).unwrap();
        let listed = |collection: &Collection, limit| -> Vec<_> {
            file.list(collection, None, limit).unwrap().into_iter().map(|(name, _)| name).collect()
        };
        assert_eq!(listed(&Collection::Users, 2), [names[0].clone(), names[2].clone()]);
        assert_eq!(file.find(&Collection::Users, "n", |_| true).unwrap().len(), 2);
        assert_eq!(listed(&below.collection, 9), [below]);
    }

    /// A write of one of three documents: which, one of three fields, a value, and a condition: 0 none, 1 absent,
    /// else the version that many writes ago.
    type Step = (u8, u8, u64, u64);

    fn step_of((id, field, value, condition): Step, last: u64) -> Write {
        let condition = match condition {
            0 => Condition::Always,
            1 => Condition::Absent,
            ago => Condition::At(Version(last.saturating_sub(ago - 2))),
        };
        let fields = fields(json!({ format!("f.{field}"): value }));
        Write { name: Name::user(id.to_string().into()), change: Change::Set(fields), condition }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 16, ..ProptestConfig::default() })]

        #[test]
        fn it_does_as_a_map_would(
            groups in prop::collection::vec(prop::collection::vec((0..3_u8, 0..3_u8, 0..9_u64, 0..5_u64), 1..6), 1..12)
        ) {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("users.redb");
            let mut file = StoreFile::open(&path).unwrap();
            let mut model: BTreeMap<Name, (u64, BTreeMap<String, u64>)> = BTreeMap::new();
            let mut last = 0;
            for (turn, group) in groups.into_iter().enumerate() {
                let writes: Vec<_> = group.iter().map(|step| step_of(*step, last)).collect();
                let outcomes = file.write(&writes).unwrap();
                for ((write, outcome), (_, field, value, _)) in writes.iter().zip(outcomes).zip(group) {
                    let holds = match (write.condition, model.get(&write.name)) {
                        (Condition::Always, _) | (Condition::Absent, None) => true,
                        (Condition::At(version), Some((at, _))) => version.0 == *at,
                        (Condition::Absent, Some(_)) | (Condition::At(_), None) => false,
                    };
                    prop_assert_eq!(holds, matches!(outcome, Outcome::Written(_)));
                    if holds {
                        last += 1;
                        let document = model.entry(write.name.clone()).or_default();
                        document.0 = last;
                        document.1.insert(field.to_string(), value);
                    }
                }
                if turn % 4 == 3 {
                    drop(file);
                    file = StoreFile::open(&path).unwrap();
                }
                for id in 0..3 {
                    let name = Name::user(id.to_string().into());
                    let wanted = model.get(&name).map(|(version, values)| Document {
                        fields: fields(json!({ "f": values })),
                        version: Version(*version),
                    });
                    prop_assert_eq!(&file.get(&[name]).unwrap(), &[wanted]);
                }
            }
        }
    }
}
