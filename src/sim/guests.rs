//! What those who are connected bring about among each other: their messages, their coming and going.

use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::{BufMut, Bytes};

use super::chat::put_id;
use super::delivery::Delivery;
use super::hub::{Hub, Peer};
use super::lines::{Lines, Mark};
use super::session::is_anonymous;

/// Brings a client's own message to the others in the channel.
pub(super) async fn say(peer: &Peer, login: &str, (channel, text): &(String, String), delivery: &Delivery) {
    let mut lines = Lines::default();
    let slot = lines.slot(channel);
    let out = lines.buffer(slot);
    let badges = if login == channel { "broadcaster/1" } else { "" };
    out.put_slice(
        format!("@badge-info=;badges={badges};color=;display-name={login};emotes=;first-msg=0;flags=;id=")
            .as_bytes(),
    );
    let id_at = out.len();
    put_id(&mut fastrand::Rng::new(), out);
    let id = id_at..out.len();
    out.put_slice(
        format!(
            ";mod=0;returning-chatter=0;room-id={};subscriber=0;tmi-sent-ts={};turbo=0;user-id=",
            delivery.hub.names().room_id(channel),
            (delivery.now)()
        )
        .as_bytes(),
    );
    let user_at = out.len();
    out.put_slice(delivery.hub.names().room_id(login).to_string().as_bytes());
    let user = user_at..out.len();
    out.put_slice(
        format!(";user-type= :{login}!{login}@{login}.tmi.twitch.tv PRIVMSG #{channel} :{text}\r\n")
            .as_bytes(),
    );
    lines.mark(slot, Mark { id: Some(id), user: Some(user), ..Mark::default() });
    for chunk in lines.drain() {
        delivery.deliver(&chunk, Some(peer.id)).await;
    }
}

/// Tells those in `channels` who asked to be told that somebody came (`JOIN`) or went (`PART`). Nobody hears of those
/// without an account, and nobody is waited for.
pub(super) async fn tell(peer: &Peer, command: &str, channels: &[String], hub: &Hub) {
    let Some(login) = peer.login().filter(|login| !is_anonymous(login)) else {
        return;
    };
    for channel in channels {
        let line = Bytes::from(format!(":{login}!{login}@{login}.tmi.twitch.tv {command} #{channel}\r\n"));
        for other in hub.members(channel) {
            if other.id != peer.id && other.membership.load(Ordering::Relaxed) && other.speaks() {
                other.queue.push(&line, Some(Duration::ZERO)).await;
            }
        }
    }
}
