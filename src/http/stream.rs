//! `/v1/stream`: published envelopes as server-sent events.
//!
//! Each client has a pump, which takes from the [`tail`] what it needs, and a short queue. The pump waits for the client a
//! bounded time; then the client is cut, told so, and comes back with `Last-Event-ID`.

mod tail;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, Weak};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State as Extract};
use axum::http::{HeaderMap, header};
use axum::response::{IntoResponse, Response};
use futures_util::{StreamExt as _, stream};
use serde::Deserialize;
use tokio::sync::{Mutex, mpsc, watch};
use tokio::task::yield_now;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::problem::{Problem, ProblemCode};
use super::{Server, State};
use crate::bus::{Bus, BusError, Follower};
use crate::retry::Backoff;
use tail::{BLOCK_BYTES, Block, Held, Tail};

/// Blocks that wait for a client: what one that does not read can hold on to.
const QUEUE: usize = 4;
/// How long a pump waits for its client.
const PATIENCE: Duration = Duration::from_secs(10);
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// For the bus to say where the stream ends.
const BUS_WAIT: Duration = Duration::from_secs(5);

/// `?platform=&channel=&type=`: what the client wants to see.
#[derive(Debug, Default, Deserialize)]
pub(super) struct Filter {
    platform: Option<String>,
    channel: Option<String>,
    #[serde(rename = "type")]
    kind: Option<String>,
}

/// What stands in the address.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Asked {
    /// As the header `Last-Event-ID`, which a browser's `EventSource` cannot be given.
    last_event_id: Option<String>,
    #[serde(flatten)]
    filter: Filter,
}

impl Filter {
    fn is_for_all(&self) -> bool {
        self.platform.is_none() && self.channel.is_none() && self.kind.is_none()
    }

    fn passes(&self, block: &Block, line: usize) -> bool {
        let of_kind = self.kind.as_ref().is_none_or(|kind| *kind == block.lines[line].kind);
        if !of_kind || (self.platform.is_none() && self.channel.is_none()) {
            return of_kind;
        }
        let source = &block.sources()[line];
        self.platform.as_ref().is_none_or(|platform| *platform == source.platform)
            && self.channel.as_ref().is_none_or(|channel| *channel == source.channel)
    }

    /// What of a block a client is sent that has seen everything before `next`.
    fn pick(&self, block: &Block, next: u64) -> Bytes {
        let first = block.lines.partition_point(|line| line.position < next);
        if self.is_for_all() {
            let begin = if first == 0 { 0 } else { block.lines[first - 1].end };
            return block.bytes.slice(begin..);
        }
        let lines = (first..block.lines.len()).filter(|line| self.passes(block, *line));
        Bytes::from(lines.flat_map(|line| block.event(line)).collect::<Vec<_>>())
    }
}

/// A place among the clients, given back when dropped.
struct Place(Arc<AtomicUsize>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Places taken.
#[derive(Default)]
pub(super) struct Places(Arc<AtomicUsize>);

impl Places {
    fn take(&self, most: usize) -> Option<Place> {
        let taken = self
            .0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |taken| (taken < most).then_some(taken + 1));
        taken.ok().map(|_| Place(Arc::clone(&self.0)))
    }
}

/// What the clients share: their reader of the bus, while there are any.
#[derive(Default)]
pub(super) struct SharedTail(Mutex<Weak<Tail>>);

impl SharedTail {
    /// Takes hold of it; the first one to do so starts it.
    async fn hold(&self, server: &Server) -> Result<Arc<Tail>, BusError> {
        let mut held = self.0.lock().await;
        if let Some(tail) = held.upgrade() {
            return Ok(tail);
        }
        let (tail, reader) = Tail::attach(Arc::clone(&server.shown.bus)).await?;
        start_task(server, "stream reader", reader);
        let tail = Arc::new(tail);
        *held = Arc::downgrade(&tail);
        Ok(tail)
    }
}

pub(super) async fn stream(
    Extract(server): State,
    asked: Result<Query<Asked>, QueryRejection>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let Query(Asked { last_event_id, mut filter }) =
        asked.map_err(|rejection| Problem::new(ProblemCode::BadRequest, rejection.body_text()))?;
    filter.channel = filter.channel.map(|channel| channel.trim_start_matches('#').to_lowercase());
    let last_id = last_id(&headers, last_event_id.as_deref())?;
    let Some(place) = server.places.take(server.shown.config.stream_max_clients) else {
        return Err(Problem::new(ProblemCode::TooManyClients, "all places are taken; try again later"));
    };
    let (tail, identity, next) = begin(&server, last_id).await.map_err(|error| {
        Problem::new(ProblemCode::BusUnavailable, "the stream cannot be read now").because(&error)
    })?;
    let (pieces, queue) = mpsc::channel(QUEUE);
    let cut = Arc::new(OnceLock::new());
    let bus = Arc::clone(&server.shown.bus);
    let pump =
        Pump { bus, tail, filter, pieces, identity, next, alone: None, cut: Arc::clone(&cut), _place: place };
    start_task(&server, "stream client", pump.run(server.closing.clone()));
    let queued = stream::unfold(queue, |mut queue| async { queue.recv().await.map(|piece| (piece, queue)) });
    let farewell = stream::once(async move { Bytes::from(farewell(cut.get().copied().unwrap_or("closed"))) });
    let body = Body::from_stream(queued.chain(farewell).map(Ok::<_, std::convert::Infallible>));
    let head = [
        (header::CONTENT_TYPE, "text/event-stream"),
        (header::CACHE_CONTROL, "no-store"),
        (header::HeaderName::from_static("x-accel-buffering"), "no"),
    ];
    Ok((head, body).into_response())
}

fn start_task(server: &Server, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
    let mut tasks = server.streams.lock().unwrap_or_else(PoisonError::into_inner);
    tasks.forget_finished();
    tasks.spawn(name, task);
}

/// The last position that the client has seen, if it says so. The header is the newer one: a browser that comes back by
/// itself sends it to the same address.
fn last_id(headers: &HeaderMap, in_address: Option<&str>) -> Result<Option<u64>, Problem> {
    let refused = || {
        Problem::new(ProblemCode::BadRequest, "Last-Event-ID or lastEventId is no position of this stream")
    };
    let id = match headers.get("last-event-id") {
        Some(header) => Some(header.to_str().map_err(|_| refused())?),
        // Who has heard nothing yet may say so.
        None => in_address.filter(|id| !id.is_empty()),
    };
    id.map(|id| id.parse().map_err(|_| refused())).transpose()
}

/// Where a client begins. Waits for a bus that is on its way, as after a start: a browser's `EventSource` that is refused
/// does not come back to where it was.
async fn begin(server: &Server, last_id: Option<u64>) -> Result<(Arc<Tail>, String, u64), BusError> {
    let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(1));
    let mut why = BusError::Away("no answer in time".to_owned());
    let deadline = Instant::now() + BUS_WAIT;
    while let Ok(begun) = timeout_at(deadline, place_of(server, last_id)).await {
        match begun {
            Err(error) if error.is_transient() => why = error,
            begun => return begun,
        }
        sleep(backoff.next_wait()).await;
    }
    Err(why)
}

/// Behind what the client has seen last, or at the end.
async fn place_of(server: &Server, last_id: Option<u64>) -> Result<(Arc<Tail>, String, u64), BusError> {
    let tail = server.tail.hold(server).await?;
    let (identity, end) =
        tail.end().ok_or_else(|| BusError::Interrupted("it is being followed again".to_owned()))?;
    let next = match last_id {
        None => end,
        Some(last) if last < end => last + 1,
        // The tail may lag a little; what lies behind the end for certain is a position of a stream that is gone.
        Some(last) if last < tail::position_of_end(&*server.shown.bus).await? => last + 1,
        Some(_) => 1,
    };
    Ok((tail, identity, next))
}

struct Pump {
    bus: Arc<dyn Bus>,
    tail: Arc<Tail>,
    filter: Filter,
    pieces: mpsc::Sender<Bytes>,
    /// The stream that is read.
    identity: String,
    /// The position behind the last one seen.
    next: u64,
    /// Its own reader, while the tail does not reach back so far, and what it brought.
    alone: Option<(Follower, VecDeque<Block>)>,
    /// Why the client is let go.
    cut: Arc<OnceLock<&'static str>>,
    _place: Place,
}

impl Pump {
    async fn run(mut self, mut closing: watch::Receiver<bool>) {
        let why = tokio::select! {
            why = self.pump() => why,
            () = async { drop(closing.wait_for(|closing| *closing).await) } => "shutting_down",
        };
        self.cut.get_or_init(|| why);
    }

    async fn pump(&mut self) -> &'static str {
        // The head of the answer goes out at once, even if nothing is said for a long time; with the place to come back
        // to, even if nothing is said before the connection is lost.
        let mut piece = self.remark("inlet");
        let mut changes = self.tail.changes();
        let client = self.pieces.clone();
        loop {
            match timeout(PATIENCE, client.send(piece)).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) => return "client_gone",
                Err(_) => return "too_slow",
            }
            let awake = Instant::now() + KEEP_ALIVE;
            piece = tokio::select! {
                piece = timeout_at(awake, self.next_piece(&mut changes)) => match piece {
                    Ok(piece) => piece,
                    Err(_) => self.remark("still here"),
                },
                () = client.closed() => return "client_gone",
            };
        }
    }

    /// Waits for something that passes the filter. Cancel safe: whenever it waits, nothing is gathered.
    async fn next_piece(&mut self, changes: &mut watch::Receiver<()>) -> Bytes {
        let mut gathered = Vec::new();
        loop {
            changes.mark_unchanged();
            match self.tail.from(&self.identity, self.next) {
                Held::Block(block) => {
                    self.alone = None;
                    let piece = self.pass(&block);
                    if self.filter.is_for_all() && !piece.is_empty() {
                        return piece;
                    }
                    // A few of each block: together they are worth a write.
                    gathered.extend_from_slice(&piece);
                    if gathered.len() >= BLOCK_BYTES {
                        return Bytes::from(gathered);
                    }
                    if gathered.is_empty() {
                        // Whoever filters everything out must not keep the others waiting.
                        yield_now().await;
                    }
                }
                Held::Nothing | Held::Not if !gathered.is_empty() => return Bytes::from(gathered),
                // The reader outlives its clients: there is always another change.
                Held::Nothing => drop(changes.changed().await),
                Held::Not => {
                    let piece = self.read_alone().await;
                    if !piece.is_empty() {
                        return piece;
                    }
                }
            }
        }
    }

    fn pass(&mut self, block: &Block) -> Bytes {
        let piece = self.filter.pick(block, self.next);
        self.next = block.next;
        piece
    }

    /// A step of its own reader; an empty piece where there is nothing to send yet.
    async fn read_alone(&mut self) -> Bytes {
        let followed = match &mut self.alone {
            None => match tail::follow_from(&*self.bus, &self.identity, self.next).await {
                Ok(followed) => followed,
                Err(_) => tail::follow_again(&*self.bus, &self.identity, self.next).await,
            },
            Some((follower, blocks)) => {
                if let Some(block) = blocks.pop_front() {
                    return self.pass(&block);
                }
                match tail::next_of(follower).await {
                    Ok(batch) => {
                        *blocks = tail::blocks_of(&batch.messages).into();
                        return Bytes::new();
                    }
                    Err(_) => tail::follow_again(&*self.bus, &self.identity, self.next).await,
                }
            }
        };
        self.identity.clone_from(&followed.0.identity);
        self.next = followed.1;
        self.alone = Some((followed.0, VecDeque::new()));
        Bytes::new()
    }

    /// A comment, with the position to come back to.
    fn remark(&self, text: &str) -> Bytes {
        Bytes::from(format!(": {text}\nid: {}\n\n", self.next.saturating_sub(1)))
    }
}

fn farewell(why: &str) -> String {
    format!("event: cut\ndata: {{\"reason\":\"{why}\"}}\n\n")
}
