//! One connection's outgoing bytes: a queue bounded in bytes, whose full-policy is to make the writer wait.
//!
//! The rule: what is in the queue never exceeds [`QUEUE_BYTES`] (one chunk may overshoot an empty queue), so a client
//! that does not read costs a fixed amount of memory. Chunks are shared [`Bytes`]: a line sent to a hundred
//! connections exists once.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until, timeout};

/// How many bytes wait for one connection at most.
pub(super) const QUEUE_BYTES: usize = 4 * 1024 * 1024;
/// What a chunk costs beside its bytes, so that many tiny answers are bounded as well.
const CHUNK_COST: usize = 64;

/// What became of a chunk handed to a queue.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Pushed {
    /// It lies in the queue.
    Queued,
    /// The connection is closed or closing.
    Closed,
    /// There was no room for the whole patience.
    Full,
}

#[derive(Debug, Default)]
struct State {
    chunks: VecDeque<Bytes>,
    bytes: usize,
    /// Nothing more is taken; what lies here is still written.
    finishing: bool,
    closed: bool,
    deadline: Option<Instant>,
}

/// The queue. Any number of writers, one reader.
#[derive(Debug, Default)]
pub(super) struct Queue {
    state: Mutex<State>,
    data: Notify,
    room: Notify,
    ending: Notify,
}

impl Queue {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues `chunk`, waiting for room as long as `patience` allows (`None`: as long as the connection lives).
    pub(super) async fn push(&self, chunk: &Bytes, patience: Option<Duration>) -> Pushed {
        match patience {
            None => self.wait_and_push(chunk).await,
            Some(patience) => match self.try_push(chunk) {
                Some(pushed) => pushed,
                None => timeout(patience, self.wait_and_push(chunk)).await.unwrap_or(Pushed::Full),
            },
        }
    }

    async fn wait_and_push(&self, chunk: &Bytes) -> Pushed {
        loop {
            let room = self.room.notified();
            tokio::pin!(room);
            // Registered before looking, so that room made in between is not missed.
            room.as_mut().enable();
            if let Some(pushed) = self.try_push(chunk) {
                return pushed;
            }
            room.await;
        }
    }

    fn try_push(&self, chunk: &Bytes) -> Option<Pushed> {
        let mut state = self.state();
        if state.closed || state.finishing {
            return Some(Pushed::Closed);
        }
        let cost = chunk.len() + CHUNK_COST;
        if state.bytes > 0 && state.bytes + cost > QUEUE_BYTES {
            return None;
        }
        state.bytes += cost;
        state.chunks.push_back(chunk.clone());
        drop(state);
        self.data.notify_one();
        Some(Pushed::Queued)
    }

    /// The next chunk without waiting.
    pub(super) fn try_next(&self) -> Option<Bytes> {
        let mut state = self.state();
        let chunk = state.chunks.pop_front()?;
        state.bytes -= chunk.len() + CHUNK_COST;
        drop(state);
        self.room.notify_waiters();
        Some(chunk)
    }

    /// The next chunk; `None` once the queue is finished and empty, or closed.
    pub(super) async fn next(&self) -> Option<Bytes> {
        loop {
            if let Some(chunk) = self.try_next() {
                return Some(chunk);
            }
            {
                let state = self.state();
                if state.closed || state.finishing {
                    return None;
                }
            }
            self.data.notified().await;
        }
    }

    /// How many bytes lie here now.
    pub(super) fn bytes(&self) -> usize {
        self.state().bytes
    }

    /// Ends the connection at once; what lies in the queue is lost.
    pub(super) fn close(&self) {
        {
            let mut state = self.state();
            state.closed = true;
            state.chunks.clear();
            state.bytes = 0;
        }
        self.wake();
    }

    /// Takes nothing more, lets what lies here be written, and closes at `by` at the latest.
    pub(super) fn finish(&self, by: Instant) {
        {
            let mut state = self.state();
            state.finishing = true;
            state.deadline = Some(state.deadline.map_or(by, |earlier| earlier.min(by)));
        }
        self.wake();
    }

    /// Goes on as before until `by`, then closes.
    pub(super) fn close_at(&self, by: Instant) {
        {
            let mut state = self.state();
            state.deadline = Some(state.deadline.map_or(by, |earlier| earlier.min(by)));
        }
        self.wake();
    }

    fn wake(&self) {
        self.data.notify_one();
        self.room.notify_waiters();
        self.ending.notify_waiters();
    }

    /// Returns once the queue is closed, by [`Queue::close`] or by its deadline.
    pub(super) async fn closed(&self) {
        loop {
            let ending = self.ending.notified();
            tokio::pin!(ending);
            ending.as_mut().enable();
            let deadline = {
                let state = self.state();
                if state.closed {
                    return;
                }
                state.deadline
            };
            match deadline {
                None => ending.await,
                Some(by) => {
                    tokio::select! {
                        () = sleep_until(by) => return self.close(),
                        () = ending => {}
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_full_queue_waits_then_says_so() {
        let queue = Queue::default();
        let big = Bytes::from(vec![b'x'; QUEUE_BYTES - CHUNK_COST]);
        let small = Bytes::from_static(b"y");
        assert_eq!(queue.push(&big, None).await, Pushed::Queued);
        let patience = Some(Duration::from_millis(20));
        assert_eq!(queue.push(&small, patience).await, Pushed::Full);
        let (pushed, taken) = tokio::join!(queue.push(&small, patience), queue.next());
        assert_eq!(pushed, Pushed::Queued);
        assert_eq!(taken.map(|chunk| chunk.len()), Some(big.len()));
    }

    #[tokio::test]
    async fn closing_frees_who_waits() {
        let queue = Queue::default();
        let big = Bytes::from(vec![b'x'; QUEUE_BYTES]);
        assert_eq!(queue.push(&big, None).await, Pushed::Queued);
        queue.close_at(Instant::now() + Duration::from_millis(20));
        let ((), pushed) = tokio::join!(queue.closed(), queue.push(&big, None));
        assert_eq!(pushed, Pushed::Closed);
        assert!(queue.next().await.is_none());
    }

    #[tokio::test]
    async fn finishing_writes_what_is_there_and_takes_no_more() {
        let queue = Queue::default();
        let chunk = Bytes::from_static(b"last words");
        queue.push(&chunk, None).await;
        queue.finish(Instant::now() + Duration::from_mins(1));
        assert_eq!(queue.push(&chunk, None).await, Pushed::Closed);
        assert_eq!(queue.next().await, Some(chunk));
        assert!(queue.next().await.is_none());
    }
}
