//! Moves messages from their source to the connections, at the pace asked for.
//!
//! The clock starts at the first JOIN, so nobody misses the beginning. A reader that falls behind slows everybody, until
//! it is cut ([`Delivery`]).

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::yield_now;
use tokio::time::{Instant, sleep_until};

use super::bad_lines::BadLines;
use super::chat::Chat;
use super::delivery::Delivery;
use super::hub::reaches;
use super::lifelike::Lifelike;
use super::lines::Lines;
use super::pace::Pace;
use super::replay::Replay;

/// Messages made at a time; some 280 KB.
const BATCH: u64 = 512;
/// The shortest wait between two batches at a fixed rate.
const TICK: Duration = Duration::from_millis(1);

/// Where messages come from.
pub(super) enum Feed {
    Chat(Box<Chat>),
    Lifelike(Box<Lifelike>),
    Replay(Box<Replay>),
}

impl Feed {
    /// A channel has another name from now on. The lines of a file name their channels themselves.
    fn rename(&mut self, old: &str, new: &str) {
        match self {
            Self::Chat(chat) => chat.rename(old, new),
            Self::Lifelike(chat) => chat.rename(old, new),
            Self::Replay(_) => {}
        }
    }
}

/// The pump. Built once, run once.
pub(super) struct Pump {
    pub(super) feed: Feed,
    pub(super) bad_lines: BadLines,
    pub(super) delivery: Arc<Delivery>,
    /// Messages per second over all channels; 0: as fast as they are read.
    pub(super) rate: u32,
    /// How many to make; `None`: no end (a replay ends with its file).
    pub(super) count: Option<u64>,
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
        let delivery = Arc::clone(&self.delivery);
        let hub = &delivery.hub;
        let mut readers = hub.readers();
        let mut paused = hub.paused.subscribe();
        let mut seen = 0;
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
            for (old, new) in hub.names().take_fresh() {
                self.feed.rename(&old, &new);
            }
            let made = self.fill(wanted, &mut lines)?;
            pace.sent(made);
            left -= made;
            hub.generated.fetch_add(made, Ordering::Relaxed);
            self.bad_lines.mix_in(hub.bad_permille.load(Ordering::Relaxed), made, &mut lines);
            let twice = hub.duplicate_every.load(Ordering::Relaxed);
            for chunk in lines.drain() {
                let chunk = if twice > 0 { chunk.with_copies(twice, &mut seen) } else { chunk };
                delivery.deliver(&chunk, None).await;
            }
            if made < wanted {
                break;
            }
            yield_now().await;
        }
        tracing::info!(generated = hub.generated.load(Ordering::Relaxed), "all messages are sent");
        Ok(())
    }

    fn fill(&mut self, wanted: u64, lines: &mut Lines) -> io::Result<u64> {
        let now = (self.delivery.now)().to_string();
        match &mut self.feed {
            Feed::Chat(chat) => {
                chat.fill(usize::try_from(wanted).unwrap_or(usize::MAX), &now, lines);
                Ok(wanted)
            }
            Feed::Lifelike(chat) => {
                chat.fill(usize::try_from(wanted).unwrap_or(usize::MAX), &now, lines);
                Ok(wanted)
            }
            Feed::Replay(replay) => replay.fill(wanted, &now, lines),
        }
    }
}
