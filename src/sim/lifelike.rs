//! Chat as it is: beside messages also replies, subs and gifts, raids, announcements, bans, deletions, shared chat,
//! viewers who change their names, and texts of every kind.
//!
//! The same seed makes the same chat, but for its times: nothing here looks at the clock or at how many lines are asked
//! for at once. What is not a message is some 10 of 1,000 lines, so that figures of plain chat stay comparable. Memory
//! is bounded: a few dozen messages per channel to refer to, and so many renamed viewers.

mod line;
mod moderation;
mod notices;
mod speech;

use std::collections::{BTreeMap, VecDeque};

use super::chat::ChatPlan;
use super::lines::Lines;
use super::people::{MAX_USERS, Viewer, Zipf, room_id, viewer};
use super::text::Text;
use super::words::{COLORS, SURNAMES};
use line::Line;

/// How uneven channels are: exponent of a Zipf curve.
const ROOM_ZIPF: f64 = 0.8;
/// Messages of a channel that can be replied to or deleted.
const MAX_RECENT: usize = 48;
/// Viewers who changed their name or colour; when there are more, the first ones are as they were.
const MAX_CHANGED: usize = 4_096;
/// Happenings are drawn from so many.
const CHANCES: u32 = 100_000;
/// They may be so many times more often; beyond it, few messages would be left.
const MOST_OFTEN: u32 = 50;

/// The generator.
#[derive(Debug)]
pub(super) struct Lifelike {
    rng: fastrand::Rng,
    people: Zipf,
    sizes: Zipf,
    rooms: Vec<Room>,
    changed: BTreeMap<u32, Viewer>,
    /// The first two channels share their chat.
    sharing: bool,
    chances: u32,
    text: Text,
    /// Lines made and not yet asked for; at most what one happening makes.
    waiting: VecDeque<Line>,
}

#[derive(Debug)]
struct Room {
    name: String,
    id: String,
    recent: VecDeque<Said>,
}

/// A message that can be referred to.
#[derive(Debug, Clone)]
struct Said {
    id: String,
    viewer: Viewer,
    text: String,
    /// The first message of its thread and who wrote that.
    thread: Option<(String, Viewer)>,
}

impl Lifelike {
    pub(super) fn new(plan: &ChatPlan<'_>) -> Self {
        let room = |name: &String| Room {
            name: name.clone(),
            id: room_id(name).to_string(),
            recent: VecDeque::new(),
        };
        Self {
            rng: fastrand::Rng::with_seed(plan.seed),
            people: Zipf::new(plan.users.clamp(1, MAX_USERS), plan.zipf),
            sizes: Zipf::new(u32::try_from(plan.channels.len()).unwrap_or(u32::MAX), ROOM_ZIPF),
            rooms: plan.channels.iter().map(room).collect(),
            changed: BTreeMap::new(),
            sharing: false,
            chances: CHANCES,
            text: Text::default(),
            waiting: VecDeque::new(),
        }
    }

    /// The same with happenings so many times as often.
    pub(super) fn more_often(self, times: u32) -> Self {
        Self { chances: CHANCES / times.clamp(1, MOST_OFTEN), ..self }
    }

    /// Appends `count` lines, sent at `now` (Unix ms), to `lines`.
    pub(super) fn fill(&mut self, count: usize, now: &str, lines: &mut Lines) {
        let mut made = 0;
        while made < count && !self.rooms.is_empty() {
            let Some(line) = self.waiting.pop_front() else {
                self.happen();
                continue;
            };
            let channel = &self.rooms[line.room].name;
            let slot = lines.slot(channel);
            let mark = line.write(channel, now, lines.buffer(slot));
            lines.mark(slot, mark);
            made += 1;
        }
    }

    /// Lets something happen in some channel.
    fn happen(&mut self) {
        let room = self.sizes.pick(self.rng.f64());
        match self.rng.u32(..self.chances) {
            0..300 => self.resub(room),
            300..400 => self.subgift(room),
            400..430 => self.mystery_gift(room),
            430..450 => self.raid(room),
            450..490 => self.announcement(room),
            490..540 => self.milestone(room),
            540..570 => self.other_notice(room),
            570..860 => self.timeout(room),
            860..930 => self.ban(room),
            930..1_080 => self.deletion(room),
            1_080..1_100 => self.clear_room(room),
            1_100..1_120 => self.slow_mode(room),
            1_120..1_220 => self.change_somebody(),
            1_220..1_270 if self.rooms.len() > 1 => self.sharing = true,
            1_270..1_570 => self.sharing = false,
            _ => self.message(room),
        }
    }

    fn id(&mut self) -> String {
        let id = uuid::Builder::from_random_bytes(self.rng.u128(..).to_be_bytes()).into_uuid();
        id.hyphenated().to_string()
    }

    /// Some viewer, as they are called now and as they stand in this channel; now and then its owner.
    fn somebody(&mut self, room: usize) -> Viewer {
        let user = u32::try_from(self.people.pick(self.rng.f64())).unwrap_or(0);
        if self.rng.u16(..1_000) < 5 {
            return self.owner(room);
        }
        let mut viewer = self.changed.get(&user).cloned().unwrap_or_else(|| viewer(user));
        // Nobody moderates, or pays for, every channel.
        let elsewhere = !(user as usize + room).is_multiple_of(3);
        if room > 0 && elsewhere {
            (viewer.moderator, viewer.vip, viewer.months) = (false, false, 0);
        }
        viewer
    }

    fn owner(&self, room: usize) -> Viewer {
        let Room { name, id, .. } = &self.rooms[room];
        let mut owner = viewer(0);
        owner.login.clone_from(name);
        owner.display.clone_from(name);
        owner.id.clone_from(id);
        (owner.moderator, owner.vip, owner.months, owner.premium) = (false, false, 60, false);
        owner
    }

    fn message(&mut self, room: usize) {
        let viewer = self.somebody(room);
        let someone = self.somebody(room).display;
        speech::roll(&mut self.text, &someone, &mut self.rng);
        let parent = (self.rng.u8(..100) < 8).then(|| self.recent(room)).flatten();
        if let Some(parent) = &parent {
            self.text.put_first(&format!("@{}", parent.viewer.display));
        }
        let id = self.id();
        let mut line = self.line_of(room, &viewer, &id);
        self.tag_message(&viewer, &mut line);
        let thread = parent.map(|parent| reply_to(&parent, &mut line));
        let text = String::from_utf8_lossy(&self.text.bytes).into_owned();
        let wire = if self.text.action { format!("\u{1}ACTION {text}\u{1}") } else { text.clone() };
        line.text = Some(wire.into_bytes());
        line.command = "PRIVMSG";
        line.login.clone_from(&viewer.login);
        let recent = &mut self.rooms[room].recent;
        if recent.len() >= MAX_RECENT {
            recent.pop_front();
        }
        recent.push_back(Said { id, viewer, text, thread });
        self.send(line);
    }

    /// A message of this channel that is still remembered.
    fn recent(&mut self, room: usize) -> Option<Said> {
        let recent = &self.rooms[room].recent;
        (!recent.is_empty()).then(|| recent[self.rng.usize(..recent.len())].clone())
    }

    /// The tags that every line of a viewer has.
    fn line_of(&self, room: usize, viewer: &Viewer, id: &str) -> Line {
        let mut line = Line { room, ..Line::default() };
        let is_owner = viewer.id == self.rooms[room].id;
        let badges = viewer.badges();
        line.tag("badge-info", viewer.badge_info());
        line.tag("badges", if is_owner { format!("broadcaster/1,{badges}") } else { badges });
        line.tag("color", viewer.color);
        line.tag("display-name", viewer.display.clone());
        line.tag("emotes", "");
        line.tag("flags", "");
        line.tag("id", id);
        line.tag("mod", u8::from(viewer.moderator).to_string());
        line.tag("room-id", self.rooms[room].id.clone());
        line.tag("subscriber", u8::from(viewer.months > 0).to_string());
        line.tag("tmi-sent-ts", "");
        line.tag("user-id", viewer.id.clone());
        line.tag("user-type", if viewer.moderator { "mod" } else { "" });
        if viewer.vip {
            line.tag("vip", "1");
        }
        line
    }

    /// The tags that messages have beyond.
    fn tag_message(&mut self, viewer: &Viewer, line: &mut Line) {
        let mut emotes = bytes::BytesMut::new();
        self.text.put_emotes(&mut emotes);
        line.tag("emotes", String::from_utf8_lossy(&emotes));
        if self.text.is_emotes_alone() {
            line.tag("emote-only", "1");
        }
        if self.text.bits > 0 {
            line.tag("bits", self.text.bits.to_string());
        }
        if self.rng.bool() {
            line.tag("client-nonce", format!("{:032x}", self.rng.u128(..)));
        }
        if self.rng.u16(..1_000) < 3 {
            line.tag("custom-reward-id", self.id());
        }
        line.tag("first-msg", if self.rng.u8(..) == 0 { "1" } else { "0" });
        line.tag("returning-chatter", u8::from(viewer.returning).to_string());
        line.tag("turbo", "0");
    }

    /// Puts a line on its way, and its copy in the channel that shares the chat.
    fn send(&mut self, mut line: Line) {
        if !self.sharing || line.room > 1 || !line.tags.contains_key("id") {
            self.waiting.push_back(line);
            return;
        }
        let source = [line.tags["id"].clone(), line.tags["room-id"].clone()];
        line.tag("source-id", source[0].clone());
        line.tag("source-room-id", source[1].clone());
        let mut copy = line.clone();
        copy.room = 1 - line.room;
        copy.tag("id", self.id());
        copy.tag("room-id", self.rooms[copy.room].id.clone());
        for (of_source, own) in [("source-badge-info", "badge-info"), ("source-badges", "badges")] {
            let theirs = copy.tags[own].clone();
            copy.tag(of_source, theirs);
            copy.tag(own, "");
        }
        for (key, value) in [("mod", "0"), ("subscriber", "0"), ("user-type", "")] {
            copy.tag(key, value);
        }
        if line.command == "USERNOTICE" {
            let kind = line.tags.get("msg-id").cloned().unwrap_or_default();
            copy.tag("source-msg-id", kind);
            copy.tag("msg-id", "sharedchatnotice");
        } else {
            line.tag("source-only", "0");
            copy.tag("source-only", "0");
        }
        self.waiting.push_back(line);
        self.waiting.push_back(copy);
    }

    /// A viewer takes another colour, writes the name otherwise, or takes another name.
    fn change_somebody(&mut self) {
        let user = u32::try_from(self.people.pick(self.rng.f64())).unwrap_or(0);
        let mut changed = self.changed.get(&user).cloned().unwrap_or_else(|| viewer(user));
        match self.rng.u8(..10) {
            0..5 => changed.color = COLORS[self.rng.usize(..COLORS.len())],
            5..8 => changed.display = changed.login.to_uppercase(),
            _ => {
                let word = SURNAMES[self.rng.usize(..SURNAMES.len())];
                changed.login = format!("{word}{user}_{}", self.rng.u8(..));
                changed.display.clone_from(&changed.login);
            }
        }
        if self.changed.len() >= MAX_CHANGED {
            self.changed.pop_first();
        }
        self.changed.insert(user, changed);
    }
}

/// Makes a line a reply; the thread it belongs to.
fn reply_to(parent: &Said, line: &mut Line) -> (String, Viewer) {
    let (id, starter) = parent.thread.clone().unwrap_or_else(|| (parent.id.clone(), parent.viewer.clone()));
    line.tag("reply-parent-display-name", parent.viewer.display.clone());
    line.tag("reply-parent-msg-body", parent.text.clone());
    line.tag("reply-parent-msg-id", parent.id.clone());
    line.tag("reply-parent-user-id", parent.viewer.id.clone());
    line.tag("reply-parent-user-login", parent.viewer.login.clone());
    line.tag("reply-thread-parent-display-name", starter.display.clone());
    line.tag("reply-thread-parent-msg-id", id.clone());
    line.tag("reply-thread-parent-user-id", starter.id.clone());
    line.tag("reply-thread-parent-user-login", starter.login.clone());
    (id, starter)
}

#[cfg(test)]
mod tests;
