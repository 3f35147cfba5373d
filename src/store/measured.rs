//! A store with the time that its caller gives it, and with its figures.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use jiff::Timestamp;
use prometheus::{Histogram, IntCounter, Registry};

use super::{Document, DocumentStore, Edits, Name, StoreError, Version, Write, WriteRefusal, in_time};
use crate::label;
use crate::telemetry::metrics::{CountersBy, Label as _, Register};

label! {
    /// What a store is asked to do.
    pub enum StoreOp {
        /// Read documents.
        Get => "get",
        /// Write documents.
        Write => "write",
        /// Follow what operators change.
        Listen => "listen",
    }
}

label! {
    /// How a request ended.
    pub enum StoreResult {
        /// It was answered.
        Ok => "ok",
        /// The store is away, or did not answer in time.
        Away => "away",
        /// The store refused.
        Refused => "refused",
    }
}

impl StoreResult {
    fn of(error: &StoreError) -> Self {
        match error {
            StoreError::Away(_) | StoreError::GaveUp(_) => Self::Away,
            StoreError::Refused { .. } => Self::Refused,
        }
    }
}

/// What is counted of a store.
pub struct StoreMetrics {
    requests: CountersBy<StoreOp, StoreResult>,
    duration: Vec<Histogram>,
    conflicts: IntCounter,
    documents_read: AtomicU64,
    documents_written: AtomicU64,
}

impl StoreMetrics {
    /// Registers the series.
    pub fn new(registry: &Registry) -> prometheus::Result<Self> {
        let register = Register(registry);
        Ok(Self {
            requests: register.counters_by(
                "store_requests_total",
                "Requests to the user store, by how they ended",
                ["op", "result"],
            )?,
            duration: register.latencies::<StoreOp>(
                "store_request_duration_seconds",
                "From asking the user store to its answer",
                "op",
            )?,
            conflicts: register.counter(
                "store_conflicts_total",
                "Documents not written because somebody else had written them",
            )?,
            documents_read: AtomicU64::new(0),
            documents_written: AtomicU64::new(0),
        })
    }

    /// Documents asked for or heard of so far: what Firestore bills as reads.
    pub fn documents_read(&self) -> u64 {
        self.documents_read.load(Ordering::Relaxed)
    }

    /// Documents written so far: what Firestore bills as writes.
    pub fn documents_written(&self) -> u64 {
        self.documents_written.load(Ordering::Relaxed)
    }

    fn count<T>(&self, op: StoreOp, began: Instant, answer: &Result<T, StoreError>) {
        self.duration[op.index()].observe(began.elapsed().as_secs_f64());
        self.count_result(op, answer.as_ref().err());
    }

    fn count_result(&self, op: StoreOp, error: Option<&StoreError>) {
        self.requests.of(op, error.map_or(StoreResult::Ok, StoreResult::of)).inc();
    }
}

fn add(counter: &AtomicU64, documents: usize) {
    counter.fetch_add(documents as u64, Ordering::Relaxed);
}

/// A store, as everybody else sees it. Cheap to clone.
#[derive(Clone)]
pub struct Store {
    documents: Arc<dyn DocumentStore>,
    metrics: Arc<StoreMetrics>,
}

impl Store {
    /// Measures `documents`.
    pub fn new(documents: Arc<dyn DocumentStore>, metrics: Arc<StoreMetrics>) -> Self {
        Self { documents, metrics }
    }

    /// Its figures.
    pub fn metrics(&self) -> &StoreMetrics {
        &self.metrics
    }

    /// As [`DocumentStore::get_many`], within a time.
    pub async fn get_many(
        &self,
        names: &[Name],
        within: Duration,
    ) -> Result<Vec<Option<Document>>, StoreError> {
        let began = Instant::now();
        let answer = in_time(within, self.documents.get_many(names)).await;
        self.metrics.count(StoreOp::Get, began, &answer);
        if answer.is_ok() {
            add(&self.metrics.documents_read, names.len());
        }
        answer
    }

    /// As [`DocumentStore::write_many`], within a time. After that time it is unknown what was written.
    pub async fn write_many(
        &self,
        writes: Vec<Write>,
        within: Duration,
    ) -> Result<Vec<Result<Version, WriteRefusal>>, StoreError> {
        let began = Instant::now();
        let answer = in_time(within, self.documents.write_many(writes)).await;
        match &answer {
            Ok(outcomes) => self.count_outcomes(began, outcomes),
            Err(_) => self.metrics.count(StoreOp::Write, began, &answer),
        }
        answer
    }

    fn count_outcomes(&self, began: Instant, outcomes: &[Result<Version, WriteRefusal>]) {
        let (mut written, mut conflicts, mut failed) = (0, 0, None);
        for outcome in outcomes {
            match outcome {
                Ok(_) => written += 1,
                Err(WriteRefusal::Conflict) => conflicts += 1,
                Err(WriteRefusal::Failed(error)) => failed = Some(error),
            }
        }
        add(&self.metrics.documents_written, written);
        self.metrics.conflicts.inc_by(conflicts);
        self.metrics.duration[StoreOp::Write.index()].observe(began.elapsed().as_secs_f64());
        self.metrics.count_result(StoreOp::Write, failed);
    }

    /// As [`DocumentStore::edits`].
    pub async fn edits(&self, since: Timestamp) -> Result<Edits, StoreError> {
        let began = Instant::now();
        let answer = self.documents.edits(since).await;
        self.metrics.count(StoreOp::Listen, began, &answer);
        let metrics = Arc::clone(&self.metrics);
        let counted = answer?.inspect(move |batch| match batch {
            Ok(batch) => add(&metrics.documents_read, batch.len()),
            Err(error) => metrics.count_result(StoreOp::Listen, Some(error)),
        });
        Ok(counted.boxed())
    }
}
