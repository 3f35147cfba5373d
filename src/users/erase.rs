//! Whoever is forgotten has no document, whatever raced with the forgetting.
//!
//! No write of ours begins for somebody who is known to be forgotten. One that began before may come behind the
//! deletion, and make the document anew: so an instance deletes it when it hears of the forgetting, again behind each
//! write that ended after it heard, and once more when a write whose answer was lost cannot come any more. What an
//! instance that crashed has left behind, the next start of any finds: it looks at every forgotten user once.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, sleep, sleep_until};

use super::barred::Tombstone;
use super::{EnrichMode, PATIENCE, Shared, Users};
use crate::errors::ErrorCode;
use crate::retry::Backoff;
use crate::store::{Change, Condition, Name, StoreError, Write, WriteRefusal};
use crate::telemetry::logs::Said;

/// Users looked at in one request.
const AT_ONCE: usize = 100;

/// A write whose answer was lost comes within its time-out, and what the network adds.
const LOST_WRITES: Duration = PATIENCE.saturating_add(Duration::from_secs(5));

const FIRST_RETRY: Duration = Duration::from_millis(250);
const LONGEST_RETRY: Duration = Duration::from_secs(10);

/// Whose documents are to be looked for, and when.
#[derive(Default)]
pub(super) struct Erasures {
    due: Mutex<BTreeSet<(Instant, Arc<str>)>>,
    added: Notify,
}

impl Erasures {
    fn add(&self, at: Instant, keys: impl Iterator<Item = Arc<str>>) {
        self.due.lock().unwrap_or_else(PoisonError::into_inner).extend(keys.map(|key| (at, key)));
        self.added.notify_one();
    }

    /// Those whose time has come, a group of them; else when it comes.
    fn take_due(&self, now: Instant) -> Result<Vec<Arc<str>>, Option<Instant>> {
        let mut due = self.due.lock().unwrap_or_else(PoisonError::into_inner);
        let mut taken = Vec::new();
        while taken.len() < AT_ONCE
            && let Some((at, key)) = due.pop_first()
        {
            if at > now {
                due.insert((at, key));
                break;
            }
            taken.push(key);
        }
        if taken.is_empty() { Err(due.first().map(|(at, _)| *at)) } else { Ok(taken) }
    }
}

impl Users {
    /// Looks for documents of forgotten users, and deletes them. Does not end.
    pub async fn erase_forgotten(self) {
        let shared = &*self.0;
        let mut backoff = Backoff::new(FIRST_RETRY, LONGEST_RETRY);
        let mut said = Said::default();
        loop {
            shared.circuit.until(false).await;
            let keys = match shared.erasures.take_due(Instant::now()) {
                Ok(keys) => keys,
                Err(next) => {
                    tokio::select! {
                        () = shared.erasures.added.notified() => {}
                        () = async { sleep_until(next.unwrap_or_else(Instant::now)).await }, if next.is_some() => {}
                    }
                    continue;
                }
            };
            match shared.erase_now(&keys).await {
                Ok(()) => {
                    backoff.reset();
                    said.over();
                }
                Err(error) => {
                    if error.is_transient() {
                        tracing::debug!(error = %error, "documents of forgotten users could not be looked for");
                    } else {
                        said.failure(
                            ErrorCode::StoreRefused,
                            &error,
                            "documents of forgotten users cannot be deleted",
                        );
                    }
                    let wait = backoff.next_wait();
                    shared.erasures.add(Instant::now() + wait, keys.into_iter());
                    sleep(wait).await;
                }
            }
        }
    }
}

impl Shared {
    /// These users are not to be known from here on: whatever memory holds of them is dropped, and their documents are
    /// looked for. `is_first`: nothing of this process can have been written yet.
    pub(super) fn forget_all(&self, forgotten: Vec<Tombstone>, is_first: bool) {
        if forgotten.is_empty() {
            return;
        }
        let keys: Vec<_> = forgotten.iter().map(|one| Arc::clone(&one.key)).collect();
        self.drop_all(&keys);
        self.erase(&keys, !is_first);
        if self.config.mode == EnrichMode::On {
            self.words.add(forgotten.into_iter().filter(|one| !one.is_told));
        }
        // An opening of theirs may have been waited for.
        self.changed.notify_one();
    }

    /// What memory holds of these users is of before they were forgotten, or came back.
    pub(super) fn drop_all(&self, keys: &[Arc<str>]) {
        let mut table = self.table();
        for key in keys {
            table.bar(key);
        }
        self.show(&mut table);
    }

    /// Their documents are looked for now, and `again` when no write of before can come any more.
    fn erase(&self, keys: &[Arc<str>], again: bool) {
        if self.config.mode == EnrichMode::On {
            let now = Instant::now();
            self.erasures.add(now, keys.iter().cloned());
            if again {
                self.erasures.add(now + LOST_WRITES, keys.iter().cloned());
            }
        }
    }

    /// A write of these users' documents has ended, or its answer was lost: of who is forgotten by now, none may stay.
    pub(super) fn erase_forgotten_of<'a>(&self, written: impl Iterator<Item = &'a Arc<str>>) {
        let barred = self.barred.now();
        if barred.is_nobody() {
            return;
        }
        let forgotten: Vec<_> = written.filter(|key| barred.is_forgotten(key)).cloned().collect();
        drop(barred);
        if !forgotten.is_empty() {
            self.erase(&forgotten, true);
        }
    }

    async fn erase_now(&self, keys: &[Arc<str>]) -> Result<(), StoreError> {
        // Somebody may have come back meanwhile.
        let names: Vec<_> = {
            let barred = self.barred.now();
            keys.iter().filter(|key| barred.is_forgotten(key)).cloned().map(Name::user).collect()
        };
        if names.is_empty() {
            return Ok(());
        }
        let found = self.store.get_many(&names, PATIENCE).await?;
        let there =
            names.into_iter().zip(found).filter_map(|(name, document)| Some((name, document?.version)));
        // As it was found, and once more without those who were taken in again meanwhile: they are somebody new.
        let writes: Vec<_> = {
            let barred = self.barred.now();
            there
                .filter(|(name, _)| barred.is_forgotten(&name.id))
                .map(|(name, version)| Write {
                    name,
                    change: Change::Delete,
                    condition: Condition::At(version),
                })
                .collect()
        };
        if writes.is_empty() {
            return Ok(());
        }
        let (users, ids) = (writes.len(), writes.iter().map(|write| Arc::clone(&write.name.id)));
        let ids: Vec<_> = ids.collect();
        for (id, outcome) in ids.into_iter().zip(self.store.write_many(writes, PATIENCE).await?) {
            match outcome {
                Ok(_) => {}
                // It was written meanwhile: looked at once more.
                Err(WriteRefusal::Conflict) => {
                    self.erasures.add(Instant::now() + FIRST_RETRY, [id].into_iter());
                }
                Err(WriteRefusal::Failed(error)) => return Err(error),
            }
        }
        tracing::info!(users, "deleted documents of users who are forgotten");
        Ok(())
    }
}
