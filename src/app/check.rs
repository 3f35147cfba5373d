//! A look at everything a start would need, which starts, makes and changes nothing.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use bytesize::ByteSize;
use futures_util::future::BoxFuture;
use futures_util::{FutureExt as _, Stream, StreamExt as _, stream};
use rustix::fs::Access;
use serde::Serialize;
use tokio::net::TcpListener;
use tokio::time::{Instant, timeout};

use super::{AppConfig, source_tls};
use crate::bus::embedded::EmbeddedBus;
use crate::bus::jetstream::{self, JetStreamConfig, Looked};
use crate::bus::{BusError, Driver};
use crate::clock::Clock;
use crate::data_dir::{DataDirError, Seen};
use crate::pipeline::Outbox;
use crate::source::twitch::look::{self, LookError};
use crate::store::embedded::EmbeddedStore;
use crate::store::firestore::{FirestoreConfig, FirestoreStore};
use crate::store::{DocumentStore as _, Name, StoreError};
use crate::telemetry::logs::with_causes;

/// For one part, whatever it asks on its way. Longer than a dial and a login or a question together take.
const LONGEST: Duration = Duration::from_secs(22);

/// How a running service begins to say who it is, see [`super::App`].
pub const SERVICE: &str = "inlet serve";

/// How a part was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// As it should be.
    Ok,
    /// A start would do; somebody should know all the same.
    Warning,
    /// Not there, or it does not answer: it may pass by itself.
    Away,
    /// It does not fit, and will not until somebody changes something.
    Bad,
}

impl Verdict {
    /// Its name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Away => "away",
            Self::Bad => "bad",
        }
    }
}

/// What was found of one part.
#[derive(Debug, Serialize)]
pub struct Finding {
    /// Which.
    pub part: &'static str,
    /// How it is.
    pub verdict: Verdict,
    /// What was seen, and where something is to be done, what.
    pub said: String,
    /// How long the look took, in milliseconds.
    pub took_ms: u64,
}

/// What a look says.
pub struct Said(Verdict, String);

impl Said {
    /// All is well.
    pub fn ok(text: impl Into<String>) -> Self {
        Self(Verdict::Ok, text.into())
    }

    /// Something to know.
    pub fn warning(text: impl Into<String>) -> Self {
        Self(Verdict::Warning, text.into())
    }

    /// Not there.
    pub fn away(text: impl Into<String>) -> Self {
        Self(Verdict::Away, text.into())
    }

    /// Not fit.
    pub fn bad(text: impl Into<String>) -> Self {
        Self(Verdict::Bad, text.into())
    }

    fn and(self, doubt: Option<String>) -> Self {
        match doubt {
            Some(doubt) => Self(self.0.max(Verdict::Warning), format!("{}; {doubt}", self.1)),
            None => self,
        }
    }
}

/// A part to look at, and the look.
pub type Look<'a> = (&'static str, BoxFuture<'a, Said>);

/// The looks at what these settings need. `seen` is what there is of `DATA_DIR`.
pub fn looks<'a>(
    config: &'a AppConfig,
    seen: &'a Result<Seen, DataDirError>,
    clock: &Clock,
) -> Vec<Look<'a>> {
    let holder = seen.as_ref().ok().and_then(|seen| seen.holder.as_deref());
    vec![
        ("data", look_at_folder(config, seen).boxed()),
        ("twitch", look_at_twitch(config).boxed()),
        ("history", look_at_history(config, clock.clone()).boxed()),
        ("bus", look_at_bus(config, holder).boxed()),
        ("store", look_at_store(config, holder).boxed()),
        ("http", look_at_port(config, holder).boxed()),
    ]
}

/// Looks at all of them at once, each within its time; they are told in their order.
pub fn findings(looks: Vec<Look<'_>>) -> impl Stream<Item = Finding> + '_ {
    let at_once = looks.len().max(1);
    let found = looks.into_iter().map(|(part, look)| async move {
        let began = Instant::now();
        let said = timeout(LONGEST, look).await;
        let Said(verdict, said) =
            said.unwrap_or_else(|_| Said::away(format!("no answer within {LONGEST:?}")));
        let took_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
        Finding { part, verdict, said, took_ms }
    });
    stream::iter(found).buffered(at_once)
}

async fn look_at_folder(config: &AppConfig, seen: &Result<Seen, DataDirError>) -> Said {
    let path = &config.data_dir;
    let shown = path.display();
    let Seen { there, holder } = match seen {
        Ok(seen) => seen,
        Err(error) => return Said::bad(format!("{}; set another DATA_DIR", with_causes(error))),
    };
    let doubt = medium(config, there);
    match holder {
        Some(holder) if holder.starts_with(SERVICE) => {
            return Said::ok(format!("{shown} is in use by {holder}; commands go through it")).and(doubt);
        }
        Some(holder) => {
            return Said::warning(format!("{shown} is in use by {holder}; a start would end with 78"))
                .and(doubt);
        }
        None => {}
    }
    if let Err(error) = rustix::fs::access(there, Access::WRITE_OK | Access::EXEC_OK) {
        let there = there.display();
        let remedy = "change its owner, or set another DATA_DIR";
        return Said::bad(format!("{there} cannot be written to ({error}); {remedy}"));
    }
    if let Err(error) = look::look_at_note(path) {
        return unusable(&with_causes(&error));
    }
    if let Err(why) = of_files(path, Outbox::look).await {
        return unusable(&why);
    }
    let is_there = if path.exists() { "can be written" } else { "will be made" };
    Said::ok(format!("{shown} {is_there}")).and(doubt)
}

/// What is a file is looked at on a thread that may wait for the disk.
async fn of_files<E: std::error::Error + Send + 'static>(
    folder: &Path,
    look: fn(&Path) -> Result<(), E>,
) -> Result<(), String> {
    let folder = folder.to_owned();
    match tokio::task::spawn_blocking(move || look(&folder)).await {
        Ok(looked) => looked.map_err(|error| with_causes(&error)),
        Err(_) => Err("the look was interrupted".to_owned()),
    }
}

fn unusable(why: &str) -> Said {
    Said::bad(format!("{why}; run the version of Inlet that wrote it, or set another DATA_DIR"))
}

/// What there is to know of what the folder lies on.
fn medium(config: &AppConfig, there: &Path) -> Option<String> {
    let bounds = config.path.outbox.bounds(there);
    if bounds.is_in_memory {
        return Some(
            "it lies in memory: the outbox, and what is embedded, is lost with this machine".to_owned(),
        );
    }
    let free = match rustix::fs::statvfs(there) {
        Ok(seen) => seen.f_bavail.saturating_mul(seen.f_frsize),
        Err(error) => return Some(format!("its free space cannot be told: {error}")),
    };
    let stream = match config.path.bus.driver {
        Driver::Embedded => {
            config.path.bus.retention.max_bytes.unwrap_or(crate::bus::embedded::USUAL_MAX_BYTES)
        }
        Driver::Nats => 0,
    };
    let most = bounds.max_bytes.saturating_add(stream);
    (free < most).then(|| {
        let (free, most) = (ByteSize(free), ByteSize(most));
        format!("{free} of its disk are free, and Inlet may take {most}; set OUTBOX_MAX_BYTES or NATS_STREAM_MAX_BYTES lower")
    })
}

async fn look_at_twitch(config: &AppConfig) -> Said {
    let twitch = &config.path.twitch;
    if !twitch.enabled {
        return Said::ok("not read: TWITCH_ENABLED is false");
    }
    if twitch.channels.is_empty() {
        return Said::warning(
            "no channel is read but those that `inlet channel list` shows; set TWITCH_CHANNELS, or add some",
        );
    }
    let address = serde_json::to_value(&twitch.address).unwrap_or_default();
    let address = address.as_str().unwrap_or_default();
    let tls = match source_tls(&config.path) {
        Ok(tls) => tls,
        Err(error) => return Said::bad(format!("{}; set TLS_CA_FILE", with_causes(&error))),
    };
    let channels = twitch.channels.len();
    match look::log_in(twitch, tls.as_ref()).await {
        Ok(nick) => Said::ok(format!("{address} takes {nick}; {channels} channels, which serve joins")),
        Err(error @ LookError::Refused(_)) => Said::bad(format!(
            "{address}: {error}; get a new TWITCH_BOT_ACCESS_TOKEN for TWITCH_BOT_USERNAME, or leave both out"
        )),
        Err(error @ LookError::Untrusted(_)) => {
            Said::bad(format!("{address}: {error}; set TLS_CA_FILE or another TWITCH_IRC_URL"))
        }
        Err(LookError::Away(why)) => {
            Said::away(format!("{address}: {why}; look at TWITCH_IRC_URL and the network"))
        }
    }
}

async fn look_at_history(config: &AppConfig, clock: Clock) -> Said {
    let tls = match source_tls(&config.path) {
        Ok(tls) => tls,
        Err(error) => return Said::bad(with_causes(&error)),
    };
    match look::ask_for_history(&config.path.twitch, tls, clock).await {
        None => Said::ok("nobody is asked: TWITCH_BACKFILL_URL is not set, or no channel is"),
        Some(Ok(())) => Said::ok("the history service answers"),
        // Chat waits for none of it.
        Some(Err(why)) => Said::warning(format!("{why}; gaps stay unhealed, look at TWITCH_BACKFILL_URL")),
    }
}

async fn look_at_bus(config: &AppConfig, holder: Option<&str>) -> Said {
    match &config.path.bus.jetstream {
        Some(nats) if config.path.bus.driver == Driver::Nats => look_at_nats(config, nats).await,
        _ if holder.is_some() => Said::ok("the embedded stream is in use"),
        _ => match of_files(&config.data_dir, EmbeddedBus::look).await {
            Ok(()) => Said::ok("the embedded stream can be opened"),
            Err(why) => unusable(&why),
        },
    }
}

async fn look_at_nats(config: &AppConfig, nats: &JetStreamConfig) -> Said {
    let Looked { stream, servers_away } = match jetstream::look(nats, &config.path.bus, &config.path.tls)
        .await
    {
        Ok(looked) => looked,
        Err(error @ BusError::Settings(_)) => {
            return Said::bad(format!("NATS: {error}; look at NATS_URL, its credentials and TLS_CA_FILE"));
        }
        Err(BusError::Unfit(why)) => return Said::bad(format!("NATS: {why}")),
        Err(error) => {
            return Said::away(format!(
                "NATS: {}; look at NATS_URL, and whether JetStream is on",
                with_causes(&error)
            ));
        }
    };
    let away = (!servers_away.is_empty()).then(|| format!("not there: {}", servers_away.join("; ")));
    let stream = match stream {
        Err(name) => return Said::ok(format!("NATS answers; a start creates the stream {name}")).and(away),
        Ok(stream) => stream,
    };
    let least = config.path.enrich.flush_max * 2;
    let doubt = if !stream.keeps_by_limits {
        Some("its retention is not limits: counts may be lost in a crash".to_owned())
    } else if stream.max_age.is_some_and(|age| age < least) {
        Some(
            "it keeps messages for less than twice ENRICH_FLUSH_MAX: counts may be lost in a crash"
                .to_owned(),
        )
    } else {
        None
    };
    Said::ok(format!("NATS answers; the stream {} fits", stream.name)).and(doubt).and(away)
}

async fn look_at_store(config: &AppConfig, holder: Option<&str>) -> Said {
    match &config.path.store.firestore {
        Some(firestore) => look_at_firestore(firestore).await,
        None if holder.is_some() => Said::ok("the embedded store is in use"),
        None => match of_files(&config.data_dir, EmbeddedStore::look).await {
            Ok(()) => Said::ok("the embedded store can be opened"),
            Err(why) => unusable(&why),
        },
    }
}

async fn look_at_firestore(config: &FirestoreConfig) -> Said {
    let store = FirestoreStore::new(config);
    match store.get_many(&[Name::note("check")]).await {
        Ok(_) => Said::ok("Firestore answers and lets us read"),
        Err(StoreError::Refused { code, message }) => {
            let remedy = match code {
                "PERMISSION_DENIED" => "give the service account roles/datastore.user",
                "NOT_FOUND" => "create the database, or look at FIREBASE_DATABASE_ID",
                "UNAUTHENTICATED" => "give it application default credentials",
                _ => "look at GOOGLE_CLOUD_PROJECT and FIREBASE_DATABASE_ID",
            };
            Said::bad(format!("Firestore refuses with {code}: {message}; {remedy}"))
        }
        Err(StoreError::Away(why) | StoreError::GaveUp(why)) => Said::away(format!(
            "Firestore: {why}; look at the network, and at FIRESTORE_EMULATOR_HOST if an emulator is meant"
        )),
    }
}

async fn look_at_port(config: &AppConfig, holder: Option<&str>) -> Said {
    let address = SocketAddr::new(config.http.address, config.http.port);
    if let Some(holder) = holder.filter(|holder| holder.ends_with(&format!("port {}", config.http.port))) {
        return Said::ok(format!("{address} is that of {holder}"));
    }
    match TcpListener::bind(address).await {
        Ok(_) => Said::ok(format!("{address} is free")),
        Err(error) => {
            Said::bad(format!("{address} cannot be listened on: {error}; set another PORT or BIND_ADDR"))
        }
    }
}
