//! The connections together. One task owns the [plan](super::plan): it opens connections as they are needed, hands out
//! JOINs, moves channels when a connection ends or is about to, and notes since when each is heard.
//!
//! Around it: a task per connection, told by a short queue of its own and reporting on one that all share, and one
//! task that [tells the gaps](super::heal). When Twitch asks to reconnect, the new connection is made before the old
//! one is let go: both are read, the door drops what comes twice.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use jiff::Timestamp;
use thiserror::Error;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, interval_at, sleep_until, timeout};

use super::backfill::{Backfill, BackfillError};
use super::connection::{Connection, End, Order, Report, What, stopped};
use super::heal::Heal;
use super::ledger::{Ledger, Mark};
use super::metrics::TwitchMetrics;
use super::normalize::Normalizer;
use super::note::{NoteError, NoteFile};
use super::pacer::Pacer;
use super::plan::{ConnectionId, Plan};
use super::settings::TwitchConfig;
use super::status::{ConnectionSeen, ConnectionState, Outlook, TwitchStatus};
use crate::clock::Clock;
use crate::envelope::Origin;
use crate::envelope::draft::GapCause;
use crate::errors::ErrorCode;
use crate::pipeline::Intake;
use crate::retry::Backoff;
use crate::tasks::Tasks;
use crate::telemetry::logs::with_causes;

/// Logins in any ten seconds.
const LOGIN_RATE: usize = 20;
/// A replacement that is asked to reconnect sooner after its login is replaced with a wait: logins are limited.
const BETWEEN_REQUESTS: Duration = Duration::from_secs(30);
/// Waits after a refused login.
const REFUSED_FIRST: Duration = Duration::from_secs(30);
const REFUSED_LONGEST: Duration = Duration::from_mins(5);
/// How long a start waits to know who to log in as.
const ACCOUNT_PATIENCE: Duration = Duration::from_secs(10);
/// The limit of channels per account that Twitch announced in May 2024.
const CHANNELS_PER_ACCOUNT: usize = 100;
/// More than a connection is ever told at a time: one JOIN for each of its channels, and to close.
const ORDERS: usize = 128;
/// Full: connections wait.
const REPORTS: usize = 256;
/// How busy a channel is counts half after so long.
const HALF_LIFE: Duration = Duration::from_mins(1);

/// Why the source cannot be made.
#[derive(Debug, Error)]
pub enum SetupError {
    /// The last run's note.
    #[error(transparent)]
    Note(#[from] NoteError),
    /// The history service.
    #[error(transparent)]
    Backfill(#[from] BackfillError),
}

/// How much is said in each channel, lately.
pub(super) struct Busy(HashMap<String, AtomicU64>);

impl Busy {
    fn new(channels: &[String]) -> Self {
        Self(channels.iter().map(|name| (name.clone(), AtomicU64::new(0))).collect())
    }

    /// Something was said.
    pub(super) fn count(&self, channel: &str) {
        if let Some(count) = self.0.get(channel) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn of(&self, channel: &str) -> u64 {
        self.0.get(channel).map_or(0, |count| count.load(Ordering::Relaxed))
    }

    fn halve(&self) {
        for count in self.0.values() {
            // What is counted meanwhile may be lost: it is a hint.
            count.store(count.load(Ordering::Relaxed) / 2, Ordering::Relaxed);
        }
    }
}

/// What all connections use.
pub(super) struct Shared {
    pub(super) config: TwitchConfig,
    pub(super) tls: Option<Arc<rustls::ClientConfig>>,
    pub(super) normalizer: Normalizer,
    pub(super) status: Arc<TwitchStatus>,
    pub(super) clock: Clock,
    pub(super) busy: Busy,
}

/// What the source needs of the service around it.
pub struct Surroundings {
    /// Needed if an address asks for TLS.
    pub tls: Option<Arc<rustls::ClientConfig>>,
    /// What the probes read.
    pub status: Arc<TwitchStatus>,
    /// What it counts.
    pub metrics: Arc<TwitchMetrics>,
    /// The time.
    pub clock: Clock,
    /// `DATA_DIR`, where it leaves a note for the next run.
    pub folder: PathBuf,
}

/// The source.
pub struct Twitch {
    shared: Arc<Shared>,
    ledger: Arc<Ledger>,
    heal: Heal,
}

impl Twitch {
    /// A source that has not started. Fails if the note in `DATA_DIR` is from a later version.
    pub fn new(config: TwitchConfig, around: Surroundings) -> Result<Self, SetupError> {
        let Surroundings { tls, status, metrics, clock, folder } = around;
        let file = NoteFile::in_folder(&folder);
        let ledger = Arc::new(Ledger::new(&config.channels, file.read()?));
        let normalizer = |origin| Normalizer::new(origin, config.shared_chat, Arc::clone(&metrics));
        let backfill = config
            .backfill
            .as_ref()
            .map(|url| Backfill::new(url.clone(), tls.clone(), normalizer(Origin::Backfill), clock.clone()))
            .transpose()?;
        let heal = Heal::new(Arc::clone(&ledger), file, backfill, clock.clone());
        let normalizer = normalizer(Origin::Twitch);
        let busy = Busy::new(&config.channels);
        let shared = Arc::new(Shared { config, tls, normalizer, status, clock, busy });
        Ok(Self { shared, ledger, heal })
    }

    /// Reads chat until `stop` becomes true, connecting as often as it takes. `last_stored` says when the stream's last
    /// message was stored, if it has one from before this run; it is asked only if no run before left a note.
    pub async fn run<F: Future<Output = Option<Timestamp>>>(
        self,
        intake: Intake,
        last_stored: impl FnOnce(Timestamp) -> F,
        mut stop: watch::Receiver<bool>,
    ) {
        let Self { shared, ledger, heal } = self;
        // Chat is not missed for an account: without it, it is read anonymously.
        tokio::select! {
            () = stopped(&mut stop) => {}
            _ = timeout(ACCOUNT_PATIENCE, shared.status.credentials().settled()) => {}
        }
        let mut accounts = shared.status.credentials().changes();
        if shared.status.credentials().account().is_some()
            && shared.config.channels.len() > CHANNELS_PER_ACCOUNT
        {
            let (channels, limit) = (shared.config.channels.len(), CHANNELS_PER_ACCOUNT);
            tracing::warn!(error_code = %ErrorCode::TooManyChannels, channels, limit, "Twitch may refuse channels beyond its limit for an account");
        }
        let started = shared.clock.now();
        let (reports, mut inbox) = mpsc::channel(REPORTS);
        let finish = watch::Sender::new(false);
        let mut healing = Tasks::new();
        healing.spawn("twitch gaps", heal.run(intake.clone(), finish.subscribe()));
        let mut fleet = Fleet::new(shared, Arc::clone(&ledger), intake, reports, stop.clone());
        let mut last_stored = std::pin::pin!(last_stored(started));
        let mut is_asking = !ledger.has_past();
        let mut halving = interval_at(Instant::now() + HALF_LIFE, HALF_LIFE);
        loop {
            fleet.act(Instant::now());
            let due = fleet.next_due(Instant::now());
            tokio::select! {
                biased;
                () = stopped(&mut stop) => break,
                last = &mut last_stored, if is_asking => {
                    is_asking = false;
                    if let Some(last) = last {
                        ledger.heard_before(last, started);
                    }
                }
                Some(report) = inbox.recv() => {
                    fleet.hear(report);
                    while let Ok(report) = inbox.try_recv() {
                        fleet.hear(report);
                    }
                }
                () = async { sleep_until(due.unwrap_or_else(Instant::now)).await }, if due.is_some() => {}
                Ok(()) = accounts.changed() => fleet.account_changed(Instant::now()),
                _ = halving.tick() => fleet.shared.busy.halve(),
                // Its last report tells of an ordinary end; a part that broke ends the source.
                Some(ended) = fleet.tasks.next_end() => if ended.panicked { return },
                _ = healing.next_end() => return,
            }
        }
        drop(inbox);
        fleet.close().await;
        finish.send_replace(true);
        healing.join("twitch gaps").await;
    }
}

/// A connection as the fleet sees it.
struct Berth {
    orders: mpsc::Sender<Order>,
    mark: Arc<Mark>,
    /// Its login counts.
    is_login_written: bool,
    logged_in_at: Option<Instant>,
    /// It stands in the place of one that was lost or is leaving.
    is_replacement: bool,
    leave: Leave,
}

/// How far a connection is from being let go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Leave {
    /// It stays.
    No,
    /// Twitch asked for it to be replaced.
    Asked,
    /// It is replaced, and told to close.
    Told,
}

struct Fleet {
    shared: Arc<Shared>,
    ledger: Arc<Ledger>,
    intake: Intake,
    reports: mpsc::Sender<Report>,
    stop: watch::Receiver<bool>,
    tasks: Tasks,
    plan: Plan,
    logins: Pacer,
    berths: BTreeMap<ConnectionId, Berth>,
    last_id: ConnectionId,
    /// Not before then.
    dial_at: Instant,
    backoff: Backoff,
    refused_backoff: Backoff,
    /// Connections that were lost, or are to be replaced, and nothing stands in their place yet.
    lost: u64,
    was_connected: bool,
    is_login_refused: bool,
}

impl Fleet {
    fn new(
        shared: Arc<Shared>,
        ledger: Arc<Ledger>,
        intake: Intake,
        reports: mpsc::Sender<Report>,
        stop: watch::Receiver<bool>,
    ) -> Self {
        let config = &shared.config;
        Self {
            plan: Plan::new(&config.channels, config.join_rate),
            backoff: Backoff::new(config.reconnect_first, config.reconnect_longest),
            refused_backoff: Backoff::new(REFUSED_FIRST, REFUSED_LONGEST),
            shared,
            ledger,
            intake,
            reports,
            stop,
            tasks: Tasks::new(),
            logins: Pacer::new(LOGIN_RATE),
            berths: BTreeMap::new(),
            last_id: 0,
            dial_at: Instant::now(),
            lost: 0,
            was_connected: false,
            is_login_refused: false,
        }
    }

    /// Does what is due, and shows how things are.
    fn act(&mut self, now: Instant) {
        if self.plan.wants_connection() && self.dial_at <= now && self.logins.reserve(now) {
            self.open();
        }
        while let Some((id, channel)) = self.plan.next_join(now, |channel| self.shared.busy.of(channel)) {
            self.order(id, Order::Join(channel));
        }
        let replaced: Vec<_> = self
            .berths
            .iter()
            .filter(|(id, berth)| berth.leave == Leave::Asked && self.plan.is_replaced(**id))
            .map(|(id, _)| *id)
            .collect();
        for id in replaced {
            self.order(id, Order::Close);
            if let Some(berth) = self.berths.get_mut(&id) {
                berth.leave = Leave::Told;
            }
        }
        if self.plan.placeless() == 0 {
            self.lost = 0;
        }
        self.show();
    }

    /// When there is something to do again, if nothing happens before.
    fn next_due(&self, now: Instant) -> Option<Instant> {
        let dial = self.plan.wants_connection().then(|| Some(self.logins.next_free(now)?.max(self.dial_at)));
        self.plan.next_due(now).into_iter().chain(dial.flatten()).min()
    }

    fn open(&mut self) {
        self.last_id += 1;
        let id = self.last_id;
        let (orders, inbox) = mpsc::channel(ORDERS);
        let mark = Arc::new(Mark::new(self.shared.clock.now()));
        let connection = Connection {
            id,
            shared: Arc::clone(&self.shared),
            intake: self.intake.clone(),
            mark: Arc::clone(&mark),
            orders: inbox,
            reports: self.reports.clone(),
        };
        self.tasks.spawn("twitch connection", connection.run(self.stop.clone()));
        self.plan.opening(id);
        let berth = Berth {
            orders,
            mark,
            is_login_written: false,
            logged_in_at: None,
            is_replacement: self.lost > 0,
            leave: Leave::No,
        };
        self.berths.insert(id, berth);
    }

    fn order(&self, id: ConnectionId, order: Order) {
        // The queue has room for all a connection can be told; one that is gone will say so.
        if let Some(berth) = self.berths.get(&id)
            && berth.orders.try_send(order).is_err()
        {
            tracing::debug!(connection = id, "the connection is ending");
        }
    }

    fn hear(&mut self, Report { connection: id, what }: Report) {
        let now = Instant::now();
        match what {
            What::LoggingIn { at } => {
                self.logins.sent(1, at);
                if let Some(berth) = self.berths.get_mut(&id) {
                    berth.is_login_written = true;
                }
            }
            What::LoggedIn { nick } => self.logged_in(id, &nick, now),
            What::Written { channels, at } => self.plan.written(id, &channels, at),
            What::Confirmed { channel, at } => {
                if self.plan.confirmed(id, &channel) {
                    tracing::info!(channel, connection = id, "joined");
                    if let Some(berth) = self.berths.get(&id) {
                        self.ledger.heard(&channel, at, &berth.mark);
                    }
                }
            }
            What::Refused { channel, why } => {
                let was_heard = self.plan.is_heard(&channel);
                if self.plan.refused(id, &channel, why, now) {
                    tracing::warn!(error_code = %ErrorCode::ChannelRefused, channel, why = ?why, "Twitch refuses the channel");
                }
                self.unless_heard(was_heard, &channel);
            }
            What::Parted { channel } => {
                let was_heard = self.plan.is_heard(&channel);
                if self.plan.parted(id, &channel) {
                    tracing::warn!(error_code = %ErrorCode::ChannelRefused, channel, "Twitch put us out of the channel");
                }
                self.unless_heard(was_heard, &channel);
            }
            What::AskedToReconnect => self.asked_to_reconnect(id, now),
            What::Ended(end) => self.ended(id, &end, now),
        }
    }

    /// Notes that a channel is not heard any more, if that is so.
    fn unless_heard(&self, was_heard: bool, channel: &str) {
        if was_heard && !self.plan.is_heard(channel) {
            self.ledger.unheard(channel, GapCause::Removed);
        }
    }

    fn logged_in(&mut self, id: ConnectionId, nick: &str, now: Instant) {
        self.plan.opened(id);
        if let Some(berth) = self.berths.get_mut(&id) {
            berth.logged_in_at = Some(now);
        }
        self.backoff.reset();
        self.refused_backoff.reset();
        self.is_login_refused = false;
        self.was_connected = true;
        self.shared.status.connected(nick, self.lost > 0);
        self.lost = self.lost.saturating_sub(1);
    }

    /// What Twitch refused is not what it would be asked with now. Connections that stand stay.
    fn account_changed(&mut self, now: Instant) {
        if self.is_login_refused {
            self.dial_at = now;
        }
    }

    fn asked_to_reconnect(&mut self, id: ConnectionId, now: Instant) {
        let Some(berth) = self.berths.get_mut(&id).filter(|berth| berth.leave == Leave::No) else { return };
        berth.leave = Leave::Asked;
        // At once, unless that is what it says every time.
        let is_soon = berth.logged_in_at.is_none_or(|at| now < at + BETWEEN_REQUESTS);
        let wait = if is_soon && berth.is_replacement { self.backoff.next_wait() } else { Duration::ZERO };
        self.dial_at = self.dial_at.max(now + wait);
        self.lost += 1;
        tracing::info!(connection = id, channels = self.plan.places(id), "Twitch asked to reconnect");
        self.plan.leaving(id);
    }

    fn ended(&mut self, id: ConnectionId, end: &End, now: Instant) {
        let Some(berth) = self.berths.remove(&id) else { return };
        if !berth.is_login_written {
            self.logins.unused(1);
        }
        let cause = match end {
            _ if berth.leave != Leave::No => GapCause::ReconnectTooLate,
            End::Silent => GapCause::Silence,
            End::Stopped | End::Replaced | End::LoginRefused(_) | End::Dial(_) | End::Io(_) | End::Closed => {
                GapCause::ConnectionLost
            }
        };
        let unheard = self.plan.ended(id, now);
        for channel in &unheard {
            self.ledger.unheard(channel, cause);
        }
        let wait = match end {
            End::Stopped | End::Replaced => {
                return tracing::debug!(connection = id, why = end.code(), "closed");
            }
            End::LoginRefused(_) => self.refused_backoff.next_wait(),
            // What takes its place is on its way, or stands.
            _ if berth.leave != Leave::No && unheard.is_empty() => {
                return tracing::info!(connection = id, "closed by Twitch, as announced");
            }
            _ if berth.leave != Leave::No => Duration::ZERO,
            End::Dial(_) | End::Io(_) | End::Closed | End::Silent => self.backoff.next_wait(),
        };
        self.dial_at = self.dial_at.max(now + wait);
        self.is_login_refused = matches!(end, End::LoginRefused(_));
        if berth.logged_in_at.is_some() && berth.leave == Leave::No {
            self.lost += 1;
        }
        self.note(id, end, unheard.len(), wait);
    }

    fn note(&self, connection: ConnectionId, end: &End, channels: usize, wait: Duration) {
        let error = with_causes(end);
        let retry_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
        let error_code = end.code();
        if matches!(end, End::LoginRefused(_)) {
            tracing::error!(error_code, error, retry_ms, "Twitch refuses the login");
        } else {
            tracing::warn!(connection, channels, error_code, error, retry_ms, "not connected to Twitch");
        }
        self.shared.status.failed(error_code, error);
    }

    fn show(&self) {
        let stands = |berth: &Berth| berth.logged_in_at.is_some();
        let state = match (self.berths.values().any(stands), self.is_login_refused, self.was_connected) {
            (true, ..) => ConnectionState::Connected,
            (false, true, _) => ConnectionState::Error,
            (false, false, true) => ConnectionState::Reconnecting,
            (false, false, false) => ConnectionState::Connecting,
        };
        let connections = self.berths.iter().map(|(id, berth)| {
            let state = match (berth.leave != Leave::No, stands(berth)) {
                (true, _) => "closing",
                (false, true) => "connected",
                (false, false) => "connecting",
            };
            let joined = self.plan.channels().filter(|(.., on)| *on == Some(*id)).count();
            ConnectionSeen { id: *id, state, channels: self.plan.places(*id), joined }
        });
        let connections = connections.collect();
        self.shared.status.show(Outlook { state, connections, channels: &self.plan });
    }

    /// Waits until every connection has ended. They have heard that it is time.
    async fn close(mut self) {
        while self.tasks.next_end().await.is_some() {}
        self.shared.status.closed();
    }
}
