//! Secrets are a type: what holds one cannot print it, log it or serialise it by accident.

use std::fmt;

use serde::{Serialize, Serializer};
use subtle::ConstantTimeEq;

/// What stands in the place of a secret wherever it would be shown.
pub const REDACTED: &str = "[redacted]";

/// A token, password or key. It is compared by [`Secret::matches`] alone.
#[derive(Clone)]
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

    /// Whether `given` is this secret, in a time that does not depend on where they differ. It may tell their lengths
    /// apart.
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

/// `url` with its user-info and what follows its path, if it has any, replaced: what may be shown of an address. A query
/// may hold a token as well.
pub fn without_user_info(url: &str) -> String {
    let (scheme, rest) = url.split_once("://").map_or(("", url), |(scheme, rest)| (scheme, rest));
    let separator = if scheme.is_empty() { "" } else { "://" };
    // Up to the last one: a password may hold a slash that should have been escaped.
    let (user_info, rest) = match rest.rfind('@') {
        Some(at) => (REDACTED, &rest[at..]),
        None => ("", rest),
    };
    match rest.find(['?', '#']) {
        Some(end) => format!("{scheme}{separator}{user_info}{}{REDACTED}", &rest[..=end]),
        None => format!("{scheme}{separator}{user_info}{rest}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_shows_itself_nowhere() {
        let secret = Secret::new("hunter2");
        assert_eq!(format!("{secret} {secret:?}"), "[redacted] [redacted]");
        assert_eq!(serde_json::to_string(&secret).unwrap(), "\"[redacted]\"");
        let in_others = format!("{:?} {:#?}", Some(&secret), [&secret]);
        assert!(!in_others.contains("hunter2"), "{in_others}");
    }

    #[test]
    fn a_secret_matches_itself_alone() {
        let secret = Secret::new("hunter2");
        assert!(secret.matches("hunter2"));
        for other in
            ["", "h", "hunter", "hunter3", "gunter2", "hunter22", "hunter2hunter2", "Hunter2", "hunter2\0"]
        {
            assert!(!secret.matches(other), "{other:?}");
        }
        assert!(Secret::new("").matches("") && !Secret::new("").matches("h"));
    }

    #[test]
    fn a_panic_of_code_that_holds_a_secret_does_not_tell_it() {
        let refuse = |secret: &str| Err::<(), _>(Secret::new(secret));
        let panic = std::panic::catch_unwind(|| refuse("hunter2").unwrap()).unwrap_err();
        let text = panic.downcast::<String>().unwrap();
        assert!(text.contains(REDACTED) && !text.contains("hunter2"), "{text}");
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
            ("https://host/path?token=x", "https://host/path?[redacted]"),
            ("https://u:p@host/?token=x@y", "https://[redacted]@y"),
            ("https://u:p?q@host/#x", "https://[redacted]@host/#[redacted]"),
        ] {
            assert_eq!(without_user_info(url), shown);
        }
    }
}
