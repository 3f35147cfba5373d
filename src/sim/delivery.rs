//! From lines to queues: everybody in a channel gets what they asked for, and the log says who got what.
//!
//! A connection that is silenced or half open gets nothing, so it is not said to have got it: lines that reached nobody
//! are recorded without a connection.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::mpsc;

use super::hub::Hub;
use super::lines::{Chunk, Mark};
use super::queue::Pushed;
use super::sent::Note;

/// What stands between whoever has lines and the queues.
#[derive(Debug)]
pub(super) struct Delivery {
    pub(super) hub: Arc<Hub>,
    pub(super) log: Option<mpsc::Sender<Note>>,
    /// A connection whose queue has no room for so long is cut, as Twitch does; `None`: never, everybody waits for it.
    pub(super) cut_after: Option<Duration>,
    /// The wall clock, Unix milliseconds.
    pub(super) now: fn() -> i64,
}

impl Delivery {
    /// Queues one channel's lines at everybody in it. What a connection itself says (`from`) goes to all but that one,
    /// and waits for nobody: who has no room misses it.
    pub(super) async fn deliver(&self, chunk: &Chunk, from: Option<u64>) {
        let patience = if from.is_some() { Some(Duration::ZERO) } else { self.cut_after };
        // Which lines nobody got: all, those for who asked for commands, or none.
        let (mut reached_some, mut reached_all) = (false, false);
        for peer in self.hub.members(&chunk.channel) {
            if Some(peer.id) == from || !peer.speaks() {
                continue;
            }
            let (tags, commands) = (peer.tags.load(Ordering::Relaxed), peer.commands.load(Ordering::Relaxed));
            let (bytes, marks) = chunk.seen_by(tags, commands);
            if marks.is_empty() {
                continue;
            }
            // A place in the log first: between queueing and noting nothing may wait, or a stop could part them.
            let place = self.place().await;
            match peer.queue.push(&bytes, patience).await {
                Pushed::Queued => {
                    reached_some = true;
                    reached_all |= marks.len() == chunk.marks.len();
                    self.hub.sent.fetch_add(marks.len() as u64, Ordering::Relaxed);
                    self.note(place, Some(peer.id), chunk, marks);
                }
                Pushed::Closed => {}
                Pushed::Full if from.is_some() => {}
                Pushed::Full => {
                    tracing::warn!(connection = peer.id, "cut a connection that does not read");
                    peer.queue.close();
                }
            }
        }
        if !reached_all {
            let missed = |mark: &&Mark| !reached_some || mark.needs_commands;
            let marks: Arc<[Mark]> = chunk.marks.iter().filter(missed).cloned().collect();
            self.note(self.place().await, None, chunk, marks);
        }
    }

    async fn place(&self) -> Option<mpsc::Permit<'_, Note>> {
        match &self.log {
            Some(log) => log.reserve().await.ok(),
            None => None,
        }
    }

    fn note(
        &self,
        place: Option<mpsc::Permit<'_, Note>>,
        connection: Option<u64>,
        chunk: &Chunk,
        marks: Arc<[Mark]>,
    ) {
        if let Some(place) = place {
            let chunk = Chunk { channel: Arc::clone(&chunk.channel), bytes: chunk.bytes.clone(), marks };
            place.send(Note::Sent { time: (self.now)(), connection, chunk });
        }
    }
}
