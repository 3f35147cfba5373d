//! How a connection, or everybody who connects, is being treated badly. Set at the start and by commands, read by
//! whoever it concerns.

use std::collections::{BTreeMap, BTreeSet};
use std::str::FromStr;

use serde::Serialize;
use thiserror::Error;

/// Channels with a fault of their own; more names are not taken.
const MAX_NAMES: usize = 10_000;

/// How a connection behaves.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// As it should.
    #[default]
    Normal,
    /// Open, and nothing comes out of it: no chat, no answer, no PING. What the client sends is read and ignored.
    Silent,
    /// Open, and neither read from nor written to, as behind a router that forgot it.
    HalfOpen,
}

/// With which text a login is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoginRefusal {
    /// `Login authentication failed`: a bad or expired token.
    Failed,
    /// `Improperly formatted auth`: no token.
    Format,
    /// `Invalid NICK`.
    Nick,
    /// `Login unsuccessful`: what Twitch says when it cannot tell.
    Unsuccessful,
}

impl LoginRefusal {
    /// As Twitch puts it.
    pub fn text(self) -> &'static str {
        match self {
            Self::Failed => "Login authentication failed",
            Self::Format => "Improperly formatted auth",
            Self::Nick => "Invalid NICK",
            Self::Unsuccessful => "Login unsuccessful",
        }
    }
}

/// Why a JOIN is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JoinRefusal {
    /// NOTICE `msg_banned`.
    Banned,
    /// NOTICE `msg_channel_suspended`.
    Suspended,
}

impl JoinRefusal {
    /// The `msg-id` of the NOTICE and its text.
    pub(super) fn notice(self, channel: &str) -> (&'static str, String) {
        match self {
            Self::Banned => ("msg_banned", format!("You are permanently banned from talking in {channel}.")),
            Self::Suspended => {
                ("msg_channel_suspended", "This channel does not exist or has been suspended.".to_owned())
            }
        }
    }
}

/// A word that stands for no refusal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("one of {0} is wanted")]
pub struct UnknownRefusal(&'static str);

impl FromStr for LoginRefusal {
    type Err = UnknownRefusal;

    fn from_str(word: &str) -> Result<Self, Self::Err> {
        match word {
            "failed" => Ok(Self::Failed),
            "format" => Ok(Self::Format),
            "nick" => Ok(Self::Nick),
            "unsuccessful" => Ok(Self::Unsuccessful),
            _ => Err(UnknownRefusal("failed, format, nick, unsuccessful")),
        }
    }
}

impl FromStr for JoinRefusal {
    type Err = UnknownRefusal;

    fn from_str(word: &str) -> Result<Self, Self::Err> {
        match word {
            "banned" => Ok(Self::Banned),
            "suspended" => Ok(Self::Suspended),
            _ => Err(UnknownRefusal("banned, suspended")),
        }
    }
}

/// How the server treats those who connect.
#[derive(Debug, Default, Clone)]
pub(super) struct Policy {
    /// Every login gets this; `None`: it is looked at.
    pub(super) refuse_login: Option<LoginRefusal>,
    /// With an account, one of these is needed; `None`: any.
    pub(super) accept_tokens: Option<Vec<String>>,
    /// Channels whose JOIN is never answered.
    pub(super) ignore_joins: BTreeSet<String>,
    /// Channels whose JOIN is refused.
    pub(super) refuse_joins: BTreeMap<String, JoinRefusal>,
}

impl Policy {
    /// JOINs to these channels are never answered.
    pub(super) fn ignore(&mut self, channels: Vec<String>) {
        for channel in channels {
            if self.ignore_joins.len() < MAX_NAMES {
                self.ignore_joins.insert(channel);
            }
        }
    }

    /// JOINs to these channels are refused.
    pub(super) fn refuse(&mut self, channels: Vec<String>, why: JoinRefusal) {
        for channel in channels {
            if self.refuse_joins.len() < MAX_NAMES {
                self.refuse_joins.insert(channel, why);
            }
        }
    }

    /// JOINs to these channels are answered again; with none named, to all.
    pub(super) fn allow(&mut self, channels: &[String]) {
        let all = channels.is_empty();
        self.ignore_joins.retain(|channel| !all && !channels.contains(channel));
        self.refuse_joins.retain(|channel, _| !all && !channels.contains(channel));
    }
}
