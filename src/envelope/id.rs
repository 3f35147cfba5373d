//! Deterministic ids: the same event gets the same id, whoever takes it in and however often.

use std::fmt;
use std::str::FromStr;

use serde::{Serialize, Serializer};
use sha2::{Digest, Sha256};
use uuid::Uuid;

/// `UUIDv5` of the URL `urn:inlet:event`.
const EVENTS: Uuid = Uuid::from_u128(0x99c4_52c6_807f_5d66_b35a_2ce5_031c_89dc);

/// What a dead letter's message id starts with. One stream de-duplicates across its subjects, so a dead letter
/// needs an id of its own.
const DEAD_LETTER_PREFIX: &str = "dlq-";

/// The id of the event with this idempotency key.
pub fn event_id(idempotency_key: &str) -> Uuid {
    Uuid::new_v5(&EVENTS, idempotency_key.as_bytes())
}

/// The idempotency key of something without an id of its own: the first 32 hex digits of its SHA-256.
pub fn content_key(platform: &str, content: &[u8]) -> String {
    use fmt::Write as _;
    let digest = Sha256::digest(content);
    let mut key = format!("{platform}:sha256-");
    for byte in &digest[..16] {
        let written = write!(key, "{byte:02x}");
        debug_assert!(written.is_ok(), "writing to a String does not fail");
    }
    key
}

/// Where users' documents lie.
const USERS: &str = "users/";

/// `users/<provider>:<id>`, the user's document, from its key.
#[derive(Debug, Clone, Copy)]
pub struct UserRef<'a>(pub &'a str);

impl fmt::Display for UserRef<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(USERS)?;
        f.write_str(self.0)
    }
}

impl Serialize for UserRef<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// `<provider>:<id>`, the name of the user's document among users.
pub fn user_key(provider: &str, user_id: &str) -> String {
    let mut key = String::with_capacity(1 + provider.len() + user_id.len());
    push_escaped(&mut key, provider);
    key.push(':');
    push_escaped(&mut key, user_id);
    key
}

/// Longest id of a user, in bytes: a key has to fit a document's name and a header.
const LONGEST_USER_ID: usize = 256;

/// Whether this can be somebody's id on a platform.
pub fn is_user_id(text: &str) -> bool {
    !text.is_empty() && text.len() <= LONGEST_USER_ID && !text.contains(char::is_control)
}

/// Provider and id of a [`user_key`]; `None` if it is none.
pub fn user_of_key(key: &str) -> Option<(String, String)> {
    let unescaped =
        |part: &str| Some(percent_encoding::percent_decode_str(part).decode_utf8().ok()?.into_owned());
    let (provider, id) = key.split_once(':')?;
    let is_key = !provider.is_empty() && !id.is_empty() && !id.contains([':', '/']);
    if !is_key {
        return None;
    }
    let (provider, id) = (unescaped(provider)?, unescaped(id)?);
    (is_user_id(&provider) && is_user_id(&id)).then_some((provider, id))
}

/// Percent-escapes what a document's name may not hold, the same for every store: `%`, `/` and `:` anywhere,
/// and the whole names `.`, `..` and `__…__`.
fn push_escaped(path: &mut String, part: &str) {
    let is_plain = part.bytes().all(|byte| byte.is_ascii_alphanumeric());
    if is_plain {
        return path.push_str(part);
    }
    let reserved =
        matches!(part, "." | "..") || (part.len() >= 4 && part.starts_with("__") && part.ends_with("__"));
    for (at, letter) in part.char_indices() {
        match letter {
            '%' => path.push_str("%25"),
            '/' => path.push_str("%2F"),
            ':' => path.push_str("%3A"),
            '.' if reserved => path.push_str("%2E"),
            '_' if reserved && at == 0 => path.push_str("%5F"),
            _ => path.push(letter),
        }
    }
}

/// The id under which a message is published: the stream keeps one message of each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MessageId {
    /// The event's id.
    pub event: Uuid,
    /// Whether this is the event's dead letter rather than its envelope.
    pub is_dead_letter: bool,
}

impl MessageId {
    /// The id of an event's envelope.
    pub fn of_event(event: Uuid) -> Self {
        Self { event, is_dead_letter: false }
    }

    /// As text; the same as by [`fmt::Display`], in one allocation.
    pub fn to_text(self) -> String {
        let mut buffer = Uuid::encode_buffer();
        let event = self.event.hyphenated().encode_lower(&mut buffer);
        if self.is_dead_letter { [DEAD_LETTER_PREFIX, event].concat() } else { event.to_owned() }
    }

    /// The id of an event's dead letter.
    pub fn of_dead_letter(event: Uuid) -> Self {
        Self { event, is_dead_letter: true }
    }
}

impl fmt::Display for MessageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_dead_letter {
            f.write_str(DEAD_LETTER_PREFIX)?;
        }
        self.event.hyphenated().fmt(f)
    }
}

impl FromStr for MessageId {
    type Err = uuid::Error;

    fn from_str(text: &str) -> Result<Self, uuid::Error> {
        match text.strip_prefix(DEAD_LETTER_PREFIX) {
            Some(event) => event.parse().map(Self::of_dead_letter),
            None => text.parse().map(Self::of_event),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_contracts_example_holds() {
        assert_eq!(EVENTS, Uuid::new_v5(&Uuid::NAMESPACE_URL, b"urn:inlet:event"));
        let id = event_id("twitch:885196de-cb67-427a-baa8-82f9b0fcd05f");
        assert_eq!(id.to_string(), "708dd32c-85be-515f-817a-9491a23cd8ae");
    }

    #[test]
    fn content_keys_are_the_start_of_the_digest() {
        assert_eq!(content_key("twitch", b"abc"), "twitch:sha256-ba7816bf8f01cfea414140de5dae2223");
    }

    #[test]
    fn user_refs_escape_what_a_document_name_may_not_hold() {
        for (id, path) in [
            ("29025231", "users/twitch:29025231"),
            ("a/b:c%d", "users/twitch:a%2Fb%3Ac%25d"),
            (".", "users/twitch:%2E"),
            ("..", "users/twitch:%2E%2E"),
            ("a.b", "users/twitch:a.b"),
            ("__x__", "users/twitch:%5F_x__"),
            ("_x_", "users/twitch:_x_"),
        ] {
            assert_eq!(UserRef(&user_key("twitch", id)).to_string(), path);
            let of_key = user_of_key(path.strip_prefix("users/").unwrap());
            assert_eq!(of_key, Some(("twitch".to_owned(), id.to_owned())));
        }
    }

    #[test]
    fn what_is_no_key_of_a_user_is_told() {
        for key in ["", "twitch", "twitch:", ":1", "twitch:1:2", "twitch:a/b", "twitch:%ff", "twitch:1%0A2"] {
            assert_eq!(user_of_key(key), None, "{key}");
        }
    }

    #[test]
    fn message_ids_go_to_text_and_back() {
        let event = event_id("twitch:x");
        for id in [MessageId::of_event(event), MessageId::of_dead_letter(event)] {
            assert_eq!(id.to_string().parse(), Ok(id));
            assert_eq!(id.to_text(), id.to_string());
        }
        assert_eq!(MessageId::of_dead_letter(event).to_string(), format!("dlq-{event}"));
        assert!("dlq-".parse::<MessageId>().is_err() && "hello".parse::<MessageId>().is_err());
    }
}
