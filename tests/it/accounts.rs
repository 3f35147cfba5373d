//! The account that chat is read with: a token that expires, is rotated, is revoked, or cannot be asked about, while chat
//! goes on; and how a person logs in.

mod login;

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::harness::emulator::Documents;
use crate::harness::firestore::{Project, host};
use crate::harness::inlet::{Inlet, Simulator, run};
use crate::harness::oauth::{CLIENT_ID, LOGIN, Mood, OAuth, Pair, USER_ID};
use crate::harness::proxy::{Mode, Proxy};
use crate::harness::{eventually, within};

const CHANNEL: &str = "alpha";
/// Long enough for a token to be waited for, on a busy machine.
const LONG: Duration = Duration::from_mins(2);
const DOCUMENT: &str = "twitch:bot";

/// Twitch's chat and its OAuth.
struct Twitch {
    simulator: Simulator,
    oauth: OAuth,
}

impl Twitch {
    async fn start(flags: &[&str]) -> Self {
        let flags = [&["--channels", CHANNEL], flags].concat();
        Self { simulator: Simulator::start(&flags).await, oauth: OAuth::start().await }
    }

    /// Settings that find both; a public client's.
    fn settings(&self) -> Vec<(&'static str, String)> {
        vec![
            ("TWITCH_CHANNELS", CHANNEL.to_owned()),
            ("TWITCH_IRC_URL", self.simulator.url()),
            ("TWITCH_OAUTH_URL", self.oauth.url()),
            ("TWITCH_CLIENT_ID", CLIENT_ID.to_owned()),
            ("IRC_RECONNECT_INITIAL_MS", "20".to_owned()),
        ]
    }

    /// From now on lets in who shows this token, and nobody who did before.
    fn accept_only(&mut self, pair: &Pair) {
        self.simulator.say(&format!("accept-tokens {}", pair.access));
        self.simulator.say("drop");
    }
}

async fn serve(settings: &[(&str, String)]) -> Inlet {
    serve_in(tempfile::tempdir().unwrap(), settings).await
}

async fn serve_in(folder: tempfile::TempDir, settings: &[(&str, String)]) -> Inlet {
    let settings: Vec<_> = settings.iter().map(|(name, value)| (*name, value.as_str())).collect();
    Inlet::serve_in(folder, &settings).await
}

/// Settings of a store in this project.
fn in_firestore(project: &Project) -> Vec<(&'static str, String)> {
    vec![("GOOGLE_CLOUD_PROJECT", project.id.clone()), ("FIRESTORE_EMULATOR_HOST", host())]
}

/// Waits until the page says what is wanted of the token.
async fn token_is(inlet: &Inlet, what: &str, is_wanted: impl Fn(&Value) -> bool) -> Value {
    within(LONG, what, || async {
        let (_, page) = inlet.json("/_debug/twitch").await;
        is_wanted(&page["token"]).then_some(page)
    })
    .await
}

async fn state_is(inlet: &Inlet, state: &str) -> Value {
    token_is(inlet, state, |token| token["state"] == state).await
}

async fn joined_as(inlet: &Inlet, login: &str) {
    within(LONG, "joined", || async {
        let (_, page) = inlet.json("/_debug/twitch").await;
        let is_joined = page["state"] == "connected" && page["channels"][0]["state"] == "joined";
        (is_joined && page["account"].as_str().is_some_and(|account| account.starts_with(login)))
            .then_some(())
    })
    .await;
}

/// Nothing that was ever a secret stands in the log or on a page.
async fn assert_says_no_secret(inlet: &Inlet, oauth: &OAuth) {
    let mut said = inlet.log();
    for page in ["/_debug/twitch", "/_debug/config", "/healthz", "/metrics"] {
        said += &inlet.get(page).await.unwrap().text().await.unwrap();
    }
    for secret in oauth.secrets() {
        assert!(!said.contains(&secret), "{secret} is said:\n{said}");
    }
}

async fn document(project: &Project) -> Option<Documents> {
    let documents = project.read_all("oauth").await;
    documents.contains_key(DOCUMENT).then_some(documents)
}

#[tokio::test]
async fn a_connection_survives_every_refresh_without_a_gap_and_the_next_one_has_the_newest_token() {
    let mut twitch = Twitch::start(&["--rate", "100", "--count", "2500"]).await;
    twitch.oauth.set_lifetime(Duration::from_secs(8));
    let project = Project::new();
    project.write("oauth", DOCUMENT, twitch.oauth.issue().fields(8)).await;
    let inlet = serve(&[twitch.settings(), in_firestore(&project)].concat()).await;
    joined_as(&inlet, LOGIN).await;
    within(LONG, "two refreshes", || async { (twitch.oauth.count("token", 200) >= 2).then_some(()) }).await;
    twitch.oauth.set_lifetime(Duration::from_hours(4));
    let refreshed = twitch.oauth.count("token", 200);
    within(LONG, "a last one", || async { (twitch.oauth.count("token", 200) > refreshed).then_some(()) })
        .await;
    let newest = twitch.oauth.newest();
    // What is stored is what was got last, in full.
    let stored = within(LONG, "it is stored", || async {
        let stored = document(&project).await?.remove(DOCUMENT)?;
        (stored["refreshToken"] == newest.refresh).then_some(stored)
    })
    .await;
    assert_eq!(stored["accessToken"], newest.access);
    assert_eq!((&stored["expiresIn"], &stored["scope"]), (&json!(14_400), &json!(["chat:read"])));
    assert_eq!((&stored["login"], &stored["userId"]), (&json!(LOGIN), &json!(USER_ID)));
    assert!(stored["obtainmentTimestamp"].as_i64().unwrap() > 1_700_000_000_000, "Unix milliseconds");
    // The one connection was there all the time.
    let (_, page) = inlet.json("/_debug/twitch").await;
    assert_eq!((&page["reconnects"], &page["connections"][0]["id"]), (&json!(0), &json!(1)), "{page}");
    assert_eq!(twitch.oauth.count("token", 400), 0);
    let sent = twitch.simulator.has_finished(2_500).await;
    let metrics = inlet.settled(sent.len() as u64).await;
    assert_eq!(metrics.get("inlet_events_received_total{source=\"twitch\"}"), sent.len() as u64);
    assert_eq!(metrics.get("inlet_events_published_total{source=\"gap\"}"), 0);
    metrics.assert_account_closes();
    // And whoever connects now shows the newest one.
    twitch.accept_only(&newest);
    token_is(&inlet, "reconnected", |_| inlet.log().matches("connected to Twitch").count() >= 2).await;
    joined_as(&inlet, LOGIN).await;
    assert!(!inlet.log().contains("Twitch refuses the login"), "{}", inlet.log());
    assert_says_no_secret(&inlet, &twitch.oauth).await;
}

#[tokio::test]
async fn a_new_token_is_stored_before_it_is_used() {
    let mut twitch = Twitch::start(&[]).await;
    let project = Project::new();
    let proxy = Proxy::to(project.address().await).await;
    let first = twitch.oauth.issue();
    project.write("oauth", DOCUMENT, first.fields(14_400)).await;
    let mut settings = [twitch.settings(), in_firestore(&project)].concat();
    settings.retain(|(name, _)| *name != "FIRESTORE_EMULATOR_HOST");
    settings.push(("FIRESTORE_EMULATOR_HOST", proxy.addr().to_string()));
    let inlet = serve(&settings).await;
    joined_as(&inlet, LOGIN).await;
    // Twitch takes the token no more; the next one is issued while the store is lost.
    twitch.oauth.set(Mood::Late(Duration::from_secs(2)));
    twitch.oauth.expire_all();
    twitch.simulator.say("accept-tokens none-so-far");
    twitch.simulator.say("drop");
    within(LONG, "the refresh is under way", || async {
        document(&project).await?[DOCUMENT].get("refreshingBy")?.is_string().then_some(())
    })
    .await;
    proxy.set(Mode::Cut);
    let page = state_is(&inlet, "degraded").await;
    assert_eq!(page["token"]["lastError"]["code"], "store_unavailable", "{page}");
    let newest = twitch.oauth.newest();
    assert_ne!(newest, first);
    assert_eq!(inlet.json("/healthz").await.1["status"], "degraded");
    let stored = document(&project).await.unwrap();
    assert_eq!(stored[DOCUMENT]["refreshToken"], first.refresh);
    // It would be let in with the new one, and does not try.
    let logins = inlet.log().matches("connected to Twitch").count();
    twitch.simulator.say(&format!("accept-tokens {}", newest.access));
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(inlet.log().matches("connected to Twitch").count(), logins);
    proxy.set(Mode::Pass);
    state_is(&inlet, "ok").await;
    within(LONG, "connected again", || async {
        (inlet.log().matches("connected to Twitch").count() > logins).then_some(())
    })
    .await;
    joined_as(&inlet, LOGIN).await;
    assert_eq!(document(&project).await.unwrap()[DOCUMENT]["refreshToken"], newest.refresh);
    assert_eq!(twitch.oauth.count("token", 200), 1);
    assert_says_no_secret(&inlet, &twitch.oauth).await;
}

#[tokio::test]
async fn two_instances_that_refresh_at_once_end_with_one_valid_token() {
    let twitch = Twitch::start(&[]).await;
    let project = Project::new();
    // Expired: each wants a new one as soon as it starts. Each refresh token can be used once.
    twitch.oauth.set(Mood::Late(Duration::from_millis(500)));
    let mut expired = twitch.oauth.issue().fields(60);
    expired["obtainmentTimestamp"] = json!(1_700_000_000_000_i64);
    project.write("oauth", DOCUMENT, expired).await;
    let settings = [twitch.settings(), in_firestore(&project)].concat();
    let (one, two) = tokio::join!(serve(&settings), serve(&settings));
    for inlet in [&one, &two] {
        joined_as(inlet, LOGIN).await;
        let page = state_is(inlet, "ok").await;
        assert_eq!(page["token"]["login"], LOGIN, "{page}");
    }
    assert_eq!((twitch.oauth.count("token", 200), twitch.oauth.count("token", 400)), (1, 0));
    let stored = document(&project).await.unwrap();
    assert_eq!(stored[DOCUMENT]["refreshToken"], twitch.oauth.newest().refresh);
    assert!(stored[DOCUMENT]["refreshingBy"].is_null(), "the claim is gone");
    // Again, by what both hear at once: Twitch takes the token no more.
    twitch.oauth.expire_all();
    let mut twitch = twitch;
    twitch.simulator.say("accept-tokens none-so-far");
    twitch.simulator.say("drop");
    within(LONG, "the next token", || async { (twitch.oauth.count("token", 200) >= 2).then_some(()) }).await;
    twitch.simulator.say("accept-tokens off");
    for inlet in [&one, &two] {
        within(LONG, "with the new one", || async {
            let (_, page) = inlet.json("/_debug/twitch").await;
            (page["state"] == "connected" && page["token"]["state"] == "ok").then_some(())
        })
        .await;
        assert_says_no_secret(inlet, &twitch.oauth).await;
    }
    assert_eq!(twitch.oauth.count("token", 400), 0, "no refresh token was used twice");
    eventually("the newest one is stored", || async {
        let stored = document(&project).await?;
        (stored[DOCUMENT]["refreshToken"] == twitch.oauth.newest().refresh).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_claim_that_a_crash_left_is_waited_for_and_no_longer() {
    let twitch = Twitch::start(&[]).await;
    let claimed = async |until: i64| {
        let project = Project::new();
        let mut fields = twitch.oauth.issue().fields(60);
        fields["obtainmentTimestamp"] = json!(1_700_000_000_000_i64);
        (fields["refreshingBy"], fields["refreshingUntil"]) = (json!("one-that-is-gone"), json!(until));
        project.write("oauth", DOCUMENT, fields).await;
        project
    };
    let now = inlet::clock::system_milliseconds();
    let began = Instant::now();
    // Even if the clock of whoever left it was wrong by hours.
    let (old, fresh) = (claimed(now - 300_000).await, claimed(now + 7_200_000).await);
    let in_old = serve(&[twitch.settings(), in_firestore(&old)].concat()).await;
    let in_fresh = serve(&[twitch.settings(), in_firestore(&fresh)].concat()).await;
    token_is(&in_old, "refreshed", |token| token["lastRefreshedAt"].is_string()).await;
    token_is(&in_fresh, "refreshed", |token| token["lastRefreshedAt"].is_string()).await;
    assert!(began.elapsed() >= Duration::from_secs(20), "{:?}", began.elapsed());
    assert_eq!(twitch.oauth.count("token", 200), 2);
}

#[tokio::test]
async fn a_revoked_token_is_said_once_and_chat_goes_on_until_a_person_logs_in() {
    let twitch = Twitch::start(&["--rate", "20"]).await;
    let project = Project::new();
    let mut fields = twitch.oauth.issue().fields(14_400);
    twitch.oauth.revoke_all();
    let inlet = serve(&[twitch.settings(), in_firestore(&project)].concat()).await;
    joined_as(&inlet, "justinfan").await;
    // It comes while chat is read without one, and is found to be revoked.
    fields["scope"] = json!([]);
    project.write("oauth", DOCUMENT, fields).await;
    let page = state_is(&inlet, "login_failed").await;
    assert_eq!(page["token"]["lastError"]["code"], "login_failed", "{page}");
    assert_eq!(page["state"], "connected", "the connection is left alone");
    let (status, health) = inlet.json("/healthz").await;
    assert_eq!((status, &health["status"]), (200, &json!("degraded")));
    assert_eq!(health["parts"]["twitch"]["token"], "login_failed");
    inlet.ready().await;
    let said = inlet.log().lines().filter(|line| line.contains("run `inlet login`")).count();
    assert_eq!(said, 1, "{}", inlet.log());
    // Another instance, or `inlet login`, stored a new one: this one takes it.
    project.write("oauth", DOCUMENT, twitch.oauth.issue().fields(14_400)).await;
    let page = token_is(&inlet, "validated", |token| token["lastValidatedAt"].is_string()).await;
    assert_eq!((&page["token"]["state"], &page["token"]["login"]), (&json!("ok"), &json!(LOGIN)), "{page}");
    assert_eq!(inlet.json("/healthz").await.1["status"], "ok");
    assert_says_no_secret(&inlet, &twitch.oauth).await;
}

#[tokio::test]
async fn an_outage_backs_off_shows_and_does_not_touch_chat() {
    // 500s, a hang, nonsense, and a wish to be asked later: each on a service of its own, at the same time.
    let moods = [Mood::Fails(500, None), Mood::Hangs, Mood::Babbles, Mood::Fails(429, Some(3_600))];
    let outage = async |mood: Mood| {
        let twitch = Twitch::start(&["--rate", "20"]).await;
        twitch.oauth.set(mood);
        let pair = twitch.oauth.issue();
        let mut settings = twitch.settings();
        settings.extend([
            ("TWITCH_BOT_USERNAME", LOGIN.to_owned()),
            ("TWITCH_BOT_ACCESS_TOKEN", pair.access.clone()),
            ("TWITCH_BOT_REFRESH_TOKEN", pair.refresh.clone()),
        ]);
        let inlet = serve(&settings).await;
        joined_as(&inlet, LOGIN).await;
        let page = state_is(&inlet, "degraded").await;
        assert_eq!(page["token"]["lastError"]["code"], "oauth_unavailable", "{mood:?} {page}");
        assert_eq!(inlet.json("/healthz").await.1["status"], "degraded");
        inlet.ready().await;
        let received = inlet.metrics().await.sum("inlet_events_received_total");
        // The real clock, for as long as a test may take: 30 s is the shortest wait, less its jitter.
        tokio::time::sleep(Duration::from_secs(18)).await;
        assert_eq!(twitch.oauth.asked().len(), 1, "{mood:?}");
        assert!(inlet.metrics().await.sum("inlet_events_received_total") > received + 100, "chat goes on");
        (twitch, inlet)
    };
    let [failing, hanging, babbling, limiting] = moods;
    let mut all = tokio::join!(outage(failing), outage(hanging), outage(babbling), outage(limiting));
    for (twitch, _) in [&all.0, &all.1, &all.2, &all.3] {
        twitch.oauth.set(Mood::Well);
    }
    for (_, inlet) in [&all.0, &all.1, &all.2] {
        state_is(inlet, "ok").await;
    }
    // Who asked for an hour has it.
    assert_eq!(state_is(&all.3.1, "degraded").await["state"], "connected");
    assert_eq!(all.3.0.oauth.asked().len(), 1);
    for (twitch, inlet) in [&mut all.0, &mut all.1, &mut all.2, &mut all.3] {
        assert_says_no_secret(inlet, &twitch.oauth).await;
    }
}

#[tokio::test]
async fn a_login_that_chat_refuses_again_and_again_does_not_spin() {
    let mut twitch = Twitch::start(&[]).await;
    let project = Project::new();
    project.write("oauth", DOCUMENT, twitch.oauth.issue().fields(14_400)).await;
    twitch.simulator.say("refuse-login unsuccessful");
    let inlet = serve(&[twitch.settings(), in_firestore(&project)].concat()).await;
    let began = Instant::now();
    within(LONG, "refused with the next token too", || async {
        (inlet.log().matches("Twitch refuses the login").count() >= 2).then_some(())
    })
    .await;
    // Refreshed once because of the refusal, before or after it was validated, and then waited for.
    let rest = Duration::from_secs(15).saturating_sub(began.elapsed());
    tokio::time::sleep(rest).await;
    assert_eq!(twitch.oauth.count("token", 200), 1);
    assert!(twitch.oauth.asked().len() <= 2, "{:?}", twitch.oauth.asked());
    twitch.simulator.say("refuse-login off");
    joined_as(&inlet, LOGIN).await;
    state_is(&inlet, "ok").await;
    assert!(twitch.oauth.asked().len() <= 6);
}

fn kept_file(folder: &Path) -> std::path::PathBuf {
    folder.join("data").join("twitch-token.json")
}

#[tokio::test]
async fn the_environments_token_is_rotated_in_the_data_dir_until_the_environment_changes() {
    use std::os::unix::fs::PermissionsExt as _;
    let mut twitch = Twitch::start(&[]).await;
    twitch.oauth.set_confidential();
    let given = |pair: &Pair, twitch: &Twitch| {
        let mut settings = twitch.settings();
        settings.extend([
            ("TWITCH_BOT_USERNAME", LOGIN.to_owned()),
            ("TWITCH_BOT_ACCESS_TOKEN", format!("oauth:{}", pair.access)),
            ("TWITCH_BOT_REFRESH_TOKEN", pair.refresh.clone()),
            ("TWITCH_CLIENT_SECRET", crate::harness::oauth::CLIENT_SECRET.to_owned()),
        ]);
        settings
    };
    let first = twitch.oauth.issue();
    twitch.oauth.expire_all();
    let inlet = serve(&given(&first, &twitch)).await;
    token_is(&inlet, "refreshed", |token| token["lastRefreshedAt"].is_string()).await;
    let second = twitch.oauth.newest();
    assert_ne!(first, second);
    let page = state_is(&inlet, "ok").await;
    assert_eq!(page["token"]["source"], "environment");
    assert_says_no_secret(&inlet, &twitch.oauth).await;
    let folder = inlet.into_folder();
    let file = kept_file(folder.path());
    assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    assert!(std::fs::read_to_string(&file).unwrap().contains(&second.refresh));
    // The next run has the same environment, whose refresh token is spent, and goes on with what was kept.
    twitch.accept_only(&second);
    let inlet = serve_in(folder, &given(&first, &twitch)).await;
    joined_as(&inlet, LOGIN).await;
    state_is(&inlet, "ok").await;
    assert_eq!(twitch.oauth.count("token", 400), 0);
    // Whoever changes the environment means the new token.
    let third = twitch.oauth.issue();
    let folder = inlet.into_folder();
    twitch.accept_only(&third);
    let inlet = serve_in(folder, &given(&third, &twitch)).await;
    joined_as(&inlet, LOGIN).await;
    assert_eq!(twitch.oauth.count("token", 200), 1);
    assert_says_no_secret(&inlet, &twitch.oauth).await;
}

#[tokio::test]
async fn a_token_without_its_login_or_its_time_is_asked_about_first() {
    let twitch = Twitch::start(&[]).await;
    let project = Project::new();
    // As twurple's own examples write it.
    let pair = twitch.oauth.issue();
    let fields = json!({
        "accessToken": pair.access, "refreshToken": pair.refresh, "expiresIn": 0, "obtainmentTimestamp": 0,
    });
    project.write("oauth", DOCUMENT, fields).await;
    let inlet = serve(&[twitch.settings(), in_firestore(&project)].concat()).await;
    joined_as(&inlet, LOGIN).await;
    let (_, page) = inlet.json("/_debug/twitch").await;
    assert!(page["token"]["expiresAt"].is_string() && page["token"]["userId"] == USER_ID, "{page}");
    assert!(!inlet.log().contains("justinfan"), "{}", inlet.log());
}

#[tokio::test]
async fn a_document_that_holds_no_token_is_said_and_chat_is_read_all_the_same() {
    let twitch = Twitch::start(&[]).await;
    let project = Project::new();
    project.write("oauth", DOCUMENT, json!({ "accessToken": "two words", "login": LOGIN })).await;
    let inlet = serve(&[twitch.settings(), in_firestore(&project)].concat()).await;
    joined_as(&inlet, "justinfan").await;
    let page = state_is(&inlet, "login_failed").await;
    assert_eq!(page["token"]["lastError"]["code"], "token_unusable", "{page}");
    assert_eq!(inlet.log().matches("the stored token cannot be used").count(), 1);
    assert!(twitch.oauth.asked().is_empty() && !inlet.log().contains("two words"));
    project.write("oauth", DOCUMENT, twitch.oauth.issue().fields(14_400)).await;
    state_is(&inlet, "ok").await;
}

#[test]
fn settings_that_make_no_sense_together_are_said_all_at_once() {
    let environment = [
        ("TWITCH_BOT_REFRESH_TOKEN", "hush-hush"),
        ("TWITCH_CLIENT_SECRET", "hush-hush"),
        ("TWITCH_TOKEN_DOC", "oauth/twitch/bot"),
        ("TWITCH_OAUTH_URL", "id.twitch.tv"),
    ];
    let output = run(&["serve"], &environment);
    assert_eq!(output.status.code(), Some(78));
    let said = String::from_utf8_lossy(&output.stderr);
    for (name, _) in environment {
        assert!(said.contains(name), "{name} in {said}");
    }
    assert!(!said.contains("hush"), "{said}");
}

#[tokio::test]
async fn the_metrics_tell_when_the_token_expires_and_how_twitch_answers() {
    let twitch = Twitch::start(&[]).await;
    let project = Project::new();
    project.write("oauth", DOCUMENT, twitch.oauth.issue().fields(14_400)).await;
    let inlet = serve(&[twitch.settings(), in_firestore(&project)].concat()).await;
    token_is(&inlet, "validated", |token| token["lastValidatedAt"].is_string()).await;
    let metrics = eventually("counted", || async {
        let metrics = inlet.metrics().await;
        (metrics.get("inlet_twitch_oauth_requests_total{op=\"validate\",result=\"ok\"}") == 1)
            .then_some(metrics)
    })
    .await;
    let expires_at = i64::try_from(metrics.get("inlet_twitch_token_expires_at_seconds")).unwrap();
    let expires_in = expires_at - inlet::clock::system_milliseconds() / 1_000;
    assert!((14_000..=14_400).contains(&expires_in), "{expires_in}");
}
