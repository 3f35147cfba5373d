//! A batch of chat lines on its way to the connections: per channel one buffer, and where in it the ids stand.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};

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

/// Where in a buffer one message's identity stands.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Mark {
    /// The bytes of the `user-id` tag's value.
    pub(super) user: Option<Range<usize>>,
    /// The bytes of the `id` tag's value.
    pub(super) id: Option<Range<usize>>,
}

/// The finished lines of one channel.
#[derive(Debug, Clone)]
pub(super) struct Chunk {
    pub(super) channel: Arc<str>,
    /// Whole lines, each ended by CR LF, with their tags.
    pub(super) bytes: Bytes,
    /// One per message.
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
    pub(super) fn mark(&mut self, slot: usize, mark: Mark) {
        self.slots[slot].marks.push(mark);
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

/// The same lines without their tags, for a connection that did not ask for them.
pub(super) fn without_tags(lines: &[u8]) -> Bytes {
    let mut bare = BytesMut::with_capacity(lines.len() / 2);
    for line in lines.split_inclusive(|&byte| byte == b'\n') {
        let tags = if line.starts_with(b"@") { memchr::memchr(b' ', line).map_or(0, |at| at + 1) } else { 0 };
        bare.extend_from_slice(&line[tags..]);
    }
    bare.freeze()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_are_taken_off_line_by_line() {
        let lines = b"@id=1;a= :x PRIVMSG #c :@hi there\r\n:y PRIVMSG #c :no tags\r\n";
        let bare = without_tags(lines);
        assert_eq!(&bare[..], b":x PRIVMSG #c :@hi there\r\n:y PRIVMSG #c :no tags\r\n");
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
