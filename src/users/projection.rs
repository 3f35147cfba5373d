//! The projection follows the stream, own and foreign events alike, and notes each under its user with its position. It
//! is the only thing that counts. The same follower tells the door which events are known.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use serde_json::{Value, json};

use super::fold::{Kind, Seen};
use super::{Shared, Users, flush, gauge};
use crate::bus::{Batch, BusError, BusState, ByUser, Follower, Start, StreamInfo, Wanted};
use crate::envelope::{EventType, MessageId, id};
use crate::errors::ErrorCode;
use crate::retry::Backoff;
use crate::status::Part;
use crate::telemetry::logs::Said;

const FIRST_RETRY: Duration = Duration::from_millis(100);
const LONGEST_RETRY: Duration = Duration::from_secs(2);

/// How the projection does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Following {
    /// It has not begun: the bus or the store is not there yet.
    Starting,
    /// It reads what it has not seen.
    CatchingUp,
    /// It has seen everything there is.
    CaughtUp,
    /// It lost the stream; it will begin again where it stands.
    Interrupted,
    /// It must not begin: what to change is in the text.
    Unfit(String),
}

impl Following {
    fn name(&self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::CatchingUp => "catching_up",
            Self::CaughtUp => "caught_up",
            Self::Interrupted => "interrupted",
            Self::Unfit(_) => "unfit",
        }
    }

    fn why(&self) -> Option<&str> {
        match self {
            Self::Unfit(why) => Some(why),
            Self::Starting | Self::CatchingUp | Self::CaughtUp | Self::Interrupted => None,
        }
    }
}

/// Hears which events the stream holds, and when it stored them.
pub(super) type Known = Box<dyn Fn(&[(MessageId, Timestamp)]) + Send + Sync>;

impl Users {
    /// Follows the stream. Does not end.
    pub async fn follow_stream(self, known: Known) {
        let shared = &*self.0;
        let mut backoff = Backoff::new(FIRST_RETRY, LONGEST_RETRY);
        let mut said = Said::default();
        loop {
            let mut bus = shared.bus.state();
            // The bus lives as long as this.
            drop(bus.wait_for(|state| *state == BusState::Up).await);
            shared.circuit.until(false).await;
            match shared.attach().await {
                Ok(Some(mut follower)) => {
                    shared.say(Following::CatchingUp);
                    backoff.reset();
                    match shared.pump(&mut follower, &known, &mut said).await {
                        Some(error) if !error.is_transient() => {
                            said.failure(
                                ErrorCode::StreamUncountable,
                                &error,
                                "the stream cannot be counted",
                            );
                        }
                        error => tracing::debug!(error = ?error, "the projection is interrupted"),
                    }
                    shared.say(Following::Interrupted);
                }
                Ok(None) => {}
                Err(error) if !error.is_transient() => {
                    said.failure(ErrorCode::StreamUncountable, &error, "the stream cannot be counted");
                }
                Err(error) => tracing::debug!(error = %error, "the stream cannot be followed now"),
            }
            shared.not_attached();
            tokio::time::sleep(backoff.next_wait()).await;
        }
    }
}

impl Shared {
    /// Begins where the projection stands, or behind what is counted. `None`: not possible now.
    async fn attach(&self) -> Result<Option<Follower>, BusError> {
        let Some(stream) = self.bus.stream() else { return Ok(None) };
        let standing = self.table().position_in(&stream.identity);
        let (start, is_first_ever) = match standing {
            Some(position) => (position, false),
            None => match self.counted_to(&stream.identity).await {
                Ok(counted) => (counted.unwrap_or(0), counted.is_none()),
                Err(flush::NotKnown::Away) => return Ok(None),
                Err(flush::NotKnown::AnotherSubject(subject)) => {
                    self.refuse_subject(&subject);
                    return Ok(None);
                }
            },
        };
        // Nobody is counted who is not to be known.
        self.barred.known().await;
        let follower = self.bus.follow(Start::Position(start + 1), Wanted::Headers).await?;
        if follower.identity != stream.identity {
            return Ok(None);
        }
        if is_first_ever {
            // That takes its time, and is waited for: the stream is being read.
            self.say(Following::CatchingUp);
            if !self.restore_forgotten().await? {
                return Ok(None);
            }
        }
        // Said before anything is counted, so that nobody with another subject begins beside us.
        // A note that cannot be read is written over.
        let version = self.note_version();
        if is_first_ever
            && !self.write_note_over(&stream.identity, version, follower.first_position - 1).await
        {
            return Ok(None);
        }
        let mut table = self.table();
        if table.position().is_none_or(|(identity, _)| *identity != *stream.identity) {
            table.begin(&stream.identity, start);
            self.warn_of_age(&stream);
        }
        if follower.first_position > start + 1 {
            let dropped = follower.first_position - start - 1;
            if !is_first_ever {
                table.lose(dropped);
            }
            table.followed_to(follower.first_position - 1);
        }
        self.show(&mut table);
        Ok(Some(follower))
    }

    /// A crash loses the counts of what the stream drops before anybody writes them.
    fn warn_of_age(&self, stream: &StreamInfo) {
        let least = self.config.flush_max * 2;
        if stream.max_age.is_some_and(|max_age| max_age < least) {
            tracing::warn!(error_code = %ErrorCode::StreamUnsafe, stream = stream.identity, max_age = ?stream.max_age, ?least, "the stream keeps messages for less than twice ENRICH_FLUSH_MAX: counts may be lost in a crash");
        }
    }

    /// Notes what comes, until the stream is lost or memory is at its end.
    async fn pump(&self, follower: &mut Follower, known: &Known, said: &mut Said) -> Option<BusError> {
        loop {
            if !self.has_room().await {
                return None;
            }
            match follower.next().await {
                Some(Ok(batch)) => {
                    said.over();
                    self.note(&batch);
                    let ids = batch.messages.iter().filter_map(|stored| Some((stored.id?, stored.stored_at)));
                    known(&ids.collect::<Vec<_>>());
                    if batch.is_end() {
                        self.say(Following::CaughtUp);
                    }
                }
                Some(Err(error)) => return Some(error),
                None => return None,
            }
        }
    }

    fn note(&self, batch: &Batch) {
        let now = self.clock.now();
        let barred = self.barred.now();
        let mut table = self.table();
        for stored in &batch.messages {
            if let Some(id) = stored.id
                && let Some((key, seen)) = counted(&stored.kind, id, stored.by_user.as_ref())
                && !barred.is_nobodys(key, seen.at)
                && (table.holds(key) || id::user_of_key(key).is_some())
            {
                table.note(key, seen, stored.position, now);
            }
        }
        if let Some(last) = batch.messages.last() {
            table.followed_to(last.position);
            self.metrics.position.set(gauge(last.position));
        }
        self.metrics.lag.set(gauge(batch.behind));
        self.show(&mut table);
        drop(table);
        drop(barred);
        self.changed.notify_one();
    }

    /// Waits until there is room for more uncounted events. False: there will be none, what was noted is forgotten, and
    /// is read again when the store answers.
    async fn has_room(&self) -> bool {
        while self.table().noted() >= self.config.max_pending {
            if self.circuit.is_open() {
                let counted_to = self.counted_to_now();
                let mut table = self.table();
                table.go_back_to(counted_to);
                tracing::warn!(
                    error_code = %ErrorCode::CountsDeferred,
                    counted_to,
                    "too many events are not counted while the store is away; they will be read again"
                );
                return false;
            }
            let flushed = self.flushed.notified();
            self.flush_now.notify_one();
            tokio::select! {
                () = flushed => {}
                () = self.circuit.until(true) => {}
            }
            // What the store refuses makes no room however often it is written.
            if self.table().noted() >= self.config.max_pending {
                tokio::time::sleep(FIRST_RETRY).await;
            }
        }
        true
    }

    /// Where it had begun to read, it is interrupted.
    fn not_attached(&self) {
        self.following.send_if_modified(|current| {
            let was_reading = *current == Following::CatchingUp;
            if was_reading {
                *current = Following::Interrupted;
            }
            was_reading
        });
    }

    fn say(&self, following: Following) {
        self.following.send_if_modified(|current| {
            let changed = *current != following;
            *current = following;
            changed
        });
    }

    fn refuse_subject(&self, theirs: &str) {
        let why = format!(
            "instances that share a stream and a user store must publish to the same subject: this one to {}, another to {theirs}",
            self.subject
        );
        let unfit = Following::Unfit(why);
        if *self.following.borrow() != unfit {
            tracing::error!(error_code = %ErrorCode::StreamUncountable, error = unfit.why(), "the stream is not counted");
        }
        self.say(unfit);
    }
}

/// What concerns a user.
pub(super) fn counted<'a>(
    kind: &str,
    id: MessageId,
    by_user: Option<&'a ByUser>,
) -> Option<(&'a Arc<str>, Seen)> {
    let by_user = by_user.filter(|_| !id.is_dead_letter)?;
    let kind = if kind == EventType::ChatMessage.as_str() {
        Kind::Message
    } else if kind == EventType::ChatNotice.as_str() {
        Kind::Notice
    } else {
        return None;
    };
    Some((&by_user.key, Seen { id: id.event, kind, at: by_user.occurred_at }))
}

/// The projection as the probes see it.
pub(super) struct ProjectionPart(pub(super) Users);

impl Part for ProjectionPart {
    fn name(&self) -> &'static str {
        "projection"
    }

    /// Where the bus or the store is away, that is what is waited for.
    fn is_waited_for(&self) -> bool {
        let shared = &*self.0.0;
        let is_behind = *shared.following.borrow() != Following::CaughtUp;
        is_behind && !shared.circuit.is_open() && *shared.bus.state().borrow() == BusState::Up
    }

    fn describe(&self) -> Value {
        let shared = &*self.0.0;
        let following = shared.following.borrow().clone();
        let position = shared.table().position();
        json!({
            "state": following.name(),
            "why": following.why(),
            "stream": position.as_ref().map(|(identity, _)| &**identity),
            "position": position.as_ref().map(|(_, position)| *position),
            "lagEvents": shared.metrics.lag.get(),
            "countedTo": shared.metrics.counted_to.get(),
        })
    }
}
