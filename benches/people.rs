//! What people cost: operations on the user store for hours of lifelike chat (time compressed by the injected clock), a
//! catch-up after a long absence, and memory. Prints one JSON object. `scripts/cost` runs it and adds the money.
//!
//! The whole path runs, on embedded parts: door, users, stream, projection, flush. What is counted is what the port of
//! the store is asked, so Firestore would be asked the same.

#![expect(clippy::expect_used, clippy::unwrap_used, reason = "a benchmark that cannot go on ends")]

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Parser;
use inlet::app::{AppArgs, Around, PathConfig, lay_path, open_bus, open_people, open_store};
use inlet::bus::{Bus, ByUser, Message, Numbered};
use inlet::clock::Clock;
use inlet::envelope::draft::{Content, Event, PayloadJson, Role, SourceRef, User};
use inlet::envelope::{Draft, EventType, MessageId, Origin, id};
use inlet::pipeline::{Intake, Patience, PipelineMetrics};
use inlet::settings::{Environment, Problems};
use inlet::tasks::Tasks;
use inlet::users::{Following, Users};
use jiff::Timestamp;
use prometheus::Registry;
use serde_json::json;

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// 2026-03-01T12:00:00Z.
const START_MS: i64 = 1_772_366_400_000;

#[derive(Parser)]
struct Settings {
    #[command(flatten)]
    app: AppArgs,
}

struct Laid {
    bus: Arc<dyn Bus>,
    users: Users,
    intake: Intake,
    metrics: Arc<PipelineMetrics>,
    _tasks: Tasks,
}

fn config(folder: &Path, flags: &[&str]) -> PathConfig {
    let folder = folder.to_str().unwrap();
    let flags = [&["people", "--data-dir", folder], flags].concat();
    let mut problems = Problems::default();
    let checked = Settings::parse_from(flags).app.check(&Environment::default(), &mut problems);
    checked.unwrap_or_else(|| panic!("{:?}", problems.lines())).path
}

impl Laid {
    async fn lay(folder: &Path, clock: &Clock, flags: &[&str]) -> Self {
        let config = config(folder, flags);
        let registry = Registry::new();
        let bus = open_bus(&config, folder, clock).await.expect("a bus");
        let store = open_store(&config, folder, &registry).expect("a store");
        let people = open_people(&config, store, &bus, &registry, clock).expect("metrics");
        let users = people.users.clone().expect("enrichment");
        let metrics = Arc::new(PipelineMetrics::new(&registry).expect("metrics"));
        let mut tasks = Tasks::new();
        let around = Around::new(&bus, &people, &metrics, clock);
        let intake = lay_path(&config, around, &mut tasks).await.expect("a path");
        Self { bus, users, intake, metrics, _tasks: tasks }
    }

    async fn caught_up(&self) {
        let mut following = self.users.following();
        following.wait_for(|following| *following == Following::CaughtUp).await.expect("a projection");
    }

    /// Takes events in and waits until they are published and noted.
    async fn offer(&self, drafts: Vec<Draft>) {
        self.intake.offer(Origin::Twitch, drafts, Patience::Unlimited).await;
        while self.metrics.pending.get() > 0 || self.users.awaits_notes() {
            tokio::time::sleep(Duration::from_micros(200)).await;
        }
    }
}

fn message(number: u64, user: u64, at: Timestamp) -> Draft {
    let user_id = (100_000 + user).to_string();
    let key = format!("twitch:{number}");
    let event = Event {
        kind: EventType::ChatMessage,
        occurred_at: at,
        idempotency_key: key.clone(),
        source: SourceRef { platform: "twitch", channel: "somewhere".into(), channel_id: Some("1".into()) },
        user: Some(User {
            key: id::user_key("twitch", &user_id).into(),
            name: format!("viewer_{user}"),
            display_name: format!("Viewer_{user}"),
            id: user_id,
            profile_image_url: String::new(),
            role: Role::Viewer,
            roles: vec![Role::Viewer],
            tags: vec!["PROVIDER_TWITCH".into()],
        }),
        payload: PayloadJson::write(&json!({ "text": "hello" }), 32).expect("JSON"),
    };
    Draft {
        origin: Origin::Twitch,
        id: id::event_id(&key),
        taken_in_at: at,
        taken_in: Instant::now(),
        not_published_before: at,
        content: Content::Event(Box::new(event)),
        slip: None,
    }
}

/// Who writes next, on a Zipf curve of exponent 1.
struct Zipf(Vec<f64>);

impl Zipf {
    fn new(users: u32) -> Self {
        let mut sum = 0.0;
        Self(
            (1..=users)
                .map(|rank| {
                    sum += 1.0 / f64::from(rank);
                    sum
                })
                .collect(),
        )
    }

    fn next(&self, random: &mut fastrand::Rng) -> u64 {
        let at = random.f64() * self.0.last().expect("users");
        self.0.partition_point(|sum| *sum < at) as u64
    }
}

/// Hours of chat at ten messages a second.
async fn cost(hours: u64, users: u32) -> serde_json::Value {
    let folder = tempfile::tempdir().expect("a folder");
    let clock = Clock::by_hand(Timestamp::from_millisecond(START_MS).unwrap());
    let flags = ["--enrich-flush-idle", "5m", "--enrich-flush-max", "15m"];
    let path = Laid::lay(folder.path(), &clock, &flags).await;
    path.caught_up().await;
    let (zipf, mut random, mut number) = (Zipf::new(users), fastrand::Rng::with_seed(1), 0);
    for _ in 0..hours * 3_600 {
        let drafts = (0..10).map(|_| {
            number += 1;
            message(number, zipf.next(&mut random), clock.now())
        });
        path.offer(drafts.collect()).await;
        path.users.flush_due().await;
        clock.step(1_000);
    }
    path.users.finish(tokio::time::Instant::now() + Duration::from_mins(1)).await;
    let asked = path.users.store_metrics();
    json!({ "hours": hours, "users": users, "messages": number, "reads": asked.documents_read(), "writes": asked.documents_written() })
}

/// A million events that nobody has counted.
async fn catch_up(events: u64, users: u64) -> serde_json::Value {
    let folder = tempfile::tempdir().expect("a folder");
    let clock = Clock::system();
    let bus = open_bus(&config(folder.path(), &[]), folder.path(), &clock).await.expect("a bus");
    let mut lane = bus.open_lane(1_024);
    let mut number = 0;
    while number < events {
        let batch: Vec<_> = (0..1_000).map(|n| numbered(number + n, users)).collect();
        number += 1_000;
        lane.messages.send(batch).await.expect("a lane");
        let mut acked = 0;
        while acked < 1_000 {
            acked += lane.settled.recv().await.expect("acks").len();
        }
    }
    drop((lane, bus));
    tokio::time::sleep(Duration::from_millis(200)).await;
    let began = Instant::now();
    let path = Laid::lay(folder.path(), &clock, &[]).await;
    path.caught_up().await;
    let seconds = began.elapsed().as_secs_f64();
    path.users.finish(tokio::time::Instant::now() + Duration::from_mins(1)).await;
    drop(path.bus);
    json!({ "events": events, "users": users, "seconds": seconds, "counted_after_seconds": began.elapsed().as_secs_f64() })
}

fn numbered(number: u64, users: u64) -> Numbered {
    let key = format!("twitch:{}", 100_000 + number % users);
    let message = Message {
        subject: "internal.ingress.v1".into(),
        id: MessageId::of_event(id::event_id(&format!("twitch:{number}"))),
        kind: "external.chat.message.v1".into(),
        by_user: Some(ByUser {
            key: key.into(),
            occurred_at: Timestamp::from_millisecond(START_MS).unwrap(),
        }),
        payload: vec![b'x'; 900].into(),
    };
    Numbered { number, message: Arc::new(message) }
}

/// What users in memory take, met, written and at rest.
async fn memory(users: u64) -> serde_json::Value {
    let folder = tempfile::tempdir().expect("a folder");
    let clock = Clock::by_hand(Timestamp::from_millisecond(START_MS).unwrap());
    // Ids are forgotten at once, so that what grows is users alone.
    let forgetful =
        ["--dedup-window", "1s", "--nats-stream-max-age", "10s", "--enrich-cache-users", "1000000"];
    let path = Laid::lay(folder.path(), &clock, &forgetful).await;
    path.caught_up().await;
    // Everything that grows once has grown when a tenth of them are in.
    let (mut at_first, first) = (0, users / 10);
    for number in (0..users).step_by(200) {
        if number == first {
            at_first = at_rest(&path).await;
        }
        path.offer((0..200).map(|n| message(number + n, number + n, clock.now())).collect()).await;
        clock.step(200);
    }
    let bytes = at_rest(&path).await.saturating_sub(at_first) / (users - first);
    json!({ "users": users, "bytes_per_user": bytes })
}

async fn at_rest(path: &Laid) -> u64 {
    path.users.finish(tokio::time::Instant::now() + Duration::from_mins(1)).await;
    tokio::time::sleep(Duration::from_secs(12)).await;
    let pages = std::fs::read_to_string("/proc/self/statm").expect("Linux");
    pages.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok()).expect("pages") * 4_096
}

fn main() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime");
    let which = std::env::args().skip(1).find(|argument| !argument.starts_with('-')).unwrap_or_default();
    let figures = runtime.block_on(async {
        match which.as_str() {
            "cost" => cost(4, 3_000).await,
            "catch-up" => catch_up(1_000_000, 20_000).await,
            "memory" => memory(100_000).await,
            other => panic!("{other:?} is none of cost, catch-up and memory"),
        }
    });
    println!("{figures}");
}
