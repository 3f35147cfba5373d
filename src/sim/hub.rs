//! Who is connected, who is in which channel, and how they are treated: the one piece of state that connections, the
//! pump and the commands share.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;
use tokio::time::Instant;

use super::control::{PeerStats, Stats};
use super::faults::{Mode, Policy};
use super::joins::JoinBook;
use super::names::Names;
use super::queue::Queue;

/// At most so many connections at once: with their queues they bound the simulator's memory.
const MAX_PEERS: usize = 1_024;

/// One connection, as the others see it.
#[derive(Debug)]
pub(super) struct Peer {
    pub(super) id: u64,
    pub(super) queue: Queue,
    /// It asked for tags.
    pub(super) tags: AtomicBool,
    /// It asked for Twitch's own commands.
    pub(super) commands: AtomicBool,
    /// It asked to be told who comes and goes.
    pub(super) membership: AtomicBool,
    /// The name it logged in with.
    login: Mutex<Option<String>>,
    /// Channels it was put out of, and does not know that it may join again.
    put_out: Mutex<Vec<String>>,
    /// JOINs it sent, each channel of a list as one.
    pub(super) joins: AtomicU64,
    /// It is written to so slowly, in bytes per second; 0: as fast as it reads.
    pub(super) slow: AtomicU64,
    mode: watch::Sender<Mode>,
}

#[derive(Debug, Default)]
struct State {
    last_id: u64,
    peers: BTreeMap<u64, Arc<Peer>>,
    members: HashMap<String, BTreeMap<u64, Arc<Peer>>>,
}

/// The register of connections.
#[derive(Debug)]
pub(super) struct Hub {
    state: Mutex<State>,
    /// The channels that get messages; `None`: any.
    audience: Mutex<Option<BTreeSet<String>>>,
    names: Mutex<Names>,
    /// How many joined connections would get something.
    readers: watch::Sender<usize>,
    policy: Mutex<Policy>,
    joins: Mutex<JoinBook>,
    refuses_until: Mutex<Option<Instant>>,
    pub(super) paused: watch::Sender<bool>,
    /// Of a thousand lines so many more are bad ones.
    pub(super) bad_permille: AtomicU64,
    /// Each line with a number divided by this is sent twice; 0: none.
    pub(super) duplicate_every: AtomicU64,
    /// Of connections to come, see [`Peer::slow`].
    pub(super) slow: AtomicU64,
    pub(super) generated: AtomicU64,
    pub(super) sent: AtomicU64,
}

impl Peer {
    /// Whether something comes out of it.
    pub(super) fn speaks(&self) -> bool {
        *self.mode.borrow() == Mode::Normal
    }

    /// Returns once neither reads nor writes are to be done any more.
    pub(super) async fn half_open(&self) {
        reaches(&mut self.mode.subscribe(), |&mode| mode == Mode::HalfOpen).await;
    }

    pub(super) fn login(&self) -> Option<String> {
        lock(&self.login).clone()
    }

    pub(super) fn take_put_out(&self) -> Vec<String> {
        std::mem::take(&mut *lock(&self.put_out))
    }

    pub(super) fn set_login(&self, login: &str) {
        *lock(&self.login) = Some(login.to_owned());
    }
}

impl Hub {
    pub(super) fn new(audience: Option<BTreeSet<String>>) -> Self {
        Self {
            state: Mutex::default(),
            audience: Mutex::new(audience),
            names: Mutex::default(),
            readers: watch::Sender::new(0),
            policy: Mutex::default(),
            joins: Mutex::default(),
            refuses_until: Mutex::default(),
            paused: watch::Sender::new(false),
            bad_permille: AtomicU64::new(0),
            duplicate_every: AtomicU64::new(0),
            slow: AtomicU64::new(0),
            generated: AtomicU64::new(0),
            sent: AtomicU64::new(0),
        }
    }

    /// Enters a new connection; `None` when there are too many.
    pub(super) fn enter(&self) -> Option<Arc<Peer>> {
        let mut state = lock(&self.state);
        if state.peers.len() >= MAX_PEERS {
            return None;
        }
        state.last_id += 1;
        let peer = Arc::new(Peer {
            id: state.last_id,
            queue: Queue::default(),
            tags: AtomicBool::new(false),
            commands: AtomicBool::new(false),
            membership: AtomicBool::new(false),
            login: Mutex::default(),
            put_out: Mutex::default(),
            joins: AtomicU64::new(0),
            slow: AtomicU64::new(self.slow.load(Ordering::Relaxed)),
            mode: watch::Sender::new(Mode::Normal),
        });
        state.peers.insert(peer.id, Arc::clone(&peer));
        Some(peer)
    }

    /// Takes a connection out of everything; the channels it was in.
    pub(super) fn leave(&self, peer: &Peer) -> Vec<String> {
        peer.queue.close();
        let mut state = lock(&self.state);
        state.peers.remove(&peer.id);
        let mut left = Vec::new();
        state.members.retain(|channel, members| {
            left.extend(members.remove(&peer.id).map(|_| channel.clone()));
            !members.is_empty()
        });
        let counted = left.iter().filter(|channel| self.counts(channel)).count();
        self.add_readers(peer, 0, counted);
        left
    }

    pub(super) fn join(&self, peer: &Arc<Peer>, channel: &str) {
        let mut state = lock(&self.state);
        let members = state.members.entry(channel.to_owned()).or_default();
        if members.insert(peer.id, Arc::clone(peer)).is_none() {
            self.add_readers(peer, usize::from(self.counts(channel)), 0);
        }
    }

    pub(super) fn part(&self, peer: &Peer, channel: &str) {
        let mut state = lock(&self.state);
        let Some(members) = state.members.get_mut(channel) else {
            return;
        };
        let gone = members.remove(&peer.id).is_some();
        if members.is_empty() {
            state.members.remove(channel);
        }
        if gone {
            self.add_readers(peer, 0, usize::from(self.counts(channel)));
        }
    }

    /// As [`Hub::part`], against its will.
    pub(super) fn put_out(&self, peer: &Peer, channel: &str) {
        lock(&peer.put_out).push(channel.to_owned());
        self.part(peer, channel);
    }

    /// Called with the state locked, so that the number and the register agree.
    fn add_readers(&self, peer: &Peer, more: usize, less: usize) {
        if peer.speaks() && more + less > 0 {
            self.readers.send_modify(|readers| *readers = *readers + more - less);
        }
    }

    /// Changes how a connection behaves; half open is for good.
    pub(super) fn set_mode(&self, peer: &Peer, mode: Mode) {
        let state = lock(&self.state);
        let before = *peer.mode.borrow();
        if before == Mode::HalfOpen || before == mode || !state.peers.contains_key(&peer.id) {
            return;
        }
        let of_peer = |(channel, members): &(&String, &BTreeMap<u64, Arc<Peer>>)| {
            members.contains_key(&peer.id) && self.counts(channel)
        };
        let joined = state.members.iter().filter(of_peer).count();
        self.add_readers(peer, 0, joined);
        peer.mode.send_replace(mode);
        self.add_readers(peer, joined, 0);
    }

    fn counts(&self, channel: &str) -> bool {
        lock(&self.audience).as_ref().is_none_or(|audience| audience.contains(channel))
    }

    /// Gives a channel another name. Those in it stay where they are, and get nothing more.
    pub(super) fn rename(&self, old: &str, new: &str) {
        let state = lock(&self.state);
        if !self.names().rename(old, new) {
            return;
        }
        let speaking = |channel: &str| {
            let members = state.members.get(channel);
            members.map_or(0, |members| members.values().filter(|peer| peer.speaks()).count())
        };
        let mut audience = lock(&self.audience);
        if let Some(audience) = audience.as_mut()
            && audience.remove(old)
        {
            let more = if audience.insert(new.to_owned()) { speaking(new) } else { 0 };
            self.readers.send_modify(|readers| *readers = *readers + more - speaking(old));
        }
    }

    /// What channels are called. Do not hold it over an await.
    pub(super) fn names(&self) -> MutexGuard<'_, Names> {
        lock(&self.names)
    }

    /// Those in `channel`; with an empty name everybody.
    pub(super) fn members(&self, channel: &str) -> Vec<Arc<Peer>> {
        let state = lock(&self.state);
        let members = if channel.is_empty() { Some(&state.peers) } else { state.members.get(channel) };
        members.map(|members| members.values().cloned().collect()).unwrap_or_default()
    }

    /// The first channel by name that somebody is in.
    pub(super) fn some_channel(&self) -> Option<String> {
        lock(&self.state).members.keys().min().cloned()
    }

    /// How many joined connections would get something, as it changes.
    pub(super) fn readers(&self) -> watch::Receiver<usize> {
        self.readers.subscribe()
    }

    /// How those who connect are treated. Do not hold it over an await.
    pub(super) fn policy(&self) -> MutexGuard<'_, Policy> {
        lock(&self.policy)
    }

    /// The account of JOINs. Do not hold it over an await.
    pub(super) fn joins(&self) -> MutexGuard<'_, JoinBook> {
        lock(&self.joins)
    }

    /// New connections are reset until then.
    pub(super) fn refuse_connections(&self, until: Instant) {
        *lock(&self.refuses_until) = Some(until);
    }

    pub(super) fn refuses_connections(&self) -> bool {
        lock(&self.refuses_until).is_some_and(|until| Instant::now() < until)
    }

    pub(super) fn stats(&self) -> Stats {
        let (joins, accounts) = self.joins().stats();
        let state = lock(&self.state);
        let channels = |peer: &u64| state.members.values().filter(|of| of.contains_key(peer)).count();
        Stats {
            connections: state.peers.len(),
            joined: state.members.values().map(BTreeMap::len).sum(),
            sent: self.sent.load(Ordering::Relaxed),
            generated: self.generated.load(Ordering::Relaxed),
            joins,
            accounts,
            peers: state
                .peers
                .values()
                .map(|peer| PeerStats {
                    connection: peer.id,
                    login: peer.login(),
                    mode: *peer.mode.borrow(),
                    channels: channels(&peer.id),
                    joins: peer.joins.load(Ordering::Relaxed),
                    queued_bytes: peer.queue.bytes(),
                })
                .collect(),
        }
    }
}

/// A panic elsewhere leaves nothing here half done.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Returns once `value` is as `wanted`, or when nobody is left to change it.
pub(super) async fn reaches<T>(value: &mut watch::Receiver<T>, wanted: impl FnMut(&T) -> bool) {
    if value.wait_for(wanted).await.is_err() {
        tracing::debug!("the simulator was dropped");
    }
}
