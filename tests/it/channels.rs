//! Channels that come, go and change their names while the service runs: by the routes and by the commands, on either
//! store, over real sockets.

mod rooms;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use inlet::tasks::Tasks;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use crate::harness::account::Account;
use crate::harness::firestore::Project;
use crate::harness::inlet::{Inlet, Simulator, run};
use crate::harness::nats::Nats;
use crate::harness::proxy::{Mode, Proxy};
use crate::harness::stream::{InStream, read};
use crate::harness::{eventually, within};

const TOKEN: &str = "correct-horse-battery";
const GAP: &str = "internal.source.gap.v1";
/// Joining takes its time where JOINs are limited, and this machine may be busy.
const JOINING: Duration = Duration::from_mins(2);
/// What instances that share a store are promised.
const AGREED_WITHIN: Duration = Duration::from_secs(5);

/// Environment variables.
type Settings = Vec<(String, String)>;

fn settings(pairs: &[(&str, &str)]) -> Settings {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

fn refs(settings: &Settings) -> Vec<(&str, &str)> {
    settings.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect()
}

fn firestore(project: &Project, host: &str) -> Settings {
    settings(&[("GOOGLE_CLOUD_PROJECT", &project.id), ("FIRESTORE_EMULATOR_HOST", host)])
}

/// A request to `/admin/channels`; its status and its JSON.
async fn ask(inlet: &Inlet, method: &str, path: &str, body: Option<&str>) -> (u16, Value) {
    let url = inlet.url(&format!("/admin/channels{path}"));
    let mut request = inlet.client().request(method.parse().unwrap(), url).bearer_auth(TOKEN);
    if let Some(body) = body {
        request = request.body(body.to_owned());
    }
    let response = request.send().await.unwrap();
    (response.status().as_u16(), response.json().await.unwrap())
}

async fn add(inlet: &Inlet, login: &str) -> (u16, Value) {
    ask(inlet, "POST", "", Some(&json!({ "login": login }).to_string())).await
}

async fn remove(inlet: &Inlet, login: &str) -> (u16, Value) {
    ask(inlet, "DELETE", &format!("/{login}"), None).await
}

/// `/_debug/twitch`.
async fn page(inlet: &Inlet) -> Value {
    let request = inlet.client().get(inlet.url("/_debug/twitch")).bearer_auth(TOKEN);
    request.send().await.unwrap().json().await.unwrap()
}

/// The channels of `/_debug/twitch` in this state.
async fn in_state(inlet: &Inlet, state: &str) -> BTreeSet<String> {
    let page = page(inlet).await;
    let channels = page["channels"].as_array().unwrap().iter();
    let of = channels.filter(|channel| channel["state"] == state);
    of.map(|channel| channel["name"].as_str().unwrap().to_owned()).collect()
}

/// Waits until exactly these channels are joined, and no other is wanted.
async fn joined(inlet: &Inlet, names: &[&str]) {
    let names: BTreeSet<_> = names.iter().map(|name| (*name).to_owned()).collect();
    within(JOINING, &format!("joined are {names:?}"), || async {
        let all = page(inlet).await["channels"].as_array().unwrap().len();
        (all == names.len() && in_state(inlet, "joined").await == names).then_some(())
    })
    .await;
}

/// A command's exit code, and what it said.
fn channel(arguments: &[&str], environment: &Settings) -> (i32, String) {
    let arguments: Vec<_> = std::iter::once("channel").chain(arguments.iter().copied()).collect();
    let output = run(&arguments, &refs(environment));
    let said = [output.stdout, output.stderr].concat();
    (output.status.code().unwrap(), String::from_utf8(said).unwrap())
}

fn gaps(found: &[InStream]) -> Vec<Value> {
    let gaps = found.iter().filter(|message| message.body["type"] == GAP);
    gaps.map(|message| message.body["payload"].clone()).collect()
}

/// Waits until the stream holds so many gap events.
async fn with_gaps(nats: &Nats, count: usize) -> Vec<Value> {
    eventually("the gap events", || async {
        let gaps = gaps(&read(&nats.url(), "INLET").await);
        (gaps.len() >= count).then_some(gaps)
    })
    .await
}

/// The simulator's numbers. What it was told before is done then.
async fn numbers(simulator: &mut Simulator) -> Value {
    let lines = |simulator: &Simulator| {
        let log = simulator.log();
        log.lines().filter(|line| line.starts_with('{')).map(str::to_owned).collect::<Vec<_>>()
    };
    let before = lines(simulator).len();
    simulator.say("stats");
    eventually("the numbers", || async { serde_json::from_str(lines(simulator).get(before)?).ok() }).await
}

/// Somebody with an account says something in a channel.
async fn speak(simulator: &Simulator, login: &str, channel: &str) {
    let mut socket = TcpStream::connect(simulator.addr()).await.unwrap();
    let said = format!(
        "PASS oauth:x\r\nNICK {login}\r\nJOIN #{channel}\r\nPRIVMSG #{channel} :here I am\r\nPING :end\r\n"
    );
    socket.write_all(said.as_bytes()).await.unwrap();
    let (mut answer, mut piece) = (String::new(), [0; 4096]);
    while !answer.contains("PONG tmi.twitch.tv :end") {
        let read = socket.read(&mut piece).await.unwrap();
        assert!(read > 0, "the simulator closed: {answer}");
        answer.push_str(&String::from_utf8_lossy(&piece[..read]));
    }
}

/// Every good and bad answer of the routes and of the commands, on a store.
async fn answers(store: Settings) {
    let simulator = Simulator::start(&["--channels", "alpha,beta,gamma", "--rate", "20"]).await;
    let own = settings(&[
        ("TWITCH_CHANNELS", "alpha"),
        ("TWITCH_IRC_URL", &simulator.url()),
        ("ADMIN_TOKEN", TOKEN),
    ]);
    let inlet = Inlet::serve(&refs(&[own, store.clone()].concat())).await;
    for (method, path) in [("GET", ""), ("POST", ""), ("DELETE", "/alpha")] {
        let url = inlet.url(&format!("/admin/channels{path}"));
        let answer = inlet.client().request(method.parse().unwrap(), url).send().await.unwrap();
        assert_eq!(answer.status(), 401, "{method} without the token");
    }
    joined(&inlet, &["alpha"]).await;
    let (status, body) = add(&inlet, " #Beta").await;
    assert_eq!((status, &body["login"], &body["fixed"]), (201, &"beta".into(), &false.into()), "{body}");
    let (status, again) = add(&inlet, "beta").await;
    assert_eq!((status, &again["addedAt"]), (200, &body["addedAt"]), "the first one counts");
    assert_eq!(add(&inlet, "alpha").await.0, 200, "it is there by the settings");
    for bad in ["a b", "", "a\r\nJOIN #b", "x234567890123456789012345x", "ä"] {
        let (status, body) = add(&inlet, bad).await;
        assert_eq!((status, &body["error"]["code"]), (400, &"bad_request".into()), "{bad:?}: {body}");
    }
    let large = format!("{{\"login\":\"{}\"}}", "x".repeat(70_000));
    for (bad, status) in [("", 400), ("{", 400), ("[]", 400), ("{\"login\":7}", 400), (large.as_str(), 413)] {
        assert_eq!(ask(&inlet, "POST", "", Some(bad)).await.0, status, "{bad:.20}");
    }
    joined(&inlet, &["alpha", "beta"]).await;
    let channels = eventually("both rooms are known", || async {
        let (status, body) = ask(&inlet, "GET", "", None).await;
        assert_eq!(status, 200);
        let channels = body["channels"].as_array().unwrap().clone();
        channels.iter().all(|channel| channel["roomId"].is_string()).then_some(channels)
    })
    .await;
    let of = |name: &str| channels.iter().find(|channel| channel["login"] == name).unwrap();
    assert_eq!((&of("alpha")["fixed"], &of("beta")["fixed"]), (&true.into(), &false.into()));
    assert_eq!((&of("beta")["state"], &of("beta")["addedAt"]), (&"joined".into(), &body["addedAt"]));
    for (login, status, code) in [
        ("alpha", 409, "conflict"),
        ("nobody", 404, "not_found"),
        ("a%20b", 400, "bad_request"),
        ("%FF", 400, "bad_request"),
    ] {
        let (answer, body) = remove(&inlet, login).await;
        assert_eq!((answer, &body["error"]["code"]), (status, &code.into()), "{login}: {body}");
    }
    let place = tempfile::tempdir().unwrap();
    let folder = if store.is_empty() { inlet.data_dir() } else { place.path().to_owned() };
    let of_command = settings(&[
        ("DATA_DIR", folder.to_str().unwrap()),
        ("PORT", &inlet.port.to_string()),
        ("ADMIN_TOKEN", TOKEN),
        ("TWITCH_CHANNELS", "alpha"),
        ("LOG_LEVEL", "error"),
    ]);
    let environment = [of_command, store.clone()].concat();
    commands(&environment, store.is_empty());
    joined(&inlet, &["alpha", "beta", "gamma"]).await;
    assert_eq!(channel(&["remove", "gamma"], &environment), (0, "gamma removed\n".to_owned()));
    let (status, gone) = remove(&inlet, "beta").await;
    assert_eq!((status, &gone["login"]), (200, &"beta".into()));
    assert_eq!(remove(&inlet, "beta").await.0, 404);
    joined(&inlet, &["alpha"]).await;
    records(&inlet, store.is_empty()).await;
    let metrics = inlet.metrics().await;
    let count = |state: &str| metrics.get(&format!("inlet_twitch_channels{{state=\"{state}\"}}"));
    assert_eq!((count("joined"), count("wanted"), count("failed")), (1, 0, 0));
    assert!(!inlet.log().contains(TOKEN));
}

/// What was done is on record, with how it ended.
async fn records(inlet: &Inlet, is_embedded: bool) {
    let answer =
        inlet.client().get(inlet.url("/admin/audit?limit=500")).bearer_auth(TOKEN).send().await.unwrap();
    let page: Value = answer.json().await.unwrap();
    let records = page["records"].as_array().unwrap();
    let outcomes = |action: &str, login: &str| {
        let of = records.iter().filter(|record| {
            record["action"] == action
                && record["target"].as_str().is_some_and(|target| target.ends_with(login))
        });
        of.map(|record| record["outcome"].as_str().unwrap()).collect::<BTreeSet<_>>()
    };
    assert!(outcomes("DELETE /admin/channels/{login}", "beta").contains("done"), "{page}");
    let command = if is_embedded { "DELETE /admin/channels/{login}" } else { "inlet channel remove" };
    assert!(outcomes(command, "gamma").contains("done"), "{page}");
    assert!(
        !outcomes(command, "nobody").contains("done") && !outcomes(command, "nobody").is_empty(),
        "{page}"
    );
}

fn commands(environment: &Settings, is_embedded: bool) {
    assert_eq!(channel(&["add", "Gamma"], environment), (0, "gamma added\n".to_owned()));
    assert_eq!(
        channel(&["add", "gamma", "beta"], environment).1,
        "gamma there already\nbeta there already\n"
    );
    let (code, said) = channel(&["list", "--json"], environment);
    let logins: BTreeSet<_> = said
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap()["login"].as_str().unwrap().to_owned())
        .collect();
    assert!(code == 0 && logins.contains("beta") && logins.contains("gamma"), "{said}");
    let (code, said) = channel(&["list"], environment);
    assert!(code == 0 && said.contains("beta  ") && said.contains(", added "), "{said}");
    for (arguments, wanted, says) in [
        (&["add", "a b"][..], 1, "no login"),
        (&["remove", "a/b"], 1, "no login"),
        (&["remove", "nobody"], 1, "there is no channel nobody"),
        (&["remove", "alpha"], 1, "TWITCH_CHANNELS"),
        (&["add"], 64, "Usage"),
        (&["frobnicate"], 64, "Usage"),
    ] {
        let (code, said) = channel(arguments, environment);
        assert!(code == wanted && said.contains(says), "{arguments:?}: {code}, {said}");
    }
    if is_embedded {
        let without: Settings =
            environment.iter().filter(|(name, _)| name != "ADMIN_TOKEN").cloned().collect();
        assert_eq!(channel(&["list"], &without).0, 78);
        let nowhere = [without, settings(&[("INLET_URL", "http://127.0.0.1:1")])].concat();
        assert_eq!(channel(&["add", "delta"], &nowhere).0, 69);
    }
}

#[tokio::test]
async fn routes_and_commands_answer_on_the_embedded_store() {
    answers(Vec::new()).await;
}

#[tokio::test]
async fn routes_and_commands_answer_on_firestore() {
    let project = Project::new();
    answers(firestore(&project, &crate::harness::firestore::host())).await;
}

#[tokio::test]
async fn while_the_store_is_away_the_last_known_channels_stay() {
    let project = Project::new();
    let proxy = Proxy::to(project.address().await).await;
    let simulator = Simulator::start(&["--channels", "alpha,beta", "--rate", "20"]).await;
    let own = settings(&[("TWITCH_IRC_URL", &simulator.url()), ("ADMIN_TOKEN", TOKEN)]);
    let store = firestore(&project, &proxy.addr().to_string());
    let inlet = Inlet::serve(&refs(&[own, store.clone()].concat())).await;
    assert_eq!(add(&inlet, "alpha").await.0, 201);
    joined(&inlet, &["alpha"]).await;
    proxy.set(Mode::Cut);
    for ((status, body), code) in [
        (add(&inlet, "beta").await, "audit_unavailable"),
        (remove(&inlet, "alpha").await, "audit_unavailable"),
        (ask(&inlet, "GET", "", None).await, "store_unavailable"),
    ] {
        assert_eq!((status, &body["error"]["code"]), (503, &code.into()), "{body}");
    }
    let folder = tempfile::tempdir().unwrap();
    let of_command = settings(&[("DATA_DIR", folder.path().to_str().unwrap()), ("LOG_LEVEL", "error")]);
    let (code, said) = channel(&["add", "beta"], &[of_command, store].concat());
    assert_eq!(code, 69, "{said}");
    let heard = inlet.metrics().await.sum("inlet_events_received_total");
    eventually("chat goes on", || async {
        (inlet.metrics().await.sum("inlet_events_received_total") > heard + 20).then_some(())
    })
    .await;
    joined(&inlet, &["alpha"]).await;
    proxy.set(Mode::Pass);
    eventually("the store is there again", || async { (add(&inlet, "beta").await.0 < 300).then_some(()) })
        .await;
    joined(&inlet, &["alpha", "beta"]).await;
}

#[tokio::test]
async fn two_instances_agree_within_five_seconds() {
    let project = Project::new();
    let simulator = Simulator::start(&["--channels", "alpha,beta", "--rate", "20"]).await;
    let own = settings(&[("TWITCH_IRC_URL", &simulator.url()), ("ADMIN_TOKEN", TOKEN)]);
    let store = firestore(&project, &crate::harness::firestore::host());
    let all = [own, store.clone()].concat();
    let (one, other) = (Inlet::serve(&refs(&all)).await, Inlet::serve(&refs(&all)).await);
    one.ready().await;
    other.ready().await;
    let folder = tempfile::tempdir().unwrap();
    let of_command =
        [settings(&[("DATA_DIR", folder.path().to_str().unwrap()), ("LOG_LEVEL", "error")]), store].concat();
    let names = async |inlet: &Inlet| {
        let page = page(inlet).await;
        let channels = page["channels"].as_array().unwrap().iter();
        channels.map(|channel| channel["name"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    let mut slowest = Duration::ZERO;
    for (login, is_added, by_command) in [
        ("alpha", true, false),
        ("beta", true, true),
        ("alpha", false, false),
        ("beta", false, true),
        ("beta", true, false),
    ] {
        let command = if is_added { "add" } else { "remove" };
        let start = if by_command {
            let (code, said) = channel(&[command, login], &of_command);
            assert_eq!(code, 0, "{said}");
            Instant::now()
        } else {
            let (status, body) = if is_added { add(&one, login).await } else { remove(&one, login).await };
            assert!(status < 300, "{body}");
            Instant::now()
        };
        for inlet in [&one, &other] {
            eventually(&format!("{login} {command}"), || async {
                (names(inlet).await.contains(&login.to_owned()) == is_added).then_some(())
            })
            .await;
        }
        slowest = slowest.max(start.elapsed());
    }
    println!("two instances: the slowest of five changes was known to both after {slowest:?}");
    assert!(slowest <= AGREED_WITHIN, "{slowest:?}");
    joined(&one, &["beta"]).await;
    joined(&other, &["beta"]).await;
    // One document for it, by its room; of what was removed, marks at most, which go.
    let documents = eventually("beta is a room", || async {
        let documents = project.read_all("channels").await;
        (!documents.contains_key("login:beta") || documents["login:beta"].contains_key("removedAt"))
            .then_some(documents)
    })
    .await;
    let wanted = documents.values().filter(|fields| {
        fields.get("addedAt").is_some_and(Value::is_string)
            && !fields.get("removedAt").is_some_and(Value::is_string)
    });
    assert_eq!(wanted.map(|fields| fields["login"].clone()).collect::<Vec<_>>(), ["beta"]);
}

#[tokio::test]
async fn the_first_channel_starts_the_source_and_the_last_ends_it() {
    let simulator = Simulator::start(&["--channels", "alpha", "--rate", "20"]).await;
    let own =
        settings(&[("TWITCH_IRC_URL", &simulator.url()), ("ADMIN_TOKEN", TOKEN), ("ENRICH_MODE", "off")]);
    let inlet = Inlet::serve(&refs(&own)).await;
    inlet.ready().await;
    for _ in 0..2 {
        let page = page(&inlet).await;
        assert_eq!((&page["state"], &page["channels"]), (&"disabled".into(), &json!([])), "{page}");
        assert_eq!(add(&inlet, "alpha").await.0, 201);
        joined(&inlet, &["alpha"]).await;
        inlet.ready().await;
        assert_eq!(remove(&inlet, "alpha").await.0, 200);
        eventually("nothing is connected", || async {
            let page = self::page(&inlet).await;
            let none = page["connections"].as_array().unwrap().is_empty();
            (none && page["state"] == "disabled").then_some(())
        })
        .await;
        inlet.ready().await;
    }
    // Where a setting forbids it nothing is read, whatever is added.
    let forbidden = [own, settings(&[("TWITCH_ENABLED", "false")])].concat();
    let inlet = Inlet::serve_in(inlet.into_folder(), &refs(&forbidden)).await;
    assert_eq!(add(&inlet, "alpha").await.0, 201);
    assert_eq!(page(&inlet).await["state"], "disabled");
}

#[tokio::test]
async fn many_channels_come_and_go_and_nothing_is_lost() {
    let (nats, project) = (Nats::start().await, Project::new());
    let fixed: Vec<_> = (0..5).map(|n| format!("fixed{n}")).collect();
    let more: Vec<_> = (0..30).map(|n| format!("more{n:02}")).collect();
    let all = [fixed.clone(), more.clone()].concat().join(",");
    let mut simulator = Simulator::start(&["--channels", &all, "--rate", "500", "--join-limit", "20"]).await;
    let own = settings(&[
        ("TWITCH_CHANNELS", &fixed.join(",")),
        ("TWITCH_IRC_URL", &simulator.url()),
        ("NATS_URL", &nats.url()),
        ("ADMIN_TOKEN", TOKEN),
    ]);
    let own = [own, firestore(&project, &crate::harness::firestore::host())].concat();
    let mut inlet = Inlet::serve(&refs(&own)).await;
    for login in &more {
        assert_eq!(add(&inlet, login).await.0, 201);
    }
    let names: Vec<_> = fixed.iter().chain(&more).map(String::as_str).collect();
    joined(&inlet, &names).await;
    for login in &more[..20] {
        assert_eq!(remove(&inlet, login).await.0, 200);
    }
    let left: Vec<_> = fixed.iter().chain(&more[20..]).map(String::as_str).collect();
    joined(&inlet, &left).await;
    eventually("the list says where they are", || async {
        let (_, body) = ask(&inlet, "GET", "", None).await;
        let channels = body["channels"].as_array().unwrap();
        (channels.len() == 15 && channels.iter().all(|channel| channel["roomId"].is_string())).then_some(())
    })
    .await;
    simulator.say("pause");
    inlet.quiet().await.assert_account_closes();
    assert_eq!(unheard(&simulator, &fixed), 0, "somebody is always there");
    assert!(gaps(&read(&nats.url(), "INLET").await).is_empty(), "whoever comes or goes has no gap");
    let metrics = inlet.metrics().await;
    let stats = numbers(&mut simulator).await;
    let joins = &stats["joins"];
    println!("JOINs: {joins}");
    assert_eq!((&joins["received"], &joins["vanished"]), (&35.into(), &0.into()));
    assert!(joins["most_in_10s"].as_u64().unwrap() <= 20, "{joins}");
    let summary = Account::new().counted(&metrics).judge(&nats, &[&simulator]);
    // What was queued for our connections is all there; the rest was said where nobody was.
    assert_eq!((&summary["lost"], &summary["carried"]), (&0.into(), &summary["inStream"]), "{summary}");
    // An empty folder: the list is in the store.
    inlet.terminate(Duration::from_secs(20)).await;
    let inlet = Inlet::serve(&refs(&own)).await;
    joined(&inlet, &left).await;
}

/// Lines that nobody was there for, in these channels, since the first that somebody heard.
fn unheard(simulator: &Simulator, channels: &[String]) -> usize {
    let (mut heard, mut unheard) = (BTreeSet::new(), 0);
    for line in std::fs::read_to_string(simulator.sent_file()).unwrap().lines() {
        let line: Value = serde_json::from_str(line).unwrap();
        let channel = line["channel"].as_str().unwrap().to_owned();
        if !line["connection"].is_null() {
            heard.insert(channel);
        } else if channels.contains(&channel) && heard.contains(&channel) {
            unheard += 1;
        }
    }
    assert!(channels.iter().all(|channel| heard.contains(channel)), "{heard:?}");
    unheard
}

#[tokio::test]
async fn what_is_taken_out_and_put_in_again_while_the_service_is_down_has_no_gap() {
    let nats = Nats::start().await;
    let simulator = Simulator::start(&["--channels", "alpha,beta,gamma", "--rate", "50"]).await;
    let own = settings(&[
        ("TWITCH_IRC_URL", &simulator.url()),
        ("NATS_URL", &nats.url()),
        ("ADMIN_TOKEN", TOKEN),
        ("ENRICH_MODE", "off"),
    ]);
    let mut inlet = Inlet::serve(&refs(&own)).await;
    for login in ["alpha", "beta"] {
        assert_eq!(add(&inlet, login).await.0, 201);
    }
    joined(&inlet, &["alpha", "beta"]).await;
    let rooms = async || {
        let (_, body) = ask(&inlet, "GET", "", None).await;
        body["channels"].as_array().unwrap().iter().all(|channel| channel["roomId"].is_string())
    };
    eventually("both are rooms", || async { rooms().await.then_some(()) }).await;
    // Both are in the note of the next run.
    eventually("the note names both", || async {
        let note: Value =
            serde_json::from_slice(&std::fs::read(inlet.data_dir().join("twitch.json")).ok()?).ok()?;
        (note["channels"].as_object()?.len() == 2).then_some(())
    })
    .await;
    inlet.terminate(Duration::from_secs(20)).await;
    // Nobody holds the folder: the command opens it.
    let environment =
        settings(&[("DATA_DIR", inlet.data_dir().to_str().unwrap()), ("PORT", "1"), ("LOG_LEVEL", "error")]);
    assert_eq!(channel(&["remove", "alpha"], &environment), (0, "alpha removed\n".to_owned()));
    assert_eq!(channel(&["remove", "alpha"], &environment).0, 1);
    assert_eq!(
        channel(&["add", "alpha", "gamma"], &environment),
        (0, "alpha added\ngamma added\n".to_owned())
    );
    let inlet = Inlet::serve_in(inlet.into_folder(), &refs(&own)).await;
    joined(&inlet, &["alpha", "beta", "gamma"]).await;
    let gaps = with_gaps(&nats, 1).await;
    assert_eq!((gaps.len(), &gaps[0]["channel"], &gaps[0]["cause"]), (1, &"beta".into(), &"restart".into()));
}

#[tokio::test]
async fn a_renamed_channel_is_joined_under_its_new_login() {
    let nats = Nats::start().await;
    let mut simulator = Simulator::start(&["--channels", "alpha,beta", "--rate", "100"]).await;
    let own = settings(&[
        ("TWITCH_CHANNELS", "beta"),
        ("TWITCH_IRC_URL", &simulator.url()),
        ("NATS_URL", &nats.url()),
        ("ADMIN_TOKEN", TOKEN),
        ("ENRICH_MODE", "off"),
    ]);
    let inlet = Inlet::serve(&refs(&own)).await;
    assert_eq!(add(&inlet, "alpha").await.0, 201);
    joined(&inlet, &["alpha", "beta"]).await;
    let room = async |inlet: &Inlet, login: &str| {
        eventually("its room is known", || async {
            let (_, body) = ask(inlet, "GET", "", None).await;
            let channels = body["channels"].as_array().unwrap();
            let channel = channels.iter().find(|channel| channel["login"] == login)?.clone();
            channel["roomId"].is_string().then_some(channel)
        })
        .await
    };
    let (alpha, beta) = (room(&inlet, "alpha").await, room(&inlet, "beta").await);
    simulator.say("rename alpha gamma");
    numbers(&mut simulator).await;
    // Its owner speaks in another channel that is read.
    speak(&simulator, "gamma", "beta").await;
    joined(&inlet, &["beta", "gamma"]).await;
    let gamma = eventually("the list says so", || async {
        let gamma = room(&inlet, "gamma").await;
        (gamma["formerLogin"] == "alpha").then_some(gamma)
    })
    .await;
    assert_eq!((&gamma["roomId"], &gamma["addedAt"]), (&alpha["roomId"], &alpha["addedAt"]));
    // One of the settings is followed as well, and found again by the next run, although the setting names it as before.
    simulator.say("rename beta delta");
    numbers(&mut simulator).await;
    speak(&simulator, "delta", "gamma").await;
    joined(&inlet, &["delta", "gamma"]).await;
    let delta = eventually("the list says so", || async {
        let delta = room(&inlet, "delta").await;
        (delta["formerLogin"] == "beta").then_some(delta)
    })
    .await;
    assert_eq!((&delta["roomId"], &delta["fixed"]), (&beta["roomId"], &true.into()));
    assert_eq!(remove(&inlet, "delta").await.0, 409);
    let gaps = with_gaps(&nats, 2).await;
    for (gap, channel) in gaps.iter().zip(["gamma", "delta"]) {
        assert_eq!((&gap["channel"], &gap["cause"]), (&channel.into(), &"renamed".into()));
        let time = |name: &str| gap[name].as_str().unwrap().parse::<jiff::Timestamp>().unwrap();
        assert!(time("from") < time("to"), "{gap}");
    }
    let heard = |found: &[InStream], channel: &str| {
        found.iter().filter(|message| message.body["source"]["channel"] == channel).count()
    };
    eventually("chat under the new names", || async {
        let found = read(&nats.url(), "INLET").await;
        (heard(&found, "gamma") > 20 && heard(&found, "delta") > 20).then_some(())
    })
    .await;
    let inlet = Inlet::serve_in(inlet.into_folder(), &refs(&own)).await;
    joined(&inlet, &["delta", "gamma"]).await;
}

/// Twitch's API as far as it is asked for logins: it answers with this one, to whoever has the token.
async fn api(login: &'static str, asked: Arc<AtomicUsize>) -> (String, Tasks) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let mut tasks = Tasks::new();
    tasks.spawn("api", async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            let (mut request, mut piece) = (String::new(), [0; 4096]);
            while !request.contains("\r\n\r\n") {
                let read = socket.read(&mut piece).await.unwrap();
                request.push_str(&String::from_utf8_lossy(&piece[..read]));
            }
            let request = request.to_ascii_lowercase();
            let may =
                request.contains("client-id: app1") && request.contains("authorization: bearer secret7");
            // The first question fails.
            let is_first = asked.fetch_add(1, Ordering::Relaxed) == 0;
            let ids = request.split(' ').nth(1).unwrap().split_once('?').unwrap().1;
            let user = |id: &str| json!({ "id": id.trim_start_matches("id="), "login": login });
            let body = json!({ "data": ids.split('&').map(user).collect::<Vec<_>>() }).to_string();
            let status = match (is_first, may) {
                (true, _) => "500 No",
                (false, true) => "200 OK",
                (false, false) => "401 No",
            };
            let head =
                format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n", body.len());
            socket.write_all((head + &body).as_bytes()).await.unwrap();
        }
    });
    (url, tasks)
}

#[tokio::test]
async fn with_an_account_a_rename_is_looked_up() {
    let mut simulator = Simulator::start(&["--channels", "alpha", "--rate", "50"]).await;
    let asked = Arc::new(AtomicUsize::new(0));
    let (url, _tasks) = api("gamma", Arc::clone(&asked)).await;
    let own = settings(&[
        ("TWITCH_CHANNELS", "alpha"),
        ("TWITCH_IRC_URL", &simulator.url()),
        ("ADMIN_TOKEN", TOKEN),
        ("ENRICH_MODE", "off"),
    ]);
    let inlet = Inlet::serve(&refs(&own)).await;
    joined(&inlet, &["alpha"]).await;
    eventually("its room is stored", || async {
        let (_, body) = ask(&inlet, "GET", "", None).await;
        body["channels"][0]["roomId"].is_string().then_some(())
    })
    .await;
    let folder = inlet.into_folder();
    // Renamed while nobody was there; its owner says nothing.
    simulator.say("rename alpha gamma");
    numbers(&mut simulator).await;
    let account = settings(&[
        ("TWITCH_BOT_USERNAME", "bot"),
        ("TWITCH_BOT_ACCESS_TOKEN", "secret7"),
        ("TWITCH_CLIENT_ID", "app1"),
        ("TWITCH_API_URL", &url),
    ]);
    let inlet = Inlet::serve_in(folder, &refs(&[own, account].concat())).await;
    joined(&inlet, &["gamma"]).await;
    let questions = asked.load(Ordering::Relaxed);
    assert!((2..=4).contains(&questions), "{questions} questions");
    assert!(!inlet.log().contains("secret7"));
}
