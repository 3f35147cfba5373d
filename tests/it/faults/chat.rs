//! Twitch breaks: connections end, fall silent, or are asked to; logins and channels are refused.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{CHANNELS, Ground};
use crate::harness::account::Account;
use crate::harness::inlet::{Inlet, Simulator};
use crate::harness::proxy::{Mode, Proxy, Way};
use crate::harness::readiness::Watch;
use crate::harness::{eventually, free_port, within};

/// A ground whose chat goes through a proxy.
async fn proxied(flags: &[&str]) -> (Ground, Proxy, Inlet) {
    let ground = Ground::new(flags).await;
    let proxy = Proxy::to(ground.simulator.addr()).await;
    let inlet = ground.serve(&[("TWITCH_IRC_URL", &format!("irc://{}", proxy.addr()))]).await;
    (ground, proxy, inlet)
}

/// So many messages more were published.
async fn chat_flows(inlet: &Inlet, more: u64) {
    let before = inlet.metrics().await.sum("inlet_events_published_total");
    eventually("chat flows", || async {
        (inlet.metrics().await.sum("inlet_events_published_total") >= before + more).then_some(())
    })
    .await;
}

fn assert_none_refused_or_lost(summary: &Value) {
    assert_eq!((&summary["refused"], &summary["lost"]), (&json!(0), &json!(0)), "{summary}");
}

#[tokio::test]
async fn a_cut_connection_is_made_again_and_named_meanwhile() {
    let (ground, proxy, inlet) = proxied(&["--rate", "300", "--count", "2500"]).await;
    let watch = Watch::on(&inlet);
    ground.simulator.has_sent(500).await;
    let broken = Instant::now();
    proxy.set(Mode::Cut);
    eventually("it is named", || async { watch.has_named("twitch", broken).then_some(()) }).await;
    let mended = Instant::now();
    proxy.set(Mode::Pass);
    let attempt =
        within(Duration::from_mins(1), "it connects", || async { proxy.first_connection_after(mended) })
            .await;
    inlet.ready().await;
    chat_flows(&inlet, 100).await;
    ground.simulator.has_finished(2_500).await;
    watch.assert_named("twitch", broken, attempt);
    assert_none_refused_or_lost(&ground.close(inlet, Account::new().cut()).await);
}

#[tokio::test]
async fn a_half_open_connection_is_noticed_and_left() {
    let (mut ground, proxy, inlet) = proxied(&["--rate", "100"]).await;
    let watch = Watch::on(&inlet);
    ground.simulator.has_sent(200).await;
    // Nor is one that is dialled answered, or it would be back before anybody asked.
    let broken = Instant::now();
    proxy.set(Mode::Swallow(Way::Down));
    within(Duration::from_secs(40), "it is named", || async {
        watch.has_named("twitch", broken).then_some(())
    })
    .await;
    let mended = Instant::now();
    proxy.set(Mode::Cut);
    proxy.set(Mode::Pass);
    let attempt = within(Duration::from_secs(40), "another connection", || async {
        proxy.first_connection_after(mended)
    })
    .await;
    inlet.ready().await;
    chat_flows(&inlet, 100).await;
    watch.assert_named("twitch", broken, attempt);
    assert!(inlet.log().contains("no_answer"), "{}", inlet.log());
    ground.simulator.say("pause");
    assert_none_refused_or_lost(&ground.close(inlet, Account::new().cut()).await);
}

#[tokio::test]
async fn silence_alone_ends_no_connection() {
    let mut ground = Ground::new(&["--rate", "200", "--count", "1000"]).await;
    let inlet = ground.serve(&[]).await;
    let watch = Watch::on(&inlet);
    ground.simulator.has_sent(400).await;
    let begun = Instant::now();
    ground.simulator.say("pause");
    // Longer than an unanswered question would be waited for.
    tokio::time::sleep(Duration::from_secs(15)).await;
    watch.assert_ready_since(begun);
    ground.simulator.say("resume");
    ground.simulator.has_finished(1_000).await;
    assert_eq!(inlet.metrics().await.get("inlet_twitch_reconnects_total"), 0);
    let summary = ground.close(inlet, Account::new()).await;
    assert_eq!(summary["missing"], 0, "{summary}");
}

#[tokio::test]
async fn a_slow_line_costs_time_alone() {
    let (ground, proxy, inlet) = proxied(&["--rate", "300", "--count", "2000"]).await;
    ground.simulator.has_sent(300).await;
    proxy.set(Mode::Throttle(40_000));
    ground.simulator.has_sent(1_200).await;
    proxy.set(Mode::Pass);
    ground.simulator.has_finished(2_000).await;
    inlet.settled(2_000).await;
    assert_eq!(inlet.metrics().await.get("inlet_twitch_reconnects_total"), 0);
    let summary = ground.close(inlet, Account::new()).await;
    assert_eq!(summary["missing"], 0, "{summary}");
}

#[tokio::test]
async fn a_dropped_connection_is_made_again_and_shown() {
    let mut ground = Ground::new(&["--rate", "200", "--count", "1500"]).await;
    let inlet = ground.serve(&[]).await;
    ground.simulator.has_sent(100).await;
    ground.simulator.say("drop");
    eventually("a reconnect", || async {
        let (_, page) = inlet.json("/_debug/twitch").await;
        (page["reconnects"] == 1 && page["state"] == "connected").then_some(())
    })
    .await;
    inlet.ready().await;
    let (_, page) = inlet.json("/_debug/twitch").await;
    assert!(page["lastReconnectAt"].is_string() && page["lastError"]["code"].is_string(), "{page}");
    assert_eq!(inlet.metrics().await.get("inlet_twitch_reconnects_total"), 1);
    chat_flows(&inlet, 100).await;
    ground.simulator.has_finished(1_500).await;
    assert_none_refused_or_lost(&ground.close(inlet, Account::new().cut()).await);
}

#[tokio::test]
async fn a_reconnect_request_is_followed_without_waiting() {
    let mut ground = Ground::new(&["--rate", "200", "--count", "2500"]).await;
    let inlet = ground.serve(&[("IRC_RECONNECT_INITIAL_MS", "30000")]).await;
    ground.simulator.has_sent(200).await;
    ground.simulator.say("reconnect");
    within(Duration::from_secs(5), "back at once", || async {
        let (_, page) = inlet.json("/_debug/twitch").await;
        (page["reconnects"] == 1 && page["state"] == "connected").then_some(())
    })
    .await;
    ground.simulator.has_finished(2_500).await;
    assert_none_refused_or_lost(&ground.close(inlet, Account::new().cut()).await);
}

#[tokio::test]
async fn a_refused_login_is_a_state_and_not_the_end() {
    let simulator = Simulator::start(&["--channels", CHANNELS, "--refuse-login"]).await;
    let inlet = Inlet::serve(&[
        ("TWITCH_CHANNELS", CHANNELS),
        ("TWITCH_IRC_URL", &simulator.url()),
        ("TWITCH_BOT_USERNAME", "somebot"),
        ("TWITCH_BOT_ACCESS_TOKEN", "oauth:very-secret-token"),
        ("TWITCH_OAUTH_URL", &format!("http://127.0.0.1:{}", free_port())),
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
