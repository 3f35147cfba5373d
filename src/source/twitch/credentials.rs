//! The account that chat is read with, and the token it logs in with: read, validated, refreshed before it expires, and
//! kept where the next start, or another instance, finds it.
//!
//! ```text
//! environment + file in DATA_DIR ─┐                     ┌─▶ account ──▶ new connections
//!                                 ├─ TokenStore ─ keeper┤
//! document in the user store ─────┘      ▲          │   └─▶ /_debug/twitch, /healthz
//!      (`inlet login` writes it)         └── oauth ─┘ ◀── Twitch refused, or took, the login
//! ```
//! One task, the [keeper](keeper::Keeper), holds the token. Connections that stand are left alone: a token that expires
//! ends none.

mod file;
mod keeper;
pub mod oauth;
mod pace;
pub mod settings;
mod token;

use std::sync::{Mutex, PoisonError};

use futures_util::future::BoxFuture;
use futures_util::stream::BoxStream;
use jiff::Timestamp;
use prometheus::{IntGauge, Registry};
use serde::{Serialize, Serializer};
use thiserror::Error;
use tokio::sync::watch;

use crate::errors::{Coded, ErrorCode};
use crate::label;
use crate::secret::Secret;
use crate::telemetry::metrics::{CountersBy, Label as _, Register};

pub use file::TokenFile;
pub use keeper::Keeper;
pub use token::{CHAT_READ, NoToken, Token};

/// Where a token is kept.
pub trait TokenStore: Send + Sync {
    /// The token, with the revision that says so; `None`: there is none. Within a bounded time.
    fn read(&self) -> BoxFuture<'_, Result<Option<Stored>, TokenStoreError>>;

    /// Changes what is stored, if it still is at `revision`; returns the new one. Within a bounded time. On the disk, or
    /// with the server, when it returns.
    fn write(&self, change: Change, revision: u64) -> BoxFuture<'_, Result<u64, TokenStoreError>>;

    /// Puts a token there whatever is there: a person has logged in. Whoever is getting another one meanwhile finds this.
    fn replace(&self, token: Token) -> BoxFuture<'_, Result<(), TokenStoreError>>;

    /// Says, without end, that somebody may have changed it.
    fn changes(&self) -> BoxStream<'static, ()>;

    /// Its name in `/_debug/twitch`.
    fn place(&self) -> &'static str;
}

/// What is stored.
#[derive(Debug, Clone)]
pub struct Stored {
    /// The token.
    pub token: Token,
    /// Who is getting the next one.
    pub claim: Option<Claim>,
    /// Changes with each write.
    pub revision: u64,
}

/// An instance's word that it is getting the next token. A refresh token can be used once, so two must not try.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    /// The instance: random, of one process.
    pub by: String,
    /// The word is good until then: whoever gave it may be gone.
    pub until: Timestamp,
}

/// What is written.
#[derive(Debug, Clone)]
pub enum Change {
    /// That somebody is getting the next token.
    Claim(Claim),
    /// The next token; whoever claimed to be getting it has.
    Token(Token),
}

/// Why a token could not be read or written.
#[derive(Debug, Error)]
pub enum TokenStoreError {
    /// It is not at that revision any more.
    #[error("somebody else changed the token")]
    Conflict,
    /// The store does not do it now.
    #[error("the token's store does not work: {0}")]
    Away(String),
    /// What is stored is no token.
    #[error("what is stored is no token: {0}")]
    Unusable(#[from] NoToken),
}

/// Who to log in as.
#[derive(Debug, Clone)]
pub struct Account {
    /// The login, lower case.
    pub username: String,
    /// Without `oauth:`.
    pub token: Secret,
}

impl Coded for TokenStoreError {
    fn code(&self) -> ErrorCode {
        match self {
            Self::Conflict | Self::Away(_) => ErrorCode::StoreUnavailable,
            Self::Unusable(_) => ErrorCode::TokenUnusable,
        }
    }
}

/// How it stands with the token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum TokenState {
    /// There is none: chat is read anonymously.
    Anonymous,
    /// It is as it should be, as far as is known.
    Ok,
    /// It could not be validated, refreshed or read lately.
    Degraded,
    /// It is of no use any more: a person has to do something.
    LoginFailed,
}

/// The last thing that went wrong.
#[derive(Debug, Clone, Serialize)]
pub struct LastTrouble {
    #[serde(serialize_with = "as_str")]
    code: ErrorCode,
    at: Timestamp,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde hands over a reference to the field")]
fn as_str<S: Serializer>(code: &ErrorCode, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(code.as_str())
}

/// What may be shown of a token.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct TokenSeen {
    /// How it stands.
    pub state: TokenState,
    /// Where it is kept: `environment` or `document`.
    source: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    login: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    user_id: Option<String>,
    scopes: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    expires_at: Option<Timestamp>,
    #[serde(skip_serializing_if = "Option::is_none")]
    last_validated_at: Option<Timestamp>,
    #[serde(skip_serializing_if = "Option::is_none")]
    last_refreshed_at: Option<Timestamp>,
    #[serde(skip_serializing_if = "Option::is_none")]
    last_error: Option<LastTrouble>,
}

impl TokenSeen {
    /// Where the token in use is kept: the [`TokenStore::place`].
    pub fn source(&self) -> &'static str {
        self.source
    }
}

label! {
    /// What Twitch's OAuth is asked for.
    pub enum OAuthOp {
        /// Whose a token is.
        Validate => "validate",
        /// The next token.
        Refresh => "refresh",
    }
}

label! {
    /// How it answered.
    pub enum OAuthResult {
        /// As it should.
        Ok => "ok",
        /// It refused the token, or the application.
        Refused => "refused",
        /// It did not, or failed.
        Failed => "failed",
    }
}

/// What is counted.
pub struct TokenMetrics {
    /// Requests to Twitch's OAuth.
    requests: CountersBy<OAuthOp, OAuthResult>,
    /// When the token expires, Unix seconds.
    expires: IntGauge,
}

impl TokenMetrics {
    /// Registers the series.
    pub fn new(registry: &Registry) -> prometheus::Result<Self> {
        let register = Register(registry);
        Ok(Self {
            requests: register.counters_by(
                "twitch_oauth_requests_total",
                "Requests to Twitch's OAuth, by how they were answered",
                ["op", "result"],
            )?,
            expires: register.gauge(
                "twitch_token_expires_at_seconds",
                "When the token expires, in Unix seconds; 0: there is none, or it is not known when",
            )?,
        })
    }
}

/// What Twitch's chat said to a login.
#[derive(Debug, Clone)]
enum Verdict {
    Accepted(Secret),
    Refused(Secret),
}

/// The account, for those who log in with it; and how it stands, for those who show it.
pub struct Credentials {
    account: watch::Sender<Option<Account>>,
    /// Whether it is known what to log in with.
    is_settled: watch::Sender<bool>,
    verdict: watch::Sender<Option<Verdict>>,
    seen: Mutex<TokenSeen>,
    metrics: TokenMetrics,
}

impl Credentials {
    /// Without an account so far. `place`: of the [`TokenStore`].
    pub fn new(place: &'static str, metrics: TokenMetrics) -> Self {
        let seen = TokenSeen {
            state: TokenState::Anonymous,
            source: place,
            login: None,
            user_id: None,
            scopes: Vec::new(),
            expires_at: None,
            last_validated_at: None,
            last_refreshed_at: None,
            last_error: None,
        };
        Self {
            account: watch::Sender::new(None),
            is_settled: watch::Sender::new(false),
            verdict: watch::Sender::new(None),
            seen: Mutex::new(seen),
            metrics,
        }
    }

    /// Who to log in as now; `None`: anonymously.
    pub(super) fn account(&self) -> Option<Account> {
        self.account.borrow().clone()
    }

    /// Says when that changes.
    pub(super) fn changes(&self) -> watch::Receiver<Option<Account>> {
        self.account.subscribe()
    }

    /// Waits until it is known who to log in as, or why it is not.
    pub(super) async fn settled(&self) {
        // The sender lives as long as this.
        drop(self.is_settled.subscribe().wait_for(|is_settled| *is_settled).await);
    }

    /// Twitch took the login.
    pub(super) fn accepted(&self, token: &Secret) {
        self.verdict.send_replace(Some(Verdict::Accepted(token.clone())));
    }

    /// Twitch refused the login.
    pub(super) fn refused(&self, token: &Secret) {
        self.verdict.send_replace(Some(Verdict::Refused(token.clone())));
    }

    /// What may be shown.
    pub fn seen(&self) -> TokenSeen {
        self.show(|seen| seen.clone())
    }

    fn show<T>(&self, work: impl FnOnce(&mut TokenSeen) -> T) -> T {
        work(&mut self.seen.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Hands out an account, if it is another than before.
    fn publish(&self, account: Option<Account>) {
        self.account.send_if_modified(|current| {
            let is_same = match (&*current, &account) {
                (None, None) => true,
                (Some(old), Some(new)) => {
                    old.username == new.username && old.token.matches(new.token.expose())
                }
                _ => false,
            };
            *current = account;
            !is_same
        });
    }
}
