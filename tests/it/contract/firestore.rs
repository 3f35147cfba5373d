//! What is Firestore's alone: it may be away, hang, and refuse one document for good.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use inlet::store::measured::{Store, StoreMetrics};
use inlet::store::{self, Condition, StoreError, WriteRefusal};
use serde_json::json;
use tokio::net::TcpListener;

use super::store::{Fixture, at, bounded, user, write};
use crate::harness::eventually;
use crate::harness::firestore::Project;
use crate::harness::proxy::{Mode, Proxy};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_start_without_firestore_succeeds_and_connects_later() {
    let project = Project::new();
    let proxy = Proxy::to(project.address().await).await;
    proxy.set(Mode::Cut);
    let config = project.config_through(&proxy.addr().to_string());
    let store = store::open(&config, std::path::Path::new("/nonexistent")).unwrap();
    let name = user("a");
    let names = std::slice::from_ref(&name);
    let began = Instant::now();
    let early = bounded(store.get_many(names)).await;
    assert!(matches!(early, Err(StoreError::Away(_))), "{early:?}");
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    let early = bounded(store.write_many(vec![write(&name, json!({ "n": 1 }), Condition::Absent)])).await;
    assert!(early.is_err_and(|error| error.is_transient()));
    assert!(bounded(store.edits(at(0))).await.is_err_and(|error| error.is_transient()));
    // It comes, goes, and comes again, and with it the store.
    for turn in 0..3 {
        proxy.set(Mode::Pass);
        eventually("the store connects", || async { store.get_many(names).await.ok() }).await;
        let writes = vec![write(&name, json!({ "n": turn }), Condition::Always)];
        assert!(bounded(store.write_many(writes)).await.unwrap()[0].is_ok());
        let mut edits = bounded(store.edits(at(0))).await.unwrap();
        proxy.set(Mode::Cut);
        let end = bounded(async {
            loop {
                if let Err(error) = edits.next().await.unwrap() {
                    return error;
                }
            }
        });
        assert!(end.await.is_transient());
        assert!(edits.next().await.is_none());
        assert!(bounded(store.get_many(names)).await.is_err_and(|error| error.is_transient()));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_never_answers_costs_the_time_given_and_is_counted() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let host = listener.local_addr().unwrap().to_string();
    let config = Project::new().config_through(&host);
    let registry = prometheus::Registry::new();
    let metrics = Arc::new(StoreMetrics::new(&registry).unwrap());
    let store = Store::new(store::open(&config, std::path::Path::new("/nonexistent")).unwrap(), metrics);
    let within = Duration::from_millis(200);
    let began = Instant::now();
    let read = bounded(store.get_many(&[user("a")], within)).await;
    let written =
        bounded(store.write_many(vec![write(&user("a"), json!({ "n": 1 }), Condition::Absent)], within))
            .await;
    assert!(
        read.is_err_and(|error| error.is_transient()) && written.is_err_and(|error| error.is_transient())
    );
    assert!(
        began.elapsed() >= 2 * within && began.elapsed() < Duration::from_secs(2),
        "{:?}",
        began.elapsed()
    );
    // Without a caller's time there is an outer bound.
    let began = Instant::now();
    assert!(bounded(store.edits(at(0))).await.is_err_and(|error| error.is_transient()));
    assert!(began.elapsed() < Duration::from_secs(25), "{:?}", began.elapsed());
    let shown = prometheus::TextEncoder::new().encode_to_string(&registry.gather()).unwrap();
    for op in ["get", "write", "listen"] {
        for (result, count) in [("ok", 0), ("away", 1), ("refused", 0)] {
            let line = format!("inlet_store_requests_total{{op=\"{op}\",result=\"{result}\"}} {count}\n");
            assert!(shown.contains(&line), "{line} {shown}");
        }
    }
    assert_eq!((store.metrics().documents_read(), store.metrics().documents_written()), (0, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_document_that_firestore_refuses_for_good_is_refused_alone() {
    let fixture = Fixture::firestore().await;
    let [a, b, c] = ["a", "b", "c"].map(user);
    // Beyond the size of any document.
    let large = json!({ "notes": "x".repeat(1_100_000) });
    assert!(matches!(
        fixture.write(&b, large.clone(), Condition::Absent).await,
        Err(WriteRefusal::Failed(StoreError::Refused { .. }))
    ));
    let outcomes = fixture
        .write_many(vec![
            write(&a, json!({ "n": 1 }), Condition::Absent),
            write(&b, large, Condition::Absent),
            write(&c, json!({ "n": 3 }), Condition::Absent),
        ])
        .await;
    assert!(outcomes[0].is_ok() && outcomes[2].is_ok(), "{outcomes:?}");
    let Err(WriteRefusal::Failed(StoreError::Refused { code, message })) = &outcomes[1] else {
        panic!("{outcomes:?}")
    };
    assert_eq!(*code, "INVALID_ARGUMENT");
    assert!(message.len() < 500 && !message.contains("xxxxxxxx"), "{message}");
    let read = fixture.get_many(&[a, b, c]).await;
    assert_eq!(read.iter().map(Option::is_some).collect::<Vec<_>>(), [true, false, true]);
}
