//! Tells the gaps: notes them, asks the history service for what was missed, if there is one, and brings the gap event
//! to the door, where it waits as long as it takes.
//!
//! It has a task of its own, so that neither a slow service nor a full door holds up live chat.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval, timeout};

use super::backfill::Backfill;
use super::connection::stopped;
use super::gap::Gap;
use super::ledger::{Ledger, Pending};
use super::note::{Note, NoteFile};
use crate::clock::Clock;
use crate::envelope::draft::Healed;
use crate::envelope::{Origin, Receipt};
use crate::errors::ErrorCode;
use crate::pipeline::{Intake, Patience};

/// Up to when channels were heard is noted so often.
const NOTE_EVERY: Duration = Duration::from_secs(1);
/// Gaps dealt with at a time: it bounds the answers of a history service that lie in memory together.
const AT_ONCE: usize = 4;
/// At the end: gaps that are not in the stream by then are told by the next run.
const LAST_WAIT: Duration = Duration::from_secs(1);

/// The teller.
pub(super) struct Heal {
    ledger: Arc<Ledger>,
    file: NoteFile,
    backfill: Option<Backfill>,
    clock: Clock,
}

/// What was last written, and whether that worked: said when it changes.
#[derive(Default)]
struct Written {
    note: Option<Note>,
    has_failed: bool,
}

impl Heal {
    pub(super) fn new(ledger: Arc<Ledger>, file: NoteFile, backfill: Option<Backfill>, clock: Clock) -> Self {
        Self { ledger, file, backfill, clock }
    }

    /// Tells gaps until `finish` becomes true; then those that wait go out as they are.
    pub(super) async fn run(self, intake: Intake, mut finish: watch::Receiver<bool>) {
        let mut written = Written::default();
        let mut working = FuturesUnordered::new();
        let mut tick = interval(NOTE_EVERY);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            if self.ledger.is_behind() {
                self.write_note(&mut written).await;
            }
            while working.len() < AT_ONCE {
                let Some(pending) = self.ledger.take() else { break };
                working.push(self.tell(pending, &intake));
            }
            tokio::select! {
                biased;
                () = stopped(&mut finish) => break,
                Some(()) = working.next() => {}
                () = self.ledger.changed() => self.write_note(&mut written).await,
                _ = tick.tick() => self.write_note(&mut written).await,
            }
        }
        drop(working);
        self.tell_rest(&intake).await;
        self.write_note(&mut written).await;
    }

    /// Writes the note, unless it says nothing new. A disk that does not take it holds up no gap.
    async fn write_note(&self, written: &mut Written) {
        let (note, number) = self.ledger.to_note();
        if written.note.as_ref() != Some(&note) {
            let (file, text) = (self.file.clone(), note.clone());
            let writing = tokio::task::spawn_blocking(move || file.write(&text));
            let result = writing.await.unwrap_or_else(|error| Err(io::Error::other(error)));
            match &result {
                Ok(()) if written.has_failed => {
                    tracing::info!("the note for the next run can be written again");
                }
                Err(error) if !written.has_failed => {
                    tracing::error!(error_code = %ErrorCode::NoteUnusable, error = %error, "the note for the next run cannot be written");
                }
                Ok(()) | Err(_) => {}
            }
            written.has_failed = result.is_err();
            written.note = result.is_ok().then_some(note);
        }
        self.ledger.noted(number);
    }

    /// Brings one gap into the stream, with what can be healed of it before.
    async fn tell(&self, pending: Pending, intake: &Intake) {
        let healed = match &self.backfill {
            Some(backfill) => backfill.heal(&pending.gap, pending.since, intake).await,
            None => None,
        };
        let receipt = Receipt::new();
        self.offer(&[(&pending.gap, healed)], &receipt, intake, Patience::Unlimited).await;
        let outcomes = receipt.all_back().await;
        let Gap { channel, from, to, cause } = &pending.gap;
        let seconds = to.duration_since(*from).as_secs();
        let healed = healed.map(|healed| healed.messages);
        tracing::info!(channel, seconds, cause = ?cause, healed, "the channel was not heard for a while");
        // One that was lost on the way stays in the note for the next run.
        if outcomes.lost + outcomes.refused == 0 {
            self.ledger.told(&pending);
        }
    }

    async fn offer(
        &self,
        gaps: &[(&Gap, Option<Healed>)],
        receipt: &Receipt,
        intake: &Intake,
        patience: Patience,
    ) {
        let draft = |(gap, healed): &(&Gap, Option<Healed>)| {
            let draft = gap.draft(self.ledger.instance(), *healed, &self.clock, receipt.slip());
            draft.inspect_err(|error| tracing::error!(error_code = %ErrorCode::Internal, error = %error, "a gap cannot be written")).ok()
        };
        let drafts = gaps.iter().filter_map(draft).collect();
        intake.offer(Origin::Gap, drafts, patience).await;
    }

    /// The end is near: what is not told yet goes out unhealed, and is struck out if it arrives in time.
    async fn tell_rest(&self, intake: &Intake) {
        let untold = self.ledger.untold();
        if untold.is_empty() {
            return;
        }
        let receipt = Receipt::new();
        let gaps: Vec<_> = untold.iter().map(|pending| (&pending.gap, None)).collect();
        let telling = async {
            self.offer(&gaps, &receipt, intake, Patience::Bounded).await;
            receipt.all_back().await
        };
        match timeout(LAST_WAIT, telling).await {
            Ok(outcomes) if outcomes.lost + outcomes.refused == 0 => {
                for pending in &untold {
                    self.ledger.told(pending);
                }
            }
            Ok(_) | Err(_) => tracing::info!(gaps = untold.len(), "the next run tells these gaps"),
        }
    }
}
