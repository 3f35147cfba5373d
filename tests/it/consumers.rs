//! The consumers under `examples/`, run as their readers would run them, beside a real nats-server: whoever is killed, each
//! event of the stream has its effect once.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::harness::child::{Child, clean};
use crate::harness::inlet::{Inlet, Simulator};
use crate::harness::nats::Nats;
use crate::harness::stream::{InStream, read};
use crate::harness::within;

/// For all that is still to come, on a busy machine.
const CATCHING_UP: Duration = Duration::from_mins(1);

/// An example's folder with what it needs installed, made once for each state of its files.
fn installed(name: &str, files: &[&str], install: &[&[&str]]) -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples").join(name);
    let mut state = DefaultHasher::new();
    for file in files {
        std::fs::read(source.join(file)).unwrap().hash(&mut state);
    }
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-{:016x}", state.finish()));
    if folder.exists() {
        return folder;
    }
    // Beside it first: another run may be at the same, and one that is ended leaves nothing half done in its place.
    let beside = folder.with_extension(std::process::id().to_string());
    std::fs::create_dir_all(&beside).unwrap();
    for file in files {
        std::fs::copy(source.join(file), beside.join(file)).unwrap();
    }
    for command in install {
        // With our own environment: it may say where packages come from.
        let output = Command::new(command[0]).args(&command[1..]).current_dir(&beside).output();
        let output = output
            .unwrap_or_else(|error| panic!("{}: {error}; ./validate_deliverable.sh installs it", command[0]));
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{}: {out}{err}", command.join(" "));
    }
    if std::fs::rename(&beside, &folder).is_err() {
        assert!(folder.exists(), "{} cannot be moved", beside.display());
        std::fs::remove_dir_all(&beside).unwrap();
    }
    folder
}

/// An example to be run on a file, and how to read from the file what was done, by the events' ids.
struct Example {
    name: &'static str,
    program: Vec<PathBuf>,
    done: fn(&Path) -> Vec<String>,
}

/// An example at work.
struct Consumer<'a> {
    example: &'a Example,
    folder: tempfile::TempDir,
    nats: String,
    child: Child,
}

impl<'a> Consumer<'a> {
    fn start(example: &'a Example, nats: String) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let child = Self::run(example, folder.path(), &nats);
        Self { example, folder, nats, child }
    }

    fn run(example: &Example, folder: &Path, nats: &str) -> Child {
        let mut command = clean(&example.program[0]);
        command.args(&example.program[1..]).arg(folder.join("done")).env("NATS_URL", nats);
        Child::start(example.name, &mut command, &folder.join("log"))
    }

    /// SIGKILL, and another one in its place.
    fn kill_and_start(&mut self) {
        self.child.kill();
        self.child = Self::run(self.example, self.folder.path(), &self.nats);
    }

    fn done(&self) -> Vec<String> {
        (self.example.done)(&self.folder.path().join("done"))
    }

    /// Waits until it has done so many more.
    async fn goes_on(&self, more: usize) {
        self.has_done_as_many(self.done().len() + more).await;
    }

    async fn has_done_as_many(&self, wanted: usize) {
        within(CATCHING_UP, "the consumer goes on", || async { (self.done().len() >= wanted).then_some(()) })
            .await;
    }

    /// Waits until it has done what is in the stream: nothing else, each once, in order.
    async fn has_done(&self, stream: &[InStream]) {
        let wanted: Vec<_> = stream.iter().map(|message| message.msg_id.clone()).collect();
        self.has_done_as_many(wanted.len()).await;
        assert_eq!(
            self.done(),
            wanted,
            "{}",
            std::fs::read_to_string(self.folder.path().join("log")).unwrap()
        );
    }
}

/// What a consumer finds in the stream: without the dead letters, and without what is nobody's envelope.
async fn events(nats: &Nats) -> Vec<InStream> {
    let mut events = read(&nats.url(), "INLET").await;
    events.retain(|message| message.subject == "internal.ingress.v1" && !message.msg_id.is_empty());
    events
}

/// Somebody else publishes on the subject what is no envelope.
async fn foreigners(nats: &Nats) {
    let context = nats.jetstream().await;
    for payload in ["no JSON", "null", "5", r#"{"a":1}"#, r#"{"id":{},"source":{"channel":"a"},"user":5}"#] {
        context.publish("internal.ingress.v1", payload.into()).await.unwrap().await.unwrap();
    }
}

async fn say(inlet: &Inlet, id: &str) {
    let line = format!("@id={id};user-id=5;tmi-sent-ts=1795153883317 :a!a@a PRIVMSG #alpha :one more\n");
    let replayed = inlet.client().post(inlet.url("/admin/replay")).body(line).send().await.unwrap();
    assert!(replayed.status().is_success());
}

/// Chat flows; the consumer is killed three times in the midst of it, the server once, and others write to the stream. Then
/// chat stops, and one more is said. At last the stream is another one.
async fn each_event_once(example: &Example) -> (Vec<InStream>, tempfile::TempDir) {
    let mut nats = Nats::start().await;
    let mut simulator = Simulator::start(&["--channels", "alpha,beta", "--rate", "40"]).await;
    let (nats_url, irc_url) = (nats.url(), simulator.url());
    let inlet = Inlet::serve(&[
        ("NATS_URL", nats_url.as_str()),
        ("TWITCH_IRC_URL", &irc_url),
        ("TWITCH_CHANNELS", "alpha,beta"),
    ])
    .await;
    let mut consumer = Consumer::start(example, nats_url);
    consumer.goes_on(20).await;
    foreigners(&nats).await;
    consumer.kill_and_start();
    consumer.goes_on(20).await;
    nats.kill();
    nats.restart().await;
    consumer.goes_on(20).await;
    consumer.kill_and_start();
    consumer.goes_on(20).await;
    consumer.kill_and_start();
    consumer.goes_on(20).await;
    simulator.say("pause");
    inlet.quiet().await;
    let before = events(&nats).await;
    consumer.has_done(&before).await;
    // A start that finds nothing new repeats nothing, and goes on behind it.
    consumer.kill_and_start();
    say(&inlet, "one-more").await;
    let mut stream = events(&nats).await;
    assert_eq!(stream.len(), before.len() + 1);
    consumer.has_done(&stream).await;
    // What it wrote of the old stream stays, and it goes on in the new one by itself.
    nats.kill();
    nats.restart_empty().await;
    say(&inlet, "in-the-new-one").await;
    consumer.has_done_as_many(stream.len() + 1).await;
    stream.extend(events(&nats).await);
    let ids = stream.iter().map(|message| message.msg_id.clone()).collect::<BTreeSet<_>>();
    assert_eq!(consumer.done().len(), stream.len());
    assert_eq!(consumer.done().into_iter().collect::<BTreeSet<_>>(), ids);
    (stream, consumer.folder)
}

#[tokio::test]
async fn the_one_in_typescript_writes_each_event_once_and_in_order() {
    let files = ["consumer.ts", "package.json", "package-lock.json", "tsconfig.json"];
    let install: [&[&str]; 2] = [&["npm", "ci", "--no-audit", "--no-fund"], &["npm", "run", "build"]];
    let folder = installed("consumer-typescript", &files, &install);
    let done = |file: &Path| {
        let text = std::fs::read_to_string(file).unwrap_or_default();
        // What stands behind the last line end is being written.
        let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
        let id = |line: &str| {
            serde_json::from_str::<serde_json::Value>(line).unwrap()["id"].as_str().unwrap().to_owned()
        };
        whole.lines().map(id).collect()
    };
    let program = vec!["node".into(), folder.join("dist/consumer.js")];
    each_event_once(&Example { name: "the consumer in TypeScript", program, done }).await;
}

/// What a query of a consumer's database brings, a row a line; nothing where there is no table yet.
fn query(file: &Path, sql: &str) -> Vec<String> {
    let script = "import sqlite3, sys\n\
        for row in sqlite3.connect(f'file:{sys.argv[1]}?mode=ro', uri=True).execute(sys.argv[2]): print(*row)";
    let output = clean("python3").args(["-c", script]).arg(file).arg(sql).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    if output.status.success() { text.lines().map(str::to_owned).collect() } else { Vec::new() }
}

#[tokio::test]
async fn the_one_in_python_counts_each_event_once() {
    let install: [&[&str]; 2] =
        [&["python3", "-m", "venv", "venv"], &["sh", "-c", "venv/bin/pip install -q -r requirements.txt"]];
    let folder = installed("consumer-python", &["consumer.py", "requirements.txt"], &install);
    let done = |file: &Path| query(file, "SELECT id FROM event ORDER BY seq");
    let program = vec![folder.join("venv/bin/python"), folder.join("consumer.py")];
    let (stream, folder) = each_event_once(&Example { name: "the consumer in Python", program, done }).await;
    // Its effect is no mere note: counters that were only ever added to.
    let mut expected = BTreeMap::new();
    for message in stream.iter().filter(|message| message.body["type"] == "external.chat.message.v1") {
        let of = |part: &str, field: &str| message.body[part][field].as_str().unwrap().to_owned();
        *expected.entry((of("source", "channel"), of("user", "id"))).or_insert(0) += 1;
    }
    let expected: Vec<_> = expected
        .into_iter()
        .map(|((channel, user), messages)| format!("{channel} {user} {messages}"))
        .collect();
    let counted = query(&folder.path().join("done"), "SELECT * FROM said ORDER BY channel, user");
    assert_eq!(counted, expected);
}
