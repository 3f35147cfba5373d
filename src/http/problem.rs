//! The one place that turns what went wrong into an answer: a stable code, a public message; the cause goes to
//! the log alone.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::json;

use crate::label;

label! {
    /// Every code that an answer can carry.
    pub enum ProblemCode {
        /// No such path.
        NotFound => "not_found",
        /// The path does not take this method.
        MethodNotAllowed => "method_not_allowed",
        /// Missing or wrong token.
        Unauthorized => "unauthorized",
        /// No token is set, and the request is not from this machine.
        LoopbackOnly => "loopback_only",
        /// The request makes no sense.
        BadRequest => "bad_request",
        /// All places are taken.
        TooManyClients => "too_many_clients",
        /// The bus cannot be read now.
        BusUnavailable => "bus_unavailable",
        /// The user store does not answer.
        StoreUnavailable => "store_unavailable",
        /// The service is shutting down.
        ShuttingDown => "shutting_down",
        /// Our fault.
        Internal => "internal",
    }
}

impl ProblemCode {
    fn status(self) -> StatusCode {
        match self {
            Self::NotFound => StatusCode::NOT_FOUND,
            Self::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
            Self::Unauthorized => StatusCode::UNAUTHORIZED,
            Self::LoopbackOnly => StatusCode::FORBIDDEN,
            Self::BadRequest => StatusCode::BAD_REQUEST,
            Self::TooManyClients | Self::BusUnavailable | Self::StoreUnavailable | Self::ShuttingDown => {
                StatusCode::SERVICE_UNAVAILABLE
            }
            Self::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }
}

/// An answer that says what is wrong. The request's id is added on the way out.
#[derive(Debug, Clone)]
pub(super) struct Problem {
    code: ProblemCode,
    message: String,
}

impl Problem {
    /// `message` is read by whoever made the request: it holds nothing of ours.
    pub(super) fn new(code: ProblemCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }

    /// The body, once the request's id is known.
    pub(super) fn into_response_for(self, request_id: &str) -> Response {
        let body = json!({
            "error": { "code": self.code.to_string(), "message": self.message },
            "requestId": request_id,
        });
        let mut response = (self.code.status(), Json(body)).into_response();
        if self.code.status() == StatusCode::SERVICE_UNAVAILABLE {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("5"));
        }
        if self.code == ProblemCode::Unauthorized {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }

    /// Its code.
    pub(super) fn code(&self) -> ProblemCode {
        self.code
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let mut response = self.code.status().into_response();
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
