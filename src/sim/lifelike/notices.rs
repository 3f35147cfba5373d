//! USERNOTICEs: subs, gifts, raids, announcements, milestones and the rest.

use super::super::people::Viewer;
use super::{Lifelike, Line, speech};

/// Gifts at once, at most: what one happening makes is bounded by it.
const MAX_GIFTS: u32 = 10;

impl Lifelike {
    /// A subscription, mostly not the first, sometimes with a word.
    pub(super) fn resub(&mut self, room: usize) {
        let viewer = self.somebody(room);
        let months = if self.rng.u8(..5) == 0 { 1 } else { self.rng.u32(2..60) };
        let (plan, tier) = self.plan();
        let kind = if months == 1 { "sub" } else { "resub" };
        let again =
            if months == 1 { String::new() } else { format!(" They've subscribed for {months} months!") };
        let says = format!("{} subscribed {tier}.{again}", viewer.display);
        let mut line = self.notice(room, &viewer, kind, &says);
        line.tag("msg-param-cumulative-months", months.to_string());
        line.tag("msg-param-months", "0");
        line.tag("msg-param-multimonth-duration", "1");
        line.tag("msg-param-multimonth-tenure", "0");
        line.tag("msg-param-was-gifted", "false");
        line.tag("msg-param-sub-plan", plan);
        line.tag("msg-param-sub-plan-name", format!("Channel Subscription ({})", self.rooms[room].name));
        let streak = self.rng.bool() && months > 1;
        line.tag("msg-param-should-share-streak", u8::from(streak).to_string());
        if streak {
            line.tag("msg-param-streak-months", self.rng.u32(1..=months).to_string());
        }
        if months > 1 && self.rng.bool() {
            self.add_words(&mut line);
        }
        self.send(line);
    }

    fn plan(&mut self) -> (&'static str, &'static str) {
        match self.rng.u8(..20) {
            0 => ("3000", "at Tier 3"),
            1 | 2 => ("2000", "at Tier 2"),
            3..10 => ("Prime", "with Prime"),
            _ => ("1000", "at Tier 1"),
        }
    }

    pub(super) fn subgift(&mut self, room: usize) {
        let giver = self.giver(room);
        let total = self.rng.u32(1..300);
        self.gift(room, &giver, (&total.to_string(), None));
    }

    /// Several at once: one line that says how many, and one for each.
    pub(super) fn mystery_gift(&mut self, room: usize) {
        let giver = self.giver(room);
        let count = self.rng.u32(2..=MAX_GIFTS);
        let total = count + self.rng.u32(..300);
        let origin = self.rng.u64(..).to_string();
        let says = format!(
            "{} is gifting {count} Tier 1 Subs to {}'s community!",
            giver.display, self.rooms[room].name
        );
        let mut line = self.notice(room, &giver, "submysterygift", &says);
        line.tag("msg-param-community-gift-id", origin.clone());
        line.tag("msg-param-mass-gift-count", count.to_string());
        line.tag("msg-param-origin-id", origin.clone());
        line.tag("msg-param-sender-count", total.to_string());
        line.tag("msg-param-sub-plan", "1000");
        self.send(line);
        for _ in 0..count {
            self.gift(room, &giver, ("0", Some(&origin)));
        }
    }

    /// Somebody, or nobody by name.
    fn giver(&mut self, room: usize) -> Viewer {
        let mut giver = self.somebody(room);
        if self.rng.u8(..10) == 0 {
            "ananonymousgifter".clone_into(&mut giver.login);
            "AnAnonymousGifter".clone_into(&mut giver.display);
            "274598607".clone_into(&mut giver.id);
            (giver.months, giver.moderator, giver.vip, giver.premium) = (0, false, false, false);
        }
        giver
    }

    fn gift(&mut self, room: usize, giver: &Viewer, (total, origin): (&str, Option<&str>)) {
        let recipient = self.somebody(room);
        let says = format!("{} gifted a Tier 1 sub to {}!", giver.display, recipient.display);
        let mut line = self.notice(room, giver, "subgift", &says);
        line.tag("msg-param-gift-months", "1");
        line.tag("msg-param-months", self.rng.u32(1..30).to_string());
        line.tag("msg-param-recipient-display-name", recipient.display);
        line.tag("msg-param-recipient-id", recipient.id);
        line.tag("msg-param-recipient-user-name", recipient.login);
        line.tag("msg-param-sender-count", total);
        line.tag("msg-param-sub-plan", "1000");
        line.tag("msg-param-sub-plan-name", format!("Channel Subscription ({})", self.rooms[room].name));
        if let Some(origin) = origin {
            line.tag("msg-param-community-gift-id", origin);
            line.tag("msg-param-origin-id", origin);
        }
        self.send(line);
    }

    pub(super) fn raid(&mut self, room: usize) {
        let raider = self.somebody(room);
        let viewers = self.rng.u32(1..5_000);
        let says = format!("{viewers} raiders from {} have joined!", raider.display);
        let mut line = self.notice(room, &raider, "raid", &says);
        line.tag("msg-param-displayName", raider.display.clone());
        line.tag("msg-param-login", raider.login.clone());
        line.tag(
            "msg-param-profileImageURL",
            "https://static-cdn.jtvnw.net/jtv_user_pictures/x-profile_image-%s.png",
        );
        line.tag("msg-param-viewerCount", viewers.to_string());
        self.send(line);
    }

    pub(super) fn announcement(&mut self, room: usize) {
        let owner = self.owner(room);
        let mut line = self.notice(room, &owner, "announcement", "");
        line.tag("msg-param-color", ["PRIMARY", "BLUE", "GREEN", "ORANGE", "PURPLE"][self.rng.usize(..5)]);
        self.add_words(&mut line);
        self.send(line);
    }

    pub(super) fn milestone(&mut self, room: usize) {
        let viewer = self.somebody(room);
        let value = self.rng.u32(1..20) * 5;
        let says =
            format!("{} watched {value} consecutive streams and sparked a watch streak!", viewer.display);
        let mut line = self.notice(room, &viewer, "viewermilestone", &says);
        line.tag("msg-param-category", "watch-streak");
        line.tag("msg-param-copoReward", "450");
        let id = self.id();
        line.tag("msg-param-id", id);
        line.tag("msg-param-value", value.to_string());
        self.add_words(&mut line);
        self.send(line);
    }

    /// The rarer ones, and one that nobody has heard of: new kinds appear unannounced.
    pub(super) fn other_notice(&mut self, room: usize) {
        let viewer = self.somebody(room);
        let (kind, says) = [
            ("giftpaidupgrade", "is continuing the Gift Sub they got!"),
            ("primepaidupgrade", "converted from a Prime sub to a Tier 1 sub!"),
            ("bitsbadgetier", "just earned a new 10K Bits badge!"),
            ("charitydonation", "donated USD 5.00 to support a good cause!"),
            ("somethingnew", "did what nobody has done before; twice"),
        ][self.rng.usize(..5)];
        let mut line = self.notice(room, &viewer, kind, &format!("{} {says}", viewer.display));
        if kind == "bitsbadgetier" {
            line.tag("msg-param-threshold", "10000");
        }
        self.send(line);
    }

    fn notice(&mut self, room: usize, viewer: &Viewer, kind: &str, says: &str) -> Line {
        let id = self.id();
        let mut line = self.line_of(room, viewer, &id);
        line.command = "USERNOTICE";
        line.tag("login", viewer.login.clone());
        line.tag("msg-id", kind);
        line.tag("system-msg", says);
        line
    }

    /// What the viewer says to it.
    fn add_words(&mut self, line: &mut Line) {
        speech::roll(&mut self.text, "chat", &mut self.rng);
        let mut emotes = bytes::BytesMut::new();
        self.text.put_emotes(&mut emotes);
        line.tag("emotes", String::from_utf8_lossy(&emotes));
        line.text = Some(self.text.bytes.clone());
    }
}
