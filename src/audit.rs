//! What operators did: who, what, when, and how it ended. A record is written before the act and completed behind it, so
//! that nothing is done without one; what its record cannot be written for is refused. A record that stays `begun` says
//! that nobody knows how the act ended: the process was killed in between, or the store went away.
//!
//! Operators are told apart by the credential they used, or by their name on the machine; never by an address. Of what
//! they wrote, names and ids are kept; of all else, notes say, only how long it was.

use std::os::unix::fs::MetadataExt as _;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use serde_json::{Map, Value, json};
use thiserror::Error;
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use crate::clock::Clock;
use crate::errors::{Coded, ErrorCode};
use crate::retry::Backoff;
use crate::store::measured::Store;
use crate::store::{Collection, Fields, Name, StoreError, Write, WriteRefusal};
use crate::telemetry::logs::with_causes;

/// For one call of the store.
const STORE_TIMEOUT: Duration = Duration::from_secs(5);
/// For completing a record, in all.
const COMPLETION_TIMEOUT: Duration = Duration::from_secs(5);
const FIRST_RETRY: Duration = Duration::from_millis(100);
const LONGEST_RETRY: Duration = Duration::from_secs(1);

/// Longest text that a record holds, in bytes.
const LONGEST_TEXT: usize = 256;
/// Values that a field of a record holds.
const MOST_VALUES: usize = 100;
/// Longest details of a record, in bytes; what does not fit is left out, and that is said.
const LONGEST_DETAILS: usize = 16 * 1024;

/// Most records in one answer.
pub const MOST_RECORDS: usize = 500;

/// Fields of a request whose values are kept. They name what was done, to what; none holds a secret or what somebody
/// wrote about somebody.
const SHOWN: [&str; 12] = [
    "channel",
    "channelId",
    "channels",
    "id",
    "ids",
    "key",
    "login",
    "logins",
    "roomId",
    "user",
    "userId",
    "users",
];

/// Who did something.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Actor {
    /// Whoever has `ADMIN_TOKEN`.
    AdminToken,
    /// Whoever has `ADMIN_TOKEN_NEXT`.
    NextAdminToken,
    /// Somebody on this machine, where no token is set.
    Loopback,
    /// A command straight on the store: the user's name on the machine.
    Command(String),
}

impl Actor {
    /// The user whose process this is.
    pub fn of_this_process() -> Self {
        // The environment says what its owner likes; the kernel does not.
        let Ok(process) = std::fs::metadata("/proc/self") else {
            return Self::Command("unknown".to_owned());
        };
        let users = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
        Self::Command(user_name(&users, process.uid()))
    }

    fn shown(&self) -> String {
        match self {
            Self::AdminToken => "ADMIN_TOKEN".to_owned(),
            Self::NextAdminToken => "ADMIN_TOKEN_NEXT".to_owned(),
            Self::Loopback => "loopback".to_owned(),
            Self::Command(user) => format!("cli:{user}"),
        }
    }
}

/// The name of a user in the text of `/etc/passwd`; a user without one is shown by number.
fn user_name(users: &str, uid: u32) -> String {
    let uid = uid.to_string();
    let name = users.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)? == uid).then_some(name)
    });
    name.map_or_else(|| format!("uid {uid}"), str::to_owned)
}

/// What else is known of an act: names and ids as they are, of the rest how long it was.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Details {
    fields: Map<String, Value>,
    bytes: usize,
}

impl Details {
    /// Nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// A name, an id, a number: kept as it is, up to 256 bytes.
    #[must_use]
    pub fn shown(mut self, field: &str, value: impl Into<Value>) -> Self {
        self.put(field, kept(&value.into()));
        self
    }

    /// What may be somebody's affair or a secret: kept as its length.
    #[must_use]
    pub fn redacted(mut self, field: &str, text: &str) -> Self {
        self.put(field, redacted(text.len()));
        self
    }

    /// Fields of a request: the values of those that name things are kept, of all others how long they are.
    #[must_use]
    pub fn of_request(mut self, fields: &Map<String, Value>) -> Self {
        for (field, value) in fields {
            self.put(field, if SHOWN.contains(&field.as_str()) { kept(value) } else { length_of(value) });
        }
        self
    }

    fn put(&mut self, field: &str, value: Value) {
        let field = field_name(field);
        let bytes = field.len() + value.to_string().len();
        if self.bytes + bytes > LONGEST_DETAILS {
            self.fields.insert("truncated".to_owned(), true.into());
        } else {
            self.bytes += bytes;
            self.fields.insert(field, value);
        }
    }
}

/// A name that every store takes.
fn field_name(field: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    field.chars().take(64).map(|c| if is_plain(c) { c } else { '_' }).collect()
}

fn kept(value: &Value) -> Value {
    match value {
        Value::String(text) => cut(text).into(),
        Value::Array(values) if values.iter().all(Value::is_string) => {
            values.iter().take(MOST_VALUES).map(kept).collect()
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => value.clone(),
        Value::Array(_) | Value::Object(_) => length_of(value),
    }
}

fn length_of(value: &Value) -> Value {
    match value {
        Value::Null => Value::Null,
        Value::String(text) => redacted(text.len()),
        value => redacted(value.to_string().len()),
    }
}

fn redacted(bytes: usize) -> Value {
    format!("{}, {bytes} bytes", crate::secret::REDACTED).into()
}

/// The text up to its longest, without control characters.
fn cut(text: &str) -> String {
    let text = &text[..text.floor_char_boundary(LONGEST_TEXT)];
    text.chars().filter(|c| !c.is_control()).collect()
}

/// What an operator is about to do.
#[derive(Debug, Clone)]
pub struct Deed {
    /// Who.
    pub actor: Actor,
    /// What, as it was asked for: `POST /admin/channels`, `inlet channel add`.
    pub action: String,
    /// To what: a document, a path.
    pub target: String,
    /// What else.
    pub details: Details,
    /// The request, if it came by HTTP.
    pub request_id: Option<String>,
}

/// Why there is no record. The act was not done.
#[derive(Debug, Error)]
#[error("the audit record cannot be written, so nothing was done")]
pub struct NotRecorded(#[source] pub WriteRefusal);

impl Coded for NotRecorded {
    fn code(&self) -> ErrorCode {
        ErrorCode::AuditUnavailable
    }
}

/// Why an act with a record was not done, or failed.
#[derive(Debug, Error)]
pub enum Audited<E: std::error::Error + 'static> {
    /// It has no record, so it was not tried.
    #[error(transparent)]
    NotRecorded(#[from] NotRecorded),
    /// It failed.
    #[error(transparent)]
    Failed(E),
}

impl<E: Coded + std::error::Error + 'static> Coded for Audited<E> {
    fn code(&self) -> ErrorCode {
        match self {
            Self::NotRecorded(error) => error.code(),
            Self::Failed(error) => error.code(),
        }
    }
}

/// Does something that has a record: written before `act` is polled, completed when it is done.
pub async fn audited<T, E: Coded + std::error::Error + 'static>(
    store: &Store,
    clock: &Clock,
    deed: Deed,
    act: impl Future<Output = Result<T, E>>,
) -> Result<T, Audited<E>> {
    let record = Begun::write(store, clock, deed).await?;
    let done = act.await;
    let outcome = done.as_ref().err().map_or(Outcome::Done, |error| Outcome::Failed(error.code()));
    record.complete(outcome, Details::new()).await;
    done.map_err(Audited::Failed)
}

/// How an act ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// As it was meant.
    Done,
    /// With an error.
    Failed(ErrorCode),
}

impl Outcome {
    fn shown(self) -> String {
        match self {
            Self::Done => "done".to_owned(),
            Self::Failed(code) => code.to_string(),
        }
    }
}

/// The record of an act that may now be done.
#[must_use = "a record that is not completed says that nobody knows how the act ended"]
pub struct Begun<'a> {
    store: &'a Store,
    name: Name,
    details: Details,
}

impl<'a> Begun<'a> {
    /// Writes the record of what is about to be done.
    pub async fn write(store: &'a Store, clock: &Clock, deed: Deed) -> Result<Self, NotRecorded> {
        let Deed { actor, action, target, details, request_id } = deed;
        let at = clock.now();
        let name = Name { collection: Collection::Audit, id: id_at(at) };
        let mut fields = Fields::from_iter([
            ("at".to_owned(), format!("{at:.3}").into()),
            ("actor".to_owned(), cut(&actor.shown()).into()),
            ("action".to_owned(), cut(&action).into()),
            ("target".to_owned(), cut(&target).into()),
            ("details".to_owned(), details.fields.clone().into()),
            ("outcome".to_owned(), "begun".into()),
        ]);
        if let Some(id) = request_id {
            fields.insert("requestId".to_owned(), cut(&id).into());
        }
        let write = Write::over(name.clone(), None, fields);
        store.write(write, STORE_TIMEOUT).await.map_err(NotRecorded)?;
        Ok(Self { store, name, details })
    }

    /// Notes how it ended, and what is known since. The act is done: if this cannot be written, it is said in the log.
    pub async fn complete(self, outcome: Outcome, more: Details) {
        let Self { store, name, mut details } = self;
        let mut fields = Fields::from_iter([("outcome".to_owned(), outcome.shown().into())]);
        if !more.fields.is_empty() {
            details.fields.extend(more.fields);
            fields.insert("details".to_owned(), details.fields.into());
        }
        let deadline = Instant::now() + COMPLETION_TIMEOUT;
        let mut backoff = Backoff::new(FIRST_RETRY, LONGEST_RETRY);
        loop {
            let left = deadline.saturating_duration_since(Instant::now()).min(STORE_TIMEOUT);
            let Err(refusal) = store.write(Write::set(name.clone(), fields.clone()), left).await else {
                return;
            };
            let wait = backoff.next_wait();
            if !is_transient(&refusal) || Instant::now() + wait >= deadline {
                let (error_code, error) = (ErrorCode::AuditIncomplete, with_causes(&refusal));
                let outcome = outcome.shown();
                tracing::error!(%error_code, error, record = %name, outcome, "an audit record cannot be completed");
                return;
            }
            sleep(wait).await;
        }
    }
}

fn is_transient(refusal: &WriteRefusal) -> bool {
    match refusal {
        WriteRefusal::Conflict => true,
        WriteRefusal::Failed(error) => error.is_transient(),
    }
}

/// The later, the smaller: a store lists ids in ascending order, and the newest record is to be the first.
fn id_at(at: Timestamp) -> Arc<str> {
    let left = 9_999_999_999_999 - at.as_millisecond().clamp(0, 9_999_999_999_999);
    format!("{left:013}-{}", Uuid::new_v4().simple()).into()
}

/// Whether a record may have this id.
pub fn is_id(text: &str) -> bool {
    text.len() == 13 + 1 + 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-')
}

/// Records, newest first.
#[derive(Debug, PartialEq)]
pub struct Page {
    /// As they are stored, each with its `id`.
    pub records: Vec<Value>,
    /// Where the next page begins, if there may be one.
    pub next: Option<Arc<str>>,
}

/// At most `limit` records ([`MOST_RECORDS`] at most) that are older than the one of the id `after`.
pub async fn list(store: &Store, after: Option<Arc<str>>, limit: usize) -> Result<Page, StoreError> {
    let limit = limit.min(MOST_RECORDS);
    let found = store.list(Collection::Audit, after, limit, STORE_TIMEOUT).await?;
    let next = found.last().filter(|_| found.len() == limit).map(|(name, _)| Arc::clone(&name.id));
    let records = found.into_iter().map(|(name, document)| {
        let mut record = json!({ "id": *name.id });
        if let Some(record) = record.as_object_mut() {
            record.extend(document.fields);
        }
        record
    });
    Ok(Page { records: records.collect(), next })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use futures_util::FutureExt as _;
    use futures_util::future::BoxFuture;
    use prometheus::Registry;

    use super::*;
    use crate::store::embedded::EmbeddedStore;
    use crate::store::measured::StoreMetrics;
    use crate::store::{Changes, Document, DocumentStore, Edits, Version};

    #[derive(Debug, Error)]
    #[error("it is not there")]
    struct Missing;

    impl Coded for Missing {
        fn code(&self) -> ErrorCode {
            ErrorCode::NotFound
        }
    }

    /// A store that is away after so many writes.
    struct Failing {
        stored: EmbeddedStore,
        writes_left: AtomicUsize,
    }

    impl DocumentStore for Failing {
        fn get_many<'a>(
            &'a self,
            names: &'a [Name],
        ) -> BoxFuture<'a, Result<Vec<Option<Document>>, StoreError>> {
            self.stored.get_many(names)
        }

        fn write_many(
            &self,
            writes: Vec<Write>,
        ) -> BoxFuture<'_, Result<Vec<Result<Version, WriteRefusal>>, StoreError>> {
            let left =
                self.writes_left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
            match left {
                Ok(_) => self.stored.write_many(writes),
                Err(_) => async { Err(StoreError::Away("on purpose".to_owned())) }.boxed(),
            }
        }

        fn list(
            &self,
            collection: Collection,
            after: Option<Arc<str>>,
            limit: usize,
        ) -> BoxFuture<'_, Result<Vec<(Name, Document)>, StoreError>> {
            self.stored.list(collection, after, limit)
        }

        fn edits(&self, since: Timestamp) -> BoxFuture<'_, Result<Edits, StoreError>> {
            self.stored.edits(since)
        }

        fn follow(&self, collection: Collection) -> BoxFuture<'_, Result<Changes, StoreError>> {
            self.stored.follow(collection)
        }
    }

    fn store(writes: usize) -> (Store, tempfile::TempDir) {
        let folder = tempfile::tempdir().unwrap();
        let stored = EmbeddedStore::open(folder.path()).unwrap();
        let failing = Failing { stored, writes_left: AtomicUsize::new(writes) };
        let metrics = Arc::new(StoreMetrics::new(&Registry::new()).unwrap());
        (Store::new(Arc::new(failing), metrics), folder)
    }

    fn clock() -> Clock {
        Clock::by_hand("2026-11-20T05:51:20.612Z".parse().unwrap())
    }

    fn deed(action: &str) -> Deed {
        Deed {
            actor: Actor::Command("somebody".to_owned()),
            action: action.to_owned(),
            target: "users/twitch:1".to_owned(),
            details: Details::new().shown("key", "twitch:1").redacted("notes", "likes cats"),
            request_id: None,
        }
    }

    async fn outcomes(store: &Store) -> Vec<String> {
        let page = list(store, None, 100).await.unwrap();
        page.records.iter().map(|record| format!("{} {}", record["action"], record["outcome"])).collect()
    }

    #[tokio::test]
    async fn an_act_is_recorded_before_it_is_done_and_completed_behind_it() {
        let (store, _folder) = store(usize::MAX);
        let clock = clock();
        let during =
            audited(&store, &clock, deed("first"), async { Ok::<_, Missing>(outcomes(&store).await) });
        assert_eq!(during.await.unwrap(), ["\"first\" \"begun\""]);
        clock.step(1);
        let missing = audited(&store, &clock, deed("second"), async { Err::<(), _>(Missing) }).await;
        assert!(matches!(missing, Err(Audited::Failed(Missing))));
        let page = list(&store, None, 100).await.unwrap();
        assert_eq!(outcomes(&store).await, ["\"second\" \"not_found\"", "\"first\" \"done\""]);
        assert_eq!(page.next, None);
        let mut first = page.records[1].clone();
        assert!(is_id(first["id"].take().as_str().unwrap()));
        assert_eq!(
            first,
            json!({
                "id": null, "at": "2026-11-20T05:51:20.612Z", "actor": "cli:somebody", "action": "first",
                "target": "users/twitch:1", "outcome": "done",
                "details": { "key": "twitch:1", "notes": "[redacted], 10 bytes" },
            })
        );
    }

    #[tokio::test]
    async fn what_cannot_be_recorded_is_not_done() {
        let (store, _folder) = store(0);
        let clock = clock();
        let refused = audited(&store, &clock, deed("act"), async {
            panic!("done without a record");
            #[expect(unreachable_code, reason = "a type for what is never made")]
            Ok::<(), Missing>(())
        });
        let refused = refused.await.unwrap_err();
        assert_eq!(refused.code(), ErrorCode::AuditUnavailable);
        assert_eq!(
            with_causes(&refused),
            "the audit record cannot be written, so nothing was done: the store is away: on purpose"
        );
        assert!(outcomes(&store).await.is_empty());
    }

    #[tokio::test]
    async fn an_act_whose_record_cannot_be_completed_is_done_all_the_same() {
        let (store, _folder) = store(1);
        let record = Begun::write(&store, &clock(), deed("act")).await.unwrap();
        // Not before: time that stands still runs on while a thread is waited for.
        tokio::time::pause();
        let begun = Instant::now();
        record.complete(Outcome::Done, Details::new()).await;
        assert!(begun.elapsed() > Duration::from_secs(2) && begun.elapsed() <= COMPLETION_TIMEOUT);
        tokio::time::resume();
        assert_eq!(outcomes(&store).await, ["\"act\" \"begun\""]);
    }

    #[tokio::test]
    async fn pages_go_from_the_newest_to_the_oldest() {
        let (store, _folder) = store(usize::MAX);
        let clock = clock();
        for number in 0..5 {
            clock.step(if number == 3 { 86_400_000 } else { 1 });
            audited(&store, &clock, deed(&number.to_string()), async { Ok::<_, Missing>(()) }).await.unwrap();
        }
        let (mut seen, mut after) = (Vec::new(), None);
        loop {
            let page = list(&store, after, 2).await.unwrap();
            seen.extend(page.records.iter().map(|record| record["action"].clone()));
            let Some(next) = page.next else { break };
            after = Some(next);
        }
        assert_eq!(seen, ["4", "3", "2", "1", "0"]);
    }

    #[test]
    fn of_a_request_names_are_kept_and_of_the_rest_the_length() {
        let Value::Object(fields) = json!({
            "login": "some_login", "ids": ["1", "2"], "notes": "a personal note", "email": "a@b.example",
            "token": "hunter2", "tags": ["secret-ish"], "key": { "token": "hunter2" }, "a.b/c\n": 1, "nothing": null,
            "user": format!("{}\u{1b}[2J", "x".repeat(300)),
        }) else {
            unreachable!()
        };
        let details = Details::new().of_request(&fields);
        let text = json!(details.fields).to_string();
        for secret in ["personal", "a@b", "hunter2", "secret-ish", "\\u001b"] {
            assert!(!text.contains(secret), "{secret} in {text}");
        }
        assert_eq!(details.fields["login"], "some_login");
        assert_eq!(details.fields["ids"], json!(["1", "2"]));
        assert_eq!(details.fields["notes"], "[redacted], 15 bytes");
        assert_eq!(details.fields["a_b_c_"], "[redacted], 1 bytes");
        assert_eq!(details.fields["user"], "x".repeat(256));
        let many = (0..1_000).map(|number| (format!("field{number}"), Value::from("x"))).collect();
        let details = Details::new().of_request(&many);
        assert_eq!(details.fields["truncated"], true);
        assert!(json!(details.fields).to_string().len() < LONGEST_DETAILS + 4_096);
    }

    #[test]
    fn a_command_is_its_users() {
        let users = "root:x:0:0:root:/root:/bin/bash\nsomebody:x:1000:1000::/home/somebody:/bin/sh\n";
        assert_eq!(user_name(users, 0), "root");
        assert_eq!(user_name(users, 1000), "somebody");
        assert_eq!(user_name(users, 7), "uid 7");
        assert!(Actor::of_this_process().shown().starts_with("cli:"));
    }
}
