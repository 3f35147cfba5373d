//! In order into the stream, each event settled exactly once: in the stream, there already, or a dead letter.
//!
//! Messages go out in a window; each has its own deadline. When one fails, nothing new is sent until the whole
//! window is settled and what failed was sent again and acknowledged, under the same ids: so order is kept, and
//! a repetition does no harm.

mod config;

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until};

use super::enrich::{Enriched, dead_letter_message};
use super::look_back::LookBack;
use super::metrics::PipelineMetrics;
use super::window::Window;
use crate::bus::{Ack, Bus, BusState, Lane, Message, Numbered, Refusal, Settled, TransientCause};
use crate::clock::Clock;
use crate::envelope::deadletter::Original;
use crate::envelope::{DeadLetter, DeadLetterReason, MessageId, Outcome, SubjectTemplate};
use crate::retry::Backoff;
use crate::users::Users;

pub use config::{PublishArgs, PublishConfig};

const FIRST_RETRY: Duration = Duration::from_millis(250);
const LONGEST_RETRY: Duration = Duration::from_secs(5);

/// Until the stream was seen for the first time: what a NATS server takes by default, and the window of a stream
/// that Inlet makes.
const USUAL_LARGEST_MESSAGE: usize = 1 << 20;
const USUAL_DUPLICATE_WINDOW: Duration = Duration::from_mins(10);

/// What may be sent.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// New events.
    Flowing,
    /// Nothing: something failed, and the rest of the window is not settled yet.
    Settling,
    /// Nothing until then, or until the bus comes back.
    Waiting(Instant),
    /// What failed was sent again; nothing new until it is acknowledged.
    Repeating,
}

/// What the stage waits for.
enum Happened {
    /// Messages were settled. `None`: the bus is gone for good.
    Settled(Option<Vec<Settled>>),
    /// A deadline or a wait is over.
    Time,
    /// No need to wait any longer.
    BusIsBack,
}

/// The stage.
pub struct Publish {
    lane: Lane,
    bus: Arc<dyn Bus>,
    bus_state: watch::Receiver<BusState>,
    config: PublishConfig,
    subjects: SubjectTemplate,
    users: Option<Users>,
    metrics: Arc<PipelineMetrics>,
    clock: Clock,
    window: Window,
    /// In order behind the window.
    waiting: VecDeque<Enriched>,
    mode: Mode,
    backoff: Backoff,
    look_back: LookBack,
    is_bus_gone: bool,
}

impl Publish {
    /// A stage that publishes on `bus`, and tells `users` what became of their events.
    pub fn new(
        bus: Arc<dyn Bus>,
        config: PublishConfig,
        subjects: SubjectTemplate,
        (users, clock): (Option<Users>, Clock),
        metrics: Arc<PipelineMetrics>,
    ) -> Self {
        Self {
            lane: bus.open_lane(config.max_in_flight),
            bus_state: bus.state(),
            bus,
            config,
            subjects,
            users,
            metrics,
            clock,
            window: Window::default(),
            waiting: VecDeque::new(),
            mode: Mode::Flowing,
            backoff: Backoff::new(FIRST_RETRY, LONGEST_RETRY),
            look_back: LookBack::default(),
            is_bus_gone: false,
        }
    }

    /// Asks for the largest message the bus takes, as far as is known, in bytes.
    pub(super) fn largest_message(&self) -> impl Fn() -> usize + use<> {
        let bus = Arc::clone(&self.bus);
        move || largest_message(&*bus)
    }

    /// Publishes what comes, in order, until nothing more will come and everything is settled, or the bus is gone.
    pub(super) async fn run(mut self, mut events: mpsc::Receiver<Vec<Enriched>>) {
        let mut is_open = true;
        loop {
            self.send_what_may_go().await;
            if self.is_bus_gone || !is_open && self.is_settled() {
                return;
            }
            tokio::select! {
                biased;
                happened = self.next() => self.handle(happened).await,
                batch = events.recv(), if is_open && self.wants_more() => match batch {
                    Some(batch) => self.waiting.extend(batch),
                    None => is_open = false,
                },
            }
        }
    }

    /// Whether everything accepted is settled.
    fn is_settled(&self) -> bool {
        self.window.is_empty() && self.waiting.is_empty()
    }

    /// Whether there is room for another batch.
    fn wants_more(&self) -> bool {
        self.mode == Mode::Flowing && self.waiting.is_empty() && self.room() > 0
    }

    /// Waits for an answer, a deadline, or the end of a wait. Cancel safe.
    async fn next(&mut self) -> Happened {
        let (timer, is_waiting) = match self.mode {
            Mode::Waiting(until) => (Some(until), true),
            Mode::Flowing | Mode::Settling | Mode::Repeating => {
                (self.window.oldest_sent_at().map(|sent_at| sent_at + self.config.ack_wait), false)
            }
        };
        tokio::select! {
            // Answers that lie there already come before a deadline that has passed meanwhile.
            biased;
            settled = self.lane.settled.recv() => Happened::Settled(settled),
            () = async { sleep_until(timer.unwrap_or_else(Instant::now)).await }, if timer.is_some() => Happened::Time,
            () = came_up(&mut self.bus_state), if is_waiting => Happened::BusIsBack,
        }
    }

    /// Acts on what [`Publish::next`] saw.
    async fn handle(&mut self, happened: Happened) {
        match happened {
            Happened::Settled(Some(settled)) => {
                for Settled { number, outcome } in settled {
                    self.settle(number, outcome).await;
                }
            }
            Happened::Settled(None) => {
                tracing::error!(
                    events = self.window.len() + self.waiting.len(),
                    "the bus is gone; these are lost"
                );
                self.is_bus_gone = true;
            }
            Happened::BusIsBack => self.mode = Mode::Waiting(Instant::now()),
            Happened::Time => {
                if let Some(before) = Instant::now().checked_sub(self.config.ack_wait) {
                    self.window.expire(before);
                }
            }
        }
    }

    /// Sends what the mode allows: what failed before, or new events as far as the window has room.
    async fn send_what_may_go(&mut self) {
        loop {
            self.update_mode();
            match self.mode {
                Mode::Waiting(until) if until <= Instant::now() => self.repeat().await,
                Mode::Flowing if self.room() > 0 && !self.waiting.is_empty() => self.send_new().await,
                Mode::Flowing | Mode::Settling | Mode::Waiting(_) | Mode::Repeating => break,
            }
        }
        self.metrics.publish_in_flight.set(i64::try_from(self.window.sent_count()).unwrap_or(i64::MAX));
    }

    fn room(&self) -> usize {
        self.config.max_in_flight.saturating_sub(self.window.len())
    }

    fn update_mode(&mut self) {
        let has_failed = self.window.failed_count() > 0;
        self.mode = match self.mode {
            Mode::Waiting(until) => Mode::Waiting(until),
            _ if has_failed && self.window.sent_count() > 0 => Mode::Settling,
            _ if has_failed => Mode::Waiting(Instant::now() + self.backoff.next_wait()),
            Mode::Repeating | Mode::Settling if !self.window.is_empty() => Mode::Repeating,
            Mode::Repeating | Mode::Settling => {
                self.backoff.reset();
                Mode::Flowing
            }
            Mode::Flowing => Mode::Flowing,
        };
    }

    async fn send_new(&mut self) {
        let count = self.room().min(self.waiting.len());
        let asked = Late::among(self.waiting.iter().take(count), self.late_before());
        if !self.look_back_for(asked).await {
            return;
        }
        let now = Instant::now();
        let mut batch = Vec::with_capacity(count);
        for event in self.waiting.drain(..count).collect::<Vec<_>>() {
            let known = self.known_position(&event);
            let message = Arc::clone(&event.message);
            let number = self.window.push(event, now);
            match known {
                Some(position) => self.acknowledge(number, Ack { position, duplicate: true }),
                None => batch.push(Numbered { number, message }),
            }
        }
        self.send(batch).await;
    }

    /// Sends again what failed, in order.
    async fn repeat(&mut self) {
        let asked = Late::among(self.window.failed().map(|(_, slot, _)| &slot.event), self.late_before());
        if !self.look_back_for(asked).await {
            return;
        }
        let now = Instant::now();
        let mut batch = Vec::with_capacity(self.window.failed_count());
        let mut known = Vec::new();
        for (number, slot, cause) in self.window.failed() {
            if let Some(position) = self.known_position(&slot.event) {
                known.push((number, position));
            } else {
                self.metrics.publish_retries.of(cause).inc();
                batch.push(Numbered { number, message: Arc::clone(&slot.event.message) });
            }
        }
        for (number, position) in known {
            self.acknowledge(number, Ack { position, duplicate: true });
        }
        for numbered in &batch {
            self.window.mark_sent(numbered.number, now);
        }
        self.mode = if batch.is_empty() { Mode::Flowing } else { Mode::Repeating };
        self.send(batch).await;
    }

    async fn send(&mut self, batch: Vec<Numbered>) {
        // A lane takes as many batches as there may be messages in flight, so this does not wait for long; that
        // it is gone is seen where its answers come from.
        if !batch.is_empty() && self.lane.messages.send(batch).await.is_err() {
            tracing::debug!("the lane is closed");
        }
    }

    /// Reads the stream back for late events. False: not possible now, to be tried again.
    async fn look_back_for(&mut self, late: Option<Late>) -> bool {
        let Some(Late { from, ids }) = late else {
            return true;
        };
        match self.look_back.ensure(&*self.bus, from, self.stream_window(), &ids).await {
            Ok(()) => true,
            Err(error) => {
                if error.is_transient() {
                    tracing::debug!(error = %error, "could not look back; trying again");
                } else {
                    tracing::error!(error = %error, "cannot look back; nothing late is sent until that is mended");
                }
                self.mode = Mode::Waiting(Instant::now() + self.backoff.next_wait());
                false
            }
        }
    }

    fn stream_window(&self) -> Duration {
        self.bus.stream().map_or(USUAL_DUPLICATE_WINDOW, |stream| stream.duplicate_window)
    }

    /// Events that can have been published before this are looked for in the stream before they are sent.
    fn late_before(&self) -> Timestamp {
        self.clock.now() - self.stream_window() / 2
    }

    /// Where a late event already is in the stream, by the last look back.
    fn known_position(&self, event: &Enriched) -> Option<u64> {
        if event.not_published_before < self.late_before() {
            self.look_back.position(event.message.id)
        } else {
            None
        }
    }

    async fn settle(&mut self, number: u64, outcome: Result<Ack, Refusal>) {
        match outcome {
            Ok(ack) => self.acknowledge(number, ack),
            Err(Refusal::Transient(cause)) => self.window.mark_failed(number, cause),
            Err(refusal) => self.refused(number, refusal).await,
        }
    }

    fn acknowledge(&mut self, number: u64, ack: Ack) {
        let Some(slot) = self.window.get(number) else {
            return;
        };
        let (taken_in, origin, dead_letter) =
            (slot.event.taken_in, slot.event.origin, slot.event.dead_letter);
        let slip = slot.event.slip.take();
        match (&self.users, &slot.event.user, dead_letter) {
            (Some(users), Some(key), None) => users.acked(key, slot.event.message.id.event, ack.position),
            (Some(users), Some(key), Some(_)) => users.dead_lettered(key, slot.event.message.id.event),
            (None, _, _) | (_, None, _) => {}
        }
        let Some(since_sent) = self.window.mark_done(number) else {
            return;
        };
        let metrics = &self.metrics;
        metrics.publish_duration.observe(since_sent.as_secs_f64());
        metrics.ingest_to_ack.observe(taken_in.elapsed().as_secs_f64());
        let outcome = match dead_letter {
            // A dead letter, too: what was there before is the work of an earlier run.
            _ if ack.duplicate => Outcome::Duplicate,
            Some(_) => Outcome::DeadLettered,
            None => Outcome::Published,
        };
        match (outcome, dead_letter) {
            (Outcome::DeadLettered, Some(reason)) => metrics.dead_lettered.of(origin, reason).inc(),
            (Outcome::Published, _) => metrics.published.of(origin).inc(),
            _ => metrics.publish_duplicates.inc(),
        }
        metrics.pending.dec();
        if let Some(slip) = slip {
            slip.settle(outcome);
        }
    }

    /// A refusal that will not pass, or that has been given its chances, makes a dead letter of the event.
    async fn refused(&mut self, number: u64, refusal: Refusal) {
        let max_attempts = self.config.max_attempts;
        let Some(slot) = self.window.get(number) else {
            return;
        };
        let reason = match refusal {
            Refusal::TooLarge => DeadLetterReason::TooLarge,
            Refusal::BadSubject => DeadLetterReason::BadSubject,
            Refusal::Other(_) | Refusal::Transient(_) => {
                slot.attempts += 1;
                if slot.attempts < max_attempts {
                    return self.window.mark_failed(number, TransientCause::Unavailable);
                }
                DeadLetterReason::Refused
            }
        };
        let (id, is_unknown) = (slot.event.message.id, slot.is_unknown);
        if slot.event.dead_letter.is_some() {
            return self.give_up(number, refusal);
        }
        // An event that is known to be in the stream is never a dead letter.
        if let (Some(users), Some(key)) = (&self.users, &slot.event.user)
            && let Some(position) = users.position_of(key, id.event)
        {
            return self.acknowledge(number, Ack { position, duplicate: true });
        }
        if is_unknown {
            match self.stored_position(number, id).await {
                Ok(Some(position)) => {
                    return self.acknowledge(number, Ack { position, duplicate: true });
                }
                Ok(None) => {}
                Err(()) => return,
            }
        }
        self.bury(number, reason, refusal).await;
    }

    /// Whether an event that may have arrived is in the stream. `Err`: cannot be known now, the event stays.
    async fn stored_position(&mut self, number: u64, id: MessageId) -> Result<Option<u64>, ()> {
        let window = self.stream_window();
        let Some(from) = self.window.get(number).map(|slot| slot.event.not_published_before) else {
            return Err(());
        };
        self.look_back = LookBack::default();
        match self.look_back.ensure(&*self.bus, from, window, &HashSet::from([id])).await {
            Ok(()) => Ok(self.look_back.position(id)),
            Err(error) => {
                tracing::debug!(error = %error, "could not look back before a dead letter");
                self.window.mark_failed(number, TransientCause::Away);
                Err(())
            }
        }
    }

    /// Puts a dead letter in the event's place and sends it.
    async fn bury(&mut self, number: u64, reason: DeadLetterReason, refusal: Refusal) {
        let (largest, now, subject) =
            (largest_message(&*self.bus), self.clock.now(), self.subjects.dead_letters());
        let Some(slot) = self.window.get(number) else {
            return;
        };
        let original = &slot.event.message;
        tracing::error!(event_id = %original.id.event, error = %refusal, reason = %reason, "the event becomes a dead letter");
        let letter = DeadLetter {
            reason,
            message: &refusal.to_string(),
            at: now,
            original_subject: &original.subject,
            attempts: slot.attempts.max(1),
            original: Original::Envelope(original.payload.clone()),
        };
        let message: Arc<Message> =
            Arc::new(dead_letter_message(&letter, original.id.event, subject, largest));
        slot.event.message = Arc::clone(&message);
        slot.event.dead_letter = Some(reason);
        slot.attempts = 0;
        self.window.mark_sent(number, Instant::now());
        self.send(vec![Numbered { number, message }]).await;
    }

    /// Not even the dead letter is taken.
    fn give_up(&mut self, number: u64, refusal: Refusal) {
        let Some(slot) = self.window.get(number) else {
            return;
        };
        let (id, origin) = (slot.event.message.id, slot.event.origin);
        // Its slip goes with it, unsettled: whoever waits for it hears that it was lost.
        slot.event.slip = None;
        if let (Some(users), Some(key)) = (&self.users, &slot.event.user) {
            users.dead_lettered(key, id.event);
        }
        self.window.mark_done(number);
        tracing::error!(event_id = %id.event, error = %refusal, "the bus does not take the dead letter; the event is lost");
        self.metrics.dead_lettered.of(origin, DeadLetterReason::Undeliverable).inc();
        self.metrics.pending.dec();
    }
}

fn largest_message(bus: &dyn Bus) -> usize {
    bus.stream().map_or(USUAL_LARGEST_MESSAGE, |stream| stream.largest_message)
}

/// Events that the stream may have forgotten the ids of.
struct Late {
    /// None of them can be in the stream from before this.
    from: Timestamp,
    ids: HashSet<MessageId>,
}

impl Late {
    fn among<'a>(events: impl Iterator<Item = &'a Enriched>, late_before: Timestamp) -> Option<Self> {
        let mut late: Option<Self> = None;
        for event in events.filter(|event| event.not_published_before < late_before) {
            let from = event.not_published_before;
            let late = late.get_or_insert_with(|| Self { from, ids: HashSet::new() });
            late.from = late.from.min(from);
            late.ids.insert(event.message.id);
        }
        late
    }
}

/// Waits until the bus changes to up; for ever if it never does.
async fn came_up(state: &mut watch::Receiver<BusState>) {
    loop {
        if state.changed().await.is_err() {
            return std::future::pending().await;
        }
        if *state.borrow_and_update() == BusState::Up {
            return;
        }
    }
}
