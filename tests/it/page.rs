//! The page at `/`, in a real browser against the real binary.

use std::path::PathBuf;

use serde_json::{Value, json};

use crate::harness::browser::{Browser, Complaint, Tab};
use crate::harness::inlet::{Inlet, Simulator};
use crate::harness::nats::Nats;

const TOKEN: &str = "operator's t0ken";
const IS_WELL: &str = "document.querySelector('#state').textContent === 'All is well'";
const SAID: &str = "[...document.querySelectorAll('#lines .said')].map((said) => said.textContent)";

/// A line of chat in the channel `alpha`.
fn line(id: &str, text: &str) -> String {
    format!("raw @id={id};room-id=1;user-id=9;display-name=Nn :nn!nn@nn PRIVMSG #alpha :{text}")
}

/// A simulator that says in `alpha` what it is told to, and nothing else.
async fn quiet_simulator() -> Simulator {
    Simulator::start(&["--channels", "another", "--rate", "1"]).await
}

fn of_alpha(url: &str) -> [(&str, &str); 3] {
    [("TWITCH_CHANNELS", "alpha"), ("TWITCH_IRC_URL", url), ("IRC_RECONNECT_INITIAL_MS", "50")]
}

/// What a browser says by itself of a service that is not there, or went away in the midst of an answer.
fn is_of_an_absent_service(complaint: &Complaint, inlet: &str) -> bool {
    complaint.source == "network" && complaint.url.starts_with(inlet) && complaint.text.contains("net::ERR_")
}

fn assert_asked_nobody_but(inlet: &str, browser: &Browser) {
    let requests = browser.requests();
    assert!(requests.len() > 3);
    for (url, _) in requests {
        assert!(url.starts_with(inlet) && !url.contains("oken"), "{url}");
    }
}

#[tokio::test]
async fn the_page_shows_what_is_said_as_text_and_survives_a_restart() {
    let mut simulator = quiet_simulator().await;
    let url = simulator.url();
    let settings = of_alpha(&url);
    let inlet = Inlet::serve(&settings).await;
    let base = inlet.url("/");
    let browser = Browser::start();
    let tab = browser.tab().await;
    tab.open(&base).await;
    tab.is(IS_WELL).await;
    tab.is("document.querySelector('#channels').textContent === '#alpha'").await;
    let markup = "<img src=x onerror=\"document.title='owned'\"><b>bold</b>";
    simulator.say(&line("1", markup));
    tab.is(&format!("{SAID}.includes({})", Value::from(markup))).await;
    let row = "document.querySelector('#lines li')";
    assert_eq!(tab.ask(&format!("{row}.querySelectorAll('img, b').length")).await, 0);
    assert_eq!(tab.ask(&format!("{row}.querySelector('.name').textContent")).await, "Nn");
    assert_eq!(tab.ask(&format!("{row}.querySelector('.badge.new').textContent")).await, "NEW USER");
    // In the browser's zone, and not in UTC.
    let zone = format!(
        "new Date({row}.querySelector('time').dateTime).toLocaleTimeString('en-US', {{timeZone: 'Asia/Kolkata'}})"
    );
    assert_eq!(tab.ask(&format!("{row}.querySelector('time').textContent")).await, tab.ask(&zone).await);
    tab.is("document.querySelector('#published').textContent === '1'").await;
    assert!(browser.complaints().is_empty(), "{:?}", browser.complaints());

    let restarting = inlet.kill_and_serve(&settings);
    tab.is("document.querySelector('#state').textContent === 'No connection to the service'").await;
    let mut inlet = restarting.await;
    inlet.ready().await;
    // It may be said before the page is back: then it is what the page resumes with.
    simulator.say(&line("2", "after the restart"));
    tab.is(&format!("{SAID}.includes('after the restart')")).await;
    tab.is(IS_WELL).await;
    let meanwhile = browser.complaints();
    for complaint in &meanwhile {
        assert!(is_of_an_absent_service(complaint, &base), "{complaint:?}");
    }
    simulator.say(&line("3", "and on"));
    tab.is(&format!("{SAID}.includes('and on')")).await;
    let said = tab.ask(SAID).await;
    let chat: Vec<_> = said
        .as_array()
        .unwrap()
        .iter()
        .filter(|said| !said.as_str().unwrap().starts_with("not heard"))
        .collect();
    assert_eq!(chat, ["and on", "after the restart", markup], "each once, the newest first");
    assert_eq!(browser.complaints().len(), meanwhile.len(), "{:?}", browser.complaints());
    assert_asked_nobody_but(&base, &browser);
    // Nothing of the page outlives the service's shutdown.
    assert_eq!(inlet.terminate(std::time::Duration::from_secs(9)).await.1, Some(0));
}

async fn give(tab: &Tab<'_>, token: &str) {
    let fill = "document.querySelector('#token').value = ".to_owned() + &Value::from(token).to_string();
    tab.ask(&format!("{fill}; document.querySelector('#ask').requestSubmit()")).await;
}

#[tokio::test]
async fn the_page_asks_for_the_token_and_keeps_it_for_the_tab() {
    let mut simulator = quiet_simulator().await;
    let url = simulator.url();
    let mut settings = of_alpha(&url).to_vec();
    settings.push(("ADMIN_TOKEN", TOKEN));
    let inlet = Inlet::serve(&settings).await;
    inlet.ready().await;
    let base = inlet.url("/");
    let browser = Browser::start();
    let tab = browser.tab().await;
    tab.open(&base).await;
    tab.is("!document.querySelector('#ask').hidden && document.querySelector('#version').textContent").await;
    // Without the token it does not even try.
    assert!(browser.requests().iter().all(|(url, _)| !url.contains("/v1/") && !url.contains("/_debug/")));
    assert!(browser.complaints().is_empty(), "{:?}", browser.complaints());
    give(&tab, "a wrong one").await;
    tab.is("document.querySelector('#ask-why').textContent.includes('ADMIN_TOKEN')").await;
    let refused = browser.complaints();
    assert!(
        !refused.is_empty() && refused.iter().all(|complaint| complaint.text.contains("401")),
        "{refused:?}"
    );
    give(&tab, TOKEN).await;
    tab.is(IS_WELL).await;
    tab.is("document.querySelector('#channels').textContent === '#alpha'").await;
    simulator.say(&line("1", "for those who may see it"));
    tab.is(&format!("{SAID}.includes('for those who may see it')")).await;
    // The same tab knows it still, another one does not.
    tab.command("Page.reload", json!({})).await;
    tab.is("document.querySelector('#ask').hidden && document.querySelector('#channels').textContent === '#alpha'").await;
    let other = browser.tab().await;
    other.open(&base).await;
    other.is("!document.querySelector('#ask').hidden").await;
    assert_eq!(other.ask("document.querySelector('#lines').childElementCount").await, 0);
    assert_eq!(browser.complaints().len(), refused.len(), "{:?}", browser.complaints());
    assert_asked_nobody_but(&base, &browser);
}

const CHAT_TOKEN: &str = "a reader's t0ken";

/// How often `/_debug/twitch` was asked for with this token.
fn looks_inside(browser: &Browser, token: &str) -> usize {
    let bearer = format!("Bearer {token}");
    let asked = |(url, headers): &(String, Value)| {
        url.ends_with("/_debug/twitch") && headers["Authorization"] == bearer.as_str()
    };
    browser.requests().iter().filter(|request| asked(request)).count()
}

#[tokio::test]
async fn the_page_goes_on_after_what_is_no_envelope_and_asks_for_nothing_twice_that_its_token_does_not_open()
{
    let (nats, mut simulator) = (Nats::start().await, quiet_simulator().await);
    let (url, nats_url) = (simulator.url(), nats.url());
    let mut settings = of_alpha(&url).to_vec();
    settings.extend([("NATS_URL", nats_url.as_str()), ("ADMIN_TOKEN", TOKEN), ("STREAM_TOKEN", CHAT_TOKEN)]);
    let inlet = Inlet::serve(&settings).await;
    inlet.ready().await;
    let (browser, base) = (Browser::start(), inlet.url("/"));
    let tab = browser.tab().await;
    tab.open(&base).await;
    tab.is("!document.querySelector('#ask').hidden").await;
    give(&tab, CHAT_TOKEN).await;
    tab.is("document.querySelector('#empty').textContent.startsWith('Waiting')").await;
    simulator.say(&line("1", "before"));
    tab.is(&format!("{SAID}.includes('before')")).await;
    let context = nats.jetstream().await;
    for payload in ["null", "no JSON", r#"{"type":5}"#, r#"{"type":"x","user":null}"#] {
        context.publish("internal.ingress.v1", payload.into()).await.unwrap().await.unwrap();
    }
    simulator.say(&line("2", "after"));
    tab.is(&format!("{SAID}.includes('after')")).await;
    assert_eq!(tab.ask(&format!("{SAID}.length")).await, 2);

    // Who is kept out on purpose is nothing that was lost.
    let ignored = inlet.client().put(inlet.url("/admin/users/twitch:9/ignored")).bearer_auth(TOKEN);
    assert!(ignored.send().await.unwrap().status().is_success());
    let refused = "inlet_events_refused_total{reason=\"ignored\",source=\"twitch\"}";
    let mut said = 2;
    while inlet.metrics().await.sum(refused) == 0 {
        said += 1;
        assert!(said < 300, "they are never kept out");
        simulator.say(&line(&said.to_string(), "kept out"));
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    simulator.say(&line("last", "to be counted").replace("user-id=9", "user-id=10"));
    let published = inlet.quiet().await.sum("inlet_events_published_total").to_string();
    tab.is(&format!("document.querySelector('#published').textContent === '{published}'")).await;
    assert_eq!(tab.ask("document.querySelector('#lost').textContent").await, "0");
    tab.is("document.querySelector('#chart polyline').points.length > 2").await;
    assert_eq!(looks_inside(&browser, CHAT_TOKEN), 1, "{:?}", browser.complaints());
}

#[tokio::test]
async fn the_page_says_what_to_do_where_there_is_nothing_to_see() {
    let inlet = Inlet::serve(&[]).await;
    let browser = Browser::start();
    let tab = browser.tab().await;
    tab.open(&inlet.url("/")).await;
    tab.is("document.querySelector('#empty').textContent.includes('TWITCH_CHANNELS')").await;
    tab.is("document.querySelector('#empty').textContent.includes('inlet demo')").await;
    tab.is(IS_WELL).await;
    assert!(browser.complaints().is_empty(), "{:?}", browser.complaints());
}

/// The lowest contrast of any text against what lies behind it; colours are opaque here.
const LOWEST_CONTRAST: &str = "(() => {
  const light = (colour) => colour.match(/[\\d.]+/g).slice(0, 3).map((c) => c / 255)
    .map((c) => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4).reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
  const behind = (element) => {
    const colour = getComputedStyle(element).backgroundColor;
    return colour === 'rgba(0, 0, 0, 0)' && element.parentElement ? behind(element.parentElement) : colour;
  };
  const shown = [...document.querySelectorAll('body *')].filter((e) => e.checkVisibility() && [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()));
  return Math.min(...shown.map((element) => {
    const [a, b] = [light(getComputedStyle(element).color), light(behind(element))];
    return (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
  }));
})()";

/// The pictures go to the folder in `PAGE_PICTURES`, if it is set; `docs/page.png` is the one called `light.png`, made with
/// Debian's fonts-dejavu-core, fonts-noto-color-emoji and fonts-wqy-zenhei:
/// `PAGE_PICTURES=/tmp cargo nextest run --test it page::the_page_can_be_read`.
#[tokio::test]
async fn the_page_can_be_read_on_a_desk_on_a_phone_and_in_the_dark() {
    let simulator = Simulator::start(&[
        "--channels",
        "alpha,beta,gamma",
        "--rate",
        "12",
        "--users",
        "2000",
        "--zipf",
        "0.7",
        "--lifelike",
    ])
    .await;
    let url = simulator.url();
    let inlet = Inlet::serve(&[("TWITCH_CHANNELS", "alpha,beta,gamma"), ("TWITCH_IRC_URL", &url)]).await;
    inlet.settled(150).await;
    let browser = Browser::start();
    let tab = browser.tab().await;
    tab.open(&inlet.url("/")).await;
    tab.is(IS_WELL).await;
    tab.is("document.querySelectorAll('#lines li').length > 40").await;
    let pictures = std::env::var_os("PAGE_PICTURES").map(PathBuf::from);
    // For a picture worth showing it runs for a while.
    let points = if pictures.is_some() { 30 } else { 3 };
    tab.is(&format!("document.querySelector('#chart polyline').points.length > {points}")).await;
    for (name, width, height, scheme) in
        [("light", 1100, 760, "light"), ("dark", 1100, 760, "dark"), ("phone", 390, 844, "light")]
    {
        let size = json!({ "width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500 });
        tab.command("Emulation.setDeviceMetricsOverride", size).await;
        let media = json!({ "features": [{ "name": "prefers-color-scheme", "value": scheme }] });
        tab.command("Emulation.setEmulatedMedia", media).await;
        tab.is(&format!("matchMedia('(prefers-color-scheme: {scheme})').matches && innerWidth === {width}"))
            .await;
        assert_eq!(tab.ask("document.documentElement.scrollWidth <= innerWidth").await, true, "{name}");
        let contrast = tab.ask(LOWEST_CONTRAST).await.as_f64().unwrap();
        assert!(contrast >= 4.5, "{name}: {contrast}");
        let picture = tab.picture().await;
        assert!(picture.starts_with(b"\x89PNG"));
        if let Some(folder) = &pictures {
            std::fs::write(folder.join(format!("{name}.png")), picture).unwrap();
        }
    }
    // However much is said, the page stays small.
    tab.is("document.querySelectorAll('#lines li').length === 150").await;
    assert!(browser.complaints().is_empty(), "{:?}", browser.complaints());
}
