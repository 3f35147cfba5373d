//! Bytes through the reader and the normaliser, each line accounted for. The tests feed it mutations of lines, the package in
//! `fuzz/` whatever a fuzzer led by coverage thinks of.

use std::sync::Arc;
use std::time::Instant;

use inlet::clock::Clock;
use inlet::envelope::draft::Content;
use inlet::envelope::{DeadLetterReason, EnvelopeV1, Origin, UnmatchedReason};
use inlet::source::twitch::lines::Lines;
use inlet::source::twitch::normalize::TakenIn;
use inlet::source::twitch::{Normalizer, Reading, SharedChatMode, TwitchMetrics};
use jiff::Timestamp;

/// Reads as a connection does.
pub struct Reader {
    lines: Lines,
    source_only: Normalizer,
    all: Normalizer,
    taken_in: TakenIn,
    pub fates: Fates,
}

impl Reader {
    pub fn new() -> Self {
        let metrics = Arc::new(TwitchMetrics::new(&prometheus::Registry::new()).unwrap());
        let normalizer = |mode| Normalizer::new(Origin::Replay, mode, Arc::clone(&metrics));
        Self {
            lines: Lines::new(),
            source_only: normalizer(SharedChatMode::SourceOnly),
            all: normalizer(SharedChatMode::All),
            taken_in: TakenIn { at: Clock::system().now(), instant: Instant::now() },
            fates: Fates::default(),
        }
    }

    /// Takes in what one read brought.
    pub fn read(&mut self, bytes: &[u8], mode: SharedChatMode) {
        let normalizer = match mode {
            SharedChatMode::SourceOnly => &self.source_only,
            SharedChatMode::All => &self.all,
        };
        self.lines.buffer().extend_from_slice(bytes);
        while let Some(line) = self.lines.next_line() {
            self.fates.take(normalizer.read(line, self.taken_in), self.taken_in.at);
        }
    }
}

/// What became of lines.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Fates {
    pub events: u64,
    pub not_normalizable: u64,
    pub unparsable: u64,
    pub too_long: u64,
    pub protocol: u64,
    pub empty: u64,
}

impl Fates {
    fn take(&mut self, reading: Reading, at: Timestamp) {
        let draft = match reading {
            Reading::Draft(draft) => draft,
            Reading::Protocol(_) => return self.protocol += 1,
            Reading::Empty => return self.empty += 1,
        };
        match &draft.content {
            Content::Event(event) => {
                EnvelopeV1::new(&draft, event, Err(UnmatchedReason::Disabled), at).to_json().unwrap();
                self.events += 1;
            }
            Content::Unusable { reason, .. } => match reason {
                DeadLetterReason::LineTooLong => self.too_long += 1,
                DeadLetterReason::NotNormalizable => self.not_normalizable += 1,
                _ => self.unparsable += 1,
            },
        }
    }

    pub fn all(&self) -> u64 {
        self.events + self.not_normalizable + self.unparsable + self.too_long + self.protocol + self.empty
    }
}
