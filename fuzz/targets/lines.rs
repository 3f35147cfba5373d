//! Bytes as a connection might bring them. The first one says where reads cut them and which copies of a shared chat count.
#![no_main]

use inlet::source::twitch::SharedChatMode;
use libfuzzer_sys::fuzz_target;

#[path = "../../tests/it/fuzz/reader.rs"]
mod reader;

use reader::Reader;

fuzz_target!(|input: &[u8]| {
    let Some((&how, bytes)) = input.split_first() else { return };
    let mode = if how & 1 == 0 { SharedChatMode::SourceOnly } else { SharedChatMode::All };
    let (mut whole, mut cut) = (Reader::new(), Reader::new());
    whole.read(bytes, mode);
    for piece in bytes.chunks(usize::from(how >> 1) + 1) {
        cut.read(piece, mode);
    }
    assert_eq!(whole.fates, cut.fates, "it matters where reads cut");
    // One fate a line; one that is too long has it before its end.
    let ends = bytes.iter().filter(|byte| **byte == b'\n').count() as u64;
    assert!((ends..=ends + whole.fates.too_long.min(1)).contains(&whole.fates.all()), "{ends}: {:?}", whole.fates);
});
