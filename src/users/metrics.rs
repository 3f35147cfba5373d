//! What is counted of users, and of the counting itself.

use prometheus::{IntCounter, IntGauge, Registry};

use crate::label;
use crate::telemetry::metrics::{Counters, Register};

label! {
    /// Whether an event met its user.
    pub enum Matched {
        /// It did.
        True => "true",
        /// It did not; the envelope says why.
        False => "false",
    }
}

/// Series of users and projection.
pub struct UserMetrics {
    /// Events enriched.
    pub enriched: Counters<Matched>,
    /// Documents created.
    pub created: IntCounter,
    /// Sessions written.
    pub sessions: IntCounter,
    /// First messages.
    pub first_messages: IntCounter,
    /// Users in memory.
    pub cached: IntGauge,
    /// Users to be written.
    pub dirty: IntGauge,
    /// The projection's position.
    pub position: IntGauge,
    /// Messages behind it.
    pub lag: IntGauge,
    /// Counted in every user up to here.
    pub counted_to: IntGauge,
    /// Counts given up.
    pub lost: IntCounter,
    /// 1: the store is not asked.
    pub circuit_open: IntGauge,
    /// Stored values of the wrong shape.
    pub bad_values: IntCounter,
}

impl UserMetrics {
    /// Registers the series.
    pub fn new(registry: &Registry) -> prometheus::Result<Self> {
        let register = Register(registry);
        Ok(Self {
            enriched: register.counters(
                "enriched_events_total",
                "Events that were to meet their user, by whether they did (enriched_event_count)",
                "matched",
            )?,
            created: register
                .counter("users_created_total", "Documents of users created (created_user_count)")?,
            sessions: register.counter("sessions_started_total", "Sessions opened (new_session_count)")?,
            first_messages: register
                .counter("first_messages_total", "First messages of a lifetime (first_message_count)")?,
            cached: register.gauge("users_cached", "Users in memory")?,
            dirty: register
                .gauge("users_dirty", "Users whose events are counted in memory and not yet written")?,
            position: register
                .gauge("projection_position", "Position in the stream up to which events are noted")?,
            lag: register
                .gauge("projection_lag_events", "Messages in the stream that the projection has not read")?,
            counted_to: register.gauge(
                "counted_to_position",
                "Position up to which every event is counted in its user's document",
            )?,
            lost: register.counter(
                "counts_lost_total",
                "Events given up before they were counted, at most: the stream dropped them, or the store refuses their user's document",
            )?,
            circuit_open: register.gauge(
                "store_circuit_open",
                "1 while the user store is not asked because it did not answer",
            )?,
            bad_values: register
                .counter("store_bad_values_total", "Stored values of the wrong shape, taken for absent")?,
        })
    }
}
