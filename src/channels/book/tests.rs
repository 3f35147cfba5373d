//! Several books on one store that knows conditions, as every store does.

use super::super::record::{removals, wanted_rooms};
use super::super::{Channel, Collection};
use super::*;
use crate::store::{Condition, Fields};

/// A store without time-outs.
#[derive(Default, Clone)]
struct World {
    documents: BTreeMap<Arc<str>, Document>,
    last: u64,
}

impl World {
    /// Whether the write was done, and as which version.
    fn write(&mut self, write: &Write) -> Option<Version> {
        let there = self.documents.get(&write.name.id).cloned();
        let holds = match write.condition {
            Condition::Absent => there.is_none(),
            Condition::At(version) => there.as_ref().is_some_and(|there| there.version == version),
            Condition::Always => true,
        };
        if !holds {
            return None;
        }
        self.last += 1;
        let version = Version(self.last);
        match &write.change {
            Change::Delete => drop(self.documents.remove(&write.name.id)),
            Change::Set(fields) => {
                let mut all = there.map(|there| there.fields).unwrap_or_default();
                all.extend(fields.clone());
                self.documents.insert(Arc::clone(&write.name.id), Document { fields: all, version });
            }
        }
        Some(version)
    }

    fn all(&self) -> Vec<(Name, Option<Document>)> {
        let name = |id: &Arc<str>| Name { collection: Collection::Channels, id: Arc::clone(id) };
        self.documents.iter().map(|(id, document)| (name(id), Some(document.clone()))).collect()
    }

    fn records(&self) -> Vec<Record> {
        self.documents.iter().filter_map(|(id, document)| Record::read(id, document)).collect()
    }

    fn ids(&self) -> Vec<&str> {
        self.documents.keys().map(|id| &**id).collect()
    }

    /// What an operator does to add a channel that is not there.
    fn add(&mut self, login: &str, at: Timestamp) {
        let fields = fields([("login", json!(login)), ("addedAt", json!(at)), ("removedAt", Value::Null)]);
        let name = Key::Login(login.to_owned()).name();
        self.write(&Write::set(name, fields));
    }

    /// What an operator does to remove it.
    fn remove(&mut self, login: &str, at: Timestamp) {
        let records = self.records();
        for write in removals(&records, (login, &wanted_rooms(&records, login)), at) {
            self.write(&write).unwrap();
        }
    }
}

/// One instance.
struct Instance {
    book: Book,
    sights: Sights,
}

impl Instance {
    fn new(fixed: &[&str]) -> Self {
        let fixed: Vec<_> = fixed.iter().map(|login| (*login).to_owned()).collect();
        Self { book: Book::new(fixed.into(), true), sights: Sights::default() }
    }

    fn sees(&mut self, room: RoomId, login: &str, at: Timestamp) {
        let wanted = self.book.roster(&self.sights);
        self.sights.note(room, login, at, &wanted);
        self.book.learn(&self.sights);
    }

    fn hears(&mut self, world: &World) {
        self.book.replace(world.all(), &self.sights);
        self.book.learn(&self.sights);
    }

    /// Writes one round; whether there was anything to write.
    fn writes(&mut self, world: &mut World, now: Timestamp) -> bool {
        let writes = self.book.writes(&self.sights, now);
        for write in &writes {
            if let Some(version) = world.write(write) {
                self.book.wrote(write, version, &self.sights);
            }
        }
        !writes.is_empty()
    }

    /// Hears and writes until there is nothing left to do.
    fn settles(&mut self, world: &mut World, now: Timestamp) {
        for _ in 0..10 {
            self.hears(world);
            if !self.writes(world, now) {
                return;
            }
        }
        panic!("it goes on writing: {:?}", self.book.writes(&self.sights, now));
    }

    fn logins(&self) -> Vec<String> {
        self.book.roster(&self.sights).channels.into_keys().collect()
    }
}

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_700_000_000 + second).unwrap()
}

fn shown(world: &World) -> Vec<Channel> {
    world.records().iter().filter(|record| record.is_wanted()).map(|record| record.shown(false)).collect()
}

#[test]
fn a_login_that_answered_becomes_a_room_whoever_does_it() {
    let mut world = World::default();
    world.add("alpha", at(0));
    let [mut one, mut other] = [Instance::new(&[]), Instance::new(&[])];
    for instance in [&mut one, &mut other] {
        instance.hears(&world);
        assert_eq!(instance.logins(), ["alpha"]);
        assert!(instance.book.writes(&instance.sights, at(1)).is_empty());
        instance.sees(7, "alpha", at(1));
    }
    // Both make the room; one is too late. Then both delete the login.
    assert!(one.writes(&mut world, at(1)) && other.writes(&mut world, at(1)));
    assert_eq!(world.ids(), ["7", "login:alpha"]);
    one.settles(&mut world, at(2));
    other.settles(&mut world, at(2));
    assert_eq!(world.ids(), ["7"]);
    let channel = &shown(&world)[0];
    assert_eq!(
        (&*channel.login, channel.added_at, channel.last_seen_at),
        ("alpha", Some(at(0)), Some(at(1)))
    );
    for instance in [&one, &other] {
        let roster = instance.book.roster(&instance.sights);
        assert_eq!((roster.channels["alpha"].room, roster.is_whole), (Some(7), true));
    }
}

/// An operator removes the channel at any moment of its move, and an instance may stop at any moment of its own.
#[test]
fn a_channel_that_is_removed_while_it_is_moved_stays_removed() {
    for moment in 0..6 {
        for again in [false, true] {
            let mut world = World::default();
            world.add("alpha", at(0));
            let [mut one, mut other] = [Instance::new(&[]), Instance::new(&[])];
            let mut late = Vec::new();
            for step in 0..6 {
                if step == moment {
                    world.remove("alpha", at(3));
                    if again {
                        world.add("alpha", at(4));
                    }
                }
                match step {
                    0 => {
                        for instance in [&mut one, &mut other] {
                            instance.hears(&world);
                            instance.sees(7, "alpha", at(1));
                        }
                    }
                    // Decided now, and under way until the end.
                    1 => late = other.book.writes(&other.sights, at(1)),
                    2 | 4 => drop(one.writes(&mut world, at(2))),
                    3 => one.hears(&world),
                    _ => {}
                }
            }
            for write in &late {
                world.write(write);
            }
            for _ in 0..3 {
                one.settles(&mut world, at(5));
                other.settles(&mut world, at(5));
            }
            one.settles(&mut world, at(70));
            let logins: Vec<_> = shown(&world).into_iter().map(|channel| channel.login).collect();
            let case = format!("removed at {moment}, added again {again}: {:?}", world.ids());
            if again {
                assert_eq!(logins, ["alpha"], "{case}");
            } else {
                assert!(logins.is_empty() && world.documents.is_empty(), "{case}");
            }
        }
    }
}

#[test]
fn a_room_is_followed_to_its_new_login_and_old_news_do_not_bring_it_back() {
    let mut world = World::default();
    world.add("alpha", at(0));
    let [mut one, mut other] = [Instance::new(&[]), Instance::new(&[])];
    for instance in [&mut one, &mut other] {
        instance.hears(&world);
        instance.sees(7, "alpha", at(1));
        instance.settles(&mut world, at(1));
    }
    one.hears(&world);
    one.sees(7, "beta", at(10));
    // At once, also while the store is away.
    assert_eq!((one.logins(), other.logins()), (vec!["beta".to_owned()], vec!["alpha".to_owned()]));
    one.settles(&mut world, at(10));
    other.settles(&mut world, at(11));
    assert_eq!(other.logins(), ["beta"]);
    // And again, heard by the other one: what the first one saw is older.
    other.sees(7, "gamma", at(20));
    other.settles(&mut world, at(20));
    one.settles(&mut world, at(21));
    other.settles(&mut world, at(22));
    assert_eq!((one.logins(), other.logins()), (vec!["gamma".to_owned()], vec!["gamma".to_owned()]));
    let channel = &shown(&world)[0];
    assert_eq!((&*channel.login, channel.former_login.as_deref()), ("gamma", Some("beta")));
    // Its old login is somebody else's: that changes nothing.
    one.sees(8, "alpha", at(30));
    one.settles(&mut world, at(30));
    assert_eq!(world.ids(), ["7"]);
    // A room that is seen for long is noted as seen once a day.
    one.sees(7, "gamma", at(20 + 86_400));
    one.settles(&mut world, at(20 + 86_400));
    assert_eq!(shown(&world)[0].last_seen_at, Some(at(20 + 86_400)));
}

/// What an operator does about a rename that nobody heard of: the old login is removed, the new one added. What the
/// instances saw of the room before says otherwise.
#[test]
fn a_room_that_is_added_under_its_new_login_keeps_it() {
    for is_forgotten in [false, true] {
        let mut world = World::default();
        world.add("alpha", at(0));
        let [mut one, mut other] = [Instance::new(&[]), Instance::new(&[])];
        for instance in [&mut one, &mut other] {
            instance.hears(&world);
            instance.sees(7, "alpha", at(1));
            instance.settles(&mut world, at(1));
        }
        world.remove("alpha", at(10));
        world.add("beta", at(11));
        for instance in [&mut one, &mut other] {
            instance.hears(&world);
            if is_forgotten {
                instance.sights.keep(&instance.book.roster(&instance.sights));
            }
        }
        one.sees(7, "beta", at(12));
        for second in 12..15 {
            one.settles(&mut world, at(second));
            other.settles(&mut world, at(second));
        }
        assert_eq!((one.logins(), other.logins()), (vec!["beta".to_owned()], vec!["beta".to_owned()]));
        let channel = &shown(&world)[0];
        assert_eq!((&*channel.login, channel.former_login.as_deref()), ("beta", None));
        one.settles(&mut world, at(100));
        assert_eq!(world.ids(), ["7"]);
    }
}

#[test]
fn a_room_that_is_renamed_while_it_is_removed_goes_all_the_same() {
    let mut world = World::default();
    world.add("alpha", at(0));
    let mut one = Instance::new(&[]);
    one.hears(&world);
    one.sees(7, "alpha", at(1));
    one.settles(&mut world, at(1));
    let records = world.records();
    let rooms = wanted_rooms(&records, "alpha");
    let removal = removals(&records, ("alpha", &rooms), at(2));
    one.sees(7, "beta", at(2));
    one.settles(&mut world, at(2));
    let written: Vec<_> = removal.iter().map(|write| world.write(write).is_some()).collect();
    assert!(written.contains(&false), "the rename was faster");
    for write in removals(&world.records(), ("alpha", &rooms), at(3)) {
        world.write(&write).unwrap();
    }
    assert!(removals(&world.records(), ("alpha", &rooms), at(3)).is_empty());
    one.settles(&mut world, at(4));
    assert!(one.logins().is_empty() && shown(&world).is_empty(), "{:?}", world.ids());
}

#[test]
fn a_room_is_made_over_what_cannot_be_read() {
    let mut world = World::default();
    world.write(&Write::set(Key::Room(7).name(), fields([("login", json!(7))])));
    world.add("alpha", at(0));
    let mut one = Instance::new(&[]);
    one.hears(&world);
    assert_eq!(one.book.unreadable().keys().map(|id| &**id).collect::<Vec<_>>(), ["7"]);
    one.sees(7, "alpha", at(1));
    one.settles(&mut world, at(1));
    assert_eq!((world.ids(), one.book.unreadable().len()), (vec!["7"], 0));
    assert_eq!(shown(&world)[0].login, "alpha");
}

#[test]
fn a_channel_of_the_settings_is_found_again_under_its_new_login() {
    let mut world = World::default();
    let mut one = Instance::new(&["alpha"]);
    assert_eq!((one.logins(), one.book.roster(&one.sights).is_whole), (vec!["alpha".to_owned()], false));
    one.sees(7, "alpha", at(1));
    assert!(!one.writes(&mut world, at(1)), "not before it is known what is there");
    one.settles(&mut world, at(1));
    assert_eq!(world.ids(), ["7"]);
    assert!(shown(&world).is_empty(), "no operator added it");
    one.sees(7, "beta", at(2));
    one.settles(&mut world, at(2));
    assert_eq!(one.logins(), ["beta"]);
    // The next run: the setting says what it said.
    let mut next = Instance::new(&["alpha"]);
    next.settles(&mut world, at(3));
    let roster = next.book.roster(&next.sights);
    assert_eq!(roster.channels.keys().collect::<Vec<_>>(), ["beta"]);
    assert_eq!(
        (roster.channels["beta"].room, roster.channels["beta"].former.as_deref()),
        (Some(7), Some("alpha"))
    );
    // Whoever has the old login now is not meant.
    next.sees(8, "alpha", at(4));
    next.settles(&mut world, at(4));
    assert_eq!((next.logins(), world.ids()), (vec!["beta".to_owned()], vec!["7"]));
    // A setting that names the new login knows the same room, and both agree.
    let mut third = Instance::new(&["beta"]);
    third.settles(&mut world, at(5));
    third.sees(7, "beta", at(5));
    third.settles(&mut world, at(5));
    next.settles(&mut world, at(6));
    assert_eq!((third.logins(), next.logins()), (vec!["beta".to_owned()], vec!["beta".to_owned()]));
}

#[test]
fn a_login_of_the_settings_means_who_has_it_if_nobody_saw_where_the_first_went() {
    let mut world = World::default();
    let mut one = Instance::new(&["alpha"]);
    one.hears(&world);
    one.sees(7, "alpha", at(1));
    one.settles(&mut world, at(1));
    one.sees(8, "alpha", at(2));
    one.settles(&mut world, at(2));
    assert_eq!((one.logins(), world.ids()), (vec!["alpha".to_owned()], vec!["8"]));
}

#[test]
fn what_is_no_channel_is_left_alone() {
    let mut world = World::default();
    for (id, login) in [("7", "a b"), ("login:alpha", "beta"), ("x", "gamma"), ("8", "")] {
        let name = Name { collection: Collection::Channels, id: id.into() };
        let all: Fields = fields([("login", json!(login)), ("addedAt", json!(at(0)))]);
        world.write(&Write::set(name, all));
    }
    let mut one = Instance::new(&[]);
    one.settles(&mut world, at(100));
    assert!(one.logins().is_empty());
    assert_eq!(world.documents.len(), 4);
}
