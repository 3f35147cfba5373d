//! Bytes that no server should send, over a real socket: counted, no panic, no lost connection.

use std::sync::Arc;
use std::time::Duration;

use inlet::sim::{Command, SimConfig, Simulator};
use serde_json::Value;

use crate::harness::eventually;
use crate::harness::inlet::{Inlet, run};

async fn simulator() -> Arc<Simulator> {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut config = SimConfig::new(inlet::clock::system_milliseconds);
    config.channels = vec!["alpha".to_owned()];
    config.count = Some(0);
    Arc::new(Simulator::start(config, listener).await.unwrap())
}

async fn service(simulator: &Simulator) -> Inlet {
    let url = format!("irc://{}", simulator.local_addr());
    let inlet = Inlet::serve(&[("TWITCH_CHANNELS", "alpha"), ("TWITCH_IRC_URL", &url)]).await;
    inlet.ready().await;
    inlet
}

/// The bodies in the stream; dead letters are not shown by `tail`.
fn envelopes(inlet: &Inlet, count: u64) -> Vec<Value> {
    let (port, count) = (inlet.port.to_string(), count.to_string());
    let output = run(&["tail", "--json", "--after", "0", "--count", &count], &[("PORT", &port)]);
    String::from_utf8(output.stdout)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

#[tokio::test]
async fn every_kind_of_bad_line_is_counted_and_the_connection_lives() {
    let simulator = simulator().await;
    let inlet = service(&simulator).await;
    let mut bytes = Vec::new();
    let mut long = b"@id=long :n!n@n PRIVMSG #alpha :".to_vec();
    long.resize(1 << 20, b'x');
    for line in [
        b"@id=utf8;user-id=1 :n!n@n PRIVMSG #alpha :a\xff\xfeb".as_slice(),
        &long,
        b"@id=reversed;user-id=1;emotes=25:4-0 :n!n@n PRIVMSG #alpha :Kappa",
        b"@id=overlong;user-id=1;emotes=25:0-99,18446744073709551615-1 :n!n@n PRIVMSG #alpha :Kappa",
        b":n!n@n PRIVMSG #alpha :no tags at all",
        b"@id=nosign;room-id=5 :n!n@n PRIVMSG alpha :no sign",
        b":!@.tmi.twitch.tv CLEARCHAT alpha",
        b"@id=nul;user-id=1 :n!n@n PRIVMSG #alpha :a\0b",
        b"",
        b"   ",
        b"@id=bad :n!n@n PRIVMSG",
        b"@@@;;;===",
        b"\x00\x01\x02\xff",
        b"@id=last;user-id=1 :n!n@n PRIVMSG #alpha :the end",
    ] {
        bytes.extend_from_slice(line);
        bytes.extend_from_slice(b"\r\n");
    }
    simulator.control(Command::Raw(bytes)).await;
    let metrics = inlet.settled(12).await;
    metrics.assert_account_closes();
    for (kind, count) in
        [("invalid_utf8", 2), ("too_long", 1), ("empty", 2), ("not_normalizable", 1), ("unparsable", 2)]
    {
        assert_eq!(metrics.get(&format!("inlet_twitch_bad_lines_total{{kind=\"{kind}\"}}")), count, "{kind}");
    }
    assert_eq!(metrics.get("inlet_twitch_emote_ranges_dropped_total"), 3);
    assert_eq!(metrics.sum("inlet_events_deadlettered_total"), 4);
    assert_eq!(metrics.get("inlet_twitch_reconnects_total"), 0);
    assert_eq!(metrics.get("inlet_twitch_connected"), 1);
    let texts: Vec<_> = envelopes(&inlet, 8)
        .iter()
        .map(|envelope| envelope["payload"]["text"].as_str().unwrap_or("-").to_owned())
        .collect();
    assert_eq!(
        texts,
        ["a\u{fffd}\u{fffd}b", "Kappa", "Kappa", "no tags at all", "no sign", "-", "a\0b", "the end"]
    );
    let log = inlet.log();
    assert!(!log.contains("no tags at all") && !log.contains("panicked"), "{log}");
}

#[tokio::test]
async fn lines_arrive_whole_wherever_the_bytes_are_cut() {
    let simulator = simulator().await;
    let inlet = service(&simulator).await;
    let line =
        |n: usize| format!("@id=cut{n};user-id=1;emotes=25:2-6 :n!n@n PRIVMSG #alpha :😂 Kappa {n}\r\n");
    let length = line(100).len();
    for cut in 0..length {
        let line = line(100 + cut).into_bytes();
        for part in [&line[..cut], &line[cut..]] {
            simulator.control(Command::Raw(part.to_vec())).await;
        }
        if cut % 16 == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    let metrics = inlet.settled(length as u64).await;
    assert_eq!(metrics.sum("inlet_events_published_total"), length as u64);
    assert_eq!(metrics.sum("inlet_twitch_bad_lines_total"), 0);
    for (n, envelope) in envelopes(&inlet, length as u64).iter().enumerate() {
        assert_eq!(envelope["payload"]["text"], format!("😂 Kappa {}", 100 + n));
        assert_eq!(envelope["payload"]["emotes"][0]["name"], "Kappa");
    }
}

#[tokio::test]
async fn a_message_too_large_for_the_server_becomes_a_dead_letter_that_fits() {
    let nats = crate::harness::nats::Nats::with_config("max_payload: 2048").await;
    let simulator = simulator().await;
    let url = format!("irc://{}", simulator.local_addr());
    let inlet =
        Inlet::serve(&[("TWITCH_CHANNELS", "alpha"), ("TWITCH_IRC_URL", &url), ("NATS_URL", &nats.url())])
            .await;
    inlet.ready().await;
    let large = format!("@id=large;user-id=1 :n!n@n PRIVMSG #alpha :{}\r\n", "x".repeat(3_000));
    simulator.control(Command::Raw(large.into_bytes())).await;
    simulator.control(Command::Raw(b"@id=small;user-id=1 :n!n@n PRIVMSG #alpha :small\r\n".to_vec())).await;
    let metrics = inlet.settled(2).await;
    metrics.assert_account_closes();
    assert_eq!(metrics.get("inlet_events_deadlettered_total{reason=\"too_large\",source=\"twitch\"}"), 1);
    let found = crate::harness::stream::read(&nats.url(), "INLET").await;
    let letter = found.iter().find(|message| message.subject == "internal.deadletter.v1").unwrap();
    assert_eq!(
        (letter.body["reason"].as_str(), letter.body["truncated"].as_bool()),
        (Some("too_large"), Some(true))
    );
    let key = "twitch:large";
    let id = inlet::envelope::id::event_id(key);
    assert_eq!(letter.msg_id, format!("dlq-{id}"));
    assert_eq!(found.len(), 2);
}

#[tokio::test]
async fn a_line_that_lies_about_its_time_is_taken_as_it_says() {
    let simulator = simulator().await;
    let inlet = service(&simulator).await;
    // Long ago: looked for in the stream before it is sent, and sent. In the far future, and no number at all.
    for (id, time) in [
        ("old", "1000000000000"),
        ("new", "99999999999999"),
        ("odd", "soon"),
        ("early", "-1"),
        ("old", "1000000000000"),
    ] {
        let line = format!("@id={id};user-id=1;tmi-sent-ts={time} :n!n@n PRIVMSG #alpha :{id}\r\n");
        simulator.control(Command::Raw(line.into_bytes())).await;
    }
    let metrics = inlet.settled(5).await;
    metrics.assert_account_closes();
    assert_eq!(metrics.get("inlet_events_duplicate_total{source=\"twitch\"}"), 1);
    let envelopes = envelopes(&inlet, 4);
    assert_eq!(envelopes[0]["occurredAt"], "2001-09-09T01:46:40.000Z");
    for undated in &envelopes[2..] {
        assert_eq!(undated["occurredAt"], undated["timestamp"]);
    }
    eventually("still connected", || async {
        (inlet.metrics().await.get("inlet_twitch_connected") == 1).then_some(())
    })
    .await;
}
