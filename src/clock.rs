//! Where the time comes from. Everything that stamps, ages or expires something is handed a [`Clock`], so
//! that a test can step it; nothing else in the crate asks the system for the time of day.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use jiff::Timestamp;

/// The time of day: the system's, or one that a test moves by hand.
#[derive(Clone, Debug, Default)]
pub struct Clock {
    by_hand: Option<Arc<AtomicI64>>,
}

impl Clock {
    /// The system's clock.
    pub fn system() -> Self {
        Self::default()
    }

    /// A clock that stands still at `start` until it is moved.
    pub fn by_hand(start: Timestamp) -> Self {
        Self { by_hand: Some(Arc::new(AtomicI64::new(start.as_millisecond()))) }
    }

    /// Moves a clock made by [`Clock::by_hand`]; the system's clock does not move.
    pub fn step(&self, milliseconds: i64) {
        if let Some(hand) = &self.by_hand {
            hand.fetch_add(milliseconds, Ordering::Relaxed);
        }
    }

    /// Now, in UTC, cut to whole milliseconds: the precision of every time on the wire.
    pub fn now(&self) -> Timestamp {
        let milliseconds = match &self.by_hand {
            Some(hand) => hand.load(Ordering::Relaxed),
            None => system_milliseconds(),
        };
        Timestamp::from_millisecond(milliseconds).unwrap_or(Timestamp::UNIX_EPOCH)
    }
}

/// Unix time in milliseconds, from the system.
#[expect(clippy::disallowed_methods, reason = "the one place that reads the system's clock")]
pub fn system_milliseconds() -> i64 {
    Timestamp::now().as_millisecond()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_by_hand_moves_only_when_stepped() {
        let clock = Clock::by_hand(Timestamp::from_millisecond(1_000).unwrap());
        assert_eq!(clock.now().as_millisecond(), 1_000);
        clock.step(-1_500);
        assert_eq!(clock.now().as_millisecond(), -500);
    }
}
