//! One line, parsed. The grammar is `twitch-irc`'s; what real lines do to it is dealt with here.

use std::borrow::Cow;
use std::collections::HashMap;

use twitch_irc::message::{IRCMessage, IRCPrefix};

/// A line of IRC.
#[derive(Debug)]
pub(super) struct Parsed {
    pub(super) command: String,
    pub(super) params: Vec<String>,
    /// Unescaped; the last of repeated keys.
    pub(super) tags: HashMap<String, String>,
    pub(super) prefix: Option<IRCPrefix>,
}

impl Parsed {
    /// A tag's value, if it is there and not empty.
    pub(super) fn tag(&self, key: &str) -> Option<&str> {
        self.tags.get(key).map(String::as_str).filter(|value| !value.is_empty())
    }

    /// The nick of the prefix; of a prefix without one, what stands in its place.
    pub(super) fn nick(&self) -> Option<&str> {
        match self.prefix.as_ref()? {
            IRCPrefix::Full { nick, user, .. } => {
                Some(nick.as_str()).filter(|nick| !nick.is_empty()).or(user.as_deref())
            }
            IRCPrefix::HostOnly { .. } => None,
        }
    }
}

/// Parses a line. Double spaces outside the text, seen live, count as one.
pub(super) fn parse(line: &str) -> Option<Parsed> {
    let message = IRCMessage::parse(line).or_else(|_| IRCMessage::parse(&single_spaced(line))).ok()?;
    Some(Parsed { command: message.command, params: message.params, tags: message.tags.0, prefix: message.prefix })
}

/// `line` with runs of spaces before the trailing parameter made one. By position, never by search: a viewer's
/// text may hold anything.
fn single_spaced(line: &str) -> String {
    let mut spaced = String::with_capacity(line.len());
    let mut rest = line.trim_start_matches(' ');
    // Tags and prefix come before the command, in this order, each at most once.
    for sign in ['@', ':'] {
        if rest.starts_with(sign) {
            let (part, behind) = rest.split_once(' ').unwrap_or((rest, ""));
            spaced.push_str(part);
            spaced.push(' ');
            rest = behind.trim_start_matches(' ');
        }
    }
    loop {
        if rest.starts_with(':') {
            spaced.push_str(rest);
            return spaced;
        }
        let (part, behind) = rest.split_once(' ').unwrap_or((rest, ""));
        spaced.push_str(part);
        rest = behind.trim_start_matches(' ');
        if rest.is_empty() {
            return spaced;
        }
        spaced.push(' ');
    }
}

/// The tags as they stand on the wire, still escaped, a key without a value as an empty one; the last of
/// repeated keys, sorted.
pub(super) fn wire_tags(line: &str) -> Vec<(&str, &str)> {
    let Some(tags) = line.trim_start_matches(' ').strip_prefix('@').and_then(|rest| rest.split(' ').next()) else {
        return Vec::new();
    };
    let mut last: HashMap<&str, &str> = HashMap::new();
    for tag in tags.split(';').filter(|tag| !tag.is_empty()) {
        let (key, value) = tag.split_once('=').unwrap_or((tag, ""));
        last.insert(key, value);
    }
    let mut sorted: Vec<_> = last.into_iter().collect();
    sorted.sort_unstable();
    sorted
}

/// The bytes as text; what is no UTF-8 is replaced, and whether there was any.
pub(super) fn text(line: &[u8]) -> (Cow<'_, str>, bool) {
    let text = String::from_utf8_lossy(line);
    let is_replaced = matches!(text, Cow::Owned(_));
    (text, is_replaced)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn double_spaces_outside_the_text_count_as_one() {
        for line in ["  @a=b  :n!u@h   PRIVMSG  #c   :two  spaces", "@a=b :n!u@h PRIVMSG #c :two  spaces"] {
            let parsed = parse(line).unwrap();
            assert_eq!(parsed.command, "PRIVMSG");
            assert_eq!(parsed.params, ["#c", "two  spaces"]);
            assert_eq!((parsed.tag("a"), parsed.nick()), (Some("b"), Some("n")));
        }
        assert_eq!(parse("PING  ").unwrap().command, "PING");
        assert_eq!(parse(":h  CLEARCHAT  #c  name").unwrap().params, ["#c", "name"]);
    }

    #[test]
    fn what_is_no_irc_is_refused() {
        for line in ["", " ", "@", "@a", ":", ":x", "P!NG", "1A2", "@a=b :x"] {
            assert!(parse(line).is_none(), "{line:?}");
        }
    }

    #[test]
    fn values_are_unescaped_and_the_last_of_repeated_keys_counts() {
        let parsed = parse(r"@a=1;b=\:\s\\\r\n;c;d=;a=2;e=x\;f=\z PING").unwrap();
        let tags = |key: &str| parsed.tags.get(key).map(String::as_str);
        assert_eq!((tags("a"), tags("b"), tags("c"), tags("d")), (Some("2"), Some("; \\\r\n"), Some(""), Some("")));
        assert_eq!((tags("e"), tags("f")), (Some("x"), Some("z")));
        assert_eq!(wire_tags(r"@b=\s;a=1;c;a=2 PING"), [("a", "2"), ("b", r"\s"), ("c", "")]);
        assert!(wire_tags("PING").is_empty());
    }

    #[test]
    fn the_nick_is_found_or_made_up_for() {
        for (line, nick) in [
            (":n!u@h X", Some("n")),
            (":!u@u.tmi.twitch.tv X", Some("u")),
            (":tmi.twitch.tv X", None),
            ("X", None),
        ] {
            assert_eq!(parse(line).unwrap().nick(), nick, "{line}");
        }
    }
}
