//! Up to when each channel was heard, and the gaps that are to be told.
//!
//! A gap is noted in `DATA_DIR` before it is told, and struck out when it is in the stream: so none is lost in a
//! crash. One waits per channel, beside those of the last run: a further interruption while an earlier gap of that
//! channel still waits is told with it, which bounds what waits by the number of channels.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use jiff::Timestamp;
use tokio::sync::Notify;
use tokio::time::Instant;
use uuid::Uuid;

use super::gap::Gap;
use super::note::Note;
use crate::envelope::draft::GapCause;

/// When a connection's last line was read.
#[derive(Debug)]
pub(super) struct Mark(AtomicI64);

impl Mark {
    pub(super) fn new(at: Timestamp) -> Self {
        Self(AtomicI64::new(at.as_millisecond()))
    }

    pub(super) fn set(&self, at: Timestamp) {
        self.0.store(at.as_millisecond(), Ordering::Relaxed);
    }

    pub(super) fn get(&self) -> Timestamp {
        Timestamp::from_millisecond(self.0.load(Ordering::Relaxed)).unwrap_or(Timestamp::UNIX_EPOCH)
    }
}

/// Up to when a channel was heard.
#[derive(Debug)]
enum Heard {
    /// Not yet, and nothing is missing: it is new.
    Never,
    /// Until then, and not since, for this reason.
    Until(Timestamp, GapCause),
    /// Without interruption, on the connection of this mark.
    Now(Arc<Mark>),
}

#[derive(Debug)]
struct Channel {
    heard: Heard,
    /// Since when it is wanted; `None`: as long as anybody can tell.
    since: Option<Timestamp>,
    /// When this run first heard it.
    first: Option<Timestamp>,
}

/// A gap on its way into the stream.
#[derive(Debug, Clone)]
pub(super) struct Pending {
    number: u64,
    pub(super) gap: Gap,
    /// Since when it is on its way.
    pub(super) since: Instant,
    /// A run before may have told it: it stays as it is.
    is_old: bool,
}

#[derive(Debug)]
struct State {
    channels: BTreeMap<String, Channel>,
    /// What the last run noted, of channels that are not wanted yet: the list may not be read yet.
    past: BTreeMap<String, Timestamp>,
    /// Up to when somebody heard whatever was wanted, by the stream's last message.
    before: Option<Timestamp>,
    waiting: VecDeque<Pending>,
    /// Being dealt with.
    in_hand: Vec<Pending>,
    last_number: u64,
    /// Gaps up to this number are in the note.
    noted: u64,
}

/// The ledger.
#[derive(Debug)]
pub(super) struct Ledger {
    instance: String,
    /// Whether a run before left a note.
    has_past: bool,
    state: Mutex<State>,
    changed: Notify,
}

impl Ledger {
    /// Of no channel yet, with what the last run noted.
    pub(super) fn new(note: Option<Note>) -> Self {
        // A run that was killed before it heard anything leaves a note that says nothing.
        let has_past = note.as_ref().is_some_and(|note| !note.channels.is_empty());
        let random = || Uuid::new_v4().simple().to_string();
        let note = note.unwrap_or_else(|| Note::new(random(), BTreeMap::new(), Vec::new()));
        let mut state = State {
            channels: BTreeMap::new(),
            past: note.channels,
            before: None,
            waiting: VecDeque::new(),
            in_hand: Vec::new(),
            last_number: 0,
            noted: 0,
        };
        for gap in note.gaps {
            state.push(gap, true);
        }
        Self { instance: note.instance, has_past, state: Mutex::new(state), changed: Notify::new() }
    }

    /// The channel is wanted since `since` (`None`: as long as anybody can tell), known as `former` before. What was
    /// missed before that is no gap.
    pub(super) fn want(&self, name: &str, since: Option<Timestamp>, former: Option<&str>) {
        let mut state = self.state();
        let noted = state.past.remove(name);
        let until = noted.or_else(|| state.past.remove(former?)).or(state.before);
        let until = until.filter(|until| since.is_none_or(|since| since <= *until));
        let heard = until.map_or(Heard::Never, |until| Heard::Until(until, GapCause::Restart));
        state.channels.entry(name.to_owned()).or_insert(Channel { heard, since, first: None });
    }

    /// The channel is not wanted any more. What was missed of it so far is still told.
    pub(super) fn forget(&self, name: &str) {
        self.state().channels.remove(name);
    }

    /// The channel has another name now. The platform was silent under the old one for some time: since `last_said`, if
    /// something was said in it.
    pub(super) fn renamed(&self, name: &str, new_name: &str, last_said: Option<Timestamp>) {
        let mut state = self.state();
        let Some(mut channel) = state.channels.remove(name) else { return };
        if let Heard::Now(mark) = &channel.heard {
            let from = last_said.or(channel.first).unwrap_or_else(|| mark.get());
            channel.heard = Heard::Until(from, GapCause::Renamed);
        }
        state.channels.entry(new_name.to_owned()).or_insert(channel);
    }

    /// All channels that are wanted now are known: what was noted of others is of no use any more.
    pub(super) fn all_are_wanted(&self) {
        self.state().past.clear();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Random, the same for all runs on one `DATA_DIR`.
    pub(super) fn instance(&self) -> &str {
        &self.instance
    }

    /// Whether a run before noted what it heard. Without that the stream's last message says since when there is a gap.
    pub(super) fn has_past(&self) -> bool {
        self.has_past
    }

    /// The stream's last message is from `last`: before this run, which began at `started`, somebody heard every
    /// channel up to then.
    pub(super) fn heard_before(&self, last: Timestamp, started: Timestamp) {
        let until = last.min(started);
        let mut state = self.state();
        state.before = Some(until);
        let mut missed = Vec::new();
        for (name, channel) in &mut state.channels {
            // One that is newer was heard by nobody.
            if channel.since.is_some_and(|since| since > until) {
                continue;
            }
            match (channel.first, &channel.heard) {
                (Some(to), _) => {
                    let (channel, cause) = (name.clone(), GapCause::Restart);
                    missed.push(Gap { channel, from: until.min(to), to, cause });
                }
                (None, Heard::Never) => channel.heard = Heard::Until(until, GapCause::Restart),
                (None, Heard::Until(..) | Heard::Now(_)) => {}
            }
        }
        for gap in missed {
            state.push(gap, false);
        }
        drop(state);
        self.changed.notify_one();
    }

    /// The channel is heard since `at` on the connection of `mark`, or goes on being heard on another one.
    pub(super) fn heard(&self, name: &str, at: Timestamp, mark: &Arc<Mark>) {
        let mut state = self.state();
        let Some(channel) = state.channels.get_mut(name) else { return };
        channel.first.get_or_insert(at);
        let before = std::mem::replace(&mut channel.heard, Heard::Now(Arc::clone(mark)));
        match before {
            // A clock may have been set back meanwhile.
            Heard::Until(from, cause) => {
                state.push(Gap { channel: name.to_owned(), from: from.min(at), to: at, cause }, false);
            }
            // To be noted at once: a run that ends before the next note would not know of it.
            Heard::Never => {}
            Heard::Now(_) => return,
        }
        drop(state);
        self.changed.notify_one();
    }

    /// The channel is not heard any more.
    pub(super) fn unheard(&self, name: &str, cause: GapCause) {
        let mut state = self.state();
        if let Some(channel) = state.channels.get_mut(name)
            && let Heard::Now(mark) = &channel.heard
        {
            channel.heard = Heard::Until(mark.get(), cause);
        }
    }

    /// What is to be noted now. Say [`Ledger::noted`] with the number when it is.
    pub(super) fn to_note(&self) -> (Note, u64) {
        let state = self.state();
        let until = |channel: &Channel| match &channel.heard {
            Heard::Never => None,
            Heard::Until(until, _) => Some(*until),
            Heard::Now(mark) => Some(mark.get()),
        };
        let channels =
            state.channels.iter().filter_map(|(name, channel)| Some((name.clone(), until(channel)?)));
        let past = state.past.iter().map(|(name, until)| (name.clone(), *until));
        let channels = past.chain(channels);
        let gaps = state.in_hand.iter().chain(&state.waiting).map(|pending| pending.gap.clone());
        (Note::new(self.instance.clone(), channels.collect(), gaps.collect()), state.last_number)
    }

    /// The note with this number is written.
    pub(super) fn noted(&self, number: u64) {
        let mut state = self.state();
        state.noted = state.noted.max(number);
    }

    /// Whether a gap waits that is not noted yet.
    pub(super) fn is_behind(&self) -> bool {
        let state = self.state();
        state.waiting.iter().any(|pending| pending.number > state.noted)
    }

    /// The next gap to be told, among those that are noted.
    pub(super) fn take(&self) -> Option<Pending> {
        let mut state = self.state();
        let noted = state.noted;
        let pending = state.waiting.pop_front_if(|pending| pending.number <= noted)?;
        state.in_hand.push(pending.clone());
        Some(pending)
    }

    /// It is in the stream.
    pub(super) fn told(&self, told: &Pending) {
        self.state().in_hand.retain(|pending| pending.number != told.number);
    }

    /// All that are not in the stream as far as is known.
    pub(super) fn untold(&self) -> Vec<Pending> {
        let state = self.state();
        state.in_hand.iter().chain(&state.waiting).cloned().collect()
    }

    /// Waits until there is another gap, or a channel that is heard for the first time.
    pub(super) async fn changed(&self) {
        self.changed.notified().await;
    }
}

impl State {
    fn push(&mut self, gap: Gap, is_old: bool) {
        self.last_number += 1;
        let number = self.last_number;
        let mut new = self.waiting.iter_mut().filter(|waiting| !waiting.is_old && !is_old);
        if let Some(waiting) = new.find(|waiting| waiting.gap.channel == gap.channel) {
            waiting.gap.from = waiting.gap.from.min(gap.from);
            waiting.gap.to = waiting.gap.to.max(gap.to);
            waiting.number = number;
            return;
        }
        self.waiting.push_back(Pending { number, gap, since: Instant::now(), is_old });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(1_700_000_000 + second).unwrap()
    }

    /// A ledger of two channels that are wanted as long as anybody can tell.
    fn of_two(note: Option<Note>) -> Ledger {
        let ledger = Ledger::new(note);
        for name in ["a", "b"] {
            ledger.want(name, None, None);
        }
        ledger.all_are_wanted();
        ledger
    }

    fn gap(channel: &str, from: i64, to: i64, cause: GapCause) -> Gap {
        Gap { channel: channel.to_owned(), from: at(from), to: at(to), cause }
    }

    /// Notes and takes all that waits.
    fn taken(ledger: &Ledger) -> Vec<Gap> {
        assert!(ledger.take().is_none() || !ledger.is_behind(), "nothing is told before it is noted");
        ledger.noted(ledger.to_note().1);
        std::iter::from_fn(|| ledger.take()).map(|pending| pending.gap).collect()
    }

    #[test]
    fn a_note_that_names_no_channel_is_none() {
        let empty = Note::new("x".to_owned(), BTreeMap::new(), Vec::new());
        assert!(!of_two(Some(empty)).has_past());
        let ledger = of_two(None);
        ledger.heard("a", at(0), &Arc::new(Mark::new(at(0))));
        assert!(of_two(Some(ledger.to_note().0)).has_past());
    }

    #[tokio::test]
    async fn a_new_channel_has_no_gap_and_an_interrupted_one_has() {
        let ledger = of_two(None);
        let mark = Arc::new(Mark::new(at(0)));
        ledger.heard("a", at(1), &mark);
        ledger.heard("b", at(1), &mark);
        assert!(taken(&ledger).is_empty());
        mark.set(at(7));
        ledger.unheard("a", GapCause::Silence);
        ledger.unheard("a", GapCause::ConnectionLost);
        // b goes on being heard on another connection.
        let other = Arc::new(Mark::new(at(8)));
        ledger.heard("b", at(9), &other);
        ledger.heard("a", at(12), &other);
        assert_eq!(taken(&ledger), [gap("a", 7, 12, GapCause::Silence)]);
        let (note, _) = ledger.to_note();
        assert_eq!(note.channels, BTreeMap::from([("a".to_owned(), at(8)), ("b".to_owned(), at(8))]));
    }

    #[tokio::test]
    async fn a_restart_tells_what_was_noted_and_what_was_not_told() {
        let ledger = of_two(None);
        let mark = Arc::new(Mark::new(at(0)));
        ledger.heard("a", at(1), &mark);
        mark.set(at(5));
        ledger.unheard("a", GapCause::ConnectionLost);
        ledger.heard("a", at(6), &Arc::new(Mark::new(at(6))));
        let untold = taken(&ledger);
        assert_eq!(untold.len(), 1);
        let (note, _) = ledger.to_note();
        let next = of_two(Some(note));
        assert_eq!((next.instance(), next.has_past()), (ledger.instance(), true));
        // What the last run may have told is not told anew with something else.
        next.heard("a", at(20), &mark);
        // b was never heard: it is new.
        next.heard("b", at(20), &mark);
        assert_eq!(taken(&next), [untold, vec![gap("a", 6, 20, GapCause::Restart)]].concat());
        for pending in next.untold() {
            next.told(&pending);
        }
        assert!(next.to_note().0.gaps.is_empty());
    }

    #[tokio::test]
    async fn without_a_note_the_streams_last_message_is_where_a_gap_begins() {
        let mark = Arc::new(Mark::new(at(50)));
        // Known before anything is heard, or only after a was.
        let ledger = of_two(None);
        ledger.heard("a", at(52), &mark);
        ledger.heard_before(at(10), at(49));
        ledger.heard("b", at(55), &mark);
        let expected = [gap("a", 10, 52, GapCause::Restart), gap("b", 10, 55, GapCause::Restart)];
        assert_eq!(taken(&ledger), expected);
        // What this run published itself says nothing of the time before it.
        let ledger = of_two(None);
        ledger.heard("a", at(52), &mark);
        ledger.heard_before(at(60), at(49));
        assert_eq!(taken(&ledger), [gap("a", 49, 52, GapCause::Restart)]);
    }

    #[tokio::test]
    async fn one_gap_waits_per_channel_and_covers_what_it_stands_for() {
        let ledger = of_two(None);
        let mark = Arc::new(Mark::new(at(0)));
        for second in 0..1_000 {
            mark.set(at(second * 10));
            ledger.heard("a", at(second * 10 + 5), &mark);
            ledger.unheard("a", GapCause::ConnectionLost);
        }
        assert_eq!(ledger.untold().len(), 1);
        assert_eq!(taken(&ledger), [gap("a", 0, 9_995, GapCause::ConnectionLost)]);
    }

    #[tokio::test]
    async fn a_channel_that_comes_and_goes_has_no_gap_for_it() {
        let ledger = of_two(None);
        ledger.heard_before(at(10), at(49));
        let mark = Arc::new(Mark::new(at(50)));
        // Added at run time: nobody heard it before.
        ledger.want("c", Some(at(50)), None);
        ledger.heard("c", at(51), &mark);
        ledger.forget("c");
        assert!(!ledger.to_note().0.channels.contains_key("c"));
        ledger.want("c", Some(at(60)), None);
        ledger.heard("c", at(61), &mark);
        assert!(taken(&ledger).is_empty());
        // Added long ago, and only read now from the list: somebody heard it.
        ledger.want("d", Some(at(5)), None);
        ledger.heard("d", at(62), &mark);
        assert_eq!(taken(&ledger), [gap("d", 10, 62, GapCause::Restart)]);
        // What was missed while it was wanted is told after it is not.
        ledger.unheard("d", GapCause::ConnectionLost);
        ledger.heard("d", at(63), &mark);
        ledger.forget("d");
        assert_eq!(taken(&ledger), [gap("d", 50, 63, GapCause::ConnectionLost)]);
    }

    #[tokio::test]
    async fn the_note_is_kept_until_the_list_was_read() {
        let heard = BTreeMap::from([("a", 1), ("b", 2), ("c", 3)].map(|(name, t)| (name.to_owned(), at(t))));
        let ledger = Ledger::new(Some(Note::new("x".to_owned(), heard.clone(), Vec::new())));
        ledger.want("a", None, None);
        assert_eq!(ledger.to_note().0.channels, heard);
        // b was taken out and put in again meanwhile; c is called d now.
        ledger.want("b", Some(at(9)), None);
        ledger.want("d", Some(at(0)), Some("c"));
        ledger.all_are_wanted();
        let mark = Arc::new(Mark::new(at(20)));
        for name in ["a", "b", "d"] {
            ledger.heard(name, at(20), &mark);
        }
        let expected = [gap("a", 1, 20, GapCause::Restart), gap("d", 3, 20, GapCause::Restart)];
        assert_eq!(taken(&ledger), expected);
        assert_eq!(ledger.to_note().0.channels.len(), 3);
    }

    #[tokio::test]
    async fn a_rename_is_a_gap_since_something_was_last_said() {
        let ledger = of_two(None);
        let mark = Arc::new(Mark::new(at(50)));
        ledger.heard("a", at(10), &mark);
        ledger.heard("b", at(11), &mark);
        ledger.renamed("a", "x", Some(at(30)));
        ledger.heard("x", at(60), &mark);
        // Nothing was said in it: since it was joined.
        ledger.renamed("b", "y", None);
        ledger.heard("y", at(61), &mark);
        let expected = [gap("x", 30, 60, GapCause::Renamed), gap("y", 11, 61, GapCause::Renamed)];
        assert_eq!(taken(&ledger), expected);
        // One that was not heard anyway is missed since then.
        ledger.unheard("x", GapCause::Silence);
        ledger.renamed("x", "z", Some(at(31)));
        ledger.heard("z", at(70), &mark);
        assert_eq!(taken(&ledger), [gap("z", 50, 70, GapCause::Silence)]);
    }
}
