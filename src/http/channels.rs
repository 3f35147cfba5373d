//! `/admin/channels`: what `inlet channel` does, while the service runs.

use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::State as Extract;
use axum::extract::rejection::BytesRejection;
use axum::http::StatusCode;
use axum::routing::{delete, get};
use axum::{Json, Router};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::problem::{Problem, ProblemCode};
use super::request::Segment;
use super::{Server, State};
use crate::channels::{Added, Channel, ChannelError};
use crate::errors::Coded as _;

pub(super) fn routes() -> Router<Arc<Server>> {
    Router::new()
        .route("/admin/channels", get(list).post(add))
        .route("/admin/channels/{login}", delete(remove))
}

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

async fn list(Extract(server): State) -> Result<Json<Value>, Problem> {
    let channels = server.shown.channels.list().await.map_err(|error| problem(&error))?;
    let snapshot = server.shown.twitch.snapshot();
    let shown: Vec<_> = channels
        .into_iter()
        .map(|channel| Shown { state: snapshot.state_of(&channel.login), channel })
        .collect();
    Ok(Json(json!({ "channels": shown })))
}

async fn add(
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

async fn remove(Extract(server): State, Segment(login): Segment) -> Result<Json<Channel>, Problem> {
    server.shown.channels.remove(&login).await.map(Json).map_err(|error| problem(&error))
}

fn problem(error: &ChannelError) -> Problem {
    match error {
        ChannelError::Store(error) => Problem::of_store(error),
        _ => Problem::new(error.code(), error.to_string()),
    }
}
