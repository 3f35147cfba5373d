//! What a request brings along and nobody reads is read out before the answer goes: a connection that is closed with
//! something unread in it is reset, and whoever was still sending does not see the answer.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::Error;
use axum::body::{Body, BodyDataStream, Bytes, HttpBody as _};
use axum::extract::Request;
use axum::middleware::Next;
use axum::response::Response;
use futures_util::{Stream, StreamExt as _};
use tokio::sync::oneshot;
use tokio::time::timeout;

/// For whoever is still sending to come to an end.
const LINGER: Duration = Duration::from_secs(2);

/// A body that comes back when it is let go of before its end.
struct Lent {
    body: BodyDataStream,
    back: Option<oneshot::Sender<BodyDataStream>>,
}

impl Stream for Lent {
    type Item = Result<Bytes, Error>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let next = ready!(self.body.poll_next_unpin(context));
        if !matches!(next, Some(Ok(_))) {
            self.back = None;
        }
        Poll::Ready(next)
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let Some(back) = self.back.take() {
            let empty = Body::empty().into_data_stream();
            drop(back.send(std::mem::replace(&mut self.body, empty)));
        }
    }
}

/// Reads out what is left of a request's body when its answer is made.
pub(super) async fn read_out(request: Request, next: Next) -> Response {
    if request.body().is_end_stream() {
        return next.run(request).await;
    }
    let (back, mut left) = oneshot::channel();
    let lend = |body: Body| Body::from_stream(Lent { body: body.into_data_stream(), back: Some(back) });
    let response = next.run(request.map(lend)).await;
    if let Ok(mut body) = left.try_recv() {
        // Whoever sends without end is answered all the same.
        drop(timeout(LINGER, async { while let Some(Ok(_)) = body.next().await {} }).await);
    }
    response
}
