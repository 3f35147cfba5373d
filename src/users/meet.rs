//! Events meet their users, in order and in batches: read whom memory does not hold, write what must be decided first,
//! fold.

use std::sync::Arc;

use tokio::time::Instant;

use super::table::{Entered, Met, Opening, Visit};
use super::{Matched, Shared, Users};
use crate::envelope::UnmatchedReason;
use crate::envelope::id::{self, UserRef};
use crate::errors::ErrorCode;
use crate::store::document::{write_history, write_profile};
use crate::store::{Fields, Name, StoreError, Version, Write, WriteRefusal};

/// Users read, and users written, in one round. More at once would keep a slow store busy for longer than events wait for
/// it, and a store that is only slow would be taken for one that is away.
const MOST_AT_ONCE: usize = 100;

/// How a meeting went.
#[derive(Debug)]
pub enum Meeting {
    /// The event met its user.
    Met(Met),
    /// It did not.
    Unmatched(UnmatchedReason),
    /// With what is known of its user it cannot be published; it touched nothing.
    TooLarge,
}

/// What stands in the way of the next event.
enum Next {
    Nothing,
    Read,
    Write,
    Wait,
}

impl Users {
    /// Lets events meet their users, in order. Answers for at least the first of them: an event that opens a session is
    /// not decided before those in front of it are on their way.
    ///
    /// Waits for the store for no longer than `ENRICH_TIMEOUT`, and not at all once it failed: then events flow on
    /// unmatched, and are counted when it answers again.
    pub async fn meet(&self, visits: &[Visit<'_>]) -> Vec<Meeting> {
        let shared = &*self.0;
        let mut deadline = Instant::now() + shared.config.timeout;
        let mut met = Vec::with_capacity(visits.len());
        let (mut has_read, mut has_written) = (false, false);
        loop {
            let next =
                if self.is_dry() { shared.imagine(visits, &mut met) } else { shared.enter(visits, &mut met) };
            match next {
                Next::Nothing => return met,
                // What is decided goes on its way. The rest has a time of its own: one read, then one write.
                Next::Wait if !met.is_empty() => return met,
                Next::Read if !met.is_empty() && (has_read || has_written) => return met,
                Next::Write if !met.is_empty() && has_written => return met,
                Next::Wait => {
                    let began = Instant::now();
                    shared.changed.notified().await;
                    // That was not the store's time.
                    deadline += began.elapsed();
                }
                Next::Read => {
                    let ahead = visits[met.len()..].iter().map(|visit| &visit.key);
                    shared.read_missing(ahead, deadline).await;
                    has_read = true;
                }
                Next::Write => {
                    shared.write_openings(&visits[met.len()..], deadline).await;
                    has_written = true;
                }
            }
        }
    }

    /// Reads whom memory does not hold, ahead of their meeting.
    pub async fn expect<'a>(&self, keys: impl Iterator<Item = &'a Arc<str>>) {
        self.0.read_missing(keys, Instant::now() + self.0.config.timeout).await;
    }
}

impl Shared {
    async fn read_missing<'a>(&self, keys: impl Iterator<Item = &'a Arc<str>>, deadline: Instant) {
        if self.circuit.is_open() {
            return;
        }
        let missing = self.table().missing(keys, MOST_AT_ONCE);
        if missing.is_empty() {
            return;
        }
        self.read(missing, deadline.saturating_duration_since(Instant::now())).await;
    }

    /// Reads users into the table; a failure opens the circuit.
    pub(super) async fn read(&self, keys: Vec<Arc<str>>, within: std::time::Duration) {
        let names: Vec<_> = {
            let barred = self.barred.now();
            keys.into_iter().filter(|key| !barred.is_forgotten(key)).map(Name::user).collect()
        };
        if names.is_empty() {
            return;
        }
        match self.store.get_many(&names, within).await {
            Ok(documents) => {
                // Who was forgotten meanwhile is not remembered as they were.
                let barred = self.barred.now();
                let mut table = self.table();
                let known = names.iter().zip(&documents).filter(|(name, _)| !barred.is_forgotten(&name.id));
                for (name, document) in known {
                    tracing::debug!(user_ref = %name, exists = document.is_some(), "user loaded");
                    table.loaded(&name.id, document.as_ref());
                }
                self.show(&mut table);
            }
            // It is there: read again, for as long as there is time.
            Err(error @ StoreError::GaveUp(_)) => tracing::debug!(error = %error, "users were not read"),
            Err(error) => self.circuit.trip(&error),
        }
    }

    /// Folds events as far as nothing stands in the way.
    fn enter(&self, visits: &[Visit<'_>], met: &mut Vec<Meeting>) -> Next {
        let is_away = self.circuit.is_open();
        let barred = self.barred.now();
        let mut table = self.table();
        for visit in &visits[met.len()..] {
            // Let in the moment before: it is nobody's.
            if barred.is_nobodys(&visit.key, visit.seen.at) {
                let meeting = Meeting::Unmatched(UnmatchedReason::NoUser);
                self.count(&meeting);
                met.push(meeting);
                continue;
            }
            let meeting = match table.enter(visit, is_away) {
                Entered::Met(known) => {
                    self.metrics.first_messages.inc_by(u64::from(known.folded.tags.first_alltime));
                    Meeting::Met(known)
                }
                Entered::TooLarge => Meeting::TooLarge,
                Entered::Unknown | Entered::NeedsWrite | Entered::Refused if is_away => {
                    passed(&mut table, visit)
                }
                Entered::Refused => passed(&mut table, visit),
                Entered::Unknown => return Next::Read,
                Entered::NeedsWrite => return Next::Write,
                Entered::MustWait => return Next::Wait,
            };
            self.count(&meeting);
            met.push(meeting);
        }
        Next::Nothing
    }

    fn count(&self, meeting: &Meeting) {
        match meeting {
            Meeting::Met(_) => self.metrics.enriched.of(Matched::True).inc(),
            Meeting::Unmatched(_) => self.metrics.enriched.of(Matched::False).inc(),
            Meeting::TooLarge => {}
        }
    }

    /// On paper: what would be written is logged, and remembered until the user leaves memory.
    fn imagine(&self, visits: &[Visit<'_>], met: &mut Vec<Meeting>) -> Next {
        let is_away = self.circuit.is_open();
        let mut table = self.table();
        for visit in &visits[met.len()..] {
            let folded = table.imagine(visit);
            if folded.is_none() && !is_away {
                return Next::Read;
            }
            if let Some(folded) = folded {
                let tags: Vec<_> = folded.tags.names().collect();
                tracing::debug!(user_ref = %UserRef(&visit.key), event_id = %visit.seen.id, ?tags, opens = folded.opens, "dry run: nothing is written");
            }
            let meeting = Meeting::Unmatched(UnmatchedReason::DryRun);
            self.count(&meeting);
            met.push(meeting);
        }
        Next::Nothing
    }

    /// Writes first sights and openings through. Whatever is not certain afterwards is read again.
    async fn write_openings(&self, visits: &[Visit<'_>], deadline: Instant) {
        let mut openings = self.table().openings(visits.iter(), MOST_AT_ONCE);
        {
            let barred = self.barred.now();
            openings.retain(|opening| !barred.is_forgotten(&opening.key));
        }
        if openings.is_empty() {
            return;
        }
        let writes: Vec<_> = openings.iter().map(write).collect();
        let within = deadline.saturating_duration_since(Instant::now());
        let written = self.store.write_many(writes, within).await;
        self.erase_forgotten_of(openings.iter().map(|opening| &opening.key));
        match written {
            Ok(outcomes) => {
                let mut table = self.table();
                for (opening, outcome) in openings.into_iter().zip(outcomes) {
                    self.settle(&mut table, opening, outcome);
                }
            }
            Err(error) => {
                let mut table = self.table();
                for opening in &openings {
                    table.forget_base(&opening.key);
                }
                self.circuit.trip(&error);
            }
        }
    }

    fn settle(&self, table: &mut super::Table, opening: Opening, outcome: Result<Version, WriteRefusal>) {
        match outcome {
            Ok(version) => {
                let is_new = opening.version.is_none();
                self.metrics.created.inc_by(u64::from(is_new));
                self.metrics.sessions.inc_by(u64::from(!is_new || opening.history.session_count > 0));
                if is_new {
                    tracing::debug!(user_ref = %UserRef(&opening.key), "user created");
                }
                table.opened(opening, version);
            }
            Err(WriteRefusal::Conflict) => table.forget_base(&opening.key),
            // Contention, or a part of a request: the store is there. What was written shows when it is read.
            Err(WriteRefusal::Failed(error)) if error.is_transient() => table.forget_base(&opening.key),
            Err(WriteRefusal::Failed(error)) => {
                tracing::error!(error_code = %ErrorCode::StoreRefused, user_ref = %UserRef(&opening.key), error = %error, "the user's document cannot be written");
                table.refuse(&opening.key);
            }
        }
    }
}

/// The event flows on without its user.
fn passed(table: &mut super::Table, visit: &Visit<'_>) -> Meeting {
    table.pass(visit);
    Meeting::Unmatched(UnmatchedReason::StoreUnavailable)
}

fn write(opening: &Opening) -> Write {
    let mut fields = write_history(&opening.history);
    if opening.version.is_none() {
        identify(&mut fields, &opening.key, opening.profile.as_ref());
    }
    Write::over(Name::user(Arc::clone(&opening.key)), opening.version, fields)
}

/// Adds whom the document is of.
pub(super) fn identify(fields: &mut Fields, key: &str, profile: Option<&crate::store::document::Profile>) {
    if let Some((provider, user_id)) = id::user_of_key(key) {
        write_profile(fields, &provider, &user_id, profile);
    }
}
