//! What we know of people, and how it is counted.
//!
//! The stream is the truth: an event exists once it is there, and everything counted of a user is folded from it. An
//! event [meets](Users::meet) its user on its way to the stream, which decides its tags; the projection
//! follows the stream and notes whatever is in it, whoever published it; the flush writes users behind. Memory
//! holds what lies between (the table).

mod barred;
mod circuit;
mod config;
mod desk;
mod erase;
mod flush;
mod fold;
mod meet;
mod metrics;
pub mod operations;
mod operators;
mod projection;
mod session;
mod table;
mod words;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::{Notify, watch};
use uuid::Uuid;

use crate::bus::{Bus, BusState, Message};
use crate::clock::Clock;
use crate::envelope::SubjectTemplate;
use crate::errors::ErrorCode;
use crate::retry::Backoff;
use crate::status::Part;
use crate::store::Name;
use crate::store::measured::{Store, StoreMetrics};
use circuit::Circuit;
use erase::Erasures;
use table::Table;
use words::Words;

pub use barred::{Bar, Barred};
pub use config::{EnrichArgs, EnrichConfig, EnrichMode};
pub use desk::{Desk, Farewell, Remains};
pub use fold::{Folded, Kind, Seen, Tags};
pub use meet::Meeting;
pub use metrics::{Matched, UserMetrics};
pub use projection::Following;
pub use table::{Met, Visit};

/// Waits between probes of a store that failed.
const FIRST_PROBE: Duration = Duration::from_millis(200);
const LONGEST_PROBE: Duration = Duration::from_secs(2);

/// A bus that is there, and whose stream cannot be followed for so long, is away for whoever waits for its events.
const LONGEST_UNFOLLOWED: Duration = Duration::from_secs(10);

/// What is done behind the path may take this long before the store counts as away.
const PATIENCE: Duration = Duration::from_secs(10);

/// Users, as the path and the background see them. Cheap to clone.
#[derive(Clone)]
pub struct Users(Arc<Shared>);

struct Shared {
    table: Mutex<Table>,
    store: Store,
    bus: Arc<dyn Bus>,
    /// What instances that share a stream and a store must share, too.
    subject: String,
    subjects: SubjectTemplate,
    config: EnrichConfig,
    circuit: Circuit,
    /// Who is not to be known.
    barred: Barred,
    erasures: Erasures,
    words: Words,
    metrics: Arc<UserMetrics>,
    clock: Clock,
    /// An event was acknowledged or given up, or the circuit opened.
    changed: Notify,
    /// Memory is short: users are to be written before their time.
    flush_now: Notify,
    /// Users were written.
    flushed: Notify,
    following: watch::Sender<Following>,
    counted: Mutex<flush::CountedTo>,
}

impl Users {
    /// Nobody in memory yet. `subjects` are what this instance publishes to; `barred` are not met.
    pub fn new(
        store: Store,
        bus: Arc<dyn Bus>,
        subjects: SubjectTemplate,
        config: EnrichConfig,
        (metrics, clock, barred): (Arc<UserMetrics>, Clock, Barred),
    ) -> Self {
        let [subject, _] = subjects.patterns();
        Self(Arc::new(Shared {
            table: Mutex::new(Table::new(config.session_gap, config.cache_users, config.max_pending)),
            circuit: Circuit::new(metrics.circuit_open.clone()),
            barred,
            erasures: Erasures::default(),
            words: Words::default(),
            store,
            bus,
            subject,
            subjects,
            config,
            metrics,
            clock,
            changed: Notify::new(),
            flush_now: Notify::new(),
            flushed: Notify::new(),
            following: watch::Sender::new(Following::Starting),
            counted: Mutex::new(flush::CountedTo::default()),
        }))
    }

    /// Whether everything is on paper alone.
    pub fn is_dry(&self) -> bool {
        self.0.config.mode == EnrichMode::DryRun
    }

    /// How many documents this run created.
    pub fn created(&self) -> u64 {
        self.0.metrics.created.get()
    }

    /// The stream has an event of this instance at `position`, whether it was there before or not.
    pub fn acked(&self, key: &Arc<str>, id: Uuid, position: u64) {
        self.0.table().acked(key, id, position);
        self.0.changed.notify_one();
    }

    /// An event of this instance is in the outbox: an opening need not wait for it any longer.
    pub fn stored(&self, key: &Arc<str>, id: Uuid) {
        self.0.table().stored(key, id);
        self.0.changed.notify_one();
    }

    /// This event of an earlier run lies in the outbox.
    pub fn recovered(&self, message: &Message) {
        if let Some((key, seen)) = projection::counted(&message.kind, message.id, message.by_user.as_ref()) {
            self.0.table().recovered(key, seen);
        }
    }

    /// An event of this instance became a dead letter, or was lost with the bus.
    pub fn dead_lettered(&self, key: &Arc<str>, id: Uuid) {
        self.0.table().dead_lettered(key, id);
        self.0.changed.notify_one();
    }

    /// Where the stream is known to hold an event that its sender has no answer for.
    pub fn position_of(&self, key: &Arc<str>, id: Uuid) -> Option<u64> {
        self.0.table().position_of(key, id)
    }

    /// Waits until events may be taken in: it is known who is kept out, and what the stream holds is noted; or that cannot
    /// be, because the bus or the store is away, or the stream cannot be followed.
    pub async fn caught_up(&self) {
        self.0.barred.asked().await;
        if self.is_dry() {
            return;
        }
        let mut following = self.0.following.subscribe();
        let mut bus = self.0.bus.state();
        tokio::select! {
            _ = following.wait_for(|following| matches!(following, Following::CaughtUp | Following::Unfit(_))) => {}
            _ = bus.wait_for(|state| !matches!(state, BusState::Up | BusState::Connecting)) => {}
            () = self.0.circuit.until(true) => {}
            () = not_followed(self.0.following.subscribe()) => {}
        }
    }

    /// Whether the stream acknowledged something that the projection has not read yet.
    pub fn awaits_notes(&self) -> bool {
        self.0.table().awaits_notes()
    }

    /// What the store was asked.
    pub fn store_metrics(&self) -> &StoreMetrics {
        self.0.store.metrics()
    }

    /// How the projection does.
    pub fn following(&self) -> watch::Receiver<Following> {
        self.0.following.subscribe()
    }

    /// Probes the store while it is away. Does not end.
    pub async fn probe_store(self) {
        let probe = [Name::note("probe")];
        let mut backoff = Backoff::new(FIRST_PROBE, LONGEST_PROBE);
        let mut closed_at = tokio::time::Instant::now();
        loop {
            self.0.circuit.until(true).await;
            // It is not asked for anybody before it has said who is not to be known.
            self.0.barred.known().await;
            // A store that answers probes and fails at work is not asked more and more often.
            if closed_at.elapsed() > LONGEST_PROBE {
                backoff.reset();
            }
            // Whoever waits for something to be written need not any longer.
            self.0.changed.notify_one();
            tokio::time::sleep(backoff.next_wait()).await;
            if self.0.store.get_many(&probe, self.0.config.timeout).await.is_ok() {
                self.0.circuit.close();
                closed_at = tokio::time::Instant::now();
            }
        }
    }

    /// What the probes show.
    pub fn parts(&self) -> Vec<Arc<dyn Part>> {
        let mut parts: Vec<Arc<dyn Part>> = vec![Arc::new(StorePart(self.clone()))];
        if !self.is_dry() {
            parts.insert(0, Arc::new(projection::ProjectionPart(self.clone())));
        }
        parts
    }
}

impl Shared {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Carries what the table counted over to the series.
    fn show(&self, table: &mut Table) {
        self.metrics.bad_values.inc_by(table.take_bad_values());
        let lost = table.take_lost();
        if lost > 0 {
            self.metrics.lost.inc_by(lost);
            tracing::error!(error_code = %ErrorCode::CountsLost, events = lost, "events are gone before they were counted");
        }
        self.metrics.cached.set(gauge(table.len() as u64));
        self.metrics.dirty.set(gauge(table.dirty() as u64));
    }
}

/// Waits until the projection could not begin, or go on, for so long that it is not waited for.
async fn not_followed(mut following: watch::Receiver<Following>) {
    let is_reading =
        |following: &Following| !matches!(following, Following::Starting | Following::Interrupted);
    // Its sender lives as long as the users.
    while following.wait_for(|following| !is_reading(following)).await.is_ok() {
        if tokio::time::timeout(LONGEST_UNFOLLOWED, following.wait_for(is_reading)).await.is_err() {
            return;
        }
    }
    std::future::pending::<()>().await;
}

/// The store as the probes see it.
struct StorePart(Users);

impl Part for StorePart {
    fn name(&self) -> &'static str {
        "store"
    }

    fn is_waited_for(&self) -> bool {
        self.0.0.circuit.is_open()
    }

    fn describe(&self) -> Value {
        json!({ "state": if self.0.0.circuit.is_open() { "away" } else { "up" } })
    }
}

fn gauge(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_stream_that_cannot_be_followed_is_not_waited_for_but_one_that_is_read_is() {
        let following = watch::Sender::new(Following::CatchingUp);
        let mut waiting = std::pin::pin!(not_followed(following.subscribe()));
        assert!(tokio::time::timeout(LONGEST_UNFOLLOWED * 10, &mut waiting).await.is_err());
        following.send_replace(Following::Interrupted);
        assert!(tokio::time::timeout(LONGEST_UNFOLLOWED * 2, &mut waiting).await.is_ok());
    }
}
