//! The keeper of the token: one task that reads, validates and refreshes it.
//!
//! **Refreshing** spends the refresh token: of a public client it can be used once. So whoever is about to refresh says
//! so first, where the token is stored, on condition that nobody wrote there since; the others wait for the word to
//! lapse, or for the token. The new one is stored, on the same condition, before anybody logs in with it. What a crash
//! between Twitch's answer and that write costs is the refresh token of a public client; nothing else is lost.
//!
//! **When it fails**, [`Pace`] says when to ask again. Meanwhile what is held stays in use.

mod held;
mod tell;

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use jiff::{SignedDuration, Timestamp};
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

use super::oauth::{Granted, OAuth, OAuthError, Validated};
use super::pace::Pace;
use super::{
    CHAT_READ, Change, Claim, Credentials, OAuthOp, Stored, Token, TokenStore, TokenStoreError, Verdict,
};
use crate::clock::Clock;
use crate::errors::{Coded as _, ErrorCode};
use crate::retry::Backoff;
use crate::source::twitch::connection::stopped;
use crate::telemetry::logs::with_causes;
use held::{Held, Step, refresh_at};

/// How long a claim is good: longer than a refresh and the write after it may take.
const LEASE: Duration = Duration::from_secs(20);
/// Clocks of instances differ by less.
const SKEW: SignedDuration = SignedDuration::from_mins(2);
/// Whoever lost a race looks again after so long, and up to twice as long.
const AFTER_CONFLICT: Duration = Duration::from_millis(250);
/// Where there is no token, it is looked for so often, should its store not have told of one.
const LOOK_AGAIN: Duration = Duration::from_mins(5);
/// Waits for a store that is away.
const FIRST_RETRY: Duration = Duration::from_secs(1);
const LONGEST_RETRY: Duration = Duration::from_mins(1);
/// The time of day may be set, and a machine may sleep: it is looked at so often.
const LONGEST_SLEEP: Duration = Duration::from_mins(1);
/// Rewrites of a refreshed token in a row, while others write beside us.
const MOST_CONFLICTS: usize = 8;

/// A token that was got and is not stored yet.
struct Unstored {
    token: Token,
    /// The one whose refresh token was spent for it.
    spent: Token,
    revision: u64,
    validated_at: Option<Timestamp>,
    is_unproven: bool,
}

/// The keeper.
pub struct Keeper {
    store: Arc<dyn TokenStore>,
    oauth: OAuth,
    shared: Arc<Credentials>,
    clock: Clock,
    /// This instance, in claims.
    name: String,
    pace: Pace,
    store_backoff: Backoff,
    /// The store is not asked before, but when something changes.
    store_wait: Option<Instant>,
    /// The claim of another instance, and when it was first seen.
    other: Option<(Claim, Instant)>,
    /// When the store was last read.
    read_at: Option<Instant>,
    held: Option<Held>,
    unstored: Option<Unstored>,
    /// What is wrong with the token.
    trouble: Option<ErrorCode>,
    /// What is wrong with where it is stored. One is no news of the other.
    store_trouble: Option<ErrorCode>,
}

impl Keeper {
    /// Of a token that was not looked at so far.
    pub fn new(store: Arc<dyn TokenStore>, oauth: OAuth, shared: Arc<Credentials>, clock: Clock) -> Self {
        Self {
            store,
            oauth,
            shared,
            clock,
            name: uuid::Uuid::new_v4().simple().to_string(),
            pace: Pace::new(),
            store_backoff: Backoff::new(FIRST_RETRY, LONGEST_RETRY),
            store_wait: None,
            other: None,
            read_at: None,
            held: None,
            unstored: None,
            trouble: None,
            store_trouble: None,
        }
    }

    /// Keeps the token until `stop` becomes true. What is under way then is finished: a token that Twitch has issued is
    /// stored.
    pub async fn run(mut self, mut stop: watch::Receiver<bool>) {
        let mut changes = self.store.changes();
        let mut verdicts = self.shared.verdict.subscribe();
        loop {
            let (next, at) = self.next(Instant::now());
            let wake = at.min(Instant::now() + LONGEST_SLEEP);
            tokio::select! {
                biased;
                () = stopped(&mut stop) => break,
                Ok(()) = verdicts.changed() => {
                    let verdict = verdicts.borrow_and_update().clone();
                    self.hear(verdict.as_ref());
                }
                Some(()) = changes.next() => self.read().await,
                () = sleep_until(wake) => if wake == at { self.take(next).await },
            }
            self.settle();
        }
        if self.unstored.is_some() {
            self.put().await;
        }
    }

    /// What to do next, and when.
    fn next(&self, now: Instant) -> (Step, Instant) {
        let store_free = self.store_wait.unwrap_or(now).max(now);
        if self.unstored.is_some() {
            return (Step::Put, store_free);
        }
        let Some(held) = &self.held else {
            let due = self.read_at.map_or(now, |at| at + LOOK_AGAIN);
            return (Step::Read, store_free.max(due));
        };
        let (step, wait) = held.next(self.oauth.has_client(), self.clock.now());
        let at = (now + wait).max(self.pace.next_free(now));
        if step == Step::Refresh { (step, at.max(store_free)) } else { (step, at) }
    }

    async fn take(&mut self, step: Step) {
        match step {
            Step::Read => self.read().await,
            Step::Put => self.put().await,
            Step::Validate => self.validate().await,
            Step::Refresh => self.refresh().await,
        }
    }

    /// Lets those go on who wait to know what to log in with.
    fn settle(&self) {
        let now = self.clock.now();
        let is_known = match &self.held {
            Some(held) => held.is_usable(now),
            None => self.read_at.is_some(),
        };
        if is_known || self.trouble.or(self.store_trouble).is_some() {
            self.shared.is_settled.send_replace(true);
        }
    }

    /// Twitch took a login, or refused it.
    fn hear(&mut self, verdict: Option<&Verdict>) {
        let now = Instant::now();
        let Some(held) = &mut self.held else { return };
        match verdict {
            Some(Verdict::Accepted(token)) if held.token().access.matches(token.expose()) => {
                (held.is_refused, held.is_refused_by_chat) = (false, false);
                if std::mem::take(&mut held.is_unproven) {
                    self.pace.succeeded();
                }
            }
            Some(Verdict::Refused(token)) if held.token().access.matches(token.expose()) => {
                (held.is_refused, held.is_refused_by_chat) = (true, true);
                if held.is_unproven {
                    // Another one would fare no better.
                    self.pace.failed(now, None);
                }
            }
            // About one that is not in use any more.
            _ => {}
        }
    }

    /// Looks at what is stored, and takes over what is new.
    async fn read(&mut self) {
        match self.store.read().await {
            Ok(Some(stored)) => {
                self.store_works();
                match &mut self.held {
                    Some(held) if held.token().is_same(&stored.token) => {
                        // What is known of it by asking stays.
                        held.stored.claim = stored.claim;
                        held.stored.revision = stored.revision;
                        held.stored.token.refresh = stored.token.refresh;
                    }
                    _ => self.adopt(stored),
                }
                self.note_claim();
            }
            Ok(None) => {
                self.store_works();
                if self.held.take().is_some() {
                    tracing::warn!(error_code = %ErrorCode::TokenUnusable, "the token is gone; new connections are anonymous");
                }
                self.well();
            }
            Err(error) => self.store_failed(&error),
        }
    }

    fn note_claim(&mut self) {
        let claim = self.held.as_ref().and_then(|held| held.stored.claim.clone());
        let claim = claim.filter(|claim| claim.by != self.name);
        match (claim, &self.other) {
            (Some(claim), Some((known, _))) if claim == *known => {}
            (claim, _) => self.other = claim.map(|claim| (claim, Instant::now())),
        }
    }

    fn adopt(&mut self, stored: Stored) {
        let token = &stored.token;
        let (login, is_first) = (token.login.clone(), self.held.is_none());
        if token.refresh.is_some() && !self.oauth.has_client() {
            tracing::warn!(error_code = %ErrorCode::ClientRefused, "the token cannot be refreshed: TWITCH_CLIENT_ID is not set");
        }
        if !is_first {
            tracing::info!(login, "somebody else stored a new token; new connections log in with it");
        }
        self.held = Some(Held::new(stored, None));
        // It deserves to be tried, whatever became of the one before.
        self.pace.succeeded();
        self.well();
    }

    async fn validate(&mut self) {
        let Some(access) = self.held.as_ref().map(|held| held.token().access.clone()) else { return };
        self.pace.called(Instant::now());
        let answer = self.oauth.validate(&access).await;
        self.count(OAuthOp::Validate, answer.as_ref().err());
        let Some(held) = &mut self.held else { return };
        match answer {
            Ok(Validated { login, user_id, scope, expires_in }) => {
                let now = self.clock.now();
                let token = &mut held.stored.token;
                let has_scope = scope.iter().any(|scope| scope == CHAT_READ);
                if token.login.as_ref().is_some_and(|given| *given != login) {
                    tracing::warn!(
                        error_code = %ErrorCode::LoginFailed,
                        given = token.login,
                        login,
                        "the token belongs to another login than was given"
                    );
                }
                (token.login, token.user_id, token.scope) = (Some(login), Some(user_id), scope);
                (token.expires_in, token.obtained) = (expires_in, Some(now));
                held.refresh_at = refresh_at(token, fastrand::f64());
                held.validated_at = Some(now);
                held.is_refused = false;
                if !held.is_unproven {
                    self.pace.succeeded();
                }
                if has_scope {
                    self.well();
                } else {
                    self.fails(ErrorCode::ScopeMissing, "it lacks chat:read", None);
                }
            }
            Err(OAuthError::TokenRefused) => {
                held.is_refused = true;
                if held.next(self.oauth.has_client(), self.clock.now()).0 != Step::Refresh {
                    self.refused(&OAuthError::TokenRefused);
                }
            }
            Err(error) => self.refused(&error),
        }
    }

    async fn refresh(&mut self) {
        let before = self.held.as_ref().map(|held| held.token().access.clone());
        self.read().await;
        let (Some(before), Some(held)) = (before, &self.held) else { return };
        let Some(refresh) = held.token().refresh.clone() else { return };
        if !held.token().access.matches(before.expose()) || self.store_wait.is_some() {
            return;
        }
        if let Some(until) = self.others_turn() {
            self.store_wait = Some(until);
            return;
        }
        let Some(revision) = self.claim().await else { return };
        let Some(held) = &mut self.held else { return };
        held.stored.revision = revision;
        self.pace.called(Instant::now());
        let answer = self.oauth.refresh(&refresh).await;
        self.count(OAuthOp::Refresh, answer.as_ref().err());
        match answer {
            Ok(granted) => {
                self.granted(granted);
                self.put().await;
            }
            Err(error @ OAuthError::TokenRefused) => {
                // Perhaps because another instance was faster.
                self.read().await;
                if self.held.as_ref().is_some_and(|held| held.token().access.matches(before.expose())) {
                    if let Some(held) = &mut self.held {
                        held.is_refused = true;
                    }
                    self.refused(&error);
                }
            }
            Err(error) => self.refused(&error),
        }
    }

    /// Until when it is another instance's turn, if it is.
    fn others_turn(&self) -> Option<Instant> {
        let (claim, seen_at) = self.other.as_ref()?;
        let has_lapsed = claim.until.checked_add(SKEW).is_ok_and(|until| until < self.clock.now());
        let until = *seen_at + LEASE;
        (!has_lapsed && until > Instant::now()).then_some(until)
    }

    /// Says that this instance is getting the next token; the revision that says so.
    async fn claim(&mut self) -> Option<u64> {
        let until = self.clock.now().checked_add(LEASE).ok()?;
        let claim = Claim { by: self.name.clone(), until };
        let revision = self.held.as_ref()?.stored.revision;
        match self.store.write(Change::Claim(claim), revision).await {
            Ok(revision) => Some(revision),
            Err(TokenStoreError::Conflict) => {
                self.store_wait = Some(Instant::now() + AFTER_CONFLICT.mul_f64(1.0 + fastrand::f64()));
                None
            }
            Err(error) => {
                self.store_failed(&error);
                None
            }
        }
    }

    fn granted(&mut self, granted: Granted) {
        let Some(held) = &self.held else { return };
        let Granted { access, refresh, expires_in, scope } = granted;
        let spent = held.token().clone();
        let token = Token {
            access,
            // The same as before, unless it says otherwise.
            refresh: refresh.or_else(|| spent.refresh.clone()),
            expires_in,
            obtained: Some(self.clock.now()),
            scope: if scope.is_empty() { spent.scope.clone() } else { scope },
            user_id: spent.user_id.clone(),
            login: spent.login.clone(),
        };
        let (revision, validated_at) = (held.stored.revision, held.validated_at);
        let is_unproven = held.is_refused_by_chat;
        self.unstored = Some(Unstored { token, spent, revision, validated_at, is_unproven });
    }

    /// Stores what was got; then, and not before, it is in use.
    async fn put(&mut self) {
        for _ in 0..MOST_CONFLICTS {
            let Some(unstored) = &mut self.unstored else { return };
            match self.store.write(Change::Token(unstored.token.clone()), unstored.revision).await {
                Ok(revision) => {
                    self.store_works();
                    return self.stored(revision);
                }
                Err(TokenStoreError::Conflict) => match self.store.read().await {
                    // Still the one that was spent: what somebody else wrote is not a newer token.
                    Ok(Some(stored)) if stored.token.has_refresh_of(&unstored.spent) => {
                        unstored.revision = stored.revision;
                    }
                    Ok(Some(stored)) => {
                        self.unstored = None;
                        self.store_works();
                        return self.adopt(stored);
                    }
                    Ok(None) => {
                        self.unstored = None;
                        return self.read().await;
                    }
                    Err(error) => return self.store_failed(&error),
                },
                Err(error) => return self.store_failed(&error),
            }
        }
        self.store_failed(&TokenStoreError::Conflict);
    }

    fn stored(&mut self, revision: u64) {
        let Some(Unstored { token, validated_at, is_unproven, .. }) = self.unstored.take() else { return };
        let held = Held::new(Stored { token, claim: None, revision }, validated_at);
        let expires_at = held.token().expires_at().map(tracing::field::display);
        tracing::info!(login = held.token().login, expires_at, "the token was refreshed");
        self.held = Some(Held { is_unproven, ..held });
        self.other = None;
        if !is_unproven {
            self.pace.succeeded();
        }
        let now = self.clock.now();
        self.shared.show(|seen| seen.last_refreshed_at = Some(now));
        self.store_well();
        self.well();
    }

    /// Twitch's OAuth did not do what it was asked.
    fn refused(&mut self, error: &OAuthError) {
        let wait = self.pace.failed(Instant::now(), error.retry_after());
        self.fails(error.code(), &with_causes(error), Some(wait));
    }

    fn store_failed(&mut self, error: &TokenStoreError) {
        let wait = self.store_backoff.next_wait();
        self.store_wait = Some(Instant::now() + wait);
        self.fails(error.code(), &with_causes(error), Some(wait));
    }

    fn store_works(&mut self) {
        self.read_at = Some(Instant::now());
        self.store_wait = None;
        self.store_backoff.reset();
        self.store_well();
    }
}
