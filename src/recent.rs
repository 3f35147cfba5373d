//! What was seen within the last while: a map from 128-bit ids that forgets by age, and never outgrows a
//! limit.
//!
//! Ids are kept in generations; forgetting drops a whole one. That costs 17 bytes an id and no queue beside
//! the map, for the price of remembering up to an eighth longer than asked.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasherDefault, Hasher};
use std::time::Duration;

use jiff::Timestamp;

/// How many generations span the time.
const GENERATIONS: u32 = 8;

/// Ids and what belongs to each.
#[derive(Debug)]
pub struct Recent<V> {
    /// Oldest first.
    generations: VecDeque<Generation<V>>,
    span: Duration,
    most: usize,
    len: usize,
    evicted_early: u64,
}

#[derive(Debug)]
struct Generation<V> {
    opened: Timestamp,
    ids: HashMap<u128, V, BuildHasherDefault<AsItIs>>,
}

impl<V: Copy> Recent<V> {
    /// Remembers for `span`, and at most `most` ids.
    pub fn new(span: Duration, most: usize) -> Self {
        Self { generations: VecDeque::new(), span, most: most.max(1), len: 0, evicted_early: 0 }
    }

    /// What belongs to `id`, if it is remembered.
    pub fn get(&self, id: u128) -> Option<V> {
        self.generations.iter().rev().find_map(|generation| generation.ids.get(&id).copied())
    }

    /// Remembers `id` as of `now`, if it is not remembered already; returns what it already had.
    pub fn insert(&mut self, id: u128, value: V, now: Timestamp) -> Option<V> {
        let known = self.get(id);
        if known.is_none() {
            self.make_room(now);
            if let Some(newest) = self.generations.back_mut() {
                newest.ids.insert(id, value);
                self.len += 1;
            }
        }
        known
    }

    /// Forgets what is older than the span.
    pub fn forget_old(&mut self, now: Timestamp) {
        // A generation is as old as its youngest id: the opening of the next one.
        while self.generations.get(1).is_some_and(|next| age(next.opened, now) > self.span) {
            self.drop_oldest();
        }
        if self.generations.len() == 1
            && self.generations.front().is_some_and(|g| age(g.opened, now) > self.span * 2)
        {
            self.drop_oldest();
        }
    }

    /// How many are remembered.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing is remembered.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// How many were forgotten before their time, because of the limit.
    pub fn evicted_early(&self) -> u64 {
        self.evicted_early
    }

    fn make_room(&mut self, now: Timestamp) {
        let generations = GENERATIONS as usize;
        let is_due = self.generations.back().is_none_or(|newest| {
            age(newest.opened, now) >= self.span / GENERATIONS
                || newest.ids.len() >= self.most.div_ceil(generations)
        });
        if is_due {
            self.forget_old(now);
            self.generations.push_back(Generation { opened: now, ids: HashMap::default() });
        }
        while self.len >= self.most {
            self.evicted_early += self.drop_oldest() as u64;
        }
    }

    fn drop_oldest(&mut self) -> usize {
        let dropped = self.generations.pop_front().map_or(0, |generation| generation.ids.len());
        self.len -= dropped;
        dropped
    }
}

fn age(since: Timestamp, now: Timestamp) -> Duration {
    Duration::try_from(now.duration_since(since)).unwrap_or(Duration::ZERO)
}

/// The ids are the output of a hash already.
#[derive(Default)]
struct AsItIs(u64);

impl Hasher for AsItIs {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.0 ^= u64::from_le_bytes(word);
        }
    }

    #[expect(clippy::cast_possible_truncation, reason = "both halves are used")]
    fn write_u128(&mut self, id: u128) {
        // UUIDs have fixed bits in the middle of each half; the mix of both has none.
        self.0 = (id >> 64) as u64 ^ (id as u64).rotate_left(32);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(1_700_000_000 + seconds).unwrap()
    }

    #[test]
    fn ids_are_known_for_the_span_and_forgotten_soon_after() {
        let mut recent = Recent::new(Duration::from_secs(80), 1_000);
        for second in 0..400 {
            let id = u128::try_from(second).unwrap();
            assert_eq!(recent.insert(id, second, at(second)), None);
            for back in 0..=80.min(second) {
                assert_eq!(recent.get(u128::try_from(second - back).unwrap()), Some(second - back));
            }
            assert!(recent.len() <= 80 + 22, "{}", recent.len());
        }
        assert_eq!(recent.insert(399, 7, at(400)), Some(399));
        assert_eq!(recent.evicted_early(), 0);
        recent.forget_old(at(4_000));
        assert!(recent.is_empty());
    }

    #[test]
    fn the_limit_holds_and_early_forgetting_is_counted() {
        let mut recent = Recent::new(Duration::from_mins(10), 800);
        for id in 0..10_000_u128 {
            recent.insert(id, (), at(0));
            assert!(recent.len() <= 800);
        }
        assert!(recent.get(9_999).is_some() && recent.get(9_300).is_some() && recent.get(0).is_none());
        assert_eq!(recent.evicted_early() + recent.len() as u64, 10_000);
    }

    #[test]
    fn a_clock_that_steps_back_neither_panics_nor_forgets() {
        let mut recent = Recent::new(Duration::from_mins(1), 100);
        recent.insert(1, (), at(100));
        recent.insert(2, (), at(-3_600));
        assert!(recent.get(1).is_some() && recent.get(2).is_some());
    }
}
