//! A stand-in for Twitch's chat server, for development, tests and load: IRC over TCP or WebSocket, with or without TLS.
//!
//! It owns its listener, its connections and one stream of messages, made up from a seed or replayed from a file, that
//! everybody in a channel gets with the same ids. It shares nothing with the code that reads from Twitch, and no
//! parser above all: a fake that shared it could not catch its mistakes. Beyond the protocol it serves faults on
//! request ([`Command`]) and keeps a record of what it sent ([`SentRecord`]) to count against.
//!
//! Nothing here grows without bound: connections, their lines and their queues are limited, and a reader that falls
//! behind makes the stream wait.

mod bad_lines;
mod chat;
mod config;
mod connection;
mod control;
mod delivery;
mod faults;
mod guests;
mod hub;
mod joins;
mod lifelike;
mod lines;
mod pace;
mod parts;
mod people;
mod pump;
mod queue;
mod replay;
mod sent;
mod server;
mod session;
mod text;
mod tls;
mod websocket;
mod words;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;

pub use config::{SimConfig, SimError};
pub use control::{COMMANDS, Command, ControlLine, PeerStats, Stats, Target};
pub use faults::{JoinRefusal, LoginRefusal, Mode, UnknownRefusal};
pub use joins::JoinStats;
pub use lines::LineKind;
pub use sent::SentRecord;

/// Batches on their way to the record of what was sent.
const LOG_BATCHES: usize = 64;

/// A running simulator. Dropped without [`Simulator::shutdown`], it ends at once.
#[derive(Debug)]
pub struct Simulator {
    desk: control::Desk,
    addr: SocketAddr,
    ca_pem: Option<String>,
    stop: watch::Sender<bool>,
    tasks: JoinSet<()>,
}

impl Simulator {
    /// Starts serving on `listener`. Must be called within a Tokio runtime.
    pub async fn start(config: SimConfig, listener: TcpListener) -> Result<Self, SimError> {
        let config = config::checked(config)?;
        let addr = listener.local_addr().map_err(SimError::Listen)?;
        let audience = (!config.channels.is_empty()).then(|| config.channels.iter().cloned().collect());
        let hub = Arc::new(hub::Hub::new(audience));
        treat(&config, &hub);
        let (acceptor, ca_pem) = if config.tls { Some(tls::acceptor()?) } else { None }.unzip();
        let feed = feed(&config)?;
        let stop = watch::Sender::new(false);
        let mut tasks = JoinSet::new();
        let log = open_log(&config, &mut tasks).await?;
        let delivery = delivery::Delivery { hub, log, cut_after: config.cut_after, now: config.now };
        let delivery = Arc::new(delivery);
        let ping_every = config.ping_every.max(Duration::from_millis(1));
        let service = server::Service { delivery: Arc::clone(&delivery), tls: acceptor, ping_every };
        tasks.spawn(server::serve(listener, Arc::new(service), stop.subscribe()));
        let pump = pump::Pump {
            feed,
            bad_lines: bad_lines::BadLines::new(config.seed),
            delivery: Arc::clone(&delivery),
            rate: config.rate,
            count: config.count,
        };
        let pump = pump.run(stop.subscribe());
        tasks.spawn(async move {
            if let Err(error) = pump.await {
                tracing::error!(%error, "the file to replay cannot be read on");
            }
        });
        let desk = control::Desk {
            delivery,
            reconnect_grace: config.reconnect_grace,
            seed: config.seed,
            bad_times: AtomicU64::new(0),
        };
        Ok(Self { desk, addr, ca_pem, stop, tasks })
    }

    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.addr
    }

    /// The certificate to trust, as PEM; `None` without TLS.
    pub fn ca_pem(&self) -> Option<&str> {
        self.ca_pem.as_deref()
    }

    /// Does what `command` says; returns when it is done (bytes: when they are queued).
    pub async fn control(&self, command: Command) {
        self.desk.act(command).await;
    }

    /// Its numbers now.
    pub fn stats(&self) -> Stats {
        self.desk.delivery.hub.stats()
    }

    /// The last records of what was sent, oldest first, as many as [`SimConfig::sent_kept`] allows.
    pub async fn sent(&self) -> Vec<SentRecord> {
        let Some(notes) = &self.desk.delivery.log else {
            return Vec::new();
        };
        let (answer, records) = oneshot::channel();
        if notes.send(sent::Note::Snapshot(answer)).await.is_err() {
            return Vec::new();
        }
        records.await.unwrap_or_default()
    }

    /// Stops generating, gives each connection a second to read what is queued for it, closes and writes the log out.
    pub async fn shutdown(self) {
        let Self { desk, stop, mut tasks, .. } = self;
        stop.send_replace(true);
        // The log ends with the last of those who could tell it something.
        drop(desk);
        while let Some(ended) = tasks.join_next().await {
            if let Err(error) = ended {
                tracing::error!(%error, "a part of the simulator failed");
            }
        }
    }
}

/// Sets the faults that are asked for from the start.
fn treat(config: &SimConfig, hub: &hub::Hub) {
    let mut policy = hub.policy();
    policy.refuse_login = config.refuse_login;
    policy.ignore(config.ignore_joins.clone());
    for (channel, why) in &config.refuse_joins {
        policy.refuse(vec![channel.clone()], *why);
    }
    hub.joins().limit = config.join_limit;
    hub.bad_permille.store(config.bad_permille.into(), Ordering::Relaxed);
    hub.duplicate_every.store(config.duplicate_every.into(), Ordering::Relaxed);
    hub.slow.store(config.slow, Ordering::Relaxed);
}

fn feed(config: &SimConfig) -> Result<pump::Feed, SimError> {
    let Some(path) = &config.replay else {
        let (channels, users) = (&config.channels, config.users);
        let plan = chat::ChatPlan { channels, users, zipf: config.zipf, seed: config.seed };
        return Ok(if config.lifelike {
            let chat = lifelike::Lifelike::new(&plan).more_often(config.happenings);
            pump::Feed::Lifelike(Box::new(chat))
        } else {
            pump::Feed::Chat(Box::new(chat::Chat::new(&plan)))
        });
    };
    let replay = replay::Replay::open(path, &config.channels, config.seed);
    let replay = replay.map_err(|source| SimError::File { path: path.clone(), source })?;
    Ok(pump::Feed::Replay(Box::new(replay.keep_ids(config.keep_ids).again(config.count.is_some()))))
}

async fn open_log(
    config: &SimConfig,
    tasks: &mut JoinSet<()>,
) -> Result<Option<mpsc::Sender<sent::Note>>, SimError> {
    if config.sent_file.is_none() && config.sent_kept == 0 {
        return Ok(None);
    }
    let path = config.sent_file.as_deref();
    let log = sent::SentLog::open(path, config.sent_kept)
        .await
        .map_err(|source| SimError::File { path: config.sent_file.clone().unwrap_or_default(), source })?;
    let (notes, inbox) = mpsc::channel(LOG_BATCHES);
    tasks.spawn(async move {
        if let Err(error) = log.run(inbox).await {
            tracing::error!(%error, "the log of what was sent cannot be written on");
        }
    });
    Ok(Some(notes))
}

#[cfg(test)]
mod tests;
