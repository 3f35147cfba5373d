//! People: what events were told of their users, and what is counted of them, judged by a check that shares nothing with
//! the service; through kills, twins, outages and operators' edits, on both stores.

use std::path::Path;
use std::time::Duration;

use inlet::store::embedded::EmbeddedStore;
use inlet::store::{Collection, DocumentStore as _, Write};
use serde_json::{Value, json};

use crate::harness::emulator::Documents;
use crate::harness::eventually;
use crate::harness::firestore::{self, Project};
use crate::harness::inlet::{Inlet, Simulator, run};
use crate::harness::nats::Nats;
use crate::harness::people::{embedded_users, verify};
use crate::harness::proxy::{Mode, Proxy};
use crate::harness::stream::read;

/// What a service of these tests is set to.
pub struct Setting {
    pub nats: Nats,
    pub simulator: Simulator,
    pub emulator: Option<Project>,
    /// Where the service finds the emulator.
    pub store_at: String,
}

impl Setting {
    pub async fn new(with_firestore: bool, flags: &[&str]) -> Self {
        let emulator = with_firestore.then(Project::new);
        let store_at = match &emulator {
            Some(emulator) => emulator.address().await.to_string(),
            None => String::new(),
        };
        let flags = [&["--channels", "people"], flags].concat();
        Self { nats: Nats::start().await, simulator: Simulator::start(&flags).await, emulator, store_at }
    }

    /// Settings of a service, on top of which come `more`.
    pub async fn serve_in(&self, folder: tempfile::TempDir, more: &[(&str, &str)]) -> Inlet {
        let (nats, irc) = (self.nats.url(), self.simulator.url());
        let mut settings = vec![
            ("TWITCH_CHANNELS", "people"),
            ("TWITCH_IRC_URL", &*irc),
            ("NATS_URL", &*nats),
            ("ENRICH_FLUSH_IDLE", "1s"),
            ("ENRICH_FLUSH_MAX", "3s"),
            // A test machine is busy; what is slow here is not the store.
            ("ENRICH_TIMEOUT", "5s"),
        ];
        if let Some(emulator) = &self.emulator {
            settings.push(("FIRESTORE_EMULATOR_HOST", &*self.store_at));
            settings.push(("GOOGLE_CLOUD_PROJECT", &emulator.id));
        }
        settings.extend(more);
        Inlet::serve_in(folder, &settings).await
    }

    pub async fn serve(&self, more: &[(&str, &str)]) -> Inlet {
        self.serve_in(tempfile::tempdir().unwrap(), more).await
    }

    /// The check's verdict on everything in the stream.
    pub async fn judge(&self, flags: &[&str], users: &Documents) -> Value {
        let found = read(&self.nats.url(), "INLET").await;
        verify(flags, &[&self.simulator.sent_file()], found.iter().map(|message| &message.body), users)
    }

    pub async fn users(&self) -> Documents {
        self.emulator.as_ref().unwrap().users().await
    }
}

/// Everything is counted: nothing is left to be written.
pub async fn all_counted(inlet: &Inlet) {
    eventually("every user is written", || async {
        let metrics = inlet.metrics().await;
        let is_done = metrics.get("inlet_projection_lag_events") == 0
            && metrics.get("inlet_users_dirty") == 0
            && metrics.get("inlet_events_pending") == 0;
        is_done.then_some(())
    })
    .await;
}

pub async fn ended_well(inlet: &mut Inlet) {
    let (_, code) = inlet.terminate(Duration::from_secs(9)).await;
    assert_eq!(code, Some(0), "{}", inlet.log());
    // Shown where the test fails later on.
    for line in inlet.log().lines().filter(|line| !line.contains("INFO")) {
        eprintln!("{line}");
    }
}

#[tokio::test]
async fn on_firestore_tags_and_counts_are_those_of_an_independent_reading() {
    let setting = Setting::new(true, &["--rate", "1000", "--count", "8000", "--users", "500"]).await;
    let mut inlet = setting.serve(&[]).await;
    setting.simulator.has_finished(8_000).await;
    inlet.settled(8_000).await.assert_account_closes();
    ended_well(&mut inlet).await;
    let summary = setting.judge(&["--exact"], &setting.users().await).await;
    assert_eq!(summary["envelopes"], 8_000, "{summary}");
    // And how far everything is counted.
    let notes = setting.emulator.as_ref().unwrap().read_all("inlet").await;
    let (name, note) = notes.first_key_value().unwrap();
    assert!(name.starts_with("INLET@"), "{name}");
    assert_eq!((&note["countedTo"], &note["subject"]), (&json!(8_000), &json!("internal.ingress.v1")));
}

#[tokio::test]
async fn on_the_embedded_store_tags_and_counts_are_those_of_an_independent_reading() {
    let setting = Setting::new(false, &["--rate", "1000", "--count", "8000", "--users", "500"]).await;
    let mut inlet = setting.serve(&[]).await;
    setting.simulator.has_finished(8_000).await;
    inlet.settled(8_000).await.assert_account_closes();
    ended_well(&mut inlet).await;
    let found: Vec<_> =
        read(&setting.nats.url(), "INLET").await.into_iter().map(|message| message.body).collect();
    let users = embedded_users(&inlet.data_dir(), &found).await;
    assert_eq!(verify(&["--exact"], &[&setting.simulator.sent_file()], &found, &users)["envelopes"], 8_000);
}

/// Kills the service again and again under load; each time the next one starts, in the same folder or in an empty one.
async fn killed(setting: &Setting, is_folder_kept: bool) -> Inlet {
    let mut folder = tempfile::tempdir().unwrap();
    for round in 1..=3 {
        let inlet = setting.serve_in(folder, &[]).await;
        setting.simulator.has_sent(round * 1_500).await;
        inlet.child.signal("KILL");
        let used = inlet.into_folder();
        folder = if is_folder_kept { used } else { tempfile::tempdir().unwrap() };
    }
    let inlet = setting.serve_in(folder, &[]).await;
    inlet.ready().await;
    inlet
}

/// Every event in the stream is counted once, whatever was killed.
async fn killed_and_judged(is_folder_kept: bool) {
    let setting = Setting::new(true, &["--rate", "1000", "--users", "200"]).await;
    let mut inlet = killed(&setting, is_folder_kept).await;
    setting.simulator.has_sent(7_000).await;
    ended_well(&mut inlet).await;
    setting.judge(&["--faults"], &setting.users().await).await;
}

#[tokio::test]
async fn killed_with_its_folder_kept_it_counts_every_event_in_the_stream_once() {
    killed_and_judged(true).await;
}

#[tokio::test]
async fn killed_with_its_folder_lost_it_counts_every_event_in_the_stream_once() {
    killed_and_judged(false).await;
}

#[tokio::test]
async fn a_lost_embedded_store_is_built_again_from_the_stream() {
    let setting = Setting::new(false, &["--rate", "1000", "--users", "200"]).await;
    let mut inlet = killed(&setting, false).await;
    setting.simulator.has_sent(7_000).await;
    ended_well(&mut inlet).await;
    let found: Vec<_> =
        read(&setting.nats.url(), "INLET").await.into_iter().map(|message| message.body).collect();
    let users = embedded_users(&inlet.data_dir(), &found).await;
    // Who is new was forgotten with the store: but counts are those of the stream.
    let mut counts = std::collections::BTreeMap::<String, u64>::new();
    // What tells a gap is nobody's.
    for user in found.iter().filter_map(|body| body["auth"]["userRef"].as_str()) {
        *counts.entry(user["users/".len()..].to_owned()).or_default() += 1;
    }
    let counted: std::collections::BTreeMap<_, _> = users
        .iter()
        .map(|(key, fields)| (key.clone(), fields["messageCountAllTime"].as_u64().unwrap()))
        .collect();
    assert_eq!(counted, counts);
}

#[tokio::test]
async fn two_instances_count_each_event_once_and_tag_alike() {
    let mut setting = Setting::new(true, &["--rate", "500", "--count", "5000", "--users", "100"]).await;
    // What one alone has heard, and is late with, may come behind what both have.
    setting.simulator.say("pause");
    let one = setting.serve(&[]).await;
    let mut two = setting.serve(&[]).await;
    one.ready().await;
    two.ready().await;
    setting.simulator.say("resume");
    setting.simulator.has_sent(5_000).await;
    // Half way, as each line is sent to both.
    one.child.signal("KILL");
    setting.simulator.has_finished(5_000).await;
    all_counted(&two).await;
    ended_well(&mut two).await;
    let summary = setting.judge(&["--exact"], &setting.users().await).await;
    assert_eq!(summary["envelopes"], 5_000, "{summary}");
}

#[tokio::test]
async fn fifty_first_messages_of_one_user_from_two_instances_make_one_user() {
    let mut setting = Setting::new(true, &["--rate", "0", "--count", "50", "--users", "1"]).await;
    // One that starts when the other has published something tells the gap before it came.
    setting.simulator.say("pause");
    let mut one = setting.serve(&[]).await;
    let mut two = setting.serve(&[]).await;
    one.ready().await;
    two.ready().await;
    setting.simulator.say("resume");
    setting.simulator.has_finished(50).await;
    let streamed = || async { read(&setting.nats.url(), "INLET").await.len() };
    eventually("all are in the stream", || async { (streamed().await == 50).then_some(()) }).await;
    all_counted(&one).await;
    all_counted(&two).await;
    ended_well(&mut one).await;
    ended_well(&mut two).await;
    let users = setting.users().await;
    assert_eq!((users.len(), &users.values().next().unwrap()["messageCountAllTime"]), (1, &json!(50)));
    setting.judge(&["--exact"], &users).await;
}

#[tokio::test]
async fn while_the_store_hangs_events_flow_unmatched_and_are_counted_afterwards() {
    let mut setting = Setting::new(true, &["--rate", "500", "--count", "6000", "--users", "300"]).await;
    let proxy = Proxy::to(setting.emulator.as_ref().unwrap().address().await).await;
    setting.store_at = proxy.addr().to_string();
    let mut inlet = setting.serve(&[("ENRICH_TIMEOUT", "400ms")]).await;
    setting.simulator.has_sent(1_500).await;
    proxy.set(Mode::Hang);
    eventually("readiness names the store", || async {
        (inlet.waiting_for().await.contains(&"store".to_owned())).then_some(())
    })
    .await;
    setting.simulator.has_sent(4_000).await;
    let metrics = inlet.metrics().await;
    assert_eq!(metrics.get("inlet_store_circuit_open"), 1);
    proxy.set(Mode::Pass);
    setting.simulator.has_finished(6_000).await;
    inlet.settled(6_000).await.assert_account_closes();
    eventually("the store is back", || async { inlet.waiting_for().await.is_empty().then_some(()) }).await;
    all_counted(&inlet).await;
    ended_well(&mut inlet).await;
    let summary = setting.judge(&["--faults", "--outage"], &setting.users().await).await;
    assert_eq!(summary["envelopes"], 6_000, "{summary}");
}

#[tokio::test]
async fn an_operators_note_is_in_the_next_envelope_after_two_seconds_and_never_overwritten() {
    let setting = Setting::new(true, &["--rate", "20", "--users", "1"]).await;
    let mut inlet = setting.serve(&[]).await;
    setting.simulator.has_sent(10).await;
    let emulator = setting.emulator.as_ref().unwrap();
    let key =
        eventually("the user is there", || async { emulator.users().await.keys().next().cloned() }).await;
    let metrics = inlet.metrics().await;
    let reads = metrics.get("inlet_store_requests_total{op=\"get\",result=\"ok\"}");
    for round in 0..3 {
        let note = format!("note {round}");
        let now = inlet::clock::Clock::system().now();
        emulator
            .edit(&key, json!({ "notes": note, "tags": ["VIP"], "status": "watched", "operatorUpdatedAt": now.to_string() }))
            .await;
        let edited = std::time::Instant::now();
        eventually("the note is published", || async {
            let found = read(&setting.nats.url(), "INLET").await;
            (found.last()?.body["user"]["notes"] == note.as_str()).then_some(())
        })
        .await;
        assert!(edited.elapsed() < Duration::from_secs(2), "{:?}", edited.elapsed());
    }
    let metrics = inlet.metrics().await;
    let asked = metrics.get("inlet_store_requests_total{op=\"get\",result=\"ok\"}") - reads;
    assert!(asked < 10, "{asked} reads for three edits");
    // Nobody says when: it is found at the user's next flush.
    emulator.edit(&key, json!({ "notes": "quietly" })).await;
    eventually("the note is published", || async {
        let found = read(&setting.nats.url(), "INLET").await;
        (found.last()?.body["user"]["notes"] == "quietly").then_some(())
    })
    .await;
    ended_well(&mut inlet).await;
    let last = read(&setting.nats.url(), "INLET").await.pop().unwrap().body;
    assert_eq!(last["user"]["status"], "watched");
    assert!(last["user"]["tags"].as_array().unwrap().contains(&json!("VIP")), "{last}");
    let users = emulator.users().await;
    assert_eq!((&users[&key]["notes"], &users[&key]["tags"]), (&json!("quietly"), &json!(["VIP"])));
}

#[tokio::test]
async fn a_dry_run_reads_and_writes_nothing() {
    let setting = Setting::new(true, &["--rate", "500", "--count", "500", "--users", "20"]).await;
    let mut inlet = setting.serve(&[("ENRICH_MODE", "dry-run"), ("LOG_LEVEL", "debug")]).await;
    setting.simulator.has_finished(500).await;
    inlet.settled(500).await.assert_account_closes();
    let metrics = inlet.metrics().await;
    let writes = ["ok", "away", "refused"].map(|result| {
        metrics.get(&format!("inlet_store_requests_total{{op=\"write\",result=\"{result}\"}}"))
    });
    assert_eq!(writes, [0, 0, 0]);
    ended_well(&mut inlet).await;
    let emulator = setting.emulator.as_ref().unwrap();
    assert!(emulator.users().await.is_empty() && emulator.read_all("inlet").await.is_empty());
    assert!(inlet.log().contains("nothing is written"), "it says what it computed");
    for message in read(&setting.nats.url(), "INLET").await {
        assert_eq!(message.body["auth"]["reason"], "dry_run");
        assert!(!message.headers.contains_key("Inlet-User"));
    }
}

#[tokio::test]
async fn an_instance_with_another_subject_on_the_same_stream_and_store_does_not_start() {
    let setting = Setting::new(true, &["--rate", "100", "--count", "100"]).await;
    let mut inlet = setting.serve(&[]).await;
    setting.simulator.has_finished(100).await;
    inlet.settled(100).await;
    ended_well(&mut inlet).await;
    let folder = tempfile::tempdir().unwrap();
    let (nats, emulator) = (setting.nats.url(), setting.emulator.as_ref().unwrap());
    let subject = "internal.{type}.v1";
    widen(&nats).await;
    let output = run(
        &["serve"],
        &[
            ("NATS_URL", &nats),
            ("FIRESTORE_EMULATOR_HOST", &setting.store_at),
            ("GOOGLE_CLOUD_PROJECT", &emulator.id),
            ("PUBLISH_SUBJECT", subject),
            ("PORT", "0"),
            ("DATA_DIR", folder.path().to_str().unwrap()),
        ],
    );
    let log = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert_eq!(output.status.code(), Some(78), "{log}");
    assert!(log.contains("same subject"), "{log}");
}

#[tokio::test]
async fn a_deleted_document_is_created_again_as_a_new_user() {
    let setting = Setting::new(true, &["--rate", "50", "--users", "1"]).await;
    let mut inlet = setting.serve(&[]).await;
    let emulator = setting.emulator.as_ref().unwrap();
    let key = eventually("the user is counted", || async {
        let users = emulator.users().await;
        let (key, fields) = users.first_key_value()?;
        (fields.get("messageCountAllTime")?.as_u64()? > 0).then(|| key.clone())
    })
    .await;
    let first = emulator.users().await[&key]["firstEventId"].clone();
    emulator.delete_user(&key).await;
    eventually("the user is there again, counted anew", || async {
        let users = emulator.users().await;
        let again = users.get(&key)?;
        (again["firstEventId"] != first && again.get("messageCountAllTime")?.as_u64()? > 0).then_some(())
    })
    .await;
    ended_well(&mut inlet).await;
}

/// Feeds the lines of a file to a service of its own in this folder; what it published.
fn replayed(folder: &Path, lines: &Path, emulator: Option<&Project>) -> Vec<Value> {
    let host = firestore::host();
    let mut environment = vec![("DATA_DIR", folder.to_str().unwrap()), ("LOG_LEVEL", "error")];
    if let Some(emulator) = emulator {
        environment.extend([("FIRESTORE_EMULATOR_HOST", &*host), ("GOOGLE_CLOUD_PROJECT", &emulator.id)]);
    }
    let output = run(&["replay", "--show", "--json", lines.to_str().unwrap()], &environment);
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let said = said.lines().map(|line| serde_json::from_str(line).unwrap());
    said.filter(|line: &Value| !line["user"].is_null()).collect()
}

/// What the session rules say of messages of one user at these times, in milliseconds after the first.
async fn edges(emulator: Option<&Project>) {
    const DAY: i64 = 24 * 60 * 60 * 1_000;
    let at = [0, DAY - 1, 2 * DAY - 1, 2 * DAY - 2, DAY, 3 * DAY, 3 * DAY + 1, 2 * DAY];
    let folder = tempfile::tempdir().unwrap();
    let lines = folder.path().join("lines");
    let line = |(number, after): (usize, &i64)| {
        let at = 1_700_000_000_000 + after;
        format!(
            "@id=edge-{number};room-id=1;tmi-sent-ts={at};user-id=7 :a!a@a.tmi.twitch.tv PRIVMSG #people :{number}\n"
        )
    };
    std::fs::write(&lines, at.iter().enumerate().map(line).collect::<String>()).unwrap();
    let published = replayed(folder.path(), &lines, emulator);
    let brief = |body: &Value| {
        let tags = body["user"]["tags"].as_array().unwrap();
        let tags: Vec<_> =
            tags.iter().map(|tag| &tag.as_str().unwrap()[..7]).filter(|tag| *tag != "PROVIDE").collect();
        (tags.join(" "), !body["user"]["sessionId"].is_null())
    };
    let told: Vec<_> = published.iter().map(brief).collect();
    let expected = [
        ("FIRST_A FIRST_S NEW_USE", true),
        ("RETURNI", true),
        // A day after the last message, to the millisecond.
        ("FIRST_S RETURNI", true),
        // From before its session.
        ("RETURNI", false),
        ("RETURNI", false),
        ("FIRST_S RETURNI", true),
        ("RETURNI", true),
        ("RETURNI", false),
    ];
    assert_eq!(told, expected.map(|(tags, is_in_session)| (tags.to_owned(), is_in_session)));
    let users = match emulator {
        Some(emulator) => emulator.users().await,
        None => embedded_users(folder.path(), &published).await,
    };
    let counts = (&users["twitch:7"]["messageCountAllTime"], &users["twitch:7"]["sessionCount"]);
    assert_eq!(counts, (&json!(8), &json!(3)));
}

/// Somebody spoiled the note of how far the stream is counted.
async fn a_spoiled_note(emulator: Option<&Project>) {
    let folder = tempfile::tempdir().unwrap();
    let lines = folder.path().join("lines");
    let say = |id: &str| {
        let line = format!("@id={id};room-id=1;user-id=7 :a!a@a.tmi.twitch.tv PRIVMSG #people :{id}\n");
        std::fs::write(&lines, line).unwrap();
        replayed(folder.path(), &lines, emulator)
    };
    say("before");
    if let Some(emulator) = emulator {
        let notes = emulator.read_all("inlet").await;
        emulator.write("inlet", notes.keys().next().unwrap(), json!({ "countedTo": "far" })).await;
    } else {
        let store = EmbeddedStore::open(folder.path()).unwrap();
        let (note, _) = store.list(Collection::Inlet, None, 1).await.unwrap().remove(0);
        let fields = serde_json::Map::from_iter([("countedTo".to_owned(), json!(-7))]);
        store.write_many(vec![Write::set(note, fields)]).await.unwrap();
    }
    let published = say("after");
    assert_eq!(published[0]["user"]["tags"], json!(["PROVIDER_TWITCH", "RETURNING_USER"]));
    let users = match emulator {
        Some(emulator) => emulator.users().await,
        None => embedded_users(folder.path(), &published).await,
    };
    assert_eq!(users["twitch:7"]["messageCountAllTime"], 2, "each line is counted once");
}

#[tokio::test]
async fn a_note_that_cannot_be_read_is_written_over_on_the_embedded_store() {
    a_spoiled_note(None).await;
}

#[tokio::test]
async fn a_note_that_cannot_be_read_is_written_over_on_firestore() {
    a_spoiled_note(Some(&Project::new())).await;
}

#[tokio::test]
async fn sessions_end_to_the_millisecond_on_the_embedded_store() {
    edges(None).await;
}

#[tokio::test]
async fn sessions_end_to_the_millisecond_on_firestore() {
    edges(Some(&Project::new())).await;
}

/// Lets the stream take other subjects as well.
async fn widen(url: &str) {
    let context = async_nats::jetstream::new(async_nats::connect(url).await.unwrap());
    let mut config = context.get_stream("INLET").await.unwrap().cached_info().config.clone();
    config.subjects = vec!["internal.>".to_owned()];
    context.update_stream(config).await.unwrap();
}
