//! The real binary, as a service and as a command, and the simulator as a process beside it.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::child::{Child, clean, on_a_small_disk};
use super::{PATIENCE, eventually, free_port};

/// The binary under test.
pub const BINARY: &str = env!("CARGO_BIN_EXE_inlet");

/// Runs a command to its end.
pub fn run(arguments: &[&str], environment: &[(&str, &str)]) -> Output {
    command(arguments, environment).output().unwrap()
}

/// A command with this environment and nothing else.
pub fn command(arguments: &[&str], environment: &[(&str, &str)]) -> Command {
    let mut command = clean(BINARY);
    command.args(arguments).envs(environment.iter().copied());
    command
}

/// A running service.
pub struct Inlet {
    pub port: u16,
    pub child: Child,
    folder: tempfile::TempDir,
    client: reqwest::Client,
}

impl Inlet {
    /// Starts `serve` with these settings on a folder of its own, and waits until it answers.
    pub async fn serve(settings: &[(&str, &str)]) -> Self {
        Self::serve_in(tempfile::tempdir().unwrap(), settings).await
    }

    /// The same in a folder that was used before.
    pub async fn serve_in(folder: tempfile::TempDir, settings: &[(&str, &str)]) -> Self {
        Self::start(clean(BINARY), folder, settings).await
    }

    /// Kills it, and starts it again with these settings on the same folder and port, when the returned future is awaited.
    pub fn kill_and_serve(mut self, settings: &[(&str, &str)]) -> impl Future<Output = Self> {
        self.child.kill();
        let Self { port, folder, .. } = self;
        Self::start_on(port, clean(BINARY), folder, settings)
    }

    /// The same where [`Child::limit_files`] can fill the disk.
    pub async fn serve_on_a_small_disk(settings: &[(&str, &str)]) -> Self {
        Self::start(on_a_small_disk(BINARY), tempfile::tempdir().unwrap(), settings).await
    }

    async fn start(command: Command, folder: tempfile::TempDir, settings: &[(&str, &str)]) -> Self {
        Self::start_on(free_port(), command, folder, settings).await
    }

    async fn start_on(
        port: u16,
        mut command: Command,
        folder: tempfile::TempDir,
        settings: &[(&str, &str)],
    ) -> Self {
        ::inlet::tls::install_provider();
        command.arg("serve").envs(settings.iter().copied());
        command.env("PORT", port.to_string()).env("DATA_DIR", folder.path().join("data"));
        let child = Child::start("inlet serve", &mut command, &folder.path().join("log"));
        let client = reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(10)).build().unwrap();
        let mut inlet = Self { port, child, folder, client };
        while inlet.get("/livez").await.is_none() {
            assert!(inlet.child.has_ended().is_none(), "inlet ended at its start:\n{}", inlet.log());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        inlet
    }

    /// The service's folder, to be used by the next one.
    pub fn into_folder(self) -> tempfile::TempDir {
        let Self { child, folder, .. } = self;
        drop(child);
        folder
    }

    pub fn data_dir(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.port)
    }

    pub fn client(&self) -> &reqwest::Client {
        &self.client
    }

    /// An answer, if there is one.
    pub async fn get(&self, path: &str) -> Option<reqwest::Response> {
        self.client.get(self.url(path)).send().await.ok()
    }

    /// An answer's status and JSON.
    pub async fn json(&self, path: &str) -> (u16, Value) {
        let response = self.get(path).await.unwrap();
        (response.status().as_u16(), response.json().await.unwrap())
    }

    /// Names of the parts that `/readyz` waits for.
    pub async fn waiting_for(&self) -> Vec<String> {
        let (_, body) = self.json("/readyz").await;
        let names = body["waitingFor"].as_array().cloned().unwrap_or_default();
        names.iter().map(|name| name.as_str().unwrap().to_owned()).collect()
    }

    /// Waits until `/readyz` is content.
    pub async fn ready(&self) {
        for _ in 0..PATIENCE.as_millis() / 20 {
            if self.waiting_for().await.is_empty() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("not ready, it waits for {:?}:\n{}", self.waiting_for().await, self.log());
    }

    /// Everything it wrote to its log.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap()
    }

    /// The numbers of `/metrics`.
    pub async fn metrics(&self) -> Metrics {
        Metrics::parse(&self.get("/metrics").await.unwrap().text().await.unwrap())
    }

    /// Waits until so many events have come to their end.
    pub async fn settled(&self, events: u64) -> Metrics {
        eventually("all events settled", || async {
            let metrics = self.metrics().await;
            (metrics.sum("inlet_events_received_total") >= events && metrics.sum("inlet_events_pending") == 0)
                .then_some(())
        })
        .await;
        // Series are read one after the other: in that answer, one read early may be from before the end.
        self.metrics().await
    }

    /// Waits until nothing is under way: nothing pending, and nothing more comes in.
    pub async fn quiet(&self) -> Metrics {
        let deadline = Instant::now() + SENDING;
        let (mut before, mut since) = (None, Instant::now());
        loop {
            let metrics = self.metrics().await;
            let received = metrics.sum("inlet_events_received_total");
            if before.replace(received) != Some(received) || metrics.sum("inlet_events_pending") > 0 {
                since = Instant::now();
            }
            if since.elapsed() > QUIET {
                return metrics;
            }
            assert!(Instant::now() < deadline, "something is still under way: {metrics:?}");
            tokio::time::sleep(QUIET / 10).await;
        }
    }

    /// SIGTERM; how long it took, and the exit code.
    pub async fn terminate(&mut self, patience: Duration) -> (Duration, Option<i32>) {
        let start = Instant::now();
        self.child.signal("TERM");
        let status = self.child.wait(patience).await;
        (start.elapsed(), status.code())
    }

    /// Resident memory, in KiB: now and at most.
    pub fn memory_kib(&self) -> (u64, u64) {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let of = |name: &str| {
            let line = status.lines().find(|line| line.starts_with(name)).unwrap();
            line.split_whitespace().nth(1).unwrap().parse().unwrap()
        };
        (of("VmRSS:"), of("VmHWM:"))
    }
}

/// The numbers of `/metrics`.
#[derive(Debug, Clone)]
pub struct Metrics(BTreeMap<String, f64>);

impl Metrics {
    pub fn parse(text: &str) -> Self {
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        Self(
            lines
                .filter_map(|line| line.rsplit_once(' '))
                .map(|(k, v)| (k.to_owned(), v.parse().unwrap()))
                .collect(),
        )
    }

    /// One series, by its full name.
    pub fn get(&self, series: &str) -> u64 {
        let value = self.0.get(series).unwrap_or_else(|| panic!("there is no series {series}"));
        whole(*value)
    }

    /// The sum of a family.
    pub fn sum(&self, family: &str) -> u64 {
        let of = |name: &str| {
            name == family || name.strip_prefix(family).is_some_and(|rest| rest.starts_with('{'))
        };
        let values: Vec<f64> = self.0.iter().filter(|(name, _)| of(name)).map(|(_, value)| *value).collect();
        assert!(!values.is_empty(), "there is no family {family}");
        assert!(values.iter().all(|value| value.fract() == 0.0));
        whole(values.iter().sum())
    }

    /// As `/metrics` shows them.
    pub fn text(&self) -> String {
        self.0.iter().fold(String::new(), |text, (name, value)| text + name + " " + &value.to_string() + "\n")
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    /// The account of the contract: nothing is counted twice or not at all.
    pub fn assert_account_closes(&self) {
        let sum = |family: &str| self.sum(&format!("inlet_{family}"));
        assert_eq!(
            sum("events_received_total"),
            sum("events_admitted_total") + sum("events_duplicate_total") + sum("events_refused_total"),
            "received = admitted + duplicate + refused"
        );
        assert_eq!(
            sum("events_admitted_total") + sum("outbox_recovered_total"),
            sum("events_published_total")
                + sum("publish_duplicates_total")
                + sum("events_deadlettered_total")
                + sum("events_pending"),
            "admitted + recovered = published + publish duplicates + dead-lettered + pending"
        );
    }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "counts are whole and small")]
fn whole(value: f64) -> u64 {
    value as u64
}

/// The simulator as a process of its own.
pub struct Simulator {
    pub child: Child,
    pub port: u16,
    folder: tempfile::TempDir,
}

impl Simulator {
    /// Starts it with these flags more.
    pub async fn start(flags: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let port = free_port();
        Self::start_on(port, folder, flags).await
    }

    async fn start_on(port: u16, folder: tempfile::TempDir, flags: &[&str]) -> Self {
        let listen = format!("127.0.0.1:{port}");
        let sent = folder.path().join("sent");
        let mut command = command(&["simulate", "--listen", &listen, "--sent", sent.to_str().unwrap()], &[]);
        command.args(flags).stdin(Stdio::piped());
        let log = folder.path().join("log");
        let child = Child::start("inlet simulate", &mut command, &log);
        let simulator = Self { child, port, folder };
        eventually("the simulator listens", || async {
            simulator.log().contains("simulating Twitch chat on").then_some(())
        })
        .await;
        simulator
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap()
    }

    /// Its address.
    pub fn url(&self) -> String {
        format!("irc://127.0.0.1:{}", self.port)
    }

    /// Where a proxy finds it.
    pub fn addr(&self) -> std::net::SocketAddr {
        std::net::SocketAddr::from(([127, 0, 0, 1], self.port))
    }

    /// A line of control.
    pub fn say(&mut self, line: &str) {
        let stdin = self.child.stdin();
        stdin.write_all(format!("{line}\n").as_bytes()).unwrap();
        stdin.flush().unwrap();
    }

    /// What it sent, from its own log: channel and id, in order; lines that nobody was there for left out.
    pub fn sent(&self) -> Vec<(String, String)> {
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let log = self.sent_log();
        log.iter()
            .filter(|l| !l["connection"].is_null())
            .map(|l| (text(&l["channel"]), text(&l["id"])))
            .collect()
    }

    /// Its log of what it sent.
    pub fn sent_file(&self) -> PathBuf {
        self.folder.path().join("sent")
    }

    pub fn sent_log(&self) -> Vec<Value> {
        let text = std::fs::read_to_string(self.folder.path().join("sent")).unwrap();
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// Waits until it has sent at least so many.
    pub async fn has_sent(&self, count: usize) {
        super::within(SENDING, "the simulator has sent so many", || async {
            (self.sent().len() >= count).then_some(())
        })
        .await;
    }

    /// Waits until all `count` messages were made; returns those that somebody was there for.
    pub async fn has_finished(&self, count: usize) -> Vec<(String, String)> {
        super::within(SENDING, "the simulator has finished", || async {
            let log = self.sent_log();
            let ids: BTreeSet<_> = log.iter().map(|line| line["id"].as_str().unwrap()).collect();
            (ids.len() == count).then_some(())
        })
        .await;
        self.sent()
    }
}

/// The longest that a simulator of these tests sends.
const SENDING: Duration = Duration::from_mins(1);
/// Chat that flows brings something in so short a time.
const QUIET: Duration = Duration::from_millis(1_500);
