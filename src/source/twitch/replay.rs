//! Captured lines, through the same path as live ones. Idempotent: ids are the lines' own, and late sends look
//! back in the stream, so a second run publishes nothing new, however late.

use std::io;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::sync::watch;

use super::lines::Lines;
use super::normalize::{Normalizer, Reading, TakenIn};
use crate::clock::Clock;
use crate::envelope::receipt::Outcomes;
use crate::envelope::{Draft, Origin, Receipt};
use crate::pipeline::{Intake, Patience};

/// Lines brought to the door at a time.
const BATCH: usize = 256;
const READ_BYTES: usize = 64 * 1024;

/// The way of captured lines into the path. It holds the door open until it is closed itself.
pub struct ReplayDoor {
    intake: Mutex<Option<Intake>>,
    normalizer: Normalizer,
    clock: Clock,
    closed: watch::Sender<bool>,
}

impl ReplayDoor {
    /// An open one.
    pub fn new(intake: Intake, normalizer: Normalizer, clock: Clock) -> Self {
        Self { intake: Mutex::new(Some(intake)), normalizer, clock, closed: watch::Sender::new(false) }
    }

    /// Lets go of the door. Replays under way read no further.
    pub fn close(&self) {
        self.closed.send_replace(true);
        self.intake.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    /// Feeds the lines of `input` to the path and waits until each event has come to its end; `None` when closed
    /// before all was read.
    pub async fn replay(&self, input: impl AsyncRead + Unpin) -> io::Result<Option<Outcomes>> {
        let intake = self.intake.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let Some(intake) = intake else { return Ok(None) };
        let receipt = Receipt::new();
        let is_whole = self.feed(input, &intake, &receipt).await?;
        drop(intake);
        let outcomes = receipt.all_back().await;
        Ok(is_whole.then_some(outcomes))
    }

    /// Feeds the lines of `input` to the door, and waits there as long as it takes. False: closed meanwhile.
    async fn feed(
        &self,
        mut input: impl AsyncRead + Unpin,
        intake: &Intake,
        receipt: &Receipt,
    ) -> io::Result<bool> {
        let mut closed = self.closed.subscribe();
        let mut lines = Lines::new();
        let mut drafts = Vec::with_capacity(BATCH);
        loop {
            lines.buffer().reserve(READ_BYTES);
            let read = tokio::select! {
                read = input.read_buf(lines.buffer()) => read?,
                () = async { drop(closed.wait_for(|closed| *closed).await) } => return Ok(false),
            };
            let taken_in = TakenIn { at: self.clock.now(), instant: Instant::now() };
            while let Some(line) =
                lines.next_line().or_else(|| if read == 0 { lines.last_line() } else { None })
            {
                if let Reading::Draft(mut draft) = self.normalizer.read(line, taken_in) {
                    draft.slip = Some(receipt.slip());
                    drafts.push(*draft);
                }
                if drafts.len() == BATCH && !self.offer(std::mem::take(&mut drafts), intake).await {
                    return Ok(false);
                }
            }
            if read == 0 {
                return Ok(self.offer(drafts, intake).await);
            }
        }
    }

    /// Waits at the door. False: closed meanwhile. Whoever went on waiting would hold the door open, and with it the
    /// whole path.
    async fn offer(&self, drafts: Vec<Draft>, intake: &Intake) -> bool {
        let mut closed = self.closed.subscribe();
        tokio::select! {
            _ = intake.offer(Origin::Replay, drafts, Patience::Unlimited) => true,
            _ = closed.wait_for(|closed| *closed) => false,
        }
    }
}
