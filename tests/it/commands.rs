//! Commands as a person types them: what they say, and their exit codes.

use std::io::Write as _;
use std::path::Path;
use std::process::{Output, Stdio};
use std::sync::Arc;
use std::time::Duration;

use inlet::bus::{Bus, Retention};
use inlet::clock::Clock;
use inlet::envelope::receipt::Outcomes;
use inlet::envelope::{Origin, SubjectTemplate};
use inlet::pipeline::{self, Enrich, IntakeConfig, PipelineMetrics, Publish, PublishConfig, open_door};
use inlet::source::twitch::{Normalizer, ReplayDoor, SharedChatMode, TwitchMetrics};
use inlet::tasks::Tasks;
use inlet::users::Barred;
use serde_json::Value;

use crate::harness::inlet::{Inlet, command, run};
use crate::harness::nats::Nats;
use crate::harness::stream::read;

const LINES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/chat.irc");

fn summary(output: &Output) -> Value {
    let text = String::from_utf8_lossy(&output.stdout);
    let last = text.lines().last().unwrap_or_else(|| panic!("{}", String::from_utf8_lossy(&output.stderr)));
    serde_json::from_str(last).unwrap()
}

fn counts(output: &Output) -> (u64, u64, u64, u64) {
    let summary = summary(output);
    let of = |name: &str| summary[name].as_u64().unwrap();
    assert_eq!((of("refused"), of("lost")), (0, 0));
    (of("received"), of("published"), of("duplicates"), of("deadLettered"))
}

#[test]
fn replay_twice_publishes_nothing_new_the_second_time() {
    let folder = tempfile::tempdir().unwrap();
    let environment = [("DATA_DIR", folder.path().to_str().unwrap())];
    assert_eq!(counts(&run(&["replay", "--json", LINES], &environment)), (58, 49, 4, 5));
    assert_eq!(counts(&run(&["replay", "--json", LINES, LINES], &environment)), (116, 0, 116, 0));
}

#[test]
fn replay_reads_standard_input_and_files_without_a_last_line_end() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("lines");
    std::fs::write(&file, "@id=1;user-id=5 :a!a@a PRIVMSG #c :one").unwrap();
    let environment = [("DATA_DIR", folder.path().to_str().unwrap())];
    let mut child = command(&["replay", "--json", file.to_str().unwrap(), "-"], &environment)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"@id=2;user-id=5 :a!a@a PRIVMSG #c :two").unwrap();
    assert_eq!(counts(&child.wait_with_output().unwrap()), (2, 2, 0, 0));
    let missing = run(&["replay", "/no/such/file", LINES], &environment);
    assert_eq!(missing.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&missing.stderr).contains("/no/such/file"));
}

#[tokio::test]
async fn replay_looks_back_when_the_server_has_forgotten_the_ids() {
    let nats = Nats::start().await;
    let client = async_nats::connect(nats.url()).await.unwrap();
    let config = async_nats::jetstream::stream::Config {
        name: "SHORT".to_owned(),
        subjects: vec!["internal.>".to_owned()],
        duplicate_window: Duration::from_millis(200),
        ..Default::default()
    };
    async_nats::jetstream::new(client).create_stream(config).await.unwrap();
    let url = nats.url();
    let environment = [("NATS_URL", url.as_str())];
    assert_eq!(counts(&run(&["replay", "--json", LINES], &environment)), (58, 49, 4, 5));
    tokio::time::sleep(Duration::from_millis(600)).await;
    assert_eq!(counts(&run(&["replay", "--json", LINES], &environment)), (58, 0, 58, 0));
    assert_eq!(read(&nats.url(), "SHORT").await.len(), 54);
}

/// Replays the fixture through the path on an embedded stream, at the clock's time.
async fn replay_at(folder: &Path, clock: &Clock) -> Outcomes {
    let subjects = SubjectTemplate::new("", "internal.ingress.v1").unwrap();
    let retention = Retention { max_age: Duration::from_hours(72), max_bytes: None };
    let bus: Arc<dyn Bus> =
        crate::harness::open_embedded(folder, retention, subjects.clone(), clock.clone()).await;
    let registry = prometheus::Registry::new();
    let metrics = Arc::new(PipelineMetrics::new(&registry).unwrap());
    let intake = IntakeConfig {
        max_events: 64,
        wait: Duration::ZERO,
        dedup_window: Duration::from_mins(10),
        dedup_max_ids: 1_000,
    };
    let publish = PublishConfig { max_in_flight: 16, max_attempts: 5, ack_wait: Duration::from_secs(5) };
    let (intake, door) = open_door(intake, Barred::nobody(), Arc::clone(&metrics), clock.clone());
    let publish = Publish::new(Arc::clone(&bus), publish, subjects.clone(), (None, clock.clone()), metrics);
    let mut tasks = Tasks::new();
    tasks.spawn("pipeline", pipeline::run(door, Enrich::new(subjects, None, clock.clone()), publish));
    let twitch = Arc::new(TwitchMetrics::new(&registry).unwrap());
    let normalizer = Normalizer::new(Origin::Replay, SharedChatMode::SourceOnly, twitch);
    let door = ReplayDoor::new(intake, normalizer, clock.clone());
    let outcomes = door.replay(&*std::fs::read(LINES).unwrap()).await.unwrap().unwrap();
    door.close();
    tasks.join("pipeline").await;
    outcomes
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replay_a_day_later_publishes_nothing_new() {
    let folder = tempfile::tempdir().unwrap();
    let clock = Clock::by_hand("2026-11-20T23:00:00Z".parse().unwrap());
    assert_eq!(replay_at(folder.path(), &clock).await.published, 49);
    clock.step(24 * 60 * 60 * 1000);
    let later = replay_at(folder.path(), &clock).await;
    assert_eq!((later.published, later.dead_lettered, later.duplicates), (0, 0, 58));
}

#[tokio::test]
async fn replay_beside_a_running_service_goes_through_it() {
    let inlet = Inlet::serve(&[("ADMIN_TOKEN", "open-sesame")]).await;
    let (port, data) = (inlet.port.to_string(), inlet.data_dir());
    let environment = [("PORT", port.as_str()), ("DATA_DIR", data.to_str().unwrap())];
    let refused = run(&["replay", "--json", LINES], &environment);
    assert_eq!(refused.status.code(), Some(78), "without the token");
    let with_token = [&environment[..], &[("ADMIN_TOKEN", "open-sesame")]].concat();
    assert_eq!(counts(&run(&["replay", "--json", LINES], &with_token)), (58, 49, 4, 5));
    assert_eq!(counts(&run(&["replay", "--json", LINES], &with_token)), (58, 0, 58, 0));
    assert_eq!(inlet.metrics().await.get("inlet_events_published_total{source=\"replay\"}"), 49);
    // A second service on the folder names the first.
    let second = run(&["serve"], &[("PORT", "0"), ("DATA_DIR", data.to_str().unwrap())]);
    assert_eq!(second.status.code(), Some(78));
    let said = String::from_utf8_lossy(&second.stderr);
    assert!(said.contains(&format!("inlet serve, process {}, port {port}", inlet.child.id())), "{said}");
}

#[test]
fn bad_settings_are_reported_all_at_once_and_end_with_78() {
    let environment = [
        ("TWITCH_JOIN_RATE", "fast"),
        ("INTAKE_WAIT", "2"),
        ("NATS_STREAM_MAX_BYTES", "much"),
        ("TWITCH_BOT_USERNAME", "bot"),
        ("BUS_PREFIX", "dev"),
        ("TWITCH_ENABLED", "true"),
        ("LOG_FORMAT", "xml"),
        ("PORT", "99999"),
    ];
    let output = run(&["serve"], &environment);
    assert_eq!(output.status.code(), Some(78));
    let said = String::from_utf8_lossy(&output.stderr);
    for name in [
        "TWITCH_JOIN_RATE",
        "INTAKE_WAIT",
        "NATS_STREAM_MAX_BYTES",
        "TWITCH_BOT_ACCESS_TOKEN",
        "BUS_PREFIX",
        "TWITCH_ENABLED",
        "LOG_FORMAT",
        "PORT",
    ] {
        assert!(said.contains(name), "{name} in {said}");
    }
}

#[test]
fn secrets_in_bad_settings_are_not_repeated() {
    let output = run(&["serve"], &[("NATS_URL", "http://user:hunter2@host:4222"), ("PORT", "x")]);
    assert_eq!(output.status.code(), Some(78));
    assert!(!String::from_utf8_lossy(&output.stderr).contains("hunter2"));
}

#[test]
fn usage_help_and_version() {
    assert_eq!(run(&[], &[]).status.code(), Some(64));
    assert_eq!(run(&["serve", "--no-such-flag"], &[]).status.code(), Some(64));
    assert_eq!(run(&["frobnicate"], &[]).status.code(), Some(64));
    for arguments in [&["--help"][..], &["serve", "--help"], &["--version"]] {
        let output = run(arguments, &[]);
        assert_eq!(output.status.code(), Some(0), "{arguments:?}");
        assert!(!output.stdout.is_empty());
    }
}

#[test]
fn what_is_away_ends_with_69() {
    let port = crate::harness::free_port().to_string();
    let output = run(&["tail"], &[("PORT", &port)]);
    assert_eq!(output.status.code(), Some(69), "{}", String::from_utf8_lossy(&output.stderr));
    let url = format!("nats://127.0.0.1:{port}");
    assert_eq!(run(&["tail"], &[("NATS_URL", &url)]).status.code(), Some(69));
}

#[tokio::test]
async fn a_stream_that_does_not_fit_ends_the_start_with_78() {
    let nats = Nats::start().await;
    let client = async_nats::connect(nats.url()).await.unwrap();
    let config = async_nats::jetstream::stream::Config {
        name: "HALF".to_owned(),
        subjects: vec!["internal.ingress.v1".to_owned()],
        ..Default::default()
    };
    async_nats::jetstream::new(client).create_stream(config).await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let url = nats.url();
    let output =
        run(&["serve"], &[("NATS_URL", &url), ("PORT", "0"), ("DATA_DIR", folder.path().to_str().unwrap())]);
    assert_eq!(output.status.code(), Some(78));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("HALF") && said.contains("internal.deadletter.v1"), "{said}");
}
