//! A stand-in for Twitch's OAuth: tokens that expire, refresh tokens that can be used once, the device code flow, and
//! whatever can go wrong with it. Real HTTP on a real socket; it remembers each token it ever gave.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post};
use inlet::clock::system_milliseconds;
use inlet::tasks::Tasks;
use percent_encoding::percent_decode_str;
use serde_json::{Value, json};
use tokio::net::TcpListener;

/// The application, its secret, and the account that everything belongs to.
pub const CLIENT_ID: &str = "app0of1tests";
pub const CLIENT_SECRET: &str = "app-s3cret";
pub const LOGIN: &str = "some_bot";
pub const USER_ID: &str = "29025231";
/// What a person enters.
pub const USER_CODE: &str = "WXYZQRST";

/// How it answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mood {
    Well,
    /// After so long, and right.
    Late(Duration),
    /// With this status and, in seconds, Retry-After.
    Fails(u16, Option<u64>),
    /// Not at all.
    Hangs,
    /// With something else.
    Babbles,
}

/// What a person does with the code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Person {
    /// Enters it when it was asked about so often.
    Approves(u32),
    Denies,
    /// Lets it expire.
    Waits,
}

/// A token and what gets the next one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pair {
    pub access: String,
    pub refresh: String,
}

struct Inner {
    mood: Mood,
    person: Person,
    /// How long the next tokens live.
    lifetime: Duration,
    scopes: Vec<String>,
    /// Whether refreshing needs the secret.
    is_confidential: bool,
    /// Access tokens that are valid, and until when.
    valid: BTreeMap<String, Instant>,
    /// Refresh tokens that were not used so far.
    unused: BTreeSet<String>,
    /// All that were given, the newest last.
    given: Vec<Pair>,
    /// Every request: its path, and the status it was answered with.
    calls: Vec<(Instant, String, u16)>,
    /// Device codes, and how often each was asked about.
    devices: BTreeMap<String, u32>,
    device_lifetime: u64,
    /// Answers `slow_down` so often first.
    slow_downs: u32,
}

/// The service. Dropping it closes everything.
pub struct OAuth {
    addr: SocketAddr,
    inner: Shared,
    _tasks: Tasks,
}

type Shared = Arc<Mutex<Inner>>;

impl OAuth {
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let inner = Arc::new(Mutex::new(Inner {
            mood: Mood::Well,
            person: Person::Approves(1),
            lifetime: Duration::from_hours(4),
            scopes: vec!["chat:read".to_owned()],
            is_confidential: false,
            valid: BTreeMap::new(),
            unused: BTreeSet::new(),
            given: Vec::new(),
            calls: Vec::new(),
            devices: BTreeMap::new(),
            device_lifetime: 1_800,
            slow_downs: 0,
        }));
        let router = Router::new()
            .route("/oauth2/validate", get(validate))
            .route("/oauth2/token", post(token))
            .route("/oauth2/device", post(device))
            .with_state(Arc::clone(&inner));
        let mut tasks = Tasks::new();
        tasks.spawn("oauth", async move { axum::serve(listener, router).await.unwrap() });
        Self { addr, inner, _tasks: tasks }
    }

    pub fn url(&self) -> String {
        format!("http://{}/oauth2", self.addr)
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap()
    }

    pub fn set(&self, mood: Mood) {
        self.inner().mood = mood;
    }

    pub fn set_person(&self, person: Person) {
        self.inner().person = person;
    }

    pub fn set_lifetime(&self, lifetime: Duration) {
        self.inner().lifetime = lifetime;
    }

    pub fn set_scopes(&self, scopes: &[&str]) {
        self.inner().scopes = scopes.iter().map(|&scope| scope.to_owned()).collect();
    }

    pub fn set_confidential(&self) {
        self.inner().is_confidential = true;
    }

    pub fn set_device_lifetime(&self, seconds: u64) {
        self.inner().device_lifetime = seconds;
    }

    pub fn set_slow_downs(&self, count: u32) {
        self.inner().slow_downs = count;
    }

    /// A token as somebody got it elsewhere.
    pub fn issue(&self) -> Pair {
        self.inner().issue()
    }

    /// Takes back everything.
    pub fn revoke_all(&self) {
        let mut inner = self.inner();
        inner.valid.clear();
        inner.unused.clear();
    }

    /// Takes back access tokens: they can be refreshed.
    pub fn expire_all(&self) {
        self.inner().valid.clear();
    }

    /// The newest token.
    pub fn newest(&self) -> Pair {
        self.inner().given.last().cloned().unwrap()
    }

    /// Every secret it gave.
    pub fn secrets(&self) -> Vec<String> {
        let inner = self.inner();
        let pairs = inner.given.iter().flat_map(|pair| [pair.access.clone(), pair.refresh.clone()]);
        pairs.chain(inner.devices.keys().cloned()).chain([CLIENT_SECRET.to_owned()]).collect()
    }

    /// How often it was asked for something and answered so.
    pub fn count(&self, path: &str, status: u16) -> usize {
        self.inner().calls.iter().filter(|call| call.1 == path && call.2 == status).count()
    }

    /// When it was asked.
    pub fn asked(&self) -> Vec<Instant> {
        self.inner().calls.iter().map(|call| call.0).collect()
    }
}

impl Inner {
    fn issue(&mut self) -> Pair {
        let number = self.given.len();
        let random = || fastrand::u64(..);
        let pair = Pair {
            access: format!("acc{number}{:016x}{:016x}", random(), random()),
            refresh: format!("ref{number}{:016x}{:016x}", random(), random()),
        };
        self.valid.insert(pair.access.clone(), Instant::now() + self.lifetime);
        self.unused.insert(pair.refresh.clone());
        self.given.push(pair.clone());
        pair
    }

    fn grant(&mut self) -> (u16, Value) {
        let Pair { access, refresh } = self.issue();
        let body = json!({
            "access_token": access, "refresh_token": refresh, "expires_in": self.lifetime.as_secs(),
            "scope": self.scopes, "token_type": "bearer",
        });
        (200, body)
    }

    fn validate(&self, token: &str) -> (u16, Value) {
        let Some(until) = self.valid.get(token).filter(|until| **until > Instant::now()) else {
            return refusal(401, "invalid access token");
        };
        let body = json!({
            "client_id": CLIENT_ID, "login": LOGIN, "user_id": USER_ID, "scopes": self.scopes,
            "expires_in": (*until - Instant::now()).as_secs(),
        });
        (200, body)
    }

    fn token(&mut self, form: &HashMap<String, String>) -> (u16, Value) {
        let has = |name: &str, value: &str| form.get(name).is_some_and(|given| given == value);
        if !has("client_id", CLIENT_ID) {
            return refusal(400, "invalid client");
        }
        match form.get("grant_type").map(String::as_str) {
            Some("refresh_token") if self.is_confidential && !has("client_secret", CLIENT_SECRET) => {
                refusal(403, "invalid client secret")
            }
            Some("refresh_token") if self.unused.remove(&form["refresh_token"]) => self.grant(),
            Some("refresh_token") => refusal(400, "Invalid refresh token"),
            Some("urn:ietf:params:oauth:grant-type:device_code") => self.poll(&form["device_code"]),
            _ => refusal(400, "missing grant_type"),
        }
    }

    fn poll(&mut self, code: &str) -> (u16, Value) {
        let Some(polled) = self.devices.get_mut(code) else { return refusal(400, "invalid device code") };
        *polled += 1;
        let polled = *polled;
        if polled <= self.slow_downs {
            return (400, json!({ "status": 400, "error": "slow_down" }));
        }
        match self.person {
            Person::Approves(after) if polled > after => self.grant(),
            Person::Denies => (400, json!({ "status": 400, "error": "access_denied" })),
            Person::Approves(_) | Person::Waits => refusal(400, "authorization_pending"),
        }
    }

    fn device(&mut self, form: &HashMap<String, String>) -> (u16, Value) {
        if form.get("client_id").is_none_or(|id| id != CLIENT_ID) {
            return refusal(400, "invalid client");
        }
        assert_eq!(form["scopes"], "chat:read");
        let code = format!("dev{:032x}", fastrand::u128(..));
        self.devices.insert(code.clone(), 0);
        let body = json!({
            "device_code": code, "user_code": USER_CODE, "interval": 1, "expires_in": self.device_lifetime,
            "verification_uri": format!("https://www.twitch.example/activate?device-code={USER_CODE}"),
        });
        (200, body)
    }
}

fn refusal(status: u16, message: &str) -> (u16, Value) {
    (status, json!({ "status": status, "message": message }))
}

/// Answers as the mood is; what is right is only worked out when it is answered.
async fn answer(inner: &Shared, path: &str, right: impl FnOnce(&mut Inner) -> (u16, Value)) -> Response {
    let at = Instant::now();
    let mood = inner.lock().unwrap().mood;
    if mood == Mood::Hangs {
        inner.lock().unwrap().calls.push((at, path.to_owned(), 0));
        tokio::time::sleep(Duration::from_mins(10)).await;
    }
    if let Mood::Late(wait) = mood {
        tokio::time::sleep(wait).await;
    }
    let mut inner = inner.lock().unwrap();
    let (status, body, retry_after) = match mood {
        Mood::Fails(status, retry_after) => (status, json!({ "message": "no" }).to_string(), retry_after),
        Mood::Babbles => {
            let secret = inner.given.last().map_or_else(String::new, |pair| pair.access.clone());
            (200, format!("<html>at your service, {secret}</html>"), None)
        }
        Mood::Well | Mood::Late(_) | Mood::Hangs => {
            let (status, body) = right(&mut inner);
            (status, body.to_string(), None)
        }
    };
    inner.calls.push((at, path.to_owned(), status));
    let mut response = (StatusCode::from_u16(status).unwrap(), body).into_response();
    if let Some(seconds) = retry_after {
        response.headers_mut().insert("retry-after", seconds.into());
    }
    response
}

async fn validate(State(inner): State<Shared>, headers: HeaderMap) -> Response {
    let token = headers["authorization"].to_str().unwrap().strip_prefix("OAuth ").unwrap().to_owned();
    answer(&inner, "validate", |inner| inner.validate(&token)).await
}

async fn token(State(inner): State<Shared>, body: String) -> Response {
    answer(&inner, "token", |inner| inner.token(&form(&body))).await
}

async fn device(State(inner): State<Shared>, body: String) -> Response {
    answer(&inner, "device", |inner| inner.device(&form(&body))).await
}

/// The fields of a form.
fn form(body: &str) -> HashMap<String, String> {
    let plain = |text: &str| percent_decode_str(text).decode_utf8().unwrap().into_owned();
    body.split('&').filter_map(|pair| pair.split_once('=')).map(|(k, v)| (plain(k), plain(v))).collect()
}

impl Pair {
    /// The token document's fields: obtained now, to expire after so many seconds.
    pub fn fields(&self, expires_in: u64) -> Value {
        json!({
            "accessToken": self.access, "refreshToken": self.refresh, "expiresIn": expires_in,
            "obtainmentTimestamp": system_milliseconds(), "scope": ["chat:read"], "userId": USER_ID, "login": LOGIN,
        })
    }
}
