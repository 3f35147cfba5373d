//! Captured lines, through the same path as live ones. Idempotent: ids are the lines' own, and late sends look
//! back in the stream, so a second run publishes nothing new, however late.

use std::io;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use tokio::io::{AsyncRead, AsyncReadExt as _};

use super::lines::Lines;
use super::normalize::{Normalizer, Reading, TakenIn};
use crate::clock::Clock;
use crate::envelope::receipt::Outcomes;
use crate::envelope::{Origin, Receipt};
use crate::pipeline::{Intake, Patience};

/// Lines brought to the door at a time.
const BATCH: usize = 256;
const READ_BYTES: usize = 64 * 1024;

/// The way of captured lines into the path. It holds the door open until it is closed itself.
pub struct ReplayDoor {
    intake: Mutex<Option<Intake>>,
    normalizer: Normalizer,
    clock: Clock,
}

impl ReplayDoor {
    /// An open one.
    pub fn new(intake: Intake, normalizer: Normalizer, clock: Clock) -> Self {
        Self {
            intake: Mutex::new(Some(intake)),
            normalizer,
            clock,
        }
    }

    /// Lets go of the door; replays under way still hold it.
    pub fn close(&self) {
        self.intake.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    /// Feeds the lines of `input` to the path and waits until each event has come to its end; `None` when closed.
    pub async fn replay(&self, input: impl AsyncRead + Unpin) -> io::Result<Option<Outcomes>> {
        let intake = self.intake.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let Some(intake) = intake else { return Ok(None) };
        let receipt = Receipt::new();
        feed(input, &self.normalizer, &intake, &self.clock, &receipt).await?;
        drop(intake);
        Ok(Some(receipt.all_back().await))
    }
}

/// Feeds the lines of `input` to the door, and waits there as long as it takes. What becomes of each event is
/// told to `receipt`.
async fn feed(
    mut input: impl AsyncRead + Unpin,
    normalizer: &Normalizer,
    intake: &Intake,
    clock: &Clock,
    receipt: &Receipt,
) -> io::Result<()> {
    let mut lines = Lines::new();
    let mut drafts = Vec::with_capacity(BATCH);
    loop {
        lines.buffer().reserve(READ_BYTES);
        let read = input.read_buf(lines.buffer()).await?;
        let taken_in = TakenIn {
            at: clock.now(),
            instant: Instant::now(),
        };
        while let Some(line) = lines
            .next_line()
            .or_else(|| if read == 0 { lines.last_line() } else { None })
        {
            if let Reading::Draft(mut draft) = normalizer.read(line, taken_in) {
                draft.slip = Some(receipt.slip());
                drafts.push(*draft);
            }
            if drafts.len() == BATCH {
                intake
                    .offer(Origin::Replay, std::mem::take(&mut drafts), Patience::Unlimited)
                    .await;
            }
        }
        if read == 0 {
            intake.offer(Origin::Replay, drafts, Patience::Unlimited).await;
            return Ok(());
        }
    }
}
