//! What every store promises, on the embedded one and on Google's emulator of Firestore.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::{StreamExt as _, future};
use inlet::store::document::{read_user, shown_time};
use inlet::store::{
    self, Change, Changes, Collection, Condition, Document, DocumentStore, Edits, Fields, Name, Version,
    Write, WriteRefusal,
};
use jiff::Timestamp;
use serde_json::{Value, json};

use crate::harness::firestore::{Project, config};
use crate::harness::{PATIENCE, eventually};

/// A store and what it stands on.
pub(super) struct Fixture {
    store: Arc<dyn DocumentStore>,
    ground: Ground,
}

enum Ground {
    Embedded(tempfile::TempDir),
    Firestore(Project),
}

impl Fixture {
    async fn embedded() -> Self {
        Self::on(Ground::Embedded(tempfile::tempdir().unwrap())).await
    }

    pub(super) async fn firestore() -> Self {
        Self::on(Ground::Firestore(Project::new())).await
    }

    async fn on(ground: Ground) -> Self {
        let (config, folder) = match &ground {
            Ground::Embedded(folder) => (config(&["--user-store-driver", "embedded"]), folder.path()),
            Ground::Firestore(project) => (project.config(), std::path::Path::new("/nonexistent")),
        };
        // One that was just let go is still held for a moment by its writer.
        let store =
            eventually("the store's file is free", || async { store::open(&config, folder).ok() }).await;
        Self { store, ground }
    }

    /// The same store for another process, or after a restart.
    async fn reopen(self) -> Self {
        let Self { store, ground } = self;
        drop(store);
        Self::on(ground).await
    }

    async fn get(&self, name: &Name) -> Option<Document> {
        self.get_many(std::slice::from_ref(name)).await.pop().unwrap()
    }

    pub(super) async fn get_many(&self, names: &[Name]) -> Vec<Option<Document>> {
        bounded(self.store.get_many(names)).await.unwrap()
    }

    pub(super) async fn write_many(&self, writes: Vec<Write>) -> Vec<Result<Version, WriteRefusal>> {
        bounded(self.store.write_many(writes)).await.unwrap()
    }

    async fn delete(&self, name: &Name, condition: Condition) -> Result<Version, WriteRefusal> {
        let write = Write { name: name.clone(), change: Change::Delete, condition };
        self.write_many(vec![write]).await.pop().unwrap()
    }

    pub(super) async fn write(
        &self,
        name: &Name,
        fields: Value,
        condition: Condition,
    ) -> Result<Version, WriteRefusal> {
        self.write_many(vec![write(name, fields, condition)]).await.pop().unwrap()
    }
}

pub(super) async fn bounded<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, work).await.unwrap()
}

fn fields(value: Value) -> Fields {
    let Value::Object(fields) = value else { panic!("an object") };
    fields
}

pub(super) fn user(id: impl AsRef<str>) -> Name {
    Name::user(format!("twitch:{}", id.as_ref()).into())
}

pub(super) fn write(name: &Name, value: Value, condition: Condition) -> Write {
    Write { name: name.clone(), change: Change::Set(fields(value)), condition }
}

fn is_conflict(outcome: &Result<Version, WriteRefusal>) -> bool {
    matches!(outcome, Err(WriteRefusal::Conflict))
}

/// The first batch that brings something about a user.
async fn next_edit(edits: &mut Edits) -> Vec<(Name, Document)> {
    bounded(async {
        loop {
            let batch = edits.next().await.unwrap().unwrap();
            if !batch.is_empty() {
                return batch;
            }
        }
    })
    .await
}

/// One test for each store.
macro_rules! on_every_store {
    ($($name:ident),+ $(,)?) => {
        mod embedded { $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)] async fn $name() { super::$name(super::Fixture::embedded().await).await; })+ }
        mod firestore { $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)] async fn $name() { super::$name(super::Fixture::firestore().await).await; })+ }
    };
}

on_every_store!(
    what_is_written_is_read_back_and_what_is_not_is_missing,
    a_document_is_created_once,
    an_update_needs_the_version_that_was_read,
    an_operators_write_needs_nothing,
    fields_that_are_not_named_stay,
    times_keep_their_milliseconds,
    documents_of_one_call_stand_for_themselves,
    five_hundred_documents_at_once_keep_their_order,
    of_fifty_who_create_one_document_one_does,
    of_fifty_who_update_one_version_one_does,
    a_document_of_the_wrong_shape_is_read_field_by_field,
    a_restart_keeps_documents_and_versions,
    collections_are_apart_and_names_are_taken_as_they_are,
    what_is_deleted_is_gone_and_counts_as_changed,
    a_collection_is_listed_in_order_piece_by_piece,
    a_setting_may_name_a_collection_of_its_own,
    a_collection_is_followed_with_what_is_deleted,
    an_operators_edit_is_seen_within_two_seconds,
    following_again_brings_what_was_missed,
);

async fn what_is_written_is_read_back_and_what_is_not_is_missing(fixture: Fixture) {
    let [a, b, c] = ["a", "b", "c"].map(user);
    assert_eq!(fixture.get_many(&[a.clone(), b.clone()]).await, [None, None]);
    assert!(fixture.get_many(&[]).await.is_empty());
    assert!(fixture.write_many(Vec::new()).await.is_empty());
    let content = json!({
        "displayName": "Ä \"b\"\u{1f600}", "roles": ["vip", "subscriber"], "sessionCount": 3, "negative": -5,
        "ratio": 0.5, "is": true, "status": null, "applied": { "INLET@1700000000000000000": 9_007_199_254_740_993_u64 },
        "lastSeenAt": "2026-11-20T05:51:20.612Z", "empty": {}, "none": [],
    });
    let first = fixture.write(&b, content.clone(), Condition::Absent).await.unwrap();
    let second = fixture.write(&a, json!({ "sessionCount": 1 }), Condition::Absent).await.unwrap();
    assert!(second > first || matches!(fixture.ground, Ground::Firestore(_)));
    // In the order of the names, also where one is asked for twice.
    let read = fixture.get_many(&[c, b.clone(), a, b]).await;
    assert_eq!(read[0], None);
    assert_eq!(read[1], Some(Document { fields: fields(content), version: first }));
    assert_eq!(read[2], Some(Document { fields: fields(json!({ "sessionCount": 1 })), version: second }));
    assert_eq!(read[3], read[1]);
}

async fn a_document_is_created_once(fixture: Fixture) {
    let name = user("a");
    let version = fixture.write(&name, json!({ "sessionCount": 1 }), Condition::Absent).await.unwrap();
    let again = fixture.write(&name, json!({ "sessionCount": 2 }), Condition::Absent).await;
    assert!(is_conflict(&again), "{again:?}");
    let document = Document { fields: fields(json!({ "sessionCount": 1 })), version };
    assert_eq!(fixture.get(&name).await, Some(document));
}

async fn an_update_needs_the_version_that_was_read(fixture: Fixture) {
    let name = user("a");
    let early = fixture.write(&name, json!({ "sessionCount": 1 }), Condition::At(Version(1))).await;
    assert!(is_conflict(&early), "{early:?}");
    assert_eq!(fixture.get(&name).await, None);
    let first = fixture.write(&name, json!({ "sessionCount": 1 }), Condition::Absent).await.unwrap();
    let second = fixture.write(&name, json!({ "sessionCount": 2 }), Condition::At(first)).await.unwrap();
    assert!(second > first);
    let stale = fixture.write(&name, json!({ "sessionCount": 3 }), Condition::At(first)).await;
    assert!(is_conflict(&stale), "{stale:?}");
    let document = Document { fields: fields(json!({ "sessionCount": 2 })), version: second };
    assert_eq!(fixture.get(&name).await, Some(document));
    fixture.write(&name, json!({ "sessionCount": 3 }), Condition::At(second)).await.unwrap();
}

async fn what_is_deleted_is_gone_and_counts_as_changed(fixture: Fixture) {
    let [name, other] = ["a", "b"].map(user);
    let first = fixture.write(&name, json!({ "sessionCount": 1 }), Condition::Absent).await.unwrap();
    let second = fixture.write(&name, json!({ "sessionCount": 2 }), Condition::At(first)).await.unwrap();
    let stale = fixture.delete(&name, Condition::At(first)).await;
    assert!(is_conflict(&stale), "{stale:?}");
    fixture.delete(&name, Condition::At(second)).await.unwrap();
    assert_eq!(fixture.get(&name).await, None);
    let gone = fixture.write(&name, json!({ "sessionCount": 4 }), Condition::At(second)).await;
    assert!(is_conflict(&gone), "{gone:?}");
    assert_eq!(fixture.get(&name).await, None);
    let created = fixture.write(&name, json!({ "sessionCount": 1 }), Condition::Absent).await.unwrap();
    assert!(created > second);
    // Together with others, and where there is nothing to delete.
    let both = vec![
        Write { name: name.clone(), change: Change::Delete, condition: Condition::Always },
        write(&other, json!({ "sessionCount": 9 }), Condition::Absent),
        Write { name: user("nobody"), change: Change::Delete, condition: Condition::Always },
    ];
    assert!(fixture.write_many(both).await.iter().all(Result::is_ok));
    let read = fixture.get_many(&[name, other]).await;
    assert_eq!((&read[0], &read[1].as_ref().unwrap().fields["sessionCount"]), (&None, &json!(9)));
}

async fn a_collection_is_listed_in_order_piece_by_piece(fixture: Fixture) {
    let id = |n: usize| format!("twitch:{n:03}");
    let writes =
        (0..250).rev().map(|n| write(&user(format!("{n:03}")), json!({ "n": n }), Condition::Absent));
    fixture.write_many(writes.collect()).await;
    fixture.write(&Name::note("twitch:004"), json!({ "n": -1 }), Condition::Absent).await.unwrap();
    let mut found = Vec::new();
    let mut after: Option<Arc<str>> = None;
    loop {
        let piece = bounded(fixture.store.list(Collection::Users, after, 100)).await.unwrap();
        let Some((last, _)) = piece.last() else { break };
        after = Some(Arc::clone(&last.id));
        found.extend(piece);
    }
    assert_eq!(found.len(), 250);
    for (n, (name, document)) in found.iter().enumerate() {
        assert_eq!((&*name.id, &document.fields["n"]), (&*id(n), &json!(n)));
    }
    let versions = fixture.get_many(&[found[7].0.clone()]).await;
    assert_eq!(versions[0].as_ref(), Some(&found[7].1));
    assert!(bounded(fixture.store.list(Collection::Channels, None, 10)).await.unwrap().is_empty());
}

async fn a_setting_may_name_a_collection_of_its_own(fixture: Fixture) {
    for collection in ["oauth", "apps/inlet/oauth"] {
        let name = Name { collection: Collection::Other(collection.into()), id: "twitch:bot".into() };
        let version = fixture.write(&name, json!({ "n": collection }), Condition::Absent).await.unwrap();
        let document = Document { fields: fields(json!({ "n": collection })), version };
        assert_eq!(fixture.get(&name).await, Some(document.clone()));
        let found = bounded(fixture.store.list(name.collection.clone(), None, 9)).await.unwrap();
        assert_eq!(found, [(name, document)]);
    }
}

/// What a follower of a collection knows.
#[derive(Default)]
struct Followed(BTreeMap<String, Value>);

impl Followed {
    fn take(&mut self, batch: Vec<(Name, Option<Document>)>) {
        for (name, document) in batch {
            assert_eq!(name.collection, Collection::Channels);
            match document {
                Some(document) => drop(self.0.insert(name.id.to_string(), Value::Object(document.fields))),
                None => drop(self.0.remove(&*name.id)),
            }
        }
    }

    async fn until(&mut self, changes: &mut Changes, expected: Value) {
        bounded(async {
            while json!(self.0) != expected {
                self.take(changes.next().await.unwrap().unwrap());
            }
        })
        .await;
    }
}

async fn a_collection_is_followed_with_what_is_deleted(fixture: Fixture) {
    let channel = |id: &str| Name { collection: Collection::Channels, id: id.into() };
    let mut changes = bounded(fixture.store.follow(Collection::Channels)).await.unwrap();
    assert_eq!(bounded(changes.next()).await.unwrap().unwrap(), [], "that there is nothing is said");
    let mut followed = Followed::default();
    fixture.write(&channel("1"), json!({ "login": "a" }), Condition::Absent).await.unwrap();
    followed.until(&mut changes, json!({ "1": { "login": "a" } })).await;
    fixture.write(&channel("2"), json!({ "login": "b" }), Condition::Absent).await.unwrap();
    fixture.write(&channel("1"), json!({ "login": "c" }), Condition::Always).await.unwrap();
    // Elsewhere.
    fixture.write(&user("3"), edit("a note", 40), Condition::Always).await.unwrap();
    followed.until(&mut changes, json!({ "1": { "login": "c" }, "2": { "login": "b" } })).await;
    fixture.delete(&channel("1"), Condition::Always).await.unwrap();
    followed.until(&mut changes, json!({ "2": { "login": "b" } })).await;
    fixture.write(&channel("1"), json!({ "login": "d" }), Condition::Absent).await.unwrap();
    let expected = json!({ "1": { "login": "d" }, "2": { "login": "b" } });
    followed.until(&mut changes, expected.clone()).await;
    // Whoever comes later gets all of it at once.
    let mut later = bounded(fixture.store.follow(Collection::Channels)).await.unwrap();
    let mut whole = Followed::default();
    whole.take(bounded(later.next()).await.unwrap().unwrap());
    assert_eq!(json!(whole.0), expected);
}

async fn an_operators_write_needs_nothing(fixture: Fixture) {
    let name = user("a");
    let first = fixture.write(&name, json!({ "notes": "hello" }), Condition::Always).await.unwrap();
    let second = fixture.write(&name, json!({ "tags": ["x"] }), Condition::Always).await.unwrap();
    assert!(second > first);
    let document = Document { fields: fields(json!({ "notes": "hello", "tags": ["x"] })), version: second };
    assert_eq!(fixture.get(&name).await, Some(document));
}

async fn fields_that_are_not_named_stay(fixture: Fixture) {
    let name = user("a");
    let operators = json!({
        "notes": "knows the owner", "tags": ["friend"], "status": "trusted", "email": "a@example.org",
        "profiles": { "kick": { "id": "9", "since": 5 }, "twitch": { "id": "0", "old": true } },
        "operatorUpdatedAt": "2026-11-20T05:51:20.612Z", "theirs": { "a": 1 },
    });
    let version = fixture.write(&name, operators, Condition::Always).await.unwrap();
    let ours = json!({
        "profiles.twitch": { "id": "1", "login": "a" }, "profiles.you-tube": { "id": "2" },
        "applied": { "S@1": 5 }, "sessionCount": 1,
    });
    let version = fixture.write(&name, ours, Condition::At(version)).await.unwrap();
    // A map that is named without a dot is replaced as a whole.
    fixture.write(&name, json!({ "applied": { "T@2": 6 } }), Condition::At(version)).await.unwrap();
    let expected = json!({
        "notes": "knows the owner", "tags": ["friend"], "status": "trusted", "email": "a@example.org",
        "profiles": {
            "kick": { "id": "9", "since": 5 }, "twitch": { "id": "1", "login": "a" }, "you-tube": { "id": "2" },
        },
        "operatorUpdatedAt": "2026-11-20T05:51:20.612Z", "theirs": { "a": 1 },
        "applied": { "T@2": 6 }, "sessionCount": 1,
    });
    assert_eq!(Value::Object(fixture.get(&name).await.unwrap().fields), expected);
}

async fn times_keep_their_milliseconds(fixture: Fixture) {
    let name = user("a");
    let times = [0, 1, 999, 1_795_153_880_612, 1_795_153_880_000, 253_402_207_199_999]
        .map(|ms| Timestamp::from_millisecond(ms).unwrap());
    let mut condition = Condition::Absent;
    for time in times {
        let content = json!({ "firstSeenAt": shown_time(time), "lastMessageAt": shown_time(time) });
        condition = Condition::At(fixture.write(&name, content.clone(), condition).await.unwrap());
        let read = fixture.get(&name).await.unwrap().fields;
        assert_eq!(Value::Object(read.clone()), content);
        let (user, bad) = read_user(&read);
        assert!(bad.is_empty(), "{bad:?}");
        assert_eq!(
            (user.history.first_seen_at, user.history.last_message_at),
            (Some(time.into()), Some(time.into()))
        );
    }
}

async fn documents_of_one_call_stand_for_themselves(fixture: Fixture) {
    let [a, b, c, d] = ["a", "b", "c", "d"].map(user);
    let note = Name::note("INLET@1");
    let old = fixture.write(&a, json!({ "n": 1 }), Condition::Absent).await.unwrap();
    let version = fixture.write(&a, json!({ "n": 2 }), Condition::At(old)).await.unwrap();
    fixture.write(&b, json!({ "n": 1 }), Condition::Absent).await.unwrap();
    let outcomes = fixture
        .write_many(vec![
            write(&b, json!({ "n": 7 }), Condition::Absent),
            write(&a, json!({ "n": 7 }), Condition::At(version)),
            write(&c, json!({ "n": 7 }), Condition::At(version)),
            write(&d, json!({ "n": 7 }), Condition::Absent),
            write(&note, json!({ "countedTo": 7, "at": "2026-11-20T05:51:20.612Z" }), Condition::Always),
        ])
        .await;
    let done: Vec<_> = outcomes.iter().map(Result::is_ok).collect();
    assert_eq!(done, [false, true, false, true, true], "{outcomes:?}");
    assert!(is_conflict(&outcomes[0]) && is_conflict(&outcomes[2]), "{outcomes:?}");
    let read = fixture.get_many(&[a, b, c, d, note]).await;
    let numbers: Vec<_> =
        read.iter().map(|read| read.as_ref().map(|read| read.fields["n"].clone())).take(4).collect();
    assert_eq!(numbers, [Some(json!(7)), Some(json!(1)), None, Some(json!(7))]);
    assert_eq!(read[4].as_ref().unwrap().fields["countedTo"], 7);
    // The versions that were told are those that are read.
    assert_eq!(read[0].as_ref().unwrap().version, *outcomes[1].as_ref().unwrap());
    assert_eq!(read[3].as_ref().unwrap().version, *outcomes[3].as_ref().unwrap());
}

async fn five_hundred_documents_at_once_keep_their_order(fixture: Fixture) {
    let names: Vec<_> = (0..500).map(|n| user(n.to_string())).collect();
    let odd = names.iter().skip(1).step_by(2);
    fixture.write_many(odd.map(|name| write(name, json!({ "n": -1 }), Condition::Absent)).collect()).await;
    let writes = (0..).zip(&names).map(|(n, name)| write(name, json!({ "n": n }), Condition::Absent));
    let outcomes = fixture.write_many(writes.collect()).await;
    assert_eq!(outcomes.len(), 500);
    for (n, outcome) in outcomes.iter().enumerate() {
        assert!(if n % 2 == 1 { is_conflict(outcome) } else { outcome.is_ok() }, "{n}: {outcome:?}");
    }
    let read = fixture.get_many(&names).await;
    for (n, (document, outcome)) in (0_i64..).zip(read.iter().zip(&outcomes)) {
        let document = document.as_ref().unwrap();
        assert_eq!(document.fields["n"], if n % 2 == 1 { -1 } else { n });
        assert!(outcome.as_ref().is_ok_and(|version| *version == document.version) || n % 2 == 1);
    }
}

async fn of_fifty_who_create_one_document_one_does(fixture: Fixture) {
    let name = user("a");
    let one = |n: usize| fixture.write(&name, json!({ "n": n }), Condition::Absent);
    race(&fixture, &name, future::join_all((0..50).map(one)).await).await;
}

async fn of_fifty_who_update_one_version_one_does(fixture: Fixture) {
    let name = user("a");
    let version = fixture.write(&name, json!({ "n": 99 }), Condition::Absent).await.unwrap();
    let one = |n: usize| fixture.write(&name, json!({ "n": n }), Condition::At(version));
    race(&fixture, &name, future::join_all((0..50).map(one)).await).await;
}

/// Exactly one wrote, and it is that one's that is there. Under contention Firestore may turn some away without
/// saying that they lost; whoever asks again is told.
async fn race(fixture: &Fixture, name: &Name, outcomes: Vec<Result<Version, WriteRefusal>>) {
    let written: Vec<_> = outcomes.iter().enumerate().filter(|(_, outcome)| outcome.is_ok()).collect();
    assert_eq!(written.len(), 1, "{outcomes:?}");
    for outcome in &outcomes {
        let is_told = match outcome {
            Ok(_) | Err(WriteRefusal::Conflict) => true,
            Err(WriteRefusal::Failed(error)) => {
                matches!(fixture.ground, Ground::Firestore(_)) && error.is_transient()
            }
        };
        assert!(is_told, "{outcome:?}");
    }
    let (n, version) = written[0];
    let document = fixture.get(name).await.unwrap();
    assert_eq!((&document.fields["n"], &document.version), (&json!(n), version.as_ref().unwrap()));
}

async fn a_document_of_the_wrong_shape_is_read_field_by_field(fixture: Fixture) {
    let name = user("a");
    let content = json!({
        "firstSeenAt": "2026-11-20T05:51:20.612Z", "lastSeenAt": "yesterday", "lastMessageAt": 17,
        "sessionCount": "three", "messageCountAllTime": 12, "applied": { "S@1": 5 }, "tags": ["b", 5],
        "notes": { "a": 1 }, "status": "fine", "lastSessionId": null,
    });
    fixture.write(&name, content, Condition::Always).await.unwrap();
    let mut expected: BTreeSet<_> = ["lastSeenAt", "lastMessageAt", "sessionCount", "tags", "notes"].into();
    if let Ground::Firestore(project) = &fixture.ground {
        let path = format!("projects/{}/databases/(default)/documents/users/b", project.id);
        let odd = json!({
            "lastSessionStartedAt": { "geoPointValue": { "latitude": 1.0, "longitude": 2.0 } },
            "lastSessionId": { "bytesValue": "YWJj" },
            "firstEventId": { "referenceValue": path },
            "lastSessionActivityAt": { "doubleValue": "NaN" },
        });
        project.set("users/twitch:a", odd).await;
        expected.extend(["lastSessionStartedAt", "lastSessionId", "firstEventId", "lastSessionActivityAt"]);
    }
    let document = fixture.get(&name).await.unwrap();
    let (user, bad) = read_user(&document.fields);
    assert_eq!(bad.into_iter().collect::<BTreeSet<_>>(), expected);
    assert_eq!((user.message_count, user.history.first_seen_at.is_some()), (12, true));
    assert_eq!(user.operator.unwrap().status.as_deref(), Some("fine"));
    // What cannot be read is not in the way of what is written.
    fixture
        .write(&name, json!({ "messageCountAllTime": 13 }), Condition::At(document.version))
        .await
        .unwrap();
    let after = fixture.get(&name).await.unwrap().fields;
    assert_eq!((&after["notes"], &after["messageCountAllTime"]), (&json!({ "a": 1 }), &json!(13)));
}

async fn a_restart_keeps_documents_and_versions(fixture: Fixture) {
    let name = user("a");
    let first = fixture.write(&name, json!({ "n": 1 }), Condition::Absent).await.unwrap();
    let fixture = fixture.reopen().await;
    assert_eq!(fixture.get(&name).await.unwrap().version, first);
    let second = fixture.write(&name, json!({ "n": 2 }), Condition::At(first)).await.unwrap();
    let fixture = fixture.reopen().await;
    let stale = fixture.write(&name, json!({ "n": 3 }), Condition::At(first)).await;
    assert!(second > first && is_conflict(&stale), "{stale:?}");
}

async fn collections_are_apart_and_names_are_taken_as_they_are(fixture: Fixture) {
    let names = [
        user("a"),
        Name::note("twitch:a"),
        user("%2F"),
        user("%2e%2E"),
        user("ä é"),
        user(" "),
        Name::note("INLET_dev.eu@1700000000000000000"),
    ];
    let writes = (0..).zip(&names).map(|(n, name)| write(name, json!({ "n": n }), Condition::Absent));
    let outcomes = fixture.write_many(writes.collect()).await;
    assert!(outcomes.iter().all(Result::is_ok), "{outcomes:?}");
    let read = fixture.get_many(&names).await;
    let numbers: Vec<_> =
        read.iter().map(|read| read.as_ref().unwrap().fields["n"].as_u64().unwrap()).collect();
    assert_eq!(numbers, (0..7).collect::<Vec<_>>());
}

pub(super) fn at(milliseconds: i64) -> Timestamp {
    Timestamp::from_millisecond(1_795_153_880_000 + milliseconds).unwrap()
}

fn edit(notes: &str, milliseconds: i64) -> Value {
    json!({ "notes": notes, "operatorUpdatedAt": shown_time(at(milliseconds)) })
}

async fn an_operators_edit_is_seen_within_two_seconds(fixture: Fixture) {
    let [a, b, c] = ["a", "b", "c"].map(user);
    fixture.write(&a, edit("before", 0), Condition::Always).await.unwrap();
    fixture.write(&b, edit("stored", 1), Condition::Always).await.unwrap();
    let mut edits = bounded(fixture.store.edits(at(0))).await.unwrap();
    let stored = next_edit(&mut edits).await;
    assert_eq!((stored.len(), &stored[0].0, &stored[0].1.fields["notes"]), (1, &b, &json!("stored")));
    for turn in 2..22 {
        let began = Instant::now();
        let notes = format!("turn {turn}");
        let version = fixture.write(&a, edit(&notes, turn), Condition::Always).await.unwrap();
        let seen = next_edit(&mut edits).await;
        assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
        assert_eq!((seen.len(), &seen[0].0), (1, &a));
        assert_eq!((&seen[0].1.fields["notes"], seen[0].1.version), (&json!(notes), version));
    }
    // What is older than asked for, not an operator's, or not a user's, is not for this one.
    fixture.write(&c, edit("old", -5), Condition::Always).await.unwrap();
    fixture.write(&c, json!({ "sessionCount": 4 }), Condition::Always).await.unwrap();
    fixture.write(&Name::note("x"), edit("a note", 40), Condition::Always).await.unwrap();
    fixture.write(&c, edit("new", 41), Condition::Always).await.unwrap();
    let seen = next_edit(&mut edits).await;
    assert_eq!((seen.len(), &seen[0].0, &seen[0].1.fields["notes"]), (1, &c, &json!("new")));
    assert_eq!(seen[0].1.fields["sessionCount"], 4);
}

async fn following_again_brings_what_was_missed(fixture: Fixture) {
    let names: Vec<_> = (0..20).map(|n| user(n.to_string())).collect();
    let edits = bounded(fixture.store.edits(at(0))).await.unwrap();
    drop(edits);
    let writes = (1..).zip(&names).map(|(n, name)| write(name, edit("missed", n), Condition::Always));
    fixture.write_many(writes.collect()).await;
    let mut edits = bounded(fixture.store.edits(at(5))).await.unwrap();
    let mut seen = BTreeSet::new();
    while seen.len() < 15 {
        seen.extend(next_edit(&mut edits).await.into_iter().map(|(name, _)| name));
    }
    assert_eq!(seen, names[5..].iter().cloned().collect());
    // Two at a time hear the same.
    let mut other = bounded(fixture.store.edits(at(100))).await.unwrap();
    fixture.write(&names[0], edit("both", 101), Condition::Always).await.unwrap();
    for edits in [&mut edits, &mut other] {
        assert_eq!(next_edit(edits).await[0].1.fields["notes"], "both");
    }
}
