//! What goes in and comes out: drafts, envelopes, ids, subjects, dead letters. Pure: no I/O, no clock.
//!
//! A [`Draft`] is a normalised event. [`EnvelopeV1`] is how it is written: borrowed from the draft and
//! serialised once.

pub mod deadletter;
pub mod draft;
pub mod id;
pub mod receipt;
pub mod subject;

use jiff::Timestamp;
use serde::{Serialize, Serializer};
use uuid::Uuid;

pub use deadletter::{DeadLetter, DeadLetterReason};
pub use draft::{Draft, Event, EventType, Origin};
pub use id::MessageId;
pub use receipt::{Outcome, Receipt, Slip};
pub use subject::SubjectTemplate;

use draft::{PayloadJson, Role, SourceRef, User};

/// What stands around a payload, in bytes, more or less.
const USUAL_SIZE_WITHOUT_PAYLOAD: usize = 1024;

/// Where an envelope is to end when its routing slip is empty.
const FINALIZATION_DESTINATION: &str = "internal.finalizer.v1";

/// Version 1 of the envelope, as the contract has it (§2).
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct EnvelopeV1<'a> {
    v: &'static str,
    id: Uuid,
    #[serde(rename = "type")]
    kind: EventType,
    #[serde(serialize_with = "milliseconds")]
    timestamp: Timestamp,
    #[serde(serialize_with = "milliseconds")]
    occurred_at: Timestamp,
    correlation_id: Uuid,
    trace_id: uuid::fmt::Simple,
    idempotency_key: &'a str,
    source: &'a SourceRef,
    #[serde(skip_serializing_if = "Option::is_none")]
    user: Option<WrittenUser<'a>>,
    auth: Auth<'a>,
    routing_slip: [(); 0],
    finalization_destination: &'static str,
    /// JSON already; stands last.
    #[serde(skip)]
    payload: &'a PayloadJson,
}

/// What enrichment found out about an event's user.
#[derive(Debug, Clone, Default)]
pub struct Enrichment<'a> {
    /// Tags that hold for this event alone.
    pub transient_tags: Vec<&'static str>,
    /// Labels that operators gave the user.
    pub labels: &'a [String],
    /// Operators' notes.
    pub notes: Option<&'a str>,
    /// Operators' word on how the user stands.
    pub status: Option<&'a str>,
    /// The session.
    pub session_id: Option<&'a str>,
}

/// The user as published.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct WrittenUser<'a> {
    id: &'a str,
    name: &'a str,
    display_name: &'a str,
    profile_image_url: &'a str,
    role: Role,
    roles: &'a [Role],
    tags: Vec<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    notes: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    session_id: Option<&'a str>,
}

impl<'a> WrittenUser<'a> {
    fn new(user: &'a User, enrichment: Enrichment<'a>) -> Self {
        let Enrichment { transient_tags, labels, notes, status, session_id } = enrichment;
        let mut tags: Vec<&str> = user.tags.iter().map(String::as_str).collect();
        tags.extend(transient_tags);
        tags.extend(labels.iter().map(String::as_str));
        tags.sort_unstable();
        tags.dedup();
        Self {
            id: &user.id,
            name: &user.name,
            display_name: &user.display_name,
            profile_image_url: &user.profile_image_url,
            role: user.role,
            roles: &user.roles,
            tags,
            notes,
            status,
            session_id,
        }
    }
}

/// How enrichment went.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Auth<'a> {
    v: &'static str,
    method: &'static str,
    provider: &'a str,
    matched: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<UnmatchedReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    user_ref: Option<id::UserRef<'a>>,
    #[serde(serialize_with = "milliseconds")]
    at: Timestamp,
}

/// Why an event did not meet its user.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum UnmatchedReason {
    /// Enrichment is off.
    Disabled,
    /// Enrichment is on paper alone.
    DryRun,
    /// The event names no user.
    NoUser,
    /// The store did not say in time, or could not be written.
    StoreUnavailable,
}

impl<'a> EnvelopeV1<'a> {
    /// The envelope of an event, with what is known of its user or why nothing is, as of `at`.
    pub fn new(
        draft: &'a Draft,
        event: &'a Event,
        enriched: Result<Enrichment<'a>, UnmatchedReason>,
        at: Timestamp,
    ) -> Self {
        let provider = event.source.platform;
        let (enrichment, reason) = match enriched {
            Ok(enrichment) => (enrichment, None),
            Err(reason) => (Enrichment::default(), Some(reason)),
        };
        let auth = Auth {
            v: "1",
            method: "enrichment",
            provider,
            matched: reason.is_none(),
            reason,
            user_ref: event.user.as_ref().map(|user| id::UserRef(&user.key)),
            at,
        };
        Self {
            v: "1",
            id: draft.id,
            kind: event.kind,
            timestamp: draft.taken_in_at,
            occurred_at: event.occurred_at,
            correlation_id: draft.id,
            trace_id: draft.id.simple(),
            idempotency_key: &event.idempotency_key,
            source: &event.source,
            user: event.user.as_ref().map(|user| WrittenUser::new(user, enrichment)),
            auth,
            routing_slip: [],
            finalization_destination: FINALIZATION_DESTINATION,
            payload: &event.payload,
        }
    }

    /// The envelope as it is published.
    pub fn to_json(&self) -> Result<Vec<u8>, serde_json::Error> {
        const PAYLOAD: &[u8] = b",\"payload\":";
        let payload = self.payload.as_bytes();
        let mut json = Vec::with_capacity(USUAL_SIZE_WITHOUT_PAYLOAD + payload.len());
        serde_json::to_writer(&mut json, self)?;
        // Behind the last field, in front of the closing brace.
        json.pop();
        for part in [PAYLOAD, payload, b"}"] {
            json.extend_from_slice(part);
        }
        Ok(json)
    }
}

/// RFC 3339, UTC, milliseconds: the one form of time on the wire.
pub(crate) fn milliseconds<S: Serializer>(time: &Timestamp, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&format_args!("{time:.3}"))
}
