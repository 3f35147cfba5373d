//! `inlet check` over real parts: each good, each away, each of the wrong kind; and nothing changed by looking.

use std::process::Output;
use std::time::Duration;

use inlet::redb_file::RedbFile;
use serde_json::Value;

use crate::harness::firestore;
use crate::harness::free_port;
use crate::harness::inlet::{Inlet, Simulator, run};
use crate::harness::nats::Nats;

/// What was found, by part.
struct Checked {
    code: Option<i32>,
    findings: Vec<Value>,
    output: Output,
}

impl Checked {
    fn of(&self, part: &str) -> (&str, &str) {
        let finding = self.findings.iter().find(|finding| finding["part"] == part);
        let finding = finding.unwrap_or_else(|| panic!("no {part} in {:?}", self.findings));
        (finding["verdict"].as_str().unwrap(), finding["said"].as_str().unwrap())
    }

    fn assert(&self, part: &str, verdict: &str, says: &str) {
        let (found, said) = self.of(part);
        assert!(found == verdict && said.contains(says), "{part} is {found}: {said}");
    }

    /// All but these are well.
    fn assert_others_ok(&self, but: &[&str]) {
        for finding in &self.findings {
            let part = finding["part"].as_str().unwrap();
            assert!(but.contains(&part) || finding["verdict"] == "ok", "{finding}");
        }
    }

    fn assert_silent_about(&self, secret: &str) {
        let (out, err) = (&self.output.stdout, &self.output.stderr);
        let said = [String::from_utf8_lossy(out), String::from_utf8_lossy(err)].concat();
        assert!(!said.contains(secret), "{said}");
    }
}

/// Checks with these settings, on a free port, in a folder that is not there yet unless they say so.
fn check(settings: &[(&str, &str)]) -> Checked {
    let folder = tempfile::tempdir().unwrap();
    let (data, port) = (folder.path().join("data"), free_port().to_string());
    let usual = [("DATA_DIR", data.to_str().unwrap()), ("PORT", &port), ("BIND_ADDR", "127.0.0.1")];
    let output = run(&["check", "--json"], &[&usual[..], settings].concat());
    let findings = String::from_utf8_lossy(&output.stdout)
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert!(!data.exists(), "a look makes nothing");
    Checked { code: output.status.code(), findings, output }
}

#[test]
fn on_day_one_all_is_well_but_that_no_channel_is_read() {
    let checked = check(&[]);
    assert_eq!(checked.code, Some(0));
    checked.assert("twitch", "warning", "set TWITCH_CHANNELS");
    checked.assert("data", "ok", "will be made");
    checked.assert_others_ok(&["twitch"]);
    let parts: Vec<_> = checked.findings.iter().map(|finding| finding["part"].as_str().unwrap()).collect();
    assert_eq!(parts, ["settings", "data", "twitch", "history", "bus", "store", "http"]);
}

#[tokio::test]
async fn all_is_well_and_nothing_is_changed() {
    let (nats, simulator) = (Nats::start().await, Simulator::start(&["--join-limit", "1"]).await);
    let project = firestore::Project::new();
    let (nats_url, irc_url, emulator) = (nats.url(), simulator.url(), firestore::host());
    let settings = [
        ("NATS_URL", nats_url.as_str()),
        ("TWITCH_IRC_URL", &irc_url),
        ("TWITCH_CHANNELS", "sim,other"),
        ("TWITCH_BOT_USERNAME", "bot"),
        ("TWITCH_BOT_ACCESS_TOKEN", "hunter2"),
        ("FIRESTORE_EMULATOR_HOST", &emulator),
        ("GOOGLE_CLOUD_PROJECT", &project.id),
    ];
    let checked = check(&settings);
    assert_eq!(checked.code, Some(0), "{:?}", checked.findings);
    checked.assert_others_ok(&[]);
    checked.assert("bus", "ok", "a start creates the stream INLET");
    checked.assert("twitch", "ok", "takes bot; 2 channels");
    checked.assert("store", "ok", "Firestore");
    checked.assert_silent_about("hunter2");
    let streams = nats.jetstream().await;
    assert!(streams.get_stream("INLET").await.is_err(), "a look creates nothing");
    // With the stream that a start made.
    let mut inlet = Inlet::serve(&settings[..1]).await;
    inlet.ready().await;
    inlet.terminate(Duration::from_secs(20)).await;
    check(&settings).assert("bus", "ok", "the stream INLET fits");
    // And for a person.
    let output = run(&["check"], &settings);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("ok       settings") && text.contains(" ms)") && !text.contains('\x1b'), "{text}");
}

#[tokio::test]
async fn what_is_away_is_named_and_ends_with_69() {
    let closed = free_port();
    let (nats, irc, emulator) = (
        format!("nats://127.0.0.1:{closed}"),
        format!("irc://127.0.0.1:{closed}"),
        format!("127.0.0.1:{closed}"),
    );
    for (settings, part, names) in [
        (&[("NATS_URL", nats.as_str())][..], "bus", "NATS_URL"),
        (&[("TWITCH_CHANNELS", "a"), ("TWITCH_IRC_URL", &irc)], "twitch", "TWITCH_IRC_URL"),
        (&[("FIRESTORE_EMULATOR_HOST", &emulator)], "store", "FIRESTORE_EMULATOR_HOST"),
        // Channels, the token, the audit and who is kept out are there, too.
        (
            &[("FIRESTORE_EMULATOR_HOST", &emulator), ("ENRICH_MODE", "off")],
            "store",
            "FIRESTORE_EMULATOR_HOST",
        ),
    ] {
        let checked = check(settings);
        assert_eq!(checked.code, Some(69), "{:?}", checked.findings);
        checked.assert(part, "away", names);
        checked.assert_others_ok(&[part, "twitch"]);
        assert!(String::from_utf8_lossy(&checked.output.stderr).contains(&format!("away: {part}")));
    }
    // One server of two is enough, and is said.
    let up = Nats::start().await;
    let checked = check(&[("NATS_URL", &format!("{nats},{}", up.url()))]);
    assert_eq!(checked.code, Some(0));
    checked.assert("bus", "warning", &format!("not there: {nats}"));
    // A peer that takes a connection and says nothing is away as well.
    up.stop().await;
    let checked = check(&[("NATS_URL", &up.url())]);
    assert_eq!(checked.code, Some(69));
    checked.assert("bus", "away", "NATS_URL");
    up.signal("CONT");
}

#[tokio::test]
async fn a_stream_that_does_not_fit_is_told_as_serve_would_tell_it() {
    use async_nats::jetstream::stream::{Config, RetentionPolicy};
    let nats = Nats::start().await;
    let context = nats.jetstream().await;
    let both = vec!["internal.ingress.v1".to_owned(), "internal.deadletter.v1".to_owned()];
    let url = nats.url();
    let half = Config { name: "HALF".to_owned(), subjects: both[..1].to_vec(), ..Default::default() };
    context.create_stream(half).await.unwrap();
    let checked = check(&[("NATS_URL", &url)]);
    assert_eq!(checked.code, Some(78));
    checked.assert("bus", "bad", "HALF does not take internal.deadletter.v1");
    let checked = check(&[("NATS_URL", &url), ("NATS_STREAM", "NEW")]);
    assert_eq!(checked.code, Some(78));
    checked.assert("bus", "bad", "overlap with those of HALF");
    context.delete_stream("HALF").await.unwrap();
    // One that loses counts in a crash is taken, and doubted.
    let mut doubtful = Config {
        name: "QUEUE".to_owned(),
        subjects: both,
        retention: RetentionPolicy::Interest,
        ..Default::default()
    };
    context.create_stream(doubtful.clone()).await.unwrap();
    let checked = check(&[("NATS_URL", &url)]);
    assert_eq!(checked.code, Some(0));
    checked.assert("bus", "warning", "its retention is not limits");
    context.delete_stream("QUEUE").await.unwrap();
    (doubtful.retention, doubtful.max_age) = (RetentionPolicy::Limits, Duration::from_secs(1));
    doubtful.duplicate_window = Duration::from_secs(1);
    context.create_stream(doubtful).await.unwrap();
    check(&[("NATS_URL", &url)]).assert("bus", "warning", "ENRICH_FLUSH_MAX");
}

#[tokio::test]
async fn who_is_not_let_in_has_something_to_change() {
    let nats = Nats::with_config("authorization { user: inlet, password: right }").await;
    let url = format!("nats://inlet:hunter2@127.0.0.1:{}", nats.port);
    let checked = check(&[("NATS_URL", &url)]);
    assert_eq!(checked.code, Some(78), "{:?}", checked.findings);
    checked.assert("bus", "bad", "authorization violation");
    checked.assert_silent_about("hunter2");
    let right = format!("nats://inlet:right@127.0.0.1:{}", nats.port);
    check(&[("NATS_URL", &right)]).assert("bus", "ok", "NATS answers");

    let simulator = Simulator::start(&["--refuse-login"]).await;
    let irc_url = simulator.url();
    let settings = [
        ("TWITCH_IRC_URL", irc_url.as_str()),
        ("TWITCH_CHANNELS", "sim"),
        ("TWITCH_BOT_USERNAME", "bot"),
        ("TWITCH_BOT_ACCESS_TOKEN", "hunter2"),
    ];
    let checked = check(&settings);
    assert_eq!(checked.code, Some(78), "{:?}", checked.findings);
    checked.assert("twitch", "bad", "TWITCH_BOT_ACCESS_TOKEN");
    checked.assert_silent_about("hunter2");
}

#[tokio::test]
async fn a_certificate_that_is_not_trusted_is_told_from_a_server_that_is_away() {
    let folder = tempfile::tempdir().unwrap();
    let ca = folder.path().join("ca.pem");
    let simulator = Simulator::start(&["--tls", "--tls-ca", ca.to_str().unwrap()]).await;
    let url = format!("ircs://localhost:{}", simulator.port);
    let settings = [("TWITCH_IRC_URL", url.as_str()), ("TWITCH_CHANNELS", "sim")];
    let checked = check(&settings);
    assert_eq!(checked.code, Some(78), "{:?}", checked.findings);
    checked.assert("twitch", "bad", "TLS_CA_FILE");
    let trusted = [&settings[..], &[("TLS_CA_FILE", ca.to_str().unwrap())]].concat();
    check(&trusted).assert("twitch", "ok", "justinfan");
}

#[test]
fn bad_settings_are_told_all_at_once() {
    let checked = check(&[("TWITCH_JOIN_RATE", "fast"), ("LOG_FORMAT", "xml"), ("INLET_URL", "nowhere")]);
    assert_eq!((checked.code, checked.findings.len()), (Some(78), 0));
    let said = String::from_utf8_lossy(&checked.output.stderr);
    for name in ["TWITCH_JOIN_RATE", "LOG_FORMAT", "INLET_URL"] {
        assert!(said.contains(name), "{name} in {said}");
    }
}

#[tokio::test]
async fn a_folder_that_a_service_holds_is_fine() {
    let inlet = Inlet::serve(&[]).await;
    inlet.ready().await;
    let (data, port) = (inlet.data_dir(), inlet.port.to_string());
    let settings = [("DATA_DIR", data.to_str().unwrap()), ("PORT", &port)];
    let checked = check(&settings);
    assert_eq!(checked.code, Some(0), "{:?}", checked.findings);
    checked.assert("data", "ok", &format!("in use by inlet serve, process {}", inlet.child.id()));
    checked.assert("bus", "ok", "in use");
    checked.assert("store", "ok", "in use");
    checked.assert("http", "ok", "is that of inlet serve");
    checked.assert("service", "ok", "is ready; commands go through it");
    // Where commands would not find it, that is to be known.
    let elsewhere = format!("http://127.0.0.1:{}", free_port());
    let checked = check(&[&settings[..], &[("INLET_URL", &elsewhere)]].concat());
    assert_eq!(checked.code, Some(0));
    checked.assert("service", "warning", "INLET_URL");
}

#[tokio::test]
async fn a_folder_that_cannot_be_used_is_told_why() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().to_str().unwrap();
    drop(inlet::data_dir::DataDir::take(folder.path(), "somebody").unwrap());
    let held = inlet::data_dir::DataDir::take(folder.path(), "inlet replay, process 7").unwrap();
    let checked = check(&[("DATA_DIR", data)]);
    assert_eq!(checked.code, Some(0));
    checked.assert("data", "warning", "in use by inlet replay, process 7");
    drop(held);
    check(&[("DATA_DIR", data)]).assert("data", "ok", "can be written");
    for (file, part) in [("outbox.redb", "data"), ("stream.redb", "bus"), ("users.redb", "store")] {
        let path = folder.path().join(file);
        drop(RedbFile::open(&path, 99).unwrap());
        let before = std::fs::read(&path).unwrap();
        let checked = check(&[("DATA_DIR", data)]);
        assert_eq!(checked.code, Some(78), "{:?}", checked.findings);
        checked.assert(part, "bad", "has format 99");
        assert!(std::fs::read(&path).unwrap() == before, "{file} was touched");
        std::fs::remove_file(&path).unwrap();
    }
    std::fs::write(folder.path().join("twitch.json"), r#"{"format":99}"#).unwrap();
    check(&[("DATA_DIR", data)]).assert("data", "bad", "has format 99");
    let file = folder.path().join("twitch.json");
    let checked = check(&[("DATA_DIR", file.to_str().unwrap())]);
    assert_eq!(checked.code, Some(78));
    checked.assert("data", "bad", "set another DATA_DIR");
}

#[test]
fn a_folder_in_memory_and_a_disk_that_is_small_are_said() {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let checked = check(&[("DATA_DIR", folder.path().to_str().unwrap())]);
    assert_eq!(checked.code, Some(0));
    checked.assert("data", "warning", "lies in memory");
    let checked = check(&[("OUTBOX_MAX_BYTES", "8EiB")]);
    assert_eq!(checked.code, Some(0));
    checked.assert("data", "warning", "set OUTBOX_MAX_BYTES");
}

#[test]
fn a_port_that_somebody_else_has_is_said() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let checked = check(&[("PORT", &port)]);
    assert_eq!(checked.code, Some(78));
    checked.assert("http", "bad", "set another PORT");
}

#[test]
fn a_history_service_that_is_away_is_a_warning() {
    let url = format!("http://user:hunter2@127.0.0.1:{}", free_port());
    let settings = [("TWITCH_CHANNELS", "a"), ("TWITCH_ENABLED", "false"), ("TWITCH_BACKFILL_URL", &url)];
    let checked = check(&settings);
    assert_eq!(checked.code, Some(0), "{:?}", checked.findings);
    checked.assert("history", "warning", "TWITCH_BACKFILL_URL");
    checked.assert("twitch", "ok", "TWITCH_ENABLED is false");
    checked.assert_silent_about("hunter2");
}
