//! `inlet demo`: the service as it is, on embedded parts, against a simulated Twitch in the same process.
//!
//! It reads no setting: whatever an environment names (a NATS server, a project, an account) belongs to a deployment, and
//! a demonstration has no business there. Everything listens on the loopback interface, on ports of the system's choice,
//! and lies in a folder that is removed at the end.
//!
//! What was said goes to standard output, what is said about it to standard error: so a pipe gets chat alone.

use std::io::{IsTerminal as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use clap::builder::{OsStr, Resettable};
use clap::{Args, FromArgMatches as _};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::sleep;

use super::printer::{Counted, Printer};
use super::{Failure, asked_to_stop, checked};
use crate::app::{App, AppArgs, AppConfig, Tally};
use crate::bus::{Bus, Start, Wanted};
use crate::clock::{self, Clock};
use crate::errors::ErrorCode;
use crate::settings::{self, Environment};
use crate::sim::{SimConfig, SimError, Simulator};
use crate::telemetry::logs::{self, with_causes};

/// The first two share their chat now and then.
const CHANNELS: [&str; 3] = ["pixel_garden", "night_train", "tea_house"];
/// Few enough that a person sees them come back.
const VIEWERS: u32 = 60;
/// Something other than a message happens so many times more often than on Twitch: it is to be seen within a minute.
const HAPPENINGS: u32 = 8;

#[derive(Debug, Args)]
pub(super) struct DemoArgs {
    /// Messages per second over all channels together
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rate: u32,
    /// Print the envelopes as they are, one a line
    #[arg(long)]
    json: bool,
    /// End after so many
    #[arg(long, value_name = "N")]
    count: Option<u64>,
    /// End after so long, such as 30s [default: with Ctrl-C]
    #[arg(long = "for", value_name = "DURATION")]
    duration: Option<String>,
    /// What the service logs: `error`, `warn`, `info`, `debug`, `trace`, or a filter
    #[arg(long, value_name = "LEVEL", default_value = "error")]
    log_level: String,
}

pub(super) async fn run(args: &DemoArgs, environment: &Environment) -> Result<(), Failure> {
    let (duration, log_level) = checked(|problems| {
        let text = args.duration.as_ref();
        let duration = problems.parse_optional("--for", text, settings::positive_duration);
        Some((duration?, &args.log_level))
    })?;
    let mut stop = pin!(asked_to_end(duration));
    // Dropped last: whatever happens, nothing is left behind.
    let folder = Folder::new().map_err(|error| Failure::Failed(format!("no temporary folder: {error}")))?;
    let (simulator, app) = tokio::select! {
        biased;
        // Polled first, so that from here on a signal is a request to end well.
        () = &mut stop => return Ok(()),
        started = start(args.rate, log_level, &folder.0) => started?,
    };
    say(&heading(app.address(), environment));
    let printer = Counted::new(Printer::new(args.json, environment), args.count);
    let bus = app.bus();
    let mut shown = Ok(());
    let tally = app
        .run(async {
            tokio::select! {
                () = stop => {}
                ended = show(bus, printer) => shown = ended,
            }
        })
        .await?;
    simulator.shutdown().await;
    let Tally { received, published, users } = tally;
    let line_end = if std::io::stderr().is_terminal() { "\n" } else { "" };
    say(&format!("{line_end}{received} received, {published} published, {users} users\n"));
    shown
}

/// A folder of this run's own. What a killed run leaves is in nobody's way.
struct Folder(PathBuf);

impl Folder {
    fn new() -> std::io::Result<Self> {
        let name = format!("inlet-demo-{}-{:08x}", std::process::id(), fastrand::u32(..));
        let path = std::env::temp_dir().join(name);
        // For its owner's eyes alone, and an error where it is there already: the folder around it is everybody's.
        std::fs::DirBuilder::new().mode(0o700).create(&path)?;
        Ok(Self(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            tracing::warn!(error_code = %ErrorCode::LeftBehind, path = %self.0.display(), %error, "the temporary folder could not be removed");
        }
    }
}

async fn start(rate: u32, log_level: &str, folder: &Path) -> Result<(Simulator, App), Failure> {
    let cannot = |error: SimError| Failure::Failed(with_causes(&error));
    let listener =
        TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.map_err(SimError::Listen).map_err(cannot)?;
    let chat = SimConfig {
        channels: CHANNELS.map(str::to_owned).to_vec(),
        rate,
        users: VIEWERS,
        seed: fastrand::u64(..),
        lifelike: true,
        happenings: HAPPENINGS,
        ..SimConfig::new(clock::system_milliseconds)
    };
    let simulator = Simulator::start(chat, listener).await.map_err(cannot)?;
    let config = service(simulator.local_addr(), log_level, folder)?;
    let clock = Clock::system();
    logs::start(&config.logs, clock.clone());
    Ok((simulator, App::start(config, clock).await?))
}

/// Settings of the service, as its flags. Its variables are taken off it, and its secrets are looked for nowhere.
fn service(twitch: SocketAddr, log_level: &str, folder: &Path) -> Result<AppConfig, Failure> {
    let cannot = |error: clap::Error| Failure::Failed(error.to_string());
    let no_variable = |arg: clap::Arg| arg.env(Resettable::<OsStr>::Reset);
    let command =
        AppArgs::augment_args(clap::Command::new("serve").no_binary_name(true)).mut_args(no_variable);
    let (folder, twitch, channels) =
        (folder.display().to_string(), format!("irc://{twitch}"), CHANNELS.join(","));
    let flags = [
        ["--data-dir", &folder],
        ["--bind-addr", "127.0.0.1"],
        ["--port", "0"],
        ["--shutdown-grace", "3s"],
        ["--log-level", log_level],
        ["--twitch-irc-url", &twitch],
        ["--twitch-channels", &channels],
        ["--message-bus-driver", "embedded"],
        ["--user-store-driver", "embedded"],
    ];
    let matches = command.try_get_matches_from(flags.as_flattened()).map_err(cannot)?;
    let args = AppArgs::from_arg_matches(&matches).map_err(cannot)?;
    checked(|problems| args.check(&Environment::default(), problems))
}

/// Prints what is in the stream, from its start on, until as many are printed as were wanted or nobody reads any more.
async fn show(bus: Arc<dyn Bus>, mut printer: Counted) -> Result<(), Failure> {
    let mut follower = bus.follow(Start::Position(0), Wanted::Whole).await?;
    while let Some(batch) = follower.next().await {
        for stored in &batch?.messages {
            if !printer.print(&stored.payload)? {
                return Ok(());
            }
        }
    }
    Ok(())
}

fn heading(address: SocketAddr, environment: &Environment) -> String {
    let url = format!("http://{address}");
    let inlet = std::env::args().next().unwrap_or_else(|| "inlet".to_owned());
    // What is set for a deployment would lead it there.
    let embedded = if environment.get("NATS_URL").is_some() { " --message-bus-driver embedded" } else { "" };
    format!(
        "A simulated Twitch and the whole service, in this process; nothing leaves this machine. Ctrl-C ends it.\n\
         \n  look     {url}/\
         \n  health   {url}/healthz\
         \n  metrics  {url}/metrics\
         \n  follow   {inlet} tail{embedded} --inlet-url {url}\n\n"
    )
}

/// To standard error. That nobody reads it is no reason to end.
fn say(text: &str) {
    drop(std::io::stderr().write_all(text.as_bytes()));
}

/// Waits for a signal, also that the terminal is gone, or for the end of the time.
async fn asked_to_end(duration: Option<Duration>) {
    let hung_up = async {
        match signal(SignalKind::hangup()) {
            Ok(mut hung_up) => drop(hung_up.recv().await),
            Err(_) => std::future::pending().await,
        }
    };
    let over = async {
        match duration {
            Some(duration) => sleep(duration).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        () = asked_to_stop() => {}
        () = hung_up => {}
        () = over => {}
    }
}
