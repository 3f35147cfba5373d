//! What `async-nats` alone publishes: the same bytes, headers and window as Inlet, from memory, as fast as it goes.
//! The upper bound Inlet is measured against.
//!
//! One task sends, one awaits the acks in the order they were sent; between them a bounded channel of ack futures, so
//! the sender never waits for an ack while the window has room. Of the ack futures only the oldest is ever polled:
//! one timer, however wide the window.

use std::io::BufRead;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use async_nats::jetstream::context::PublishAckFuture;
use async_nats::{HeaderMap, Subject};
use clap::Parser;
use inlet_peers::{Error, Outcome, Report, block_on, context, ensure_stream};
use tokio::sync::mpsc;
use uuid::Uuid;

#[cfg(feature = "jemalloc")]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

#[derive(Parser)]
#[command(about = "Publishes to JetStream with async-nats alone, as fast as it goes; prints one JSON line")]
struct Args {
    #[arg(long, default_value = "nats://127.0.0.1:4222")]
    nats_url: String,
    #[arg(long, default_value = "INLET")]
    stream: String,
    #[arg(long, default_value = "internal.ingress.v1")]
    subject: String,
    /// Payloads, one per line (read-stream --payloads writes them), sent over and over
    #[arg(long)]
    payloads: PathBuf,
    #[arg(long, default_value_t = 300_000)]
    count: u64,
    /// Unacknowledged messages at most
    #[arg(long, default_value_t = 1024)]
    window: usize,
    /// Worker threads: 0 one per core, 1 everything on one thread
    #[arg(long, default_value_t = 1)]
    threads: usize,
}

fn main() -> Result<(), Error> {
    let args = Args::parse();
    block_on(args.threads, run(args))??.print()
}

async fn run(args: Args) -> Result<Report, Error> {
    let payloads = read_payloads(&args.payloads)?;
    let client = async_nats::connect(&args.nats_url).await?;
    let context = context(client, args.window);
    ensure_stream(&context, &args.stream, &args.subject).await?;

    let (sent, acks) = mpsc::channel(args.window);
    let settling = tokio::spawn(settle(acks, args.count));

    let subject = Subject::from(args.subject);
    let started = Instant::now();
    for n in 0..args.count {
        let payload = payloads[(n % payloads.len() as u64) as usize].clone();
        let ack = context
            .publish_with_headers(subject.clone(), headers(Uuid::new_v4()), payload)
            .await?;
        sent.send((Instant::now(), ack)).await?;
    }
    drop(sent);
    let outcome = settling.await?;
    Report::new("nats-alone", &outcome, started.elapsed())
}

async fn settle(mut acks: mpsc::Receiver<(Instant, PublishAckFuture)>, count: u64) -> Outcome {
    let mut outcome = Outcome {
        ack_waits_ms: Vec::with_capacity(count as usize),
        ..Outcome::default()
    };
    while let Some((sent, ack)) = acks.recv().await {
        match ack.await {
            Ok(ack) => {
                outcome.acked += 1;
                outcome.duplicates += u64::from(ack.duplicate);
                outcome.ack_waits_ms.push(milliseconds(sent.elapsed()));
            }
            Err(error) => {
                eprintln!("not acknowledged: {error}");
                outcome.failed += 1;
            }
        }
    }
    outcome
}

fn headers(id: Uuid) -> HeaderMap {
    let mut headers = HeaderMap::new();
    let mut hyphenated = Uuid::encode_buffer();
    headers.insert("Nats-Msg-Id", &*id.hyphenated().encode_lower(&mut hyphenated));
    headers.insert("type", "external.chat.message.v1");
    let mut simple = Uuid::encode_buffer();
    let trace = &*id.simple().encode_lower(&mut simple);
    headers.insert("traceparent", format!("00-{trace}-{}-01", &trace[16..]));
    headers
}

fn read_payloads(path: &PathBuf) -> Result<Vec<bytes::Bytes>, Error> {
    let file = std::io::BufReader::new(std::fs::File::open(path)?);
    let payloads = file
        .lines()
        .filter(|line| line.as_ref().map_or(true, |line| !line.is_empty()))
        .map(|line| line.map(bytes::Bytes::from))
        .collect::<Result<Vec<_>, _>>()?;
    if payloads.is_empty() {
        return Err(format!("{} holds no payload", path.display()).into());
    }
    Ok(payloads)
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}
