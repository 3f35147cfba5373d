//! `/v1/stream`: published envelopes as server-sent events.
//!
//! Each client has a pump that follows the bus and a short queue. The pump waits for the client a bounded time;
//! then the client is cut, told so, and comes back with `Last-Event-ID`.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, PoisonError};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State as Extract};
use axum::http::{HeaderMap, header};
use axum::response::{IntoResponse, Response};
use futures_util::{StreamExt as _, stream};
use serde::Deserialize;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;

use super::problem::{Problem, ProblemCode};
use super::{Server, State};
use crate::bus::{Bus, Follower, Start, Stored, Wanted};

/// Pieces that wait for a client, and how large one is at most, or one envelope more: what a client that does not
/// read can hold on to.
const QUEUE: usize = 4;
const PIECE_BYTES: usize = 64 * 1024;
/// How long a pump waits for its client.
const PATIENCE: Duration = Duration::from_secs(10);
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// Waits before following again after an interruption.
const REATTACH: Duration = Duration::from_millis(500);

/// `?platform=&channel=&type=`: what the client wants to see.
#[derive(Debug, Default, Deserialize)]
pub(super) struct Filter {
    platform: Option<String>,
    channel: Option<String>,
    #[serde(rename = "type")]
    kind: Option<String>,
}

impl Filter {
    fn passes(&self, stored: &Stored) -> bool {
        #[derive(Deserialize)]
        struct Envelope<'a> {
            #[serde(borrow)]
            source: Option<Source<'a>>,
        }
        #[derive(Deserialize)]
        struct Source<'a> {
            #[serde(borrow)]
            platform: std::borrow::Cow<'a, str>,
            #[serde(borrow)]
            channel: std::borrow::Cow<'a, str>,
        }
        if stored.id.is_some_and(|id| id.is_dead_letter)
            || self.kind.as_ref().is_some_and(|kind| *kind != stored.kind)
        {
            return false;
        }
        if self.platform.is_none() && self.channel.is_none() {
            return true;
        }
        let Ok(Envelope { source: Some(source) }) = serde_json::from_slice(&stored.payload) else {
            return false;
        };
        self.platform.as_ref().is_none_or(|platform| *platform == source.platform)
            && self
                .channel
                .as_ref()
                .is_none_or(|channel| channel.trim_start_matches('#').to_lowercase() == source.channel)
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

pub(super) async fn stream(
    Extract(server): State,
    filter: Result<Query<Filter>, QueryRejection>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let Query(filter) =
        filter.map_err(|rejection| Problem::new(ProblemCode::BadRequest, rejection.body_text()))?;
    let start = start(&headers)?;
    let Some(place) = server.places.take(server.shown.config.stream_max_clients) else {
        return Err(Problem::new(ProblemCode::TooManyClients, "all places are taken; try again later"));
    };
    let follower = server.shown.bus.follow(start, Wanted::Whole).await.map_err(|error| {
        Problem::new(ProblemCode::BusUnavailable, "the stream cannot be read now").because(&error)
    })?;
    let (pieces, queue) = mpsc::channel(QUEUE);
    let cut = Arc::new(OnceLock::new());
    let next = match start {
        Start::Position(position) => Some(position),
        Start::Time(_) | Start::Last | Start::End => None,
    };
    let pump = Pump {
        bus: Arc::clone(&server.shown.bus),
        filter,
        pieces,
        next,
        identity: identity(&*server.shown.bus),
        cut: Arc::clone(&cut),
        _place: place,
    };
    start_pump(&server, pump.run(follower, server.closing.clone()));
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

fn start_pump(server: &Server, pump: impl Future<Output = ()> + Send + 'static) {
    let mut pumps = server.pumps.lock().unwrap_or_else(PoisonError::into_inner);
    pumps.forget_finished();
    pumps.spawn("stream client", pump);
}

/// Where the client left off, or the end.
fn start(headers: &HeaderMap) -> Result<Start, Problem> {
    match headers.get("last-event-id") {
        None => Ok(Start::End),
        Some(id) => {
            let position = id.to_str().ok().and_then(|id| id.parse::<u64>().ok()).ok_or_else(|| {
                Problem::new(ProblemCode::BadRequest, "Last-Event-ID is no position of this stream")
            })?;
            Ok(Start::Position(position.saturating_add(1)))
        }
    }
}

struct Pump {
    bus: Arc<dyn Bus>,
    filter: Filter,
    pieces: mpsc::Sender<Bytes>,
    /// The position behind the last one seen.
    next: Option<u64>,
    /// The stream it is the position of.
    identity: Option<String>,
    /// Why the client is let go.
    cut: Arc<OnceLock<&'static str>>,
    _place: Place,
}

impl Pump {
    async fn run(mut self, mut follower: Follower, mut closing: watch::Receiver<bool>) {
        let why = tokio::select! {
            why = self.pump(&mut follower) => why,
            () = async { drop(closing.wait_for(|closing| *closing).await) } => "shutting_down",
        };
        self.cut.get_or_init(|| why);
    }

    async fn pump(&mut self, follower: &mut Follower) -> &'static str {
        // The head of the answer goes out at once, even if nothing is said for a long time.
        let mut pieces = vec![Bytes::from_static(b": inlet\n\n")];
        loop {
            for piece in pieces {
                match timeout(PATIENCE, self.pieces.send(piece)).await {
                    Ok(Ok(())) => {}
                    Ok(Err(_)) => return "client_gone",
                    Err(_) => return "too_slow",
                }
            }
            pieces = match timeout(KEEP_ALIVE, follower.next()).await {
                Err(_) => vec![Bytes::from_static(b": still here\n\n")],
                Ok(Some(Ok(batch))) => self.write(&batch.messages),
                Ok(Some(Err(_)) | None) => {
                    tokio::select! {
                        again = follow_again(&*self.bus, self.identity.as_deref(), self.next) => *follower = again,
                        () = self.pieces.closed() => return "client_gone",
                    }
                    self.identity = identity(&*self.bus);
                    Vec::new()
                }
            };
        }
    }

    fn write(&mut self, messages: &[Stored]) -> Vec<Bytes> {
        let mut pieces = Vec::new();
        let mut piece = String::new();
        for stored in messages {
            self.next = Some(stored.position + 1);
            let Ok(data) = std::str::from_utf8(&stored.payload) else { continue };
            // An envelope is one line; what is not is none of ours.
            if data.contains('\n') || !self.filter.passes(stored) {
                continue;
            }
            let written = write!(piece, "id: {}\ndata: {data}\n\n", stored.position);
            debug_assert!(written.is_ok(), "writing to a String does not fail");
            if piece.len() >= PIECE_BYTES {
                pieces.push(Bytes::from(std::mem::take(&mut piece)));
            }
        }
        if !piece.is_empty() {
            pieces.push(Bytes::from(piece));
        }
        pieces
    }
}

/// Which stream the bus is attached to.
fn identity(bus: &dyn Bus) -> Option<String> {
    bus.stream().map(|stream| stream.identity)
}

/// After an interruption: from where it broke off, as often as it takes; another stream from its start.
async fn follow_again(bus: &dyn Bus, before: Option<&str>, next: Option<u64>) -> Follower {
    loop {
        tokio::time::sleep(REATTACH).await;
        let start = match next {
            _ if identity(bus).as_deref() != before => Start::Position(1),
            Some(next) => Start::Position(next),
            None => Start::End,
        };
        if let Ok(follower) = bus.follow(start, Wanted::Whole).await {
            return follower;
        }
    }
}

fn farewell(why: &str) -> String {
    format!("event: cut\ndata: {{\"reason\":\"{why}\"}}\n\n")
}
