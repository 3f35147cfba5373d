//! One event folded over what is known of its user. Pure: no clock, no store.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use uuid::Uuid;

use super::session::session_id;
use crate::store::document::{History, Moment};

/// What an event is to its user.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// They said something: it counts, and may open a session.
    Message,
    /// The platform announced something of them: they were seen.
    Notice,
}

/// An event, as far as it concerns its user.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// The event's id.
    pub id: Uuid,
    /// What it is.
    pub kind: Kind,
    /// When it happened.
    pub at: Timestamp,
}

/// What an event is called by because of when it came.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "the contract's four tags")]
pub struct Tags {
    /// It created the document.
    pub new_user: bool,
    /// It opens the first session.
    pub first_alltime: bool,
    /// It opens a session.
    pub first_session: bool,
    /// A message of somebody known.
    pub returning: bool,
}

impl Tags {
    /// The tags' names, sorted. The platform's own stands among them.
    pub fn names(self) -> impl Iterator<Item = &'static str> {
        let named = [
            (self.first_alltime, "FIRST_ALLTIME_MESSAGE"),
            (self.first_session, "FIRST_SESSION_MESSAGE"),
            (self.new_user, "NEW_USER"),
            (self.returning, "RETURNING_USER"),
        ];
        named.into_iter().filter_map(|(is_set, name)| is_set.then_some(name))
    }
}

/// What folding an event found out.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Folded {
    /// Its tags.
    pub tags: Tags,
    /// It opens a session that the history did not have: to be written through first.
    pub opens: bool,
    /// The session it belongs to.
    pub session_id: Option<Arc<str>>,
}

/// Folds an event over a history. `gap` is how long a silence ends a session.
///
/// Doing it twice is the same as once: an event that the history names as its first, or as its session's opener, gets
/// its tags again.
pub(super) fn fold(user_key: &str, mut history: History, seen: &Seen, gap: Duration) -> (History, Folded) {
    let Seen { id, kind, at } = *seen;
    let new_user = history.first_event_id == Some(id);
    let happened = Some(Moment::from(at));
    history.first_seen_at = history.first_seen_at.or(happened);
    history.last_seen_at = history.last_seen_at.max(happened);
    if kind == Kind::Notice {
        return (history, Folded { tags: Tags { new_user, ..Tags::default() }, ..Folded::default() });
    }
    let active_at = history.session_activity_at.or(history.last_message_at);
    let folded = if let Some(own) = opened_before(user_key, &history, seen) {
        let first_alltime = new_user || history.session_count == 1;
        let tags = Tags { new_user, first_alltime, first_session: true, returning: !first_alltime };
        Folded { tags, opens: false, session_id: Some(own.into()) }
    } else {
        let opens = active_at.is_none_or(|active_at| is_past(active_at, at, gap));
        let is_late = !opens && happened < history.session_started_at;
        let first_alltime = opens && history.session_count == 0;
        if opens {
            history.session_count += 1;
            history.session_id = Some(session_id(user_key, id, at).into());
            history.session_started_at = happened;
        }
        let returning = !new_user && !first_alltime;
        let tags = Tags { new_user, first_alltime, first_session: opens, returning };
        Folded { tags, opens, session_id: history.session_id.clone().filter(|_| !is_late) }
    };
    history.session_activity_at = active_at.max(happened);
    history.last_message_at = history.last_message_at.max(happened);
    (history, folded)
}

fn is_past(active_at: Moment, at: Timestamp, gap: Duration) -> bool {
    i128::from(at.as_millisecond() - active_at.as_millisecond())
        >= i128::try_from(gap.as_millis()).unwrap_or(i128::MAX)
}

/// The session that this very message opened, if the history knows it as an opener.
fn opened_before(user_key: &str, history: &History, seen: &Seen) -> Option<String> {
    let is_first = history.first_event_id == Some(seen.id);
    // A session starts when its opener happened: no other message needs its hash taken.
    let may_be = history.session_started_at.is_none_or(|started_at| started_at == seen.at.into());
    if history.session_count == 0 || !is_first && !may_be {
        return None;
    }
    let own = session_id(user_key, seen.id, seen.at);
    (is_first || history.session_id.as_deref() == Some(own.as_str())).then_some(own)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::envelope::id::event_id;

    const KEY: &str = "twitch:1";
    const DAY: Duration = Duration::from_hours(24);
    const DAY_MS: i64 = 24 * 60 * 60 * 1000;
    const START: i64 = 1_700_000_000_000;

    fn seen(name: &str, kind: Kind, after_ms: i64) -> Seen {
        let at = Timestamp::from_millisecond(START + after_ms).unwrap();
        Seen { id: event_id(name), kind, at }
    }

    fn moment(after_ms: i64) -> Option<Moment> {
        Timestamp::from_millisecond(START + after_ms).ok().map(Moment::from)
    }

    fn message(name: &str, after_ms: i64) -> Seen {
        seen(name, Kind::Message, after_ms)
    }

    /// Tags by their initials, `o` for an opening, `s` for a session id.
    fn brief(folded: &Folded) -> String {
        let Tags { new_user, first_alltime, first_session, returning } = folded.tags;
        let letters = [
            (new_user, 'N'),
            (first_alltime, 'A'),
            (first_session, 'S'),
            (returning, 'R'),
            (folded.opens, 'o'),
            (folded.session_id.is_some(), 's'),
        ];
        letters.into_iter().filter_map(|(is_set, letter)| is_set.then_some(letter)).collect()
    }

    fn run(mut history: History, events: &[Seen]) -> (History, Vec<String>) {
        let mut all = Vec::new();
        for event in events {
            let folded;
            (history, folded) = fold(KEY, history, event, DAY);
            all.push(brief(&folded));
        }
        (history, all)
    }

    fn created_by(name: &str) -> History {
        History { first_event_id: Some(event_id(name)), ..History::default() }
    }

    #[test]
    fn a_session_ends_after_the_gap_to_the_millisecond() {
        for (gap_ms, second) in [(DAY_MS - 1, "Rs"), (DAY_MS, "SRos"), (DAY_MS + 1, "SRos")] {
            let (history, tags) = run(created_by("a"), &[message("a", 0), message("b", gap_ms)]);
            assert_eq!(tags, ["NASos", second], "{gap_ms}");
            assert_eq!(history.session_count, if second == "Rs" { 1 } else { 2 });
        }
        // The gap is counted from the last message, not from the session's start.
        let (_, tags) =
            run(created_by("a"), &[message("a", 0), message("b", DAY_MS - 1), message("c", 2 * DAY_MS - 2)]);
        assert_eq!(tags, ["NASos", "Rs", "Rs"]);
    }

    #[test]
    fn openers_get_their_tags_again_and_nothing_moves() {
        let events = [message("a", 0), message("b", 5), message("c", DAY_MS + 5)];
        let (history, tags) = run(created_by("a"), &events);
        assert_eq!(tags, ["NASos", "Rs", "SRos"]);
        let (again, tags) = run(history.clone(), &events);
        // "b" is from before the present session.
        assert_eq!((again, tags), (history, vec!["NASs".to_owned(), "R".to_owned(), "SRs".to_owned()]));
    }

    #[test]
    fn what_comes_out_of_order_moves_nothing_back() {
        let (history, tags) =
            run(created_by("a"), &[message("a", 0), message("b", DAY_MS), message("c", DAY_MS - 1)]);
        assert_eq!(tags, ["NASos", "SRos", "R"]);
        assert_eq!(history.session_activity_at, moment(DAY_MS));
        assert_eq!(history.first_seen_at, moment(0));
        assert_eq!(history.session_count, 2);
    }

    #[test]
    fn an_operators_document_is_no_new_user() {
        let (history, tags) = run(History::default(), &[message("a", 0), message("a", 0), message("b", 1)]);
        assert_eq!(tags, ["ASos", "ASs", "Rs"]);
        assert_eq!(history.first_event_id, None);
    }

    #[test]
    fn a_notice_is_seen_and_neither_counted_nor_a_session() {
        let first = [
            seen("n", Kind::Notice, 0),
            message("a", 1),
            seen("m", Kind::Notice, 2),
            seen("n", Kind::Notice, 0),
        ];
        let (history, tags) = run(created_by("n"), &first);
        assert_eq!(tags, ["N", "ASos", "", "N"]);
        assert_eq!((history.session_count, history.last_message_at), (1, moment(1)));
        assert_eq!(history.last_seen_at, moment(2));
    }

    #[test]
    fn an_old_document_without_sessions_goes_by_its_last_message() {
        let old = History { last_message_at: moment(0), ..History::default() };
        assert_eq!(run(old.clone(), &[message("a", 5)]).1, ["Rs".trim_end_matches('s')]);
        assert_eq!(run(old, &[message("a", DAY_MS)]).1, ["ASos"]);
    }
}
