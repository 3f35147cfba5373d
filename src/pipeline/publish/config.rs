//! Settings of publishing.

use std::time::Duration;

use clap::Args;
use serde::Serialize;

use crate::settings::{self, Problems};

/// Settings of publishing.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Publishing")]
#[expect(clippy::struct_field_names, reason = "the names are the flags")]
pub struct PublishArgs {
    /// Messages sent and not yet acknowledged, at most
    #[arg(long, env, default_value = "1024")]
    publish_max_in_flight: String,
    /// Refusals of unknown kind before a message becomes a dead letter
    #[arg(long, env, default_value = "5")]
    publish_max_attempts: String,
    /// How long to wait for an ack
    #[arg(long, env, default_value = "5s")]
    publish_ack_wait: String,
}

/// Checked settings of publishing.
#[derive(Debug, Clone, Serialize)]
pub struct PublishConfig {
    /// Messages sent and not yet acknowledged.
    #[serde(rename = "PUBLISH_MAX_IN_FLIGHT")]
    pub max_in_flight: usize,
    /// Refusals of unknown kind before a message becomes a dead letter.
    #[serde(rename = "PUBLISH_MAX_ATTEMPTS")]
    pub max_attempts: u32,
    /// How long to wait for an ack.
    #[serde(rename = "PUBLISH_ACK_WAIT", serialize_with = "settings::shown_duration")]
    pub ack_wait: Duration,
}

impl PublishArgs {
    /// Checks the settings.
    pub fn check(&self, problems: &mut Problems) -> Option<PublishConfig> {
        let max_in_flight =
            problems.parse("PUBLISH_MAX_IN_FLIGHT", &self.publish_max_in_flight, settings::count(1, 65_536));
        let max_attempts =
            problems.parse("PUBLISH_MAX_ATTEMPTS", &self.publish_max_attempts, settings::count(1, 1_000));
        let ack_wait =
            problems.parse("PUBLISH_ACK_WAIT", &self.publish_ack_wait, settings::positive_duration);
        Some(PublishConfig {
            max_in_flight: max_in_flight?,
            max_attempts: u32::try_from(max_attempts?).unwrap_or(u32::MAX),
            ack_wait: ack_wait?,
        })
    }
}
