//! The composition root: the only place that knows every part. It builds them, starts them, watches over them,
//! and at the end lets them go in the order of the path.

mod account;
pub mod check;
mod config;
mod path;
mod token_document;

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use prometheus::{IntGaugeVec, Opts, Registry, process_collector::ProcessCollector};
use thiserror::Error;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use crate::bus::embedded::EmbeddedError;
use crate::bus::{Bus, Start, Wanted};
use crate::channels::{Channels, Follow};
use crate::clock::Clock;
use crate::data_dir::{DataDir, DataDirError, NewerFormat};
use crate::envelope::Origin;
use crate::errors::ErrorCode;
use crate::http::{self, HttpConfig, HttpMetrics, Shown};
use crate::pipeline::{Intake, OutboxError, OutboxMetrics, PipelineMetrics};
use crate::retry::Backoff;
use crate::source::twitch::credentials::oauth::OAuthSetupError;
use crate::source::twitch::{
    BackfillUrl, Normalizer, ReplayDoor, Roster, SetupError, Sights, Surroundings, Twitch, TwitchMetrics,
    TwitchStatus,
};
use crate::status::{Part, Parts};
use crate::store::embedded::EmbeddedStoreError;
use crate::tasks::{Ended, Tasks};
use crate::telemetry::metrics::{Counters, Label as _};
use crate::telemetry::tally::ErrorTally;
use crate::tls::{self, TlsError};
use crate::users::{EnrichMode, Following, Users};
use path::{hear_of, lay_path_with_outbox, make_bus};

pub use account::{Account, open_account, open_oauth};
pub use config::{AppArgs, AppConfig, PathArgs, PathConfig};
pub use path::{Around, People, lay_path, open_bus, open_people, open_store};
pub use token_document::TokenDocument;

/// How long a start waits to hear whether the bus is there. It starts all the same.
const BUS_PATIENCE: Duration = Duration::from_secs(3);

/// What requests under way are given when everything else is settled.
const LAST_REQUESTS: Duration = Duration::from_secs(1);

/// After the grace: what is left must be gone.
const AFTER_GRACE: Duration = Duration::from_millis(250);

/// Why the service could not start, or did not end well.
#[derive(Debug, Error)]
pub enum AppError {
    /// The data folder.
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    /// The embedded stream.
    #[error(transparent)]
    Embedded(#[from] EmbeddedError),
    /// The embedded user store.
    #[error(transparent)]
    Store(#[from] EmbeddedStoreError),
    /// The outbox.
    #[error(transparent)]
    Outbox(#[from] OutboxError),
    /// The stream must not be counted as the settings are.
    #[error("{0}")]
    CountingUnfit(String),
    /// The bus is there, but not as it must be.
    #[error("{0}")]
    BusUnfit(String),
    /// The Twitch source.
    #[error(transparent)]
    Source(#[from] SetupError),
    /// What a run of a later version left.
    #[error(transparent)]
    NewerFormat(#[from] NewerFormat),
    /// Twitch's OAuth.
    #[error(transparent)]
    OAuth(#[from] OAuthSetupError),
    /// TLS.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The address of the operator's HTTP.
    #[error("cannot listen on {address}")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// The metrics contradict each other.
    #[error("the metrics cannot be registered")]
    Metrics(#[from] prometheus::Error),
    /// A part ended that should not have.
    #[error("{0} ended unexpectedly")]
    PartEnded(&'static str),
    /// The grace was over before everything was settled.
    #[error("{0} events were not settled in time; they are lost")]
    NotSettled(i64),
}

impl AppError {
    /// Whether somebody has to change the configuration.
    pub fn is_configuration(&self) -> bool {
        match self {
            Self::DataDir(error) => error.is_configuration(),
            Self::BusUnfit(_)
            | Self::CountingUnfit(_)
            | Self::Source(_)
            | Self::NewerFormat(_)
            | Self::OAuth(_)
            | Self::Tls(_)
            | Self::Listen { .. } => true,
            Self::Outbox(OutboxError::File(error))
            | Self::Store(EmbeddedStoreError::File(error))
            | Self::Embedded(EmbeddedError::File(error)) => error.is_newer_format(),
            Self::Outbox(_)
            | Self::Store(_)
            | Self::Embedded(_)
            | Self::Metrics(_)
            | Self::PartEnded(_)
            | Self::NotSettled(_) => false,
        }
    }
}

/// What a run came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tally {
    /// Events that its sources took in.
    pub received: u64,
    /// Events that the stream acknowledged as new.
    pub published: u64,
    /// Users met for the first time.
    pub users: u64,
}

/// A running service.
pub struct App {
    address: SocketAddr,
    bus: Arc<dyn Bus>,
    tasks: Tasks,
    /// Stops what faces the outside.
    stop: watch::Sender<bool>,
    /// Ends the operator's HTTP, last.
    close_http: watch::Sender<bool>,
    replay: Arc<ReplayDoor>,
    pipeline: Arc<PipelineMetrics>,
    outbox: Arc<OutboxMetrics>,
    users: Option<Users>,
    grace: Duration,
    /// Held to the end.
    _data_dir: DataDir,
}

impl App {
    /// Builds and starts every part. The first log line says what runs.
    pub async fn start(config: AppConfig, clock: Clock) -> Result<Self, AppError> {
        let (data_dir, listener, address) = take_place(&config).await?;
        let path = &config.path;
        let ((registry, errors), mut tasks) = (new_registry(&clock)?, Tasks::new());
        let pipeline = Arc::new(PipelineMetrics::new(&registry)?);
        let twitch_metrics = Arc::new(TwitchMetrics::new(&registry)?);
        let bus = make_bus(&path.bus, data_dir.path(), path.window(), &path.tls, &clock)?;
        let store = open_store(path, data_dir.path(), &registry)?;
        let channels = Channels::new(store.clone(), path.fixed_channels(), clock.clone());
        let Account { status, document, keeper } =
            open_account(path, data_dir.path(), &store, (&twitch_metrics, &registry), &clock)?;
        let people = open_people(path, store.clone(), &bus, &registry, &clock)?;
        let around = Around::new(&bus, &people, &pipeline, &clock);
        let (intake, outbox, of_path) =
            lay_path_with_outbox(path, data_dir.path(), around, &registry, &mut tasks).await?;
        let replay = replay_door(path, &intake, &twitch_metrics, clock.clone());
        let source = twitch(path, (&status, &twitch_metrics), clock.clone(), data_dir.path(), &channels)?;

        let (stop, close_http) = (watch::Sender::new(false), watch::Sender::new(false));
        // First, so that the probes are answered whatever the rest waits for.
        let shown = Shown {
            settings: serde_json::to_value(&config).unwrap_or_default(),
            config: config.http.clone(),
            desk: people.desk(&bus, &clock),
            clock,
            parts: Parts::new(parts(&status, of_path, &people)),
            twitch: status,
            pipeline: Arc::clone(&pipeline),
            bus: Arc::clone(&bus),
            metrics: Arc::new(HttpMetrics::new(&registry)?),
            registry,
            channels,
            token_document: document,
            replay: Arc::clone(&replay),
            store,
            errors,
            draining: stop.subscribe(),
        };
        tasks.spawn("http", http::serve(listener, shown, close_http.subscribe()));
        hear_of_both(&*bus, people.users.as_ref()).await?;
        if let Some((source, follow)) = source {
            tasks.spawn("channels", follow.run());
            tasks.spawn("twitch token", keeper.run(stop.subscribe()));
            let asked = Arc::clone(&bus);
            let last_stored = |started| last_stored_before(asked, started);
            let source = |stop| source.run(intake, last_stored, stop);
            tasks.spawn("twitch", when_caught_up(people.users.clone(), source, stop.subscribe()));
        }
        Ok(Self {
            address,
            bus,
            tasks,
            stop,
            close_http,
            replay,
            pipeline,
            outbox,
            users: people.users,
            grace: config.shutdown_grace,
            _data_dir: data_dir,
        })
    }

    /// Where the operator's HTTP listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The stream that it publishes to.
    pub fn bus(&self) -> Arc<dyn Bus> {
        Arc::clone(&self.bus)
    }

    fn tally(&self) -> Tally {
        let sum =
            |counters: &Counters<Origin>| Origin::ALL.iter().map(|origin| counters.of(*origin).get()).sum();
        Tally {
            received: sum(&self.pipeline.received),
            published: sum(&self.pipeline.published),
            users: self.users.as_ref().map_or(0, Users::created),
        }
    }

    /// Runs until `stop` is done or a part ends; then lets everything go, within the grace.
    pub async fn run(mut self, stop: impl Future<Output = ()>) -> Result<Tally, AppError> {
        let ended = tokio::select! {
            () = stop => None,
            ended = self.tasks.next_end() => ended,
        };
        match &ended {
            None => tracing::info!(pending = self.pipeline.pending.get(), "shutting down"),
            Some(Ended { name, panicked }) => {
                tracing::error!(error_code = %ErrorCode::PartEnded, task = name, panicked, "a part ended; shutting down");
            }
        }
        let deadline = Instant::now() + self.grace;
        self.stop.send_replace(true);
        self.replay.close();
        let settling = timeout_at(deadline, async {
            self.tasks.join("twitch").await;
            // A token that Twitch has just issued is stored before the end.
            self.tasks.join("twitch token").await;
            self.tasks.join("pipeline").await;
        });
        drop(settling.await);
        if let Some(users) = &self.users {
            // A store that does not answer is not waited for beyond the grace.
            drop(timeout_at(deadline, users.finish(deadline)).await);
        }
        self.close_http.send_replace(true);
        let requests = LAST_REQUESTS.min(deadline.saturating_duration_since(Instant::now())).max(AFTER_GRACE);
        if timeout(requests, self.tasks.join("http")).await.is_err() {
            tracing::debug!("a request was cut off at the end");
        }
        // What is in the outbox is sent by the next start.
        let stored = self.outbox.events.get();
        let lost = self.pipeline.pending.get() - stored;
        if stored > 0 {
            tracing::info!(events = stored, "left in the outbox");
        }
        match ended {
            Some(Ended { name, .. }) => Err(AppError::PartEnded(name)),
            None if lost > 0 => Err(AppError::NotSettled(lost)),
            None => Ok(self.tally()),
        }
    }
}

/// The way of captured lines into the path.
fn replay_door(
    path: &PathConfig,
    intake: &Intake,
    metrics: &Arc<TwitchMetrics>,
    clock: Clock,
) -> Arc<ReplayDoor> {
    let normalizer = Normalizer::new(Origin::Replay, path.shared_chat(), Arc::clone(metrics));
    Arc::new(ReplayDoor::new(intake.clone(), normalizer, clock))
}

/// Opens the source when what the stream holds is noted, so that nobody is met who is about to be known better.
async fn when_caught_up<F: Future<Output = ()>>(
    users: Option<Users>,
    source: impl FnOnce(watch::Receiver<bool>) -> F,
    mut stop: watch::Receiver<bool>,
) {
    if let Some(users) = users {
        tokio::select! {
            () = users.caught_up() => {}
            _ = stop.wait_for(|stop| *stop) => return,
        }
    }
    source(stop).await;
}

/// When the stream's last message was stored; `None` if all of it is from after `started`. Asked as often as it takes:
/// a bus that was away may have taken in something of ours before it answers.
async fn last_stored_before(bus: Arc<dyn Bus>, started: Timestamp) -> Option<Timestamp> {
    let mut backoff = Backoff::new(Duration::from_millis(100), BUS_PATIENCE);
    let stored_at = async |start| {
        let batch = bus.follow(start, Wanted::Headers).await.ok()?.next().await?.ok()?;
        Some(batch.messages.first().map(|stored| stored.stored_at))
    };
    loop {
        let ask = async {
            let last = stored_at(Start::Last).await?;
            let is_past = match last {
                Some(last) if last >= started => stored_at(Start::Position(0)).await? < Some(started),
                _ => true,
            };
            Some(last.filter(|_| is_past))
        };
        if let Ok(Some(last)) = timeout(BUS_PATIENCE, ask).await {
            return last;
        }
        sleep(backoff.next_wait()).await;
    }
}

/// The parts that the probes show, in the order of the path.
fn parts(status: &Arc<TwitchStatus>, of_path: [Arc<dyn Part>; 2], people: &People) -> Vec<Arc<dyn Part>> {
    let mut parts: Vec<Arc<dyn Part>> = vec![Arc::clone(status) as _];
    parts.extend(of_path);
    parts.extend(people.users.as_ref().map(Users::parts).unwrap_or_default());
    parts.push(Arc::new(people.barred.clone()));
    parts
}

/// Waits a moment for each: whether the bus is there and fits, and whether its stream may be counted.
async fn hear_of_both(bus: &dyn Bus, users: Option<&Users>) -> Result<(), AppError> {
    hear_of(bus).await?;
    hear_of_counting(users).await
}

/// Waits a moment to hear whether the stream may be counted.
async fn hear_of_counting(users: Option<&Users>) -> Result<(), AppError> {
    let Some(users) = users else { return Ok(()) };
    let mut following = users.following();
    let begun = async {
        tokio::select! {
            biased;
            begun = following.wait_for(|following| *following != Following::Starting) => {
                begun.map(|following| following.clone()).ok()
            }
            () = users.caught_up() => None,
        }
    };
    match timeout(BUS_PATIENCE, begun).await {
        Ok(Some(Following::Unfit(why))) => Err(AppError::CountingUnfit(why)),
        _ => Ok(()),
    }
}

fn holder(port: u16) -> String {
    format!("inlet serve, process {}, port {port}", std::process::id())
}

/// The folder and the port, ours from here on.
async fn take_place(config: &AppConfig) -> Result<(DataDir, TcpListener, SocketAddr), AppError> {
    let mut data_dir = DataDir::take_for_good(&config.data_dir, &holder(config.http.port))?;
    let listener = listen(&config.http).await?;
    let address = listener.local_addr().map_err(|source| listen_error(&config.http, source))?;
    data_dir.say(&holder(address.port()));
    say_hello(config, address);
    config.http.say_weak_tokens();
    Ok((data_dir, listener, address))
}

fn listen_error(config: &HttpConfig, source: std::io::Error) -> AppError {
    AppError::Listen { address: SocketAddr::new(config.address, config.port), source }
}

async fn listen(config: &HttpConfig) -> Result<TcpListener, AppError> {
    let listening = TcpListener::bind((config.address, config.port)).await;
    listening.map_err(|source| listen_error(config, source))
}

/// The Twitch source, not yet running, and what tells it which channels are wanted; `None` where a setting forbids it.
fn twitch(
    path: &PathConfig,
    (status, metrics): (&Arc<TwitchStatus>, &Arc<TwitchMetrics>),
    clock: Clock,
    folder: &Path,
    channels: &Channels,
) -> Result<Option<(Twitch, Follow)>, AppError> {
    if !path.twitch.enabled {
        tracing::info!("TWITCH_ENABLED is false: no chat is read");
        return Ok(None);
    }
    let wanted = watch::Sender::new(Arc::new(Roster::fixed(path.fixed_channels())));
    let (roster, sights) = (wanted.subscribe(), watch::Sender::new(Sights::default()));
    let keeps_fixed = path.enrich.mode != EnrichMode::DryRun;
    let follow = Follow::new(channels.clone(), keeps_fixed, wanted, sights.subscribe());
    let (status, metrics) = (Arc::clone(status), Arc::clone(metrics));
    let around = Surroundings {
        tls: source_tls(path)?,
        status,
        metrics,
        clock,
        folder: folder.to_owned(),
        roster,
        sights,
    };
    Ok(Some((Twitch::new(path.twitch.clone(), around)?, follow)))
}

/// TLS for what the source dials, if it dials anything with it.
fn source_tls(path: &PathConfig) -> Result<Option<Arc<rustls::ClientConfig>>, TlsError> {
    let is_needed = path.twitch.address.tls || path.twitch.backfill.as_ref().is_some_and(BackfillUrl::is_tls);
    let is_asked = path.twitch.credentials.client.is_some() && path.twitch.api.is_tls();
    Ok(match (is_needed, is_asked) {
        (true, _) => Some(tls::client_config(path.tls.ca_file.as_deref())?),
        (false, true) => Some(account::tls_if_any(path)?),
        (false, false) => None,
    })
}

/// With what is always there: the process, the build, and what goes wrong.
fn new_registry(clock: &Clock) -> prometheus::Result<(Registry, ErrorTally)> {
    let registry = Registry::new();
    let errors = ErrorTally::of_the_log(clock)?;
    errors.register(&registry)?;
    registry.register(Box::new(ProcessCollector::for_self()))?;
    let build =
        IntGaugeVec::new(Opts::new("build_info", "1, with the version").namespace("inlet"), &["version"])?;
    build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
    registry.register(Box::new(build))?;
    Ok((registry, errors))
}

fn say_hello(config: &AppConfig, address: SocketAddr) {
    let twitch = &config.path.twitch;
    let sources = if twitch.enabled {
        format!("twitch ({} channels)", twitch.channels.len())
    } else {
        "none".to_owned()
    };
    let host = if address.ip().is_unspecified() { "localhost".to_owned() } else { address.ip().to_string() };
    let (version, bus) = (env!("CARGO_PKG_VERSION"), config.path.bus.driver);
    let store = match config.path.enrich.mode {
        EnrichMode::On => config.path.store.driver.to_string(),
        EnrichMode::Off => format!("{} (enrichment off)", config.path.store.driver),
        EnrichMode::DryRun => format!("{} (dry run)", config.path.store.driver),
    };
    let port = address.port();
    tracing::info!("inlet {version}: sources {sources}, bus {bus}, store {store}, http://{host}:{port}");
}
