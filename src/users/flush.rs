//! The flush writes users behind: when they fall quiet, at the latest after a while, and all of them at the end. And
//! `countedTo`, the one note of how far everything is counted, from which any start on any machine goes on.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use futures_util::{StreamExt as _, stream};
use jiff::Timestamp;
use serde_json::Value;
use tokio::time::Instant;

use super::meet::identify;
use super::table::Flushing;
use super::{PATIENCE, Shared, Users, gauge};
use crate::envelope::id::UserRef;
use crate::errors::ErrorCode;
use crate::store::document::{shown_time, write_counts, write_history};
use crate::store::{Document, Fields, Name, StoreError, Version, Write, WriteRefusal};

/// How often users are looked through.
const SHORTEST_TURN: Duration = Duration::from_millis(100);
const LONGEST_TURN: Duration = Duration::from_secs(1);

/// Users written at a time.
const GROUP: usize = 100;

/// Groups on their way together at the end. Otherwise one at a time: events that come meet their users through the same
/// store, and they come first.
const GROUPS_AT_THE_END: usize = 8;

/// `countedTo` is written at most this often.
const NOTE_PERIOD: Duration = Duration::from_mins(1);

/// At the end: rounds that write nobody, and the pause between two.
const MOST_ROUNDS_IN_VAIN: u32 = 3;
const BETWEEN_ROUNDS: Duration = Duration::from_millis(20);

/// A start waits for the first answer: a connection may have to be made, but a store that hangs must not keep it.
const FIRST_PATIENCE: Duration = Duration::from_secs(3);

/// At the end: how long the projection is waited for.
const LAST_NOTES: Duration = Duration::from_secs(1);

/// What the store says of how far the present stream is counted.
#[derive(Debug, Default)]
pub(super) struct CountedTo {
    stream: String,
    position: u64,
    /// Of the note; `None`: there is none yet.
    version: Option<Version>,
    written_at: Timestamp,
}

/// Why it is not known how far the stream is counted.
pub(super) enum NotKnown {
    /// The store does not say.
    Away,
    /// It is counted for instances that publish to another subject.
    AnotherSubject(String),
}

impl Users {
    /// Writes users behind. Does not end.
    pub async fn flush_behind(self) {
        let shared = &*self.0;
        let turn = (shared.config.flush_idle / 4).clamp(SHORTEST_TURN, LONGEST_TURN);
        loop {
            let is_short_of_memory = tokio::select! {
                () = tokio::time::sleep(turn) => false,
                () = shared.flush_now.notified() => true,
            };
            shared.flush_turn(is_short_of_memory).await;
        }
    }

    /// Writes what is due now, and the note if its time has come.
    pub async fn flush_due(&self) {
        self.0.flush_turn(false).await;
    }

    /// Writes everything, at the end: whatever is acknowledged is waited for a moment, until the projection has it.
    pub async fn finish(&self, deadline: Instant) {
        let shared = &*self.0;
        let last_notes = (Instant::now() + LAST_NOTES).min(deadline);
        while shared.table().awaits_notes() && Instant::now() < last_notes {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        // Conflicts need another round; what the store refuses is not asked for again and again.
        let mut rounds_in_vain = 0;
        while shared.table().dirty() > 0 && !shared.circuit.is_open() && Instant::now() < deadline {
            let before = shared.table().dirty();
            // Those that are being written already are waited for.
            let is_in_vain = shared.flush_all().await && shared.table().dirty() >= before;
            rounds_in_vain = if is_in_vain { rounds_in_vain + 1 } else { 0 };
            if rounds_in_vain > MOST_ROUNDS_IN_VAIN {
                break;
            }
            tokio::time::sleep(BETWEEN_ROUNDS).await;
        }
        let left = shared.table().dirty();
        if left > 0 {
            tracing::warn!(
                error_code = %ErrorCode::CountsDeferred,
                users = left,
                "users were not written in time; they are counted at the next start"
            );
        }
        if !shared.circuit.is_open() {
            shared.write_note().await;
        }
    }
}

impl Shared {
    async fn flush_turn(&self, is_short_of_memory: bool) {
        if !self.circuit.is_open() {
            if is_short_of_memory {
                let most = (self.table().dirty() / 4).max(GROUP);
                self.flush(Duration::ZERO, Duration::ZERO, most).await;
            } else {
                self.flush(self.config.flush_idle, self.config.flush_max, usize::MAX).await;
            }
            if self.is_note_due() {
                self.write_note().await;
            }
        }
        self.show(&mut self.table());
        self.flushed.notify_waiters();
    }

    /// Writes users who are due, those who wait longest first.
    async fn flush(&self, idle: Duration, longest: Duration, most: usize) {
        let mut due = self.table().due(self.clock.now(), idle, longest);
        due.truncate(most);
        for group in due.chunks(GROUP) {
            if self.circuit.is_open() {
                return;
            }
            self.flush_group(group).await;
        }
    }

    /// Writes everybody; whether there was anybody to write.
    async fn flush_all(&self) -> bool {
        let due = self.table().due(self.clock.now(), Duration::ZERO, Duration::ZERO);
        let groups = stream::iter(due.chunks(GROUP));
        groups
            .for_each_concurrent(GROUPS_AT_THE_END, async |group| {
                if !self.circuit.is_open() {
                    self.flush_group(group).await;
                }
            })
            .await;
        !due.is_empty()
    }

    async fn flush_group(&self, group: &[Arc<str>]) {
        let group = &*self.without_forgotten(group);
        let missing = self.table().missing(group.iter(), usize::MAX);
        if !missing.is_empty() {
            self.read(missing, PATIENCE).await;
        }
        let flushing: Vec<_> = {
            let barred = self.barred.now();
            let mut table = self.table();
            let known = group.iter().filter(|key| !barred.is_forgotten(key));
            known.filter_map(|key| table.flush(key)).collect()
        };
        if flushing.is_empty() {
            return;
        }
        let writes = flushing.iter().map(write).collect();
        let written = self.store.write_many(writes, PATIENCE).await;
        self.erase_forgotten_of(flushing.iter().map(|flushing| &flushing.key));
        let mut table = self.table();
        match written {
            Ok(outcomes) => {
                for (flushing, outcome) in flushing.into_iter().zip(outcomes) {
                    self.settle_flush(&mut table, flushing, outcome);
                }
            }
            Err(error) => {
                for flushing in &flushing {
                    table.not_flushed(&flushing.key);
                }
                self.circuit.trip(&error);
            }
        }
        self.show(&mut table);
    }

    /// Those of a group who may be known. Of the others nothing is kept: the projection may have noted an event while they
    /// were being forgotten.
    fn without_forgotten(&self, group: &[Arc<str>]) -> Vec<Arc<str>> {
        let barred = self.barred.now();
        let mut table = self.table();
        let mut kept = group.to_vec();
        kept.retain(|key| {
            let is_forgotten = barred.is_forgotten(key);
            if is_forgotten {
                table.bar(key);
            }
            !is_forgotten
        });
        kept
    }

    fn settle_flush(
        &self,
        table: &mut super::Table,
        flushing: Flushing,
        outcome: Result<Version, WriteRefusal>,
    ) {
        let error = match outcome {
            Ok(version) => {
                tracing::debug!(user_ref = %UserRef(&flushing.key), "user flushed");
                let counted = table.flushed(flushing, version);
                self.metrics.created.inc_by(u64::from(counted.is_new));
                self.metrics.sessions.inc_by(counted.sessions);
                return;
            }
            Err(WriteRefusal::Conflict) => return table.not_flushed(&flushing.key),
            Err(WriteRefusal::Failed(error)) => error,
        };
        let (key, now) = (&flushing.key, self.clock.now());
        if error.is_transient() {
            return table.postpone(key, now);
        }
        tracing::error!(error_code = %ErrorCode::StoreRefused, user_ref = %UserRef(key), error = %error, "the user's document cannot be written");
        let given_up = table.refused(key, now);
        if given_up > 0 {
            self.metrics.lost.inc_by(given_up as u64);
            tracing::error!(error_code = %ErrorCode::CountsLost, user_ref = %UserRef(key), events = given_up, "what the user's document does not count is given up: the store refuses to write it");
        }
    }

    /// Up to where the stream is counted; `None` if nothing is.
    pub(super) async fn counted_to(&self, stream: &str) -> Result<Option<u64>, NotKnown> {
        let document = match self.store.get_many(&[Name::note(stream)], FIRST_PATIENCE).await {
            Ok(mut documents) => documents.pop().flatten(),
            Err(error) => {
                self.circuit.trip(&error);
                return Err(NotKnown::Away);
            }
        };
        if let Some(theirs) = document.as_ref().and_then(|document| document.fields.get("subject")?.as_str())
            && theirs != self.subject
        {
            return Err(NotKnown::AnotherSubject(theirs.to_owned()));
        }
        let position = document.as_ref().and_then(|document| self.position_in(stream, document));
        let mut counted = self.counted.lock().unwrap_or_else(PoisonError::into_inner);
        *counted = CountedTo {
            stream: stream.to_owned(),
            position: position.unwrap_or(0),
            version: document.map(|document| document.version),
            written_at: self.clock.now(),
        };
        self.metrics.counted_to.set(gauge(counted.position));
        Ok(position)
    }

    /// Up to where a note says that its stream is counted. One that says nothing of the kind is as good as none.
    fn position_in(&self, stream: &str, note: &Document) -> Option<u64> {
        let position = note.fields.get("countedTo").and_then(Value::as_u64);
        if position.is_none() {
            self.metrics.bad_values.inc();
            tracing::warn!(error_code = %ErrorCode::BadStoredValue, stream, "the note of how far the stream is counted cannot be read; it is taken for absent");
        }
        position
    }

    /// The version of the note as last read or written; `None`: there is none.
    pub(super) fn note_version(&self) -> Option<Version> {
        self.counted.lock().unwrap_or_else(PoisonError::into_inner).version
    }

    /// Up to where the stream is counted, as last read or written.
    pub(super) fn counted_to_now(&self) -> u64 {
        self.counted.lock().unwrap_or_else(PoisonError::into_inner).position
    }

    fn is_note_due(&self) -> bool {
        let mut counted = self.counted.lock().unwrap_or_else(PoisonError::into_inner);
        let now = self.clock.now();
        counted.written_at = counted.written_at.min(now);
        now.duration_since(counted.written_at)
            >= jiff::SignedDuration::try_from(NOTE_PERIOD).unwrap_or_default()
    }

    /// Writes how far everything is counted, if that is further than before.
    async fn write_note(&self) {
        let Some((stream, position)) = self.table().counted_to() else { return };
        let now = self.clock.now();
        let version = {
            let mut counted = self.counted.lock().unwrap_or_else(PoisonError::into_inner);
            counted.written_at = now;
            if *counted.stream != *stream || position <= counted.position {
                return;
            }
            counted.version
        };
        self.write_note_over(&stream, version, position).await;
    }

    /// Writes the note of a stream over what it said; whether that was possible.
    pub(super) async fn write_note_over(
        &self,
        stream: &str,
        version: Option<Version>,
        position: u64,
    ) -> bool {
        let mut fields = Fields::new();
        fields.insert("countedTo".to_owned(), position.into());
        fields.insert("at".to_owned(), shown_time(self.clock.now()));
        fields.insert("subject".to_owned(), self.subject.as_str().into());
        let write = Write::over(Name::note(stream), version, fields);
        let outcome = self.store.write_many(vec![write], PATIENCE).await.map(|mut outcomes| outcomes.pop());
        match outcome {
            Ok(Some(Ok(version))) => {
                self.remember_note(stream, position, Some(version));
                return true;
            }
            Ok(Some(Err(WriteRefusal::Conflict))) => self.read_note(stream).await,
            Ok(Some(Err(WriteRefusal::Failed(error)))) => not_noted(&error),
            Ok(None) => {}
            Err(error) => {
                not_noted(&error);
                self.circuit.trip(&error);
            }
        }
        false
    }

    /// Another instance wrote the note: it is read, and ours written when it is due again, if it says more.
    async fn read_note(&self, stream: &str) {
        match self
            .store
            .get_many(&[Name::note(stream)], PATIENCE)
            .await
            .map(|mut documents| documents.pop().flatten())
        {
            Ok(document) => {
                let theirs =
                    document.as_ref().and_then(|document| self.position_in(stream, document)).unwrap_or(0);
                self.remember_note(stream, theirs, document.map(|document| document.version));
            }
            Err(error) => not_noted(&error),
        }
    }

    /// Remembers what the note of a stream says, unless another stream is followed by now.
    fn remember_note(&self, stream: &str, position: u64, version: Option<Version>) {
        let mut counted = self.counted.lock().unwrap_or_else(PoisonError::into_inner);
        if *counted.stream == *stream {
            (counted.position, counted.version) = (position, version);
            self.metrics.counted_to.set(gauge(position));
        }
    }
}

fn not_noted(error: &StoreError) {
    tracing::debug!(error = %error, "how far the stream is counted was not noted");
}

fn write(flushing: &Flushing) -> Write {
    let mut fields = write_history(&flushing.user.history);
    write_counts(&mut fields, &flushing.user);
    if flushing.version.is_none() || flushing.profile.is_some() {
        identify(&mut fields, &flushing.key, flushing.profile.as_ref());
    }
    Write::over(Name::user(Arc::clone(&flushing.key)), flushing.version, fields)
}
