//! `inlet login`: a person lets Inlet read chat as an account of theirs, by Twitch's device code flow, and the token is
//! stored where the service finds it.
//!
//! The place is looked at first, so that nobody goes through the flow for nothing; the folder is not held meanwhile, so
//! that a service can start.

use std::io::Write as _;
use std::time::Duration;

use clap::Args;
use prometheus::Registry;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep, timeout_at};

use super::client::{ClientArgs, Service};
use super::held::{Held, hold};
use super::{Failure, asked_to_stop, checked, print};
use crate::app::{AppArgs, AppConfig, TokenDocument, open_oauth, open_store};
use crate::audit::{Actor, Deed, Details, audited};
use crate::clock::Clock;
use crate::data_dir::DataDir;
use crate::retry::Backoff;
use crate::settings::Environment;
use crate::source::twitch::credentials::oauth::{DeviceFlow, Granted, NotYet, OAuth, OAuthError};
use crate::source::twitch::credentials::{CHAT_READ, Token, TokenStore, TokenStoreError};
use crate::store::measured::Store;
use crate::telemetry::logs::{self, with_causes};

/// No flow takes longer, whatever the service says.
const LONGEST_FLOW: Duration = Duration::from_mins(30);
/// Asked too often: so much slower from then on, as the standard has it.
const SLOWER: Duration = Duration::from_secs(5);
/// Waits for a service that fails.
const FIRST_RETRY: Duration = Duration::from_secs(2);
const LONGEST_RETRY: Duration = Duration::from_secs(30);
/// For an answer of the running service.
const SERVICE_TIMEOUT: Duration = Duration::from_secs(15);

#[derive(Debug, Args)]
pub(super) struct LoginArgs {
    /// Print who logged in as one line of JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    client: ClientArgs,
    #[command(flatten)]
    app: AppArgs,
}

/// Where a token goes.
enum Place {
    /// Into a store that this process may open. The folder is held as long as this.
    Here(Store, TokenDocument, Option<DataDir>),
    /// Into that of a service, which alone may write to it.
    Service,
}

pub(super) async fn run(args: &LoginArgs, environment: &Environment) -> Result<(), Failure> {
    let (config, service) = checked(|problems| {
        let config = args.app.check(environment, problems)?;
        let service = args.client.check(environment, config.http.port, problems)?;
        if config.path.credentials().client.is_none() {
            problems.add(
                "TWITCH_CLIENT_ID",
                "is needed: the id of an application at https://dev.twitch.tv/console",
            );
        }
        Some((config, service))
    })?;
    let clock = Clock::system();
    logs::start(&config.logs, clock.clone());
    let token = tokio::select! {
        biased;
        () = asked_to_stop() => return Err(Failure::Failed("stopped; nothing was stored".to_owned())),
        token = log_in(&config, &service, &clock) => token?,
    };
    // What Twitch has issued is stored, whatever is pressed now.
    let in_use = store(&token, &config, &service, &clock).await?;
    tell(args, &token, &config, in_use)
}

async fn log_in(config: &AppConfig, service: &Service, clock: &Clock) -> Result<Token, Failure> {
    look_at(config, service).await?;
    let oauth = open_oauth(&config.path)?;
    let flow = oauth.begin_device_flow(CHAT_READ).await.map_err(|error| refused(&error))?;
    say(&format!("Open {} and enter {}", flow.address, flow.user_code))?;
    let granted = approved(&oauth, &flow).await?;
    token_of(&oauth, granted, clock).await
}

fn say(line: &str) -> Result<(), Failure> {
    writeln!(std::io::stderr(), "{line}").map_err(|error| Failure::Failed(error.to_string()))
}

fn refused(error: &OAuthError) -> Failure {
    let text = format!("Twitch's OAuth: {}", with_causes(error));
    match error {
        OAuthError::Away(_) | OAuthError::Status { .. } | OAuthError::Unreadable => {
            Failure::Unavailable(text)
        }
        OAuthError::ClientRefused | OAuthError::NoClient => Failure::Configuration(text),
        OAuthError::TokenRefused => Failure::Failed(text),
    }
}

/// Waits until somebody has approved it. A service that fails is asked again as long as the flow lasts.
async fn approved(oauth: &OAuth, flow: &DeviceFlow) -> Result<Granted, Failure> {
    let deadline = Instant::now() + flow.expires_in.min(LONGEST_FLOW);
    let expired = || Failure::Failed("nobody entered the code in time; run `inlet login` again".to_owned());
    let (mut interval, mut backoff) =
        (flow.interval.min(LONGEST_FLOW), Backoff::new(FIRST_RETRY, LONGEST_RETRY));
    let mut wait = interval;
    loop {
        if timeout_at(deadline, sleep(wait)).await.is_err() {
            return Err(expired());
        }
        wait = match oauth.poll_device_flow(&flow.device_code, CHAT_READ).await {
            Ok(Ok(granted)) => return Ok(granted),
            Ok(Err(NotYet::Pending)) => interval,
            Ok(Err(NotYet::SlowDown)) => {
                interval += SLOWER;
                interval
            }
            Ok(Err(NotYet::Denied)) => {
                return Err(Failure::Failed("the login was denied; nothing was stored".to_owned()));
            }
            Ok(Err(NotYet::Expired)) => return Err(expired()),
            Err(error) if error.is_outage() => {
                tracing::debug!(error = with_causes(&error), "no answer yet");
                interval.max(backoff.next_wait())
            }
            Err(error) => return Err(refused(&error)),
        };
    }
}

/// The token, with whose it is.
async fn token_of(oauth: &OAuth, granted: Granted, clock: &Clock) -> Result<Token, Failure> {
    let obtained = Some(clock.now());
    let validated = oauth.validate(&granted.access).await.map_err(|error| refused(&error))?;
    if !validated.scope.iter().any(|scope| scope == CHAT_READ) {
        return Err(Failure::Failed(format!("the token does not allow {CHAT_READ}; nothing was stored")));
    }
    let Granted { access, refresh, expires_in, .. } = granted;
    Ok(Token {
        access,
        refresh,
        expires_in: expires_in.or(validated.expires_in),
        obtained,
        scope: validated.scope,
        user_id: Some(validated.user_id),
        login: Some(validated.login),
    })
}

/// Where the token goes now: a service may have come or gone since it was last looked.
async fn place(config: &AppConfig, service: &Service) -> Result<Place, Failure> {
    let mut held = None;
    if config.path.has_embedded_store() {
        match hold(config, "login", service).await? {
            Held::ByUs(folder) => held = Some(folder),
            Held::ByService => return Ok(Place::Service),
        }
    }
    let store = open_store(&config.path, &config.data_dir, &Registry::new())?;
    let document = TokenDocument::new(store.clone(), &config.path.credentials().document);
    Ok(Place::Here(store, document, held))
}

/// Whether a token could be stored, as far as can be seen.
async fn look_at(config: &AppConfig, service: &Service) -> Result<(), Failure> {
    match place(config, service).await? {
        Place::Here(_, document, _held) => match document.read().await {
            // What is there is about to be replaced.
            Ok(_) | Err(TokenStoreError::Unusable(_)) => Ok(()),
            Err(error) => Err(error.into()),
        },
        Place::Service => {
            service.send(service.get("/_debug/twitch").timeout(SERVICE_TIMEOUT)).await.map(drop)
        }
    }
}

/// What is recorded of it: whose the token is, nothing of the token.
fn deed(token: &Token, config: &AppConfig) -> Deed {
    let details = Details::new()
        .shown("login", token.login.as_deref().unwrap_or_default())
        .shown("id", token.user_id.as_deref().unwrap_or_default());
    Deed {
        actor: Actor::of_this_process(),
        action: "inlet login".to_owned(),
        target: config.path.credentials().document.to_string(),
        details,
        request_id: None,
    }
}

impl From<TokenStoreError> for Failure {
    fn from(error: TokenStoreError) -> Self {
        Self::Unavailable(with_causes(&error))
    }
}

/// Stores it; whether the service it went through uses it, if it is known.
async fn store(
    token: &Token,
    config: &AppConfig,
    service: &Service,
    clock: &Clock,
) -> Result<Option<bool>, Failure> {
    match place(config, service).await? {
        Place::Here(store, document, _held) => {
            let act = document.replace(token.clone());
            audited(&store, clock, deed(token, config), act).await?;
            Ok(config.path.credentials().given.is_some().then_some(false))
        }
        Place::Service => {
            let request = service.post("/admin/login").timeout(SERVICE_TIMEOUT).json(&token.to_fields());
            let answer: Value =
                service.send(request).await?.json().await.map_err(|error| service.away(error))?;
            Ok(answer["inUse"].as_bool())
        }
    }
}

fn tell(args: &LoginArgs, token: &Token, config: &AppConfig, in_use: Option<bool>) -> Result<(), Failure> {
    let (login, user_id) = (token.login.as_deref().unwrap_or_default(), token.user_id.as_deref());
    let document = config.path.credentials().document.to_string();
    let line = if args.json {
        json!({
            "login": login, "userId": user_id, "scopes": token.scope, "expiresAt": token.expires_at(),
            "document": document,
        })
        .to_string()
    } else {
        format!("logged in as {login}, with {}; stored in {document}", token.scope.join(" "))
    };
    print(&line)?;
    if in_use == Some(false) {
        say("It is not used as long as TWITCH_BOT_ACCESS_TOKEN is set.")?;
    }
    Ok(())
}
