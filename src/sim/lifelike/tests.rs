//! Lifelike chat holds together: what refers to something refers to what was there.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::*;
use crate::sim::lines::LineKind;
use crate::sim::words::EMOTES;

const COUNT: usize = 30_000;

/// A line taken apart, well enough for lines that are known to be whole.
struct Read {
    tags: BTreeMap<String, String>,
    login: String,
    command: String,
    channel: String,
    text: Option<String>,
    kind: LineKind,
}

fn unescaped(value: &str) -> String {
    let mut plain = String::new();
    let mut chars = value.chars();
    while let Some(char) = chars.next() {
        plain.push(match char {
            '\\' => match chars.next().unwrap() {
                ':' => ';',
                's' => ' ',
                'r' => '\r',
                'n' => '\n',
                other => other,
            },
            other => other,
        });
    }
    plain
}

fn read(line: &str, kind: LineKind) -> Read {
    let (tags, rest) = line.strip_prefix('@').unwrap().split_once(' ').unwrap();
    let keys: Vec<_> = tags.split(';').map(|tag| tag.split_once('=').unwrap().0).collect();
    assert!(keys.is_sorted() && keys.iter().collect::<BTreeSet<_>>().len() == keys.len(), "{line}");
    let tags = tags.split(';').map(|tag| tag.split_once('=').unwrap());
    let tags = tags.map(|(key, value)| (key.to_owned(), unescaped(value))).collect();
    let (prefix, rest) = rest.strip_prefix(':').unwrap().split_once(' ').unwrap();
    let (middle, text) = match rest.split_once(" :") {
        Some((middle, text)) => (middle, Some(text.to_owned())),
        None => (rest, None),
    };
    let (command, channel) = middle.split_once(" #").unwrap();
    Read {
        tags,
        login: prefix.split('!').next().unwrap().to_owned(),
        command: command.to_owned(),
        channel: channel.to_owned(),
        text,
        kind,
    }
}

/// A channel's lines: their bytes, and of each its end and kind.
type Generated = (Vec<u8>, Vec<(usize, LineKind)>);

/// The lines of each channel, made in batches of so many.
fn generate(seed: u64, count: usize, batch: usize) -> BTreeMap<String, Generated> {
    let channels = ["one", "two", "three"].map(str::to_owned);
    let mut chat = Lifelike::new(&ChatPlan { channels: &channels, users: 5_000, zipf: 1.0, seed });
    let (mut lines, mut all) = (Lines::default(), BTreeMap::<String, Generated>::new());
    let mut left = count;
    while left > 0 {
        let now = batch.min(left);
        chat.fill(now, "1700000000000", &mut lines);
        for chunk in lines.drain() {
            let (bytes, ends) = all.entry(chunk.channel.to_string()).or_default();
            ends.extend(chunk.marks.iter().map(|mark| (bytes.len() + mark.line.end, mark.kind)));
            bytes.extend_from_slice(&chunk.bytes);
        }
        left -= now;
    }
    all
}

fn everything() -> Vec<Read> {
    let mut read_lines = Vec::new();
    for (bytes, ends) in generate(7, COUNT, 100).values() {
        let mut from = 0;
        for (end, kind) in ends {
            let line = std::str::from_utf8(&bytes[from..*end]).unwrap();
            assert_eq!(line.find("\r\n"), Some(line.len() - 2), "one line: {line:?}");
            read_lines.push(read(&line[..line.len() - 2], *kind));
            from = *end;
        }
    }
    assert_eq!(read_lines.len(), COUNT);
    read_lines
}

#[test]
fn the_same_seed_makes_the_same_chat_however_it_is_asked_for() {
    assert_eq!(generate(1, 5_000, 1), generate(1, 5_000, 512));
    assert_ne!(generate(1, 5_000, 512), generate(2, 5_000, 512));
}

#[test]
fn everything_happens_in_plausible_proportions() {
    let lines = everything();
    let mut seen = HashMap::<&str, usize>::new();
    for line in &lines {
        let tag = |key| line.tags.get(key).map_or("", |value| value.as_str());
        *seen.entry(&line.command).or_default() += 1;
        *seen.entry(tag("msg-id")).or_default() += 1;
        for key in ["reply-parent-msg-id", "source-id", "bits", "ban-duration", "emote-only", "vip"] {
            *seen.entry(key).or_default() += usize::from(line.tags.contains_key(key));
        }
        for key in ["first-msg", "returning-chatter", "mod", "subscriber"] {
            *seen.entry(key).or_default() += usize::from(tag(key) == "1");
        }
        let action = line.text.as_deref().is_some_and(|text| text.starts_with("\u{1}ACTION "));
        *seen.entry("action").or_default() += usize::from(action);
        *seen.entry("owner").or_default() += usize::from(tag("badges").starts_with("broadcaster/1"));
        let ban =
            line.command == "CLEARCHAT" && line.text.is_some() && !line.tags.contains_key("ban-duration");
        *seen.entry("ban").or_default() += usize::from(ban);
        *seen.entry("clear").or_default() += usize::from(line.command == "CLEARCHAT" && line.text.is_none());
        assert_eq!(line.kind, LineKind::of_command(line.command.as_bytes()));
    }
    let messages = seen["PRIVMSG"];
    assert!((COUNT * 97 / 100..COUNT * 995 / 1_000).contains(&messages), "{messages}");
    for what in [
        "sub",
        "resub",
        "subgift",
        "submysterygift",
        "raid",
        "announcement",
        "viewermilestone",
        "somethingnew",
        "giftpaidupgrade",
        "sharedchatnotice",
        "CLEARMSG",
        "ban-duration",
        "ban",
        "clear",
        "NOTICE",
        "ROOMSTATE",
        "reply-parent-msg-id",
        "source-id",
        "bits",
        "emote-only",
        "vip",
        "first-msg",
        "returning-chatter",
        "mod",
        "subscriber",
        "action",
        "owner",
    ] {
        assert!(seen.get(what).is_some_and(|&count| count > 0), "never: {what}");
    }
}

#[test]
fn channels_are_uneven_and_viewers_change() {
    let lines = everything();
    let of = |channel: &str| lines.iter().filter(|line| line.channel == channel).count();
    assert!(of("one") > of("two") && of("two") > of("three"), "uneven channels");
    let mut names = HashMap::<&str, BTreeSet<(&str, &str)>>::new();
    for line in lines.iter().filter(|line| line.command == "PRIVMSG") {
        names.entry(&line.tags["user-id"]).or_default().insert((&line.login, &line.tags["display-name"]));
    }
    assert!(names.values().filter(|names| names.len() > 1).count() > 2, "nobody took another name");
}

#[test]
fn ids_are_unique_and_references_hold() {
    let lines = everything();
    let mut ids = HashMap::new();
    for line in &lines {
        if let Some(id) = line.tags.get("id") {
            assert_eq!(uuid::Uuid::parse_str(id).unwrap().get_version_num(), 4);
            assert!(ids.insert(id.as_str(), line).is_none(), "twice: {id}");
            assert_eq!(line.tags["room-id"], room_id(&line.channel).to_string());
        }
    }
    let mut deleted = BTreeSet::new();
    for line in &lines {
        let tag = |key| line.tags.get(key).map(String::as_str);
        if let Some(parent) = tag("reply-parent-msg-id").map(|id| ids[id]) {
            assert_eq!(tag("reply-parent-user-id"), Some(parent.tags["user-id"].as_str()));
            let of_room = tag("source-room-id").or(tag("room-id"));
            let there = parent.tags.get("source-room-id").unwrap_or(&parent.tags["room-id"]);
            assert_eq!(of_room, Some(there.as_str()));
            assert!(ids.contains_key(tag("reply-thread-parent-msg-id").unwrap()));
        }
        if let Some(target) = tag("target-msg-id") {
            assert!(deleted.insert(target), "deleted twice");
            assert_eq!(ids[target].channel, line.channel);
            assert_eq!(tag("login"), Some(ids[target].login.as_str()));
        }
        if let Some(source) = tag("source-id") {
            let origin = ids[source];
            let own = tag("id") == Some(source);
            assert_eq!(own, tag("source-room-id") == tag("room-id"));
            assert_eq!(origin.text, line.text);
            assert!(own || line.command == "PRIVMSG" || tag("msg-id") == Some("sharedchatnotice"));
        }
    }
}

#[test]
fn emotes_stand_where_their_tag_says_and_texts_are_not_too_long() {
    let (mut checked, mut longest) = (0, 0);
    for line in everything() {
        let text = line.text.unwrap_or_default();
        let text = text.strip_prefix("\u{1}ACTION ").unwrap_or(&text).trim_end_matches('\u{1}');
        longest = longest.max(text.chars().count());
        let emotes = line.tags.get("emotes").map_or("", String::as_str);
        for emote in emotes.split('/').filter(|emote| !emote.is_empty()) {
            let (id, ranges) = emote.split_once(':').unwrap();
            let code = EMOTES.iter().find(|known| known.0 == id).unwrap().1;
            for range in ranges.split(',') {
                let (from, to) = range.split_once('-').unwrap();
                let (from, to): (usize, usize) = (from.parse().unwrap(), to.parse().unwrap());
                assert_eq!(text.chars().skip(from).take(to - from + 1).collect::<String>(), code, "{text}");
                checked += 1;
            }
        }
    }
    assert!(checked > 8_000, "{checked}");
    assert!((480..600).contains(&longest), "{longest}");
}
