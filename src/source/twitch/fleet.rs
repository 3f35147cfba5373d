//! The connections together. One task owns the [plan](super::plan): it opens connections as they are needed, hands out
//! JOINs, moves channels when a connection ends or is about to, and notes since when each is heard.
//!
//! Around it: a task per connection, told by a short queue of its own and reporting on one that all share, and one
//! task that [tells the gaps](super::heal). When Twitch asks to reconnect, the new connection is made before the old
//! one is let go: both are read, the door drops what comes twice. Which channels are wanted may
//! [change](roster) at any time; without any there is no connection.

mod roster;
mod shown;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use thiserror::Error;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, interval_at, sleep_until, timeout};

use super::backfill::{Backfill, BackfillError};
use super::connection::{Connection, End, Order, Report, What, stopped};
use super::heal::Heal;
use super::helix::{Helix, HelixError};
use super::known::Known;
use super::ledger::{Ledger, Mark};
use super::metrics::TwitchMetrics;
use super::normalize::Normalizer;
use super::note::{NoteError, NoteFile};
use super::pacer::Pacer;
use super::plan::{ConnectionId, Plan};
use super::roster::{Lookout, Roster, Sights};
use super::settings::TwitchConfig;
use super::status::TwitchStatus;
use crate::clock::Clock;
use crate::envelope::Origin;
use crate::envelope::draft::GapCause;
use crate::errors::ErrorCode;
use crate::pipeline::Intake;
use crate::retry::Backoff;
use crate::tasks::Tasks;

/// Logins in any ten seconds.
const LOGIN_RATE: usize = 20;
/// A replacement that is asked to reconnect sooner after its login is replaced with a wait: logins are limited.
const BETWEEN_REQUESTS: Duration = Duration::from_secs(30);
/// Waits after a refused login.
const REFUSED_FIRST: Duration = Duration::from_secs(30);
const REFUSED_LONGEST: Duration = Duration::from_mins(5);
/// How long a start waits to hear which channels are wanted besides those of the settings.
const ROSTER_PATIENCE: Duration = Duration::from_secs(2);
/// How long a start waits to know who to log in as.
const ACCOUNT_PATIENCE: Duration = Duration::from_secs(10);
/// What one connection may have before it to do: ten times a JOIN for each of its channels. Full: it is let go of.
const ORDERS: usize = 1_024;
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
    /// Twitch's API.
    #[error(transparent)]
    Helix(#[from] HelixError),
}

/// What all connections use.
pub(super) struct Shared {
    pub(super) config: TwitchConfig,
    pub(super) tls: Option<Arc<rustls::ClientConfig>>,
    pub(super) normalizer: Normalizer,
    pub(super) status: Arc<TwitchStatus>,
    pub(super) clock: Clock,
    pub(super) known: Known,
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
    /// Which channels are wanted.
    pub roster: watch::Receiver<Arc<Roster>>,
    /// Where it says which rooms it saw.
    pub sights: watch::Sender<Sights>,
}

/// The source.
pub struct Twitch {
    shared: Arc<Shared>,
    ledger: Arc<Ledger>,
    heal: Heal,
    helix: Option<Helix>,
    roster: watch::Receiver<Arc<Roster>>,
    lookout: Lookout,
}

impl Twitch {
    /// A source that has not started. Fails if the note in `DATA_DIR` is from a later version.
    pub fn new(config: TwitchConfig, around: Surroundings) -> Result<Self, SetupError> {
        let Surroundings { tls, status, metrics, clock, folder, roster, sights } = around;
        let file = NoteFile::in_folder(&folder);
        let ledger = Arc::new(Ledger::new(file.read()?));
        let normalizer = |origin| Normalizer::new(origin, config.shared_chat, Arc::clone(&metrics));
        let backfill = config
            .backfill
            .as_ref()
            .map(|url| Backfill::new(url.clone(), tls.clone(), normalizer(Origin::Backfill), clock.clone()))
            .transpose()?;
        let helix = Helix::of(&config, tls.clone(), status.credentials(), &clock)?;
        let heal = Heal::new(Arc::clone(&ledger), file, backfill, clock.clone());
        let normalizer = normalizer(Origin::Twitch);
        let shared = Arc::new(Shared { config, tls, normalizer, status, clock, known: Known::default() });
        let lookout = Lookout { sights, unanswered: watch::Sender::new(BTreeMap::new()) };
        Ok(Self { shared, ledger, heal, helix, roster, lookout })
    }

    /// Reads chat until `stop` becomes true, connecting as often as it takes. `last_stored` says when the stream's last
    /// message was stored, if it has one from before this run; it is asked only if no run before left a note.
    pub async fn run<F: Future<Output = Option<Timestamp>>>(
        self,
        intake: Intake,
        last_stored: impl FnOnce(Timestamp) -> F,
        mut stop: watch::Receiver<bool>,
    ) {
        let Self { shared, ledger, heal, helix, mut roster, lookout } = self;
        // Chat is not missed for an account: without it, it is read anonymously. Nor for channels that were added: but a
        // channel that was renamed is not asked for under its old name.
        tokio::select! {
            () = stopped(&mut stop) => {}
            () = who_and_what(&shared.status, &mut roster) => {}
        }
        let mut accounts = shared.status.credentials().changes();
        let started = shared.clock.now();
        let (reports, mut inbox) = mpsc::channel(REPORTS);
        let finish = watch::Sender::new(false);
        let mut healing = Tasks::new();
        healing.spawn("twitch gaps", heal.run(intake.clone(), finish.subscribe()));
        if let Some(helix) = helix {
            healing.spawn("twitch logins", helix.run(roster.clone(), lookout.clone(), finish.subscribe()));
        }
        let of_fleet = (Arc::clone(&ledger), lookout);
        let mut fleet = Fleet::new(shared, of_fleet, intake, reports, stop.clone());
        let first = Arc::clone(&roster.borrow_and_update());
        fleet.follow(&first, Instant::now());
        let mut last_stored = std::pin::pin!(last_stored(started));
        let mut is_asking = !ledger.has_past();
        let mut halving = interval_at(Instant::now() + HALF_LIFE, HALF_LIFE);
        loop {
            fleet.act(Instant::now());
            let due = fleet.next_due(Instant::now());
            tokio::select! {
                biased;
                () = stopped(&mut stop) => break,
                Ok(()) = roster.changed() => {
                    let wanted = Arc::clone(&roster.borrow_and_update());
                    fleet.follow(&wanted, Instant::now());
                }
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
                _ = halving.tick() => fleet.shared.known.halve(),
                // Its last report tells of an ordinary end; a part that broke ends the source.
                Some(ended) = fleet.tasks.next_end() => if ended.panicked { return },
                _ = healing.next_end() => return,
            }
        }
        drop(inbox);
        fleet.close().await;
        finish.send_replace(true);
        healing.join("twitch gaps").await;
        healing.join("twitch logins").await;
    }
}

/// Waits to know who to log in as and which channels are wanted, neither for long.
async fn who_and_what(status: &TwitchStatus, roster: &mut watch::Receiver<Arc<Roster>>) {
    let account = timeout(ACCOUNT_PATIENCE, status.credentials().settled());
    let whole = timeout(ROSTER_PATIENCE, async { roster.wait_for(|roster| roster.is_whole).await.is_ok() });
    drop(tokio::join!(account, whole));
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
    /// It is not needed any more.
    Surplus,
    /// It is replaced, and told to close.
    Told,
}

impl Leave {
    /// Whether it is to be closed as soon as its channels are heard elsewhere.
    fn is_due(self) -> bool {
        matches!(self, Self::Asked | Self::Surplus)
    }
}

struct Fleet {
    shared: Arc<Shared>,
    ledger: Arc<Ledger>,
    lookout: Lookout,
    /// What is wanted.
    roster: Arc<Roster>,
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
        (ledger, lookout): (Arc<Ledger>, Lookout),
        intake: Intake,
        reports: mpsc::Sender<Report>,
        stop: watch::Receiver<bool>,
    ) -> Self {
        let config = &shared.config;
        Self {
            plan: Plan::new(config.join_rate),
            backoff: Backoff::new(config.reconnect_first, config.reconnect_longest),
            refused_backoff: Backoff::new(REFUSED_FIRST, REFUSED_LONGEST),
            shared,
            ledger,
            lookout,
            roster: Arc::default(),
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
        while let Some((id, channel)) = self.plan.next_join(now, |channel| self.shared.known.busy(channel)) {
            self.order(id, Order::Join(channel));
        }
        self.shrink();
        let replaced: Vec<_> = self
            .berths
            .iter()
            .filter(|(id, berth)| berth.leave.is_due() && self.plan.is_replaced(**id))
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
        self.look_for_unanswered();
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

    fn order(&mut self, id: ConnectionId, order: Order) {
        let Some(berth) = self.berths.get_mut(&id) else { return };
        match berth.orders.try_send(order) {
            Ok(()) => {}
            // One that is gone will say so.
            Err(TrySendError::Closed(_)) => tracing::debug!(connection = id, "the connection is ending"),
            Err(TrySendError::Full(_)) => {
                tracing::warn!(error_code = %ErrorCode::ConnectionFailed, connection = id, "a connection does nothing that it is told; it is let go of");
                // Without anybody to tell it anything it ends, and its channels are joined elsewhere.
                berth.orders = mpsc::channel(1).0;
            }
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
            What::Confirmed { channel, room, at } => {
                if self.is_right(id, &channel, (room, at)) && self.plan.confirmed(id, &channel) {
                    tracing::info!(channel, connection = id, "joined");
                    if let Some(berth) = self.berths.get(&id) {
                        self.ledger.heard(&channel, at, &berth.mark);
                    }
                }
            }
            What::Seen { room, login } => {
                self.lookout.saw(room, &login, self.shared.clock.now(), &self.roster);
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
            _ if matches!(berth.leave, Leave::Asked | Leave::Told) => GapCause::ReconnectTooLate,
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

    /// Waits until every connection has ended. They have heard that it is time.
    async fn close(mut self) {
        while self.tasks.next_end().await.is_some() {}
        self.shared.status.closed();
    }
}
