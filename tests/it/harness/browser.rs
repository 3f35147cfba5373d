//! A real browser: headless Chromium, led over its debugging pipe. What its pages ask for, and what they complain of, is
//! noted.

use std::collections::BTreeMap;
use std::process::Stdio;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ::inlet::tasks::Tasks;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::process::{Child, ChildStdin, Command};

use super::within;

/// A cold start of Chromium on a busy machine takes its time.
const PATIENCE: Duration = Duration::from_secs(90);

/// Headless, silent, and without a way off this machine.
const FLAGS: [&str; 14] = [
    "--headless",
    "--remote-debugging-pipe",
    // As root, in a container, there is no sandbox to be had; the pages are our own.
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--disable-sync",
    "--disable-breakpad",
    "--mute-audio",
    "--no-proxy-server",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
];

/// Something in a page's console that somebody should look at.
#[derive(Debug, Clone)]
pub struct Complaint {
    /// `network`, `security`, `javascript`, …
    pub source: String,
    pub text: String,
    pub url: String,
}

#[derive(Default)]
struct Heard {
    answers: BTreeMap<u64, Value>,
    complaints: Vec<Complaint>,
    requests: Vec<(String, Value)>,
}

impl Heard {
    fn take(&mut self, mut message: Value) {
        if let Some(id) = message["id"].as_u64() {
            self.answers.insert(id, message);
            return;
        }
        let parameters = message["params"].take();
        match message["method"].as_str().unwrap_or_default() {
            "Network.requestWillBeSent" => {
                let url = parameters["request"]["url"].as_str().unwrap().to_owned();
                self.requests.push((url, parameters["request"]["headers"].clone()));
            }
            "Log.entryAdded" => {
                let entry = &parameters["entry"];
                if entry["level"] == "error" || entry["level"] == "warning" {
                    self.complain(&entry["source"], &entry["text"], &entry["url"]);
                }
            }
            "Runtime.exceptionThrown" => {
                let details = &parameters["exceptionDetails"];
                self.complain(&"exception".into(), &details["exception"]["description"], &details["url"]);
            }
            "Runtime.consoleAPICalled" if parameters["type"] == "error" || parameters["type"] == "assert" => {
                self.complain(&"console".into(), &parameters["args"], &Value::Null);
            }
            _ => {}
        }
    }

    fn complain(&mut self, source: &Value, text: &Value, url: &Value) {
        let shown = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        self.complaints.push(Complaint { source: shown(source), text: shown(text), url: shown(url) });
    }
}

/// A browser with a profile of its own. Dropping it ends it.
pub struct Browser {
    _child: Child,
    input: tokio::sync::Mutex<ChildStdin>,
    heard: Arc<Mutex<Heard>>,
    last_id: AtomicU64,
    _tasks: Tasks,
    folder: tempfile::TempDir,
}

impl Browser {
    /// Starts one. `CHROMIUM_BIN` picks another than the one in the path.
    pub fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let program = std::env::var("CHROMIUM_BIN").unwrap_or_else(|_| "chromium".to_owned());
        // It reads commands from descriptor 3 and answers on 4.
        let mut command = Command::new("sh");
        command
            .args(["-c", r#"exec "$0" "$@" 3<&0 4>&1 </dev/null >"$HOME/log" 2>&1"#])
            .arg(program)
            .args(FLAGS);
        command
            .arg(format!("--user-data-dir={}", folder.path().join("profile").display()))
            .arg("about:blank");
        command.env_clear().env("PATH", std::env::var("PATH").unwrap()).env("HOME", folder.path());
        command.env("TZ", "Asia/Kolkata").stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().unwrap();
        let (input, output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let heard = Arc::new(Mutex::new(Heard::default()));
        let mut tasks = Tasks::new();
        let told = Arc::clone(&heard);
        tasks.spawn("browser", async move {
            let mut output = BufReader::new(output);
            let mut message = Vec::new();
            while output.read_until(0, &mut message).await.is_ok_and(|length| length > 0) {
                message.pop();
                told.lock().unwrap().take(serde_json::from_slice(&message).unwrap());
                message.clear();
            }
        });
        let (input, last_id) = (tokio::sync::Mutex::new(input), AtomicU64::new(0));
        Self { _child: child, input, heard, last_id, _tasks: tasks, folder }
    }

    /// What a command of the `DevTools` protocol returns.
    async fn command(&self, session: Option<&str>, method: &str, parameters: Value) -> Value {
        let id = self.last_id.fetch_add(1, Ordering::Relaxed) + 1;
        let mut message = json!({ "id": id, "method": method, "params": parameters });
        if let Some(session) = session {
            message["sessionId"] = session.into();
        }
        let sent = self.input.lock().await.write_all(format!("{message}\0").as_bytes()).await;
        assert!(sent.is_ok(), "chromium is not there (apt-get install chromium):\n{}", self.log());
        let answer =
            within(PATIENCE, method, || async { self.heard.lock().unwrap().answers.remove(&id) }).await;
        assert!(answer["error"].is_null(), "{method}: {answer}\n{}", self.log());
        answer["result"].clone()
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    /// A new tab.
    pub async fn tab(&self) -> Tab<'_> {
        let target = self.command(None, "Target.createTarget", json!({ "url": "about:blank" })).await;
        let attach = json!({ "targetId": target["targetId"], "flatten": true });
        let session = self.command(None, "Target.attachToTarget", attach).await;
        let tab = Tab { browser: self, session: session["sessionId"].as_str().unwrap().to_owned() };
        for domain in ["Page", "Runtime", "Log", "Network"] {
            tab.command(&format!("{domain}.enable"), json!({})).await;
        }
        tab
    }

    /// What pages complained of so far.
    pub fn complaints(&self) -> Vec<Complaint> {
        self.heard.lock().unwrap().complaints.clone()
    }

    /// Addresses that pages asked for, and the headers they sent.
    pub fn requests(&self) -> Vec<(String, Value)> {
        self.heard.lock().unwrap().requests.clone()
    }
}

/// A tab of it.
pub struct Tab<'a> {
    browser: &'a Browser,
    session: String,
}

impl Tab<'_> {
    /// What a command of the `DevTools` protocol returns.
    pub async fn command(&self, method: &str, parameters: Value) -> Value {
        self.browser.command(Some(&self.session), method, parameters).await
    }

    /// Goes there.
    pub async fn open(&self, url: &str) {
        let answer = self.command("Page.navigate", json!({ "url": url })).await;
        assert!(answer["errorText"].is_null(), "{url}: {answer}");
    }

    /// What the page says to this expression.
    pub async fn ask(&self, expression: &str) -> Value {
        let parameters = json!({ "expression": expression, "returnByValue": true, "awaitPromise": true });
        let answer = self.command("Runtime.evaluate", parameters).await;
        assert!(answer["exceptionDetails"].is_null(), "{expression}: {answer}");
        answer["result"]["value"].clone()
    }

    /// Waits until the page says yes to it.
    pub async fn is(&self, expression: &str) {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        // The page may be on its way: then there is nothing to ask.
        while self
            .ask(&format!("(() => {{ try {{ return Boolean({expression}) }} catch {{ return false }} }})()"))
            .await
            != true
        {
            if tokio::time::Instant::now() > deadline {
                let text = self.ask("document.body.innerText").await;
                panic!("still not so: {expression}\n{text}\n{:?}", self.browser.complaints());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Its picture, as PNG.
    pub async fn picture(&self) -> Vec<u8> {
        let answer = self.command("Page.captureScreenshot", json!({ "format": "png" })).await;
        STANDARD.decode(answer["data"].as_str().unwrap()).unwrap()
    }
}
