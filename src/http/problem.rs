//! The one place that turns what went wrong into an answer: a stable code, a public message; the cause goes to
//! the log alone.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::json;

use crate::errors::Coded;
use crate::store::StoreError;
use crate::telemetry::logs::with_causes;

pub(super) use crate::errors::ErrorCode as ProblemCode;

/// An answer that says what is wrong. The request's id is added on the way out.
#[derive(Debug, Clone)]
pub(super) struct Problem {
    code: ProblemCode,
    message: String,
    /// For the log alone.
    cause: Option<String>,
}

impl Problem {
    /// `message` is read by whoever made the request: it holds nothing of ours.
    pub(super) fn new(code: ProblemCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), cause: None }
    }

    /// An error whose own words are for whoever made the request. What caused it goes to the log.
    pub(super) fn of<E: Coded + std::error::Error>(error: &E) -> Self {
        let cause = error.source().map(with_causes);
        Self { code: error.code(), message: error.to_string(), cause }
    }

    /// The store did not do what it was asked.
    pub(super) fn of_store(error: &StoreError) -> Self {
        let message = if error.is_transient() {
            "the store does not answer; try again"
        } else {
            "the store refuses; the log says why"
        };
        Self::new(error.code(), message).because(error)
    }

    /// With what it comes from, for the log.
    pub(super) fn because(self, cause: &(dyn std::error::Error + 'static)) -> Self {
        Self { cause: Some(with_causes(cause)), ..self }
    }

    /// The status of its code.
    fn status(&self) -> StatusCode {
        let status = self.code.status().map(StatusCode::from_u16);
        status.and_then(Result::ok).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
    }

    /// The body, once the request's id is known.
    pub(super) fn into_response_for(self, request_id: &str) -> Response {
        let body = json!({
            "error": { "code": self.code.to_string(), "message": self.message },
            "requestId": request_id,
        });
        let mut response = (self.status(), Json(body)).into_response();
        if self.status() == StatusCode::SERVICE_UNAVAILABLE {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("5"));
        }
        if self.code == ProblemCode::Unauthorized {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }

    /// What it comes from.
    pub(super) fn cause(&self) -> Option<&str> {
        self.cause.as_deref()
    }

    /// Its code.
    pub(super) fn code(&self) -> ProblemCode {
        self.code
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let mut response = self.status().into_response();
        response.extensions_mut().insert(self);
        response
    }
}

pub(super) async fn not_found() -> Problem {
    Problem::new(ProblemCode::NotFound, "there is nothing here")
}

pub(super) async fn method_not_allowed() -> Problem {
    Problem::new(ProblemCode::MethodNotAllowed, "not with this method")
}
