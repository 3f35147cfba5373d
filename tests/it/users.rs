//! What operators do with users, by commands and over HTTP, on both stores: looked at, noted, kept out, forgotten.

use std::collections::HashSet;
use std::time::Duration;

use futures_util::future::join_all;
use inlet::clock::system_milliseconds;
use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};

use crate::harness::firestore::Project;
use crate::harness::inlet::{Inlet, run};
use crate::harness::proxy::{Mode, Proxy};
use crate::harness::stream::read;
use crate::harness::{eventually, within};
use crate::people::{Setting, all_counted, ended_well};

const FORGOTTEN: &str = "inlet_events_refused_total{reason=\"forgotten\",source=\"twitch\"}";
/// The documents promise two seconds; a test machine is busy.
const HEARD: Duration = Duration::from_secs(5);
const IGNORED: &str = "inlet_events_refused_total{reason=\"ignored\",source=\"twitch\"}";

/// Lines that these users said just now, each once.
fn lines(round: u32, users: &[u32]) -> String {
    lines_at(system_milliseconds(), round, users)
}

fn lines_at(at: i64, round: u32, users: &[u32]) -> String {
    let line = |user: &u32| {
        let id = format!("line-{round}-{user}");
        format!(
            "@id={id};room-id=1;tmi-sent-ts={at};user-id={user};display-name=U{user} :u{user}!u{user}@u{user}.tmi.twitch.tv PRIVMSG #people :{round}\r\n"
        )
    };
    users.iter().map(line).collect()
}

async fn replay(inlet: &Inlet, round: u32, users: &[u32]) -> Value {
    replay_lines(inlet, lines(round, users)).await
}

async fn replay_lines(inlet: &Inlet, lines: String) -> Value {
    let request = inlet.client().post(inlet.url("/admin/replay")).body(lines);
    request.send().await.unwrap().json().await.unwrap()
}

async fn ask(inlet: &Inlet, method: Method, path: &str, body: Option<&str>) -> (u16, Value) {
    let mut request = inlet.client().request(method, inlet.url(path));
    if let Some(body) = body {
        request = request.header("content-type", "application/json").body(body.to_owned());
    }
    let response = request.send().await.unwrap();
    (response.status().as_u16(), response.json().await.unwrap())
}

/// A service with a store of its own, and what a command needs to find it.
struct Scene {
    inlet: Inlet,
    settings: Vec<(String, String)>,
}

impl Scene {
    async fn new(emulator: Option<&Project>) -> Self {
        let mut settings =
            vec![("ENRICH_FLUSH_IDLE", "200ms".to_owned()), ("ENRICH_TIMEOUT", "5s".to_owned())];
        if let Some(emulator) = emulator {
            settings.push(("FIRESTORE_EMULATOR_HOST", emulator.address().await.to_string()));
            settings.push(("GOOGLE_CLOUD_PROJECT", emulator.id.clone()));
        }
        let given: Vec<_> = settings.iter().map(|(name, value)| (*name, value.as_str())).collect();
        let inlet = Inlet::serve(&given).await;
        inlet.ready().await;
        let mut settings: Vec<_> =
            settings.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        settings.push(("DATA_DIR".to_owned(), inlet.data_dir().to_str().unwrap().to_owned()));
        settings.push(("PORT".to_owned(), inlet.port.to_string()));
        settings.push(("LOG_LEVEL".to_owned(), "error".to_owned()));
        Self { inlet, settings }
    }

    /// `inlet user …`: its exit code, and what it said: standard output, else standard error.
    fn user(&self, arguments: &[&str]) -> (i32, String) {
        let settings: Vec<_> = self.settings.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
        let output = run(&[&["user"], arguments].concat(), &settings);
        let code = output.status.code().unwrap();
        let said = if code == 0 { output.stdout } else { output.stderr };
        (code, String::from_utf8(said).unwrap())
    }

    /// The same, well ended, as JSON.
    fn user_json(&self, arguments: &[&str]) -> Vec<Value> {
        let (code, said) = self.user(&[arguments, &["--json"]].concat());
        assert_eq!(code, 0, "{said}");
        said.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    async fn counted(&self, key: &str, messages: u64) {
        eventually("the user is counted", || async {
            let (_, user) = ask(&self.inlet, Method::GET, &format!("/admin/users/{key}"), None).await;
            (user["document"]["messageCountAllTime"] == messages).then_some(())
        })
        .await;
    }
}

/// By commands: beside a service, good and bad.
async fn by_commands(emulator: Option<&Project>) {
    let mut scene = Scene::new(emulator).await;
    assert_eq!(replay(&scene.inlet, 1, &[7, 8, 9]).await["published"], 3);
    scene.counted("twitch:7", 1).await;

    let shown = scene.user_json(&["show", "7"]);
    assert_eq!((&shown[0]["key"], &shown[0]["document"]["displayName"]), (&json!("twitch:7"), &json!("U7")));
    let (_, text) = scene.user(&["show", "twitch:7"]);
    assert!(text.contains("displayName: U7") && text.contains("messageCountAllTime: 1"), "{text}");
    for (arguments, code, words) in [
        (&["show", "some_login"][..], 64, "inlet user list --login"),
        (&["show", "twitch:1/2"], 64, "twitch:12345"),
        (&["show", "123456789012345678901"], 64, "twitch:12345"),
        (&["show", "4"], 1, "nothing is known of twitch:4"),
        (&["note", "7", &"n".repeat(4_097)], 64, "longer than 4096"),
        (&["note", "7", "a\u{1b}[31m"], 64, "control characters"),
        (&["tag", "add", "7", ""], 64, "one is empty"),
        (&["tag", "add", "7", &"t".repeat(2_100)], 64, "all together longer"),
        (&["tag", "add", "7"], 64, "required"),
        (&["unignore", "7"], 1, "twitch:7 is not ignored"),
        (&["unforget", "7"], 1, "twitch:7 is not forgotten"),
        (&["list", "--ignored", "--forgotten"], 64, "cannot be used"),
    ] {
        let (found, said) = scene.user(arguments);
        assert!(found == code && said.contains(words), "{arguments:?}: {found} {said}");
    }

    scene.user_json(&["note", "7", "long-time viewer"]);
    scene.user_json(&["status", "7", "watched"]);
    scene.user_json(&["tag", "add", "7", "vip", "kind"]);
    let (code, said) = scene.user(&["tag", "add", "7", &"t".repeat(2_040)]);
    assert!(code == 1 && said.contains("would be longer"), "{said}");
    let edited = scene.user_json(&["tag", "remove", "7", "vip", "nothing"]);
    let document = &edited[0]["document"];
    let operators =
        (&document["notes"], &document["status"], &document["tags"], &document["messageCountAllTime"]);
    assert_eq!(operators, (&json!("long-time viewer"), &json!("watched"), &json!(["kind"]), &json!(1)));
    scene.user_json(&["note", "7"]);
    let shown = scene.user_json(&["show", "7"]);
    assert!(
        shown[0]["document"]["notes"].is_null() && shown[0]["document"]["status"] == "watched",
        "{shown:?}"
    );
    // Somebody who was not seen yet: the document waits for them, and they are not new.
    scene.user_json(&["note", "5", "expected"]);
    assert_eq!(scene.user_json(&["show", "5"])[0]["document"]["providerUserId"], "5");

    let keys = |users: &[Value]| {
        users
            .iter()
            .map(|user| user["key"].as_str().unwrap()["twitch:".len()..].to_owned())
            .collect::<Vec<_>>()
    };
    assert_eq!(keys(&scene.user_json(&["list"])), ["5", "7", "8", "9"]);
    assert_eq!(keys(&scene.user_json(&["list", "--limit", "2", "--after", "5"])), ["7", "8"]);
    assert_eq!(keys(&scene.user_json(&["list", "--login", "U8"])), ["8"]);
    assert_eq!(keys(&scene.user_json(&["list", "--tag", "kind", "--status", "watched"])), ["7"]);
    assert!(scene.user_json(&["list", "--tag", "nobody's"]).is_empty());

    assert_eq!(scene.user_json(&["ignore", "8"])[0]["barred"]["kind"], "ignored");
    assert_eq!(scene.user_json(&["ignore", "8"])[0]["barred"]["kind"], "ignored");
    let farewell = &scene.user_json(&["forget", "9"])[0];
    assert_eq!((&farewell["key"], &farewell["hadDocument"]), (&json!("twitch:9"), &json!(true)));
    let again = &scene.user_json(&["forget", "9"])[0];
    assert_eq!((&again["at"], &again["hadDocument"]), (&farewell["at"], &json!(false)));
    for (arguments, words) in [
        (&["note", "9", "still here"][..], "is forgotten"),
        (&["ignore", "9"], "is forgotten"),
        (&["unignore", "9"], "is not ignored"),
    ] {
        let (code, said) = scene.user(arguments);
        assert!(code == 1 && said.contains(words), "{arguments:?}: {said}");
    }
    let shown = scene.user_json(&["show", "9"]);
    assert_eq!((&shown[0]["barred"]["kind"], &shown[0]["document"]), (&json!("forgotten"), &Value::Null));
    assert_eq!(keys(&scene.user_json(&["list", "--ignored"])), ["8"]);
    assert_eq!(keys(&scene.user_json(&["list", "--forgotten"])), ["9"]);
    assert_eq!(keys(&scene.user_json(&["list"])), ["5", "7", "8"]);
    let (_, text) = scene.user(&["forget", "9"]);
    for word in ["What remains", "in the stream", "outbox", "barred/twitch:9", "unforget"] {
        assert!(text.contains(word), "{word} in {text}");
    }

    kept_out_and_let_in(&mut scene).await;
    scene.inlet.metrics().await.assert_account_closes();
    assert_eq!(scene.inlet.terminate(Duration::from_secs(9)).await.1, Some(0), "{}", scene.inlet.log());
    // Without a service: on the embedded store the file itself.
    scene.user_json(&["note", "7", "at night"]);
    assert_eq!(scene.user_json(&["show", "7"])[0]["document"]["notes"], "at night");
    scene.user_json(&["forget", "7"]);
    assert_eq!(keys(&scene.user_json(&["list", "--forgotten"])), ["7"]);
    if let Some(emulator) = emulator {
        // From elsewhere the stream cannot be asked, and none is made to be asked.
        let elsewhere = tempfile::tempdir().unwrap();
        scene.settings.push(("DATA_DIR".to_owned(), elsewhere.path().to_str().unwrap().to_owned()));
        let (code, text) = scene.user(&["forget", "8"]);
        assert!(code == 0 && text.contains("could not be asked from here"), "{text}");
        assert!(!elsewhere.path().join("stream.redb").exists());
        // What was done straight on Firestore has its record, without what was said of anybody.
        let records = emulator.read_all("audit").await;
        let of = |action: &str| {
            records
                .values()
                .filter(|record| record["action"] == action && record["outcome"] == "done")
                .count()
        };
        assert_eq!((of("inlet user forget"), of("inlet user unforget")), (5, 1), "{records:?}");
        assert!(of("inlet user edit") > 3 && !format!("{records:?}").contains("long-time viewer"));
    }
}

/// 8 is ignored and 9 forgotten: their lines are refused, until they are let in again.
async fn kept_out_and_let_in(scene: &mut Scene) {
    let mut round = 10;
    let mut say = async |expected: [u64; 2], patience: Duration| {
        // A command straight on the store is heard of within two seconds.
        within(HEARD + patience, "it is heard of", || {
            round += 1;
            let said = replay(&scene.inlet, round, &[7, 8, 9]);
            async {
                let said = said.await;
                ([&said["published"], &said["barred"]] == expected.map(Value::from).each_ref()).then_some(())
            }
        })
        .await;
    };
    say([1, 2], Duration::ZERO).await;
    let before = scene.user_json(&["show", "8"])[0]["document"].clone();
    scene.user_json(&["unignore", "8"]);
    say([2, 1], Duration::ZERO).await;
    let after = scene.user_json(&["show", "8"])[0].clone();
    assert!(after["barred"].is_null(), "{after}");
    assert_eq!(after["document"]["firstEventId"], before["firstEventId"], "it is as it was");
    scene.user_json(&["unforget", "9"]);
    // What they say from three seconds on; what they said before that stays nobody's.
    say([3, 0], Duration::from_secs(3)).await;
    let old = replay_lines(&scene.inlet, lines_at(1_700_000_000_000, 9, &[9])).await;
    assert_eq!((&old["published"], &old["barred"]), (&json!(0), &json!(1)), "{old}");
    eventually("the forgotten user is somebody new", || async {
        let (status, user) = ask(&scene.inlet, Method::GET, "/admin/users/twitch:9", None).await;
        (status == 200 && user["document"]["messageCountAllTime"].as_u64()? > 0).then_some(())
    })
    .await;
}

#[tokio::test]
async fn users_are_looked_after_by_commands_on_the_embedded_store() {
    by_commands(None).await;
}

#[tokio::test]
async fn users_are_looked_after_by_commands_on_firestore() {
    by_commands(Some(&Project::new())).await;
}

/// Over HTTP, good and bad.
async fn over_http(emulator: Option<&Project>) {
    let scene = Scene::new(emulator).await;
    let inlet = &scene.inlet;
    let users: Vec<_> = (100..110).collect();
    assert_eq!(replay(inlet, 1, &users).await["published"], 10);
    scene.counted("twitch:105", 1).await;
    let (get, patch, put, delete) = (Method::GET, Method::PATCH, Method::PUT, Method::DELETE);

    // Page by page, everybody once.
    let (mut keys, mut after) = (Vec::new(), String::new());
    loop {
        let (status, page) = ask(inlet, get.clone(), &format!("/admin/users?limit=4{after}"), None).await;
        assert_eq!(status, 200, "{page}");
        let found = page["users"].as_array().unwrap();
        assert!(found.len() <= 4);
        keys.extend(found.iter().map(|user| user["key"].as_str().unwrap().to_owned()));
        let Some(next) = page["next"].as_str() else { break };
        after = format!("&after={next}");
    }
    assert_eq!(keys, users.iter().map(|user| format!("twitch:{user}")).collect::<Vec<_>>());

    // A document that is no user's holds up nobody.
    if let Some(emulator) = emulator {
        emulator.set("users/no%20key", json!({ "kind": { "stringValue": "odd" } })).await;
        let (_, page) = ask(inlet, get.clone(), "/admin/users?limit=1", None).await;
        assert_eq!(page["next"], "no key", "{page}");
        let (_, page) = ask(inlet, get.clone(), "/admin/users?limit=1&after=no%20key", None).await;
        assert_eq!(page["users"][0]["key"], "twitch:100", "{page}");
    }

    let large = format!("{{\"notes\":\"{}\"}}", "n".repeat(70_000));
    for (method, path, body, status, code) in [
        (&get, "/admin/users/twitch:4", None, 404, "not_found"),
        (&get, "/admin/users/login", None, 400, "bad_request"),
        (&get, "/admin/users/%FF", None, 400, "bad_request"),
        (&get, "/admin/users?limit=0", None, 400, "bad_request"),
        (&get, "/admin/users?limit=501", None, 400, "bad_request"),
        (&get, "/admin/users?limit=x", None, 400, "bad_request"),
        (&get, "/admin/users?wanted=x", None, 400, "bad_request"),
        (&get, "/admin/users?after=a%2Fb", None, 400, "bad_request"),
        (&get, "/admin/users?barred=banned", None, 400, "bad_request"),
        (&patch, "/admin/users/twitch:105", Some("{"), 400, "bad_request"),
        (&patch, "/admin/users/twitch:105", Some("{}"), 400, "bad_request"),
        (&patch, "/admin/users/twitch:105", Some("{\"email\":\"a@b\"}"), 400, "bad_request"),
        (&patch, "/admin/users/twitch:105", Some("{\"notes\":\"a\\u0007\"}"), 400, "bad_request"),
        (&patch, "/admin/users/twitch:105", Some("{\"tags\":[\"\"]}"), 400, "bad_request"),
        (&patch, "/admin/users/twitch:105", Some(&*large), 413, "body_too_large"),
        (&patch, "/admin/users/login", Some("{\"notes\":\"a\"}"), 400, "bad_request"),
        (&delete, "/admin/users/login", None, 400, "bad_request"),
        (&put, "/admin/users/login/ignored", None, 400, "bad_request"),
        (&delete, "/admin/users/twitch:105/ignored", None, 404, "not_found"),
        (&delete, "/admin/users/twitch:105/forgotten", None, 404, "not_found"),
        (&put, "/admin/users/twitch:105", None, 405, "method_not_allowed"),
    ] {
        let (found, answer) = ask(inlet, method.clone(), path, body).await;
        assert_eq!((found, &answer["error"]["code"]), (status, &json!(code)), "{method} {path}: {answer}");
    }

    let edit = json!({ "notes": "kind and patient", "status": "watched", "tags": ["b"], "addTags": ["a"] })
        .to_string();
    let (status, user) = ask(inlet, patch.clone(), "/admin/users/twitch:105", Some(&edit)).await;
    assert_eq!((status, &user["document"]["tags"]), (200, &json!(["a", "b"])), "{user}");
    // In the next envelope after two seconds at most; every replay is another line.
    let mut round = 20;
    within(HEARD, "the note is published", || {
        round += 1;
        let said = replay(inlet, round, &[105]);
        async {
            said.await;
            (last_of(inlet, "105").await?["user"]["notes"] == "kind and patient").then_some(())
        }
    })
    .await;
    let (status, user) = ask(inlet, patch.clone(), "/admin/users/twitch:105", Some("{\"notes\":null}")).await;
    assert_eq!((status, &user["document"]["status"]), (200, &json!("watched")));
    assert!(user["document"]["notes"].is_null());

    let (status, user) = ask(inlet, put.clone(), "/admin/users/twitch:106/ignored", None).await;
    assert_eq!((status, &user["barred"]["kind"]), (200, &json!("ignored")));
    let (_, page) = ask(inlet, get.clone(), "/admin/users?barred=ignored", None).await;
    assert_eq!(
        (&page["users"][0]["key"], &page["users"][0]["document"]["displayName"]),
        (&json!("twitch:106"), &json!("U106"))
    );
    assert_eq!(ask(inlet, delete.clone(), "/admin/users/twitch:106/ignored", None).await.0, 200);

    let (status, farewell) = ask(inlet, delete.clone(), "/admin/users/twitch:107", None).await;
    assert_eq!((status, &farewell["hadDocument"]), (200, &json!(true)), "{farewell}");
    let remains = &farewell["remains"];
    assert_eq!((&remains["maxAgeSeconds"], &remains["maxBytes"]), (&json!(259_200), &json!(1 << 30)));
    assert!(remains["oldestAt"].is_string() && remains["goneBy"].is_string(), "{remains}");
    for (method, path, body) in [
        (&put, "/admin/users/twitch:107/ignored", None),
        (&patch, "/admin/users/twitch:107", Some("{\"notes\":\"a\"}")),
    ] {
        let (status, answer) = ask(inlet, method.clone(), path, body).await;
        assert_eq!((status, &answer["error"]["code"]), (409, &json!("conflict")), "{answer}");
    }
    let (status, user) = ask(inlet, delete.clone(), "/admin/users/twitch:107/forgotten", None).await;
    assert!(status == 200 && user["barred"].is_null() && user["document"].is_null(), "{user}");
    assert_eq!(ask(inlet, get.clone(), "/admin/users/twitch:107", None).await.0, 404);

    // Each act is on record, without what was said of anybody.
    let (_, audit) = ask(inlet, get.clone(), "/admin/audit?limit=500", None).await;
    for action in [
        "PATCH /admin/users/{key}",
        "PUT /admin/users/{key}/ignored",
        "DELETE /admin/users/{key}/ignored",
        "DELETE /admin/users/{key}",
        "DELETE /admin/users/{key}/forgotten",
    ] {
        let is_done = |record: &Value| record["action"] == action && record["outcome"] == "done";
        assert!(audit["records"].as_array().unwrap().iter().any(is_done), "{action}: {audit}");
    }
    assert!(!audit.to_string().contains("patient"), "{audit}");

    let metrics = inlet.metrics().await;
    assert!(metrics.get("inlet_http_requests_total{route=\"/admin/users/{key}\",status=\"2xx\"}") > 0);
    metrics.assert_account_closes();
}

/// The user's last envelope that the service's stream holds.
async fn last_of(inlet: &Inlet, id: &str) -> Option<Value> {
    let environment = [("INLET_URL", &*inlet.url("")), ("LOG_LEVEL", "error")];
    let output =
        run(&["tail", "--json", "--after", "0", "--count", &(held(inlet).await).to_string()], &environment);
    let text = String::from_utf8(output.stdout).unwrap();
    let mut bodies = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    bodies.rfind(|body| body["user"]["id"] == id)
}

async fn held(inlet: &Inlet) -> u64 {
    let metrics = inlet.metrics().await;
    metrics.sum("inlet_events_published_total")
}

#[tokio::test]
async fn users_are_looked_after_over_http_on_the_embedded_store() {
    over_http(None).await;
}

#[tokio::test]
async fn users_are_looked_after_over_http_on_firestore() {
    over_http(Some(&Project::new())).await;
}

#[tokio::test]
async fn users_are_the_operators_alone_and_a_store_that_is_away_is_said_to_be() {
    let emulator = Project::new();
    let proxy = Proxy::to(emulator.address().await).await;
    let at = proxy.addr().to_string();
    let settings =
        [("FIRESTORE_EMULATOR_HOST", &*at), ("GOOGLE_CLOUD_PROJECT", &emulator.id), ("ADMIN_TOKEN", "t0ken")];
    let inlet = Inlet::serve(&settings).await;
    inlet.ready().await;
    let routes = [
        (Method::GET, "/admin/users"),
        (Method::GET, "/admin/users/twitch:1"),
        (Method::PATCH, "/admin/users/twitch:1"),
        (Method::DELETE, "/admin/users/twitch:1"),
        (Method::PUT, "/admin/users/twitch:1/ignored"),
        (Method::DELETE, "/admin/users/twitch:1/ignored"),
        (Method::DELETE, "/admin/users/twitch:1/forgotten"),
    ];
    for (method, path) in &routes {
        let (status, answer) = ask(&inlet, method.clone(), path, None).await;
        assert_eq!((status, &answer["error"]["code"]), (401, &json!("unauthorized")), "{method} {path}");
    }
    proxy.set(Mode::Cut);
    let inlet = &inlet;
    let refused = routes.map(|(method, path)| async move {
        let body = (method == Method::PATCH).then_some(json!({ "notes": "a note" }));
        // What cannot be recorded is not done.
        let code = if method == Method::GET { "store_unavailable" } else { "audit_unavailable" };
        let request = inlet.client().request(method.clone(), inlet.url(path)).bearer_auth("t0ken");
        let response = body.iter().fold(request, RequestBuilder::json).send().await.unwrap();
        let (status, has_wait) = (response.status().as_u16(), response.headers().contains_key("retry-after"));
        let answer = response.json::<Value>().await.unwrap();
        assert_eq!(
            (status, has_wait, &answer["error"]["code"]),
            (503, true, &json!(code)),
            "{method} {path}"
        );
    });
    join_all(refused).await;
    let output = run(&["user", "show", "1"], &[settings[0], settings[1]]);
    assert_eq!(output.status.code(), Some(69), "{}", String::from_utf8_lossy(&output.stderr));
}

/// How many envelopes of a user the stream holds.
async fn said_by(setting: &Setting, key: &str) -> usize {
    let user = format!("users/{key}");
    let found = read(&setting.nats.url(), "INLET").await;
    found.iter().filter(|message| message.body["auth"]["userRef"] == user.as_str()).count()
}

/// `inlet user …` on the setting's Firestore.
async fn user(setting: &Setting, arguments: &[&str]) -> Value {
    let emulator = setting.emulator.as_ref().unwrap();
    let host = emulator.address().await.to_string();
    let nats = setting.nats.url();
    let settings =
        [("FIRESTORE_EMULATOR_HOST", &*host), ("GOOGLE_CLOUD_PROJECT", &*emulator.id), ("NATS_URL", &*nats)];
    let arguments =
        [&["user", "--json"], arguments].concat().into_iter().map(str::to_owned).collect::<Vec<_>>();
    let settings: Vec<_> = settings.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    // The emulator and the simulator go on meanwhile.
    let output = tokio::task::spawn_blocking(move || {
        let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
        let settings: Vec<_> = settings.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
        run(&arguments, &settings)
    });
    let output = output.await.unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The first few users that are known.
async fn some_users(setting: &Setting, count: usize) -> Vec<String> {
    eventually("users are known", || async {
        let users = setting.users().await;
        (users.len() >= count).then(|| users.keys().take(count).cloned().collect())
    })
    .await
}

async fn refused(inlets: &[&Inlet], series: &str) -> u64 {
    let mut sum = 0;
    for inlet in inlets {
        sum += inlet.metrics().await.get(series);
    }
    sum
}

#[tokio::test]
async fn under_load_two_instances_keep_out_whom_they_are_told_to_and_forget_for_good() {
    let mut setting = Setting::new(true, &["--rate", "300", "--users", "20"]).await;
    let mut one = setting.serve(&[]).await;
    let mut two = setting.serve(&[]).await;
    one.ready().await;
    two.ready().await;
    let keys = some_users(&setting, 3).await;
    let [bot, gone, other] = [&*keys[0], &*keys[1], &*keys[2]];
    user(&setting, &["ignore", bot]).await;
    let farewell = user(&setting, &["forget", gone]).await;
    let forgotten_at = system_milliseconds();
    assert_eq!(farewell["remains"]["maxAgeSeconds"], 259_200, "{farewell}");
    let refuse = async |times: u64| {
        for inlet in [&one, &two] {
            let (forgotten, ignored) = (refused(&[inlet], FORGOTTEN).await, refused(&[inlet], IGNORED).await);
            eventually("each instance refuses", || async {
                let is_so = refused(&[inlet], FORGOTTEN).await >= forgotten + times
                    && refused(&[inlet], IGNORED).await >= ignored + times;
                is_so.then_some(())
            })
            .await;
        }
    };
    // From then on nobody lets them in; what was let in before is through soon.
    refuse(20).await;
    let before =
        [said_by(&setting, bot).await, said_by(&setting, gone).await, said_by(&setting, other).await];
    let counted = setting.users().await[bot]["messageCountAllTime"].clone();
    refuse(20).await;
    let after = [said_by(&setting, bot).await, said_by(&setting, gone).await, said_by(&setting, other).await];
    assert_eq!((after[0], after[1]), (before[0], before[1]));
    assert!(after[2] > before[2], "the others go on: {before:?} {after:?}");
    // `forget` has waited until all have heard: no line that was sent since is in the stream.
    let of_gone = |line: &Value| {
        let is_later = line["time"].as_i64().unwrap() > forgotten_at;
        let is_theirs = line["user"].as_str() == gone.strip_prefix("twitch:");
        (is_later && is_theirs).then(|| line["id"].as_str().unwrap().to_owned())
    };
    let since: Vec<_> = setting.simulator.sent_log().iter().filter_map(of_gone).collect();
    let published = read(&setting.nats.url(), "INLET").await;
    let published: HashSet<_> =
        published.iter().filter_map(|message| message.body["payload"]["messageId"].as_str()).collect();
    assert!(since.len() > 20, "{}", since.len());
    assert!(since.iter().all(|id| !published.contains(&**id)), "{since:?}");
    let users = setting.users().await;
    assert!(!users.contains_key(gone), "{:?}", users.get(gone));
    assert!(users[bot]["messageCountAllTime"].as_u64() >= counted.as_u64());
    user(&setting, &["unignore", bot]).await;
    eventually("the bot is heard again", || async {
        (said_by(&setting, bot).await > after[0]).then_some(())
    })
    .await;
    setting.simulator.say("pause");
    for inlet in [&mut one, &mut two] {
        inlet.quiet().await.assert_account_closes();
        all_counted(inlet).await;
        ended_well(inlet).await;
    }
    let users = setting.users().await;
    assert!(!users.contains_key(gone), "{:?}", users.get(gone));
    assert_eq!(setting.emulator.as_ref().unwrap().read_all("barred").await[gone]["kind"], "forgotten");
    // Ignoring costs no count: what was taken in is counted.
    assert_eq!(users[bot]["messageCountAllTime"], said_by(&setting, bot).await);
}

#[tokio::test]
async fn who_is_forgotten_stays_forgotten_after_a_restart_on_an_empty_folder() {
    let mut setting = Setting::new(true, &["--rate", "200", "--users", "5"]).await;
    let mut inlet = setting.serve(&[]).await;
    let keys = some_users(&setting, 2).await;
    user(&setting, &["forget", &keys[0]]).await;
    ended_well(&mut inlet).await;
    let before = said_by(&setting, &keys[0]).await;
    // Nothing is counted yet, as far as the next one can know: it reads the whole stream.
    let emulator = setting.emulator.as_ref().unwrap();
    let notes = emulator.read_all("inlet").await;
    for name in notes.keys() {
        let status = emulator.rest("DELETE", &format!("inlet/{name}"), Some("Bearer owner"), None).await;
        assert_eq!(status, 200);
    }
    for key in &keys {
        emulator.delete_user(key).await;
    }
    let inlet = setting.serve(&[]).await;
    eventually("the other is there again", || async {
        setting.users().await.contains_key(&keys[1]).then_some(())
    })
    .await;
    eventually("it is refused", || async { (refused(&[&inlet], FORGOTTEN).await > 50).then_some(()) }).await;
    setting.simulator.say("pause");
    inlet.quiet().await.assert_account_closes();
    all_counted(&inlet).await;
    assert_eq!(said_by(&setting, &keys[0]).await, before);
    assert!(!setting.users().await.contains_key(&keys[0]));
}

#[tokio::test]
async fn who_is_taken_in_again_is_somebody_new_though_the_stream_is_counted_again() {
    let mut setting = Setting::new(true, &["--rate", "100", "--users", "3"]).await;
    let mut inlet = setting.serve(&[]).await;
    let keys = some_users(&setting, 2).await;
    user(&setting, &["forget", &keys[0]]).await;
    setting.simulator.say("pause");
    user(&setting, &["unforget", &keys[0]]).await;
    ended_well(&mut inlet).await;
    let before = said_by(&setting, &keys[0]).await;
    let emulator = setting.emulator.as_ref().unwrap();
    let returned_at = emulator.read_all("barred").await[&keys[0]]["returnedAt"].clone();
    let returned_at: jiff::Timestamp = returned_at.as_str().unwrap().parse().unwrap();
    // How far everything is counted lags: the next one begins before the forgetting.
    for name in emulator.read_all("inlet").await.keys() {
        let status = emulator.rest("DELETE", &format!("inlet/{name}"), Some("Bearer owner"), None).await;
        assert_eq!(status, 200);
    }
    let inlet = setting.serve(&[]).await;
    inlet.ready().await;
    all_counted(&inlet).await;
    assert!(!setting.users().await.contains_key(&keys[0]));
    eventually("the moment has come", || async {
        (system_milliseconds() > returned_at.as_millisecond()).then_some(())
    })
    .await;
    setting.simulator.say("resume");
    some_users(&setting, 3).await;
    setting.simulator.say("pause");
    inlet.quiet().await.assert_account_closes();
    all_counted(&inlet).await;
    let theirs = said_by(&setting, &keys[0]).await - before;
    assert_eq!(setting.users().await[&keys[0]]["messageCountAllTime"], theirs);
    let found = read(&setting.nats.url(), "INLET").await;
    let reference = format!("users/{}", keys[0]);
    let mut found = found.iter().filter(|message| message.body["auth"]["userRef"] == *reference).skip(before);
    let tags = found.next().unwrap().body["user"]["tags"].to_string();
    assert!(tags.contains("NEW_USER"), "{tags}");
}

#[tokio::test]
async fn with_enrichment_off_or_dry_they_are_kept_out_all_the_same() {
    let emulator = Project::new();
    let at = emulator.address().await.to_string();
    for (mode, user) in [("off", 7), ("dry-run", 8)] {
        emulator
            .set(&format!("barred/twitch%3A{user}"), json!({ "kind": { "stringValue": "forgotten" } }))
            .await;
        let settings = [
            ("FIRESTORE_EMULATOR_HOST", &*at),
            ("GOOGLE_CLOUD_PROJECT", &emulator.id),
            ("ENRICH_MODE", mode),
        ];
        let inlet = Inlet::serve(&settings).await;
        inlet.ready().await;
        let said = replay(&inlet, 1, &[user, 9]).await;
        assert_eq!(
            (&said["published"], &said["barred"], &said["refused"]),
            (&json!(1), &json!(1), &json!(0)),
            "{mode}"
        );
        inlet.metrics().await.assert_account_closes();
    }
}

#[tokio::test]
async fn while_the_store_is_away_at_the_start_chat_flows_and_nobody_forgotten_is_made_anew() {
    let mut setting = Setting::new(true, &["--rate", "100", "--users", "3"]).await;
    let proxy = Proxy::to(setting.emulator.as_ref().unwrap().address().await).await;
    setting.store_at = proxy.addr().to_string();
    let mut inlet = setting.serve(&[]).await;
    let keys = some_users(&setting, 3).await;
    // Of one it was heard before, of the other nobody runs to hear.
    user(&setting, &["forget", &keys[1]]).await;
    ended_well(&mut inlet).await;
    let known = said_by(&setting, &keys[1]).await;
    let emulator = setting.emulator.as_ref().unwrap();
    let path = format!("barred/{}", keys[0].replace(':', "%3A"));
    emulator.set(&path, json!({ "kind": { "stringValue": "forgotten" } })).await;
    emulator.delete_user(&keys[0]).await;
    proxy.set(Mode::Hang);
    let inlet = setting.serve_in(inlet.into_folder(), &[]).await;
    let published = || async { inlet.metrics().await.sum("inlet_events_published_total") };
    eventually("chat flows without the store", || async { (published().await > 100).then_some(()) }).await;
    // Which channels were added is not known either.
    assert_eq!(inlet.waiting_for().await, ["twitch", "store"]);
    proxy.set(Mode::Pass);
    eventually("they are kept out", || async { (refused(&[&inlet], FORGOTTEN).await > 20).then_some(()) })
        .await;
    eventually("the store is back", || async { inlet.waiting_for().await.is_empty().then_some(()) }).await;
    setting.simulator.say("pause");
    inlet.quiet().await.assert_account_closes();
    all_counted(&inlet).await;
    let users = setting.users().await;
    assert!(!users.contains_key(&keys[0]) && !users.contains_key(&keys[1]), "{:?}", users.keys());
    assert!(users.contains_key(&keys[2]), "{:?}", users.keys());
    assert_eq!(said_by(&setting, &keys[1]).await, known, "kept out from the first line on");
}

#[tokio::test]
async fn a_lost_embedded_store_is_built_again_without_whom_it_forgot() {
    let mut setting = Setting::new(false, &["--rate", "200", "--users", "4"]).await;
    let inlet = setting.serve(&[]).await;
    setting.simulator.has_sent(200).await;
    let gone = eventually("somebody is known", || async {
        let (_, page) = ask(&inlet, Method::GET, "/admin/users", None).await;
        page["users"][0]["key"].as_str().map(str::to_owned)
    })
    .await;
    let (status, farewell) = ask(&inlet, Method::DELETE, &format!("/admin/users/{gone}"), None).await;
    assert_eq!((status, &farewell["hadDocument"]), (200, &json!(true)), "{farewell}");
    let said = eventually("the stream says so", || async {
        let found = read(&setting.nats.url(), "INLET").await;
        found.into_iter().find(|message| message.body["type"] == "internal.user.forgotten.v1")
    })
    .await;
    let schema = serde_json::from_str(include_str!("../../docs/envelope-v1.schema.json")).unwrap();
    let validator = jsonschema::validator_for(&schema).unwrap();
    assert!(validator.is_valid(&said.body), "{}", said.body);
    assert_eq!(said.body["payload"]["userRef"], format!("users/{gone}"));
    assert_eq!(said.headers["Inlet-User"], gone);
    let before = said_by(&setting, &gone).await;
    assert!(before > 0);
    // The machine and its disk are gone, in the middle of it all.
    drop(inlet);
    let inlet = setting.serve(&[]).await;
    let users = || async { ask(&inlet, Method::GET, "/admin/users", None).await.1["users"].clone() };
    eventually("the others are there again", || async {
        (users().await.as_array()?.len() >= 2).then_some(())
    })
    .await;
    eventually("they are refused", || async { (refused(&[&inlet], FORGOTTEN).await > 20).then_some(()) })
        .await;
    setting.simulator.say("pause");
    inlet.quiet().await.assert_account_closes();
    all_counted(&inlet).await;
    assert_eq!(said_by(&setting, &gone).await, before);
    let (status, user) = ask(&inlet, Method::GET, &format!("/admin/users/{gone}"), None).await;
    assert_eq!(
        (status, &user["barred"]["kind"], &user["document"]),
        (200, &json!("forgotten"), &Value::Null)
    );
    // It was said once, and not again by the new one.
    let words = read(&setting.nats.url(), "INLET").await;
    let words = words.iter().filter(|message| message.body["type"] == "internal.user.forgotten.v1");
    assert_eq!(words.count(), 1);
}
