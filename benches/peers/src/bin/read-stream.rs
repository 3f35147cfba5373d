//! Reads a `JetStream` stream from its first message to its last and says what it holds: how many, which twice, in
//! which order, how late. It shares no code with Inlet, so it can catch its mistakes.
//!
//! With the simulator's log (`--sent`) it also says which messages that reached a connection are missing, which are
//! there though nobody sent them, and where a channel's order differs from the order of sending.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::{BufRead, Write};
use std::path::PathBuf;
use std::time::Duration;

use async_nats::jetstream::{self, consumer, stream};
use chrono::DateTime;
use clap::Parser;
use futures_util::StreamExt;
use inlet_peers::{Error, block_on, percentile};
use serde::{Deserialize, Serialize};

const CHAT_MESSAGE: &str = "external.chat.message.v1";

#[derive(Parser)]
#[command(
    about = "Reads a JetStream stream and counts losses, doubles, order and latency; prints one JSON object"
)]
struct Args {
    #[arg(long, default_value = "nats://127.0.0.1:4222")]
    nats_url: String,
    #[arg(long, default_value = "INLET")]
    stream: String,
    #[arg(long, default_value = "internal.ingress.v1")]
    subject: String,
    /// What the simulator sent, JSON lines
    #[arg(long)]
    sent: Option<PathBuf>,
    /// Write the first payloads here, one per line
    #[arg(long)]
    payloads: Option<PathBuf>,
    #[arg(long, default_value_t = 20_000)]
    payloads_max: u64,
    /// Give up when no message came for so long
    #[arg(long, default_value_t = 10.0)]
    idle_seconds: f64,
}

#[derive(Deserialize)]
struct SentLine {
    connection: Option<u64>,
    channel: String,
    id: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Envelope {
    r#type: String,
    occurred_at: String,
    idempotency_key: String,
    source: Source,
    #[serde(default)]
    payload: Payload,
}

#[derive(Deserialize)]
struct Source {
    channel: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Payload {
    message_id: Option<String>,
}

#[derive(Default, Serialize)]
struct Found {
    total: u64,
    by_type: BTreeMap<String, u64>,
    distinct_msg_ids: u64,
    distinct_idempotency_keys: u64,
    /// Messages beyond the first of their idempotency key.
    doubles: u64,
    without_msg_id: u64,
    unreadable: u64,
    /// Distinct ids in the log that at least one connection was sent; absent without a log, like all below.
    sent: Option<u64>,
    lost: Option<u64>,
    /// Chat messages whose id the log does not hold.
    unknown: Option<u64>,
    order_violations: Option<u64>,
    order_violations_by_channel: Option<BTreeMap<String, u64>>,
    lost_examples: Vec<String>,
    stored_seconds: f64,
    stored_per_second: f64,
    payload_bytes_mean: f64,
    /// From the platform's time of the message to the server's time of storing it; both have milliseconds at best.
    stored_minus_occurred_p50_ms: f64,
    stored_minus_occurred_p99_ms: f64,
    stored_minus_occurred_max_ms: f64,
}

/// What the simulator sent: each id's place in its log, and the ids that reached somebody.
struct SentLog {
    place: HashMap<String, u64>,
    delivered: HashSet<String>,
}

fn main() -> Result<(), Error> {
    let args = Args::parse();
    let found = block_on(1, run(args))??;
    println!("{}", serde_json::to_string(&found)?);
    Ok(())
}

async fn run(args: Args) -> Result<Found, Error> {
    let sent = args.sent.as_ref().map(read_sent).transpose()?;
    let mut payloads = args
        .payloads
        .as_ref()
        .map(std::fs::File::create)
        .transpose()?
        .map(std::io::BufWriter::new);
    let client = async_nats::connect(&args.nats_url).await?;
    let context = jetstream::new(client);
    let stream: stream::Stream = context.get_stream(&args.stream).await?;
    let mut consumer = stream
        .create_consumer(consumer::pull::OrderedConfig {
            filter_subject: args.subject.clone(),
            deliver_policy: consumer::DeliverPolicy::All,
            ..Default::default()
        })
        .await?;
    let mut reading = Reading::default();
    if consumer.info().await?.num_pending > 0 {
        let mut messages = consumer.messages().await?;
        loop {
            let next = tokio::time::timeout(Duration::from_secs_f64(args.idle_seconds), messages.next());
            let message = next
                .await
                .map_err(|_| "the stream stopped answering")?
                .ok_or("the stream ended")??;
            let info = message.info()?;
            let stored_ms = info.published.unix_timestamp_nanos() as f64 / 1e6;
            if let Some(file) = payloads
                .as_mut()
                .filter(|_| reading.found.total < args.payloads_max)
            {
                file.write_all(&message.payload)?;
                file.write_all(b"\n")?;
            }
            let pending = info.pending;
            reading.note(&message, stored_ms, sent.as_ref());
            if pending == 0 {
                break;
            }
        }
    }
    if let Some(file) = payloads.as_mut() {
        file.flush()?;
    }
    Ok(reading.finish(sent.as_ref()))
}

#[derive(Default)]
struct Reading {
    found: Found,
    msg_ids: HashSet<String>,
    keys: HashSet<String>,
    message_ids: HashSet<String>,
    /// The place in the log of the last message read of each channel.
    last_place: HashMap<String, u64>,
    violations: BTreeMap<String, u64>,
    unknown: u64,
    latencies_ms: Vec<f64>,
    payload_bytes: u64,
    first_stored_ms: Option<f64>,
    last_stored_ms: f64,
}

impl Reading {
    fn note(&mut self, message: &jetstream::Message, stored_ms: f64, sent: Option<&SentLog>) {
        self.found.total += 1;
        self.payload_bytes += message.payload.len() as u64;
        self.first_stored_ms.get_or_insert(stored_ms);
        self.last_stored_ms = stored_ms;
        match message
            .headers
            .as_ref()
            .and_then(|headers| headers.get("Nats-Msg-Id"))
        {
            Some(id) => {
                self.msg_ids.insert(id.to_string());
            }
            None => self.found.without_msg_id += 1,
        }
        let Ok(envelope) = serde_json::from_slice::<Envelope>(&message.payload) else {
            self.found.unreadable += 1;
            return;
        };
        *self.found.by_type.entry(envelope.r#type.clone()).or_default() += 1;
        if !self.keys.insert(envelope.idempotency_key) {
            self.found.doubles += 1;
        }
        if envelope.r#type != CHAT_MESSAGE {
            return;
        }
        match DateTime::parse_from_rfc3339(&envelope.occurred_at) {
            Ok(occurred) => self
                .latencies_ms
                .push(stored_ms - occurred.timestamp_millis() as f64),
            Err(_) => self.found.unreadable += 1,
        }
        if let (Some(id), Some(sent)) = (envelope.payload.message_id, sent) {
            self.note_order(&id, envelope.source.channel.unwrap_or_default(), sent);
            self.message_ids.insert(id);
        }
    }

    fn note_order(&mut self, id: &str, channel: String, sent: &SentLog) {
        let Some(&place) = sent.place.get(id) else {
            self.unknown += 1;
            return;
        };
        let last = self.last_place.entry(channel.clone()).or_insert(place);
        if place < *last {
            *self.violations.entry(channel).or_default() += 1;
        } else {
            *last = place;
        }
    }

    fn finish(mut self, sent: Option<&SentLog>) -> Found {
        self.latencies_ms.sort_by(f64::total_cmp);
        let mut found = self.found;
        found.distinct_msg_ids = self.msg_ids.len() as u64;
        found.distinct_idempotency_keys = self.keys.len() as u64;
        if let Some(sent) = sent {
            let mut lost: Vec<&String> = sent
                .delivered
                .iter()
                .filter(|id| !self.message_ids.contains(*id))
                .collect();
            lost.sort_by_key(|id| sent.place.get(*id));
            found.sent = Some(sent.delivered.len() as u64);
            found.lost = Some(lost.len() as u64);
            found.lost_examples = lost.into_iter().take(5).cloned().collect();
            found.unknown = Some(self.unknown);
            found.order_violations = Some(self.violations.values().sum());
            found.order_violations_by_channel = Some(self.violations);
        }
        if let Some(first) = self.first_stored_ms {
            found.stored_seconds = (self.last_stored_ms - first) / 1000.0;
        }
        if found.stored_seconds > 0.0 {
            found.stored_per_second = found.total as f64 / found.stored_seconds;
        }
        if found.total > 0 {
            found.payload_bytes_mean = self.payload_bytes as f64 / found.total as f64;
        }
        found.stored_minus_occurred_p50_ms = percentile(&self.latencies_ms, 0.50);
        found.stored_minus_occurred_p99_ms = percentile(&self.latencies_ms, 0.99);
        found.stored_minus_occurred_max_ms = percentile(&self.latencies_ms, 1.0);
        found
    }
}

/// A message that went to several connections has a line for each; its place is that of the first.
fn read_sent(path: &PathBuf) -> Result<SentLog, Error> {
    let mut log = SentLog {
        place: HashMap::new(),
        delivered: HashSet::new(),
    };
    let mut last_in_channel: HashMap<String, u64> = HashMap::new();
    for line in std::io::BufReader::new(std::fs::File::open(path)?).lines() {
        let line: SentLine = serde_json::from_str(&line?)?;
        if line.connection.is_some() {
            log.delivered.insert(line.id.clone());
        }
        if let std::collections::hash_map::Entry::Vacant(place) = log.place.entry(line.id) {
            let next = last_in_channel.entry(line.channel).or_default();
            *next += 1;
            place.insert(*next);
        }
    }
    Ok(log)
}
