//! `POST /admin/replay`: captured lines into a running service, which alone may write to its stream.

use std::io;

use axum::Json;
use axum::body::Body;
use axum::extract::State as Extract;
use futures_util::TryStreamExt as _;
use tokio_util::io::StreamReader;

use super::State;
use super::problem::{Problem, ProblemCode};
use crate::envelope::receipt::Outcomes;

pub(super) async fn replay(Extract(server): State, body: Body) -> Result<Json<Outcomes>, Problem> {
    let lines = StreamReader::new(body.into_data_stream().map_err(io::Error::other));
    match server.shown.replay.replay(lines).await {
        Ok(Some(outcomes)) => Ok(Json(outcomes)),
        Ok(None) => {
            Err(Problem::new(ProblemCode::ShuttingDown, "the service is shutting down; replay again"))
        }
        Err(_) => Err(Problem::new(ProblemCode::BadRequest, "the lines ended before they were whole")),
    }
}
