//! A store with the time that its caller gives it, and with its figures.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use jiff::Timestamp;
use prometheus::{Histogram, IntCounter, Registry};

use super::{
    Changes, Collection, Document, DocumentStore, Edits, Name, StoreError, Version, Write, WriteRefusal,
    in_time,
};
use crate::label;
use crate::telemetry::metrics::{CountersBy, Label as _, Register};

label! {
    /// What a store is asked to do.
    pub enum StoreOp {
        /// Read documents.
        Get => "get",
        /// Write documents.
        Write => "write",
        /// List a collection.
        List => "list",
        /// Follow what others change.
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

    /// What a listener brought.
    fn count_batch<T>(&self, batch: &Result<Vec<T>, StoreError>) {
        match batch {
            Ok(batch) => add(&self.documents_read, batch.len()),
            Err(error) => self.count_result(StoreOp::Listen, Some(error)),
        }
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

    /// One document, within a time.
    pub async fn get(&self, name: &Name, within: Duration) -> Result<Option<Document>, StoreError> {
        Ok(self.get_many(std::slice::from_ref(name), within).await?.pop().flatten())
    }

    /// Writes one document, within a time. After that time it is unknown whether it was written.
    pub async fn write(&self, write: Write, within: Duration) -> Result<Version, WriteRefusal> {
        let outcomes = self.write_many(vec![write], within).await.map_err(WriteRefusal::Failed)?;
        let missing = || WriteRefusal::Failed(StoreError::Away("it answered without an outcome".to_owned()));
        outcomes.into_iter().next().unwrap_or_else(|| Err(missing()))
    }

    /// As [`DocumentStore::list`], within a time.
    pub async fn list(
        &self,
        collection: Collection,
        after: Option<Arc<str>>,
        limit: usize,
        within: Duration,
    ) -> Result<Vec<(Name, Document)>, StoreError> {
        let began = Instant::now();
        let answer = in_time(within, self.documents.list(collection, after, limit)).await;
        self.metrics.count(StoreOp::List, began, &answer);
        if let Ok(found) = &answer {
            // An empty answer is billed as one.
            add(&self.metrics.documents_read, found.len().max(1));
        }
        answer
    }

    /// As [`DocumentStore::edits`].
    pub async fn edits(&self, since: Timestamp) -> Result<Edits, StoreError> {
        let began = Instant::now();
        let answer = self.documents.edits(since).await;
        self.metrics.count(StoreOp::Listen, began, &answer);
        let metrics = Arc::clone(&self.metrics);
        let counted = answer?.inspect(move |batch| metrics.count_batch(batch));
        Ok(counted.boxed())
    }

    /// As [`DocumentStore::follow`].
    pub async fn follow(&self, collection: Collection) -> Result<Changes, StoreError> {
        let began = Instant::now();
        let answer = self.documents.follow(collection).await;
        self.metrics.count(StoreOp::Listen, began, &answer);
        let metrics = Arc::clone(&self.metrics);
        let counted = answer?.inspect(move |batch| metrics.count_batch(batch));
        Ok(counted.boxed())
    }
}
