//! What a connection looks up for each line: how much is said where, and whether somebody who speaks owns a channel
//! that is wanted, under another login than it is known by.

use std::collections::HashMap;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard};

use jiff::Timestamp;

use super::roster::{RoomId, Roster, is_login};
use crate::envelope::Draft;
use crate::envelope::draft::{Content, Event};

/// One channel.
#[derive(Debug, Default)]
struct Pulse {
    /// How much is said, lately.
    count: AtomicU64,
    /// When something was last said, Unix milliseconds; 0: not in this run.
    last: AtomicI64,
    /// The room that is meant, where that is certain: whoever else has the login is left again.
    room: Option<RoomId>,
}

#[derive(Debug, Default)]
pub(super) struct Lookup {
    channels: HashMap<String, Pulse>,
    /// Logins of the owners of channels.
    owners: HashMap<RoomId, String>,
}

/// The wanted channels, as connections see them.
#[derive(Debug, Default)]
pub(super) struct Known(RwLock<Lookup>);

impl Known {
    /// For a batch of lines. Do not hold it over an await.
    pub(super) fn lookup(&self) -> RwLockReadGuard<'_, Lookup> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on these.
    pub(super) fn set(&self, roster: &Roster) {
        let mut lookup = self.0.write().unwrap_or_else(PoisonError::into_inner);
        lookup.channels.retain(|login, _| roster.channels.contains_key(login));
        for (login, wanted) in &roster.channels {
            let room = wanted.room.filter(|_| !wanted.is_fixed);
            lookup.channels.entry(login.clone()).or_default().room = room;
        }
        lookup.owners = roster.rooms().into_iter().map(|(room, login)| (room, login.to_owned())).collect();
    }

    /// How much is said in a channel, lately.
    pub(super) fn busy(&self, channel: &str) -> u64 {
        self.lookup().channels.get(channel).map_or(0, |pulse| pulse.count.load(Ordering::Relaxed))
    }

    /// When something was last said in a channel.
    pub(super) fn last_said(&self, channel: &str) -> Option<Timestamp> {
        let last = self.lookup().channels.get(channel)?.last.load(Ordering::Relaxed);
        Timestamp::from_millisecond(last).ok().filter(|_| last > 0)
    }

    /// What was said a while ago counts half.
    pub(super) fn halve(&self) {
        for pulse in self.lookup().channels.values() {
            // What is counted meanwhile may be lost: it is a hint.
            pulse.count.store(pulse.count.load(Ordering::Relaxed) / 2, Ordering::Relaxed);
        }
    }
}

impl Lookup {
    /// Counts what is said. Returns the room and the present login of a speaker who owns a wanted channel by another
    /// name.
    pub(super) fn note(&self, draft: &Draft) -> Option<(RoomId, String)> {
        let Content::Event(event) = &draft.content else { return None };
        if let Some(pulse) = self.channels.get(&event.source.channel).filter(|pulse| !pulse.is_another(event))
        {
            pulse.count.fetch_add(1, Ordering::Relaxed);
            pulse.last.store(draft.taken_in_at.as_millisecond(), Ordering::Relaxed);
        }
        let user = event.user.as_ref()?;
        let room = user.id.parse().ok()?;
        let known = self.owners.get(&room)?;
        (*known != user.name && is_login(&user.name)).then(|| (room, user.name.clone()))
    }

    /// Whether it was said in a room that is not wanted and has the login of one that is. Nobody asked for that: it is
    /// not received.
    pub(super) fn is_of_another(&self, draft: &Draft) -> bool {
        let Content::Event(event) = &draft.content else { return false };
        self.channels.get(&event.source.channel).is_some_and(|pulse| pulse.is_another(event))
    }
}

impl Pulse {
    fn is_another(&self, event: &Event) -> bool {
        let said_in = event.source.channel_id.as_deref().and_then(|id| id.parse::<RoomId>().ok());
        matches!((self.room, said_in), (Some(wanted), Some(said_in)) if wanted != said_in)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Instant;

    use super::super::lines::Line;
    use super::super::metrics::TwitchMetrics;
    use super::super::normalize::{Normalizer, Reading, SharedChatMode, TakenIn};
    use super::super::roster::Wanted;
    use super::*;
    use crate::envelope::Origin;

    fn draft(normalizer: &Normalizer, user: &str, login: &str) -> Box<Draft> {
        let line = format!(
            "@badge-info=;badges=;color=;display-name=X;emotes=;first-msg=0;flags=;id=x;mod=0;room-id=7;subscriber=0;\
             tmi-sent-ts=1700000000000;turbo=0;user-id={user};user-type= \
             :{login}!{login}@{login}.tmi.twitch.tv PRIVMSG #alpha :hello there, how are you all today"
        );
        let taken_in = TakenIn { at: Timestamp::from_second(9).unwrap(), instant: Instant::now() };
        match normalizer.read(Line::Whole(line.into()), taken_in) {
            Reading::Draft(draft) => draft,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn an_owner_who_speaks_under_another_login_is_told() {
        let metrics = Arc::new(TwitchMetrics::new(&prometheus::Registry::new()).unwrap());
        let normalizer = Normalizer::new(Origin::Twitch, SharedChatMode::SourceOnly, metrics);
        let known = Known::default();
        let mut roster = Roster::fixed(&["alpha".to_owned(), "beta".to_owned()]);
        roster.channels.insert("gamma".to_owned(), Wanted { room: Some(5), ..Wanted::default() });
        known.set(&roster);
        let note = |user: &str, login: &str| known.lookup().note(&draft(&normalizer, user, login));
        assert_eq!((note("5", "gamma"), note("6", "delta"), note("x", "delta")), (None, None, None));
        assert_eq!(note("5", "delta"), Some((5, "delta".to_owned())));
        // No login may get into a line that is none.
        assert_eq!(note("5", "a,b"), None);
        assert_eq!((known.busy("alpha"), known.busy("beta"), known.busy("elsewhere")), (5, 0, 0));
        assert_eq!(known.last_said("alpha"), Timestamp::from_second(9).ok());
        assert_eq!(known.last_said("beta"), None);
        known.halve();
        assert_eq!(known.busy("alpha"), 2);
        // What is said in another room that has the login now is not meant, where a certain one is.
        roster.channels.insert("alpha".to_owned(), Wanted { room: Some(8), ..Wanted::default() });
        known.set(&roster);
        let is_of_another = |known: &Known| known.lookup().is_of_another(&draft(&normalizer, "5", "delta"));
        assert!(is_of_another(&known));
        assert_eq!((note("5", "delta"), known.busy("alpha")), (Some((5, "delta".to_owned())), 2));
        let fixed = Wanted { room: Some(8), is_fixed: true, ..Wanted::default() };
        for wanted in [Wanted { room: Some(7), ..Wanted::default() }, fixed] {
            roster.channels.insert("alpha".to_owned(), wanted);
            known.set(&roster);
            assert!(!is_of_another(&known));
        }
        // What is counted stays over a change of the list.
        roster.channels.remove("beta");
        known.set(&roster);
        assert_eq!(known.busy("alpha"), 2);
    }
}
