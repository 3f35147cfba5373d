//! `/admin/users`: what `inlet user` does, over HTTP.

use std::sync::Arc;

use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::extract::{Query, State as Extract};
use axum::routing::{delete, get, put};
use axum::{Json, Router};

use super::problem::{Problem, ProblemCode};
use super::request::Segment;
use super::{Server, State};
use crate::errors::Coded as _;
use crate::users::operations::{Edit, Filter, Page, UserError, UserKey, UserView};
use crate::users::{Desk, Farewell};

pub(super) fn routes() -> Router<Arc<Server>> {
    Router::new()
        .route("/admin/users", get(list))
        .route("/admin/users/{key}", get(show).patch(edit).delete(forget))
        .route("/admin/users/{key}/ignored", put(ignore).delete(unignore))
        .route("/admin/users/{key}/forgotten", delete(unforget))
}

impl From<UserError> for Problem {
    fn from(error: UserError) -> Self {
        match &error {
            UserError::Store(cause) => Self::of_store(cause),
            _ => Self::new(error.code(), error.to_string()),
        }
    }
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

async fn show(Extract(server): State, Segment(key): Segment) -> Result<Json<UserView>, Problem> {
    let (desk, key) = at(&server, &key)?;
    Ok(Json(desk.show(&key).await?))
}

async fn edit(
    Extract(server): State,
    Segment(key): Segment,
    body: Result<Json<Edit>, JsonRejection>,
) -> Result<Json<UserView>, Problem> {
    let (desk, key) = at(&server, &key)?;
    let Json(edit) =
        body.map_err(|rejection| Problem::new(ProblemCode::BadRequest, rejection.body_text()))?;
    Ok(Json(desk.edit(&key, &edit).await?))
}

async fn ignore(Extract(server): State, Segment(key): Segment) -> Result<Json<UserView>, Problem> {
    let (desk, key) = at(&server, &key)?;
    Ok(Json(desk.ignore(&key).await?))
}

async fn unignore(Extract(server): State, Segment(key): Segment) -> Result<Json<UserView>, Problem> {
    let (desk, key) = at(&server, &key)?;
    Ok(Json(desk.unignore(&key).await?))
}

async fn forget(Extract(server): State, Segment(key): Segment) -> Result<Json<Farewell>, Problem> {
    let (desk, key) = at(&server, &key)?;
    Ok(Json(desk.forget(&key).await?))
}

async fn unforget(Extract(server): State, Segment(key): Segment) -> Result<Json<UserView>, Problem> {
    let (desk, key) = at(&server, &key)?;
    Ok(Json(desk.unforget(&key).await?))
}
