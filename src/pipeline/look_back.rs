//! Late sends look back: the stream forgets ids after its duplicate window, so before a late event is sent the
//! stream itself is asked whether it holds it.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use jiff::Timestamp;
use tokio::time::Instant;

use crate::bus::{Bus, BusError, Start, Wanted};
use crate::envelope::MessageId;

/// Clocks differ: reading starts this much before the event's own time.
const MARGIN: Duration = Duration::from_mins(1);

/// A stream that brings nothing for this long is away.
const PATIENCE: Duration = Duration::from_secs(10);

/// Ids kept from one reading. Of a longer stretch only those that were asked for are kept.
const MOST_IDS: usize = 1_000_000;

/// What the last reading found.
#[derive(Debug, Default)]
pub(super) struct LookBack {
    found: Option<Found>,
}

#[derive(Debug)]
struct Found {
    /// Of the stream that was read.
    identity: String,
    from: Timestamp,
    read_at: Instant,
    positions: HashMap<MessageId, u64>,
    /// Whether every id of the stretch is in `positions`.
    is_complete: bool,
}

impl LookBack {
    /// Makes sure that the stream was read from `from` on, lately enough; `asked` are the ids it is about.
    /// What is read stays good for half of `duplicate_window`: whatever is published after it was read is still
    /// known to the stream for that long.
    pub(super) async fn ensure(
        &mut self,
        bus: &dyn Bus,
        from: Timestamp,
        duplicate_window: Duration,
        asked: &HashSet<MessageId>,
    ) -> Result<(), BusError> {
        let stream = bus.stream();
        let good = self.found.as_ref().is_some_and(|found| {
            stream.as_ref().is_some_and(|stream| stream.identity == found.identity)
                && found.is_complete
                && found.from <= from
                && found.read_at.elapsed() < duplicate_window / 2
        });
        if !good {
            self.found = None;
            self.found = Some(read(bus, from, asked).await?);
        }
        Ok(())
    }

    /// Where the stream holds `id`, as far as was read.
    pub(super) fn position(&self, id: MessageId) -> Option<u64> {
        self.found.as_ref()?.positions.get(&id).copied()
    }
}

async fn read(bus: &dyn Bus, from: Timestamp, asked: &HashSet<MessageId>) -> Result<Found, BusError> {
    let read_at = Instant::now();
    let start =
        Start::Time(from.checked_sub(MARGIN).unwrap_or(Timestamp::UNIX_EPOCH).max(Timestamp::UNIX_EPOCH));
    let mut follower = in_time(bus.follow(start, Wanted::Headers)).await??;
    let identity = follower.identity.clone();
    let mut found = Found { identity, from, read_at, positions: HashMap::new(), is_complete: true };
    loop {
        let Some(batch) = in_time(follower.next()).await? else {
            return Err(BusError::Interrupted("it ended".to_owned()));
        };
        let batch = batch?;
        let is_end = batch.is_end();
        for stored in batch.messages {
            let Some(id) = stored.id else { continue };
            if found.positions.len() < MOST_IDS || asked.contains(&id) {
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
