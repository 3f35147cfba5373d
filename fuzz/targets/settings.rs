//! A flag with a value on each line: the number of the flag is the line's first byte. What follows an empty line is the
//! environment's secrets, in the order of `SECRETS`.
#![no_main]

use std::sync::LazyLock;

use inlet::settings::Environment;
use libfuzzer_sys::fuzz_target;

#[path = "../../tests/it/fuzz/settings.rs"]
mod settings;

use settings::{SECRETS, Settings};

static SETTINGS: LazyLock<Settings> = LazyLock::new(Settings::new);

fuzz_target!(|input: &str| {
    let (flags, secrets) = input.split_once("\n\n").unwrap_or((input, ""));
    let flags = flags.lines().filter_map(|line| {
        let number = line.chars().next()?;
        let name = &SETTINGS.flags[number as usize % SETTINGS.flags.len()];
        Some(format!("--{name}={}", &line[number.len_utf8()..]))
    });
    let secrets = SECRETS.iter().zip(secrets.lines()).map(|(name, value)| ((*name).to_owned(), value.to_owned()));
    SETTINGS.are_refused(&flags.collect::<Vec<_>>(), &Environment::new(secrets));
});
