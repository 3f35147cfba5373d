//! What the tags say about the text and its author: emotes, badges, roles, `/me`.

use crate::envelope::draft::{Emote, Role};

/// The text without the wrapping of `/me`, and whether it had one.
pub(super) fn unwrap_action(text: &str) -> (&str, bool) {
    match text.strip_prefix("\u{1}ACTION ") {
        // Some clients leave out the closing sign.
        Some(action) => (action.strip_suffix('\u{1}').unwrap_or(action), true),
        None => (text, false),
    }
}

/// Emotes of the tag `emotes` (`id:from-to,from-to/id:…`, code points, ends inclusive), by position, and how
/// many ranges do not fit the text.
pub(super) fn emotes<'a>(tag: &'a str, text: &'a str) -> (Vec<Emote<'a>>, u64) {
    if tag.is_empty() {
        return (Vec::new(), 0);
    }
    let points = CodePoints::new(text);
    let mut emotes = Vec::new();
    let mut dropped = 0;
    for part in tag.split('/').filter(|part| !part.is_empty()) {
        let Some((id, ranges)) = part.rsplit_once(':').filter(|(id, _)| !id.is_empty()) else {
            dropped += 1;
            continue;
        };
        for range in ranges.split(',') {
            match emote(id, range, &points) {
                Some(emote) => emotes.push(emote),
                None => dropped += 1,
            }
        }
    }
    emotes.sort_by_key(|emote| (emote.start, emote.end));
    (emotes, dropped)
}

fn emote<'a>(id: &'a str, range: &str, points: &CodePoints<'a>) -> Option<Emote<'a>> {
    let (from, to) = range.split_once('-')?;
    let (start, last): (usize, usize) = (from.parse().ok()?, to.parse().ok()?);
    let end = last.checked_add(1)?;
    let name = points.slice(start, end)?;
    Some(Emote { id, name, start, end })
}

/// A text that can be cut by code points.
struct CodePoints<'a> {
    text: &'a str,
    /// Byte offset of each code point and of the end; empty for ASCII, where they are the same.
    offsets: Vec<usize>,
}

impl<'a> CodePoints<'a> {
    fn new(text: &'a str) -> Self {
        let offsets = if text.is_ascii() {
            Vec::new()
        } else {
            text.char_indices().map(|(offset, _)| offset).chain([text.len()]).collect()
        };
        Self { text, offsets }
    }

    fn slice(&self, start: usize, end: usize) -> Option<&'a str> {
        if start >= end {
            return None;
        }
        if self.offsets.is_empty() {
            return self.text.get(start..end);
        }
        self.text.get(*self.offsets.get(start)?..*self.offsets.get(end)?)
    }
}

/// `name/version,…` as a list.
pub(super) fn badges(tag: &str) -> Vec<&str> {
    tag.split(',').filter(|badge| !badge.is_empty()).collect()
}

/// What the badges and the tags `mod`, `vip`, `subscriber` make of a user; highest first.
pub(super) fn roles(badges: &[&str], is_tagged: impl Fn(&str) -> bool) -> Vec<Role> {
    let has = |name: &str| badges.iter().any(|badge| badge.split('/').next() == Some(name));
    let held = [
        (Role::Broadcaster, has("broadcaster")),
        (Role::Moderator, has("moderator") || has("lead_moderator") || is_tagged("mod")),
        (Role::Vip, has("vip") || is_tagged("vip")),
        (Role::Subscriber, has("subscriber") || has("founder") || is_tagged("subscriber")),
    ];
    let roles: Vec<_> = held.into_iter().filter_map(|(role, held)| held.then_some(role)).collect();
    if roles.is_empty() { vec![Role::Viewer] } else { roles }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn action_is_unwrapped_only_at_the_start() {
        assert_eq!(unwrap_action("\u{1}ACTION waves\u{1}"), ("waves", true));
        assert_eq!(unwrap_action("\u{1}ACTION waves"), ("waves", true));
        assert_eq!(unwrap_action("\u{1}ACTION \u{1}"), ("", true));
        assert_eq!(unwrap_action("x \u{1}ACTION waves\u{1}"), ("x \u{1}ACTION waves\u{1}", false));
        assert_eq!(unwrap_action("\u{1}VERSION\u{1}"), ("\u{1}VERSION\u{1}", false));
    }

    fn found(tag: &str, text: &str) -> (Vec<(String, String, usize, usize)>, u64) {
        let (emotes, dropped) = emotes(tag, text);
        (
            emotes
                .into_iter()
                .map(|emote| (emote.id.to_owned(), emote.name.to_owned(), emote.start, emote.end))
                .collect(),
            dropped,
        )
    }

    fn emote_at(id: &str, name: &str, start: usize, end: usize) -> (String, String, usize, usize) {
        (id.to_owned(), name.to_owned(), start, end)
    }

    #[test]
    fn emotes_are_cut_by_code_point() {
        assert_eq!(found("25:6-10", "Hello Kappa!"), (vec![emote_at("25", "Kappa", 6, 11)], 0));
        assert_eq!(found("25:1-5", "😂Kappa😂"), (vec![emote_at("25", "Kappa", 1, 6)], 0));
        let both = vec![emote_at("25", "Kappa", 0, 5), emote_at("1902", "Keepo", 6, 11)];
        assert_eq!(found("1902:6-10/25:0-4", "Kappa Keepo"), (both, 0));
        assert_eq!(found("emotesv2_a:0-0", "e\u{301}"), (vec![emote_at("emotesv2_a", "e", 0, 1)], 0));
    }

    #[test]
    fn ranges_that_do_not_fit_are_left_out_and_counted() {
        for (tag, text, dropped) in [
            ("25:4-0", "Kappa", 1),
            ("84608:9-10", "foo bar", 1),
            ("25:0-4,3-99", "Kappa", 1),
            ("25:x-4", "Kappa", 1),
            ("25", "Kappa", 1),
            ("25:", "Kappa", 1),
            (":0-4", "Kappa", 1),
            ("25:0-18446744073709551615", "Kappa", 1),
            ("25:-1-4", "Kappa", 1),
            ("25:0-4//", "Kappa", 0),
            ("25:0-0", "", 1),
            ("25:0-6", "😂Kappa", 1),
        ] {
            assert_eq!(found(tag, text).1, dropped, "{tag} in {text}");
        }
    }

    #[test]
    fn roles_come_from_badges_and_tags_highest_first() {
        let of = |list: &str, tagged: &[&str]| roles(&badges(list), |key| tagged.contains(&key));
        assert_eq!(of("", &[]), [Role::Viewer]);
        assert_eq!(of("premium/1", &[]), [Role::Viewer]);
        assert_eq!(of("subscriber/12,broadcaster/1", &[]), [Role::Broadcaster, Role::Subscriber]);
        assert_eq!(of("lead_moderator/1", &[]), [Role::Moderator]);
        assert_eq!(of("founder/0,vip/1", &["mod"]), [Role::Moderator, Role::Vip, Role::Subscriber]);
        assert_eq!(of("", &["subscriber", "vip"]), [Role::Vip, Role::Subscriber]);
        assert_eq!(of("moderator_of_the_year/1", &[]), [Role::Viewer]);
    }
}
