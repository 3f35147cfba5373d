//! A channel is its room: who has its login is not enough. And what instances under one account share.

use super::*;
use crate::twitch::irc::Irc;

/// A channel that was added and whose room is known, as the store has it.
async fn stored(project: &Project, room: &str, login: &str) {
    let fields = json!({
        "login": { "stringValue": login },
        "addedAt": { "timestampValue": "2026-01-01T00:00:00Z" },
    });
    project.set(&format!("channels/{room}"), fields).await;
}

/// The state of a channel, and why.
async fn state(inlet: &Inlet, login: &str) -> Option<(String, String)> {
    let page = page(inlet).await;
    let channel =
        page["channels"].as_array().unwrap().iter().find(|channel| channel["name"] == login)?.clone();
    let text = |name: &str| channel[name].as_str().unwrap_or_default().to_owned();
    Some((text("state"), text("why")))
}

#[tokio::test]
async fn while_the_list_is_not_known_the_source_is_waited_for() {
    let project = Project::new();
    let proxy = Proxy::to(project.address().await).await;
    proxy.set(Mode::Cut);
    let own = settings(&[("ADMIN_TOKEN", TOKEN), ("ENRICH_MODE", "off")]);
    let inlet = Inlet::serve(&refs(&[own, firestore(&project, &proxy.addr().to_string())].concat())).await;
    let says_so =
        |line: &str| line.contains("channels cannot be followed") && line.contains("store_unavailable");
    eventually("it says why", || async { inlet.log().lines().any(says_so).then_some(()) }).await;
    assert_eq!(
        (&page(&inlet).await["state"], inlet.waiting_for().await),
        (&"connecting".into(), vec!["twitch".to_owned()])
    );
    proxy.set(Mode::Pass);
    inlet.ready().await;
    assert_eq!(page(&inlet).await["state"], "disabled");
    assert_eq!(inlet.log().lines().filter(|line| says_so(line)).count(), 1, "{}", inlet.log());
}

#[tokio::test]
async fn a_certain_room_is_waited_for_and_another_one_that_has_its_login_is_not_read() {
    let (irc, project, nats) = (Irc::start().await, Project::new(), Nats::start().await);
    stored(&project, "7", "alpha").await;
    // One that says nothing must not keep the rest from being read.
    project.set("channels/9", json!({ "login": { "integerValue": "9" } })).await;
    let own = settings(&[
        ("TWITCH_IRC_URL", &irc.url()),
        ("NATS_URL", &nats.url()),
        ("ADMIN_TOKEN", TOKEN),
        ("ENRICH_MODE", "off"),
    ]);
    let inlet = Inlet::serve(&refs(&[own, firestore(&project, &project.host())].concat())).await;
    eventually("it is asked for", || async { (irc.joined() == 1).then_some(()) }).await;
    let said = irc.say("alpha");
    inlet.settled(1).await;
    assert_eq!(state(&inlet, "alpha").await.unwrap().0, "wanted", "nobody said yet which room it is");
    irc.tell(
        "@id=other-1;room-id=8;user-id=1;display-name=X :x!x@x.tmi.twitch.tv PRIVMSG #alpha :not for us",
    );
    irc.tell("@room-id=8 :tmi.twitch.tv ROOMSTATE #alpha");
    eventually("it is another one", || async {
        (state(&inlet, "alpha").await? == ("failed".to_owned(), "other_room".to_owned())).then_some(())
    })
    .await;
    inlet.ready().await;
    let found = read(&nats.url(), "INLET").await;
    let ids: Vec<_> = found.iter().map(|message| message.body["payload"]["messageId"].clone()).collect();
    assert_eq!(ids, [said.as_str()]);
    assert!(inlet.log().contains("channel_changed"));
    let unreadable: Vec<_> =
        inlet.log().lines().filter(|line| line.contains("channels/9")).map(str::to_owned).collect();
    assert!(unreadable.len() == 1 && unreadable[0].contains("bad_stored_value"), "{unreadable:?}");
}

#[tokio::test]
async fn an_unreadable_document_is_written_over() {
    let (irc, project) = (Irc::start().await, Project::new());
    project.set("channels/login:alpha", json!({ "login": { "integerValue": "9" } })).await;
    let own = settings(&[("TWITCH_IRC_URL", &irc.url()), ("ADMIN_TOKEN", TOKEN), ("ENRICH_MODE", "off")]);
    let inlet = Inlet::serve(&refs(&[own, firestore(&project, &project.host())].concat())).await;
    inlet.ready().await;
    assert_eq!(add(&inlet, "alpha").await.0, 201);
    joined(&inlet, &["alpha"]).await;
    // A setting of another instance, which names it no more: nobody added it here.
    let of_others = json!({
        "login": { "stringValue": "gamma" }, "configuredAs": { "stringValue": "gamma" },
    });
    project.set("channels/5", of_others).await;
    assert_eq!(remove(&inlet, "gamma").await.0, 404);
}

#[tokio::test]
async fn being_put_out_of_a_channel_is_a_gap() {
    let nats = Nats::start().await;
    let mut simulator = Simulator::start(&["--channels", "alpha,beta", "--rate", "100"]).await;
    let own = settings(&[
        ("TWITCH_CHANNELS", "alpha,beta"),
        ("TWITCH_IRC_URL", &simulator.url()),
        ("NATS_URL", &nats.url()),
        ("ADMIN_TOKEN", TOKEN),
        ("ENRICH_MODE", "off"),
    ]);
    let inlet = Inlet::serve(&refs(&own)).await;
    joined(&inlet, &["alpha", "beta"]).await;
    simulator.say("put-out alpha");
    let gaps = with_gaps(&nats, 1).await;
    assert_eq!((&gaps[0]["channel"], &gaps[0]["cause"]), (&"alpha".into(), &"removed".into()));
    joined(&inlet, &["alpha", "beta"]).await;
    assert_eq!(numbers(&mut simulator).await["joins"]["received"], 3);
}

#[tokio::test]
async fn a_rename_that_one_instance_hears_of_is_followed_by_the_other() {
    let project = Project::new();
    let mut simulator = Simulator::start(&["--channels", "alpha,beta", "--rate", "20"]).await;
    let own =
        settings(&[("TWITCH_IRC_URL", &simulator.url()), ("ADMIN_TOKEN", TOKEN), ("ENRICH_MODE", "off")]);
    let other = [own, firestore(&project, &project.host())].concat();
    let one = [settings(&[("TWITCH_CHANNELS", "beta")]), other.clone()].concat();
    let (one, other) = (Inlet::serve(&refs(&one)).await, Inlet::serve(&refs(&other)).await);
    assert_eq!(add(&other, "alpha").await.0, 201);
    joined(&one, &["alpha", "beta"]).await;
    joined(&other, &["alpha"]).await;
    eventually("its room is known", || async {
        let documents = project.read_all("channels").await;
        (!documents.contains_key("login:alpha")).then_some(())
    })
    .await;
    simulator.say("rename alpha gamma");
    numbers(&mut simulator).await;
    // Only one of them is there to hear it.
    speak(&simulator, "gamma", "beta").await;
    joined(&one, &["beta", "gamma"]).await;
    joined(&other, &["gamma"]).await;
    let documents = eventually("it is written", || async {
        let documents = project.read_all("channels").await;
        documents.values().any(|fields| fields["login"] == "gamma").then_some(documents)
    })
    .await;
    let gamma: Vec<_> = documents.values().filter(|fields| fields["login"] == "gamma").collect();
    assert_eq!((gamma.len(), &gamma[0]["formerLogin"]), (1, &"alpha".into()), "{documents:?}");
}

/// Twitch's limit is the account's, and an instance knows its own JOINs alone.
#[tokio::test]
async fn instances_under_one_account_share_its_limit_of_joins() {
    let names: Vec<_> = (0..12).map(|n| format!("c{n:02}")).collect();
    let all = names.join(",");
    let mut simulator = Simulator::start(&["--channels", &all, "--rate", "20", "--join-limit", "20"]).await;
    let own = settings(&[
        ("TWITCH_CHANNELS", &all),
        ("TWITCH_IRC_URL", &simulator.url()),
        ("TWITCH_JOIN_RATE", "10"),
        ("ADMIN_TOKEN", TOKEN),
        ("ENRICH_MODE", "off"),
    ]);
    let instances = [Inlet::serve(&refs(&own)).await, Inlet::serve(&refs(&own)).await];
    let names: Vec<_> = names.iter().map(String::as_str).collect();
    for inlet in &instances {
        joined(inlet, &names).await;
    }
    let joins = &numbers(&mut simulator).await["joins"];
    assert_eq!((&joins["received"], &joins["vanished"]), (&24.into(), &0.into()));
    assert!(joins["most_in_10s"].as_u64().unwrap() <= 20, "{joins}");
}
