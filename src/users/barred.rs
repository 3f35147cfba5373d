//! Who is not taken in: users whom an operator ignores, and those who are forgotten. Their names are documents of
//! their own, which every instance follows; door and projection ask here.
//!
//! Until the store has said who they are, nobody passes the door, and nothing is counted: a line let in too early would
//! make somebody known again. A store that does not say holds nobody up for long: then those are kept out whom the run
//! before knew, and of the others events flow without their users, as always while it is away; nobody's document is made
//! or counted before it has said.
//!
//! Who was forgotten and is taken in again is somebody new: what they said before that moment is nobody's, at the door,
//! to the projection, on every instance alike. The moment lies a little ahead, so that all have heard of it by then.

mod kept;

use std::collections::HashMap;
use std::convert::Infallible;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use futures_util::StreamExt as _;
use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep, sleep_until};

use self::kept::Kept;
use super::Users;
use super::words::TOLD;
use crate::data_dir::NewerFormat;
use crate::errors::ErrorCode;
use crate::retry::Backoff;
use crate::status::Part;
use crate::store::document::shown_time;
use crate::store::measured::Store;
use crate::store::{Changes, Collection, Document, Fields, Name, StoreError};
use crate::telemetry::logs::Said;

/// A start waits for the store to say who is not taken in: a connection may have to be made, and they may be many. Later,
/// a listener may be gone for so long before somebody should look.
const LISTENER_PATIENCE: Duration = Duration::from_secs(10);

const FIRST_RETRY: Duration = Duration::from_millis(250);
const LONGEST_RETRY: Duration = Duration::from_secs(2);

/// Fields of a document.
const KIND: &str = "kind";
const AT: &str = "at";
const RETURNED_AT: &str = "returnedAt";
/// The kind of who is taken in.
const RETURNED: &str = "returned";

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

    /// What is to be written of somebody who is not taken in from `at` on.
    pub(super) fn write(self, at: Timestamp) -> Fields {
        let mut fields =
            Fields::from_iter([(KIND.to_owned(), self.as_str().into()), (AT.to_owned(), shown_time(at))]);
        if self == Self::Forgotten {
            // They may have been forgotten before.
            fields.insert(TOLD.to_owned(), false.into());
        }
        fields
    }
}

/// What a document says of a user.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Mark {
    /// They are not taken in.
    pub(super) bar: Option<Bar>,
    /// They were forgotten, and taken in again: what they said before is nobody's.
    pub(super) returned_at: Option<Timestamp>,
}

impl Mark {
    /// One that nobody can read keeps its user out, and deletes nothing.
    pub(super) fn read(fields: &Fields) -> Self {
        let bar = match fields.get(KIND).and_then(Value::as_str) {
            Some(kind) if kind == Bar::Forgotten.as_str() => Some(Bar::Forgotten),
            Some(RETURNED) => None,
            _ => Some(Bar::Ignored),
        };
        Self { bar, returned_at: read_time(fields, RETURNED_AT) }
    }

    /// What is to be written of somebody who is taken in from `at` on.
    pub(super) fn write_returned(at: Timestamp) -> Fields {
        let at = shown_time(at);
        Fields::from_iter([
            (KIND.to_owned(), RETURNED.into()),
            (AT.to_owned(), at.clone()),
            (RETURNED_AT.to_owned(), at),
        ])
    }

    fn is_forgotten(self) -> bool {
        self.bar == Some(Bar::Forgotten)
    }

    /// Why what its user said at that time is not taken in.
    fn bar_at(self, said_at: Timestamp) -> Option<Bar> {
        let is_of_before = self.returned_at.is_some_and(|returned_at| said_at < returned_at);
        self.bar.or(is_of_before.then_some(Bar::Forgotten))
    }
}

fn read_time(fields: &Fields, name: &str) -> Option<Timestamp> {
    fields.get(name)?.as_str()?.parse().ok()
}

/// Since when, as a document has it.
pub(super) fn read_at(fields: &Fields) -> Option<Timestamp> {
    read_time(fields, AT)
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
    marks: RwLock<HashMap<Arc<str>, Mark>>,
    /// How often that changed.
    changes: AtomicU64,
    changed: Notify,
    knowledge: watch::Sender<Knowledge>,
    /// What the store says has not been heard for long.
    is_detached: AtomicBool,
    kept: OnceLock<Kept>,
}

/// Who is not taken in at this moment.
pub struct BarredNow<'a>(RwLockReadGuard<'a, HashMap<Arc<str>, Mark>>);

impl BarredNow<'_> {
    /// Whether it is nobody.
    pub fn is_nobody(&self) -> bool {
        self.0.is_empty()
    }

    fn mark_of(&self, key: &str) -> Mark {
        if self.0.is_empty() { Mark::default() } else { self.0.get(key).copied().unwrap_or_default() }
    }

    /// Why what this user said at that time is not taken in.
    pub fn bar_of(&self, key: &str, said_at: Timestamp) -> Option<Bar> {
        self.mark_of(key).bar_at(said_at)
    }

    /// Whether what this user said at that time is nobody's: they are not to be known, or were not until later.
    pub(super) fn is_nobodys(&self, key: &str, said_at: Timestamp) -> bool {
        let Mark { bar, returned_at } = self.mark_of(key);
        let bar = bar.filter(|bar| *bar == Bar::Forgotten);
        Mark { bar, returned_at }.bar_at(said_at).is_some()
    }

    /// Whether this user is not to be known.
    pub fn is_forgotten(&self, key: &str) -> bool {
        self.mark_of(key).is_forgotten()
    }

    /// When this user was taken in again.
    pub(super) fn returned_at(&self, key: &str) -> Option<Timestamp> {
        self.mark_of(key).returned_at
    }
}

/// What was heard that asks for something to be done.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Heard {
    /// Those who were not forgotten before.
    pub(super) forgotten: Vec<Tombstone>,
    /// Those who are not forgotten any more.
    pub(super) returned: Vec<Arc<str>>,
}

impl Default for Barred {
    fn default() -> Self {
        Self::new()
    }
}

impl Barred {
    /// Nobody has said yet who they are.
    pub fn new() -> Self {
        Self(Arc::new(State {
            marks: RwLock::default(),
            changes: AtomicU64::new(0),
            changed: Notify::new(),
            knowledge: watch::Sender::new(Knowledge::Asking),
            is_detached: AtomicBool::new(false),
            kept: OnceLock::new(),
        }))
    }

    /// Nobody is kept out, and nobody will be.
    pub fn nobody() -> Self {
        let barred = Self::new();
        barred.0.knowledge.send_replace(Knowledge::Known);
        barred
    }

    /// Until the store has said who they are, it is those that the run before left in `folder`; [`Barred::keep`] leaves
    /// them for the next. Fails if a later version wrote there.
    pub fn keep_in(&self, folder: &Path) -> Result<(), NewerFormat> {
        let (kept, found) = Kept::open(folder)?;
        self.marks_mut().extend(found.map(|(key, bar)| (key, Mark { bar: Some(bar), returned_at: None })));
        // Nobody else has set it: there is one folder.
        self.0.kept.get_or_init(|| kept);
        Ok(())
    }

    /// Keeps who they are for a start without the store. Does not end.
    pub async fn keep(self) {
        let mut said = Said::default();
        let mut backoff = Backoff::new(FIRST_RETRY, LONGEST_RETRY);
        loop {
            self.0.changed.notified().await;
            let Some(kept) = self.0.kept.get() else { continue };
            let bars: Vec<_> =
                self.now().0.iter().filter_map(|(key, mark)| Some((key.to_string(), mark.bar?))).collect();
            match kept.put(bars).await {
                Ok(()) => {
                    said.over();
                    backoff.reset();
                }
                Err(error) => {
                    said.failure(
                        ErrorCode::NoteUnusable,
                        &error,
                        "who is not taken in cannot be kept in DATA_DIR",
                    );
                    self.0.changed.notify_one();
                    sleep(backoff.next_wait()).await;
                }
            }
        }
    }

    fn marks_mut(&self) -> RwLockWriteGuard<'_, HashMap<Arc<str>, Mark>> {
        self.0.marks.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Those of this moment. Held no longer than it takes to look.
    pub fn now(&self) -> BarredNow<'_> {
        BarredNow(self.0.marks.read().unwrap_or_else(PoisonError::into_inner))
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

    /// Takes in what the store says: all there is, or what changed.
    pub(super) fn hear(&self, is_whole: bool, said: &[(Name, Option<Document>)]) -> Heard {
        let mut heard = Heard::default();
        {
            let mut marks = self.marks_mut();
            let mut before = if is_whole { std::mem::take(&mut *marks) } else { HashMap::new() };
            if *self.0.knowledge.borrow() != Knowledge::Known {
                // What the run before kept was not acted upon by this one.
                before.clear();
            }
            for (name, document) in said {
                let is = document.as_ref().map(|document| Mark::read(&document.fields)).unwrap_or_default();
                let was = match document {
                    Some(_) => marks.insert(Arc::clone(&name.id), is),
                    None => marks.remove(&name.id),
                };
                let was = was.or_else(|| before.remove(&name.id)).unwrap_or_default();
                if let Some(document) = document.as_ref().filter(|_| is.is_forgotten()) {
                    if !was.is_forgotten() {
                        heard.forgotten.push(Tombstone::read(&name.id, &document.fields));
                    }
                } else if was.is_forgotten() || is.returned_at > was.returned_at {
                    heard.returned.push(Arc::clone(&name.id));
                }
            }
            heard
                .returned
                .extend(before.into_iter().filter(|(_, was)| was.is_forgotten()).map(|(key, _)| key));
            self.0.changes.fetch_add(1, Ordering::Release);
        }
        self.0.changed.notify_one();
        self.0
            .knowledge
            .send_if_modified(|knowledge| std::mem::replace(knowledge, Knowledge::Known) != Knowledge::Known);
        heard
    }

    /// Follows what the store says. Does not end. `users` erases who is forgotten; without it nobody is kept.
    pub async fn follow(self, store: Store, users: Option<Users>) {
        let users = users.as_ref();
        let mut backoff = Backoff::new(FIRST_RETRY, LONGEST_RETRY);
        let mut said = Said::default();
        let mut detached_at = Instant::now();
        loop {
            let mut changes = tokio::select! {
                changes = self.attach(&store, users, &mut backoff, &mut said) => changes,
                never = self.say_that_they_wait_in_vain(users, detached_at) => match never {},
            };
            if self.0.is_detached.swap(false, Ordering::AcqRel) {
                tracing::info!("it is heard again who is not taken in");
            }
            while let Some(Ok(changed)) = changes.next().await {
                backoff.reset();
                self.take_in(false, &changed, users);
            }
            tracing::debug!("the listener for who is not taken in was interrupted");
            detached_at = Instant::now();
            sleep(backoff.next_wait()).await;
        }
    }

    /// Begins to follow, and takes in all there is; as often as it takes. Waits for an answer however long it takes;
    /// nobody else does.
    async fn attach(
        &self,
        store: &Store,
        users: Option<&Users>,
        backoff: &mut Backoff,
        said: &mut Said,
    ) -> Changes {
        let attach = async || {
            let mut changes = store.follow(Collection::Barred).await?;
            let ended = || StoreError::Away("the listener was ended".to_owned());
            let whole = changes.next().await.ok_or_else(ended)??;
            Ok::<_, StoreError>((changes, whole))
        };
        loop {
            match attach().await {
                Ok((changes, whole)) => {
                    said.over();
                    self.take_in(true, &whole, users);
                    return changes;
                }
                Err(error) if error.is_transient() => {
                    tracing::debug!(error = %error, "who is not taken in cannot be followed now");
                }
                Err(error) => {
                    self.give_up_waiting(users, &error);
                    said.failure(
                        ErrorCode::StoreRefused,
                        &error,
                        "who is ignored or forgotten cannot be followed",
                    );
                }
            }
            sleep(backoff.next_wait()).await;
        }
    }

    /// While nothing is heard: lets those go who wait for the first answer, and says so once it has taken long.
    async fn say_that_they_wait_in_vain(&self, users: Option<&Users>, since: Instant) -> Infallible {
        let patience_ends = since + LISTENER_PATIENCE;
        let is_away = async {
            match users {
                Some(users) => users.0.circuit.until(true).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = is_away => {}
            () = sleep_until(patience_ends) => {}
        }
        let error = StoreError::Away("it does not say who is ignored or forgotten".to_owned());
        self.give_up_waiting(users, &error);
        sleep_until(patience_ends).await;
        if !self.0.is_detached.swap(true, Ordering::AcqRel) {
            tracing::warn!(
                error_code = %ErrorCode::StoreUnavailable,
                "it is not heard who is ignored or forgotten; those known so far are kept out"
            );
        }
        std::future::pending().await
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
        let Heard { forgotten, returned } = self.hear(is_whole, said);
        if let Some(users) = users {
            users.0.forget_all(forgotten, is_first);
            // Before the first answer nobody was met: memory holds nothing but what lies in the outbox.
            if !is_first {
                users.0.drop_all(&returned);
            }
        }
    }
}

/// As the probes see it.
impl Part for Barred {
    fn name(&self) -> &'static str {
        "barred"
    }

    /// Where it is not heard who they are because the store is away, that is what is waited for.
    fn is_waited_for(&self) -> bool {
        false
    }

    fn is_degraded(&self) -> bool {
        self.0.is_detached.load(Ordering::Acquire)
    }

    fn describe(&self) -> Value {
        json!({ "state": if self.is_degraded() { "detached" } else { "followed" } })
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

    /// Keys of those who were heard to be forgotten, and to be back.
    fn news(heard: &Heard) -> [Vec<&str>; 2] {
        [
            heard.forgotten.iter().map(|one| &*one.key).collect(),
            heard.returned.iter().map(|key| &**key).collect(),
        ]
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn what_the_store_says_last_holds() {
        let barred = Barred::new();
        let hear = |is_whole, all: &[(&str, Option<&str>)]| {
            let all: Vec<_> = all.iter().map(|(key, kind)| said(key, *kind)).collect();
            let heard = barred.hear(is_whole, &all);
            news(&heard).map(|keys| keys.join(" "))
        };
        let news = |forgotten: &str, returned: &str| [forgotten.to_owned(), returned.to_owned()];
        let bars = || ["a", "b", "c", "d"].map(|key| barred.now().bar_of(key, at(1)));
        let (ignored, forgotten) = (Some(Bar::Ignored), Some(Bar::Forgotten));
        let whole = [("a", Some("ignored")), ("b", Some("forgotten")), ("c", Some("nonsense"))];
        assert_eq!(hear(true, &whole), news("b", ""));
        assert_eq!(bars(), [ignored, forgotten, ignored, None]);
        // Said again, it is no news; an ignored user may be forgotten, and both may end.
        assert_eq!(hear(false, &[("b", Some("forgotten")), ("a", Some("forgotten"))]), news("a", ""));
        assert_eq!(hear(false, &[("b", None), ("d", None)]), news("", "b"));
        assert_eq!(bars(), [forgotten, None, ignored, None]);
        // After an interruption the whole is said again: what is not in it is gone.
        assert_eq!(hear(true, &[("c", Some("forgotten")), ("d", Some("forgotten"))]), news("c d", "a"));
        assert_eq!(bars(), [None, None, forgotten, forgotten]);
        assert_eq!(barred.changes(), 4);
    }

    #[test]
    fn what_somebody_said_before_they_came_back_is_nobodys() {
        let barred = Barred::new();
        let mark = |fields: Fields| (name("a".into()), Some(Document { fields, version: Version(1) }));
        let heard = barred.hear(true, &[mark(Mark::write_returned(at(10)))]);
        assert_eq!(news(&heard), [vec![], vec!["a"]], "whatever a run before has in the outbox");
        let bar = |said_at| {
            let now = barred.now();
            (now.bar_of("a", at(said_at)), now.is_nobodys("a", at(said_at)), now.is_forgotten("a"))
        };
        assert_eq!(bar(9), (Some(Bar::Forgotten), true, false));
        assert_eq!(bar(10), (None, false, false));
        // Ignored later, which leaves the rest of the document as it is.
        let mut fields = Mark::write_returned(at(10));
        fields.extend(Bar::Ignored.write(at(20)));
        assert_eq!(barred.hear(false, &[mark(fields.clone())]), Heard::default());
        assert_eq!(bar(9), (Some(Bar::Ignored), true, false));
        assert_eq!(bar(30), (Some(Bar::Ignored), false, false));
        // Forgotten once more, and back.
        fields.extend(Bar::Forgotten.write(at(40)));
        assert_eq!(news(&barred.hear(false, &[mark(fields)])), [vec!["a"], vec![]]);
        assert_eq!(bar(50), (Some(Bar::Forgotten), true, true));
        assert_eq!(news(&barred.hear(true, &[mark(Mark::write_returned(at(60)))])), [vec![], vec!["a"]]);
        assert_eq!((bar(59).1, bar(60).1), (true, false));
    }

    #[test]
    fn a_document_is_read_as_it_was_written() {
        let at = Timestamp::from_millisecond(1_700_000_000_123).unwrap();
        for bar in [Bar::Ignored, Bar::Forgotten] {
            let fields = bar.write(at);
            let mark = Mark { bar: Some(bar), returned_at: None };
            assert_eq!((Mark::read(&fields), read_at(&fields)), (mark, Some(at)));
        }
        let returned = Mark { bar: None, returned_at: Some(at) };
        assert_eq!(Mark::read(&Mark::write_returned(at)), returned);
        assert_eq!(Mark::read(&crate::store::document::damaged()).bar, Some(Bar::Ignored));
    }

    #[tokio::test]
    async fn a_start_without_the_store_keeps_out_whom_the_run_before_knew() {
        let folder = tempfile::tempdir().unwrap();
        let open = || {
            let barred = Barred::new();
            barred.keep_in(folder.path()).unwrap();
            barred
        };
        let bars = |barred: &Barred| ["a", "b", "c"].map(|key| barred.now().bar_of(key, at(1)));
        let barred = open();
        assert_eq!(bars(&barred), [None; 3]);
        barred.hear(true, &[said("a", Some("ignored")), said("b", Some("forgotten"))]);
        let mut tasks = crate::tasks::Tasks::new();
        tasks.spawn("kept out", barred.clone().keep());
        let is_kept = async |expected| {
            while bars(&open()) != expected {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let (ignored, forgotten) = (Some(Bar::Ignored), Some(Bar::Forgotten));
        tokio::time::timeout(Duration::from_secs(5), is_kept([ignored, forgotten, None])).await.unwrap();
        barred.hear(false, &[said("a", None), said("c", Some("forgotten"))]);
        tokio::time::timeout(Duration::from_secs(5), is_kept([None, forgotten, forgotten])).await.unwrap();
        drop(tasks);
        // What the store says counts, and is acted upon once more: nobody did in this run.
        let next = open();
        let heard = next.hear(true, &[said("b", Some("forgotten"))]);
        assert_eq!((news(&heard), bars(&next)), ([vec!["b"], vec![]], [None, forgotten, None]));
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
