//! What is promised when something breaks: nothing lost, nothing twice, or counted.

use std::time::Duration;

use crate::harness::eventually;
use crate::harness::inlet::{Inlet, Simulator};
use crate::harness::nats::Nats;
use crate::harness::stream::{assert_holds_exactly, read};

const CHANNELS: &str = "alpha,beta";

async fn service(simulator: &Simulator, nats: &Nats, more: &[(&str, &str)]) -> Inlet {
    let (irc, url) = (simulator.url(), nats.url());
    let mut settings = vec![
        ("TWITCH_CHANNELS", CHANNELS),
        ("TWITCH_IRC_URL", irc.as_str()),
        ("NATS_URL", url.as_str()),
        ("IRC_RECONNECT_INITIAL_MS", "100"),
    ];
    settings.extend(more);
    Inlet::serve(&settings).await
}

#[tokio::test]
async fn nats_restarted_loses_nothing_and_doubles_nothing() {
    let mut nats = Nats::start().await;
    let simulator = Simulator::start(&["--channels", CHANNELS, "--rate", "500", "--count", "6000"]).await;
    let inlet = service(&simulator, &nats, &[]).await;
    inlet.ready().await;
    simulator.has_sent(1_000).await;
    nats.away_for(Duration::from_secs(3)).await;
    let sent = simulator.has_finished(6_000).await;
    inlet.ready().await;
    let metrics = inlet.settled(sent.len() as u64).await;
    metrics.assert_account_closes();
    assert_eq!(metrics.sum("inlet_events_refused_total"), 0);
    assert!(metrics.sum("inlet_publish_retries_total") > 0, "the outage was felt");
    assert_holds_exactly(&read(&nats.url(), "INLET").await, &sent);
}

#[tokio::test]
async fn nats_paused_loses_nothing_and_doubles_nothing() {
    let nats = Nats::start().await;
    let simulator = Simulator::start(&["--channels", CHANNELS, "--rate", "300", "--count", "4000"]).await;
    let inlet = service(&simulator, &nats, &[("PUBLISH_ACK_WAIT", "1s")]).await;
    simulator.has_sent(500).await;
    nats.stop().await;
    tokio::time::sleep(Duration::from_secs(4)).await;
    nats.signal("CONT");
    let sent = simulator.has_finished(4_000).await;
    let metrics = inlet.settled(sent.len() as u64).await;
    metrics.assert_account_closes();
    assert!(metrics.get("inlet_publish_retries_total{cause=\"timed_out\"}") > 0);
    assert_holds_exactly(&read(&nats.url(), "INLET").await, &sent);
}

#[tokio::test]
async fn a_start_without_nats_succeeds_and_finds_it_later() {
    let mut nats = Nats::start().await;
    nats.kill();
    let simulator = Simulator::start(&["--channels", CHANNELS, "--rate", "100", "--count", "500"]).await;
    let inlet = service(&simulator, &nats, &[]).await;
    assert_eq!(inlet.json("/readyz").await.0, 503);
    eventually("only the bus is waited for", || async {
        (inlet.waiting_for().await == ["bus"]).then_some(())
    })
    .await;
    nats.restart().await;
    inlet.ready().await;
    let sent = simulator.has_finished(500).await;
    inlet.settled(sent.len() as u64).await.assert_account_closes();
    assert_holds_exactly(&read(&nats.url(), "INLET").await, &sent);
}

#[tokio::test]
async fn a_dropped_connection_is_made_again_and_shown() {
    let nats = Nats::start().await;
    let mut simulator = Simulator::start(&["--channels", CHANNELS, "--rate", "200"]).await;
    let inlet = service(&simulator, &nats, &[]).await;
    simulator.has_sent(100).await;
    simulator.say("drop");
    eventually("a reconnect", || async {
        let (_, page) = inlet.json("/_debug/twitch").await;
        (page["reconnects"] == 1 && page["state"] == "connected").then_some(())
    })
    .await;
    inlet.ready().await;
    let (_, page) = inlet.json("/_debug/twitch").await;
    assert!(page["lastReconnectAt"].is_string() && page["lastError"]["code"].is_string(), "{page}");
    assert_eq!(inlet.metrics().await.get("inlet_twitch_reconnects_total"), 1);
    let before = inlet.metrics().await.sum("inlet_events_published_total");
    eventually("chat flows again", || async {
        (inlet.metrics().await.sum("inlet_events_published_total") > before + 100).then_some(())
    })
    .await;
    simulator.say("pause");
    inlet.settled(1).await.assert_account_closes();
}

#[tokio::test]
async fn a_reconnect_request_is_followed_without_waiting() {
    let nats = Nats::start().await;
    let mut simulator = Simulator::start(&["--channels", CHANNELS, "--rate", "50"]).await;
    let inlet = service(&simulator, &nats, &[("IRC_RECONNECT_INITIAL_MS", "30000")]).await;
    simulator.has_sent(20).await;
    simulator.say("reconnect");
    crate::harness::within(Duration::from_secs(5), "back at once", || async {
        let (_, page) = inlet.json("/_debug/twitch").await;
        (page["reconnects"] == 1 && page["state"] == "connected").then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_refused_login_is_a_state_and_not_the_end() {
    let simulator = Simulator::start(&["--channels", CHANNELS, "--refuse-login"]).await;
    let inlet = Inlet::serve(&[
        ("TWITCH_CHANNELS", CHANNELS),
        ("TWITCH_IRC_URL", &simulator.url()),
        ("TWITCH_BOT_USERNAME", "somebot"),
        ("TWITCH_BOT_ACCESS_TOKEN", "oauth:very-secret-token"),
    ])
    .await;
    eventually("login_failed", || async {
        let (_, page) = inlet.json("/_debug/twitch").await;
        (page["state"] == "error" && page["lastError"]["code"] == "login_failed").then_some(())
    })
    .await;
    assert_eq!(inlet.waiting_for().await, ["twitch"]);
    assert_eq!(inlet.json("/livez").await.0, 200);
    // One try in this time, not one after the other: logins are limited too.
    tokio::time::sleep(Duration::from_secs(3)).await;
    let tries = inlet.log().matches("Twitch refuses the login").count();
    assert_eq!(tries, 1, "{}", inlet.log());
    let everything = format!("{}{}", inlet.log(), inlet.json("/_debug/config").await.1);
    assert!(!everything.contains("very-secret-token"));
}

#[tokio::test]
async fn a_channel_that_never_answers_is_named() {
    let simulator =
        Simulator::start(&["--channels", "alpha", "--rate", "100", "--ignore-join", "ghost"]).await;
    let inlet =
        Inlet::serve(&[("TWITCH_CHANNELS", "ghost alpha"), ("TWITCH_IRC_URL", &simulator.url())]).await;
    eventually("alpha is joined", || async {
        let (_, page) = inlet.json("/_debug/twitch").await;
        (page["channels"][0]["name"] == "alpha" && page["channels"][0]["state"] == "joined").then_some(())
    })
    .await;
    let (_, page) = inlet.json("/_debug/twitch").await;
    assert_eq!(
        (&page["channels"][1]["name"], &page["channels"][1]["state"]),
        (&"ghost".into(), &"wanted".into())
    );
    assert_eq!(inlet.waiting_for().await, ["twitch"]);
}

#[tokio::test]
async fn the_embedded_stream_survives_being_killed() {
    let simulator = Simulator::start(&["--channels", "alpha", "--rate", "2000"]).await;
    let settings = [("TWITCH_CHANNELS", "alpha"), ("TWITCH_IRC_URL", &simulator.url())];
    let mut inlet = Inlet::serve(&settings).await;
    let mut acknowledged = 0;
    for round in 1..=3 {
        eventually("something published", || async {
            (inlet.metrics().await.sum("inlet_events_published_total") > 1_000).then_some(())
        })
        .await;
        acknowledged += inlet.metrics().await.sum("inlet_events_published_total");
        inlet.child.kill();
        inlet = Inlet::serve_in(inlet.into_folder(), &settings).await;
        let (port, count) = (inlet.port.to_string(), acknowledged.to_string());
        let arguments = ["tail", "--json", "--after", "0", "--count", &count];
        let output = crate::harness::inlet::run(&arguments, &[("PORT", &port)]);
        let lines = String::from_utf8(output.stdout).unwrap();
        let mut ids: Vec<_> = lines
            .lines()
            .map(|line| {
                serde_json::from_str::<serde_json::Value>(line).unwrap()["id"].as_str().unwrap().to_owned()
            })
            .collect();
        assert_eq!(ids.len() as u64, acknowledged, "round {round}: what was acknowledged is there");
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len() as u64, acknowledged, "round {round}: once");
    }
}
