//! Publishing against a bus whose answers and whose pace are given by hand.

use std::sync::Mutex;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use jiff::Timestamp;

use super::*;
use crate::bus::embedded::EmbeddedBus;
use crate::bus::{Follower, Refusal, Retention, Start, StreamInfo, TransientCause, Wanted};
use crate::envelope::{DeadLetterReason, Origin};
use crate::pipeline::Enrich;
use crate::pipeline::tests_support::draft;

const T0: Timestamp = Timestamp::constant(1_700_000_000, 0);

/// An embedded stream that forgets ids sooner, and takes its time to be read from a time on. What is published goes to
/// whoever holds the other ends of `lane`, if there is one.
struct ByHand {
    stream: Arc<EmbeddedBus>,
    window: Duration,
    reading_takes: Duration,
    followed: Mutex<Vec<Start>>,
    lane: Mutex<Option<Lane>>,
}

impl Bus for ByHand {
    fn state(&self) -> watch::Receiver<BusState> {
        self.stream.state()
    }

    fn open_lane(&self, window: usize) -> Lane {
        self.lane.lock().unwrap().take().unwrap_or_else(|| self.stream.open_lane(window))
    }

    fn follow(&self, start: Start, content: Wanted) -> BoxFuture<'_, Result<Follower, BusError>> {
        self.followed.lock().unwrap().push(start);
        async move {
            if matches!(start, Start::Time(_)) {
                tokio::time::sleep(self.reading_takes).await;
            }
            self.stream.follow(start, content).await
        }
        .boxed()
    }

    fn stream(&self) -> Option<StreamInfo> {
        let info = self.stream.stream()?;
        Some(StreamInfo { duplicate_window: self.window, ..info })
    }
}

struct Case {
    bus: Arc<ByHand>,
    metrics: Arc<PipelineMetrics>,
    clock: Clock,
    _folder: tempfile::TempDir,
}

impl Case {
    fn new(window: Duration, reading_takes: Duration, lane: Option<Lane>) -> Self {
        let (folder, clock) = (tempfile::tempdir().unwrap(), Clock::by_hand(T0));
        let retention = Retention { max_age: Duration::from_hours(72), max_bytes: None };
        let stream = EmbeddedBus::open(folder.path(), retention, subjects(), clock.clone()).unwrap();
        let bus = Arc::new(ByHand {
            stream,
            window,
            reading_takes,
            followed: Mutex::default(),
            lane: Mutex::new(lane),
        });
        let metrics = Arc::new(PipelineMetrics::new(&prometheus::Registry::new()).unwrap());
        Self { bus, metrics, clock, _folder: folder }
    }

    fn event(&self, key: &str) -> Enriched {
        self.metrics.pending.inc();
        Enrich::new(subjects(), None, self.clock.clone()).batch(vec![draft(key)], 1 << 20).pop().unwrap()
    }

    /// Publishes these while `script` runs.
    async fn publishes(&self, events: Vec<Enriched>, script: impl Future<Output = ()>) {
        let config = PublishConfig { max_in_flight: 64, max_attempts: 5, ack_wait: Duration::from_secs(5) };
        let bus: Arc<dyn Bus> = Arc::<ByHand>::clone(&self.bus);
        let about = (None, self.clock.clone());
        let publish = Publish::new(bus, config, subjects(), about, Arc::clone(&self.metrics));
        let ((to_publish, inbox), (_open, closing)) = (mpsc::channel(1), watch::channel(()));
        to_publish.send(events).await.unwrap();
        tokio::select! {
            () = publish.run(inbox, closing) => panic!("it ended"),
            ended = tokio::time::timeout(Duration::from_secs(10), script) => ended.unwrap(),
        }
    }

    async fn has_settled(&self) {
        while self.metrics.pending.get() > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    fn readings(&self) -> usize {
        let is_from_a_time = |start: &&Start| matches!(start, Start::Time(_));
        self.bus.followed.lock().unwrap().iter().filter(is_from_a_time).count()
    }
}

fn subjects() -> SubjectTemplate {
    SubjectTemplate::new("", "a").unwrap()
}

#[tokio::test]
async fn a_stream_that_takes_longer_to_read_than_that_is_good_for_is_read_once_and_then_on() {
    let case = Case::new(Duration::from_millis(400), Duration::from_millis(250), None);
    let event = case.event("late");
    case.clock.step(3_600_000);
    case.publishes(vec![event], case.has_settled()).await;
    assert_eq!((case.metrics.published.of(Origin::Twitch).get(), case.readings()), (1, 1));
    // What lies before is read when it is asked for.
    let mut older = case.event("older");
    older.not_published_before = T0 - Duration::from_hours(1);
    case.publishes(vec![older], case.has_settled()).await;
    assert_eq!(case.metrics.published.of(Origin::Twitch).get(), 2);
}

#[tokio::test]
async fn an_event_is_late_by_its_age_here_though_the_clock_was_set_back() {
    let (messages, mut sent) = mpsc::channel(64);
    let (_answers, settled) = mpsc::channel(64);
    let lane = Lane { messages, settled };
    let case = Case::new(Duration::from_secs(2), Duration::ZERO, Some(lane));
    let mut event = case.event("published by a twin");
    let mut twin = case.bus.stream.open_lane(1);
    twin.messages.send(vec![Numbered { number: 0, message: Arc::clone(&event.message) }]).await.unwrap();
    twin.settled.recv().await.unwrap();
    case.clock.step(-3_600_000);
    event.taken_in -= Duration::from_secs(10);
    case.publishes(vec![event], case.has_settled()).await;
    assert_eq!(case.metrics.publish_duplicates.get(), 1);
    assert!(sent.try_recv().is_err(), "nothing is sent");
}

#[tokio::test]
async fn one_look_back_is_for_all_that_may_have_arrived_before_they_are_dead_letters() {
    let (messages, mut sent) = mpsc::channel(64);
    let (answers, settled) = mpsc::channel(64);
    let case = Case::new(Duration::from_mins(10), Duration::ZERO, Some(Lane { messages, settled }));
    let events = ["one", "two", "three"].map(|key| case.event(key));
    let mut received = async || -> Vec<Numbered> {
        let mut received = Vec::new();
        while received.len() < 3 {
            received.extend(sent.recv().await.unwrap());
        }
        received
    };
    let answer = async |sent: &[Numbered], outcome: Result<Ack, Refusal>| {
        let settled = sent.iter().map(|sent| Settled { number: sent.number, outcome });
        answers.send(settled.collect()).await.unwrap();
    };
    let script = async {
        let first = received().await;
        answer(&first, Err(Refusal::Transient(TransientCause::Lost))).await;
        answer(&received().await, Err(Refusal::TooLarge)).await;
        // None of them is in the stream, so they are tried once more.
        let again = received().await;
        assert!(again.iter().all(|sent| !sent.message.id.is_dead_letter));
        assert_eq!(case.bus.followed.lock().unwrap().len(), 1);
        answer(&again, Err(Refusal::TooLarge)).await;
        let letters = received().await;
        assert!(letters.iter().all(|sent| sent.message.id.is_dead_letter));
        // The events' late answers are none to the letters.
        answer(&first, Ok(Ack { position: 1, duplicate: false })).await;
        answer(&letters, Err(Refusal::TooLarge)).await;
        let shorter = received().await;
        let is_shorter = |(letter, shorter): (&Numbered, &Numbered)| {
            shorter.message.payload.len() < letter.message.payload.len()
        };
        assert!(letters.iter().zip(&shorter).all(is_shorter));
        assert_eq!(case.metrics.pending.get(), 3);
        answer(&shorter, Ok(Ack { position: 2, duplicate: false })).await;
        case.has_settled().await;
    };
    case.publishes(events.into(), script).await;
    assert_eq!(case.metrics.dead_lettered.of(Origin::Twitch, DeadLetterReason::TooLarge).get(), 3);
}
