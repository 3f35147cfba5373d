//! Secrets are a type: what holds one cannot print it, log it or serialise it by accident.

use std::fmt;

use serde::{Serialize, Serializer};
use subtle::ConstantTimeEq;

/// What stands in the place of a secret wherever it would be shown.
pub const REDACTED: &str = "[redacted]";

/// A token, password or key.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Takes the text as it is.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The text itself, for the one place that sends it.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// Whether `given` is this secret, in a time that does not depend on where they differ.
    pub fn matches(&self, given: &str) -> bool {
        self.0.as_bytes().ct_eq(given.as_bytes()).into()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(REDACTED)
    }
}

impl fmt::Display for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(REDACTED)
    }
}

impl Serialize for Secret {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(REDACTED)
    }
}

/// `url` with its user-info, if it has any, replaced: what may be shown of an address.
pub fn without_user_info(url: &str) -> String {
    let (scheme, rest) = url.split_once("://").map_or(("", url), |(scheme, rest)| (scheme, rest));
    // Up to the last one: a password may hold a slash that should have been escaped.
    let Some(at) = rest.rfind('@') else {
        return url.to_owned();
    };
    let separator = if scheme.is_empty() { "" } else { "://" };
    format!("{scheme}{separator}{REDACTED}@{}", &rest[at + 1..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_shows_itself_nowhere() {
        let secret = Secret::new("hunter2");
        assert_eq!(format!("{secret} {secret:?}"), "[redacted] [redacted]");
        assert_eq!(serde_json::to_string(&secret).unwrap(), "\"[redacted]\"");
        assert!(secret.matches("hunter2"));
        assert!(!secret.matches("hunter22") && !secret.matches("") && !secret.matches("hunter3"));
    }

    #[test]
    fn user_info_is_taken_out_of_urls() {
        for (url, shown) in [
            ("nats://u:p@host:4222", "nats://[redacted]@host:4222"),
            ("nats://token@host", "nats://[redacted]@host"),
            ("nats://p@ss@host/x", "nats://[redacted]@host/x"),
            ("nats://u:pa/ss@host", "nats://[redacted]@host"),
            ("u:p@host:4222", "[redacted]@host:4222"),
            ("nats://host:4222", "nats://host:4222"),
        ] {
            assert_eq!(without_user_info(url), shown);
        }
    }
}
