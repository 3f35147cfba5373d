//! Firestore breaks: slow, cut off. (Hung, and edited and raced for by others, it is in `people`.)

use std::time::{Duration, Instant};

use super::Ground;
use crate::harness::account::Account;
use crate::harness::firestore::Project;
use crate::harness::inlet::Inlet;
use crate::harness::people::verify;
use crate::harness::proxy::{Mode, Proxy, Way};
use crate::harness::readiness::Watch;
use crate::harness::stream::read;
use crate::harness::{eventually, within};

/// A service whose Firestore is behind a proxy.
struct Stored {
    ground: Ground,
    emulator: Project,
    proxy: Proxy,
    inlet: Inlet,
}

impl Stored {
    async fn new(flags: &[&str], enrich_timeout: &str) -> Self {
        let (ground, emulator) = (Ground::new(flags).await, Project::new());
        let proxy = Proxy::to(emulator.address().await).await;
        let inlet = ground
            .serve(&[
                ("FIRESTORE_EMULATOR_HOST", &proxy.addr().to_string()),
                ("GOOGLE_CLOUD_PROJECT", &emulator.id),
                ("ENRICH_FLUSH_IDLE", "1s"),
                ("ENRICH_FLUSH_MAX", "3s"),
                ("ENRICH_TIMEOUT", enrich_timeout),
            ])
            .await;
        Self { ground, emulator, proxy, inlet }
    }

    /// The account closes, and every event in the stream is counted once.
    async fn close(self, count: u64) {
        let Self { ground, emulator, inlet, .. } = self;
        // What is not counted at the end is counted by the next run; here there is none.
        within(Duration::from_mins(1), "every user is written", || async {
            let metrics = inlet.metrics().await;
            let left = ["inlet_projection_lag_events", "inlet_users_dirty", "inlet_events_pending"];
            left.iter().all(|series| metrics.get(series) == 0).then_some(())
        })
        .await;
        let (account, _folder) = ground.end(inlet, Account::new()).await;
        let summary = account.judge(&ground.nats, &[&ground.simulator]);
        assert_eq!((&summary["inStream"], &summary["missing"]), (&count.into(), &0.into()), "{summary}");
        let found = read(&ground.nats.url(), "INLET").await;
        let bodies = found.iter().map(|message| &message.body);
        let flags = ["--faults", "--outage"];
        verify(&flags, &[&ground.simulator.sent_file()], bodies, &emulator.users().await);
    }
}

#[tokio::test]
async fn cut_off_it_is_named_events_flow_and_are_counted_afterwards() {
    // A test machine is busy; what is slow here is not the store, and a connection that is cut says so at once.
    let case = Stored::new(&["--rate", "300", "--count", "4000", "--users", "500"], "5s").await;
    let watch = Watch::on(&case.inlet);
    case.ground.simulator.has_sent(600).await;
    let broken = Instant::now();
    case.proxy.set(Mode::Cut);
    eventually("the store is named", || async { watch.has_named("store", broken).then_some(()) }).await;
    case.ground.simulator.has_sent(case.ground.simulator.sent().len() + 300).await;
    assert!(case.inlet.metrics().await.get("inlet_enriched_events_total{matched=\"false\"}") > 0);
    let mended = Instant::now();
    case.proxy.set(Mode::Pass);
    let attempt = within(Duration::from_mins(1), "it connects again", || async {
        case.proxy.first_connection_after(mended)
    })
    .await;
    case.inlet.ready().await;
    case.ground.simulator.has_finished(4_000).await;
    watch.assert_named("store", broken, attempt);
    case.close(4_000).await;
}

#[tokio::test]
async fn slow_it_costs_matches_and_no_count() {
    let case = Stored::new(&["--rate", "300", "--count", "3000", "--users", "500"], "400ms").await;
    case.ground.simulator.has_sent(500).await;
    case.proxy.set(Mode::Delay(Way::Down, Duration::from_millis(300)));
    case.ground.simulator.has_sent(1_700).await;
    case.proxy.set(Mode::Pass);
    case.ground.simulator.has_finished(3_000).await;
    eventually("the store is itself again", || async {
        case.inlet.waiting_for().await.is_empty().then_some(())
    })
    .await;
    case.close(3_000).await;
}
