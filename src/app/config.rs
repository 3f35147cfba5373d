//! All settings of the service. Each section lives with what it configures; only the composition root sees them all.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use serde::Serialize;

use crate::bus::{BusArgs, BusConfig, Driver};
use crate::http::{HttpArgs, HttpConfig};
use crate::pipeline::{IntakeArgs, IntakeConfig, OutboxArgs, OutboxConfig, PublishArgs, PublishConfig};
use crate::settings::{self, Environment, Problems};
use crate::source::twitch::credentials::settings::CredentialConfig;
use crate::source::twitch::{SharedChatMode, TwitchArgs, TwitchConfig};
use crate::store::{StoreArgs, StoreConfig, StoreDriver};
use crate::telemetry::logs::{LogArgs, LogConfig};
use crate::tls::{TlsArgs, TlsConfig};
use crate::users::{EnrichArgs, EnrichConfig};

/// Settings of the service.
#[derive(Debug, Clone, Args)]
pub struct AppArgs {
    /// Folder of the embedded parts
    #[arg(long, env, default_value = "./data")]
    data_dir: String,
    /// From SIGTERM to the end, at most
    #[arg(long, env, default_value = "8s")]
    shutdown_grace: String,
    #[command(flatten)]
    http: HttpArgs,
    #[command(flatten)]
    logs: LogArgs,
    #[command(flatten)]
    path: PathArgs,
}

/// Settings of the path from a source to the stream.
#[derive(Debug, Clone, Args)]
pub struct PathArgs {
    #[command(flatten)]
    twitch: TwitchArgs,
    #[command(flatten)]
    intake: IntakeArgs,
    #[command(flatten)]
    publish: PublishArgs,
    #[command(flatten)]
    outbox: OutboxArgs,
    #[command(flatten)]
    bus: BusArgs,
    #[command(flatten)]
    enrich: EnrichArgs,
    #[command(flatten)]
    store: StoreArgs,
    #[command(flatten)]
    tls: TlsArgs,
}

/// Checked settings of the service.
#[derive(Debug, Clone, Serialize)]
pub struct AppConfig {
    /// Folder of the embedded parts.
    #[serde(rename = "DATA_DIR")]
    pub data_dir: PathBuf,
    /// From SIGTERM to the end.
    #[serde(rename = "SHUTDOWN_GRACE", serialize_with = "settings::shown_duration")]
    pub shutdown_grace: Duration,
    /// The operator's HTTP.
    #[serde(flatten)]
    pub http: HttpConfig,
    /// The log.
    #[serde(flatten)]
    pub logs: LogConfig,
    /// The path.
    #[serde(flatten)]
    pub path: PathConfig,
}

/// Checked settings of the path.
#[derive(Debug, Clone, Serialize)]
pub struct PathConfig {
    #[serde(flatten)]
    pub(super) twitch: TwitchConfig,
    #[serde(flatten)]
    pub(super) intake: IntakeConfig,
    #[serde(flatten)]
    pub(super) publish: PublishConfig,
    #[serde(flatten)]
    pub(super) outbox: OutboxConfig,
    /// The bus.
    #[serde(flatten)]
    pub bus: BusConfig,
    /// Enrichment.
    #[serde(flatten)]
    pub enrich: EnrichConfig,
    /// The user store.
    #[serde(flatten)]
    pub store: StoreConfig,
    /// TLS.
    #[serde(flatten)]
    pub tls: TlsConfig,
}

impl AppArgs {
    /// Checks the settings; every problem is noted.
    pub fn check(&self, environment: &Environment, problems: &mut Problems) -> Option<AppConfig> {
        let data_dir = self.check_data_dir(problems);
        let shutdown_grace = problems.parse("SHUTDOWN_GRACE", &self.shutdown_grace, settings::duration);
        let http = self.http.check(environment, problems);
        let logs = self.logs.check(environment, problems);
        let path = self.path.check(environment, problems);
        Some(AppConfig {
            data_dir: data_dir?,
            shutdown_grace: shutdown_grace?,
            http: http?,
            logs: logs?,
            path: path?,
        })
    }

    fn check_data_dir(&self, problems: &mut Problems) -> Option<PathBuf> {
        problems.parse("DATA_DIR", &self.data_dir, |text| Ok(PathBuf::from(text)))
    }
}

impl PathArgs {
    fn check(&self, environment: &Environment, problems: &mut Problems) -> Option<PathConfig> {
        let twitch = self.twitch.check(environment, problems);
        let intake = self.intake.check(problems);
        let publish = self.publish.check(problems);
        let outbox = self.outbox.check(environment, problems);
        let bus = self.bus.check(environment, problems);
        let store = self.store.check(environment, problems);
        let writes_cost = store.as_ref().is_some_and(|store| store.driver == StoreDriver::Firestore);
        let enrich = self.enrich.check(writes_cost, problems);
        let tls = self.tls.check(problems);
        Some(PathConfig {
            twitch: twitch?,
            intake: intake?,
            publish: publish?,
            outbox: outbox?,
            bus: bus?,
            enrich: enrich?,
            store: store?,
            tls: tls?,
        })
    }
}

impl PathConfig {
    /// Whether something lies in `DATA_DIR` that has one user at a time.
    pub fn has_embedded_parts(&self) -> bool {
        self.has_embedded_store() || self.bus.driver == Driver::Embedded
    }

    /// Messages under way at a time.
    pub fn window(&self) -> usize {
        self.publish.max_in_flight
    }

    /// Whether the user store is a file in `DATA_DIR`.
    pub fn has_embedded_store(&self) -> bool {
        self.store.driver == StoreDriver::Embedded
    }

    /// Channels that a setting names.
    pub fn fixed_channels(&self) -> &[String] {
        &self.twitch.channels
    }

    /// The account.
    pub fn credentials(&self) -> &CredentialConfig {
        &self.twitch.credentials
    }

    /// Which copies in a shared chat are events.
    pub fn shared_chat(&self) -> SharedChatMode {
        self.twitch.shared_chat
    }
}
