//! Bytes become lines, wherever the reads happen to cut them. No I/O here, so a test can cut everywhere.

use bytes::{Buf, Bytes, BytesMut};

/// Longest line that is read. Of a longer one this much is kept, and the rest is skipped up to its end.
pub const LONGEST_LINE: usize = 64 * 1024;

/// A line without its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Line {
    /// As received.
    Whole(Bytes),
    /// The start of a line that is longer than [`LONGEST_LINE`].
    TooLong(Bytes),
}

/// Cuts a stream of bytes into lines.
#[derive(Debug)]
pub struct Lines {
    longest: usize,
    buffer: BytesMut,
    /// Up to here the buffer holds no end of line.
    searched: usize,
    /// In the rest of a line that was too long.
    is_skipping: bool,
}

impl Default for Lines {
    fn default() -> Self {
        Self::new()
    }
}

impl Lines {
    /// An empty one, for lines of at most [`LONGEST_LINE`].
    pub fn new() -> Self {
        Self::up_to(LONGEST_LINE)
    }

    /// An empty one, for lines of at most `longest` bytes.
    pub fn up_to(longest: usize) -> Self {
        Self { longest, buffer: BytesMut::new(), searched: 0, is_skipping: false }
    }

    /// Where the next bytes are to be read to. What stands there already must stay.
    pub fn buffer(&mut self) -> &mut BytesMut {
        &mut self.buffer
    }

    /// The next whole line, if the buffer holds one.
    pub fn next_line(&mut self) -> Option<Line> {
        loop {
            let Some(end) = memchr::memchr(b'\n', &self.buffer[self.searched..]).map(|at| at + self.searched)
            else {
                return self.without_end();
            };
            let mut line = self.buffer.split_to(end + 1).freeze();
            self.searched = 0;
            if std::mem::take(&mut self.is_skipping) {
                continue;
            }
            line.truncate(end);
            if line.last() == Some(&b'\r') {
                line.truncate(end - 1);
            }
            if line.len() > self.longest {
                line.truncate(self.longest);
                return Some(Line::TooLong(line));
            }
            return Some(Line::Whole(line));
        }
    }

    /// What is left when nothing more will come: a last line without its end.
    pub fn last_line(&mut self) -> Option<Line> {
        if self.is_skipping || self.buffer.is_empty() {
            return None;
        }
        self.buffer.extend_from_slice(b"\n");
        self.next_line()
    }

    fn without_end(&mut self) -> Option<Line> {
        if self.is_skipping {
            self.buffer.clear();
        }
        self.searched = self.buffer.len();
        // One byte more than the longest: it may be the CR of the end.
        if self.buffer.len() <= self.longest + 1 {
            return None;
        }
        let line = self.buffer.split_to(self.longest).freeze();
        self.buffer.advance(self.buffer.len());
        self.searched = 0;
        self.is_skipping = true;
        Some(Line::TooLong(line))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(chunks: &[&[u8]]) -> Vec<Line> {
        let mut lines = Lines::new();
        let mut found = Vec::new();
        for chunk in chunks {
            lines.buffer().extend_from_slice(chunk);
            while let Some(line) = lines.next_line() {
                found.push(line);
            }
        }
        found.extend(lines.last_line());
        found
    }

    fn whole(line: &[u8]) -> Line {
        Line::Whole(Bytes::copy_from_slice(line))
    }

    #[test]
    fn the_same_lines_come_out_wherever_the_bytes_are_cut() {
        let bytes = b"PING :a\r\n\r\n@a=b :x PRIVMSG #c :\xf0\x9f\x98\x82 \xff\n\0\r\nlast";
        let expected = [
            whole(b"PING :a"),
            whole(b""),
            whole(b"@a=b :x PRIVMSG #c :\xf0\x9f\x98\x82 \xff"),
            whole(b"\0"),
            whole(b"last"),
        ];
        for first in 0..=bytes.len() {
            for second in first..=bytes.len() {
                let chunks = [&bytes[..first], &bytes[first..second], &bytes[second..]];
                assert_eq!(cut(&chunks), expected, "cut at {first} and {second}");
            }
        }
    }

    #[test]
    fn a_line_that_is_too_long_keeps_its_start_and_harms_no_other() {
        for length in [LONGEST_LINE + 1, LONGEST_LINE + 2, LONGEST_LINE * 3, 1 << 20] {
            let mut bytes = vec![b'x'; length];
            bytes.extend_from_slice(b"\r\nPING\r\n");
            let expected = [Line::TooLong(Bytes::from(vec![b'x'; LONGEST_LINE])), whole(b"PING")];
            assert_eq!(cut(&[&bytes]), expected, "{length} at once");
            let chunks: Vec<&[u8]> = bytes.chunks(1_000).collect();
            assert_eq!(cut(&chunks), expected, "{length} in pieces");
        }
        let mut longest = vec![b'x'; LONGEST_LINE];
        longest.extend_from_slice(b"\r\n");
        for cut_at in [LONGEST_LINE - 1, LONGEST_LINE, LONGEST_LINE + 1] {
            let found = cut(&[&longest[..cut_at], &longest[cut_at..]]);
            assert_eq!(found, [whole(&longest[..LONGEST_LINE])], "cut at {cut_at}");
        }
    }

    #[test]
    fn the_buffer_stays_bounded_in_an_endless_line() {
        let mut lines = Lines::new();
        for _ in 0..1_000 {
            lines.buffer().extend_from_slice(&[b'x'; 4096]);
            while lines.next_line().is_some() {}
            assert!(lines.buffer().len() <= LONGEST_LINE + 4096);
        }
    }
}
