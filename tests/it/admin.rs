//! What operators do and hear over HTTP: its records, the tokens, the errors. Over a real socket, on either store.

use std::collections::BTreeMap;
use std::time::Duration;

use inlet::errors::ErrorCode;
use inlet::telemetry::metrics::Label as _;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::harness::firestore::Project;
use crate::harness::inlet::{Inlet, Metrics, run};
use crate::harness::{PATIENCE, eventually, free_port};

const TOKEN: &str = "the-token-of-this-year";
const NEXT: &str = "the-token-of-next-year";
const CHAT: &str = "xyzzy-plugh";

fn line(id: u32) -> String {
    format!("@id={id};room-id=1;user-id=9;display-name=Nn :nn!nn@nn PRIVMSG #alpha :{CHAT} {id}\r\n")
}

/// On the embedded store, and on Firestore.
fn stores() -> [(&'static str, Vec<(&'static str, String)>); 2] {
    let project = Project::new();
    let firestore =
        vec![("GOOGLE_CLOUD_PROJECT", project.id.clone()), ("FIRESTORE_EMULATOR_HOST", project.host())];
    [("embedded", Vec::new()), ("firestore", firestore)]
}

async fn serve(settings: &[(&'static str, String)]) -> Inlet {
    let mut all = vec![("ADMIN_TOKEN", TOKEN), ("ADMIN_TOKEN_NEXT", NEXT)];
    all.extend(settings.iter().map(|(name, value)| (*name, value.as_str())));
    Inlet::serve(&all).await
}

/// A request with a token; status and body.
async fn ask(inlet: &Inlet, token: &str, request: reqwest::RequestBuilder) -> (u16, Value) {
    let response = request.bearer_auth(token).send().await.unwrap();
    let status = response.status().as_u16();
    assert!(response.headers().contains_key("x-request-id"), "{}", inlet.log());
    (status, response.json().await.unwrap())
}

async fn get(inlet: &Inlet, path: &str) -> (u16, Value) {
    ask(inlet, TOKEN, inlet.client().get(inlet.url(path))).await
}

async fn records(inlet: &Inlet) -> Vec<Value> {
    let (status, page) = get(inlet, "/admin/audit").await;
    assert_eq!(status, 200, "{page}");
    page["records"].as_array().unwrap().clone()
}

/// Records of one millisecond are in no order.
async fn next_millisecond() {
    let now = inlet::clock::system_milliseconds;
    let then = now();
    eventually("the next millisecond", || async { (now() > then).then_some(()) }).await;
}

fn code(answer: &Value) -> &str {
    answer["error"]["code"].as_str().unwrap()
}

#[tokio::test]
async fn what_an_operator_does_is_recorded_and_what_one_looks_at_is_not() {
    for (store, settings) in stores() {
        let inlet = serve(&settings).await;
        let client = inlet.client();
        let replay = || client.post(inlet.url("/admin/replay"));
        for path in ["/admin/errors", "/admin/audit", "/_debug/config"] {
            assert_eq!(get(&inlet, path).await.0, 200, "{path}");
        }
        assert_eq!(ask(&inlet, "wrong", replay().body(line(1))).await.0, 401);
        assert_eq!(ask(&inlet, TOKEN, client.put(inlet.url("/admin/replay"))).await.0, 405);
        assert_eq!(records(&inlet).await, Vec::<Value>::new(), "{store}");

        let body = line(1) + &line(2);
        let request = replay().query(&[("note", CHAT)]).header("x-request-id", "req-7").body(body.clone());
        let (status, outcomes) = ask(&inlet, NEXT, request).await;
        assert_eq!((status, &outcomes["published"]), (200, &json!(2)), "{store}: {outcomes}");
        let [mut record] = <[Value; 1]>::try_from(records(&inlet).await).unwrap();
        assert_eq!(record["id"].take().as_str().unwrap().len(), 46);
        let at: jiff::Timestamp = record["at"].take().as_str().unwrap().parse().unwrap();
        let age = jiff::Timestamp::now().duration_since(at);
        assert!(age.as_secs().abs() < 60, "{age:?}");
        let details = record["details"].take();
        assert_eq!(
            record,
            json!({
                "id": null, "at": null, "actor": "ADMIN_TOKEN_NEXT", "action": "POST /admin/replay",
                "target": "/admin/replay", "details": null, "outcome": "done", "requestId": "req-7",
            }),
            "{store}"
        );
        for (field, value) in [
            ("bytes", json!(body.len())),
            ("received", json!(2)),
            ("published", json!(2)),
            ("note", json!("[redacted], 11 bytes")),
        ] {
            assert_eq!(details[field], value, "{store}: {details}");
        }
        assert!(!inlet.log().contains(CHAT) && !details.to_string().contains(CHAT));
    }
}

#[tokio::test]
async fn an_act_is_finished_and_recorded_when_whoever_asked_for_it_hangs_up() {
    let inlet = serve(&[]).await;
    let head = format!(
        "POST /admin/replay HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {TOKEN}\r\ncontent-length: 1000\r\n\r\n"
    );
    let mut socket = tokio::net::TcpStream::connect(("127.0.0.1", inlet.port)).await.unwrap();
    socket.write_all((head + &line(1)).as_bytes()).await.unwrap();
    eventually("it has begun", || async {
        let records = records(&inlet).await;
        (records.first()?["outcome"] == "begun").then_some(())
    })
    .await;
    drop(socket);
    eventually("it is over", || async {
        let records = records(&inlet).await;
        (records[0]["outcome"] == "bad_request").then_some(())
    })
    .await;
    assert_eq!(records(&inlet).await.len(), 1);
}

#[tokio::test]
async fn of_what_is_sent_names_are_recorded_and_nothing_else_and_there_is_a_largest_size() {
    for (store, settings) in stores() {
        let inlet = serve(&settings).await;
        let post = |body: String| inlet.client().post(inlet.url("/admin/login")).body(body);
        let body = json!({
            "accessToken": "anaccesstoken1", "refreshToken": "arefreshtoken2", "login": "some_login", "userId": "77",
            "scope": ["chat:read"], "expiresIn": 14_400, "obtainmentTimestamp": 0, "notes": CHAT,
        });
        let (status, answer) = ask(&inlet, TOKEN, post(body.to_string())).await;
        assert_eq!(status, 200, "{store}: {answer}");
        next_millisecond().await;
        let (status, answer) = ask(&inlet, TOKEN, post(format!("no JSON, {CHAT}"))).await;
        assert_eq!((status, code(&answer)), (400, "bad_request"), "{store}");
        let (status, answer) = ask(&inlet, TOKEN, post("x".repeat(65 * 1024))).await;
        assert_eq!((status, code(&answer)), (413, "body_too_large"), "{store}");
        let records = records(&inlet).await;
        let outcomes: Vec<_> = records.iter().map(|record| record["outcome"].as_str().unwrap()).collect();
        assert_eq!(outcomes, ["bad_request", "done"], "{store}: what is not taken is no act");
        let details = &records[1]["details"];
        assert_eq!((&details["login"], &details["userId"]), (&json!("some_login"), &json!("77")));
        assert_eq!(details["accessToken"], "[redacted], 14 bytes");
        assert_eq!(records[0]["details"], json!({ "bytes": 9 + CHAT.len() }));
        let said = json!(records).to_string() + &inlet.log();
        for secret in ["anaccesstoken1", "arefreshtoken2", CHAT] {
            assert!(!said.contains(secret), "{store}: {secret}");
        }
    }
}

#[tokio::test]
async fn a_body_that_does_not_come_is_not_waited_for() {
    let inlet = serve(&[]).await;
    let head = format!(
        "POST /admin/login HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {TOKEN}\r\ncontent-length: 9\r\n\r\n"
    );
    let mut socket = tokio::net::TcpStream::connect(("127.0.0.1", inlet.port)).await.unwrap();
    socket.write_all(head.as_bytes()).await.unwrap();
    let mut answer = [0; 12];
    let read = tokio::time::timeout(PATIENCE, socket.read_exact(&mut answer)).await;
    read.unwrap().unwrap();
    assert_eq!(&answer, b"HTTP/1.1 408");
    assert!(records(&inlet).await.is_empty());
}

#[tokio::test]
async fn records_come_page_by_page_and_what_is_no_page_is_said() {
    for (store, settings) in stores() {
        let inlet = serve(&settings).await;
        for number in 1..=5 {
            let request = inlet
                .client()
                .post(inlet.url("/admin/replay"))
                .header("x-request-id", number.to_string())
                .body(line(number));
            assert_eq!(ask(&inlet, TOKEN, request).await.0, 200);
            next_millisecond().await;
        }
        let (mut seen, mut path) = (Vec::new(), "/admin/audit?limit=2".to_owned());
        loop {
            let (status, page) = get(&inlet, &path).await;
            assert_eq!(status, 200, "{page}");
            let records = page["records"].as_array().unwrap();
            assert!(records.len() <= 2);
            seen.extend(records.iter().map(|record| record["requestId"].as_str().unwrap().to_owned()));
            let Some(next) = page["next"].as_str() else { break };
            path = format!("/admin/audit?limit=2&after={next}");
        }
        assert_eq!(seen, ["5", "4", "3", "2", "1"], "{store}");
        for query in [
            "limit=0",
            "limit=501",
            "limit=-1",
            "limit=many",
            "after=x",
            "after=../users/twitch:1",
            "since=1",
        ] {
            let (status, answer) = get(&inlet, &format!("/admin/audit?{query}")).await;
            assert_eq!((status, code(&answer)), (400, "bad_request"), "{query}");
        }
        let (status, answer) = ask(&inlet, TOKEN, inlet.client().delete(inlet.url("/admin/audit"))).await;
        assert_eq!((status, code(&answer)), (405, "method_not_allowed"));
        assert_eq!(inlet.get("/admin/audit").await.unwrap().status(), 401);
    }
}

#[tokio::test]
async fn records_survive_a_restart() {
    let mut inlet = serve(&[]).await;
    let request = inlet.client().post(inlet.url("/admin/replay")).body(line(1));
    assert_eq!(ask(&inlet, TOKEN, request).await.0, 200);
    let before = records(&inlet).await;
    inlet.terminate(Duration::from_secs(15)).await;
    let settings = [("ADMIN_TOKEN", TOKEN), ("ADMIN_TOKEN_NEXT", NEXT)];
    let inlet = Inlet::serve_in(inlet.into_folder(), &settings).await;
    assert_eq!(records(&inlet).await, before);
}

#[tokio::test]
async fn what_cannot_be_recorded_is_not_done() {
    let nowhere = format!("127.0.0.1:{}", free_port());
    let settings =
        [("GOOGLE_CLOUD_PROJECT", "some-project".to_owned()), ("FIRESTORE_EMULATOR_HOST", nowhere)];
    let inlet = serve(&settings).await;
    let request = inlet.client().post(inlet.url("/admin/replay")).body(line(1));
    let (status, answer) = ask(&inlet, TOKEN, request).await;
    assert_eq!((status, code(&answer)), (503, "audit_unavailable"), "{answer}");
    assert_eq!(answer["error"]["message"], "the audit record cannot be written, so nothing was done");
    let (status, answer) = get(&inlet, "/admin/audit").await;
    assert_eq!((status, code(&answer)), (503, "store_unavailable"), "{answer}");
    let metrics = inlet.metrics().await;
    assert_eq!(metrics.sum("inlet_events_received_total"), 0);
    assert_eq!(metrics.get("inlet_errors_total{code=\"audit_unavailable\"}"), 1);
    let log = inlet.log();
    let line = log.lines().find(|line| line.contains("audit_unavailable")).unwrap();
    let line: Value = serde_json::from_str(line).unwrap();
    assert_eq!((&line["errorCode"], &line["severity"]), (&json!("audit_unavailable"), &json!("WARNING")));
    assert!(line["requestId"].is_string() && line["error"].as_str().unwrap().contains("away"), "{line}");
}

#[tokio::test]
async fn both_tokens_open_everything_while_one_takes_the_others_place() {
    let inlet = serve(&[]).await;
    let client = inlet.client();
    for (path, is_post) in [
        ("/_debug/config", false),
        ("/_debug/twitch", false),
        ("/admin/audit", false),
        ("/admin/errors", false),
        ("/v1/stream", false),
        ("/admin/replay", true),
    ] {
        let request = || if is_post { client.post(inlet.url(path)) } else { client.get(inlet.url(path)) };
        for token in [TOKEN, NEXT] {
            let response = request().bearer_auth(token).send().await.unwrap();
            assert_eq!(response.status(), 200, "{path} {token}");
        }
        for token in ["", "the", "the-token-of-this-yea", "the-token-of-next-year2", "THE-TOKEN-OF-NEXT-YEAR"]
        {
            let response = request().bearer_auth(token).send().await.unwrap();
            assert_eq!(response.status(), 401, "{path} {token}");
        }
        assert_eq!(request().send().await.unwrap().status(), 401, "{path}");
    }
    let (_, config) = get(&inlet, "/_debug/config").await;
    assert_eq!(
        (&config["ADMIN_TOKEN"], &config["ADMIN_TOKEN_NEXT"]),
        (&"[redacted]".into(), &"[redacted]".into())
    );
    assert!(!inlet.log().contains("the-token-of"), "{}", inlet.log());
}

#[tokio::test]
async fn a_token_that_can_be_guessed_is_said_and_half_a_rotation_is_refused() {
    let output = run(&["serve"], &[("ADMIN_TOKEN_NEXT", NEXT)]);
    assert_eq!(output.status.code(), Some(78));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("ADMIN_TOKEN_NEXT: ") && !said.contains(NEXT), "{said}");
    let inlet = Inlet::serve(&[("ADMIN_TOKEN", TOKEN), ("ADMIN_TOKEN_NEXT", "short")]).await;
    let log = inlet.log();
    let weak: Vec<_> = log.lines().filter(|line| line.contains("weak_token")).collect();
    assert!(weak.len() == 1 && weak[0].contains("ADMIN_TOKEN_NEXT"), "{log}");
    assert!(!log.contains("short"), "{log}");
}

fn counts(metrics: &Metrics) -> BTreeMap<String, u64> {
    let name = |code: &ErrorCode| format!("inlet_errors_total{{code=\"{code}\"}}");
    ErrorCode::ALL.iter().map(|code| (code.to_string(), metrics.get(&name(code)))).collect()
}

#[tokio::test]
async fn every_code_is_shown_with_its_count_and_what_to_do() {
    for (store, settings) in stores() {
        let inlet = serve(&settings).await;
        let of = |page: &Value, code: &str| {
            page["errors"].as_array().unwrap().iter().find(|error| error["code"] == code).unwrap().clone()
        };
        // That there is no channel is known when the store has listed those it keeps.
        let before = eventually("it is said that there is no channel", || async {
            let (status, page) = get(&inlet, "/admin/errors").await;
            assert_eq!(status, 200);
            (of(&page, "no_channels")["count"] == 1).then_some(page)
        })
        .await;
        let codes: Vec<_> = ErrorCode::ALL.iter().map(|code| code.as_str()).collect();
        let listed = before["errors"].as_array().unwrap();
        assert_eq!(listed.iter().map(|error| error["code"].as_str().unwrap()).collect::<Vec<_>>(), codes);
        for error in listed {
            let is_used = error["count"].as_u64().unwrap() > 0;
            assert_eq!(error["lastAt"].is_string(), is_used, "{store}: {error}");
            assert!(error["help"].as_str().unwrap().len() > 10, "{error}");
        }
        assert_eq!(of(&before, "not_found")["count"], 0);

        assert_eq!(get(&inlet, "/nothing").await.0, 404);
        assert_eq!(inlet.get("/admin/errors").await.unwrap().status(), 401);
        assert_eq!(ask(&inlet, TOKEN, inlet.client().post(inlet.url("/admin/errors"))).await.0, 405);
        let lines = format!("{}@@@;;;=== {CHAT}\r\n", line(1));
        let (_, outcomes) =
            ask(&inlet, TOKEN, inlet.client().post(inlet.url("/admin/replay")).body(lines)).await;
        assert_eq!(outcomes["deadLettered"], 1, "{outcomes}");
        let (_, after) = get(&inlet, "/admin/errors").await;
        for code in ["not_found", "unauthorized", "method_not_allowed", "unparsable", "bad_line"] {
            assert_eq!(of(&after, code)["count"], 1, "{store}: {code}");
        }
        let families = &after["statusFamilies"];
        assert_eq!((&families["3xx"], &families["4xx"], &families["5xx"]), (&json!(0), &json!(3), &json!(0)));
        assert!(families["2xx"].as_u64().unwrap() >= 2, "{families}");
        let shown: BTreeMap<_, _> = after["errors"]
            .as_array()
            .unwrap()
            .iter()
            .map(|error| (error["code"].as_str().unwrap().to_owned(), error["count"].as_u64().unwrap()))
            .collect();
        assert_eq!(shown, counts(&inlet.metrics().await), "{store}");
    }
}
