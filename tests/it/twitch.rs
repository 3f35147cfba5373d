//! Chat over many connections, through everything that can happen to them: what is missed is said, what a history
//! service knows is filled in, and nothing comes twice.

mod backfill;
mod history;
pub mod irc;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use inlet::clock::system_milliseconds;
use jiff::Timestamp;
use serde_json::Value;

use crate::harness::inlet::{Inlet, Simulator};
use crate::harness::nats::Nats;
use crate::harness::proxy::{Mode, Proxy};
use crate::harness::stream::{InStream, read};
use crate::harness::{eventually, within};
use irc::Irc;

const GAP: &str = "internal.source.gap.v1";
const CHAT: &str = "inlet_events_received_total{source=\"twitch\"}";

fn names(prefix: &str, count: usize) -> Vec<String> {
    (0..count).map(|n| format!("{prefix}{n:03}")).collect()
}

async fn serve(irc: &str, nats: &Nats, channels: &str, more: &[(&str, &str)]) -> Inlet {
    serve_in(tempfile::tempdir().unwrap(), irc, nats, channels, more).await
}

async fn serve_in(
    folder: tempfile::TempDir,
    irc: &str,
    nats: &Nats,
    channels: &str,
    more: &[(&str, &str)],
) -> Inlet {
    let url = nats.url();
    let mut settings = vec![
        ("TWITCH_CHANNELS", channels),
        ("TWITCH_IRC_URL", irc),
        ("NATS_URL", url.as_str()),
        ("ENRICH_MODE", "off"),
    ];
    settings.extend(more);
    Inlet::serve_in(folder, &settings).await
}

/// The gap events of a stream.
fn gaps(found: &[InStream]) -> Vec<&Value> {
    found.iter().filter(|message| message.body["type"] == GAP).map(|message| &message.body).collect()
}

/// The ids of the chat messages of a stream, each once.
fn chat(found: &[InStream]) -> BTreeSet<String> {
    let ids: BTreeSet<_> = found.iter().map(|message| &message.msg_id).collect();
    assert_eq!(ids.len(), found.len(), "every Nats-Msg-Id once");
    let chat: Vec<_> =
        found.iter().filter_map(|message| message.body["payload"]["messageId"].as_str()).collect();
    let unique: BTreeSet<_> = chat.iter().map(|id| (*id).to_owned()).collect();
    assert_eq!(unique.len(), chat.len(), "every message once");
    unique
}

/// Waits until the stream holds so many gap events.
async fn with_gaps(nats: &Nats, count: usize) -> Vec<InStream> {
    within(Duration::from_mins(2), "the gap events", || async {
        let found = read(&nats.url(), "INLET").await;
        (gaps(&found).len() >= count).then_some(found)
    })
    .await
}

fn channels_of(gaps: &[&Value]) -> BTreeSet<String> {
    let channels: Vec<_> =
        gaps.iter().map(|gap| gap["payload"]["channel"].as_str().unwrap().to_owned()).collect();
    let unique: BTreeSet<_> = channels.iter().cloned().collect();
    assert_eq!(unique.len(), channels.len(), "one gap for each channel");
    unique
}

/// A time of the payload, Unix milliseconds.
fn time(gap: &Value, name: &str) -> i64 {
    gap["payload"][name].as_str().unwrap().parse::<Timestamp>().unwrap().as_millisecond()
}

/// A gap event keeps its form.
fn assert_form(gap: &Value) {
    let schema: Value = serde_json::from_str(include_str!("../../docs/envelope-v1.schema.json")).unwrap();
    let validator = jsonschema::validator_for(&schema).unwrap();
    let problems: Vec<_> = validator.iter_errors(gap).map(|error| error.to_string()).collect();
    assert!(problems.is_empty(), "{problems:?} in {gap}");
    assert_eq!(gap["source"]["platform"], "twitch");
    assert_eq!(gap["source"]["channel"], gap["payload"]["channel"]);
    assert_eq!(gap["occurredAt"], gap["payload"]["to"]);
    let key = gap["idempotencyKey"].as_str().unwrap();
    let payload = &gap["payload"];
    let (channel, from) = (payload["channel"].as_str().unwrap(), payload["from"].as_str().unwrap());
    assert!(key.ends_with(&format!(":{channel}:{from}")), "{key}");
}

fn most_in_ten_seconds(times: &[Instant]) -> usize {
    let within = |start: Instant| {
        times.iter().filter(|at| **at >= start && **at - start < Duration::from_secs(10)).count()
    };
    times.iter().map(|at| within(*at)).max().unwrap_or(0)
}

/// Waits until the limit of JOINs has forgotten the last ones.
async fn joins_may_go(irc: &Irc) {
    eventually("the limit of JOINs has forgotten", || async {
        let last = irc.joins().last().unwrap().0;
        (last.elapsed() > Duration::from_millis(10_500)).then_some(())
    })
    .await;
}

#[tokio::test]
async fn three_hundred_channels_are_joined_within_the_limit() {
    let (irc, nats) = (Irc::start().await, Nats::start().await);
    let inlet = serve(&irc.url(), &nats, &names("c", 300).join(","), &[]).await;
    eventually("the channels alone are waited for", || async {
        (inlet.waiting_for().await == ["twitch"]).then_some(())
    })
    .await;
    within(Duration::from_mins(3), "all are joined", || async { (irc.joined() == 300).then_some(()) }).await;
    inlet.ready().await;
    let joins = irc.joins();
    let times: Vec<_> = joins.iter().map(|(at, ..)| *at).collect();
    assert_eq!(joins.len(), 300, "each was asked for once");
    assert_eq!(most_in_ten_seconds(&times), 20, "in no ten seconds more, and no fewer than allowed");
    let taken = times[299] - times[0];
    println!("300 channels joined in {taken:?}, 20 in ten seconds at most");
    let standing = irc.standing();
    assert_eq!(standing.len(), 4);
    assert!(standing.values().all(|channels| channels.len() <= 90));
    let (_, page) = inlet.json("/_debug/twitch").await;
    let connections = page["connections"].as_array().unwrap();
    let joined: u64 = connections.iter().map(|connection| connection["joined"].as_u64().unwrap()).sum();
    assert_eq!((connections.len(), joined), (4, 300));
    assert!(page["channels"].as_array().unwrap().iter().all(|channel| channel["connection"].is_u64()));
    assert_eq!(inlet.metrics().await.get("inlet_twitch_channels{state=\"joined\"}"), 300);
    // New channels have no gap.
    assert!(gaps(&read(&nats.url(), "INLET").await).is_empty());
}

#[tokio::test]
async fn logins_keep_to_their_limit_however_often_they_are_cut_off() {
    let (irc, nats) = (Irc::start().await, Nats::start().await);
    irc.set_hasty();
    let waits = [("IRC_RECONNECT_INITIAL_MS", "1"), ("IRC_RECONNECT_MAX_MS", "1")];
    let inlet = serve(&irc.url(), &nats, "alpha", &waits).await;
    eventually("more logins than ten seconds allow", || async { (irc.logins().len() > 25).then_some(()) })
        .await;
    assert_eq!(most_in_ten_seconds(&irc.logins()), 20);
    assert_eq!(inlet.json("/livez").await.0, 200);
}

#[tokio::test]
async fn a_request_to_reconnect_loses_nothing_and_doubles_nothing() {
    let nats = Nats::start().await;
    let channels = names("ch", 20).join(",");
    let mut simulator =
        Simulator::start(&["--channels", &channels, "--rate", "500", "--count", "10000"]).await;
    let inlet = serve(&simulator.url(), &nats, &channels, &[]).await;
    // Until the limit has forgotten the first JOINs.
    simulator.has_sent(6_000).await;
    simulator.say("reconnect");
    let sent = simulator.has_finished(10_000).await;
    // Until the first channel is joined nobody is there; the log tells.
    let sent: BTreeSet<_> = sent.into_iter().map(|(_, id)| id).collect();
    let page = eventually("one connection again", || async {
        let (_, page) = inlet.json("/_debug/twitch").await;
        (page["connections"].as_array().unwrap().len() == 1).then_some(page)
    })
    .await;
    assert_eq!((&page["reconnects"], &page["connections"][0]["joined"]), (&1.into(), &20.into()), "{page}");
    let metrics = inlet.settled(sent.len() as u64).await;
    metrics.assert_account_closes();
    assert!(metrics.sum("inlet_events_duplicate_total") > 0, "both were read");
    let found = read(&nats.url(), "INLET").await;
    let chat = chat(&found);
    let missing: Vec<_> = sent.difference(&chat).take(5).collect();
    assert_eq!((chat.len(), missing), (sent.len(), vec![]));
    assert!(gaps(&found).is_empty(), "nothing was missed");
}

#[tokio::test]
async fn channels_that_come_too_late_after_a_request_to_reconnect_each_have_a_gap() {
    let (irc, nats) = (Irc::start().await, Nats::start().await);
    let channels = names("c", 90);
    let rate = [("TWITCH_JOIN_RATE", "45")];
    let inlet = serve(&irc.url(), &nats, &channels.join(","), &rate).await;
    within(Duration::from_mins(1), "all are joined", || async { (irc.joined() == 90).then_some(()) }).await;
    let busy: BTreeSet<_> = channels.iter().rev().take(10).cloned().collect();
    for channel in &busy {
        (0..5).for_each(|_| drop(irc.say(channel)));
    }
    inlet.settled(50).await;
    joins_may_go(&irc).await;
    let asked_at = system_milliseconds();
    let old = irc.ask_to_reconnect();
    let on_new = |joins: &[(Instant, u64, String)]| {
        let new = joins.iter().filter(|(_, connection, _)| !old.contains(connection));
        new.map(|(.., channel)| channel.clone()).collect::<BTreeSet<_>>()
    };
    let in_time = eventually("the first half is joined", || async {
        let joined = on_new(&irc.joins());
        (joined.len() >= 45).then_some(joined)
    })
    .await;
    assert!(in_time.len() == 45 && busy.is_subset(&in_time), "the busiest come first: {in_time:?}");
    // Everybody is still heard, on the one or the other.
    inlet.ready().await;
    for channel in &channels {
        irc.say(channel);
    }
    eventually("all of it was read", || async {
        (inlet.metrics().await.get(CHAT) >= 50 + 90 + 45).then_some(())
    })
    .await;
    irc.cut(|id| old.contains(&id));
    eventually("the rest is missed", || async { (inlet.waiting_for().await == ["twitch"]).then_some(()) })
        .await;
    let late: BTreeSet<_> = channels.iter().filter(|name| !in_time.contains(*name)).cloned().collect();
    let found = with_gaps(&nats, late.len()).await;
    inlet.ready().await;
    let found_gaps = gaps(&found);
    assert_eq!(channels_of(&found_gaps), late);
    for gap in found_gaps {
        assert_form(gap);
        assert_eq!(gap["payload"]["cause"], "reconnect_too_late");
        assert!(time(gap, "from") >= asked_at && time(gap, "from") <= time(gap, "to"), "{gap}");
    }
    let said: BTreeSet<_> = irc.said().into_iter().map(|said| said.id).collect();
    assert_eq!(chat(&found), said);
}

#[tokio::test]
async fn after_a_cut_its_channels_are_back_soon() {
    let (irc, nats) = (Irc::start().await, Nats::start().await);
    let channels = names("c", 20).join(",");
    // Five times in ten seconds: the limit is not what is measured.
    let inlet = serve(&irc.url(), &nats, &channels, &[("TWITCH_JOIN_RATE", "200")]).await;
    inlet.ready().await;
    let mut spans = Vec::new();
    for _ in 0..5 {
        let start = Instant::now();
        irc.cut(|_| true);
        eventually("all are back", || async { (irc.joined() == 20).then_some(()) }).await;
        spans.push(start.elapsed());
        inlet.ready().await;
    }
    spans.sort_unstable();
    println!("back after a cut with 20 channels: median {:?}, all {spans:?}", spans[2]);
    assert!(spans[2] < Duration::from_secs(2), "{spans:?}");
    assert!(most_in_ten_seconds(&irc.logins()) <= 20);
    let found = with_gaps(&nats, 100).await;
    let found_gaps = gaps(&found);
    assert_eq!(found_gaps.len(), 100, "one for each channel and cut");
    assert!(found_gaps.iter().all(|gap| gap["payload"]["cause"] == "connection_lost"));
    assert_eq!(inlet.metrics().await.get("inlet_twitch_reconnects_total"), 5);
}

#[tokio::test]
async fn a_half_open_connection_is_noticed_within_fifteen_seconds_and_is_a_gap() {
    let (irc, nats) = (Irc::start().await, Nats::start().await);
    let proxy = Proxy::to(irc.addr()).await;
    let inlet = serve(&format!("irc://{}", proxy.addr()), &nats, "alpha beta", &[]).await;
    inlet.ready().await;
    irc.say("alpha");
    inlet.settled(1).await;
    let hung_at = (Instant::now(), system_milliseconds());
    proxy.set(Mode::Hang);
    eventually("it is noticed", || async { (inlet.waiting_for().await == ["twitch"]).then_some(()) }).await;
    let noticed = hung_at.0.elapsed();
    proxy.set(Mode::Pass);
    let passes_at = Instant::now();
    inlet.ready().await;
    println!("half open: noticed after {noticed:?}, back {:?} after it passed again", passes_at.elapsed());
    // Five seconds until it is asked, eight until it is dead, two for a busy machine.
    assert!(noticed < Duration::from_secs(15), "{noticed:?}");
    let found = with_gaps(&nats, 2).await;
    assert_eq!(channels_of(&gaps(&found)), ["alpha", "beta"].map(str::to_owned).into());
    for gap in gaps(&found) {
        assert_form(gap);
        assert_eq!(gap["payload"]["cause"], "silence");
        assert!(time(gap, "from") <= hung_at.1 && time(gap, "to") > hung_at.1, "{gap}");
    }
}

#[tokio::test]
async fn the_channels_of_a_dead_connection_move() {
    let (irc, nats) = (Irc::start().await, Nats::start().await);
    let channels = names("c", 120);
    let inlet = serve(&irc.url(), &nats, &channels.join(","), &[("TWITCH_JOIN_RATE", "300")]).await;
    eventually("all are joined", || async { (irc.joined() == 120).then_some(()) }).await;
    inlet.ready().await;
    let before = irc.standing();
    let (dead, lost) = before.first_key_value().unwrap();
    irc.cut(|id| id == *dead);
    eventually("all are joined again", || async { (irc.joined() == 120).then_some(()) }).await;
    inlet.ready().await;
    let after = irc.standing();
    assert!(after.values().all(|channels| channels.len() <= 90));
    let (survivor, kept) = before.last_key_value().unwrap();
    assert!(after[survivor].is_superset(kept) && after[survivor].len() > kept.len(), "it took some over");
    let total: usize = after.values().map(BTreeSet::len).sum();
    assert_eq!(total, 120, "each is on one connection");
    let found = with_gaps(&nats, lost.len()).await;
    assert_eq!(channels_of(&gaps(&found)), *lost);
    for channel in &channels {
        irc.say(channel);
    }
    eventually("all are heard", || async { (inlet.metrics().await.get(CHAT) == 120).then_some(()) }).await;
}

#[tokio::test]
async fn a_restart_is_a_gap_for_each_channel_that_was_heard() {
    let (irc, nats) = (Irc::start().await, Nats::start().await);
    let mut inlet = serve(&irc.url(), &nats, "alpha beta", &[]).await;
    inlet.ready().await;
    irc.say("alpha");
    inlet.settled(1).await;
    let note = inlet.data_dir().join("twitch.json");
    eventually("the note", || async {
        let note: Value = serde_json::from_slice(&std::fs::read(&note).ok()?).ok()?;
        (note["channels"].as_object()?.len() == 2).then_some(())
    })
    .await;
    let killed_at = system_milliseconds();
    inlet.child.kill();
    eventually("nobody is there", || async { (irc.joined() == 0).then_some(()) }).await;
    // One more than before: it is new, and has no gap.
    let mut inlet = serve_in(inlet.into_folder(), &irc.url(), &nats, "alpha beta gamma", &[]).await;
    inlet.ready().await;
    let found = with_gaps(&nats, 2).await;
    let first: BTreeMap<_, _> = gaps(&found)
        .iter()
        .map(|gap| (gap["payload"]["channel"].as_str().unwrap().to_owned(), time(gap, "to")))
        .collect();
    assert_eq!(first.keys().collect::<Vec<_>>(), ["alpha", "beta"]);
    for gap in gaps(&found) {
        assert_form(gap);
        assert_eq!(gap["payload"]["cause"], "restart");
        // Its connection said something at least every five seconds, and that is noted each second.
        let from = time(gap, "from");
        assert!(from <= killed_at && killed_at - from < 15_000 && killed_at <= time(gap, "to"), "{gap}");
        assert_eq!(gap["auth"]["reason"], "disabled");
    }
    // In an empty folder the stream says where the gap begins, and the instance is another one.
    let (_, code) = inlet.terminate(Duration::from_secs(20)).await;
    assert_eq!(code, Some(0));
    let inlet = serve(&irc.url(), &nats, "alpha", &[]).await;
    inlet.ready().await;
    let found = with_gaps(&nats, 3).await;
    let last = gaps(&found)[2];
    assert_eq!(
        (&last["payload"]["channel"], &last["payload"]["cause"]),
        (&"alpha".into(), &"restart".into())
    );
    let stored = time(last, "from");
    assert!(stored >= first["alpha"] && stored < time(last, "to"), "{last}");
    let instance =
        |gap: &Value| gap["idempotencyKey"].as_str().unwrap().split(':').nth(1).unwrap().to_owned();
    assert_eq!(instance(gaps(&found)[0]), instance(gaps(&found)[1]));
    assert_ne!(instance(gaps(&found)[0]), instance(last));
}

#[tokio::test]
async fn a_gap_that_was_noted_is_told_by_the_next_run() {
    let (irc, mut nats) = (Irc::start().await, Nats::start().await);
    let mut inlet = serve(&irc.url(), &nats, "alpha", &[]).await;
    inlet.ready().await;
    nats.kill();
    irc.cut(|_| true);
    let note = inlet.data_dir().join("twitch.json");
    let cut_at = system_milliseconds();
    // In the note, and soon in the outbox instead.
    eventually("the gap is on disk", || async {
        let note: Value = serde_json::from_slice(&std::fs::read(&note).ok()?).ok()?;
        let is_noted = note["gaps"].as_array().is_some_and(|gaps| !gaps.is_empty());
        (is_noted || inlet.metrics().await.get("inlet_outbox_events") > 0).then_some(())
    })
    .await;
    inlet.child.kill();
    nats.restart().await;
    let inlet = serve_in(inlet.into_folder(), &irc.url(), &nats, "alpha", &[]).await;
    let found = with_gaps(&nats, 2).await;
    let causes: Vec<_> = gaps(&found).iter().map(|gap| gap["payload"]["cause"].clone()).collect();
    assert_eq!(causes, ["connection_lost", "restart"]);
    let gap = gaps(&found)[0];
    assert!(time(gap, "from") <= cut_at && cut_at <= time(gap, "to"), "{gap} of {cut_at}");
    eventually("and struck out", || async {
        let note: Value =
            serde_json::from_slice(&std::fs::read(inlet.data_dir().join("twitch.json")).ok()?).ok()?;
        note["gaps"].as_array()?.is_empty().then_some(())
    })
    .await;
}
