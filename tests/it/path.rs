//! The whole path: simulated chat over a real socket, the real binary, a real nats-server; what was sent is
//! compared with what an independent reader finds in the stream.

use std::time::Duration;

use crate::harness::inlet::{Inlet, Simulator};
use crate::harness::nats::Nats;
use crate::harness::stream::{assert_holds_exactly, read};

const CHANNELS: &str = "alpha,beta,gamma";

#[tokio::test]
async fn everything_sent_is_in_the_stream_once_and_in_order() {
    let nats = Nats::start().await;
    let simulator = Simulator::start(&["--channels", CHANNELS, "--rate", "1000", "--count", "20000"]).await;
    let inlet = Inlet::serve(&[
        ("TWITCH_CHANNELS", CHANNELS),
        ("TWITCH_IRC_URL", &simulator.url()),
        ("NATS_URL", &nats.url()),
    ])
    .await;
    let sent = simulator.has_finished(20_000).await;
    let metrics = inlet.settled(sent.len() as u64).await;
    assert_eq!(metrics.get("inlet_events_published_total{source=\"twitch\"}"), sent.len() as u64);
    metrics.assert_account_closes();
    let found = read(&nats.url(), "INLET").await;
    assert_holds_exactly(&found, &sent);
    let (now, _) = inlet.memory_kib();
    assert!(now < 96 * 1024, "{now} KiB");

    // The headers of one of them say what its envelope says.
    let message = &found[0];
    assert_eq!(message.subject, "internal.ingress.v1");
    assert_eq!(message.headers["type"], "external.chat.message.v1");
    let trace = message.body["traceId"].as_str().unwrap();
    assert_eq!(message.headers["traceparent"], format!("00-{trace}-{}-01", &trace[16..]));
    assert_eq!(message.headers["Nats-Msg-Id"], message.body["id"].as_str().unwrap());
    let by_user = format!("users/{}", message.headers["Inlet-User"]);
    assert_eq!(by_user, message.body["auth"]["userRef"]);
    let at: jiff::Timestamp = message.body["occurredAt"].as_str().unwrap().parse().unwrap();
    assert_eq!(message.headers["Inlet-At"], at.as_millisecond().to_string());
}

#[tokio::test]
async fn sigterm_leaves_everything_taken_in_in_the_stream() {
    let nats = Nats::start().await;
    let simulator = Simulator::start(&["--channels", CHANNELS, "--rate", "2000"]).await;
    let mut inlet = Inlet::serve(&[
        ("TWITCH_CHANNELS", CHANNELS),
        ("TWITCH_IRC_URL", &simulator.url()),
        ("NATS_URL", &nats.url()),
    ])
    .await;
    simulator.has_sent(6_000).await;
    let (spent, code) = inlet.terminate(Duration::from_secs(9)).await;
    assert_eq!(code, Some(0), "{}", inlet.log());
    // `SHUTDOWN_GRACE`, and half a second.
    assert!(spent < Duration::from_millis(8_500), "{spent:?}");
    let found = read(&nats.url(), "INLET").await;
    // What was sent up to the first message that was not taken in any more; nothing between is missing.
    let mut sent = simulator.sent();
    assert!(found.len() > 5_000 && sent.len() >= found.len());
    for channel in CHANNELS.split(',') {
        let of_channel = |in_channel: &str| in_channel == channel;
        let count =
            found.iter().filter(|m| of_channel(m.body["source"]["channel"].as_str().unwrap())).count();
        let mut kept = 0;
        sent.retain(|(in_channel, _)| {
            let is_kept = !of_channel(in_channel) || kept < count;
            kept += usize::from(of_channel(in_channel));
            is_kept
        });
    }
    assert_holds_exactly(&found, &sent);
}

#[tokio::test]
async fn while_it_drains_the_service_says_so() {
    let nats = Nats::start().await;
    let simulator = Simulator::start(&["--channels", CHANNELS, "--rate", "500"]).await;
    let mut inlet = Inlet::serve(&[
        ("TWITCH_CHANNELS", CHANNELS),
        ("TWITCH_IRC_URL", &simulator.url()),
        ("NATS_URL", &nats.url()),
        ("SHUTDOWN_GRACE", "4s"),
    ])
    .await;
    simulator.has_sent(500).await;
    // It answers nothing, and for a while nobody knows whether it will.
    nats.stop().await;
    crate::harness::eventually("events wait", || async {
        (inlet.metrics().await.sum("inlet_events_pending") > 100).then_some(())
    })
    .await;
    inlet.child.signal("TERM");
    crate::harness::eventually("draining", || async {
        let waiting = inlet.waiting_for().await;
        let (status, _) = inlet.json("/healthz").await;
        (waiting.contains(&"shutdown".to_owned()) && status == 503).then_some(())
    })
    .await;
    // The end comes when it was promised, and what was taken in is in the outbox.
    let start = std::time::Instant::now();
    assert_eq!(inlet.child.wait(Duration::from_secs(9)).await.code(), Some(0), "{}", inlet.log());
    assert!(start.elapsed() < Duration::from_millis(4_500), "{:?}", start.elapsed());
    assert!(inlet.log().contains("left in the outbox"), "{}", inlet.log());
}

#[tokio::test]
async fn the_same_path_on_the_embedded_stream_and_through_tail() {
    let simulator = Simulator::start(&["--channels", "alpha", "--rate", "500", "--count", "2000"]).await;
    let settings = [("TWITCH_CHANNELS", "#Alpha"), ("TWITCH_IRC_URL", &simulator.url())];
    let mut inlet = Inlet::serve(&settings).await;
    let sent = simulator.has_finished(2_000).await;
    let metrics = inlet.settled(sent.len() as u64).await;
    metrics.assert_account_closes();
    let sent: Vec<_> = sent.into_iter().map(|(_, id)| id).collect();
    assert_eq!(tail(&inlet, sent.len()), sent);

    // A restart keeps all of it, and the next run goes on behind it.
    assert_eq!(inlet.terminate(Duration::from_secs(9)).await.1, Some(0));
    let inlet = Inlet::serve_in(inlet.into_folder(), &settings).await;
    assert_eq!(tail(&inlet, sent.len()), sent);
}

/// The message ids that `inlet tail` shows from the start of the stream.
fn tail(inlet: &Inlet, count: usize) -> Vec<String> {
    let (port, count) = (inlet.port.to_string(), count.to_string());
    let arguments = ["tail", "--json", "--after", "0", "--count", &count];
    let output = crate::harness::inlet::run(&arguments, &[("PORT", &port)]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let lines = String::from_utf8(output.stdout).unwrap();
    let id = |line: &str| {
        let envelope: serde_json::Value = serde_json::from_str(line).unwrap();
        envelope["payload"]["messageId"].as_str().unwrap().to_owned()
    };
    lines.lines().map(id).collect()
}

#[tokio::test]
async fn subjects_are_made_of_the_event_where_the_settings_say_so() {
    let nats = Nats::start().await;
    let simulator = Simulator::start(&["--channels", "alpha,beta", "--rate", "200", "--count", "100"]).await;
    let inlet = Inlet::serve(&[
        ("TWITCH_CHANNELS", "alpha,beta"),
        ("TWITCH_IRC_URL", &simulator.url()),
        ("NATS_URL", &nats.url()),
        ("BUS_PREFIX", "dev."),
        ("PUBLISH_SUBJECT", "chat.{platform}.{channel}.{type}"),
    ])
    .await;
    let sent = simulator.has_finished(100).await;
    inlet.settled(sent.len() as u64).await;
    let found = read(&nats.url(), "INLET_dev").await;
    assert!(found.len() == sent.len() && found.len() > 50);
    for message in &found {
        let channel = message.body["source"]["channel"].as_str().unwrap();
        assert_eq!(message.subject, format!("dev.chat.twitch.{channel}.external=2Echat=2Emessage=2Ev1"));
    }
}

#[tokio::test]
async fn two_services_on_the_same_channels_publish_each_message_once() {
    let nats = Nats::start().await;
    let simulator = Simulator::start(&["--channels", CHANNELS, "--rate", "500", "--count", "5000"]).await;
    let (irc, url) = (simulator.url(), nats.url());
    let settings =
        [("TWITCH_CHANNELS", CHANNELS), ("TWITCH_IRC_URL", irc.as_str()), ("NATS_URL", url.as_str())];
    let (first, second) = (Inlet::serve(&settings).await, Inlet::serve(&settings).await);
    let sent = simulator.has_finished(5_000).await;
    let (a, b) = crate::harness::eventually("both took in all that was sent to them", || async {
        let (a, b) = (first.metrics().await, second.metrics().await);
        let chat = "inlet_events_received_total{source=\"twitch\"}";
        let received = a.get(chat) + b.get(chat);
        let pending = a.sum("inlet_events_pending") + b.sum("inlet_events_pending");
        (received == sent.len() as u64 && pending == 0).then_some((a, b))
    })
    .await;
    for metrics in [&a, &b] {
        metrics.assert_account_closes();
    }
    let found = read(&nats.url(), "INLET").await;
    let published = a.sum("inlet_events_published_total") + b.sum("inlet_events_published_total");
    assert_eq!(found.len() as u64, published);
    let mut ids: Vec<_> = found.iter().map(|message| &message.msg_id).collect();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), found.len());
    assert!(a.sum("inlet_publish_duplicates_total") + b.sum("inlet_publish_duplicates_total") > 3_000);
}
