//! Settings of the bus.

use std::fmt;
use std::time::Duration;

use clap::Args;
use serde::Serialize;

use super::jetstream;
use crate::envelope::SubjectTemplate;
use crate::settings::{self, Problems};

/// Settings of the bus that all drivers share.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Bus")]
pub struct BusArgs {
    /// `nats` or `embedded`; left out: `nats` if `NATS_URL` is set, else `embedded`
    #[arg(long, env)]
    message_bus_driver: Option<String>,
    /// Oldest message that a stream created by Inlet, or the embedded one, keeps
    #[arg(long, env, default_value = "72h")]
    nats_stream_max_age: String,
    /// Most bytes that stream keeps; left out: 10GiB on NATS, 1GiB embedded
    #[arg(long, env)]
    nats_stream_max_bytes: Option<String>,
    /// Put before every subject; empty or ends with a dot
    #[arg(long, env, default_value = "")]
    bus_prefix: String,
    /// Subject of events; may hold {platform}, {type} and {channel}
    #[arg(long, env, default_value = "internal.ingress.v1")]
    publish_subject: String,
    #[command(flatten)]
    jetstream: jetstream::JetStreamArgs,
}

/// Which bus.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Driver {
    /// NATS `JetStream`.
    Nats,
    /// A file in `DATA_DIR`.
    Embedded,
}

impl fmt::Display for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nats => "nats",
            Self::Embedded => "embedded",
        })
    }
}

/// Checked settings of the bus.
#[derive(Debug, Clone, Serialize)]
pub struct BusConfig {
    /// The driver.
    #[serde(rename = "MESSAGE_BUS_DRIVER")]
    pub driver: Driver,
    /// Bounds of the stream.
    #[serde(flatten)]
    pub retention: Retention,
    #[serde(rename = "BUS_PREFIX")]
    prefix: String,
    #[serde(rename = "PUBLISH_SUBJECT")]
    subject: String,
    /// The subjects, parsed.
    #[serde(skip)]
    pub subjects: SubjectTemplate,
    /// NATS; `None` when the driver is another.
    #[serde(flatten)]
    pub jetstream: Option<jetstream::JetStreamConfig>,
}

/// How much a stream keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Retention {
    /// Oldest message.
    #[serde(rename = "NATS_STREAM_MAX_AGE", serialize_with = "settings::shown_duration")]
    pub max_age: Duration,
    /// Most bytes; `None` is the driver's default.
    #[serde(rename = "NATS_STREAM_MAX_BYTES")]
    pub max_bytes: Option<u64>,
}

/// For how long a stream that Inlet makes knows an id, at most.
const LONGEST_DUPLICATE_WINDOW: Duration = Duration::from_mins(10);

impl Retention {
    /// The duplicate window of a stream that Inlet makes.
    pub fn duplicate_window(&self) -> Duration {
        self.max_age.min(LONGEST_DUPLICATE_WINDOW)
    }
}

impl BusArgs {
    /// Checks the settings.
    pub fn check(&self, environment: &settings::Environment, problems: &mut Problems) -> Option<BusConfig> {
        let jetstream = self.jetstream.check(environment, problems);
        let has_url = self.jetstream.has_url();
        let driver = problems.parse_optional(
            "MESSAGE_BUS_DRIVER",
            self.message_bus_driver.as_ref(),
            |text| match text {
                "nats" if !has_url => Err("is nats, but NATS_URL is not set".to_owned()),
                "nats" => Ok(Driver::Nats),
                "embedded" => Ok(Driver::Embedded),
                _ => Err(format!("{text:?} is neither nats nor embedded")),
            },
        );
        let max_age =
            problems.parse("NATS_STREAM_MAX_AGE", &self.nats_stream_max_age, settings::positive_duration);
        let max_bytes =
            problems.parse_optional("NATS_STREAM_MAX_BYTES", self.nats_stream_max_bytes.as_ref(), |text| {
                match settings::bytes(text)? {
                    enough if enough >= 1 << 20 => Ok(enough),
                    _ => Err("must be at least 1MiB".to_owned()),
                }
            });
        let subjects = SubjectTemplate::new(self.bus_prefix.trim(), self.publish_subject.trim())
            .map_err(|error| problems.add("BUS_PREFIX, PUBLISH_SUBJECT", error))
            .ok();
        let driver = driver?.unwrap_or(if has_url { Driver::Nats } else { Driver::Embedded });
        Some(BusConfig {
            driver,
            retention: Retention { max_age: max_age?, max_bytes: max_bytes? },
            prefix: self.bus_prefix.trim().to_owned(),
            subject: self.publish_subject.trim().to_owned(),
            subjects: subjects?,
            jetstream: if driver == Driver::Nats { jetstream? } else { None },
        })
    }
}

impl BusConfig {
    /// `BUS_PREFIX`.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }
}
