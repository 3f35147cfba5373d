//! The operator's HTTP: probes, metrics, a look inside, the stream of what was published, and a page that shows them.

mod access;
mod audit;
mod channels;
mod connections;
mod debug;
mod errors;
mod health;
mod login;
mod metrics;
mod origins;
mod page;
mod problem;
mod replay;
mod request;
mod stream;
mod unread;
mod users;

use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::Router;
use axum::middleware::{from_fn, from_fn_with_state, map_request};
use axum::routing::{get, post};
use clap::Args;
use prometheus::Registry;
use serde::Serialize;
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::bus::Bus;
use crate::channels::Channels;
use crate::clock::Clock;
use crate::errors::ErrorCode;
use crate::pipeline::PipelineMetrics;
use crate::secret::Secret;
use crate::settings::{self, Environment, Problems};
use crate::source::twitch::credentials::TokenStore;
use crate::source::twitch::{ReplayDoor, TwitchStatus};
use crate::status::Parts;
use crate::store::measured::Store;
use crate::tasks::Tasks;
use crate::telemetry::tally::ErrorTally;
use crate::users::Desk;

use connections::Limits;

pub use metrics::HttpMetrics;
pub use origins::Origins;

/// Connections at a time, besides those of `/v1/stream`'s readers. Well below the 1024 descriptors that a process usually
/// has: the bus, the sources and the files need theirs.
const CONNECTIONS: usize = 256;
/// A token that is shorter is weak, in characters.
const SHORTEST_TOKEN: usize = 16;
/// For the head of a request, and between two.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);
/// For whoever asked to read on.
const READER_TIMEOUT: Duration = Duration::from_secs(30);

/// Settings of the operator's HTTP.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "HTTP")]
pub struct HttpArgs {
    /// Port of the operator's HTTP
    #[arg(long, env, default_value = "8080")]
    port: String,
    /// Address of the operator's HTTP
    #[arg(long, env, default_value = "0.0.0.0")]
    bind_addr: String,
    /// Readers of /v1/stream at a time
    #[arg(long, env, default_value = "64")]
    stream_max_clients: String,
    /// Pages of other sites that may read /v1/stream with `STREAM_TOKEN`: origins such as <https://overlay.example>, with
    /// commas or white space between; null is a page opened from a file
    #[arg(long, env)]
    stream_origins: Option<String>,
}

/// Checked settings.
#[derive(Debug, Clone, Serialize)]
pub struct HttpConfig {
    /// Port; 0 takes a free one.
    #[serde(rename = "PORT")]
    pub port: u16,
    /// Address.
    #[serde(rename = "BIND_ADDR")]
    pub address: IpAddr,
    /// Guards what is not for everybody.
    #[serde(rename = "ADMIN_TOKEN")]
    pub admin_token: Option<Secret>,
    /// Opens what that does, while one takes the other's place.
    #[serde(rename = "ADMIN_TOKEN_NEXT")]
    pub next_admin_token: Option<Secret>,
    /// Opens `/v1/stream` alone.
    #[serde(rename = "STREAM_TOKEN")]
    pub stream_token: Option<Secret>,
    /// Pages that may read it.
    #[serde(rename = "STREAM_ORIGINS")]
    pub stream_origins: Origins,
    /// Readers of `/v1/stream`.
    #[serde(rename = "STREAM_MAX_CLIENTS")]
    pub stream_max_clients: usize,
}

impl HttpArgs {
    /// Checks the settings.
    pub fn check(&self, environment: &Environment, problems: &mut Problems) -> Option<HttpConfig> {
        let port = self.check_port(problems);
        let address = problems.parse("BIND_ADDR", &self.bind_addr, |text| {
            text.parse::<IpAddr>().map_err(|_| format!("{text:?} is no IP address"))
        });
        let clients =
            problems.parse("STREAM_MAX_CLIENTS", &self.stream_max_clients, settings::count(0, 10_000));
        let origins = problems.parse_optional("STREAM_ORIGINS", self.stream_origins.as_ref(), Origins::parse);
        let before = problems.lines().len();
        let admin_token = environment.secret("ADMIN_TOKEN", problems);
        let next_admin_token = environment.secret("ADMIN_TOKEN_NEXT", problems);
        let stream_token = environment.secret("STREAM_TOKEN", problems);
        if next_admin_token.is_some() && admin_token.is_none() {
            problems
                .add("ADMIN_TOKEN_NEXT", "takes the place of ADMIN_TOKEN, which is not set; set that one");
        }
        for (name, admin) in [("ADMIN_TOKEN", &admin_token), ("ADMIN_TOKEN_NEXT", &next_admin_token)] {
            if stream_token
                .as_ref()
                .zip(admin.as_ref())
                .is_some_and(|(one, other)| one.matches(other.expose()))
            {
                let what = format!("is {name}; it may stand in addresses, so it must be another one");
                problems.add("STREAM_TOKEN", what);
            }
        }
        if problems.lines().len() > before {
            return None;
        }
        let stream_origins = origins?.unwrap_or_default();
        if stream_token.is_none() && stream_origins != Origins::default() {
            problems.add("STREAM_ORIGINS", "opens nothing without STREAM_TOKEN; set both");
            return None;
        }
        Some(HttpConfig {
            port: port?,
            address: address?,
            admin_token,
            next_admin_token,
            stream_token,
            stream_origins,
            stream_max_clients: clients?,
        })
    }

    /// The port alone, for commands that talk to the service.
    pub fn check_port(&self, problems: &mut Problems) -> Option<u16> {
        let port = problems.parse("PORT", &self.port, settings::number(0, u64::from(u16::MAX)));
        port.and_then(|port| u16::try_from(port).ok())
    }
}

impl HttpConfig {
    /// Says which tokens are so short that they can be guessed. They are taken all the same.
    pub fn say_weak_tokens(&self) {
        let tokens = [
            ("ADMIN_TOKEN", &self.admin_token),
            ("ADMIN_TOKEN_NEXT", &self.next_admin_token),
            ("STREAM_TOKEN", &self.stream_token),
        ];
        let is_weak = |token: &Option<Secret>| {
            token.as_ref().is_some_and(|token| token.expose().len() < SHORTEST_TOKEN)
        };
        for (setting, _) in tokens.iter().filter(|(_, token)| is_weak(token)) {
            let error_code = ErrorCode::WeakToken;
            tracing::warn!(%error_code, setting, "a token of less than {SHORTEST_TOKEN} characters can be guessed");
        }
    }
}

/// What the routes show and use.
pub struct Shown {
    /// Settings of the server.
    pub config: HttpConfig,
    /// All settings, secrets redacted.
    pub settings: serde_json::Value,
    /// Since when something is wrong is told by it.
    pub clock: Clock,
    /// What the probes ask.
    pub parts: Parts,
    /// The source's own page.
    pub twitch: Arc<TwitchStatus>,
    /// Events.
    pub pipeline: Arc<PipelineMetrics>,
    /// Where operators look after users.
    pub desk: Desk,
    /// What `/v1/stream` follows.
    pub bus: Arc<dyn Bus>,
    /// Every series.
    pub registry: Registry,
    /// Requests.
    pub metrics: Arc<HttpMetrics>,
    /// Where `/admin/login` puts a token.
    pub token_document: Arc<dyn TokenStore>,
    /// Becomes true when the service stops taking in.
    pub draining: watch::Receiver<bool>,
    /// Where operators add and remove channels.
    pub channels: Channels,
    /// The door for `/admin/replay`, until the service shuts down.
    pub replay: Arc<ReplayDoor>,
    /// Where it is recorded what operators do.
    pub store: Store,
    /// What went wrong so far.
    pub errors: ErrorTally,
}

/// Shared by all requests.
struct Server {
    shown: Shown,
    started: Instant,
    since: health::Since,
    page: page::Page,
    /// The tasks of `/v1/stream`.
    streams: Mutex<Tasks>,
    tail: stream::SharedTail,
    places: stream::Places,
    /// What operators do now.
    acts: Mutex<Tasks>,
    /// Becomes true at shutdown: streams without end end.
    closing: watch::Receiver<bool>,
}

type State = axum::extract::State<Arc<Server>>;

/// Serves until `closing` becomes true, then lets requests under way finish.
pub async fn serve(listener: TcpListener, shown: Shown, closing: watch::Receiver<bool>) {
    let limits = Limits {
        connections: CONNECTIONS + shown.config.stream_max_clients,
        head: HEAD_TIMEOUT,
        reader: READER_TIMEOUT,
    };
    let server = Arc::new(Server {
        page: page::Page::new(shown.config.admin_token.is_some()),
        since: health::Since::default(),
        shown,
        started: Instant::now(),
        streams: Mutex::new(Tasks::new()),
        tail: stream::SharedTail::default(),
        places: stream::Places::default(),
        acts: Mutex::new(Tasks::new()),
        closing: closing.clone(),
    });
    tokio::select! {
        () = connections::serve(listener, router(&server), limits, closing) => {}
        () = health::watch(&server) => {}
    }
    // Whoever asked for them may be gone already.
    let mut acts = std::mem::take(&mut *server.acts.lock().unwrap_or_else(PoisonError::into_inner));
    while acts.next_end().await.is_some() {}
}

fn router(server: &Arc<Server>) -> Router {
    let guarded = Router::new()
        .route("/_debug/twitch", get(debug::twitch))
        .route("/_debug/config", get(debug::config))
        .route("/admin/replay", post(replay::replay))
        .merge(channels::routes())
        .merge(users::routes())
        .route("/admin/login", login::route())
        .route("/admin/audit", get(audit::list))
        .route("/admin/errors", get(errors::errors))
        .route_layer(from_fn_with_state(Arc::clone(server), audit::record))
        .route_layer(from_fn_with_state(Arc::clone(server), access::guard));
    let streamed = Router::new()
        .route("/v1/stream", get(stream::stream).options(access::preflight))
        .route_layer(from_fn_with_state(Arc::clone(server), access::guard_stream));
    let mut open = Router::new().route("/", get(page::page)).route("/metrics", get(metrics::metrics));
    for path in ["/livez", "/live"] {
        open = open.route(path, get(health::live));
    }
    for path in ["/readyz", "/ready"] {
        open = open.route(path, get(health::ready));
    }
    for path in ["/healthz", "/health"] {
        open = open.route(path, get(health::health));
    }
    open.merge(guarded)
        .merge(streamed)
        .fallback(problem::not_found)
        .method_not_allowed_fallback(problem::method_not_allowed)
        .layer(from_fn_with_state(Arc::clone(server), request::observe))
        .layer(map_request(request::identify))
        .layer(from_fn(unread::read_out))
        .with_state(Arc::clone(server))
}
