//! The id of a session: made of the event that opened it, so everybody who sees that event makes the same.

use jiff::Timestamp;
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use crate::envelope::id;

/// Crockford's base 32, lower case.
const ALPHABET: &[u8; 32] = b"0123456789abcdefghjkmnpqrstvwxyz";

/// `sess_<yyyyMMdd>_<provider>_<id>_<six characters>`: the day in UTC, and the first 30 bits of the SHA-256 of the id of
/// the event that opened it.
pub(super) fn session_id(user_key: &str, opener: Uuid, opened_at: Timestamp) -> String {
    let mut buffer = Uuid::encode_buffer();
    let digest = Sha256::digest(opener.hyphenated().encode_lower(&mut buffer).as_bytes());
    let bits = u32::from_be_bytes([digest[0], digest[1], digest[2], digest[3]]) >> 2;
    let letters = (0..6).rev().map(|place| char::from(ALPHABET[(bits >> (place * 5)) as usize & 31]));
    let day = opened_at.strftime("%Y%m%d");
    let suffix = letters.collect::<String>();
    match id::user_of_key(user_key) {
        Some((provider, user_id)) => format!("sess_{day}_{provider}_{user_id}_{suffix}"),
        None => format!("sess_{day}_{user_key}_{suffix}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_contracts_example_holds() {
        let opener = id::event_id("twitch:885196de-cb67-427a-baa8-82f9b0fcd05f");
        let at = "2026-11-20T05:51:20.612Z".parse().unwrap();
        assert_eq!(session_id("twitch:29025231", opener, at), "sess_20261120_twitch_29025231_vxf99h");
    }
}
