//! Settings of any kind: either there is a configuration, or it is said what is wrong. The tests feed it combinations of values
//! on the edge, the package in `fuzz/` whatever a fuzzer led by coverage thinks of.

use clap::{Args as _, FromArgMatches as _};
use inlet::app::AppArgs;
use inlet::settings::{Environment, Problems};

/// Some of what comes from the environment alone.
pub const SECRETS: [&str; 4] =
    ["ADMIN_TOKEN", "TWITCH_BOT_ACCESS_TOKEN", "TWITCH_BOT_ACCESS_TOKEN_FILE", "STREAM_TOKEN"];

pub struct Settings {
    command: clap::Command,
    /// The name of every flag.
    pub flags: Vec<String>,
}

impl Settings {
    pub fn new() -> Self {
        let command = AppArgs::augment_args(clap::Command::new("inlet"));
        let flags = command.get_arguments().filter_map(|arg| arg.get_long().map(str::to_owned)).collect();
        Self { command, flags }
    }

    /// Whether these are refused, and it is said why.
    pub fn are_refused(&self, given: &[String], environment: &Environment) -> bool {
        let arguments = std::iter::once("inlet").chain(given.iter().map(String::as_str));
        let Ok(matches) = self.command.clone().try_get_matches_from(arguments) else { return true };
        let mut problems = Problems::default();
        let config = AppArgs::from_arg_matches(&matches).unwrap().check(environment, &mut problems);
        assert!(config.is_some() || !problems.lines().is_empty());
        !problems.lines().is_empty()
    }
}
