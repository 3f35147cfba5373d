//! Commands that go through a running service.

use std::time::Duration;

use clap::Args;
use reqwest::{Client, Method, RequestBuilder, StatusCode};

use super::Failure;
use crate::secret::{Secret, without_user_info};
use crate::settings::{Environment, Problems};
use crate::telemetry::logs::with_causes;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// A service says something at least every 15 s.
const READ_TIMEOUT: Duration = Duration::from_mins(1);
/// For an answer that costs the service nothing.
const GREETING_TIMEOUT: Duration = Duration::from_secs(10);
/// A peer that is gone without a word is noticed, however long an answer may take.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// Where the service is.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Running service")]
pub(super) struct ClientArgs {
    /// Address of a running service; left out: this machine's PORT
    #[arg(long, env)]
    inlet_url: Option<String>,
}

/// A running service.
pub(super) struct Service {
    base: String,
    token: Option<Secret>,
    client: Client,
    /// For an answer that may take as long as it takes.
    patient_client: Client,
}

impl ClientArgs {
    /// Checks the settings; `port` is where a service on this machine listens.
    pub(super) fn check(
        &self,
        environment: &Environment,
        port: u16,
        problems: &mut Problems,
    ) -> Option<Service> {
        let base = problems.parse_optional("INLET_URL", self.inlet_url.as_ref(), address)?;
        let token = environment.secret("ADMIN_TOKEN", problems);
        // Never through a proxy: the local service is meant, and it refuses what was forwarded.
        let builder =
            || Client::builder().connect_timeout(CONNECT_TIMEOUT).tcp_keepalive(KEEP_ALIVE).no_proxy();
        let built =
            builder().read_timeout(READ_TIMEOUT).build().and_then(|client| Ok((client, builder().build()?)));
        let (client, patient_client) =
            built.map_err(|error| problems.add("INLET_URL", with_causes(&error))).ok()?;
        let base = base.unwrap_or_else(|| format!("http://127.0.0.1:{port}"));
        Some(Service { base, token, client, patient_client })
    }
}

fn address(text: &str) -> Result<String, String> {
    let is_base = reqwest::Url::parse(text).is_ok_and(|url| {
        let is_bare = url.query().is_none() && url.fragment().is_none();
        url.has_host() && is_bare && matches!(url.scheme(), "http" | "https")
    });
    if is_base {
        Ok(text.trim_end_matches('/').to_owned())
    } else {
        Err(format!("{:?} is no address such as http://localhost:8080", without_user_info(text)))
    }
}

impl Service {
    /// Its address, for messages.
    pub(super) fn shown(&self) -> String {
        without_user_info(&self.base)
    }

    pub(super) fn get(&self, path: &str) -> RequestBuilder {
        self.with_token(self.client.get(format!("{}{path}", self.base)))
    }

    /// A request whose body may be long, and whose answer comes when all of it is dealt with.
    pub(super) fn post(&self, path: &str) -> RequestBuilder {
        self.with_token(self.patient_client.post(format!("{}{path}", self.base)))
    }

    /// A request of another method; its answer comes soon.
    pub(super) fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.with_token(self.client.request(method, format!("{}{path}", self.base)))
    }

    fn with_token(&self, request: RequestBuilder) -> RequestBuilder {
        match &self.token {
            Some(token) => request.bearer_auth(token.expose()),
            None => request,
        }
    }

    /// Makes sure that it is an Inlet that answers there, before it is sent anything that matters.
    pub(super) async fn greet(&self) -> Result<(), Failure> {
        // Without the token: it is nobody else's to see.
        let request = self.client.get(format!("{}/livez", self.base)).timeout(GREETING_TIMEOUT);
        let response = request.send().await.map_err(|error| self.away(error))?;
        let status = response.status();
        let answer: serde_json::Value = response.json().await.unwrap_or_default();
        if status.is_success() && answer["live"] == true {
            return Ok(());
        }
        let text = format!("what answers at {} ({status}) is no Inlet; look at INLET_URL", self.shown());
        // A proxy whose Inlet is away.
        Err(if status.is_server_error() { Failure::Unavailable(text) } else { Failure::Configuration(text) })
    }

    /// Sends a request; an answer that is no success becomes a failure in the service's own words.
    pub(super) async fn send(&self, request: RequestBuilder) -> Result<reqwest::Response, Failure> {
        let response = request.send().await.map_err(|error| self.away(error))?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let body: serde_json::Value = response.json().await.unwrap_or_default();
        let said = body["error"]["message"].as_str().unwrap_or("no reason given");
        let hint = match (status, &self.token) {
            (StatusCode::UNAUTHORIZED, None) => "; set ADMIN_TOKEN as the service has it",
            (StatusCode::UNAUTHORIZED, Some(_)) => "; the service has another ADMIN_TOKEN",
            _ => "",
        };
        let text = format!("{} answers {status}: {said}{hint}", self.shown());
        Err(match status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Failure::Configuration(text),
            StatusCode::SERVICE_UNAVAILABLE => Failure::Unavailable(text),
            _ => Failure::Failed(text),
        })
    }

    pub(super) fn away(&self, error: reqwest::Error) -> Failure {
        let why = with_causes(&error.without_url());
        Failure::Unavailable(format!("no service answers at {}: {why}", self.shown()))
    }
}
