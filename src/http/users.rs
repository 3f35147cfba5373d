//! `/admin/users`: what `inlet user` does, over HTTP.

use std::sync::Arc;

use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::extract::{DefaultBodyLimit, Path, Query, State as Extract};
use axum::routing::{delete, get, put};
use axum::{Json, Router};

use super::problem::{Problem, ProblemCode};
use super::{Server, State};
use crate::errors::Coded as _;
use crate::users::operations::{Edit, Filter, Page, UserError, UserKey, UserView};
use crate::users::{Desk, Farewell};

/// Largest body, in bytes: notes and labels are much smaller.
const LARGEST_BODY: usize = 64 * 1024;

pub(super) fn routes() -> Router<Arc<Server>> {
    Router::new()
        .route("/admin/users", get(list))
        .route("/admin/users/{key}", get(show).patch(edit).delete(forget))
        .route("/admin/users/{key}/ignored", put(ignore).delete(unignore))
        .route("/admin/users/{key}/forgotten", delete(unforget))
        .layer(DefaultBodyLimit::max(LARGEST_BODY))
}

impl From<UserError> for Problem {
    fn from(error: UserError) -> Self {
        let code = error.code();
        let UserError::Store(cause) = &error else { return Self::new(code, error.to_string()) };
        tracing::warn!(error = %cause, error_code = %code, "an operator's request could not be done");
        let text = if cause.is_transient() {
            "the user store does not answer; try again"
        } else {
            "the user store refuses; the log says why"
        };
        Self::new(code, text)
    }
}

fn bad_body(rejection: &JsonRejection) -> Problem {
    let is_too_large = rejection.status() == axum::http::StatusCode::PAYLOAD_TOO_LARGE;
    let code = if is_too_large { ProblemCode::BodyTooLarge } else { ProblemCode::BadRequest };
    Problem::new(code, rejection.body_text())
}

/// The desk, and whose document is meant.
fn at(server: &Server, key: &str) -> Result<(Desk, UserKey), Problem> {
    Ok((server.shown.desk.clone(), key.parse()?))
}

async fn list(
    Extract(server): State,
    filter: Result<Query<Filter>, QueryRejection>,
) -> Result<Json<Page>, Problem> {
    let Query(filter) =
        filter.map_err(|rejection| Problem::new(ProblemCode::BadRequest, rejection.body_text()))?;
    Ok(Json(server.shown.desk.list(&filter).await?))
}

async fn show(Extract(server): State, Path(key): Path<String>) -> Result<Json<UserView>, Problem> {
    let (desk, key) = at(&server, &key)?;
    Ok(Json(desk.show(&key).await?))
}

async fn edit(
    Extract(server): State,
    Path(key): Path<String>,
    body: Result<Json<Edit>, JsonRejection>,
) -> Result<Json<UserView>, Problem> {
    let (desk, key) = at(&server, &key)?;
    let Json(edit) = body.map_err(|rejection| bad_body(&rejection))?;
    Ok(Json(desk.edit(&key, &edit).await?))
}

async fn ignore(Extract(server): State, Path(key): Path<String>) -> Result<Json<UserView>, Problem> {
    let (desk, key) = at(&server, &key)?;
    Ok(Json(desk.ignore(&key).await?))
}

async fn unignore(Extract(server): State, Path(key): Path<String>) -> Result<Json<UserView>, Problem> {
    let (desk, key) = at(&server, &key)?;
    Ok(Json(desk.unignore(&key).await?))
}

async fn forget(Extract(server): State, Path(key): Path<String>) -> Result<Json<Farewell>, Problem> {
    let (desk, key) = at(&server, &key)?;
    Ok(Json(desk.forget(&key).await?))
}

async fn unforget(Extract(server): State, Path(key): Path<String>) -> Result<Json<UserView>, Problem> {
    let (desk, key) = at(&server, &key)?;
    Ok(Json(desk.unforget(&key).await?))
}
