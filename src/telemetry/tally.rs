//! How often each error code was used. Whatever goes wrong is logged with the field `error_code`, and what is logged is
//! counted here, whether `LOG_LEVEL` shows it or not: nobody has to count beside it, or can forget to.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use jiff::Timestamp;
use prometheus::{IntCounter, IntCounterVec, Opts, Registry};
use tracing::field::{Field, Visit};
use tracing::{Event, Metadata, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::{FilterFn, LevelFilter, filter_fn};
use tracing_subscriber::layer::Context;

use crate::clock::Clock;
use crate::errors::ErrorCode;
use crate::telemetry::metrics::Label as _;

/// The field that makes an event count.
const FIELD: &str = "error_code";

/// No time yet.
const NEVER: i64 = i64::MIN;

/// How often each code was used, and when last. Cheap to clone.
#[derive(Clone)]
pub struct ErrorTally(Arc<Tallied>);

struct Tallied {
    family: IntCounterVec,
    codes: Vec<(IntCounter, AtomicI64)>,
    clock: Clock,
}

impl ErrorTally {
    /// Every code at 0.
    pub fn new(clock: Clock) -> prometheus::Result<Self> {
        let opts = Opts::new("errors_total", "Errors by their code: see docs/errors.md").namespace("inlet");
        let family = IntCounterVec::new(opts, &["code"])?;
        let code = |code: &ErrorCode| (family.with_label_values(&[code.as_str()]), AtomicI64::new(NEVER));
        let codes = ErrorCode::ALL.iter().map(code).collect();
        Ok(Self(Arc::new(Tallied { family, codes, clock })))
    }

    /// The tally of this process's log. Before a log is started there is none: then a new one, which counts nothing.
    pub fn of_the_log(clock: &Clock) -> prometheus::Result<Self> {
        match tracing::dispatcher::get_default(|log| log.downcast_ref::<Self>().cloned()) {
            Some(tally) => Ok(tally),
            None => Self::new(clock.clone()),
        }
    }

    /// Shows it in `/metrics`.
    pub fn register(&self, registry: &Registry) -> prometheus::Result<()> {
        registry.register(Box::new(self.0.family.clone()))
    }

    /// How often a code was used, and when last.
    pub fn of(&self, code: ErrorCode) -> (u64, Option<Timestamp>) {
        let (count, last) = &self.0.codes[code.index()];
        let last = Some(last.load(Ordering::Relaxed)).filter(|at| *at != NEVER);
        (count.get(), last.and_then(|at| Timestamp::from_millisecond(at).ok()))
    }

    fn count(&self, code: ErrorCode) {
        let (count, last) = &self.0.codes[code.index()];
        count.inc();
        last.store(self.0.clock.now().as_millisecond(), Ordering::Relaxed);
    }

    /// Lets through what counts, at whatever level.
    pub(super) fn filter() -> FilterFn<fn(&Metadata<'_>) -> bool> {
        let counts: fn(&Metadata<'_>) -> bool = |metadata| metadata.fields().field(FIELD).is_some();
        filter_fn(counts).with_max_level_hint(LevelFilter::DEBUG)
    }
}

impl<S: Subscriber> Layer<S> for ErrorTally {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut found = Found(None);
        event.record(&mut found);
        if let Some(code) = found.0 {
            self.count(code);
        }
    }
}

struct Found(Option<ErrorCode>);

impl Visit for Found {
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == FIELD {
            self.0 = ErrorCode::of_text(value);
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == FIELD {
            self.0 = ErrorCode::of_text(&format!("{value:?}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use tracing_subscriber::EnvFilter;
    use tracing_subscriber::layer::SubscriberExt as _;

    use super::*;

    #[test]
    fn what_is_logged_with_a_code_is_counted_whether_it_is_shown_or_not() {
        let clock = Clock::by_hand("2026-11-20T05:51:20.612Z".parse().unwrap());
        let tally = ErrorTally::new(clock.clone()).unwrap();
        let shown =
            tracing_subscriber::fmt::layer().with_writer(std::io::sink).with_filter(EnvFilter::new("error"));
        let log =
            tracing_subscriber::registry().with(tally.clone().with_filter(ErrorTally::filter())).with(shown);
        tracing::subscriber::with_default(log, || {
            tracing::error!(error_code = %ErrorCode::DoorFull, "shown");
            clock.step(1_000);
            tracing::warn!(error_code = %ErrorCode::DoorFull, "not shown");
            tracing::debug!(error_code = ErrorCode::NotFound.as_str(), "not shown either");
            tracing::warn!("without a code");
            tracing::warn!(error_code = "of somebody else", "no code of ours");
            let found = ErrorTally::of_the_log(&clock).unwrap();
            assert_eq!(found.of(ErrorCode::DoorFull), (2, Some(clock.now())));
        });
        assert_eq!(tally.of(ErrorCode::NotFound).0, 1);
        assert_eq!(tally.of(ErrorCode::Internal), (0, None));
        let counted: u64 = ErrorCode::ALL.iter().map(|code| tally.of(*code).0).sum();
        assert_eq!(counted, 3);
    }

    #[test]
    fn every_code_is_there_from_the_start() {
        let registry = Registry::new();
        ErrorTally::new(Clock::system()).unwrap().register(&registry).unwrap();
        let families = registry.gather();
        assert_eq!(families[0].name(), "inlet_errors_total");
        assert_eq!(families[0].get_metric().len(), ErrorCode::ALL.len());
    }
}
