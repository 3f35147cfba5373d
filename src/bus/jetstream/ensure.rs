//! The stream: found and checked, or created. One that exists is never changed.

use std::time::Duration;

use async_nats::jetstream::ErrorCode;
use async_nats::jetstream::context::{Context, CreateStreamErrorKind, GetStreamErrorKind};
use async_nats::jetstream::response::Response;
use async_nats::jetstream::stream::{Config, DiscardPolicy, Info, RetentionPolicy, StorageType};
use serde::Deserialize;
use serde_json::json;

use super::Desired;
use crate::bus::BusError;
use crate::envelope::subject::covers;
use crate::errors;
use crate::telemetry::logs::with_causes;

/// Marks a stream as ours, so that it may be created again if it is deleted.
const DESCRIPTION: &str = "Live events, created by Inlet";

const USUAL_MAX_BYTES: u64 = 10 << 30;
const LEAST_MAX_BYTES: u64 = 256 << 20;

/// A stream that fits.
#[derive(Debug)]
pub(super) struct Attached {
    pub(super) name: String,
    pub(super) identity: String,
    /// Its retention is limits.
    pub(super) keeps_by_limits: bool,
    pub(super) duplicate_window: Duration,
    pub(super) max_age: Option<Duration>,
    pub(super) max_bytes: Option<u64>,
    /// The stream's own limit, if it has one.
    pub(super) largest_message: Option<usize>,
    pub(super) owner: Owner,
}

/// Whose the stream is that was attached to last: only ours is created again when it is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Owner {
    /// None was attached to yet.
    Unknown,
    /// Inlet created it, now or once.
    Inlet,
    /// An operator's.
    Other,
}

/// The name of a stream that Inlet creates.
pub(super) fn default_name(prefix: &str) -> String {
    let prefix = prefix.trim_end_matches('.');
    if prefix.is_empty() {
        return "INLET".to_owned();
    }
    let plain = |c: char| {
        if c.is_ascii_alphanumeric() || c == '-' { c } else { '_' }
    };
    format!("INLET_{}", prefix.chars().map(plain).collect::<String>())
}

/// Finds the stream and checks it, or creates it.
pub(super) async fn ensure(context: &Context, desired: &Desired, owner: Owner) -> Result<Attached, BusError> {
    let name = name(context, desired).await?;
    if let Some(info) = get(context, &name).await? {
        check(&info, desired)
    } else if owner == Owner::Other {
        Err(BusError::Unfit("the stream is gone, and Inlet did not create it; create it again".to_owned()))
    } else {
        let info = create(context, &name, desired).await?;
        // Said once each: a stream that vanished is a thing to know of.
        if owner == Owner::Inlet {
            tracing::error!(
                error_code = %errors::ErrorCode::StreamRecreated,
                stream = name,
                "the stream was gone and has been created again; what it held is lost"
            );
        } else {
            tracing::info!(stream = name, "created the stream");
        }
        check(&info, desired)
    }
}

/// As [`ensure`] with nothing done: the stream that is there, or the name of the one that would be created.
pub(super) async fn look(context: &Context, desired: &Desired) -> Result<Result<Attached, String>, BusError> {
    let name = name(context, desired).await?;
    if let Some(info) = get(context, &name).await? {
        return check(&info, desired).map(Ok);
    }
    let others = others(context, desired).await?;
    if others.is_empty() { Ok(Err(name)) } else { Err(overlap(&name, &others)) }
}

/// The name of the stream: as set, or of the one that covers the subject, or of the one to create.
async fn name(context: &Context, desired: &Desired) -> Result<String, BusError> {
    if let Some(name) = &desired.stream {
        return Ok(name.clone());
    }
    Ok(find(context, desired).await?.unwrap_or_else(|| desired.default_name.clone()))
}

/// The stream that takes our events now, if any does.
async fn find(context: &Context, desired: &Desired) -> Result<Option<String>, BusError> {
    let [events, dead_letters] = desired.subjects.patterns();
    let mut found = names_on(context, &events).await?;
    if found.len() > 1 {
        return Err(BusError::Unfit(format!(
            "the streams {} each take a part of {events}; set NATS_STREAM or another PUBLISH_SUBJECT",
            found.join(", ")
        )));
    }
    if let Some(name) = found.pop() {
        return Ok(Some(name));
    }
    match names_on(context, &dead_letters).await?.pop() {
        Some(name) => Err(BusError::Unfit(format!(
            "the stream {name} takes {dead_letters} but not {events}, so none can be created for both; \
             add {events} to it or set another BUS_PREFIX"
        ))),
        None => Ok(None),
    }
}

async fn names_on(context: &Context, subject: &str) -> Result<Vec<String>, BusError> {
    #[derive(Deserialize)]
    struct Names {
        #[serde(default)]
        streams: Option<Vec<String>>,
    }
    let answer: Response<Names> = context
        .request("STREAM.NAMES", &json!({ "subject": subject }))
        .await
        .map_err(|error| BusError::Away(with_causes(&error)))?;
    match answer {
        Response::Ok(names) => Ok(names.streams.unwrap_or_default()),
        Response::Err { error } => Err(refused(&error)),
    }
}

async fn get(context: &Context, name: &str) -> Result<Option<Info>, BusError> {
    match context.get_stream(name).await {
        Ok(stream) => Ok(Some(stream.cached_info().clone())),
        Err(error) => match error.kind() {
            GetStreamErrorKind::JetStream(cause) if cause.error_code() == ErrorCode::STREAM_NOT_FOUND => {
                Ok(None)
            }
            GetStreamErrorKind::JetStream(cause) => Err(refused(&cause)),
            GetStreamErrorKind::EmptyName | GetStreamErrorKind::InvalidStreamName => {
                Err(BusError::Unfit(format!("{name:?} is no name of a stream")))
            }
            GetStreamErrorKind::Request => Err(BusError::Away(with_causes(&error))),
        },
    }
}

fn check(info: &Info, desired: &Desired) -> Result<Attached, BusError> {
    let config = &info.config;
    let name = &config.name;
    for pattern in desired.subjects.patterns() {
        if !config.subjects.iter().any(|subject| covers(subject, &pattern)) {
            return Err(BusError::Unfit(format!(
                "the stream {name} does not take {pattern}; add it to its subjects"
            )));
        }
    }
    if config.duplicate_window.is_zero() {
        return Err(BusError::Unfit(format!(
            "the stream {name} has no duplicate window, so events would double"
        )));
    }
    Ok(Attached {
        name: name.clone(),
        identity: format!("{name}@{}", info.created.unix_timestamp_nanos()),
        keeps_by_limits: config.retention == RetentionPolicy::Limits,
        duplicate_window: config.duplicate_window,
        max_age: Some(config.max_age).filter(|age| !age.is_zero()),
        max_bytes: u64::try_from(config.max_bytes).ok().filter(|most| *most > 0),
        largest_message: usize::try_from(config.max_message_size).ok().filter(|most| *most > 0),
        owner: if config.description.as_deref() == Some(DESCRIPTION) { Owner::Inlet } else { Owner::Other },
    })
}

/// Creates the stream. Where the settings leave its size open, it is halved until the server has room for it.
async fn create(context: &Context, name: &str, desired: &Desired) -> Result<Info, BusError> {
    let by_hand = desired.retention.max_bytes;
    let mut max_bytes = by_hand.unwrap_or(USUAL_MAX_BYTES);
    loop {
        match context.create_stream(new_stream(name, desired, max_bytes)).await {
            Ok(stream) => return Ok(stream.cached_info().clone()),
            Err(error) => match error.kind() {
                CreateStreamErrorKind::JetStream(cause)
                    if cause.error_code() == ErrorCode::STORAGE_RESOURCES_EXCEEDED =>
                {
                    if by_hand.is_some() || max_bytes / 2 < LEAST_MAX_BYTES {
                        return Err(BusError::Unfit(format!(
                            "the server has no room for a stream of {max_bytes} bytes; set NATS_STREAM_MAX_BYTES lower"
                        )));
                    }
                    max_bytes /= 2;
                }
                CreateStreamErrorKind::JetStream(cause)
                    if cause.error_code() == ErrorCode::STREAM_SUBJECT_OVERLAP =>
                {
                    return Err(overlap(name, &others(context, desired).await?));
                }
                CreateStreamErrorKind::JetStream(cause) => return Err(refused(&cause)),
                _ => return Err(BusError::Away(with_causes(&error))),
            },
        }
    }
}

/// The streams that take something of ours.
async fn others(context: &Context, desired: &Desired) -> Result<Vec<String>, BusError> {
    let mut others = Vec::new();
    for pattern in desired.subjects.patterns() {
        others.extend(names_on(context, &pattern).await?);
    }
    others.sort_unstable();
    others.dedup();
    Ok(others)
}

fn overlap(name: &str, others: &[String]) -> BusError {
    BusError::Unfit(format!(
        "the stream {name} cannot be created: its subjects overlap with those of {}",
        others.join(", ")
    ))
}

fn new_stream(name: &str, desired: &Desired, max_bytes: u64) -> Config {
    Config {
        name: name.to_owned(),
        description: Some(DESCRIPTION.to_owned()),
        subjects: desired.subjects.patterns().to_vec(),
        retention: RetentionPolicy::Limits,
        storage: StorageType::File,
        discard: DiscardPolicy::Old,
        max_age: desired.retention.max_age,
        max_bytes: i64::try_from(max_bytes).unwrap_or(i64::MAX),
        num_replicas: desired.replicas,
        duplicate_window: desired.retention.duplicate_window(),
        ..Config::default()
    }
}

/// What the server says for good, and what passes, told apart by code.
fn refused(error: &async_nats::jetstream::Error) -> BusError {
    let passes = [
        ErrorCode::CLUSTER_NOT_AVAILABLE,
        ErrorCode::CLUSTER_NO_PEERS,
        ErrorCode::CLUSTER_NOT_LEADER,
        ErrorCode::INSUFFICIENT_RESOURCES,
    ];
    if passes.contains(&error.error_code())
        || error.code() == 503 && error.error_code() == ErrorCode::default()
    {
        BusError::Away(error.to_string())
    } else {
        BusError::Unfit(format!("NATS refuses: {error}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_streams_name_follows_the_prefix() {
        for (prefix, name) in [("", "INLET"), ("dev.", "INLET_dev"), ("a.b c.", "INLET_a_b_c")] {
            assert_eq!(default_name(prefix), name);
        }
    }
}
