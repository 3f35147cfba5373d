//! `inlet simulate`: the simulator on a socket, obeying lines on standard input.

use std::future::Future;
use std::io::{BufRead, Read, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::mpsc;

use crate::sim::{
    COMMANDS, ControlLine, JoinRefusal, LoginRefusal, SimConfig, SimError, Simulator, UnknownRefusal,
};

/// A control line may be so long.
const MAX_LINE_BYTES: u64 = 64 * 1024;

/// For a channel that a JOIN is refused to.
const REFUSED_JOIN: &str = "banned:NAME or suspended:NAME is wanted";

/// What `--help` says at its end.
pub fn after_help() -> String {
    format!(
        "Lines on standard input, N being a connection's number (`stats` lists them), all by default:\n{}",
        COMMANDS.lines().map(|line| ["  ", line, "\n"].concat()).collect::<String>()
    )
}

/// Settings of the simulator.
#[derive(Debug, Clone, clap::Args)]
pub struct SimulateArgs {
    /// Address to listen on; port 0 takes a free one
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:6667")]
    pub listen: SocketAddr,
    /// Channels that get messages, separated by commas; others can be joined and stay silent [default: sim, or with
    /// --replay the channels its lines name]
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    pub channels: Vec<String>,
    /// Messages per second over all channels together; 0: as fast as they are read
    #[arg(long, value_name = "N", default_value_t = 10)]
    pub rate: u32,
    /// Messages in all, then silence; 0: no end (a replayed file: once)
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub count: u64,
    /// How many viewers write
    #[arg(long, value_name = "N", default_value_t = 500, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub users: u32,
    /// How unevenly they write: exponent of a Zipf curve, 0 for all alike
    #[arg(long, value_name = "EXPONENT", default_value_t = 1.0)]
    pub zipf: f64,
    /// The same seed makes the same messages
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
    /// All that happens on Twitch, not messages alone: subs, gifts, raids, replies, announcements, bans, deletions, shared
    /// chat between the first two channels, renamed viewers, texts of every kind
    #[arg(long, conflicts_with = "replay")]
    pub lifelike: bool,
    /// Send the raw IRC lines of this file instead, with new ids and times
    #[arg(long, value_name = "FILE")]
    pub replay: Option<PathBuf>,
    /// Leave the replayed lines their ids and times
    #[arg(long, requires = "replay")]
    pub keep_ids: bool,
    /// Log what was sent to this file: one JSON line per line sent and connection
    #[arg(long, value_name = "FILE")]
    pub sent: Option<PathBuf>,
    /// Speak TLS, as localhost and 127.0.0.1
    #[arg(long)]
    pub tls: bool,
    /// Where to write the certificate to trust [default: inlet-simulate-ca.pem in the temporary folder]
    #[arg(long, value_name = "FILE", requires = "tls")]
    pub tls_ca: Option<PathBuf>,
    /// Refuse every login: failed (as with a bad token), format, nick or unsuccessful
    #[arg(long, value_name = "HOW", num_args = 0..=1, require_equals = true, default_missing_value = "failed")]
    pub refuse_login: Option<LoginRefusal>,
    /// Never answer a JOIN to this channel; may be given several times
    #[arg(long = "ignore-join", value_name = "NAME")]
    pub ignore_joins: Vec<String>,
    /// Refuse a JOIN to this channel, as banned:NAME or suspended:NAME; may be given several times
    #[arg(long = "refuse-join", value_name = "HOW:NAME", value_parser = refused_join)]
    pub refuse_joins: Vec<(String, JoinRefusal)>,
    /// Answer so many JOINs of an account in any 10 s and let the others vanish; Twitch's limit is 20, 0 is none.
    /// Connections without an account count as one
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub join_limit: u32,
    /// Among a thousand lines, so many more are bad ones: cut, misshapen, too long, no IRC, no UTF-8, empty
    #[arg(long, value_name = "PERMILLE", default_value_t = 0, value_parser = clap::value_parser!(u32).range(..=1000))]
    pub bad_lines: u32,
    /// Send each Nth line twice, with the same id; 0: none
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub duplicate_every: u32,
    /// Write so many bytes a second to each connection; 0: as fast as they are read
    #[arg(long, value_name = "BYTES", default_value_t = 0)]
    pub slow: u64,
    /// Cut a connection whose queue of 4 MiB has had no room for so long, 0: never; until then the stream waits for it
    /// [default: 10, with --rate 0: 0]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(..=86_400))]
    pub cut_after: Option<u64>,
    /// How long a connection stays open after a RECONNECT
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(..=86_400))]
    pub reconnect_grace: u64,
}

fn refused_join(text: &str) -> Result<(String, JoinRefusal), String> {
    let (how, name) = text.split_once(':').ok_or(REFUSED_JOIN)?;
    let how = how.parse().map_err(|error: UnknownRefusal| error.to_string())?;
    Ok((name.to_owned(), how))
}

impl SimulateArgs {
    fn config(&self, now: fn() -> i64) -> SimConfig {
        let cut_after = self.cut_after.unwrap_or(if self.rate == 0 { 0 } else { 10 });
        let named = !self.channels.is_empty() || self.replay.is_some();
        SimConfig {
            channels: if named { self.channels.clone() } else { vec!["sim".to_owned()] },
            rate: self.rate,
            count: (self.count > 0).then_some(self.count),
            users: self.users,
            zipf: self.zipf,
            seed: self.seed,
            lifelike: self.lifelike,
            replay: self.replay.clone(),
            keep_ids: self.keep_ids,
            sent_file: self.sent.clone(),
            tls: self.tls,
            refuse_login: self.refuse_login,
            ignore_joins: self.ignore_joins.clone(),
            refuse_joins: self.refuse_joins.clone(),
            join_limit: self.join_limit,
            bad_permille: self.bad_lines,
            duplicate_every: self.duplicate_every,
            slow: self.slow,
            cut_after: (cut_after > 0).then(|| Duration::from_secs(cut_after)),
            reconnect_grace: Duration::from_secs(self.reconnect_grace),
            ..SimConfig::new(now)
        }
    }
}

/// Serves until `stop`, or `quit` on standard input. `now` is the wall clock in Unix milliseconds.
pub async fn run(
    args: SimulateArgs,
    now: fn() -> i64,
    stop: impl Future<Output = ()>,
) -> Result<(), SimError> {
    let listener = TcpListener::bind(args.listen).await.map_err(SimError::Listen)?;
    let config = args.config(now);
    let channels = match &config.channels[..] {
        [] => "channels as in the file".to_owned(),
        names => format!("channels {}", names.join(" ")),
    };
    let simulator = Simulator::start(config, listener).await?;
    let addr = simulator.local_addr();
    if let Some(pem) = simulator.ca_pem() {
        let path = args.tls_ca.unwrap_or_else(|| std::env::temp_dir().join("inlet-simulate-ca.pem"));
        std::fs::write(&path, pem).map_err(|source| SimError::File { path: path.clone(), source })?;
        let (port, path) = (addr.port(), path.display());
        say(&format!(
            "simulating Twitch chat on ircs://localhost:{port} ({channels}; set TLS_CA_FILE={path})"
        ))?;
    } else {
        say(&format!("simulating Twitch chat on irc://{addr} ({channels})"))?;
    }
    let ended = tokio::select! {
        () = stop => Ok(()),
        ended = obey(&simulator, control_lines()) => ended,
    };
    simulator.shutdown().await;
    ended
}

/// Does what is typed until `quit`; when there is nothing left to read, waits for ever.
async fn obey(simulator: &Simulator, mut lines: mpsc::Receiver<Vec<u8>>) -> Result<(), SimError> {
    while let Some(line) = lines.recv().await {
        match ControlLine::parse(&line) {
            Some(ControlLine::Do(command)) => simulator.control(command).await,
            Some(ControlLine::Stats) => {
                say(&serde_json::to_string(&simulator.stats())
                    .map_err(|error| SimError::Output(error.into()))?)?;
            }
            Some(ControlLine::Quit) => return Ok(()),
            Some(ControlLine::Empty) => {}
            Some(ControlLine::Help) => say(COMMANDS)?,
            None => {
                let typed = String::from_utf8_lossy(&line);
                say(&format!("unknown command {}; there are:\n{COMMANDS}", typed.trim().escape_debug()))?;
            }
        }
    }
    std::future::pending().await
}

/// Standard input, line by line. A thread of its own, and never joined: a read from a terminal cannot be cancelled, and
/// Tokio's own reader would hold up the end of the process until somebody types.
fn control_lines() -> mpsc::Receiver<Vec<u8>> {
    let (lines, inbox) = mpsc::channel(16);
    let read = move || {
        let mut input = std::io::stdin().lock();
        let mut line = Vec::new();
        while input.by_ref().take(MAX_LINE_BYTES).read_until(b'\n', &mut line).is_ok_and(|read| read > 0) {
            if lines.blocking_send(std::mem::take(&mut line)).is_err() {
                return;
            }
        }
    };
    if let Err(error) = std::thread::Builder::new().name("control lines".to_owned()).spawn(read) {
        tracing::warn!(%error, "cannot read control lines");
    }
    inbox
}

/// Prints a line at once, also into a pipe.
fn say(line: &str) -> Result<(), SimError> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}").and_then(|()| out.flush()).map_err(SimError::Output)
}
