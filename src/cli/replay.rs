//! `inlet replay`: captured lines through the path. Beside a running service that holds the embedded stream it
//! goes through that service.

use std::io::{SeekFrom, Write as _};
use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use prometheus::Registry;
use tokio::fs::File;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncSeekExt as _};
use tokio::time::Instant;
use tokio_util::io::ReaderStream;

use super::client::{ClientArgs, Service};
use super::held::{Held, hold};
use super::printer::Printer;
use super::{Failure, checked};
use crate::app::{AppArgs, AppConfig, Around, lay_path, open_bus, open_people, open_store};
use crate::bus::{Bus, Start, Wanted};
use crate::clock::Clock;
use crate::envelope::Origin;
use crate::envelope::receipt::Outcomes;
use crate::pipeline::PipelineMetrics;
use crate::settings::Environment;
use crate::source::twitch::{Normalizer, ReplayDoor, TwitchMetrics};
use crate::tasks::Tasks;
use crate::telemetry::logs;

#[derive(Debug, Args)]
pub(super) struct ReplayArgs {
    /// Files of raw IRC lines; `-` is standard input
    #[arg(required = true)]
    files: Vec<PathBuf>,
    /// Print what was published, read back from the stream
    #[arg(long)]
    show: bool,
    /// Print JSON: the envelopes of --show as they are, and the summary as the last line
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    client: ClientArgs,
    #[command(flatten)]
    app: AppArgs,
}

pub(super) async fn run(args: &ReplayArgs, environment: &Environment) -> Result<(), Failure> {
    let (config, service) = checked(|problems| {
        let config = args.app.check(environment, problems)?;
        let service = args.client.check(environment, config.http.port, problems)?;
        Some((config, service))
    })?;
    let clock = Clock::system();
    logs::start(&config.logs, clock.clone());
    let input = open(&args.files).await?;
    let held =
        if config.path.has_embedded_parts() { Some(hold(&config, "replay", &service).await?) } else { None };
    let outcomes = match held {
        Some(Held::ByService) => through_service(&service, args, input).await?,
        Some(Held::ByUs(_)) | None => {
            here((args, Printer::new(args.json, environment)), &config, clock, input).await?
        }
    };
    summarize(args, outcomes)
}

type Input = Box<dyn AsyncRead + Send + Unpin>;

/// The files, one behind the other. All are opened first, so that a wrong name costs nothing.
async fn open(files: &[PathBuf]) -> Result<Input, Failure> {
    let mut input: Input = Box::new(tokio::io::empty());
    for path in files {
        input = if path.as_os_str() == "-" {
            Box::new(input.chain(tokio::io::stdin()))
        } else {
            let failed = |error| Failure::Failed(format!("{}: {error}", path.display()));
            let mut file = File::open(path).await.map_err(failed)?;
            if ends_within_a_line(&mut file).await.map_err(failed)? {
                Box::new(input.chain(file).chain(&b"\n"[..]))
            } else {
                Box::new(input.chain(file))
            }
        };
    }
    Ok(input)
}

/// Whether the next file would go on in this one's last line.
async fn ends_within_a_line(file: &mut File) -> std::io::Result<bool> {
    // A pipe has no length; its end is taken as it comes.
    let is_within = match file.seek(SeekFrom::End(-1)).await {
        Ok(_) => file.read_u8().await? != b'\n',
        Err(_) => false,
    };
    match file.rewind().await {
        Err(error) if error.kind() != std::io::ErrorKind::NotSeekable => Err(error),
        _ => Ok(is_within),
    }
}

async fn here(
    (args, printer): (&ReplayArgs, Printer),
    config: &AppConfig,
    clock: Clock,
    input: Input,
) -> Result<Outcomes, Failure> {
    let path = &config.path;
    let bus = open_bus(path, &config.data_dir, &clock).await?;
    let registry = Registry::new();
    let failed = |error: prometheus::Error| Failure::Failed(error.to_string());
    let metrics = Arc::new(PipelineMetrics::new(&registry).map_err(failed)?);
    let twitch = Arc::new(TwitchMetrics::new(&registry).map_err(failed)?);
    let before = if args.show { Some(end_of(&bus).await?) } else { None };
    let store = open_store(path, &config.data_dir, &registry)?;
    let people = open_people(path, store, &bus, &registry, &clock)?;
    let mut tasks = Tasks::new();
    let around = Around::new(&bus, &people, &metrics, &clock);
    let intake = lay_path(path, around, &mut tasks).await?;
    let door = ReplayDoor::new(intake, Normalizer::new(Origin::Replay, path.shared_chat(), twitch), clock);
    let replayed =
        door.replay(input).await.map_err(|error| Failure::Failed(format!("cannot read: {error}")))?;
    door.close();
    tasks.join("pipeline").await;
    if let Some(users) = &people.users {
        users.finish(Instant::now() + config.shutdown_grace).await;
    }
    if let Some(before) = before {
        show(&bus, before, printer).await?;
    }
    replayed.ok_or_else(|| Failure::Failed("the door was closed".to_owned()))
}

/// The position behind the last message.
async fn end_of(bus: &Arc<dyn Bus>) -> Result<u64, Failure> {
    let mut follower = bus.follow(Start::Position(0), Wanted::Headers).await?;
    let mut end = 1;
    while let Some(batch) = follower.next().await {
        let batch = batch?;
        end = batch.messages.last().map_or(end, |last| last.position + 1);
        if batch.is_end() {
            break;
        }
    }
    Ok(end)
}

async fn show(bus: &Arc<dyn Bus>, from: u64, mut printer: Printer) -> Result<(), Failure> {
    let mut follower = bus.follow(Start::Position(from), Wanted::Whole).await?;
    while let Some(batch) = follower.next().await {
        let batch = batch?;
        for stored in &batch.messages {
            if !printer.print(&stored.payload)? {
                return Ok(());
            }
        }
        if batch.is_end() {
            break;
        }
    }
    Ok(())
}

async fn through_service(service: &Service, args: &ReplayArgs, input: Input) -> Result<Outcomes, Failure> {
    if args.show {
        return Err(Failure::Failed(
            "a service runs: follow it with `inlet tail` instead of --show".to_owned(),
        ));
    }
    tracing::info!(service = service.shown(), "replaying through the running service");
    let body = reqwest::Body::wrap_stream(ReaderStream::new(input));
    let response = service.send(service.post("/admin/replay").body(body)).await?;
    response.json().await.map_err(|error| service.away(error))
}

fn summarize(args: &ReplayArgs, outcomes: Outcomes) -> Result<(), Failure> {
    let Outcomes { received, published, stored, duplicates, dead_lettered, refused, barred, lost } = outcomes;
    let line = if args.json {
        serde_json::to_string(&outcomes).unwrap_or_default()
    } else {
        let stored = if stored > 0 { format!("{stored} in the outbox, ") } else { String::new() };
        let barred =
            if barred > 0 { format!(", {barred} of ignored or forgotten users") } else { String::new() };
        format!(
            "{received} received: {published} published, {stored}{duplicates} known, {dead_lettered} dead letters{barred}"
        )
    };
    // The summary of a human's run goes beside the envelopes, not among them.
    let written =
        if args.json { writeln!(std::io::stdout(), "{line}") } else { writeln!(std::io::stderr(), "{line}") };
    written.map_err(|error| Failure::Failed(error.to_string()))?;
    match refused + lost {
        0 => Ok(()),
        missing => Err(Failure::Failed(format!("{missing} events did not reach the stream"))),
    }
}
