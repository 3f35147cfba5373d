//! Captured lines, through the same path as live ones. Idempotent: ids are the lines' own, and late sends look
//! back in the stream, so a second run publishes nothing new, however late.

use std::io;
use std::time::Instant;

use tokio::io::{AsyncRead, AsyncReadExt as _};

use super::normalize::{Normalizer, Reading, TakenIn};
use super::lines::Lines;
use crate::clock::Clock;
use crate::envelope::{Draft, Origin};
use crate::pipeline::{Intake, Offered, Patience};

/// Lines brought to the door at a time.
const BATCH: usize = 256;
const READ_BYTES: usize = 64 * 1024;

/// Feeds the lines of `input` to the door, and waits there as long as it takes.
pub async fn replay(
    mut input: impl AsyncRead + Unpin,
    normalizer: &Normalizer,
    intake: &Intake,
    clock: &Clock,
) -> io::Result<Offered> {
    let mut lines = Lines::new();
    let mut total = Offered::default();
    let mut drafts = Vec::with_capacity(BATCH);
    loop {
        lines.buffer().reserve(READ_BYTES);
        let read = input.read_buf(lines.buffer()).await?;
        let taken_in = TakenIn { at: clock.now(), instant: Instant::now() };
        while let Some(line) = lines.next_line().or_else(|| if read == 0 { lines.last_line() } else { None }) {
            if let Reading::Draft(draft) = normalizer.read(line, taken_in) {
                drafts.push(*draft);
            }
            if drafts.len() == BATCH {
                offer(std::mem::take(&mut drafts), intake, &mut total).await;
            }
        }
        if read == 0 {
            break;
        }
    }
    offer(drafts, intake, &mut total).await;
    Ok(total)
}

async fn offer(drafts: Vec<Draft>, intake: &Intake, total: &mut Offered) {
    let offered = intake.offer(Origin::Replay, drafts, Patience::Unlimited).await;
    total.admitted += offered.admitted;
    total.duplicates += offered.duplicates;
    total.refused += offered.refused;
}
