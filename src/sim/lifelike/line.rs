//! One line as Twitch writes it: tags in alphabetical order, their values escaped, and where its identity stands.

use std::collections::BTreeMap;

use bytes::{BufMut, BytesMut};

use crate::sim::lines::{LineKind, Mark};

/// A line that waits for its time.
#[derive(Debug, Clone, Default)]
pub(super) struct Line {
    /// Which of the channels it is for.
    pub(super) room: usize,
    pub(super) tags: BTreeMap<&'static str, String>,
    /// Of whoever says it; empty: of Twitch.
    pub(super) login: String,
    pub(super) command: &'static str,
    /// What stands behind the channel: a text, or the target of a moderator.
    pub(super) text: Option<Vec<u8>>,
}

impl Line {
    pub(super) fn tag(&mut self, key: &'static str, value: impl Into<String>) {
        self.tags.insert(key, value.into());
    }

    /// Writes it as sent at `now` (Unix ms) to `channel`.
    pub(super) fn write(&self, channel: &str, now: &str, out: &mut BytesMut) -> Mark {
        let mut mark = Mark {
            kind: LineKind::of_command(self.command.as_bytes()),
            needs_commands: self.command != "PRIVMSG",
            ..Mark::default()
        };
        out.reserve(1024);
        let mut before = b'@';
        for (key, value) in &self.tags {
            out.put_u8(before);
            before = b';';
            out.put_slice(key.as_bytes());
            out.put_u8(b'=');
            let from = out.len();
            put_escaped(if *key == "tmi-sent-ts" { now } else { value }, out);
            let range = (out.len() > from).then(|| from..out.len());
            match *key {
                "id" => mark.id = range,
                "user-id" => mark.user = range,
                "source-id" => mark.source = range,
                _ => {}
            }
        }
        let login = &self.login;
        let prefix = if login.is_empty() {
            " :tmi.twitch.tv ".to_owned()
        } else {
            format!(" :{login}!{login}@{login}.tmi.twitch.tv ")
        };
        out.put_slice(prefix.as_bytes());
        out.put_slice(self.command.as_bytes());
        out.put_slice(b" #");
        out.put_slice(channel.as_bytes());
        if let Some(text) = &self.text {
            out.put_slice(b" :");
            out.put_slice(text);
        }
        out.put_slice(b"\r\n");
        mark
    }
}

fn put_escaped(value: &str, out: &mut BytesMut) {
    for byte in value.bytes() {
        match byte {
            b';' => out.put_slice(b"\\:"),
            b' ' => out.put_slice(b"\\s"),
            b'\\' => out.put_slice(b"\\\\"),
            b'\r' => out.put_slice(b"\\r"),
            b'\n' => out.put_slice(b"\\n"),
            _ => out.put_u8(byte),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_written_as_twitch_does() {
        let mut line = Line { command: "USERNOTICE", text: Some(b"hi".to_vec()), ..Line::default() };
        line.tag("user-id", "7");
        line.tag("system-msg", "a b; c\\");
        line.tag("id", "x");
        line.tag("tmi-sent-ts", "");
        let mut out = BytesMut::from("before");
        let mark = line.write("room", "12", &mut out);
        let wanted = "before@id=x;system-msg=a\\sb\\:\\sc\\\\;tmi-sent-ts=12;user-id=7 \
                      :tmi.twitch.tv USERNOTICE #room :hi\r\n";
        assert_eq!(out, wanted);
        assert_eq!((mark.kind, mark.needs_commands), (LineKind::Notice, true));
        assert_eq!((&out[mark.id.unwrap()], &out[mark.user.unwrap()]), (&b"x"[..], &b"7"[..]));
    }
}
