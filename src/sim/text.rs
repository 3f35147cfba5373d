//! What a simulated viewer says: random words, emotes with their places, now and then a `/me` or bits.

use bytes::{BufMut, BytesMut};

use super::words::{EMOTES, WORDS};

/// A message's text and what its tags must say about it.
#[derive(Debug)]
pub(super) struct Text {
    pub(super) bytes: Vec<u8>,
    /// Emote, first and last code point (the last one included, as on the wire).
    emotes: Vec<(usize, u32, u32)>,
    pub(super) bits: u32,
    pub(super) action: bool,
    /// How many code points each of [`WORDS`] and each of [`EMOTES`] has.
    word_chars: Vec<u32>,
    emote_chars: Vec<u32>,
}

impl Default for Text {
    fn default() -> Self {
        let chars = |word: &str| u32::try_from(word.chars().count()).unwrap_or(0);
        Self {
            bytes: Vec::with_capacity(512),
            emotes: Vec::new(),
            bits: 0,
            action: false,
            word_chars: WORDS.iter().map(|word| chars(word)).collect(),
            emote_chars: EMOTES.iter().map(|(_, code)| chars(code)).collect(),
        }
    }
}

impl Text {
    /// Nothing said yet.
    pub(super) fn clear(&mut self) {
        self.bytes.clear();
        self.emotes.clear();
        self.bits = 0;
        self.action = false;
    }

    /// How many code points there are.
    pub(super) fn chars(&self) -> u32 {
        let first = self.bytes.iter().filter(|&&byte| byte & 0xc0 != 0x80);
        u32::try_from(first.count()).unwrap_or(u32::MAX)
    }

    /// Says a word, after a space if it is not the first.
    pub(super) fn say(&mut self, word: &str) {
        if !self.bytes.is_empty() {
            self.bytes.push(b' ');
        }
        self.bytes.extend_from_slice(word.as_bytes());
    }

    /// Says one of [`EMOTES`] in the same way.
    pub(super) fn say_emote(&mut self, emote: usize) {
        self.say(EMOTES[emote].1);
        let end = self.chars();
        self.emotes.push((emote, end - self.emote_chars[emote], end - 1));
    }

    /// Whether nothing but emotes was said.
    pub(super) fn is_emotes_alone(&self) -> bool {
        let said = self.bytes.split(|&byte| byte == b' ').count();
        !self.emotes.is_empty() && said == self.emotes.len()
    }

    /// Puts a word in front of what is said.
    pub(super) fn put_first(&mut self, word: &str) {
        let by = u32::try_from(word.chars().count() + 1).unwrap_or(0);
        self.bytes.splice(0..0, [word.as_bytes(), b" "].concat());
        for (_, from, to) in &mut self.emotes {
            *from += by;
            *to += by;
        }
    }

    /// Makes a new text: 40 to 220 bytes, one in four with emotes, one in 25 a `/me`, one in 50 with bits.
    pub(super) fn roll(&mut self, rng: &mut fastrand::Rng) {
        self.bytes.clear();
        self.emotes.clear();
        let kind = rng.u8(0..100);
        self.action = kind < 4;
        self.bits = if kind >= 98 { [1, 100, 500, 1000][rng.usize(0..4)] } else { 0 };
        let mut emotes_left = if kind % 4 == 1 { rng.u8(1..4) } else { 0 };
        let length = rng.usize(40..200);
        let mut chars = 0;
        if self.bits > 0 {
            let cheer = format!("Cheer{} ", self.bits);
            chars += u32::try_from(cheer.len()).unwrap_or(0);
            self.bytes.extend_from_slice(cheer.as_bytes());
        }
        loop {
            if emotes_left > 0 && rng.u8(0..4) == 0 {
                let emote = rng.usize(0..EMOTES.len());
                emotes_left -= 1;
                self.bytes.extend_from_slice(EMOTES[emote].1.as_bytes());
                self.emotes.push((emote, chars, chars + self.emote_chars[emote] - 1));
                chars += self.emote_chars[emote];
            } else {
                let word = rng.usize(0..WORDS.len());
                self.bytes.extend_from_slice(WORDS[word].as_bytes());
                chars += self.word_chars[word];
            }
            if self.bytes.len() >= length {
                return;
            }
            self.bytes.push(b' ');
            chars += 1;
        }
    }

    /// The value of the `emotes` tag: `id:from-to,from-to/id:from-to`.
    pub(super) fn put_emotes(&self, out: &mut BytesMut) {
        for (nth, &(emote, ..)) in self.emotes.iter().enumerate() {
            if self.emotes[..nth].iter().any(|earlier| earlier.0 == emote) {
                continue;
            }
            if nth > 0 {
                out.put_u8(b'/');
            }
            out.put_slice(EMOTES[emote].0.as_bytes());
            let mut before = b':';
            for &(_, from, to) in self.emotes.iter().filter(|other| other.0 == emote) {
                out.put_u8(before);
                put_number(out, from);
                out.put_u8(b'-');
                put_number(out, to);
                before = b',';
            }
        }
    }
}

/// Writes a number in decimal.
pub(super) fn put_number(out: &mut BytesMut, number: u32) {
    let mut digits = [b'0'; 10];
    let mut at = digits.len();
    let mut rest = number;
    loop {
        at -= 1;
        digits[at] += u8::try_from(rest % 10).unwrap_or(0);
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    out.put_slice(&digits[at..]);
}
