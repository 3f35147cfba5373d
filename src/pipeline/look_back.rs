//! Late sends look back: the stream forgets ids after its duplicate window, so before a late event is sent the
//! stream itself is asked whether it holds it.
//!
//! What was read once is not read again: a reading goes on where the last one stood, up to the stream's head as it was
//! when it began. So a stream that takes longer to read than a result is good for is caught up with all the same.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use jiff::Timestamp;
use tokio::time::Instant;

use super::enrich::Enriched;
use crate::bus::{Batch, Bus, BusError, Start, Wanted};
use crate::envelope::MessageId;

/// Clocks differ: reading starts this much before the event's own time.
const MARGIN: Duration = Duration::from_mins(1);

/// A stream that brings nothing for this long is away.
const PATIENCE: Duration = Duration::from_secs(10);

/// A reading of another stream than the expected one is not repeated for so long.
const AT_ODDS: Duration = Duration::from_secs(1);

/// Ids kept from one reading. Of a longer stretch only those that were asked for are kept.
const MOST_IDS: usize = 1_000_000;

/// Events that the stream may have forgotten the ids of.
pub(super) struct Late {
    /// None of them can be in the stream from before this.
    from: Timestamp,
    ids: HashSet<MessageId>,
    /// What was read before this says nothing of them.
    since: Option<Instant>,
}

impl Late {
    /// All of these; `None` if there are none. With each, the time from which on the stream has to be read for it.
    pub(super) fn all<'a>(events: impl Iterator<Item = (&'a Enriched, Option<Instant>)>) -> Option<Self> {
        let mut late: Option<Self> = None;
        for (event, since) in events {
            let from = event.not_published_before;
            let late = late.get_or_insert_with(|| Self { from, ids: HashSet::new(), since });
            late.from = late.from.min(from);
            late.since = late.since.max(since);
            late.ids.insert(event.message.id);
        }
        late
    }

    /// These, and others that had better be asked for at once.
    pub(super) fn and(mut self, others: Option<Self>) -> Self {
        if let Some(others) = others {
            self.from = self.from.min(others.from);
            self.ids.extend(others.ids);
        }
        self
    }
}

/// What was read, and the reading that is under way.
#[derive(Default)]
pub(super) struct LookBack {
    found: Option<Found>,
    reading: Option<BoxFuture<'static, (Found, Result<(), BusError>)>>,
}

struct Found {
    /// Of the stream that was read.
    identity: Option<String>,
    from: Timestamp,
    /// The positions that were read; `None`: nothing yet.
    stretch: Option<Range<u64>>,
    /// When the last message of the stretch was stored.
    until: Timestamp,
    /// When the stream's head was where the last whole reading ended.
    read_at: Option<Instant>,
    positions: HashMap<MessageId, u64>,
    /// The ids that it was about: whether they were found is known.
    asked: HashSet<MessageId>,
    /// Whether every id of the stretch is in `positions`.
    is_complete: bool,
}

impl LookBack {
    /// Whether the stream was read for these, lately enough. What is read stays good for half of `duplicate_window`:
    /// whatever is published after it was read is still known to the stream for that long.
    pub(super) fn is_good(&self, bus: &dyn Bus, late: &Late, duplicate_window: Duration) -> bool {
        let stream = bus.stream();
        self.found.as_ref().is_some_and(|found| {
            stream.is_some_and(|stream| found.is_of(&stream.identity))
                && found.knows_of(&late.ids)
                && found.from <= late.from
                && found.read_at.is_some_and(|read_at| {
                    read_at.elapsed() < duplicate_window / 2 && Some(read_at) >= late.since
                })
        })
    }

    /// Whether another stream was read just now than the one that the bus is attached to.
    pub(super) fn is_at_odds(&self, bus: &dyn Bus) -> bool {
        self.found.as_ref().is_some_and(|found| {
            found.read_at.is_some_and(|read_at| read_at.elapsed() < AT_ODDS)
                && bus.stream().is_none_or(|stream| !found.is_of(&stream.identity))
        })
    }

    /// Begins to read what is missing of these.
    pub(super) fn begin(&mut self, bus: Arc<dyn Bus>, late: Late) {
        let identity = bus.stream().map(|stream| stream.identity);
        let is_of_use = |found: &Found| {
            // Further on it is shorter to begin there.
            found.identity == identity && found.knows_of(&late.ids) && late.from <= found.until
        };
        let mut found = self.found.take().filter(is_of_use).unwrap_or_else(|| Found::new(late.from));
        if found.is_complete {
            found.asked = late.ids;
        }
        self.reading = Some(
            async move {
                let read = found.read(&*bus, late.from).await;
                (found, read)
            }
            .boxed(),
        );
    }

    /// Whether the stream is being read.
    pub(super) fn is_reading(&self) -> bool {
        self.reading.is_some()
    }

    /// Waits until what was begun is read; for ever if nothing was. Cancel safe.
    pub(super) async fn finished(&mut self) -> Result<(), BusError> {
        let Some(reading) = &mut self.reading else { return std::future::pending().await };
        let (found, read) = reading.await;
        self.reading = None;
        self.found = Some(found);
        read
    }

    /// Where the stream holds `id`, as far as was read.
    pub(super) fn position(&self, id: MessageId) -> Option<u64> {
        self.found.as_ref()?.positions.get(&id).copied()
    }
}

impl Found {
    fn new(from: Timestamp) -> Self {
        Self {
            identity: None,
            from,
            stretch: None,
            until: from,
            read_at: None,
            positions: HashMap::new(),
            asked: HashSet::new(),
            is_complete: true,
        }
    }

    fn is_of(&self, identity: &str) -> bool {
        self.identity.as_deref() == Some(identity)
    }

    /// Whether each of these was found if it is in the stretch.
    fn knows_of(&self, ids: &HashSet<MessageId>) -> bool {
        self.is_complete || self.asked.is_superset(ids)
    }

    /// Reads what lies before the stretch from `from` on, and what has come behind it.
    async fn read(&mut self, bus: &dyn Bus, from: Timestamp) -> Result<(), BusError> {
        let begin =
            Start::Time(from.checked_sub(MARGIN).unwrap_or(Timestamp::UNIX_EPOCH).max(Timestamp::UNIX_EPOCH));
        if let Some(stretch) = self.stretch.clone().filter(|_| from < self.from) {
            let before = self.pass(bus, begin, Some(stretch.start)).await?;
            self.stretch = Some(before.start.min(stretch.start)..stretch.end);
        }
        self.from = self.from.min(from);
        let start = self.stretch.as_ref().map_or(begin, |stretch| Start::Position(stretch.end));
        let noted_at = Instant::now();
        self.pass(bus, start, None).await?;
        self.read_at = Some(noted_at);
        tracing::debug!(%from, ids = self.positions.len(), "looked back in the stream");
        Ok(())
    }

    /// Reads up to `end`; up to the stream's head of now if there is none, and then it is noted how far that came,
    /// should it be broken off. Returns the positions.
    async fn pass(&mut self, bus: &dyn Bus, start: Start, end: Option<u64>) -> Result<Range<u64>, BusError> {
        let mut follower = in_time(bus.follow(start, Wanted::Headers)).await??;
        if self.identity.get_or_insert_with(|| follower.identity.clone()) != &follower.identity {
            return Err(BusError::Interrupted("the stream is another one".to_owned()));
        }
        let is_behind = end.is_none();
        let end = end.unwrap_or(follower.last_position + 1);
        let mut passed: Option<Range<u64>> = None;
        loop {
            let Some(batch) = in_time(follower.next()).await? else {
                return Err(BusError::Interrupted("it ended".to_owned()));
            };
            let batch = batch?;
            let behind = batch.up_to + 1;
            let first = batch.messages.first().map_or(behind, |stored| stored.position);
            let is_end = batch.is_end() || behind >= end;
            self.note(batch);
            let passed = passed.get_or_insert(first..behind);
            passed.end = behind;
            if is_behind {
                self.stretch.get_or_insert(first..behind).end = behind;
            }
            if is_end {
                return Ok(passed.clone());
            }
        }
    }

    fn note(&mut self, batch: Batch) {
        for stored in batch.messages {
            self.until = self.until.max(stored.stored_at);
            let Some(id) = stored.id else { continue };
            if self.positions.len() < MOST_IDS || self.asked.contains(&id) {
                self.positions.entry(id).or_insert(stored.position);
            } else {
                self.is_complete = false;
            }
        }
    }
}

async fn in_time<T>(work: impl Future<Output = T>) -> Result<T, BusError> {
    tokio::time::timeout(PATIENCE, work)
        .await
        .map_err(|_| BusError::Away("no answer while looking back".to_owned()))
}
