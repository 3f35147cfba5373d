//! A normalised event on its way to becoming an envelope. What a source makes, and all that it makes.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use jiff::Timestamp;
use serde::{Deserialize, Serialize, Serializer};
use uuid::Uuid;

use super::deadletter::DeadLetterReason;
use super::milliseconds;
use super::receipt::Slip;
use crate::label;

label! {
    /// The source that took an event in.
    pub enum Origin {
        /// A live Twitch connection.
        Twitch => "twitch",
        /// Captured lines fed in by hand.
        Replay => "replay",
        /// What a history service knew of a time that was missed.
        Backfill => "backfill",
        /// The source's own word on what it missed.
        Gap => "gap",
    }
}

/// The type of an envelope.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum EventType {
    /// Somebody said something.
    #[serde(rename = "external.chat.message.v1")]
    ChatMessage,
    /// The platform announced something: a subscription, a raid, ….
    #[serde(rename = "external.chat.notice.v1")]
    ChatNotice,
    /// A moderator acted.
    #[serde(rename = "external.chat.moderation.v1")]
    ChatModeration,
    /// A source was interrupted.
    #[serde(rename = "internal.source.gap.v1")]
    SourceGap,
    /// Somebody is not to be known any more.
    #[serde(rename = "internal.user.forgotten.v1")]
    UserForgotten,
}

impl EventType {
    /// The type as it stands in the envelope and in the header `type`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::ChatMessage => "external.chat.message.v1",
            Self::ChatNotice => "external.chat.notice.v1",
            Self::ChatModeration => "external.chat.moderation.v1",
            Self::SourceGap => "internal.source.gap.v1",
            Self::UserForgotten => "internal.user.forgotten.v1",
        }
    }
}

/// One thing that a source received: an event, or something that cannot be made one.
#[derive(Debug)]
pub struct Draft {
    /// Which source took it in.
    pub origin: Origin,
    /// The event's id: derived from its idempotency key, so the same event has the same id everywhere.
    pub id: Uuid,
    /// When it was taken in.
    pub taken_in_at: Timestamp,
    /// The same moment on the monotonic clock, for measuring.
    pub taken_in: Instant,
    /// No copy of it can be in the stream from before this time; where a look back starts.
    pub not_published_before: Timestamp,
    /// What it holds.
    pub content: Content,
    /// Tells whoever waits for it what became of the event.
    pub slip: Option<Slip>,
}

impl Draft {
    /// Key of the document of the user whose event it is, and when it happened.
    pub fn said_by(&self) -> Option<(&Arc<str>, Timestamp)> {
        match &self.content {
            Content::Event(event) => event.user.as_ref().map(|user| (&user.key, event.occurred_at)),
            Content::Unusable { .. } => None,
        }
    }

    /// Key of the document of the user whose event it is.
    pub fn user_key(&self) -> Option<&Arc<str>> {
        match &self.content {
            Content::Event(event) => event.user.as_ref().map(|user| &user.key),
            Content::Unusable { .. } => None,
        }
    }
}

/// What a draft holds.
#[derive(Debug)]
pub enum Content {
    /// A normalised event.
    Event(Box<Event>),
    /// Bytes that cannot be normalised, bound for the dead letters.
    Unusable {
        /// Why.
        reason: DeadLetterReason,
        /// The same for a person.
        message: String,
        /// The bytes as received.
        original: Bytes,
    },
}

/// A normalised event.
#[derive(Debug)]
pub struct Event {
    /// Its type.
    pub kind: EventType,
    /// When the platform says it happened; when it was taken in, if the platform does not say.
    pub occurred_at: Timestamp,
    /// What makes two copies of it the same event.
    pub idempotency_key: String,
    /// Where it happened.
    pub source: SourceRef,
    /// Who it is of, if the platform says.
    pub user: Option<User>,
    /// What happened: JSON already, written from the line while it was at hand. What enrichment adds stands beside
    /// it, so nothing of it has to be kept apart.
    pub payload: PayloadJson,
}

/// Where an event happened.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct SourceRef {
    /// The platform's name, lower case.
    pub platform: &'static str,
    /// The channel's login, lower case, without `#`.
    pub channel: String,
    /// The channel's stable id.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub channel_id: Option<String>,
}

/// The user of an event, as far as the event itself tells.
#[derive(Debug, Clone)]
pub struct User {
    /// Key of the user's document, as by [`user_key`](super::id::user_key).
    pub key: Arc<str>,
    /// The platform's own id.
    pub id: String,
    /// The login.
    pub name: String,
    /// The name as the user writes it.
    pub display_name: String,
    /// Empty where the platform does not send it with its events.
    pub profile_image_url: String,
    /// The highest of `roles`.
    pub role: Role,
    /// All roles, highest first.
    pub roles: Vec<Role>,
    /// Labels, sorted and unique.
    pub tags: Vec<String>,
}

/// What a user is in the channel; highest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// The channel is theirs.
    Broadcaster,
    /// May delete and ban.
    Moderator,
    /// Marked by the broadcaster.
    Vip,
    /// Pays.
    Subscriber,
    /// Everybody else.
    Viewer,
}

/// A payload as it is published.
#[derive(Debug)]
pub struct PayloadJson(Vec<u8>);

impl PayloadJson {
    /// Writes a payload. `about` is how long it will be, more or less: growing costs more than writing.
    pub fn write(payload: &impl Serialize, about: usize) -> Result<Self, serde_json::Error> {
        let mut json = Vec::with_capacity(about);
        serde_json::to_writer(&mut json, payload)?;
        Ok(Self(json))
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

/// Payload of `external.chat.message.v1`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct MessagePayload<'a> {
    /// The text, without the wrapping of `/me`.
    pub text: &'a str,
    /// What it shares with notices.
    #[serde(flatten)]
    pub said: Said<'a>,
}

/// Payload of `external.chat.notice.v1`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct NoticePayload<'a> {
    /// The platform's kind, as it came.
    pub kind: &'a str,
    /// The platform's text.
    pub system_text: &'a str,
    /// The user's text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<&'a str>,
    /// The platform's parameters, named without their prefix.
    pub params: Pairs<'a>,
    /// What it shares with chat messages.
    #[serde(flatten)]
    pub said: Said<'a>,
}

/// What chat messages and notices have in common.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
#[expect(clippy::struct_excessive_bools, reason = "the contract's form")]
pub struct Said<'a> {
    /// The platform's id of the line.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message_id: Option<&'a str>,
    /// Whether it was said with `/me`.
    pub is_action: bool,
    /// `name/version`, as they came.
    pub badges: &'a [&'a str],
    /// Holds the role.
    pub is_mod: bool,
    /// Holds the role.
    pub is_subscriber: bool,
    /// Holds the role.
    pub is_vip: bool,
    /// Holds the role.
    pub is_broadcaster: bool,
    /// `#RRGGBB`, or empty.
    pub color: &'a str,
    /// Bits cheered.
    pub bits: u64,
    /// Emotes in the text, by position.
    pub emotes: Vec<Emote<'a>>,
    /// What it replies to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reply: Option<Reply<'a>>,
    /// Where a shared chat's copy comes from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shared_chat: Option<SharedChat<'a>>,
    /// The line's tags.
    pub raw: Raw<'a>,
}

/// Payload of `external.chat.moderation.v1`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ModerationPayload<'a> {
    /// What was done.
    pub action: ModerationAction,
    /// To whom.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_user_id: Option<&'a str>,
    /// To whom.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_login: Option<&'a str>,
    /// For how long.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub duration_seconds: Option<u64>,
    /// To which message.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_message_id: Option<&'a str>,
    /// The line's tags.
    pub raw: Raw<'a>,
}

/// What a moderator did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ModerationAction {
    /// Shut a user out for good.
    Ban,
    /// Shut a user out for a while.
    Timeout,
    /// Cleared the room.
    Clear,
    /// Deleted one message.
    Delete,
}

/// Payload of `internal.source.gap.v1`: what was said there and then may be missing.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct GapPayload<'a> {
    /// The channel's login.
    pub channel: &'a str,
    /// When the last line was read.
    #[serde(serialize_with = "milliseconds")]
    pub from: Timestamp,
    /// When the channel was joined again.
    #[serde(serialize_with = "milliseconds")]
    pub to: Timestamp,
    /// Why.
    pub cause: GapCause,
    /// What a history service gave back of it; left out where none is asked, or none answered for the whole of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub healed: Option<Healed>,
}

/// Why a source was interrupted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GapCause {
    /// The service was not running.
    Restart,
    /// The connection was closed or failed.
    ConnectionLost,
    /// The connection stood, and nothing came any more.
    Silence,
    /// The platform closed the connection, as it had announced, before the channel was joined on the next one.
    ReconnectTooLate,
    /// The platform put us out of the channel.
    Removed,
    /// The channel has another name since, which was not known at once.
    Renamed,
}

/// What a history service gave back of a gap.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Healed {
    /// Events that are in the stream because of it; what was known already is not counted.
    pub messages: u64,
    /// The oldest line it gave: one from before the gap says that its memory reaches back far enough.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "maybe_milliseconds")]
    pub from: Option<Timestamp>,
    /// The newest line it gave.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "maybe_milliseconds")]
    pub to: Option<Timestamp>,
}

#[expect(clippy::ref_option, reason = "serde hands over a reference to the field")]
fn maybe_milliseconds<S: Serializer>(time: &Option<Timestamp>, serializer: S) -> Result<S::Ok, S::Error> {
    match time {
        Some(time) => milliseconds(time, serializer),
        None => serializer.serialize_none(),
    }
}

/// An emote at its place in the text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Emote<'a> {
    /// The platform's id.
    pub id: &'a str,
    /// The text it stands for.
    pub name: &'a str,
    /// First code point.
    pub start: usize,
    /// First code point after it.
    pub end: usize,
}

/// What a message replies to.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Reply<'a> {
    /// The message replied to.
    pub parent_message_id: &'a str,
    /// Its author.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parent_user_id: Option<&'a str>,
    /// Its author.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parent_user_login: Option<&'a str>,
    /// The message that began the thread.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub thread_message_id: Option<&'a str>,
}

/// Where a shared chat's copy comes from.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct SharedChat<'a> {
    /// The room it was said in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source_room_id: Option<&'a str>,
    /// Its id there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source_message_id: Option<&'a str>,
    /// A notice's kind there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source_kind: Option<&'a str>,
}

/// The line's tags, as they came.
#[derive(Debug, Serialize)]
pub struct Raw<'a> {
    /// Unescaped, sorted by key.
    pub tags: Pairs<'a>,
    /// Set when not all of them fit.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub truncated: bool,
}

/// Keys and values in their order, written as a JSON object.
#[derive(Debug)]
pub struct Pairs<'a>(pub &'a [(&'a str, Cow<'a, str>)]);

impl Serialize for Pairs<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(key, value)| (key, value)))
    }
}
