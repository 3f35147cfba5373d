//! `GET /admin/errors`: every code there is, how often it was used, and what to do about it.

use axum::Json;
use axum::extract::State as Extract;
use serde_json::{Map, Value, json};

use super::State;
use super::metrics::StatusFamily;
use crate::errors::ErrorCode;
use crate::telemetry::metrics::Label as _;

pub(super) async fn errors(Extract(server): State) -> Json<Value> {
    let shown = &server.shown;
    let errors: Vec<_> = ErrorCode::ALL
        .iter()
        .map(|code| {
            let (count, last_at) = shown.errors.of(*code);
            let mut error = json!({ "code": code.as_str(), "count": count, "help": code.help() });
            if let (Some(error), Some(at)) = (error.as_object_mut(), last_at) {
                error.insert("lastAt".to_owned(), format!("{at:.3}").into());
            }
            error
        })
        .collect();
    let families = StatusFamily::ALL.iter();
    let families: Map<_, _> = families
        .map(|family| (family.as_str().to_owned(), shown.metrics.requests.sum_by(*family).into()))
        .collect();
    Json(json!({ "errors": errors, "statusFamilies": families }))
}
