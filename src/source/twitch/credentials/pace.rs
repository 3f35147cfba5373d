//! How often Twitch's OAuth is asked: seldom when all is well, more seldom when it is not, and never more than
//! [`MOST_CALLS`] times in five minutes, whatever goes wrong. Pure: time is an argument.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

use crate::retry::Backoff;

/// Calls in any [`SPAN`].
const MOST_CALLS: usize = 6;
/// A little more than five minutes, since the two ends measure it apart.
const SPAN: Duration = Duration::from_secs(305);
/// Waits after a failure.
const FIRST_WAIT: Duration = Duration::from_secs(30);
const LONGEST_WAIT: Duration = Duration::from_mins(5);
/// No wait that the service asks for is longer.
const LONGEST_ASKED: Duration = Duration::from_hours(1);

/// When the next call may be made.
#[derive(Debug)]
pub(super) struct Pace {
    /// When calls were made, oldest first.
    calls: VecDeque<Instant>,
    backoff: Backoff,
    /// Not before then.
    wait_until: Option<Instant>,
}

impl Pace {
    pub(super) fn new() -> Self {
        let backoff = Backoff::new(FIRST_WAIT, LONGEST_WAIT);
        Self { calls: VecDeque::with_capacity(MOST_CALLS), backoff, wait_until: None }
    }

    /// When a call may be made.
    pub(super) fn next_free(&self, now: Instant) -> Instant {
        let oldest = self.calls.front().filter(|_| self.calls.len() >= MOST_CALLS);
        let free = oldest.map_or(now, |call| *call + SPAN);
        free.max(self.wait_until.unwrap_or(now)).max(now)
    }

    /// One is made now.
    pub(super) fn called(&mut self, now: Instant) {
        if self.calls.len() >= MOST_CALLS {
            self.calls.pop_front();
        }
        self.calls.push_back(now);
    }

    /// It failed; returns how long the next one waits. `asked`: as long as the service itself wants.
    pub(super) fn failed(&mut self, now: Instant, asked: Option<Duration>) -> Duration {
        let wait = self.backoff.next_wait().max(asked.unwrap_or_default().min(LONGEST_ASKED));
        self.wait_until = Some(now + wait);
        wait
    }

    /// All is well: nothing has to wait.
    pub(super) fn succeeded(&mut self) {
        self.backoff.reset();
        self.wait_until = None;
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::{sleep, sleep_until};

    use super::*;

    /// The most calls in any five minutes.
    fn most(calls: &[Instant]) -> usize {
        let within = |from: &Instant| {
            calls.iter().filter(|call| *call >= from && **call < *from + Duration::from_mins(5)).count()
        };
        calls.iter().map(within).max().unwrap_or_default()
    }

    #[tokio::test(start_paused = true)]
    async fn failures_are_asked_about_six_times_in_five_minutes_at_most() {
        for _ in 0..50 {
            let (mut pace, mut calls) = (Pace::new(), Vec::new());
            let end = Instant::now() + Duration::from_hours(1);
            while Instant::now() < end {
                sleep_until(pace.next_free(Instant::now())).await;
                calls.push(Instant::now());
                pace.called(Instant::now());
                // An answer that is slow in coming.
                sleep(Duration::from_secs(fastrand::u64(0..5))).await;
                pace.failed(Instant::now(), None);
            }
            let first = calls.iter().filter(|call| **call < calls[0] + Duration::from_mins(5)).count();
            assert!((3..=6).contains(&first) && most(&calls) <= 6, "{first}, {}", most(&calls));
            // And it does not give up.
            assert!(calls.len() >= 10, "{} calls in an hour", calls.len());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn success_that_does_not_last_is_bounded_as_well() {
        let (mut pace, mut calls) = (Pace::new(), Vec::new());
        for _ in 0..100 {
            sleep_until(pace.next_free(Instant::now())).await;
            calls.push(Instant::now());
            pace.called(Instant::now());
            pace.succeeded();
        }
        assert_eq!(most(&calls), MOST_CALLS);
    }

    #[tokio::test(start_paused = true)]
    async fn the_services_own_wait_is_kept_within_reason() {
        let (mut pace, now) = (Pace::new(), Instant::now());
        assert_eq!(pace.failed(now, Some(Duration::from_mins(20))), Duration::from_mins(20));
        assert_eq!(pace.next_free(now), now + Duration::from_mins(20));
        assert_eq!(pace.failed(now, Some(Duration::from_hours(99))), LONGEST_ASKED);
        assert!(pace.failed(now, Some(Duration::ZERO)) > Duration::from_mins(1));
        pace.succeeded();
        assert_eq!(pace.next_free(now), now);
        assert!(pace.failed(now, None) < Duration::from_secs(40));
    }
}
