//! What every bus promises, on the embedded stream and on a real nats-server.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use inlet::bus::embedded::EmbeddedBus;
use inlet::bus::jetstream::JetStreamBus;
use inlet::bus::{
    Ack, Bus, BusArgs, BusConfig, BusState, ByUser, Lane, Message, Numbered, Refusal, Settled, Start, Stored,
    Wanted,
};
use inlet::clock::Clock;
use inlet::envelope::{MessageId, id};
use inlet::settings::{Environment, Problems};
use inlet::tls::TlsConfig;
use jiff::Timestamp;

use crate::harness::nats::Nats;
use crate::harness::{PATIENCE, eventually, open_embedded};

const WINDOW: usize = 64;

/// A bus and what it stands on.
struct Fixture {
    bus: Arc<dyn Bus>,
    ground: Ground,
    clock: Clock,
}

enum Ground {
    Embedded(tempfile::TempDir),
    Nats(Nats),
}

/// Settings as a user gives them.
fn config(flags: &[&str]) -> BusConfig {
    #[derive(clap::Parser)]
    struct Command {
        #[command(flatten)]
        bus: BusArgs,
    }
    let flags = std::iter::once("inlet").chain(flags.iter().copied());
    let command = <Command as clap::Parser>::try_parse_from(flags).unwrap();
    let mut problems = Problems::default();
    let config = command.bus.check(&Environment::default(), &mut problems);
    assert!(problems.lines().is_empty(), "{:?}", problems.lines());
    config.unwrap()
}

impl Fixture {
    async fn embedded() -> Self {
        Self::on(Ground::Embedded(tempfile::tempdir().unwrap()), Clock::system(), &[]).await
    }

    async fn nats() -> Self {
        Self::on(Ground::Nats(Nats::start().await), Clock::system(), &[]).await
    }

    async fn on(ground: Ground, clock: Clock, flags: &[&str]) -> Self {
        let bus: Arc<dyn Bus> = match &ground {
            Ground::Embedded(folder) => {
                let config = config(flags);
                open_embedded(folder.path(), config.retention, config.subjects, clock.clone()).await
            }
            Ground::Nats(nats) => {
                let url = nats.url();
                let config = config(&[&["--nats-url", &url], flags].concat());
                let jetstream = config.jetstream.clone().unwrap();
                JetStreamBus::start(jetstream, &config, &TlsConfig::default(), WINDOW)
            }
        };
        let fixture = Self { bus, ground, clock };
        fixture.up().await;
        fixture
    }

    async fn up(&self) {
        let mut state = self.bus.state();
        let up = state.wait_for(|state| *state == BusState::Up);
        drop(tokio::time::timeout(PATIENCE, up).await.unwrap().unwrap());
    }

    /// The same stream after a restart of whoever publishes.
    async fn reopen(self) -> Self {
        let Self { bus, ground, clock } = self;
        drop(bus);
        Self::on(ground, clock, &[]).await
    }

    /// Everything in the stream from `start` to its present end.
    async fn read(&self, start: Start, wanted: Wanted) -> Vec<Stored> {
        let mut follower = self.bus.follow(start, wanted).await.unwrap();
        let mut all = Vec::new();
        loop {
            let batch = tokio::time::timeout(PATIENCE, follower.next()).await.unwrap().unwrap().unwrap();
            let is_end = batch.is_end();
            all.extend(batch.messages);
            if is_end {
                return all;
            }
        }
    }
}

fn message(key: &str) -> Message {
    Message {
        subject: Arc::from("internal.ingress.v1"),
        id: MessageId::of_event(id::event_id(key)),
        kind: "external.chat.message.v1".into(),
        by_user: None,
        payload: format!("{{\"key\":\"{key}\"}}").into(),
    }
}

fn of_user(key: &str, user: &str) -> Message {
    let occurred_at = Timestamp::from_millisecond(1_700_000_000_123).unwrap();
    Message { by_user: Some(ByUser { key: user.into(), occurred_at }), ..message(key) }
}

fn numbered(messages: impl IntoIterator<Item = Message>) -> Vec<Numbered> {
    (0..).zip(messages).map(|(number, message)| Numbered { number, message: Arc::new(message) }).collect()
}

/// Sends and waits until each is settled; outcomes by number.
async fn publish(lane: &mut Lane, messages: impl IntoIterator<Item = Message>) -> Vec<Result<Ack, Refusal>> {
    let mut outcomes = Vec::new();
    let numbered = numbered(messages);
    for chunk in numbered.chunks(WINDOW / 2) {
        lane.messages.send(chunk.to_vec()).await.unwrap();
        let mut settled: Vec<Settled> = Vec::new();
        while settled.len() < chunk.len() {
            settled.extend(tokio::time::timeout(PATIENCE, lane.settled.recv()).await.unwrap().unwrap());
        }
        settled.sort_by_key(|settled| settled.number);
        outcomes.extend(settled.into_iter().map(|settled| settled.outcome));
    }
    outcomes
}

fn keys(stored: &[Stored]) -> Vec<String> {
    let key = |stored: &Stored| {
        let body: serde_json::Value = serde_json::from_slice(&stored.payload).unwrap();
        body["key"].as_str().unwrap().to_owned()
    };
    stored.iter().map(key).collect()
}

/// One test for each bus.
macro_rules! on_every_bus {
    ($($name:ident),+ $(,)?) => {
        mod embedded { $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)] async fn $name() { super::$name(super::Fixture::embedded().await).await; })+ }
        mod nats { $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)] async fn $name() { super::$name(super::Fixture::nats().await).await; })+ }
    };
}

on_every_bus!(
    messages_are_stored_in_order_and_acked_by_position,
    the_ack_of_a_duplicate_names_the_originals_position,
    an_event_and_its_dead_letter_are_two_messages,
    following_begins_at_a_position_a_time_or_the_end,
    headers_alone_come_without_the_payload,
    a_restart_keeps_the_stream_and_knows_its_ids,
    what_is_too_large_is_refused_for_good_and_nothing_else_suffers,
    an_empty_stream_says_that_this_was_all,
    closing_a_lane_settles_what_was_sent,
);

async fn messages_are_stored_in_order_and_acked_by_position(fixture: Fixture) {
    let mut lane = fixture.bus.open_lane(WINDOW);
    let wanted: Vec<_> = (0..500).map(|n| format!("m{n}")).collect();
    let acks = publish(&mut lane, wanted.iter().map(|key| message(key))).await;
    let positions: Vec<_> = acks.iter().map(|ack| ack.unwrap().position).collect();
    assert_eq!(positions, (1..=500).collect::<Vec<_>>());
    assert!(acks.iter().all(|ack| !ack.unwrap().duplicate));
    let stored = fixture.read(Start::Position(0), Wanted::Whole).await;
    assert_eq!(keys(&stored), wanted);
    assert_eq!(stored.iter().map(|stored| stored.position).collect::<Vec<_>>(), positions);
    let first = &stored[0];
    assert_eq!(first.id, Some(message("m0").id));
    assert_eq!((&*first.subject, first.kind.as_str()), ("internal.ingress.v1", "external.chat.message.v1"));
    assert!(fixture.clock.now().duration_since(first.stored_at).abs().as_secs() < 60);
}

async fn the_ack_of_a_duplicate_names_the_originals_position(fixture: Fixture) {
    let mut lane = fixture.bus.open_lane(WINDOW);
    publish(&mut lane, ["a", "b", "c"].map(message)).await;
    let acks = publish(&mut lane, ["b", "d", "a", "d"].map(message)).await;
    let said: Vec<_> = acks.iter().map(|ack| ack.map(|ack| (ack.position, ack.duplicate)).unwrap()).collect();
    assert_eq!(said, [(2, true), (4, false), (1, true), (4, true)]);
    assert_eq!(keys(&fixture.read(Start::Position(1), Wanted::Whole).await), ["a", "b", "c", "d"]);
}

async fn an_event_and_its_dead_letter_are_two_messages(fixture: Fixture) {
    let mut lane = fixture.bus.open_lane(WINDOW);
    let event = message("a");
    let letter = Message {
        id: MessageId::of_dead_letter(event.id.event),
        subject: Arc::from("internal.deadletter.v1"),
        ..event.clone()
    };
    let acks = publish(&mut lane, [event, letter.clone(), letter]).await;
    let positions: Vec<_> = acks.iter().map(|ack| ack.unwrap().position).collect();
    assert_eq!(positions, [1, 2, 2]);
    let stored = fixture.read(Start::Position(1), Wanted::Headers).await;
    assert_eq!(
        stored.iter().map(|stored| stored.id.unwrap().is_dead_letter).collect::<Vec<_>>(),
        [false, true]
    );
}

async fn following_begins_at_a_position_a_time_or_the_end(fixture: Fixture) {
    let mut lane = fixture.bus.open_lane(WINDOW);
    publish(&mut lane, ["a", "b", "c"].map(message)).await;
    tokio::time::sleep(Duration::from_millis(30)).await;
    let middle = fixture.clock.now();
    tokio::time::sleep(Duration::from_millis(30)).await;
    publish(&mut lane, ["d", "e"].map(message)).await;
    assert_eq!(keys(&fixture.read(Start::Position(2), Wanted::Whole).await), ["b", "c", "d", "e"]);
    assert_eq!(keys(&fixture.read(Start::Time(middle), Wanted::Whole).await), ["d", "e"]);
    assert_eq!(keys(&fixture.read(Start::Time(Timestamp::UNIX_EPOCH), Wanted::Whole).await).len(), 5);
    assert!(fixture.read(Start::Position(6), Wanted::Whole).await.is_empty());
    assert_eq!(keys(&fixture.read(Start::Last, Wanted::Whole).await), ["e"]);

    let mut at_end = fixture.bus.follow(Start::End, Wanted::Whole).await.unwrap();
    let first = at_end.next().await.unwrap().unwrap();
    assert!(first.messages.is_empty() && first.is_end());
    publish(&mut lane, ["f"].map(message)).await;
    let next = tokio::time::timeout(PATIENCE, at_end.next()).await.unwrap().unwrap().unwrap();
    assert_eq!((keys(&next.messages), next.messages[0].position), (vec!["f".to_owned()], 6));
}

async fn headers_alone_come_without_the_payload(fixture: Fixture) {
    let mut lane = fixture.bus.open_lane(WINDOW);
    let counted = of_user("b", "twitch:1%2F2");
    publish(&mut lane, [message("a"), counted.clone()]).await;
    let stored = fixture.read(Start::Position(1), Wanted::Headers).await;
    assert_eq!((stored[0].id, stored[0].payload.len()), (Some(message("a").id), 0));
    assert_eq!(stored[0].kind, "external.chat.message.v1");
    assert_eq!((&stored[0].by_user, &stored[1].by_user), (&None, &counted.by_user));
}

async fn a_restart_keeps_the_stream_and_knows_its_ids(fixture: Fixture) {
    let mut lane = fixture.bus.open_lane(WINDOW);
    publish(&mut lane, ["a", "b"].map(message)).await;
    let identity = fixture.bus.stream().unwrap().identity;
    drop(lane);
    let fixture = fixture.reopen().await;
    assert_eq!(fixture.bus.stream().unwrap().identity, identity);
    assert_eq!(fixture.bus.stream().unwrap().duplicate_window, Duration::from_mins(10));
    let mut lane = fixture.bus.open_lane(WINDOW);
    let acks = publish(&mut lane, ["b", "c"].map(message)).await;
    assert_eq!(acks[0], Ok(Ack { position: 2, duplicate: true }));
    assert_eq!(acks[1], Ok(Ack { position: 3, duplicate: false }));
}

async fn what_is_too_large_is_refused_for_good_and_nothing_else_suffers(fixture: Fixture) {
    let mut lane = fixture.bus.open_lane(WINDOW);
    let largest = fixture.bus.stream().unwrap().largest_message;
    let large = Message { payload: vec![b' '; largest + 1].into(), ..message("large") };
    let acks = publish(&mut lane, [message("a"), large, message("b")]).await;
    assert!(acks[0].is_ok() && acks[2].is_ok());
    assert_eq!(acks[1], Err(Refusal::TooLarge));
    assert_eq!(keys(&fixture.read(Start::Position(1), Wanted::Whole).await), ["a", "b"]);
}

async fn an_empty_stream_says_that_this_was_all(fixture: Fixture) {
    for start in
        [Start::Position(0), Start::Position(9), Start::Time(Timestamp::UNIX_EPOCH), Start::Last, Start::End]
    {
        assert!(fixture.read(start, Wanted::Headers).await.is_empty(), "{start:?}");
    }
}

async fn closing_a_lane_settles_what_was_sent(fixture: Fixture) {
    let mut lane = fixture.bus.open_lane(WINDOW);
    publish(&mut lane, (0..10).map(|n| message(&n.to_string()))).await;
    drop(lane.messages);
    let end = tokio::time::timeout(PATIENCE, lane.settled.recv()).await.unwrap();
    assert!(end.is_none(), "{end:?}");
}

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_second(1_800_000_000 + seconds).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_embedded_stream_forgets_ids_by_time_and_messages_by_age_and_size() {
    let clock = Clock::by_hand(at(0));
    let ground = Ground::Embedded(tempfile::tempdir().unwrap());
    let flags = ["--nats-stream-max-age", "1h", "--nats-stream-max-bytes", "1MiB"];
    let fixture = Fixture::on(ground, clock.clone(), &flags).await;
    let mut lane = fixture.bus.open_lane(WINDOW);
    publish(&mut lane, [message("a")]).await;
    clock.step(9 * 60 * 1000);
    assert!(publish(&mut lane, [message("a")]).await[0].unwrap().duplicate);
    clock.step(13 * 60 * 1000);
    let again = publish(&mut lane, [message("a")]).await[0].unwrap();
    assert_eq!(again, Ack { position: 2, duplicate: false });
    clock.step(50 * 60 * 1000);
    publish(&mut lane, [message("b")]).await;
    let left: Vec<_> =
        fixture.read(Start::Position(0), Wanted::Headers).await.iter().map(|s| s.position).collect();
    assert_eq!(left, [2, 3], "the first message is older than an hour");

    let large = |n: u32| Message { payload: vec![b'x'; 100_000].into(), ..message(&format!("large {n}")) };
    for n in 0..30 {
        publish(&mut lane, [large(n)]).await;
    }
    let left = fixture.read(Start::Position(0), Wanted::Headers).await;
    assert!((8..=10).contains(&left.len()), "{} of 100 kB in 1 MiB", left.len());
    assert_eq!(left.last().unwrap().position, 33);
    let follower = fixture.bus.follow(Start::Position(1), Wanted::Headers).await.unwrap();
    assert_eq!(follower.first_position, left[0].position);
    // Everything goes by age at last, and positions still go on.
    clock.step(2 * 60 * 60 * 1000);
    let next = publish(&mut lane, [message("c")]).await[0].unwrap();
    assert_eq!(next.position, 34);
    assert_eq!(keys(&fixture.read(Start::Time(at(0)), Wanted::Whole).await), ["c"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_embedded_streams_times_do_not_step_back_with_the_clock() {
    let clock = Clock::by_hand(at(0));
    let ground = Ground::Embedded(tempfile::tempdir().unwrap());
    let fixture = Fixture::on(ground, clock.clone(), &[]).await;
    let mut lane = fixture.bus.open_lane(WINDOW);
    for key in ["a", "b", "c", "d"] {
        publish(&mut lane, [message(key)]).await;
        clock.step(if key == "b" { -3_600_000 } else { 1_000 });
    }
    let stored = fixture.read(Start::Position(1), Wanted::Headers).await;
    assert!(stored.is_sorted_by_key(|stored| stored.stored_at));
    assert_eq!(fixture.read(Start::Time(at(1)), Wanted::Headers).await.len(), 3);
}

#[test]
fn a_stream_file_of_a_later_format_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("stream.redb");
    let numbers: redb::TableDefinition<'_, &str, u64> = redb::TableDefinition::new("numbers");
    let database = redb::Database::create(&path).unwrap();
    let writing = database.begin_write().unwrap();
    writing.open_table(numbers).unwrap().insert("format", 99).unwrap();
    writing.commit().unwrap();
    drop(database);
    let config = config(&[]);
    let opened = EmbeddedBus::open(folder.path(), config.retention, config.subjects, Clock::system());
    let Err(error) = opened else { panic!("opened") };
    assert!(error.to_string().contains("format 99"), "{error}");
}

/// The settings of a stream that an operator made, and what Inlet says to it.
async fn verdict(nats: &Nats, flags: &[&str]) -> BusState {
    let url = nats.url();
    let config = config(&[&["--nats-url", &url], flags].concat());
    let bus = JetStreamBus::start(config.jetstream.clone().unwrap(), &config, &TlsConfig::default(), WINDOW);
    let mut state = bus.state();
    let known = state.wait_for(|state| !matches!(state, BusState::Connecting | BusState::Away(_)));
    tokio::time::timeout(PATIENCE, known).await.unwrap().unwrap().clone()
}

async fn make_stream(nats: &Nats, config: async_nats::jetstream::stream::Config) {
    let client = async_nats::connect(nats.url()).await.unwrap();
    async_nats::jetstream::new(client).create_stream(config).await.unwrap();
}

fn stream(name: &str, subjects: &[&str]) -> async_nats::jetstream::stream::Config {
    async_nats::jetstream::stream::Config {
        name: name.to_owned(),
        subjects: subjects.iter().map(|subject| (*subject).to_owned()).collect(),
        ..Default::default()
    }
}

fn unfit(state: &BusState) -> &str {
    match state {
        BusState::Unfit(why) => why,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operators_stream_is_used_if_it_fits_and_named_if_it_does_not() {
    let nats = Nats::start().await;
    make_stream(&nats, stream("EVENTS", &["internal.>"])).await;
    assert_eq!(verdict(&nats, &[]).await, BusState::Up);
    let client = async_nats::connect(nats.url()).await.unwrap();
    let context = async_nats::jetstream::new(client);
    assert!(context.get_stream("INLET").await.is_err(), "no stream beside one that covers the subject");

    // It takes events but no dead letters.
    make_stream(&nats, stream("HALF", &["half.internal.ingress.v1"])).await;
    let said = verdict(&nats, &["--bus-prefix", "half."]).await;
    assert!(
        unfit(&said).contains("HALF") && unfit(&said).contains("half.internal.deadletter.v1"),
        "{said:?}"
    );
    // It takes dead letters but no events: what would be created overlaps.
    make_stream(&nats, stream("LETTERS", &["other.internal.deadletter.*"])).await;
    let said = verdict(&nats, &["--bus-prefix", "other."]).await;
    assert!(unfit(&said).contains("LETTERS"), "{said:?}");
    // Named, but of something else.
    let said = verdict(&nats, &["--nats-stream", "HALF"]).await;
    assert!(unfit(&said).contains("HALF"), "{said:?}");
    // A size set by hand that the server has no room for.
    let said = verdict(&nats, &["--bus-prefix", "big.", "--nats-stream-max-bytes", "100GiB"]).await;
    assert!(unfit(&said).contains("NATS_STREAM_MAX_BYTES"), "{said:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_created_stream_is_as_the_contract_says() {
    let nats = Nats::start().await;
    assert_eq!(verdict(&nats, &["--bus-prefix", "dev.eu."]).await, BusState::Up);
    let client = async_nats::connect(nats.url()).await.unwrap();
    let mut made = async_nats::jetstream::new(client).get_stream("INLET_dev_eu").await.unwrap();
    let config = made.info().await.unwrap().config.clone();
    let subjects: BTreeSet<_> = config.subjects.iter().map(String::as_str).collect();
    assert_eq!(subjects, BTreeSet::from(["dev.eu.internal.ingress.v1", "dev.eu.internal.deadletter.v1"]));
    assert_eq!(config.max_age, Duration::from_hours(72));
    assert_eq!(config.duplicate_window, Duration::from_mins(10));
    // 10 GiB halved until it fits into the server's 4 GB.
    assert_eq!(config.max_bytes, (10 << 30) / 4);
    assert_eq!(config.storage, async_nats::jetstream::stream::StorageType::File);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_inlet_made_is_made_again_when_it_is_deleted() {
    let fixture = Fixture::nats().await;
    let Ground::Nats(nats) = &fixture.ground else { unreachable!() };
    let mut lane = fixture.bus.open_lane(WINDOW);
    publish(&mut lane, [message("a")]).await;
    let before = fixture.bus.stream().unwrap().identity;
    let client = async_nats::connect(nats.url()).await.unwrap();
    async_nats::jetstream::new(client).delete_stream("INLET").await.unwrap();
    let refused = publish(&mut lane, [message("b")]).await;
    assert!(refused[0].unwrap_err().is_transient(), "{refused:?}");
    eventually("another stream", || async {
        (fixture.bus.stream().unwrap().identity != before).then_some(())
    })
    .await;
    fixture.up().await;
    assert_eq!(publish(&mut lane, [message("b")]).await, [Ok(Ack { position: 1, duplicate: false })]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operators_stream_that_is_gone_is_said_and_not_made_again() {
    let nats = Nats::start().await;
    make_stream(&nats, stream("EVENTS", &["internal.>"])).await;
    let fixture = Fixture::on(Ground::Nats(nats), Clock::system(), &[]).await;
    let Ground::Nats(nats) = &fixture.ground else { unreachable!() };
    let client = async_nats::connect(nats.url()).await.unwrap();
    let context = async_nats::jetstream::new(client);
    context.delete_stream("EVENTS").await.unwrap();
    let mut lane = fixture.bus.open_lane(WINDOW);
    assert!(publish(&mut lane, [message("a")]).await[0].unwrap_err().is_transient());
    let mut state = fixture.bus.state();
    let said = state.wait_for(|state| matches!(state, BusState::Unfit(_)));
    drop(tokio::time::timeout(PATIENCE, said).await.unwrap().unwrap());
    assert!(context.get_stream("INLET").await.is_err());
    make_stream(nats, stream("EVENTS", &["internal.>"])).await;
    fixture.up().await;
    assert!(publish(&mut lane, [message("a")]).await[0].is_ok());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_peer_is_noticed_within_fifteen_seconds() {
    let fixture = Fixture::nats().await;
    let Ground::Nats(nats) = &fixture.ground else { unreachable!() };
    let mut lane = fixture.bus.open_lane(WINDOW);
    publish(&mut lane, [message("a")]).await;
    nats.stop().await;
    let start = std::time::Instant::now();
    lane.messages.send(numbered([message("b")])).await.unwrap();
    let settled = tokio::time::timeout(PATIENCE, lane.settled.recv()).await.unwrap().unwrap();
    let spent = start.elapsed();
    nats.signal("CONT");
    assert!(settled[0].outcome.unwrap_err().is_transient());
    assert!(spent < Duration::from_secs(15), "{spent:?}");
    fixture.up().await;
    // What the stopped server had in its socket is there once, whoever sent it.
    eventually("the message is in the stream", || async {
        let stored = fixture.read(Start::Position(1), Wanted::Headers).await;
        (stored.len() == 2).then_some(())
    })
    .await;
}
