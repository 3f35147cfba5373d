//! A token and its form in a document, a file and a request: the fields of twurple's `AccessToken`, with whose it is.

use jiff::Timestamp;
use serde_json::{Map, Value, json};
use thiserror::Error;

use crate::secret::Secret;

/// Longest token, and longest name in one, in bytes. Twitch's are well below 100.
const LONGEST: usize = 1024;
/// Scopes that are kept.
const MOST_SCOPES: usize = 100;

/// The scope that reading chat needs.
pub const CHAT_READ: &str = "chat:read";

/// Fields that cannot be a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("it has no usable {0}")]
pub struct NoToken(&'static str);

/// A token of an account.
#[derive(Debug, Clone)]
pub struct Token {
    /// What one logs in with, without `oauth:`.
    pub access: Secret,
    /// What gets the next one.
    pub refresh: Option<Secret>,
    /// Seconds from `obtained` on; `None`: it does not expire, or it is not known when.
    pub expires_in: Option<u64>,
    /// When it was obtained.
    pub obtained: Option<Timestamp>,
    /// What it may be used for.
    pub scope: Vec<String>,
    /// Whose it is.
    pub user_id: Option<String>,
    /// The login of whose it is.
    pub login: Option<String>,
}

/// Whether this can be a token: it goes into a header and into a line of IRC.
pub(super) fn is_token_text(text: &str) -> bool {
    (1..=LONGEST).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic())
}

fn is_login(text: &str) -> bool {
    (1..=64).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
}

fn is_user_id(text: &str) -> bool {
    (1..=64).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit())
}

/// Scopes as far as they look like some.
pub(super) fn scopes<'a>(given: impl IntoIterator<Item = &'a str>) -> Vec<String> {
    let is_scope = |text: &&str| is_token_text(text) && text.len() <= 100;
    given.into_iter().filter(is_scope).take(MOST_SCOPES).map(str::to_owned).collect()
}

/// A login as Twitch gives it, in lower case.
pub(super) fn login_of(text: &str) -> Option<String> {
    is_login(text).then(|| text.to_ascii_lowercase())
}

/// A user's id as Twitch gives it.
pub(super) fn user_id_of(text: &str) -> Option<String> {
    is_user_id(text).then(|| text.to_owned())
}

impl Token {
    /// Reads the fields. What has the wrong shape is taken as absent, but for the access token itself.
    pub fn from_fields(fields: &Map<String, Value>) -> Result<Self, NoToken> {
        let text = |name: &str| fields.get(name).and_then(Value::as_str);
        let secret = |name: &str| {
            text(name)
                .map(|text| text.trim_start_matches("oauth:"))
                .filter(|text| is_token_text(text))
                .map(Secret::new)
        };
        let scope = fields.get("scope").and_then(Value::as_array);
        Ok(Self {
            access: secret("accessToken").ok_or(NoToken("accessToken"))?,
            refresh: secret("refreshToken"),
            // Very old applications have tokens that do not expire: null, or 0.
            expires_in: fields.get("expiresIn").and_then(Value::as_u64).filter(|seconds| *seconds > 0),
            obtained: fields
                .get("obtainmentTimestamp")
                .and_then(Value::as_i64)
                .and_then(|milliseconds| Timestamp::from_millisecond(milliseconds).ok()),
            scope: scopes(scope.into_iter().flatten().filter_map(Value::as_str)),
            user_id: text("userId").and_then(user_id_of),
            login: text("login").and_then(login_of),
        })
    }

    /// The fields, secrets included: for whoever stores them.
    pub fn to_fields(&self) -> Map<String, Value> {
        let fields = json!({
            "accessToken": self.access.expose(),
            "refreshToken": self.refresh.as_ref().map(Secret::expose),
            "expiresIn": self.expires_in,
            "obtainmentTimestamp": self.obtained.map(Timestamp::as_millisecond),
            "scope": self.scope,
            "userId": self.user_id,
            "login": self.login,
        });
        match fields {
            Value::Object(fields) => fields,
            _ => Map::new(),
        }
    }

    /// When it expires, if that is known.
    pub fn expires_at(&self) -> Option<Timestamp> {
        let seconds = i64::try_from(self.expires_in?).ok()?;
        self.obtained?.checked_add(jiff::SignedDuration::from_secs(seconds)).ok()
    }

    /// Whether this is the same token, whatever else is known of it.
    pub fn is_same(&self, other: &Self) -> bool {
        self.access.matches(other.access.expose())
    }

    /// Whether the next one is got with the same refresh token.
    pub(super) fn has_refresh_of(&self, other: &Self) -> bool {
        match (&self.refresh, &other.refresh) {
            (Some(ours), Some(theirs)) => ours.matches(theirs.expose()),
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(value: Value) -> Result<Token, NoToken> {
        let Value::Object(fields) = value else { panic!("an object") };
        Token::from_fields(&fields)
    }

    #[test]
    fn what_is_written_is_read_back() {
        let written = json!({
            "accessToken": "a", "refreshToken": "r", "expiresIn": 14400, "obtainmentTimestamp": 1_795_000_000_123_i64,
            "scope": ["chat:read", "chat:edit"], "userId": "29025231", "login": "some_bot",
        });
        let token = read(written.clone()).unwrap();
        assert_eq!(Value::Object(token.to_fields()), written);
        assert_eq!(token.expires_at().unwrap().as_millisecond(), 1_795_000_000_123 + 14_400_000);
    }

    #[test]
    fn twurples_own_form_is_read_and_so_is_what_is_odd() {
        let token = read(json!({
            "accessToken": "oauth:a", "refreshToken": null, "expiresIn": null, "obtainmentTimestamp": 0, "scope": [],
        }))
        .unwrap();
        assert!(token.access.matches("a") && token.refresh.is_none() && token.expires_at().is_none());
        let odd = read(json!({
            "accessToken": "a", "refreshToken": "two words", "expiresIn": -5, "obtainmentTimestamp": "now",
            "scope": "chat:read", "userId": 17, "login": "no login\r\nJOIN #x",
        }))
        .unwrap();
        assert!(
            odd.refresh.is_none() && odd.login.is_none() && odd.user_id.is_none() && odd.scope.is_empty()
        );
        assert_eq!(odd.expires_at(), None);
        let far =
            read(json!({ "accessToken": "a", "expiresIn": u64::MAX, "obtainmentTimestamp": 1 })).unwrap();
        assert_eq!(far.expires_at(), None);
    }

    #[test]
    fn what_cannot_be_a_token_is_none_and_is_not_repeated() {
        for bad in [
            json!({}),
            json!({ "accessToken": "" }),
            json!({ "accessToken": "hush\r\nJOIN #x" }),
            json!({ "accessToken": 1 }),
        ] {
            let error = read(bad).unwrap_err().to_string();
            assert!(error.contains("accessToken") && !error.contains("hush"), "{error}");
        }
    }
}
