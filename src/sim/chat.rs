//! Chat out of nothing: PRIVMSG lines as Twitch writes them, the same ones for the same seed.
//!
//! What does not change from line to line is formatted beforehand ([`People`] and the rooms), so a line costs a few
//! copies and its random text.

use bytes::{BufMut, BytesMut};
use uuid::Builder;

use super::lines::{Lines, Mark};
use super::people::{People, Zipf, room_id};
use super::text::{Text, put_number};

/// What to generate.
#[derive(Debug)]
pub(super) struct ChatPlan<'a> {
    pub(super) channels: &'a [String],
    pub(super) users: u32,
    pub(super) zipf: f64,
    pub(super) seed: u64,
}

/// The generator.
#[derive(Debug)]
pub(super) struct Chat {
    rng: fastrand::Rng,
    zipf: Zipf,
    people: People,
    rooms: Vec<Room>,
    next_room: usize,
    text: Text,
}

#[derive(Debug)]
struct Room {
    name: String,
    id: String,
}

impl Chat {
    pub(super) fn new(plan: &ChatPlan<'_>) -> Self {
        let rooms = plan.channels.iter();
        Self {
            rng: fastrand::Rng::with_seed(plan.seed),
            zipf: Zipf::new(plan.users.clamp(1, super::people::MAX_USERS), plan.zipf),
            people: People::new(plan.users),
            rooms: rooms.map(|name| Room { name: name.clone(), id: room_id(name).to_string() }).collect(),
            next_room: 0,
            text: Text::default(),
        }
    }

    /// A channel has another name from now on, and is the same room.
    pub(super) fn rename(&mut self, old: &str, new: &str) {
        for room in self.rooms.iter_mut().filter(|room| room.name == old) {
            new.clone_into(&mut room.name);
        }
    }

    /// Appends `count` messages, sent at `now` (Unix ms), to `lines`.
    pub(super) fn fill(&mut self, count: usize, now: &str, lines: &mut Lines) {
        for _ in 0..count {
            let Some(room) = self.rooms.get(self.next_room) else {
                return;
            };
            let slot = lines.slot(&room.name);
            self.next_room = (self.next_room + 1) % self.rooms.len();
            let user = self.zipf.pick(self.rng.f64());
            self.text.roll(&mut self.rng);
            let mark =
                line(&mut self.rng, &self.people.parts(user), (room, now, &self.text), lines.buffer(slot));
            lines.mark(slot, mark);
        }
    }
}

/// Writes one line and says where its identity stands.
fn line(
    rng: &mut fastrand::Rng,
    user: &super::people::Parts<'_>,
    (room, now, text): (&Room, &str, &Text),
    out: &mut BytesMut,
) -> Mark {
    out.reserve(1024);
    out.put_slice(user.badges);
    if text.bits > 0 {
        out.put_slice(b";bits=");
        put_number(out, text.bits);
    }
    let mut hex = [0; 36];
    out.put_slice(b";client-nonce=");
    let nonce = Builder::from_u128(rng.u128(..)).into_uuid();
    out.put_slice(nonce.simple().encode_lower(&mut hex).as_bytes());
    out.put_slice(user.look);
    text.put_emotes(out);
    out.put_slice(if rng.u8(..) == 0 { b";first-msg=1" } else { b";first-msg=0" });
    out.put_slice(b";flags=;id=");
    let id_at = out.len();
    put_id(rng, out);
    let id_end = out.len();
    out.put_slice(user.standing);
    out.put_slice(room.id.as_bytes());
    out.put_slice(user.subscriber);
    out.put_slice(now.as_bytes());
    let who_at = out.len();
    out.put_slice(user.who);
    out.put_slice(room.name.as_bytes());
    out.put_slice(b" :");
    if text.action {
        out.put_slice(b"\x01ACTION ");
    }
    out.put_slice(&text.bytes);
    out.put_slice(if text.action { b"\x01\r\n" } else { b"\r\n" });
    let user = who_at + user.user_id.start..who_at + user.user_id.end;
    Mark { user: Some(user), id: Some(id_at..id_end), ..Mark::default() }
}

/// Writes a random UUID (version 4) in lower-case hyphenated form.
pub(super) fn put_id(rng: &mut fastrand::Rng, out: &mut BytesMut) {
    let mut hex = [0; 36];
    let id = Builder::from_random_bytes(rng.u128(..).to_be_bytes()).into_uuid();
    out.put_slice(id.hyphenated().encode_lower(&mut hex).as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::words::EMOTES;

    fn generate(seed: u64, count: usize) -> (String, Vec<Mark>) {
        let channels = ["one".to_owned(), "two".to_owned()];
        let mut chat = Chat::new(&ChatPlan { channels: &channels, users: 500, zipf: 1.0, seed });
        let mut lines = Lines::default();
        chat.fill(count, "1700000000000", &mut lines);
        let chunks = lines.drain();
        assert_eq!(chunks.len(), 2);
        assert_eq!(chunks[0].marks.len(), count / 2);
        (String::from_utf8(chunks[0].bytes.to_vec()).unwrap(), chunks[0].marks.to_vec())
    }

    fn tag<'a>(line: &'a str, key: &str) -> &'a str {
        let tags = line[1..].split(' ').next().unwrap().split(';');
        tags.filter_map(|tag| tag.split_once('=')).find(|(name, _)| *name == key).unwrap().1
    }

    #[test]
    fn the_same_seed_says_the_same() {
        assert_eq!(generate(1, 2_000), generate(1, 2_000));
        assert_ne!(generate(1, 2_000).0, generate(2, 2_000).0);
    }

    #[test]
    fn lines_look_like_twitchs() {
        let (lines, marks) = generate(3, 4_000);
        let mut total = 0;
        let mut start = 0;
        for (line, mark) in lines.split_inclusive("\r\n").zip(marks) {
            assert!((380..=700).contains(&line.len()), "{} bytes: {line}", line.len());
            total += line.len();
            assert_eq!(tag(line, "id"), &lines[mark.id.unwrap()]);
            assert_eq!(tag(line, "user-id"), &lines[mark.user.unwrap()]);
            assert_eq!(uuid::Uuid::parse_str(tag(line, "id")).unwrap().get_version_num(), 4);
            let keys: Vec<_> = line[1..].split(' ').next().unwrap().split(';').collect();
            assert!(keys.is_sorted(), "{line}");
            let rest = line.split_once(' ').unwrap().1;
            assert!(rest.contains(".tmi.twitch.tv PRIVMSG #one :"), "{rest}");
            assert_eq!(tag(line, "room-id"), room_id("one").to_string());
            start += line.len();
        }
        assert_eq!(start, lines.len());
        let average = total / 2_000;
        assert!((450..=650).contains(&average), "{average}");
        assert!(lines.contains(";bits=100;client-nonce=") && lines.contains(" :\u{1}ACTION "));
    }

    #[test]
    fn emote_ranges_point_at_their_codes() {
        let (lines, _) = generate(5, 4_000);
        let mut checked = 0;
        for line in lines.lines() {
            let emotes = tag(line, "emotes");
            let (_, text) = line.split_once(" PRIVMSG #one :").unwrap();
            let text = text.strip_prefix("\u{1}ACTION ").unwrap_or(text).trim_end_matches('\u{1}');
            for emote in emotes.split('/').filter(|emote| !emote.is_empty()) {
                let (id, ranges) = emote.split_once(':').unwrap();
                let code = EMOTES.iter().find(|known| known.0 == id).unwrap().1;
                for range in ranges.split(',') {
                    let (from, to) = range.split_once('-').unwrap();
                    let (from, to): (usize, usize) = (from.parse().unwrap(), to.parse().unwrap());
                    let said: String = text.chars().skip(from).take(to - from + 1).collect();
                    assert_eq!(said, code, "{line}");
                    checked += 1;
                }
            }
        }
        assert!(checked > 300, "{checked}");
    }
}
