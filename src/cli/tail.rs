//! `inlet tail`: what is published, as it is published.

use std::io::{IsTerminal as _, Write as _};

use clap::Args;
use futures_util::StreamExt as _;
use serde::Deserialize;

use super::client::{ClientArgs, Service};
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
    tokio::select! {
        () = asked_to_stop() => Ok(()),
        done = async {
            match config.path.bus.driver {
                Driver::Nats => follow_nats(args, &config).await,
                Driver::Embedded => follow_service(args, &service).await,
            }
        } => done,
    }
}

/// Longer than any message that a stream takes by default.
const LONGEST_EVENT: usize = 8 << 20;

/// Prints until `count` is reached or nobody reads any more; says whether to go on.
struct Counted {
    printer: Printer,
    left: Option<u64>,
}

impl Counted {
    fn new(args: &TailArgs) -> Self {
        Self { printer: Printer::new(args.json), left: args.count }
    }

    fn print(&mut self, envelope: &[u8]) -> bool {
        if self.left == Some(0) || !self.printer.print(envelope) {
            return false;
        }
        self.left = self.left.map(|left| left - 1);
        self.left != Some(0)
    }
}

async fn follow_nats(args: &TailArgs, config: &AppConfig) -> Result<(), Failure> {
    let path = &config.path;
    let bus = open_bus(path, &config.data_dir, &Clock::system()).await?;
    let mut start = args.after.map_or(Start::End, |after| Start::Position(after.saturating_add(1)));
    let mut counted = Counted::new(args);
    loop {
        let mut follower = bus.follow(start, Wanted::Whole).await?;
        while let Some(Ok(batch)) = follower.next().await {
            for stored in &batch.messages {
                start = Start::Position(stored.position + 1);
                if !stored.id.is_some_and(|id| id.is_dead_letter) && !counted.print(&stored.payload) {
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
async fn follow_service(args: &TailArgs, service: &Service) -> Result<(), Failure> {
    let mut request = service.get("/v1/stream");
    if let Some(after) = args.after {
        request = request.header("Last-Event-ID", after.to_string());
    }
    let mut body = service.send(request).await?.bytes_stream();
    let mut counted = Counted::new(args);
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
                if !counted.print(data) {
                    return Ok(());
                }
            }
        }
    }
    Err(Failure::Unavailable("the service ended the stream".to_owned()))
}

/// Writes envelopes to standard output, for a person or as they are.
pub(super) struct Printer {
    json: bool,
    is_terminal: bool,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Seen {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    occurred_at: String,
    #[serde(default)]
    source: SeenSource,
    user: Option<SeenUser>,
    #[serde(default)]
    payload: SeenPayload,
    /// Of a dead letter.
    reason: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct SeenSource {
    channel: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct SeenUser {
    display_name: String,
    #[serde(default)]
    tags: Vec<String>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct SeenPayload {
    text: Option<String>,
    system_text: Option<String>,
    action: Option<String>,
    target_login: Option<String>,
    is_action: bool,
    /// Of a gap.
    from: Option<String>,
    cause: Option<String>,
}

impl Printer {
    pub(super) fn new(json: bool) -> Self {
        Self { json, is_terminal: std::io::stdout().is_terminal() }
    }

    /// Prints one; false when nobody reads any more.
    pub(super) fn print(&mut self, envelope: &[u8]) -> bool {
        let mut out = std::io::stdout().lock();
        let written = if self.json {
            self.write_json(envelope, &mut out)
        } else {
            writeln!(out, "{}", self.readable(envelope))
        };
        written.and_then(|()| out.flush()).is_ok()
    }

    /// As it is; what would drive a terminal is escaped there, which is the same JSON.
    fn write_json(&self, envelope: &[u8], out: &mut impl std::io::Write) -> std::io::Result<()> {
        if self.is_terminal {
            for letter in String::from_utf8_lossy(envelope).chars() {
                if is_harmless(letter) {
                    write!(out, "{letter}")?;
                } else {
                    write!(out, "\\u{:04x}", u32::from(letter))?;
                }
            }
        } else {
            out.write_all(envelope)?;
        }
        out.write_all(b"\n")
    }

    fn readable(&self, envelope: &[u8]) -> String {
        let Ok(seen) = serde_json::from_slice::<Seen>(envelope) else {
            return format!("? {}", for_terminal(&String::from_utf8_lossy(envelope)));
        };
        let time = seen.occurred_at.get(11..19).unwrap_or("--:--:--");
        if let Some(reason) = &seen.reason {
            return format!("{time} dead letter: {}", for_terminal(reason));
        }
        let (dim, bold, end) =
            if self.is_terminal { ("\x1b[2m", "\x1b[1m", "\x1b[0m") } else { ("", "", "") };
        let channel = for_terminal(&seen.source.channel);
        let name = seen.user.as_ref().map(|user| for_terminal(&user.display_name)).unwrap_or_default();
        let payload = &seen.payload;
        let text = for_terminal(payload.text.as_deref().unwrap_or_default());
        let what = match seen.kind.as_str() {
            "external.chat.message.v1" if payload.is_action => format!("{bold}{name}{end} {text}"),
            "external.chat.message.v1" => format!("{bold}{name}{end}: {text}"),
            "external.chat.moderation.v1" => format!(
                "* {} {}",
                for_terminal(payload.action.as_deref().unwrap_or_default()),
                for_terminal(payload.target_login.as_deref().unwrap_or_default())
            ),
            "internal.source.gap.v1" => format!(
                "* not heard since {} ({})",
                for_terminal(payload.from.as_deref().unwrap_or_default()),
                for_terminal(payload.cause.as_deref().unwrap_or_default())
            ),
            _ => format!("* {} {text}", for_terminal(payload.system_text.as_deref().unwrap_or_default())),
        };
        let tags: Vec<_> = seen
            .user
            .iter()
            .flat_map(|user| &user.tags)
            .filter(|tag| !tag.starts_with("PROVIDER_"))
            .collect();
        let tags = tags.iter().fold(String::new(), |shown, tag| shown + " " + &for_terminal(tag));
        format!("{dim}{time} #{channel}{end} {}{dim}{tags}{end}", what.trim_end())
    }
}

/// Without control characters: a viewer's text must not drive the terminal.
fn for_terminal(text: &str) -> String {
    text.chars().filter(|letter| is_harmless(*letter)).collect()
}

/// Neither a control character nor a sign that turns the direction of writing, by which a line can be made to look
/// like another.
fn is_harmless(letter: char) -> bool {
    !letter.is_control() && !matches!(letter, '\u{202A}'..='\u{202E}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_person_reads_what_was_said_and_no_control_character() {
        let printer = Printer { json: false, is_terminal: false };
        let message = br#"{"type":"external.chat.message.v1","occurredAt":"2026-11-20T05:51:20.612Z",
            "source":{"channel":"c"},"user":{"displayName":"N\u001b[31m","tags":["NEW_USER","PROVIDER_TWITCH"]},
            "payload":{"text":"hi\u0007\u202e there","isAction":false}}"#;
        assert_eq!(printer.readable(message), "05:51:20 #c N[31m: hi there NEW_USER");
        let ban = br#"{"type":"external.chat.moderation.v1","occurredAt":"2026-11-20T05:51:20.612Z",
            "source":{"channel":"c"},"payload":{"action":"ban","targetLogin":"x"}}"#;
        assert_eq!(printer.readable(ban), "05:51:20 #c * ban x");
        let gap = br#"{"type":"internal.source.gap.v1","occurredAt":"2026-11-20T05:51:20.612Z",
            "source":{"channel":"c"},"payload":{"from":"2026-11-20T05:51:18.001Z","cause":"silence"}}"#;
        assert_eq!(printer.readable(gap), "05:51:20 #c * not heard since 2026-11-20T05:51:18.001Z (silence)");
        assert_eq!(
            printer.readable(b"{\"type\":\"internal.deadletter.v1\",\"reason\":\"too_large\"}"),
            "--:--:-- dead letter: too_large"
        );
        assert_eq!(printer.readable(b"\x1b"), "? ");
    }
}
