//! `examples/overlay.html`, as it is, in a real browser against the real binary.

use axum::Router;
use axum::response::Html;
use axum::routing::get;
use inlet::tasks::Tasks;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use tokio::net::TcpListener;

use crate::harness::browser::{Browser, Tab};
use crate::harness::inlet::{Inlet, Simulator};

const TOKEN: &str = "reader/of+the=stream&more";
const PAGE: &str = include_str!("../../examples/overlay.html");
const BUBBLES: &str = "[...document.querySelectorAll('#chat li')].map((bubble) => bubble.textContent)";

/// The overlay on a site of its own; its origin.
async fn site() -> (String, Tasks) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let origin = format!("http://{}", listener.local_addr().unwrap());
    let router = Router::new().route("/overlay.html", get(|| async { Html(PAGE) }));
    let mut tasks = Tasks::new();
    tasks.spawn("site", async move { axum::serve(listener, router).await.unwrap() });
    (origin, tasks)
}

fn settings_of(inlet: &Inlet, channel: &str) -> String {
    let encoded = |text: &str| utf8_percent_encode(text, NON_ALPHANUMERIC).to_string();
    format!("#inlet={}&token={}&channel={channel}", encoded(&inlet.url("")), encoded(TOKEN))
}

fn raw(channel: &str, id: &str, user: &str, text: &str) -> String {
    format!("raw @id={id};room-id=1;user-id={user};display-name=U{user} :u!u@u PRIVMSG #{channel} :{text}")
}

async fn shows(tab: &Tab<'_>, text: &str) {
    tab.is(&format!("{BUBBLES}.some((text) => text.includes({}))", serde_json::Value::from(text))).await;
}

#[tokio::test]
async fn the_overlay_shows_chat_from_a_file_and_from_a_listed_site_and_takes_away_what_moderators_do() {
    let mut simulator = Simulator::start(&["--channels", "another", "--rate", "1"]).await;
    let (url, (origin, _site), (other_origin, _other_site)) = (simulator.url(), site().await, site().await);
    let origins = format!("null, {origin}");
    let settings = [
        ("TWITCH_CHANNELS", "alpha,beta"),
        ("TWITCH_IRC_URL", url.as_str()),
        ("IRC_RECONNECT_INITIAL_MS", "50"),
        ("ADMIN_TOKEN", "operator"),
        ("STREAM_TOKEN", TOKEN),
        ("STREAM_ORIGINS", origins.as_str()),
    ];
    let inlet = Inlet::serve(&settings).await;
    inlet.ready().await;
    let browser = Browser::start();
    let (from_file, from_site, refused) = (browser.tab().await, browser.tab().await, browser.tab().await);
    let file = concat!("file://", env!("CARGO_MANIFEST_DIR"), "/examples/overlay.html");
    from_file.open(&format!("{file}{}", settings_of(&inlet, "alpha"))).await;
    from_site.open(&format!("{origin}/overlay.html{}", settings_of(&inlet, ""))).await;
    refused.open(&format!("{other_origin}/overlay.html{}", settings_of(&inlet, "alpha"))).await;
    refused.is("document.querySelector('#state').textContent.includes('STREAM_ORIGINS')").await;
    let markup = "<img src=x onerror=alert(1)> hello";
    // Said again until both are there: what is said before is none of theirs.
    let mut said = 0;
    while from_file.ask(BUBBLES).await.as_array().unwrap().is_empty()
        || from_site.ask(BUBBLES).await.as_array().unwrap().is_empty()
    {
        said += 1;
        assert!(said < 300, "{:?}", browser.complaints());
        simulator.say(&raw("beta", &format!("b{said}"), "8", "in another channel"));
        simulator.say(&raw("alpha", &format!("a{said}"), &said.to_string(), markup));
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    for tab in [&from_file, &from_site] {
        shows(tab, &format!("new hereU{said}{markup}")).await;
        assert_eq!(tab.ask("document.querySelectorAll('#chat img').length").await, 0);
        assert_eq!(tab.ask("getComputedStyle(document.body).backgroundColor").await, "rgba(0, 0, 0, 0)");
    }
    shows(&from_site, "in another channel").await;
    assert_eq!(
        from_file.ask(&format!("{BUBBLES}.some((text) => text.includes('another channel'))")).await,
        false
    );
    assert_eq!(refused.ask(BUBBLES).await.as_array().unwrap().len(), 0);

    // A restart: the browser comes back by itself, and to what was said before it did.
    let restarting = inlet.kill_and_serve(&settings);
    from_file.is("!document.querySelector('#state').hidden").await;
    let inlet = restarting.await;
    inlet.ready().await;
    simulator.say(&raw("alpha", "z1", "9001", "one that is deleted"));
    simulator.say(&raw("alpha", "z2", "9002", "one of a banned viewer"));
    simulator.say(&raw("alpha", "z3", "9003", "one that stays"));
    shows(&from_file, "one that is deleted").await;
    shows(&from_file, "one that stays").await;
    from_file.is("document.querySelector('#state').hidden").await;
    shows(&from_site, "one that stays").await;
    // What another channel's moderators do is no matter of this one.
    simulator.say("raw @target-user-id=9003;room-id=2 :tmi.twitch.tv CLEARCHAT #beta :u");
    simulator
        .say("raw @login=u;target-msg-id=z1;room-id=1 :tmi.twitch.tv CLEARMSG #alpha :one that is deleted");
    simulator.say("raw @target-user-id=9002;room-id=1 :tmi.twitch.tv CLEARCHAT #alpha :u");
    from_file.is(&format!("{BUBBLES}.filter((text) => text.includes('one ')).length === 1")).await;
    shows(&from_file, "one that stays").await;
    from_site.is(&format!("{BUBBLES}.filter((text) => text.includes('one ')).length === 1")).await;
    shows(&from_site, "one that stays").await;

    // Who is refused for a while comes back to what was said meanwhile.
    let mut others = settings;
    others[4].1 = "another token";
    let refusing = inlet.kill_and_serve(&others).await;
    refusing.ready().await;
    from_file.is("document.querySelector('#state').textContent.includes('refused')").await;
    simulator.say(&raw("alpha", "z4", "9004", "said meanwhile"));
    refusing.quiet().await;
    let inlet = refusing.kill_and_serve(&settings).await;
    shows(&from_file, "said meanwhile").await;
    simulator.say("raw @room-id=1 :tmi.twitch.tv CLEARCHAT #alpha");
    from_file.is(&format!("{BUBBLES}.length === 0")).await;
    assert!(!inlet.log().contains("reader"), "the token is in no log");
}
