//! Google's Firestore emulator: one for all tests, a project of its own for each.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use inlet::settings::{Environment, Problems};
use inlet::store::{StoreArgs, StoreConfig};
use serde_json::{Value, json};

/// Where the emulator is. There is no test of Firestore without it, and none is skipped.
pub fn host() -> String {
    std::env::var("FIRESTORE_EMULATOR_HOST").unwrap_or_else(|_| {
        panic!(
            "FIRESTORE_EMULATOR_HOST is not set: run the tests by `scripts/with-firestore-emulator cargo nextest \
             run`, or all of it by ./validate_deliverable.sh"
        )
    })
}

/// Settings of the store as a user gives them.
pub fn config(flags: &[&str]) -> StoreConfig {
    #[derive(clap::Parser)]
    struct Command {
        #[command(flatten)]
        store: StoreArgs,
    }
    let flags = std::iter::once("inlet").chain(flags.iter().copied());
    let command = <Command as clap::Parser>::try_parse_from(flags).unwrap();
    let mut problems = Problems::default();
    let config = command.store.check(&Environment::default(), &mut problems);
    assert!(problems.lines().is_empty(), "{:?}", problems.lines());
    config.unwrap()
}

/// A project in the emulator that nobody else uses.
pub struct Project {
    pub id: String,
    pub(super) host: String,
    pub(super) client: reqwest::Client,
}

impl Project {
    pub fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        inlet::tls::install_provider();
        let next = NEXT.fetch_add(1, Ordering::Relaxed);
        let id = format!("t-{}-{next}-{:08x}", std::process::id(), fastrand::u32(..));
        let client = reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(10)).build().unwrap();
        Self { id, host: host(), client }
    }

    /// Settings of a store in this project.
    pub fn config(&self) -> StoreConfig {
        self.config_through(&self.host)
    }

    /// The emulator, as `FIRESTORE_EMULATOR_HOST` has it.
    pub fn host(&self) -> String {
        self.host.clone()
    }

    /// The same through something else that listens.
    pub fn config_through(&self, host: &str) -> StoreConfig {
        config(&["--google-cloud-project", &self.id, "--firestore-emulator-host", host])
    }

    /// A request over REST, by whoever has this `Authorization`; the answer's status.
    pub async fn rest(
        &self,
        method: &str,
        path: &str,
        authorization: Option<&str>,
        body: Option<Value>,
    ) -> u16 {
        let url =
            format!("http://{}/v1/projects/{}/databases/(default)/documents/{path}", self.host, self.id);
        self.send(method, url, authorization, body).await
    }

    async fn send(&self, method: &str, url: String, authorization: Option<&str>, body: Option<Value>) -> u16 {
        let mut request = self.client.request(method.parse().unwrap(), url);
        if let Some(authorization) = authorization {
            request = request.header("authorization", authorization);
        }
        if let Some(body) = body {
            request = request.json(&body);
        }
        request.send().await.unwrap().status().as_u16()
    }

    /// Writes fields of the collection's document, as Firestore's REST form has them, by nobody in particular.
    pub async fn set(&self, path: &str, fields: Value) {
        let mask: Vec<_> =
            fields.as_object().unwrap().keys().map(|key| format!("updateMask.fieldPaths={key}")).collect();
        let path = format!("{path}?{}", mask.join("&"));
        let status = self.rest("PATCH", &path, Some("Bearer owner"), Some(json!({ "fields": fields }))).await;
        assert_eq!(status, 200);
    }

    /// Puts these security rules in force.
    pub async fn load_rules(&self, rules: &str) {
        let url = format!("http://{}/emulator/v1/projects/{}:securityRules", self.host, self.id);
        let body = json!({ "rules": { "files": [{ "name": "firestore.rules", "content": rules }] } });
        assert_eq!(self.send("PUT", url, None, Some(body)).await, 200);
    }

    /// The emulator's own address: what a proxy stands before.
    pub async fn address(&self) -> SocketAddr {
        tokio::net::lookup_host(&self.host).await.unwrap().next().unwrap()
    }
}
