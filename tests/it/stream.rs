//! `/v1/stream` by its own token and for pages of other sites; and what its readers count on when they come back.

use std::collections::HashSet;
use std::time::Duration;

use reqwest::{Method, RequestBuilder};
use serde_json::Value;

use crate::harness::events::Events;
use crate::harness::inlet::{Inlet, Simulator, run};
use crate::harness::nats::Nats;
use crate::harness::stream as stored;

const TOKEN: &str = "reader/of+the=stream";

/// Status and code of the answer, and which page may read it.
async fn outcome(request: RequestBuilder) -> (u16, Option<String>, Option<String>) {
    let response = request.send().await.unwrap();
    let header = |name: &str| response.headers().get(name).map(|value| value.to_str().unwrap().to_owned());
    assert_eq!(header("vary").as_deref(), Some("origin"), "an answer depends on the origin");
    let (status, readable_by) = (response.status().as_u16(), header("access-control-allow-origin"));
    let code = if status < 400 {
        None
    } else {
        let body: Value = response.json().await.unwrap();
        Some(body["error"]["code"].as_str().unwrap().to_owned())
    };
    (status, code, readable_by)
}

#[tokio::test]
async fn its_token_opens_the_stream_and_nothing_else() {
    let inlet = Inlet::serve(&[
        ("ADMIN_TOKEN", "operator"),
        ("STREAM_TOKEN", TOKEN),
        ("STREAM_ORIGINS", "https://overlay.example null"),
    ])
    .await;
    let client = inlet.client();
    let get = || client.get(inlet.url("/v1/stream"));
    let in_address = || get().query(&[("access_token", TOKEN)]);
    for (request, expected) in [
        (get().bearer_auth(TOKEN), (200, None)),
        (get().bearer_auth("operator"), (200, None)),
        (in_address(), (200, None)),
        (in_address().query(&[("channel", "a")]), (200, None)),
        (get(), (401, Some("unauthorized"))),
        (get().query(&[("access_token", "operator")]), (401, Some("unauthorized"))),
        (get().query(&[("access_token", "reader")]), (401, Some("unauthorized"))),
    ] {
        let (status, code, readable_by) = outcome(request).await;
        assert_eq!((status, code.as_deref()), expected);
        assert_eq!(readable_by, None);
    }
    for path in ["/_debug/config", "/_debug/twitch"] {
        let request = || client.get(inlet.url(path));
        assert_eq!(request().bearer_auth(TOKEN).send().await.unwrap().status(), 401);
        assert_eq!(request().query(&[("access_token", TOKEN)]).send().await.unwrap().status(), 401);
    }
    let replay = client.post(inlet.url("/admin/replay")).bearer_auth(TOKEN).body("").send().await.unwrap();
    assert_eq!(replay.status(), 401);
    let shown: Value = client
        .get(inlet.url("/_debug/config"))
        .bearer_auth("operator")
        .send()
        .await
        .unwrap()
        .json()
        .await
        .unwrap();
    assert_eq!(shown["STREAM_TOKEN"], "[redacted]");
    assert_eq!(shown["STREAM_ORIGINS"], serde_json::json!(["https://overlay.example", "null"]));
}

#[tokio::test]
async fn pages_of_listed_origins_may_read_it_and_no_others() {
    let inlet =
        Inlet::serve(&[("STREAM_TOKEN", TOKEN), ("STREAM_ORIGINS", "https://overlay.example, null")]).await;
    let client = inlet.client();
    let get = |origin: &str| client.get(inlet.url("/v1/stream")).header("origin", origin);
    for origin in ["https://overlay.example", "null"] {
        let readable = Some(origin.to_owned());
        let request = get(origin).query(&[("access_token", TOKEN)]);
        assert_eq!(outcome(request).await, (200, None, readable.clone()));
        // The page is told why it is refused, too.
        let refused = (401, Some("unauthorized".to_owned()), readable.clone());
        assert_eq!(outcome(get(origin)).await, refused);
        let bad = get(origin).bearer_auth(TOKEN).header("last-event-id", "soon");
        assert_eq!(outcome(bad).await, (400, Some("bad_request".to_owned()), readable.clone()));
        let preflight = client.request(Method::OPTIONS, inlet.url("/v1/stream")).header("origin", origin);
        let answer = preflight.try_clone().unwrap().send().await.unwrap();
        assert_eq!(answer.headers()["access-control-allow-methods"], "GET");
        assert!(answer.headers()["access-control-allow-headers"].to_str().unwrap().contains("authorization"));
        assert_eq!(outcome(preflight).await, (204, None, readable));
    }
    let not_allowed = (403, Some("origin_not_allowed".to_owned()), None);
    for origin in ["https://evil.example", "http://overlay.example", "https://overlay.example:8443"] {
        assert_eq!(outcome(get(origin).bearer_auth(TOKEN)).await, not_allowed);
        let preflight = client.request(Method::OPTIONS, inlet.url("/v1/stream")).header("origin", origin);
        assert_eq!(outcome(preflight).await, not_allowed);
    }
    // Our own page is no other site.
    let own = get(&inlet.url("")).bearer_auth(TOKEN);
    assert_eq!(outcome(own).await, (200, None, None));
    // Of the other routes a browser hears nothing of the kind.
    for path in ["/healthz", "/metrics", "/_debug/config"] {
        let answer =
            client.get(inlet.url(path)).header("origin", "https://overlay.example").send().await.unwrap();
        assert!(!answer.headers().contains_key("access-control-allow-origin"), "{path}");
    }
}

#[test]
fn settings_that_would_open_more_than_meant_are_refused() {
    for (settings, says) in [
        (&[("STREAM_TOKEN", "a"), ("ADMIN_TOKEN", "a")][..], "STREAM_TOKEN: is ADMIN_TOKEN"),
        (&[("STREAM_ORIGINS", "https://a.example")], "STREAM_ORIGINS: opens nothing without STREAM_TOKEN"),
        (&[("STREAM_ORIGINS", "*"), ("STREAM_TOKEN", "a")], "STREAM_ORIGINS: \"*\" is not taken"),
        (&[("STREAM_ORIGINS", "https://a.example/"), ("STREAM_TOKEN", "a")], "STREAM_ORIGINS: "),
    ] {
        let output = run(&["serve"], settings);
        assert_eq!(output.status.code(), Some(78));
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains(says), "{said}");
    }
}

/// Reads on from behind `last` until it has `count` in all, in pieces: each time the connection is dropped, in the midst of
/// what it brings, and taken up by the last id.
async fn read_in_pieces(inlet: &Inlet, last: &mut u64, read: &mut Vec<String>, count: usize) {
    while read.len() < count {
        let mut events = Events::open(inlet, "", Some(&last.to_string())).await;
        for _ in 0..(count - read.len()).min(37) {
            let (position, envelope) = events.envelope().await;
            assert!(position > *last);
            *last = position;
            read.push(envelope["id"].as_str().unwrap().to_owned());
        }
    }
}

#[tokio::test]
async fn who_comes_back_misses_and_repeats_nothing_on_either_bus() {
    let nats = Nats::start().await;
    for bus in [None, Some(nats.url())] {
        let simulator = Simulator::start(&["--channels", "alpha", "--rate", "200", "--count", "2000"]).await;
        let url = simulator.url();
        let mut settings = vec![("TWITCH_CHANNELS", "alpha"), ("TWITCH_IRC_URL", url.as_str())];
        settings.extend(bus.as_ref().map(|url| ("NATS_URL", url.as_str())));
        let mut inlet = Inlet::serve(&settings).await;
        // It is asked while the bus is still on its way, as a browser does: it may wait, but is not refused.
        let (mut last, mut read) = (0, Vec::new());
        read_in_pieces(&inlet, &mut last, &mut read, 300).await;
        assert_eq!(inlet.terminate(Duration::from_secs(15)).await.1, Some(0));
        let inlet = Inlet::serve_in(inlet.into_folder(), &settings).await;
        read_in_pieces(&inlet, &mut last, &mut read, 900).await;

        // Beside who comes back so often: who reads all of it at once, and who knows nothing of Inlet.
        let (mut at_once, mut position) = (Vec::new(), 0);
        let mut events = Events::open(&inlet, "", Some("0")).await;
        while position < last {
            let (next, envelope) = events.envelope().await;
            position = next;
            at_once.push(envelope["id"].as_str().unwrap().to_owned());
        }
        assert_eq!(read, at_once);
        if bus.is_some() {
            let stored = stored::read(&nats.url(), "INLET").await;
            let stored: Vec<_> = stored.into_iter().map(|message| message.msg_id).take(read.len()).collect();
            assert_eq!(read, stored);
        }
        assert_eq!(read.iter().collect::<HashSet<_>>().len(), read.len());
    }
}

#[tokio::test]
async fn who_was_there_before_anything_was_said_comes_back_to_all_of_it() {
    let mut simulator = Simulator::start(&["--channels", "another", "--rate", "1"]).await;
    let url = simulator.url();
    let inlet = Inlet::serve(&[("TWITCH_CHANNELS", "alpha"), ("TWITCH_IRC_URL", url.as_str())]).await;
    inlet.ready().await;
    // The head of the answer names the place to come back to.
    let place = Events::open(&inlet, "", None).await.place().await;
    for number in 1..=3 {
        simulator.say(&format!("raw @id=m{number};room-id=1;user-id=9 :n!n@n PRIVMSG #alpha :hello"));
    }
    inlet.settled(3).await;
    let mut events = Events::open(&inlet, "", Some(&place)).await;
    for number in 1..=3 {
        assert_eq!(events.envelope().await.1["payload"]["messageId"], format!("m{number}"));
    }
    // Of a stream that is gone: this one from its start, instead of waiting for a position that comes much later.
    let mut events = Events::open(&inlet, "", Some("5000")).await;
    assert_eq!(events.envelope().await.1["payload"]["messageId"], "m1");
    // The address may say it, too; the header is the newer one.
    let mut events = Events::open(&inlet, "?lastEventId=1", None).await;
    assert_eq!(events.envelope().await.1["payload"]["messageId"], "m2");
    let mut events = Events::open(&inlet, "?lastEventId=1&channel=alpha", Some("2")).await;
    assert_eq!(events.envelope().await.1["payload"]["messageId"], "m3");
    assert_eq!(inlet.get("/v1/stream?lastEventId=soon").await.unwrap().status(), 400);
    // But the end is the end.
    let mut events = Events::open(&inlet, "", Some("3")).await;
    simulator.say("raw @id=m4;room-id=1;user-id=9 :n!n@n PRIVMSG #alpha :hello");
    assert_eq!(events.envelope().await.1["payload"]["messageId"], "m4");
}

/// So many readers as there are places for, and one that does not read: each hears all of it, in order, and the path does
/// not notice.
#[tokio::test]
async fn sixty_four_readers_hear_the_same() {
    const READERS: usize = 64;
    const COUNT: u64 = 2_000;
    let simulator =
        Simulator::start(&["--channels", "alpha,beta", "--rate", "1000", "--count", "2000"]).await;
    let url = simulator.url();
    let settings =
        [("TWITCH_CHANNELS", "alpha,beta"), ("TWITCH_IRC_URL", url.as_str()), ("STREAM_MAX_CLIENTS", "65")];
    let inlet = Inlet::serve(&settings).await;
    let mut deaf = tokio::net::TcpStream::connect(("127.0.0.1", inlet.port)).await.unwrap();
    let request = b"GET /v1/stream HTTP/1.1\r\nhost: localhost\r\nlast-event-id: 0\r\n\r\n";
    tokio::io::AsyncWriteExt::write_all(&mut deaf, request).await.unwrap();
    let readers = (0..READERS).map(|reader| {
        let inlet = &inlet;
        async move {
            let only_beta = reader % 8 == 7;
            let query = if only_beta { "?channel=beta" } else { "" };
            let mut events = Events::open(inlet, query, Some("0")).await;
            let mut heard = Vec::new();
            // The last ones may be of the other channel.
            let end = if only_beta { COUNT - 200 } else { COUNT };
            while heard.last().is_none_or(|(position, _)| *position < end) {
                let (position, envelope) = events.envelope().await;
                heard.push((position, envelope["source"]["channel"].as_str().unwrap().to_owned()));
            }
            (only_beta, heard)
        }
    });
    let heard = futures_util::future::join_all(readers).await;
    let all = &heard[0].1;
    assert!(all.iter().map(|(position, _)| *position).eq(1..=COUNT));
    for (only_beta, heard) in &heard {
        let last = heard.last().unwrap().0;
        let expected = all.iter().filter(|(at, channel)| *at <= last && (!only_beta || channel == "beta"));
        assert!(heard.iter().eq(expected), "{only_beta} {}", heard.len());
    }
    let metrics = inlet.settled(COUNT).await;
    metrics.assert_account_closes();
    assert_eq!(metrics.sum("inlet_events_published_total"), COUNT);
    drop(deaf);
}
