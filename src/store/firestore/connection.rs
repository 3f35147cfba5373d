//! One HTTP/2 connection to Firestore, made when it is first needed and again when it was lost.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use firestore::gcloud_sdk::error::{Error as AuthError, ErrorKind};
use firestore::gcloud_sdk::google::firestore::v1::firestore_client::FirestoreClient;
use firestore::gcloud_sdk::tonic::metadata::{Ascii, MetadataMap, MetadataValue};
use firestore::gcloud_sdk::tonic::transport::{Channel, ClientTlsConfig, Endpoint};
use firestore::gcloud_sdk::tonic::{Code, Request, Response, Status};
use firestore::gcloud_sdk::{GoogleAuthHeaders, HeaderMap};
use tokio::sync::Mutex;

use super::FirestoreConfig;
use crate::errors::ErrorCode;
use crate::store::{Collection, Name, StoreError, in_time};
use crate::telemetry::logs::with_causes;

const HOST: &str = "firestore.googleapis.com";

/// What the service account's token is good for.
const SCOPE: &str = "https://www.googleapis.com/auth/datastore";

/// What Google's own tools send an emulator: no security rule applies to its bearer.
const OWNER: &str = "Bearer owner";

/// Outer bound of each request; who asks waits for less.
pub(super) const LONGEST_REQUEST: Duration = Duration::from_secs(10);

const LONGEST_DIAL: Duration = Duration::from_secs(5);

/// A connection that is silent for the first is asked, and given up when it does not answer within the second: a
/// lost one is noticed within their sum, also by a listener, which may be silent for hours. Google's front ends take it amiss
/// to be asked more often than every 30 s.
const ASK_AFTER: Duration = Duration::from_secs(30);
const GIVE_UP_AFTER: Duration = Duration::from_secs(10);

/// Longest text of Firestore's own in a message.
const LONGEST_MESSAGE: usize = 200;

pub(super) type Client = FirestoreClient<Channel>;

pub(super) struct Connection {
    channel: Channel,
    database: String,
    /// Names the database to Google's front, which routes by it.
    prefix: Option<MetadataValue<Ascii>>,
    /// `None` with an emulator.
    credentials: Option<Credentials>,
}

impl Connection {
    pub(super) fn new(config: &FirestoreConfig) -> Self {
        let endpoint = match &config.emulator {
            // Without asking: the emulator ends a connection on which nothing but that happens for 90 s.
            Some(host) => Endpoint::from_shared(format!("http://{host}")),
            None => Endpoint::from_shared(format!("https://{HOST}")).map(asking).and_then(|endpoint| {
                endpoint.tls_config(ClientTlsConfig::new().with_webpki_roots().domain_name(HOST))
            }),
        };
        // What the settings let through is a URL, so this is reached by no input; dialling it then says what is wrong.
        let endpoint = endpoint.unwrap_or_else(|error| {
            tracing::error!(error_code = %ErrorCode::StoreUnavailable, error = with_causes(&error), "the store's address is unusable");
            Endpoint::from_static("http://localhost:0")
        });
        let channel = endpoint.connect_timeout(LONGEST_DIAL).tcp_nodelay(true).connect_lazy();
        let database = config.database_path();
        Self {
            channel,
            prefix: database.parse().ok(),
            database,
            credentials: config.emulator.is_none().then(Credentials::default),
        }
    }

    /// The database's name.
    pub(super) fn database(&self) -> &str {
        &self.database
    }

    /// What documents' names begin with.
    pub(super) fn documents(&self) -> String {
        format!("{}/documents", self.database)
    }

    /// The document's whole name.
    pub(super) fn path_of(&self, name: &Name) -> String {
        format!("{}/documents/{name}", self.database)
    }

    /// Where a collection lies, and its own name there.
    pub(super) fn place_of<'a>(&self, collection: &'a Collection) -> (String, &'a str) {
        match collection.as_str().rsplit_once('/') {
            Some((above, id)) => (format!("{}/{above}", self.documents()), id),
            None => (self.documents(), collection.as_str()),
        }
    }

    /// The name of a document of this collection; `None` where it lies elsewhere.
    pub(super) fn name_in(&self, collection: &Collection, path: &str) -> Option<Name> {
        let id = path
            .strip_prefix(&self.documents())?
            .strip_prefix('/')?
            .strip_prefix(collection.as_str())?
            .strip_prefix('/')?;
        Some(Name { collection: collection.clone(), id: id.into() })
    }

    /// Sends one request, with its credentials, within its time.
    pub(super) async fn call<Q, A, F: Future<Output = Result<Response<A>, Status>>>(
        &self,
        message: Q,
        send: impl FnOnce(Client, Request<Q>) -> F,
    ) -> Result<Response<A>, StoreError> {
        let answer = async {
            let request = self.request(message).await?;
            send(Client::new(self.channel.clone()), request).await.map_err(|status| refusal(&status))
        };
        in_time(LONGEST_REQUEST, answer).await
    }

    async fn request<Q>(&self, message: Q) -> Result<Request<Q>, StoreError> {
        let mut request = Request::new(message);
        match &self.credentials {
            None => drop(request.metadata_mut().insert("authorization", MetadataValue::from_static(OWNER))),
            Some(credentials) => {
                *request.metadata_mut() = MetadataMap::from_headers(credentials.headers().await?);
            }
        }
        if let Some(prefix) = &self.prefix {
            request.metadata_mut().insert("google-cloud-resource-prefix", prefix.clone());
        }
        Ok(request)
    }
}

/// The application default credentials, looked up at the first call: the metadata server may come up after us.
#[derive(Default)]
struct Credentials(Mutex<Option<Arc<GoogleAuthHeaders>>>);

impl Credentials {
    async fn headers(&self) -> Result<HeaderMap, StoreError> {
        let found = self.found().await.map_err(|error| unauthenticated(&error))?;
        match found.headers().await {
            Ok(headers) => Ok((*headers).clone()),
            Err(error) => {
                let error = unauthenticated(&error);
                if !error.is_transient() {
                    // They never try again after that; whoever put it right should not have to restart us.
                    *self.0.lock().await = None;
                }
                Err(error)
            }
        }
    }

    async fn found(&self) -> Result<Arc<GoogleAuthHeaders>, AuthError> {
        let mut found = self.0.lock().await;
        if let Some(found) = &*found {
            return Ok(Arc::clone(found));
        }
        let new = Arc::new(GoogleAuthHeaders::from_adc_with_scopes(vec![SCOPE.to_owned()]).await?);
        Ok(Arc::clone(found.insert(new)))
    }
}

/// Notices a peer that is gone without a word.
fn asking(endpoint: Endpoint) -> Endpoint {
    endpoint
        .http2_keep_alive_interval(ASK_AFTER)
        .keep_alive_timeout(GIVE_UP_AFTER)
        .keep_alive_while_idle(true)
}

pub(super) fn away(why: &str) -> StoreError {
    StoreError::Away(why.to_owned())
}

/// What a failed request means.
pub(super) fn refusal(status: &Status) -> StoreError {
    match std::error::Error::source(status) {
        // The connection, not Firestore: what there is to say is in the causes.
        Some(cause) => StoreError::Away(with_causes(cause)),
        None => by_code(status.code(), status.message()),
    }
}

enum Meaning {
    Away,
    GaveUp,
    Refused,
}

/// What a code of Firestore's means. What it says is cut short: it names documents, and may quote what it was sent.
pub(super) fn by_code(code: Code, message: &str) -> StoreError {
    let (name, meaning) = match code {
        Code::Ok => ("OK", Meaning::Away),
        Code::Cancelled => ("CANCELLED", Meaning::GaveUp),
        Code::Unknown => ("UNKNOWN", Meaning::Away),
        Code::DeadlineExceeded => ("DEADLINE_EXCEEDED", Meaning::Away),
        Code::ResourceExhausted => ("RESOURCE_EXHAUSTED", Meaning::Away),
        Code::Aborted => ("ABORTED", Meaning::GaveUp),
        Code::Internal => ("INTERNAL", Meaning::Away),
        Code::Unavailable => ("UNAVAILABLE", Meaning::Away),
        Code::InvalidArgument => ("INVALID_ARGUMENT", Meaning::Refused),
        Code::NotFound => ("NOT_FOUND", Meaning::Refused),
        Code::AlreadyExists => ("ALREADY_EXISTS", Meaning::Refused),
        Code::PermissionDenied => ("PERMISSION_DENIED", Meaning::Refused),
        Code::FailedPrecondition => ("FAILED_PRECONDITION", Meaning::Refused),
        Code::OutOfRange => ("OUT_OF_RANGE", Meaning::Refused),
        Code::Unimplemented => ("UNIMPLEMENTED", Meaning::Refused),
        Code::DataLoss => ("DATA_LOSS", Meaning::Refused),
        Code::Unauthenticated => ("UNAUTHENTICATED", Meaning::Refused),
    };
    let message: String = message.chars().take(LONGEST_MESSAGE).collect();
    match meaning {
        Meaning::Away => StoreError::Away(format!("{name}: {message}")),
        Meaning::GaveUp => StoreError::GaveUp(format!("{name}: {message}")),
        Meaning::Refused => StoreError::Refused { code: name, message },
    }
}

fn unauthenticated(error: &AuthError) -> StoreError {
    match error.kind() {
        ErrorKind::Credentials(cause) if cause.is_transient() => StoreError::Away(with_causes(error)),
        _ => StoreError::Refused { code: "UNAUTHENTICATED", message: with_causes(error) },
    }
}

#[cfg(test)]
mod tests {
    use firestore::gcloud_sdk::google::firestore::v1::ListenRequest;
    use futures_util::stream;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_listener_notices_within_a_minute_that_its_peer_is_silent() {
        let peer = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", peer.local_addr().unwrap());
        let mut client = Client::new(asking(Endpoint::from_shared(url).unwrap()).connect_lazy());
        let began = tokio::time::Instant::now();
        let listened = client.listen(stream::pending::<ListenRequest>()).await;
        assert!(matches!(refusal(&listened.unwrap_err()), StoreError::Away(_)));
        assert!(
            began.elapsed() >= ASK_AFTER && began.elapsed() < Duration::from_mins(1),
            "{:?}",
            began.elapsed()
        );
        drop(peer);
    }

    #[test]
    fn errors_are_told_apart_by_code() {
        for code in (0..17).map(Code::from_i32) {
            let error = refusal(&Status::new(code, "why"));
            match code {
                Code::Cancelled | Code::Aborted => {
                    assert!(matches!(error, StoreError::GaveUp(_)), "{code:?}");
                }
                Code::Ok
                | Code::Unknown
                | Code::DeadlineExceeded
                | Code::ResourceExhausted
                | Code::Internal
                | Code::Unavailable => assert!(matches!(error, StoreError::Away(_)), "{code:?}"),
                _ => assert!(matches!(error, StoreError::Refused { .. }), "{code:?}"),
            }
        }
        let StoreError::Refused { code, message } = by_code(Code::PermissionDenied, &"é".repeat(500)) else {
            panic!()
        };
        assert_eq!((code, message.chars().count()), ("PERMISSION_DENIED", LONGEST_MESSAGE));
    }
}
