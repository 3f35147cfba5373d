//! NATS `JetStream`.
//!
//! Each connection is a session of its own. `async-nats` would reconnect by itself and then send what was
//! left in its buffers, behind our back and before what was lost: order would break. So a session ends with
//! its connection, everything unsettled is said to be unknown, and the sender sends it again, in order, on the
//! next one.

mod ensure;
mod follow;
mod lane;
mod look;
mod session;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use clap::Args;
use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use serde::{Serialize, Serializer};
use tokio::sync::{Notify, mpsc, watch};

use super::{Bus, BusError, BusState, Follower, Lane, Retention, Start, StreamInfo, Wanted};
use crate::envelope::SubjectTemplate;
use crate::errors::ErrorCode;
use crate::retry::Backoff;
use crate::secret::{Secret, without_user_info};
use crate::settings::{self, Environment, Problems};
use crate::tasks::Tasks;
use crate::tls::TlsConfig;
use session::{Session, gone};

pub use look::{Looked, look};

/// Waits between attempts to connect. What has gathered meanwhile is to be sent soon.
const FIRST_RETRY: Duration = Duration::from_millis(250);
const LONGEST_RETRY: Duration = Duration::from_secs(2);

/// How often the stream is looked at while all seems well: it may be deleted or changed by somebody else, and a
/// publisher may hear nothing of it; and a server whose `JetStream` answers nothing is noticed within 15 s.
const CHECK_PERIOD: Duration = Duration::from_secs(8);

/// Settings of NATS.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "NATS")]
#[expect(clippy::struct_field_names, reason = "the names are the flags")]
pub struct JetStreamArgs {
    /// Servers, one or more with commas between; user:password@ or token@ allowed
    #[arg(long, env)]
    nats_url: Option<String>,
    /// Path of a .creds file
    #[arg(long, env)]
    nats_creds_file: Option<String>,
    /// Path of an nkey seed
    #[arg(long, env)]
    nats_nkey_file: Option<String>,
    /// Client certificate, PEM
    #[arg(long, env)]
    nats_tls_cert_file: Option<String>,
    /// Its key, PEM
    #[arg(long, env)]
    nats_tls_key_file: Option<String>,
    /// The stream; left out: the one that covers the subject, else INLET is created
    #[arg(long, env)]
    nats_stream: Option<String>,
    /// Replicas of a stream that is created
    #[arg(long, env, default_value = "1")]
    nats_stream_replicas: String,
}

/// Checked settings of NATS.
#[derive(Debug, Clone, Serialize)]
pub struct JetStreamConfig {
    #[serde(rename = "NATS_URL", serialize_with = "shown_urls")]
    urls: Vec<Secret>,
    #[serde(rename = "NATS_CREDS_FILE", serialize_with = "shown_if_set")]
    credentials: Option<Secret>,
    #[serde(rename = "NATS_NKEY_FILE", serialize_with = "shown_if_set")]
    nkey: Option<Secret>,
    #[serde(rename = "NATS_TLS_CERT_FILE")]
    certificate: Option<std::path::PathBuf>,
    #[serde(rename = "NATS_TLS_KEY_FILE")]
    certificate_key: Option<std::path::PathBuf>,
    #[serde(rename = "NATS_STREAM")]
    stream: Option<String>,
    #[serde(rename = "NATS_STREAM_REPLICAS")]
    replicas: usize,
}

fn shown_urls<S: Serializer>(urls: &[Secret], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(urls.iter().map(|url| without_user_info(url.expose())))
}

#[expect(clippy::ref_option, reason = "serde hands over a reference to the field")]
fn shown_if_set<S: Serializer>(secret: &Option<Secret>, serializer: S) -> Result<S::Ok, S::Error> {
    secret.serialize(serializer)
}

impl JetStreamArgs {
    /// Whether `NATS_URL` is set.
    pub fn has_url(&self) -> bool {
        self.nats_url.as_ref().is_some_and(|url| !url.trim().is_empty())
    }

    /// Checks the settings; the inner `None` is "no `NATS_URL`".
    pub fn check(&self, _: &Environment, problems: &mut Problems) -> Option<Option<JetStreamConfig>> {
        let urls = problems.parse_optional("NATS_URL", self.nats_url.as_ref(), |text| {
            text.split(',').map(|url| session::checked_url(url.trim())).collect::<Result<Vec<_>, _>>()
        });
        let secret_in = |text: &str| match std::fs::read_to_string(text) {
            Ok(secret) => Ok(Secret::new(secret.trim())),
            Err(error) => Err(format!("{text:?} cannot be read: {error}")),
        };
        let credentials = problems.parse_optional("NATS_CREDS_FILE", self.nats_creds_file.as_ref(), |text| {
            session::checked_credentials(&secret_in(text)?)
        });
        let nkey = problems.parse_optional("NATS_NKEY_FILE", self.nats_nkey_file.as_ref(), secret_in);
        let certificate = problems.parse_optional(
            "NATS_TLS_CERT_FILE",
            self.nats_tls_cert_file.as_ref(),
            settings::readable_file,
        );
        let certificate_key = problems.parse_optional(
            "NATS_TLS_KEY_FILE",
            self.nats_tls_key_file.as_ref(),
            settings::readable_file,
        );
        let stream = problems.parse_optional("NATS_STREAM", self.nats_stream.as_ref(), stream_name);
        let replicas =
            problems.parse("NATS_STREAM_REPLICAS", &self.nats_stream_replicas, settings::count(1, 5));
        let (certificate, certificate_key) = (certificate?, certificate_key?);
        if certificate.is_some() != certificate_key.is_some() {
            problems.add("NATS_TLS_CERT_FILE", "and NATS_TLS_KEY_FILE go together");
        }
        let (credentials, nkey) = (credentials?, nkey?);
        if credentials.is_some() && nkey.is_some() {
            problems.add("NATS_CREDS_FILE", "and NATS_NKEY_FILE exclude each other");
        }
        let (stream, replicas) = (stream?, replicas?);
        Some(urls?.map(|urls| JetStreamConfig {
            urls,
            credentials,
            nkey,
            certificate,
            certificate_key,
            stream,
            replicas,
        }))
    }
}

fn stream_name(text: &str) -> Result<String, String> {
    if text
        .contains(|c: char| c.is_whitespace() || c.is_control() || matches!(c, '.' | '*' | '>' | '/' | '\\'))
    {
        return Err(format!("{text:?} is no name of a stream"));
    }
    Ok(text.to_owned())
}

/// What the stream is to be like; what [`ensure`] needs.
#[derive(Debug, Clone)]
pub(crate) struct Desired {
    subjects: SubjectTemplate,
    stream: Option<String>,
    default_name: String,
    retention: Retention,
    replicas: usize,
}

impl Desired {
    fn new(config: &JetStreamConfig, bus: &super::BusConfig) -> Self {
        Self {
            subjects: bus.subjects.clone(),
            stream: config.stream.clone(),
            default_name: ensure::default_name(bus.prefix()),
            retention: bus.retention,
            replicas: config.replicas,
        }
    }
}

/// A bus on NATS `JetStream`.
pub struct JetStreamBus {
    shared: Arc<Shared>,
    /// The keeper of the connection and the lanes. They end with the bus.
    tasks: Mutex<Tasks>,
}

struct Shared {
    state: watch::Sender<BusState>,
    /// The session that stands, if one does. Closed when nobody keeps the connection any longer.
    session: watch::Receiver<Option<Session>>,
    /// Somebody was told that the stream is not there.
    stream_missed: Notify,
    last_info: Mutex<Option<StreamInfo>>,
    desired: Desired,
}

impl JetStreamBus {
    /// Starts connecting in the background; [`Bus::state`] says how it goes.
    pub fn start(
        config: JetStreamConfig,
        bus: &super::BusConfig,
        tls: &TlsConfig,
        window: usize,
    ) -> Arc<Self> {
        let desired = Desired::new(&config, bus);
        let (sessions, session) = watch::channel(None);
        let shared = Arc::new(Shared {
            state: watch::Sender::new(BusState::Connecting),
            session,
            stream_missed: Notify::new(),
            last_info: Mutex::new(None),
            desired,
        });
        let connector = session::Connector::new(config, tls.clone(), window);
        let mut tasks = Tasks::new();
        let keeper = Keeper { shared: Arc::clone(&shared), sessions, keeps_by_limits: true };
        tasks.spawn("nats connection", keeper.keep_connected(connector));
        Arc::new(Self { shared, tasks: Mutex::new(tasks) })
    }
}

impl Bus for JetStreamBus {
    fn state(&self) -> watch::Receiver<BusState> {
        self.shared.state.subscribe()
    }

    fn open_lane(&self, window: usize) -> Lane {
        let (messages, inbox) = mpsc::channel(window);
        let (outbox, settled) = mpsc::channel(window);
        let lane = lane::LaneEnd::new(Arc::clone(&self.shared), inbox, outbox);
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner).spawn("nats lane", lane.run());
        Lane { messages, settled }
    }

    fn follow(&self, start: Start, content: Wanted) -> BoxFuture<'_, Result<Follower, BusError>> {
        async move {
            let session = self.shared.session.borrow().clone();
            let Some(session) = session else {
                let state = self.shared.state.borrow().clone();
                return Err(match state {
                    BusState::Unfit(why) => BusError::Unfit(why),
                    other => BusError::Away(other.why().unwrap_or("not connected").to_owned()),
                });
            };
            let sessions = self.shared.session.clone();
            follow::follow(session, sessions, self.shared.desired.subjects.clone(), start, content).await
        }
        .boxed()
    }

    fn stream(&self) -> Option<StreamInfo> {
        self.shared.last_info.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Keeps the connection. It alone can say which session stands, so that its end, by a panic too, ends the lanes, and with
/// them the service.
struct Keeper {
    shared: Arc<Shared>,
    sessions: watch::Sender<Option<Session>>,
    /// What was last seen of the stream's retention: said when it changes, not whenever it is looked at.
    keeps_by_limits: bool,
}

impl Keeper {
    /// Connects, looks after the stream, and starts over when the connection is lost.
    async fn keep_connected(mut self, mut connector: session::Connector) {
        let mut backoff = Backoff::new(FIRST_RETRY, LONGEST_RETRY);
        let mut owner = ensure::Owner::Unknown;
        loop {
            match connector.connect().await {
                Ok(link) => {
                    let kept = self.keep_stream(&link, &mut owner, &mut backoff).await;
                    self.sessions.send_replace(None);
                    if let Err(error) = kept {
                        self.shared.say(BusState::Away(error));
                    }
                }
                Err(error) => self.shared.say(BusState::Away(error.to_string())),
            }
            tokio::time::sleep(backoff.next_wait()).await;
        }
    }

    /// Ensures the stream for as long as the connection stands; returns why it no longer does.
    async fn keep_stream(
        &mut self,
        link: &session::Link,
        owner: &mut ensure::Owner,
        backoff: &mut Backoff,
    ) -> Result<(), String> {
        let mut lost = link.lost();
        loop {
            let ensured = tokio::select! {
                ensured = ensure::ensure(link.context(), &self.shared.desired, *owner) => ensured,
                () = gone(&mut lost) => return Err("the connection was lost".to_owned()),
            };
            let wait = match ensured {
                Ok(attached) => {
                    *owner = attached.owner;
                    self.warn_of_retention(&attached);
                    self.attach(Session::new(link, attached, link.largest_message()));
                    backoff.reset();
                    None
                }
                Err(error) => {
                    self.sessions.send_replace(None);
                    self.shared.say(match error {
                        BusError::Unfit(why) => BusState::Unfit(why),
                        error => BusState::Away(error.to_string()),
                    });
                    Some(backoff.next_wait())
                }
            };
            tokio::select! {
                () = gone(&mut lost) => return Err("the connection was lost".to_owned()),
                () = tokio::time::sleep(wait.unwrap_or(CHECK_PERIOD)) => {}
                () = async {
                    self.shared.stream_missed.notified().await;
                    // Many messages miss it at once; one look is enough.
                    tokio::time::sleep(FIRST_RETRY).await;
                }, if wait.is_none() => {}
            }
        }
    }

    fn warn_of_retention(&mut self, attached: &ensure::Attached) {
        let kept = std::mem::replace(&mut self.keeps_by_limits, attached.keeps_by_limits);
        if kept && !attached.keeps_by_limits {
            tracing::warn!(error_code = %ErrorCode::StreamUnsafe, stream = attached.name, "the stream's retention is not limits: counts may be lost in a crash");
        }
    }

    fn attach(&self, session: Session) {
        let info = session.info();
        *self.shared.last_info.lock().unwrap_or_else(PoisonError::into_inner) = Some(info);
        self.sessions.send_if_modified(|current| {
            // The same stream on the same connection, looked at again: nothing changed.
            let same = current.as_ref().is_some_and(|current| current.is_same(&session));
            if !same {
                *current = Some(session);
            }
            !same
        });
        self.shared.say(BusState::Up);
    }
}

impl Shared {
    /// Notes the state, and logs it when it changes: transitions, not attempts.
    fn say(&self, state: BusState) {
        self.state.send_if_modified(|current| {
            if *current == state {
                return false;
            }
            match (&*current, &state) {
                (_, BusState::Up) => tracing::info!("NATS is up"),
                (_, BusState::Unfit(why)) => {
                    tracing::error!(error_code = %ErrorCode::BusUnfit, error = why, "NATS has no stream that can be used");
                }
                (BusState::Away(_), BusState::Away(_)) | (_, BusState::Connecting) => {}
                (_, BusState::Away(why)) => tracing::warn!(error_code = %ErrorCode::BusUnavailable, error = why, "NATS is away"),
            }
            *current = state;
            true
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::Numbered;

    /// What a lane needs, with nobody behind it but whoever holds the sender.
    fn shared() -> (Arc<Shared>, watch::Sender<Option<Session>>) {
        let (sessions, session) = watch::channel(None);
        let subjects = SubjectTemplate::new("", "internal.ingress.v1").unwrap();
        let retention = Retention { max_age: Duration::from_mins(1), max_bytes: None };
        let desired =
            Desired { subjects, stream: None, default_name: "INLET".to_owned(), retention, replicas: 1 };
        let (stream_missed, last_info) = (Notify::new(), Mutex::new(None));
        let state = watch::Sender::new(BusState::Up);
        (Arc::new(Shared { state, session, stream_missed, last_info, desired }), sessions)
    }

    #[tokio::test]
    async fn a_lane_ends_with_whoever_keeps_the_connection() {
        let (shared, sessions) = shared();
        let (messages, inbox) = mpsc::channel::<Vec<Numbered>>(1);
        let (outbox, mut settled) = mpsc::channel(1);
        let mut tasks = Tasks::new();
        tasks.spawn("nats lane", lane::LaneEnd::new(shared, inbox, outbox).run());
        drop(sessions);
        let ended = tokio::time::timeout(Duration::from_secs(5), settled.recv()).await;
        assert!(ended.is_ok_and(|settled| settled.is_none()), "it goes on refusing");
        drop(messages);
    }
}
