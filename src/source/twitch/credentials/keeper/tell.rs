//! What the keeper says and shows of the token: never the token.

use std::time::Duration;

use jiff::Timestamp;

use super::super::oauth::OAuthError;
use super::super::{Account, LastTrouble, OAuthOp, OAuthResult, Token, TokenState};
use super::Keeper;
use super::held::Held;
use crate::errors::ErrorCode;
use crate::telemetry::metrics::Label as _;

/// How it stands with a token that this is wrong with.
fn state_of(code: ErrorCode) -> TokenState {
    match code {
        ErrorCode::OAuthUnavailable | ErrorCode::StoreUnavailable => TokenState::Degraded,
        _ => TokenState::LoginFailed,
    }
}

impl Keeper {
    /// Says what is wrong, once, and shows it.
    pub(super) fn fails(&mut self, code: ErrorCode, error: &str, wait: Option<Duration>) {
        let trouble = match code {
            ErrorCode::StoreUnavailable | ErrorCode::TokenUnusable => &mut self.store_trouble,
            _ => &mut self.trouble,
        };
        if trouble.replace(code) != Some(code) {
            let error_code = code.as_str();
            let retry_ms = wait.map(|wait| u64::try_from(wait.as_millis()).unwrap_or(u64::MAX));
            let remedy = self.remedy();
            match code {
                ErrorCode::OAuthUnavailable => {
                    tracing::warn!(
                        error_code,
                        error,
                        retry_ms,
                        "Twitch's OAuth fails; the token stays as it is"
                    );
                }
                ErrorCode::StoreUnavailable => {
                    tracing::warn!(error_code, error, retry_ms, "the token cannot be read or stored now");
                }
                ErrorCode::ClientRefused => {
                    tracing::error!(error_code, error, retry_ms, "the bot's token cannot be refreshed");
                }
                ErrorCode::ScopeMissing => {
                    tracing::error!(
                        error_code,
                        error,
                        "the bot's token does not allow reading chat: {remedy}"
                    );
                }
                ErrorCode::TokenUnusable => {
                    tracing::error!(error_code, error, "the stored token cannot be used: {remedy}");
                }
                _ => {
                    tracing::error!(
                        error_code,
                        error,
                        retry_ms,
                        "Twitch no longer takes the bot's token: {remedy}"
                    );
                }
            }
        }
        let at = self.clock.now();
        self.shared.show(|seen| seen.last_error = Some(LastTrouble { code, at }));
        self.show();
    }

    fn remedy(&self) -> &'static str {
        match self.store.place() {
            "environment" => "set TWITCH_BOT_ACCESS_TOKEN anew, or leave it out and run `inlet login`",
            _ => "run `inlet login`",
        }
    }

    /// Nothing is wrong with the token any more.
    pub(super) fn well(&mut self) {
        if let Some(trouble) = self.trouble.take() {
            tracing::info!(was = trouble.as_str(), "the token is as it should be again");
        }
        self.show();
    }

    /// Nothing is wrong with where it is stored any more.
    pub(super) fn store_well(&mut self) {
        if let Some(trouble) = self.store_trouble.take() {
            tracing::info!(was = trouble.as_str(), "the token can be read and stored again");
            self.show();
        }
    }

    /// Hands out what is held, and shows what may be shown of it.
    pub(super) fn show(&self) {
        let token = self.held.as_ref().map(Held::token);
        let account = token.and_then(|token| {
            token.login.clone().map(|username| Account { username, token: token.access.clone() })
        });
        self.shared.publish(account);
        let expires_at = token.and_then(Token::expires_at);
        self.shared.metrics.expires.set(expires_at.map_or(0, Timestamp::as_second));
        self.shared.show(|seen| {
            let usual = if token.is_some() { TokenState::Ok } else { TokenState::Anonymous };
            seen.state = self.trouble.or(self.store_trouble).map_or(usual, state_of);
            seen.login = token.and_then(|token| token.login.clone());
            seen.user_id = token.and_then(|token| token.user_id.clone());
            seen.scopes = token.map(|token| token.scope.clone()).unwrap_or_default();
            seen.expires_at = expires_at;
            seen.last_validated_at = self.held.as_ref().and_then(|held| held.validated_at);
        });
    }

    pub(super) fn count(&self, op: OAuthOp, error: Option<&OAuthError>) {
        let result = match error {
            None => OAuthResult::Ok,
            Some(error) if error.is_outage() => OAuthResult::Failed,
            Some(_) => OAuthResult::Refused,
        };
        self.shared.metrics.requests.of(op, result).inc();
    }
}
