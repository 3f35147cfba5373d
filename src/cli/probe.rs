//! `inlet probe`: the image's health check, since the image has no shell.

use std::time::Duration;

use clap::Args;

use super::client::ClientArgs;
use super::{Failure, checked};
use crate::settings::{self, Environment};

const PATIENCE: Duration = Duration::from_secs(2);

#[derive(Debug, Args)]
pub(super) struct ProbeArgs {
    /// What to ask for
    #[arg(default_value = "/livez")]
    path: String,
    /// Port of the local service
    #[arg(long, env, default_value = "8080")]
    port: String,
    #[command(flatten)]
    client: ClientArgs,
}

pub(super) async fn run(args: &ProbeArgs, environment: &Environment) -> Result<(), Failure> {
    let service = checked(|problems| {
        let port = problems.parse("PORT", &args.port, settings::number(1, u64::from(u16::MAX)));
        if !args.path.starts_with('/') {
            problems.add("PATH", "must begin with a slash");
        }
        args.client.check(environment, u16::try_from(port?).ok()?, problems)
    })
    // Whatever is wrong, a health check knows but one bad end.
    .map_err(|failure| Failure::Failed(failure.to_string()))?;
    match service.send(service.get(&args.path).timeout(PATIENCE)).await {
        Ok(_) => Ok(()),
        Err(failure) => Err(Failure::Failed(failure.to_string())),
    }
}
