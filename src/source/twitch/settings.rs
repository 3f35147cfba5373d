//! Settings of the Twitch source.

use std::time::Duration;

use clap::Args;
use serde::Serialize;

use super::backfill::BackfillUrl;
use super::credentials::settings::{CredentialArgs, CredentialConfig};
use super::normalize::SharedChatMode;
use crate::secret::without_user_info;
use crate::settings::{self, Environment, Problems};

/// Settings of the Twitch source, as given.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Twitch")]
pub struct TwitchArgs {
    /// `true` or `false`; left out: true, and chat is read as soon as there is a channel
    #[arg(long, env)]
    twitch_enabled: Option<String>,
    /// Logins, with commas or white space between; more can be added by `inlet channel`
    #[arg(long, env)]
    twitch_channels: Option<String>,
    #[command(flatten)]
    credentials: CredentialArgs,
    /// Base address of Twitch's API, where the logins of renamed channels are looked up
    #[arg(long, env, default_value = "https://api.twitch.tv/helix")]
    twitch_api_url: String,
    /// `ircs://host:port`, or `irc://host:port` without TLS
    #[arg(long, env, default_value = "ircs://irc.chat.twitch.tv:6697")]
    twitch_irc_url: String,
    /// JOINs per 10 s
    #[arg(long, env, default_value = "20")]
    twitch_join_rate: String,
    /// `source-only` or `all`: whether the copies of a message in a shared chat are one event
    #[arg(long, env, default_value = "source-only")]
    twitch_shared_chat: String,
    /// Base address of a service that speaks the recent-messages API, asked for what was missed in a gap; left out:
    /// nobody is asked
    #[arg(long, env)]
    twitch_backfill_url: Option<String>,
    /// First wait before connecting again, in ms
    #[arg(long, env, default_value = "1000")]
    irc_reconnect_initial_ms: String,
    /// Longest wait before connecting again, in ms
    #[arg(long, env, default_value = "30000")]
    irc_reconnect_max_ms: String,
}

/// Where to connect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IrcAddress {
    /// Whether with TLS.
    pub tls: bool,
    /// Name or address.
    pub host: String,
    /// Port.
    pub port: u16,
}

impl Serialize for IrcAddress {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let scheme = if self.tls { "ircs" } else { "irc" };
        serializer.collect_str(&format_args!("{scheme}://{}:{}", self.host, self.port))
    }
}

/// Base address of Twitch's API.
#[derive(Debug, Clone, Serialize)]
#[serde(transparent)]
pub struct ApiUrl(String);

impl ApiUrl {
    /// Whether it is reached over TLS.
    pub fn is_tls(&self) -> bool {
        self.0.starts_with("https:")
    }

    /// The address, without a slash at its end.
    pub(super) fn as_str(&self) -> &str {
        &self.0
    }
}

/// Checked settings.
#[derive(Debug, Clone, Serialize)]
pub struct TwitchConfig {
    /// Whether the source runs.
    #[serde(rename = "TWITCH_ENABLED")]
    pub enabled: bool,
    /// Logins, lower case, unique.
    #[serde(rename = "TWITCH_CHANNELS")]
    pub channels: Vec<String>,
    /// The account.
    #[serde(flatten)]
    pub credentials: CredentialConfig,
    /// Where logins are looked up.
    #[serde(rename = "TWITCH_API_URL")]
    pub api: ApiUrl,
    /// Where to connect.
    #[serde(rename = "TWITCH_IRC_URL")]
    pub address: IrcAddress,
    /// JOINs per 10 s.
    #[serde(rename = "TWITCH_JOIN_RATE")]
    pub join_rate: usize,
    /// Which copies are events.
    #[serde(rename = "TWITCH_SHARED_CHAT")]
    pub shared_chat: SharedChatMode,
    /// Who is asked for what was missed.
    #[serde(rename = "TWITCH_BACKFILL_URL")]
    pub backfill: Option<BackfillUrl>,
    /// First wait before connecting again.
    #[serde(rename = "IRC_RECONNECT_INITIAL_MS", serialize_with = "milliseconds")]
    pub reconnect_first: Duration,
    /// Longest wait before connecting again.
    #[serde(rename = "IRC_RECONNECT_MAX_MS", serialize_with = "milliseconds")]
    pub reconnect_longest: Duration,
}

fn milliseconds<S: serde::Serializer>(value: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u64(u64::try_from(value.as_millis()).unwrap_or(u64::MAX))
}

fn shared_chat(text: &str) -> Result<SharedChatMode, String> {
    match text {
        "source-only" => Ok(SharedChatMode::SourceOnly),
        "all" => Ok(SharedChatMode::All),
        _ => Err(format!("{text:?} is neither source-only nor all")),
    }
}

impl TwitchArgs {
    /// Checks the settings.
    pub fn check(&self, environment: &Environment, problems: &mut Problems) -> Option<TwitchConfig> {
        let channels = problems
            .parse_optional("TWITCH_CHANNELS", self.twitch_channels.as_ref(), channels)
            .map(Option::unwrap_or_default);
        let enabled =
            problems.parse_optional("TWITCH_ENABLED", self.twitch_enabled.as_ref(), settings::boolean);
        let has_channels = channels.as_ref().is_none_or(|channels| !channels.is_empty());
        if enabled == Some(Some(true)) && !has_channels {
            problems.add("TWITCH_ENABLED", "is true, but TWITCH_CHANNELS names no channel");
        }
        let credentials = self.credentials.check(login, environment, problems);
        let api = problems.parse("TWITCH_API_URL", &self.twitch_api_url, api_url);
        let address = problems.parse("TWITCH_IRC_URL", &self.twitch_irc_url, irc_address);
        let join_rate = problems.parse("TWITCH_JOIN_RATE", &self.twitch_join_rate, settings::count(1, 2_000));
        let shared_chat = problems.parse("TWITCH_SHARED_CHAT", &self.twitch_shared_chat, shared_chat);
        let backfill = problems.parse_optional(
            "TWITCH_BACKFILL_URL",
            self.twitch_backfill_url.as_ref(),
            BackfillUrl::parse,
        );
        let wait = settings::number(1, 3_600_000);
        let first = problems.parse("IRC_RECONNECT_INITIAL_MS", &self.irc_reconnect_initial_ms, &wait);
        let longest = problems.parse("IRC_RECONNECT_MAX_MS", &self.irc_reconnect_max_ms, &wait);
        if first.zip(longest).is_some_and(|(first, longest)| first > longest) {
            problems.add("IRC_RECONNECT_INITIAL_MS", "is more than IRC_RECONNECT_MAX_MS");
        }
        Some(TwitchConfig {
            enabled: enabled?.unwrap_or(true),
            channels: channels?,
            credentials: credentials?,
            api: api?,
            address: address?,
            join_rate: join_rate?,
            shared_chat: shared_chat?,
            backfill: backfill?,
            reconnect_first: Duration::from_millis(first?),
            reconnect_longest: Duration::from_millis(longest?),
        })
    }
}

fn channels(text: &str) -> Result<Vec<String>, String> {
    let mut channels = Vec::new();
    for name in text.split([',', ' ', '\t', '\r', '\n']).filter(|name| !name.is_empty()) {
        let channel = login(name)?;
        if !channels.contains(&channel) {
            channels.push(channel);
        }
    }
    Ok(channels)
}

/// A login: letters, digits and `_`, which is also what keeps a JOIN one line.
fn login(text: &str) -> Result<String, String> {
    let login = text.strip_prefix('#').unwrap_or(text).to_lowercase();
    let is_plain = login.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    if login.is_empty() || login.len() > 64 || !is_plain {
        return Err(format!("{text:?} is no login of Twitch"));
    }
    Ok(login)
}

fn api_url(text: &str) -> Result<ApiUrl, String> {
    let is_base = !text.contains(['?', '#', '@', ' ']);
    if is_base && (text.starts_with("https://") || text.starts_with("http://")) {
        Ok(ApiUrl(text.trim_end_matches('/').to_owned()))
    } else {
        Err(format!("{:?} is no address such as https://host", without_user_info(text)))
    }
}

fn irc_address(text: &str) -> Result<IrcAddress, String> {
    let wrong =
        || format!("{:?} is no address such as ircs://host:6697 or irc://host:6667", without_user_info(text));
    let (scheme, rest) = text.split_once("://").ok_or_else(wrong)?;
    let tls = match scheme {
        "ircs" => true,
        "irc" => false,
        _ => return Err(wrong()),
    };
    let (host, port) = rest.trim_end_matches('/').rsplit_once(':').ok_or_else(wrong)?;
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let port = port.parse().map_err(|_| wrong())?;
    if host.is_empty() || host.contains(['/', '@']) {
        return Err(wrong());
    }
    Ok(IrcAddress { tls, host: host.to_owned(), port })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        twitch: TwitchArgs,
    }

    fn check(flags: &[&str], environment: &[(&str, &str)]) -> Result<TwitchConfig, Vec<String>> {
        let arguments = std::iter::once("inlet").chain(flags.iter().copied());
        let command = Command::try_parse_from(arguments).unwrap();
        let environment = Environment::new(
            environment.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())),
        );
        let mut problems = Problems::default();
        let config = command.twitch.check(&environment, &mut problems);
        if problems.lines().is_empty() { Ok(config.unwrap()) } else { Err(problems.lines().to_vec()) }
    }

    #[test]
    fn channels_are_split_folded_and_unique() {
        let config = check(&["--twitch-channels", "#Alpha, beta\n\tALPHA,,gamma_1"], &[]).unwrap();
        assert_eq!(config.channels, ["alpha", "beta", "gamma_1"]);
        assert!(config.enabled);
        assert!(check(&["--twitch-channels", "a b!c"], &[]).is_err());
        let none = check(&["--twitch-channels", ""], &[]).unwrap();
        assert!(none.enabled && none.channels.is_empty());
        assert!(check(&["--twitch-enabled", "true"], &[]).is_err());
        assert!(!check(&["--twitch-enabled", "false", "--twitch-channels", "a"], &[]).unwrap().enabled);
    }

    #[test]
    fn all_problems_are_reported_at_once() {
        let flags = [
            "--twitch-irc-url",
            "http://x",
            "--twitch-join-rate",
            "20.5",
            "--irc-reconnect-initial-ms",
            "99999",
            "--twitch-backfill-url",
            "user:hush@host",
            "--twitch-bot-username",
            "bot",
            "--twitch-token-doc",
            "oauth",
        ];
        let problems = check(&flags, &[]).unwrap_err();
        assert!(problems.len() == 6 && !problems.concat().contains("hush"), "{problems:?}");
    }

    #[test]
    fn addresses_of_irc() {
        let address = |text| irc_address(text).map(|address| (address.tls, address.host, address.port));
        assert_eq!(address("irc://127.0.0.1:6667"), Ok((false, "127.0.0.1".to_owned(), 6667)));
        assert_eq!(address("ircs://[::1]:6697/"), Ok((true, "::1".to_owned(), 6697)));
        for bad in ["irc://host", "host:1", "irc://:1", "irc://u:p@h:1", "irc://h:99999"] {
            let error = address(bad).unwrap_err();
            assert!(!error.contains("u:p"), "{error}");
        }
    }
}
