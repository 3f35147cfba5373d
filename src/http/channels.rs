//! `/admin/channels`: what `inlet channel` does, while the service runs.

use axum::Json;
use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{Path, State as Extract};
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::State;
use super::problem::{Problem, ProblemCode};
use crate::channels::{Added, Channel, ChannelError};
use crate::errors::Coded as _;

/// Longest body that is read.
pub(super) const LARGEST_BODY: usize = 64 * 1024;

/// A channel to add.
#[derive(Deserialize)]
struct Wanted {
    login: String,
}

/// A channel with how it is now.
#[derive(Serialize)]
struct Shown {
    #[serde(flatten)]
    channel: Channel,
    /// As in `/_debug/twitch`.
    #[serde(flatten)]
    state: Option<Value>,
}

pub(super) async fn list(Extract(server): State) -> Result<Json<Value>, Problem> {
    let channels = server.shown.channels.list().await.map_err(|error| problem(&error))?;
    let snapshot = server.shown.twitch.snapshot();
    let shown: Vec<_> = channels
        .into_iter()
        .map(|channel| Shown { state: snapshot.state_of(&channel.login), channel })
        .collect();
    Ok(Json(json!({ "channels": shown })))
}

pub(super) async fn add(
    Extract(server): State,
    body: Result<Bytes, BytesRejection>,
) -> Result<(StatusCode, Json<Channel>), Problem> {
    let unreadable = || Problem::new(ProblemCode::BadRequest, "the body must be {\"login\":\"…\"}");
    let body = body.map_err(|_| unreadable())?;
    let Wanted { login } = serde_json::from_slice(&body).map_err(|_| unreadable())?;
    match server.shown.channels.add(&login).await {
        Ok(Added::New(channel)) => Ok((StatusCode::CREATED, Json(channel))),
        Ok(Added::Known(channel)) => Ok((StatusCode::OK, Json(channel))),
        Err(error) => Err(problem(&error)),
    }
}

pub(super) async fn remove(
    Extract(server): State,
    Path(login): Path<String>,
) -> Result<Json<Channel>, Problem> {
    server.shown.channels.remove(&login).await.map(Json).map_err(|error| problem(&error))
}

fn problem(error: &ChannelError) -> Problem {
    if let ChannelError::Store(error) = error {
        tracing::warn!(error = %error, "the list of channels cannot be read or written");
        let said = "the user store does not answer, or refuses; the log says why";
        return Problem::new(ChannelError::Store(error.clone()).code(), said);
    }
    Problem::new(error.code(), error.to_string())
}
