//! `inlet demo` as a stranger types it: what it shows, how it ends, what it leaves, and whom it asks.

use std::io::{BufRead as _, BufReader, ErrorKind, Read as _};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::harness::PATIENCE;
use crate::harness::child::clean;
use crate::harness::inlet::{BINARY, command, run};

/// A running demonstration, its temporary folders in a folder of the test's.
struct Demo {
    child: Child,
    folder: tempfile::TempDir,
    /// What it shows, line by line.
    shown: Receiver<String>,
    /// What it says about it.
    said: Receiver<String>,
}

/// The lines that come out of a pipe. The thread ends with the pipe or with whoever reads them.
fn lines_of(pipe: impl std::io::Read + Send + 'static) -> Receiver<String> {
    let (lines, inbox) = sync_channel(10_000);
    std::thread::spawn(move || {
        for line in BufReader::new(pipe).lines().map_while(Result::ok) {
            if lines.send(line).is_err() {
                return;
            }
        }
    });
    inbox
}

impl Demo {
    fn start(flags: &[&str], environment: &[(&str, &str)]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut command = command(&[&["demo"], flags].concat(), environment);
        command.env("TMPDIR", folder.path()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let (shown, said) = (lines_of(child.stdout.take().unwrap()), lines_of(child.stderr.take().unwrap()));
        Self { child, folder, shown, said }
    }

    /// The next line that it shows; `None` at the end.
    fn next(&self) -> Option<String> {
        match self.shown.recv_timeout(PATIENCE) {
            Ok(line) => Some(line),
            Err(RecvTimeoutError::Disconnected) => None,
            Err(RecvTimeoutError::Timeout) => panic!("it shows nothing for {PATIENCE:?}"),
        }
    }

    /// The address that it names.
    fn url(&self) -> String {
        let line = std::iter::from_fn(|| self.said.recv_timeout(PATIENCE).ok())
            .find(|line| line.contains("look "))
            .unwrap();
        line.split_whitespace().last().unwrap().trim_end_matches('/').to_owned()
    }

    fn signal(&self, signal: &str) {
        let kill = clean("kill").arg(format!("-{signal}")).arg(self.child.id().to_string()).status();
        assert!(kill.unwrap().success());
    }

    /// Its end: how, and the last it said. Nothing may be left.
    fn ended(mut self) -> (ExitStatus, String) {
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < deadline, "it still runs");
            std::thread::sleep(Duration::from_millis(10));
        };
        assert_eq!(left_in(self.folder.path()), Vec::<String>::new(), "left behind");
        (status, self.said.iter().collect::<Vec<_>>().join("\n"))
    }
}

impl Drop for Demo {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

fn left_in(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect()
}

/// The numbers of the last line: received, published, users.
fn account(said: &str) -> [u64; 3] {
    let line = said.lines().last().unwrap();
    let numbers: Vec<u64> =
        line.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse().ok()).collect();
    assert!(line.contains(" received, ") && line.ends_with(" users"), "{said}");
    numbers.try_into().unwrap()
}

#[test]
fn it_shows_enriched_messages_soon_and_ends_with_an_account() {
    let began = Instant::now();
    let demo = Demo::start(&["--count", "12", "--rate", "20"], &[]);
    let first = demo.next().unwrap();
    // What is promised to a stranger.
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    let mut lines = vec![first];
    lines.extend(std::iter::from_fn(|| demo.next()));
    assert_eq!(lines.len(), 12, "{lines:#?}");
    assert!(lines.iter().any(|line| line.contains("[NEW_USER]")), "{lines:#?}");
    let is_plain = |line: &String| line.contains(" #") && !line.contains(char::is_control);
    assert!(lines.iter().all(is_plain), "{lines:#?}");
    let (status, said) = demo.ended();
    assert_eq!(status.code(), Some(0), "{said}");
    for part in ["/healthz", "/metrics", " tail --inlet-url http://127.0.0.1:"] {
        assert!(said.contains(part), "{said}");
    }
    let [received, published, users] = account(&said);
    assert!(published >= 12 && received >= published && users > 0, "{said}");
    // Nothing is logged where nothing is wrong.
    assert!(!said.contains("WARN") && !said.contains("ERROR"), "{said}");
}

#[test]
fn envelopes_are_printed_as_they_are() {
    let demo = Demo::start(&["--json", "--count", "10", "--rate", "50"], &[]);
    let schema: Value = serde_json::from_str(include_str!("../../docs/envelope-v1.schema.json")).unwrap();
    let schema = jsonschema::validator_for(&schema).unwrap();
    let envelopes: Vec<Value> =
        std::iter::from_fn(|| demo.next()).map(|line| serde_json::from_str(&line).unwrap()).collect();
    assert_eq!(envelopes.len(), 10);
    for envelope in &envelopes {
        assert!(schema.is_valid(envelope), "{envelope}");
        assert!(envelope["user"].is_null() || envelope["auth"]["matched"] == true, "{envelope}");
    }
    assert_eq!(demo.ended().0.code(), Some(0));
}

#[test]
fn a_signal_ends_it_well_and_leaves_nothing() {
    for signal in ["INT", "TERM", "HUP"] {
        let demo = Demo::start(&["--rate", "20"], &[]);
        demo.next().unwrap();
        assert_eq!(left_in(demo.folder.path()).len(), 1);
        demo.signal(signal);
        let (status, said) = demo.ended();
        assert_eq!(status.code(), Some(0), "{signal}: {said}");
        assert!(account(&said)[0] > 0, "{signal}: {said}");
    }
}

#[test]
fn it_ends_by_itself_after_the_time_that_is_asked_for() {
    let demo = Demo::start(&["--for", "500ms"], &[]);
    while demo.next().is_some() {}
    assert_eq!(demo.ended().0.code(), Some(0));
    let wrong = run(&["demo", "--for", "soon"], &[]);
    assert_eq!(wrong.status.code(), Some(78));
    assert!(String::from_utf8_lossy(&wrong.stderr).contains("--for"));
}

#[test]
fn a_reader_that_goes_away_ends_it_quietly() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = command(&["demo", "--rate", "50"], &[]);
    command.env("TMPDIR", folder.path()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut head = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    for _ in 0..5 {
        line.clear();
        head.read_line(&mut line).unwrap();
        assert!(line.contains(" #"), "{line}");
    }
    drop(head);
    let mut said = String::new();
    // Ends with the process.
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0), "{said}");
    assert!(!said.contains("panic") && !said.to_lowercase().contains("error"), "{said}");
    assert_eq!(left_in(folder.path()), Vec::<String>::new());
}

/// Somebody who must not be asked.
struct Elsewhere(TcpListener);

impl Elsewhere {
    fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        Self(listener)
    }

    fn address(&self) -> String {
        self.0.local_addr().unwrap().to_string()
    }

    fn assert_untouched(&self) {
        let came = self.0.accept();
        assert!(came.is_err_and(|error| error.kind() == ErrorKind::WouldBlock), "somebody came");
    }
}

#[test]
fn what_is_set_for_a_deployment_is_not_its_business() {
    let (nats, firestore, twitch, history) =
        (Elsewhere::new(), Elsewhere::new(), Elsewhere::new(), Elsewhere::new());
    let data = tempfile::tempdir().unwrap();
    let environment = [
        ("NATS_URL", format!("nats://user:hush@{}", nats.address())),
        ("MESSAGE_BUS_DRIVER", "nats".to_owned()),
        ("NATS_CREDS_FILE", "/no/such".to_owned()),
        ("USER_STORE_DRIVER", "firestore".to_owned()),
        ("GOOGLE_CLOUD_PROJECT", "somebodys-project".to_owned()),
        ("FIRESTORE_EMULATOR_HOST", firestore.address()),
        ("TWITCH_CHANNELS", "somebody".to_owned()),
        ("TWITCH_IRC_URL", format!("irc://{}", twitch.address())),
        ("TWITCH_BOT_USERNAME", "somebody".to_owned()),
        ("TWITCH_BOT_ACCESS_TOKEN", "hush".to_owned()),
        ("TWITCH_BACKFILL_URL", format!("http://{}", history.address())),
        ("TLS_CA_FILE", "/no/such".to_owned()),
        ("DATA_DIR", data.path().to_str().unwrap().to_owned()),
        ("BUS_PREFIX", "prod".to_owned()),
        ("ENRICH_MODE", "off".to_owned()),
        ("PORT", "not a port".to_owned()),
        ("BIND_ADDR", "0.0.0.0".to_owned()),
        ("ADMIN_TOKEN", "hush".to_owned()),
        ("ADMIN_TOKEN_FILE", "/no/such".to_owned()),
        ("STREAM_TOKEN", "hush".to_owned()),
        ("LOG_LEVEL", "trace".to_owned()),
        ("K_SERVICE", "inlet".to_owned()),
    ];
    let environment: Vec<_> = environment.iter().map(|(name, value)| (*name, value.as_str())).collect();
    let demo = Demo::start(&["--json", "--count", "5", "--rate", "50"], &environment);
    let shown: Vec<_> = std::iter::from_fn(|| demo.next()).collect();
    let (status, said) = demo.ended();
    assert_eq!((status.code(), shown.len()), (Some(0), 5), "{said}");
    // The settings that would lead `tail` elsewhere are answered in the line that is shown.
    assert!(said.contains(" tail --message-bus-driver embedded --inlet-url http://127.0.0.1:"), "{said}");
    assert!(!said.contains("hush"), "{said}");
    for elsewhere in [nats, firestore, twitch, history] {
        elsewhere.assert_untouched();
    }
    assert_eq!(left_in(data.path()), Vec::<String>::new());
}

#[tokio::test]
async fn it_is_the_service_that_it_shows() {
    inlet::tls::install_provider();
    let demo = Demo::start(&["--rate", "20"], &[]);
    let url = demo.url();
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    crate::harness::eventually("it is ready", || async {
        let answer = client.get(format!("{url}/readyz")).send().await.ok()?;
        answer.status().is_success().then_some(())
    })
    .await;
    let health: Value = client.get(format!("{url}/healthz")).send().await.unwrap().json().await.unwrap();
    assert_eq!(
        (&health["service"], &health["parts"]["twitch"]["state"]),
        (&"inlet".into(), &"connected".into())
    );
    let page = client.get(format!("{url}/")).send().await.unwrap();
    assert_eq!(
        (page.status().as_u16(), &page.headers()["content-type"]),
        (200, &"text/html; charset=utf-8".parse().unwrap())
    );
    let tail = tokio::task::spawn_blocking(move || run(&["tail", "--count", "3", "--inlet-url", &url], &[]));
    let tail = tail.await.unwrap();
    assert_eq!(tail.status.code(), Some(0), "{}", String::from_utf8_lossy(&tail.stderr));
    assert_eq!(String::from_utf8_lossy(&tail.stdout).lines().count(), 3);
    demo.signal("TERM");
    assert_eq!(demo.ended().0.code(), Some(0));
}

#[test]
fn colours_are_for_a_terminal_that_wants_them() {
    // `script` gives it a terminal.
    let at_a_terminal = |environment: &[(&str, &str)]| {
        let folder = tempfile::tempdir().unwrap();
        let mut command = clean("script");
        command.args(["-qec", &format!("{BINARY} demo --rate 50 --count 8"), "/dev/null"]);
        let output = command.env("TMPDIR", folder.path()).envs(environment.iter().copied()).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success() && text.contains(" #"), "{text}");
        text
    };
    let coloured = at_a_terminal(&[("TERM", "xterm-256color")]);
    assert!(coloured.contains("\x1b[30;42m NEW_USER \x1b[0m"), "{coloured:?}");
    for plain in [("NO_COLOR", "1"), ("TERM", "dumb")] {
        let text = at_a_terminal(&[plain]);
        assert!(!text.contains('\x1b') && text.contains("[NEW_USER]"), "{plain:?}: {text:?}");
    }
}
