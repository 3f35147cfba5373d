//! Late sends look back: the stream forgets ids after its duplicate window, so before a late event is sent the
//! stream itself is asked whether it holds it.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use jiff::Timestamp;
use tokio::time::Instant;

use crate::bus::{Bus, BusError, Start, Wanted};
use crate::envelope::MessageId;

/// Clocks differ: reading starts this much before the event's own time.
const MARGIN: Duration = Duration::from_mins(1);

/// A stream that brings nothing for this long is away.
const PATIENCE: Duration = Duration::from_secs(10);

/// A reading of another stream than the expected one is not repeated for so long.
const AT_ODDS: Duration = Duration::from_secs(1);

/// Ids kept from one reading. Of a longer stretch only those that were asked for are kept.
const MOST_IDS: usize = 1_000_000;

/// What the last reading found, and the one that is under way.
#[derive(Default)]
pub(super) struct LookBack {
    found: Option<Found>,
    reading: Option<BoxFuture<'static, Result<Found, BusError>>>,
}

struct Found {
    /// Of the stream that was read.
    identity: String,
    from: Timestamp,
    read_at: Instant,
    positions: HashMap<MessageId, u64>,
    /// The ids that it was about: whether they were found is known.
    asked: HashSet<MessageId>,
    /// Whether every id of the stretch is in `positions`.
    is_complete: bool,
}

impl LookBack {
    /// Whether the stream was read from `from` on, lately enough, for the ids asked for. What is read stays good for half
    /// of `duplicate_window`: whatever is published after it was read is still known to the stream for that long.
    pub(super) fn is_good(
        &self,
        bus: &dyn Bus,
        from: Timestamp,
        duplicate_window: Duration,
        asked: &HashSet<MessageId>,
    ) -> bool {
        let stream = bus.stream();
        self.found.as_ref().is_some_and(|found| {
            stream.is_some_and(|stream| stream.identity == found.identity)
                && (found.is_complete || found.asked.is_superset(asked))
                && found.from <= from
                && found.read_at.elapsed() < duplicate_window / 2
        })
    }

    /// Whether another stream was read just now than the one that the bus is attached to.
    pub(super) fn is_at_odds(&self, bus: &dyn Bus) -> bool {
        self.found.as_ref().is_some_and(|found| {
            found.read_at.elapsed() < AT_ODDS
                && bus.stream().is_none_or(|stream| stream.identity != found.identity)
        })
    }

    /// Begins to read from `from` on.
    pub(super) fn begin(&mut self, bus: Arc<dyn Bus>, from: Timestamp, asked: HashSet<MessageId>) {
        self.found = None;
        self.reading = Some(async move { read(&*bus, from, asked).await }.boxed());
    }

    /// Whether the stream is being read.
    pub(super) fn is_reading(&self) -> bool {
        self.reading.is_some()
    }

    /// Waits until what was begun is read; for ever if nothing was. Cancel safe.
    pub(super) async fn finished(&mut self) -> Result<(), BusError> {
        let Some(reading) = &mut self.reading else { return std::future::pending().await };
        let found = reading.await;
        self.reading = None;
        self.found = Some(found?);
        Ok(())
    }

    /// Where the stream holds `id`, as far as was read.
    pub(super) fn position(&self, id: MessageId) -> Option<u64> {
        self.found.as_ref()?.positions.get(&id).copied()
    }
}

async fn read(bus: &dyn Bus, from: Timestamp, asked: HashSet<MessageId>) -> Result<Found, BusError> {
    let read_at = Instant::now();
    let start =
        Start::Time(from.checked_sub(MARGIN).unwrap_or(Timestamp::UNIX_EPOCH).max(Timestamp::UNIX_EPOCH));
    let mut follower = in_time(bus.follow(start, Wanted::Headers)).await??;
    let identity = follower.identity.clone();
    let mut found = Found { identity, from, read_at, positions: HashMap::new(), asked, is_complete: true };
    loop {
        let Some(batch) = in_time(follower.next()).await? else {
            return Err(BusError::Interrupted("it ended".to_owned()));
        };
        let batch = batch?;
        let is_end = batch.is_end();
        for stored in batch.messages {
            let Some(id) = stored.id else { continue };
            if found.positions.len() < MOST_IDS || found.asked.contains(&id) {
                found.positions.entry(id).or_insert(stored.position);
            } else {
                found.is_complete = false;
            }
        }
        if is_end {
            tracing::debug!(%from, ids = found.positions.len(), "looked back in the stream");
            return Ok(found);
        }
    }
}

async fn in_time<T>(work: impl Future<Output = T>) -> Result<T, BusError> {
    tokio::time::timeout(PATIENCE, work)
        .await
        .map_err(|_| BusError::Away("no answer while looking back".to_owned()))
}
