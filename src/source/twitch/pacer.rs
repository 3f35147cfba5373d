//! So many in any ten seconds and no more: Twitch drops JOINs and logins beyond its limits without a word.
//!
//! What is allowed is *reserved* first and counts as under way until it is known when it went out: the limit is
//! Twitch's, so the moment of sending matters, not that of deciding. Pure: time is an argument.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

/// The span of Twitch's limits; a little more, since the two ends measure it apart.
const SPAN: Duration = Duration::from_millis(10_250);

/// A sliding window.
#[derive(Debug)]
pub(super) struct Pacer {
    most: usize,
    /// Allowed, and not known to be sent.
    reserved: usize,
    /// When the last ones were sent, oldest first.
    sent: VecDeque<Instant>,
}

impl Pacer {
    /// At most `most` in any ten seconds.
    pub(super) fn new(most: usize) -> Self {
        Self { most: most.max(1), reserved: 0, sent: VecDeque::new() }
    }

    /// Allows one, if there is room for it now. Each ends with [`Pacer::sent`] or [`Pacer::unused`].
    pub(super) fn reserve(&mut self, now: Instant) -> bool {
        while self.sent.front().is_some_and(|sent| *sent + SPAN <= now) {
            self.sent.pop_front();
        }
        let is_free = self.sent.len() + self.reserved < self.most;
        self.reserved += usize::from(is_free);
        is_free
    }

    /// So many of those allowed were sent just now.
    pub(super) fn sent(&mut self, count: usize, now: Instant) {
        let count = count.min(self.reserved);
        self.reserved -= count;
        // The reports of two connections may come out of order; the later time is the safe one.
        let at = self.sent.back().map_or(now, |last| now.max(*last));
        self.sent.extend(std::iter::repeat_n(at, count));
    }

    /// So many of those allowed were not sent and never will be.
    pub(super) fn unused(&mut self, count: usize) {
        self.reserved = self.reserved.saturating_sub(count);
    }

    /// When there is room for one; `None`: not before one that is under way is sent.
    pub(super) fn next_free(&self, now: Instant) -> Option<Instant> {
        let surplus = (self.sent.len() + self.reserved).checked_sub(self.most);
        match surplus {
            None => Some(now),
            Some(index) => self.sent.get(index).map(|sent| (*sent + SPAN).max(now)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_window_slides_from_the_moment_of_sending() {
        let mut pacer = Pacer::new(2);
        let start = Instant::now();
        assert!(pacer.reserve(start) && pacer.reserve(start) && !pacer.reserve(start));
        assert_eq!(pacer.next_free(start), None);
        // One is held up for three seconds, the other is never sent.
        let late = start + Duration::from_secs(3);
        pacer.sent(1, late);
        pacer.unused(1);
        assert_eq!(pacer.next_free(late), Some(late));
        assert!(pacer.reserve(late));
        pacer.sent(1, late);
        assert_eq!(pacer.next_free(late), Some(late + SPAN));
        assert!(!pacer.reserve(late + Duration::from_secs(10)) && pacer.reserve(late + SPAN));
    }
}
