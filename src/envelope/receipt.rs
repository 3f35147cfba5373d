//! A receipt for events that somebody waits for: each carries a slip, and a slip that is gone without an outcome
//! counts as lost. So the wait always ends.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::Notify;

/// What became of an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// In the stream.
    Published,
    /// In the outbox, from where it gets into the stream.
    Stored,
    /// Known at the door, or in the stream already.
    Duplicate,
    /// A dead letter.
    DeadLettered,
    /// Not let in.
    Refused,
    /// Not let in, because its user is ignored or forgotten.
    Barred,
}

/// Counts the outcomes of the events it gave slips to.
#[derive(Debug, Default)]
pub struct Receipt {
    counts: Arc<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    given: AtomicU64,
    published: AtomicU64,
    stored: AtomicU64,
    duplicates: AtomicU64,
    dead_lettered: AtomicU64,
    refused: AtomicU64,
    barred: AtomicU64,
    lost: AtomicU64,
    came_back: Notify,
}

/// One event's part of a receipt.
#[derive(Debug)]
pub struct Slip {
    counts: Arc<Counts>,
    outcome: Option<Outcome>,
}

/// The counts of a receipt.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Outcomes {
    /// Events taken in.
    pub received: u64,
    /// In the stream now.
    pub published: u64,
    /// In the outbox, because the stream was away: they get there by themselves.
    #[serde(default)]
    pub stored: u64,
    /// There before.
    pub duplicates: u64,
    /// Dead letters.
    pub dead_lettered: u64,
    /// Not let in.
    pub refused: u64,
    /// Not let in, because their users are ignored or forgotten.
    #[serde(default)]
    pub barred: u64,
    /// Let in, and the service ended before it was settled.
    pub lost: u64,
}

impl Outcomes {
    /// Events that are in the stream because of this, or will be.
    pub fn accepted(&self) -> u64 {
        self.published + self.stored
    }
}

impl Receipt {
    /// Of nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// For one more event.
    pub fn slip(&self) -> Slip {
        self.counts.given.fetch_add(1, Ordering::Relaxed);
        Slip { counts: Arc::clone(&self.counts), outcome: None }
    }

    /// Waits until every slip has come back.
    pub async fn all_back(&self) -> Outcomes {
        loop {
            let came_back = self.counts.came_back.notified();
            let outcomes = self.outcomes();
            let back = outcomes.published
                + outcomes.stored
                + outcomes.duplicates
                + outcomes.dead_lettered
                + outcomes.refused
                + outcomes.barred
                + outcomes.lost;
            if back == outcomes.received {
                return outcomes;
            }
            came_back.await;
        }
    }

    fn outcomes(&self) -> Outcomes {
        let of = |count: &AtomicU64| count.load(Ordering::Acquire);
        Outcomes {
            received: of(&self.counts.given),
            published: of(&self.counts.published),
            stored: of(&self.counts.stored),
            duplicates: of(&self.counts.duplicates),
            dead_lettered: of(&self.counts.dead_lettered),
            refused: of(&self.counts.refused),
            barred: of(&self.counts.barred),
            lost: of(&self.counts.lost),
        }
    }
}

impl Slip {
    /// The event came to its end.
    pub fn settle(mut self, outcome: Outcome) {
        self.outcome = Some(outcome);
    }
}

impl Drop for Slip {
    fn drop(&mut self) {
        let count = match self.outcome {
            Some(Outcome::Published) => &self.counts.published,
            Some(Outcome::Stored) => &self.counts.stored,
            Some(Outcome::Duplicate) => &self.counts.duplicates,
            Some(Outcome::DeadLettered) => &self.counts.dead_lettered,
            Some(Outcome::Refused) => &self.counts.refused,
            Some(Outcome::Barred) => &self.counts.barred,
            None => &self.counts.lost,
        };
        count.fetch_add(1, Ordering::Release);
        self.counts.came_back.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_wait_ends_when_every_slip_is_back_however_it_came() {
        let receipt = Receipt::new();
        let slips: Vec<_> = (0..7).map(|_| receipt.slip()).collect();
        let outcomes = [
            Some(Outcome::Published),
            Some(Outcome::Stored),
            Some(Outcome::Duplicate),
            Some(Outcome::DeadLettered),
            Some(Outcome::Refused),
            Some(Outcome::Barred),
            None,
        ];
        let settling = async {
            for (slip, outcome) in slips.into_iter().zip(outcomes) {
                tokio::task::yield_now().await;
                match outcome {
                    Some(outcome) => slip.settle(outcome),
                    None => drop(slip),
                }
            }
        };
        let (all, ()) = tokio::join!(receipt.all_back(), settling);
        let expected = Outcomes {
            received: 7,
            published: 1,
            stored: 1,
            duplicates: 1,
            dead_lettered: 1,
            refused: 1,
            barred: 1,
            lost: 1,
        };
        assert_eq!(all, expected);
    }
}
