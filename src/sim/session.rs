//! What one connection says and what Twitch would answer: the protocol alone, without a socket.
//!
//! Answers follow the forms Twitch sends (`tmi.twitch.tv`, its welcome text, its silence where it is silent): a
//! channel name that cannot exist is never answered, a wrong login gets a NOTICE without tags and the connection ends.
//! What a client did not ask for by `CAP REQ` it does not get.

use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

use tokio::time::Instant;

use super::faults::LoginRefusal;
use super::hub::Hub;

/// One connection may be in so many channels; further JOINs vanish, as over Twitch's own limit.
const MAX_CHANNELS: usize = 1_000;
const KNOWN_CAPS: [&str; 3] = ["twitch.tv/tags", "twitch.tv/commands", "twitch.tv/membership"];
/// Names in one answer to a JOIN: a line has to stay short.
const MAX_NAMES: usize = 15;
/// Twitch lets an ordinary account say so much in so long.
const MAX_SAID: usize = 20;
const SAID_WITHIN: Duration = Duration::from_secs(30);
/// A longer text is cut, in characters.
const MAX_TEXT_CHARS: usize = 500;
/// Under this name the JOINs of all anonymous connections are counted: they share one address.
pub(super) const ANONYMOUS: &str = "anonymous";

/// What a line of the client leads to.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Reply {
    /// To be sent, whole lines.
    pub(super) text: String,
    /// Channels to deliver from now on, after `text`.
    pub(super) joined: Vec<String>,
    pub(super) parted: Vec<String>,
    /// Channel and text of a message to the others there.
    pub(super) said: Option<(String, String)>,
    /// The connection ends after `text`.
    pub(super) close: bool,
}

/// One connection's state.
#[derive(Debug, Default)]
pub(super) struct Session {
    /// Set once the login was accepted.
    pub(super) login: Option<String>,
    pass: Option<String>,
    pub(super) tags: bool,
    pub(super) commands: bool,
    pub(super) membership: bool,
    channels: BTreeSet<String>,
    /// When it said something lately.
    said: VecDeque<Instant>,
    /// JOINs it sent, each channel of a list as one.
    pub(super) joins: u64,
}

impl Session {
    /// Takes one line, without its end.
    pub(super) fn answer(&mut self, line: &str, hub: &Hub, now: Instant) -> Reply {
        let line = line.trim_end_matches(['\r', '\n']);
        // A client may put tags or a prefix before its command; neither means anything here.
        let mut rest = line.trim_start();
        while rest.starts_with('@') || rest.starts_with(':') {
            rest = rest.split_once(' ').map_or("", |(_, after)| after.trim_start());
        }
        let (command, rest) = rest.split_once(' ').unwrap_or((rest, ""));
        let rest = rest.trim_start();
        match command.to_ascii_uppercase().as_str() {
            "CAP" => self.cap(rest),
            "PASS" => {
                self.pass = Some(text_of(rest).to_owned());
                Reply::default()
            }
            "NICK" => self.nick(text_of(rest), hub),
            "JOIN" => self.join(rest, hub, now),
            "PART" => self.part(rest),
            "PRIVMSG" => self.say(rest, now),
            // tmi.js pings without a word, and takes for an answer only what has no prefix.
            "PING" if rest.is_empty() => Reply::say("PONG\r\n".to_owned()),
            "PING" => Reply::say(format!(":tmi.twitch.tv PONG tmi.twitch.tv :{}\r\n", text_of(rest))),
            "QUIT" => Reply { close: true, ..Reply::default() },
            "" | "PONG" | "USER" | "NOTICE" => Reply::default(),
            _ => self.unknown(command),
        }
    }

    fn cap(&mut self, rest: &str) -> Reply {
        let (verb, rest) = rest.split_once(' ').unwrap_or((rest, ""));
        let asked = text_of(rest.trim_start());
        let has = |name: &str| asked.split_whitespace().any(|cap| cap == name);
        match verb.to_ascii_uppercase().as_str() {
            "LS" => Reply::say(format!(":tmi.twitch.tv CAP * LS :{}\r\n", KNOWN_CAPS.join(" "))),
            "LIST" => {
                let have = [self.tags, self.commands, self.membership];
                let have = KNOWN_CAPS.into_iter().zip(have).filter(|(_, have)| *have).map(|(name, _)| name);
                Reply::say(format!(":tmi.twitch.tv CAP * LIST :{}\r\n", have.collect::<Vec<_>>().join(" ")))
            }
            "REQ" if asked.split_whitespace().all(|cap| KNOWN_CAPS.contains(&cap)) => {
                self.tags |= has(KNOWN_CAPS[0]);
                self.commands |= has(KNOWN_CAPS[1]);
                self.membership |= has(KNOWN_CAPS[2]);
                Reply::say(format!(":tmi.twitch.tv CAP * ACK :{}\r\n", asked.trim()))
            }
            "REQ" => Reply::say(format!(":tmi.twitch.tv CAP * NAK :{}\r\n", asked.trim())),
            _ => Reply::default(),
        }
    }

    fn nick(&mut self, nick: &str, hub: &Hub) -> Reply {
        if self.login.is_some() {
            return Reply::default();
        }
        let nick = nick.trim().to_ascii_lowercase();
        let token = self.pass.as_deref().and_then(|pass| pass.strip_prefix("oauth:"));
        let bad_nick = (!is_login(&nick)).then_some(LoginRefusal::Nick);
        let policy = hub.policy();
        let no_token = (!is_anonymous(&nick) && token.is_none()).then_some(LoginRefusal::Format);
        let is_wrong =
            |token| policy.accept_tokens.as_ref().is_some_and(|fine| !fine.iter().any(|t| t == token));
        let bad_token = (!is_anonymous(&nick) && token.is_some_and(is_wrong)).then_some(LoginRefusal::Failed);
        if let Some(why) = policy.refuse_login.or(bad_nick).or(no_token).or(bad_token) {
            return Reply::refuse(why.text());
        }
        let mut reply = Reply::default();
        for (number, says) in [
            ("001", "Welcome, GLHF!"),
            ("002", "Your host is tmi.twitch.tv"),
            ("003", "This server is rather new"),
            ("004", "-"),
            ("375", "-"),
            ("372", "You are in a maze of twisty passages, all alike."),
            ("376", ">"),
        ] {
            reply.add(&format!(":tmi.twitch.tv {number} {nick} :{says}\r\n"));
        }
        if !is_anonymous(&nick) {
            let tags = format!(
                "badge-info=;badges=;color=;display-name={nick};emote-sets=0;user-id={};user-type=",
                hub.names().room_id(&nick)
            );
            reply.add(&self.command(&tags, "GLOBALUSERSTATE"));
        }
        self.login = Some(nick);
        reply
    }

    /// A line of Twitch's own: nothing for one who did not ask for commands, without tags for one who did not ask for
    /// those.
    fn command(&self, tags: &str, rest: &str) -> String {
        match (self.commands, self.tags) {
            (false, _) => String::new(),
            (true, true) => format!("@{tags} :tmi.twitch.tv {rest}\r\n"),
            (true, false) => format!(":tmi.twitch.tv {rest}\r\n"),
        }
    }

    fn notice(&self, channel: &str, msg_id: &str, text: &str) -> String {
        self.command(&format!("msg-id={msg_id}"), &format!("NOTICE #{channel} :{text}"))
    }

    fn user_state(&self, nick: &str, channel: &str) -> String {
        let badges = if nick == channel { "broadcaster/1" } else { "" };
        let tags = format!(
            "badge-info=;badges={badges};color=;display-name={nick};emote-sets=0;mod=0;subscriber=0;user-type="
        );
        self.command(&tags, &format!("USERSTATE #{channel}"))
    }

    fn join(&mut self, rest: &str, hub: &Hub, now: Instant) -> Reply {
        let Some(nick) = self.login.clone() else {
            return Reply::default();
        };
        let account = if is_anonymous(&nick) { ANONYMOUS } else { &nick };
        let mut reply = Reply::default();
        for channel in channels_of(rest) {
            self.joins += 1;
            let passes = hub.joins().may_join(account, now);
            if !passes || self.channels.contains(&channel) || self.channels.len() >= MAX_CHANNELS {
                continue;
            }
            let (ignored, refused) = {
                let policy = hub.policy();
                (policy.ignore_joins.contains(&channel), policy.refuse_joins.get(&channel).copied())
            };
            // A name that nobody has is not answered.
            if ignored || hub.names().is_gone(&channel) {
                continue;
            }
            if let Some(why) = refused {
                let (msg_id, text) = why.notice(&channel);
                reply.add(&self.notice(&channel, msg_id, &text));
                continue;
            }
            self.welcome(&nick, &channel, hub, &mut reply);
            self.channels.insert(channel.clone());
            reply.joined.push(channel);
        }
        reply
    }

    fn welcome(&self, nick: &str, channel: &str, hub: &Hub, reply: &mut Reply) {
        let mut names = vec![nick.to_owned()];
        if self.membership {
            let others = hub.members(channel).into_iter().filter_map(|peer| peer.login());
            names.extend(others.filter(|name| name != nick && !is_anonymous(name)).take(MAX_NAMES));
        }
        reply.add(&format!(
            ":{nick}!{nick}@{nick}.tmi.twitch.tv JOIN #{channel}\r\n\
             :{nick}.tmi.twitch.tv 353 {nick} = #{channel} :{}\r\n\
             :{nick}.tmi.twitch.tv 366 {nick} #{channel} :End of /NAMES list\r\n",
            names.join(" ")
        ));
        if !is_anonymous(nick) {
            reply.add(&self.user_state(nick, channel));
        }
        let tags = format!(
            "emote-only=0;followers-only=-1;r9k=0;room-id={};slow=0;subs-only=0",
            hub.names().room_id(channel)
        );
        reply.add(&self.command(&tags, &format!("ROOMSTATE #{channel}")));
    }

    fn part(&mut self, rest: &str) -> Reply {
        let Some(nick) = self.login.clone() else {
            return Reply::default();
        };
        let mut reply = Reply::default();
        for channel in channels_of(rest) {
            if self.channels.remove(&channel) {
                reply.add(&format!(":{nick}!{nick}@{nick}.tmi.twitch.tv PART #{channel}\r\n"));
                reply.parted.push(channel);
            }
        }
        reply
    }

    /// Somebody put it out of a channel: its next JOIN is one.
    pub(super) fn was_put_out(&mut self, channel: &str) {
        self.channels.remove(channel);
    }

    /// A message of the client's own. Twitch answers with the sender's state and does not send it back.
    fn say(&mut self, rest: &str, now: Instant) -> Reply {
        let (target, text) = rest.split_once(' ').unwrap_or((rest, ""));
        let (nick, channel) = match (&self.login, channels_of(target).next()) {
            // Who only reads is not heard.
            (Some(nick), Some(channel)) if !is_anonymous(nick) => (nick.clone(), channel),
            _ => return Reply::default(),
        };
        let sayable = text_of(text.trim_start()).chars().filter(|c| !matches!(c, '\r' | '\0'));
        let text: String = sayable.take(MAX_TEXT_CHARS).collect();
        if text.trim().is_empty() {
            return Reply::default();
        }
        if let Some(command) = text.strip_prefix('/') {
            let command = command.split(' ').next().unwrap_or("");
            let text = format!("Unrecognized command: /{command}");
            return Reply::say(self.notice(&channel, "unrecognized_cmd", &text));
        }
        while self.said.front().is_some_and(|&at| now.duration_since(at) >= SAID_WITHIN) {
            self.said.pop_front();
        }
        if self.said.len() >= MAX_SAID {
            let text = "Your message was not sent because you are sending messages too quickly.";
            return Reply::say(self.notice(&channel, "msg_ratelimit", text));
        }
        self.said.push_back(now);
        Reply { said: Some((channel.clone(), text)), ..Reply::say(self.user_state(&nick, &channel)) }
    }

    fn unknown(&self, command: &str) -> Reply {
        let nick = self.login.as_deref().unwrap_or("you");
        Reply::say(format!(":tmi.twitch.tv 421 {nick} {command} :Unknown command\r\n"))
    }
}

impl Reply {
    fn say(text: String) -> Self {
        Self { text, ..Self::default() }
    }

    fn add(&mut self, text: &str) {
        self.text.push_str(text);
    }

    fn refuse(why: &str) -> Self {
        Self { text: format!(":tmi.twitch.tv NOTICE * :{why}\r\n"), close: true, ..Self::default() }
    }
}

/// The trailing parameter, or the first one.
fn text_of(rest: &str) -> &str {
    rest.strip_prefix(':').unwrap_or_else(|| rest.split(' ').next().unwrap_or(""))
}

fn channels_of(rest: &str) -> impl Iterator<Item = String> {
    let names = text_of(rest).split(',').filter_map(|name| name.trim().strip_prefix('#'));
    names.map(str::to_ascii_lowercase).filter(|name| is_login(name))
}

/// Whether this is a name for those without an account.
pub(super) fn is_anonymous(nick: &str) -> bool {
    nick.strip_prefix("justinfan").is_some_and(|id| id.bytes().all(|byte| byte.is_ascii_digit()))
}

/// Whether `name` can be a login at Twitch, in lower case.
pub(super) fn is_login(name: &str) -> bool {
    let fits = |byte: u8| byte == b'_' || byte.is_ascii_digit() || byte.is_ascii_lowercase();
    (1..=25).contains(&name.len()) && name.bytes().all(fits)
}
