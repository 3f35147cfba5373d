//! `inlet user`: what operators do with users. On Firestore straight on the store; on the embedded store beside a running
//! service through that service, else on the file itself.

use std::sync::Arc;

use clap::{Args, Subcommand};
use prometheus::Registry;
use reqwest::Method;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::client::{ClientArgs, Service};
use super::held::{Held, hold};
use super::{Failure, checked, print};
use crate::app::{AppArgs, AppConfig, open_bus, open_store};
use crate::audit::{Actor, Deed, Details, audited};
use crate::bus::embedded;
use crate::bus::jetstream;
use crate::bus::{Bus, Driver};
use crate::clock::Clock;
use crate::data_dir::DataDir;
use crate::envelope::id::UserRef;
use crate::settings::Environment;
use crate::store::StoreError;
use crate::store::measured::Store;
use crate::telemetry::logs::{self, with_causes};
use crate::users::operations::{BarredView, Edit, Filter, LONGEST_PAGE, Page, UserError, UserKey, UserView};
use crate::users::{Desk, Farewell, Remains};

#[derive(Debug, Args)]
#[command(mut_args(|arg| arg.global(true)))]
pub(super) struct UserArgs {
    /// Print JSON: one object for each user
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    client: ClientArgs,
    #[command(flatten)]
    app: AppArgs,
    #[command(subcommand)]
    action: Action,
}

/// A user, as `twitch:12345` or 12345.
#[derive(Debug, Args)]
struct Whom {
    /// The platform's id of the user: twitch:12345 or 12345
    #[arg(value_name = "USER", value_parser = |text: &str| text.parse::<UserKey>())]
    key: UserKey,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Everything that is known of a user
    Show(Whom),
    /// Note something of a user, for every envelope of theirs; without a text the notes are removed
    Note {
        #[command(flatten)]
        whom: Whom,
        /// The notes, at most 4 KiB
        text: Option<String>,
    },
    /// Say in a word how a user stands; without one that is removed
    Status {
        #[command(flatten)]
        whom: Whom,
        /// The word
        word: Option<String>,
    },
    /// Labels of a user
    #[command(subcommand)]
    Tag(TagAction),
    /// Users, by key. Every document is read that is looked at, which Firestore bills
    List(ListArgs),
    /// Keep a user's messages out: they are counted as refused, and never stored
    Ignore(Whom),
    /// Take an ignored user's messages in again
    Unignore(Whom),
    /// Forget a user: the document is deleted, none is made again, and their messages are kept out
    Forget(Whom),
    /// Take a forgotten user in again, as somebody new
    Unforget(Whom),
}

#[derive(Debug, Subcommand)]
enum TagAction {
    /// Add labels
    Add(TagArgs),
    /// Take labels away
    Remove(TagArgs),
}

#[derive(Debug, Args)]
struct TagArgs {
    #[command(flatten)]
    whom: Whom,
    /// The labels
    #[arg(required = true)]
    tags: Vec<String>,
}

#[derive(Debug, Args)]
struct ListArgs {
    /// Who was last seen under this login
    #[arg(long)]
    login: Option<String>,
    /// Who has this label
    #[arg(long)]
    tag: Option<String>,
    /// Who stands like this
    #[arg(long)]
    status: Option<String>,
    /// Who is ignored
    #[arg(long, conflicts_with = "forgotten")]
    ignored: bool,
    /// Who is forgotten
    #[arg(long)]
    forgotten: bool,
    /// Behind this key
    #[arg(long)]
    after: Option<String>,
    /// At most so many
    #[arg(long, default_value_t = 100)]
    limit: usize,
}

/// The way to users.
enum Way {
    /// The store is open here.
    Here { desk: Desk, store: Store, clock: Clock, _held: Option<DataDir> },
    /// A running service has it.
    Service(Service),
}

pub(super) async fn run(args: &UserArgs, environment: &Environment) -> Result<(), Failure> {
    let (config, service) = checked(|problems| {
        let config = args.app.check(environment, problems)?;
        let service = args.client.check(environment, config.http.port, problems)?;
        Some((config, service))
    })?;
    let clock = Clock::system();
    logs::start(&config.logs, clock.clone());
    let asks_stream = matches!(args.action, Action::Forget(_));
    let way = find_way(&config, service, clock, asks_stream).await?;
    args.act(&way).await
}

async fn find_way(
    config: &AppConfig,
    service: Service,
    clock: Clock,
    asks_stream: bool,
) -> Result<Way, Failure> {
    let mut held = None;
    if config.path.has_embedded_store() {
        match hold(config, "user", &service).await? {
            Held::ByUs(folder) => held = Some(folder),
            Held::ByService => return Ok(Way::Service(service)),
        }
    } else if asks_stream
        && config.path.bus.driver == Driver::Embedded
        && has_embedded_stream(config)
        // Whoever else holds the folder has the stream; the store is elsewhere.
        && let Ok(folder) = DataDir::take(&config.data_dir, &format!("inlet user, process {}", std::process::id()))
    {
        held = Some(folder);
    }
    let store = open_store(&config.path, &config.data_dir, &Registry::new())?;
    let bus = if asks_stream { stream_of(config, held.is_some(), &clock).await } else { None };
    let desk = Desk::new(store.clone(), clock.clone(), bus);
    Ok(Way::Here { desk, store, clock, _held: held })
}

/// The stream, to ask what it holds; `None` where it cannot be asked from here. Asking makes none.
async fn stream_of(config: &AppConfig, is_folder_ours: bool, clock: &Clock) -> Option<Arc<dyn Bus>> {
    let bus = &config.path.bus;
    let is_there = match (&bus.jetstream, bus.driver) {
        (Some(nats), Driver::Nats) => {
            let looked = jetstream::look(nats, bus, &config.path.tls).await;
            looked.is_ok_and(|looked| looked.stream.is_ok())
        }
        _ => is_folder_ours && has_embedded_stream(config),
    };
    if !is_there {
        return None;
    }
    let bus = open_bus(&config.path, &config.data_dir, clock).await;
    bus.inspect_err(|error| tracing::info!(error = %error, "the stream cannot be asked what it holds")).ok()
}

fn has_embedded_stream(config: &AppConfig) -> bool {
    config.data_dir.join(embedded::FILE_NAME).is_file()
}

impl From<UserError> for Failure {
    fn from(error: UserError) -> Self {
        let text = with_causes(&error);
        match error {
            UserError::NoKey | UserError::Unfit(_) => Self::Usage(text),
            UserError::Store(StoreError::Away(_) | StoreError::GaveUp(_)) => Self::Unavailable(text),
            UserError::Unknown(_)
            | UserError::TooManyTags(_)
            | UserError::NotBarred(..)
            | UserError::Forgotten(_)
            | UserError::Contended(_)
            | UserError::Returned(_)
            | UserError::Store(StoreError::Refused { .. }) => Self::Failed(text),
        }
    }
}

impl UserArgs {
    async fn act(&self, way: &Way) -> Result<(), Failure> {
        let view = match &self.action {
            Action::Show(whom) => way.show(&whom.key).await?,
            Action::Note { whom, text } => {
                way.edit(
                    &whom.key,
                    &Edit { notes: Some(text.clone().unwrap_or_default()), ..Edit::default() },
                )
                .await?
            }
            Action::Status { whom, word } => {
                way.edit(
                    &whom.key,
                    &Edit { status: Some(word.clone().unwrap_or_default()), ..Edit::default() },
                )
                .await?
            }
            Action::Tag(TagAction::Add(TagArgs { whom, tags })) => {
                way.edit(&whom.key, &Edit { add_tags: tags.clone(), ..Edit::default() }).await?
            }
            Action::Tag(TagAction::Remove(TagArgs { whom, tags })) => {
                way.edit(&whom.key, &Edit { remove_tags: tags.clone(), ..Edit::default() }).await?
            }
            Action::List(list) => return self.list(way, list).await,
            Action::Ignore(whom) => way.ignore(&whom.key).await?,
            Action::Unignore(whom) => way.unignore(&whom.key).await?,
            Action::Unforget(whom) => way.unforget(&whom.key).await?,
            Action::Forget(whom) => {
                let farewell = way.forget(&whom.key).await?;
                return if self.json { print_json(&farewell) } else { print(&farewell_text(&farewell)) };
            }
        };
        if self.json { print_json(&view) } else { print(&view_text(&view)) }
    }

    async fn list(&self, way: &Way, list: &ListArgs) -> Result<(), Failure> {
        let barred = match (list.ignored, list.forgotten) {
            (true, _) => Some("ignored".to_owned()),
            (false, true) => Some("forgotten".to_owned()),
            (false, false) => None,
        };
        let mut filter = Filter {
            login: list.login.clone(),
            tag: list.tag.clone(),
            status: list.status.clone(),
            barred,
            after: list.after.as_deref().map(as_key),
            limit: None,
        };
        let mut left = list.limit;
        while left > 0 {
            filter.limit = Some(left.min(LONGEST_PAGE));
            let page = way.list(&filter).await?;
            left -= page.users.len().min(left);
            for user in &page.users {
                if self.json { print_json(user)? } else { print(&line_of(user))? }
            }
            match page.next {
                Some(next) => filter.after = Some(next),
                None => break,
            }
        }
        Ok(())
    }
}

impl Way {
    async fn show(&self, key: &UserKey) -> Result<UserView, Failure> {
        match self {
            Self::Here { desk, .. } => Ok(desk.show(key).await?),
            Self::Service(service) => ask(service, Method::GET, &of(key), None::<&()>).await,
        }
    }

    async fn list(&self, filter: &Filter) -> Result<Page, Failure> {
        match self {
            Self::Here { desk, .. } => Ok(desk.list(filter).await?),
            Self::Service(service) => {
                let request = service.request(Method::GET, "/admin/users").query(filter);
                answer(service, request).await
            }
        }
    }

    async fn edit(&self, key: &UserKey, edit: &Edit) -> Result<UserView, Failure> {
        edit.check()?;
        match self {
            Self::Here { desk, store, clock, .. } => {
                let deed = deed("edit", key, of_edit(edit));
                Ok(audited(store, clock, deed, desk.edit(key, edit)).await?)
            }
            Self::Service(service) => ask(service, Method::PATCH, &of(key), Some(edit)).await,
        }
    }

    async fn ignore(&self, key: &UserKey) -> Result<UserView, Failure> {
        match self {
            Self::Here { desk, store, clock, .. } => {
                let deed = deed("ignore", key, Details::new());
                Ok(audited(store, clock, deed, desk.ignore(key)).await?)
            }
            Self::Service(service) => {
                ask(service, Method::PUT, &format!("{}/ignored", of(key)), None::<&()>).await
            }
        }
    }

    async fn unignore(&self, key: &UserKey) -> Result<UserView, Failure> {
        match self {
            Self::Here { desk, store, clock, .. } => {
                let deed = deed("unignore", key, Details::new());
                Ok(audited(store, clock, deed, desk.unignore(key)).await?)
            }
            Self::Service(service) => {
                ask(service, Method::DELETE, &format!("{}/ignored", of(key)), None::<&()>).await
            }
        }
    }

    async fn forget(&self, key: &UserKey) -> Result<Farewell, Failure> {
        match self {
            Self::Here { desk, store, clock, .. } => {
                let deed = deed("forget", key, Details::new());
                Ok(audited(store, clock, deed, desk.forget(key)).await?)
            }
            Self::Service(service) => ask(service, Method::DELETE, &of(key), None::<&()>).await,
        }
    }

    async fn unforget(&self, key: &UserKey) -> Result<UserView, Failure> {
        match self {
            Self::Here { desk, store, clock, .. } => {
                let deed = deed("unforget", key, Details::new());
                Ok(audited(store, clock, deed, desk.unforget(key)).await?)
            }
            Self::Service(service) => {
                ask(service, Method::DELETE, &format!("{}/forgotten", of(key)), None::<&()>).await
            }
        }
    }
}

/// A user's id alone stands for its key; a list may also go on behind something else.
fn as_key(after: &str) -> String {
    after.parse::<UserKey>().map_or_else(|_| after.to_owned(), |key| key.to_string())
}

/// What is about to be done, for the audit.
fn deed(action: &str, key: &UserKey, details: Details) -> Deed {
    let (actor, action, target) =
        (Actor::of_this_process(), format!("inlet user {action}"), UserRef(&key.to_string()).to_string());
    Deed { actor, action, target, details, request_id: None }
}

fn of_edit(edit: &Edit) -> Details {
    match serde_json::to_value(edit) {
        Ok(Value::Object(fields)) => Details::new().of_request(&fields),
        _ => Details::new(),
    }
}

fn of(key: &UserKey) -> String {
    format!("/admin/users/{key}")
}

async fn ask<T: DeserializeOwned>(
    service: &Service,
    method: Method,
    path: &str,
    body: Option<&impl Serialize>,
) -> Result<T, Failure> {
    let request = service.request(method, path);
    answer(service, if let Some(body) = body { request.json(body) } else { request }).await
}

async fn answer<T: DeserializeOwned>(
    service: &Service,
    request: reqwest::RequestBuilder,
) -> Result<T, Failure> {
    service.send(request).await?.json().await.map_err(|error| service.away(error))
}

fn print_json(value: &impl Serialize) -> Result<(), Failure> {
    print(&serde_json::to_string(value).map_err(|error| Failure::Failed(error.to_string()))?)
}

/// What somebody else wrote, for a terminal.
fn shown(value: &Value) -> String {
    let text = match value {
        Value::String(text) => text.clone(),
        Value::Array(values) => values.iter().map(shown).collect::<Vec<_>>().join(", "),
        other => other.to_string(),
    };
    text.chars().filter(|letter| !letter.is_control()).collect()
}

fn barred_text(barred: &BarredView) -> String {
    let since = barred.at.map(|at| format!(" since {at}")).unwrap_or_default();
    format!("{}{since}", barred.kind)
}

/// A user on one line.
fn line_of(view: &UserView) -> String {
    let of = |name: &str| {
        view.document.as_ref().and_then(|fields| fields.get(name)).filter(|value| !value.is_null())
    };
    let mut parts = vec![view.key.clone()];
    for (name, label) in [
        ("displayName", ""),
        ("messageCountAllTime", "messages "),
        ("lastSeenAt", "last seen "),
        ("status", "status "),
        ("tags", "tags "),
    ] {
        if let Some(value) = of(name).map(shown).filter(|text| !text.is_empty()) {
            parts.push(format!("{label}{value}"));
        }
    }
    parts.extend(view.barred.as_ref().map(barred_text));
    parts.join("  ")
}

/// A user, a field on each line.
fn view_text(view: &UserView) -> String {
    let mut lines = vec![view.key.clone()];
    if let Some(barred) = &view.barred {
        lines.push(format!("  {}", barred_text(barred)));
    }
    match &view.document {
        None => lines.push("  no document".to_owned()),
        Some(fields) => {
            let shown_fields = fields.iter().filter(|(_, value)| !value.is_null());
            lines.extend(shown_fields.map(|(name, value)| format!("  {name}: {}", shown(value))));
            lines.push(
                "Counts are those of the last write: what was said since is counted when the user's state is next written (ENRICH_FLUSH_IDLE, ENRICH_FLUSH_MAX)."
                    .to_owned(),
            );
        }
    }
    lines.join("\n")
}

fn farewell_text(farewell: &Farewell) -> String {
    let Farewell { forgotten, remains } = farewell;
    let key = &forgotten.key;
    let document = if forgotten.had_document { "the document is deleted" } else { "there is no document" };
    format!(
        "{key} is forgotten since {at}: {document}, and none will be made. Every instance keeps their messages out, two seconds from now at the latest.\n\
         What remains:\n\
         \x20 {stream}\n\
         \x20 in an instance's outbox: what was taken in and could not be published yet, until it is\n\
         \x20 what others said of them, and what moderators did to them\n\
         \x20 what consumers of the stream keep by themselves, and backups\n\
         \x20 barred/{key}: that they are forgotten, and since when; nobody could be kept out without it\n\
         `inlet user unforget {key}` takes them in again, as somebody new.",
        at = forgotten.at,
        stream = stream_text(remains),
    )
}

fn stream_text(remains: &Remains) -> String {
    let Some(stream) = &remains.stream else {
        return "in the stream: what they said before, dead letters too, as long as the stream keeps messages (it could not be asked from here)".to_owned();
    };
    let oldest = match remains.oldest_at {
        Some(at) => format!("; the oldest message there is of {at}"),
        None => "; it is empty".to_owned(),
    };
    let until = match (remains.gone_by, remains.max_age_seconds) {
        (Some(gone_by), Some(seconds)) => format!("gone by {gone_by} (kept for {} h)", seconds / 3_600),
        _ => "kept without a limit of age".to_owned(),
    };
    let bytes = match remains.max_bytes {
        Some(bytes) => format!(", or earlier when it has more than {bytes} bytes"),
        None => String::new(),
    };
    format!("in the stream {stream}: what they said before, dead letters too, {until}{bytes}{oldest}")
}
