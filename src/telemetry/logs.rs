//! Log lines on standard error: JSON as Cloud Logging reads it, or text for a person.
//!
//! `tracing-subscriber`'s own JSON nests the fields; the contract wants them beside `message`, so the form is
//! ours. Events carry their values as fields; spans are not used.

use std::any::Any;
use std::backtrace::{Backtrace, BacktraceStatus};
use std::fmt;
use std::io::IsTerminal;

use clap::Args;
use serde::Serialize;
use serde_json::{Map, Value};
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer as _};

use crate::clock::Clock;
use crate::errors::ErrorCode;
use crate::settings::{Environment, Problems};
use crate::telemetry::tally::ErrorTally;

/// Settings of the log.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Logs")]
pub struct LogArgs {
    /// `json` or `text`; left out: `json` on Cloud Run or when standard error is no terminal, else `text`
    #[arg(long, env)]
    log_format: Option<String>,
    /// `error`, `warn`, `info`, `debug`, `trace`, or a filter such as `info,inlet::source=debug`
    #[arg(long, env, default_value = "info")]
    log_level: String,
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// One JSON object a line.
    Json,
    /// For a person at a terminal.
    Text,
}

/// Checked settings of the log.
#[derive(Debug, Clone, Serialize)]
pub struct LogConfig {
    #[serde(rename = "LOG_FORMAT")]
    format: LogFormat,
    #[serde(rename = "LOG_LEVEL")]
    level: String,
    #[serde(skip)]
    project: Option<String>,
}

impl LogArgs {
    /// Checks the settings.
    pub fn check(&self, environment: &Environment, problems: &mut Problems) -> Option<LogConfig> {
        let format = problems.parse_optional("LOG_FORMAT", self.log_format.as_ref(), |text| match text {
            "json" => Ok(LogFormat::Json),
            "text" => Ok(LogFormat::Text),
            _ => Err(format!("{text:?} is neither json nor text")),
        });
        let level = problems.parse("LOG_LEVEL", &self.log_level, |text| {
            text.parse::<EnvFilter>().map(|_| text.to_owned()).map_err(|error| error.to_string())
        });
        let project = environment.get("GOOGLE_CLOUD_PROJECT").map(str::to_owned);
        let on_cloud_run = environment.get("K_SERVICE").is_some();
        let usual =
            if on_cloud_run || !std::io::stderr().is_terminal() { LogFormat::Json } else { LogFormat::Text };
        Some(LogConfig { format: format?.unwrap_or(usual), level: level?, project })
    }
}

/// Starts the log of this process, and the [`ErrorTally`] of what is said in it. The second call of a process changes
/// nothing.
pub fn start(config: &LogConfig, clock: Clock) {
    // Libraries at `warn`; `async-nats` not at all: it says at every loss of a connection what we say ourselves.
    let filter = if config.level.contains(['=', ',']) {
        EnvFilter::new(&config.level)
    } else {
        EnvFilter::new(format!("warn,async_nats=off,inlet={}", config.level))
    };
    let colour = config.format == LogFormat::Text && std::io::stderr().is_terminal();
    let tally_clock = clock.clone();
    let lines = Lines { format: config.format, colour, clock, project: config.project.clone() };
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).event_format(lines);
    let tally = ErrorTally::new(tally_clock).ok().map(|tally| tally.with_filter(ErrorTally::filter()));
    let log = tracing_subscriber::registry().with(tally).with(lines.with_filter(filter));
    if log.try_init().is_err() {
        tracing::debug!("the log was started before");
    }
}

/// From here on a panic is said as one line of the log, and of its text only what is written in the program: a text made
/// at run time may hold what was worked on, such as what somebody said in chat.
pub fn say_panics() {
    std::panic::set_hook(Box::new(|panic| {
        let location = panic.location().map(ToString::to_string);
        let text = text_of_the_program(panic.payload());
        let backtrace = Backtrace::capture();
        let backtrace = (backtrace.status() == BacktraceStatus::Captured).then(|| backtrace.to_string());
        if tracing::dispatcher::has_been_set() {
            tracing::error!(error_code = %ErrorCode::Panic, location, backtrace, panic = text, "a panic");
        } else {
            eprintln!("inlet: a panic at {}: {text}", location.as_deref().unwrap_or("an unknown place"));
        }
    }));
}

fn text_of_the_program(payload: &(dyn Any + Send)) -> &'static str {
    payload.downcast_ref::<&'static str>().copied().unwrap_or("its text is not shown, it may hold data")
}

struct Lines {
    format: LogFormat,
    colour: bool,
    clock: Clock,
    /// On Cloud Run: the project that traces belong to.
    project: Option<String>,
}

/// What one line says.
struct Entry {
    level: Level,
    component: String,
    message: String,
    fields: Map<String, Value>,
}

impl<S, N> FormatEvent<S, N> for Lines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, _: &FmtContext<'_, S, N>, writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let mut fields = Fields(Map::new());
        event.record(&mut fields);
        let message = fields.0.remove("message").map_or_else(String::new, |value| as_text(&value));
        let level = *event.metadata().level();
        let component = component(event.metadata().target());
        let entry = Entry { level, component, message, fields: fields.0 };
        match self.format {
            LogFormat::Json => self.write_json(writer, entry),
            LogFormat::Text => self.write_text(writer, &entry),
        }
    }
}

impl Lines {
    fn write_json(&self, mut writer: Writer<'_>, entry: Entry) -> fmt::Result {
        let mut line = Map::new();
        line.insert("timestamp".into(), format!("{:.3}", self.clock.now()).into());
        line.insert("severity".into(), severity(entry.level).into());
        line.insert("message".into(), entry.message.into());
        line.insert("service".into(), "inlet".into());
        line.insert("component".into(), entry.component.into());
        if let Some(event) = entry.fields.get("eventId").and_then(Value::as_str) {
            // Of a root event all three are one.
            let trace = event.replace('-', "");
            if let Some(project) = &self.project {
                let name = format!("projects/{project}/traces/{trace}");
                line.insert("logging.googleapis.com/trace".into(), name.into());
            }
            line.insert("correlationId".into(), event.into());
            line.insert("traceId".into(), trace.into());
        }
        line.extend(entry.fields);
        writeln!(writer, "{}", Value::Object(line))
    }

    fn write_text(&self, mut writer: Writer<'_>, entry: &Entry) -> fmt::Result {
        let Entry { level, component, message, fields } = entry;
        let (start, end) = if self.colour { (colour(*level), "\x1b[0m") } else { ("", "") };
        let time = format!("{:.3}", self.clock.now());
        let time = time.get(11..23).unwrap_or(&time);
        write!(writer, "{time} {start}{:<5}{end} {component}: {message}", level.as_str())?;
        for (name, value) in fields {
            write!(writer, " {name}={}", printable(&as_text(value)))?;
        }
        writeln!(writer)
    }
}

fn severity(level: Level) -> &'static str {
    match level {
        Level::ERROR => "ERROR",
        Level::WARN => "WARNING",
        Level::INFO => "INFO",
        Level::DEBUG | Level::TRACE => "DEBUG",
    }
}

fn colour(level: Level) -> &'static str {
    match level {
        Level::ERROR => "\x1b[31m",
        Level::WARN => "\x1b[33m",
        Level::INFO => "\x1b[32m",
        Level::DEBUG | Level::TRACE => "\x1b[2m",
    }
}

/// `inlet::source::twitch::joins` is said as `source.twitch.joins`.
fn component(target: &str) -> String {
    target.strip_prefix("inlet::").unwrap_or(target).replace("::", ".")
}

/// What others say must neither begin a line that looks like ours nor move a terminal's cursor.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c }).collect()
}

fn as_text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// Collects an event's fields; names in `snake_case` become `camelCase`, as everywhere on the wire.
struct Fields(Map<String, Value>);

impl Fields {
    fn put(&mut self, field: &Field, value: Value) {
        let mut name = String::with_capacity(field.name().len());
        let mut upper = false;
        for letter in field.name().chars() {
            match letter {
                '_' => upper = true,
                _ if upper => {
                    name.push(letter.to_ascii_uppercase());
                    upper = false;
                }
                _ => name.push(letter),
            }
        }
        self.0.insert(name, value);
    }
}

impl Visit for Fields {
    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, value.into());
    }
    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, value.into());
    }
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.put(field, value.into());
    }
    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, value.into());
    }
    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, value.into());
    }
    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        self.put(field, with_causes(value).into());
    }
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.put(field, format!("{value:?}").into());
    }
}

/// A failure that comes again with every attempt is said once, and again when it is another one.
#[derive(Debug, Default)]
pub struct Said(Option<String>);

impl Said {
    /// Logs the failure if it is news.
    pub fn failure(&mut self, error_code: ErrorCode, error: &(dyn std::error::Error + 'static), what: &str) {
        let error = with_causes(error);
        if self.0.as_ref() != Some(&error) {
            tracing::error!(%error_code, error, "{what}");
            self.0 = Some(error);
        }
    }

    /// It works: the same failure is news again.
    pub fn over(&mut self) {
        self.0 = None;
    }
}

/// An error and what caused it, in one line: each layer says its own half.
pub fn with_causes(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let said = error.to_string();
        // Some libraries repeat their source in their own text.
        if !text.ends_with(&said) {
            text.push_str(": ");
            text.push_str(&said);
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn components_are_paths_of_ours_or_names_of_libraries() {
        assert_eq!(component("inlet::source::twitch::joins"), "source.twitch.joins");
        assert_eq!(component("async_nats"), "async_nats");
    }

    /// What is logged meanwhile.
    fn logged(format: LogFormat, work: impl FnOnce()) -> String {
        let written = tempfile::NamedTempFile::new().unwrap();
        let writer = Arc::new(written.reopen().unwrap());
        let clock = Clock::by_hand("2026-11-20T05:51:20.612Z".parse().unwrap());
        let lines = Lines { format, colour: false, clock, project: None };
        let log = tracing_subscriber::fmt().with_writer(writer).event_format(lines).finish();
        tracing::subscriber::with_default(log, work);
        std::fs::read_to_string(written.path()).unwrap()
    }

    #[test]
    fn of_a_panic_only_what_the_program_itself_says_is_shown() {
        say_panics();
        let said = "somebody's words, and a token".to_owned();
        let log = logged(LogFormat::Json, || {
            let made = std::panic::catch_unwind(|| assert!(said.is_empty(), "while reading {said}"));
            let sliced = std::panic::catch_unwind(|| said[100..].to_owned());
            let written = std::panic::catch_unwind(|| unreachable!("no such state"));
            assert!(made.is_err() && sliced.is_err() && written.is_err());
        });
        drop(std::panic::take_hook());
        assert!(log.lines().all(|line| serde_json::from_str::<Value>(line).is_ok()), "{log}");
        assert_eq!(log.matches("\"location\":\"src/telemetry/logs.rs:").count(), 3, "{log}");
        assert!(log.contains("no such state") && !log.contains("words"), "{log}");
    }

    #[test]
    fn what_others_say_stays_within_its_line() {
        let log = logged(LogFormat::Text, || tracing::warn!(error = "a\n00:00 ERROR b\x1b[2J\u{9b}c", "odd"));
        assert_eq!(log.lines().count(), 1, "{log:?}");
        assert!(log.trim_end().chars().all(|c| !c.is_control()) && log.contains("a\u{fffd}00:00"), "{log:?}");
        let log = logged(LogFormat::Json, || tracing::warn!(error = "a\nb\x1b", "odd"));
        assert!(log.lines().count() == 1 && log.contains("a\\nb\\u001b"), "{log:?}");
    }

    #[test]
    fn a_failure_is_said_once_and_again_when_it_was_over() {
        let log = logged(LogFormat::Text, || {
            let mut said = Said::default();
            let fail = |said: &mut Said, why: &str| {
                said.failure(ErrorCode::StoreRefused, &std::io::Error::other(why.to_owned()), "no use");
            };
            for why in ["a", "a", "b", "b"] {
                fail(&mut said, why);
            }
            said.over();
            fail(&mut said, "b");
        });
        assert_eq!(log.lines().count(), 3, "{log}");
    }

    #[test]
    fn causes_are_said_once() {
        #[derive(Debug, thiserror::Error)]
        #[error("could not open the folder")]
        struct Outer(#[source] std::io::Error);
        let error = Outer(std::io::Error::other("disk on fire"));
        assert_eq!(with_causes(&error), "could not open the folder: disk on fire");
    }
}
