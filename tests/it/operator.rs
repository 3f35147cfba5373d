//! The operator's HTTP, over a real socket: good answers and bad ones.

use std::time::Duration;

use serde_json::Value;

use crate::harness::events::Events;
use crate::harness::eventually;
use crate::harness::inlet::{Inlet, Simulator, run};

#[tokio::test]
async fn day_one_no_channels_and_everything_answers() {
    let mut inlet = Inlet::serve(&[]).await;
    inlet.ready().await;
    for path in [
        "/livez",
        "/live",
        "/readyz",
        "/ready",
        "/healthz",
        "/health",
        "/metrics",
        "/_debug/twitch",
        "/_debug/config",
    ] {
        assert_eq!(inlet.get(path).await.unwrap().status(), 200, "{path}");
    }
    let (_, health) = inlet.json("/healthz").await;
    assert_eq!((&health["status"], &health["service"]), (&"ok".into(), &"inlet".into()));
    assert_eq!(health["parts"]["twitch"]["state"], "disabled");
    assert_eq!(health["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(inlet.json("/_debug/twitch").await.1["state"], "disabled");
    let log = inlet.log();
    assert_eq!(log.matches("TWITCH_CHANNELS").count(), 1, "{log}");
    let first: Value = serde_json::from_str(log.lines().next().unwrap()).unwrap();
    assert!(first["message"].as_str().unwrap().starts_with("inlet 0."), "{first}");
    for field in ["timestamp", "severity", "service", "component"] {
        assert!(first[field].is_string(), "{field} in {first}");
    }
    assert_eq!(inlet.terminate(Duration::from_secs(3)).await.1, Some(0));
}

#[tokio::test]
async fn errors_have_one_form_and_every_answer_its_request_id() {
    let inlet = Inlet::serve(&[]).await;
    let client = inlet.client();
    let missing = client.get(inlet.url("/nothing")).header("x-request-id", "caller-7").send().await.unwrap();
    assert_eq!(
        (missing.status().as_u16(), &missing.headers()["x-request-id"]),
        (404, &"caller-7".parse().unwrap())
    );
    let body: Value = missing.json().await.unwrap();
    assert_eq!((&body["error"]["code"], &body["requestId"]), (&"not_found".into(), &"caller-7".into()));

    let wrong = client.post(inlet.url("/metrics")).send().await.unwrap();
    assert_eq!(wrong.status(), 405);
    assert_eq!(wrong.json::<Value>().await.unwrap()["error"]["code"], "method_not_allowed");
    for bad in ["", "with space", &"x".repeat(129), "é"] {
        let response =
            client.get(inlet.url("/livez")).header("x-request-id", bad.as_bytes()).send().await.unwrap();
        let id = response.headers()["x-request-id"].to_str().unwrap().to_owned();
        assert!(id != bad && id.len() == 36, "{id}");
    }
    let metrics = inlet.metrics().await;
    assert_eq!(metrics.get("inlet_http_requests_total{route=\"unmatched\",status=\"4xx\"}"), 1);
    assert_eq!(metrics.get("inlet_errors_total{code=\"not_found\"}"), 1);
}

#[tokio::test]
async fn without_a_token_only_this_machine_sees_the_inside() {
    let inlet = Inlet::serve(&[]).await;
    let client = inlet.client();
    for path in ["/_debug/twitch", "/_debug/config", "/v1/stream", "/admin/replay"] {
        for (name, value) in [
            ("host", "inlet.example"),
            ("x-forwarded-for", "203.0.113.9"),
            ("origin", "https://evil.example"),
            ("sec-fetch-site", "cross-site"),
        ] {
            let request = if path == "/admin/replay" {
                client.post(inlet.url(path))
            } else {
                client.get(inlet.url(path))
            };
            let response = request.header(name, value).send().await.unwrap();
            assert_eq!(response.status(), 403, "{path} {name}");
            assert_eq!(response.json::<Value>().await.unwrap()["error"]["code"], "loopback_only");
        }
    }
}

#[tokio::test]
async fn with_a_token_it_is_asked_for_and_shown_nowhere() {
    let inlet = Inlet::serve(&[("ADMIN_TOKEN", "correct-horse-battery")]).await;
    let client = inlet.client();
    let get = |token: Option<&str>| {
        let request = client.get(inlet.url("/_debug/config"));
        match token {
            Some(token) => request.bearer_auth(token).send(),
            None => request.send(),
        }
    };
    assert_eq!(get(None).await.unwrap().status(), 401);
    assert_eq!(get(Some("wrong")).await.unwrap().status(), 401);
    let shown = get(Some("correct-horse-battery")).await.unwrap();
    assert_eq!(shown.status(), 200);
    let text = shown.text().await.unwrap();
    assert!(
        text.contains("\"ADMIN_TOKEN\":\"[redacted]\"") && !text.contains("correct-horse-battery"),
        "{text}"
    );
    assert!(!inlet.log().contains("correct-horse-battery"));
    assert_eq!(inlet.get("/livez").await.unwrap().status(), 200);
    assert_eq!(inlet.get("/metrics").await.unwrap().status(), 200);
}

#[tokio::test]
async fn the_stream_is_followed_resumed_filtered_and_ended() {
    let simulator = Simulator::start(&["--channels", "alpha,beta", "--rate", "200"]).await;
    let settings = [
        ("TWITCH_CHANNELS", "alpha,beta"),
        ("TWITCH_IRC_URL", &*simulator.url()),
        ("STREAM_MAX_CLIENTS", "2"),
    ];
    let mut inlet = Inlet::serve(&settings).await;
    let mut all = Events::open(&inlet, "", Some("0")).await;
    for position in 1..=50 {
        assert_eq!(all.envelope().await.0, position);
    }
    let mut beta =
        Events::open(&inlet, "?channel=Beta&platform=twitch&type=external.chat.message.v1", Some("0")).await;
    for _ in 0..20 {
        assert_eq!(beta.envelope().await.1["source"]["channel"], "beta");
    }
    // Both places are taken.
    let full = inlet.get("/v1/stream").await.unwrap();
    assert_eq!((full.status().as_u16(), full.headers().contains_key("retry-after")), (503, true));
    assert_eq!(full.json::<Value>().await.unwrap()["error"]["code"], "too_many_clients");
    drop(all);
    eventually("a place", || async { (inlet.get("/v1/stream").await?.status() == 200).then_some(()) }).await;
    // Resuming misses and repeats nothing.
    drop(beta);
    eventually("two places", || async { (inlet.get("/v1/stream").await?.status() == 200).then_some(()) })
        .await;
    let mut resumed = Events::open(&inlet, "", Some("30")).await;
    assert_eq!(resumed.envelope().await.0, 31);
    let bad =
        inlet.client().get(inlet.url("/v1/stream")).header("last-event-id", "soon").send().await.unwrap();
    assert_eq!(bad.status(), 400);
    // Shutdown ends it and says so.
    inlet.child.signal("TERM");
    let mut last = String::new();
    while let Some(block) = resumed.next().await {
        last = block;
    }
    assert_eq!(last, "event: cut\ndata: {\"reason\":\"shutting_down\"}");
    assert_eq!(inlet.child.wait(Duration::from_secs(9)).await.code(), Some(0));
}

#[tokio::test]
async fn a_client_that_does_not_read_is_let_go_and_costs_nothing() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let simulator = Simulator::start(&["--channels", "alpha", "--rate", "3000"]).await;
    let settings =
        [("TWITCH_CHANNELS", "alpha"), ("TWITCH_IRC_URL", &*simulator.url()), ("STREAM_MAX_CLIENTS", "1")];
    let inlet = Inlet::serve(&settings).await;
    let mut idle = tokio::net::TcpStream::connect(("127.0.0.1", inlet.port)).await.unwrap();
    idle.write_all(b"GET /v1/stream HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
    // The first words say that the place is taken; it reads no further.
    let mut head = [0; 15];
    idle.read_exact(&mut head).await.unwrap();
    assert_eq!(&head, b"HTTP/1.1 200 OK");
    assert_eq!(inlet.get("/v1/stream").await.unwrap().status(), 503);
    crate::harness::within(Duration::from_mins(1), "the place is free again", || async {
        (inlet.get("/v1/stream").await?.status() == 200).then_some(())
    })
    .await;
    let metrics = inlet.metrics().await;
    assert!(metrics.sum("inlet_events_published_total") > 3_000);
    assert_eq!(metrics.sum("inlet_events_refused_total"), 0);
    // When it reads after all, it hears why.
    let mut rest = Vec::new();
    let read_all = async {
        while !rest.ends_with(b"event: cut\ndata: {\"reason\":\"too_slow\"}\n\n\r\n0\r\n\r\n") {
            assert!(idle.read_buf(&mut rest).await.unwrap() > 0, "it ends without a word");
        }
    };
    tokio::time::timeout(Duration::from_secs(20), read_all).await.unwrap();
}

#[tokio::test]
async fn probe_says_how_the_service_is_by_its_exit_code() {
    let mut inlet = Inlet::serve(&[]).await;
    let port = inlet.port.to_string();
    assert_eq!(run(&["probe"], &[("PORT", &port)]).status.code(), Some(0));
    assert_eq!(run(&["probe", "/readyz", "--port", &port], &[]).status.code(), Some(0));
    assert_eq!(run(&["probe", "/nothing"], &[("PORT", &port)]).status.code(), Some(1));
    inlet.terminate(Duration::from_secs(5)).await;
    assert_eq!(run(&["probe"], &[("PORT", &port)]).status.code(), Some(1));
}
