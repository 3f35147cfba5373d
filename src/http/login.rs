//! `POST /admin/login`: the token of an account into the token document, for `inlet login` beside a service that holds
//! the embedded store. What is posted is a secret: it is neither logged nor repeated.

use std::sync::Arc;

use axum::Json;
use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{DefaultBodyLimit, State as Extract};
use axum::http::StatusCode;
use axum::routing::{MethodRouter, post};
use serde_json::{Map, Value, json};

use super::problem::{Problem, ProblemCode};
use super::{Server, State};
use crate::errors::Coded as _;
use crate::source::twitch::credentials::Token;

/// A token and what is said of it take some 500 bytes.
const LARGEST_BODY: usize = 16 * 1024;

pub(super) fn route() -> MethodRouter<Arc<Server>> {
    post(login).layer(DefaultBodyLimit::max(LARGEST_BODY))
}

async fn login(Extract(server): State, body: Result<Bytes, BytesRejection>) -> Result<Json<Value>, Problem> {
    let bad = |message| Problem::new(ProblemCode::BadRequest, message);
    let body = body.map_err(|rejection| match rejection.status() {
        StatusCode::PAYLOAD_TOO_LARGE => {
            Problem::new(ProblemCode::BodyTooLarge, "the body is larger than any token")
        }
        _ => bad("the body ended before it was whole"),
    })?;
    // The library's own words would quote what was posted.
    let fields: Map<String, Value> =
        serde_json::from_slice(&body).map_err(|_| bad("the body is no JSON object"))?;
    let token = Token::from_fields(&fields).map_err(|_| bad("the body holds no token in accessToken"))?;
    let (Some(login), Some(user_id)) = (token.login.clone(), token.user_id.clone()) else {
        return Err(bad("the body does not say whose token it is, in login and userId"));
    };
    let shown = &server.shown;
    shown.token_document.replace(token).await.map_err(|error| {
        Problem::new(error.code(), "the user store does not take the token now; try again").because(&error)
    })?;
    tracing::info!(login, "a person logged in");
    let source = shown.twitch.snapshot().token.source();
    Ok(Json(json!({ "login": login, "userId": user_id, "inUse": source == shown.token_document.place() })))
}
