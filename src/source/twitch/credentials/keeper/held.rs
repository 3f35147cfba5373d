//! The token in use, and when something is to be done with it. Pure: time is an argument.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

use super::super::{Stored, Token};

/// Twitch wants every token validated at the start and every hour; a little less, so that it is never more.
const VALIDATE_EVERY: SignedDuration = SignedDuration::from_mins(57);
/// A token is refreshed when a tenth of its life is left, or so much, if that is less; up to half as much earlier, so that
/// instances do not come together.
const LONGEST_MARGIN: SignedDuration = SignedDuration::from_mins(15);

/// What is to be done next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// Look at what is stored.
    Read,
    /// Store the token that was got.
    Put,
    /// Ask whose the token is.
    Validate,
    /// Get the next one.
    Refresh,
}

/// The token in use.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) stored: Stored,
    pub(super) validated_at: Option<Timestamp>,
    /// When to get the next one.
    pub(super) refresh_at: Option<Timestamp>,
    /// Twitch does not take it.
    pub(super) is_refused: bool,
    /// It was chat that did not take it.
    pub(super) is_refused_by_chat: bool,
    /// It was got because chat did not take the one before, and it is not known whether it is any better.
    pub(super) is_unproven: bool,
}

impl Held {
    pub(super) fn new(stored: Stored, validated_at: Option<Timestamp>) -> Self {
        let refresh_at = refresh_at(&stored.token, fastrand::f64());
        Self {
            stored,
            validated_at,
            refresh_at,
            is_refused: false,
            is_refused_by_chat: false,
            is_unproven: false,
        }
    }

    pub(super) fn token(&self) -> &Token {
        &self.stored.token
    }

    /// Whether one can log in with it, as far as is known.
    pub(super) fn is_usable(&self, now: Timestamp) -> bool {
        let is_expired = self.token().expires_at().is_some_and(|at| at <= now);
        self.token().login.is_some() && !self.is_refused && !is_expired
    }

    /// What to do with it, and how long from now.
    pub(super) fn next(&self, can_refresh: bool, now: Timestamp) -> (Step, Duration) {
        let until = |at: Timestamp| Duration::try_from(at.duration_since(now)).unwrap_or_default();
        let next_validation = |at: Timestamp| at.checked_add(VALIDATE_EVERY).ok();
        let validate_at = self.validated_at.filter(|_| !self.is_refused).and_then(next_validation);
        let validate_in = validate_at.map_or(Duration::ZERO, until);
        if !can_refresh || self.token().refresh.is_none() {
            return (Step::Validate, validate_in);
        }
        let refresh_in = if self.is_refused { Some(Duration::ZERO) } else { self.refresh_at.map(until) };
        match refresh_in {
            Some(refresh_in) if refresh_in <= validate_in => (Step::Refresh, refresh_in),
            _ => (Step::Validate, validate_in),
        }
    }
}

/// When a token is to be refreshed; `share`, from 0 to 1, spreads instances.
pub(super) fn refresh_at(token: &Token, share: f64) -> Option<Timestamp> {
    let (expires_at, seconds) = (token.expires_at()?, token.expires_in?);
    let life = SignedDuration::from_secs(i64::try_from(seconds).ok()?);
    let margin = (life / 10).min(LONGEST_MARGIN).mul_f64(1.0 + share / 2.0);
    expires_at.checked_sub(margin).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secret::Secret;

    const HOUR: i64 = 3_600;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn held(expires_in: Option<u64>, validated_at: Option<i64>) -> Held {
        let token = Token {
            access: Secret::new("a"),
            refresh: Some(Secret::new("r")),
            expires_in,
            obtained: Some(at(0)),
            scope: Vec::new(),
            user_id: None,
            login: Some("bot".into()),
        };
        Held::new(Stored { token, claim: None, revision: 1 }, validated_at.map(at))
    }

    fn next(held: &Held, now: i64) -> (Step, u64) {
        let (step, wait) = held.next(true, at(now));
        (step, wait.as_secs())
    }

    #[test]
    fn a_token_is_validated_at_the_start_and_every_hour_and_refreshed_before_it_expires() {
        let held = held(Some(14_400), None);
        assert_eq!(next(&held, 0), (Step::Validate, 0));
        let mut held = Held { validated_at: Some(at(0)), ..held };
        let (step, wait) = next(&held, 0);
        assert!(step == Step::Validate && (3_000..=3_600).contains(&wait), "{wait}");
        held.validated_at = Some(at(3 * HOUR));
        let (step, wait) = next(&held, 3 * HOUR);
        assert!(
            step == Step::Refresh && (HOUR - 1_350..=HOUR - 900).contains(&i64::try_from(wait).unwrap()),
            "{wait}"
        );
        assert_eq!(next(&held, 4 * HOUR), (Step::Refresh, 0));
    }

    #[test]
    fn instances_do_not_refresh_together() {
        let token = held(Some(14_400), None).stored.token;
        let spread: Vec<_> =
            [0.0, 0.5, 1.0].iter().map(|share| refresh_at(&token, *share).unwrap().as_second()).collect();
        assert_eq!(spread, [14_400 - 900, 14_400 - 1_125, 14_400 - 1_350]);
        let short = held(Some(20), None).stored.token;
        assert_eq!(refresh_at(&short, 0.0), Timestamp::from_second(18).ok());
        assert_eq!(refresh_at(&held(None, None).stored.token, 0.0), None);
    }

    #[test]
    fn what_twitch_refuses_is_refreshed_at_once_and_asked_about_where_it_cannot_be() {
        let refused = Held { is_refused: true, ..held(Some(14_400), Some(0)) };
        assert_eq!(next(&refused, 1), (Step::Refresh, 0));
        assert_eq!(refused.next(false, at(1)), (Step::Validate, Duration::ZERO));
        let mut without = refused;
        without.stored.token.refresh = None;
        assert_eq!(next(&without, 1), (Step::Validate, 0));
        // One that expires and cannot be refreshed is validated every hour as any other.
        without.is_refused = false;
        let (step, wait) = next(&without, 10);
        assert!(step == Step::Validate && wait > 3_000, "{wait}");
    }

    #[test]
    fn one_logs_in_with_what_is_not_known_to_be_bad() {
        let good = held(Some(100), None);
        assert!(good.is_usable(at(99)) && !good.is_usable(at(100)));
        assert!(held(None, None).is_usable(at(1_000_000)));
        assert!(!Held { is_refused: true, ..held(None, None) }.is_usable(at(0)));
        let mut nameless = held(None, None);
        nameless.stored.token.login = None;
        assert!(!nameless.is_usable(at(0)));
    }
}
