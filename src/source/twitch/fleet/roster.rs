//! Channels that come, go and change their names while the connections stand.

use std::collections::BTreeMap;
use std::sync::Arc;

use jiff::Timestamp;
use tokio::time::Instant;

use super::super::connection::Order;
use super::super::plan::ConnectionId;
use super::super::roster::{RoomId, Roster};
use super::{Fleet, Leave};
use crate::envelope::draft::GapCause;
use crate::errors::ErrorCode;

/// The limit of channels per account that Twitch announced in May 2024.
const CHANNELS_PER_ACCOUNT: usize = 100;

impl Fleet {
    /// From now on these channels are wanted.
    pub(super) fn follow(&mut self, roster: &Arc<Roster>, now: Instant) {
        let before = std::mem::replace(&mut self.roster, Arc::clone(roster));
        self.warn_of_too_many(&before, roster);
        self.rename(&before, roster, now);
        for login in before.channels.keys().filter(|login| !roster.channels.contains_key(*login)) {
            self.part(login, now);
            self.ledger.forget(login);
        }
        for (login, wanted) in &roster.channels {
            if !before.channels.contains_key(login) {
                self.plan.add(login, false);
                self.ledger.want(login, wanted.since, wanted.former.as_deref());
            }
        }
        if roster.is_whole && !before.is_whole {
            self.ledger.all_are_wanted();
        }
        self.shared.known.set(roster);
        self.lookout.sights.send_if_modified(|sights| sights.keep(roster));
    }

    fn warn_of_too_many(&self, before: &Roster, roster: &Roster) {
        let is_more = |roster: &Roster| roster.channels.len() > CHANNELS_PER_ACCOUNT;
        let has_account = self.shared.status.credentials().account().is_some();
        if has_account && is_more(roster) && !is_more(before) {
            let (channels, limit) = (roster.channels.len(), CHANNELS_PER_ACCOUNT);
            tracing::warn!(error_code = %ErrorCode::TooManyChannels, channels, limit, "Twitch may refuse channels beyond its limit for an account");
        }
    }

    /// Rooms that have another login now are joined under it; what was missed since is a gap.
    fn rename(&mut self, before: &Roster, roster: &Roster, now: Instant) {
        let rooms = roster.rooms();
        let of_rooms =
            before.rooms().into_iter().filter_map(|(room, login)| Some((login, *rooms.get(&room)?)));
        // Its room was not known here yet when another instance heard of the new name.
        let of_others = roster
            .channels
            .iter()
            .filter_map(|(login, wanted)| Some((wanted.former.as_deref()?, login.as_str())));
        let renamed: BTreeMap<_, _> =
            of_others.filter(|(login, _)| before.channels.contains_key(*login)).chain(of_rooms).collect();
        for (login, new_login) in renamed.into_iter().filter(|(login, new_login)| login != new_login) {
            if roster.channels.contains_key(login) || before.channels.contains_key(new_login) {
                // One of the two is wanted for itself as well.
                continue;
            }
            tracing::info!(channel = login, renamed_to = new_login, "the channel has another name now");
            self.ledger.renamed(login, new_login, self.shared.known.last_said(login));
            self.part(login, now);
            self.plan.add(new_login, true);
        }
    }

    fn part(&mut self, login: &str, now: Instant) {
        for id in self.plan.remove(login, now) {
            self.order(id, Order::Part(login.to_owned()));
        }
    }

    /// Whether the room that answered to a login is the one that is wanted under it. Another one is left.
    pub(super) fn is_right(
        &mut self,
        id: ConnectionId,
        login: &str,
        (room, at): (Option<RoomId>, Timestamp),
    ) -> bool {
        let Some(wanted) = self.roster.channels.get(login) else { return true };
        // Which room answers is said by its ROOMSTATE; where a certain one is wanted, that is waited for.
        let Some(room) = room else { return wanted.is_fixed || wanted.room.is_none() };
        let now = Instant::now();
        self.lookout.saw(room, login, at, &self.roster);
        if wanted.is_fixed || wanted.room.is_none_or(|wanted| wanted == room) {
            return true;
        }
        let was_heard = self.plan.is_heard(login);
        if self.plan.is_another(id, login, now) {
            tracing::warn!(error_code = %ErrorCode::ChannelChanged, channel = login, "the login is another channel's now");
        }
        self.order(id, Order::Part(login.to_owned()));
        if was_heard && !self.plan.is_heard(login) {
            self.ledger.unheard(login, GapCause::Removed);
        }
        false
    }

    /// Lets go of a connection that is not needed any more. Its channels are joined on the others before.
    pub(super) fn shrink(&mut self) {
        while let Some(id) = self.plan.surplus() {
            self.plan.leaving(id);
            if let Some(berth) = self.berths.get_mut(&id) {
                berth.leave = Leave::Surplus;
            }
            tracing::info!(connection = id, "a connection is not needed any more");
        }
    }

    /// Says which rooms are wanted under a login that does not answer.
    pub(super) fn look_for_unanswered(&self) {
        let room = |login: &str| self.roster.channels.get(login)?.room;
        let unanswered: BTreeMap<_, _> =
            self.plan.unanswered().filter_map(|login| Some((room(login)?, login.to_owned()))).collect();
        self.lookout.unanswered.send_if_modified(|before| {
            let is_other = *before != unanswered;
            *before = unanswered;
            is_other
        });
    }
}
