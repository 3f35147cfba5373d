//! Following the stream: an ordered consumer, in batches.

use std::sync::Arc;

use async_nats::jetstream::consumer::{DeliverPolicy, pull};
use async_nats::jetstream::{self};
use futures_util::stream::{self, BoxStream};
use futures_util::{FutureExt as _, StreamExt as _};
use jiff::Timestamp;
use tokio::sync::watch;

use super::session::{Session, gone};
use crate::bus::{Batch, BusError, ByUser, Follower, Start, Stored, Wanted, header};
use crate::envelope::SubjectTemplate;
use crate::telemetry::logs::with_causes;

/// Messages asked for at a time, and the most that one batch brings.
const MOST_AT_ONCE: usize = 500;

type Messages = BoxStream<'static, Result<jetstream::Message, BusError>>;

struct State {
    messages: Messages,
    lost: watch::Receiver<bool>,
    /// The session that stands now: one with another stream ends this.
    sessions: watch::Receiver<Option<Session>>,
    identity: String,
    /// The consumer's name.
    consumer: String,
    subjects: SubjectTemplate,
    /// The stream's last position, if nothing is left behind it when following begins, and nobody was told yet.
    begins_at_end: Option<u64>,
}

pub(super) async fn follow(
    session: Session,
    sessions: watch::Receiver<Option<Session>>,
    subjects: SubjectTemplate,
    start: Start,
    content: Wanted,
) -> Result<Follower, BusError> {
    let away = |error: &(dyn std::error::Error + 'static)| BusError::Away(with_causes(error));
    let stream = session.context.get_stream(&*session.stream_name).await.map_err(|error| away(&error))?;
    let deliver_policy = match start {
        Start::Position(position) => DeliverPolicy::ByStartSequence { start_sequence: position.max(1) },
        Start::Time(time) => match async_nats::datetime::from_nanos(time.as_nanosecond()) {
            Ok(start_time) => DeliverPolicy::ByStartTime { start_time },
            Err(_) => DeliverPolicy::All,
        },
        Start::Last => DeliverPolicy::Last,
        Start::End => DeliverPolicy::New,
    };
    // Others may have a subject in the stream; the last message must be one of ours.
    let filter_subject = match start {
        Start::Last => subjects.patterns()[0].clone(),
        Start::Position(_) | Start::Time(_) | Start::End => String::new(),
    };
    let config = pull::OrderedConfig {
        deliver_policy,
        filter_subject,
        headers_only: content == Wanted::Headers,
        max_batch: i64::try_from(MOST_AT_ONCE).unwrap_or(i64::MAX),
        ..pull::OrderedConfig::default()
    };
    let consumer = stream.create_consumer(config).await.map_err(|error| away(&error))?;
    let found = format!("{}@{}", session.stream_name, stream.cached_info().created.unix_timestamp_nanos());
    if found != session.info().identity {
        return Err(BusError::Interrupted("the stream is another one".to_owned()));
    }
    let first_position = stream.cached_info().state.first_sequence.max(1);
    let last_position = stream.cached_info().state.last_sequence;
    let begins_at_end = (consumer.cached_info().num_pending == 0).then_some(last_position);
    let name = consumer.cached_info().name.clone();
    let messages = consumer.messages().await.map_err(|error| away(&error))?;
    let messages =
        messages.map(|message| message.map_err(|error| BusError::Interrupted(with_causes(&error)))).boxed();
    let state = State {
        messages,
        lost: session.lost.clone(),
        sessions,
        identity: session.info().identity,
        consumer: name,
        subjects,
        begins_at_end,
    };
    let identity = state.identity.clone();
    let batches = stream::try_unfold(state, next).boxed();
    Ok(Follower { identity, first_position, last_position, batches })
}

async fn next(mut state: State) -> Result<Option<(Batch, State)>, BusError> {
    if let Some(up_to) = state.begins_at_end.take() {
        return Ok(Some((Batch { up_to, ..Batch::default() }, state)));
    }
    let first = tokio::select! {
        message = state.messages.next() => {
            message.ok_or_else(|| BusError::Interrupted("the consumer ended".to_owned()))?
        }
        () = another_stream(&mut state.sessions, &state.identity) => {
            return Err(BusError::Interrupted("the stream is another one".to_owned()));
        }
        () = gone(&mut state.lost) => return Err(BusError::Interrupted("the connection was lost".to_owned())),
    };
    let mut batch = Batch::default();
    let mut following = Some(first);
    while let Some(message) = following {
        let message = message?;
        let info =
            message.info().map_err(|_| BusError::Interrupted("a message without its position".to_owned()))?;
        // The library makes a consumer anew by itself, and from the stream's start if nothing came before.
        if state.consumer != info.consumer {
            return Err(BusError::Interrupted("the consumer is another one".to_owned()));
        }
        (batch.behind, batch.up_to) = (info.pending, info.stream_sequence);
        if state.subjects.owns(&message.subject) {
            batch.messages.push(stored(&message, &info));
        }
        if batch.messages.len() >= MOST_AT_ONCE {
            break;
        }
        following = state.messages.next().now_or_never().flatten();
    }
    Ok(Some((batch, state)))
}

/// Waits until a session stands on another stream. The library's consumer would wait in the new one for positions
/// of the old.
async fn another_stream(sessions: &mut watch::Receiver<Option<Session>>, identity: &str) {
    let is_another =
        |session: &Option<Session>| session.as_ref().is_some_and(|s| s.info().identity != identity);
    drop(sessions.wait_for(is_another).await);
}

fn stored(message: &jetstream::Message, info: &jetstream::message::Info<'_>) -> Stored {
    let headers = Headers::of(message);
    Stored {
        position: info.stream_sequence,
        stored_at: Timestamp::from_nanosecond(info.published.unix_timestamp_nanos())
            .unwrap_or(Timestamp::UNIX_EPOCH),
        id: headers.id.and_then(|id| id.parse().ok()),
        subject: Arc::from(message.subject.as_str()),
        kind: headers.kind.unwrap_or_default().to_owned(),
        by_user: by_user(headers.user, headers.at),
        payload: message.payload.clone(),
    }
}

/// The first of each header that says something.
#[derive(Default)]
struct Headers<'a> {
    id: Option<&'a str>,
    kind: Option<&'a str>,
    user: Option<&'a str>,
    at: Option<&'a str>,
}

impl<'a> Headers<'a> {
    /// Goes through them once: asking for one after the other makes a name and hashes it each time.
    fn of(message: &'a jetstream::Message) -> Self {
        let mut found = Self::default();
        for (name, values) in message.headers.iter().flat_map(async_nats::HeaderMap::iter) {
            let place = match name.as_ref() {
                header::MESSAGE_ID => &mut found.id,
                header::TYPE => &mut found.kind,
                header::USER => &mut found.user,
                header::AT => &mut found.at,
                _ => continue,
            };
            *place = values.first().map(async_nats::HeaderValue::as_str);
        }
        found
    }
}

fn by_user(key: Option<&str>, at: Option<&str>) -> Option<ByUser> {
    let occurred_at = Timestamp::from_millisecond(at?.parse().ok()?).ok()?;
    Some(ByUser { key: Arc::from(key?), occurred_at })
}
