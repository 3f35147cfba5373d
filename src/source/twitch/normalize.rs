//! A line becomes a draft, a matter of the connection, or nothing. Tolerant of every absence: a capture lacks
//! tags, a server forgets a `#`, and neither may cost an event.

use std::borrow::Cow;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use bytes::Bytes;
use jiff::Timestamp;
use serde::Serialize;

use super::lines::Line;
use super::metrics::{BadLine, TwitchMetrics};
use super::text;
use super::wire::{self, Parsed};
use crate::envelope::draft::{
    Content, MessagePayload, ModerationAction, ModerationPayload, NoticePayload, Pairs, PayloadJson, Raw,
    Reply, Role, Said, SharedChat, SourceRef, User,
};
use crate::envelope::{DeadLetterReason, Draft, Event, EventType, Origin, id};
use crate::errors::ErrorCode;
use crate::telemetry::metrics::Label;

pub(super) const PLATFORM: &str = "twitch";

/// Most bytes of tags that `payload.raw` keeps.
const MOST_RAW_TAGS: usize = 8 * 1024;

/// Which copies of a message in a shared chat are events of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum SharedChatMode {
    /// All copies are one event; the first one seen wins.
    #[serde(rename = "source-only")]
    SourceOnly,
    /// Each room's copy is an event.
    #[serde(rename = "all")]
    All,
}

/// When a line was received.
#[derive(Debug, Clone, Copy)]
pub struct TakenIn {
    /// By the clock.
    pub at: Timestamp,
    /// For measuring.
    pub instant: Instant,
}

/// What a line is.
#[derive(Debug)]
pub enum Reading {
    /// Something for the door.
    Draft(Box<Draft>),
    /// A matter of the connection: any other command.
    Protocol(Protocol),
    /// Nothing.
    Empty,
}

/// A line that is about the connection.
#[derive(Debug)]
pub struct Protocol {
    /// Upper case.
    pub command: String,
    /// Its parameters.
    pub params: Vec<String>,
    /// Who it is from.
    pub nick: Option<String>,
    /// The tag `msg-id`.
    pub msg_id: Option<String>,
    /// The tag `room-id`.
    pub room: Option<u64>,
}

/// Reads lines.
pub struct Normalizer {
    origin: Origin,
    shared_chat: SharedChatMode,
    metrics: Arc<TwitchMetrics>,
    /// Kinds of bad lines that were logged: once each, or chat could fill the log.
    logged: AtomicU32,
}

impl Normalizer {
    /// A reader for one source.
    pub fn new(origin: Origin, shared_chat: SharedChatMode, metrics: Arc<TwitchMetrics>) -> Self {
        Self { origin, shared_chat, metrics, logged: AtomicU32::new(0) }
    }

    /// Reads a line.
    pub fn read(&self, line: Line, taken_in: TakenIn) -> Reading {
        let bytes = match line {
            Line::TooLong(start) => {
                self.note(BadLine::TooLong);
                let message = "a line of more than 64 KiB; this is its start".to_owned();
                return self.unusable(DeadLetterReason::LineTooLong, message, &start, taken_in);
            }
            Line::Whole(bytes) => bytes,
        };
        if bytes.iter().all(|byte| *byte == b' ') {
            self.note(BadLine::Empty);
            return Reading::Empty;
        }
        let (line, is_replaced) = wire::text(&bytes);
        if is_replaced {
            self.note(BadLine::InvalidUtf8);
        }
        let Some(parsed) = wire::parse(&line) else {
            self.note(BadLine::Unparsable);
            return self.unusable(
                DeadLetterReason::Unparsable,
                "no line of IRC".to_owned(),
                &bytes,
                taken_in,
            );
        };
        let is_dated = sent_at(&parsed).is_some();
        let event = match parsed.command.as_str() {
            "PRIVMSG" => self.message(&parsed, &line, taken_in.at),
            "USERNOTICE" => self.notice(&parsed, &line, taken_in.at),
            "CLEARCHAT" => self.clear_chat(&parsed, &line, taken_in.at),
            "CLEARMSG" => self.clear_message(&parsed, &line, taken_in.at),
            _ => return Reading::Protocol(protocol(parsed)),
        };
        match event {
            Ok(event) => self.draft(event, is_dated, taken_in),
            Err(missing) => {
                self.note(BadLine::NotNormalizable);
                self.unusable(DeadLetterReason::NotNormalizable, missing.to_owned(), &bytes, taken_in)
            }
        }
    }

    fn note(&self, kind: BadLine) {
        self.metrics.bad_lines.of(kind).inc();
        let bit = 1 << kind.index();
        if self.logged.fetch_or(bit, Ordering::Relaxed) & bit == 0 {
            tracing::warn!(error_code = %ErrorCode::BadLine, kind = %kind, source = %self.origin, "a bad line; more of this kind are only counted");
        }
    }

    fn draft(&self, event: Event, is_dated: bool, taken_in: TakenIn) -> Reading {
        let not_published_before = if is_dated { event.occurred_at } else { self.undated(taken_in.at) };
        Reading::Draft(Box::new(Draft {
            origin: self.origin,
            id: id::event_id(&event.idempotency_key),
            taken_in_at: taken_in.at,
            taken_in: taken_in.instant,
            not_published_before,
            content: Content::Event(Box::new(event)),
            slip: None,
        }))
    }

    /// From when on something without a time of its own may be in the stream: a live line is new, a captured
    /// one may be as old as the stream.
    fn undated(&self, taken_in_at: Timestamp) -> Timestamp {
        match self.origin {
            Origin::Twitch | Origin::Gap => taken_in_at,
            Origin::Replay | Origin::Backfill => Timestamp::UNIX_EPOCH,
        }
    }

    fn unusable(
        &self,
        reason: DeadLetterReason,
        message: String,
        bytes: &[u8],
        taken_in: TakenIn,
    ) -> Reading {
        Reading::Draft(Box::new(Draft {
            origin: self.origin,
            id: id::event_id(&id::content_key(PLATFORM, bytes)),
            taken_in_at: taken_in.at,
            taken_in: taken_in.instant,
            not_published_before: self.undated(taken_in.at),
            // A copy: a slice would keep the whole read buffer alive.
            content: Content::Unusable { reason, message, original: Bytes::copy_from_slice(bytes) },
            slip: None,
        }))
    }

    fn message(&self, parsed: &Parsed<'_>, line: &str, at: Timestamp) -> Result<Event, &'static str> {
        let [_, text] = &parsed.params[..] else {
            return Err("PRIVMSG without a channel or a text");
        };
        let (text, is_action) = text::unwrap_action(text);
        let author = Author::of(parsed, parsed.nick());
        let payload = MessagePayload { text, said: self.said(parsed, &author, text, is_action) };
        Ok(with_user(self.event(EventType::ChatMessage, parsed, line, at, &payload)?, &author))
    }

    fn notice(&self, parsed: &Parsed<'_>, line: &str, at: Timestamp) -> Result<Event, &'static str> {
        let text = parsed.params.get(1).map(|text| text::unwrap_action(text));
        let is_action = text.is_some_and(|(_, is_action)| is_action);
        let text = text.map(|(text, _)| text);
        let author = Author::of(parsed, parsed.tag("login"));
        let params: Vec<_> = (parsed.tags.all().iter())
            .filter_map(|(key, value)| Some((key.strip_prefix("msg-param-")?, Cow::Borrowed(&**value))))
            .collect();
        let payload = NoticePayload {
            kind: parsed.tag("msg-id").unwrap_or_default(),
            system_text: parsed.tag("system-msg").unwrap_or_default(),
            text,
            params: Pairs(&params),
            said: self.said(parsed, &author, text.unwrap_or_default(), is_action),
        };
        Ok(with_user(self.event(EventType::ChatNotice, parsed, line, at, &payload)?, &author))
    }

    /// What chat messages and notices share.
    fn said<'a>(
        &self,
        parsed: &'a Parsed<'_>,
        author: &'a Author<'a>,
        text: &'a str,
        is_action: bool,
    ) -> Said<'a> {
        let (emotes, dropped) = text::emotes(parsed.tag("emotes").unwrap_or_default(), text);
        self.metrics.emote_ranges_dropped.inc_by(dropped);
        let holds = |role| author.roles.contains(&role);
        Said {
            message_id: parsed.tag("id"),
            is_action,
            badges: &author.badges,
            is_mod: holds(Role::Moderator),
            is_subscriber: holds(Role::Subscriber),
            is_vip: holds(Role::Vip),
            is_broadcaster: holds(Role::Broadcaster),
            color: parsed.tag("color").unwrap_or_default(),
            bits: parsed.tag("bits").and_then(|bits| bits.parse().ok()).unwrap_or_default(),
            emotes,
            reply: reply(parsed),
            shared_chat: shared_chat(parsed),
            raw: raw(parsed),
        }
    }

    fn clear_chat(&self, parsed: &Parsed<'_>, line: &str, at: Timestamp) -> Result<Event, &'static str> {
        let duration_seconds = parsed.tag("ban-duration").and_then(|seconds| seconds.parse().ok());
        let target_login = parsed.params.get(1).map(String::as_str).filter(|login| !login.is_empty());
        let target_user_id = parsed.tag("target-user-id");
        let action = match (target_login.or(target_user_id), duration_seconds) {
            (None, _) => ModerationAction::Clear,
            (Some(_), Some(_)) => ModerationAction::Timeout,
            (Some(_), None) => ModerationAction::Ban,
        };
        let target_message_id = None;
        let raw = raw(parsed);
        let payload = ModerationPayload {
            action,
            target_user_id,
            target_login,
            duration_seconds,
            target_message_id,
            raw,
        };
        self.event(EventType::ChatModeration, parsed, line, at, &payload)
    }

    fn clear_message(&self, parsed: &Parsed<'_>, line: &str, at: Timestamp) -> Result<Event, &'static str> {
        let payload = ModerationPayload {
            action: ModerationAction::Delete,
            target_user_id: None,
            target_login: parsed.tag("login"),
            duration_seconds: None,
            target_message_id: parsed.tag("target-msg-id"),
            raw: raw(parsed),
        };
        self.event(EventType::ChatModeration, parsed, line, at, &payload)
    }

    /// An event without a user.
    #[expect(clippy::too_many_arguments, reason = "the parts of a line, handed on")]
    fn event(
        &self,
        kind: EventType,
        parsed: &Parsed<'_>,
        line: &str,
        at: Timestamp,
        payload: &impl Serialize,
    ) -> Result<Event, &'static str> {
        Ok(Event {
            kind,
            occurred_at: sent_at(parsed).unwrap_or(at),
            idempotency_key: self.key(parsed, line),
            source: source(parsed)?,
            user: None,
            // The tags stand in it twice, in part.
            payload: PayloadJson::write(payload, line.len() * 2 + 256)
                .map_err(|_| "a payload that is no JSON")?,
        })
    }

    /// What makes two copies of this line the same event.
    fn key(&self, parsed: &Parsed<'_>, line: &str) -> String {
        let shared = match self.shared_chat {
            SharedChatMode::SourceOnly => parsed.tag("source-id"),
            SharedChatMode::All => None,
        };
        match shared.or_else(|| parsed.tag("id")) {
            Some(id) => format!("{PLATFORM}:{id}"),
            None => content_key(parsed, line),
        }
    }
}

/// The key of a line without an id: of what a history service's copy has in common with it.
fn content_key(parsed: &Parsed<'_>, line: &str) -> String {
    let mut content = parsed.command.clone();
    for param in &parsed.params {
        content.push('\n');
        content.push_str(param);
    }
    for (key, value) in wire::wire_tags(line) {
        if key.starts_with("rm-") || key == "historical" {
            continue;
        }
        for part in ["\n", key, "=", value] {
            content.push_str(part);
        }
    }
    id::content_key(PLATFORM, content.as_bytes())
}

fn protocol(parsed: Parsed<'_>) -> Protocol {
    let nick = parsed.nick().map(str::to_owned);
    let msg_id = parsed.tag("msg-id").map(str::to_owned);
    let room = parsed.tag("room-id").and_then(|room| room.parse().ok());
    Protocol { command: parsed.command, params: parsed.params, nick, msg_id, room }
}

fn source(parsed: &Parsed<'_>) -> Result<SourceRef, &'static str> {
    let channel = parsed.params.first().map(|channel| channel.trim_start_matches('#').to_lowercase());
    match channel.filter(|channel| !channel.is_empty()) {
        Some(channel) => Ok(SourceRef {
            platform: PLATFORM,
            channel,
            channel_id: parsed.tag("room-id").map(str::to_owned),
        }),
        None => Err("no channel"),
    }
}

/// Who said something.
struct Author<'a> {
    id: Option<&'a str>,
    name: Cow<'a, str>,
    display_name: Cow<'a, str>,
    badges: Vec<&'a str>,
    /// Highest first, never empty.
    roles: Vec<Role>,
}

impl<'a> Author<'a> {
    /// `login`: from where this kind of line has it.
    fn of(parsed: &'a Parsed<'_>, login: Option<&'a str>) -> Self {
        let badges = text::badges(parsed.tag("badges").unwrap_or_default());
        let roles = text::roles(&badges, |key| parsed.tag(key) == Some("1"));
        let display_name = parsed.tag("display-name");
        let name = match (login, display_name) {
            (Some(login), _) => Cow::Borrowed(login),
            (None, Some(display_name)) => Cow::Owned(display_name.to_lowercase()),
            (None, None) => Cow::Borrowed(""),
        };
        let display_name = display_name.map_or_else(|| name.clone(), Cow::Borrowed);
        Self { id: parsed.tag("user-id"), name, display_name, badges, roles }
    }
}

/// The event with its user, if the line says who that is.
fn with_user(event: Event, author: &Author<'_>) -> Event {
    let user = author.id.filter(|user_id| id::is_user_id(user_id)).map(|user_id| User {
        key: id::user_key(event.source.platform, user_id).into(),
        id: user_id.to_owned(),
        name: author.name.as_ref().to_owned(),
        display_name: author.display_name.as_ref().to_owned(),
        profile_image_url: String::new(),
        role: author.roles.first().copied().unwrap_or(Role::Viewer),
        roles: author.roles.clone(),
        tags: vec!["PROVIDER_TWITCH".to_owned()],
    });
    Event { user, ..event }
}

/// When Twitch says the line was sent.
fn sent_at(parsed: &Parsed<'_>) -> Option<Timestamp> {
    let milliseconds = parsed.tag("tmi-sent-ts")?.parse().ok().filter(|milliseconds| *milliseconds > 0)?;
    Timestamp::from_millisecond(milliseconds).ok()
}

fn reply<'a>(parsed: &'a Parsed<'_>) -> Option<Reply<'a>> {
    Some(Reply {
        parent_message_id: parsed.tag("reply-parent-msg-id")?,
        parent_user_id: parsed.tag("reply-parent-user-id"),
        parent_user_login: parsed.tag("reply-parent-user-login"),
        thread_message_id: parsed.tag("reply-thread-parent-msg-id"),
    })
}

fn shared_chat<'a>(parsed: &'a Parsed<'_>) -> Option<SharedChat<'a>> {
    let source_room_id = parsed.tag("source-room-id");
    let source_message_id = parsed.tag("source-id");
    source_room_id.or(source_message_id)?;
    Some(SharedChat { source_room_id, source_message_id, source_kind: parsed.tag("source-msg-id") })
}

fn raw<'a>(parsed: &'a Parsed<'_>) -> Raw<'a> {
    let all = parsed.tags.all();
    let mut size = 0;
    let fitting = all.iter().take_while(|(key, value)| {
        size += key.len() + value.len();
        size <= MOST_RAW_TAGS
    });
    let kept = fitting.count();
    Raw { tags: Pairs(&all[..kept]), truncated: kept < all.len() }
}
