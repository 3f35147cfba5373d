//! Channels that were renamed: the room stays, its login changes, and nobody answers to the old one any more.

use std::collections::{BTreeMap, BTreeSet};

use super::people::room_id;

/// Renames that are taken; more are not.
const MOST: usize = 10_000;

#[derive(Debug, Default)]
pub(super) struct Names {
    /// Rooms of channels that have another name than they began with.
    rooms: BTreeMap<String, u64>,
    /// Names that nobody has any more.
    gone: BTreeSet<String>,
    /// Old and new names that whoever makes messages has not heard of yet.
    fresh: Vec<(String, String)>,
}

impl Names {
    /// Gives a channel another name; false if it cannot have it.
    pub(super) fn rename(&mut self, old: &str, new: &str) -> bool {
        if old == new || self.is_gone(old) || self.gone.len() >= MOST {
            return false;
        }
        let room = self.room_id(old);
        self.rooms.remove(old);
        self.gone.insert(old.to_owned());
        self.gone.remove(new);
        self.rooms.insert(new.to_owned(), room);
        self.fresh.push((old.to_owned(), new.to_owned()));
        true
    }

    /// The room that answers to a name.
    pub(super) fn room_id(&self, channel: &str) -> u64 {
        self.rooms.get(channel).copied().unwrap_or_else(|| room_id(channel))
    }

    /// Whether nobody has this name any more.
    pub(super) fn is_gone(&self, channel: &str) -> bool {
        self.gone.contains(channel)
    }

    /// Renames since the last call.
    pub(super) fn take_fresh(&mut self) -> Vec<(String, String)> {
        std::mem::take(&mut self.fresh)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_room_keeps_its_id_under_every_name() {
        let mut names = Names::default();
        assert!(names.rename("one", "two") && names.rename("two", "three"));
        assert!(!names.rename("one", "four") && !names.rename("three", "three"));
        assert_eq!(names.room_id("three"), room_id("one"));
        assert!(names.is_gone("one") && names.is_gone("two") && !names.is_gone("three"));
        assert_eq!(names.take_fresh().len(), 2);
        assert!(names.take_fresh().is_empty());
        // Somebody else takes a name that is free again, or the same channel takes it back.
        assert!(names.rename("other", "one") && names.rename("three", "two"));
        assert_eq!((names.room_id("one"), names.room_id("two")), (room_id("other"), room_id("one")));
        assert!(!names.is_gone("one") && !names.is_gone("two"));
    }
}
