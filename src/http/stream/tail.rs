//! The end of the stream, read once for everybody who follows it.
//!
//! A reader of the bus for each client would make sixty-four clients cost sixty-four times what is published. So one
//! reader keeps the last blocks, made ready for the wire, in a bounded ring, and clients take them from there, each at
//! its own place. Who comes from further back, or falls behind the ring, reads the bus alone until it is near enough; it
//! holds up nobody. The reader is there while a client is.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use axum::body::Bytes;
use serde::Deserialize;
use tokio::sync::{oneshot, watch};
use tokio::time::{Instant, sleep, timeout, timeout_at};

use crate::bus::{Batch, Bus, BusError, Follower, Start, Stored, Wanted};
use crate::retry::Backoff;

/// What the ring holds at most, or one block more: at 1,000 messages a second some twelve seconds, which a client may be
/// behind without a reader of its own.
const RING_BYTES: usize = 16 * 1024 * 1024;
/// How large a block is at most, or one envelope more: it goes to a client in one piece.
pub(super) const BLOCK_BYTES: usize = 64 * 1024;
/// For so long, or up to so many bytes, the reader gathers before it tells the clients: a write for each message and client
/// would cost more than all the rest.
const GATHER: Duration = Duration::from_millis(20);
const GATHER_BYTES: usize = 1024 * 1024;
/// For an answer of the bus.
const BUS_WAIT: Duration = Duration::from_secs(5);
/// Waits before following again after an interruption: the first, and the longest.
const REATTACH: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(5));

/// Where an envelope is from.
#[derive(Debug, Default, Deserialize)]
pub(super) struct Source {
    pub(super) platform: String,
    pub(super) channel: String,
}

/// An envelope within its block.
pub(super) struct Line {
    pub(super) position: u64,
    pub(super) kind: String,
    /// Where its event ends in the block's bytes; it begins where the one before it ends.
    pub(super) end: usize,
}

/// A part of the stream, as server-sent events.
#[derive(Default)]
pub(super) struct Block {
    /// The position behind it.
    pub(super) next: u64,
    pub(super) bytes: Bytes,
    pub(super) lines: Vec<Line>,
    sources: OnceLock<Vec<Source>>,
}

impl Block {
    /// What a line's event is in the bytes.
    pub(super) fn event(&self, line: usize) -> Bytes {
        let begin = if line == 0 { 0 } else { self.lines[line - 1].end };
        self.bytes.slice(begin..self.lines[line].end)
    }

    /// Where each line is from: read once, and only if somebody asks.
    pub(super) fn sources(&self) -> &[Source] {
        #[derive(Deserialize)]
        struct Envelope {
            source: Source,
        }
        let source = |line| {
            let event = self.event(line);
            let data = memchr::memmem::find(&event, b"data: ").map_or(&event[..0], |at| &event[at + 6..]);
            serde_json::from_slice(data)
                .map_or_else(|_| Source::default(), |envelope: Envelope| envelope.source)
        };
        self.sources.get_or_init(|| (0..self.lines.len()).map(source).collect())
    }
}

/// What the bus brought, in blocks. Dead letters are none of a reader's business.
pub(super) fn blocks_of(messages: &[Stored]) -> Vec<Block> {
    let mut blocks = Vec::new();
    let (mut text, mut lines) = (String::new(), Vec::new());
    for (index, stored) in messages.iter().enumerate() {
        let is_dead_letter = stored.id.is_some_and(|id| id.is_dead_letter);
        // An envelope is one line of text; what is not is none of ours. A carriage return ends a line here, too.
        if let Some(data) =
            std::str::from_utf8(&stored.payload).ok().filter(|data| !data.contains(['\n', '\r']))
            && !is_dead_letter
        {
            let written = write!(text, "id: {}\ndata: {data}\n\n", stored.position);
            debug_assert!(written.is_ok(), "writing to a String does not fail");
            lines.push(Line { position: stored.position, kind: stored.kind.clone(), end: text.len() });
        }
        if text.len() >= BLOCK_BYTES || index + 1 == messages.len() {
            let bytes = Bytes::from(std::mem::take(&mut text));
            let lines = std::mem::take(&mut lines);
            blocks.push(Block { next: stored.position + 1, bytes, lines, sources: OnceLock::new() });
        }
    }
    blocks
}

/// The last blocks of one stream, without a gap.
struct Ring {
    identity: String,
    /// From this position on the ring holds everything.
    from: u64,
    /// Up to before this one.
    next: u64,
    blocks: VecDeque<Arc<Block>>,
    bytes: usize,
    /// Whether the bus is being followed now.
    is_attached: bool,
}

impl Ring {
    fn empty(identity: String, next: u64) -> Self {
        Self { identity, from: next, next, blocks: VecDeque::new(), bytes: 0, is_attached: true }
    }

    fn push(&mut self, block: Block) {
        self.next = block.next;
        self.bytes += block.bytes.len();
        self.blocks.push_back(Arc::new(block));
        while self.bytes > RING_BYTES
            && let Some(oldest) = self.blocks.pop_front()
        {
            self.bytes -= oldest.bytes.len();
            self.from = oldest.next;
        }
    }
}

/// What the ring has for a client.
pub(super) enum Held {
    /// The block with the position asked for.
    Block(Arc<Block>),
    /// Nothing was published after it yet.
    Nothing,
    /// It is further back, ahead of the ring, or of another stream.
    Not,
}

struct Shared {
    ring: Mutex<Ring>,
    changed: watch::Sender<()>,
}

impl Shared {
    fn with<T>(&self, work: impl FnOnce(&mut Ring) -> T) -> T {
        work(&mut self.ring.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn take_in(&self, messages: &[Stored]) {
        // Outside the lock: clients wait for it.
        let blocks = blocks_of(messages);
        self.with(|ring| blocks.into_iter().for_each(|block| ring.push(block)));
        self.changed.send_replace(());
    }
}

/// A client's hold on the ring. The last one to go ends the reader.
pub(super) struct Tail {
    shared: Arc<Shared>,
    _reader: oneshot::Sender<()>,
}

impl Tail {
    /// Attaches to the bus; what comes back as well reads it, until nobody holds the tail any more.
    pub(super) async fn attach(bus: Arc<dyn Bus>) -> Result<(Self, impl Future<Output = ()>), BusError> {
        let (follower, next, rest) = in_time(end_of(&*bus)).await?;
        let ring = Mutex::new(Ring::empty(follower.identity.clone(), next));
        let shared = Arc::new(Shared { ring, changed: watch::Sender::new(()) });
        shared.take_in(&rest);
        let (holds, mut released) = oneshot::channel();
        let reading = read(bus, Arc::clone(&shared), follower);
        let reader = async move {
            tokio::select! {
                () = reading => {}
                _ = &mut released => {}
            }
        };
        Ok((Self { shared, _reader: holds }, reader))
    }

    /// The stream's identity and the position behind what was published so far; `None` while the bus is away.
    pub(super) fn end(&self) -> Option<(String, u64)> {
        self.shared.with(|ring| ring.is_attached.then(|| (ring.identity.clone(), ring.next)))
    }

    /// What there is from `position` on, in the stream `identity`.
    pub(super) fn from(&self, identity: &str, position: u64) -> Held {
        self.shared.with(|ring| {
            if ring.identity != identity || !(ring.from..=ring.next).contains(&position) {
                return Held::Not;
            }
            let index = ring.blocks.partition_point(|block| block.next <= position);
            ring.blocks.get(index).map_or(Held::Nothing, |block| Held::Block(Arc::clone(block)))
        })
    }

    /// Says when there may be more.
    pub(super) fn changes(&self) -> watch::Receiver<()> {
        self.shared.changed.subscribe()
    }
}

/// Follows from the end; with it the position behind what there is, and what was published after that already.
async fn end_of(bus: &dyn Bus) -> Result<(Follower, u64, Vec<Stored>), BusError> {
    let mut follower = bus.follow(Start::Last, Wanted::Whole).await?;
    let mut batch = next_of(&mut follower).await?;
    if batch.messages.is_empty() {
        let first = follower.first_position;
        return Ok((follower, first, Vec::new()));
    }
    let rest = batch.messages.split_off(1);
    Ok((follower, batch.messages[0].position + 1, rest))
}

/// The position behind the last message of ours that there is now, dead letters too.
pub(super) async fn position_of_end(bus: &dyn Bus) -> Result<u64, BusError> {
    in_time(async {
        let (_, mut next, _) = end_of(bus).await?;
        let mut follower = bus.follow(Start::Position(next), Wanted::Headers).await?;
        loop {
            let batch = next_of(&mut follower).await?;
            next = batch.messages.last().map_or(next, |last| last.position + 1);
            if batch.is_end() {
                return Ok(next);
            }
        }
    })
    .await
}

async fn in_time<T>(asked: impl Future<Output = Result<T, BusError>>) -> Result<T, BusError> {
    timeout(BUS_WAIT, asked).await.unwrap_or_else(|_| Err(BusError::Away("no answer in time".to_owned())))
}

pub(super) async fn next_of(follower: &mut Follower) -> Result<Batch, BusError> {
    follower.next().await.unwrap_or_else(|| Err(BusError::Interrupted("the bus is closed".to_owned())))
}

async fn read(bus: Arc<dyn Bus>, shared: Arc<Shared>, mut follower: Follower) {
    loop {
        match gather(&mut follower).await {
            Ok(messages) => shared.take_in(&messages),
            Err(error) => {
                tracing::debug!(error = %error, "the stream's readers wait for the bus");
                shared.with(|ring| ring.is_attached = false);
                let (identity, next) = shared.with(|ring| (ring.identity.clone(), ring.next));
                let (again, next) = follow_again(&*bus, &identity, next).await;
                follower = again;
                shared.with(|ring| {
                    if ring.identity == follower.identity {
                        ring.is_attached = true;
                    } else {
                        *ring = Ring::empty(follower.identity.clone(), next);
                    }
                });
                shared.changed.send_replace(());
            }
        }
    }
}

async fn gather(follower: &mut Follower) -> Result<Vec<Stored>, BusError> {
    let mut messages = next_of(follower).await?.messages;
    let deadline = Instant::now() + GATHER;
    let mut bytes: usize = messages.iter().map(|stored| stored.payload.len()).sum();
    // What ends the follower is told by it again, next time.
    while bytes < GATHER_BYTES
        && let Ok(Ok(more)) = timeout_at(deadline, next_of(follower)).await
    {
        bytes += more.messages.iter().map(|stored| stored.payload.len()).sum::<usize>();
        messages.extend(more.messages);
    }
    Ok(messages)
}

/// From `next` on, as often as it takes; another stream from its start. With it the position that it begins at.
pub(super) async fn follow_again(bus: &dyn Bus, identity: &str, next: u64) -> (Follower, u64) {
    let mut backoff = Backoff::new(REATTACH.0, REATTACH.1);
    loop {
        sleep(backoff.next_wait()).await;
        if let Ok(follower) = follow_from(bus, identity, next).await {
            return follower;
        }
    }
}

/// From `next` on, if the stream is still `identity`, else from its start.
pub(super) async fn follow_from(
    bus: &dyn Bus,
    identity: &str,
    next: u64,
) -> Result<(Follower, u64), BusError> {
    let follow = |position| in_time(bus.follow(Start::Position(position), Wanted::Whole));
    let follower = follow(next).await?;
    if follower.identity == identity {
        return Ok((follower, next));
    }
    Ok((follow(1).await?, 1))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use jiff::Timestamp;

    use super::*;

    fn stored(position: u64, text: &str) -> Stored {
        Stored {
            position,
            stored_at: Timestamp::UNIX_EPOCH,
            id: None,
            subject: Arc::from("s"),
            kind: "k".to_owned(),
            by_user: None,
            payload: Bytes::from(text.to_owned()),
        }
    }

    fn shared(next: u64) -> Tail {
        let ring = Mutex::new(Ring::empty("s@1".to_owned(), next));
        let (holds, _) = oneshot::channel();
        Tail { shared: Arc::new(Shared { ring, changed: watch::Sender::new(()) }), _reader: holds }
    }

    /// Everything that the ring has from a position on; `None` where it cannot say.
    fn all_from(tail: &Tail, mut position: u64) -> Option<Vec<u64>> {
        let mut found = Vec::new();
        loop {
            match tail.from("s@1", position) {
                Held::Block(block) => {
                    found.extend(block.lines.iter().map(|line| line.position).filter(|p| *p >= position));
                    position = block.next;
                }
                Held::Nothing => return Some(found),
                Held::Not => return None,
            }
        }
    }

    #[test]
    fn blocks_hold_each_envelope_once_and_stay_small() {
        let messages: Vec<_> = (5..305).map(|position| stored(position, &"x".repeat(1_000))).collect();
        let blocks = blocks_of(&messages);
        assert!(blocks.len() > 3 && blocks.iter().all(|block| block.bytes.len() < BLOCK_BYTES + 1_100));
        let positions: Vec<_> =
            blocks.iter().flat_map(|block| block.lines.iter().map(|l| l.position)).collect();
        assert_eq!(positions, (5..305).collect::<Vec<_>>());
        assert_eq!(blocks.last().unwrap().next, 305);
        assert_eq!(blocks[0].event(1), format!("id: 6\ndata: {}\n\n", "x".repeat(1_000)));
        assert!(blocks_of(&[]).is_empty());
        // Nothing of ours: passed over, and its position is not asked for again.
        for text in ["two\nlines", "{}\rid: 99", "{}\r\n"] {
            let foreign = blocks_of(&[stored(7, text)]);
            assert_eq!(
                (foreign[0].next, foreign[0].lines.len(), foreign[0].bytes.len()),
                (8, 0, 0),
                "{text:?}"
            );
        }
    }

    #[test]
    fn the_ring_says_what_it_does_not_hold() {
        let tail = shared(10);
        assert_eq!(all_from(&tail, 10), Some(vec![]));
        assert!(all_from(&tail, 9).is_none() && all_from(&tail, 11).is_none());
        // Positions need not follow each other: others write to the stream, too.
        tail.shared.take_in(&[stored(12, "a"), stored(15, "b")]);
        assert_eq!(all_from(&tail, 10), Some(vec![12, 15]));
        assert_eq!(all_from(&tail, 13), Some(vec![15]));
        assert_eq!(all_from(&tail, 16), Some(vec![]));
        assert!(all_from(&tail, 17).is_none());
        assert!(matches!(tail.from("s@2", 12), Held::Not));
        for position in 16..1_000 {
            tail.shared.take_in(&[stored(position, &"x".repeat(20_000))]);
        }
        let from = tail.shared.with(|ring| ring.from);
        assert!(tail.shared.with(|ring| ring.bytes) <= RING_BYTES && from > 16);
        assert_eq!(all_from(&tail, from), Some((from..1_000).collect()));
        assert!(all_from(&tail, from - 1).is_none());
    }

    #[test]
    fn an_envelope_is_from_where_it_says() {
        let blocks = blocks_of(&[
            stored(1, r#"{"source":{"platform":"twitch","channel":"a"},"x":[1]}"#),
            stored(2, "no"),
        ]);
        let sources = blocks[0].sources();
        assert_eq!((&*sources[0].platform, &*sources[0].channel), ("twitch", "a"));
        assert_eq!((&*sources[1].platform, &*sources[1].channel), ("", ""));
    }
}
