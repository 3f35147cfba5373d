//! Which channel is on which connection, and which to ask for next. Twitch drops JOINs beyond its limit without a
//! word, so they are paced over all connections together, each is confirmed by its own answer, and what stays
//! unanswered is asked for again and then reported.
//!
//! A channel keeps its place until the connection ends or is about to, or until nobody wants it any more: so no
//! connection ever has more than [`MOST_CHANNELS`], late answers included. Pure: time is an argument.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;
use tokio::time::Instant;

use super::metrics::ChannelState;
use super::pacer::Pacer;

/// Channels on one connection: Twitch cuts one whose queue of lines to send grows.
pub(super) const MOST_CHANNELS: usize = 90;

/// How long to wait for the answer to the first JOIN of a channel, the second, …; then it has failed.
const ANSWER_WAITS: [Duration; 4] =
    [Duration::from_secs(10), Duration::from_secs(20), Duration::from_secs(40), Duration::from_secs(10)];

/// After leaving a channel, its answer is waited for so long before it is joined on the same connection again: until
/// then nobody can tell to which of the two an answer belongs. Longer than a write may take.
const LEAVE_WAIT: Duration = Duration::from_secs(15);

/// Channels that the other connections may have on average for one connection to be given up: with some room to grow
/// again.
const FEW_CHANNELS: usize = 60;

/// How long a failed channel is left alone.
const FAILED_PAUSE: Duration = Duration::from_mins(5);

/// A connection's number. Later ones are higher.
pub(super) type ConnectionId = u64;

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
    /// The login is another channel's now: this one has a new login that is not known.
    OtherRoom,
}

/// What is being done about a channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Request {
    /// To be asked for, as the next of this many requests.
    Queued { asked: usize },
    /// Handed to its connection, to be written.
    Handed { asked: usize },
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
    /// The connection it has a place on.
    place: Option<ConnectionId>,
    /// A connection that is about to be closed, on which it is still heard.
    still_on: Option<ConnectionId>,
    /// Kept until the channel is joined after all, over retries and connections: it stays named, and is not waited
    /// for.
    failed: Option<JoinFailure>,
    /// It was heard once: it comes before those that never were.
    was_heard: bool,
}

impl Channel {
    fn is_heard(&self) -> bool {
        self.request == Request::Joined || self.still_on.is_some()
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// On the way to its login.
    Opening,
    /// Logged in.
    Open,
    /// To be closed: its channels are to be joined elsewhere.
    Leaving,
}

#[derive(Debug)]
struct Connection {
    stage: Stage,
    /// JOINs handed to it and not written yet.
    handed: usize,
}

/// A channel, its state, why it failed, and the connection it is heard on.
pub(super) type Seen<'a> = (&'a str, ChannelState, Option<JoinFailure>, Option<ConnectionId>);

/// The channels of one account.
#[derive(Debug)]
pub(super) struct Plan {
    channels: BTreeMap<String, Channel>,
    connections: BTreeMap<ConnectionId, Connection>,
    joins: Pacer,
    /// Channels that are being left, and until when their answer is waited for.
    parting: BTreeMap<(ConnectionId, String), Instant>,
}

impl Plan {
    /// Of no channel yet, with at most `join_rate` JOINs in any ten seconds.
    pub(super) fn new(join_rate: usize) -> Self {
        Self {
            channels: BTreeMap::new(),
            connections: BTreeMap::new(),
            joins: Pacer::new(join_rate),
            parting: BTreeMap::new(),
        }
    }

    /// Another channel is wanted. `was_heard`: under another name, so that it comes before those that never were.
    pub(super) fn add(&mut self, name: &str, was_heard: bool) {
        let unknown = Channel {
            request: Request::Queued { asked: 0 },
            place: None,
            still_on: None,
            failed: None,
            was_heard,
        };
        self.channels.entry(name.to_owned()).or_insert(unknown);
    }

    /// The channel is not wanted any more. Returns the connections that are to leave it.
    pub(super) fn remove(&mut self, name: &str, now: Instant) -> Vec<ConnectionId> {
        let Some(channel) = self.channels.remove(name) else { return Vec::new() };
        let is_asked = match channel.request {
            // Asked for before, perhaps, and late with its answer.
            Request::Queued { asked } => asked > 0,
            Request::Handed { .. } | Request::Asked { .. } | Request::Joined => true,
            // An answer after all is no news of a channel that nobody wants.
            Request::Resting { .. } => channel.failed == Some(JoinFailure::NoAnswer),
        };
        let on: Vec<_> = channel.place.filter(|_| is_asked).into_iter().chain(channel.still_on).collect();
        self.leave(name, &on, now);
        on
    }

    fn leave(&mut self, name: &str, on: &[ConnectionId], now: Instant) {
        for id in on {
            self.parting.insert((*id, name.to_owned()), now + LEAVE_WAIT);
        }
    }

    /// The channel that answered to this name on a connection is another one than is wanted; whether that is news. It is
    /// to be left.
    pub(super) fn is_another(&mut self, id: ConnectionId, name: &str, now: Instant) -> bool {
        let is_news = self.refused(id, name, JoinFailure::OtherRoom, now);
        self.leave(name, &[id], now);
        is_news
    }

    /// Whether there is anything to hear.
    pub(super) fn is_empty(&self) -> bool {
        self.channels.is_empty()
    }

    /// A connection that is not needed any more, its channels having room on the others; all of them where there is no
    /// channel. Not while any is on its way or leaving.
    pub(super) fn surplus(&self) -> Option<ConnectionId> {
        let stages = || self.connections.values().map(|connection| connection.stage);
        if self.is_empty() {
            return self.connections.iter().find(|(_, one)| one.stage != Stage::Leaving).map(|(id, _)| *id);
        }
        if stages().any(|stage| stage != Stage::Open) || self.placeless() > 0 {
            return None;
        }
        let most = stages().count().saturating_sub(1) * FEW_CHANNELS;
        let (places, id) = self.connections.keys().map(|id| (self.places(*id), *id)).min()?;
        let is_settled =
            |channel: &Channel| matches!(channel.request, Request::Joined | Request::Resting { .. });
        let fits = self.channels.len() <= most && self.channels.values().all(is_settled);
        (fits || (places == 0 && most > 0)).then_some(id)
    }

    /// Whether another connection is to be opened. One at a time.
    pub(super) fn wants_connection(&self) -> bool {
        if self.is_empty() {
            return false;
        }
        let staying = || self.connections.iter().filter(|(_, connection)| connection.stage != Stage::Leaving);
        if staying().any(|(_, connection)| connection.stage == Stage::Opening) {
            return false;
        }
        let room: usize = staying().map(|(id, _)| MOST_CHANNELS.saturating_sub(self.places(*id))).sum();
        staying().next().is_none() || self.placeless() > room
    }

    /// How many channels are to be asked for and have no place.
    pub(super) fn placeless(&self) -> usize {
        let resting = |channel: &Channel| matches!(channel.request, Request::Resting { .. });
        self.channels.values().filter(|channel| channel.place.is_none() && !resting(channel)).count()
    }

    /// How many channels have their place on a connection.
    pub(super) fn places(&self, id: ConnectionId) -> usize {
        self.channels.values().filter(|channel| channel.place == Some(id)).count()
    }

    /// A connection is being opened.
    pub(super) fn opening(&mut self, id: ConnectionId) {
        self.connections.insert(id, Connection { stage: Stage::Opening, handed: 0 });
    }

    /// It is logged in.
    pub(super) fn opened(&mut self, id: ConnectionId) {
        if let Some(connection) = self.connections.get_mut(&id).filter(|c| c.stage == Stage::Opening) {
            connection.stage = Stage::Open;
        }
    }

    /// It will be closed: its channels are to be joined elsewhere, and are heard there as long as it stands.
    pub(super) fn leaving(&mut self, id: ConnectionId) {
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.stage = Stage::Leaving;
        }
        for channel in self.channels.values_mut().filter(|channel| channel.place == Some(id)) {
            channel.place = None;
            if channel.request == Request::Joined {
                channel.still_on = Some(id);
            }
            if !matches!(channel.request, Request::Resting { .. }) {
                channel.request = Request::Queued { asked: 0 };
            }
        }
    }

    /// It is gone. Everything on it is to be joined again; the limit does not forget. Returns the channels that are
    /// not heard any more.
    pub(super) fn ended(&mut self, id: ConnectionId, now: Instant) -> Vec<String> {
        if let Some(Connection { handed, .. }) = self.connections.remove(&id) {
            // Written or not: nobody knows.
            self.joins.sent(handed, now);
        }
        self.parting.retain(|(on, _), _| *on != id);
        let mut unheard = Vec::new();
        for (name, channel) in &mut self.channels {
            let was_heard = channel.is_heard();
            if channel.still_on == Some(id) {
                channel.still_on = None;
            }
            if channel.place == Some(id) {
                channel.place = None;
                if !matches!(channel.request, Request::Resting { .. }) {
                    channel.request = Request::Queued { asked: 0 };
                }
            }
            if was_heard && !channel.is_heard() {
                unheard.push(name.clone());
            }
        }
        unheard
    }

    /// Whether a connection that is to be closed is needed no more: each of its channels is heard elsewhere, or cannot
    /// be.
    pub(super) fn is_replaced(&self, id: ConnectionId) -> bool {
        let is_leaving =
            self.connections.get(&id).is_some_and(|connection| connection.stage == Stage::Leaving);
        let is_needed = |channel: &Channel| {
            channel.still_on == Some(id) && channel.request != Request::Joined && channel.failed.is_none()
        };
        is_leaving && !self.channels.values().any(is_needed)
    }

    /// A JOIN that may be written now, if there is one: of channels that were heard before first, and of those the
    /// busiest.
    pub(super) fn next_join(
        &mut self,
        now: Instant,
        busy: impl Fn(&str) -> u64,
    ) -> Option<(ConnectionId, String)> {
        self.expire(now);
        let roomiest = self.roomiest();
        let candidates = self.channels.iter().rev().filter_map(|(name, channel)| match channel.request {
            Request::Queued { asked } => Some((name, channel, asked, self.home(name, channel, roomiest)?)),
            _ => None,
        });
        let (name, _, asked, id) =
            candidates.max_by_key(|(name, channel, ..)| (channel.was_heard, busy(name)))?;
        if !self.joins.reserve(now) {
            return None;
        }
        let name = name.clone();
        if let Some(channel) = self.channels.get_mut(&name) {
            channel.place = Some(id);
            channel.request = Request::Handed { asked };
        }
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.handed += 1;
        }
        Some((id, name))
    }

    /// When [`Plan::next_join`] is worth calling again, if ever.
    pub(super) fn next_due(&self, now: Instant) -> Option<Instant> {
        let changes = self.channels.values().filter_map(|channel| match channel.request {
            Request::Asked { answer_due, .. } => Some(answer_due),
            Request::Resting { retry_at } => Some(retry_at),
            Request::Queued { .. } | Request::Handed { .. } | Request::Joined => None,
        });
        let roomiest = self.roomiest();
        let may_go = |(name, channel): (&String, &Channel)| {
            matches!(channel.request, Request::Queued { .. }) && self.home(name, channel, roomiest).is_some()
        };
        let permit = self.channels.iter().any(may_go).then(|| self.joins.next_free(now)).flatten();
        let parted = self.parting.values().copied();
        changes.chain(permit).chain(parted).min()
    }

    /// Where a channel is to be asked for: on its connection, or on the roomiest; not where it is being left.
    fn home(&self, name: &str, channel: &Channel, roomiest: Option<ConnectionId>) -> Option<ConnectionId> {
        let is_open = |id: &ConnectionId| self.connections.get(id).is_some_and(|c| c.stage == Stage::Open);
        channel.place.filter(is_open).or(roomiest).filter(|id| !self.is_parting(*id, name))
    }

    fn is_parting(&self, id: ConnectionId, name: &str) -> bool {
        !self.parting.is_empty() && self.parting.contains_key(&(id, name.to_owned()))
    }

    /// JOINs went out on a connection.
    pub(super) fn written(&mut self, id: ConnectionId, names: &[String], now: Instant) {
        self.joins.sent(names.len(), now);
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.handed = connection.handed.saturating_sub(names.len());
        }
        for name in names {
            let Some(channel) = self.channels.get_mut(name).filter(|channel| channel.place == Some(id))
            else {
                continue;
            };
            if let Request::Handed { asked } = channel.request {
                let wait = ANSWER_WAITS[asked.min(ANSWER_WAITS.len() - 1)];
                channel.request = Request::Asked { asked: asked + 1, answer_due: now + wait };
            }
        }
    }

    /// Twitch confirmed the channel on a connection; whether that is news.
    pub(super) fn confirmed(&mut self, id: ConnectionId, name: &str) -> bool {
        if self.is_parting(id, name) {
            return false;
        }
        let stage = self.connections.get(&id).map(|connection| connection.stage);
        let Some(channel) = self.channels.get_mut(name) else { return false };
        let is_news = if channel.place == Some(id) {
            std::mem::replace(&mut channel.request, Request::Joined) != Request::Joined
        } else {
            // Asked for before it was known that the connection will be closed.
            let is_late = stage == Some(Stage::Leaving) && !channel.is_heard();
            if is_late {
                channel.still_on = Some(id);
            }
            is_late
        };
        if is_news {
            channel.failed = None;
            channel.was_heard = true;
        }
        is_news
    }

    /// Twitch refused the channel on a connection; whether that is news.
    pub(super) fn refused(&mut self, id: ConnectionId, name: &str, why: JoinFailure, now: Instant) -> bool {
        let Some(channel) = self.channels.get_mut(name).filter(|channel| channel.place == Some(id)) else {
            return false;
        };
        channel.request = Request::Resting { retry_at: now + FAILED_PAUSE };
        channel.failed.replace(why) != Some(why)
    }

    /// Twitch put us out of the channel on a connection; whether it was heard there.
    pub(super) fn parted(&mut self, id: ConnectionId, name: &str) -> bool {
        if self.parting.remove(&(id, name.to_owned())).is_some() {
            return false;
        }
        let Some(channel) = self.channels.get_mut(name) else { return false };
        if channel.still_on == Some(id) {
            channel.still_on = None;
            return true;
        }
        let was_joined = channel.place == Some(id) && channel.request == Request::Joined;
        if was_joined {
            channel.request = Request::Queued { asked: 0 };
        }
        was_joined
    }

    /// Channels that were asked for, and have not answered.
    pub(super) fn unanswered(&self) -> impl Iterator<Item = &str> {
        self.channels.iter().filter_map(|(name, channel)| {
            let is_unanswered = match channel.request {
                Request::Queued { asked } | Request::Handed { asked } => asked > 0,
                Request::Asked { asked, .. } => asked > 1,
                Request::Joined => false,
                Request::Resting { .. } => {
                    matches!(channel.failed, Some(JoinFailure::NoAnswer | JoinFailure::OtherRoom))
                }
            };
            is_unanswered.then_some(name.as_str())
        })
    }

    /// Whether the channel is heard on any connection.
    pub(super) fn is_heard(&self, name: &str) -> bool {
        self.channels.get(name).is_some_and(Channel::is_heard)
    }

    /// Every channel.
    pub(super) fn channels(&self) -> impl Iterator<Item = Seen<'_>> {
        self.channels.iter().map(|(name, channel)| {
            let on = channel.place.filter(|_| channel.request == Request::Joined).or(channel.still_on);
            match (channel.is_heard(), channel.failed) {
                (true, _) => (name.as_str(), ChannelState::Joined, None, on),
                (false, Some(why)) => (name.as_str(), ChannelState::Failed, Some(why), None),
                (false, None) => (name.as_str(), ChannelState::Wanted, None, None),
            }
        })
    }

    /// The open connection with the most room, if one has any.
    fn roomiest(&self) -> Option<ConnectionId> {
        let open = self.connections.iter().filter(|(_, connection)| connection.stage == Stage::Open);
        let with_places = open.map(|(id, _)| (self.places(*id), *id));
        with_places.filter(|(places, _)| *places < MOST_CHANNELS).min().map(|(_, id)| id)
    }

    fn expire(&mut self, now: Instant) {
        self.parting.retain(|_, until| *until > now);
        for channel in self.channels.values_mut() {
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
                | Request::Handed { .. }
                | Request::Asked { .. }
                | Request::Joined
                | Request::Resting { .. } => continue,
            };
            channel.request = Request::Queued { asked: asked_again };
        }
    }
}

#[cfg(test)]
mod tests;
