//! `/metrics`, and what the HTTP server itself counts.

use axum::extract::State as Extract;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use prometheus::{Encoder as _, Histogram, Registry, TextEncoder};

use super::State;
use super::problem::{Problem, ProblemCode};
use crate::label;
use crate::telemetry::metrics::{CountersBy, Label as _, Register};

label! {
    /// Routes, as in the label; the rest is `unmatched`.
    pub enum Route {
        /// Liveness.
        Livez => "/livez",
        /// Readiness.
        Readyz => "/readyz",
        /// Health.
        Healthz => "/healthz",
        /// The source.
        DebugTwitch => "/_debug/twitch",
        /// The settings.
        DebugConfig => "/_debug/config",
        /// This.
        Metrics => "/metrics",
        /// Published envelopes.
        Stream => "/v1/stream",
        /// The page.
        Page => "/",
        /// Captured lines.
        AdminReplay => "/admin/replay",
        /// Channels.
        AdminChannels => "/admin/channels",
        /// One channel.
        AdminChannel => "/admin/channels/{login}",
        /// Users.
        AdminUsers => "/admin/users",
        /// A user.
        AdminUser => "/admin/users/{key}",
        /// Whether a user is ignored.
        AdminUserIgnored => "/admin/users/{key}/ignored",
        /// Whether a user is forgotten.
        AdminUserForgotten => "/admin/users/{key}/forgotten",
        /// A token.
        AdminLogin => "/admin/login",
        /// What operators did.
        AdminAudit => "/admin/audit",
        /// Errors by their code.
        AdminErrors => "/admin/errors",
        /// Everything else.
        Unmatched => "unmatched",
    }
}

impl Route {
    /// The route of a matched path; aliases count as what they stand for.
    pub fn of(path: &str) -> Self {
        match path {
            "/live" => Self::Livez,
            "/ready" => Self::Readyz,
            "/health" => Self::Healthz,
            path => Self::ALL.iter().copied().find(|route| route.as_str() == path).unwrap_or(Self::Unmatched),
        }
    }
}

label! {
    /// Families of statuses.
    pub enum StatusFamily {
        /// Done.
        Success => "2xx",
        /// Elsewhere.
        Redirection => "3xx",
        /// The request's fault.
        ClientError => "4xx",
        /// Ours, or not now.
        ServerError => "5xx",
    }
}

impl StatusFamily {
    /// The family of a status.
    pub fn of(status: u16) -> Self {
        match status {
            0..300 => Self::Success,
            300..400 => Self::Redirection,
            400..500 => Self::ClientError,
            500.. => Self::ServerError,
        }
    }
}

/// The series.
pub struct HttpMetrics {
    /// Answers.
    pub requests: CountersBy<Route, StatusFamily>,
    /// Seconds to the answer's head.
    pub durations: Vec<Histogram>,
}

impl HttpMetrics {
    /// Registers the series.
    pub fn new(registry: &Registry) -> prometheus::Result<Self> {
        let register = Register(registry);
        Ok(Self {
            requests: register.counters_by(
                "http_requests_total",
                "Requests answered",
                ["route", "status"],
            )?,
            durations: register.latencies::<Route>(
                "http_request_duration_seconds",
                "From a request to the head of its answer",
                "route",
            )?,
        })
    }
}

pub(super) async fn metrics(Extract(server): State) -> Result<Response, Problem> {
    let mut text = Vec::new();
    let encoder = TextEncoder::new();
    encoder.encode(&server.shown.registry.gather(), &mut text).map_err(|error| {
        Problem::new(ProblemCode::Internal, "the metrics could not be written").because(&error)
    })?;
    Ok(([(header::CONTENT_TYPE, encoder.format_type().to_owned())], text).into_response())
}
