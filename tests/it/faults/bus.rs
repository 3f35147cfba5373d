//! NATS breaks: killed, paused, emptied, full, too small, slow, deaf.

use std::time::{Duration, Instant};

use async_nats::jetstream::stream::{Config, DiscardPolicy};
use serde_json::Value;

use super::Ground;
use crate::harness::account::{Account, now_ms};
use crate::harness::inlet::Inlet;
use crate::harness::nats::Nats;
use crate::harness::proxy::{Mode, Proxy, Way};
use crate::harness::readiness::Watch;
use crate::harness::{eventually, within};

/// A ground with a proxy before its NATS, and a service that goes through it.
struct Proxied {
    ground: Ground,
    proxy: Proxy,
    inlet: Inlet,
    watch: Watch,
}

impl Proxied {
    async fn new(flags: &[&str], more: &[(&str, &str)]) -> Self {
        Self::on(Nats::start().await, flags, more).await
    }

    async fn on(nats: Nats, flags: &[&str], more: &[(&str, &str)]) -> Self {
        let ground = Ground::on(nats, flags).await;
        let proxy = Proxy::to(ground.nats.addr()).await;
        let url = format!("nats://{}", proxy.addr());
        let settings = [&[("NATS_URL", url.as_str())], more].concat();
        let inlet = ground.serve(&settings).await;
        let watch = Watch::on(&inlet);
        Self { ground, proxy, inlet, watch }
    }

    /// The bus was broken, and mended: when the first attempt after that got through, and that `/readyz` said so.
    async fn assert_bus_named(&self, broken: Instant, mended: Instant) {
        let attempt =
            eventually("it connects again", || async { self.proxy.first_connection_after(mended) }).await;
        self.inlet.ready().await;
        // Asked ten times a second; the first content answer has to be among them.
        eventually("the watch sees it", || async { self.watch.is_ready().then_some(()) }).await;
        self.watch.assert_named("bus", broken, attempt);
    }

    async fn close(self, account: Account) -> Value {
        let Self { ground, inlet, watch, .. } = self;
        drop(watch);
        ground.close(inlet, account).await
    }
}

/// Nothing is missing, and nobody was refused.
fn assert_all(summary: &Value, sent: u64) {
    assert_eq!((&summary["inStream"], &summary["missing"]), (&sent.into(), &0.into()), "{summary}");
}

#[tokio::test]
async fn killed_and_restarted_with_its_data_it_loses_and_doubles_nothing() {
    let mut case = Proxied::new(&["--rate", "400", "--count", "4000"], &[]).await;
    case.ground.simulator.has_sent(800).await;
    case.ground.nats.kill();
    let broken = Instant::now();
    case.ground.simulator.has_sent(2_000).await;
    let mended = Instant::now();
    case.ground.nats.restart().await;
    case.assert_bus_named(broken, mended).await;
    case.ground.simulator.has_finished(4_000).await;
    assert_all(&case.close(Account::new()).await, 4_000);
}

#[tokio::test]
async fn paused_it_loses_and_doubles_nothing() {
    let case = Proxied::new(&["--rate", "300", "--count", "3000"], &[("PUBLISH_ACK_WAIT", "1s")]).await;
    case.ground.simulator.has_sent(500).await;
    case.ground.nats.stop().await;
    case.ground.simulator.has_sent(1_700).await;
    case.ground.nats.signal("CONT");
    case.ground.simulator.has_finished(3_000).await;
    let metrics = case.inlet.quiet().await;
    assert!(metrics.get("inlet_publish_retries_total{cause=\"timed_out\"}") > 0, "the pause was felt");
    assert_all(&case.close(Account::new()).await, 3_000);
}

/// What the stream had is gone: what was not acknowledged then, or came later, is in the new one.
async fn destroyed(is_restarted: bool) {
    let mut case = Proxied::new(&["--rate", "300", "--count", "3000"], &[]).await;
    case.ground.simulator.has_sent(900).await;
    let at = if is_restarted {
        case.ground.nats.kill();
        let (at, broken) = (now_ms(), Instant::now());
        case.ground.simulator.has_sent(1_500).await;
        let mended = Instant::now();
        case.ground.nats.restart_empty().await;
        case.assert_bus_named(broken, mended).await;
        at
    } else {
        case.ground.nats.jetstream().await.delete_stream("INLET").await.unwrap();
        now_ms()
    };
    case.ground.simulator.has_finished(3_000).await;
    let Proxied { ground, inlet, .. } = case;
    let (account, _folder) = ground.end(inlet, Account::new().destroyed(at)).await;
    let summary = account.judge(&ground.nats, &[&ground.simulator]);
    assert!(summary["inStream"].as_u64() > Some(1_500), "{summary}");
}

#[tokio::test]
async fn restarted_empty_it_gets_what_was_not_acknowledged_and_what_comes() {
    destroyed(true).await;
}

#[tokio::test]
async fn with_its_stream_deleted_it_gets_what_was_not_acknowledged_and_what_comes() {
    destroyed(false).await;
}

/// A stream of an operator's, with Inlet's subjects.
fn operators_stream() -> Config {
    let subjects = ["internal.ingress.v1", "internal.deadletter.v1"].map(str::to_owned);
    Config {
        name: "INLET".to_owned(),
        subjects: subjects.to_vec(),
        duplicate_window: Duration::from_mins(2),
        ..Config::default()
    }
}

#[tokio::test]
async fn a_full_stream_that_discards_what_is_new_gets_all_once_there_is_room() {
    let nats = Nats::start().await;
    let full = Config { discard: DiscardPolicy::New, max_messages: 700, ..operators_stream() };
    nats.jetstream().await.create_stream(full.clone()).await.unwrap();
    let case = Proxied::on(nats, &["--rate", "300", "--count", "2500"], &[]).await;
    eventually("the stream is full", || async {
        (case.inlet.metrics().await.get("inlet_publish_retries_total{cause=\"full\"}") > 0).then_some(())
    })
    .await;
    case.ground.simulator.has_sent(1_700).await;
    let room = Config { max_messages: -1, ..full };
    case.ground.nats.jetstream().await.update_stream(room).await.unwrap();
    case.ground.simulator.has_finished(2_500).await;
    assert_all(&case.close(Account::new().refused_at_first(1_024)).await, 2_500);
}

#[tokio::test]
async fn a_server_that_takes_less_than_before_gets_dead_letters_and_then_all() {
    let mut case = Proxied::new(&["--rate", "200"], &[]).await;
    case.ground.simulator.has_sent(300).await;
    // Envelopes have some 2 KiB, and their headers a quarter of one.
    for (config, family) in
        [("max_payload: 1200", "inlet_events_deadlettered_total"), ("", "inlet_events_published_total")]
    {
        let before = case.inlet.metrics().await.sum(family);
        case.ground.nats.kill();
        case.ground.nats.configure(config);
        case.ground.nats.restart().await;
        eventually("what is sent ends as this server has it", || async {
            (case.inlet.metrics().await.sum(family) > before + 200).then_some(())
        })
        .await;
    }
    case.ground.simulator.say("pause");
    let summary = case.close(Account::new()).await;
    let of = |figure: &str| summary[figure].as_u64().unwrap();
    assert!(of("deadLetters") > 200 && of("inStream") + of("deadLetters") == of("sent"), "{summary}");
}

#[tokio::test]
async fn slow_acks_are_waited_for() {
    let case = Proxied::new(&["--rate", "300", "--count", "2000"], &[]).await;
    case.ground.simulator.has_sent(300).await;
    let begun = Instant::now();
    case.proxy.set(Mode::Delay(Way::Down, Duration::from_millis(200)));
    case.ground.simulator.has_sent(1_300).await;
    case.proxy.set(Mode::Pass);
    case.ground.simulator.has_finished(2_000).await;
    case.watch.assert_ready_since(begun);
    let metrics = case.inlet.quiet().await;
    assert_eq!(metrics.sum("inlet_publish_retries_total"), 0, "slow is not lost");
    assert_all(&case.close(Account::new()).await, 2_000);
}

#[tokio::test]
async fn lost_acks_are_asked_for_again_and_the_dead_connection_is_left() {
    let case = Proxied::new(&["--rate", "200", "--count", "4500"], &[("PUBLISH_ACK_WAIT", "1s")]).await;
    case.ground.simulator.has_sent(400).await;
    let broken = Instant::now();
    case.proxy.set_standing(Mode::Swallow(Way::Down));
    // The server hears everything, and its answers go nowhere: until it is clear that this connection is dead.
    let attempt = within(Duration::from_secs(40), "another connection", || async {
        case.proxy.first_connection_after(broken)
    })
    .await;
    case.assert_bus_named(broken, attempt).await;
    case.ground.simulator.has_finished(4_500).await;
    let metrics = case.inlet.quiet().await;
    assert!(metrics.sum("inlet_publish_duplicates_total") > 0, "what was stored is found to be");
    assert_all(&case.close(Account::new()).await, 4_500);
}

#[tokio::test]
async fn answers_with_bytes_missing_cost_a_connection_and_nothing_else() {
    let case = Proxied::new(&["--rate", "300", "--count", "2400"], &[("PUBLISH_ACK_WAIT", "1s")]).await;
    case.ground.simulator.has_sent(500).await;
    case.proxy.set(Mode::Drop(Way::Down, 500));
    case.ground.simulator.has_sent(1_400).await;
    case.proxy.set(Mode::Cut);
    case.proxy.set(Mode::Pass);
    case.ground.simulator.has_finished(2_400).await;
    // An ack that lost a digit of its position would be believed: users are not compared here.
    let Proxied { ground, inlet, .. } = case;
    let (account, _folder) = ground.end(inlet, Account::new()).await;
    assert_all(&account.judge(&ground.nats, &[&ground.simulator]), 2_400);
}

#[tokio::test]
async fn away_past_the_duplicate_window_while_a_twin_published_it_looks_back() {
    let nats = Nats::start().await;
    let forgetful = Config { duplicate_window: Duration::from_secs(2), ..operators_stream() };
    nats.jetstream().await.create_stream(forgetful).await.unwrap();
    let case = Proxied::on(nats, &["--rate", "200", "--count", "3000"], &[]).await;
    let twin = case.ground.serve(&[]).await;
    case.ground.simulator.has_sent(1_200).await;
    case.proxy.set(Mode::Cut);
    let cut = Instant::now();
    // What both were sent in this time, the twin publishes alone, and the stream forgets its ids.
    case.ground.simulator.has_sent(1_200 + 2 * 200 * 7).await;
    assert!(cut.elapsed() > Duration::from_secs(4));
    case.proxy.set(Mode::Pass);
    case.ground.simulator.has_finished(3_000).await;
    let Proxied { ground, inlet, .. } = case;
    let (account, _one) = ground.end(inlet, Account::new().unordered()).await;
    let (account, _other) = ground.end(twin, account).await;
    assert_all(&account.judge(&ground.nats, &[&ground.simulator]), 3_000);
}

#[tokio::test]
async fn away_for_longer_than_there_is_room_it_refuses_and_counts() {
    let mut case = Proxied::new(
        &["--rate", "1000", "--count", "12000"],
        &[
            ("INTAKE_MAX_EVENTS", "500"),
            ("INTAKE_WAIT", "200ms"),
            ("PUBLISH_MAX_IN_FLIGHT", "100"),
            ("OUTBOX_MAX_BYTES", "4MiB"),
        ],
    )
    .await;
    case.ground.simulator.has_sent(1_000).await;
    case.ground.nats.kill();
    let broken = Instant::now();
    eventually("refusals", || async {
        (case.inlet.metrics().await.sum("inlet_events_refused_total") > 500).then_some(())
    })
    .await;
    assert!(case.inlet.waiting_for().await.contains(&"bus".to_owned()));
    let (status, health) = case.inlet.json("/healthz").await;
    assert_eq!(
        (status, health["status"].as_str(), health["parts"]["bus"]["state"].as_str()),
        (200, Some("degraded"), Some("away"))
    );
    let (now, _) = case.inlet.memory_kib();
    assert!(now < 128 * 1024, "{now} KiB: nothing grows");
    let mended = Instant::now();
    case.ground.nats.restart().await;
    case.assert_bus_named(broken, mended).await;
    case.ground.simulator.has_finished(12_000).await;
    let summary = case.close(Account::new()).await;
    let (stream, refused) = (summary["inStream"].as_u64().unwrap(), summary["refused"].as_u64().unwrap());
    assert!(refused > 500 && stream + refused == 12_000, "{summary}");
}

#[tokio::test]
async fn a_start_without_nats_succeeds_and_finds_it_later() {
    let mut nats = Nats::start().await;
    nats.kill();
    let mut ground = Ground::on(nats, &["--rate", "100", "--count", "500"]).await;
    let inlet = ground.start_in(tempfile::tempdir().unwrap(), &[]).await;
    assert_eq!(inlet.json("/readyz").await.0, 503);
    eventually("only the bus is waited for", || async {
        (inlet.waiting_for().await == ["bus"]).then_some(())
    })
    .await;
    ground.nats.restart().await;
    inlet.ready().await;
    ground.note_descriptors(&inlet);
    let sent = ground.simulator.has_finished(500).await;
    let summary = ground.close(inlet, Account::new()).await;
    assert_eq!((&summary["inStream"], &summary["missing"]), (&sent.len().into(), &summary["uncarried"]));
}

#[tokio::test]
async fn while_the_bus_is_away_chats_socket_is_the_queue() {
    // A door that waits as long as it takes refuses nobody: what it does not read waits where it comes from.
    let settings = [("INTAKE_MAX_EVENTS", "200"), ("INTAKE_WAIT", "60s"), ("PUBLISH_MAX_IN_FLIGHT", "100")];
    let mut case = Proxied::new(&["--rate", "500", "--count", "5000"], &settings).await;
    case.ground.simulator.has_sent(1_000).await;
    case.ground.nats.kill();
    case.ground.simulator.has_sent(3_500).await;
    case.ground.nats.restart().await;
    case.ground.simulator.has_finished(5_000).await;
    let summary = case.close(Account::new()).await;
    assert_all(&summary, 5_000);
    assert_eq!(summary["refused"], 0);
}
