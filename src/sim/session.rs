//! What one connection says and what Twitch would answer: the protocol alone, without a socket.
//!
//! Answers follow the forms Twitch sends (`tmi.twitch.tv`, its welcome text, its silence where it is silent): a
//! channel name that cannot exist is never answered, a wrong login gets a NOTICE without tags and the connection ends.

use std::collections::BTreeSet;

use super::people::room_id;

/// One connection may be in so many channels; further JOINs vanish, as over Twitch's own limit.
const MAX_CHANNELS: usize = 1_000;
const KNOWN_CAPS: [&str; 3] = ["twitch.tv/tags", "twitch.tv/commands", "twitch.tv/membership"];

/// How the server treats those who connect.
#[derive(Debug, Default, Clone)]
pub(super) struct Policy {
    pub(super) refuse_login: bool,
    /// Channels whose JOIN is never answered.
    pub(super) ignore_joins: BTreeSet<String>,
}

/// What a line of the client leads to.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Reply {
    /// To be sent, whole lines.
    pub(super) text: String,
    /// Channels to deliver from now on, after `text`.
    pub(super) joined: Vec<String>,
    pub(super) parted: Vec<String>,
    /// The connection ends after `text`.
    pub(super) close: bool,
}

/// One connection's state.
#[derive(Debug, Default)]
pub(super) struct Session {
    /// Set once the login was accepted.
    login: Option<String>,
    pass: Option<String>,
    pub(super) tags: bool,
    pub(super) commands: bool,
    channels: BTreeSet<String>,
}

impl Session {
    /// Takes one line, without its end.
    pub(super) fn answer(&mut self, line: &str, policy: &Policy) -> Reply {
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
            "NICK" => self.nick(text_of(rest), policy),
            "JOIN" => self.join(rest, policy),
            "PART" => self.part(rest),
            "PING" => Reply::say(format!(":tmi.twitch.tv PONG tmi.twitch.tv :{}\r\n", text_of(rest))),
            "QUIT" => Reply { close: true, ..Reply::default() },
            "" | "PONG" | "PRIVMSG" | "USER" | "NOTICE" => Reply::default(),
            _ => self.unknown(command),
        }
    }

    fn cap(&mut self, rest: &str) -> Reply {
        let (verb, rest) = rest.split_once(' ').unwrap_or((rest, ""));
        let asked = text_of(rest.trim_start());
        match verb.to_ascii_uppercase().as_str() {
            "LS" => Reply::say(format!(":tmi.twitch.tv CAP * LS :{}\r\n", KNOWN_CAPS.join(" "))),
            "REQ" if asked.split_whitespace().all(|cap| KNOWN_CAPS.contains(&cap)) => {
                self.tags |= asked.split_whitespace().any(|cap| cap == KNOWN_CAPS[0]);
                self.commands |= asked.split_whitespace().any(|cap| cap == KNOWN_CAPS[1]);
                Reply::say(format!(":tmi.twitch.tv CAP * ACK :{}\r\n", asked.trim()))
            }
            "REQ" => Reply::say(format!(":tmi.twitch.tv CAP * NAK :{}\r\n", asked.trim())),
            _ => Reply::default(),
        }
    }

    fn nick(&mut self, nick: &str, policy: &Policy) -> Reply {
        if self.login.is_some() {
            return Reply::default();
        }
        let nick = nick.trim().to_ascii_lowercase();
        let anonymous =
            nick.strip_prefix("justinfan").is_some_and(|id| id.bytes().all(|byte| byte.is_ascii_digit()));
        let token = self.pass.as_deref().is_some_and(|pass| pass.starts_with("oauth:"));
        if policy.refuse_login {
            return Reply::refuse("Login authentication failed");
        }
        if !is_login(&nick) {
            return Reply::refuse("Invalid NICK");
        }
        if !anonymous && !token {
            return Reply::refuse("Improperly formatted auth");
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
        if !anonymous && self.commands {
            if self.tags {
                reply.add(&format!(
                    "@badge-info=;badges=;color=;display-name={nick};emote-sets=0;user-id={};user-type= ",
                    room_id(&nick)
                ));
            }
            reply.add(":tmi.twitch.tv GLOBALUSERSTATE\r\n");
        }
        self.login = Some(nick);
        reply
    }

    fn join(&mut self, rest: &str, policy: &Policy) -> Reply {
        let Some(nick) = self.login.clone() else {
            return Reply::default();
        };
        let mut reply = Reply::default();
        for channel in channels_of(rest) {
            if policy.ignore_joins.contains(&channel) || self.channels.len() >= MAX_CHANNELS {
                continue;
            }
            if !self.channels.insert(channel.clone()) {
                continue;
            }
            reply.add(&format!(
                ":{nick}!{nick}@{nick}.tmi.twitch.tv JOIN #{channel}\r\n\
                 :{nick}.tmi.twitch.tv 353 {nick} = #{channel} :{nick}\r\n\
                 :{nick}.tmi.twitch.tv 366 {nick} #{channel} :End of /NAMES list\r\n"
            ));
            if self.commands {
                if self.tags {
                    reply.add(&format!(
                        "@emote-only=0;followers-only=-1;r9k=0;room-id={};slow=0;subs-only=0 ",
                        room_id(&channel)
                    ));
                }
                reply.add(&format!(":tmi.twitch.tv ROOMSTATE #{channel}\r\n"));
            }
            reply.joined.push(channel);
        }
        reply
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

/// Whether `name` can be a login at Twitch, in lower case.
pub(super) fn is_login(name: &str) -> bool {
    let fits = |byte: u8| byte == b'_' || byte.is_ascii_digit() || byte.is_ascii_lowercase();
    (1..=25).contains(&name.len()) && name.bytes().all(fits)
}
