//! A real nats-server of a test's own.

use super::child::{Child, clean};
use super::{eventually, free_port};

/// A server with its own folder and port; both stay when it is restarted.
pub struct Nats {
    pub port: u16,
    folder: tempfile::TempDir,
    config: String,
    child: Option<Child>,
}

impl Nats {
    /// Starts one with `JetStream`.
    pub async fn start() -> Self {
        Self::with_config("").await
    }

    /// Starts one with these lines more in its configuration.
    pub async fn with_config(config: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut nats = Self { port: free_port(), folder, config: config.to_owned(), child: None };
        nats.restart().await;
        nats
    }

    /// Its address.
    pub fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port)
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        self.child.take().unwrap().kill();
    }

    pub async fn stop(&self) {
        self.child.as_ref().unwrap().stop().await;
    }

    pub fn signal(&self, signal: &str) {
        self.child.as_ref().unwrap().signal(signal);
    }

    /// Starts it (again) on the same folder and port.
    pub async fn restart(&mut self) {
        let store = self.folder.path().join("store");
        let config = self.folder.path().join("nats.conf");
        let text = format!(
            "listen: 127.0.0.1:{}\njetstream {{ store_dir: \"{}\", max_file_store: 4GB }}\n{}\n",
            self.port,
            store.display(),
            self.config
        );
        std::fs::write(&config, text).unwrap();
        let program = std::env::var("NATS_SERVER_BIN").unwrap_or_else(|_| "nats-server".to_owned());
        let log = self.folder.path().join("nats.log");
        self.child = Some(Child::start("nats-server", clean(program).arg("-c").arg(&config), &log));
        eventually("nats-server listens", || async {
            let log = std::fs::read_to_string(&log).unwrap();
            let is_fatal = log.contains("[FTL]") || log.starts_with("nats-server:");
            assert!(!is_fatal, "nats-server does not start:\n{log}");
            log.contains("Server is ready").then_some(())
        })
        .await;
    }

    /// Starts it again on the same port without anything it had.
    pub async fn restart_empty(&mut self) {
        assert!(self.child.is_none(), "it still runs");
        std::fs::remove_dir_all(self.folder.path().join("store")).unwrap();
        self.restart().await;
    }

    /// From the next start on, these lines stand in its configuration.
    pub fn configure(&mut self, config: &str) {
        config.clone_into(&mut self.config);
    }

    /// Where a proxy finds it.
    pub fn addr(&self) -> std::net::SocketAddr {
        std::net::SocketAddr::from(([127, 0, 0, 1], self.port))
    }

    /// Its streams, as an operator sees them.
    pub async fn jetstream(&self) -> async_nats::jetstream::Context {
        async_nats::jetstream::new(async_nats::connect(self.url()).await.unwrap())
    }
}
