//! One line, parsed. The grammar of the message is `twitch-irc`'s. The tags in front of it are cut here, by
//! position and without a copy: the crate makes a map of owned strings of them, which took a third of the whole
//! path's time (see `docs/adr`).

use std::borrow::Cow;

use twitch_irc::message::{IRCMessage, IRCPrefix};

/// A chat line has about so many.
const USUAL_TAGS: usize = 24;

/// A line of IRC.
#[derive(Debug)]
pub(super) struct Parsed<'a> {
    pub(super) command: String,
    pub(super) params: Vec<String>,
    pub(super) tags: Tags<'a>,
    pub(super) prefix: Option<IRCPrefix>,
}

impl Parsed<'_> {
    /// A tag's value, if it is there and not empty.
    pub(super) fn tag(&self, key: &str) -> Option<&str> {
        self.tags.get(key).filter(|value| !value.is_empty())
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

/// A line's tags, sorted by key; the last of repeated keys.
#[derive(Debug, Default)]
pub(super) struct Tags<'a> {
    unescaped: Vec<(&'a str, Cow<'a, str>)>,
}

impl<'a> Tags<'a> {
    fn parse(tags: &'a str) -> Self {
        let sorted = sorted_tags(tags);
        Self { unescaped: sorted.into_iter().map(|(key, value)| (key, unescape(value))).collect() }
    }

    /// A tag's value; empty for a tag without one.
    pub(super) fn get(&self, key: &str) -> Option<&str> {
        let index = self.unescaped.binary_search_by(|(other, _)| (*other).cmp(key)).ok()?;
        Some(&self.unescaped[index].1)
    }

    /// All of them, in order.
    pub(super) fn all(&self) -> &[(&'a str, Cow<'a, str>)] {
        &self.unescaped
    }
}

/// A value as it was meant: `\:` is `;`, `\s` a space, `\r` and `\n` the ends of a line; in front of anything else
/// the backslash only vanishes, and so does one at the end.
fn unescape(value: &str) -> Cow<'_, str> {
    if memchr::memchr(b'\\', value.as_bytes()).is_none() {
        return Cow::Borrowed(value);
    }
    let mut unescaped = String::with_capacity(value.len());
    let mut letters = value.chars();
    while let Some(letter) = letters.next() {
        match letter {
            '\\' => unescaped.extend(letters.next().map(|escaped| match escaped {
                ':' => ';',
                's' => ' ',
                'r' => '\r',
                'n' => '\n',
                other => other,
            })),
            other => unescaped.push(other),
        }
    }
    Cow::Owned(unescaped)
}

/// Parses a line. Double spaces outside the text, seen live, count as one.
pub(super) fn parse(line: &str) -> Option<Parsed<'_>> {
    let line = line.trim_start_matches(' ');
    let (tags, rest) = match line.strip_prefix('@') {
        Some(tagged) => {
            tagged.split_once(' ').filter(|(tags, _)| !tags.is_empty() && !tags.contains('\r'))?
        }
        None => ("", line),
    };
    let message = IRCMessage::parse(rest).or_else(|_| IRCMessage::parse(&single_spaced(rest))).ok()?;
    let tags = Tags::parse(tags);
    // A second block of tags is none: what stands there is no command.
    message.tags.0.is_empty().then_some(Parsed {
        command: message.command,
        params: message.params,
        tags,
        prefix: message.prefix,
    })
}

/// `line`, without its tags, with runs of spaces before the trailing parameter made one. By position, never by search: a viewer's
/// text may hold anything.
fn single_spaced(line: &str) -> String {
    let mut spaced = String::with_capacity(line.len());
    let mut rest = line.trim_start_matches(' ');
    // The prefix, if there is one, begins like a text.
    if rest.starts_with(':') {
        let (prefix, behind) = rest.split_once(' ').unwrap_or((rest, ""));
        spaced.push_str(prefix);
        spaced.push(' ');
        rest = behind.trim_start_matches(' ');
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

/// The tags of a line as they stand on the wire, still escaped.
pub(super) fn wire_tags(line: &str) -> Vec<(&str, &str)> {
    let tags = line.trim_start_matches(' ').strip_prefix('@').and_then(|rest| rest.split(' ').next());
    sorted_tags(tags.unwrap_or_default())
}

/// Keys and values, a key without a value with an empty one; sorted, the last of repeated keys.
fn sorted_tags(tags: &str) -> Vec<(&str, &str)> {
    let mut sorted = Vec::with_capacity(USUAL_TAGS);
    let mut start = 0;
    for end in memchr::memchr_iter(b';', tags.as_bytes()).chain([tags.len()]) {
        let tag = &tags[std::mem::replace(&mut start, end + 1)..end];
        if !tag.is_empty() {
            let (key, value) = match memchr::memchr(b'=', tag.as_bytes()) {
                Some(at) => (&tag[..at], &tag[at + 1..]),
                None => (tag, ""),
            };
            sorted.push((key, value));
        }
    }
    // Stable, so that of equal keys the last one comes last.
    sorted.sort_by_key(|(key, _)| *key);
    sorted.dedup_by(|later, earlier| {
        let is_repeated = later.0 == earlier.0;
        if is_repeated {
            earlier.1 = later.1;
        }
        is_repeated
    });
    sorted
}

/// The bytes as text; what is no UTF-8 is replaced, and whether there was any.
pub(super) fn text(line: &[u8]) -> (Cow<'_, str>, bool) {
    match std::str::from_utf8(line) {
        Ok(text) => (Cow::Borrowed(text), false),
        Err(_) => (Cow::Owned(String::from_utf8_lossy(line).into_owned()), true),
    }
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
        for line in [
            "",
            " ",
            "@",
            "@a",
            "@ PING",
            "@a=b @c=d PING",
            ":",
            ":x",
            "P!NG",
            "1A2",
            "@a=b :x",
            "@a=\r PING",
            "A\rB",
        ] {
            assert!(parse(line).is_none(), "{line:?}");
        }
    }

    #[test]
    fn values_are_unescaped_and_the_last_of_repeated_keys_counts() {
        let parsed = parse(r"@a=1;b=\:\s\\\r\n;c;d=;a=2;e=x\;f=\z PING").unwrap();
        let tags = |key: &str| parsed.tags.get(key);
        assert_eq!(
            (tags("a"), tags("b"), tags("c"), tags("d")),
            (Some("2"), Some("; \\\r\n"), Some(""), Some(""))
        );
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
