//! Moves messages from their source to the connections, at the pace asked for.
//!
//! The clock starts at the first JOIN, so nobody misses the beginning. A reader that falls behind slows everybody; at
//! a fixed rate it is cut after [`PATIENCE`], as Twitch does with a connection whose send queue does not drain.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{mpsc, watch};
use tokio::task::yield_now;
use tokio::time::{Instant, sleep_until};

use super::chat::Chat;
use super::hub::{Hub, reaches};
use super::lines::{Chunk, Lines, without_tags};
use super::pace::Pace;
use super::queue::Pushed;
use super::replay::Replay;
use super::sent::Note;

/// How long a full queue is waited for at a fixed rate.
const PATIENCE: Duration = Duration::from_secs(10);
/// Messages made at a time; some 280 KB.
const BATCH: u64 = 512;
/// The shortest wait between two batches at a fixed rate.
const TICK: Duration = Duration::from_millis(1);

/// Where messages come from.
pub(super) enum Feed {
    Chat(Box<Chat>),
    Replay(Box<Replay>),
}

/// The pump. Built once, run once.
pub(super) struct Pump {
    pub(super) feed: Feed,
    pub(super) hub: Arc<Hub>,
    pub(super) log: Option<mpsc::Sender<Note>>,
    /// Messages per second over all channels; 0: as fast as they are read.
    pub(super) rate: u32,
    /// How many to make; `None`: no end (a replay ends with its file).
    pub(super) count: Option<u64>,
    pub(super) now: fn() -> i64,
}

impl Pump {
    /// Runs until the last message is queued or `stop` says so.
    pub(super) async fn run(mut self, mut stop: watch::Receiver<bool>) -> io::Result<()> {
        tokio::select! {
            () = reaches(&mut stop, |&stop| stop) => Ok(()),
            ended = self.pump() => ended,
        }
    }

    async fn pump(&mut self) -> io::Result<()> {
        let mut readers = self.hub.readers();
        let mut paused = self.hub.paused.subscribe();
        let mut lines = Lines::default();
        let mut left = self.count.unwrap_or(u64::MAX);
        let mut pace = Pace::new(self.rate);
        reaches(&mut readers, |&readers| readers > 0).await;
        let mut start = Instant::now();
        while left > 0 {
            if *paused.borrow() {
                let since = Instant::now();
                reaches(&mut paused, |&paused| !paused).await;
                start += since.elapsed();
            }
            let due = if self.rate == 0 {
                reaches(&mut readers, |&readers| readers > 0).await;
                BATCH
            } else {
                pace.due(start.elapsed()).min(BATCH)
            };
            let wanted = due.min(left);
            if wanted == 0 {
                sleep_until((start + pace.next_at()).max(Instant::now() + TICK)).await;
                continue;
            }
            let made = self.fill(wanted, &mut lines)?;
            pace.sent(made);
            left -= made;
            self.hub.generated.fetch_add(made, Ordering::Relaxed);
            for chunk in lines.drain() {
                self.deliver(chunk).await;
            }
            if made < wanted {
                break;
            }
            yield_now().await;
        }
        tracing::info!(generated = self.hub.generated.load(Ordering::Relaxed), "all messages are sent");
        Ok(())
    }

    fn fill(&mut self, wanted: u64, lines: &mut Lines) -> io::Result<u64> {
        let now = (self.now)().to_string();
        match &mut self.feed {
            Feed::Chat(chat) => {
                chat.fill(usize::try_from(wanted).unwrap_or(usize::MAX), &now, lines);
                Ok(wanted)
            }
            Feed::Replay(replay) => replay.fill(wanted, &now, lines),
        }
    }

    /// Queues one channel's lines at everybody in it.
    async fn deliver(&self, chunk: Chunk) {
        let mut bare: Option<Bytes> = None;
        let mut reached = 0;
        for peer in self.hub.members(&chunk.channel) {
            let bytes = if peer.tags.load(Ordering::Relaxed) {
                &chunk.bytes
            } else {
                bare.get_or_insert_with(|| without_tags(&chunk.bytes))
            };
            let patience = (self.rate > 0).then_some(PATIENCE);
            // A place in the log first: between queueing and noting nothing may wait, or a stop could part them.
            let place = self.place().await;
            match peer.queue.push(bytes, patience).await {
                Pushed::Queued => {
                    reached += 1;
                    self.hub.sent.fetch_add(chunk.marks.len() as u64, Ordering::Relaxed);
                    self.note(place, Some(peer.id), &chunk);
                }
                Pushed::Closed => {}
                Pushed::Full => {
                    tracing::warn!(connection = peer.id, "cut a connection that does not read");
                    peer.queue.close();
                }
            }
        }
        if reached == 0 {
            self.note(self.place().await, None, &chunk);
        }
    }

    async fn place(&self) -> Option<mpsc::Permit<'_, Note>> {
        match &self.log {
            Some(log) => log.reserve().await.ok(),
            None => None,
        }
    }

    fn note(&self, place: Option<mpsc::Permit<'_, Note>>, connection: Option<u64>, chunk: &Chunk) {
        if let Some(place) = place {
            place.send(Note::Sent { time: (self.now)(), connection, chunk: chunk.clone() });
        }
    }
}
