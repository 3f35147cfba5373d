//! A user's document: its fields by name, read one by one. A value of the wrong shape is treated as absent and
//! reported; it never spoils the rest, and nothing that is not Inlet's is ever written.

use std::num::NonZeroI64;
use std::sync::Arc;

use jiff::Timestamp;
use serde_json::{Value, json};
use uuid::Uuid;

use super::Fields;
use crate::envelope::draft::Role;

/// Longest note shown, in bytes.
pub const LONGEST_NOTES: usize = 4 * 1024;
/// Longest word on how a user stands, in bytes.
pub const LONGEST_STATUS: usize = 1024;
/// All labels together, in bytes; those beyond are not shown. So whatever stands in a document, an envelope grows by
/// no more than 16 KiB (every letter may take two).
pub const LONGEST_TAGS: usize = 2 * 1024;
/// What each label counts beyond its letters, in bytes.
pub const TAG_OVERHEAD: usize = 4;

/// When an operator last edited the document, by the operator's word.
pub const EDITED_AT: &str = "operatorUpdatedAt";

/// Fields that hold a time.
const TIMES: [&str; 9] = [
    "firstSeenAt",
    "lastSeenAt",
    "lastMessageAt",
    "lastSessionStartedAt",
    "lastSessionActivityAt",
    EDITED_AT,
    "at",
    "addedAt",
    "removedAt",
];

/// Whether the field of this name holds a time.
pub fn is_time(field: &str) -> bool {
    TIMES.contains(&field)
}

/// The fields of a document whose bytes are damaged: one that nobody can read, so that whoever reads it finds and
/// counts a bad value.
pub fn damaged() -> Fields {
    Fields::from_iter([("applied".to_owned(), json!({ "unsupported": "damaged" }))])
}

/// A user as the store has it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct User {
    /// What is folded from the user's events and written through before tags hang on it.
    pub history: History,
    /// Messages counted. Only what [`User::applied`] covers.
    pub message_count: u64,
    /// Per stream (`<name>@<created>`), the position up to which every event of the user is counted.
    pub applied: Vec<(Arc<str>, u64)>,
    /// What operators say of the user.
    pub operator: Option<Arc<Operator>>,
}

/// What was when. Folding an event into it twice is the same as once.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct History {
    /// The event that created the document; none in one that an operator made.
    pub first_event_id: Option<Uuid>,
    /// When the user was first seen.
    pub first_seen_at: Option<Moment>,
    /// The latest event.
    pub last_seen_at: Option<Moment>,
    /// The latest message.
    pub last_message_at: Option<Moment>,
    /// Sessions so far.
    pub session_count: u64,
    /// The latest session's id.
    pub session_id: Option<Arc<str>>,
    /// When it was opened.
    pub session_started_at: Option<Moment>,
    /// Its latest message.
    pub session_activity_at: Option<Moment>,
}

/// A time in whole milliseconds, the precision of every time here, in half the room: users in memory are many. The very
/// first millisecond of 1970 is taken for the second.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment(NonZeroI64);

impl From<Timestamp> for Moment {
    fn from(time: Timestamp) -> Self {
        let milliseconds = time.as_millisecond();
        Self(NonZeroI64::new(if milliseconds == 0 { 1 } else { milliseconds }).unwrap_or(NonZeroI64::MAX))
    }
}

impl Moment {
    /// Unix milliseconds.
    pub fn as_millisecond(self) -> i64 {
        self.0.get()
    }
}

/// An operator's fields, as far as Inlet reads them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Operator {
    /// Notes, without control characters, cut at 4 KiB.
    pub notes: Option<String>,
    /// Persistent labels, sorted and unique.
    pub tags: Vec<String>,
    /// A word on how the user stands.
    pub status: Option<String>,
}

impl Operator {
    /// An upper bound of what it adds to an envelope, in bytes.
    pub fn size(&self) -> usize {
        let texts = [&self.notes, &self.status].into_iter().flatten().chain(&self.tags);
        texts.map(|text| text.len() * 2 + 16).sum()
    }
}

/// What a platform says of a user, as written to the document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Profile {
    /// The login.
    pub login: Box<str>,
    /// The name as the user writes it.
    pub display_name: Box<str>,
    /// Roles, highest first.
    pub roles: Box<[Role]>,
}

/// A user read from its fields, and the names of those that could not be read.
pub fn read_user(fields: &Fields) -> (User, Vec<&'static str>) {
    let mut reader = Reader { fields, bad: Vec::new() };
    let history = History {
        first_event_id: reader.read("firstEventId", |value| value.as_str()?.parse().ok()),
        first_seen_at: reader.read("firstSeenAt", time),
        last_seen_at: reader.read("lastSeenAt", time),
        last_message_at: reader.read("lastMessageAt", time),
        session_count: reader.read("sessionCount", Value::as_u64).unwrap_or_default(),
        session_id: reader.read("lastSessionId", |value| value.as_str().map(Arc::from)),
        session_started_at: reader.read("lastSessionStartedAt", time),
        session_activity_at: reader.read("lastSessionActivityAt", time),
    };
    let message_count = reader.read("messageCountAllTime", Value::as_u64).unwrap_or_default();
    let applied = reader.positions();
    let operator = Operator {
        notes: reader
            .read("notes", |value| value.as_str().map(shown_notes))
            .filter(|notes| !notes.is_empty()),
        tags: reader.read("tags", labels).unwrap_or_default(),
        status: reader.read("status", text),
    };
    let operator = (operator != Operator::default()).then(|| Arc::new(operator));
    (User { history, message_count, applied, operator }, reader.bad)
}

/// When an operator last said to have changed the document, to the precision it is stored with.
pub fn read_edited_at(fields: &Fields) -> Option<Timestamp> {
    fields.get(EDITED_AT)?.as_str()?.parse().ok()
}

struct Reader<'a> {
    fields: &'a Fields,
    bad: Vec<&'static str>,
}

impl<'a> Reader<'a> {
    fn read<T>(&mut self, name: &'static str, read: impl FnOnce(&'a Value) -> Option<T>) -> Option<T> {
        let value = self.fields.get(name).filter(|value| !value.is_null())?;
        let read = read(value);
        if read.is_none() {
            self.bad.push(name);
        }
        read
    }

    /// `applied`, entry by entry: one of the wrong shape spoils itself alone.
    fn positions(&mut self) -> Vec<(Arc<str>, u64)> {
        let entries = self.read("applied", Value::as_object);
        let mut positions = Vec::with_capacity(entries.map_or(0, Fields::len));
        for (stream, position) in entries.into_iter().flatten() {
            match position.as_u64() {
                Some(position) => positions.push((Arc::from(stream.as_str()), position)),
                None => self.bad.push("applied"),
            }
        }
        positions
    }
}

fn time(value: &Value) -> Option<Moment> {
    value.as_str()?.parse::<Timestamp>().ok().map(Moment::from)
}

fn text(value: &Value) -> Option<String> {
    value.as_str().map(without_controls).filter(|text| text.len() <= LONGEST_STATUS)
}

fn labels(value: &Value) -> Option<Vec<String>> {
    let labels = value.as_array()?.iter().map(|label| label.as_str().map(without_controls));
    let mut labels = labels.collect::<Option<Vec<_>>>()?;
    labels.sort_unstable();
    labels.dedup();
    let mut bytes = 0;
    labels.retain(|label| {
        bytes += label.len() + TAG_OVERHEAD;
        bytes <= LONGEST_TAGS
    });
    Some(labels)
}

fn without_controls(text: &str) -> String {
    text.chars().filter(|letter| !letter.is_control()).collect()
}

fn shown_notes(text: &str) -> String {
    let mut notes = without_controls(text);
    notes.truncate(notes.floor_char_boundary(LONGEST_NOTES));
    notes
}

/// The fields of a user's first sight or of an opening: history, never a count.
pub fn write_history(history: &History) -> Fields {
    let mut fields = Fields::new();
    let mut put = |name: &str, value: Option<Value>| {
        if let Some(value) = value {
            fields.insert(name.to_owned(), value);
        }
    };
    put("firstEventId", history.first_event_id.map(|id| json!(id)));
    put("firstSeenAt", history.first_seen_at.map(shown_moment));
    put("lastSeenAt", history.last_seen_at.map(shown_moment));
    put("lastMessageAt", history.last_message_at.map(shown_moment));
    put("lastSessionId", history.session_id.as_deref().map(Value::from));
    put("lastSessionStartedAt", history.session_started_at.map(shown_moment));
    put("lastSessionActivityAt", history.session_activity_at.map(shown_moment));
    put("sessionCount", Some(history.session_count.into()));
    fields
}

/// Adds what a flush alone writes.
pub fn write_counts(fields: &mut Fields, user: &User) {
    fields.insert("messageCountAllTime".to_owned(), user.message_count.into());
    let applied = user.applied.iter().map(|(stream, position)| (stream.to_string(), Value::from(*position)));
    fields.insert("applied".to_owned(), Value::Object(applied.collect()));
}

/// Adds who it is, and what the platform says of them if an event of theirs was seen here.
pub fn write_profile(fields: &mut Fields, provider: &str, id: &str, profile: Option<&Profile>) {
    fields.insert("provider".to_owned(), provider.into());
    fields.insert("providerUserId".to_owned(), id.into());
    if let Some(profile) = profile {
        fields.insert("displayName".to_owned(), (*profile.display_name).into());
        fields.insert("roles".to_owned(), json!(profile.roles));
        let platform = json!({ "id": id, "login": profile.login, "displayName": profile.display_name });
        fields.insert(format!("profiles.{provider}"), platform);
    }
}

fn shown_moment(moment: Moment) -> Value {
    Timestamp::from_millisecond(moment.as_millisecond()).map_or(Value::Null, shown_time)
}

/// RFC 3339, UTC, milliseconds.
pub fn shown_time(time: Timestamp) -> Value {
    Value::String(format!("{time:.3}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::fields;

    #[test]
    fn a_document_of_the_wrong_shape_is_read_field_by_field() {
        let (user, bad) = read_user(&fields(json!({
            "firstSeenAt": "2026-11-20T05:51:20.612Z", "lastSeenAt": 17, "sessionCount": -3,
            "lastSessionId": "sess_x", "messageCountAllTime": 12, "applied": { "R@1": "x", "S@1": 5, "T@1": -1 },
            "notes": "a\u{1b}[31mb", "tags": ["b", "a", "b"], "status": null, "lastMessageAt": "yesterday",
        })));
        assert_eq!(bad, ["lastSeenAt", "lastMessageAt", "sessionCount", "applied", "applied"]);
        assert_eq!(user.history.first_seen_at.unwrap().as_millisecond(), 1_795_153_880_612);
        assert_eq!((user.message_count, &user.applied[..]), (12, &[(Arc::from("S@1"), 5)][..]));
        let operator = user.operator.unwrap();
        assert_eq!((operator.notes.as_deref(), operator.status.clone()), (Some("a[31mb"), None));
        assert_eq!(operator.tags, ["a", "b"]);
    }

    #[test]
    fn what_is_written_is_read_back() {
        let at = Timestamp::from_millisecond(1_700_000_000_123).ok().map(Moment::from);
        let user = User {
            history: History {
                first_event_id: Some(Uuid::from_u128(7)),
                first_seen_at: at,
                last_seen_at: at,
                last_message_at: at,
                session_count: 2,
                session_id: Some("sess_1".into()),
                session_started_at: at,
                session_activity_at: at,
            },
            message_count: 9,
            applied: vec![("S@1".into(), 4), ("T@2".into(), 5)],
            operator: None,
        };
        let mut written = write_history(&user.history);
        write_counts(&mut written, &user);
        assert_eq!(read_user(&written), (user, vec![]));
    }

    #[test]
    fn long_notes_are_cut_between_letters() {
        let notes = shown_notes(&"é".repeat(3_000));
        assert_eq!(notes.len(), LONGEST_NOTES);
    }
}
