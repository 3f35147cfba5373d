//! `inlet login`, and the route it uses beside a service.

use std::io::Read as _;
use std::process::{Child, Stdio};

use super::*;
use crate::harness::free_port;
use crate::harness::inlet::command;
use crate::harness::oauth::{CLIENT_SECRET, Person, USER_CODE};

/// Settings of the command: where OAuth is, and the store.
fn settings(oauth: &OAuth, store: &[(&'static str, String)]) -> Vec<(&'static str, String)> {
    let own = [("TWITCH_OAUTH_URL", oauth.url()), ("TWITCH_CLIENT_ID", CLIENT_ID.to_owned())];
    own.into_iter().chain(store.iter().cloned()).collect()
}

/// Runs it to its end: exit code, standard output, standard error.
async fn login(settings: &[(&'static str, String)], flags: &[&str]) -> (Option<i32>, String, String) {
    let settings = settings.to_vec();
    let flags: Vec<_> = flags.iter().map(|&flag| flag.to_owned()).collect();
    let running = tokio::task::spawn_blocking(move || {
        let settings: Vec<_> = settings.iter().map(|(name, value)| (*name, value.as_str())).collect();
        let flags: Vec<_> = std::iter::once("login").chain(flags.iter().map(String::as_str)).collect();
        run(&flags, &settings)
    });
    let output = tokio::time::timeout(LONG, running).await.unwrap().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

fn assert_no_secret(oauth: &OAuth, said: &[&str]) {
    for secret in oauth.secrets() {
        assert!(said.iter().all(|said| !said.contains(&secret)), "{said:?}");
    }
}

fn in_folder(folder: &Path) -> Vec<(&'static str, String)> {
    vec![("DATA_DIR", folder.to_str().unwrap().to_owned())]
}

#[tokio::test]
async fn a_person_logs_in_and_the_service_reads_as_their_account_on_firestore() {
    let mut twitch = Twitch::start(&[]).await;
    let project = Project::new();
    let inlet = serve(&[twitch.settings(), in_firestore(&project)].concat()).await;
    joined_as(&inlet, "justinfan").await;
    let with_secret = [("TWITCH_CLIENT_SECRET", CLIENT_SECRET.to_owned())];
    let settings = [settings(&twitch.oauth, &in_firestore(&project)), with_secret.to_vec()].concat();
    let (code, out, err) = login(&settings, &[]).await;
    assert_eq!(code, Some(0), "{out}{err}");
    assert!(err.contains(USER_CODE) && err.contains("https://www.twitch.example/activate"), "{err}");
    assert!(out.contains(LOGIN) && out.contains("chat:read") && out.contains("oauth/twitch:bot"), "{out}");
    let newest = twitch.oauth.newest();
    let stored = document(&project).await.unwrap();
    let fields = &stored[DOCUMENT];
    assert_eq!(
        (&fields["accessToken"], &fields["refreshToken"]),
        (&json!(newest.access), &json!(newest.refresh))
    );
    assert_eq!((&fields["login"], &fields["userId"]), (&json!(LOGIN), &json!(USER_ID)));
    // Who did it is on record, the token is not.
    let audit = project.read_all("audit").await;
    let records: Vec<_> = audit.values().filter(|record| record["action"] == "inlet login").collect();
    assert_eq!(records.len(), 1, "{audit:?}");
    assert_eq!((&records[0]["outcome"], &records[0]["details"]["login"]), (&json!("done"), &json!(LOGIN)));
    assert_no_secret(&twitch.oauth, &[&format!("{audit:?}")]);
    // The service heard of it; who connects now is the account.
    token_is(&inlet, "validated", |token| token["lastValidatedAt"].is_string()).await;
    twitch.accept_only(&newest);
    joined_as(&inlet, LOGIN).await;
    assert_no_secret(&twitch.oauth, &[&out, &err]);
    assert_says_no_secret(&inlet, &twitch.oauth).await;
    // And once more, for machines.
    let (code, out, err) = login(&settings, &["--json"]).await;
    assert_eq!(code, Some(0), "{out}{err}");
    let told: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((&told["login"], &told["scopes"]), (&json!(LOGIN), &json!(["chat:read"])));
    assert!(told["expiresAt"].is_string() && told["document"] == "oauth/twitch:bot", "{told}");
    assert_no_secret(&twitch.oauth, &[&out, &err]);
}

#[tokio::test]
async fn beside_a_service_that_holds_the_embedded_store_it_goes_through_that() {
    let mut twitch = Twitch::start(&[]).await;
    let token = ("ADMIN_TOKEN", "open-sesame".to_owned());
    let inlet = serve(&[twitch.settings(), vec![token.clone()]].concat()).await;
    let page = || async {
        let request = inlet.client().get(inlet.url("/_debug/twitch")).bearer_auth("open-sesame");
        request.send().await.unwrap().json::<Value>().await.unwrap()
    };
    let service = ("INLET_URL", inlet.url(""));
    let mut settings = settings(&twitch.oauth, &in_folder(&inlet.data_dir()));
    settings.push(service);
    // Nobody goes through the flow for nothing.
    let (code, _, err) = login(&settings, &[]).await;
    assert_eq!(code, Some(78), "{err}");
    assert!(err.contains("ADMIN_TOKEN") && !err.contains(USER_CODE), "{err}");
    settings.push(token);
    let (code, out, err) = login(&settings, &[]).await;
    assert_eq!(code, Some(0), "{out}{err}");
    let newest = twitch.oauth.newest();
    within(LONG, "taken over", || async { (page().await["token"]["state"] == "ok").then_some(()) }).await;
    twitch.accept_only(&newest);
    within(LONG, "as the account", || async {
        let page = page().await;
        (page["account"] == LOGIN && page["state"] == "connected").then_some(())
    })
    .await;
    assert_no_secret(&twitch.oauth, &[&out, &err, &inlet.log()]);
    // It is still there after a restart.
    let folder = inlet.into_folder();
    let inlet = serve_in(folder, &twitch.settings()).await;
    joined_as(&inlet, LOGIN).await;
}

#[tokio::test]
async fn without_a_service_it_writes_the_embedded_store_itself() {
    let mut twitch = Twitch::start(&[]).await;
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    twitch.oauth.set_slow_downs(1);
    let began = Instant::now();
    let (code, out, err) = login(&settings(&twitch.oauth, &in_folder(&data)), &[]).await;
    assert_eq!(code, Some(0), "{out}{err}");
    assert!(began.elapsed() >= Duration::from_secs(7), "told to slow down, it did: {:?}", began.elapsed());
    twitch.accept_only(&twitch.oauth.newest());
    let inlet = serve_in(folder, &twitch.settings()).await;
    joined_as(&inlet, LOGIN).await;
    assert_no_secret(&twitch.oauth, &[&out, &err]);
    assert_says_no_secret(&inlet, &twitch.oauth).await;
}

#[tokio::test]
async fn whatever_goes_wrong_is_said_and_nothing_is_stored() {
    let oauth = OAuth::start().await;
    let folder = tempfile::tempdir().unwrap();
    let usual = settings(&oauth, &in_folder(folder.path()));
    let expect = async |settings: &[(&'static str, String)], code: i32, words: &str| {
        let (ended, out, err) = login(settings, &[]).await;
        assert_eq!(ended, Some(code), "{out}{err}");
        assert!(out.is_empty() && err.contains(words), "{words:?} in {out}{err}");
        assert_no_secret(&oauth, &[&out, &err]);
    };
    oauth.set_person(Person::Denies);
    expect(&usual, 1, "denied").await;
    oauth.set_person(Person::Waits);
    oauth.set_device_lifetime(3);
    expect(&usual, 1, "in time").await;
    oauth.set_person(Person::Approves(0));
    oauth.set_scopes(&["user:read:email"]);
    expect(&usual, 1, "chat:read").await;
    oauth.set_scopes(&["chat:read"]);
    let with = |name: &'static str, value: String| {
        let kept = usual.iter().filter(|(other, _)| *other != name).cloned();
        kept.chain([(name, value)]).collect::<Vec<_>>()
    };
    expect(&with("TWITCH_CLIENT_ID", "somebody-elses".to_owned()), 78, "TWITCH_CLIENT_ID").await;
    expect(&with("TWITCH_CLIENT_ID", String::new()), 78, "TWITCH_CLIENT_ID").await;
    expect(&with("TWITCH_OAUTH_URL", format!("http://127.0.0.1:{}", free_port())), 69, "no answer").await;
    for (mood, words) in
        [(Mood::Fails(503, None), "503"), (Mood::Hangs, "no answer"), (Mood::Babbles, "not what")]
    {
        oauth.set(mood);
        expect(&usual, 69, words).await;
    }
    oauth.set(Mood::Well);
    // A store that is away is known before anybody enters a code.
    let nowhere = format!("127.0.0.1:{}", free_port());
    expect(&with("FIRESTORE_EMULATOR_HOST", nowhere), 69, "store").await;
    // Nothing is there for a service to find.
    let twitch = Twitch::start(&[]).await;
    let data = folder.path().to_str().unwrap().to_owned();
    let started = [twitch.settings(), vec![("DATA_DIR", data)]].concat();
    let inlet = serve(&started).await;
    joined_as(&inlet, "justinfan").await;
}

fn said(child: &mut Child) -> String {
    let mut text = String::new();
    child.stderr.take().unwrap().read_to_string(&mut text).unwrap();
    text
}

#[tokio::test]
async fn an_interrupt_ends_it_cleanly() {
    let oauth = OAuth::start().await;
    oauth.set_person(Person::Waits);
    let folder = tempfile::tempdir().unwrap();
    let settings = settings(&oauth, &in_folder(folder.path()));
    let settings: Vec<_> = settings.iter().map(|(name, value)| (*name, value.as_str())).collect();
    let mut child = command(&["login"], &settings).stderr(Stdio::piped()).spawn().unwrap();
    within(LONG, "it asks", || async { (oauth.count("token", 400) >= 1).then_some(()) }).await;
    let killed = std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(killed.success());
    let status = within(LONG, "it ends", || {
        let status = child.try_wait().unwrap();
        async move { status }
    })
    .await;
    assert_eq!(status.code(), Some(1));
    assert!(said(&mut child).contains("nothing was stored"));
}

#[tokio::test]
async fn the_route_takes_a_token_and_nothing_else() {
    let oauth = OAuth::start().await;
    let inlet = serve(&[("ADMIN_TOKEN", "open-sesame".to_owned())]).await;
    let pair = oauth.issue();
    let good = pair.fields(14_400);
    let without = |name: &str| {
        let mut fields = good.clone();
        fields.as_object_mut().unwrap().remove(name);
        fields.to_string()
    };
    let ask = async |token: &str, body: String| {
        let request = inlet.client().post(inlet.url("/admin/login")).bearer_auth(token).body(body);
        let response = request.send().await.unwrap();
        (response.status().as_u16(), response.json::<Value>().await.unwrap_or_default())
    };
    for (token, body, status) in [
        ("open-sesam", good.to_string(), 401),
        ("open-sesame", String::new(), 400),
        ("open-sesame", format!("{{ \"accessToken\": \"{}\"", pair.access), 400),
        ("open-sesame", format!("\"{}\"", pair.access), 400),
        ("open-sesame", without("accessToken"), 400),
        ("open-sesame", without("login"), 400),
        ("open-sesame", without("userId"), 400),
        ("open-sesame", good.to_string() + &" ".repeat(16 * 1024), 413),
    ] {
        let (answered, answer) = ask(token, body.clone()).await;
        assert_eq!(answered, status, "{body}: {answer}");
        assert!(!answer.to_string().contains(&pair.access), "{answer}");
    }
    let request = inlet.client().get(inlet.url("/admin/login")).bearer_auth("open-sesame");
    assert_eq!(request.send().await.unwrap().status().as_u16(), 405);
    let (status, answer) = ask("open-sesame", good.to_string()).await;
    assert_eq!((status, answer), (200, json!({ "login": LOGIN, "userId": USER_ID, "inUse": true })));
    let log = inlet.log();
    assert!(!log.contains(&pair.access) && !log.contains(&pair.refresh), "{log}");
    // Of a service that has its token from the environment, it is said that this one is not used.
    let inlet = serve(&[
        ("TWITCH_BOT_USERNAME", LOGIN.to_owned()),
        ("TWITCH_BOT_ACCESS_TOKEN", "another".to_owned()),
    ])
    .await;
    let answer = inlet.client().post(inlet.url("/admin/login")).body(good.to_string()).send().await.unwrap();
    assert_eq!(answer.json::<Value>().await.unwrap()["inUse"], false);
}

#[tokio::test]
async fn the_route_says_when_the_store_is_away() {
    let nowhere = format!("127.0.0.1:{}", free_port());
    let inlet = serve(&[("FIRESTORE_EMULATOR_HOST", nowhere), ("ENRICH_MODE", "off".to_owned())]).await;
    let oauth = OAuth::start().await;
    let body = oauth.issue().fields(60).to_string();
    let response = inlet.client().post(inlet.url("/admin/login")).body(body).send().await.unwrap();
    assert_eq!(response.status().as_u16(), 503);
    assert_eq!(response.json::<Value>().await.unwrap()["error"]["code"], "audit_unavailable");
}
