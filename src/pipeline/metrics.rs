//! What the spine counts. Whenever idle: received = admitted + duplicate + refused, and admitted = published +
//! publish duplicates + dead-lettered + pending.

use prometheus::{Histogram, IntCounter, IntGauge, Registry};

use crate::bus::TransientCause;
use crate::envelope::{DeadLetterReason, Origin};
use crate::label;
use crate::telemetry::metrics::{Counters, CountersBy, Register};

label! {
    /// Why an event was not let in.
    pub enum RefusedReason {
        /// The door was full for longer than a source waits.
        DoorFull => "door_full",
        /// The service was shutting down.
        Closed => "closed",
        /// An operator ignores its user.
        Ignored => "ignored",
        /// Its user is not to be known.
        Forgotten => "forgotten",
    }
}

/// Counters of intake and publish.
pub struct PipelineMetrics {
    /// Events that a source brought to the door.
    pub received: Counters<Origin>,
    /// Events let in.
    pub admitted: Counters<Origin>,
    /// Events that were known.
    pub duplicate: Counters<Origin>,
    /// Events not let in.
    pub refused: CountersBy<Origin, RefusedReason>,
    /// Ids forgotten before their time.
    pub dedup_evicted_early: IntCounter,
    /// Events in the stream.
    pub published: Counters<Origin>,
    /// Events that the stream had already.
    pub publish_duplicates: IntCounter,
    /// Events that became dead letters.
    pub dead_lettered: CountersBy<Origin, DeadLetterReason>,
    /// Events let in and not settled.
    pub pending: IntGauge,
    /// From sending to the ack.
    pub publish_duration: Histogram,
    /// Repetitions.
    pub publish_retries: Counters<TransientCause>,
    /// Sent and without an answer.
    pub publish_in_flight: IntGauge,
    /// From the socket to the ack.
    pub ingest_to_ack: Histogram,
}

impl PipelineMetrics {
    /// Registers the series.
    pub fn new(registry: &Registry) -> prometheus::Result<Self> {
        let register = Register(registry);
        Ok(Self {
            received: register.counters("events_received_total", "Events that a source took in", "source")?,
            admitted: register.counters("events_admitted_total", "Events that passed the door", "source")?,
            duplicate: register.counters(
                "events_duplicate_total",
                "Events known from the window of ids",
                "source",
            )?,
            refused: register.counters_by(
                "events_refused_total",
                "Events not let in: those of ignored and forgotten users by intent, the others are lost",
                ["source", "reason"],
            )?,
            dedup_evicted_early: register.counter(
                "dedup_evicted_early_total",
                "Ids forgotten before DEDUP_WINDOW was over, because of DEDUP_MAX_IDS",
            )?,
            published: register.counters(
                "events_published_total",
                "Events acknowledged by the stream",
                "source",
            )?,
            publish_duplicates: register
                .counter("publish_duplicates_total", "Events that the stream had already")?,
            dead_lettered: register.counters_by(
                "events_deadlettered_total",
                "Events that became dead letters",
                ["source", "reason"],
            )?,
            pending: register.gauge("events_pending", "Events let in and not yet settled")?,
            publish_duration: register
                .latency("publish_duration_seconds", "From sending a message to its ack")?,
            publish_retries: register.counters(
                "publish_retries_total",
                "Messages sent again, by cause",
                "cause",
            )?,
            publish_in_flight: register.gauge("publish_in_flight", "Messages sent and not yet answered")?,
            ingest_to_ack: register.latency(
                "ingest_to_ack_duration_seconds",
                "From taking an event in to the ack of the stream",
            )?,
        })
    }
}
