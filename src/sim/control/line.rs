//! The lines an operator types.

use std::time::Duration;

use crate::sim::config::channel_name;

use super::{Command, Target};

/// Every line there is, for those who typed another one.
pub const COMMANDS: &str = "\
drop [N|all]                      close at once; what is queued is lost
reconnect [N|all] [SECONDS]       announce a RECONNECT, close after the grace
silent [N|all] / speak [N|all]    nothing comes out of it, PINGs unanswered / and back
half-open [N|all]                 neither read nor written any more, not closed
slow BYTES [N|all]                write so many bytes a second; 0 ends it; all: those to come too
refuse-login [failed|format|nick|unsuccessful|off]
accept-tokens TOKEN...|off        of those with an account, only who shows one of these
ignore-join NAME...               never answer
refuse-join banned|suspended NAME...
allow-join [NAME...]              answer again; none named: all
put-out NAME...                   everybody leaves these channels, and may join again
rename OLD NEW                    the channel has another login, and is the same room
join-limit N                      JOINs answered per account and 10 s; 0: all
bad [PERMILLE|off]                one of each bad line now, or so many among a thousand lines
duplicate N|off                   each Nth line twice, with the same id
refuse-connections SECONDS        reset whoever connects
pause / resume                    the chat, not the connections
raw TEXT                          this line, as it is, to every connection
stats                             numbers, as JSON
quit";

/// One line an operator typed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ControlLine {
    /// Something to do.
    Do(Command),
    /// Wants the numbers.
    Stats,
    /// Wants to know what there is.
    Help,
    /// Wants an end.
    Quit,
    /// Nothing.
    Empty,
}

impl ControlLine {
    /// Reads one line; see [`COMMANDS`]. `None`: unknown.
    pub fn parse(line: &[u8]) -> Option<Self> {
        let line = line.strip_suffix(b"\n").unwrap_or(line);
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        if let Some(text) = line.strip_prefix(b"raw ") {
            return Some(Self::Do(Command::Raw([text, b"\r\n"].concat())));
        }
        let words = std::str::from_utf8(line).ok()?.split_whitespace().collect::<Vec<_>>();
        let Some((&command, words)) = words.split_first() else {
            return Some(Self::Empty);
        };
        match (command, words) {
            ("stats", []) => Some(Self::Stats),
            ("help", []) => Some(Self::Help),
            ("quit", []) => Some(Self::Quit),
            _ => connections(command, words).or_else(|| service(command, words)).map(Self::Do),
        }
    }
}

/// What is done to connections.
fn connections(command: &str, words: &[&str]) -> Option<Command> {
    Some(match (command, words) {
        ("reconnect", [who, grace]) => Command::Reconnect(target(&[who])?, Some(seconds(grace)?)),
        ("reconnect", who) => Command::Reconnect(target(who)?, None),
        ("slow", [bytes, who @ ..]) => Command::Slow(target(who)?, bytes.parse().ok()?),
        ("drop", who) => Command::Drop(target(who)?),
        ("silent", who) => Command::Silence(target(who)?),
        ("speak", who) => Command::Speak(target(who)?),
        ("half-open", who) => Command::HalfOpen(target(who)?),
        _ => return None,
    })
}

/// What is done to the service and to its chat.
fn service(command: &str, words: &[&str]) -> Option<Command> {
    Some(match (command, words) {
        ("refuse-login", []) => Command::RefuseLogin(Some("failed".parse().ok()?)),
        ("refuse-login", ["off"]) => Command::RefuseLogin(None),
        ("refuse-login", [why]) => Command::RefuseLogin(Some(why.parse().ok()?)),
        ("accept-tokens", ["off"]) => Command::AcceptTokens(None),
        ("accept-tokens", tokens @ [_, ..]) => {
            Command::AcceptTokens(Some(tokens.iter().map(|&token| token.to_owned()).collect()))
        }
        ("ignore-join", names @ [_, ..]) => Command::IgnoreJoins(channels(names)?),
        ("refuse-join", [why, names @ ..]) if !names.is_empty() => {
            Command::RefuseJoins(why.parse().ok()?, channels(names)?)
        }
        ("allow-join", names) => Command::AllowJoins(channels(names)?),
        ("put-out", names @ [_, ..]) => Command::PutOut(channels(names)?),
        ("rename", [old, new]) => Command::Rename(channel_name(old).ok()?, channel_name(new).ok()?),
        ("join-limit", [limit]) => Command::JoinLimit(limit.parse().ok()?),
        ("bad", []) => Command::BadLinesOnce,
        ("bad", [permille]) => {
            Command::BadLines(number_or_off(permille).filter(|&permille| permille <= 1_000)?)
        }
        ("duplicate", [nth]) => Command::DuplicateEvery(number_or_off(nth)?),
        ("refuse-connections", [time]) => Command::RefuseConnections(seconds(time)?),
        ("pause", []) => Command::Pause,
        ("resume", []) => Command::Resume,
        _ => return None,
    })
}

fn target(words: &[&str]) -> Option<Target> {
    match words {
        [] | ["all"] => Some(Target::All),
        [id] => id.parse().ok().map(Target::One),
        _ => None,
    }
}

fn channels(names: &[&str]) -> Option<Vec<String>> {
    let names = names.iter().flat_map(|names| names.split(',')).filter(|name| !name.is_empty());
    names.map(|name| channel_name(name).ok()).collect()
}

fn seconds(word: &str) -> Option<Duration> {
    Duration::try_from_secs_f64(word.parse().ok()?).ok().filter(|time| *time <= Duration::from_hours(24))
}

fn number_or_off(word: &str) -> Option<u32> {
    if word == "off" { Some(0) } else { word.parse().ok() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::faults::{JoinRefusal, LoginRefusal};

    #[test]
    fn lines_are_read() {
        let second = Duration::from_secs(1);
        let names = || vec!["one".to_owned(), "two".to_owned()];
        let cases: [(&[u8], Command); 30] = [
            (b"drop\n", Command::Drop(Target::All)),
            (b"drop 12\r\n", Command::Drop(Target::One(12))),
            (b" reconnect ", Command::Reconnect(Target::All, None)),
            (b"reconnect 3", Command::Reconnect(Target::One(3), None)),
            (b"reconnect all 2.5", Command::Reconnect(Target::All, Some(second * 5 / 2))),
            (b"silent 3", Command::Silence(Target::One(3))),
            (b"speak all", Command::Speak(Target::All)),
            (b"half-open 1", Command::HalfOpen(Target::One(1))),
            (b"slow 1000", Command::Slow(Target::All, 1_000)),
            (b"slow 0 7", Command::Slow(Target::One(7), 0)),
            (b"refuse-login", Command::RefuseLogin(Some(LoginRefusal::Failed))),
            (b"refuse-login nick", Command::RefuseLogin(Some(LoginRefusal::Nick))),
            (b"refuse-login off", Command::RefuseLogin(None)),
            (b"accept-tokens one two", Command::AcceptTokens(Some(names()))),
            (b"accept-tokens off", Command::AcceptTokens(None)),
            (b"ignore-join #One two", Command::IgnoreJoins(names())),
            (b"refuse-join banned one,two", Command::RefuseJoins(JoinRefusal::Banned, names())),
            (b"refuse-join suspended one two", Command::RefuseJoins(JoinRefusal::Suspended, names())),
            (b"allow-join", Command::AllowJoins(vec![])),
            (b"put-out one two", Command::PutOut(names())),
            (b"rename #One two", Command::Rename("one".to_owned(), "two".to_owned())),
            (b"join-limit 20", Command::JoinLimit(20)),
            (b"bad", Command::BadLinesOnce),
            (b"bad 5", Command::BadLines(5)),
            (b"bad off", Command::BadLines(0)),
            (b"duplicate 10", Command::DuplicateEvery(10)),
            (b"refuse-connections 1", Command::RefuseConnections(second)),
            (b"pause", Command::Pause),
            (b"resume", Command::Resume),
            (b"raw :a  b\xff\n", Command::Raw(b":a  b\xff\r\n".to_vec())),
        ];
        for (line, wanted) in cases {
            let shown = String::from_utf8_lossy(line);
            assert_eq!(ControlLine::parse(line), Some(ControlLine::Do(wanted)), "{shown}");
        }
        assert_eq!(ControlLine::parse(b"stats"), Some(ControlLine::Stats));
        assert_eq!(ControlLine::parse(b"help"), Some(ControlLine::Help));
        assert_eq!(ControlLine::parse(b"quit\n"), Some(ControlLine::Quit));
        assert_eq!(ControlLine::parse(b"\n"), Some(ControlLine::Empty));
    }

    #[test]
    fn what_is_no_command_is_said_to_be_none() {
        for line in [
            "explode",
            "drop x",
            "drop 1 2",
            "reconnect all -1",
            "reconnect all nan",
            "slow",
            "refuse-login why",
            "accept-tokens",
            "ignore-join",
            "ignore-join a:b",
            "put-out",
            "rename one",
            "rename one t:o",
            "refuse-join banned",
            "refuse-join why one",
            "bad x",
            "bad 1001",
            "pause 1",
            "refuse-connections 1e300",
            "stats now",
        ] {
            assert_eq!(ControlLine::parse(line.as_bytes()), None, "{line}");
        }
    }

    #[test]
    fn every_command_is_in_the_list() {
        for command in [
            "drop",
            "reconnect",
            "silent",
            "speak",
            "half-open",
            "slow",
            "refuse-login",
            "accept-tokens",
            "ignore-join",
            "refuse-join",
            "allow-join",
            "put-out",
            "rename",
            "join-limit",
            "bad",
            "duplicate",
            "refuse-connections",
            "pause",
            "resume",
            "raw",
            "stats",
            "quit",
        ] {
            assert!(COMMANDS.contains(command), "{command}");
        }
    }
}
