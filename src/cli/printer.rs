//! Envelopes on standard output, as they are or for a person: `tail`, `replay --show` and `demo` show them alike.

use std::fmt::Write as _;
use std::io::{ErrorKind, IsTerminal as _, Write as _};

use serde::Deserialize;

use super::Failure;
use crate::settings::Environment;

const END: &str = "\x1b[0m";
const DIM: &str = "\x1b[2m";
/// Of people's names: the terminal's own colours, which its owner can read.
const NAMES: [&str; 6] = ["\x1b[1;31m", "\x1b[1;32m", "\x1b[1;33m", "\x1b[1;34m", "\x1b[1;35m", "\x1b[1;36m"];
/// Of the first event of somebody, of a first message, of an operator's label.
const BADGES: [&str; 3] = ["\x1b[30;42m", "\x1b[30;46m", "\x1b[30;45m"];
/// A line of what is not somebody's word.
const HAPPENED: &str = "\x1b[33m";

/// At a terminal no more of a text is shown: some viewers fill a screen.
const TERMINAL_LETTERS: usize = 160;

/// A tag, and the one that is never without it in a chat message.
const IMPLIED: [(&str, &str); 2] =
    [("FIRST_ALLTIME_MESSAGE", "NEW_USER"), ("FIRST_SESSION_MESSAGE", "FIRST_ALLTIME_MESSAGE")];

/// Writes envelopes to standard output.
pub(super) struct Printer {
    json: bool,
    is_terminal: bool,
    has_colours: bool,
    /// Of the longest channel so far: at a terminal the names stand in one column.
    channel_width: usize,
}

/// A printer of so many. Its answer says whether to go on: not when that many are printed or nobody reads any more.
pub(super) struct Counted {
    printer: Printer,
    left: Option<u64>,
}

impl Counted {
    pub(super) fn new(printer: Printer, left: Option<u64>) -> Self {
        Self { printer, left }
    }

    pub(super) fn print(&mut self, envelope: &[u8]) -> Result<bool, Failure> {
        if self.left == Some(0) || !self.printer.print(envelope)? {
            return Ok(false);
        }
        self.left = self.left.map(|left| left - 1);
        Ok(self.left != Some(0))
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Seen {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    occurred_at: String,
    #[serde(default)]
    source: SeenSource,
    user: Option<SeenUser>,
    #[serde(default)]
    payload: SeenPayload,
    /// Of a dead letter.
    reason: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct SeenSource {
    channel: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct SeenUser {
    display_name: String,
    #[serde(default)]
    tags: Vec<String>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct SeenPayload {
    text: Option<String>,
    is_action: bool,
    /// Of a notice.
    kind: String,
    system_text: Option<String>,
    /// Of a moderation.
    action: String,
    target_login: String,
    duration_seconds: Option<u64>,
    /// Of a gap.
    from: String,
    cause: String,
}

impl Printer {
    /// For standard output as it is.
    pub(super) fn new(json: bool, environment: &Environment) -> Self {
        let is_terminal = std::io::stdout().is_terminal();
        Self { json, is_terminal, has_colours: has_colours(environment), channel_width: 0 }
    }

    /// Prints one; false when nobody reads any more.
    pub(super) fn print(&mut self, envelope: &[u8]) -> Result<bool, Failure> {
        let mut out = std::io::stdout().lock();
        let written = if self.json {
            self.write_json(envelope, &mut out)
        } else {
            writeln!(out, "{}", self.readable(envelope))
        };
        match written.and_then(|()| out.flush()) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(false),
            Err(error) => Err(Failure::Failed(format!("cannot write to standard output: {error}"))),
        }
    }

    /// As it is; what would drive a terminal is escaped there, which is the same JSON.
    fn write_json(&self, envelope: &[u8], out: &mut impl std::io::Write) -> std::io::Result<()> {
        if self.is_terminal {
            for letter in String::from_utf8_lossy(envelope).chars() {
                if is_harmless(letter) {
                    write!(out, "{letter}")?;
                } else {
                    write!(out, "\\u{:04x}", u32::from(letter))?;
                }
            }
        } else {
            out.write_all(envelope)?;
        }
        out.write_all(b"\n")
    }

    fn readable(&mut self, envelope: &[u8]) -> String {
        let Ok(seen) = serde_json::from_slice::<Seen>(envelope) else {
            return format!("? {}", for_terminal(&String::from_utf8_lossy(envelope)));
        };
        let time = for_terminal(seen.occurred_at.get(11..19).unwrap_or("--:--:--"));
        if let Some(reason) = &seen.reason {
            return format!("{time} dead letter: {}", for_terminal(reason));
        }
        let channel = for_terminal(&seen.source.channel);
        if self.is_terminal {
            self.channel_width = self.channel_width.max(channel.chars().count());
        }
        let head = self.painted(DIM, &format!("{time} #{channel:<width$}", width = self.channel_width));
        let what = self.what(&seen);
        format!("{head} {}{}", what.trim_end(), self.badges(&seen))
    }

    fn what(&self, seen: &Seen) -> String {
        let payload = &seen.payload;
        let name = seen.user.as_ref().map(|user| for_terminal(&user.display_name)).unwrap_or_default();
        let mut text = for_terminal(payload.text.as_deref().unwrap_or_default());
        if let Some((end, _)) = text.char_indices().nth(TERMINAL_LETTERS).filter(|_| self.is_terminal) {
            text.truncate(end);
            text.push('…');
        }
        let name = self.painted(colour_of(&name), &name);
        match seen.kind.as_str() {
            "external.chat.message.v1" if payload.is_action => format!("{name} {text}"),
            "external.chat.message.v1" => format!("{name}: {text}"),
            "external.chat.moderation.v1" => self.happened(&moderation(payload)),
            "internal.source.gap.v1" => {
                let (from, cause) = (for_terminal(&payload.from), for_terminal(&payload.cause));
                self.happened(&format!("not heard since {from} ({cause})"))
            }
            "internal.user.forgotten.v1" => self.happened("a user is forgotten"),
            _ => {
                let said = payload.system_text.as_deref().filter(|said| !said.is_empty());
                let happened = self.happened(&for_terminal(said.unwrap_or(&payload.kind)));
                if text.is_empty() { happened } else { format!("{happened} {name}: {text}") }
            }
        }
    }

    fn happened(&self, what: &str) -> String {
        self.painted(HAPPENED, &format!("* {what}"))
    }

    /// The tags, those that say most first; every event's own platform says nothing.
    fn badges(&self, seen: &Seen) -> String {
        let all = seen.user.as_ref().map(|user| user.tags.as_slice()).unwrap_or_default();
        let has = |name: &str| all.iter().any(|tag| tag == name);
        // A line of a terminal is short, and these follow from others; a pipe gets them all.
        let is_implied =
            |tag: &str| self.is_terminal && IMPLIED.iter().any(|(name, by)| *name == tag && has(by));
        let mut shown: Vec<_> =
            all.iter().filter(|tag| !tag.starts_with("PROVIDER_") && !is_implied(tag)).collect();
        shown.sort_by_key(|tag| rank(tag));
        shown.iter().fold(String::new(), |mut badges, tag| {
            let text = for_terminal(tag);
            let written = match BADGES.get(rank(tag)) {
                Some(colour) if self.has_colours => write!(badges, " {colour} {text} {END}"),
                Some(_) | None => write!(badges, " {}", self.painted(DIM, &format!("[{text}]"))),
            };
            debug_assert!(written.is_ok(), "writing to a String does not fail");
            badges
        })
    }

    fn painted(&self, colour: &str, text: &str) -> String {
        if self.has_colours && !text.is_empty() { format!("{colour}{text}{END}") } else { text.to_owned() }
    }
}

/// Whether standard output takes colours: a terminal alone, and not where `NO_COLOR` asks for none.
pub(super) fn has_colours(environment: &Environment) -> bool {
    let wants_none = environment.get("NO_COLOR").is_some() || environment.get("TERM") == Some("dumb");
    std::io::stdout().is_terminal() && !wants_none
}

/// A tag's place among the others, and its colour among [`BADGES`].
fn rank(tag: &str) -> usize {
    match tag {
        "NEW_USER" => 0,
        "FIRST_ALLTIME_MESSAGE" | "FIRST_SESSION_MESSAGE" => 1,
        "RETURNING_USER" => 3,
        _ => 2,
    }
}

/// Always the same for a name.
fn colour_of(name: &str) -> &'static str {
    NAMES[name.bytes().map(usize::from).sum::<usize>() % NAMES.len()]
}

fn moderation(payload: &SeenPayload) -> String {
    let target = for_terminal(&payload.target_login);
    match (payload.action.as_str(), payload.duration_seconds) {
        ("ban", _) => format!("{target} was banned"),
        ("timeout", Some(seconds)) => format!("{target} was timed out for {seconds} s"),
        ("clear", _) => "the chat was cleared".to_owned(),
        ("delete", _) => format!("a message of {target} was deleted"),
        (action, _) => format!("{} {target}", for_terminal(action)),
    }
}

/// Without control characters: a viewer's text must not drive the terminal.
pub(super) fn for_terminal(text: &str) -> String {
    text.chars().filter(|letter| is_harmless(*letter)).collect()
}

/// Neither a control character nor a sign that turns the direction of writing, by which a line can be made to look
/// like another.
fn is_harmless(letter: char) -> bool {
    !letter.is_control() && !matches!(letter, '\u{202A}'..='\u{202E}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn printer(is_terminal: bool, has_colours: bool) -> Printer {
        Printer { json: false, is_terminal, has_colours, channel_width: 0 }
    }

    fn event(kind: &str, rest: &str) -> Vec<u8> {
        format!(
            r#"{{"type":"{kind}","occurredAt":"2026-11-20T05:51:20.612Z","source":{{"channel":"c"}},{rest}}}"#
        )
        .into_bytes()
    }

    const HELLO: &str = r#""user":{"displayName":"N\u001b[31m","tags":["FIRST_ALLTIME_MESSAGE",
        "FIRST_SESSION_MESSAGE","NEW_USER","PROVIDER_TWITCH","friend"]},"payload":{"text":"hi\u0007\u202e there"}"#;

    #[test]
    fn a_person_reads_what_was_said_and_no_control_character() {
        let hello = event("external.chat.message.v1", HELLO);
        assert_eq!(
            printer(false, false).readable(&hello),
            "05:51:20 #c N[31m: hi there [NEW_USER] [FIRST_ALLTIME_MESSAGE] [FIRST_SESSION_MESSAGE] [friend]"
        );
        assert_eq!(printer(true, false).readable(&hello), "05:51:20 #c N[31m: hi there [NEW_USER] [friend]");
        let action = r#""user":{"displayName":"N","tags":["RETURNING_USER"]},
            "payload":{"text":"waves","isAction":true}"#;
        assert_eq!(
            printer(false, false).readable(&event("external.chat.message.v1", action)),
            "05:51:20 #c N waves [RETURNING_USER]"
        );
    }

    #[test]
    fn colours_end_where_they_began_and_only_ours_drive_the_terminal() {
        let shown = printer(true, true).readable(&event("external.chat.message.v1", HELLO));
        let starts = shown.matches("\x1b[").count();
        assert_eq!((starts % 2, shown.matches(END).count()), (0, starts / 2), "{shown:?}");
        assert!(shown.contains("\x1b[30;42m NEW_USER \x1b[0m") && shown.contains("hi there"), "{shown:?}");
        assert!(!shown.contains("\x1b[31m") && !shown.contains('\u{202e}'), "{shown:?}");
    }

    #[test]
    fn what_happened_is_told_in_words() {
        for (kind, rest, told) in [
            (
                "external.chat.moderation.v1",
                r#""payload":{"action":"ban","targetLogin":"x"}"#,
                "* x was banned",
            ),
            (
                "external.chat.moderation.v1",
                r#""payload":{"action":"timeout","targetLogin":"x","durationSeconds":60}"#,
                "* x was timed out for 60 s",
            ),
            ("external.chat.moderation.v1", r#""payload":{"action":"clear"}"#, "* the chat was cleared"),
            (
                "external.chat.moderation.v1",
                r#""payload":{"action":"delete","targetLogin":"x"}"#,
                "* a message of x was deleted",
            ),
            (
                "external.chat.notice.v1",
                r#""payload":{"kind":"raid","systemText":"9 raiders"}"#,
                "* 9 raiders",
            ),
            (
                "external.chat.notice.v1",
                r#""user":{"displayName":"N"},"payload":{"kind":"announcement","systemText":"","text":"news"}"#,
                "* announcement N: news",
            ),
            (
                "internal.source.gap.v1",
                r#""payload":{"from":"2026-11-20T05:51:18.001Z","cause":"silence"}"#,
                "* not heard since 2026-11-20T05:51:18.001Z (silence)",
            ),
        ] {
            assert_eq!(printer(false, false).readable(&event(kind, rest)), format!("05:51:20 #c {told}"));
        }
        let dead = b"{\"type\":\"internal.deadletter.v1\",\"reason\":\"too_large\"}";
        assert_eq!(printer(false, false).readable(dead), "--:--:-- dead letter: too_large");
        assert_eq!(printer(false, false).readable(b"\x1b"), "? ");
    }

    #[test]
    fn a_long_text_is_cut_at_a_terminal_alone() {
        let long = "é".repeat(TERMINAL_LETTERS + 1);
        let said = event("external.chat.message.v1", &format!(r#""payload":{{"text":"{long}"}}"#));
        assert!(printer(false, false).readable(&said).ends_with(&long));
        let shown = printer(true, false).readable(&said);
        assert!(shown.ends_with(&format!("{}…", &long[..long.len() - 'é'.len_utf8()])), "{shown}");
    }

    #[test]
    fn at_a_terminal_names_stand_in_one_column() {
        let mut printer = printer(true, false);
        let said = |channel: &str| {
            format!(
                r#"{{"type":"external.chat.message.v1","source":{{"channel":"{channel}"}},
                "user":{{"displayName":"N"}},"payload":{{"text":"t"}}}}"#
            )
        };
        assert_eq!(printer.readable(said("long_name").as_bytes()), "--:--:-- #long_name N: t");
        assert_eq!(printer.readable(said("c").as_bytes()), "--:--:-- #c         N: t");
    }
}
