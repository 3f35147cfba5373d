//! Every act of an operator has its record: whatever is asked under `/admin` that is more than a look.
//!
//! A request's body is read here, in front of its handler, so that its fields can be recorded before anything is done: it
//! has a largest size and a time. Captured lines, which may be without end, flow through uncounted until they are over.
//! What was begun is finished, and its record completed, also when whoever asked for it hangs up.

use std::collections::HashMap;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use axum::Json;
use axum::body::{Body, to_bytes};
use axum::extract::rejection::QueryRejection;
use axum::extract::{MatchedPath, Query, Request, State as Extract};
use axum::middleware::Next;
use axum::response::Response;
use bytes::Bytes;
use futures_util::{FutureExt as _, StreamExt as _};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::metrics::Route;
use super::problem::{Problem, ProblemCode};
use super::request::RequestId;
use super::{Server, State};
use crate::audit::{self, Actor, Begun, Deed, Details, Outcome};
use crate::telemetry::metrics::Label as _;

/// Largest body of an act.
const LARGEST_BODY: usize = 64 * 1024;
/// For the whole of it to come.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);
/// Records in an answer that does not say how many.
const USUAL_RECORDS: usize = 100;

/// Records what is more than a look.
pub(super) async fn record(
    Extract(server): Extract<Arc<Server>>,
    request: Request,
    next: Next,
) -> Result<Response, Problem> {
    if request.method().is_safe() {
        return Ok(next.run(request).await);
    }
    let (deed, request, size) = describe(request).await?;
    let (done, answer) = oneshot::channel();
    let act = act(Arc::clone(&server), deed, size, next.run(request));
    {
        let mut acts = server.acts.lock().unwrap_or_else(PoisonError::into_inner);
        acts.forget_finished();
        // Whoever asked may be gone.
        acts.spawn("act", async move { drop(done.send(act.await)) });
    }
    answer.await.unwrap_or_else(|_| Err(failed()))
}

fn failed() -> Problem {
    Problem::new(ProblemCode::Internal, "something went wrong in here; the log has more")
}

async fn act(
    server: Arc<Server>,
    deed: Deed,
    size: Option<Arc<AtomicU64>>,
    handler: impl Future<Output = Response>,
) -> Result<Response, Problem> {
    let shown = &server.shown;
    let record = Begun::write(&shown.store, &shown.clock, deed).await.map_err(|error| Problem::of(&error))?;
    // A panic is logged by its hook.
    let mut response = AssertUnwindSafe(handler).catch_unwind().await.map_err(|_| failed());
    let mut details = Details::new();
    if let Ok(response) = &mut response {
        details = response.extensions_mut().remove().unwrap_or_default();
    }
    if let Some(size) = size {
        details = details.shown("bytes", size.load(Ordering::Relaxed));
    }
    record.complete(outcome(&response), details).await;
    response
}

fn outcome(response: &Result<Response, Problem>) -> Outcome {
    match response {
        Err(problem) => Outcome::Failed(problem.code()),
        Ok(response) => match response.extensions().get::<Problem>() {
            Some(problem) => Outcome::Failed(problem.code()),
            None if response.status().is_success() => Outcome::Done,
            None if response.status().is_client_error() => Outcome::Failed(ProblemCode::BadRequest),
            None => Outcome::Failed(ProblemCode::Internal),
        },
    }
}

/// What is about to be done, and the request to do it with; how long its body was when it is over, where that is all that
/// is recorded of it.
async fn describe(request: Request) -> Result<(Deed, Request, Option<Arc<AtomicU64>>), Problem> {
    let (parts, body) = request.into_parts();
    let path = parts.extensions.get::<MatchedPath>().map_or_else(|| parts.uri.path(), MatchedPath::as_str);
    let actor = parts.extensions.get::<Actor>().cloned().ok_or_else(failed)?;
    let request_id = parts.extensions.get().map(|RequestId(id)| id.clone());
    let action = format!("{} {path}", parts.method);
    let is_stream_of_lines = path == Route::AdminReplay.as_str();
    let mut details = Details::new();
    if let Ok(Query(query)) = Query::<HashMap<String, String>>::try_from_uri(&parts.uri) {
        details = details.of_request(&query.into_iter().map(|(name, text)| (name, text.into())).collect());
    }
    let (body, size) = if is_stream_of_lines {
        let size = Arc::new(AtomicU64::new(0));
        (measured(body, Arc::clone(&size)), Some(size))
    } else {
        let body = whole(body).await?;
        details = of_body(details, &body);
        (Body::from(body), None)
    };
    let deed = Deed { actor, action, target: parts.uri.path().to_owned(), details, request_id };
    Ok((deed, Request::from_parts(parts, body), size))
}

async fn whole(body: Body) -> Result<Bytes, Problem> {
    match timeout(BODY_TIMEOUT, to_bytes(body, LARGEST_BODY)).await {
        Ok(Ok(body)) => Ok(body),
        // It is too large, or it broke off, and then nobody reads this.
        Ok(Err(_)) => {
            let text = format!("a body of more than {LARGEST_BODY} bytes is not taken here");
            Err(Problem::new(ProblemCode::BodyTooLarge, text))
        }
        Err(_) => Err(Problem::new(ProblemCode::RequestTimeout, "the body did not come in time")),
    }
}

fn of_body(details: Details, body: &[u8]) -> Details {
    match serde_json::from_slice::<Map<String, Value>>(body) {
        Ok(fields) => details.of_request(&fields),
        Err(_) if body.is_empty() => details,
        Err(_) => details.shown("bytes", body.len()),
    }
}

fn measured(body: Body, size: Arc<AtomicU64>) -> Body {
    Body::from_stream(body.into_data_stream().inspect(move |piece| {
        if let Ok(piece) = piece {
            size.fetch_add(piece.len() as u64, Ordering::Relaxed);
        }
    }))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Wanted {
    limit: Option<usize>,
    after: Option<String>,
}

/// `GET /admin/audit`: records, newest first.
pub(super) async fn list(
    Extract(server): State,
    wanted: Result<Query<Wanted>, QueryRejection>,
) -> Result<Json<Value>, Problem> {
    let bad = |text: String| Problem::new(ProblemCode::BadRequest, text);
    let Query(Wanted { limit, after }) = wanted.map_err(|rejection| bad(rejection.body_text()))?;
    let limit = limit.unwrap_or(USUAL_RECORDS);
    if !(1..=audit::MOST_RECORDS).contains(&limit) {
        return Err(bad(format!("limit is from 1 to {}", audit::MOST_RECORDS)));
    }
    if after.as_deref().is_some_and(|after| !audit::is_id(after)) {
        return Err(bad("after is no id of a record".to_owned()));
    }
    let page = audit::list(&server.shown.store, after.map(Into::into), limit).await;
    let page = page.map_err(|error| Problem::of_store(&error))?;
    let mut answer = json!({ "records": page.records });
    if let (Some(answer), Some(next)) = (answer.as_object_mut(), page.next) {
        answer.insert("next".to_owned(), (*next).into());
    }
    Ok(Json(answer))
}
