//! What an operator or a test can make the simulator do while it runs.

mod line;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use serde::Serialize;
use tokio::time::Instant;

pub use line::{COMMANDS, ControlLine};

use super::bad_lines::BadLines;
use super::delivery::Delivery;
use super::faults::{JoinRefusal, LoginRefusal, Mode};
use super::hub::{Hub, Peer};
use super::joins::JoinStats;

/// How long a raw line waits for room at a connection that does not read.
const RAW_PATIENCE: Duration = Duration::from_secs(10);

/// Whom a disturbance hits, of those connected now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// Every connection.
    All,
    /// The connection with this number.
    One(u64),
}

/// A disturbance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Closes at once; what is queued is lost.
    Drop(Target),
    /// Sends `RECONNECT` to those who asked for Twitch's commands, and closes after the grace (`None`: as it was set at
    /// the start).
    Reconnect(Target, Option<Duration>),
    /// Lets nothing out of a connection that stays open: no chat, no answer, no PING.
    Silence(Target),
    /// Ends a silence. What was said in it is gone.
    Speak(Target),
    /// Neither reads nor writes any more, and does not close.
    HalfOpen(Target),
    /// Writes so many bytes per second; 0: as fast as they are read. All: those to come as well.
    Slow(Target, u64),
    /// Answers every login with this refusal; `None`: looks at logins again.
    RefuseLogin(Option<LoginRefusal>),
    /// Of those with an account, lets in who shows one of these tokens (without `oauth:`); `None`: whoever shows any.
    AcceptTokens(Option<Vec<String>>),
    /// Never answers a JOIN to these channels.
    IgnoreJoins(Vec<String>),
    /// Refuses a JOIN to these channels.
    RefuseJoins(JoinRefusal, Vec<String>),
    /// Answers JOINs to these channels again; none named: to all.
    AllowJoins(Vec<String>),
    /// Puts everybody out of these channels; whoever asks gets in again.
    PutOut(Vec<String>),
    /// Gives a channel another login: the old one gets nothing more and is not answered, the new one is the same room.
    Rename(String, String),
    /// Answers so many JOINs of an account in any ten seconds, and not one more; 0: all.
    JoinLimit(u32),
    /// Sends one of each kind of bad line to the first channel, by name, that somebody is in.
    BadLinesOnce,
    /// Of a thousand lines, makes so many more bad ones.
    BadLines(u32),
    /// Sends each line whose number this divides twice; 0: none.
    DuplicateEvery(u32),
    /// Resets whoever connects, for so long.
    RefuseConnections(Duration),
    /// Stops generating messages; connections stay.
    Pause,
    /// Goes on after a pause. The time spent in it is not made up for.
    Resume,
    /// Sends these bytes, as they are, to every connection. They need be neither a line nor UTF-8.
    Raw(Vec<u8>),
}

/// Numbers of a running simulator.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Stats {
    /// Open connections.
    pub connections: usize,
    /// Channels joined, summed over the connections.
    pub joined: usize,
    /// Lines queued, summed over the connections.
    pub sent: u64,
    /// Messages made, whether or not somebody was there to get them.
    pub generated: u64,
    /// JOINs of all accounts together.
    pub joins: JoinStats,
    /// JOINs of each account by its login; those without one are `anonymous` together.
    pub accounts: BTreeMap<String, JoinStats>,
    /// Each open connection.
    pub peers: Vec<PeerStats>,
}

/// Numbers of an open connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PeerStats {
    /// Its number, as in the log of what was sent.
    pub connection: u64,
    /// The name it logged in with.
    pub login: Option<String>,
    /// How it behaves.
    pub mode: Mode,
    /// Channels it is in.
    pub channels: usize,
    /// JOINs it sent, each channel of a list as one.
    pub joins: u64,
    /// What lies in its queue.
    pub queued_bytes: usize,
}

/// What commands work on.
#[derive(Debug)]
pub(super) struct Desk {
    pub(super) delivery: Arc<Delivery>,
    pub(super) reconnect_grace: Duration,
    pub(super) seed: u64,
    /// How often bad lines were asked for: each time they are others.
    pub(super) bad_times: std::sync::atomic::AtomicU64,
}

impl Desk {
    /// Does what `command` says.
    pub(super) async fn act(&self, command: Command) {
        let hub = &*self.delivery.hub;
        match command {
            Command::Drop(who) => each(hub, who, |peer| peer.queue.close()),
            Command::Reconnect(who, grace) => {
                self.reconnect(who, grace.unwrap_or(self.reconnect_grace)).await;
            }
            Command::Silence(who) => each(hub, who, |peer| hub.set_mode(peer, Mode::Silent)),
            Command::Speak(who) => each(hub, who, |peer| hub.set_mode(peer, Mode::Normal)),
            Command::HalfOpen(who) => each(hub, who, |peer| hub.set_mode(peer, Mode::HalfOpen)),
            Command::Slow(who, bytes) => {
                if who == Target::All {
                    hub.slow.store(bytes, Ordering::Relaxed);
                }
                each(hub, who, |peer| peer.slow.store(bytes, Ordering::Relaxed));
            }
            Command::RefuseLogin(why) => hub.policy().refuse_login = why,
            Command::AcceptTokens(tokens) => hub.policy().accept_tokens = tokens,
            Command::IgnoreJoins(channels) => hub.policy().ignore(channels),
            Command::RefuseJoins(why, channels) => hub.policy().refuse(channels, why),
            Command::AllowJoins(channels) => hub.policy().allow(&channels),
            Command::PutOut(channels) => put_out(hub, &channels).await,
            Command::Rename(old, new) => hub.rename(&old, &new),
            Command::JoinLimit(limit) => hub.joins().limit = limit,
            Command::BadLinesOnce => self.bad_lines().await,
            Command::BadLines(permille) => hub.bad_permille.store(permille.into(), Ordering::Relaxed),
            Command::DuplicateEvery(nth) => hub.duplicate_every.store(nth.into(), Ordering::Relaxed),
            Command::RefuseConnections(time) => hub.refuse_connections(Instant::now() + time),
            Command::Pause => {
                hub.paused.send_replace(true);
            }
            Command::Resume => {
                hub.paused.send_replace(false);
            }
            Command::Raw(bytes) => tell(hub.members("").into_iter(), Bytes::from(bytes)).await,
        }
    }

    async fn reconnect(&self, who: Target, grace: Duration) {
        let peers = targets(&self.delivery.hub, who);
        let by = Instant::now() + grace;
        for peer in &peers {
            peer.queue.close_at(by);
        }
        let asked = peers.into_iter().filter(|peer| peer.commands.load(Ordering::Relaxed));
        tell(asked, Bytes::from_static(b":tmi.twitch.tv RECONNECT\r\n")).await;
    }

    async fn bad_lines(&self) {
        let Some(channel) = self.delivery.hub.some_channel() else {
            return;
        };
        let times = self.bad_times.fetch_add(1, Ordering::Relaxed);
        for chunk in BadLines::new(self.seed.wrapping_add(times)).one_of_each(&channel) {
            self.delivery.deliver(&chunk, None).await;
        }
    }
}

fn targets(hub: &Hub, who: Target) -> Vec<Arc<Peer>> {
    let mut peers = hub.members("");
    peers.retain(|peer| who == Target::All || who == Target::One(peer.id));
    peers
}

fn each(hub: &Hub, who: Target, what: impl Fn(&Peer)) {
    for peer in targets(hub, who) {
        what(&peer);
    }
}

async fn put_out(hub: &Hub, channels: &[String]) {
    for channel in channels {
        for peer in hub.members(channel) {
            hub.put_out(&peer, channel);
            let nick = peer.login().unwrap_or_default();
            let line = format!(":{nick}!{nick}@{nick}.tmi.twitch.tv PART #{channel}\r\n");
            tell(std::iter::once(peer), Bytes::from(line)).await;
        }
    }
}

async fn tell(peers: impl Iterator<Item = Arc<Peer>>, bytes: Bytes) {
    for peer in peers.filter(|peer| peer.speaks()) {
        peer.queue.push(&bytes, Some(RAW_PATIENCE)).await;
    }
}
