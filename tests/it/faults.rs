//! What is promised when something breaks: nothing lost, nothing twice, or counted. One file for each thing that breaks;
//! every case ends with the account closed by a reader of its own, the users' counters compared with the stream, and no
//! descriptor left over.

mod bus;
mod chat;
mod clock;
mod disk;
mod process;
mod store;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::Value;

use crate::harness::account::Account;
use crate::harness::eventually;
use crate::harness::inlet::{Inlet, Simulator};
use crate::harness::nats::Nats;
use crate::harness::people::{embedded_users, verify};
use crate::harness::stream::read;

const CHANNELS: &str = "alpha,beta";

/// Connections of whoever asks, and those that are made again: not more than so many come and go.
const DESCRIPTORS_THAT_VARY: usize = 6;

/// A server of NATS, simulated chat, and services between them.
struct Ground {
    nats: Nats,
    simulator: Simulator,
    /// Of the last service, when it was ready.
    descriptors: AtomicUsize,
}

impl Ground {
    /// Chat by these flags.
    async fn new(flags: &[&str]) -> Self {
        Self::on(Nats::start().await, flags).await
    }

    async fn on(nats: Nats, flags: &[&str]) -> Self {
        // Users enough to have company, and few enough that each is met again.
        let users = if flags.contains(&"--users") { &[][..] } else { &["--users", "50"] };
        let flags = [&["--channels", CHANNELS], users, flags].concat();
        Self { nats, simulator: Simulator::start(&flags).await, descriptors: AtomicUsize::new(0) }
    }

    /// A service, ready. `more` settings win.
    async fn serve(&self, more: &[(&str, &str)]) -> Inlet {
        self.serve_in(tempfile::tempdir().unwrap(), more).await
    }

    async fn serve_in(&self, folder: tempfile::TempDir, more: &[(&str, &str)]) -> Inlet {
        let inlet = self.start_in(folder, more).await;
        inlet.ready().await;
        self.note_descriptors(&inlet);
        inlet
    }

    /// What a service that is ready and rests has open.
    fn note_descriptors(&self, inlet: &Inlet) {
        self.descriptors.store(inlet.child.descriptors(), Ordering::Relaxed);
    }

    /// A service that answers.
    async fn start_in(&self, folder: tempfile::TempDir, more: &[(&str, &str)]) -> Inlet {
        let (irc, url) = (self.simulator.url(), self.nats.url());
        let mut settings = vec![
            ("TWITCH_CHANNELS", CHANNELS),
            ("TWITCH_IRC_URL", irc.as_str()),
            ("NATS_URL", url.as_str()),
            ("IRC_RECONNECT_INITIAL_MS", "100"),
            ("ENRICH_TIMEOUT", "5s"),
        ];
        settings.extend(more);
        Inlet::serve_in(folder, &settings).await
    }

    /// Nothing more is sent; the service comes to rest and ends well; the account closes, with what the account says of
    /// the case and what this service counted in it; every user is counted as the stream says. The account's figures.
    async fn close(&self, inlet: Inlet, account: Account) -> Value {
        let (account, folder) = self.end(inlet, account).await;
        let summary = account.judge(&self.nats, &[&self.simulator]);
        self.judge_users(&folder).await;
        summary
    }

    /// The service comes to rest and ends well.
    async fn end(&self, mut inlet: Inlet, account: Account) -> (Account, tempfile::TempDir) {
        if account.is_all_received() {
            inlet.settled(self.simulator.sent().len() as u64).await;
        }
        let metrics = inlet.quiet().await;
        metrics.assert_account_closes();
        eventually("no descriptor is left over", || async {
            let most = self.descriptors.load(Ordering::Relaxed) + DESCRIPTORS_THAT_VARY;
            (inlet.child.descriptors() <= most).then_some(())
        })
        .await;
        let (_, code) = inlet.terminate(Duration::from_secs(10)).await;
        assert_eq!(code, Some(0), "{}", inlet.log());
        assert!(!inlet.log().contains("panicked"), "{}", inlet.log());
        (account.counted(&metrics), inlet.into_folder())
    }

    /// The embedded store in this folder, compared with the stream.
    async fn judge_users(&self, folder: &tempfile::TempDir) {
        let found = read(&self.nats.url(), "INLET").await;
        let found: Vec<_> = found.into_iter().map(|message| message.body).collect();
        let users = embedded_users(&folder.path().join("data"), &found).await;
        assert!(!users.is_empty(), "somebody was counted");
        verify(&["--faults"], &[&self.simulator.sent_file()], &found, &users);
    }
}
