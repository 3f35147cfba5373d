//! The list, kept as the store has it: one listener, and the writes that follow from what Twitch says.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::book::Book;
use super::{Channels, PATIENCE};
use crate::errors::{Coded as _, ErrorCode};
use crate::retry::Backoff;
use crate::source::twitch::{Roster, Sights};
use crate::store::{Changes, Collection, Document, Name, StoreError, Version, WriteRefusal};
use crate::telemetry::logs::Said;

/// Waits before listening again: instances agree within five seconds.
const FIRST_RETRY: Duration = Duration::from_millis(250);
const LONGEST_RETRY: Duration = Duration::from_secs(3);
/// For the first answer of a listener.
const ATTACH_TIMEOUT: Duration = Duration::from_secs(15);
/// What becomes due by itself is looked for so often.
const TICK: Duration = Duration::from_secs(30);
/// Writes that follow from each other, at a time.
const ROUNDS: usize = 4;

/// Keeps the source informed of which channels are wanted, and the store of what the source sees.
pub struct Follow {
    channels: Channels,
    book: Book,
    roster: watch::Sender<Arc<Roster>>,
    sights: watch::Receiver<Sights>,
    /// For writes that did not work.
    backoff: Backoff,
    /// When they are tried again.
    retry_at: Option<Instant>,
    said: Said,
    /// That the store is away was said.
    is_away: bool,
    /// Documents that were said to be unreadable.
    unreadable: BTreeMap<Arc<str>, Version>,
}

impl Follow {
    /// `keeps_fixed`: whether the rooms of fixed channels are kept in the store. What is wanted goes to `roster`; what
    /// the source sees comes from `sights`.
    pub fn new(
        channels: Channels,
        keeps_fixed: bool,
        roster: watch::Sender<Arc<Roster>>,
        sights: watch::Receiver<Sights>,
    ) -> Self {
        let book = Book::new(Arc::clone(&channels.fixed), keeps_fixed);
        let backoff = Backoff::new(FIRST_RETRY, TICK);
        Self {
            channels,
            book,
            roster,
            sights,
            backoff,
            retry_at: None,
            said: Said::default(),
            is_away: false,
            unreadable: BTreeMap::new(),
        }
    }

    /// Follows the store. Does not end: while the store is away, the last known list stays.
    pub async fn run(mut self) {
        let mut backoff = Backoff::new(FIRST_RETRY, LONGEST_RETRY);
        loop {
            let store = self.channels.store.clone();
            let following = timeout(ATTACH_TIMEOUT, store.follow(Collection::Channels));
            let following = self.showing_until(following).await;
            match following.unwrap_or_else(|_| Err(StoreError::Away("no answer".to_owned()))) {
                Ok(changes) => match self.follow(changes, &mut backoff).await {
                    // Listeners are ended now and then. If the store is away, the next one says so.
                    Some(error) if error.is_transient() => {
                        tracing::debug!(error = %error, "the listener for channels was interrupted");
                    }
                    Some(error) => self.not_followed(&error),
                    None => tracing::debug!("the listener for channels was ended"),
                },
                Err(error) => self.not_followed(&error),
            }
            self.showing_until(sleep(backoff.next_wait())).await;
        }
    }

    /// Says why: once, until they are followed again.
    fn not_followed(&mut self, error: &StoreError) {
        if !error.is_transient() {
            self.said.failure(error.code(), error, "channels cannot be followed");
        } else if !std::mem::replace(&mut self.is_away, true) {
            tracing::warn!(
                error_code = %error.code(), error = %error,
                "channels cannot be followed; those that are known stay"
            );
        }
    }

    /// Waits, and shows what is seen of rooms meanwhile: a channel that is renamed while the store is away is followed.
    async fn showing_until<T>(&mut self, waited_for: impl Future<Output = T>) -> T {
        let mut waited_for = std::pin::pin!(waited_for);
        loop {
            tokio::select! {
                done = &mut waited_for => return done,
                Ok(()) = self.sights.changed() => self.show(),
            }
        }
    }

    /// Follows until it is interrupted; by what, if that was said.
    async fn follow(&mut self, mut changes: Changes, backoff: &mut Backoff) -> Option<StoreError> {
        let mut is_first = true;
        let mut tick = Instant::now() + TICK;
        loop {
            let due = tick.min(self.retry_at.unwrap_or(tick));
            tokio::select! {
                batch = changes.next() => {
                    let batch = match batch? {
                        Ok(batch) => batch,
                        Err(error) => return Some(error),
                    };
                    backoff.reset();
                    self.take(batch, std::mem::take(&mut is_first));
                }
                Ok(()) = self.sights.changed(), if !is_first => {}
                () = sleep_until(due), if !is_first => tick = Instant::now() + TICK,
            }
            self.show();
            if self.retry_at.is_none_or(|at| at <= Instant::now()) {
                self.write().await;
                self.show();
            }
        }
    }

    /// The store says so.
    fn take(&mut self, batch: Vec<(Name, Option<Document>)>, is_whole: bool) {
        let sights = self.sights.borrow();
        if is_whole {
            self.book.replace(batch, &sights);
        } else {
            self.book.change(batch, &sights);
        }
        if std::mem::take(&mut self.is_away) {
            tracing::info!("channels are followed again");
        }
        let unreadable = self.book.unreadable();
        for (id, _) in unreadable.iter().filter(|(id, version)| self.unreadable.get(*id) != Some(version)) {
            tracing::error!(
                error_code = %ErrorCode::BadStoredValue, document = %format_args!("channels/{id}"),
                "a stored channel cannot be read; it is taken for absent"
            );
        }
        self.unreadable = unreadable;
    }

    /// Tells the source what is wanted.
    fn show(&mut self) {
        let sights = self.sights.borrow_and_update().clone();
        self.book.learn(&sights);
        let wanted = self.book.roster(&sights);
        self.roster.send_if_modified(|before| {
            let is_other = **before != wanted;
            if is_other {
                if wanted.is_whole && !before.is_whole && wanted.channels.is_empty() {
                    tracing::warn!(
                        error_code = %ErrorCode::NoChannels,
                        "no channels: set TWITCH_CHANNELS, or add one by `inlet channel add`, to read chat \
                         (`inlet demo` shows how it looks without any)"
                    );
                }
                *before = Arc::new(wanted);
            }
            is_other
        });
    }

    /// Writes what follows from what is known. What could not be written is tried again after a while: by then the
    /// listener has told what somebody else wrote.
    async fn write(&mut self) {
        for _ in 0..ROUNDS {
            let sights = self.sights.borrow().clone();
            let writes = self.book.writes(&sights, self.channels.clock.now());
            if writes.is_empty() {
                self.backoff.reset();
                self.retry_at = None;
                return;
            }
            let mut has_failed = false;
            match self.channels.store.write_many(writes.clone(), PATIENCE).await {
                Ok(outcomes) => {
                    for (write, outcome) in writes.iter().zip(outcomes) {
                        match outcome {
                            Ok(version) => self.book.wrote(write, version, &sights),
                            Err(WriteRefusal::Conflict) => has_failed = true,
                            Err(WriteRefusal::Failed(error)) => {
                                has_failed = true;
                                self.said.failure(error.code(), &error, "a channel cannot be written");
                            }
                        }
                    }
                }
                Err(error) => {
                    has_failed = true;
                    self.said.failure(error.code(), &error, "channels cannot be written");
                }
            }
            if has_failed {
                self.retry_at = Some(Instant::now() + self.backoff.next_wait());
                return;
            }
        }
    }
}
