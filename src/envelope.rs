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

use draft::{PayloadJson, SourceRef, User};

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
    user: Option<&'a User>,
    auth: Auth<'a>,
    routing_slip: [(); 0],
    finalization_destination: &'static str,
    /// JSON already; stands last.
    #[serde(skip)]
    payload: &'a PayloadJson,
}

/// What enrichment found out about the user.
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
    user_ref: Option<String>,
    #[serde(serialize_with = "milliseconds")]
    at: Timestamp,
}

/// Why an event's user was not looked up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum UnmatchedReason {
    /// Enrichment is off.
    Disabled,
}

impl<'a> EnvelopeV1<'a> {
    /// The envelope of an event whose user was not looked up, as of `at`.
    pub fn unmatched(draft: &'a Draft, event: &'a Event, reason: UnmatchedReason, at: Timestamp) -> Self {
        let provider = event.source.platform;
        let auth = Auth {
            v: "1",
            method: "enrichment",
            provider,
            matched: false,
            reason: Some(reason),
            user_ref: event.user.as_ref().map(|user| id::user_ref(provider, &user.id)),
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
            user: event.user.as_ref(),
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
