//! The simulator as a process: its flags, its control lines, and chat of every kind through the whole path, counted
//! from its own log by the contract's rules.

use std::collections::BTreeSet;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde_json::Value;
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use crate::harness::eventually;
use crate::harness::inlet::{Inlet, Simulator, run};
use crate::harness::nats::Nats;
use crate::harness::stream::read;

const EVENTS: Uuid = Uuid::from_u128(0x99c4_52c6_807f_5d66_b35a_2ce5_031c_89dc);
/// A reader keeps so much of a line that is too long.
const LONGEST_LINE: usize = 64 * 1024;

/// The id of what was sent, worked out from the log by the contract's rule; `None`: it is no event.
fn message_id(record: &Value) -> Option<String> {
    let text = |name: &str| record[name].as_str();
    let hash = |bytes: &[u8]| {
        let digest = Sha256::digest(bytes);
        format!("twitch:sha256-{}", data_encoding::HEXLOWER.encode(&digest[..16]))
    };
    let bytes = || match text("bytes") {
        Some(bytes) => BASE64_STANDARD.decode(bytes).unwrap(),
        None => text("line").unwrap().as_bytes().to_vec(),
    };
    let event = |key: &str| Uuid::new_v5(&EVENTS, key.as_bytes()).to_string();
    match text("kind").unwrap() {
        "message" | "notice" | "moderation" => Some(event(&match text("source").or(text("id")) {
            Some(id) => format!("twitch:{id}"),
            None => hash(content(text("line").unwrap()).as_bytes()),
        })),
        "bad" => {
            let bytes = bytes();
            Some(format!("dlq-{}", event(&hash(&bytes[..bytes.len().min(LONGEST_LINE)]))))
        }
        _ => None,
    }
}

/// Command, parameters and sorted tags of a line without an id. These lines are written by the simulator, and none of
/// them has a second space or a tag without a value.
fn content(line: &str) -> String {
    let (tags, rest) = match line.strip_prefix('@') {
        Some(tagged) => tagged.split_once(' ').unwrap(),
        None => ("", line),
    };
    let (_, rest) = rest.split_once(' ').unwrap();
    let (middle, text) = match rest.split_once(" :") {
        Some((middle, text)) => (middle, Some(text)),
        None => (rest, None),
    };
    let mut tags: Vec<_> = tags.split(';').filter(|tag| !tag.is_empty()).collect();
    tags.sort_unstable();
    middle.split(' ').chain(text).chain(tags).collect::<Vec<_>>().join("\n")
}

fn records(simulator: &Simulator) -> Vec<Value> {
    let text = std::fs::read_to_string(simulator.sent_file()).unwrap();
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

#[tokio::test]
async fn all_that_happens_on_twitch_is_in_the_stream_once() {
    let nats = Nats::start().await;
    let flags = [
        "--channels",
        "alpha,beta,gamma",
        "--lifelike",
        "--rate",
        "1000",
        "--count",
        "6000",
        "--bad-lines",
        "10",
        "--duplicate-every",
        "50",
    ];
    let simulator = Simulator::start(&flags).await;
    let inlet = Inlet::serve(&[
        ("TWITCH_CHANNELS", "alpha beta gamma"),
        ("TWITCH_IRC_URL", &simulator.url()),
        ("NATS_URL", &nats.url()),
    ])
    .await;
    // 60 bad lines beside, and of these 6060 each fiftieth once more.
    let all = eventually("all is sent", || async {
        let all = records(&simulator);
        (all.len() == 6_181).then_some(all)
    })
    .await;
    assert_eq!(all.iter().filter(|record| record["copy"] == true).count(), 121);
    let heard = || all.iter().filter(|record| !record["connection"].is_null());
    let received = heard().filter(|record| message_id(record).is_some()).count();
    let metrics = inlet.settled(received as u64).await;
    metrics.assert_account_closes();
    let found = read(&nats.url(), "INLET").await;
    let (found_ids, sent_ids): (BTreeSet<_>, BTreeSet<_>) = (
        found.iter().map(|message| message.msg_id.clone()).collect(),
        heard().filter_map(message_id).collect(),
    );
    let by_id = |id: &&String| heard().find(|record| message_id(record).as_ref() == Some(*id));
    let missing: Vec<_> = sent_ids.difference(&found_ids).filter_map(|id| by_id(&id)).take(3).collect();
    let unknown: Vec<_> = found_ids.difference(&sent_ids).collect();
    assert!(missing.is_empty() && unknown.is_empty(), "missing {missing:?}, unknown {unknown:?}");
    assert_eq!(found.len(), found_ids.len(), "each once");
    for (kind, least) in [("message", 5_900), ("notice", 20), ("moderation", 20), ("bad", 15), ("empty", 3)] {
        let count = all.iter().filter(|record| record["kind"] == kind).count();
        assert!(count >= least, "{count} of {kind}");
    }
    assert!(all.iter().any(|record| record["source"].is_string()), "no shared chat");
    assert_eq!(metrics.get("inlet_twitch_reconnects_total"), 0);
}

#[tokio::test]
async fn control_lines_answer_on_standard_output() {
    let flags =
        ["--channels", "alpha", "--rate", "100", "--refuse-join", "banned:gone", "--join-limit", "20"];
    let mut simulator = Simulator::start(&flags).await;
    let inlet =
        Inlet::serve(&[("TWITCH_CHANNELS", "alpha gone"), ("TWITCH_IRC_URL", &simulator.url())]).await;
    simulator.has_sent(10).await;
    let refused = eventually("the refused channel is named", || async {
        let (_, state) = inlet.json("/_debug/twitch").await;
        state.to_string().contains("banned").then_some(state)
    })
    .await;
    assert!(refused.to_string().contains("gone"), "{refused}");
    simulator.say("explode");
    simulator.say("stats");
    let stats: Value = eventually("both lines are answered", || async {
        let log = simulator.log();
        let stats = log.lines().find(|line| line.starts_with('{'))?;
        assert!(log.contains("unknown command explode; there are:\ndrop [N|all]"), "{log}");
        Some(serde_json::from_str(stats).unwrap())
    })
    .await;
    assert_eq!(stats["connections"], 1);
    assert_eq!(stats["joined"], 1);
    assert_eq!(stats["accounts"]["anonymous"]["most_in_10s"], 2);
    assert_eq!(stats["peers"][0]["connection"], 1);
    simulator.say("silent 1");
    simulator.say("stats");
    eventually("it is silent", || async { simulator.log().contains(r#""mode":"silent""#).then_some(()) })
        .await;
    simulator.say("quit");
    let status = simulator.child.wait(crate::harness::PATIENCE).await;
    assert_eq!(status.code(), Some(0));
}

#[test]
fn help_lists_the_control_lines_and_wrong_flags_are_refused() {
    let help = run(&["simulate", "--help"], &[]);
    let help = String::from_utf8(help.stdout).unwrap();
    for said in ["--lifelike", "half-open [N|all]", "refuse-connections SECONDS", "Lines on standard input"] {
        assert!(help.contains(said), "{said} in {help}");
    }
    for wrong in [["--refuse-join", "gone"], ["--refuse-join", "why:gone"], ["--refuse-login=why", "--tls"]] {
        let output = run(&[&["simulate"], &wrong[..]].concat(), &[]);
        assert_eq!(output.status.code(), Some(64), "{wrong:?}");
    }
}
