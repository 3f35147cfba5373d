//! Liveness, readiness, health. Liveness depends on nothing: restarting Inlet mends no broker.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use axum::Json;
use axum::extract::State as Extract;
use axum::http::StatusCode;
use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::time::{MissedTickBehavior, interval};

use super::{Server, State};

/// How exactly it is known since when a part is waited for.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Since when each part is waited for that is.
#[derive(Default)]
pub(super) struct Since(Mutex<BTreeMap<&'static str, Timestamp>>);

impl Since {
    fn note(&self, waiting_for: &[&'static str], now: Timestamp) -> BTreeMap<&'static str, Timestamp> {
        let mut since = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        since.retain(|name, _| waiting_for.contains(name));
        for name in waiting_for {
            since.entry(name).or_insert(now);
        }
        since.clone()
    }
}

/// Looks at the parts without end, so that what went wrong while nobody asked has its time as well.
pub(super) async fn watch(server: &Server) {
    let mut ticks = interval(LOOK_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        server.since.note(&server.shown.parts.waiting_for(), server.shown.clock.now());
    }
}

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
    let waiting_for = shown.parts.waiting_for();
    let takes_nothing = *shown.draining.borrow();
    let is_ok = !shown.parts.is_degraded() && !takes_nothing;
    let mut parts = shown.parts.describe();
    for (name, since) in server.since.note(&waiting_for, shown.clock.now()) {
        parts[name]["since"] = since.to_string().into();
    }
    let body = json!({
        "status": if is_ok { "ok" } else { "degraded" },
        "service": "inlet",
        "version": env!("CARGO_PKG_VERSION"),
        "uptimeSeconds": server.started.elapsed().as_secs(),
        "parts": parts,
    });
    (if takes_nothing { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::OK }, Json(body))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_waited_for_since_it_first_was_without_a_break() {
        let since = Since::default();
        let at = |second| Timestamp::from_second(second).unwrap();
        since.note(&["bus"], at(1));
        assert_eq!(since.note(&["bus", "store"], at(2)), BTreeMap::from([("bus", at(1)), ("store", at(2))]));
        assert!(since.note(&[], at(3)).is_empty());
        assert_eq!(since.note(&["bus"], at(4)), BTreeMap::from([("bus", at(4))]));
    }
}
