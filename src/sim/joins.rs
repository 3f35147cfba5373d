//! The JOINs of each account: how many came in any ten seconds, and which of them Twitch would let vanish.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use serde::Serialize;
use tokio::time::Instant;

/// The span of Twitch's limit.
const SPAN: Duration = Duration::from_secs(10);
/// JOINs of one span that are told apart, twice what Twitch lets anybody send; of more, so many are counted.
const MAX_IN_SPAN: usize = 4_000;
/// Accounts told apart; those beyond share one place.
const MAX_ACCOUNTS: usize = 1_024;
/// Where accounts beyond the bound are counted.
const OTHERS: &str = "others";

/// The JOINs of one account.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct JoinStats {
    /// JOINs received, each channel of a list as one.
    pub received: u64,
    /// Of these, beyond the limit and therefore not answered.
    pub vanished: u64,
    /// The most received in any 10 s.
    pub most_in_10s: usize,
}

/// What happened in the last ten seconds.
#[derive(Debug, Default)]
struct Window {
    times: VecDeque<Instant>,
}

impl Window {
    /// How many there were in the ten seconds up to `now`.
    fn count(&mut self, now: Instant) -> usize {
        while self.times.front().is_some_and(|&first| now.duration_since(first) >= SPAN) {
            self.times.pop_front();
        }
        self.times.len()
    }

    fn note(&mut self, now: Instant) {
        if self.count(now) < MAX_IN_SPAN {
            self.times.push_back(now);
        }
    }
}

#[derive(Debug, Default)]
struct Account {
    received: Window,
    let_through: Window,
    stats: JoinStats,
}

/// The JOINs of everybody.
#[derive(Debug, Default)]
pub(super) struct JoinBook {
    /// So many JOINs of an account are answered in any ten seconds; 0: all.
    pub(super) limit: u32,
    all: Account,
    accounts: BTreeMap<String, Account>,
}

impl JoinBook {
    /// Notes a JOIN to one channel; false when it vanishes.
    pub(super) fn may_join(&mut self, account: &str, now: Instant) -> bool {
        let limit = usize::try_from(self.limit).unwrap_or(usize::MAX);
        let known = self.accounts.len() < MAX_ACCOUNTS || self.accounts.contains_key(account);
        let name = if known { account } else { OTHERS };
        let account = self.accounts.entry(name.to_owned()).or_default();
        let passes = limit == 0 || account.let_through.count(now) < limit;
        if passes {
            account.let_through.note(now);
        }
        for book in [account, &mut self.all] {
            book.received.note(now);
            book.stats.received += 1;
            book.stats.vanished += u64::from(!passes);
            book.stats.most_in_10s = book.stats.most_in_10s.max(book.received.count(now));
        }
        passes
    }

    /// All accounts together, and each by its name.
    pub(super) fn stats(&self) -> (JoinStats, BTreeMap<String, JoinStats>) {
        let each = self.accounts.iter().map(|(name, account)| (name.clone(), account.stats));
        (self.all.stats, each.collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_window_slides() {
        let mut book = JoinBook { limit: 20, ..JoinBook::default() };
        let start = Instant::now();
        let at = |milliseconds| start + Duration::from_millis(milliseconds);
        for nth in 0..20 {
            assert!(book.may_join("one", at(nth * 100)));
        }
        assert!(!book.may_join("one", at(9_999)));
        assert!(book.may_join("two", at(9_999)), "each account by itself");
        assert!(book.may_join("one", at(10_000)), "the first was ten seconds ago");
        assert!(!book.may_join("one", at(10_099)));
        let (all, each) = book.stats();
        assert_eq!(each["one"], JoinStats { received: 23, vanished: 2, most_in_10s: 22 });
        assert_eq!(all, JoinStats { received: 24, vanished: 2, most_in_10s: 23 });
    }

    #[test]
    fn without_a_limit_all_pass_and_are_counted() {
        let mut book = JoinBook::default();
        let now = Instant::now();
        assert!((0..MAX_IN_SPAN + 10).all(|_| book.may_join("one", now)));
        assert_eq!(book.stats().0.most_in_10s, MAX_IN_SPAN);
        assert!((0..MAX_ACCOUNTS + 10).all(|nth| book.may_join(&nth.to_string(), now)));
        assert_eq!(book.stats().1.len(), MAX_ACCOUNTS + 1);
    }
}
