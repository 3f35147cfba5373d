//! The subject an envelope is published to: a fixed name, or one with a part for platform, type or channel.

use std::fmt::Write as _;
use std::sync::Arc;

use thiserror::Error;

/// Longest token that a placeholder becomes, in bytes.
const LONGEST_TOKEN: usize = 128;

/// Where dead letters go, behind the prefix.
const DEAD_LETTERS: &str = "internal.deadletter.v1";

/// Why a subject cannot be used.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum SubjectError {
    /// An empty token: two dots in a row, or one at an end.
    #[error("has an empty part between its dots")]
    EmptyToken,
    /// A letter that no subject may hold.
    #[error("holds {0:?}, which no subject to publish to may hold")]
    BadLetter(char),
    /// Braces around something else than platform, type or channel.
    #[error("has a placeholder that is none of {{platform}}, {{type}} and {{channel}}")]
    BadPlaceholder,
    /// A prefix that does not end with a dot.
    #[error("must be empty or end with a dot")]
    PrefixWithoutDot,
    /// The subject is the dead letters'.
    #[error("is where dead letters go")]
    DeadLetters,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Piece {
    Text(String),
    Platform,
    Type,
    Channel,
}

/// The subjects of one instance.
#[derive(Debug, Clone)]
pub struct SubjectTemplate {
    pieces: Vec<Piece>,
    /// The whole subject, where nothing in it varies: shared, not built per event.
    fixed: Option<Arc<str>>,
    /// What matches every subject of events: a part that varies is `*`.
    pattern: String,
    dead_letters: Arc<str>,
}

impl SubjectTemplate {
    /// Checks `prefix` (`BUS_PREFIX`) and `subject` (`PUBLISH_SUBJECT`).
    pub fn new(prefix: &str, subject: &str) -> Result<Self, SubjectError> {
        if !prefix.is_empty() && !prefix.ends_with('.') {
            return Err(SubjectError::PrefixWithoutDot);
        }
        let whole = format!("{prefix}{subject}");
        let pieces = pieces(&whole)?;
        let dead_letters = format!("{prefix}{DEAD_LETTERS}");
        if whole == dead_letters {
            return Err(SubjectError::DeadLetters);
        }
        let fixed = match &pieces[..] {
            [Piece::Text(text)] => Some(Arc::from(text.as_str())),
            _ => None,
        };
        let pattern = pattern(&pieces);
        Ok(Self { pieces, fixed, pattern, dead_letters: dead_letters.into() })
    }

    /// The subject of an event.
    pub fn of(&self, platform: &str, kind: &str, channel: &str) -> Arc<str> {
        if let Some(fixed) = &self.fixed {
            return Arc::clone(fixed);
        }
        let mut subject = String::new();
        for piece in &self.pieces {
            match piece {
                Piece::Text(text) => subject.push_str(text),
                Piece::Platform => push_token(&mut subject, platform),
                Piece::Type => push_token(&mut subject, kind),
                Piece::Channel => push_token(&mut subject, channel),
            }
        }
        subject.into()
    }

    /// Where dead letters go.
    pub fn dead_letters(&self) -> Arc<str> {
        Arc::clone(&self.dead_letters)
    }

    /// Everything this instance publishes to: events, then dead letters.
    pub fn patterns(&self) -> [String; 2] {
        [self.pattern.clone(), self.dead_letters.as_ref().to_owned()]
    }

    /// Whether a message on `subject` is one of ours.
    pub fn owns(&self, subject: &str) -> bool {
        subject == self.dead_letters.as_ref() || covers(&self.pattern, subject)
    }
}

/// Whether the NATS pattern `wide` matches everything that `narrow` (a subject or a pattern) matches.
pub fn covers(wide: &str, narrow: &str) -> bool {
    let mut narrow = narrow.split('.');
    for token in wide.split('.') {
        match (token, narrow.next()) {
            (">", Some(_)) => return true,
            ("*", Some(other)) if other != ">" => {}
            (token, Some(other)) if token == other => {}
            _ => return false,
        }
    }
    narrow.next().is_none()
}

fn pieces(subject: &str) -> Result<Vec<Piece>, SubjectError> {
    if let Some(bad) = subject.chars().find(|c| c.is_whitespace() || c.is_control() || matches!(c, '*' | '>'))
    {
        return Err(SubjectError::BadLetter(bad));
    }
    if subject.split('.').any(str::is_empty) {
        return Err(SubjectError::EmptyToken);
    }
    let mut pieces = Vec::new();
    let mut rest = subject;
    while let Some(open) = rest.find(['{', '}']) {
        if open > 0 {
            pieces.push(Piece::Text(rest[..open].to_owned()));
        }
        let (piece, length) = match &rest[open..] {
            r if r.starts_with("{platform}") => (Piece::Platform, "{platform}".len()),
            r if r.starts_with("{type}") => (Piece::Type, "{type}".len()),
            r if r.starts_with("{channel}") => (Piece::Channel, "{channel}".len()),
            _ => return Err(SubjectError::BadPlaceholder),
        };
        pieces.push(piece);
        rest = &rest[open + length..];
    }
    if !rest.is_empty() {
        pieces.push(Piece::Text(rest.to_owned()));
    }
    Ok(pieces)
}

fn pattern(pieces: &[Piece]) -> String {
    let mut filled = String::new();
    for piece in pieces {
        match piece {
            Piece::Text(text) => filled.push_str(text),
            Piece::Platform | Piece::Type | Piece::Channel => filled.push('*'),
        }
    }
    let tokens = filled.split('.').map(|token| if token.contains('*') { "*" } else { token });
    tokens.collect::<Vec<_>>().join(".")
}

/// Makes `value` one token: what is not a letter, digit, `_` or `-` becomes `=HH`, and it ends before it would
/// pass the limit.
fn push_token(subject: &mut String, value: &str) {
    let start = subject.len();
    for byte in value.bytes() {
        let plain = byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-';
        if subject.len() - start + if plain { 1 } else { 3 } > LONGEST_TOKEN {
            break;
        }
        if plain {
            subject.push(char::from(byte));
        } else {
            let written = write!(subject, "={byte:02X}");
            debug_assert!(written.is_ok(), "writing to a String does not fail");
        }
    }
    // A subject has no empty tokens.
    if subject.len() == start {
        subject.push('=');
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template(prefix: &str, subject: &str) -> SubjectTemplate {
        SubjectTemplate::new(prefix, subject).unwrap()
    }

    #[test]
    fn fixed_subjects_stay_as_they_are() {
        let fixed = template("dev.", "internal.ingress.v1");
        assert_eq!(&*fixed.of("twitch", "external.chat.message.v1", "a"), "dev.internal.ingress.v1");
        assert_eq!(fixed.patterns(), ["dev.internal.ingress.v1", "dev.internal.deadletter.v1"]);
        assert!(fixed.owns("dev.internal.deadletter.v1") && !fixed.owns("internal.ingress.v1"));
    }

    #[test]
    fn placeholders_become_one_token_each() {
        let varying = template("", "chat.{platform}.x-{channel}.{type}");
        let subject = varying.of("twitch", "external.chat.message.v1", "my_chan nél");
        assert_eq!(&*subject, "chat.twitch.x-my_chan=20n=C3=A9l.external=2Echat=2Emessage=2Ev1");
        assert_eq!(varying.patterns()[0], "chat.*.*.*");
        assert!(varying.owns(&subject));
        let long = varying.of("", "t", &"é".repeat(100));
        let tokens: Vec<_> = long.split('.').collect();
        assert_eq!(tokens[1], "=");
        assert!(tokens[2].len() <= "x-".len() + LONGEST_TOKEN && tokens[2].len() > 120);
    }

    #[test]
    fn what_cannot_be_a_subject_is_refused() {
        use SubjectError::{BadLetter, BadPlaceholder, DeadLetters, EmptyToken, PrefixWithoutDot};
        for (prefix, subject, error) in [
            ("dev", "a", PrefixWithoutDot),
            ("", "", EmptyToken),
            ("", "a..b", EmptyToken),
            ("", ".a", EmptyToken),
            ("", "a.*", BadLetter('*')),
            ("", "a b", BadLetter(' ')),
            ("", "a.{user}", BadPlaceholder),
            ("", "a.{", BadPlaceholder),
            ("", "a.}", BadPlaceholder),
            ("p.", "internal.deadletter.v1", DeadLetters),
        ] {
            assert_eq!(SubjectTemplate::new(prefix, subject).err(), Some(error), "{prefix}{subject}");
        }
    }

    #[test]
    fn coverage_follows_the_rules_of_nats() {
        for (wide, narrow, expected) in [
            ("a.b", "a.b", true),
            ("a.*", "a.b", true),
            ("a.>", "a.b.c", true),
            ("a.>", "a.*.c", true),
            (">", "a", true),
            ("a.*", "a.*", true),
            ("a.*", "a.b.c", false),
            ("a.b", "a.*", false),
            ("a.*", "a.>", false),
            ("a.>", "a", false),
            ("a.b.c", "a.b", false),
        ] {
            assert_eq!(covers(wide, narrow), expected, "{wide} {narrow}");
        }
    }
}
