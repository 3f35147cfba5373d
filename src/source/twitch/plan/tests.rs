use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

fn names(count: usize) -> Vec<String> {
    (0..count).map(|n| format!("c{n:03}")).collect()
}

/// A world around the plan: connections that open at once, and a server that answers or does not.
struct World {
    plan: Plan,
    last_id: ConnectionId,
    /// When each JOIN went out, where to and for what.
    sent: Vec<(Instant, ConnectionId, String)>,
}

impl World {
    fn new(channels: usize, rate: usize) -> Self {
        let mut plan = Plan::new(rate);
        for name in names(channels) {
            plan.add(&name, false);
        }
        Self { plan, last_id: 0, sent: Vec::new() }
    }

    /// Lets `span` pass. `answers`: whether a JOIN is answered; `delay`: how long one takes to be written.
    async fn run(&mut self, span: Duration, delay: Duration, answers: impl Fn(&str) -> bool) {
        let end = Instant::now() + span;
        loop {
            while self.plan.wants_connection() {
                self.last_id += 1;
                self.plan.opening(self.last_id);
                assert!(!self.plan.wants_connection(), "one at a time");
                self.plan.opened(self.last_id);
            }
            let mut handed = Vec::new();
            while let Some(join) = self.plan.next_join(Instant::now(), |_| 0) {
                handed.push(join);
            }
            if !handed.is_empty() {
                tokio::time::sleep(delay).await;
            }
            for (id, name) in handed {
                self.plan.written(id, std::slice::from_ref(&name), Instant::now());
                self.sent.push((Instant::now(), id, name.clone()));
                if answers(&name) {
                    self.plan.confirmed(id, &name);
                }
            }
            for id in self.plan.connections.keys() {
                assert!(self.plan.places(*id) <= MOST_CHANNELS);
            }
            match self.plan.next_due(Instant::now()).filter(|due| *due < end) {
                Some(due) => {
                    tokio::time::sleep_until(due.max(Instant::now() + Duration::from_millis(1))).await;
                }
                None => return tokio::time::sleep_until(end).await,
            }
        }
    }

    fn most_in_ten_seconds(&self) -> usize {
        let within = |start: Instant| {
            self.sent.iter().filter(|(at, ..)| *at >= start && *at < start + Duration::from_secs(10)).count()
        };
        self.sent.iter().map(|(at, ..)| within(*at)).max().unwrap_or(0)
    }

    fn joined(&self) -> usize {
        self.plan.channels().filter(|(_, state, ..)| *state == ChannelState::Joined).count()
    }

    fn connections(&self) -> Vec<ConnectionId> {
        self.plan.connections.keys().copied().collect()
    }
}

fn state_of(plan: &Plan, name: &str) -> (ChannelState, Option<JoinFailure>) {
    let (_, state, why, _) = plan.channels().find(|(other, ..)| *other == name).unwrap();
    (state, why)
}

const AT_ONCE: Duration = Duration::ZERO;

#[tokio::test(start_paused = true)]
async fn three_hundred_channels_are_joined_on_four_connections_within_the_limit() {
    let mut world = World::new(300, 20);
    world.run(Duration::from_mins(3), AT_ONCE, |_| true).await;
    assert_eq!((world.sent.len(), world.joined(), world.connections().len()), (300, 300, 4));
    assert_eq!(world.most_in_ten_seconds(), 20);
    assert!(world.sent[299].0 - world.sent[0].0 < Duration::from_secs(150));
}

#[tokio::test(start_paused = true)]
async fn what_stays_unanswered_is_asked_for_again_and_then_reported() {
    let mut world = World::new(1, 20);
    let start = Instant::now();
    world.run(Duration::from_mins(12), AT_ONCE, |_| false).await;
    let at: Vec<_> = world.sent.iter().map(|(at, ..)| (*at - start).as_secs()).collect();
    // Failed at 80 s; then every 5 min, each time with 10 s to answer.
    assert_eq!(at, [0, 10, 30, 70, 380, 690]);
    assert_eq!(state_of(&world.plan, "c000"), (ChannelState::Failed, Some(JoinFailure::NoAnswer)));
    // It stays named over retries and connections, until it is joined after all.
    world.plan.ended(1, Instant::now());
    world.run(Duration::from_mins(6), AT_ONCE, |_| false).await;
    assert_eq!(state_of(&world.plan, "c000").0, ChannelState::Failed);
    world.run(Duration::from_mins(6), AT_ONCE, |_| true).await;
    assert_eq!(state_of(&world.plan, "c000"), (ChannelState::Joined, None));
}

#[tokio::test(start_paused = true)]
async fn a_refusal_is_kept_and_an_answer_after_all_counts() {
    let mut world = World::new(2, 20);
    world.run(Duration::from_secs(1), AT_ONCE, |_| false).await;
    let now = Instant::now();
    assert!(world.plan.refused(1, "c000", JoinFailure::Banned, now));
    assert!(!world.plan.refused(1, "c000", JoinFailure::Banned, now), "no news");
    assert!(world.plan.confirmed(1, "c001") && !world.plan.confirmed(1, "c001"));
    assert!(!world.plan.confirmed(1, "elsewhere") && !world.plan.confirmed(7, "c000"));
    assert_eq!(state_of(&world.plan, "c000"), (ChannelState::Failed, Some(JoinFailure::Banned)));
    assert!(world.plan.confirmed(1, "c000"));
    assert!(world.plan.parted(1, "c001") && !world.plan.parted(1, "c001") && !world.plan.is_heard("c001"));
    assert_eq!(world.plan.next_join(now, |_| 0), Some((1, "c001".to_owned())));
}

#[tokio::test(start_paused = true)]
async fn the_channels_of_a_lost_connection_go_where_there_is_room_busiest_first() {
    let mut world = World::new(100, 1_000);
    world.run(Duration::from_secs(1), AT_ONCE, |_| true).await;
    assert_eq!((world.connections(), world.joined()), (vec![1, 2], 100));
    let lost = world.plan.ended(2, Instant::now());
    assert_eq!((lost.len(), world.joined()), (50, 50));
    assert!(world.plan.wants_connection(), "the other one has room for forty");
    let lost = world.plan.ended(1, Instant::now());
    assert_eq!(lost.len(), 50);
    world.plan.opening(3);
    world.plan.opened(3);
    let busy = |name: &str| u64::from(name == "c055") * 9 + u64::from(name == "c099") * 5;
    let first: Vec<_> = (0..3).map(|_| world.plan.next_join(Instant::now(), busy).unwrap().1).collect();
    assert_eq!(first, ["c055", "c099", "c000"]);
}

#[tokio::test(start_paused = true)]
async fn with_room_on_another_connection_none_is_opened() {
    let mut world = World::new(91, 1_000);
    world.run(Duration::from_secs(1), AT_ONCE, |_| true).await;
    assert_eq!(world.connections(), [1, 2]);
    world.plan.channels.retain(|name, _| name.as_str() < "c060");
    let lost = world.plan.ended(2, Instant::now());
    assert!(!lost.is_empty() && !world.plan.wants_connection());
    world.run(Duration::from_secs(15), AT_ONCE, |_| true).await;
    assert_eq!((world.connections(), world.joined()), (vec![1], 60));
}

#[tokio::test(start_paused = true)]
async fn a_connection_is_replaced_before_it_is_let_go() {
    let mut world = World::new(30, 20);
    world.run(Duration::from_secs(15), AT_ONCE, |_| true).await;
    world.plan.leaving(1);
    world.run(Duration::from_secs(1), AT_ONCE, |_| true).await;
    assert_eq!(world.joined(), 30, "all are heard, on the one or the other");
    assert!(!world.plan.is_replaced(1));
    world.run(Duration::from_secs(20), AT_ONCE, |_| true).await;
    assert!(world.plan.is_replaced(1) && !world.plan.is_replaced(2));
    assert!(world.plan.ended(1, Instant::now()).is_empty());
    assert_eq!(world.joined(), 30);
    // While both stand, the loss of the new one loses nobody.
    world.plan.leaving(2);
    world.run(Duration::from_secs(25), AT_ONCE, |_| true).await;
    assert!(world.plan.is_replaced(2) && world.plan.ended(3, Instant::now()).is_empty());
    assert!(!world.plan.is_replaced(2) && world.joined() == 30);
    world.run(Duration::from_secs(25), AT_ONCE, |_| true).await;
    assert!(world.plan.is_replaced(2) && world.plan.ended(2, Instant::now()).is_empty());
    // A channel that cannot be joined on the new one does not keep the old one.
    world.plan.leaving(4);
    world.run(Duration::from_secs(25), AT_ONCE, |name| name != "c000").await;
    assert!(!world.plan.is_replaced(4));
    world.plan.refused(5, "c000", JoinFailure::Banned, Instant::now());
    assert!(world.plan.is_replaced(4));
    // What is asked for on a connection that is asked to leave meanwhile is heard there.
    let mut world = World::new(1, 20);
    world.run(Duration::from_secs(1), AT_ONCE, |_| false).await;
    world.plan.leaving(1);
    assert!(world.plan.confirmed(1, "c000") && world.plan.is_heard("c000") && !world.plan.is_replaced(1));
    assert_eq!(world.plan.ended(1, Instant::now()), ["c000"]);
}

#[tokio::test(start_paused = true)]
async fn channels_come_and_go_and_no_answer_is_taken_for_anothers() {
    let mut world = World::new(2, 20);
    world.run(Duration::from_secs(1), AT_ONCE, |_| true).await;
    let now = Instant::now();
    assert_eq!(world.plan.remove("c000", now), [1]);
    assert!(world.plan.remove("c000", now).is_empty() && world.plan.remove("elsewhere", now).is_empty());
    assert!(!world.plan.confirmed(1, "c000") && !world.plan.parted(1, "c001x"));
    // Put in again: not on the same connection before that one has answered.
    world.plan.add("c000", false);
    assert_eq!(world.plan.next_join(now, |_| 0), None);
    assert!(!world.plan.confirmed(1, "c000"), "a late answer to the first JOIN");
    assert!(!world.plan.parted(1, "c000"), "asked for");
    assert_eq!(world.plan.next_join(now, |_| 0), Some((1, "c000".to_owned())));
    // One that does not answer is not waited for without end; one that was never asked for is just gone.
    assert_eq!(world.plan.remove("c000", now), [1]);
    world.plan.add("c000", false);
    let start = world.sent.len();
    world.run(Duration::from_secs(20), AT_ONCE, |_| true).await;
    assert_eq!((world.sent.len() - start, world.joined()), (1, 2));
    world.plan.add("c002", false);
    assert!(world.plan.remove("c002", Instant::now()).is_empty());
    for name in names(2) {
        world.plan.remove(&name, Instant::now());
    }
    assert!(world.plan.is_empty() && !world.plan.wants_connection());
    assert_eq!(world.plan.surplus(), Some(1));
    world.plan.leaving(1);
    assert!(world.plan.surplus().is_none() && world.plan.is_replaced(1));
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_is_not_needed_any_more_is_given_up() {
    let mut world = World::new(100, 1_000);
    world.run(Duration::from_secs(1), AT_ONCE, |_| true).await;
    assert_eq!((world.connections(), world.plan.surplus()), (vec![1, 2], None));
    for name in &names(100)[..40] {
        world.plan.remove(name, Instant::now());
    }
    let surplus = world.plan.surplus().unwrap();
    world.plan.leaving(surplus);
    assert_eq!(world.joined(), 60, "nobody is lost by that");
    world.run(Duration::from_secs(30), AT_ONCE, |_| true).await;
    assert!(world.plan.is_replaced(surplus) && world.plan.ended(surplus, Instant::now()).is_empty());
    assert_eq!((world.joined(), world.plan.surplus(), world.connections().len()), (60, None, 1));
}

#[tokio::test(start_paused = true)]
async fn another_room_under_the_login_is_left_and_named() {
    let mut world = World::new(1, 20);
    world.run(Duration::from_secs(1), AT_ONCE, |_| true).await;
    assert!(world.plan.is_another(1, "c000", Instant::now()) && !world.plan.is_heard("c000"));
    assert_eq!(state_of(&world.plan, "c000"), (ChannelState::Failed, Some(JoinFailure::OtherRoom)));
    assert_eq!(world.plan.unanswered().collect::<Vec<_>>(), ["c000"]);
    assert!(!world.plan.parted(1, "c000"));
}

/// Something that happens to the connections.
#[derive(Debug, Clone, Copy)]
enum Blow {
    /// The nth is lost.
    Lose(usize),
    /// The nth is to be replaced.
    Leave(usize),
    /// The nth channel is put out.
    Part(usize),
    /// Time passes; so many ms until a JOIN is written; channels that end with this digit are not answered.
    Pass(u64, u64, u8),
}

fn blow() -> impl Strategy<Value = Blow> {
    prop_oneof![
        any::<usize>().prop_map(Blow::Lose),
        any::<usize>().prop_map(Blow::Leave),
        any::<usize>().prop_map(Blow::Part),
        (1..60_u64, 0..3_000_u64, 0..10_u8).prop_map(|(s, ms, digit)| Blow::Pass(s, ms, digit)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn whatever_happens_the_limits_hold_and_all_are_joined_in_the_end(
        count in 1..320_usize,
        rate in 1..60_usize,
        blows in prop::collection::vec(blow(), 0..12),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        let world = runtime.block_on(async {
            let mut world = World::new(count, rate);
            for blow in blows {
                let ids = world.connections();
                match blow {
                    Blow::Lose(nth) if !ids.is_empty() => {
                        let before = world.joined();
                        let lost = world.plan.ended(ids[nth % ids.len()], Instant::now());
                        prop_assert_eq!(world.joined(), before - lost.len());
                    }
                    Blow::Leave(nth) if !ids.is_empty() => {
                        let before = world.joined();
                        world.plan.leaving(ids[nth % ids.len()]);
                        prop_assert_eq!(world.joined(), before, "nobody is lost by being asked to leave");
                    }
                    Blow::Part(nth) => {
                        let name = format!("c{:03}", nth % count);
                        for id in ids {
                            world.plan.parted(id, &name);
                        }
                        prop_assert!(!world.plan.is_heard(&name));
                    }
                    Blow::Pass(seconds, delay, digit) => {
                        let digit = digit.to_string();
                        let delay = Duration::from_millis(delay);
                        world.run(Duration::from_secs(seconds), delay, |name| !name.ends_with(&digit)).await;
                    }
                    Blow::Lose(_) | Blow::Leave(_) => {}
                }
            }
            world.run(Duration::from_hours(2), AT_ONCE, |_| true).await;
            Ok(world)
        })?;
        prop_assert_eq!(world.joined(), count);
        prop_assert!(world.most_in_ten_seconds() <= rate);
        let names: BTreeSet<_> = world.sent.iter().map(|(.., name)| name.clone()).collect();
        prop_assert_eq!(names.len(), count);
        let staying = world.plan.connections.values().filter(|c| c.stage != Stage::Leaving).count();
        prop_assert!(staying <= count.div_ceil(MOST_CHANNELS) + 12);
        for id in world.connections() {
            let is_leaving = world.plan.connections[&id].stage == Stage::Leaving;
            prop_assert!(!is_leaving || world.plan.is_replaced(id));
        }
    }
}
