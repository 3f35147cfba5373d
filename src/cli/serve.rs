//! `inlet serve`.

use clap::Args;

use super::{Failure, asked_to_stop, checked};
use crate::app::{App, AppArgs};
use crate::clock::Clock;
use crate::settings::Environment;
use crate::telemetry::logs;

#[derive(Debug, Args)]
pub(super) struct ServeArgs {
    #[command(flatten)]
    app: AppArgs,
}

pub(super) async fn run(args: &ServeArgs, environment: &Environment) -> Result<(), Failure> {
    let config = checked(|problems| args.app.check(environment, problems))?;
    let clock = Clock::system();
    logs::start(&config.logs, clock.clone());
    let stop = asked_to_stop();
    tokio::pin!(stop);
    let app = tokio::select! {
        biased;
        // Polled first, so that from here on a signal is a request to end well.
        () = &mut stop => return Ok(()),
        app = App::start(config, clock) => app?,
    };
    app.run(stop).await?;
    tracing::info!("bye");
    Ok(())
}
