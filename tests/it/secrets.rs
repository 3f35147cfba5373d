//! What the outside may never see: a service with every secret there is goes through one fault after the other, with
//! every library's log turned up, and everything it says, in its log and in its answers, is looked through.

use std::net::{IpAddr, Ipv4Addr};
use std::process::Output;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::routing::get;
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD_NO_PAD, URL_SAFE_NO_PAD};
use inlet::sim::{Command, LoginRefusal, SimConfig, Simulator, Target};
use inlet::tasks::Tasks;
use nkeys::KeyPair;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use tokio::net::TcpListener;

use crate::harness::firestore::{Project, host};
use crate::harness::inlet::{Inlet, run};
use crate::harness::nats::Nats;
use crate::harness::oauth::{CLIENT_ID, CLIENT_SECRET, Mood, OAuth};
use crate::harness::stream::read;
use crate::harness::{eventually, free_port};

const BOT_TOKEN: &str = "bot9token0of1twitch";
const REFRESH_TOKEN: &str = "refr3sh0token0of1twitch";
const ADMIN_TOKEN: &str = "admin-T0ken/of+the=operator";
const ADMIN_TOKEN_NEXT: &str = "n3xt-admin/T0ken+of=next-year";
const STREAM_TOKEN: &str = "str3am-T0ken/of+an=overlay";
const WRONG_TOKEN: &str = "wrong-t0ken/of-somebody";
const NATS_PASSWORD: &str = "n@ts/p4ss:word";
const HISTORY_PASSWORD: &str = "h1story pass/word";
const PROXY_PASSWORD: &str = "pr0xy-pass-word";

/// In all that is said in chat, with an address of e-mail.
const CHAT: &str = "xyzzy-plugh somebody@mail.example";
/// Whose requests come from here.
const CALLER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 77);
const FORWARDED_FOR: &str = "203.0.113.77";

/// Every library at its loudest; `inlet=…` alone would keep them at warnings.
const LOUD: (&str, &str) = ("LOG_LEVEL", "trace,inlet=trace");

fn encoded(text: &str) -> String {
    utf8_percent_encode(text, NON_ALPHANUMERIC).to_string()
}

/// A secret as it is, and as it travels: in an address, in a header, in JSON.
fn forms(user: &str, secret: &str) -> Vec<String> {
    let mut forms =
        vec![secret.to_owned(), encoded(secret), format!("{secret:?}").trim_matches('"').to_owned()];
    for text in [secret.to_owned(), format!("{user}:{secret}")] {
        for encoded in [STANDARD_NO_PAD.encode(&text), URL_SAFE_NO_PAD.encode(&text)] {
            // Its last letter depends on what follows.
            forms.push(encoded[..encoded.len() - 1].to_owned());
        }
    }
    forms
}

fn all_forms() -> Vec<String> {
    let secrets = [
        ("bot", BOT_TOKEN),
        ("", REFRESH_TOKEN),
        (CLIENT_ID, CLIENT_SECRET),
        ("", ADMIN_TOKEN),
        ("", ADMIN_TOKEN_NEXT),
        ("", STREAM_TOKEN),
        ("", WRONG_TOKEN),
        ("inlet", NATS_PASSWORD),
        ("history", HISTORY_PASSWORD),
        ("proxy", PROXY_PASSWORD),
    ];
    secrets.iter().flat_map(|(user, secret)| forms(user, secret)).collect()
}

/// Panics where one of `forbidden` stands in what was said.
fn assert_says_none(forbidden: &[String], said: &str, place: &str) {
    for text in forbidden {
        if let Some(at) = said.find(text.as_str()) {
            let (from, to) =
                (said.floor_char_boundary(at.saturating_sub(200)), said.floor_char_boundary(at + 200));
            panic!("{place} says {text:?}: …{}…", &said[from..to]);
        }
    }
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

/// Where nobody listens.
fn nowhere() -> String {
    format!("127.0.0.1:{}", free_port())
}

fn proxies() -> Vec<(&'static str, String)> {
    let proxy = format!("http://proxy:{}@{}", encoded(PROXY_PASSWORD), nowhere());
    let names = ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"];
    names.into_iter().map(|name| (name, proxy.clone())).collect()
}

fn borrowed<'a>(settings: &'a [(&'a str, String)]) -> Vec<(&'a str, &'a str)> {
    settings.iter().map(|(name, value)| (*name, value.as_str())).collect()
}

async fn simulator() -> Arc<Simulator> {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut config = SimConfig::new(inlet::clock::system_milliseconds);
    config.channels = vec!["alpha".to_owned()];
    config.count = Some(0);
    Arc::new(Simulator::start(config, listener).await.unwrap())
}

/// A history service that says chat in the place where none belongs.
async fn babbling_history() -> (String, Tasks) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let no_code = || async { format!(r#"{{"messages":[],"error_code":"{CHAT}"}}"#) };
    let router = Router::new().route("/api/v2/recent-messages/alpha", get(no_code));
    let mut tasks = Tasks::new();
    tasks.spawn("history", async move { axum::serve(listener, router).await.unwrap() });
    (format!("http://history:{}@{address}", encoded(HISTORY_PASSWORD)), tasks)
}

/// Every line that can go wrong, and some that do not, with [`CHAT`] in each.
fn lines() -> Vec<Vec<u8>> {
    let good = |id: u32| {
        format!("@id={id};room-id=1;user-id=9;display-name=Nn :nn!nn@nn PRIVMSG #alpha :{CHAT} {id}")
    };
    let mut lines: Vec<Vec<u8>> = (1..=20).map(|id| good(id).into_bytes()).collect();
    let long = format!("@id=long :n!n@n PRIVMSG #alpha :{CHAT}{}", "x".repeat(70_000));
    let large = format!("@id=large;user-id=9 :n!n@n PRIVMSG #alpha :{CHAT}{}", "y".repeat(60_000));
    for line in [
        long,
        large,
        format!("@id=no-text;x={CHAT} :n!n@n PRIVMSG"),
        format!("@@@;;;=== {CHAT}"),
        format!("@id=odd;user-id=9;tmi-sent-ts={CHAT};emotes={CHAT} :n!n@n PRIVMSG #alpha :{CHAT}"),
        format!(
            "@id=notice;msg-id=resub;system-msg={CHAT};user-id=9 :tmi.twitch.tv USERNOTICE #alpha :{CHAT}"
        ),
        format!("@target-msg-id=1;login=nn :tmi.twitch.tv CLEARMSG #alpha :{CHAT}"),
        format!(":tmi.twitch.tv CLEARCHAT #alpha :{CHAT}"),
        format!(":n!n@n WHISPER bot :{CHAT}"),
        format!(":tmi.twitch.tv 999 bot :{CHAT}"),
    ] {
        lines.push(line.into_bytes());
    }
    lines.push([b"@id=bytes;user-id=9 :n!n@n PRIVMSG #alpha :\xff\xfe".as_slice(), CHAT.as_bytes()].concat());
    lines
}

/// Asks for everything, rightly and wrongly; all of the answers.
async fn ask_everything(inlet: &Inlet) -> String {
    let client = reqwest::Client::builder()
        .no_proxy()
        .local_address(IpAddr::V4(CALLER))
        .timeout(Duration::from_secs(10));
    let client = client.build().unwrap();
    let mut said = String::new();
    let paths = [
        "/livez",
        "/readyz",
        "/healthz",
        "/metrics",
        "/_debug/config",
        "/_debug/twitch",
        "/admin/audit",
        "/admin/errors",
        "/nothing",
        "/v1/nothing",
    ];
    let mut requests = Vec::new();
    for path in paths {
        let request = |token: &str| client.get(inlet.url(path)).header("authorization", token);
        requests.push(request(&format!("Bearer {ADMIN_TOKEN}")));
        requests.push(request(&format!("Bearer {ADMIN_TOKEN_NEXT}")));
        requests.push(request(&format!("Bearer {WRONG_TOKEN}")));
        requests.push(request(WRONG_TOKEN));
        requests.push(client.post(inlet.url(path)).body(CHAT).header("x-forwarded-for", FORWARDED_FOR));
        requests.push(client.get(inlet.url(path)).query(&[("access_token", WRONG_TOKEN)]));
    }
    let stream = || client.get(inlet.url("/v1/stream"));
    requests.push(stream().bearer_auth(ADMIN_TOKEN).header("last-event-id", CHAT));
    requests.push(stream().bearer_auth(WRONG_TOKEN));
    for token in [STREAM_TOKEN, ADMIN_TOKEN, WRONG_TOKEN] {
        let in_address = || stream().query(&[("access_token", token)]);
        // Each is refused for another reason, so that no answer goes on without end.
        requests.push(in_address().header("last-event-id", CHAT));
        requests.push(in_address().query(&[("access_token", token)]));
        requests.push(in_address().query(&[("type", "a"), ("type", "b")]));
        requests.push(in_address().header("origin", "https://evil.example"));
        let preflight = client.request(reqwest::Method::OPTIONS, inlet.url("/v1/stream"));
        requests.push(preflight.query(&[("access_token", token)]).header("origin", "null"));
        requests.push(client.get(inlet.url("/")).query(&[("access_token", token)]));
        requests.push(client.get(inlet.url("/_debug/config")).query(&[("access_token", token)]));
    }
    requests.push(client.get(inlet.url("/v1/stream?platform=a&platform=b")).bearer_auth(ADMIN_TOKEN));
    requests.push(client.post(inlet.url("/admin/replay")).bearer_auth(WRONG_TOKEN).body(CHAT));
    requests.push(client.post(inlet.url("/admin/replay")).bearer_auth(ADMIN_TOKEN).body(CHAT));
    for request in requests {
        let response = request.send().await.unwrap();
        let head = format!("{} {:?}", response.status(), response.headers());
        said.extend([head, response.text().await.unwrap()]);
    }
    said
}

async fn bus_is(inlet: &Inlet, state: &str) {
    eventually("the bus is as awaited", || async {
        (inlet.json("/healthz").await.1["parts"]["bus"]["state"] == state).then_some(())
    })
    .await;
}

async fn twitch_error(inlet: &Inlet, code: &str) {
    eventually("the source says what is wrong", || async {
        let page =
            inlet.client().get(inlet.url("/_debug/twitch")).bearer_auth(ADMIN_TOKEN).send().await.unwrap();
        let page: serde_json::Value = page.json().await.unwrap();
        (page["lastError"]["code"] == code).then_some(())
    })
    .await;
}

async fn gaps_are_told(inlet: &Inlet, count: usize) {
    eventually("the gap is told", || async {
        (inlet.log().matches("the channel was not heard for a while").count() >= count).then_some(())
    })
    .await;
}

#[tokio::test]
async fn nothing_secret_and_nothing_said_in_chat_leaves_a_run_of_faults() {
    let mut nats = Nats::with_config(&format!(
        "max_payload: 32768\nauthorization {{ users: [\
         {{ user: inlet, password: \"{NATS_PASSWORD}\" }}, {{ user: reader, password: reader }}] }}\nno_auth_user: reader"
    ))
    .await;
    let simulator = simulator().await;
    let (history, _history) = babbling_history().await;
    // It knows none of the tokens: it refuses the one, and then the other.
    let oauth = OAuth::start().await;
    let nats_url = format!("nats://inlet:{}@127.0.0.1:{}", encoded(NATS_PASSWORD), nats.port);
    for format in ["json", "text"] {
        let mut settings = vec![
            ("TWITCH_CHANNELS", "alpha".to_owned()),
            ("TWITCH_IRC_URL", format!("irc://{}", simulator.local_addr())),
            ("TWITCH_BOT_USERNAME", "bot".to_owned()),
            ("TWITCH_BOT_ACCESS_TOKEN", format!("oauth:{BOT_TOKEN}")),
            ("TWITCH_BOT_REFRESH_TOKEN", REFRESH_TOKEN.to_owned()),
            ("TWITCH_CLIENT_ID", CLIENT_ID.to_owned()),
            ("TWITCH_CLIENT_SECRET", CLIENT_SECRET.to_owned()),
            ("TWITCH_OAUTH_URL", oauth.url()),
            ("TWITCH_BACKFILL_URL", history.clone()),
            ("IRC_RECONNECT_INITIAL_MS", "10".to_owned()),
            ("NATS_URL", nats_url.clone()),
            ("ADMIN_TOKEN", ADMIN_TOKEN.to_owned()),
            ("ADMIN_TOKEN_NEXT", ADMIN_TOKEN_NEXT.to_owned()),
            ("STREAM_TOKEN", STREAM_TOKEN.to_owned()),
            ("STREAM_ORIGINS", "null".to_owned()),
            ("GOOGLE_CLOUD_PROJECT", "some-project".to_owned()),
            ("FIRESTORE_EMULATOR_HOST", nowhere()),
            (LOUD.0, LOUD.1.to_owned()),
            ("LOG_FORMAT", format.to_owned()),
        ];
        settings.extend(proxies());
        let mut inlet = Inlet::serve(&borrowed(&settings)).await;
        let mut answers = run_through_faults(&inlet, &simulator, &mut nats).await;
        answers += &ask_everything(&inlet).await;
        assert_eq!(inlet.terminate(Duration::from_secs(15)).await.1, Some(0));
        let log = inlet.log();
        for expected in [
            "NATS is away",
            "Twitch refuses the login",
            "Twitch no longer takes the bot's token",
            "a gap could not be healed",
            "user store fails",
            "async_nats",
        ] {
            assert!(log.contains(expected), "the run went through {expected:?}:\n{log}");
        }
        assert_says_none(&all_forms(), &log, "the log");
        assert_says_none(&all_forms(), &answers, "an answer");
        let chat = [CHAT, "xyzzy", "somebody@", &encoded(CHAT), &CALLER.to_string(), FORWARDED_FOR];
        assert_says_none(&chat.map(str::to_owned), &log, "the log");
        assert_says_none(&chat.map(str::to_owned), &answers, "an answer");
        assert!(!log.contains("panic"), "{log}");
    }
    // What must not be in the log is where it belongs.
    assert!(read(&nats.url(), "INLET").await.iter().any(|message| message.body.to_string().contains(CHAT)));
}

/// The token document read, refreshed and stored, a service that says a token where none belongs, and a login: with every
/// library at its loudest.
#[tokio::test]
async fn a_token_that_is_kept_in_the_store_is_said_nowhere() {
    let (simulator, oauth, project) = (simulator().await, OAuth::start().await, Project::new());
    oauth.set_lifetime(Duration::from_secs(6));
    project.write("oauth", "twitch:bot", oauth.issue().fields(6)).await;
    let mut settings = vec![
        ("TWITCH_CHANNELS", "alpha".to_owned()),
        ("TWITCH_IRC_URL", format!("irc://{}", simulator.local_addr())),
        ("TWITCH_CLIENT_ID", CLIENT_ID.to_owned()),
        ("TWITCH_CLIENT_SECRET", CLIENT_SECRET.to_owned()),
        ("TWITCH_OAUTH_URL", oauth.url()),
        ("IRC_RECONNECT_INITIAL_MS", "10".to_owned()),
        ("GOOGLE_CLOUD_PROJECT", project.id.clone()),
        ("FIRESTORE_EMULATOR_HOST", host()),
        (LOUD.0, LOUD.1.to_owned()),
    ];
    settings.extend(proxies());
    let mut inlet = Inlet::serve(&borrowed(&settings)).await;
    eventually("refreshed", || async { inlet.log().contains("the token was refreshed").then_some(()) }).await;
    oauth.set(Mood::Babbles);
    simulator.control(Command::RefuseLogin(Some(LoginRefusal::Failed))).await;
    simulator.control(Command::Drop(Target::All)).await;
    let is_degraded = || async {
        (inlet.json("/_debug/twitch").await.1["token"]["lastError"]["code"] == "oauth_unavailable")
            .then_some(())
    };
    eventually("the outage shows", is_degraded).await;
    oauth.set(Mood::Well);
    let login = settings.clone();
    let login = tokio::task::spawn_blocking(move || run(&["login"], &borrowed(&login))).await.unwrap();
    assert_eq!(login.status.code(), Some(0), "{}", said(&login));
    let mut pages = String::new();
    for path in ["/healthz", "/metrics", "/_debug/config", "/_debug/twitch"] {
        pages += &inlet.get(path).await.unwrap().text().await.unwrap();
    }
    assert_eq!(inlet.terminate(Duration::from_secs(15)).await.1, Some(0));
    let forbidden: Vec<_> = oauth.secrets().iter().flat_map(|secret| forms(CLIENT_ID, secret)).collect();
    assert!(forbidden.len() > 20 && inlet.log().contains("h2"), "the libraries are heard");
    assert_says_none(&forbidden, &inlet.log(), "the log");
    assert_says_none(&forbidden, &pages, "a page");
    assert_says_none(&forbidden, &said(&login), "inlet login");
}

async fn run_through_faults(inlet: &Inlet, simulator: &Simulator, nats: &mut Nats) -> String {
    let say = async || {
        for mut line in lines() {
            line.extend_from_slice(b"\r\n");
            simulator.control(Command::Raw(line)).await;
        }
    };
    let is_joined = async || {
        eventually("joined", || async { (simulator.stats().joined == 1).then_some(()) }).await;
    };
    is_joined().await;
    say().await;
    inlet.settled(20).await;
    let mut answers = ask_everything(inlet).await;
    nats.kill();
    bus_is(inlet, "away").await;
    say().await;
    answers += &ask_everything(inlet).await;
    nats.restart().await;
    bus_is(inlet, "up").await;
    simulator.control(Command::Drop(Target::All)).await;
    gaps_are_told(inlet, 1).await;
    is_joined().await;
    say().await;
    simulator.control(Command::RefuseLogin(Some(LoginRefusal::Failed))).await;
    simulator.control(Command::Drop(Target::All)).await;
    twitch_error(inlet, "login_failed").await;
    answers += &ask_everything(inlet).await;
    simulator.control(Command::RefuseLogin(None)).await;
    answers
}

#[tokio::test]
async fn credentials_that_nats_refuses_are_not_repeated() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let (user, seed_of) = (KeyPair::new_user(), |pair: &KeyPair| pair.seed().unwrap());
    let jwt = format!("eyJ0eXAiOiJKV1QifQ.{}.c2lnbmF0dXJl", STANDARD_NO_PAD.encode(NATS_PASSWORD));
    let credentials = format!(
        "-----BEGIN NATS USER JWT-----\n{jwt}\n------END NATS USER JWT------\n\n\
         -----BEGIN USER NKEY SEED-----\n{}\n------END USER NKEY SEED------\n",
        seed_of(&user)
    );
    let nats = Nats::with_config("authorization { user: inlet, password: another }").await;
    let plain = nats.url();
    let url = |user_info: &str| plain.replace("://", &format!("://{user_info}@"));
    let broken_seed = format!("{}broken", seed_of(&user));
    let settings = [
        vec![("NATS_URL", url(&format!("inlet:{}", encoded(NATS_PASSWORD))))],
        vec![("NATS_URL", url(&encoded(NATS_PASSWORD)))],
        vec![("NATS_URL", plain.clone()), ("NATS_CREDS_FILE", write("creds", &credentials))],
        vec![("NATS_URL", plain.clone()), ("NATS_NKEY_FILE", write("nkey", &seed_of(&user)))],
        vec![("NATS_URL", plain.clone()), ("NATS_NKEY_FILE", write("broken", &broken_seed))],
    ];
    let mut forbidden = forms("inlet", NATS_PASSWORD);
    forbidden.extend([seed_of(&user), jwt]);
    for mut settings in settings {
        let names: Vec<_> = settings.iter().map(|(name, _)| *name).collect();
        settings.push((LOUD.0, LOUD.1.to_owned()));
        let inlet = Inlet::serve(&borrowed(&settings)).await;
        bus_is(&inlet, "away").await;
        let pages = [inlet.json("/healthz").await.1, inlet.json("/_debug/config").await.1];
        assert_says_none(&forbidden, &inlet.log(), &format!("the log with {names:?}"));
        assert_says_none(&forbidden, &format!("{pages:?}"), &format!("a page with {names:?}"));
    }
}

#[test]
fn settings_that_are_refused_are_not_repeated_where_they_may_hold_a_secret() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("secret");
    std::fs::write(&file, BOT_TOKEN).unwrap();
    let file = file.to_str().unwrap();
    let with_password = |scheme: &str, rest: &str| format!("{scheme}bot:{BOT_TOKEN}@{rest}");
    let token = || ("TWITCH_BOT_ACCESS_TOKEN", BOT_TOKEN.to_owned());
    let environments = [
        vec![("NATS_URL", with_password("nats://", "host:port"))],
        vec![("NATS_URL", with_password("http://", "host:4222"))],
        vec![("NATS_URL", with_password("nats://", "host:4222")), ("NATS_STREAM", "a.b".to_owned())],
        vec![("NATS_URL", "nats://host".to_owned()), ("NATS_CREDS_FILE", file.to_owned())],
        vec![("TWITCH_BACKFILL_URL", with_password("ftp://", "host"))],
        vec![("TWITCH_BACKFILL_URL", with_password("https://", &format!("host/?token={BOT_TOKEN}")))],
        vec![("TWITCH_BACKFILL_URL", format!("https://host/?token={BOT_TOKEN}"))],
        vec![("TWITCH_BACKFILL_URL", format!("https://host/#{BOT_TOKEN}"))],
        vec![("TWITCH_BACKFILL_URL", format!("https://bot:{BOT_TOKEN}/x@host"))],
        vec![("TWITCH_IRC_URL", with_password("ircs://", "host:6697"))],
        vec![("TWITCH_IRC_URL", with_password("https://", "host"))],
        vec![("FIRESTORE_EMULATOR_HOST", with_password("", "host:8080"))],
        vec![("FIRESTORE_EMULATOR_HOST", with_password("http://", "host"))],
        vec![token()],
        vec![
            token(),
            ("TWITCH_BOT_ACCESS_TOKEN_FILE", file.to_owned()),
            ("TWITCH_BOT_USERNAME", "b".to_owned()),
        ],
        vec![("TWITCH_BOT_REFRESH_TOKEN", BOT_TOKEN.to_owned())],
        vec![("TWITCH_CLIENT_SECRET", BOT_TOKEN.to_owned())],
        vec![("TWITCH_OAUTH_URL", with_password("https://", "host"))],
        vec![("TWITCH_OAUTH_URL", format!("https://host/?token={BOT_TOKEN}"))],
        vec![token(), ("TWITCH_BOT_USERNAME", "b".to_owned()), ("TWITCH_TOKEN_DOC", "odd".to_owned())],
        vec![("ADMIN_TOKEN", BOT_TOKEN.to_owned()), ("ADMIN_TOKEN_FILE", file.to_owned())],
        vec![("ADMIN_TOKEN", BOT_TOKEN.to_owned()), ("PORT", "many".to_owned())],
        vec![("ADMIN_TOKEN_NEXT", BOT_TOKEN.to_owned())],
        vec![
            ("ADMIN_TOKEN", "another-token-of-ours".to_owned()),
            ("ADMIN_TOKEN_NEXT", BOT_TOKEN.to_owned()),
            ("ADMIN_TOKEN_NEXT_FILE", file.to_owned()),
        ],
        vec![("ADMIN_TOKEN", BOT_TOKEN.to_owned()), ("STREAM_TOKEN", BOT_TOKEN.to_owned())],
        vec![("STREAM_TOKEN", BOT_TOKEN.to_owned()), ("STREAM_TOKEN_FILE", file.to_owned())],
        vec![("STREAM_TOKEN", BOT_TOKEN.to_owned()), ("STREAM_ORIGINS", with_password("https://", "host"))],
    ];
    let forbidden = forms("bot", BOT_TOKEN);
    for environment in environments {
        let output = run(&["serve"], &borrowed(&environment));
        assert_eq!(output.status.code(), Some(78), "{environment:?}: {}", said(&output));
        assert_says_none(&forbidden, &said(&output), &format!("serve with {environment:?}"));
    }
    let address = with_password("", "host/x");
    for command in ["replay", "tail", "probe"] {
        let output = run(&[command, "/no/such"], &[("INLET_URL", &address), ("ADMIN_TOKEN", BOT_TOKEN)]);
        assert_ne!(output.status.code(), Some(0));
        assert_says_none(&forbidden, &said(&output), command);
    }
    // A secret has no flag, and who gives it one all the same is not told what it was.
    for flag in ["--admin-token", "--admin-token-next", "--stream-token", "--twitch-bot-access-token"] {
        for arguments in [
            vec!["serve".to_owned(), format!("{flag}={BOT_TOKEN}")],
            vec!["serve".to_owned(), flag.to_owned(), BOT_TOKEN.to_owned()],
        ] {
            let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
            let output = run(&arguments, &[]);
            assert_eq!(output.status.code(), Some(64));
            assert_says_none(&forbidden, &said(&output), &format!("{arguments:?}"));
        }
    }
}

#[tokio::test]
async fn commands_say_no_secret_whether_they_work_or_fail() {
    let nats = Nats::with_config("authorization { user: inlet, password: another }").await;
    let folder = tempfile::tempdir().unwrap();
    let lines = folder.path().join("lines");
    std::fs::write(&lines, lines_joined()).unwrap();
    let (lines, data) = (lines.to_str().unwrap(), folder.path().join("data"));
    let refused = format!("nats://inlet:{}@127.0.0.1:{}", encoded(NATS_PASSWORD), nats.port);
    let away = format!("nats://inlet:{}@{}", encoded(NATS_PASSWORD), nowhere());
    let service = format!("http://operator:{}@{}", encoded(HISTORY_PASSWORD), nowhere());
    let mut settings = vec![
        ("INLET_URL", service),
        ("ADMIN_TOKEN", ADMIN_TOKEN.to_owned()),
        ("ADMIN_TOKEN_NEXT", ADMIN_TOKEN_NEXT.to_owned()),
        ("TWITCH_BOT_USERNAME", "bot".to_owned()),
        ("TWITCH_BOT_ACCESS_TOKEN", BOT_TOKEN.to_owned()),
        ("TWITCH_BACKFILL_URL", format!("https://history:{}@{}", encoded(HISTORY_PASSWORD), nowhere())),
        ("DATA_DIR", data.to_str().unwrap().to_owned()),
        (LOUD.0, LOUD.1.to_owned()),
        ("ENRICH_MODE", "off".to_owned()),
    ];
    settings.extend(proxies());
    let chat = ["xyzzy", "somebody@"].map(str::to_owned);
    for (bus, arguments) in [
        (Some(&away), &["tail", "--count", "1"][..]),
        (Some(&refused), &["tail", "--count", "1"]),
        (None, &["tail", "--count", "1"]),
        (None, &["probe"]),
        (None, &["replay", "--json", lines]),
        (None, &["replay", "--json", "/no/such"]),
        (Some(&away), &["--help"]),
        (Some(&away), &["serve", "--help"]),
        (Some(&away), &["replay", "--help"]),
        (Some(&away), &["tail", "--help"]),
        (Some(&away), &["probe", "--help"]),
        (Some(&away), &["simulate", "--help"]),
        (Some(&away), &["serve", "--port", "many"]),
        (Some(&away), &["serve", "--no-such-flag"]),
    ] {
        let mut settings = settings.clone();
        settings.extend(bus.map(|url| ("NATS_URL", url.clone())));
        let output = run(arguments, &borrowed(&settings));
        let place = format!("{arguments:?}, which ends with {:?}", output.status.code());
        assert!(output.status.code().is_some() && !said(&output).is_empty(), "{place}");
        assert_says_none(&all_forms(), &said(&output), &place);
        assert_says_none(&chat, &said(&output), &place);
    }
}

fn lines_joined() -> Vec<u8> {
    lines().into_iter().flat_map(|line| [line.as_slice(), b"\r\n"].concat()).collect()
}
