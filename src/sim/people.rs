//! The simulated viewers: a Zipf curve to choose from, and each one's part of a line formatted once.

use std::ops::Range;

use super::words::{COLORS, NAMES, SURNAMES};

/// At most so many viewers: each costs about 350 bytes.
pub(super) const MAX_USERS: u32 = 1_000_000;
const USER_ID_KEY: &str = ";turbo=0;user-id=";

/// Chooses a rank: the first is the most frequent, the k-th `k^-s` times as frequent.
#[derive(Debug)]
pub(super) struct Zipf {
    cumulative: Vec<f64>,
}

impl Zipf {
    pub(super) fn new(ranks: u32, exponent: f64) -> Self {
        let mut total = 0.0;
        let cumulative = (1..=ranks.max(1)).map(|rank| {
            total += f64::from(rank).powf(-exponent);
            total
        });
        Self { cumulative: cumulative.collect() }
    }

    /// A rank from 0, for a `uniform` in `0.0..1.0`.
    pub(super) fn pick(&self, uniform: f64) -> usize {
        let last = self.cumulative.len() - 1;
        let at = uniform * self.cumulative[last];
        self.cumulative.partition_point(|&upto| upto <= at).min(last)
    }
}

/// The fixed parts of a viewer's lines, in the order of Twitch's tags.
#[derive(Debug)]
pub(super) struct Parts<'a> {
    /// `@badge-info=…;badges=…`
    pub(super) badges: &'a [u8],
    /// `;color=…;display-name=…;emotes=`
    pub(super) look: &'a [u8],
    /// `;mod=…;returning-chatter=…;room-id=`
    pub(super) standing: &'a [u8],
    /// `;subscriber=…;tmi-sent-ts=`
    pub(super) subscriber: &'a [u8],
    /// `;turbo=0;user-id=…;user-type=… :login!login@login.tmi.twitch.tv PRIVMSG #`
    pub(super) who: &'a [u8],
    /// Where in `who` the user's id stands.
    pub(super) user_id: Range<usize>,
}

/// All viewers, formatted into one block of memory.
#[derive(Debug)]
pub(super) struct People {
    bytes: Vec<u8>,
    /// Six numbers per viewer: where its five parts start, and how long its id is.
    index: Vec<[usize; 6]>,
}

impl People {
    pub(super) fn new(users: u32) -> Self {
        let users = users.clamp(1, MAX_USERS);
        let mut people = Self { bytes: Vec::new(), index: Vec::new() };
        for user in 0..users {
            people.add(user);
        }
        people
    }

    /// The parts of viewer `user`, which must be one of those made.
    pub(super) fn parts(&self, user: usize) -> Parts<'_> {
        let [badges, look, standing, subscriber, who, id_len] = self.index[user];
        let end = self.index.get(user + 1).map_or(self.bytes.len(), |next| next[0]);
        Parts {
            badges: &self.bytes[badges..look],
            look: &self.bytes[look..standing],
            standing: &self.bytes[standing..subscriber],
            subscriber: &self.bytes[subscriber..who],
            who: &self.bytes[who..end],
            user_id: USER_ID_KEY.len()..USER_ID_KEY.len() + id_len,
        }
    }

    fn add(&mut self, user: u32) {
        let viewer = viewer(user);
        let Viewer { login, display, id, color, .. } = &viewer;
        let (info, badges) = (viewer.badge_info(), viewer.badges());
        let user_type = if viewer.moderator { "mod" } else { "" };
        let vip_tag = if viewer.vip { ";vip=1" } else { "" };
        let parts = [
            format!("@badge-info={info};badges={badges}"),
            format!(";color={color};display-name={display};emotes="),
            format!(
                ";mod={};returning-chatter={};room-id=",
                u8::from(viewer.moderator),
                u8::from(viewer.returning)
            ),
            format!(";subscriber={};tmi-sent-ts=", u8::from(viewer.months > 0)),
            format!(
                "{USER_ID_KEY}{id};user-type={user_type}{vip_tag} \
                 :{login}!{login}@{login}.tmi.twitch.tv PRIVMSG #"
            ),
        ];
        let mut entry = [0; 6];
        for (start, part) in entry.iter_mut().zip(&parts) {
            *start = self.bytes.len();
            self.bytes.extend_from_slice(part.as_bytes());
        }
        entry[5] = id.len();
        self.index.push(entry);
    }
}

/// What does not change about a viewer.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "any of these may go with any other")]
pub(super) struct Viewer {
    pub(super) login: String,
    pub(super) display: String,
    pub(super) id: String,
    pub(super) color: &'static str,
    /// Months of subscription; 0: none.
    pub(super) months: u32,
    pub(super) moderator: bool,
    pub(super) vip: bool,
    pub(super) premium: bool,
    pub(super) returning: bool,
}

/// Viewer `user`: the same in every run.
pub(super) fn viewer(user: u32) -> Viewer {
    let nth = user as usize;
    let (first, last) = (NAMES[nth % NAMES.len()], SURNAMES[nth / NAMES.len() % SURNAMES.len()]);
    let login = format!("{first}_{last}{user}");
    let display = match user % 20 {
        7 => format!("さくら{user}"),
        8 | 9 => login.clone(),
        _ => format!("{}_{}{user}", capital(first), capital(last)),
    };
    let moderator = user % 17 == 3;
    Viewer {
        login,
        display,
        id: (10_000_019 + u64::from(user) * 787).to_string(),
        color: COLORS[nth % COLORS.len()],
        months: if user % 3 == 1 { user % 40 + 1 } else { 0 },
        moderator,
        vip: !moderator && user % 23 == 5,
        premium: user % 5 == 2,
        returning: user % 13 == 4,
    }
}

impl Viewer {
    /// The value of `badge-info`.
    pub(super) fn badge_info(&self) -> String {
        if self.months > 0 { format!("subscriber/{}", self.months) } else { String::new() }
    }

    /// The value of `badges`.
    pub(super) fn badges(&self) -> String {
        let mut badges = Vec::new();
        badges.extend(self.moderator.then(|| "moderator/1".to_owned()));
        badges.extend(self.vip.then(|| "vip/1".to_owned()));
        badges.extend((self.months > 0).then(|| format!("subscriber/{}", self.months / 3 * 3)));
        badges.extend(self.premium.then(|| "premium/1".to_owned()));
        badges.join(",")
    }
}

fn capital(word: &str) -> String {
    let (head, tail) = word.split_at(1);
    format!("{}{tail}", head.to_ascii_uppercase())
}

/// The id of a channel's room: the same in every run (FNV-1a of its name, brought into Twitch's range).
pub(super) fn room_id(channel: &str) -> u64 {
    let hash = channel.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    10_000_000 + hash % 900_000_000
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zipf_favours_the_first_as_it_should() {
        let zipf = Zipf::new(500, 1.0);
        let mut rng = fastrand::Rng::with_seed(7);
        let mut seen = vec![0_u32; 500];
        for _ in 0..200_000 {
            seen[zipf.pick(rng.f64())] += 1;
        }
        // H(500) = 6.793: the first has 14.7 %, the tenth a tenth of that.
        assert!((28_000..31_000).contains(&seen[0]), "{}", seen[0]);
        assert!((2_500..3_400).contains(&seen[9]), "{}", seen[9]);
        assert_eq!(Zipf::new(1, 2.0).pick(0.999), 0);
    }

    #[test]
    fn a_viewers_parts_are_where_they_are_said_to_be() {
        let people = People::new(1_000);
        for user in [0, 1, 7, 500, 999] {
            let parts = people.parts(user);
            assert!(parts.badges.starts_with(b"@badge-info="));
            assert!(parts.who.ends_with(b".tmi.twitch.tv PRIVMSG #"));
            let id = viewer(u32::try_from(user).unwrap()).id;
            assert_eq!(&parts.who[parts.user_id], id.as_bytes());
        }
    }
}
