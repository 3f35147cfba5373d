//! What a person types: the commands, their settings, their exit codes.

mod channel;
mod check;
mod client;
mod demo;
mod held;
mod login;
mod printer;
mod probe;
mod replay;
mod serve;
pub mod simulate;
mod tail;
mod user;

use std::io::Write as _;
use std::num::NonZero;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{CommandFactory as _, FromArgMatches as _, Parser, Subcommand};
use thiserror::Error;

use crate::app::AppError;
use crate::audit::Audited;
use crate::bus::BusError;
use crate::clock;
use crate::errors::ErrorCode;
use crate::pipeline::OutboxError;
use crate::settings::{Environment, Problems};
use crate::telemetry::logs::{say_panics, with_causes};

const AFTER_HELP: &str = "\
Every flag is also an environment variable: --twitch-channels is TWITCH_CHANNELS.
Secrets have no flag; they are read from NAME, or from the file that NAME_FILE names:
  TWITCH_BOT_ACCESS_TOKEN   token of TWITCH_BOT_USERNAME, with or without `oauth:`
  TWITCH_BOT_REFRESH_TOKEN  what gets the next one
  TWITCH_CLIENT_SECRET      secret of TWITCH_CLIENT_ID; a public client has none
  ADMIN_TOKEN               guards /_debug, /admin and /v1/stream; without it they answer on this machine alone
  ADMIN_TOKEN_NEXT          opens the same, while it takes the other's place
  STREAM_TOKEN              opens /v1/stream alone, also as ?access_token=

Exit codes: 0 done, 1 failed, 64 usage, 69 unavailable, 78 configuration.";

/// Live chat in, de-duplicated envelopes out, on a durable stream.
#[derive(Debug, Parser)]
#[command(name = "inlet", version, after_help = AFTER_HELP, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// The service: chat in, stream out, the operator's HTTP on PORT
    #[command(after_help = AFTER_HELP)]
    Serve(Box<serve::ServeArgs>),
    /// The service on embedded parts against a simulated Twitch: no account, no network, no server, nothing left behind
    Demo(demo::DemoArgs),
    /// Feed raw captured IRC lines through the same path; running it twice publishes nothing new
    #[command(after_help = AFTER_HELP)]
    Replay(Box<replay::ReplayArgs>),
    /// Follow published envelopes
    #[command(after_help = AFTER_HELP)]
    Tail(Box<tail::TailArgs>),
    /// Add, remove and list channels while the service runs
    Channel(channel::ChannelArgs),
    /// Users: show, list, note, tag, ignore, forget
    #[command(after_help = AFTER_HELP)]
    User(Box<user::UserArgs>),
    /// Look at everything that serve would need, and change nothing: one line each, exit 0, 69 (away) or 78
    #[command(after_help = AFTER_HELP)]
    Check(Box<check::CheckArgs>),
    /// Let Inlet read chat as an account: shows a code to enter at Twitch, and stores the token
    #[command(after_help = AFTER_HELP)]
    Login(Box<login::LoginArgs>),
    /// Ask the local service how it is: exit 0 or 1
    Probe(probe::ProbeArgs),
    /// A stand-in Twitch chat server, for development, tests and load
    #[command(after_help = simulate::after_help())]
    Simulate(Box<simulate::SimulateArgs>),
}

/// How a command ends when it does not end well.
#[derive(Debug, Error)]
enum Failure {
    /// It ran, and something went wrong.
    #[error("{0}")]
    Failed(String),
    /// What was typed makes no sense.
    #[error("{0}")]
    Usage(String),
    /// Something it needs is away.
    #[error("{0}")]
    Unavailable(String),
    /// The settings, or what they name, do not fit.
    #[error("{0}")]
    Configuration(String),
}

impl Failure {
    fn code(&self) -> u8 {
        match self {
            Self::Failed(_) => 1,
            Self::Usage(_) => 64,
            Self::Unavailable(_) => 69,
            Self::Configuration(_) => 78,
        }
    }
}

impl From<AppError> for Failure {
    fn from(error: AppError) -> Self {
        let text = with_causes(&error);
        if error.is_configuration() { Self::Configuration(text) } else { Self::Failed(text) }
    }
}

impl From<OutboxError> for Failure {
    fn from(error: OutboxError) -> Self {
        AppError::from(error).into()
    }
}

impl From<BusError> for Failure {
    fn from(error: BusError) -> Self {
        let text = with_causes(&error);
        match error {
            BusError::Away(_) | BusError::Interrupted(_) => Self::Unavailable(text),
            BusError::Unfit(_) | BusError::Settings(_) => Self::Configuration(text),
            BusError::Embedded(_) => Self::Failed(text),
        }
    }
}

impl<E: std::error::Error + 'static> From<Audited<E>> for Failure
where
    Self: From<E>,
{
    fn from(error: Audited<E>) -> Self {
        match error {
            Audited::NotRecorded(error) => Self::Unavailable(with_causes(&error)),
            Audited::Failed(error) => error.into(),
        }
    }
}

/// Runs the command of this process's arguments.
pub fn main() -> ExitCode {
    say_panics();
    crate::tls::install_provider();
    let environment = Environment::new(std::env::vars_os().filter_map(|(name, value)| {
        // What is no UTF-8 is no setting of ours.
        Some((name.into_string().ok()?, value.into_string().ok()?))
    }));
    // Names of variables are shown in --help, their values never.
    let command = Cli::command().mut_subcommands(|command| command.mut_args(|arg| arg.hide_env_values(true)));
    let cli = match command.try_get_matches().and_then(|matches| Cli::from_arg_matches(&matches)) {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    match run(cli.command, &environment) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("inlet: {failure}");
            ExitCode::from(failure.code())
        }
    }
}

fn usage(error: &clap::Error) -> ExitCode {
    // A closed pipe is all that can go wrong here, and then nobody reads on.
    drop(error.print());
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => ExitCode::SUCCESS,
        _ => ExitCode::from(64),
    }
}

/// What is read back from the stream, to count, need not wait for what is on its way into it. More threads than that have
/// nothing to do, and a machine may have many processors.
fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, NonZero::get).min(2)
}

fn run(command: Command, environment: &Environment) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(threads())
        .enable_all()
        .build()
        .map_err(|error| Failure::Failed(format!("cannot start: {error}")))?;
    let done = runtime.block_on(async {
        match command {
            Command::Serve(args) => serve::run(&args, environment).await,
            Command::Demo(args) => demo::run(&args, environment).await,
            Command::Replay(args) => replay::run(&args, environment).await,
            Command::Tail(args) => tail::run(&args, environment).await,
            Command::Channel(args) => channel::run(&args, environment).await,
            Command::User(args) => user::run(&args, environment).await,
            Command::Check(args) => check::run(&args, environment).await,
            Command::Login(args) => login::run(&args, environment).await,
            Command::Probe(args) => probe::run(&args, environment).await,
            Command::Simulate(args) => simulate::run(*args, clock::system_milliseconds, asked_to_stop())
                .await
                .map_err(|error| Failure::Failed(with_causes(&error))),
        }
    });
    // A read of standard input that nobody waits for any more must not hold up the end.
    runtime.shutdown_background();
    done
}

/// Checks settings, and reports every problem at once.
fn checked<T>(check: impl FnOnce(&mut Problems) -> Option<T>) -> Result<T, Failure> {
    let mut problems = Problems::default();
    let value = check(&mut problems);
    match value {
        Some(value) if problems.lines().is_empty() => Ok(value),
        _ => Err(Failure::Configuration(format!("bad settings\n  {}", problems.lines().join("\n  ")))),
    }
}

/// Prints a line that somebody asked for.
fn print(line: &str) -> Result<(), Failure> {
    writeln!(std::io::stdout(), "{line}").map_err(|error| Failure::Failed(error.to_string()))
}

/// Waits for SIGINT or SIGTERM.
async fn asked_to_stop() {
    use tokio::signal::unix::{SignalKind, signal};
    match (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) {
        (Ok(mut terminate), Ok(mut interrupt)) => {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        }
        (Err(error), _) | (_, Err(error)) => {
            tracing::error!(error_code = %ErrorCode::Internal, error = %error, "signals cannot be heard; only SIGKILL will end this");
            std::future::pending::<()>().await;
        }
    }
}
