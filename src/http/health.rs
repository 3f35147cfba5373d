//! Liveness, readiness, health. Liveness depends on nothing: restarting Inlet mends no broker.

use axum::Json;
use axum::extract::State as Extract;
use axum::http::StatusCode;
use serde_json::{Value, json};

use super::State;

pub(super) async fn live() -> Json<Value> {
    Json(json!({ "live": true }))
}

pub(super) async fn ready(Extract(server): State) -> (StatusCode, Json<Value>) {
    let mut waiting_for = server.shown.parts.waiting_for();
    if *server.shown.draining.borrow() {
        waiting_for.push("shutdown");
    }
    if waiting_for.is_empty() {
        (StatusCode::OK, Json(json!({ "ready": true })))
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, Json(json!({ "ready": false, "waitingFor": waiting_for })))
    }
}

pub(super) async fn health(Extract(server): State) -> (StatusCode, Json<Value>) {
    let shown = &server.shown;
    let is_ok = !shown.parts.is_degraded() && !*shown.draining.borrow();
    let takes_nothing = *shown.draining.borrow();
    let body = json!({
        "status": if is_ok { "ok" } else { "degraded" },
        "service": "inlet",
        "version": env!("CARGO_PKG_VERSION"),
        "uptimeSeconds": server.started.elapsed().as_secs(),
        "parts": shown.parts.describe(),
    });
    (if takes_nothing { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::OK }, Json(body))
}
