//! Mutated lines into the reader and the normaliser, and over a real socket through the whole path; mutated settings.
//! Never a panic, never a lost connection, every line accounted for.
//!
//! Bounded here; by hand as many as wanted: `INLET_FUZZ_LINES=10000000 INLET_FUZZ_SEED=7 cargo nextest run --release fuzz`
//! (`INLET_FUZZ_SOCKET_LINES` for those over a socket). The same seed makes the same lines. `scripts/fuzz` lets a fuzzer led by
//! coverage look for more.

mod reader;
mod settings;

use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::Command as Process;
use std::time::{Duration, Instant};

use inlet::settings::Environment;
use inlet::sim::{Command, SimConfig, Simulator};
use inlet::source::twitch::SharedChatMode;
use serde_json::Value;

use self::reader::Reader;
use self::settings::{SECRETS, Settings};
use crate::harness::inlet::Inlet;
use crate::harness::nats::Nats;
use crate::harness::stream::read;
use crate::harness::within;

/// A number from the environment.
fn asked(name: &str, usual: u64) -> u64 {
    std::env::var(name).map_or(usual, |text| text.parse().unwrap_or_else(|_| panic!("{name} is no number")))
}

fn seed() -> u64 {
    asked("INLET_FUZZ_SEED", 1)
}

/// Pieces that mean something to somebody on the way.
const PIECES: [&[u8]; 44] = [
    b";",
    b"=",
    b" ",
    b"  ",
    b":",
    b"@",
    b"#",
    b",",
    b"/",
    b"-",
    b"\\",
    b"\\s",
    b"\\:",
    b"\\n",
    b"\r",
    b"\0",
    b"\x01",
    b"\x01ACTION ",
    b"\xff",
    b"\xc3\x28",
    b"\xed\xa0\x80",
    b"\xf0\x9f\x98\x82",
    "\u{202e}".as_bytes(),
    b"emotes=25:0-4",
    b"emotes=25:4-0,18446744073709551615-1/1902:0-0",
    b"emotes=:::",
    b"badges=moderator/1,,/,x",
    b"badges=",
    b"id=",
    b";id=",
    b"user-id=",
    b"tmi-sent-ts=",
    b"tmi-sent-ts=-1",
    b"tmi-sent-ts=99999999999999999999",
    b"bits=-5",
    b"source-id=",
    b"source-room-id=1",
    b"ban-duration=1e9",
    b"login=x",
    b"PRIVMSG",
    b"USERNOTICE",
    b"CLEARCHAT",
    b"CLEARMSG",
    b"msg-id=resub",
];
/// Numbers on the edges.
const NUMBERS: [&[u8]; 9] = [
    b"0",
    b"-1",
    b"2147483648",
    b"4294967296",
    b"9223372036854775807",
    b"18446744073709551616",
    b"1e308",
    b"",
    b"007",
];

/// Makes lines out of captured-like ones.
struct Mutator {
    random: fastrand::Rng,
    lines: Vec<Vec<u8>>,
    made: u64,
}

impl Mutator {
    fn new(seed: u64) -> Self {
        let fixture = std::fs::read(fixture()).unwrap();
        let lines: Vec<_> =
            fixture.split(|byte| *byte == b'\n').map(|line| line.trim_ascii_end().to_vec()).collect();
        // What is about the connection itself ends it by right: that is not what is looked for here.
        let is_chat = |line: &Vec<u8>| {
            [&b"PRIVMSG"[..], b"USERNOTICE", b"CLEARCHAT", b"CLEARMSG"]
                .iter()
                .any(|command| memchr::memmem::find(line, command).is_some())
        };
        let lines: Vec<_> = lines.into_iter().filter(is_chat).collect();
        assert!(lines.len() > 40);
        Self { random: fastrand::Rng::with_seed(seed), lines, made: 0 }
    }

    /// The next line, without its end and without one inside.
    fn next(&mut self) -> Vec<u8> {
        self.made += 1;
        let mut line = self.random.choice(&self.lines).unwrap().clone();
        let (id, now) = (format!("fuzz-{}", self.made), inlet::clock::system_milliseconds().to_string());
        replace_tag(&mut line, b"id=", id.as_bytes());
        replace_tag(&mut line, b"tmi-sent-ts=", now.as_bytes());
        // One line in sixteen stays as it is; most are changed once or twice.
        while self.random.u32(..16) != 0 {
            self.change(&mut line);
            if self.random.bool() {
                break;
            }
        }
        for byte in &mut line {
            if *byte == b'\n' {
                *byte = b'\t';
            }
        }
        line
    }

    fn change(&mut self, line: &mut Vec<u8>) {
        let at = self.random.usize(..=line.len());
        let span = at..line.len().min(at + self.random.usize(..12));
        match self.random.u32(..10) {
            0 if at < line.len() => line[at] ^= 1 << self.random.u32(..8),
            1 => insert(line, at, &[self.random.u8(..)]),
            2 | 3 => insert(line, at, self.random.choice(PIECES).unwrap()),
            4 => drop(line.drain(span)),
            5 => {
                let again = line[span].to_vec();
                insert(line, at, &again);
            }
            6 => self.change_number(line),
            7 => self.change_value(line),
            8 => {
                let other = self.random.choice(&self.lines).unwrap();
                let from = self.random.usize(..=other.len());
                let piece = other[from..other.len().min(from + 40)].to_vec();
                insert(line, at, &piece);
            }
            9 if self.random.u32(..64) == 0 => {
                let long = vec![self.random.u8(b'a'..=b'z'); self.random.usize(1..80_000)];
                insert(line, at, &long);
            }
            _ => line.truncate(at),
        }
    }

    /// A run of digits becomes another number.
    fn change_number(&mut self, line: &mut Vec<u8>) {
        let starts: Vec<_> = (0..line.len())
            .filter(|at| line[*at].is_ascii_digit() && (*at == 0 || !line[*at - 1].is_ascii_digit()))
            .collect();
        let Some(start) = self.random.choice(&starts).copied() else { return };
        let end = start + line[start..].iter().take_while(|byte| byte.is_ascii_digit()).count();
        let number = *self.random.choice(&NUMBERS).unwrap();
        line.splice(start..end, number.iter().copied());
    }

    /// A tag's value becomes something else.
    fn change_value(&mut self, line: &mut Vec<u8>) {
        let signs: Vec<_> = (0..line.len()).filter(|at| line[*at] == b'=').collect();
        let Some(sign) = self.random.choice(&signs).copied() else { return };
        let end = sign + line[sign..].iter().take_while(|byte| **byte != b';' && **byte != b' ').count();
        let piece = *self.random.choice(&PIECES).unwrap();
        line.splice(sign + 1..end, piece.iter().copied());
    }
}

fn insert(line: &mut Vec<u8>, at: usize, piece: &[u8]) {
    line.splice(at..at, piece.iter().copied());
}

/// Sets a tag that the line has.
fn replace_tag(line: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    let Some(tags_end) = memchr::memchr(b' ', line).filter(|_| line.starts_with(b"@")) else { return };
    let is_tag = |at: &usize| matches!(line[at - 1], b'@' | b';');
    let Some(start) = memchr::memmem::find_iter(&line[..tags_end], key).filter(|at| *at > 0).find(is_tag)
    else {
        return;
    };
    let start = start + key.len();
    let end = start + line[start..tags_end].iter().take_while(|byte| **byte != b';').count();
    line.splice(start..end, value.iter().copied());
}

fn fixture() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/chat.irc")
}

#[test]
fn mutated_lines_make_no_panic_and_each_comes_to_an_end() {
    let count = asked("INLET_FUZZ_LINES", 50_000);
    let mut mutator = Mutator::new(seed());
    let (mut reader, start) = (Reader::new(), Instant::now());
    while reader.fates.all() < count {
        let (mut line, before) = (mutator.next(), reader.fates.all());
        line.extend_from_slice(if mutator.random.bool() { b"\r\n" } else { b"\n" });
        let mode = if mutator.random.bool() { SharedChatMode::All } else { SharedChatMode::SourceOnly };
        let read = catch_unwind(AssertUnwindSafe(|| reader.read(&line, mode)));
        assert!(
            read.is_ok() && reader.fates.all() == before + 1,
            "{read:?} for {:?} ({})",
            line.escape_ascii().to_string(),
            mutator.made
        );
    }
    let fates = reader.fates;
    println!("{count} lines with seed {} in {:?}: {fates:?}", seed(), start.elapsed());
    assert!(fates.events + fates.not_normalizable >= count / 2, "too few reach the normaliser: {fates:?}");
    assert!(fates.unparsable > 0 && fates.protocol > 0 && fates.not_normalizable > 0, "{fates:?}");
}

#[test]
fn mutated_settings_make_no_panic() {
    let count = asked("INLET_FUZZ_LINES", 50_000) / 50;
    let settings = Settings::new();
    assert!(settings.flags.len() > 30);
    let values = [
        "",
        " ",
        "0",
        "1",
        "-1",
        "true",
        "2s",
        "250ms",
        "9999999999999999999h",
        "1e9",
        "10GiB",
        "18446744073709551616",
        "∞",
        "irc://[::1]:6667",
        "irc://:0",
        "nats://u:p@h:1,tls://[",
        "http://x:99999",
        "a,b #C",
        "x/../y",
        "\u{0}",
        "{platform}{",
        "dev.",
        "..",
        "INFO",
        "trace,x=debug",
        "0.0.0.0",
        "::",
        "all",
        "\u{202e}",
        "1d2h3m4s5ms6us",
    ];
    let mut random = fastrand::Rng::with_seed(seed());
    let mut refused = 0;
    for _ in 0..count {
        let given: Vec<String> = (0..random.usize(1..6))
            .map(|_| {
                let mut value = (*random.choice(values).unwrap()).to_owned();
                if random.bool() {
                    value.push_str(random.choice(values).unwrap());
                }
                format!("--{}={value}", random.choice(&settings.flags).unwrap())
            })
            .collect();
        let name = (*random.choice(SECRETS).unwrap()).to_owned();
        let environment = Environment::new([(name, (*random.choice(values).unwrap()).to_owned())]);
        let ended = catch_unwind(AssertUnwindSafe(|| settings.are_refused(&given, &environment)));
        refused += u64::from(ended.unwrap_or_else(|_| panic!("{given:?} {environment:?}")));
    }
    assert!((1..count).contains(&refused), "{refused} of {count} refused");
}

/// How much has to be published of these lines, by `scripts/verify-envelopes`, which has a parser of its own.
fn counts_of(lines: &Path) -> Value {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/verify-envelopes");
    let output = Process::new("python3").arg(script).arg(lines).arg("--counts").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[tokio::test]
async fn mutated_lines_over_a_socket_cost_no_connection_and_all_are_accounted_for() {
    const BATCH: usize = 250;
    let count = usize::try_from(asked("INLET_FUZZ_SOCKET_LINES", 5_000)).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("lines");
    let mut mutator = Mutator::new(seed() + 1);
    let lines: Vec<_> = (0..count).map(|_| [&mutator.next()[..], b"\r\n"].concat()).collect();
    std::fs::write(&path, lines.concat()).unwrap();
    let counts = counts_of(&path);
    let of = |fate: &str| counts["of"][fate].as_u64().unwrap_or_default();
    let received = of("lines") - of("notReceived") - of("empty");
    assert!(
        counts["envelopes"].as_u64().unwrap() * 2 > count as u64,
        "too few reach the normaliser: {counts}"
    );

    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut config = SimConfig::new(inlet::clock::system_milliseconds);
    config.channels = vec!["alpha".to_owned()];
    config.count = Some(0);
    let simulator = Simulator::start(config, listener).await.unwrap();
    let nats = Nats::start().await;
    let inlet = Inlet::serve(&[
        ("TWITCH_CHANNELS", "alpha"),
        ("TWITCH_IRC_URL", &format!("irc://{}", simulator.local_addr())),
        ("NATS_URL", &nats.url()),
        ("ENRICH_MODE", "off"),
        // Nobody is refused, however slow this machine is.
        ("INTAKE_WAIT", "60s"),
    ])
    .await;
    inlet.ready().await;
    for batch in lines.chunks(BATCH) {
        simulator.control(Command::Raw(batch.concat())).await;
    }
    let metrics = within(Duration::from_mins(2), "all lines came to an end", || async {
        let metrics = inlet.metrics().await;
        let is_done = metrics.sum("inlet_events_received_total") >= received
            && metrics.sum("inlet_events_pending") == 0;
        is_done.then_some(metrics)
    })
    .await;
    metrics.assert_account_closes();
    assert_eq!(metrics.sum("inlet_events_received_total"), received, "{counts}");
    assert_eq!(metrics.get("inlet_twitch_bad_lines_total{kind=\"empty\"}"), of("empty"));
    assert_eq!(metrics.get("inlet_twitch_reconnects_total"), 0, "{}", inlet.log());
    assert!(!inlet.log().contains("panicked"), "{}", inlet.log());
    // In the stream is what was let in and not found to be there already, each once.
    let found = read(&nats.url(), "INLET").await;
    let ids: HashSet<_> = found.iter().map(|message| &message.msg_id).collect();
    let (published, letters) =
        (metrics.sum("inlet_events_published_total"), metrics.sum("inlet_events_deadlettered_total"));
    assert_eq!((found.len(), found.len() as u64), (ids.len(), published + letters));
    let in_stream = found.iter().filter(|message| message.subject == "internal.deadletter.v1").count() as u64;
    assert_eq!(in_stream, letters);
    println!("{count} lines over a socket: {published} published, {letters} dead letters; {counts}");
}
