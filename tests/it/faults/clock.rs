//! The clock steps, while the platform's own times go on: in process, where it can be moved.

use std::time::{Duration, Instant};

use inlet::app::{App, AppArgs, AppConfig};
use inlet::clock::Clock;
use inlet::settings::{Environment, Problems};
use inlet::tasks::Tasks;
use tokio::sync::oneshot;

use super::{CHANNELS, Ground};
use crate::harness::account::Account;
use crate::harness::eventually;
use crate::harness::inlet::Metrics;
use crate::harness::readiness::Watch;

const HOUR_MS: i64 = 3_600_000;

fn config(flags: &[&str]) -> AppConfig {
    #[derive(clap::Parser)]
    struct Command {
        #[command(flatten)]
        app: AppArgs,
    }
    let flags = std::iter::once("inlet").chain(flags.iter().copied());
    let command = <Command as clap::Parser>::try_parse_from(flags).unwrap();
    let mut problems = Problems::default();
    let config = command.app.check(&Environment::default(), &mut problems);
    assert!(problems.lines().is_empty(), "{:?}", problems.lines());
    config.unwrap()
}

/// A clock that goes as the system's does, and can be stepped besides.
fn running_clock(tasks: &mut Tasks) -> Clock {
    let clock = Clock::by_hand(Clock::system().now());
    let hand = clock.clone();
    tasks.spawn("the clock's hand", async move {
        let (start, mut moved) = (Instant::now(), 0);
        loop {
            tokio::time::sleep(Duration::from_millis(5)).await;
            let elapsed = i64::try_from(start.elapsed().as_millis()).unwrap();
            hand.step(elapsed - moved);
            moved = elapsed;
        }
    });
    clock
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn steps_of_an_hour_either_way_lose_and_double_nothing_and_leave_no_task() {
    inlet::tls::install_provider();
    let ground = Ground::new(&["--rate", "300", "--count", "3000"]).await;
    let folder = tempfile::tempdir().unwrap();
    let data_dir = folder.path().join("data");
    let config = config(&[
        "--port=0",
        "--bind-addr=127.0.0.1",
        &format!("--data-dir={}", data_dir.display()),
        &format!("--twitch-channels={CHANNELS}"),
        &format!("--twitch-irc-url={}", ground.simulator.url()),
        &format!("--nats-url={}", ground.nats.url()),
        "--message-bus-driver=nats",
        "--user-store-driver=embedded",
        "--enrich-timeout=5s",
    ]);
    let mut tasks = Tasks::new();
    let clock = running_clock(&mut tasks);
    let alive = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
    let before = alive();

    let app = App::start(config, clock.clone()).await.unwrap();
    let port = app.address().port();
    let (stop, stopped) = oneshot::channel::<()>();
    let (ended, end) = oneshot::channel();
    tasks.spawn("the service", async move {
        let stopped = async { drop(stopped.await) };
        drop(ended.send(app.run(stopped).await));
    });
    let watch = Watch::at(port);
    eventually("it is ready", || async { watch.is_ready().then_some(()) }).await;
    let ready = Instant::now();
    for (sent, step) in [(500, HOUR_MS), (1_100, -2 * HOUR_MS), (1_700, HOUR_MS)] {
        ground.simulator.has_sent(sent).await;
        clock.step(step);
    }
    ground.simulator.has_finished(3_000).await;
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let metrics = eventually("all is settled", || async {
        let url = format!("http://127.0.0.1:{port}/metrics");
        let metrics = Metrics::parse(&client.get(url).send().await.unwrap().text().await.unwrap());
        let is_settled =
            metrics.sum("inlet_events_received_total") == 3_000 && metrics.sum("inlet_events_pending") == 0;
        is_settled.then_some(metrics)
    })
    .await;
    metrics.assert_account_closes();
    watch.assert_ready_since(ready);
    drop((watch, client));
    stop.send(()).unwrap();
    end.await.unwrap().unwrap();
    eventually("no task is alive", || async { (alive() <= before).then_some(()) }).await;
    let summary = Account::new().counted(&metrics).judge(&ground.nats, &[&ground.simulator]);
    assert_eq!((&summary["inStream"], &summary["missing"]), (&3_000.into(), &0.into()), "{summary}");
    ground.judge_users(&folder).await;
}
