//! Any interleaving of two instances, a stream and a store, with crashes, lost answers, edits and dead letters, ends in the
//! counts of the straight run, and in tags that are each given once.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use proptest::prelude::*;
use uuid::Uuid;

use super::{Entered, Opening, Table, Visit};
use crate::envelope::draft::{Role, User};
use crate::envelope::id::event_id;
use crate::store::document::{read_user, write_counts, write_history};
use crate::store::{Document, Fields, Version};
use crate::users::fold::{Kind, Seen, Tags};

const STREAM: &str = "S@1";
const USERS: u8 = 3;
const GAP: Duration = Duration::from_mins(1);

/// What may happen next; a number chooses whom or what it happens to.
#[derive(Debug, Clone, Copy)]
enum Step {
    TakeIn(u8),
    Send(u8),
    /// It is stored, and the answer does not come.
    SendAndLoseTheAck(u8),
    DeadLetter(u8),
    /// What is taken in and not acknowledged is put on disk.
    Store(u8),
    Follow(u8),
    Flush(u8),
    /// It is written, and the answer does not come.
    FlushAndLoseTheAnswer(u8),
    Note(u8),
    Crash(u8),
    Edit(u8),
    GoBack(u8),
    /// It is written that somebody is forgotten, and their document deleted.
    Forget(u8),
    /// An instance hears of that.
    Hear(u8),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => any::<u8>().prop_map(Step::TakeIn),
        5 => any::<u8>().prop_map(Step::Send),
        1 => any::<u8>().prop_map(Step::SendAndLoseTheAck),
        1 => any::<u8>().prop_map(Step::DeadLetter),
        2 => any::<u8>().prop_map(Step::Store),
        5 => any::<u8>().prop_map(Step::Follow),
        3 => any::<u8>().prop_map(Step::Flush),
        1 => any::<u8>().prop_map(Step::FlushAndLoseTheAnswer),
        2 => any::<u8>().prop_map(Step::Note),
        1 => any::<u8>().prop_map(Step::Crash),
        1 => any::<u8>().prop_map(Step::Edit),
        1 => any::<u8>().prop_map(Step::GoBack),
        1 => any::<u8>().prop_map(Step::Forget),
        1 => any::<u8>().prop_map(Step::Hear),
    ]
}

struct Instance {
    table: Table,
    /// Taken in and without an ack: key, event, tags.
    unsent: Vec<(Arc<str>, Seen, Tags)>,
    /// So many of them are on disk.
    stored: usize,
    taken_in: usize,
    followed: usize,
    /// Who is known to be forgotten.
    forgotten: BTreeSet<Arc<str>>,
}

impl Instance {
    fn remove_first(&mut self) {
        self.unsent.remove(0);
        self.stored = self.stored.saturating_sub(1);
    }
}

struct World {
    events: Vec<(Arc<str>, Seen)>,
    stream: Vec<(Arc<str>, Seen, Tags)>,
    dead: BTreeSet<Uuid>,
    store: HashMap<Arc<str>, (Fields, u64)>,
    versions: u64,
    counted_to: u64,
    forgotten: BTreeSet<Arc<str>>,
    instances: Vec<Instance>,
    /// Users that an instance keeps in memory.
    places: usize,
    user: User,
}

impl World {
    fn new(events: Vec<(Arc<str>, Seen)>, places: usize) -> Self {
        let user = User {
            key: "twitch:1".into(),
            id: "1".into(),
            name: "a".into(),
            display_name: "A".into(),
            profile_image_url: String::new(),
            role: Role::Viewer,
            roles: vec![Role::Viewer],
            tags: vec![],
        };
        let mut world = Self {
            events,
            stream: vec![],
            dead: BTreeSet::new(),
            store: HashMap::new(),
            versions: 0,
            counted_to: 0,
            forgotten: BTreeSet::new(),
            instances: vec![],
            places,
            user,
        };
        world.instances = vec![world.started(0), world.started(0)];
        world
    }

    fn started(&self, taken_in: usize) -> Instance {
        let mut table = Table::new(GAP, self.places, 1_000);
        table.begin(STREAM, self.counted_to);
        let followed = usize::try_from(self.counted_to).unwrap();
        let forgotten = self.forgotten.clone();
        Instance { table, unsent: vec![], stored: 0, taken_in, followed, forgotten }
    }

    fn store(&mut self, i: usize) {
        let Instance { table, unsent, stored, .. } = &mut self.instances[i];
        for (key, seen, _) in &unsent[*stored..] {
            table.stored(key, seen.id);
        }
        *stored = unsent.len();
    }

    /// What is on disk is there after the crash, and nothing else.
    fn crash(&mut self, i: usize) {
        let mut instance = self.started(self.instances[i].taken_in);
        let Instance { unsent, stored, .. } = &mut self.instances[i];
        unsent.truncate(*stored);
        for (key, seen, _) in &*unsent {
            instance.table.recovered(key, *seen);
        }
        let (unsent, stored) = (std::mem::take(unsent), *stored);
        self.instances[i] = Instance { unsent, stored, ..instance };
        // A start looks for what a crash left behind.
        self.erase(i);
    }

    fn document(&self, key: &Arc<str>) -> Option<Document> {
        let (fields, version) = self.store.get(key)?;
        Some(Document { fields: fields.clone(), version: Version(*version) })
    }

    /// Writes if the condition holds.
    fn write(&mut self, key: &Arc<str>, condition: Option<Version>, fields: Fields) -> Option<Version> {
        let now = self.store.get(key).map(|(_, version)| Version(*version));
        if now != condition {
            return None;
        }
        self.versions += 1;
        let (stored, version) = self.store.entry(Arc::clone(key)).or_default();
        stored.extend(fields);
        *version = self.versions;
        Some(Version(self.versions))
    }

    fn load(&mut self, i: usize, key: &Arc<str>) {
        let document = self.document(key);
        self.instances[i].table.loaded(key, document.as_ref());
    }

    /// The next event meets its user, if nothing has to be waited for.
    fn take_in(&mut self, i: usize) {
        let Some((key, seen)) = self.events.get(self.instances[i].taken_in).cloned() else { return };
        if self.instances[i].forgotten.contains(&key) {
            // Refused at the door.
            self.instances[i].taken_in += 1;
            return;
        }
        let user = self.user.clone();
        let visit = Visit { key: Arc::clone(&key), seen, room: Some(10_000), user: &user };
        loop {
            match self.instances[i].table.enter(&visit, false) {
                Entered::Unknown => self.load(i, &key),
                Entered::NeedsWrite => {
                    let openings = self.instances[i].table.openings(std::iter::once(&visit), 100);
                    assert_eq!(openings.len(), 1);
                    for opening in openings {
                        self.open(i, opening);
                    }
                }
                Entered::MustWait => return,
                Entered::Met(met) => {
                    let instance = &mut self.instances[i];
                    instance.unsent.push((key, seen, met.folded.tags));
                    instance.taken_in += 1;
                    return;
                }
                other => panic!("{other:?}"),
            }
        }
    }

    fn open(&mut self, i: usize, opening: Opening) {
        let key = Arc::clone(&opening.key);
        let written = self.write(&key, opening.version, write_history(&opening.history));
        // The flush of the same user may be answered in between.
        if self.versions.is_multiple_of(3) {
            self.flush(i, &key, true);
        }
        match written {
            Some(version) => self.instances[i].table.opened(opening, version),
            None => self.instances[i].table.forget_base(&key),
        }
    }

    /// Sends the first unsent event; each instance sends in order.
    fn send(&mut self, i: usize, is_answered: bool) {
        let Some((key, seen, tags)) = self.instances[i].unsent.first().cloned() else { return };
        let there = self.stream.iter().position(|(_, stored, _)| stored.id == seen.id);
        let position = there.unwrap_or_else(|| {
            self.stream.push((Arc::clone(&key), seen, tags));
            self.stream.len() - 1
        }) as u64
            + 1;
        if is_answered {
            self.instances[i].remove_first();
            self.instances[i].table.acked(&key, seen.id, position);
        }
    }

    fn dead_letter(&mut self, i: usize) {
        let Some((key, seen, _)) = self.instances[i].unsent.first().cloned() else { return };
        let is_there = self.stream.iter().any(|(_, stored, _)| stored.id == seen.id);
        if !is_there {
            self.instances[i].remove_first();
            self.instances[i].table.dead_lettered(&key, seen.id);
            self.dead.insert(seen.id);
        }
    }

    fn follow(&mut self, i: usize) {
        let instance = &mut self.instances[i];
        let Some((key, seen, _)) = self.stream.get(instance.followed) else { return };
        instance.followed += 1;
        let position = instance.followed as u64;
        if !instance.forgotten.contains(key) {
            instance.table.note(key, *seen, position, Timestamp::UNIX_EPOCH);
        }
        instance.table.followed_to(position);
    }

    fn forget(&mut self, key: &Arc<str>) {
        self.forgotten.insert(Arc::clone(key));
        self.store.remove(key);
    }

    fn hear(&mut self, i: usize) {
        let instance = &mut self.instances[i];
        for key in &self.forgotten {
            if instance.forgotten.insert(Arc::clone(key)) {
                instance.table.bar(key);
            }
        }
        self.erase(i);
    }

    fn erase(&mut self, i: usize) {
        for key in &self.instances[i].forgotten {
            self.store.remove(key);
        }
    }

    fn flush(&mut self, i: usize, key: &Arc<str>, is_answered: bool) {
        if self.instances[i].forgotten.contains(key) {
            return;
        }
        let is_missing = !self.instances[i].table.missing(std::iter::once(key), 1).is_empty();
        if is_missing {
            self.load(i, key);
        }
        let Some(flushing) = self.instances[i].table.flush(key) else { return };
        let mut fields = write_history(&flushing.user.history);
        write_counts(&mut fields, &flushing.user);
        match self.write(key, flushing.version, fields) {
            Some(version) if is_answered => drop(self.instances[i].table.flushed(flushing, version)),
            _ => self.instances[i].table.not_flushed(key),
        }
    }

    fn note(&mut self, i: usize) {
        let (_, counted_to) = self.instances[i].table.counted_to().unwrap();
        self.counted_to = self.counted_to.max(counted_to);
    }

    fn edit(&mut self, key: &Arc<str>) {
        let version = self.store.get(key).map(|(_, version)| Version(*version));
        if version.is_some() {
            let mut fields = Fields::new();
            fields.insert("notes".into(), format!("{}", self.versions).into());
            self.write(key, version, fields);
            if self.versions.is_multiple_of(2) {
                let document = self.document(key).unwrap();
                self.instances[0].table.edited(key, &document);
            }
        }
    }

    fn go_back(&mut self, i: usize) {
        let instance = &mut self.instances[i];
        instance.table.go_back_to(self.counted_to);
        instance.followed = usize::try_from(self.counted_to).unwrap();
    }

    fn run(&mut self, step: Step) {
        let key = |n: u8| user(n % USERS);
        match step {
            Step::TakeIn(n) => self.take_in(usize::from(n % 2)),
            Step::Send(n) => self.send(usize::from(n % 2), true),
            Step::SendAndLoseTheAck(n) => self.send(usize::from(n % 2), false),
            Step::DeadLetter(n) => self.dead_letter(usize::from(n % 2)),
            Step::Follow(n) => self.follow(usize::from(n % 2)),
            Step::Flush(n) => self.flush(usize::from(n % 2), &key(n / 2), true),
            Step::FlushAndLoseTheAnswer(n) => self.flush(usize::from(n % 2), &key(n / 2), false),
            Step::Note(n) => self.note(usize::from(n % 2)),
            Step::Store(n) => self.store(usize::from(n % 2)),
            Step::Crash(n) => self.crash(usize::from(n % 2)),
            Step::Edit(n) => self.edit(&key(n)),
            Step::GoBack(n) => self.go_back(usize::from(n % 2)),
            Step::Forget(n) => self.forget(&key(n)),
            Step::Hear(n) => self.hear(usize::from(n % 2)),
        }
    }

    /// No fault any more: everything is sent, noted and written.
    fn settle(&mut self) {
        self.hear(0);
        self.hear(1);
        for _ in 0..4 * (self.events.len() + 4) {
            for i in 0..2 {
                self.take_in(i);
                self.send(i, true);
                self.follow(i);
            }
        }
        for i in [0, 1, 0] {
            for n in 0..USERS {
                // A conflict is read again, then written.
                self.flush(i, &user(n), true);
                self.flush(i, &user(n), true);
            }
            self.note(i);
        }
    }

    fn check(&self) {
        let mut counts = BTreeMap::<Arc<str>, u64>::new();
        let mut given = BTreeMap::<(Arc<str>, &str), u32>::new();
        for (key, seen, tags) in self.stream.iter().filter(|(key, ..)| !self.forgotten.contains(key)) {
            *counts.entry(Arc::clone(key)).or_default() += u64::from(seen.kind == Kind::Message);
            for name in
                tags.names().filter(|name| *name != "RETURNING_USER" && *name != "FIRST_SESSION_MESSAGE")
            {
                *given.entry((Arc::clone(key), name)).or_default() += 1;
            }
        }
        for (key, expected) in counts {
            let (user, bad) = read_user(&self.store[&key].0);
            assert_eq!((user.message_count, bad.len()), (expected, 0), "{key}");
        }
        assert!(self.forgotten.iter().all(|key| !self.store.contains_key(key)));
        assert!(given.values().all(|times| *times == 1), "{given:?}");
        assert_eq!(self.counted_to, self.stream.len() as u64);
        for instance in &self.instances {
            assert_eq!(
                (instance.table.noted(), instance.table.dirty(), instance.table.awaits_notes()),
                (0, 0, false)
            );
        }
    }
}

fn user(n: u8) -> Arc<str> {
    format!("twitch:{n}").into()
}

fn events() -> impl Strategy<Value = Vec<(Arc<str>, Seen)>> {
    let event = (0..USERS, prop_oneof![4 => Just(1_000_i64), 1 => Just(61_000), 1 => Just(-500)], 0..8_u8);
    prop::collection::vec(event, 1..20).prop_map(|events| {
        let mut at = 1_700_000_000_000;
        let made = events.into_iter().enumerate().map(|(n, (who, later, kind))| {
            at += later;
            let kind = if kind == 0 { Kind::Notice } else { Kind::Message };
            let at = Timestamp::from_millisecond(at).unwrap();
            (user(who), Seen { id: event_id(&format!("twitch:{n}")), kind, at })
        });
        made.collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, ..ProptestConfig::default() })]

    #[test]
    fn any_interleaving_counts_each_event_once(
        events in events(),
        steps in prop::collection::vec(step(), 0..150),
        places in 1..=usize::from(USERS),
    ) {
        let mut world = World::new(events, places);
        for step in steps {
            world.run(step);
        }
        world.settle();
        world.check();
    }
}

#[test]
fn who_was_not_used_makes_room_unless_something_is_pending_of_them() {
    let mut table = Table::new(GAP, 3, 1_000);
    table.begin(STREAM, 0);
    let seen = Seen { id: event_id("a"), kind: Kind::Message, at: Timestamp::UNIX_EPOCH };
    table.note(&user(0), seen, 1, Timestamp::UNIX_EPOCH);
    for n in 1..4 {
        assert_eq!(table.missing([user(n)].iter(), 1), [user(n)]);
        table.loaded(&user(n), None);
    }
    assert_eq!((table.len(), table.holds(&user(0)), table.holds(&user(3))), (3, true, true));
    // At its end memory holds who is needed, and room for one more.
    for n in 4..9 {
        let seen = Seen { id: event_id(&n.to_string()), ..seen };
        table.note(&user(n), seen, u64::from(n), Timestamp::UNIX_EPOCH);
    }
    assert!((4..9).chain([0]).all(|n| table.holds(&user(n))));
    assert_eq!((table.len(), table.noted()), (6, 6));
}

#[test]
fn a_stream_that_comes_back_goes_on_where_it_stood() {
    let mut table = Table::new(GAP, 100, 1_000);
    let seen = |name: &str| Seen { id: event_id(name), kind: Kind::Message, at: Timestamp::UNIX_EPOCH };
    for (stream, name) in [("A@1", "a"), ("B@2", "b")] {
        table.begin(stream, 0);
        table.note(&user(1), seen(name), 1, Timestamp::UNIX_EPOCH);
        table.followed_to(1);
    }
    assert_eq!((table.position_in("A@1"), table.position_in("C@3")), (Some(1), None));
    table.begin("A@1", 1);
    table.note(&user(1), seen("a"), 1, Timestamp::UNIX_EPOCH);
    assert_eq!(table.noted(), 2);
    table.loaded(&user(1), None);
    let flushing = table.flush(&user(1)).unwrap();
    assert_eq!(flushing.user.message_count, 2);
    assert_eq!(flushing.user.applied, [("A@1".into(), 1), ("B@2".into(), 1)]);
}

#[test]
fn an_edit_that_comes_while_its_user_is_read_is_not_missed() {
    let mut table = Table::new(GAP, 100, 1_000);
    let document = |notes: &str, version| {
        let fields = Fields::from_iter([("notes".to_owned(), notes.into())]);
        Document { fields, version: Version(version) }
    };
    assert_eq!(table.missing([user(1), user(1), user(2)].iter(), 1), [user(1)]);
    table.edited(&user(1), &document("new", 2));
    table.loaded(&user(1), Some(&document("old", 1)));
    assert!(table.missing([user(1)].iter(), 1).is_empty());
    table.edited(&user(2), &document("nobody asked", 2));
    assert_eq!((table.len(), table.missing([user(2)].iter(), 1)), (1, vec![user(2)]));
}
