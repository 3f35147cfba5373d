//! How long to wait before trying again: doubling, with jitter, up to a limit. The `backoff` crate stays
//! behind this file (see the decision record on dependencies).

use std::time::Duration;

use backoff::ExponentialBackoff;
use backoff::backoff::Backoff as _;

/// Part of the interval by which a wait may be shorter or longer, so that many clients do not come back in
/// step.
const JITTER: f64 = 0.3;

/// A series of waits.
#[derive(Debug)]
pub struct Backoff {
    series: ExponentialBackoff,
    longest: Duration,
}

impl Backoff {
    /// Starts at `first` (±30 %) and doubles; no wait is longer than `longest`.
    pub fn new(first: Duration, longest: Duration) -> Self {
        let mut series = ExponentialBackoff {
            initial_interval: first,
            max_interval: longest,
            multiplier: 2.0,
            randomization_factor: JITTER,
            max_elapsed_time: None,
            ..ExponentialBackoff::default()
        };
        series.reset();
        Self { series, longest }
    }

    /// The next wait. The series never ends: whoever waits decides when to give up.
    pub fn next_wait(&mut self) -> Duration {
        self.series.next_backoff().unwrap_or(self.longest).min(self.longest)
    }

    /// What was tried worked: the next wait is the first one again.
    pub fn reset(&mut self) {
        self.series.reset();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_with_jitter_up_to_the_limit_and_start_over() {
        let mut backoff = Backoff::new(Duration::from_millis(250), Duration::from_secs(5));
        for _ in 0..2 {
            let mut middle = 250.0_f64;
            for _ in 0..12 {
                let wait = backoff.next_wait().as_secs_f64() * 1000.0;
                assert!(
                    wait >= middle * 0.69 && wait <= (middle * 1.31).min(5_000.0),
                    "{wait} near {middle}"
                );
                middle = (middle * 2.0).min(5_000.0);
            }
            backoff.reset();
        }
    }

    #[test]
    fn two_series_do_not_march_in_step() {
        let waits = || {
            let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(30));
            (0..8).map(|_| backoff.next_wait()).collect::<Vec<_>>()
        };
        assert_ne!(waits(), waits());
    }

    #[tokio::test(start_paused = true)]
    async fn ten_failures_take_under_a_minute() {
        let mut backoff = Backoff::new(Duration::from_millis(250), Duration::from_secs(5));
        let start = tokio::time::Instant::now();
        for _ in 0..10 {
            tokio::time::sleep(backoff.next_wait()).await;
        }
        let spent = start.elapsed();
        assert!(spent > Duration::from_secs(20) && spent < Duration::from_mins(1), "{spent:?}");
    }
}
