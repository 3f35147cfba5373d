//! The account of a run, closed by `scripts/verify-account`, which shares nothing with the service: what was sent, what the
//! stream holds, dead letters, refusals, gap events.

use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use serde_json::Value;

use super::inlet::{Metrics, Simulator};
use super::nats::Nats;

/// What happened, as far as it excuses anything. Without it nothing may be missing.
#[derive(Debug, Default, Clone)]
pub struct Account {
    flags: Vec<String>,
    metrics: Vec<String>,
}

impl Account {
    /// Nothing happened.
    pub fn new() -> Self {
        Self::default()
    }

    /// Connections to chat ended: what was under way on them is gone.
    pub fn cut(self) -> Self {
        self.flag("--cut").flag("--gaps")
    }

    /// More than one instance wrote.
    pub fn unordered(self) -> Self {
        self.flag("--unordered")
    }

    /// The bus refused some at first: they may follow others of their window, which holds so many.
    pub fn refused_at_first(self, window: usize) -> Self {
        let window = window.to_string();
        self.flag("--window").flag(&window)
    }

    /// A process was killed at this time (Unix milliseconds); what was sent at most `span` before may be lost.
    pub fn killed(self, at: i64, span: Duration) -> Self {
        let (at, span) = (at.to_string(), span.as_millis().to_string());
        self.flag("--kill").flag(&at).flag("--span").flag(&span)
    }

    /// The stream was destroyed at this time (Unix milliseconds).
    pub fn destroyed(self, at: i64) -> Self {
        let at = at.to_string();
        self.flag("--since").flag(&at)
    }

    /// Whether one service had one connection all the time: then it receives whatever was sent.
    pub fn is_all_received(&self) -> bool {
        self.flags.iter().all(|flag| flag != "--cut" && flag != "--unordered")
    }

    /// What an instance counted in all its life.
    pub fn counted(mut self, metrics: &Metrics) -> Self {
        self.metrics.push(metrics.text());
        self
    }

    fn flag(mut self, flag: &str) -> Self {
        self.flags.push(flag.to_owned());
        self
    }

    /// The verdict on the stream `INLET`; panics with the differences if there are any.
    pub fn judge(&self, nats: &Nats, simulators: &[&Simulator]) -> Value {
        self.judge_stream("--nats", &nats.addr().to_string(), simulators)
    }

    /// The same on a stream that was written to a file.
    pub fn judge_dump(&self, dump: &Path, simulators: &[&Simulator]) -> Value {
        self.judge_stream("--stream", dump.to_str().unwrap(), simulators)
    }

    fn judge_stream(&self, kind: &str, stream: &str, simulators: &[&Simulator]) -> Value {
        let folder = tempfile::tempdir().unwrap();
        let mut arguments = self.flags.clone();
        arguments.extend([kind, stream, "--metrics"].map(str::to_owned));
        for (number, text) in self.metrics.iter().enumerate() {
            let path = folder.path().join(number.to_string());
            std::fs::write(&path, text).unwrap();
            arguments.push(path.to_str().unwrap().to_owned());
        }
        arguments.push("--sent".to_owned());
        arguments.extend(simulators.iter().map(|one| one.sent_file().to_str().unwrap().to_owned()));
        let output = script(&arguments);
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
        println!("account: {said}");
        serde_json::from_str(&said).unwrap()
    }
}

fn script(arguments: &[String]) -> Output {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/verify-account");
    Command::new("python3").arg(script).args(arguments).output().unwrap()
}

/// Now, as the simulator's log has it.
pub fn now_ms() -> i64 {
    inlet::clock::system_milliseconds()
}

#[test]
fn the_reader_finds_what_is_wrong() {
    let output = script(&["--self-test".to_owned()]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
