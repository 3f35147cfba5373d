//! IRC over WebSocket (RFC 6455), as Twitch serves it for browsers: the handshake and the frames, nothing more.
//!
//! By hand, since the little that is needed is smaller than what a library asks for: no extensions, no compression, no
//! client side. Frames of a client are bounded by the caller; what does not follow the protocol ends the connection.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use bytes::{Buf, BufMut, Bytes, BytesMut};
use sha1_smol::Sha1;

/// What RFC 6455 has both sides append to the client's key.
const SALT: &str = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11";
/// A control frame holds so much at most.
const MAX_CONTROL_BYTES: usize = 125;

pub(super) const TEXT: u8 = 0x1;
pub(super) const BINARY: u8 = 0x2;
pub(super) const CONTINUATION: u8 = 0x0;
pub(super) const CLOSE: u8 = 0x8;
pub(super) const PING: u8 = 0x9;
pub(super) const PONG: u8 = 0xa;

/// A frame of the client, unmasked.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Frame {
    pub(super) opcode: u8,
    /// The last one of its message.
    pub(super) is_last: bool,
    pub(super) payload: Bytes,
}

/// Bytes that are no frame a client may send.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct NoFrame;

/// The answer to an HTTP request that asks for a WebSocket; `None` when it does not.
pub(super) fn handshake(request: &str) -> Option<String> {
    let header = |name: &str| {
        let mut fields = request.lines().skip(1).filter_map(|line| line.split_once(':'));
        fields.find(|(field, _)| field.trim().eq_ignore_ascii_case(name)).map(|(_, value)| value.trim())
    };
    let upgrade = header("Upgrade").is_some_and(|value| value.eq_ignore_ascii_case("websocket"));
    let key = header("Sec-WebSocket-Key").filter(|_| upgrade)?;
    let accept = BASE64_STANDARD.encode(Sha1::from(format!("{key}{SALT}")).digest().bytes());
    let wants_irc = header("Sec-WebSocket-Protocol")
        .is_some_and(|names| names.split(',').any(|name| name.trim().eq_ignore_ascii_case("irc")));
    let protocol = if wants_irc { "Sec-WebSocket-Protocol: irc\r\n" } else { "" };
    Some(format!(
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
         Sec-WebSocket-Accept: {accept}\r\n{protocol}\r\n"
    ))
}

/// Takes the next whole frame out of `buffer`; `Ok(None)`: there is none yet.
pub(super) fn next_frame(buffer: &mut BytesMut, max_bytes: usize) -> Result<Option<Frame>, NoFrame> {
    let [first, second, ..] = buffer[..] else { return Ok(None) };
    let (opcode, is_last) = (first & 0x0f, first & 0x80 != 0);
    let known = matches!(opcode, CONTINUATION | TEXT | BINARY | CLOSE | PING | PONG);
    // Reserved bits belong to extensions, and a client has to mask.
    if first & 0x70 != 0 || second & 0x80 == 0 || !known {
        return Err(NoFrame);
    }
    let (header, length) = match (second & 0x7f, buffer.len()) {
        (126, ..4) | (127, ..10) => return Ok(None),
        (126, _) => (4, u64::from((&buffer[2..4]).get_u16())),
        (127, _) => (10, (&buffer[2..10]).get_u64()),
        (length, _) => (2, u64::from(length)),
    };
    let is_control = opcode >= CLOSE;
    let max_bytes = if is_control { MAX_CONTROL_BYTES } else { max_bytes };
    let length = usize::try_from(length).ok().filter(|&length| length <= max_bytes).ok_or(NoFrame)?;
    if is_control && !is_last {
        return Err(NoFrame);
    }
    if buffer.len() < header + 4 + length {
        return Ok(None);
    }
    buffer.advance(header);
    let mask = buffer.split_to(4);
    let mut payload = buffer.split_to(length);
    for (byte, key) in payload.iter_mut().zip(mask.iter().cycle()) {
        *byte ^= key;
    }
    Ok(Some(Frame { opcode, is_last, payload: payload.freeze() }))
}

/// A frame of the server. Text has to be UTF-8; what is not, is sent with U+FFFD in its place.
pub(super) fn frame(opcode: u8, payload: &[u8]) -> Bytes {
    let text = if opcode == TEXT { String::from_utf8_lossy(payload) } else { "".into() };
    let payload = if opcode == TEXT { text.as_bytes() } else { payload };
    let mut out = BytesMut::with_capacity(payload.len() + 10);
    out.put_u8(0x80 | opcode);
    match (u8::try_from(payload.len()), u16::try_from(payload.len())) {
        (Ok(length @ ..126), _) => out.put_u8(length),
        (_, Ok(length)) => {
            out.put_u8(126);
            out.put_u16(length);
        }
        _ => {
            out.put_u8(127);
            out.put_u64(payload.len() as u64);
        }
    }
    out.put_slice(payload);
    out.freeze()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_handshake_of_the_rfc() {
        let request = "GET /chat HTTP/1.1\r\nHost: x\r\nupgrade: WebSocket\r\nConnection: Upgrade\r\n\
                       Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: chat, irc\r\n\r\n";
        let answer = handshake(request).unwrap();
        assert!(answer.contains("Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n"), "{answer}");
        assert!(answer.ends_with("Sec-WebSocket-Protocol: irc\r\n\r\n"));
        assert_eq!(handshake("GET / HTTP/1.1\r\nHost: x\r\n\r\n"), None);
    }

    fn masked(first: u8, payload: &[u8]) -> BytesMut {
        let mut unmasked = BytesMut::from(&frame(first & 0x0f, payload)[..]);
        unmasked[0] = first;
        let header = unmasked.len() - payload.len();
        let mut bytes = unmasked.split_to(header);
        bytes[1] |= 0x80;
        bytes.put_slice(&[1, 2, 3, 4]);
        bytes.extend(payload.iter().zip([1, 2, 3, 4].iter().cycle()).map(|(byte, key)| byte ^ key));
        bytes
    }

    #[test]
    fn frames_of_every_length_arrive_whole() {
        for length in [0, 1, 125, 126, 127, 65_535, 65_536] {
            let payload = vec![b'x'; length];
            let bytes = masked(0x80 | BINARY, &payload);
            let mut buffer = BytesMut::new();
            for (nth, byte) in bytes.iter().enumerate() {
                // Byte by byte at both ends; the middle at once.
                buffer.put_u8(*byte);
                if nth + 1 < bytes.len() && (nth < 20 || nth + 20 > bytes.len()) {
                    assert_eq!(next_frame(&mut buffer, 100_000), Ok(None));
                }
            }
            let frame = next_frame(&mut buffer, 100_000).unwrap().unwrap();
            assert_eq!((frame.opcode, frame.is_last, &frame.payload[..]), (BINARY, true, &payload[..]));
            assert!(buffer.is_empty());
        }
    }

    #[test]
    fn what_a_client_may_not_send_is_refused() {
        assert_eq!(next_frame(&mut masked(0x80 | TEXT, &[b'x'; 300]), 200), Err(NoFrame), "too long");
        assert_eq!(next_frame(&mut masked(0xc0 | TEXT, b"x"), 200), Err(NoFrame), "an extension");
        assert_eq!(next_frame(&mut masked(PING, b"x"), 200), Err(NoFrame), "a control frame in parts");
        assert_eq!(next_frame(&mut masked(0x83, b"x"), 200), Err(NoFrame), "an unknown kind");
        assert_eq!(next_frame(&mut BytesMut::from(&frame(TEXT, b"x")[..]), 200), Err(NoFrame), "not masked");
    }

    #[test]
    fn text_is_made_valid() {
        assert_eq!(&frame(TEXT, b"a\xff")[..], &b"\x81\x04a\xef\xbf\xbd"[..]);
    }
}
