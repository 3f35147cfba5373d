//! A look inside, for the operator.

use axum::Json;
use axum::extract::State as Extract;
use serde_json::{Value, json};

use super::State;
use crate::envelope::Origin;
use crate::pipeline::RefusedReason;

pub(super) async fn config(Extract(server): State) -> Json<Value> {
    Json(server.shown.settings.clone())
}

pub(super) async fn twitch(Extract(server): State) -> Json<Value> {
    let shown = &server.shown;
    let mut page = json!(shown.twitch.snapshot());
    if let Some(page) = page.as_object_mut() {
        let origin = Origin::Twitch;
        let pipeline = &shown.pipeline;
        // Who is kept out by intent is no failure.
        let refused = [RefusedReason::DoorFull, RefusedReason::Closed]
            .map(|reason| pipeline.refused.of(origin, reason).get());
        let failed = pipeline.dead_lettered.sum_of(origin) + refused.iter().sum::<u64>();
        page.insert("received".into(), pipeline.received.of(origin).get().into());
        page.insert("published".into(), pipeline.published.of(origin).get().into());
        page.insert("failed".into(), failed.into());
    }
    Json(page)
}
