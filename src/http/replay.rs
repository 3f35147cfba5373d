//! `POST /admin/replay`: captured lines into a running service, which alone may write to its stream.

use std::io;

use axum::body::Body;
use axum::extract::State as Extract;
use axum::{Extension, Json};
use futures_util::TryStreamExt as _;
use serde_json::json;
use tokio_util::io::StreamReader;

use super::State;
use super::problem::{Problem, ProblemCode};
use crate::audit::Details;
use crate::envelope::receipt::Outcomes;

/// The answer, and what the audit keeps of it.
type Replayed = (Extension<Details>, Json<Outcomes>);

pub(super) async fn replay(Extract(server): State, body: Body) -> Result<Replayed, Problem> {
    let lines = StreamReader::new(body.into_data_stream().map_err(io::Error::other));
    match server.shown.replay.replay(lines).await {
        Ok(Some(outcomes)) => {
            let counts = json!(outcomes);
            let details = counts.as_object().into_iter().flatten();
            let details = details.fold(Details::new(), |all, (name, count)| all.shown(name, count.clone()));
            Ok((Extension(details), Json(outcomes)))
        }
        Ok(None) => {
            Err(Problem::new(ProblemCode::ShuttingDown, "the service is shutting down; replay again"))
        }
        Err(_) => Err(Problem::new(ProblemCode::BadRequest, "the lines ended before they were whole")),
    }
}
