//! Twitch's OAuth: validating a token, refreshing it, and the device code flow. One request each; when to ask again is
//! for the caller.
//!
//! See <https://dev.twitch.tv/docs/authentication/>. What the service answers is never repeated, in no error and no
//! log: it may hold a token. Of its words only those are read that the protocol gives a meaning.

use std::sync::Arc;
use std::time::Duration;

use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use reqwest::header::{CONTENT_TYPE, HeaderMap, RETRY_AFTER};
use reqwest::redirect::Policy;
use reqwest::{Client, RequestBuilder, StatusCode};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use thiserror::Error;

use super::settings::{OAuthClient, OAuthUrl};
use super::token::{is_token_text, login_of, scopes, user_id_of};
use crate::errors::{Coded, ErrorCode};
use crate::secret::Secret;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// For one answer, from the request to its last byte. At a shutdown an answer under way is waited for, so that a token
/// that was just issued is stored.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
const LARGEST_ANSWER: usize = 64 * 1024;
/// Longest text of a flow that is shown to a person.
const LONGEST_SHOWN: usize = 512;
const DEVICE_GRANT: &str = "urn:ietf:params:oauth:grant-type:device_code";

/// No client could be made.
#[derive(Debug, Error)]
#[error("TWITCH_OAUTH_URL cannot be used")]
pub struct OAuthSetupError(#[from] reqwest::Error);

/// Why the service did not do what it was asked.
#[derive(Debug, Error)]
pub enum OAuthError {
    /// No whole answer in time.
    #[error("no answer")]
    Away(#[source] reqwest::Error),
    /// It fails, or wants to be asked less often.
    #[error("answered {status}")]
    Status {
        /// With which status.
        status: StatusCode,
        /// After what time it wants to be asked again.
        retry_after: Option<Duration>,
    },
    /// The answer is too large, or not what the documentation says.
    #[error("the answer is not what the documentation says")]
    Unreadable,
    /// The token is not, or no longer, valid.
    #[error("the token is not valid")]
    TokenRefused,
    /// The application is not known, or its secret is wrong or missing.
    #[error("Twitch refuses TWITCH_CLIENT_ID, or TWITCH_CLIENT_SECRET with it")]
    ClientRefused,
    /// `TWITCH_CLIENT_ID` is not set.
    #[error("TWITCH_CLIENT_ID is not set")]
    NoClient,
}

impl OAuthError {
    /// After what time the service wants to be asked again.
    pub(super) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Status { retry_after, .. } => *retry_after,
            Self::Away(_) | Self::Unreadable | Self::TokenRefused | Self::ClientRefused | Self::NoClient => {
                None
            }
        }
    }

    /// Whether the service did not do its part, so that it is unknown what became of the request.
    pub fn is_outage(&self) -> bool {
        match self {
            Self::Away(_) | Self::Status { .. } | Self::Unreadable => true,
            Self::TokenRefused | Self::ClientRefused | Self::NoClient => false,
        }
    }
}

impl Coded for OAuthError {
    fn code(&self) -> ErrorCode {
        match self {
            Self::Away(_) | Self::Status { .. } | Self::Unreadable => ErrorCode::OAuthUnavailable,
            Self::TokenRefused => ErrorCode::LoginFailed,
            Self::ClientRefused | Self::NoClient => ErrorCode::ClientRefused,
        }
    }
}

/// Whose a valid token is.
#[derive(Debug)]
pub struct Validated {
    /// The login.
    pub login: String,
    /// The user's id.
    pub user_id: String,
    /// What the token may be used for.
    pub scope: Vec<String>,
    /// Seconds until it expires; `None`: it does not.
    pub expires_in: Option<u64>,
}

/// A new token.
#[derive(Debug)]
pub struct Granted {
    /// The token.
    pub access: Secret,
    /// What gets the next one, if it is another than before.
    pub refresh: Option<Secret>,
    /// Seconds until it expires.
    pub expires_in: Option<u64>,
    /// What it may be used for.
    pub scope: Vec<String>,
}

/// A flow that a person is to approve.
#[derive(Debug)]
pub struct DeviceFlow {
    /// What is asked with whether they did.
    pub device_code: Secret,
    /// What they enter.
    pub user_code: String,
    /// Where.
    pub address: String,
    /// How long there is to do it.
    pub expires_in: Duration,
    /// How often to ask.
    pub interval: Duration,
}

/// Why there is no token yet in a device flow, if the service answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NotYet {
    /// Nobody has approved it so far.
    Pending,
    /// The same, and it was asked too often.
    SlowDown,
    /// Somebody said no.
    Denied,
    /// It took too long.
    Expired,
}

/// The service.
pub struct OAuth {
    url: OAuthUrl,
    app: Option<OAuthClient>,
    client: Client,
}

/// What is read of any answer.
struct Answer {
    status: StatusCode,
    retry_after: Option<Duration>,
    body: Vec<u8>,
}

impl OAuth {
    /// A client of the service; `tls` where the address wants it.
    pub fn new(
        url: OAuthUrl,
        app: Option<OAuthClient>,
        tls: Option<Arc<rustls::ClientConfig>>,
    ) -> Result<Self, OAuthSetupError> {
        let builder = Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .timeout(ANSWER_TIMEOUT)
            .redirect(Policy::none())
            .no_proxy();
        let builder = match tls {
            Some(tls) => builder.tls_backend_preconfigured((*tls).clone()),
            None => builder,
        };
        Ok(Self { url, app, client: builder.build()? })
    }

    /// Whether tokens can be refreshed: it is known for which application.
    pub(super) fn has_client(&self) -> bool {
        self.app.is_some()
    }

    /// Asks whose a token is.
    pub async fn validate(&self, access: &Secret) -> Result<Validated, OAuthError> {
        #[derive(Deserialize)]
        struct Body {
            login: String,
            user_id: String,
            #[serde(default)]
            scopes: Option<Vec<String>>,
            #[serde(default)]
            expires_in: Option<u64>,
        }
        let request = self.client.get(format!("{}/validate", self.url.as_str()));
        let answer = ask(request.header("authorization", format!("OAuth {}", access.expose()))).await?;
        if answer.status == StatusCode::UNAUTHORIZED {
            return Err(OAuthError::TokenRefused);
        }
        let Body { login, user_id, scopes: scope, expires_in } = answer.read()?;
        Ok(Validated {
            login: login_of(&login).ok_or(OAuthError::Unreadable)?,
            user_id: user_id_of(&user_id).ok_or(OAuthError::Unreadable)?,
            scope: scopes(scope.iter().flatten().map(String::as_str)),
            expires_in: expires_in.filter(|seconds| *seconds > 0),
        })
    }

    /// Exchanges a refresh token for a new token. Of a public client it can be used once.
    pub async fn refresh(&self, refresh: &Secret) -> Result<Granted, OAuthError> {
        let form = [("grant_type", "refresh_token"), ("refresh_token", refresh.expose())];
        let answer = self.post("token", &form, true).await?;
        match answer.status {
            // Of a wrong or a missing secret it says so; everything else is about the token.
            StatusCode::BAD_REQUEST | StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                let is_client = answer.words().iter().any(|words| words.contains("client"));
                Err(if is_client { OAuthError::ClientRefused } else { OAuthError::TokenRefused })
            }
            _ => answer.read_grant(),
        }
    }

    /// Begins a device flow.
    pub async fn begin_device_flow(&self, scope: &str) -> Result<DeviceFlow, OAuthError> {
        #[derive(Deserialize)]
        struct Body {
            device_code: String,
            user_code: String,
            verification_uri: String,
            expires_in: u64,
            #[serde(default)]
            interval: Option<u64>,
        }
        let answer = self.post("device", &[("scopes", scope)], false).await?;
        if matches!(answer.status.as_u16(), 400 | 401 | 403) {
            return Err(OAuthError::ClientRefused);
        }
        let Body { device_code, user_code, verification_uri, expires_in, interval } = answer.read()?;
        if !is_token_text(&device_code) {
            return Err(OAuthError::Unreadable);
        }
        Ok(DeviceFlow {
            device_code: Secret::new(device_code),
            user_code: shown(&user_code)?,
            address: shown(&verification_uri)?,
            expires_in: Duration::from_secs(expires_in),
            interval: Duration::from_secs(interval.unwrap_or(5).max(1)),
        })
    }

    /// Asks whether a device flow was approved.
    pub async fn poll_device_flow(
        &self,
        code: &Secret,
        scope: &str,
    ) -> Result<Result<Granted, NotYet>, OAuthError> {
        let form = [("grant_type", DEVICE_GRANT), ("device_code", code.expose()), ("scopes", scope)];
        // A secret is not part of this flow at Twitch.
        let answer = self.post("token", &form, false).await?;
        if !matches!(answer.status.as_u16(), 400 | 401 | 403) {
            return answer.read_grant().map(Ok);
        }
        let words = answer.words();
        let says = |word: &str| words.iter().any(|words| words.contains(word));
        if says("authorization_pending") {
            Ok(Err(NotYet::Pending))
        } else if says("slow_down") {
            Ok(Err(NotYet::SlowDown))
        } else if says("denied") {
            Ok(Err(NotYet::Denied))
        } else if says("expired") || says("device code") {
            // Twitch knows a code no more that has expired.
            Ok(Err(NotYet::Expired))
        } else {
            Err(OAuthError::ClientRefused)
        }
    }

    async fn post(&self, path: &str, form: &[(&str, &str)], with_secret: bool) -> Result<Answer, OAuthError> {
        let app = self.app.as_ref().ok_or(OAuthError::NoClient)?;
        let secret =
            app.secret.as_ref().filter(|_| with_secret).map(|secret| ("client_secret", secret.expose()));
        let pairs = form.iter().copied().chain([("client_id", app.id.as_str())]).chain(secret);
        let pairs =
            pairs.map(|(name, value)| format!("{name}={}", utf8_percent_encode(value, NON_ALPHANUMERIC)));
        let body = pairs.collect::<Vec<_>>().join("&");
        let request = self.client.post(format!("{}/{path}", self.url.as_str()));
        ask(request.header(CONTENT_TYPE, "application/x-www-form-urlencoded").body(body)).await
    }
}

async fn ask(request: RequestBuilder) -> Result<Answer, OAuthError> {
    let away = |error: reqwest::Error| OAuthError::Away(error.without_url());
    let mut response = request.send().await.map_err(away)?;
    let (status, retry_after) = (response.status(), retry_after(response.headers()));
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(away)? {
        if body.len() + chunk.len() > LARGEST_ANSWER {
            return Err(OAuthError::Unreadable);
        }
        body.extend_from_slice(&chunk);
    }
    Ok(Answer { status, retry_after, body })
}

/// In seconds; the form with a date is not used there.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    headers.get(RETRY_AFTER)?.to_str().ok()?.trim().parse().ok().map(Duration::from_secs)
}

impl Answer {
    /// The body of a success.
    fn read<T: DeserializeOwned>(&self) -> Result<T, OAuthError> {
        if !self.status.is_success() {
            return Err(OAuthError::Status { status: self.status, retry_after: self.retry_after });
        }
        serde_json::from_slice(&self.body).map_err(|_| OAuthError::Unreadable)
    }

    fn read_grant(&self) -> Result<Granted, OAuthError> {
        #[derive(Deserialize)]
        struct Body {
            access_token: String,
            #[serde(default)]
            refresh_token: Option<String>,
            #[serde(default)]
            expires_in: Option<u64>,
            #[serde(default)]
            scope: Value,
        }
        let Body { access_token, refresh_token, expires_in, scope } = self.read()?;
        let refresh_token = refresh_token.filter(|token| !token.is_empty());
        if ![Some(&access_token), refresh_token.as_ref()]
            .into_iter()
            .flatten()
            .all(|text| is_token_text(text))
        {
            return Err(OAuthError::Unreadable);
        }
        // A list at Twitch, one text in the standard.
        let scope: Vec<&str> = match &scope {
            Value::Array(list) => list.iter().filter_map(Value::as_str).collect(),
            Value::String(text) => text.split(' ').collect(),
            _ => Vec::new(),
        };
        Ok(Granted {
            access: Secret::new(access_token),
            refresh: refresh_token.map(Secret::new),
            expires_in: expires_in.filter(|seconds| *seconds > 0),
            scope: scopes(scope),
        })
    }

    /// What a refusal says, in lower case: Twitch says it in `message`, the standard in `error`.
    fn words(&self) -> Vec<String> {
        let body: Value = serde_json::from_slice(&self.body).unwrap_or_default();
        let word = |name: &str| body.get(name).and_then(Value::as_str).map(str::to_ascii_lowercase);
        [word("message"), word("error")].into_iter().flatten().collect()
    }
}

/// Text for a person's terminal.
fn shown(text: &str) -> Result<String, OAuthError> {
    let is_fine =
        (1..=LONGEST_SHOWN).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic());
    if is_fine { Ok(text.to_owned()) } else { Err(OAuthError::Unreadable) }
}
