//! Settings of enrichment.

use std::fmt;
use std::time::Duration;

use clap::Args;
use serde::Serialize;

use crate::settings::{self, Problems};

/// When a user's state is written behind, where the settings do not say: a write costs money, or it does not.
const WRITES_COST: (Duration, Duration) = (Duration::from_mins(5), Duration::from_mins(15));
const WRITES_ARE_FREE: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(10));

/// Settings of enrichment.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Users")]
pub struct EnrichArgs {
    /// `on`; `off`; or `dry-run`, which reads, computes and logs, and writes nothing
    #[arg(long, env, default_value = "on")]
    enrich_mode: String,
    /// A silence of this length ends a session
    #[arg(long, env, default_value = "24h")]
    session_gap: String,
    /// How long a batch of events waits for the user store, reading and writing together
    #[arg(long, env, default_value = "400ms")]
    enrich_timeout: String,
    /// Users held in memory
    #[arg(long, env, default_value = "100000")]
    enrich_cache_users: String,
    /// Events held in memory that are not yet counted in the store
    #[arg(long, env, default_value = "1000000")]
    enrich_max_pending: String,
    /// A user is written when quiet for this long; left out: 5m on Firestore, 2s embedded
    #[arg(long, env)]
    enrich_flush_idle: Option<String>,
    /// A user is written after this long at the latest; left out: 15m on Firestore, 10s embedded
    #[arg(long, env)]
    enrich_flush_max: Option<String>,
}

/// What is done with users.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum EnrichMode {
    /// Events meet their users, and users are counted.
    On,
    /// Nothing.
    Off,
    /// Events meet their users on paper: read and computed, nothing written.
    DryRun,
}

impl fmt::Display for EnrichMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::On => "on",
            Self::Off => "off",
            Self::DryRun => "dry-run",
        })
    }
}

/// Checked settings of enrichment.
#[derive(Debug, Clone, Serialize)]
pub struct EnrichConfig {
    /// What is done.
    #[serde(rename = "ENRICH_MODE")]
    pub mode: EnrichMode,
    /// The silence that ends a session.
    #[serde(rename = "SESSION_GAP", serialize_with = "settings::shown_duration")]
    pub session_gap: Duration,
    /// How long a batch waits for the store.
    #[serde(rename = "ENRICH_TIMEOUT", serialize_with = "settings::shown_duration")]
    pub timeout: Duration,
    /// Users in memory.
    #[serde(rename = "ENRICH_CACHE_USERS")]
    pub cache_users: usize,
    /// Uncounted events in memory.
    #[serde(rename = "ENRICH_MAX_PENDING")]
    pub max_pending: usize,
    /// When a quiet user is written.
    #[serde(rename = "ENRICH_FLUSH_IDLE", serialize_with = "settings::shown_duration")]
    pub flush_idle: Duration,
    /// When a user is written at the latest.
    #[serde(rename = "ENRICH_FLUSH_MAX", serialize_with = "settings::shown_duration")]
    pub flush_max: Duration,
}

impl EnrichArgs {
    /// Checks the settings. `writes_cost`: the store bills by the write.
    pub fn check(&self, writes_cost: bool, problems: &mut Problems) -> Option<EnrichConfig> {
        let mode = problems.parse("ENRICH_MODE", &self.enrich_mode, |text| match text {
            "on" => Ok(EnrichMode::On),
            "off" => Ok(EnrichMode::Off),
            "dry-run" => Ok(EnrichMode::DryRun),
            _ => Err(format!("{text:?} is none of on, off and dry-run")),
        });
        let session_gap = problems.parse("SESSION_GAP", &self.session_gap, settings::positive_duration);
        let timeout = problems.parse("ENRICH_TIMEOUT", &self.enrich_timeout, settings::positive_duration);
        let cache_users = problems.parse(
            "ENRICH_CACHE_USERS",
            &self.enrich_cache_users,
            settings::count(1_000, 100_000_000),
        );
        let max_pending =
            problems.parse("ENRICH_MAX_PENDING", &self.enrich_max_pending, settings::count(1, 100_000_000));
        let (idle, max) = (self.enrich_flush_idle.as_ref(), self.enrich_flush_max.as_ref());
        let idle = problems.parse_optional("ENRICH_FLUSH_IDLE", idle, settings::positive_duration);
        let max = problems.parse_optional("ENRICH_FLUSH_MAX", max, settings::positive_duration);
        let (usual_idle, usual_max) = if writes_cost { WRITES_COST } else { WRITES_ARE_FREE };
        let flush_idle = idle?.unwrap_or(usual_idle);
        let flush_max = max?.unwrap_or(usual_max.max(flush_idle));
        if flush_max < flush_idle {
            problems.add("ENRICH_FLUSH_MAX", "must not be shorter than ENRICH_FLUSH_IDLE");
        }
        Some(EnrichConfig {
            mode: mode?,
            session_gap: session_gap?,
            timeout: timeout?,
            cache_users: cache_users?,
            max_pending: max_pending?,
            flush_idle,
            flush_max,
        })
    }
}
