//! A line becomes a draft, a matter of the connection, or nothing. Tolerant of every absence: a capture lacks
//! tags, a server forgets a `#`, and neither may cost an event.

use std::collections::HashMap;
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
    Content, MessagePayload, ModerationAction, ModerationPayload, NoticePayload, Pairs, Payload, Raw, Reply, Role, Said,
    SharedChat, SourceRef, User,
};
use crate::envelope::{DeadLetterReason, Draft, Event, EventType, Origin, id};
use crate::telemetry::metrics::Label;

const PLATFORM: &str = "twitch";

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
                return self.unusable(DeadLetterReason::LineTooLong, message, start, taken_in);
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
            return self.unusable(DeadLetterReason::Unparsable, "no line of IRC".to_owned(), bytes.clone(), taken_in);
        };
        let is_dated = sent_at(&parsed).is_some();
        let event = match parsed.command.as_str() {
            "PRIVMSG" => self.message(parsed, &line, taken_in.at),
            "USERNOTICE" => self.notice(parsed, &line, taken_in.at),
            "CLEARCHAT" => self.clear_chat(parsed, &line, taken_in.at),
            "CLEARMSG" => self.clear_message(parsed, &line, taken_in.at),
            _ => return Reading::Protocol(protocol(parsed)),
        };
        match event {
            Ok(event) => self.draft(event, is_dated, taken_in),
            Err(missing) => {
                self.note(BadLine::NotNormalizable);
                self.unusable(DeadLetterReason::NotNormalizable, missing.to_owned(), bytes.clone(), taken_in)
            }
        }
    }

    fn note(&self, kind: BadLine) {
        self.metrics.bad_lines.of(kind).inc();
        let bit = 1 << kind.index();
        if self.logged.fetch_or(bit, Ordering::Relaxed) & bit == 0 {
            tracing::warn!(kind = %kind, source = %self.origin, "a bad line; more of this kind are only counted");
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
            Origin::Twitch => taken_in_at,
            Origin::Replay => Timestamp::UNIX_EPOCH,
        }
    }

    fn unusable(&self, reason: DeadLetterReason, message: String, bytes: Bytes, taken_in: TakenIn) -> Reading {
        Reading::Draft(Box::new(Draft {
            origin: self.origin,
            id: id::event_id(&id::content_key(PLATFORM, &bytes)),
            taken_in_at: taken_in.at,
            taken_in: taken_in.instant,
            not_published_before: self.undated(taken_in.at),
            content: Content::Unusable { reason, message, original: bytes },
            slip: None,
        }))
    }

    fn message(&self, mut parsed: Parsed, line: &str, at: Timestamp) -> Result<Event, &'static str> {
        let [_, text] = &mut parsed.params[..] else { return Err("PRIVMSG without a channel or a text") };
        let text = std::mem::take(text);
        let (text, is_action) = text::unwrap_action(&text);
        let text = text.to_owned();
        let name = parsed.nick().map(str::to_owned);
        self.said(EventType::ChatMessage, parsed, (line, at), name, |parsed, roles| {
            let said = self.said_fields(parsed, roles, &text, is_action);
            Payload::Message(MessagePayload { text, said })
        })
    }

    fn notice(&self, mut parsed: Parsed, line: &str, at: Timestamp) -> Result<Event, &'static str> {
        let text = if parsed.params.len() > 1 { parsed.params.pop() } else { None };
        if parsed.params.is_empty() {
            return Err("USERNOTICE without a channel");
        }
        let (text, is_action) = match text.as_deref().map(text::unwrap_action) {
            Some((text, is_action)) => (Some(text.to_owned()), is_action),
            None => (None, false),
        };
        let name = parsed.tag("login").map(str::to_owned);
        self.said(EventType::ChatNotice, parsed, (line, at), name, |parsed, roles| {
            let kind = parsed.tag("msg-id").unwrap_or_default().to_owned();
            let system_text = parsed.tag("system-msg").unwrap_or_default().to_owned();
            let mut params: Vec<_> = parsed
                .tags
                .iter()
                .filter_map(|(key, value)| Some((key.strip_prefix("msg-param-")?.to_owned(), value.clone())))
                .collect();
            params.sort_unstable();
            let said = self.said_fields(parsed, roles, text.as_deref().unwrap_or_default(), is_action);
            Payload::Notice(NoticePayload { kind, system_text, text, params: Pairs(params), said })
        })
    }

    /// What chat messages and notices share: where, who, when.
    fn said(
        &self,
        kind: EventType,
        mut parsed: Parsed,
        (line, at): (&str, Timestamp),
        name: Option<String>,
        payload: impl FnOnce(&mut Parsed, &(Vec<String>, Vec<Role>)) -> Payload,
    ) -> Result<Event, &'static str> {
        let source = source(&parsed)?;
        let idempotency_key = self.key(&parsed, line);
        let badges = text::badges(parsed.tag("badges").unwrap_or_default());
        let roles = text::roles(&badges, |key| parsed.tag(key) == Some("1"));
        let held = (badges, roles);
        let user = user(&parsed, name, &held.1);
        let occurred_at = sent_at(&parsed).unwrap_or(at);
        let payload = payload(&mut parsed, &held);
        Ok(Event { kind, occurred_at, idempotency_key, source, user, payload })
    }

    fn said_fields(&self, parsed: &mut Parsed, held: &(Vec<String>, Vec<Role>), text: &str, is_action: bool) -> Said {
        let (badges, roles) = held;
        let (emotes, dropped) = text::emotes(parsed.tag("emotes").unwrap_or_default(), text);
        self.metrics.emote_ranges_dropped.inc_by(dropped);
        let owned = |key: &str| parsed.tag(key).map(str::to_owned);
        Said {
            message_id: owned("id"),
            is_action,
            badges: badges.clone(),
            is_mod: roles.contains(&Role::Moderator),
            is_subscriber: roles.contains(&Role::Subscriber),
            is_vip: roles.contains(&Role::Vip),
            is_broadcaster: roles.contains(&Role::Broadcaster),
            color: owned("color").unwrap_or_default(),
            bits: parsed.tag("bits").and_then(|bits| bits.parse().ok()).unwrap_or_default(),
            emotes,
            reply: reply(parsed),
            shared_chat: shared_chat(parsed),
            raw: raw(std::mem::take(&mut parsed.tags)),
        }
    }

    fn clear_chat(&self, parsed: Parsed, line: &str, at: Timestamp) -> Result<Event, &'static str> {
        let duration_seconds = parsed.tag("ban-duration").and_then(|seconds| seconds.parse().ok());
        let target_login = parsed.params.get(1).filter(|login| !login.is_empty()).cloned();
        let action = match (&target_login, duration_seconds) {
            (None, _) => ModerationAction::Clear,
            (Some(_), Some(_)) => ModerationAction::Timeout,
            (Some(_), None) => ModerationAction::Ban,
        };
        let target_user_id = parsed.tag("target-user-id").map(str::to_owned);
        self.moderation(parsed, line, at, |raw| ModerationPayload {
            action,
            target_user_id,
            target_login,
            duration_seconds,
            target_message_id: None,
            raw,
        })
    }

    fn clear_message(&self, parsed: Parsed, line: &str, at: Timestamp) -> Result<Event, &'static str> {
        let target_login = parsed.tag("login").map(str::to_owned);
        let target_message_id = parsed.tag("target-msg-id").map(str::to_owned);
        self.moderation(parsed, line, at, |raw| ModerationPayload {
            action: ModerationAction::Delete,
            target_user_id: None,
            target_login,
            duration_seconds: None,
            target_message_id,
            raw,
        })
    }

    fn moderation(
        &self,
        mut parsed: Parsed,
        line: &str,
        at: Timestamp,
        payload: impl FnOnce(Raw) -> ModerationPayload,
    ) -> Result<Event, &'static str> {
        Ok(Event {
            kind: EventType::ChatModeration,
            occurred_at: sent_at(&parsed).unwrap_or(at),
            idempotency_key: self.key(&parsed, line),
            source: source(&parsed)?,
            user: None,
            payload: Payload::Moderation(payload(raw(std::mem::take(&mut parsed.tags)))),
        })
    }

    /// What makes two copies of this line the same event.
    fn key(&self, parsed: &Parsed, line: &str) -> String {
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
fn content_key(parsed: &Parsed, line: &str) -> String {
    let mut content = parsed.command.clone();
    // The text was taken out of `params`, if there is one; the line still has it.
    let whole = wire::parse(line);
    let params = whole.as_ref().map_or(&parsed.params, |whole| &whole.params);
    for param in params {
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

fn protocol(parsed: Parsed) -> Protocol {
    let nick = parsed.nick().map(str::to_owned);
    let msg_id = parsed.tag("msg-id").map(str::to_owned);
    Protocol { command: parsed.command, params: parsed.params, nick, msg_id }
}

fn source(parsed: &Parsed) -> Result<SourceRef, &'static str> {
    let channel = parsed.params.first().map(|channel| channel.trim_start_matches('#').to_lowercase());
    match channel.filter(|channel| !channel.is_empty()) {
        Some(channel) => {
            Ok(SourceRef { platform: PLATFORM, channel, channel_id: parsed.tag("room-id").map(str::to_owned) })
        }
        None => Err("no channel"),
    }
}

fn user(parsed: &Parsed, name: Option<String>, roles: &[Role]) -> Option<User> {
    let id = parsed.tag("user-id")?.to_owned();
    let display_name = parsed.tag("display-name");
    let name = name.or_else(|| display_name.map(str::to_lowercase)).unwrap_or_default();
    Some(User {
        id,
        display_name: display_name.unwrap_or(&name).to_owned(),
        name,
        profile_image_url: String::new(),
        role: roles.first().copied().unwrap_or(Role::Viewer),
        roles: roles.to_vec(),
        tags: vec!["PROVIDER_TWITCH".to_owned()],
    })
}

/// When Twitch says the line was sent.
fn sent_at(parsed: &Parsed) -> Option<Timestamp> {
    Timestamp::from_millisecond(parsed.tag("tmi-sent-ts")?.parse().ok()?).ok()
}

fn reply(parsed: &Parsed) -> Option<Reply> {
    let owned = |key: &str| parsed.tag(key).map(str::to_owned);
    Some(Reply {
        parent_message_id: owned("reply-parent-msg-id")?,
        parent_user_id: owned("reply-parent-user-id"),
        parent_user_login: owned("reply-parent-user-login"),
        thread_message_id: owned("reply-thread-parent-msg-id"),
    })
}

fn shared_chat(parsed: &Parsed) -> Option<SharedChat> {
    let owned = |key: &str| parsed.tag(key).map(str::to_owned);
    let (source_room_id, source_message_id) = (owned("source-room-id"), owned("source-id"));
    if source_room_id.is_none() && source_message_id.is_none() {
        return None;
    }
    Some(SharedChat { source_room_id, source_message_id, source_kind: owned("source-msg-id") })
}

fn raw(tags: HashMap<String, String>) -> Raw {
    let mut pairs: Vec<_> = tags.into_iter().collect();
    pairs.sort_unstable();
    let mut size = 0;
    let fitting = pairs.iter().take_while(|(key, value)| {
        size += key.len() + value.len();
        size <= MOST_RAW_TAGS
    });
    let kept = fitting.count();
    let truncated = kept < pairs.len();
    pairs.truncate(kept);
    Raw { tags: Pairs(pairs), truncated }
}
