//! What the tests stand on: children that end with their test, and accounts that must close.

pub mod account;
pub mod browser;
pub mod child;
pub mod emulator;
pub mod events;
pub mod firestore;
pub mod inlet;
pub mod nats;
pub mod oauth;
pub mod people;
pub mod proxy;
pub mod readiness;
pub mod stream;

use std::future::Future;
use std::net::TcpListener;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use ::inlet::bus::Retention;
use ::inlet::bus::embedded::EmbeddedBus;
use ::inlet::clock::Clock;
use ::inlet::envelope::SubjectTemplate;

/// Nothing here may take longer; a test that would is broken.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// A port nobody listens on now. Below those that the system gives to whoever connects: none of them takes it while a server
/// is restarted.
pub fn free_port() -> u16 {
    let is_free = |port: &u16| TcpListener::bind(("127.0.0.1", *port)).is_ok();
    std::iter::repeat_with(|| fastrand::u16(10_000..32_000)).find(is_free).unwrap()
}

/// Waits for a condition instead of sleeping, up to [`PATIENCE`].
pub async fn eventually<T, F: Future<Output = Option<T>>>(what: &str, condition: impl FnMut() -> F) -> T {
    within(PATIENCE, what, condition).await
}

/// As [`eventually`], with another patience.
pub async fn within<T, F: Future<Output = Option<T>>>(
    patience: Duration,
    what: &str,
    mut condition: impl FnMut() -> F,
) -> T {
    let deadline = tokio::time::Instant::now() + patience;
    loop {
        if let Some(value) = condition().await {
            return value;
        }
        assert!(tokio::time::Instant::now() < deadline, "still waiting after {patience:?}: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Opens an embedded stream. One that was just let go is still held for a moment by its writer.
pub async fn open_embedded(
    folder: &Path,
    retention: Retention,
    subjects: SubjectTemplate,
    clock: Clock,
) -> Arc<EmbeddedBus> {
    eventually("the stream's file is free", || async {
        EmbeddedBus::open(folder, retention, subjects.clone(), clock.clone()).ok()
    })
    .await
}
