//! How many messages are due: arithmetic only, so that a late tick catches up and nothing drifts.

use std::time::Duration;

/// A fixed rate, counted from a start: message `n` is due `n / rate` seconds after it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pace {
    per_second: u32,
    done: u64,
}

impl Pace {
    /// `per_second` must not be zero: flat out has no pace.
    pub(super) fn new(per_second: u32) -> Self {
        Self { per_second: per_second.max(1), done: 0 }
    }

    /// How many messages should have been sent by `elapsed` and were not.
    pub(super) fn due(&self, elapsed: Duration) -> u64 {
        let target = elapsed.as_nanos() * u128::from(self.per_second) / 1_000_000_000;
        u64::try_from(target).unwrap_or(u64::MAX).saturating_sub(self.done)
    }

    /// Notes `messages` as sent.
    pub(super) fn sent(&mut self, messages: u64) {
        self.done += messages;
    }

    /// When the next message is due, from the start.
    pub(super) fn next_at(&self) -> Duration {
        let nanos = (u128::from(self.done) + 1) * 1_000_000_000;
        Duration::from_nanos(u64::try_from(nanos.div_ceil(u128::from(self.per_second))).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uneven_ticks_add_up_to_the_exact_rate() {
        for rate in [1, 7, 10, 1_000, 9_999, 10_000, 1_000_000] {
            let mut pace = Pace::new(rate);
            let mut elapsed = Duration::ZERO;
            for step in 1..=40_000_u64 {
                elapsed += Duration::from_micros(1 + step % 501);
                pace.sent(pace.due(elapsed));
            }
            let exact = elapsed.as_nanos() * u128::from(rate) / 1_000_000_000;
            assert_eq!(u128::from(pace.done), exact, "rate {rate}");
        }
    }

    #[test]
    fn the_next_message_is_due_when_it_says() {
        for rate in [1, 3, 7, 9_999] {
            let mut pace = Pace::new(rate);
            for _ in 0..1_000 {
                let at = pace.next_at();
                assert_eq!(pace.due(at), 1);
                assert_eq!(pace.due(at.saturating_sub(Duration::from_nanos(1))), 0);
                pace.sent(1);
            }
        }
    }
}
