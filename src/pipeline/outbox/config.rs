//! Settings of the outbox.

use std::path::Path;
use std::time::Duration;

use bytesize::ByteSize;
use clap::Args;
use serde::{Serialize, Serializer};

use crate::data_dir::medium;
use crate::settings::{self, Environment, Problems};

/// Most bytes where the settings do not say, on a disk.
const USUAL_MAX_BYTES: u64 = 1 << 30;

/// The part of the memory limit that it may take where `DATA_DIR` lies in memory.
const PART_OF_MEMORY: u64 = 4;

/// Less would not hold a few events of the largest size.
const LEAST_BYTES: u64 = 4 << 20;

/// Settings of the outbox.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Outbox")]
pub struct OutboxArgs {
    /// Without an ack for so long, an event is put on disk
    #[arg(long, env, default_value = "250ms")]
    outbox_after: String,
    /// Most that the outbox takes of the disk; left out: 1GiB, or a quarter of the memory limit where `DATA_DIR` lies in
    /// memory
    #[arg(long, env)]
    outbox_max_bytes: Option<String>,
}

/// Checked settings of the outbox.
#[derive(Debug, Clone, Serialize)]
pub struct OutboxConfig {
    /// Without an ack for so long: on disk.
    #[serde(rename = "OUTBOX_AFTER", serialize_with = "settings::shown_duration")]
    pub after: Duration,
    /// Most bytes, if that was set.
    #[serde(rename = "OUTBOX_MAX_BYTES", serialize_with = "shown_bytes")]
    pub max_bytes: Option<u64>,
    /// On Cloud Run every folder is memory.
    #[serde(skip)]
    is_on_cloud_run: bool,
}

/// How much the outbox may hold, and where that is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// Most bytes.
    pub max_bytes: u64,
    /// Whether it is lost with the machine.
    pub is_in_memory: bool,
}

#[expect(clippy::ref_option, reason = "serde hands over a reference to the field")]
fn shown_bytes<S: Serializer>(bytes: &Option<u64>, serializer: S) -> Result<S::Ok, S::Error> {
    bytes.map(|bytes| ByteSize(bytes).to_string()).serialize(serializer)
}

impl OutboxArgs {
    /// Checks the settings.
    pub fn check(&self, environment: &Environment, problems: &mut Problems) -> Option<OutboxConfig> {
        let after = problems.parse("OUTBOX_AFTER", &self.outbox_after, settings::positive_duration);
        let max_bytes = problems.parse_optional("OUTBOX_MAX_BYTES", self.outbox_max_bytes.as_ref(), |text| {
            match settings::bytes(text)? {
                enough if enough >= LEAST_BYTES => Ok(enough),
                _ => Err(format!("must be at least {}", ByteSize(LEAST_BYTES))),
            }
        });
        let is_on_cloud_run = environment.get("K_SERVICE").is_some();
        Some(OutboxConfig { after: after?, max_bytes: max_bytes?, is_on_cloud_run })
    }
}

impl OutboxConfig {
    /// What holds in this folder.
    pub fn bounds(&self, folder: &Path) -> Bounds {
        let is_in_memory = self.is_on_cloud_run || medium::is_in_memory(folder);
        let usual = match medium::memory_limit().filter(|_| is_in_memory) {
            Some(limit) => (limit / PART_OF_MEMORY).clamp(LEAST_BYTES, USUAL_MAX_BYTES),
            None => USUAL_MAX_BYTES,
        };
        Bounds { max_bytes: self.max_bytes.unwrap_or(usual), is_in_memory }
    }
}
