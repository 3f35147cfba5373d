//! `inlet check`: whether a start would find what it needs, and what to do where it would not.

use std::io::{ErrorKind, Write as _};
use std::pin::pin;

use clap::Args;
use futures_util::{FutureExt as _, StreamExt as _};

use super::client::{ClientArgs, Service};
use super::printer::{for_terminal, has_colours};
use super::{Failure, asked_to_stop, checked};
use crate::app::AppArgs;
use crate::app::check::{Finding, Look, SERVICE, Said, Verdict, findings, looks};
use crate::clock::Clock;
use crate::data_dir;
use crate::settings::Environment;

#[derive(Debug, Args)]
pub(super) struct CheckArgs {
    /// Print JSON, one object a line
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    client: ClientArgs,
    #[command(flatten)]
    app: AppArgs,
}

pub(super) async fn run(args: &CheckArgs, environment: &Environment) -> Result<(), Failure> {
    let (config, service) = checked(|problems| {
        let config = args.app.check(environment, problems);
        let port = config.as_ref().map_or(0, |config| config.http.port);
        let service = args.client.check(environment, port, problems);
        Some((config?, service?))
    })?;
    let seen = data_dir::look(&config.data_dir);
    let settings: Look<'_> = ("settings", std::future::ready(Said::ok("all can be used")).boxed());
    let mut all = vec![settings];
    all.extend(looks(&config, &seen, &Clock::system()));
    let holder = seen.as_ref().ok().and_then(|seen| seen.holder.as_deref());
    if holder.is_some_and(|holder| holder.starts_with(SERVICE)) {
        all.push(("service", look_at_service(&service).boxed()));
    }
    let has_colours = has_colours(environment);
    let told = async {
        let mut findings = pin!(findings(all));
        let mut worst = Vec::new();
        while let Some(finding) = findings.next().await {
            if finding.verdict > Verdict::Warning {
                worst.push((finding.verdict, finding.part));
            }
            if !print(&finding, args.json, has_colours)? {
                break;
            }
        }
        verdict(&worst)
    };
    tokio::select! {
        () = asked_to_stop() => Err(Failure::Failed("ended before all was looked at".to_owned())),
        told = told => told,
    }
}

/// The service that holds the folder: commands go through it.
async fn look_at_service(service: &Service) -> Said {
    let shown = service.shown();
    if let Err(failure) = service.greet().await {
        let why = failure.to_string();
        return Said::warning(format!("{why}; commands that need it want its address in INLET_URL"));
    }
    match service.send(service.get("/readyz")).await {
        Ok(_) => Said::ok(format!("{shown} is ready; commands go through it")),
        Err(_) => {
            Said::warning(format!("{shown} answers and is not ready; {shown}/readyz says what it waits for"))
        }
    }
}

/// One line; false when nobody reads any more.
fn print(finding: &Finding, json: bool, has_colours: bool) -> Result<bool, Failure> {
    let Finding { part, verdict, said, took_ms } = finding;
    let line = if json {
        serde_json::to_string(finding).unwrap_or_default()
    } else {
        let (colour, end) = match verdict {
            _ if !has_colours => ("", ""),
            Verdict::Ok => ("\x1b[32m", "\x1b[0m"),
            Verdict::Warning => ("\x1b[33m", "\x1b[0m"),
            Verdict::Away | Verdict::Bad => ("\x1b[1;31m", "\x1b[0m"),
        };
        // A server's own words may stand in it.
        format!("{colour}{:<8}{end} {part:<8} {} ({took_ms} ms)", verdict.as_str(), for_terminal(said))
    };
    match writeln!(std::io::stdout(), "{line}") {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(Failure::Failed(format!("cannot write to standard output: {error}"))),
    }
}

fn verdict(worst: &[(Verdict, &'static str)]) -> Result<(), Failure> {
    let named = |wanted| {
        let parts: Vec<_> =
            worst.iter().filter(|(verdict, _)| *verdict == wanted).map(|(_, part)| *part).collect();
        (!parts.is_empty()).then(|| parts.join(", "))
    };
    match (named(Verdict::Bad), named(Verdict::Away)) {
        (Some(parts), _) => Err(Failure::Configuration(format!("to be changed: {parts}"))),
        (None, Some(parts)) => Err(Failure::Unavailable(format!("away: {parts}"))),
        (None, None) => Ok(()),
    }
}
