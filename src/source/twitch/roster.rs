//! Which channels are wanted, and what was seen of them: what the source shares with whoever keeps the list.
//!
//! A channel is its room: the id stays when the login changes. Until Twitch has said which room answers to a login, the
//! login is all that is known of it.

use std::collections::BTreeMap;

use jiff::Timestamp;
use tokio::sync::watch;

/// A room's id, which is its owner's user id.
pub type RoomId = u64;

/// A channel that is wanted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Its room, once that is known.
    pub room: Option<RoomId>,
    /// Whether a setting names this login: then whatever room answers to it is the one.
    pub is_fixed: bool,
    /// Since when it is wanted; `None`: as long as this run, and the one before.
    pub since: Option<Timestamp>,
    /// The login it had before.
    pub former: Option<String>,
}

/// All channels that are wanted, by login.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Roster {
    /// The channels.
    pub channels: BTreeMap<String, Wanted>,
    /// Whether this is all of them: false until the list was read for the first time.
    pub is_whole: bool,
}

impl Roster {
    /// The channels that a setting names.
    pub fn fixed(logins: &[String]) -> Self {
        let fixed = |login: &String| (login.clone(), Wanted { is_fixed: true, ..Wanted::default() });
        Self { channels: logins.iter().map(fixed).collect(), is_whole: false }
    }

    /// The rooms that are known, with their logins.
    pub fn rooms(&self) -> BTreeMap<RoomId, &str> {
        self.channels.iter().filter_map(|(login, wanted)| Some((wanted.room?, login.as_str()))).collect()
    }
}

/// Which login a room had when it was last seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sight {
    /// The login.
    pub login: String,
    /// When that was.
    pub at: Timestamp,
    /// Later ones are higher.
    pub number: u64,
}

/// What Twitch said of rooms lately: of those that are wanted, and of those that answered to a wanted login.
#[derive(Debug, Clone, Default)]
pub struct Sights {
    /// By room.
    pub rooms: BTreeMap<RoomId, Sight>,
    last: u64,
}

impl Sights {
    /// The room that answered to a login last.
    pub fn room_of(&self, login: &str) -> Option<RoomId> {
        let of = self.rooms.iter().filter(|(_, sight)| sight.login == login);
        of.max_by_key(|(_, sight)| sight.number).map(|(room, _)| *room)
    }

    /// `room` has this login at this time.
    pub fn note(&mut self, room: RoomId, login: &str, at: Timestamp, wanted: &Roster) {
        self.keep(wanted);
        self.last += 1;
        self.rooms.insert(room, Sight { login: login.to_owned(), at, number: self.last });
    }

    /// Forgets what does not matter to the wanted; whether there was anything. A room that is wanted again later is not
    /// to be taken for what it was called before.
    pub fn keep(&mut self, wanted: &Roster) -> bool {
        let (rooms, before) = (wanted.rooms(), self.rooms.len());
        self.rooms
            .retain(|room, sight| rooms.contains_key(room) || wanted.channels.contains_key(&sight.login));
        self.rooms.len() < before
    }
}

/// Where it is written down what is seen of rooms. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Lookout {
    /// What is seen.
    pub(super) sights: watch::Sender<Sights>,
    /// Rooms that do not answer to the login they are known by.
    pub(super) unanswered: watch::Sender<BTreeMap<RoomId, String>>,
}

impl Lookout {
    /// `room` has this login now.
    pub(super) fn saw(&self, room: RoomId, login: &str, at: Timestamp, wanted: &Roster) {
        self.sights.send_modify(|sights| sights.note(room, login, at, wanted));
    }
}

/// Whether this is a login: so one may be asked for in a line.
pub fn is_login(text: &str) -> bool {
    let is_plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_';
    (1..=25).contains(&text.len()) && text.bytes().all(is_plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_matters_to_the_wanted_is_kept() {
        let mut roster = Roster::fixed(&["alpha".to_owned(), "beta".to_owned()]);
        let (mut sights, at) = (Sights::default(), Timestamp::UNIX_EPOCH);
        sights.note(1, "alpha", at, &roster);
        sights.note(2, "beta", at, &roster);
        assert_eq!(
            (sights.room_of("alpha"), sights.room_of("beta"), sights.room_of("x")),
            (Some(1), Some(2), None)
        );
        // The room of alpha is known, and is called otherwise now; somebody else has its login.
        roster.channels.get_mut("alpha").unwrap().room = Some(1);
        sights.note(1, "gamma", at, &roster);
        sights.note(3, "alpha", at, &roster);
        assert_eq!((sights.room_of("alpha"), sights.room_of("gamma")), (Some(3), Some(1)));
        roster.channels.remove("alpha");
        sights.note(2, "beta", at, &roster);
        assert_eq!(sights.rooms.keys().collect::<Vec<_>>(), [&2]);
        assert!(!sights.keep(&roster));
        roster.channels.remove("beta");
        assert!(sights.keep(&roster) && sights.rooms.is_empty());
    }

    #[test]
    fn a_login_is_one_word_of_a_line() {
        for good in ["a", "some_login", "0", &"x".repeat(25)] {
            assert!(is_login(good), "{good}");
        }
        for bad in ["", "A", "a b", "a,b", "#a", "ä", "a\r\n", &"x".repeat(26)] {
            assert!(!is_login(bad), "{bad}");
        }
    }
}
