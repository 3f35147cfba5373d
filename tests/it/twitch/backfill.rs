//! What a history service knows of a gap is filled in, once; one that fails costs nothing else.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use inlet::clock::system_milliseconds;
use jiff::Timestamp;
use serde_json::Value;

use super::history::History;
use super::irc::Irc;
use super::{assert_form, channels_of, chat, gaps, serve, serve_in, time, with_gaps};
use crate::harness::eventually;
use crate::harness::nats::Nats;
use crate::harness::stream::read;

#[tokio::test]
async fn what_was_missed_is_filled_in_once_however_often_it_is_asked_for() {
    let (irc, nats) = (Arc::new(Irc::start().await), Nats::start().await);
    let history = History::of(&irc).await;
    let url = history.url();
    let settings = [
        ("TWITCH_BACKFILL_URL", url.as_str()),
        ("IRC_RECONNECT_INITIAL_MS", "100"),
        // Of an event in the outbox it is not known yet whether the stream has it.
        ("OUTBOX_AFTER", "4s"),
    ];
    let mut inlet = serve(&irc.url(), &nats, "alpha beta", &settings).await;
    inlet.ready().await;
    let started_at = system_milliseconds();
    (0..20).for_each(|_| drop(irc.say("alpha")));
    inlet.settled(20).await;
    irc.set_away(true);
    for _ in 0..2_000 {
        irc.say("alpha");
        // So that there is an older and a newer.
        tokio::time::sleep(Duration::from_micros(200)).await;
    }
    irc.set_away(false);
    let found = with_gaps(&nats, 2).await;
    let of = |channel: &str| {
        let found_gaps = gaps(&found);
        found_gaps.into_iter().find(|gap| gap["payload"]["channel"] == channel).unwrap().clone()
    };
    let (alpha, beta) = (of("alpha"), of("beta"));
    assert_form(&alpha);
    assert_form(&beta);
    assert_eq!(alpha["payload"]["healed"]["messages"], 2_000, "{alpha}");
    let healed =
        |name: &str| alpha["payload"]["healed"][name].as_str().unwrap().parse::<Timestamp>().unwrap();
    assert!(
        healed("from").as_millisecond() <= time(&alpha, "from"),
        "the margin reaches over the gap: {alpha}"
    );
    assert!(healed("to").as_millisecond() <= time(&alpha, "to"));
    assert_eq!(beta["payload"]["healed"], serde_json::json!({ "messages": 0 }), "nothing was said");
    let said: BTreeSet<_> = irc.said().into_iter().map(|said| said.id).collect();
    assert_eq!(chat(&found), said);
    assert!(history.asked().len() >= 4, "in pages");
    let metrics = inlet.metrics().await;
    metrics.assert_account_closes();
    assert_eq!(metrics.get("inlet_events_published_total{source=\"backfill\"}"), 2_000);
    let (_, config) = inlet.json("/_debug/config").await;
    assert!(config["TWITCH_BACKFILL_URL"].as_str().unwrap().starts_with("http://[redacted]@127.0.0.1"));
    // An older note, as a machine that goes down may leave: all of it is asked for again.
    let (_, code) = inlet.terminate(Duration::from_secs(20)).await;
    assert_eq!(code, Some(0));
    let note = inlet.data_dir().join("twitch.json");
    let mut older: Value = serde_json::from_slice(&std::fs::read(&note).unwrap()).unwrap();
    let begin = Timestamp::from_millisecond(started_at - 1_000).unwrap().to_string();
    older["channels"]["alpha"] = begin.into();
    std::fs::write(&note, older.to_string()).unwrap();
    let inlet = serve_in(inlet.into_folder(), &irc.url(), &nats, "alpha", &settings).await;
    let again = with_gaps(&nats, 3).await;
    let last = gaps(&again)[2].clone();
    assert_eq!(last["payload"]["healed"]["messages"], 0, "{last}");
    assert_eq!(chat(&again), said);
    let everything = format!("{}{config}", inlet.log());
    assert!(!everything.contains("very-secret-password"));
}

#[tokio::test]
async fn a_history_service_that_fails_costs_the_healing_and_nothing_else() {
    let (irc, nats) = (Arc::new(Irc::start().await), Nats::start().await);
    let history = History::of(&irc).await;
    // By name, four at a time: of those that hang, the last ones stand in line until it is too late for them.
    let channels = [
        "absent", "broken", "fine", "garbage", "huge", "hung0", "hung1", "hung2", "hung3", "hung4", "hung5",
        "hung6", "hung7", "hung8", "hung9",
    ];
    let url = history.url();
    let settings = [("TWITCH_BACKFILL_URL", url.as_str()), ("IRC_RECONNECT_INITIAL_MS", "100")];
    let mut inlet = serve(&irc.url(), &nats, &channels.join(" "), &settings).await;
    inlet.ready().await;
    irc.cut(|_| true);
    eventually("all are back", || async { (irc.joined() == channels.len()).then_some(()) }).await;
    inlet.ready().await;
    // While the service hangs, chat goes its way.
    for round in 1..=10 {
        for channel in channels {
            irc.say(channel);
        }
        eventually("chat is published", || async {
            let published = inlet.metrics().await.get("inlet_events_published_total{source=\"twitch\"}");
            (published == round * channels.len() as u64).then_some(())
        })
        .await;
    }
    assert!(gaps(&read(&nats.url(), "INLET").await).len() < channels.len(), "the hung one is still asked");
    let found = with_gaps(&nats, channels.len()).await;
    let found_gaps = gaps(&found);
    assert_eq!(channels_of(&found_gaps), channels.map(str::to_owned).into());
    for gap in found_gaps {
        assert_form(gap);
        let is_healed = gap["payload"].get("healed").is_some();
        assert_eq!(is_healed, gap["payload"]["channel"] == "fine", "{gap}");
    }
    assert_eq!(chat(&found).len(), 10 * channels.len());
    let asked = history.asked();
    let times = |channel: &str| asked.iter().filter(|asked| *asked == channel).count();
    assert!(times("broken") > 2 && times("garbage") > 2 && times("hung0") > 1, "tried again: {asked:?}");
    assert_eq!(times("hung9"), 0, "its minute was over: {asked:?}");
    assert!(times("huge") == 1 && times("absent") == 1, "another try would not help: {asked:?}");
    // A service that hangs does not hold up the end, and what is under way then is told unhealed.
    irc.cut(|_| true);
    eventually("the hung one is asked again", || async {
        let hung = history.asked().iter().filter(|asked| *asked == "hung0").count();
        (hung > times("hung0")).then_some(())
    })
    .await;
    let (took, code) = inlet.terminate(Duration::from_secs(20)).await;
    assert_eq!(code, Some(0), "{took:?}:\n{}", inlet.log());
    assert!(took < Duration::from_secs(8), "{took:?}");
    let found = with_gaps(&nats, channels.len() * 2).await;
    assert_eq!(gaps(&found).len(), channels.len() * 2);
}
