//! Which channel to ask for next, and when. Twitch drops JOINs beyond its limit without a word, so they are
//! paced, each is confirmed by its own answer, and what stays unanswered is asked for again and then reported.
//!
//! Pure: time is an argument.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use serde::Serialize;
use tokio::time::Instant;

use super::metrics::ChannelState;

/// The span of Twitch's limit; a little more, since the two ends measure it apart.
const SPAN: Duration = Duration::from_millis(10_250);

/// How long to wait for the answer to the first JOIN of a channel, the second, …; then it has failed.
const ANSWER_WAITS: [Duration; 4] =
    [Duration::from_secs(10), Duration::from_secs(20), Duration::from_secs(40), Duration::from_secs(10)];

/// How long a failed channel is left alone.
const FAILED_PAUSE: Duration = Duration::from_mins(5);

/// Why a channel cannot be joined.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum JoinFailure {
    /// No answer: usually there is no such channel.
    NoAnswer,
    /// The account is banned there.
    Banned,
    /// The channel is suspended.
    Suspended,
}

/// What is being done about a channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Request {
    /// To be asked for, as the next of this many requests.
    Queued { asked: usize },
    /// Asked for, this many times.
    Asked { asked: usize, answer_due: Instant },
    /// Nothing: it is joined.
    Joined,
    /// Nothing until then.
    Resting { retry_at: Instant },
}

#[derive(Debug)]
struct Channel {
    request: Request,
    /// Kept until the channel is joined after all, over retries and connections: it stays named, and is not waited
    /// for.
    failed: Option<JoinFailure>,
}

/// The channels of one account.
#[derive(Debug)]
pub(super) struct Joins {
    channels: BTreeMap<String, Channel>,
    /// Channels that wait to be asked for, in order.
    queue: VecDeque<String>,
    /// When the last JOINs were sent, over all connections of the account.
    sent: VecDeque<Instant>,
    rate: usize,
}

impl Joins {
    pub(super) fn new(channels: &[String], rate: usize) -> Self {
        Self {
            channels: channels
                .iter()
                .map(|name| (name.clone(), Channel { request: Request::Queued { asked: 0 }, failed: None }))
                .collect(),
            queue: channels.iter().cloned().collect(),
            sent: VecDeque::new(),
            rate,
        }
    }

    /// The connection is gone: everything is to be joined again. The limit does not forget.
    pub(super) fn disconnected(&mut self) {
        self.queue = self.channels.keys().cloned().collect();
        for channel in self.channels.values_mut() {
            channel.request = Request::Queued { asked: 0 };
        }
    }

    /// A JOIN that may be sent now, if there is one. It counts as sent.
    pub(super) fn take_due(&mut self, now: Instant) -> Option<String> {
        self.expire(now);
        if self.next_permit(now) > now {
            return None;
        }
        while let Some(name) = self.queue.pop_front() {
            let Some(channel) = self.channels.get_mut(&name) else { continue };
            let Request::Queued { asked } = channel.request else { continue };
            let wait = ANSWER_WAITS[asked.min(ANSWER_WAITS.len() - 1)];
            channel.request = Request::Asked { asked: asked + 1, answer_due: now + wait };
            self.sent.push_back(now);
            return Some(name);
        }
        None
    }

    /// When [`Joins::take_due`] is worth calling again, if ever.
    pub(super) fn next_due(&self, now: Instant) -> Option<Instant> {
        let changes = self.channels.values().filter_map(|channel| match channel.request {
            Request::Asked { answer_due, .. } => Some(answer_due),
            Request::Resting { retry_at } => Some(retry_at),
            Request::Queued { .. } | Request::Joined => None,
        });
        let permit = (!self.queue.is_empty()).then(|| self.next_permit(now));
        changes.chain(permit).min()
    }

    /// Twitch confirmed the channel; whether that is news.
    pub(super) fn confirmed(&mut self, name: &str) -> bool {
        self.channels.get_mut(name).is_some_and(|channel| {
            channel.failed = None;
            std::mem::replace(&mut channel.request, Request::Joined) != Request::Joined
        })
    }

    /// Twitch refused the channel; whether that is news.
    pub(super) fn refused(&mut self, name: &str, why: JoinFailure, now: Instant) -> bool {
        self.channels.get_mut(name).is_some_and(|channel| {
            channel.request = Request::Resting { retry_at: now + FAILED_PAUSE };
            channel.failed.replace(why) != Some(why)
        })
    }

    /// Twitch put us out of the channel; whether it is one of ours.
    pub(super) fn parted(&mut self, name: &str) -> bool {
        let Some(channel) = self.channels.get_mut(name) else { return false };
        channel.request = Request::Queued { asked: 0 };
        self.queue.push_back(name.to_owned());
        true
    }

    /// Every channel, its state, and why it failed.
    pub(super) fn states(&self) -> impl Iterator<Item = (&str, ChannelState, Option<JoinFailure>)> {
        self.channels.iter().map(|(name, channel)| match (channel.request, channel.failed) {
            (Request::Joined, _) => (name.as_str(), ChannelState::Joined, None),
            (_, Some(why)) => (name.as_str(), ChannelState::Failed, Some(why)),
            (_, None) => (name.as_str(), ChannelState::Wanted, None),
        })
    }

    fn next_permit(&self, now: Instant) -> Instant {
        match self.sent.len().checked_sub(self.rate) {
            Some(index) => self.sent.get(index).map_or(now, |sent| *sent + SPAN),
            None => now,
        }
    }

    fn expire(&mut self, now: Instant) {
        while self.sent.front().is_some_and(|sent| *sent + SPAN <= now) {
            self.sent.pop_front();
        }
        for (name, channel) in &mut self.channels {
            let asked_again = match channel.request {
                Request::Asked { asked, answer_due } if answer_due <= now => {
                    if asked >= ANSWER_WAITS.len() {
                        channel.failed = Some(JoinFailure::NoAnswer);
                        channel.request = Request::Resting { retry_at: now + FAILED_PAUSE };
                        continue;
                    }
                    asked
                }
                // Once more, as the last of its requests.
                Request::Resting { retry_at } if retry_at <= now => ANSWER_WAITS.len() - 1,
                Request::Queued { .. }
                | Request::Asked { .. }
                | Request::Joined
                | Request::Resting { .. } => continue,
            };
            channel.request = Request::Queued { asked: asked_again };
            self.queue.push_back(name.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn names(count: usize) -> Vec<String> {
        (0..count).map(|n| format!("c{n:03}")).collect()
    }

    /// Sends what is due for `span`, answering as `answers` says; returns when each JOIN went out.
    async fn run(
        joins: &mut Joins,
        span: Duration,
        answers: impl Fn(&str) -> bool,
    ) -> Vec<(Instant, String)> {
        let end = Instant::now() + span;
        let mut sent = Vec::new();
        loop {
            while let Some(channel) = joins.take_due(Instant::now()) {
                if answers(&channel) {
                    joins.confirmed(&channel);
                }
                sent.push((Instant::now(), channel));
            }
            match joins.next_due(Instant::now()).filter(|due| *due < end) {
                Some(due) => {
                    tokio::time::sleep_until(due.max(Instant::now() + Duration::from_millis(1))).await;
                }
                None => return sent,
            }
        }
    }

    fn most_in_ten_seconds(sent: &[(Instant, String)]) -> usize {
        let within = |start: Instant| {
            sent.iter().filter(|(at, _)| *at >= start && *at < start + Duration::from_secs(10)).count()
        };
        sent.iter().map(|(at, _)| within(*at)).max().unwrap_or(0)
    }

    #[tokio::test(start_paused = true)]
    async fn joins_are_paced_and_all_confirmed() {
        let mut joins = Joins::new(&names(300), 20);
        let sent = run(&mut joins, Duration::from_mins(10), |_| true).await;
        assert_eq!(sent.len(), 300);
        assert_eq!(most_in_ten_seconds(&sent), 20);
        assert!(joins.states().all(|(_, state, _)| state == ChannelState::Joined));
        assert!(sent[299].0 - sent[0].0 < Duration::from_secs(150));
    }

    #[tokio::test(start_paused = true)]
    async fn what_stays_unanswered_is_asked_for_again_and_then_reported() {
        let start = Instant::now();
        let mut joins = Joins::new(&names(1), 20);
        let sent = run(&mut joins, Duration::from_mins(12), |_| false).await;
        let at: Vec<_> = sent.iter().map(|(at, _)| (*at - start).as_secs()).collect();
        // Failed at 80 s; then every 5 min, each time with 10 s to answer.
        assert_eq!(at, [0, 10, 30, 70, 380, 690]);
        assert!(
            joins.states().all(|(_, state, why)| {
                state == ChannelState::Failed && why == Some(JoinFailure::NoAnswer)
            })
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_refusal_is_kept_and_an_answer_after_all_counts() {
        let mut joins = Joins::new(&names(2), 20);
        let now = Instant::now();
        assert!(joins.take_due(now).is_some() && joins.take_due(now).is_some());
        assert!(joins.refused("c000", JoinFailure::Banned, now));
        assert!(joins.confirmed("c001") && !joins.confirmed("c001") && !joins.confirmed("elsewhere"));
        let states: Vec<_> = joins.states().collect();
        assert_eq!(states[0], ("c000", ChannelState::Failed, Some(JoinFailure::Banned)));
        assert!(joins.confirmed("c000"));
        assert!(joins.parted("c001"));
        assert_eq!(joins.take_due(now).as_deref(), Some("c001"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_failed_channel_stays_named_over_retries_and_connections() {
        let mut joins = Joins::new(&names(1), 20);
        run(&mut joins, Duration::from_secs(100), |_| false).await;
        let failed = |joins: &Joins| joins.states().all(|(_, state, _)| state == ChannelState::Failed);
        assert!(failed(&joins));
        tokio::time::sleep(Duration::from_mins(5)).await;
        assert!(joins.take_due(Instant::now()).is_some() && failed(&joins));
        joins.disconnected();
        assert!(joins.take_due(Instant::now()).is_some() && failed(&joins));
        assert!(joins.confirmed("c000") && !failed(&joins));
    }

    proptest! {
        #[test]
        fn no_ten_seconds_see_more_joins_than_allowed(
            count in 1..60_usize, rate in 1..25_usize, unanswered in 0..5_usize, losses in prop::collection::vec(1..40_u64, 0..6),
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
            let sent = runtime.block_on(async {
                let mut joins = Joins::new(&names(count), rate);
                let mut sent = Vec::new();
                for loss in losses {
                    sent.extend(run(&mut joins, Duration::from_secs(loss), |name| !name.ends_with(&unanswered.to_string())).await);
                    joins.disconnected();
                }
                sent.extend(run(&mut joins, Duration::from_hours(1), |_| true).await);
                prop_assert!(joins.states().all(|(_, state, _)| state == ChannelState::Joined));
                Ok(sent)
            })?;
            prop_assert!(most_in_ten_seconds(&sent) <= rate);
        }
    }
}
