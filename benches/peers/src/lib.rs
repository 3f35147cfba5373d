//! What the programs of this package share: the report each prints as its last line, and the stream they publish to.
//!
//! The report has the same fields for everybody, so that `scripts/bench` compares like with like.

use std::time::Duration;

use async_nats::jetstream;
use serde::Serialize;

/// Any failure; these programs stop at the first one.
pub type Error = Box<dyn std::error::Error + Send + Sync>;

/// What a publishing program did, printed as one JSON line.
#[derive(Debug, Serialize)]
pub struct Report {
    pub program: &'static str,
    pub messages: u64,
    pub duplicates: u64,
    pub failed: u64,
    pub seconds: f64,
    pub messages_per_second: f64,
    pub cpu_seconds: f64,
    pub peak_rss_bytes: u64,
    pub ack_p50_ms: f64,
    pub ack_p99_ms: f64,
}

impl Report {
    /// Builds the report from what was counted; CPU time and peak memory are read from `/proc/self`.
    pub fn new(program: &'static str, outcome: &Outcome, took: Duration) -> Result<Self, Error> {
        let mut waits = outcome.ack_waits_ms.clone();
        waits.sort_by(f64::total_cmp);
        let seconds = took.as_secs_f64();
        Ok(Self {
            program,
            messages: outcome.acked,
            duplicates: outcome.duplicates,
            failed: outcome.failed,
            seconds,
            messages_per_second: if seconds > 0.0 {
                outcome.acked as f64 / seconds
            } else {
                0.0
            },
            cpu_seconds: cpu_seconds()?,
            peak_rss_bytes: peak_rss_bytes()?,
            ack_p50_ms: percentile(&waits, 0.50),
            ack_p99_ms: percentile(&waits, 0.99),
        })
    }

    /// Prints the report on stdout.
    pub fn print(&self) -> Result<(), Error> {
        println!("{}", serde_json::to_string(self)?);
        Ok(())
    }
}

/// What became of the messages a program sent.
#[derive(Debug, Default)]
pub struct Outcome {
    pub acked: u64,
    pub duplicates: u64,
    pub failed: u64,
    /// From handing the message to the client to having its ack, one per acked message.
    pub ack_waits_ms: Vec<f64>,
}

/// The value below which the share `q` of the sorted values lies (nearest rank), 0 for none.
pub fn percentile(sorted: &[f64], q: f64) -> f64 {
    if sorted.is_empty() {
        return 0.0;
    }
    let rank = (q * sorted.len() as f64).ceil() as usize;
    sorted[rank.clamp(1, sorted.len()) - 1]
}

/// User and system time of this process so far. Linux counts it in ticks of 10 ms.
pub fn cpu_seconds() -> Result<f64, Error> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    // The command name, the only field that can hold spaces, ends with the last parenthesis.
    let fields = stat.rsplit(')').next().unwrap_or_default();
    let ticks: u64 = fields
        .split_whitespace()
        .skip(11)
        .take(2)
        .map(|n| n.parse().unwrap_or(0))
        .sum();
    Ok(ticks as f64 / 100.0)
}

/// The most memory this process ever held.
pub fn peak_rss_bytes() -> Result<u64, Error> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status
        .lines()
        .find(|line| line.starts_with("VmHWM:"))
        .ok_or("no VmHWM in /proc/self/status")?;
    let kib: u64 = line
        .split_whitespace()
        .nth(1)
        .ok_or("no figure after VmHWM")?
        .parse()?;
    Ok(kib * 1024)
}

/// Makes sure a stream for `subject` exists, with the settings Inlet gives its own: file storage, limits retention,
/// a duplicate window of ten minutes.
pub async fn ensure_stream(context: &jetstream::Context, stream: &str, subject: &str) -> Result<(), Error> {
    context
        .get_or_create_stream(jetstream::stream::Config {
            name: stream.to_owned(),
            subjects: vec![subject.to_owned()],
            storage: jetstream::stream::StorageType::File,
            retention: jetstream::stream::RetentionPolicy::Limits,
            discard: jetstream::stream::DiscardPolicy::Old,
            max_age: Duration::from_hours(72),
            max_bytes: 10 << 30,
            duplicate_window: Duration::from_mins(10),
            num_replicas: 1,
            ..Default::default()
        })
        .await?;
    Ok(())
}

/// A `JetStream` context with `window` unacknowledged messages at most; publishing waits at a full one.
pub fn context(client: async_nats::Client, window: usize) -> jetstream::Context {
    jetstream::context::ContextBuilder::new()
        .max_ack_inflight(window)
        .backpressure_on_inflight(true)
        .timeout(Duration::from_secs(30))
        .build(client)
}

/// Runs `work` on `threads` worker threads; 0 is one per core, 1 everything on the calling thread.
pub fn block_on<F: Future>(threads: usize, work: F) -> Result<F::Output, Error> {
    let runtime = match threads {
        0 => tokio::runtime::Builder::new_multi_thread().enable_all().build()?,
        1 => tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?,
        n => tokio::runtime::Builder::new_multi_thread()
            .worker_threads(n)
            .enable_all()
            .build()?,
    };
    Ok(runtime.block_on(work))
}
