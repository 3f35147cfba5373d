//! The disk breaks: full, or not what was written.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use inlet::bus::embedded::EmbeddedBus;
use inlet::bus::{Bus as _, Retention, Start, Wanted};
use inlet::clock::Clock;
use inlet::envelope::SubjectTemplate;
use inlet::store::document::damaged as damaged_fields;
use inlet::store::embedded::EmbeddedStore;
use inlet::store::{DocumentStore as _, Name};
use serde_json::{Value, json};

use super::{CHANNELS, Ground};
use crate::harness::account::Account;
use crate::harness::inlet::{Inlet, Simulator, run};
use crate::harness::people::{embedded_users, verify};
use crate::harness::readiness::Watch;
use crate::harness::stream::read;
use crate::harness::{eventually, open_embedded};

/// So many bytes more fit on the disk.
const LEFT: u64 = 64 * 1024;

/// From now on there is no room on the disk for more than this file has.
fn fill_disk(inlet: &Inlet, file: &str) {
    let size = std::fs::metadata(inlet.data_dir().join(file)).unwrap().len();
    inlet.child.limit_files(Some(size + LEFT));
}

#[tokio::test]
async fn on_a_full_disk_the_embedded_stream_waits_and_says_so_until_there_is_room() {
    const COUNT: usize = 6_000;
    let chat = ["--channels", CHANNELS, "--users", "50", "--rate", "500", "--count", "6000"];
    let simulator = Simulator::start(&chat).await;
    let settings = [
        ("TWITCH_CHANNELS", CHANNELS),
        ("TWITCH_IRC_URL", &simulator.url()),
        ("ENRICH_TIMEOUT", "5s"),
        ("USER_STORE_DRIVER", "embedded"),
    ];
    let mut inlet = Inlet::serve_on_a_small_disk(&settings).await;
    inlet.ready().await;
    let watch = Watch::on(&inlet);
    simulator.has_sent(1_000).await;
    fill_disk(&inlet, "stream.redb");
    // It goes on within what the file has room for; broken is what fails first.
    eventually("writes fail", || async {
        inlet.log().contains("the embedded stream cannot be written").then_some(())
    })
    .await;
    let broken = Instant::now();
    eventually("it is named", || async { watch.has_named("bus", broken).then_some(()) }).await;
    simulator.has_sent(simulator.sent().len() + 500).await;
    inlet.child.limit_files(None);
    inlet.ready().await;
    simulator.has_finished(COUNT).await;
    let metrics = inlet.quiet().await;
    metrics.assert_account_closes();
    watch.assert_named("bus", broken, Instant::now());

    let bodies = tail(&inlet, COUNT);
    drop(watch);
    let (_, code) = inlet.terminate(std::time::Duration::from_secs(10)).await;
    assert_eq!(code, Some(0), "{}", inlet.log());
    let folder = inlet.into_folder();
    let dump = folder.path().join("dump");
    let lines = bodies.iter().enumerate().fold(String::new(), |text, (at, body)| {
        text + &json!({ "seq": at + 1, "msgId": body["id"], "body": body }).to_string() + "\n"
    });
    std::fs::write(&dump, lines).unwrap();
    let summary = Account::new().refused_at_first(1_024).counted(&metrics).judge_dump(&dump, &[&simulator]);
    assert_eq!((&summary["inStream"], &summary["missing"]), (&COUNT.into(), &0.into()), "{summary}");
    let users = embedded_users(&folder.path().join("data"), &bodies).await;
    verify(&["--faults"], &[&simulator.sent_file()], &bodies, &users);
}

/// The envelopes of an embedded stream.
fn tail(inlet: &Inlet, count: usize) -> Vec<Value> {
    let (port, count) = (inlet.port.to_string(), count.to_string());
    let output = run(&["tail", "--json", "--after", "0", "--count", &count], &[("PORT", &port)]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let lines = String::from_utf8(output.stdout).unwrap();
    lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[tokio::test]
async fn on_a_full_disk_the_embedded_store_is_away_and_all_is_counted_once_there_is_room() {
    let ground = Ground::new(&["--rate", "400", "--count", "5000", "--users", "100000", "--zipf", "0"]).await;
    let (irc, nats) = (ground.simulator.url(), ground.nats.url());
    let settings = [
        ("TWITCH_CHANNELS", CHANNELS),
        ("TWITCH_IRC_URL", &*irc),
        ("NATS_URL", &*nats),
        ("USER_STORE_DRIVER", "embedded"),
    ];
    let mut inlet = Inlet::serve_on_a_small_disk(&settings).await;
    inlet.ready().await;
    ground.simulator.has_sent(800).await;
    fill_disk(&inlet, "users.redb");
    eventually("people cannot be written", || async {
        (inlet.metrics().await.get("inlet_enriched_events_total{matched=\"false\"}") > 0).then_some(())
    })
    .await;
    let watch = Watch::on(&inlet);
    let broken = Instant::now();
    eventually("it is named", || async { watch.has_named("store", broken).then_some(()) }).await;
    ground.simulator.has_sent(ground.simulator.sent().len() + 300).await;
    inlet.child.limit_files(None);
    inlet.ready().await;
    ground.simulator.has_finished(5_000).await;
    let metrics = inlet.quiet().await;
    watch.assert_named("store", broken, Instant::now());
    drop(watch);
    let (_, code) = inlet.terminate(std::time::Duration::from_secs(10)).await;
    assert_eq!(code, Some(0), "{}", inlet.log());
    let summary = Account::new().counted(&metrics).judge(&ground.nats, &[&ground.simulator]);
    assert_eq!((&summary["inStream"], &summary["missing"]), (&5_000.into(), &0.into()), "{summary}");
    let found: Vec<_> =
        read(&ground.nats.url(), "INLET").await.into_iter().map(|message| message.body).collect();
    let users = embedded_users(&inlet.data_dir(), &found).await;
    verify(&["--faults", "--outage"], &[&ground.simulator.sent_file()], &found, &users);
}

/// A data folder with a stream and users in it, and what they hold.
struct Written {
    folder: tempfile::TempDir,
    envelopes: BTreeMap<String, Vec<u8>>,
    users: BTreeMap<String, Value>,
}

fn subjects() -> SubjectTemplate {
    SubjectTemplate::new("", "internal.ingress.v1").unwrap()
}

fn retention() -> Retention {
    Retention { max_age: std::time::Duration::from_hours(72), max_bytes: None }
}

/// What the stream in this folder shows until its end or its first damaged place.
async fn envelopes(bus: &Arc<EmbeddedBus>) -> (BTreeMap<String, Vec<u8>>, bool) {
    let mut found = BTreeMap::new();
    let Ok(mut follower) = bus.follow(Start::Position(1), Wanted::Whole).await else { return (found, true) };
    loop {
        match follower.next().await {
            Some(Ok(batch)) => {
                let is_end = batch.is_end();
                found.extend(
                    batch.messages.into_iter().map(|one| (one.id.unwrap().to_string(), one.payload.to_vec())),
                );
                if is_end {
                    return (found, false);
                }
            }
            Some(Err(_)) | None => return (found, true),
        }
    }
}

async fn written() -> Written {
    let chat = ["--channels", CHANNELS, "--users", "30", "--rate", "1000", "--count", "1500"];
    let simulator = Simulator::start(&chat).await;
    let settings = [
        ("TWITCH_CHANNELS", CHANNELS),
        ("TWITCH_IRC_URL", &simulator.url()),
        ("USER_STORE_DRIVER", "embedded"),
        ("ENRICH_TIMEOUT", "5s"),
    ];
    let mut inlet = Inlet::serve(&settings).await;
    simulator.has_finished(1_500).await;
    inlet.settled(1_500).await;
    let (_, code) = inlet.terminate(std::time::Duration::from_secs(10)).await;
    assert_eq!(code, Some(0), "{}", inlet.log());
    let folder = inlet.into_folder();
    let data = folder.path().join("data");
    let bus = open_embedded(&data, retention(), subjects(), Clock::system()).await;
    let (envelopes, is_damaged) = envelopes(&bus).await;
    assert!(envelopes.len() == 1_500 && !is_damaged);
    let bodies: Vec<Value> = envelopes.values().map(|bytes| serde_json::from_slice(bytes).unwrap()).collect();
    let users = embedded_users(&data, &bodies).await;
    let users = users.into_iter().map(|(key, fields)| (key, Value::Object(fields))).collect();
    Written { folder, envelopes, users }
}

/// A copy of the file with one bit flipped, in a folder of its own.
fn flipped(file: &Path, random: &mut fastrand::Rng) -> (tempfile::TempDir, PathBuf, u64) {
    let folder = tempfile::tempdir().unwrap();
    let copy = folder.path().join(file.file_name().unwrap());
    let mut bytes = std::fs::read(file).unwrap();
    // Among what was written: the rest of the file is room.
    let written: Vec<_> = (0..bytes.len()).filter(|at| bytes[*at] != 0).collect();
    let at = *random.choice(&written).unwrap();
    bytes[at] ^= 1 << random.u32(..8);
    std::fs::write(&copy, bytes).unwrap();
    (folder, copy, at as u64)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flipped_bit_in_the_stream_or_the_store_is_never_shown_as_what_was_written() {
    const FLIPS: usize = 25;
    let written = written().await;
    let data = written.folder.path().join("data");
    let mut random = fastrand::Rng::with_seed(7);
    let (mut refused, mut damaged, mut whole) = (0, 0, 0);
    for _ in 0..FLIPS {
        let (folder, _, at) = flipped(&data.join("stream.redb"), &mut random);
        match EmbeddedBus::open(folder.path(), retention(), subjects(), Clock::system()) {
            Err(_) => refused += 1,
            Ok(bus) => {
                let (found, is_damaged) = envelopes(&bus).await;
                for (id, payload) in &found {
                    assert_eq!(Some(payload), written.envelopes.get(id), "a bit at {at}: {id}");
                }
                let is_all = found.len() == written.envelopes.len() && !is_damaged;
                if is_all { whole += 1 } else { damaged += 1 }
            }
        }
    }
    println!("stream: {refused} refused, {damaged} damaged and said, {whole} whole, of {FLIPS}");
    let (mut refused, mut damaged, mut whole, mut missing, mut unreadable) = (0, 0, 0, 0, 0);
    let names: Vec<_> = written.users.keys().map(|key| Name::user(Arc::from(key.as_str()))).collect();
    for _ in 0..FLIPS {
        let (folder, _, at) = flipped(&data.join("users.redb"), &mut random);
        let Ok(store) = EmbeddedStore::open(folder.path()) else {
            refused += 1;
            continue;
        };
        let Ok(documents) = store.get_many(&names).await else {
            damaged += 1;
            continue;
        };
        // A key on a page of the tree has no checksum of ours: its document may not be found, and is never another.
        for ((key, expected), found) in written.users.iter().zip(documents) {
            let Some(document) = found else {
                missing += 1;
                continue;
            };
            // One that is damaged says so in the place of its fields, and spoils no other.
            if document.fields == damaged_fields() {
                unreadable += 1;
            } else {
                assert_eq!(&Value::Object(document.fields), expected, "a bit at {at}: {key}");
            }
        }
        whole += 1;
    }
    println!(
        "store: {refused} refused, {damaged} damaged and said, {whole} read, {missing} users missing, {unreadable} unreadable, of {FLIPS}"
    );
    assert!(missing <= written.users.len(), "one flip in {FLIPS} hits a key");
    assert!(unreadable <= FLIPS, "a flip hits one document at most");
}
