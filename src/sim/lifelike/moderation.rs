//! What moderators do: time-outs, bans, deletions, a cleared room, another mode of the room.

use super::{Lifelike, Line};

/// How long people are sent out, in seconds.
const TIMEOUTS: [u32; 6] = [1, 10, 60, 600, 3_600, 1_209_600];

impl Lifelike {
    pub(super) fn timeout(&mut self, room: usize) {
        let seconds = TIMEOUTS[self.rng.usize(..TIMEOUTS.len())];
        self.send_out(room, Some(seconds));
    }

    pub(super) fn ban(&mut self, room: usize) {
        self.send_out(room, None);
    }

    fn send_out(&mut self, room: usize, seconds: Option<u32>) {
        let target = match self.recent(room) {
            Some(said) => said.viewer,
            None => self.somebody(room),
        };
        let mut line = self.moderators_line(room, "CLEARCHAT");
        if let Some(seconds) = seconds {
            line.tag("ban-duration", seconds.to_string());
        }
        line.tag("target-user-id", target.id);
        line.text = Some(target.login.into_bytes());
        self.waiting.push_back(line);
    }

    pub(super) fn clear_room(&mut self, room: usize) {
        let line = self.moderators_line(room, "CLEARCHAT");
        self.waiting.push_back(line);
    }

    /// Deletes a message once; without one to delete, somebody says something.
    pub(super) fn deletion(&mut self, room: usize) {
        let Some(said) = self.recent(room) else {
            return self.message(room);
        };
        self.rooms[room].recent.retain(|other| other.id != said.id);
        let mut line = self.moderators_line(room, "CLEARMSG");
        line.tag("login", said.viewer.login);
        line.tag("target-msg-id", said.id);
        // Twitch often leaves the room out here.
        if self.rng.bool() {
            line.tag("room-id", "");
        }
        line.text = Some(said.text.into_bytes());
        self.waiting.push_back(line);
    }

    /// Slow mode: a NOTICE and the room's new state.
    pub(super) fn slow_mode(&mut self, room: usize) {
        let seconds = [3, 10, 30, 120][self.rng.usize(..4)];
        let mut notice = Line { room, command: "NOTICE", ..Line::default() };
        notice.tag("msg-id", "slow_on");
        let text = format!("This room is now in slow mode. You may send messages every {seconds} seconds.");
        notice.text = Some(text.into_bytes());
        let mut state = Line { room, command: "ROOMSTATE", ..Line::default() };
        state.tag("room-id", self.rooms[room].id.clone());
        state.tag("slow", seconds.to_string());
        self.waiting.extend([notice, state]);
    }

    fn moderators_line(&self, room: usize, command: &'static str) -> Line {
        let mut line = Line { room, command, ..Line::default() };
        line.tag("room-id", self.rooms[room].id.clone());
        line.tag("tmi-sent-ts", "");
        line
    }
}
