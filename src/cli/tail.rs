//! `inlet tail`: what is published, as it is published.

use clap::Args;
use futures_util::StreamExt as _;

use super::client::{ClientArgs, Service};
use super::printer::{Counted, Printer};
use super::{Failure, asked_to_stop, checked};
use crate::app::{AppArgs, AppConfig, open_bus};
use crate::bus::{Driver, Start, Wanted};
use crate::clock::Clock;
use crate::errors::ErrorCode;
use crate::settings::Environment;
use crate::source::twitch::lines::Lines;
use crate::telemetry::logs;

#[derive(Debug, Args)]
pub(super) struct TailArgs {
    /// Print the envelopes as they are, one a line
    #[arg(long)]
    json: bool,
    /// Begin behind this position of the stream; 0 is its start. Left out: what comes from now on
    #[arg(long)]
    after: Option<u64>,
    /// End after so many
    #[arg(long)]
    count: Option<u64>,
    #[command(flatten)]
    client: ClientArgs,
    #[command(flatten)]
    app: AppArgs,
}

pub(super) async fn run(args: &TailArgs, environment: &Environment) -> Result<(), Failure> {
    let (config, service) = checked(|problems| {
        let config = args.app.check(environment, problems)?;
        let service = args.client.check(environment, config.http.port, problems)?;
        Some((config, service))
    })?;
    logs::start(&config.logs, Clock::system());
    let printer = Counted::new(Printer::new(args.json, environment), args.count);
    tokio::select! {
        () = asked_to_stop() => Ok(()),
        done = async {
            match config.path.bus.driver {
                Driver::Nats => follow_nats(args, &config, printer).await,
                Driver::Embedded => follow_service(args, &service, printer).await,
            }
        } => done,
    }
}

/// Longer than any message that a stream takes by default.
const LONGEST_EVENT: usize = 8 << 20;

async fn follow_nats(args: &TailArgs, config: &AppConfig, mut counted: Counted) -> Result<(), Failure> {
    let path = &config.path;
    let bus = open_bus(path, &config.data_dir, &Clock::system()).await?;
    let mut start = args.after.map_or(Start::End, |after| Start::Position(after.saturating_add(1)));
    loop {
        let mut follower = bus.follow(start, Wanted::Whole).await?;
        while let Some(Ok(batch)) = follower.next().await {
            for stored in &batch.messages {
                start = Start::Position(stored.position + 1);
                if !stored.id.is_some_and(|id| id.is_dead_letter) && !counted.print(&stored.payload)? {
                    return Ok(());
                }
            }
        }
        let mut state = bus.state();
        tracing::warn!(error_code = %ErrorCode::BusUnavailable, "the stream was interrupted; following again");
        tokio::time::sleep(std::time::Duration::from_millis(500)).await;
        drop(state.wait_for(|state| *state == crate::bus::BusState::Up).await);
    }
}

/// Through `/v1/stream`: a stream of `id:` and `data:` lines, an empty one behind each event.
async fn follow_service(args: &TailArgs, service: &Service, mut counted: Counted) -> Result<(), Failure> {
    service.greet().await?;
    let mut request = service.get("/v1/stream");
    if let Some(after) = args.after {
        request = request.header("Last-Event-ID", after.to_string());
    }
    let mut body = service.send(request).await?.bytes_stream();
    let mut lines = Lines::up_to(LONGEST_EVENT);
    let mut is_cut = false;
    while let Some(piece) = body.next().await {
        lines.buffer().extend_from_slice(&piece.map_err(|error| service.away(error))?);
        while let Some(crate::source::twitch::lines::Line::Whole(line)) = lines.next_line() {
            is_cut |= line.starts_with(b"event: cut");
            if let Some(data) = line.strip_prefix(b"data: ") {
                if is_cut {
                    return Err(Failure::Unavailable(format!(
                        "the service ended the stream: {}",
                        String::from_utf8_lossy(data)
                    )));
                }
                if !counted.print(data)? {
                    return Ok(());
                }
            }
        }
    }
    Err(Failure::Unavailable("the service ended the stream".to_owned()))
}
