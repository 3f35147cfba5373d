//! How the outbox is, for the probes and for `/metrics`.

use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{IntCounter, IntGauge, Opts, Registry};
use serde_json::{Value, json};

use super::Bounds;
use crate::clock::Clock;
use crate::errors::ErrorCode;
use crate::status::Part;
use crate::telemetry::metrics::Register;

/// Counters of the outbox.
pub struct OutboxMetrics {
    /// Events in it that are not settled.
    pub events: IntGauge,
    /// What they take, in bytes.
    pub bytes: IntGauge,
    /// When the oldest was put there, Unix ms; 0: it is empty.
    oldest: Arc<AtomicI64>,
    /// Events of earlier runs.
    pub recovered: IntCounter,
    /// Rows that were not what was written.
    pub torn: IntCounter,
}

impl OutboxMetrics {
    /// Registers the series.
    pub fn new(registry: &Registry, clock: Clock) -> prometheus::Result<Self> {
        let register = Register(registry);
        let oldest = Arc::new(AtomicI64::new(0));
        let age = IntGauge::with_opts(
            Opts::new("outbox_oldest_age_seconds", "How long the oldest event has been in the outbox")
                .namespace("inlet"),
        )?;
        registry.register(Box::new(OldestAge { age, oldest: Arc::clone(&oldest), clock }))?;
        Ok(Self {
            events: register.gauge("outbox_events", "Events in the outbox that are not settled")?,
            bytes: register.gauge("outbox_bytes", "What the outbox takes of the disk, in bytes")?,
            oldest,
            recovered: register
                .counter("outbox_recovered_total", "Events of earlier runs found in the outbox")?,
            torn: register.counter(
                "outbox_torn_total",
                "Rows of the outbox, or whole files, that were not what was written",
            )?,
        })
    }

    pub(super) fn set_oldest(&self, stored_at_ms: i64) {
        self.oldest.store(stored_at_ms, Ordering::Relaxed);
    }
}

/// An age grows by itself: it is worked out when it is asked for.
struct OldestAge {
    age: IntGauge,
    oldest: Arc<AtomicI64>,
    clock: Clock,
}

impl Collector for OldestAge {
    fn desc(&self) -> Vec<&Desc> {
        self.age.desc()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let oldest = self.oldest.load(Ordering::Relaxed);
        let age_ms = if oldest == 0 { 0 } else { (self.clock.now().as_millisecond() - oldest).max(0) };
        self.age.set(age_ms / 1_000);
        self.age.collect()
    }
}

/// What stands in the way of the outbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Trouble {
    /// Its limit is reached.
    Full,
    /// The disk does not take it.
    Unwritable(String),
}

/// The outbox as the probes see it.
pub struct OutboxPart {
    pub(super) metrics: Arc<OutboxMetrics>,
    pub(super) bounds: Bounds,
    trouble: Mutex<Option<Trouble>>,
}

impl OutboxPart {
    pub(super) fn new(metrics: Arc<OutboxMetrics>, bounds: Bounds) -> Self {
        Self { metrics, bounds, trouble: Mutex::new(None) }
    }

    /// Notes what stands in the way, and logs it when it changes.
    pub(super) fn say(&self, trouble: Option<Trouble>) {
        let mut current = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        match (&*current, &trouble) {
            (Some(Trouble::Unwritable(_)), Some(Trouble::Unwritable(_)))
            | (Some(Trouble::Full), Some(Trouble::Full))
            | (None, None) => {}
            (_, Some(Trouble::Full)) => {
                tracing::error!(
                    error_code = %ErrorCode::OutboxFull,
                    max_bytes = self.bounds.max_bytes,
                    "the outbox is full: nothing more is taken off the door"
                );
            }
            (_, Some(Trouble::Unwritable(why))) => {
                tracing::error!(error_code = %ErrorCode::OutboxUnwritable, error = why, "the outbox cannot be written: events stay in memory");
            }
            (Some(_), None) => tracing::info!("the outbox takes events again"),
        }
        *current = trouble;
    }

    fn trouble(&self) -> Option<Trouble> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Part for OutboxPart {
    fn name(&self) -> &'static str {
        "outbox"
    }

    fn is_waited_for(&self) -> bool {
        self.trouble().is_some()
    }

    fn describe(&self) -> Value {
        let events = self.metrics.events.get();
        let (state, why) = match self.trouble() {
            Some(Trouble::Full) => ("full", None),
            Some(Trouble::Unwritable(why)) => ("unwritable", Some(why)),
            None if events > 0 => ("holding", None),
            None => ("empty", None),
        };
        json!({
            "state": state,
            "why": why,
            "events": events,
            "bytes": self.metrics.bytes.get(),
            "maxBytes": self.bounds.max_bytes,
            "inMemory": self.bounds.is_in_memory,
        })
    }
}
