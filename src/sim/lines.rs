//! A batch of chat lines on its way to the connections: per channel one buffer, and where in it the ids stand.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use serde::Serialize;

/// What a line is, as its reader has to count it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum LineKind {
    /// PRIVMSG.
    #[default]
    Message,
    /// USERNOTICE.
    Notice,
    /// CLEARCHAT, CLEARMSG.
    Moderation,
    /// Another command of IRC or of Twitch: no event.
    Other,
    /// Nothing that can be read: no IRC, or too long.
    Bad,
    /// A line end alone.
    Empty,
}

impl LineKind {
    /// The kind of a line with this command.
    pub(super) fn of_command(command: &[u8]) -> Self {
        match command {
            b"PRIVMSG" => Self::Message,
            b"USERNOTICE" => Self::Notice,
            b"CLEARCHAT" | b"CLEARMSG" => Self::Moderation,
            _ => Self::Other,
        }
    }
}

/// The lines of one batch, by channel.
#[derive(Debug, Default)]
pub(super) struct Lines {
    slots: Vec<Slot>,
    by_channel: HashMap<Arc<str>, usize>,
}

#[derive(Debug)]
struct Slot {
    /// Empty: lines that name no channel, for every connection.
    channel: Arc<str>,
    buffer: BytesMut,
    marks: Vec<Mark>,
}

/// One line of a buffer: what it is, and where its identity stands.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Mark {
    pub(super) kind: LineKind,
    /// The bytes of the `user-id` tag's value.
    pub(super) user: Option<Range<usize>>,
    /// The bytes of the `id` tag's value.
    pub(super) id: Option<Range<usize>>,
    /// The bytes of the `source-id` tag's value.
    pub(super) source: Option<Range<usize>>,
    /// Twitch sends it only to those who asked for its commands.
    pub(super) needs_commands: bool,
    /// The line before it once more.
    pub(super) copy: bool,
    /// The whole line with its end. [`Lines::mark`] sets it.
    pub(super) line: Range<usize>,
}

/// The finished lines of one channel.
#[derive(Debug, Clone)]
pub(super) struct Chunk {
    pub(super) channel: Arc<str>,
    /// Whole lines, each ended by CR LF, with their tags.
    pub(super) bytes: Bytes,
    /// One per line.
    pub(super) marks: Arc<[Mark]>,
}

impl Lines {
    /// The slot of `channel`, made when it is new.
    pub(super) fn slot(&mut self, channel: &str) -> usize {
        if let Some(&at) = self.by_channel.get(channel) {
            return at;
        }
        let channel: Arc<str> = channel.into();
        self.by_channel.insert(Arc::clone(&channel), self.slots.len());
        self.slots.push(Slot { channel, buffer: BytesMut::new(), marks: Vec::new() });
        self.slots.len() - 1
    }

    /// The buffer to append a line to. Follow with [`Lines::mark`].
    pub(super) fn buffer(&mut self, slot: usize) -> &mut BytesMut {
        &mut self.slots[slot].buffer
    }

    /// Notes the identity of the line just appended.
    pub(super) fn mark(&mut self, slot: usize, mut mark: Mark) {
        let slot = &mut self.slots[slot];
        let start = slot.marks.last().map_or(0, |last| last.line.end);
        mark.line = start..slot.buffer.len();
        slot.marks.push(mark);
    }

    /// The slots that hold lines now.
    pub(super) fn filled(&self) -> Vec<usize> {
        (0..self.slots.len()).filter(|&slot| !self.slots[slot].marks.is_empty()).collect()
    }

    /// The name of a slot's channel.
    pub(super) fn channel(&self, slot: usize) -> Arc<str> {
        Arc::clone(&self.slots[slot].channel)
    }

    /// Takes what was appended since the last call, channel by channel.
    pub(super) fn drain(&mut self) -> Vec<Chunk> {
        let filled = self.slots.iter_mut().filter(|slot| !slot.marks.is_empty());
        filled
            .map(|slot| Chunk {
                channel: Arc::clone(&slot.channel),
                bytes: slot.buffer.split().freeze(),
                marks: slot.marks.drain(..).collect(),
            })
            .collect()
    }
}

impl Chunk {
    /// The same lines, of which each `every`th stands there twice. `seen` counts lines from chunk to chunk.
    pub(super) fn with_copies(self, every: u64, seen: &mut u64) -> Self {
        let mut bytes = BytesMut::with_capacity(self.bytes.len() * 2);
        let mut marks = Vec::with_capacity(self.marks.len());
        for mark in self.marks.iter() {
            *seen += 1;
            let times = if seen.is_multiple_of(every) { 2 } else { 1 };
            for nth in 0..times {
                // Ranges count from the buffer's start, and each copy moves all that follows.
                let by = bytes.len();
                let moved = |range: &Range<usize>| {
                    range.start - mark.line.start + by..range.end - mark.line.start + by
                };
                bytes.extend_from_slice(&self.bytes[mark.line.clone()]);
                marks.push(Mark {
                    user: mark.user.as_ref().map(moved),
                    id: mark.id.as_ref().map(moved),
                    source: mark.source.as_ref().map(moved),
                    line: by..bytes.len(),
                    copy: nth > 0,
                    ..mark.clone()
                });
            }
        }
        Self { channel: self.channel, bytes: bytes.freeze(), marks: marks.into() }
    }

    /// What one who has, or has not, asked for `tags` and `commands` gets of it, and which of its lines these are.
    pub(super) fn seen_by(&self, tags: bool, commands: bool) -> (Bytes, Arc<[Mark]>) {
        let all = commands || !self.marks.iter().any(|mark| mark.needs_commands);
        if tags && all {
            return (self.bytes.clone(), Arc::clone(&self.marks));
        }
        let shown = |mark: &&Mark| all || !mark.needs_commands;
        let mut bytes = BytesMut::with_capacity(self.bytes.len());
        for mark in self.marks.iter().filter(shown) {
            let line = &self.bytes[mark.line.clone()];
            bytes.extend_from_slice(if tags { line } else { without_tags(line) });
        }
        let marks =
            if all { Arc::clone(&self.marks) } else { self.marks.iter().filter(shown).cloned().collect() };
        (bytes.freeze(), marks)
    }
}

/// A line without its tags, for a connection that did not ask for them.
fn without_tags(line: &[u8]) -> &[u8] {
    let tags = if line.starts_with(b"@") { memchr::memchr(b' ', line).map_or(0, |at| at + 1) } else { 0 };
    &line[tags..]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk(lines: &[(&str, bool)]) -> Chunk {
        let mut batch = Lines::default();
        let slot = batch.slot("a");
        for (line, needs_commands) in lines {
            let from = batch.buffer(slot).len();
            batch.buffer(slot).extend_from_slice(line.as_bytes());
            let id = line.find("id=").map(|at| from + at + 3..from + at + 4);
            batch.mark(slot, Mark { needs_commands: *needs_commands, id, ..Mark::default() });
        }
        batch.drain().remove(0)
    }

    #[test]
    fn each_gets_what_it_asked_for() {
        let lines = [
            ("@id=1;a= :x PRIVMSG #a :@hi there\r\n", false),
            ("@b= :t CLEARCHAT #a\r\n", true),
            (":y PRIVMSG #a :no tags\r\n", false),
        ];
        let chunk = chunk(&lines);
        let all: String = lines.iter().map(|line| line.0).collect();
        assert_eq!(chunk.seen_by(true, true).0, all);
        let (bytes, marks) = chunk.seen_by(false, true);
        assert_eq!(bytes, ":x PRIVMSG #a :@hi there\r\n:t CLEARCHAT #a\r\n:y PRIVMSG #a :no tags\r\n");
        assert_eq!(marks.len(), 3);
        let (bytes, marks) = chunk.seen_by(false, false);
        assert_eq!(bytes, ":x PRIVMSG #a :@hi there\r\n:y PRIVMSG #a :no tags\r\n");
        assert_eq!(marks.len(), 2);
        let (bytes, _) = chunk.seen_by(true, false);
        assert_eq!(bytes, format!("{}{}", lines[0].0, lines[2].0));
    }

    #[test]
    fn every_third_line_comes_twice_with_its_id() {
        let lines: Vec<_> = (0..4).map(|nth| format!("@id={nth} :x PRIVMSG #a :hi\r\n")).collect();
        let lines: Vec<_> = lines.iter().map(|line| (&**line, false)).collect();
        let mut seen = 1;
        let doubled = chunk(&lines).with_copies(3, &mut seen);
        let ids = |chunk: &Chunk| -> Vec<String> {
            let id = |mark: &Mark| chunk.bytes[mark.id.clone().unwrap()].to_vec();
            chunk.marks.iter().map(|mark| String::from_utf8(id(mark)).unwrap()).collect()
        };
        assert_eq!(ids(&doubled), ["0", "1", "1", "2", "3"]);
        assert_eq!(
            doubled.marks.iter().map(|mark| mark.copy).collect::<Vec<_>>(),
            [false, false, true, false, false]
        );
        assert_eq!(seen, 5);
        let again: Vec<_> = doubled.marks.iter().map(|mark| &doubled.bytes[mark.line.clone()]).collect();
        assert_eq!(again.concat(), &doubled.bytes[..]);
        assert_eq!(again[1], again[2]);
    }

    #[test]
    fn a_batch_is_kept_apart_by_channel() {
        let mut lines = Lines::default();
        for (channel, text) in [("a", "one\r\n"), ("b", "two\r\n"), ("a", "three\r\n")] {
            let slot = lines.slot(channel);
            lines.buffer(slot).extend_from_slice(text.as_bytes());
            lines.mark(slot, Mark::default());
        }
        let chunks = lines.drain();
        let seen: Vec<_> =
            chunks.iter().map(|chunk| (&*chunk.channel, &chunk.bytes[..], chunk.marks.len())).collect();
        assert_eq!(seen, [("a", &b"one\r\nthree\r\n"[..], 2), ("b", &b"two\r\n"[..], 1)]);
        assert!(lines.drain().is_empty());
    }
}
