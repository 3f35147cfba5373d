//! Who is not taken in: users whom an operator ignores, and those who are forgotten. Their names are documents of
//! their own, which every instance follows; door and projection ask here.
//!
//! Until the store has said who they are, nobody passes the door, and nothing is counted: a line let in too early would
//! make somebody known again. A store that does not say keeps nobody out for long: then events flow without their users,
//! as always while it is away, and nobody's document is made or counted before it has said.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};
use std::time::Duration;

use futures_util::StreamExt as _;
use jiff::Timestamp;
use serde_json::Value;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until};

use super::Users;
use super::words::TOLD;
use crate::errors::ErrorCode;
use crate::retry::Backoff;
use crate::store::document::shown_time;
use crate::store::measured::Store;
use crate::store::{Changes, Collection, Document, Fields, Name, StoreError};
use crate::telemetry::logs::Said;

/// A start waits for the store to say who is not taken in: a connection may have to be made, and they may be many.
const FIRST_PATIENCE: Duration = Duration::from_secs(10);

const FIRST_RETRY: Duration = Duration::from_millis(250);
const LONGEST_RETRY: Duration = Duration::from_secs(2);

/// Fields of a document.
const KIND: &str = "kind";
const AT: &str = "at";

/// Why somebody is not taken in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bar {
    /// An operator does not want their lines: a bot, say. Their document stays as it is.
    Ignored,
    /// They are not to be known: the document is deleted, and none is made.
    Forgotten,
}

impl Bar {
    /// As it stands in a document.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ignored => "ignored",
            Self::Forgotten => "forgotten",
        }
    }

    /// What a document says. One that nobody can read keeps its user out, and deletes nothing.
    pub(super) fn read(fields: &Fields) -> Self {
        let kind = fields.get(KIND).and_then(|kind| kind.as_str());
        if kind == Some(Self::Forgotten.as_str()) { Self::Forgotten } else { Self::Ignored }
    }

    /// What a document says.
    pub(super) fn write(self, at: Timestamp) -> Fields {
        Fields::from_iter([(KIND.to_owned(), self.as_str().into()), (AT.to_owned(), shown_time(at))])
    }
}

/// Since when, as a document has it.
pub(super) fn read_at(fields: &Fields) -> Option<Timestamp> {
    fields.get(AT)?.as_str()?.parse().ok()
}

/// That somebody is forgotten.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Tombstone {
    /// Who.
    pub(super) key: Arc<str>,
    /// Since when.
    pub(super) at: Timestamp,
    /// The stream says so, too.
    pub(super) is_told: bool,
}

impl Tombstone {
    fn read(key: &Arc<str>, fields: &Fields) -> Self {
        let is_told = fields.get(TOLD).and_then(Value::as_bool).unwrap_or_default();
        Self { key: Arc::clone(key), at: read_at(fields).unwrap_or(Timestamp::UNIX_EPOCH), is_told }
    }
}

/// The document of a user who is not taken in.
pub(super) fn name(key: Arc<str>) -> Name {
    Name { collection: Collection::Barred, id: key }
}

/// What is known of who they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Knowledge {
    /// The store was asked.
    Asking,
    /// It does not say.
    Away,
    /// It said; by now it may have said more.
    Known,
}

/// Who is not taken in, by their documents' keys. Cheap to clone.
#[derive(Clone)]
pub struct Barred(Arc<State>);

struct State {
    keys: RwLock<HashMap<Arc<str>, Bar>>,
    /// How often that changed.
    changes: AtomicU64,
    knowledge: watch::Sender<Knowledge>,
}

/// Who is not taken in at this moment.
pub struct BarredNow<'a>(RwLockReadGuard<'a, HashMap<Arc<str>, Bar>>);

impl BarredNow<'_> {
    /// Whether it is nobody.
    pub fn is_nobody(&self) -> bool {
        self.0.is_empty()
    }

    /// Why this user is not taken in.
    pub fn bar_of(&self, key: &str) -> Option<Bar> {
        if self.0.is_empty() { None } else { self.0.get(key).copied() }
    }

    /// Whether this user is not to be known.
    pub fn is_forgotten(&self, key: &str) -> bool {
        self.bar_of(key) == Some(Bar::Forgotten)
    }
}

impl Default for Barred {
    fn default() -> Self {
        Self::new()
    }
}

impl Barred {
    /// Nobody has said yet who they are.
    pub fn new() -> Self {
        let knowledge = watch::Sender::new(Knowledge::Asking);
        Self(Arc::new(State { keys: RwLock::default(), changes: AtomicU64::new(0), knowledge }))
    }

    /// Nobody is kept out, and nobody will be.
    pub fn nobody() -> Self {
        let barred = Self::new();
        barred.0.knowledge.send_replace(Knowledge::Known);
        barred
    }

    /// Those of this moment. Held no longer than it takes to look.
    pub fn now(&self) -> BarredNow<'_> {
        BarredNow(self.0.keys.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Rises with every change.
    pub fn changes(&self) -> u64 {
        self.0.changes.load(Ordering::Acquire)
    }

    /// Waits until the store has said who they are, or it is clear that it does not.
    pub async fn asked(&self) {
        self.until(|knowledge| knowledge != Knowledge::Asking).await;
    }

    /// Waits until the store has said who they are.
    pub(super) async fn known(&self) {
        self.until(|knowledge| knowledge == Knowledge::Known).await;
    }

    async fn until(&self, is_fine: impl Fn(Knowledge) -> bool) {
        if !is_fine(*self.0.knowledge.borrow()) {
            // The sender lives as long as this.
            drop(self.0.knowledge.subscribe().wait_for(|knowledge| is_fine(*knowledge)).await);
        }
    }

    /// The store does not say now. What it said before holds.
    fn say_away(&self) {
        self.0.knowledge.send_if_modified(|knowledge| {
            let is_asking = *knowledge == Knowledge::Asking;
            if is_asking {
                *knowledge = Knowledge::Away;
            }
            is_asking
        });
    }

    /// Takes in what the store says: all there is, or what changed. Those who were not forgotten before.
    pub(super) fn hear(&self, is_whole: bool, said: &[(Name, Option<Document>)]) -> Vec<Tombstone> {
        let mut newly_forgotten = Vec::new();
        {
            let mut keys = self.0.keys.write().unwrap_or_else(PoisonError::into_inner);
            let before = if is_whole { std::mem::take(&mut *keys) } else { HashMap::new() };
            for (name, document) in said {
                let Some(document) = document else {
                    keys.remove(&name.id);
                    continue;
                };
                let bar = Bar::read(&document.fields);
                let was = keys.insert(Arc::clone(&name.id), bar).or_else(|| before.get(&name.id).copied());
                if bar == Bar::Forgotten && was != Some(Bar::Forgotten) {
                    newly_forgotten.push(Tombstone::read(&name.id, &document.fields));
                }
            }
            self.0.changes.fetch_add(1, Ordering::Release);
        }
        self.0
            .knowledge
            .send_if_modified(|knowledge| std::mem::replace(knowledge, Knowledge::Known) != Knowledge::Known);
        newly_forgotten
    }

    /// Follows what the store says. Does not end. `users` erases who is forgotten; without it nobody is kept.
    pub async fn follow(self, store: Store, users: Option<Users>) {
        let mut backoff = Backoff::new(FIRST_RETRY, LONGEST_RETRY);
        let mut said = Said::default();
        let patience_ends = Instant::now() + FIRST_PATIENCE;
        loop {
            match self.attach(&store, users.as_ref(), patience_ends).await {
                Ok(mut changes) => {
                    while let Some(Ok(changed)) = changes.next().await {
                        backoff.reset();
                        self.take_in(false, &changed, users.as_ref());
                    }
                    tracing::debug!("the listener for who is not taken in was interrupted");
                }
                Err(error) => {
                    if error.is_transient() {
                        tracing::debug!(error = %error, "who is not taken in cannot be followed now");
                    } else {
                        self.give_up_waiting(users.as_ref(), &error);
                        said.failure(
                            ErrorCode::StoreRefused,
                            &error,
                            "who is ignored or forgotten cannot be followed",
                        );
                    }
                }
            }
            sleep(backoff.next_wait()).await;
        }
    }

    /// Begins to follow, and takes in all there is. Waits for an answer however long it takes; nobody else does.
    async fn attach(
        &self,
        store: &Store,
        users: Option<&Users>,
        patience_ends: Instant,
    ) -> Result<Changes, StoreError> {
        let attached = async {
            let mut changes = store.follow(Collection::Barred).await?;
            let ended = || StoreError::Away("the listener was ended".to_owned());
            let whole = changes.next().await.ok_or_else(ended)??;
            Ok::<_, StoreError>((changes, whole))
        };
        let others_wait_in_vain = async {
            match users {
                Some(users) => {
                    tokio::select! {
                        () = users.0.circuit.until(true) => {}
                        () = sleep_until(patience_ends) => {}
                    }
                }
                None => sleep_until(patience_ends).await,
            }
        };
        tokio::pin!(attached);
        let answer = tokio::select! {
            answer = &mut attached => answer,
            () = others_wait_in_vain => {
                let error = StoreError::Away("it does not say who is ignored or forgotten".to_owned());
                self.give_up_waiting(users, &error);
                attached.await
            }
        };
        let (changes, whole) = answer?;
        self.take_in(true, &whole, users);
        Ok(changes)
    }

    /// Whoever waits for the first answer need not any longer: the store counts as away until there is one.
    fn give_up_waiting(&self, users: Option<&Users>, error: &StoreError) {
        if *self.0.knowledge.borrow() != Knowledge::Asking {
            return;
        }
        // First: who is let in then must not be met.
        if let Some(users) = users {
            users.0.circuit.trip(error);
        }
        self.say_away();
    }

    fn take_in(&self, is_whole: bool, said: &[(Name, Option<Document>)], users: Option<&Users>) {
        let is_first = *self.0.knowledge.borrow() != Knowledge::Known;
        let forgotten = self.hear(is_whole, said);
        if let Some(users) = users {
            users.0.forget_all(forgotten, is_first);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Version;

    fn said(key: &str, kind: Option<&str>) -> (Name, Option<Document>) {
        let document = kind.map(|kind| Document {
            fields: Fields::from_iter([("kind".to_owned(), kind.into())]),
            version: Version(1),
        });
        (name(key.into()), document)
    }

    #[test]
    fn what_the_store_says_last_holds() {
        let barred = Barred::new();
        let keys = |keys: &[&str]| {
            let tombstone = |key: &&str| Tombstone::read(&Arc::from(*key), &Fields::new());
            keys.iter().map(tombstone).collect::<Vec<_>>()
        };
        let whole = [said("a", Some("ignored")), said("b", Some("forgotten")), said("c", Some("nonsense"))];
        assert_eq!(barred.hear(true, &whole), keys(&["b"]));
        let bars = |barred: &Barred| ["a", "b", "c", "d"].map(|key| barred.now().bar_of(key));
        let (ignored, forgotten) = (Some(Bar::Ignored), Some(Bar::Forgotten));
        assert_eq!(bars(&barred), [ignored, forgotten, ignored, None]);
        // Said again, it is no news; an ignored user may be forgotten, and both may end.
        assert_eq!(
            barred.hear(false, &[said("b", Some("forgotten")), said("a", Some("forgotten"))]),
            keys(&["a"])
        );
        assert!(barred.hear(false, &[said("b", None), said("d", None)]).is_empty());
        assert_eq!(bars(&barred), [forgotten, None, ignored, None]);
        // After an interruption the whole is said again: what is not in it is gone.
        assert_eq!(
            barred.hear(true, &[said("a", Some("forgotten")), said("d", Some("forgotten"))]),
            keys(&["d"])
        );
        assert_eq!(bars(&barred), [forgotten, None, None, forgotten]);
        assert_eq!(barred.changes(), 4);
    }

    #[test]
    fn a_document_is_read_as_it_was_written() {
        let at = Timestamp::from_millisecond(1_700_000_000_123).unwrap();
        for bar in [Bar::Ignored, Bar::Forgotten] {
            let fields = bar.write(at);
            assert_eq!((Bar::read(&fields), read_at(&fields)), (bar, Some(at)));
        }
        assert_eq!(Bar::read(&crate::store::document::damaged()), Bar::Ignored);
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_is_let_go_when_the_store_has_said_or_does_not() {
        let barred = Barred::new();
        let is_let_go = async |barred: &Barred| {
            tokio::time::timeout(Duration::from_secs(1), barred.asked()).await.is_ok()
        };
        assert!(!is_let_go(&barred).await);
        barred.say_away();
        assert!(is_let_go(&barred).await);
        assert!(tokio::time::timeout(Duration::from_secs(1), barred.known()).await.is_err());
        barred.hear(true, &[]);
        barred.say_away();
        barred.known().await;
        Barred::nobody().known().await;
    }
}
