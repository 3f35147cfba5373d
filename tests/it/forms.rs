//! Forms on the wire, held: golden envelopes, their schema, an independent reading of the contract, the names in
//! `/metrics`. `UPDATE_GOLDEN=1` writes the golden files anew; look at the difference before you commit it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

use inlet::clock::Clock;
use inlet::envelope::draft::Content;
use inlet::envelope::{EnvelopeV1, Origin, UnmatchedReason};
use inlet::errors::ErrorCode;
use inlet::source::twitch::lines::Lines;
use inlet::source::twitch::normalize::TakenIn;
use inlet::source::twitch::{Normalizer, Reading, SharedChatMode, TwitchMetrics};
use inlet::telemetry::metrics::Label as _;
use jiff::Timestamp;
use serde_json::Value;

use crate::harness::inlet::{Inlet, run};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn assert_golden(name: &str, actual: &str) {
    assert_is_file(&fixture(name), actual);
}

fn assert_is_file(path: &Path, actual: &str) {
    let name = path.display();
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(path, actual).unwrap();
    }
    let expected = std::fs::read_to_string(path).unwrap_or_default();
    for (line, (actual, expected)) in actual.lines().zip(expected.lines()).enumerate() {
        assert_eq!(actual, expected, "{name}, line {}", line + 1);
    }
    assert_eq!(actual.lines().count(), expected.lines().count(), "lines of {name}");
}

/// The envelopes of the fixture's lines, taken in at a fixed time.
fn envelopes(shared_chat: SharedChatMode) -> Vec<String> {
    let clock = Clock::by_hand(Timestamp::from_second(1_795_000_000).unwrap());
    let metrics = Arc::new(TwitchMetrics::new(&prometheus::Registry::new()).unwrap());
    let normalizer = Normalizer::new(Origin::Replay, shared_chat, metrics);
    let mut lines = Lines::new();
    lines.buffer().extend_from_slice(&std::fs::read(fixture("chat.irc")).unwrap());
    let mut written = Vec::new();
    while let Some(line) = lines.next_line() {
        let taken_in = TakenIn { at: clock.now(), instant: Instant::now() };
        let Reading::Draft(draft) = normalizer.read(line, taken_in) else {
            continue;
        };
        written.push(match &draft.content {
            Content::Event(event) => {
                let envelope = EnvelopeV1::new(&draft, event, Err(UnmatchedReason::Disabled), clock.now());
                String::from_utf8(envelope.to_json().unwrap()).unwrap()
            }
            Content::Unusable { reason, message, .. } => format!("# {reason}: {message}"),
        });
    }
    written
}

#[test]
fn envelopes_are_as_they_were() {
    assert_golden("chat.envelopes.jsonl", &(envelopes(SharedChatMode::SourceOnly).join("\n") + "\n"));
    assert_golden("chat.envelopes-all.jsonl", &(envelopes(SharedChatMode::All).join("\n") + "\n"));
}

#[test]
fn the_schema_holds_for_every_golden_envelope_and_dead_letter() {
    let schema: Value = serde_json::from_str(include_str!("../../docs/envelope-v1.schema.json")).unwrap();
    let validator = jsonschema::validator_for(&schema).unwrap();
    let mut types = BTreeMap::new();
    for line in envelopes(SharedChatMode::All).iter().filter(|line| !line.starts_with('#')) {
        let envelope: Value = serde_json::from_str(line).unwrap();
        let problems: Vec<_> = validator.iter_errors(&envelope).map(|error| error.to_string()).collect();
        assert!(problems.is_empty(), "{problems:?} in {line}");
        *types.entry(envelope["type"].as_str().unwrap().to_owned()).or_insert(0) += 1;
    }
    assert_eq!(types.len(), 3, "{types:?}");
    // And it is a schema that can fail.
    let mut envelope: Value = serde_json::from_str(&envelopes(SharedChatMode::All)[0]).unwrap();
    envelope["user"]["role"] = Value::from("emperor");
    assert!(!validator.is_valid(&envelope));
    envelope["user"] = Value::Null;
    assert!(!validator.is_valid(&envelope));
}

#[test]
fn what_replay_publishes_is_what_an_independent_reading_of_the_contract_expects() {
    for mode in ["source-only", "all"] {
        let folder = tempfile::tempdir().unwrap();
        let lines = fixture("chat.irc");
        let environment = [
            ("DATA_DIR", folder.path().to_str().unwrap()),
            ("TWITCH_SHARED_CHAT", mode),
            ("ENRICH_MODE", "off"),
            ("LOG_LEVEL", "error"),
        ];
        let output = run(&["replay", "--show", "--json", lines.to_str().unwrap()], &environment);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8(output.stdout).unwrap();
        let (published, summary) = text.trim_end().rsplit_once('\n').unwrap();
        let summary: Value = serde_json::from_str(summary).unwrap();
        assert_eq!(summary["deadLettered"], 5, "{summary}");
        let file = folder.path().join("published.jsonl");
        std::fs::write(&file, published).unwrap();
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/verify-envelopes");
        let check = Command::new("python3")
            .arg(script)
            .arg(&lines)
            .arg("--envelopes")
            .arg(&file)
            .args(["--shared-chat", mode])
            .output()
            .unwrap();
        assert!(check.status.success(), "{mode}: {}", String::from_utf8_lossy(&check.stdout));
    }
}

#[tokio::test]
async fn every_series_is_there_from_the_start() {
    let inlet = Inlet::serve(&[]).await;
    let names: BTreeSet<_> = inlet.metrics().await.names().map(str::to_owned).collect();
    let ours: BTreeSet<_> = names
        .iter()
        .filter(|name| !name.contains("_bucket{") && !name.starts_with("process_"))
        .map(|name| name.replace(env!("CARGO_PKG_VERSION"), "VERSION"))
        .collect();
    let ours: Vec<_> = ours.into_iter().collect();
    assert_golden("metrics.txt", &(ours.join("\n") + "\n"));
    assert!(names.contains("process_resident_memory_bytes"));
}

const ABOUT_ERRORS: &str = "\
# Errors

Every code under which Inlet says that something went wrong, from one closed list (`src/errors.rs`, of which this page is
made). A code stands in the log as `errorCode`; in an answer of the operator's HTTP as `error.code`, with the status below;
in a dead letter as `error.code`; in a record of the audit as its `outcome`.

Each is counted when it is logged, whatever `LOG_LEVEL` shows: `inlet_errors_total{code}` in `/metrics`, and `GET
/admin/errors` with the time of the last one. What goes on is logged when it begins, so it counts once; how many events it
concerns is counted by the series of its part.

| code | status | what it means | what to do |
|---|---|---|---|
";

#[test]
fn the_page_on_errors_says_what_the_code_says() {
    let cell = |text: &str| text.replace('|', "\\|");
    let rows = ErrorCode::ALL.iter().map(|code| {
        let status = code.status().map_or_else(String::new, |status| status.to_string());
        format!("| `{code}` | {status} | {} | {} |\n", cell(code.meaning()), cell(code.help()))
    });
    let page = rows.fold(ABOUT_ERRORS.to_owned(), |page, row| page + &row);
    assert_is_file(&Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/errors.md"), &page);
}

/// Every setting with its default, as `--help` shows them; secrets, which have no flag, have none.
fn settings_in_help() -> BTreeMap<String, Option<String>> {
    let output = run(&["check", "--help"], &[("TWITCH_CHANNELS", "shown-by-no-means")]).stdout;
    let help = String::from_utf8(output).unwrap();
    assert!(!help.contains("shown-by-no-means"));
    let (flags, secrets) = help.split_once("Secrets have no flag").unwrap();
    // Lines are broken anywhere.
    let flags = flags.split_whitespace().collect::<Vec<_>>().join(" ");
    let mut settings: BTreeMap<_, _> = flags
        .split("[env: ")
        .skip(1)
        .map(|rest| {
            let (name, rest) = rest.split_once(']').unwrap();
            let default = rest.strip_prefix(" [default: ").map(|rest| rest.split(']').next().unwrap());
            (name.to_owned(), default.map(|default| default.trim_matches('"').to_owned()))
        })
        .collect();
    let secrets = secrets.lines().filter_map(|line| line.strip_prefix("  ")?.split(' ').next());
    settings.extend(secrets.filter(|name| is_name(name)).map(|name| (name.to_owned(), None)));
    assert!(settings.len() > 50 && settings.contains_key("STREAM_TOKEN"), "{settings:?}");
    settings
}

fn is_name(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_')
}

/// What stands in the rows under `## Settings`: each name, and its default as far as the cell has one for each.
fn settings_in_readme() -> Vec<(String, Option<String>)> {
    let readme = include_str!("../../README.md");
    let (_, section) = readme.split_once("\n## Settings\n").unwrap();
    let section = section.split("\n## ").next().unwrap();
    let rows = section.lines().filter(|line| line.starts_with("| `"));
    rows.flat_map(|row| {
        let cells: Vec<_> = row.split('|').collect();
        assert_eq!(cells.len(), 5, "{row}");
        let parts = |cell: &str| -> Vec<String> {
            cell.split(", ").map(|part| part.trim().trim_matches('`').to_owned()).collect()
        };
        let (names, defaults) = (parts(cells[1]), parts(cells[2]));
        let is_for_each = names.len() == defaults.len();
        let default = move |index: usize| is_for_each.then(|| defaults[index].replace("empty", ""));
        names.into_iter().enumerate().map(move |(index, name)| (name, default(index)))
    })
    .collect()
}

#[test]
fn the_settings_in_the_readme_are_those_of_help() {
    let (help, readme) = (settings_in_help(), settings_in_readme());
    let names: BTreeSet<_> = readme.iter().map(|(name, _)| name).collect();
    assert_eq!(names.len(), readme.len(), "a setting has two rows");
    assert_eq!(names, help.keys().collect());
    for (name, default) in &readme {
        if let Some(expected) = &help[name] {
            assert_eq!(default.as_ref(), Some(expected), "default of {name}");
        }
    }
}

#[test]
fn the_settings_in_the_example_are_those_of_help() {
    let help = settings_in_help();
    let example = include_str!("../../.env.example").lines();
    let named = example.filter_map(|line| line.trim_start_matches('#').split_once('='));
    let mut names = BTreeSet::new();
    for (name, value) in named.filter(|(name, _)| is_name(name)) {
        let secret = name.strip_suffix("_FILE").filter(|secret| help.contains_key(*secret));
        if secret.is_none() {
            assert!(names.insert(name.to_owned()), "{name} is there twice");
        }
        let default = help.get(secret.unwrap_or(name)).cloned().flatten().unwrap_or_default();
        assert_eq!(value, default, "default of {name}");
    }
    assert_eq!(names, help.into_keys().collect());
}
