//! Lines that no client should fall over: some seen live, some that only a broken proxy would send.
//!
//! Each carries a number of its own, so that each can be told from all the others; an empty line cannot.

use bytes::{BufMut, BytesMut};

use super::chat::put_id;
use super::lines::{Chunk, LineKind, Lines, Mark};
use super::people::room_id;

/// Longer than the longest line a reader has to take.
const TOO_LONG_BYTES: usize = 70 * 1024;

/// The forms there are, in the order they come in.
const FORMS: [Form; 16] = [
    Form::NoHash,
    Form::NoBadges,
    Form::NoRoom,
    Form::NoId,
    Form::EmotesPastTheEnd,
    Form::EmotesBackwards,
    Form::NotUtf8,
    Form::DoubleSpaces,
    Form::BadTime,
    Form::NoText,
    Form::Unknown,
    Form::NoIrc,
    Form::OnlyTags,
    Form::OnlyPrefix,
    Form::TooLong,
    Form::Empty,
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    /// As seen live: `:!@.tmi.twitch.tv CLEARCHAT name`.
    NoHash,
    /// As old captures have it: no `badge-info`.
    NoBadges,
    NoRoom,
    NoId,
    EmotesPastTheEnd,
    EmotesBackwards,
    NotUtf8,
    DoubleSpaces,
    BadTime,
    /// PRIVMSG without its second parameter.
    NoText,
    /// A command that nobody knows.
    Unknown,
    NoIrc,
    OnlyTags,
    OnlyPrefix,
    TooLong,
    Empty,
}

/// Makes them.
#[derive(Debug)]
pub(super) struct BadLines {
    rng: fastrand::Rng,
    made: usize,
    /// Thousandths of a line that are due.
    due: u64,
}

impl BadLines {
    pub(super) fn new(seed: u64) -> Self {
        Self { rng: fastrand::Rng::with_seed(seed ^ 0xbad), made: 0, due: 0 }
    }

    /// Adds to `lines`, of which `count` are new, so many bad ones in a thousand.
    pub(super) fn mix_in(&mut self, permille: u64, count: u64, lines: &mut Lines) {
        if permille == 0 {
            return;
        }
        self.due += count * permille;
        let slots = lines.filled();
        while self.due >= 1_000 && !slots.is_empty() {
            self.due -= 1_000;
            let slot = slots[self.rng.usize(..slots.len())];
            self.append(slot, lines);
        }
    }

    /// One of each form, for this channel.
    pub(super) fn one_of_each(&mut self, channel: &str) -> Vec<Chunk> {
        let mut lines = Lines::default();
        let slot = lines.slot(channel);
        for _ in FORMS {
            self.append(slot, &mut lines);
        }
        lines.drain()
    }

    fn append(&mut self, slot: usize, lines: &mut Lines) {
        let form = FORMS[self.made % FORMS.len()];
        let channel = lines.channel(slot);
        let mark = self.write(form, &channel, lines.buffer(slot));
        self.made += 1;
        lines.mark(slot, mark);
    }

    fn write(&mut self, form: Form, channel: &str, out: &mut BytesMut) -> Mark {
        let number = format!("{:08x}{}", self.rng.u32(..), self.made);
        let room = room_id(channel);
        let mut mark = Mark { kind: LineKind::Bad, ..Mark::default() };
        match form {
            Form::NoHash => {
                mark.kind = LineKind::Moderation;
                mark.needs_commands = true;
                out.put_slice(format!("@nth={number} :!@.tmi.twitch.tv CLEARCHAT {channel}").as_bytes());
            }
            Form::Unknown => {
                mark.kind = LineKind::Other;
                out.put_slice(format!(":tmi.twitch.tv WHATEVER #{channel} :{number}").as_bytes());
            }
            Form::NoText => out.put_slice(format!("@nth={number} :n!n@n PRIVMSG #{channel}").as_bytes()),
            Form::NoIrc => out.put_slice(format!("\x00\x01<html>{number}</html>").as_bytes()),
            Form::OnlyTags => out.put_slice(format!("@id={number};room-id={room}").as_bytes()),
            Form::OnlyPrefix => out.put_slice(format!(":tmi.{number}.tv").as_bytes()),
            Form::TooLong => {
                out.put_slice(format!(":n!n@n PRIVMSG #{channel} :{number} ").as_bytes());
                out.put_bytes(b'x', TOO_LONG_BYTES);
            }
            Form::Empty => mark.kind = LineKind::Empty,
            _ => self.message(form, (channel, room), out, &mut mark),
        }
        out.put_slice(b"\r\n");
        mark
    }

    /// A message that can be read, with something wrong about it.
    fn message(&mut self, form: Form, (channel, room): (&str, u64), out: &mut BytesMut, mark: &mut Mark) {
        mark.kind = LineKind::Message;
        out.put_u8(b'@');
        if form != Form::NoBadges {
            out.put_slice(b"badge-info=;badges=;");
        }
        out.put_slice(b"display-name=Odd;emotes=");
        out.put_slice(match form {
            Form::EmotesPastTheEnd => b"25:2-600;",
            Form::EmotesBackwards => b"25:9-3,4294967295-0;",
            _ => b";",
        });
        if form != Form::NoId {
            out.put_slice(b"id=");
            let from = out.len();
            put_id(&mut self.rng, out);
            mark.id = Some(from..out.len());
            out.put_u8(b';');
        }
        if form != Form::NoRoom {
            out.put_slice(format!("room-id={room};").as_bytes());
        }
        if form == Form::BadTime {
            out.put_slice(b"tmi-sent-ts=yesterday;");
        }
        out.put_slice(b"user-id=");
        let from = out.len();
        out.put_slice(b"9999999");
        mark.user = Some(from..out.len());
        let gap = if form == Form::DoubleSpaces { "  " } else { " " };
        out.put_slice(format!("{gap}:odd!odd@odd.tmi.twitch.tv{gap}PRIVMSG{gap}#{channel}{gap}:").as_bytes());
        out.put_slice(format!("odd {:016x}", self.rng.u64(..)).as_bytes());
        if form == Form::NotUtf8 {
            out.put_slice(b" \xff\xfe \xf0\x9f\x98");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn one_of_each_and_each_its_own() {
        let mut bad = BadLines::new(1);
        let chunks = [bad.one_of_each("a"), bad.one_of_each("a")].concat();
        let lines = |chunk: &Chunk| -> Vec<Vec<u8>> {
            chunk.marks.iter().map(|mark| chunk.bytes[mark.line.clone()].to_vec()).collect()
        };
        let all: Vec<_> = chunks.iter().flat_map(lines).collect();
        assert_eq!(all.len(), 2 * FORMS.len());
        assert_eq!(all.iter().collect::<BTreeSet<_>>().len(), all.len() - 1, "only empty lines are alike");
        assert!(
            all.iter()
                .all(|line| line.ends_with(b"\r\n") && memchr::memchr(b'\n', line) == Some(line.len() - 1))
        );
        assert!(
            all.iter().any(|line| line.len() > 65_536)
                && all.iter().any(|line| std::str::from_utf8(line).is_err())
        );
        for mark in chunks[0].marks.iter().filter(|mark| mark.kind == LineKind::Message) {
            assert_eq!(&chunks[0].bytes[mark.user.clone().unwrap()], b"9999999");
        }
    }

    #[test]
    fn as_many_as_asked_for() {
        let (mut bad, mut lines) = (BadLines::new(1), Lines::default());
        for _ in 0..1_000 {
            let slot = lines.slot("a");
            lines.buffer(slot).extend_from_slice(b"x\r\n");
            lines.mark(slot, Mark::default());
            bad.mix_in(25, 1, &mut lines);
        }
        assert_eq!(lines.drain()[0].marks.len(), 1_025);
    }
}
