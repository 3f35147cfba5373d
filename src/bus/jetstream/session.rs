//! One connection to one server, for as long as it stands.

use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream::{self, context::Context};
use async_nats::{Client, ConnectErrorKind, ConnectOptions, Event, ServerAddr};
use thiserror::Error;
use tokio::sync::watch;

use super::JetStreamConfig;
use super::ensure::Attached;
use crate::bus::StreamInfo;
use crate::secret::Secret;
use crate::telemetry::logs::with_causes;
use crate::tls::TlsConfig;

/// With two unanswered PINGs a peer is dead: noticed within 12 s, however open the socket looks.
const PING_PERIOD: Duration = Duration::from_secs(4);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// Where nobody listens: what a lost connection is told to reconnect to, so that it ends instead.
const NOWHERE: &str = "nats://127.0.0.1:0";

/// A checked server address, user-info included. What is wrong is said without the text: a part of a password may
/// stand in it.
pub(super) fn checked_url(text: &str) -> Result<Secret, String> {
    match text.parse::<ServerAddr>() {
        Ok(address) if matches!(address.scheme(), "nats" | "tls") => Ok(Secret::new(text)),
        _ => Err("holds something that is no address such as nats://host:4222 or tls://host:4222".to_owned()),
    }
}

/// The contents of a `.creds` file, checked.
pub(super) fn checked_credentials(contents: &Secret) -> Result<Secret, String> {
    // The library finds the seed only where a line end follows it.
    let contents = format!("{}\n", contents.expose());
    match ConnectOptions::new().credentials(&contents) {
        Ok(_) => Ok(Secret::new(contents)),
        Err(_) => Err("is no file of NATS credentials".to_owned()),
    }
}

/// Why there is no connection.
#[derive(Debug, Error)]
pub(super) enum ConnectError {
    /// The server is there and does not let us in, or cannot show who it is: somebody has to change something.
    #[error("{0}")]
    Refused(String),
    /// Anything else.
    #[error("{0}")]
    Away(String),
}

impl From<async_nats::ConnectError> for ConnectError {
    fn from(error: async_nats::ConnectError) -> Self {
        let why = with_causes(&error);
        match error.kind() {
            ConnectErrorKind::Authentication
            | ConnectErrorKind::AuthorizationViolation
            | ConnectErrorKind::ServerParse
            | ConnectErrorKind::Tls => Self::Refused(why),
            ConnectErrorKind::Dns
            | ConnectErrorKind::TimedOut
            | ConnectErrorKind::Io
            | ConnectErrorKind::MaxReconnects => Self::Away(why),
        }
    }
}

/// Makes connections, one server after the other.
pub(super) struct Connector {
    config: JetStreamConfig,
    tls: TlsConfig,
    window: usize,
    next_server: usize,
}

impl Connector {
    pub(super) fn new(config: JetStreamConfig, tls: TlsConfig, window: usize) -> Self {
        Self { config, tls, window, next_server: 0 }
    }

    /// Connects to the next server in turn.
    pub(super) async fn connect(&mut self) -> Result<Link, ConnectError> {
        let url = self.config.urls[self.next_server % self.config.urls.len()].clone();
        self.next_server += 1;
        self.connect_to(&url).await
    }

    /// Connects to this server.
    pub(super) async fn connect_to(&self, url: &Secret) -> Result<Link, ConnectError> {
        let (lost, lost_seen) = watch::channel(false);
        let (options, address) = self.prepared(url).map_err(ConnectError::Refused)?;
        let options = options.event_callback(move |event| {
            let ends = matches!(event, Event::Disconnected | Event::Closed);
            lost.send_if_modified(|lost| ends && !std::mem::replace(lost, true));
            async {}
        });
        let client = options.connect(address).await?;
        // There is no "never reconnect": one attempt is the least. This makes that one fail at once.
        let pool = client.set_server_pool(NOWHERE).await;
        pool.map_err(|error| ConnectError::Away(with_causes(&error)))?;
        let mut context = jetstream::new(client.clone());
        context.set_timeout(REQUEST_TIMEOUT);
        Ok(Link { client, context, lost: lost_seen })
    }

    fn prepared(&self, url: &Secret) -> Result<(ConnectOptions, ServerAddr), String> {
        let address: ServerAddr = url.expose().parse().map_err(|_| "NATS_URL is no address".to_owned())?;
        Ok((self.options(&address)?, without_secrets(address)?))
    }

    fn options(&self, address: &ServerAddr) -> Result<ConnectOptions, String> {
        let config = &self.config;
        let mut options = ConnectOptions::new()
            .name("inlet")
            .ping_interval(PING_PERIOD)
            .connection_timeout(CONNECT_TIMEOUT)
            .request_timeout(Some(REQUEST_TIMEOUT))
            .max_reconnects(1)
            .ignore_discovered_servers()
            .skip_subject_validation(true)
            // Room for every message of the window and its repetitions until a dead peer is noticed.
            .client_capacity(self.window * 4 + 64);
        options = match (address.username(), address.password()) {
            (Some(user), Some(password)) => options.user_and_password(decoded(user), decoded(password)),
            (Some(token), None) => options.token(decoded(token)),
            (None, _) => options,
        };
        if let Some(credentials) = &config.credentials {
            options = options
                .credentials(credentials.expose())
                .map_err(|_| "NATS_CREDS_FILE holds no credentials")?;
        }
        if let Some(nkey) = &config.nkey {
            options = options.nkey(nkey.expose().to_owned());
        }
        if let Some(ca_file) = &self.tls.ca_file {
            options = options.add_root_certificates(ca_file.clone());
        }
        if let (Some(certificate), Some(key)) = (&config.certificate, &config.certificate_key) {
            options = options.add_client_certificate(certificate.clone(), key.clone());
        }
        Ok(options)
    }
}

/// The address alone: the library writes it into its own log lines as it is.
fn without_secrets(address: ServerAddr) -> Result<ServerAddr, String> {
    let mut url = address.into_inner();
    let is_bare = url.set_username("").and_then(|()| url.set_password(None)).is_ok();
    let address = is_bare.then_some(url).and_then(|url| ServerAddr::from_url(url).ok());
    address.ok_or_else(|| "NATS_URL is no address".to_owned())
}

/// User-info as it was meant: an address holds it percent-encoded.
fn decoded(text: &str) -> String {
    percent_encoding::percent_decode_str(text).decode_utf8_lossy().into_owned()
}

/// A connection.
pub(super) struct Link {
    client: Client,
    context: Context,
    lost: watch::Receiver<bool>,
}

impl Link {
    /// Becomes true when the connection is gone.
    pub(super) fn lost(&self) -> watch::Receiver<bool> {
        self.lost.clone()
    }

    pub(super) fn context(&self) -> &Context {
        &self.context
    }

    /// Largest message the server takes, headers included.
    pub(super) fn largest_message(&self) -> usize {
        self.client.server_info().max_payload
    }
}

/// Waits until the connection is gone.
pub(super) async fn gone(lost: &mut watch::Receiver<bool>) {
    // An error says that nobody is left who could tell: gone as well.
    drop(lost.wait_for(|lost| *lost).await);
}

/// A connection and the stream found on it. Cheap to clone.
#[derive(Clone)]
pub(super) struct Session {
    pub(super) client: Client,
    pub(super) context: Context,
    pub(super) lost: watch::Receiver<bool>,
    pub(super) stream_name: Arc<str>,
    info: StreamInfo,
}

impl Session {
    pub(super) fn new(link: &Link, attached: Attached, largest_message: usize) -> Self {
        let info = StreamInfo {
            identity: attached.identity,
            duplicate_window: attached.duplicate_window,
            max_age: attached.max_age,
            max_bytes: attached.max_bytes,
            largest_message: largest_message.min(attached.largest_message.unwrap_or(usize::MAX)),
        };
        Self {
            client: link.client.clone(),
            context: link.context.clone(),
            lost: link.lost(),
            stream_name: attached.name.into(),
            info,
        }
    }

    pub(super) fn info(&self) -> StreamInfo {
        self.info.clone()
    }

    /// Whether this is the same stream on the same connection.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        self.lost.same_channel(&other.lost) && self.info == other.info
    }
}
