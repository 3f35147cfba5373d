//! The one bounded door. It drops what it has seen, and when it is full says so by letting its visitors wait:
//! a source's socket is its queue.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use clap::Args;
use jiff::Timestamp;
use serde::Serialize;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};

use super::metrics::{PipelineMetrics, RefusedReason};
use crate::clock::Clock;
use crate::envelope::{Draft, MessageId, Origin, Outcome};
use crate::errors::ErrorCode;
use crate::recent::Recent;
use crate::settings::{self, Problems};
use crate::users::{Bar, Barred};

/// Most events of one batch: what one read of a socket brings, and no more than this. Batches that wait together leave
/// together, up to twice as many.
const LARGEST_BATCH: usize = 256;

/// Settings of the door.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Intake")]
pub struct IntakeArgs {
    /// Events that the door holds
    #[arg(long, env, default_value = "8192")]
    intake_max_events: String,
    /// How long chat waits at a full door before it is refused and counted
    #[arg(long, env, default_value = "2s")]
    intake_wait: String,
    /// For how long an id is known
    #[arg(long, env, default_value = "10m")]
    dedup_window: String,
    /// How many ids are known at most
    #[arg(long, env, default_value = "1000000")]
    dedup_max_ids: String,
}

/// Checked settings of the door.
#[derive(Debug, Clone, Serialize)]
pub struct IntakeConfig {
    /// Events that the door holds.
    #[serde(rename = "INTAKE_MAX_EVENTS")]
    pub max_events: usize,
    /// How long chat waits at a full door.
    #[serde(rename = "INTAKE_WAIT", serialize_with = "settings::shown_duration")]
    pub wait: Duration,
    /// For how long an id is known.
    #[serde(rename = "DEDUP_WINDOW", serialize_with = "settings::shown_duration")]
    pub dedup_window: Duration,
    /// How many ids are known.
    #[serde(rename = "DEDUP_MAX_IDS")]
    pub dedup_max_ids: usize,
}

impl IntakeArgs {
    /// Checks the settings.
    pub fn check(&self, problems: &mut Problems) -> Option<IntakeConfig> {
        let max_events =
            problems.parse("INTAKE_MAX_EVENTS", &self.intake_max_events, settings::count(1, 10_000_000));
        let wait = problems.parse("INTAKE_WAIT", &self.intake_wait, settings::duration);
        let dedup_window = problems.parse("DEDUP_WINDOW", &self.dedup_window, settings::positive_duration);
        let dedup_max_ids =
            problems.parse("DEDUP_MAX_IDS", &self.dedup_max_ids, settings::count(1, 100_000_000));
        Some(IntakeConfig {
            max_events: max_events?,
            wait: wait?,
            dedup_window: dedup_window?,
            dedup_max_ids: dedup_max_ids?,
        })
    }
}

/// How long a visitor waits at a full door.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Patience {
    /// `INTAKE_WAIT`, then what does not fit is refused and counted. While the door stays full, those who come
    /// later are not made to wait again: their sockets would overflow.
    Bounded,
    /// Until there is room: for sources that can be read later just as well.
    Unlimited,
}

/// What became of the drafts of one visit.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Offered {
    /// Let in.
    pub admitted: u64,
    /// Known.
    pub duplicates: u64,
    /// Lost.
    pub refused: u64,
    /// Of users who are ignored or forgotten.
    pub barred: u64,
}

/// The outside of the door. Each source holds one; the door closes when the last is dropped.
#[derive(Clone)]
pub struct Intake {
    shared: Arc<Shared>,
    queue: mpsc::Sender<Admitted>,
    /// Says by its end that the door is closed.
    _open: watch::Sender<()>,
}

/// The inside of the door.
pub struct Door {
    queue: mpsc::Receiver<Admitted>,
    open: watch::Receiver<()>,
}

struct Shared {
    config: IntakeConfig,
    room: Arc<Semaphore>,
    /// Visitors of unlimited patience share half of it, or they would keep chat out for as long as they come.
    patient_room: Arc<Semaphore>,
    /// Somebody waited in vain, and there was never enough room since.
    is_overrun: AtomicBool,
    known: Mutex<Recent<()>>,
    /// Who is not let in.
    barred: Barred,
    metrics: Arc<PipelineMetrics>,
    clock: Clock,
}

struct Admitted {
    drafts: Vec<Draft>,
    /// Given back when the batch leaves the door.
    room: Room,
}

/// Places at the door, held by a batch.
struct Room {
    permit: OwnedSemaphorePermit,
    _patient: Option<OwnedSemaphorePermit>,
}

impl Room {
    /// What a batch does not need is free again.
    fn for_batch(mut self, drafts: Vec<Draft>) -> Admitted {
        let surplus = self.permit.num_permits().saturating_sub(drafts.len());
        drop(self.permit.split(surplus));
        Admitted { drafts, room: self }
    }
}

/// The door's window of known ids.
pub struct KnownIds(Arc<Shared>);

impl KnownIds {
    /// These are in the stream, since those times.
    pub fn learn(&self, ids: &[(MessageId, Timestamp)]) {
        let now = self.0.clock.now();
        let oldest = now - self.0.config.dedup_window;
        let mut known = self.0.known.lock().unwrap_or_else(PoisonError::into_inner);
        let evicted_before = known.evicted_early();
        for (id, stored_at) in ids {
            if !id.is_dead_letter && *stored_at >= oldest {
                known.insert(id.event.as_u128(), (), now);
            }
        }
        self.0.metrics.dedup_evicted_early.inc_by(known.evicted_early() - evicted_before);
    }
}

/// Events that were received and not yet decided upon. A visit that is broken off leaves them refused.
struct Undecided<'a> {
    events: u64,
    origin: Origin,
    metrics: &'a PipelineMetrics,
}

impl Drop for Undecided<'_> {
    fn drop(&mut self) {
        self.metrics.refused.of(self.origin, RefusedReason::Closed).inc_by(self.events);
    }
}

/// Makes the door, which `barred` do not pass.
pub fn open_door(
    config: IntakeConfig,
    barred: Barred,
    metrics: Arc<PipelineMetrics>,
    clock: Clock,
) -> (Intake, Door) {
    // Every batch holds room for at least one event, so the queue is never fuller than this.
    let (sender, receiver) = mpsc::channel(config.max_events);
    let shared = Shared {
        room: Arc::new(Semaphore::new(config.max_events)),
        patient_room: Arc::new(Semaphore::new(config.max_events.div_ceil(2))),
        is_overrun: AtomicBool::new(false),
        known: Mutex::new(Recent::new(config.dedup_window, config.dedup_max_ids)),
        config,
        barred,
        metrics,
        clock,
    };
    let (open, seen_open) = watch::channel(());
    let intake = Intake { shared: Arc::new(shared), queue: sender, _open: open };
    (intake, Door { queue: receiver, open: seen_open })
}

impl Door {
    /// Ends when nobody can bring anything to the door any more, whatever it still holds.
    pub fn closing(&self) -> watch::Receiver<()> {
        self.open.clone()
    }

    /// The next batch; `None` when the door is closed and empty. Small batches that wait together go on together: what
    /// is behind the door (a read, a commit, a flush) costs the same for one event as for many.
    pub async fn next(&mut self) -> Option<Vec<Draft>> {
        let Admitted { mut drafts, room } = self.queue.recv().await?;
        drop(room);
        while drafts.len() < LARGEST_BATCH {
            let Ok(more) = self.queue.try_recv() else { break };
            drafts.extend(more.drafts);
        }
        Some(drafts)
    }
}

impl Intake {
    /// Brings drafts of one origin to the door, in order. Every one of them is counted exactly once.
    pub async fn offer(&self, origin: Origin, drafts: Vec<Draft>, patience: Patience) -> Offered {
        let places = match patience {
            Patience::Bounded => self.shared.config.max_events,
            Patience::Unlimited => self.shared.config.max_events.div_ceil(2),
        };
        let most = LARGEST_BATCH.min(places);
        let mut total = Offered::default();
        let mut rest = drafts;
        while !rest.is_empty() {
            let behind = rest.split_off(rest.len().min(most));
            let offered = self.offer_batch(origin, rest, patience).await;
            total.admitted += offered.admitted;
            total.duplicates += offered.duplicates;
            total.refused += offered.refused;
            total.barred += offered.barred;
            rest = behind;
        }
        total
    }

    /// The window of known ids, for whoever else hears of events. It does not keep the door open.
    pub fn known_ids(&self) -> KnownIds {
        KnownIds(Arc::clone(&self.shared))
    }

    async fn offer_batch(&self, origin: Origin, mut drafts: Vec<Draft>, patience: Patience) -> Offered {
        let metrics = &*self.shared.metrics;
        let received = drafts.len() as u64;
        metrics.received.of(origin).inc_by(received);
        let mut undecided = Undecided { events: received, origin, metrics };
        self.shared.barred.asked().await;
        let heard = self.shared.barred.changes();
        let mut barred = self.drop_barred(origin, &mut drafts);
        undecided.events -= barred;
        if drafts.is_empty() {
            return Offered { barred, ..Offered::default() };
        }
        let room = self.room_for(drafts.len(), patience).await;
        // Nothing is waited for from here on: every event is decided upon at once.
        undecided.events = 0;
        if self.shared.barred.changes() != heard {
            barred += self.drop_barred(origin, &mut drafts);
        }
        let fitting = room.as_ref().map_or(0, |room| room.permit.num_permits()).min(drafts.len());
        let refused = (drafts.len() - fitting) as u64;
        for draft in drafts.drain(fitting..) {
            settle(draft, Outcome::Refused);
        }
        metrics.refused.of(origin, RefusedReason::DoorFull).inc_by(refused);
        let before = drafts.len() as u64;
        self.drop_known(&mut drafts);
        let admitted = drafts.len() as u64;
        let duplicates = before - admitted;
        metrics.duplicate.of(origin).inc_by(duplicates);
        let Some(room) = room.filter(|_| admitted > 0) else {
            return Offered { admitted, duplicates, refused, barred };
        };
        metrics.pending.add(i64::try_from(admitted).unwrap_or(i64::MAX));
        // Every batch holds at least one place, and the queue has as many: only a closed one does not take it.
        match self.queue.try_send(room.for_batch(drafts)) {
            Ok(()) => {
                metrics.admitted.of(origin).inc_by(admitted);
                Offered { admitted, duplicates, refused, barred }
            }
            Err(error) => {
                error.into_inner().drafts.into_iter().for_each(|draft| settle(draft, Outcome::Refused));
                metrics.pending.sub(i64::try_from(admitted).unwrap_or(i64::MAX));
                metrics.refused.of(origin, RefusedReason::Closed).inc_by(admitted);
                Offered { admitted: 0, duplicates, refused: refused + admitted, barred }
            }
        }
    }

    /// Room for `wanted` events, or for as many as fit when patience is at its end.
    async fn room_for(&self, wanted: usize, patience: Patience) -> Option<Room> {
        let Shared { room, patient_room, is_overrun, config, .. } = &*self.shared;
        let permits = u32::try_from(wanted).unwrap_or(u32::MAX);
        let all = || Arc::clone(room).acquire_many_owned(permits);
        if patience == Patience::Unlimited {
            let most = u32::try_from(config.max_events.div_ceil(2)).unwrap_or(u32::MAX);
            let patient = Arc::clone(patient_room).acquire_many_owned(permits.min(most)).await.ok()?;
            return Some(Room { permit: all().await.ok()?, _patient: Some(patient) });
        }
        let without_patience = |permit| Room { permit, _patient: None };
        if let Ok(permit) = Arc::clone(room).try_acquire_many_owned(permits) {
            if is_overrun.swap(false, Ordering::Relaxed) {
                tracing::info!("the door has room again");
            }
            return Some(without_patience(permit));
        }
        if !is_overrun.load(Ordering::Relaxed) {
            if let Ok(permit) = tokio::time::timeout(config.wait, all()).await {
                return permit.ok().map(without_patience);
            }
            is_overrun.store(true, Ordering::Relaxed);
            tracing::error!(error_code = %ErrorCode::DoorFull, "the door is full: events are refused and lost until the bus takes them again");
        }
        let left = u32::try_from(room.available_permits()).unwrap_or(u32::MAX).min(permits);
        Arc::clone(room).try_acquire_many_owned(left).ok().map(without_patience)
    }

    /// Drops and counts events of those who are not let in. They need no room, and their ids stay unknown: what is said
    /// again when their user is let in again is new.
    fn drop_barred(&self, origin: Origin, drafts: &mut Vec<Draft>) -> u64 {
        let barred = self.shared.barred.now();
        if barred.is_nobody() {
            return 0;
        }
        let before = drafts.len();
        drafts.retain_mut(|draft| {
            let said_by = draft.said_by();
            let Some(bar) = said_by.and_then(|(key, at)| barred.bar_of(key, at)) else { return true };
            let reason = match bar {
                Bar::Ignored => RefusedReason::Ignored,
                Bar::Forgotten => RefusedReason::Forgotten,
            };
            self.shared.metrics.refused.of(origin, reason).inc();
            if let Some(slip) = draft.slip.take() {
                slip.settle(Outcome::Barred);
            }
            false
        });
        (before - drafts.len()) as u64
    }

    /// Drops what is known, and makes the rest known: an id enters the window as its event passes the door.
    fn drop_known(&self, drafts: &mut Vec<Draft>) {
        let now = self.shared.clock.now();
        let mut known = self.shared.known.lock().unwrap_or_else(PoisonError::into_inner);
        let evicted_before = known.evicted_early();
        drafts.retain_mut(|draft| {
            let is_new = known.insert(draft.id.as_u128(), (), now).is_none();
            if let Some(slip) = draft.slip.take_if(|_| !is_new) {
                slip.settle(Outcome::Duplicate);
            }
            is_new
        });
        self.shared.metrics.dedup_evicted_early.inc_by(known.evicted_early() - evicted_before);
    }
}

fn settle(draft: Draft, outcome: Outcome) {
    if let Some(slip) = draft.slip {
        slip.settle(outcome);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::tests_support::draft;
    use prometheus::Registry;

    fn door(max_events: usize, wait: Duration) -> (Intake, Door, Arc<PipelineMetrics>) {
        let metrics = Arc::new(PipelineMetrics::new(&Registry::new()).unwrap());
        let config =
            IntakeConfig { max_events, wait, dedup_window: Duration::from_mins(10), dedup_max_ids: 1_000 };
        let (intake, door) = open_door(config, Barred::nobody(), Arc::clone(&metrics), Clock::system());
        (intake, door, metrics)
    }

    fn drafts(ids: std::ops::Range<u32>) -> Vec<Draft> {
        ids.map(|id| draft(&format!("twitch:{id}"))).collect()
    }

    fn closes(metrics: &PipelineMetrics) -> bool {
        let origin = Origin::Twitch;
        metrics.received.of(origin).get()
            == metrics.admitted.of(origin).get()
                + metrics.duplicate.of(origin).get()
                + metrics.refused.sum_of(origin)
    }

    #[tokio::test(start_paused = true)]
    async fn known_events_are_dropped_wherever_they_come_from() {
        let (intake, mut door, metrics) = door(100, Duration::ZERO);
        let other = intake.clone();
        let first = intake.offer(Origin::Twitch, drafts(0..10), Patience::Bounded).await;
        let second = other.offer(Origin::Twitch, drafts(5..15), Patience::Bounded).await;
        assert_eq!(first, Offered { admitted: 10, ..Offered::default() });
        assert_eq!(second, Offered { admitted: 5, duplicates: 5, ..Offered::default() });
        drop((intake, other));
        let mut seen = Vec::new();
        while let Some(batch) = door.next().await {
            seen.extend(batch.into_iter().map(|draft| draft.id));
        }
        assert_eq!(seen, drafts(0..15).iter().map(|draft| draft.id).collect::<Vec<_>>());
        assert!(closes(&metrics));
    }

    #[tokio::test(start_paused = true)]
    async fn a_full_door_makes_chat_wait_once_and_then_refuses_and_counts() {
        let (intake, mut door, metrics) = door(8, Duration::from_secs(2));
        intake.offer(Origin::Twitch, drafts(0..8), Patience::Bounded).await;
        let start = tokio::time::Instant::now();
        let refused = intake.offer(Origin::Twitch, drafts(8..12), Patience::Bounded).await;
        assert_eq!((refused.refused, start.elapsed()), (4, Duration::from_secs(2)));
        // The door is still full: nobody waits again, and a refused event is not taken for a known one.
        let again = intake.offer(Origin::Twitch, drafts(8..12), Patience::Bounded).await;
        assert_eq!((again.refused, start.elapsed()), (4, Duration::from_secs(2)));
        assert_eq!(door.next().await.unwrap().len(), 8);
        let after = intake.offer(Origin::Twitch, drafts(8..12), Patience::Bounded).await;
        assert_eq!(after.admitted, 4);
        assert!(closes(&metrics));
    }

    #[tokio::test(start_paused = true)]
    async fn what_fits_is_let_in_from_the_front() {
        let (intake, mut door, _) = door(8, Duration::from_secs(1));
        intake.offer(Origin::Twitch, drafts(0..5), Patience::Bounded).await;
        let offered = intake.offer(Origin::Twitch, drafts(5..11), Patience::Bounded).await;
        assert_eq!((offered.admitted, offered.refused), (3, 3));
        drop(intake);
        let mut seen = Vec::new();
        while let Some(batch) = door.next().await {
            seen.extend(batch.into_iter().map(|draft| draft.id));
        }
        assert_eq!(seen, drafts(0..8).iter().map(|draft| draft.id).collect::<Vec<_>>());
    }

    #[tokio::test(start_paused = true)]
    async fn replay_waits_without_limit() {
        let (intake, mut door, _) = door(4, Duration::from_secs(1));
        let waiting = async { intake.offer(Origin::Replay, drafts(0..40), Patience::Unlimited).await };
        let reading = async {
            let mut seen = 0;
            while seen < 40 {
                tokio::time::sleep(Duration::from_mins(1)).await;
                seen += door.next().await.unwrap().len();
            }
        };
        let (offered, ()) = tokio::join!(waiting, reading);
        assert_eq!(offered.admitted, 40);
    }

    #[tokio::test(start_paused = true)]
    async fn replays_leave_half_of_the_door_to_chat() {
        let (intake, _door, metrics) = door(8, Duration::from_secs(1));
        let replaying = intake.offer(Origin::Replay, drafts(0..100), Patience::Unlimited);
        assert!(tokio::time::timeout(Duration::from_mins(1), replaying).await.is_err());
        let chat = intake.offer(Origin::Twitch, drafts(100..104), Patience::Bounded).await;
        assert_eq!(chat.admitted, 4);
        // The visit that was broken off is accounted for.
        let origin = Origin::Replay;
        let decided = metrics.admitted.of(origin).get() + metrics.refused.sum_of(origin);
        assert_eq!(metrics.received.of(origin).get(), decided);
    }

    #[tokio::test(start_paused = true)]
    async fn a_closed_door_refuses_and_counts() {
        let (intake, door, metrics) = door(8, Duration::ZERO);
        drop(door);
        let offered = intake.offer(Origin::Twitch, drafts(0..3), Patience::Bounded).await;
        assert_eq!(offered, Offered { refused: 3, ..Offered::default() });
        assert!(closes(&metrics) && metrics.pending.get() == 0);
    }
}
