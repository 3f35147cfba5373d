//! In order into the stream, each event settled exactly once: in the stream, there already, or a dead letter.
//!
//! Messages go out in a window; each has its own deadline. When one fails, nothing new is sent until the whole
//! window is settled and what failed was sent again and acknowledged, under the same ids: so order is kept, and
//! a repetition does no harm.
//!
//! What has no ack in time, and everything while the bus is away, goes into the [outbox](super::outbox). Events that are
//! read back from there, in front of all others, are sent like those that come.

mod config;
mod late;
mod settle;
mod store;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until};

use super::enrich::Enriched;
use super::look_back::{Late, LookBack};
use super::metrics::PipelineMetrics;
use super::outbox::Outbox;
use super::outbox::batch::Stored;
use super::window::{self, Slot, Window};
use crate::bus::{Ack, Bus, BusError, BusState, Lane, Numbered, Settled, Silence};
use crate::clock::Clock;
use crate::envelope::SubjectTemplate;
use crate::errors::ErrorCode;
use crate::retry::Backoff;
use crate::users::Users;

pub use config::{PublishArgs, PublishConfig};

const FIRST_RETRY: Duration = Duration::from_millis(250);
const LONGEST_RETRY: Duration = Duration::from_secs(5);

/// Something is under way, and nothing was acknowledged for so long: then the bus is not well, whatever else it answers.
const LONGEST_SILENCE: Duration = Duration::from_secs(10);

/// Until the stream was seen for the first time: what a NATS server takes by default.
const USUAL_LARGEST_MESSAGE: usize = 1 << 20;

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
    /// The outbox answered.
    Stored(Stored),
    /// The stream was read back.
    LookedBack(Result<(), BusError>),
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
    /// Read back from the outbox, in order behind the window.
    ready: VecDeque<Enriched>,
    /// In order behind what is in the outbox, and else behind the window.
    waiting: VecDeque<Enriched>,
    outbox: Option<Outbox>,
    /// Numbers of dead letters whose events lie on disk.
    buried: Vec<u64>,
    /// The door is closed: what is on its way is the last.
    is_closing: bool,
    mode: Mode,
    backoff: Backoff,
    look_back: LookBack,
    is_bus_gone: bool,
    /// Since when something is under way and nothing is acknowledged.
    unacked_since: Option<Instant>,
    silence: Arc<Silence>,
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
            ready: VecDeque::new(),
            waiting: VecDeque::new(),
            outbox: None,
            buried: Vec::new(),
            is_closing: false,
            mode: Mode::Flowing,
            backoff: Backoff::new(FIRST_RETRY, LONGEST_RETRY),
            look_back: LookBack::default(),
            is_bus_gone: false,
            unacked_since: None,
            silence: Arc::default(),
        }
    }

    /// The same, saying there when nothing is acknowledged.
    #[must_use]
    pub fn saying(mut self, silence: Arc<Silence>) -> Self {
        self.silence = silence;
        self
    }

    /// Asks for the largest message the bus takes, as far as is known, in bytes.
    pub(super) fn largest_message(&self) -> impl Fn() -> usize + use<> {
        let bus = Arc::clone(&self.bus);
        move || largest_message(&*bus)
    }

    /// Publishes what comes, in order, until nothing more will come and everything is settled, or safe in the outbox of a
    /// bus that is away, or the bus is gone. The end of `closing` says that what is on its way is the last.
    pub(super) async fn run(
        mut self,
        mut events: mpsc::Receiver<Vec<Enriched>>,
        mut closing: watch::Receiver<()>,
    ) {
        let mut is_open = true;
        loop {
            self.send_what_may_go().await;
            self.store_what_is_due().await;
            self.listen_for_silence();
            if self.is_done(is_open) {
                break;
            }
            tokio::select! {
                biased;
                happened = self.next() => self.handle(happened).await,
                batch = events.recv(), if is_open && self.wants_more() => match batch {
                    Some(batch) => self.waiting.extend(batch),
                    None => is_open = false,
                },
                // Nothing is ever sent on it.
                _ = closing.changed(), if !self.is_closing => self.is_closing = true,
            }
        }
        if let Some(outbox) = self.outbox {
            outbox.close().await;
        }
    }

    /// Whether there is room for another batch.
    fn wants_more(&self) -> bool {
        match self.outbox.as_ref().filter(|outbox| outbox.is_well()) {
            // What waits is on disk in time.
            Some(_) => self.waiting.len() < if self.is_behind_disk() { self.config.max_in_flight } else { 1 },
            None => {
                self.mode == Mode::Flowing && self.waiting.is_empty() && self.may_send() && self.room() > 0
            }
        }
    }

    /// Whether what waits may be sent without waiting for what lies in front of it.
    fn may_send(&self) -> bool {
        let is_in_front = |outbox: &Outbox| outbox.has_unread() || outbox.is_writing_unsent();
        self.ready.is_empty() && !self.outbox.as_ref().is_some_and(is_in_front)
    }

    /// Waits for an answer, a deadline, or the end of a wait. Cancel safe.
    async fn next(&mut self) -> Happened {
        let is_waiting = matches!(self.mode, Mode::Waiting(_));
        let timer = self.wakes_at();
        let Self { lane, bus_state, outbox, look_back, is_bus_gone, .. } = self;
        let stored = async {
            match outbox {
                Some(outbox) => outbox.answer().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            // Answers that lie there already come before a deadline that has passed meanwhile.
            biased;
            settled = lane.settled.recv(), if !*is_bus_gone => Happened::Settled(settled),
            stored = stored => Happened::Stored(stored),
            read = look_back.finished() => Happened::LookedBack(read),
            () = async { sleep_until(timer.unwrap_or_else(Instant::now)).await }, if timer.is_some() => Happened::Time,
            () = came_up(bus_state), if is_waiting => Happened::BusIsBack,
        }
    }

    /// The first deadline.
    fn wakes_at(&self) -> Option<Instant> {
        let attempt = match self.mode {
            _ if self.is_bus_gone => None,
            Mode::Waiting(until) => Some(until).filter(|_| !self.look_back.is_reading()),
            Mode::Flowing | Mode::Settling | Mode::Repeating => {
                self.window.oldest_sent_at().map(|sent_at| sent_at + self.config.ack_wait)
            }
        };
        let silent =
            self.unacked_since.filter(|_| !self.silence.is_heard()).map(|since| since + LONGEST_SILENCE);
        [attempt, silent, self.stores_at()].into_iter().flatten().min()
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
                tracing::error!(error_code = %ErrorCode::PartEnded, events = self.metrics.pending.get(), "the bus is gone");
                self.is_bus_gone = true;
            }
            Happened::BusIsBack => self.mode = Mode::Waiting(Instant::now()),
            Happened::Stored(stored) => self.stored(stored).await,
            Happened::LookedBack(Ok(())) => {}
            Happened::LookedBack(Err(error)) => {
                if error.is_transient() {
                    tracing::debug!(error = %error, "could not look back; trying again");
                } else {
                    tracing::error!(error_code = %ErrorCode::LookBackFailed, error = %error, "cannot look back; nothing late is sent until that is mended");
                }
                self.mode = Mode::Waiting(Instant::now() + self.backoff.next_wait());
            }
            Happened::Time => {
                if let Some(before) = Instant::now().checked_sub(self.config.ack_wait) {
                    self.window.expire(before);
                }
            }
        }
    }

    /// Notes whether nothing is acknowledged though something is under way.
    fn listen_for_silence(&mut self) {
        self.unacked_since =
            if self.window.is_empty() { None } else { self.unacked_since.or_else(|| Some(Instant::now())) };
        let is_silent = self.unacked_since.is_some_and(|since| since.elapsed() >= LONGEST_SILENCE);
        self.silence.say(is_silent);
    }

    /// Sends what the mode allows: what failed before, or new events as far as the window has room.
    async fn send_what_may_go(&mut self) {
        loop {
            self.update_mode();
            match self.mode {
                _ if self.look_back.is_reading() || self.is_bus_gone => break,
                Mode::Waiting(until) if until <= Instant::now() => self.repeat().await,
                Mode::Flowing if self.room() > 0 && !self.ready.is_empty() => self.send_new(true).await,
                Mode::Flowing if self.room() > 0 && !self.waiting.is_empty() && self.may_send() => {
                    self.send_new(false).await;
                }
                Mode::Flowing | Mode::Settling | Mode::Waiting(_) | Mode::Repeating => break,
            }
        }
        if let (Mode::Flowing, Some(outbox)) = (self.mode, &mut self.outbox)
            && self.ready.len() < self.config.max_in_flight
        {
            outbox.read_ahead();
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

    /// Sends events that were not sent before, from the outbox or from those that came.
    async fn send_new(&mut self, is_from_outbox: bool) {
        let lateness = self.lateness();
        let events = if is_from_outbox { &self.ready } else { &self.waiting };
        let count = self.room().min(events.len());
        let late = events.iter().take(count).filter(|event| lateness.holds(event));
        let late = Late::all(late.map(|event| (event, None)));
        if !self.has_looked_back_for(late) {
            return;
        }
        let now = Instant::now();
        let mut batch = Vec::with_capacity(count);
        let events = if is_from_outbox { &mut self.ready } else { &mut self.waiting };
        for event in events.drain(..count).collect::<Vec<_>>() {
            let known = lateness.holds(&event).then(|| self.look_back.position(event.message.id)).flatten();
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
        let lateness = self.lateness();
        let is_looked_for = |slot: &Slot| slot.looks_back_since.is_some() || lateness.holds(&slot.event);
        let late = self.window.failed().map(|(_, slot, _)| slot).filter(|slot| is_looked_for(slot));
        let late = Late::all(late.map(|slot| (&slot.event, slot.looks_back_since)));
        if !self.has_looked_back_for(late) {
            return;
        }
        let now = Instant::now();
        let mut batch = Vec::with_capacity(self.window.failed_count());
        let mut known = Vec::new();
        for (number, slot, cause) in self.window.failed() {
            let id = slot.event.message.id;
            if let Some(position) = is_looked_for(slot).then(|| self.look_back.position(id)).flatten() {
                known.push((number, position));
            } else {
                self.metrics.publish_retries.of(cause).inc();
                batch.push(slot.numbered(number));
            }
        }
        for (number, position) in known {
            self.acknowledge(number, Ack { position, duplicate: true });
        }
        for numbered in &batch {
            self.window.mark_sent(window::place(numbered.number).0, now);
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
}

fn largest_message(bus: &dyn Bus) -> usize {
    bus.stream().map_or(USUAL_LARGEST_MESSAGE, |stream| stream.largest_message)
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

#[cfg(test)]
mod tests;
