//! That somebody is forgotten is said in the stream, too, as an event of its own: so consumers hear that they have
//! something to erase; and a start on a store that is new, and does not know who is forgotten, finds it there, behind
//! what they said, and writes it again before it counts anybody. The stream drops what is oldest first: what they said
//! is gone before the word is, but for what lay in the outbox of another instance when the word was said.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use serde::Serialize;
use thiserror::Error;
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};

use super::barred::{self, Bar, Tombstone};
use super::{EnrichMode, PATIENCE, Shared, Users};
use crate::bus::{Batch, BusError, BusState, ByUser, Lane, Message, Numbered, Refusal, Start, Wanted};
use crate::envelope::draft::{Content, PayloadJson, SourceRef};
use crate::envelope::id::{self, UserRef};
use crate::envelope::{Draft, EnvelopeV1, Event, EventType, MessageId, Origin, UnmatchedReason};
use crate::errors::ErrorCode;
use crate::retry::Backoff;
use crate::store::{Document, Fields, StoreError, Write, WriteRefusal};
use crate::telemetry::logs::Said;

/// For the stream's ack, and for each batch that is read back.
const BUS_PATIENCE: Duration = Duration::from_secs(10);

const FIRST_RETRY: Duration = Duration::from_millis(250);
const LONGEST_RETRY: Duration = Duration::from_secs(10);

/// Clocks differ: reading back starts so much before the word's own time.
const MARGIN: Duration = Duration::from_mins(1);

/// In the document of who is forgotten: it was said.
pub(super) const TOLD: &str = "told";

/// Who is forgotten, and was not said to be.
#[derive(Default)]
pub(super) struct Words {
    waiting: Mutex<VecDeque<Tombstone>>,
    added: Notify,
}

impl Words {
    pub(super) fn add(&self, words: impl Iterator<Item = Tombstone>) {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).extend(words);
        self.added.notify_one();
    }

    fn first(&self) -> Option<Tombstone> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).front().cloned()
    }

    fn drop_first(&self) {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
    }
}

/// Why a word was not said.
#[derive(Debug, Error)]
enum NotSaid {
    #[error("the bus is closed")]
    Closed,
    #[error("no ack in time")]
    NoAck,
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error(transparent)]
    Bus(#[from] BusError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Json(#[from] serde_json::Error),
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct WordPayload<'a> {
    user_ref: UserRef<'a>,
}

impl Users {
    /// Says in the stream who is forgotten. Does not end.
    pub async fn say_forgotten(self) {
        let shared = &*self.0;
        let mut lane = shared.bus.open_lane(1);
        let mut backoff = Backoff::new(FIRST_RETRY, LONGEST_RETRY);
        let (mut said, mut number) = (Said::default(), 0);
        loop {
            let Some(word) = shared.words.first() else {
                shared.words.added.notified().await;
                continue;
            };
            let mut bus = shared.bus.state();
            // The bus lives as long as this.
            drop(bus.wait_for(|state| *state == BusState::Up).await);
            shared.circuit.until(false).await;
            number += 1;
            match shared.say_word(&word, &mut lane, number).await {
                Ok(()) => {
                    shared.words.drop_first();
                    backoff.reset();
                    said.over();
                }
                Err(NotSaid::Refused(error)) if !error.is_transient() => {
                    said.failure(
                        ErrorCode::BusUnfit,
                        &error,
                        "that somebody is forgotten cannot be said in the stream",
                    );
                    sleep(backoff.next_wait()).await;
                }
                Err(error) => {
                    tracing::debug!(error = %error, "that somebody is forgotten could not be said in the stream");
                    // What has no answer takes the one place there is.
                    lane = shared.bus.open_lane(1);
                    sleep(backoff.next_wait()).await;
                }
            }
        }
    }
}

impl Shared {
    async fn say_word(&self, word: &Tombstone, lane: &mut Lane, number: u64) -> Result<(), NotSaid> {
        // They may be back by now.
        if !self.barred.now().is_forgotten(&word.key) {
            return Ok(());
        }
        let message = self.message(word)?;
        // Nothing is known of a stream that is not there, and nothing is sent to it.
        let window = self.bus.stream().map_or(Duration::ZERO, |stream| stream.duplicate_window);
        let is_late = self.clock.now().duration_since(word.at).unsigned_abs() > window / 2;
        if !(is_late && self.holds(message.id, word.at).await?) {
            let message = vec![Numbered { number, message: Arc::new(message) }];
            let answered = async {
                lane.messages.send(message).await.map_err(|_| NotSaid::Closed)?;
                acked(lane, number).await
            };
            timeout(BUS_PATIENCE, answered).await.map_err(|_| NotSaid::NoAck)??;
        }
        self.note_told(word).await?;
        Ok(())
    }

    /// The event. Whoever says it, it has the same id.
    fn message(&self, word: &Tombstone) -> Result<Message, serde_json::Error> {
        let now = self.clock.now();
        let kind = EventType::UserForgotten;
        let source = SourceRef { platform: "twitch", channel: String::new(), channel_id: None };
        let subject = self.subjects.of(source.platform, kind.as_str(), "");
        let event = Event {
            kind,
            occurred_at: word.at,
            idempotency_key: format!("forgotten:{}:{:.3}", word.key, word.at),
            source,
            user: None,
            payload: PayloadJson::write(&WordPayload { user_ref: UserRef(&word.key) }, 64)?,
        };
        let event_id = id::event_id(&event.idempotency_key);
        let draft = Draft {
            origin: Origin::Gap,
            id: event_id,
            taken_in_at: now,
            taken_in: Instant::now(),
            not_published_before: word.at,
            content: Content::Event(Box::new(event)),
            slip: None,
        };
        let json = match &draft.content {
            Content::Event(event) => {
                EnvelopeV1::new(&draft, event, Err(UnmatchedReason::NoUser), now).to_json()?
            }
            Content::Unusable { .. } => Vec::new(),
        };
        Ok(Message {
            subject,
            id: MessageId::of_event(event_id),
            kind: kind.as_str().into(),
            by_user: Some(ByUser { key: Arc::clone(&word.key), occurred_at: word.at }),
            payload: json.into(),
        })
    }

    /// Whether the stream has it already, from before its duplicate window.
    async fn holds(&self, id: MessageId, at: Timestamp) -> Result<bool, BusError> {
        let mut is_there = false;
        self.read_back(Start::Time(at - MARGIN), |batch| {
            is_there |= batch.messages.iter().any(|stored| stored.id == Some(id));
        })
        .await?;
        Ok(is_there)
    }

    async fn read_back(&self, start: Start, mut read: impl FnMut(&Batch)) -> Result<(), BusError> {
        let away = || BusError::Away("nothing was read in time".to_owned());
        let mut follower = self.bus.follow(start, Wanted::Headers).await?;
        loop {
            let next = timeout(BUS_PATIENCE, follower.next()).await.map_err(|_| away())?;
            let batch = next.ok_or_else(away)??;
            read(&batch);
            if batch.is_end() {
                return Ok(());
            }
        }
    }

    async fn note_told(&self, word: &Tombstone) -> Result<(), StoreError> {
        let name = barred::name(Arc::clone(&word.key));
        let Some(document) = self.store.get(&name, PATIENCE).await? else { return Ok(()) };
        let fields = Fields::from_iter([(TOLD.to_owned(), true.into())]);
        match self.store.write(Write::over(name, Some(document.version), fields), PATIENCE).await {
            // Another instance noted it, or they are back.
            Ok(_) | Err(WriteRefusal::Conflict) => Ok(()),
            Err(WriteRefusal::Failed(error)) => Err(error),
        }
    }

    /// A store that counted nothing of this stream yet may have lost who is forgotten: the stream is read for it first.
    /// Whether that was possible.
    pub(super) async fn restore_forgotten(&self) -> Result<bool, BusError> {
        if self.config.mode != EnrichMode::On {
            return Ok(true);
        }
        let mut words = BTreeMap::new();
        self.read_back(Start::Position(0), |batch| {
            for stored in
                batch.messages.iter().filter(|stored| stored.kind == EventType::UserForgotten.as_str())
            {
                if let Some(by_user) = &stored.by_user {
                    words.insert(Arc::clone(&by_user.key), by_user.occurred_at);
                }
            }
        })
        .await?;
        {
            let barred = self.barred.now();
            words.retain(|key, at| {
                !barred.is_forgotten(key)
                    && barred.returned_at(key).is_none_or(|returned_at| returned_at < *at)
            });
        }
        for (key, at) in words {
            let mut fields = Bar::Forgotten.write(at);
            fields.insert(TOLD.to_owned(), true.into());
            let name = barred::name(key);
            match self.store.write(Write::set(name.clone(), fields.clone()), PATIENCE).await {
                Ok(version) => {
                    tracing::info!("the store did not know that somebody is forgotten; the stream did");
                    // The store says it again, which is no news then: whatever follows is done here.
                    let heard = self.barred.hear(false, &[(name, Some(Document { fields, version }))]);
                    self.forget_all(heard.forgotten, false);
                }
                Err(WriteRefusal::Failed(error)) => {
                    self.circuit.trip(&error);
                    return Ok(false);
                }
                Err(WriteRefusal::Conflict) => return Ok(false),
            }
        }
        Ok(true)
    }
}

async fn acked(lane: &mut Lane, number: u64) -> Result<(), NotSaid> {
    loop {
        let settled = lane.settled.recv().await.ok_or(NotSaid::Closed)?;
        // The answer to an earlier attempt may come late.
        if let Some(settled) = settled.into_iter().find(|settled| settled.number == number) {
            return Ok(settled.outcome.map(drop)?);
        }
    }
}
