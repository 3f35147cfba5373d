//! What cannot be published keeps its bytes and says why.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use jiff::Timestamp;
use serde::Serialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};

use crate::errors::ErrorCode;
use crate::label;

/// Header and field `type` of a dead letter.
pub const DEAD_LETTER_TYPE: &str = "internal.deadletter.v1";

/// How much of the original a dead letter keeps, in bytes.
pub const LONGEST_ORIGINAL: usize = 256 * 1024;

/// An original this short, in letters of base64, is not cut further.
const SHORTEST_ORIGINAL: usize = 512;

label! {
    /// Why an event became a dead letter. Also the label in `/metrics`.
    pub enum DeadLetterReason {
        /// A line longer than a source reads.
        LineTooLong => "line_too_long",
        /// Bytes that are no line of the platform's grammar.
        Unparsable => "unparsable",
        /// A line of a known kind that lacks what makes it one.
        NotNormalizable => "not_normalizable",
        /// Larger than the bus takes.
        TooLarge => "too_large",
        /// The bus does not take its subject.
        BadSubject => "bad_subject",
        /// The bus refused it, each time it was tried.
        Refused => "refused",
        /// The bus did not even take the dead letter; it exists in the log alone.
        Undeliverable => "undeliverable",
    }
}

impl DeadLetterReason {
    /// The reason as one of all codes.
    pub fn code(self) -> ErrorCode {
        match self {
            Self::LineTooLong => ErrorCode::LineTooLong,
            Self::Unparsable => ErrorCode::Unparsable,
            Self::NotNormalizable => ErrorCode::NotNormalizable,
            Self::TooLarge => ErrorCode::TooLarge,
            Self::BadSubject => ErrorCode::BadSubject,
            Self::Refused => ErrorCode::Refused,
            Self::Undeliverable => ErrorCode::Undeliverable,
        }
    }
}

/// A dead letter about to be written.
#[derive(Debug)]
pub struct DeadLetter<'a> {
    /// Why.
    pub reason: DeadLetterReason,
    /// The same for a person; never holds chat text.
    pub message: &'a str,
    /// When it was given up.
    pub at: Timestamp,
    /// Where it was to go.
    pub original_subject: &'a str,
    /// How often it was tried.
    pub attempts: u32,
    /// What it was.
    pub original: Original,
}

/// What a dead letter keeps.
#[derive(Debug, Clone)]
pub enum Original {
    /// A finished envelope: JSON.
    Envelope(Bytes),
    /// Bytes from the wire.
    Raw(Bytes),
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Written<'a> {
    v: &'static str,
    #[serde(rename = "type")]
    kind: &'static str,
    reason: &'static str,
    error: WrittenError<'a>,
    #[serde(serialize_with = "super::milliseconds")]
    at: Timestamp,
    original_subject: &'a str,
    attempts: u32,
    original: WrittenOriginal<'a>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    truncated: bool,
}

#[derive(Serialize)]
struct WrittenError<'a> {
    code: &'static str,
    message: &'a str,
}

#[derive(Serialize)]
#[serde(untagged)]
enum WrittenOriginal<'a> {
    Json(&'a RawValue),
    Bytes { encoding: &'static str, data: String },
}

impl DeadLetter<'_> {
    /// Writes it. The original is cut so that the whole stays under `most` bytes, and never keeps more than
    /// [`LONGEST_ORIGINAL`]; a cut envelope is no JSON any more and is kept as bytes.
    pub fn to_json(&self, most: usize) -> Result<Bytes, serde_json::Error> {
        // What stands around the original: about 200 bytes and texts of ours.
        let around = 512 + self.original_subject.len() + self.message.len() * 2;
        let room = most.saturating_sub(around);
        let (bytes, json) = match &self.original {
            Original::Envelope(bytes) => {
                let fits = bytes.len() <= LONGEST_ORIGINAL.min(room);
                (bytes, if fits { serde_json::from_slice::<&RawValue>(bytes).ok() } else { None })
            }
            Original::Raw(bytes) => (bytes, None),
        };
        let kept = bytes.len().min(LONGEST_ORIGINAL).min(room / 4 * 3);
        let (original, truncated) = if let Some(json) = json {
            (WrittenOriginal::Json(json), false)
        } else {
            let data = BASE64.encode(&bytes[..kept]);
            (WrittenOriginal::Bytes { encoding: "base64", data }, kept < bytes.len())
        };
        let written = Written {
            v: "1",
            kind: DEAD_LETTER_TYPE,
            reason: crate::telemetry::metrics::Label::as_str(self.reason),
            error: WrittenError {
                code: crate::telemetry::metrics::Label::as_str(self.reason.code()),
                message: self.message,
            },
            at: self.at,
            original_subject: self.original_subject,
            attempts: self.attempts,
            original,
            truncated,
        };
        serde_json::to_vec(&written).map(Bytes::from)
    }
}

/// A written dead letter with half as much of its original, as bytes; `None` if that is short already.
pub fn halved(letter: &Bytes) -> Option<Bytes> {
    let mut fields: serde_json::Map<String, Value> = serde_json::from_slice(letter).ok()?;
    let original = fields.get("original")?;
    let data = match original.get("data").and_then(Value::as_str).filter(|_| original["encoding"] == "base64")
    {
        Some(data) => data.to_owned(),
        None => BASE64.encode(original.to_string()),
    };
    if data.len() < SHORTEST_ORIGINAL {
        return None;
    }
    // Four letters are three bytes.
    let kept = data.get(..data.len() / 8 * 4)?;
    fields.insert("original".to_owned(), json!({ "encoding": "base64", "data": kept }));
    fields.insert("truncated".to_owned(), Value::Bool(true));
    serde_json::to_vec(&fields).ok().map(Bytes::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn letter(original: Original) -> DeadLetter<'static> {
        DeadLetter {
            reason: DeadLetterReason::TooLarge,
            message: "the server takes at most 1024 bytes",
            at: Timestamp::from_millisecond(1_700_000_000_000).unwrap(),
            original_subject: "internal.ingress.v1",
            attempts: 1,
            original,
        }
    }

    fn written(original: Original, most: usize) -> (usize, Value) {
        let bytes = letter(original).to_json(most).unwrap();
        (bytes.len(), serde_json::from_slice(&bytes).unwrap())
    }

    #[test]
    fn an_envelope_is_kept_as_json_and_bytes_as_base64() {
        let (_, value) = written(Original::Envelope(Bytes::from_static(b"{\"v\":\"1\"}")), 1 << 20);
        let expected = json!({
            "v": "1", "type": "internal.deadletter.v1", "reason": "too_large",
            "error": {"code": "too_large", "message": "the server takes at most 1024 bytes"},
            "at": "2023-11-14T22:13:20.000Z", "originalSubject": "internal.ingress.v1", "attempts": 1,
            "original": {"v": "1"},
        });
        assert_eq!(value, expected);
        let (_, value) = written(Original::Raw(Bytes::from_static(b"\xff\x00")), 1 << 20);
        assert_eq!(value["original"], json!({"encoding": "base64", "data": "/wA="}));
        assert!(value.get("truncated").is_none());
    }

    #[test]
    fn what_is_too_long_is_cut_and_says_so() {
        let long = Bytes::from(vec![b'x'; 300 * 1024]);
        let (_, value) = written(Original::Raw(long.clone()), 1 << 20);
        assert_eq!(value["truncated"], json!(true));
        let kept = BASE64.decode(value["original"]["data"].as_str().unwrap()).unwrap();
        assert_eq!(kept.len(), LONGEST_ORIGINAL);
        for most in [1_024, 10_000] {
            let (length, value) = written(Original::Envelope(long.clone()), most);
            assert!(length <= most, "{length} of {most}");
            assert_eq!(value["truncated"], json!(true));
        }
    }

    #[test]
    fn what_is_still_too_large_is_cut_by_half_until_it_is_short() {
        let envelope = format!("{{\"text\":\"{}\"}}", "x".repeat(10_000));
        let mut letter = letter(Original::Envelope(envelope.clone().into())).to_json(1 << 20).unwrap();
        let mut sizes = vec![letter.len()];
        while let Some(shorter) = halved(&letter) {
            letter = shorter;
            sizes.push(letter.len());
        }
        assert!(sizes.is_sorted_by(|longer, shorter| longer > shorter) && letter.len() < 1_024, "{sizes:?}");
        let value: Value = serde_json::from_slice(&letter).unwrap();
        assert_eq!((&value["reason"], &value["truncated"]), (&json!("too_large"), &json!(true)));
        let kept = BASE64.decode(value["original"]["data"].as_str().unwrap()).unwrap();
        assert!(envelope.as_bytes().starts_with(&kept));
    }
}
