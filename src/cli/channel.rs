//! `inlet channel`: channels to read, while the service runs. On a store that is shared it works on the store, and the
//! running instances hear of it; on the embedded one it goes through the service that holds it, if there is one.

use clap::{Args, Subcommand};
use prometheus::Registry;
use reqwest::Method;
use serde::Deserialize;
use serde_json::{Value, json};

use super::client::{ClientArgs, Service};
use super::held::{Held, hold};
use super::{Failure, checked, print};
use crate::app::{AppArgs, AppConfig, open_store};
use crate::audit::{Actor, Deed, Details, audited};
use crate::channels::{Added, Channel, ChannelError, Channels};
use crate::clock::Clock;
use crate::data_dir::DataDir;
use crate::settings::Environment;
use crate::store::measured::Store;
use crate::telemetry::logs::{self, with_causes};

#[derive(Debug, Args)]
pub(super) struct ChannelArgs {
    #[command(subcommand)]
    act: Act,
}

#[derive(Debug, Subcommand)]
enum Act {
    /// Read these channels from now on; one that is read already stays as it is
    Add(LoginArgs),
    /// Read these channels no longer; those in `TWITCH_CHANNELS` can be removed there alone
    Remove(LoginArgs),
    /// Show the channels
    List(Where),
}

#[derive(Debug, Args)]
struct LoginArgs {
    /// Logins of channels
    #[arg(required = true)]
    logins: Vec<String>,
    #[command(flatten)]
    place: Where,
}

#[derive(Debug, Args)]
struct Where {
    /// Print one JSON object for each channel
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    client: ClientArgs,
    #[command(flatten)]
    app: Box<AppArgs>,
}

/// Where the list is changed.
enum Desk {
    /// In the store. The folder is held, if the store lies in it.
    Here { channels: Channels, store: Store, _held: Option<DataDir> },
    /// By the service.
    Service(Service),
}

/// What was done with a channel.
enum Done {
    Added(Channel),
    Known(Channel),
    Removed(Channel),
}

pub(super) async fn run(args: &ChannelArgs, environment: &Environment) -> Result<(), Failure> {
    let (place, logins) = match &args.act {
        Act::Add(args) | Act::Remove(args) => (&args.place, &args.logins[..]),
        Act::List(place) => (place, &[][..]),
    };
    let (config, service) = checked(|problems| {
        let config = place.app.check(environment, problems)?;
        let service = place.client.check(environment, config.http.port, problems)?;
        Some((config, service))
    })?;
    logs::start(&config.logs, Clock::system());
    let desk = Desk::open(&config, service).await?;
    if let Act::List(_) = &args.act {
        for channel in desk.list().await? {
            print(&listed(&channel, place.json))?;
        }
        return Ok(());
    }
    for login in logins {
        let done = match &args.act {
            Act::Add(_) => desk.add(login).await?,
            Act::Remove(_) => desk.remove(login).await?,
            Act::List(_) => return Ok(()),
        };
        print(&done.shown(place.json))?;
    }
    Ok(())
}

impl Desk {
    async fn open(config: &AppConfig, service: Service) -> Result<Self, Failure> {
        let mut held = None;
        if config.path.has_embedded_store() {
            match hold(config, "channel", &service).await? {
                Held::ByUs(folder) => held = Some(folder),
                Held::ByService => return Ok(Self::Service(service)),
            }
        }
        let store = open_store(&config.path, &config.data_dir, &Registry::new())?;
        let channels = Channels::new(store.clone(), config.path.fixed_channels(), Clock::system());
        Ok(Self::Here { channels, store, _held: held })
    }

    async fn add(&self, login: &str) -> Result<Done, Failure> {
        match self {
            Self::Here { channels, store, .. } => {
                Ok(match recorded(store, "add", login, channels.add(login)).await? {
                    Added::New(channel) => Done::Added(channel),
                    Added::Known(channel) => Done::Known(channel),
                })
            }
            Self::Service(service) => {
                let request =
                    service.request(Method::POST, "/admin/channels").json(&json!({ "login": login }));
                let response = service.send(request).await?;
                let is_new = response.status() == reqwest::StatusCode::CREATED;
                let channel = response.json().await.map_err(|error| service.away(error))?;
                Ok(if is_new { Done::Added(channel) } else { Done::Known(channel) })
            }
        }
    }

    async fn remove(&self, login: &str) -> Result<Done, Failure> {
        match self {
            Self::Here { channels, store, .. } => {
                Ok(Done::Removed(recorded(store, "remove", login, channels.remove(login)).await?))
            }
            Self::Service(service) => {
                // Whatever was typed: the service says what is wrong with it.
                let segment = url_segment(login);
                let request = service.request(Method::DELETE, &format!("/admin/channels/{segment}"));
                let response = service.send(request).await?;
                Ok(Done::Removed(response.json().await.map_err(|error| service.away(error))?))
            }
        }
    }

    async fn list(&self) -> Result<Vec<Value>, Failure> {
        #[derive(Deserialize)]
        struct Page {
            channels: Vec<Value>,
        }
        match self {
            Self::Here { channels, .. } => {
                Ok(channels.list().await?.iter().map(|channel| json!(channel)).collect())
            }
            Self::Service(service) => {
                let response = service.send(service.get("/admin/channels")).await?;
                let page: Page = response.json().await.map_err(|error| service.away(error))?;
                Ok(page.channels)
            }
        }
    }
}

/// Does it with a record of it. What is no login is refused before.
async fn recorded<T>(
    store: &Store,
    act: &str,
    login: &str,
    doing: impl Future<Output = Result<T, ChannelError>>,
) -> Result<T, Failure> {
    let login = Channels::login(login)?;
    let deed = Deed {
        actor: Actor::of_this_process(),
        action: format!("inlet channel {act}"),
        target: format!("channels/{login}"),
        details: Details::new().shown("login", login),
        request_id: None,
    };
    Ok(audited(store, &Clock::system(), deed, doing).await?)
}

impl From<ChannelError> for Failure {
    fn from(error: ChannelError) -> Self {
        let text = with_causes(&error);
        match error {
            ChannelError::Store(error) if error.is_transient() => Self::Unavailable(text),
            ChannelError::Store(_)
            | ChannelError::BadLogin(_)
            | ChannelError::Unknown(_)
            | ChannelError::Fixed(_)
            | ChannelError::TooMany
            | ChannelError::Contended => Self::Failed(text),
        }
    }
}

impl Done {
    fn shown(&self, json: bool) -> String {
        let (what, channel) = match self {
            Self::Added(channel) => ("added", channel),
            Self::Known(channel) => ("there already", channel),
            Self::Removed(channel) => ("removed", channel),
        };
        if json {
            json!({ "result": what, "channel": channel }).to_string()
        } else {
            format!("{} {what}", channel.login)
        }
    }
}

fn listed(channel: &Value, json: bool) -> String {
    if json {
        return channel.to_string();
    }
    let text = |name: &str| channel[name].as_str();
    let mut line = format!("{:<25}", text("login").unwrap_or_default());
    let room = text("roomId").map_or("room not known yet".to_owned(), |room| format!("room {room}"));
    line.push_str(&room);
    let fixed = (channel["fixed"] == true).then(|| "in TWITCH_CHANNELS".to_owned());
    let added = text("addedAt").map(|at| format!("added {at}"));
    let former = text("formerLogin").map(|former| format!("formerly {former}"));
    let state =
        text("state").map(|state| text("why").map_or(state.to_owned(), |why| format!("{state}: {why}")));
    for part in [fixed, added, former, state].into_iter().flatten() {
        line.push_str(", ");
        line.push_str(&part);
    }
    line
}

/// `text` as one segment of a path.
fn url_segment(text: &str) -> String {
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || *byte == b'_';
    let escape = |byte: u8| if plain(&byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") };
    text.bytes().map(escape).collect()
}
