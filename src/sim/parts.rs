//! Where the parts of a captured line stand. By position, never by search: viewers type raw IRC.

use std::ops::Range;

/// Commands whose first parameter is a channel even without its `#`, as it has been seen live.
const CHANNEL_COMMANDS: [&[u8]; 6] =
    [b"PRIVMSG", b"USERNOTICE", b"CLEARCHAT", b"CLEARMSG", b"ROOMSTATE", b"USERSTATE"];

/// Where the parts of a line stand.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Parts {
    /// Without `@`.
    pub(super) tags: Range<usize>,
    pub(super) command: Range<usize>,
    /// Without `#`.
    pub(super) channel: Option<Range<usize>>,
}

/// Takes a line apart by position: tags, prefix, command, first parameter.
pub(super) fn parts(line: &[u8]) -> Parts {
    let mut at = 0;
    let mut parts = Parts::default();
    if line.first() == Some(&b'@') {
        parts.tags = 1..word_end(line, 1);
        at = skip_spaces(line, parts.tags.end);
    }
    if line.get(at) == Some(&b':') {
        at = skip_spaces(line, word_end(line, at));
    }
    parts.command = at..word_end(line, at);
    at = skip_spaces(line, parts.command.end);
    let parameter = at..word_end(line, at);
    parts.channel = match line.get(at) {
        Some(b'#') if parameter.len() > 1 => Some(parameter.start + 1..parameter.end),
        Some(byte)
            if *byte != b':' && *byte != b'#' && CHANNEL_COMMANDS.contains(&&line[parts.command.clone()]) =>
        {
            Some(parameter)
        }
        _ => None,
    };
    parts
}

fn word_end(line: &[u8], from: usize) -> usize {
    memchr::memchr(b' ', &line[from..]).map_or(line.len(), |at| from + at)
}

fn skip_spaces(line: &[u8], from: usize) -> usize {
    from + line[from..].iter().take_while(|&&byte| byte == b' ').count()
}
