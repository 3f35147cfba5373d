//! Captured lines, sent again: by default as if they were said now.
//!
//! A line is taken apart by position (tags, prefix, command, first parameter), never by search: viewers type raw IRC.
//! Only what has to change is changed; every other byte goes out as it was captured, valid or not.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek};
use std::path::Path;

use bytes::{BufMut, BytesMut};

use super::chat::put_id;
use super::lines::{LineKind, Lines, Mark};
use super::parts::parts;
use super::people::room_id;

/// A longer line is taken apart into several: no capture can make the simulator grow.
const MAX_LINE_BYTES: u64 = 1024 * 1024;
/// Commands that Twitch sends only to those who asked for them.
const NEED_COMMANDS: [&[u8]; 8] = [
    b"CLEARCHAT",
    b"CLEARMSG",
    b"GLOBALUSERSTATE",
    b"NOTICE",
    b"RECONNECT",
    b"ROOMSTATE",
    b"USERNOTICE",
    b"USERSTATE",
];

/// The lines of a file, over and over while more are wanted.
pub(super) struct Replay {
    file: BufReader<File>,
    rng: fastrand::Rng,
    /// Where to send the lines; empty: to the channels they name.
    channels: Vec<String>,
    next_channel: usize,
    keep_ids: bool,
    /// Begins again at the file's end.
    again: bool,
    line: Vec<u8>,
}

impl Replay {
    pub(super) fn open(path: &Path, channels: &[String], seed: u64) -> io::Result<Self> {
        Ok(Self {
            file: BufReader::with_capacity(256 * 1024, File::open(path)?),
            rng: fastrand::Rng::with_seed(seed),
            channels: channels.to_vec(),
            next_channel: 0,
            keep_ids: false,
            again: false,
            line: Vec::new(),
        })
    }

    /// Leaves `id` and `tmi-sent-ts` as they were captured.
    pub(super) fn keep_ids(mut self, keep: bool) -> Self {
        self.keep_ids = keep;
        self
    }

    /// Begins again at the file's end.
    pub(super) fn again(mut self, again: bool) -> Self {
        self.again = again;
        self
    }

    /// Appends up to `count` lines; fewer at the end.
    pub(super) fn fill(&mut self, count: u64, now: &str, lines: &mut Lines) -> io::Result<u64> {
        let mut made = 0;
        let mut empty_pass = false;
        while made < count {
            if self.next_line()? {
                empty_pass = false;
                if !self.line.is_empty() {
                    self.append(now, lines);
                    made += 1;
                }
            } else if self.again && !empty_pass {
                self.file.rewind()?;
                empty_pass = true;
            } else {
                break;
            }
        }
        Ok(made)
    }

    /// Reads a line, without its end, into `self.line`; false at the end of the file.
    fn next_line(&mut self) -> io::Result<bool> {
        loop {
            self.line.clear();
            if self.file.by_ref().take(MAX_LINE_BYTES).read_until(b'\n', &mut self.line)? == 0 {
                return Ok(false);
            }
            while self.line.last().is_some_and(|byte| matches!(byte, b'\r' | b'\n')) {
                self.line.pop();
            }
            if !self.line.is_empty() {
                return Ok(true);
            }
        }
    }

    fn append(&mut self, now: &str, lines: &mut Lines) {
        let line = &self.line;
        let parts = parts(line);
        let target = match &parts.channel {
            Some(_) if !self.channels.is_empty() => {
                let target = self.channels[self.next_channel].clone();
                self.next_channel = (self.next_channel + 1) % self.channels.len();
                Some(target)
            }
            _ => None,
        };
        let slot = match (&target, &parts.channel) {
            (Some(target), _) => lines.slot(target),
            (None, Some(channel)) => {
                lines.slot(&String::from_utf8_lossy(&line[channel.clone()]).to_lowercase())
            }
            (None, None) => lines.slot(""),
        };
        let out = lines.buffer(slot);
        let mut mark = Mark::default();
        if !parts.tags.is_empty() {
            out.put_u8(b'@');
            let fresh = Fresh { now: (!self.keep_ids).then_some(now), channel: target.as_deref() };
            mark = put_tags(&line[parts.tags.clone()], &fresh, &mut self.rng, out);
        }
        mark.kind = LineKind::of_command(&line[parts.command.clone()]);
        mark.needs_commands = NEED_COMMANDS.contains(&&line[parts.command]);
        let rest = parts.tags.end;
        match (target, parts.channel) {
            (Some(target), Some(channel)) => {
                out.put_slice(&line[rest..channel.start]);
                out.put_slice(target.as_bytes());
                out.put_slice(&line[channel.end..]);
            }
            _ => out.put_slice(&line[rest..]),
        }
        out.put_slice(b"\r\n");
        lines.mark(slot, mark);
    }
}

/// What is renewed in a line's tags.
struct Fresh<'a> {
    /// The time to write, with a new id; `None`: both are kept.
    now: Option<&'a str>,
    /// The channel whose room the line is moved to.
    channel: Option<&'a str>,
}

/// Writes the tags in their order; only tags that are there are renewed, none is added.
fn put_tags(tags: &[u8], fresh: &Fresh<'_>, rng: &mut fastrand::Rng, out: &mut BytesMut) -> Mark {
    let mut mark = Mark::default();
    for (nth, tag) in tags.split(|&byte| byte == b';').enumerate() {
        if nth > 0 {
            out.put_u8(b';');
        }
        let equals = memchr::memchr(b'=', tag);
        let (key, value) = equals.map_or((tag, &tag[tag.len()..]), |at| (&tag[..at], &tag[at + 1..]));
        out.put_slice(key);
        if equals.is_some() {
            out.put_u8(b'=');
        }
        let start = out.len();
        match (key, fresh.now, fresh.channel) {
            (b"id", Some(_), _) if !value.is_empty() => put_id(rng, out),
            (b"tmi-sent-ts", Some(now), _) if !value.is_empty() => out.put_slice(now.as_bytes()),
            (b"room-id", _, Some(channel)) => out.put_slice(room_id(channel).to_string().as_bytes()),
            _ => out.put_slice(value),
        }
        match key {
            b"id" if out.len() > start => mark.id = Some(start..out.len()),
            b"user-id" if out.len() > start => mark.user = Some(start..out.len()),
            b"source-id" if out.len() > start => mark.source = Some(start..out.len()),
            _ => {}
        }
    }
    mark
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::sim::lines::Chunk;

    const LINE: &str = "@badge-info=;id=old;room-id=1;tmi-sent-ts=5;user-id=42 \
                        :a!a@a.tmi.twitch.tv PRIVMSG #There :@id=x PRIVMSG #else :hi";

    fn replay(
        lines: &[&[u8]],
        set: impl FnOnce(Replay) -> Replay,
        channels: &[&str],
        count: u64,
    ) -> Vec<Chunk> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&lines.join(&b"\r\n"[..])).unwrap();
        let channels: Vec<String> = channels.iter().map(|&name| name.to_owned()).collect();
        let mut replay = set(Replay::open(file.path(), &channels, 1).unwrap());
        let mut batch = Lines::default();
        replay.fill(count, "1700000000000", &mut batch).unwrap();
        batch.drain()
    }

    #[test]
    fn id_and_time_are_new_and_nothing_else() {
        let chunks = replay(&[LINE.as_bytes()], |replay| replay, &[], 10);
        assert_eq!(&*chunks[0].channel, "there");
        let mark = &chunks[0].marks[0];
        let text = String::from_utf8(chunks[0].bytes.to_vec()).unwrap();
        let id = &text[mark.id.clone().unwrap()];
        assert_eq!(uuid::Uuid::parse_str(id).unwrap().get_version_num(), 4);
        assert_eq!(&text[mark.user.clone().unwrap()], "42");
        let wanted = LINE.replace("id=old", &format!("id={id}")).replace("ts=5", "ts=1700000000000");
        assert_eq!(text, wanted + "\r\n");
    }

    #[test]
    fn kept_lines_are_kept_byte_for_byte() {
        let odd: [&[u8]; 5] = [
            LINE.as_bytes(),
            b"@a;id=;b= :x!x@x  PRIVMSG   #c :two  spaces \xff\xfe",
            b":tmi.twitch.tv CLEARCHAT #c :somebody",
            b":!@.tmi.twitch.tv CLEARCHAT c",
            b"@only-tags",
        ];
        for line in odd {
            let chunks = replay(&[line], |replay| replay.keep_ids(true), &[], 10);
            assert_eq!(chunks[0].bytes, [line, b"\r\n"].concat());
            let channel = if line == b"@only-tags" { "" } else { "c" };
            assert!(line == LINE.as_bytes() || &*chunks[0].channel == channel, "{line:?}");
        }
    }

    #[test]
    fn lines_move_to_the_channels_asked_for() {
        let chunks = replay(&[LINE.as_bytes()], |replay| replay.keep_ids(true).again(true), &["a", "b"], 3);
        let wanted = |channel: &str| {
            let room = format!("room-id={}", room_id(channel));
            LINE.replace("room-id=1", &room).replace("#There", &format!("#{channel}")) + "\r\n"
        };
        assert_eq!(chunks[0].bytes, wanted("a").repeat(2));
        assert_eq!(chunks[1].bytes, wanted("b"));
    }

    #[test]
    fn a_file_is_repeated_only_when_asked_and_an_empty_one_ends() {
        let lines: [&[u8]; 3] = [b"PRIVMSG #c :1", b"", b"PRIVMSG #c :2"];
        assert_eq!(replay(&lines, |replay| replay, &[], 10)[0].marks.len(), 2);
        assert_eq!(replay(&lines, |replay| replay.again(true), &[], 10)[0].marks.len(), 10);
        assert!(replay(&[b"", b""], |replay| replay.again(true), &[], 10).is_empty());
    }
}
