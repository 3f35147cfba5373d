//! What happens around every request: its id, its counters, its log line.

use std::sync::Arc;
use std::time::Instant;

use axum::extract::{FromRequestParts, MatchedPath, Path, Request, State as Extract};
use axum::http::request::Parts;
use axum::http::{HeaderName, HeaderValue};
use axum::middleware::Next;
use axum::response::Response;
use uuid::Uuid;

use super::Server;
use super::metrics::{Route, StatusFamily};
use super::problem::{Problem, ProblemCode};
use crate::telemetry::metrics::Label as _;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const LONGEST_ID: usize = 128;

/// A segment of a path, as it is meant.
pub(super) struct Segment(pub(super) String);

impl<S: Send + Sync> FromRequestParts<S> for Segment {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let segment = Path::<String>::from_request_parts(parts, state).await;
        let segment = segment.map_err(|why| Problem::new(ProblemCode::BadRequest, why.body_text()))?;
        Ok(Self(segment.0))
    }
}

/// The id of a request.
#[derive(Debug, Clone)]
pub(super) struct RequestId(pub(super) String);

/// Gives the request its id: the caller's, if it is 1–128 visible ASCII characters, else a new one.
pub(super) async fn identify(mut request: Request) -> Request {
    let given = request.headers().get(REQUEST_ID).and_then(|id| id.to_str().ok());
    let usable =
        given.filter(|id| (1..=LONGEST_ID).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_graphic()));
    let id = usable.map_or_else(|| Uuid::new_v4().to_string(), str::to_owned);
    request.extensions_mut().insert(RequestId(id));
    request
}

/// Counts the request and puts its id on the answer.
pub(super) async fn observe(Extract(server): Extract<Arc<Server>>, request: Request, next: Next) -> Response {
    let started = Instant::now();
    let RequestId(id) = request.extensions().get().cloned().unwrap_or(RequestId(String::new()));
    let path = request.extensions().get::<MatchedPath>().map(|path| Route::of(path.as_str()));
    let route = path.unwrap_or(Route::Unmatched);
    let mut response = next.run(request).await;
    let metrics = &server.shown.metrics;
    if let Some(problem) = response.extensions_mut().remove::<Problem>() {
        let (error_code, route) = (problem.code(), route.as_str());
        // Counted by what is logged.
        if let Some(error) = problem.cause() {
            tracing::warn!(request_id = id, %error_code, error, route, "a request could not be answered");
        } else {
            tracing::debug!(request_id = id, %error_code, route, "refused a request");
        }
        // What was put on it on the way out stays.
        let head = std::mem::take(response.headers_mut());
        response = problem.into_response_for(&id);
        response.headers_mut().extend(head);
    }
    metrics.requests.of(route, StatusFamily::of(response.status().as_u16())).inc();
    metrics.durations[route.index()].observe(started.elapsed().as_secs_f64());
    if let Ok(value) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    response
}
