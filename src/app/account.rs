//! The account that chat is read with: where its token is kept, and who keeps it.

use std::path::Path;
use std::sync::Arc;

use prometheus::Registry;
use rustls::ClientConfig;

use super::token_document::TokenDocument;
use super::{AppError, PathConfig};
use crate::clock::Clock;
use crate::source::twitch::credentials::oauth::OAuth;
use crate::source::twitch::credentials::{Credentials, Keeper, TokenFile, TokenMetrics, TokenStore};
use crate::source::twitch::{TwitchMetrics, TwitchStatus};
use crate::store::measured::Store;
use crate::tls::{self, TlsError};

/// The account.
pub struct Account {
    /// How the source is that reads with it, the account itself within.
    pub status: Arc<TwitchStatus>,
    /// Where `inlet login` puts a token, whether it is in use or not.
    pub document: Arc<dyn TokenStore>,
    /// Who keeps the token that is in use.
    pub keeper: Keeper,
}

/// The account of these settings. The environment's token goes before the document's.
pub fn open_account(
    path: &PathConfig,
    folder: &Path,
    store: &Store,
    (metrics, registry): (&Arc<TwitchMetrics>, &Registry),
    clock: &Clock,
) -> Result<Account, AppError> {
    let config = &path.twitch.credentials;
    let document: Arc<dyn TokenStore> = Arc::new(TokenDocument::new(store.clone(), &config.document));
    let tokens = match &config.given {
        Some(given) => Arc::new(TokenFile::open(folder, given)?),
        None => Arc::clone(&document),
    };
    let credentials = Arc::new(Credentials::new(tokens.place(), TokenMetrics::new(registry)?));
    let keeper = Keeper::new(tokens, open_oauth(path)?, Arc::clone(&credentials), clock.clone());
    let status = TwitchStatus::new(path.twitch.enabled, Arc::clone(metrics), credentials, clock.clone());
    Ok(Account { status: Arc::new(status), document, keeper })
}

/// Twitch's OAuth, by these settings.
pub fn open_oauth(path: &PathConfig) -> Result<OAuth, AppError> {
    let config = &path.twitch.credentials;
    let tls = if config.oauth.is_tls() { Some(tls_if_any(path)?) } else { None };
    Ok(OAuth::new(config.oauth.clone(), config.client.clone(), tls)?)
}

/// A machine without root certificates may still read chat anonymously.
pub(super) fn tls_if_any(path: &PathConfig) -> Result<Arc<ClientConfig>, TlsError> {
    match tls::client_config(path.tls.ca_file.as_deref()) {
        Err(TlsError::NoRoots) => tls::trusting_nobody(),
        config => config,
    }
}
