//! The path from the door to the stream, and what it stands on: the service and the commands build it alike.

use std::path::Path;
use std::sync::Arc;

use prometheus::Registry;
use tokio::time::timeout;

use super::{AppError, BUS_PATIENCE, PathConfig};
use crate::bus::embedded::{EmbeddedBus, EmbeddedError};
use crate::bus::jetstream::JetStreamBus;
use crate::bus::{Bus, BusConfig, BusPart, BusState, Driver, Silence};
use crate::clock::Clock;
use crate::errors::ErrorCode;
use crate::pipeline::{
    self, Enrich, Intake, Outbox, OutboxError, OutboxMetrics, PipelineMetrics, Publish, open_door,
};
use crate::status::Part;
use crate::store;
use crate::store::measured::{Store, StoreMetrics};
use crate::tasks::Tasks;
use crate::tls::TlsConfig;
use crate::users::{Barred, Desk, EnrichMode, UserMetrics, Users};

/// Makes the bus. One that is away is waited for in the background.
pub(super) fn make_bus(
    config: &BusConfig,
    folder: &Path,
    window: usize,
    tls: &TlsConfig,
    clock: &Clock,
) -> Result<Arc<dyn Bus>, EmbeddedError> {
    Ok(match &config.jetstream {
        Some(jetstream) if config.driver == Driver::Nats => {
            JetStreamBus::start(jetstream.clone(), config, tls, window)
        }
        _ => EmbeddedBus::open(folder, config.retention, config.subjects.clone(), clock.clone())?,
    })
}

/// Waits a moment to hear how the bus is: one that does not fit is an error, one that is away is not.
pub(super) async fn hear_of(bus: &dyn Bus) -> Result<(), AppError> {
    let mut state = bus.state();
    let known = state.wait_for(|state| *state != BusState::Connecting);
    if let Ok(Ok(state)) = timeout(BUS_PATIENCE, known).await {
        if let BusState::Unfit(why) = &*state {
            return Err(AppError::BusUnfit(why.clone()));
        }
    } else {
        tracing::warn!(error_code = %ErrorCode::BusUnavailable, "no answer from the bus yet; going on all the same");
    }
    Ok(())
}

/// The bus for a command, once it is known how it is.
pub async fn open_bus(config: &PathConfig, folder: &Path, clock: &Clock) -> Result<Arc<dyn Bus>, AppError> {
    let bus = make_bus(&config.bus, folder, config.window(), &config.tls, clock)?;
    hear_of(&*bus).await?;
    Ok(bus)
}

/// The user store, with its figures.
pub fn open_store(config: &PathConfig, folder: &Path, registry: &Registry) -> Result<Store, AppError> {
    let requests = Arc::new(StoreMetrics::new(registry)?);
    Ok(Store::new(store::open(&config.store, folder)?, requests))
}

/// What the path needs to know of people.
pub struct People {
    /// Where they are known.
    pub store: Store,
    /// Who is not taken in.
    pub barred: Barred,
    /// Who meets events on their way; `None` when enrichment is off.
    pub users: Option<Users>,
}

impl People {
    /// Where operators look after users.
    pub(super) fn desk(&self, bus: &Arc<dyn Bus>, clock: &Clock) -> Desk {
        Desk::new(self.store.clone(), clock.clone(), Arc::clone(bus))
    }
}

/// Who is not taken in, and who meets the others. Without enrichment nothing else is asked of the store.
pub fn open_people(
    config: &PathConfig,
    store: Store,
    bus: &Arc<dyn Bus>,
    registry: &Registry,
    clock: &Clock,
) -> Result<People, AppError> {
    let metrics = Arc::new(UserMetrics::new(registry)?);
    let barred = Barred::new();
    let users = (config.enrich.mode != EnrichMode::Off).then(|| {
        let around = (metrics, clock.clone(), barred.clone());
        let subjects = config.bus.subjects.clone();
        Users::new(store.clone(), Arc::clone(bus), subjects, config.enrich.clone(), around)
    });
    Ok(People { store, barred, users })
}

/// What stands around the path from the door to the stream.
pub struct Around<'a> {
    /// The stream.
    bus: &'a Arc<dyn Bus>,
    /// Who meets events on their way, and who is kept out.
    people: &'a People,
    /// In front of a stream that is away. A command has none: what it reads is still there when it is run again.
    outbox: Option<Outbox>,
    /// Where publishing says that nothing is acknowledged.
    silence: Arc<Silence>,
    /// What is counted.
    metrics: &'a Arc<PipelineMetrics>,
    /// The time.
    clock: &'a Clock,
}

impl<'a> Around<'a> {
    /// Without an outbox.
    pub fn new(
        bus: &'a Arc<dyn Bus>,
        people: &'a People,
        metrics: &'a Arc<PipelineMetrics>,
        clock: &'a Clock,
    ) -> Self {
        Self { bus, people, outbox: None, silence: Arc::default(), metrics, clock }
    }
}

/// The path from the door to the stream, as one task among `tasks`, with what is done for users behind it; and the
/// door's outside. What lies in the outbox is taken up before anything else.
pub async fn lay_path(
    config: &PathConfig,
    around: Around<'_>,
    tasks: &mut Tasks,
) -> Result<Intake, OutboxError> {
    let Around { bus, people, outbox, silence, metrics, clock } = around;
    let People { store, barred, users } = people;
    let (intake, door) = open_door(config.intake.clone(), barred.clone(), Arc::clone(metrics), clock.clone());
    let subjects = &config.bus.subjects;
    let enrich = Enrich::new(subjects.clone(), users.clone(), clock.clone());
    let mut publish = Publish::new(
        Arc::clone(bus),
        config.publish.clone(),
        subjects.clone(),
        (users.clone(), clock.clone()),
        Arc::clone(metrics),
    )
    .saying(silence);
    if let Some(outbox) = outbox {
        publish = publish.with_outbox(outbox, &intake.known_ids()).await?;
    }
    tasks.spawn("barred", barred.clone().follow(store.clone(), users.clone()));
    if let Some(users) = users {
        tasks.spawn("store probe", users.clone().probe_store());
        if !users.is_dry() {
            let known = intake.known_ids();
            tasks.spawn("projection", users.clone().follow_stream(Box::new(move |ids| known.learn(ids))));
            tasks.spawn("forgotten", users.clone().say_forgotten());
            tasks.spawn("erase", users.clone().erase_forgotten());
            tasks.spawn("flush", users.clone().flush_behind());
            tasks.spawn("operators", users.clone().follow_operators());
        }
    }
    tasks.spawn("pipeline", pipeline::run(door, enrich, publish));
    Ok(intake)
}

/// The same with an outbox in `folder`; its counters, and the parts that the probes show of both.
pub(super) async fn lay_path_with_outbox(
    config: &PathConfig,
    folder: &Path,
    around: Around<'_>,
    registry: &Registry,
    tasks: &mut Tasks,
) -> Result<(Intake, Arc<OutboxMetrics>, [Arc<dyn Part>; 2]), AppError> {
    let metrics = Arc::new(OutboxMetrics::new(registry, around.clock.clone())?);
    let outbox = Outbox::open(folder, &config.outbox, Arc::clone(&metrics), around.clock.clone()).await?;
    let bus = BusPart { bus: Arc::clone(around.bus), silence: Arc::clone(&around.silence) };
    let parts: [Arc<dyn Part>; 2] = [Arc::new(bus), outbox.part()];
    // An embedded store is as near as the folder.
    if !config.has_embedded_store() {
        let barred = &around.people.barred;
        barred.keep_in(folder)?;
        tasks.spawn("kept out", barred.clone().keep());
    }
    let intake = lay_path(config, Around { outbox: Some(outbox), ..around }, tasks).await?;
    Ok((intake, metrics, parts))
}
