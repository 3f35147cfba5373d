//! The outbox: what was taken in while the stream was away gets there, once, in order, whatever else happens.

mod damage;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use async_nats::jetstream;
use serde_json::Value;

use crate::harness::inlet::{Inlet, Metrics, Simulator};
use crate::harness::nats::Nats;
use crate::harness::people::{embedded_users, verify};
use crate::harness::proxy::{Mode, Proxy};
use crate::harness::stream::{InStream, assert_holds_exactly, read};
use crate::harness::{eventually, within};
use crate::people::Setting;

const CHANNELS: &str = "alpha,beta";
const BACK: Duration = Duration::from_mins(1);

fn settings<'a>(irc: &'a str, nats: &'a str, more: &[(&'a str, &'a str)]) -> Vec<(&'a str, &'a str)> {
    let mut settings = vec![
        ("TWITCH_CHANNELS", CHANNELS),
        ("TWITCH_IRC_URL", irc),
        ("NATS_URL", nats),
        ("IRC_RECONNECT_INITIAL_MS", "100"),
        ("ENRICH_TIMEOUT", "5s"),
    ];
    settings.extend(more);
    settings
}

async fn chat(rate: u32, count: u32) -> Simulator {
    let (rate, count) = (rate.to_string(), count.to_string());
    Simulator::start(&["--channels", CHANNELS, "--rate", &rate, "--count", &count]).await
}

/// Waits until the outbox holds at least so many events.
async fn holds(inlet: &Inlet, events: u64) -> Metrics {
    within(BACK, "the outbox holds so many", || async {
        let metrics = inlet.metrics().await;
        (metrics.get("inlet_outbox_events") >= events).then_some(metrics)
    })
    .await
}

/// Waits until everything is settled.
async fn drained(inlet: &Inlet, received: u64) -> Metrics {
    let metrics = within(BACK, "everything is settled", || async {
        let metrics = inlet.metrics().await;
        let is_all = metrics.sum("inlet_events_received_total") >= received;
        (is_all && metrics.get("inlet_events_pending") == 0).then_some(metrics)
    })
    .await;
    metrics.assert_account_closes();
    assert_eq!(metrics.get("inlet_outbox_events"), 0);
    assert_eq!((metrics.get("inlet_outbox_bytes"), metrics.get("inlet_outbox_oldest_age_seconds")), (0, 0));
    metrics
}

fn outbox_file(inlet: &Inlet) -> PathBuf {
    inlet.data_dir().join("outbox.redb")
}

/// The chat in a stream. Whoever was away says so there as well.
async fn read_chat(url: &str, stream: &str) -> Vec<InStream> {
    let found = read(url, stream).await;
    found.into_iter().filter(|message| message.headers["type"] == "external.chat.message.v1").collect()
}

/// What was sent of what is in the stream, in the order it was sent.
fn those_in(found: &[InStream], sent: Vec<(String, String)>) -> Vec<(String, String)> {
    let kept: BTreeSet<_> =
        found.iter().map(|message| message.body["payload"]["messageId"].as_str().unwrap()).collect();
    sent.into_iter().filter(|(_, id)| kept.contains(id.as_str())).collect()
}

#[tokio::test]
async fn while_the_stream_is_away_events_wait_on_disk_and_then_get_there_in_order() {
    let mut nats = Nats::start().await;
    let simulator = chat(1_000, 20_000).await;
    let (irc, url) = (simulator.url(), nats.url());
    let inlet = Inlet::serve(&settings(&irc, &url, &[])).await;
    simulator.has_sent(2_000).await;
    nats.kill();
    let metrics = holds(&inlet, 8_000).await;
    assert!(metrics.get("inlet_outbox_bytes") > 8_000 * 500);
    eventually("its oldest event ages", || async {
        (inlet.metrics().await.get("inlet_outbox_oldest_age_seconds") >= 2).then_some(())
    })
    .await;
    assert_eq!(inlet.waiting_for().await, ["bus"]);
    assert_eq!(inlet.json("/healthz").await.1["parts"]["outbox"]["state"], "holding");
    nats.restart().await;
    inlet.ready().await;
    let sent = simulator.has_finished(20_000).await;
    let metrics = drained(&inlet, sent.len() as u64).await;
    assert_eq!(metrics.sum("inlet_events_refused_total"), 0);
    assert_eq!(inlet.json("/healthz").await.1["parts"]["outbox"]["state"], "empty");
    assert_holds_exactly(&read_chat(&nats.url(), "INLET").await, &sent);
    let (_, most) = inlet.memory_kib();
    assert!(most < 128 * 1024, "{most} KiB");
}

#[tokio::test]
async fn tags_and_counts_are_exact_through_an_outage_of_the_stream() {
    let mut setting = Setting::new(false, &["--rate", "800", "--count", "8000", "--users", "300"]).await;
    let mut inlet = setting.serve(&[("SESSION_GAP", "3s")]).await;
    setting.simulator.has_sent(1_500).await;
    setting.nats.kill();
    // Sessions open all the while: an opening waits for the disk alone.
    holds(&inlet, 3_000).await;
    setting.nats.restart().await;
    setting.simulator.has_finished(8_000).await;
    drained(&inlet, 8_000).await;
    assert_eq!(inlet.terminate(Duration::from_secs(9)).await.1, Some(0), "{}", inlet.log());
    let found: Vec<_> =
        read_chat(&setting.nats.url(), "INLET").await.into_iter().map(|message| message.body).collect();
    let users = embedded_users(&inlet.data_dir(), &found).await;
    let flags = ["--exact", "--gap", "3"];
    assert_eq!(verify(&flags, &[&setting.simulator.sent_file()], &found, &users)["envelopes"], 8_000);
}

#[tokio::test]
async fn killed_in_the_middle_of_an_outage_it_goes_on_where_it_was() {
    let mut setting = Setting::new(false, &["--rate", "500", "--users", "100"]).await;
    let mut folder = tempfile::tempdir().unwrap();
    let mut stored = 0;
    for round in 0..3 {
        let inlet = setting.serve_in(folder, &[]).await;
        if round == 0 {
            eventually("some are in the stream", || async {
                (inlet.metrics().await.sum("inlet_events_published_total") >= 500).then_some(())
            })
            .await;
            setting.nats.kill();
        }
        assert!(inlet.metrics().await.get("inlet_outbox_recovered_total") >= stored, "round {round}");
        stored = holds(&inlet, (round + 1) * 700).await.get("inlet_outbox_events");
        inlet.child.signal("KILL");
        folder = inlet.into_folder();
    }
    setting.nats.restart().await;
    let mut inlet = setting.serve_in(folder, &[]).await;
    let recovered = inlet.metrics().await.get("inlet_outbox_recovered_total");
    assert!(recovered >= stored, "{recovered} of {stored}");
    inlet.ready().await;
    eventually("new ones are behind them", || async {
        (inlet.metrics().await.sum("inlet_events_published_total") > recovered + 100).then_some(())
    })
    .await;
    assert_eq!(inlet.terminate(Duration::from_secs(9)).await.1, Some(0), "{}", inlet.log());
    let found = read_chat(&setting.nats.url(), "INLET").await;
    assert!(found.len() as u64 > stored + 500);
    let kept = those_in(&found, setting.simulator.sent());
    assert_holds_exactly(&found, &kept);
    // Counted once, and tagged as if nothing had happened but what was lost with each kill.
    let found: Vec<_> = found.into_iter().map(|message| message.body).collect();
    let users = embedded_users(&inlet.data_dir(), &found).await;
    verify(&["--faults"], &[&setting.simulator.sent_file()], &found, &users);
}

#[tokio::test]
async fn sigterm_while_the_stream_is_away_leaves_everything_to_the_next_start() {
    let mut nats = Nats::start().await;
    let simulator = chat(500, 6_000).await;
    let (irc, url) = (simulator.url(), nats.url());
    let settings = settings(&irc, &url, &[("SHUTDOWN_GRACE", "5s")]);
    let mut inlet = Inlet::serve(&settings).await;
    simulator.has_sent(1_000).await;
    nats.kill();
    holds(&inlet, 500).await;
    let (spent, code) = inlet.terminate(Duration::from_secs(9)).await;
    assert_eq!(code, Some(0), "{}", inlet.log());
    assert!(spent < Duration::from_secs(4), "a stream that is away is not waited for: {spent:?}");
    assert!(inlet.log().contains("left in the outbox"), "{}", inlet.log());
    let taken_in = simulator.sent();
    nats.restart().await;
    let inlet = Inlet::serve_in(inlet.into_folder(), &settings).await;
    let recovered = inlet.metrics().await.get("inlet_outbox_recovered_total");
    assert!(recovered >= 500, "{recovered}");
    inlet.ready().await;
    simulator.has_finished(6_000).await;
    drained(&inlet, 1).await;
    let found = read_chat(&nats.url(), "INLET").await;
    let kept = those_in(&found, simulator.sent());
    assert_holds_exactly(&found, &kept);
    // All that was taken in: what is missing was sent while nobody read.
    let first_missing = taken_in.iter().position(|sent| !kept.contains(sent)).unwrap_or(taken_in.len());
    assert!(first_missing as u64 + 200 > 1_000 + recovered, "{first_missing}");
}

#[tokio::test]
async fn a_full_outbox_fills_the_door_which_refuses_and_counts() {
    let mut nats = Nats::start().await;
    let simulator = chat(1_000, 14_000).await;
    let (irc, url) = (simulator.url(), nats.url());
    let small = [
        ("INTAKE_MAX_EVENTS", "500"),
        ("INTAKE_WAIT", "200ms"),
        ("PUBLISH_MAX_IN_FLIGHT", "100"),
        ("OUTBOX_MAX_BYTES", "4MiB"),
    ];
    let inlet = Inlet::serve(&settings(&irc, &url, &small)).await;
    simulator.has_sent(1_000).await;
    nats.kill();
    within(BACK, "refusals", || async {
        (inlet.metrics().await.sum("inlet_events_refused_total") > 500).then_some(())
    })
    .await;
    assert_eq!(inlet.waiting_for().await, ["bus", "outbox"]);
    let (status, health) = inlet.json("/healthz").await;
    assert_eq!((status, health["status"].as_str()), (200, Some("degraded")));
    let outbox = &health["parts"]["outbox"];
    assert_eq!((&outbox["state"], &outbox["maxBytes"]), (&"full".into(), &(4 << 20).into()));
    assert!(outbox["bytes"].as_u64().unwrap() <= 4 << 20, "{outbox}");
    let metrics = inlet.metrics().await;
    let (pending, stored) = (metrics.get("inlet_events_pending"), metrics.get("inlet_outbox_events"));
    assert!(pending - stored <= 500 + 100 + 3 * 512, "{pending} pending, {stored} on disk: nothing grows");
    let size = std::fs::metadata(outbox_file(&inlet)).unwrap().len();
    assert!(size < 12 << 20, "{size} bytes");
    nats.restart().await;
    inlet.ready().await;
    let sent = simulator.has_finished(14_000).await;
    let metrics = drained(&inlet, sent.len() as u64).await;
    let found = read_chat(&nats.url(), "INLET").await;
    let refused = metrics.sum("inlet_events_refused_total");
    assert_eq!(found.len() as u64 + refused, sent.len() as u64, "in the stream or refused and counted");
    assert_holds_exactly(&found, &those_in(&found, sent));
}

#[tokio::test]
async fn at_the_end_even_a_full_outbox_takes_what_the_door_holds() {
    let mut nats = Nats::start().await;
    let simulator = chat(1_000, 12_000).await;
    let (irc, url) = (simulator.url(), nats.url());
    let small = [("INTAKE_MAX_EVENTS", "500"), ("INTAKE_WAIT", "200ms"), ("OUTBOX_MAX_BYTES", "4MiB")];
    let settings = settings(&irc, &url, &small);
    let mut inlet = Inlet::serve(&settings).await;
    simulator.has_sent(500).await;
    nats.kill();
    within(BACK, "it is full", || async { (inlet.waiting_for().await == ["bus", "outbox"]).then_some(()) })
        .await;
    let (spent, code) = inlet.terminate(Duration::from_secs(9)).await;
    assert_eq!(code, Some(0), "{}", inlet.log());
    assert!(spent < Duration::from_secs(8), "{spent:?}");
    nats.restart().await;
    let inlet = Inlet::serve_in(inlet.into_folder(), &settings).await;
    inlet.ready().await;
    simulator.has_finished(12_000).await;
    drained(&inlet, 1).await;
    let found = read_chat(&nats.url(), "INLET").await;
    assert_holds_exactly(&found, &those_in(&found, simulator.sent()));
}

#[tokio::test]
async fn at_the_end_a_replay_that_waits_at_the_door_is_sent_away() {
    let mut nats = Nats::start().await;
    let url = nats.url();
    let small = [
        ("NATS_URL", &*url),
        ("INTAKE_MAX_EVENTS", "500"),
        ("OUTBOX_MAX_BYTES", "4MiB"),
        ("ENRICH_MODE", "off"),
    ];
    let mut inlet = Inlet::serve(&small).await;
    inlet.ready().await;
    nats.kill();
    let line = |n| format!("@id=line-{n};room-id=1;user-id=7 :u!u@u.tmi.twitch.tv PRIVMSG #alpha :{n}\r\n");
    let lines: String = (0..12_000).map(line).collect();
    let replay = inlet.client().post(inlet.url("/admin/replay")).body(lines).send();
    let end = async {
        within(BACK, "it is full", || async {
            (inlet.waiting_for().await == ["bus", "outbox"]).then_some(())
        })
        .await;
        inlet.terminate(Duration::from_secs(9)).await
    };
    let (_, (spent, code)) = tokio::join!(replay, end);
    assert_eq!(code, Some(0), "{}", inlet.log());
    assert!(spent < Duration::from_secs(6), "{spent:?}");
}

#[tokio::test]
async fn a_disk_that_takes_no_more_costs_nothing_while_the_process_lives() {
    let mut nats = Nats::start().await;
    let simulator = chat(400, 6_000).await;
    let (irc, url) = (simulator.url(), nats.url());
    let inlet = Inlet::serve_on_a_small_disk(&settings(&irc, &url, &[("ENRICH_MODE", "off")])).await;
    simulator.has_sent(500).await;
    let size = std::fs::metadata(outbox_file(&inlet)).unwrap().len();
    inlet.child.limit_files(Some(size));
    nats.kill();
    within(BACK, "readiness names the outbox", || async {
        inlet.waiting_for().await.contains(&"outbox".to_owned()).then_some(())
    })
    .await;
    assert_eq!(inlet.json("/healthz").await.1["parts"]["outbox"]["state"], "unwritable");
    // The stream is back before the disk is.
    nats.restart().await;
    eventually("the stream is there", || async {
        (!inlet.waiting_for().await.contains(&"bus".to_owned())).then_some(())
    })
    .await;
    inlet.child.limit_files(None);
    inlet.ready().await;
    let sent = simulator.has_finished(6_000).await;
    let metrics = drained(&inlet, sent.len() as u64).await;
    assert_eq!(metrics.sum("inlet_events_refused_total"), 0, "the door held it");
    assert_holds_exactly(&read_chat(&nats.url(), "INLET").await, &sent);
    let log = inlet.log();
    let said = log.matches("the outbox cannot be written").count();
    assert_eq!(said, 1, "{log}");
}

/// A folder with an outbox that holds events, let go in the middle of an outage, and how many.
async fn left_behind(
    nats: &mut Nats,
    simulator: &Simulator,
    more: &[(&str, &str)],
) -> (tempfile::TempDir, u64) {
    let (irc, url) = (simulator.url(), nats.url());
    let mut inlet = Inlet::serve(&settings(&irc, &url, more)).await;
    inlet.ready().await;
    nats.kill();
    holds(&inlet, 1_000).await;
    assert_eq!(inlet.terminate(Duration::from_secs(9)).await.1, Some(0), "{}", inlet.log());
    let log = inlet.log();
    let line = log.lines().find(|line| line.contains("left in the outbox")).unwrap();
    let events = serde_json::from_str::<Value>(line).unwrap()["events"].as_u64().unwrap();
    (inlet.into_folder(), events)
}

#[tokio::test]
async fn what_a_twin_published_beyond_the_duplicate_window_is_found_by_looking_back() {
    let nats = Nats::start().await;
    let context = jetstream::new(async_nats::connect(nats.url()).await.unwrap());
    let stream = jetstream::stream::Config {
        name: "SHORT".to_owned(),
        subjects: vec!["internal.>".to_owned()],
        duplicate_window: Duration::from_secs(1),
        ..Default::default()
    };
    context.create_stream(stream).await.unwrap();
    let proxy = Proxy::to(([127, 0, 0, 1], nats.port).into()).await;
    let simulator = chat(300, 3_000).await;
    let (irc, url, proxied) = (simulator.url(), nats.url(), format!("nats://{}", proxy.addr()));
    let (one, two) =
        (Inlet::serve(&settings(&irc, &url, &[])).await, Inlet::serve(&settings(&irc, &proxied, &[])).await);
    simulator.has_sent(400).await;
    proxy.set(Mode::Cut);
    holds(&two, 600).await;
    proxy.set(Mode::Pass);
    simulator.has_finished(3_000).await;
    for inlet in [&one, &two] {
        drained(inlet, 2_500).await;
    }
    let found = read_chat(&nats.url(), "SHORT").await;
    let ids: BTreeSet<_> = found.iter().map(|message| &message.msg_id).collect();
    assert_eq!(ids.len(), found.len(), "each once");
    assert!(two.metrics().await.get("inlet_publish_duplicates_total") >= 600);
    let sent: BTreeSet<_> = simulator.sent().into_iter().map(|(_, id)| id).collect();
    assert_eq!(found.len(), sent.len());
}

#[tokio::test]
async fn a_dead_letter_is_not_sent_as_an_event_after_a_restart() {
    let mut nats = Nats::start().await;
    let simulator = chat(1_000, 1_500).await;
    let (folder, left) = left_behind(&mut nats, &simulator, &[("PUBLISH_MAX_IN_FLIGHT", "64")]).await;
    // No event fits any more, a dead letter does.
    nats.configure("max_payload: 1200");
    nats.restart().await;
    let (irc, url) = ("irc://127.0.0.1:9", nats.url());
    let inlet = Inlet::serve_in(folder, &settings(irc, &url, &[("PUBLISH_MAX_IN_FLIGHT", "64")])).await;
    let letters = |metrics: &Metrics| metrics.sum("inlet_events_deadlettered_total");
    eventually("some are dead letters", || async { (letters(&inlet.metrics().await) > 100).then_some(()) })
        .await;
    inlet.child.signal("KILL");
    let folder = inlet.into_folder();
    nats.kill();
    nats.configure("");
    nats.restart().await;
    let inlet = Inlet::serve_in(folder, &settings(irc, &url, &[])).await;
    drained(&inlet, 0).await;
    let found = read(&nats.url(), "INLET").await;
    let mut forms: BTreeMap<&str, Vec<bool>> = BTreeMap::new();
    for message in &found {
        let event = message.msg_id.strip_prefix("dlq-");
        forms.entry(event.unwrap_or(&message.msg_id)).or_default().push(event.is_some());
    }
    let twice: Vec<_> = forms.iter().filter(|(_, forms)| forms.len() > 1).collect();
    assert!(twice.is_empty(), "{twice:?}");
    let dead = forms.values().filter(|forms| forms[0]).count();
    assert!(dead > 100, "{dead}");
    assert!(forms.len() as u64 >= left, "{} of {left}", forms.len());
}

#[tokio::test]
async fn a_stream_that_acknowledges_nothing_is_named_and_events_are_on_disk() {
    let nats = Nats::start().await;
    let context = jetstream::new(async_nats::connect(nats.url()).await.unwrap());
    let mut stream = jetstream::stream::Config {
        name: "MUTE".to_owned(),
        subjects: vec!["internal.>".to_owned()],
        ..Default::default()
    };
    context.create_stream(stream.clone()).await.unwrap();
    let simulator = chat(200, 6_000).await;
    let (irc, url) = (simulator.url(), nats.url());
    let inlet = Inlet::serve(&settings(&irc, &url, &[])).await;
    simulator.has_sent(200).await;
    inlet.ready().await;
    stream.no_ack = true;
    context.update_stream(stream.clone()).await.unwrap();
    let start = Instant::now();
    eventually("readiness names the bus", || async { (inlet.waiting_for().await == ["bus"]).then_some(()) })
        .await;
    assert!(start.elapsed() < Duration::from_secs(15), "{:?}", start.elapsed());
    assert_eq!(inlet.json("/healthz").await.1["parts"]["bus"]["state"], "silent");
    holds(&inlet, 1_000).await;
    stream.no_ack = false;
    context.update_stream(stream).await.unwrap();
    inlet.ready().await;
    let sent = simulator.has_finished(6_000).await;
    drained(&inlet, sent.len() as u64).await;
    let found = read_chat(&nats.url(), "MUTE").await;
    let ids: BTreeSet<_> = found.iter().map(|message| &message.msg_id).collect();
    assert_eq!((ids.len(), found.len()), (sent.len(), sent.len()), "each once");
}

#[tokio::test]
async fn with_a_healthy_stream_nothing_is_written() {
    let nats = Nats::start().await;
    let simulator = chat(1_000, 5_000).await;
    let (irc, url) = (simulator.url(), nats.url());
    // The machine of a test may be busy for longer than a quarter of a second.
    let inlet = Inlet::serve(&settings(&irc, &url, &[("OUTBOX_AFTER", "20s")])).await;
    let before = contents(&outbox_file(&inlet));
    let sent = simulator.has_finished(5_000).await;
    drained(&inlet, sent.len() as u64).await;
    assert!(contents(&outbox_file(&inlet)) == before);
}

fn contents(path: &Path) -> (std::time::SystemTime, Vec<u8>) {
    (std::fs::metadata(path).unwrap().modified().unwrap(), std::fs::read(path).unwrap())
}

#[tokio::test]
async fn a_replay_ends_when_its_events_are_in_the_outbox() {
    let mut nats = Nats::start().await;
    let url = nats.url();
    let inlet = Inlet::serve(&[("NATS_URL", &url)]).await;
    inlet.ready().await;
    nats.kill();
    let lines = std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/chat.irc")).unwrap();
    let replay = || async {
        let response =
            inlet.client().post(inlet.url("/admin/replay")).body(lines.clone()).send().await.unwrap();
        response.json::<Value>().await.unwrap()
    };
    let first = replay().await;
    assert_eq!(
        (&first["stored"], &first["published"], &first["lost"]),
        (&54.into(), &0.into(), &0.into()),
        "{first}"
    );
    // Known at the door, and after a restart too.
    assert_eq!(replay().await["duplicates"], 58);
    let inlet = Inlet::serve_in(inlet.into_folder(), &[("NATS_URL", &url)]).await;
    let response = inlet.client().post(inlet.url("/admin/replay")).body(lines.clone()).send().await.unwrap();
    let again: Value = response.json().await.unwrap();
    assert_eq!(again["received"], 58, "{again}");
    assert!(again["duplicates"].as_u64().unwrap() >= 49, "{again}");
    nats.restart().await;
    inlet.ready().await;
    drained(&inlet, 58).await;
    assert_eq!(read(&url, "INLET").await.len(), 54);
}
