//! The plain program: what a competent engineer writes in an afternoon on the same crates. `twitch-irc`'s own client
//! reads, serde serialises, `async-nats` publishes with a window of acks. It keeps no ids of its own, sets no bound
//! between socket and stream, and does not say what it lost: it is the measure of what Inlet's promises cost.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use async_nats::jetstream::context::PublishAckFuture;
use async_nats::{HeaderMap, Subject};
use async_trait::async_trait;
use chrono::{DateTime, SecondsFormat, Utc};
use clap::Parser;
use inlet_peers::{Error, Outcome, Report, block_on, context, ensure_stream};
use serde::Serialize;
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use twitch_irc::login::StaticLoginCredentials;
use twitch_irc::message::{PrivmsgMessage, ServerMessage};
use twitch_irc::transport::tcp::{MakeConnection, TCPTransport, TCPTransportConnectError};
use twitch_irc::{ClientConfig, TwitchIRCClient};
use uuid::{Uuid, uuid};

const EVENTS: Uuid = uuid!("99c452c6-807f-5d66-b35a-2ce5031c89dc");
const CHAT_MESSAGE: &str = "external.chat.message.v1";

#[derive(Parser)]
#[command(about = "Twitch chat to JetStream on the plain crates; prints one JSON line")]
struct Args {
    /// The chat server, plain TCP
    #[arg(long)]
    irc: SocketAddr,
    #[arg(long, value_delimiter = ',')]
    channels: Vec<String>,
    #[arg(long, default_value = "nats://127.0.0.1:4222")]
    nats_url: String,
    #[arg(long, default_value = "INLET")]
    stream: String,
    #[arg(long, default_value = "internal.ingress.v1")]
    subject: String,
    /// Stop after so many messages
    #[arg(long)]
    count: u64,
    /// Unacknowledged messages at most
    #[arg(long, default_value_t = 1024)]
    window: usize,
    /// Stop when no message came for so long
    #[arg(long, default_value_t = 3.0)]
    idle_seconds: f64,
    /// Stop when the first message takes longer
    #[arg(long, default_value_t = 30.0)]
    start_seconds: f64,
    /// Worker threads: 0 one per core, 1 everything on one thread
    #[arg(long, default_value_t = 0)]
    threads: usize,
}

/// The crate's transports name Twitch's own host; this one goes where it is told.
struct Server;

/// `MakeConnection::new_socket` takes no argument.
static SERVER: OnceLock<SocketAddr> = OnceLock::new();

#[async_trait]
impl MakeConnection for Server {
    type Socket = TcpStream;

    async fn new_socket() -> Result<TcpStream, TCPTransportConnectError> {
        let address = SERVER
            .get()
            .ok_or_else(|| std::io::Error::other("no server address"))?;
        Ok(TcpStream::connect(address).await?)
    }
}

fn main() -> Result<(), Error> {
    let args = Args::parse();
    block_on(args.threads, run(args))??.print()
}

async fn run(args: Args) -> Result<Report, Error> {
    SERVER.set(args.irc).map_err(|_| "the address is set once")?;
    let nats = async_nats::connect(&args.nats_url).await?;
    let context = context(nats, args.window);
    ensure_stream(&context, &args.stream, &args.subject).await?;

    let config = ClientConfig::new_simple(StaticLoginCredentials::anonymous());
    let (mut incoming, chat) = TwitchIRCClient::<TCPTransport<Server>, StaticLoginCredentials>::new(config);
    for channel in args.channels {
        chat.join(channel)?;
    }

    let (sent, acks) = mpsc::channel(args.window);
    let settling = tokio::spawn(settle(acks));
    let subject = Subject::from(args.subject);
    let mut patience = Duration::from_secs_f64(args.start_seconds);
    let mut started = None;
    let mut published = 0;
    while published < args.count {
        let Ok(message) = tokio::time::timeout(patience, incoming.recv()).await else {
            break;
        };
        let Some(message) = message else { break };
        let ServerMessage::Privmsg(message) = message else {
            continue;
        };
        started.get_or_insert_with(Instant::now);
        patience = Duration::from_secs_f64(args.idle_seconds);

        let envelope = envelope(&message, Utc::now());
        let headers = headers(&envelope);
        let payload = serde_json::to_vec(&envelope)?;
        let ack = context
            .publish_with_headers(subject.clone(), headers, payload.into())
            .await?;
        sent.send((Instant::now(), ack)).await?;
        published += 1;
    }
    drop(sent);
    let (outcome, last_ack) = settling.await?;
    let took = match (started, last_ack) {
        (Some(started), Some(last_ack)) => last_ack.duration_since(started),
        _ => Duration::ZERO,
    };
    Report::new("plain", &outcome, took)
}

async fn settle(mut acks: mpsc::Receiver<(Instant, PublishAckFuture)>) -> (Outcome, Option<Instant>) {
    let mut outcome = Outcome::default();
    let mut last_ack = None;
    while let Some((sent, ack)) = acks.recv().await {
        match ack.await {
            Ok(ack) => {
                let now = Instant::now();
                outcome.acked += 1;
                outcome.duplicates += u64::from(ack.duplicate);
                outcome
                    .ack_waits_ms
                    .push(now.duration_since(sent).as_secs_f64() * 1000.0);
                last_ack = Some(now);
            }
            Err(error) => {
                eprintln!("not acknowledged: {error}");
                outcome.failed += 1;
            }
        }
    }
    (outcome, last_ack)
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Envelope<'a> {
    v: &'static str,
    id: String,
    r#type: &'static str,
    timestamp: String,
    occurred_at: String,
    correlation_id: String,
    trace_id: String,
    idempotency_key: String,
    source: Source<'a>,
    user: User<'a>,
    auth: Auth,
    routing_slip: [&'static str; 0],
    finalization_destination: &'static str,
    payload: Payload<'a>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Source<'a> {
    platform: &'static str,
    channel: &'a str,
    channel_id: &'a str,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct User<'a> {
    id: &'a str,
    name: &'a str,
    display_name: &'a str,
    profile_image_url: &'static str,
    role: &'static str,
    roles: Vec<&'static str>,
    tags: [&'static str; 1],
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Auth {
    v: &'static str,
    method: &'static str,
    provider: &'static str,
    matched: bool,
    user_ref: String,
    reason: &'static str,
    at: String,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Payload<'a> {
    text: &'a str,
    message_id: &'a str,
    is_action: bool,
    badges: Vec<String>,
    is_mod: bool,
    is_subscriber: bool,
    is_vip: bool,
    is_broadcaster: bool,
    color: String,
    bits: u64,
    emotes: Vec<Emote<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reply: Option<Reply<'a>>,
    raw: Raw<'a>,
}

#[derive(Serialize)]
struct Emote<'a> {
    id: &'a str,
    name: &'a str,
    start: usize,
    end: usize,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Reply<'a> {
    parent_message_id: &'a str,
    parent_user_id: &'a str,
    parent_user_login: &'a str,
}

#[derive(Serialize)]
struct Raw<'a> {
    tags: BTreeMap<&'a str, &'a str>,
}

fn envelope(message: &PrivmsgMessage, now: DateTime<Utc>) -> Envelope<'_> {
    let idempotency_key = format!("twitch:{}", message.message_id);
    let id = Uuid::new_v5(&EVENTS, idempotency_key.as_bytes());
    let has = |names: &[&str]| {
        message
            .badges
            .iter()
            .any(|badge| names.contains(&badge.name.as_str()))
    };
    let is_broadcaster = has(&["broadcaster"]);
    let is_mod = has(&["moderator", "lead_moderator"]);
    let is_vip = has(&["vip"]);
    let is_subscriber = has(&["subscriber", "founder"]);
    let mut roles: Vec<&str> = [
        (is_broadcaster, "broadcaster"),
        (is_mod, "moderator"),
        (is_vip, "vip"),
        (is_subscriber, "subscriber"),
    ]
    .into_iter()
    .filter_map(|(has, role)| has.then_some(role))
    .collect();
    if roles.is_empty() {
        roles.push("viewer");
    }
    Envelope {
        v: "1",
        id: id.to_string(),
        r#type: CHAT_MESSAGE,
        timestamp: rfc3339(now),
        occurred_at: rfc3339(message.server_timestamp),
        correlation_id: id.to_string(),
        trace_id: id.simple().to_string(),
        idempotency_key,
        source: Source {
            platform: "twitch",
            channel: &message.channel_login,
            channel_id: &message.channel_id,
        },
        user: User {
            id: &message.sender.id,
            name: &message.sender.login,
            display_name: &message.sender.name,
            profile_image_url: "",
            role: roles[0],
            roles,
            tags: ["PROVIDER_TWITCH"],
        },
        auth: Auth {
            v: "1",
            method: "enrichment",
            provider: "twitch",
            matched: false,
            user_ref: format!("users/twitch:{}", message.sender.id),
            reason: "disabled",
            at: rfc3339(now),
        },
        routing_slip: [],
        finalization_destination: "internal.finalizer.v1",
        payload: Payload {
            text: &message.message_text,
            message_id: &message.message_id,
            is_action: message.is_action,
            badges: message
                .badges
                .iter()
                .map(|badge| format!("{}/{}", badge.name, badge.version))
                .collect(),
            is_mod,
            is_subscriber,
            is_vip,
            is_broadcaster,
            color: message
                .name_color
                .as_ref()
                .map(ToString::to_string)
                .unwrap_or_default(),
            bits: message.bits.unwrap_or(0),
            emotes: message
                .emotes
                .iter()
                .map(|emote| Emote {
                    id: &emote.id,
                    name: &emote.code,
                    start: emote.char_range.start,
                    end: emote.char_range.end,
                })
                .collect(),
            reply: message.reply_parent.as_ref().map(|parent| Reply {
                parent_message_id: &parent.message_id,
                parent_user_id: &parent.reply_parent_user.id,
                parent_user_login: &parent.reply_parent_user.login,
            }),
            raw: Raw {
                tags: message
                    .source
                    .tags
                    .0
                    .iter()
                    .map(|(key, value)| (key.as_str(), value.as_str()))
                    .collect(),
            },
        },
    }
}

fn headers(envelope: &Envelope<'_>) -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert("Nats-Msg-Id", envelope.id.as_str());
    headers.insert("type", envelope.r#type);
    headers.insert(
        "traceparent",
        format!("00-{}-{}-01", envelope.trace_id, &envelope.trace_id[16..]),
    );
    headers
}

fn rfc3339(time: DateTime<Utc>) -> String {
    time.to_rfc3339_opts(SecondsFormat::Millis, true)
}
