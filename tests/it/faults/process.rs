//! The service itself breaks, or is replaced.

use std::time::Duration;

use serde_json::Value;

use super::Ground;
use crate::harness::account::{Account, now_ms};
use crate::harness::eventually;
use crate::harness::inlet::{Inlet, Simulator, run};

/// `OUTBOX_AFTER` is 250 ms; a machine that runs other tests beside this one may hold up a process for as long again.
const SPAN: Duration = Duration::from_millis(750);

#[tokio::test]
async fn killed_at_random_points_it_doubles_nothing_and_loses_the_last_moment_at_most() {
    const KILLS: usize = 4;
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let ground = Ground::new(&["--rate", "500", "--count", "8000"]).await;
    let mut account = Account::new().cut();
    let mut inlet = ground.serve(&[]).await;
    for _ in 0..KILLS {
        let more = random.usize(300..1_200);
        ground.simulator.has_sent(ground.simulator.sent().len() + more).await;
        inlet.child.kill();
        account = account.killed(now_ms(), SPAN);
        inlet = ground.serve_in(inlet.into_folder(), &[]).await;
    }
    ground.simulator.has_finished(8_000).await;
    let summary = ground.close(inlet, account).await;
    assert!(summary["inStream"].as_u64() > Some(5_000), "{summary}");
}

#[tokio::test]
async fn killed_in_its_first_second_its_gap_is_told_by_the_next_run() {
    let mut ground = Ground::new(&["--rate", "300"]).await;
    let mut account = Account::new().cut();
    let mut inlet = ground.serve(&[]).await;
    for _ in 0..2 {
        let sent = ground.simulator.sent().len();
        ground.simulator.has_sent(sent + 100).await;
        inlet.child.kill();
        account = account.killed(now_ms(), SPAN);
        inlet = ground.serve_in(inlet.into_folder(), &[]).await;
    }
    let sent = ground.simulator.sent().len();
    ground.simulator.has_sent(sent + 300).await;
    ground.simulator.say("pause");
    let summary = ground.close(inlet, account).await;
    assert_eq!(summary["gapEvents"], 4, "one for each channel and kill: {summary}");
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
        let output = run(&arguments, &[("PORT", &port)]);
        let lines = String::from_utf8(output.stdout).unwrap();
        let mut ids: Vec<_> = lines
            .lines()
            .map(|line| serde_json::from_str::<Value>(line).unwrap()["id"].as_str().unwrap().to_owned())
            .collect();
        assert_eq!(ids.len() as u64, acknowledged, "round {round}: what was acknowledged is there");
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len() as u64, acknowledged, "round {round}: once");
    }
}

#[tokio::test]
async fn paused_it_goes_on_where_it_was() {
    let ground = Ground::new(&["--rate", "300", "--count", "2500"]).await;
    let inlet = ground.serve(&[]).await;
    ground.simulator.has_sent(600).await;
    inlet.child.stop().await;
    // What it does not read waits in its socket and at the server.
    ground.simulator.has_sent(1_800).await;
    inlet.child.signal("CONT");
    ground.simulator.has_finished(2_500).await;
    let summary = ground.close(inlet, Account::new()).await;
    assert_eq!((&summary["inStream"], &summary["missing"]), (&2_500.into(), &0.into()), "{summary}");
}

#[tokio::test]
async fn a_deploy_that_overlaps_loses_and_doubles_nothing() {
    let ground = Ground::new(&["--rate", "300", "--count", "4500"]).await;
    let mut old = ground.serve(&[]).await;
    for round in 1..=2 {
        ground.simulator.has_sent(ground.simulator.sent().len() + 600).await;
        let new = ground.serve(&[]).await;
        let sent = ground.simulator.sent().len();
        ground.simulator.has_sent(sent + 300).await;
        let (spent, code) = old.terminate(Duration::from_secs(10)).await;
        assert_eq!(code, Some(0), "round {round}: {}", old.log());
        assert!(spent < Duration::from_millis(8_500), "round {round}: {spent:?}");
        old = new;
    }
    ground.simulator.has_finished(4_500).await;
    // What those before had counted went with them, so the stream alone is judged.
    let account = Account::new().unordered();
    let (_, _folder) = ground.end(old, account.clone()).await;
    let summary = account.judge(&ground.nats, &[&ground.simulator]);
    assert_eq!((&summary["inStream"], &summary["missing"]), (&4_500.into(), &0.into()), "{summary}");
}
