//! What viewers say when they are not all alike: short and long, emotes alone, commands, copies, raw IRC, every script.

use crate::sim::text::Text;
use crate::sim::words::{EMOTES, ODD_TEXTS, RAW_IRC, WORDS};

/// Twitch takes no longer text, in code points.
const MAX_CHARS: u32 = 500;

/// Makes a new text; `someone` is a viewer it may name.
pub(super) fn roll(text: &mut Text, someone: &str, rng: &mut fastrand::Rng) {
    let kind = rng.u16(..1_000);
    if kind < 550 {
        // The plain chat's: sentences, some with emotes, bits or as an action.
        text.roll(rng);
        return;
    }
    text.clear();
    match kind {
        550..700 => words(text, 1..4, rng),
        700..790 => emotes(text, rng),
        790..840 => {
            text.say(&format!("@{someone}"));
            words(text, 1..10, rng);
        }
        840..870 => text.say(["!discord", "!drops", "!uptime", "!so friend", "!gamble all"][rng.usize(..5)]),
        870..910 => copies(text, rng),
        910..960 => text.say(ODD_TEXTS[rng.usize(..ODD_TEXTS.len())]),
        960..970 => text.say(RAW_IRC[rng.usize(..RAW_IRC.len())]),
        970..985 => long(text, rng),
        _ => text.say(["?", "W", "L", "1", "!", "...", "xD", "^", "+1"][rng.usize(..9)]),
    }
    if rng.u8(..) < 8 {
        text.action = true;
    }
}

fn words(text: &mut Text, how_many: std::ops::Range<u32>, rng: &mut fastrand::Rng) {
    for _ in 0..rng.u32(how_many) {
        text.say(WORDS[rng.usize(..WORDS.len())]);
    }
}

fn emotes(text: &mut Text, rng: &mut fastrand::Rng) {
    let emote = rng.usize(..EMOTES.len());
    for _ in 0..rng.u8(1..7) {
        let other = rng.u8(..) < 64;
        text.say_emote(if other { rng.usize(..EMOTES.len()) } else { emote });
    }
}

/// The same few words over and over, the last time behind characters of more than one byte and of more than one unit.
fn copies(text: &mut Text, rng: &mut fastrand::Rng) {
    let word = WORDS[rng.usize(..WORDS.len())].to_uppercase();
    for _ in 0..rng.u8(2..9) {
        text.say(&word);
        if rng.bool() {
            text.say_emote(rng.usize(..EMOTES.len()));
        }
    }
    text.say("🔥 größer");
    text.say_emote(rng.usize(..EMOTES.len()));
}

fn long(text: &mut Text, rng: &mut fastrand::Rng) {
    let wide = rng.bool();
    loop {
        let word = if wide { "かわいい日本🎉" } else { WORDS[rng.usize(..WORDS.len())] };
        let chars = u32::try_from(word.chars().count()).unwrap_or(MAX_CHARS);
        if text.chars() + 1 + chars > MAX_CHARS {
            return;
        }
        text.say(word);
    }
}
