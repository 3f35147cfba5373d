//! Which login a room has now, by the word of Twitch's API: for those that do not answer to the login they are known by,
//! and for all of them each hour. Only with an account's token and the id of the application that it was issued to.
//!
//! See <https://dev.twitch.tv/docs/api/reference/#get-users>. A service that hangs, fails or answers nonsense costs
//! nothing but what it would have said: every call has a time-out, every answer a limit, and after a failure the wait
//! doubles.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use reqwest::Client;
use reqwest::redirect::Policy;
use serde::Deserialize;
use thiserror::Error;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

use super::connection::stopped;
use super::credentials::{Account, Credentials};
use super::roster::{Lookout, RoomId, Roster, is_login};
use super::settings::TwitchConfig;
use crate::clock::Clock;
use crate::errors::ErrorCode;
use crate::retry::Backoff;
use crate::telemetry::logs::Said;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// For one answer, from the request to its last byte.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// Rooms that may be asked for at a time.
const BATCH: usize = 100;
/// What is said of a user has some 600 bytes.
const LARGEST_ANSWER: usize = 1 << 20;
/// All rooms are looked up so often.
const EVERY: Duration = Duration::from_hours(1);
/// Between the answers to two questions, at least; and from the start to the first.
const PAUSE: Duration = Duration::from_secs(3);
const FIRST_RETRY: Duration = Duration::from_secs(15);
const LONGEST_RETRY: Duration = Duration::from_mins(10);

/// No client for the API could be made.
#[derive(Debug, Error)]
#[error("TWITCH_API_URL cannot be used")]
pub struct HelixError(#[from] reqwest::Error);

/// Why the logins are not known.
#[derive(Debug, Error)]
enum LookupError {
    #[error("no answer")]
    Away(#[source] reqwest::Error),
    #[error("answered {0}")]
    Status(reqwest::StatusCode),
    #[error("the answer is not what the documentation says")]
    Unreadable,
}

/// An answer.
#[derive(Deserialize)]
struct Users {
    data: Vec<User>,
}

#[derive(Deserialize)]
struct User {
    id: String,
    login: String,
}

/// The API.
pub(super) struct Helix {
    url: String,
    client_id: String,
    /// Asked for each request: the token may change.
    credentials: Arc<Credentials>,
    client: Client,
    clock: Clock,
}

impl Helix {
    /// Of these settings; `None` without the application that tokens are issued to.
    pub(super) fn of(
        config: &TwitchConfig,
        tls: Option<Arc<rustls::ClientConfig>>,
        credentials: &Arc<Credentials>,
        clock: &Clock,
    ) -> Result<Option<Self>, HelixError> {
        let Some(client) = &config.credentials.client else { return Ok(None) };
        let builder = Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .timeout(ANSWER_TIMEOUT)
            .redirect(Policy::none())
            .no_proxy();
        let builder = match tls {
            Some(tls) => builder.tls_backend_preconfigured((*tls).clone()),
            None => builder,
        };
        Ok(Some(Self {
            url: config.api.as_str().to_owned(),
            client_id: client.id.clone(),
            credentials: Arc::clone(credentials),
            client: builder.build()?,
            clock: clock.clone(),
        }))
    }

    /// Looks logins up until `stop` becomes true.
    pub(super) async fn run(
        self,
        roster: watch::Receiver<Arc<Roster>>,
        lookout: Lookout,
        mut stop: watch::Receiver<bool>,
    ) {
        let mut unanswered = lookout.unanswered.subscribe();
        let mut backoff = Backoff::new(FIRST_RETRY, LONGEST_RETRY);
        let mut said = Said::default();
        let mut all_due = Instant::now() + PAUSE;
        // While it fails nothing else is asked, unless it is with another token.
        let mut not_before = all_due;
        let mut accounts = self.credentials.changes();
        let mut has_failed = false;
        loop {
            let is_all = tokio::select! {
                () = stopped(&mut stop) => return,
                () = sleep_until(all_due.max(not_before)) => true,
                Ok(()) = accounts.changed(), if has_failed => true,
                Ok(()) = unanswered.changed(), if !has_failed => false,
            };
            if !has_failed {
                tokio::select! {
                    () = stopped(&mut stop) => return,
                    () = sleep_until(not_before) => {}
                }
            }
            let account = tokio::select! {
                () = stopped(&mut stop) => return,
                account = with_account(&mut accounts) => account,
            };
            let wanted = Arc::clone(&roster.borrow());
            let missing: Vec<_> = unanswered.borrow_and_update().keys().copied().collect();
            let rooms = if is_all { wanted.rooms().into_keys().collect() } else { missing };
            let asked = tokio::select! {
                () = stopped(&mut stop) => return,
                asked = self.look_up(&rooms, &account, (&roster, &lookout)) => asked,
            };
            has_failed = asked.is_err();
            match asked {
                Ok(()) => {
                    backoff.reset();
                    not_before = Instant::now() + PAUSE;
                    all_due = if is_all { Instant::now() + EVERY } else { all_due };
                }
                Err(error) => {
                    said.failure(
                        ErrorCode::ApiUnavailable,
                        &error,
                        "Twitch's API does not tell the channels' logins",
                    );
                    not_before = Instant::now() + backoff.next_wait();
                    // All of them then, those that were asked for included.
                    all_due = not_before;
                }
            }
        }
    }

    async fn look_up(
        &self,
        rooms: &[RoomId],
        account: &Account,
        (roster, lookout): (&watch::Receiver<Arc<Roster>>, &Lookout),
    ) -> Result<(), LookupError> {
        for batch in rooms.chunks(BATCH) {
            let asked: BTreeSet<_> = batch.iter().copied().collect();
            let answered = self.logins(batch, account).await?;
            let wanted = Arc::clone(&roster.borrow());
            let known = wanted.rooms();
            for (room, login) in answered {
                if asked.contains(&room) && known.get(&room) != Some(&login.as_str()) {
                    lookout.saw(room, &login, self.clock.now(), &wanted);
                }
            }
        }
        Ok(())
    }

    async fn logins(
        &self,
        rooms: &[RoomId],
        account: &Account,
    ) -> Result<Vec<(RoomId, String)>, LookupError> {
        let ids: Vec<_> = rooms.iter().map(|room| format!("id={room}")).collect();
        let url = format!("{}/users?{}", self.url, ids.join("&"));
        let away = |error: reqwest::Error| LookupError::Away(error.without_url());
        let request =
            self.client.get(url).header("client-id", &self.client_id).bearer_auth(account.token.expose());
        let mut response = request.send().await.map_err(away)?;
        if !response.status().is_success() {
            return Err(LookupError::Status(response.status()));
        }
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(away)? {
            if body.len() + chunk.len() > LARGEST_ANSWER {
                return Err(LookupError::Unreadable);
            }
            body.extend_from_slice(&chunk);
        }
        let users: Users = serde_json::from_slice(&body).map_err(|_| LookupError::Unreadable)?;
        let login = |user: User| Some((user.id.parse().ok()?, user.login));
        Ok(users.data.into_iter().filter_map(login).filter(|(_, login)| is_login(login)).collect())
    }
}

/// Waits until there is an account.
async fn with_account(accounts: &mut watch::Receiver<Option<Account>>) -> Account {
    loop {
        if let Some(account) = accounts.borrow_and_update().clone() {
            return account;
        }
        if accounts.changed().await.is_err() {
            // Whoever would say so is gone: the end is near.
            std::future::pending::<()>().await;
        }
    }
}
