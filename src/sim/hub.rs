//! Who is connected and who is in which channel: the one piece of state that connections and the pump share.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use super::control::Stats;
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
    audience: Option<BTreeSet<String>>,
    /// How many joined connections would get something.
    readers: watch::Sender<usize>,
    pub(super) paused: watch::Sender<bool>,
    pub(super) generated: AtomicU64,
    pub(super) sent: AtomicU64,
}

impl Hub {
    pub(super) fn new(audience: Option<BTreeSet<String>>) -> Self {
        Self {
            state: Mutex::default(),
            audience,
            readers: watch::Sender::new(0),
            paused: watch::Sender::new(false),
            generated: AtomicU64::new(0),
            sent: AtomicU64::new(0),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters a new connection; `None` when there are too many.
    pub(super) fn enter(&self) -> Option<Arc<Peer>> {
        let mut state = self.state();
        if state.peers.len() >= MAX_PEERS {
            return None;
        }
        state.last_id += 1;
        let peer = Arc::new(Peer {
            id: state.last_id,
            queue: Queue::default(),
            tags: AtomicBool::new(false),
            commands: AtomicBool::new(false),
        });
        state.peers.insert(peer.id, Arc::clone(&peer));
        Some(peer)
    }

    /// Takes a connection out of everything.
    pub(super) fn leave(&self, peer: &Peer) {
        peer.queue.close();
        let mut left = 0;
        {
            let mut state = self.state();
            state.peers.remove(&peer.id);
            state.members.retain(|channel, members| {
                left += usize::from(members.remove(&peer.id).is_some() && self.counts(channel));
                !members.is_empty()
            });
        }
        self.readers.send_modify(|readers| *readers -= left);
    }

    pub(super) fn join(&self, peer: &Arc<Peer>, channel: &str) {
        let new = {
            let mut state = self.state();
            let members = state.members.entry(channel.to_owned()).or_default();
            members.insert(peer.id, Arc::clone(peer)).is_none()
        };
        if new && self.counts(channel) {
            self.readers.send_modify(|readers| *readers += 1);
        }
    }

    pub(super) fn part(&self, peer: &Peer, channel: &str) {
        let gone = {
            let mut state = self.state();
            let Some(members) = state.members.get_mut(channel) else {
                return;
            };
            let gone = members.remove(&peer.id).is_some();
            if members.is_empty() {
                state.members.remove(channel);
            }
            gone
        };
        if gone && self.counts(channel) {
            self.readers.send_modify(|readers| *readers -= 1);
        }
    }

    fn counts(&self, channel: &str) -> bool {
        self.audience.as_ref().is_none_or(|audience| audience.contains(channel))
    }

    /// Those in `channel`; with an empty name everybody.
    pub(super) fn members(&self, channel: &str) -> Vec<Arc<Peer>> {
        let state = self.state();
        let members = if channel.is_empty() { Some(&state.peers) } else { state.members.get(channel) };
        members.map(|members| members.values().cloned().collect()).unwrap_or_default()
    }

    /// How many joined connections would get something, as it changes.
    pub(super) fn readers(&self) -> watch::Receiver<usize> {
        self.readers.subscribe()
    }

    pub(super) fn stats(&self) -> Stats {
        let state = self.state();
        Stats {
            connections: state.peers.len(),
            joined: state.members.values().map(BTreeMap::len).sum(),
            sent: self.sent.load(Ordering::Relaxed),
            generated: self.generated.load(Ordering::Relaxed),
        }
    }
}

/// Returns once `value` is as `wanted`, or when nobody is left to change it.
pub(super) async fn reaches<T>(value: &mut watch::Receiver<T>, wanted: impl FnMut(&T) -> bool) {
    if value.wait_for(wanted).await.is_err() {
        tracing::debug!("the simulator was dropped");
    }
}
