//! Settings of the account that chat is read with.

use std::fmt;
use std::sync::Arc;

use clap::Args;
use serde::{Serialize, Serializer};

use super::token::is_token_text;
use crate::secret::{Secret, without_user_info};
use crate::settings::{Environment, Problems};

/// Collections in which documents are something else, and below which a store may find documents as theirs.
const TAKEN: [&str; 5] = ["users", "inlet", "channels", "barred", "audit"];

/// Longest path of a document, in bytes: well below what the stores take.
const LONGEST_PATH: usize = 512;

/// Settings of the account, as given.
#[derive(Debug, Clone, Args)]
#[expect(clippy::struct_field_names, reason = "they are named as the settings are")]
pub struct CredentialArgs {
    /// The account to read with, together with `TWITCH_BOT_ACCESS_TOKEN`; left out: the one that `inlet login` stored,
    /// else anonymous
    #[arg(long, env)]
    twitch_bot_username: Option<String>,
    /// Id of the application that tokens are issued to: for refreshing them, and for `inlet login`
    #[arg(long, env)]
    twitch_client_id: Option<String>,
    /// The document of the user store that holds the token, `collection/document`
    #[arg(long, env, default_value = "oauth/twitch:bot")]
    twitch_token_doc: String,
    /// Base address of Twitch's OAuth
    #[arg(long, env, default_value = "https://id.twitch.tv/oauth2")]
    twitch_oauth_url: String,
}

/// A token from the environment.
#[derive(Debug, Clone)]
pub struct GivenToken {
    /// The login, lower case.
    pub username: String,
    /// Without `oauth:`.
    pub access: Secret,
    /// What gets the next one.
    pub refresh: Option<Secret>,
}

/// The application at Twitch.
#[derive(Debug, Clone)]
pub struct OAuthClient {
    /// Its id.
    pub id: String,
    /// Its secret; a public client has none.
    pub secret: Option<Secret>,
}

/// Where the token document is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenPath {
    /// The path of its collection.
    pub collection: Arc<str>,
    /// Its own name.
    pub id: Arc<str>,
}

impl fmt::Display for TokenPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.collection, self.id)
    }
}

impl TokenPath {
    fn parse(text: &str) -> Result<Self, String> {
        let wrong = |why: &str| Err(format!("{text:?} {why}; a path such as oauth/twitch:bot is wanted"));
        let segments: Vec<_> = text.split('/').collect();
        if segments.len() % 2 == 1 {
            return wrong("has an odd number of segments");
        }
        let is_reserved = |segment: &str| segment.starts_with("__") && segment.ends_with("__");
        let is_fine = |segment: &str| {
            !matches!(segment, "" | "." | "..")
                && !is_reserved(segment)
                && !segment.chars().any(|c| c.is_control() || c.is_whitespace())
        };
        if text.len() > LONGEST_PATH || !segments.iter().all(|segment| is_fine(segment)) {
            return wrong("is no path of a document");
        }
        let Some((collection, id)) = text.rsplit_once('/') else { return wrong("is no path of a document") };
        if segments.first().is_some_and(|first| TAKEN.contains(first)) {
            return wrong("is where Inlet keeps something else");
        }
        Ok(Self { collection: collection.into(), id: id.into() })
    }
}

/// Base address of an OAuth service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OAuthUrl(String);

impl OAuthUrl {
    fn parse(text: &str) -> Result<Self, String> {
        let wrong = || format!("{:?} is no address such as https://host/oauth2", without_user_info(text));
        let url = reqwest::Url::parse(text).map_err(|_| wrong())?;
        let is_base = url.has_host() && url.query().is_none() && url.fragment().is_none();
        let is_plain = url.username().is_empty() && url.password().is_none();
        if !is_base || !is_plain || !matches!(url.scheme(), "http" | "https") {
            return Err(wrong());
        }
        Ok(Self(text.trim_end_matches('/').to_owned()))
    }

    /// Whether it is reached over TLS.
    pub fn is_tls(&self) -> bool {
        self.0.get(..6).is_some_and(|scheme| scheme.eq_ignore_ascii_case("https:"))
    }

    /// The address, without a slash at its end.
    pub(super) fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for OAuthUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Checked settings.
#[derive(Debug, Clone)]
pub struct CredentialConfig {
    /// The environment's token, which goes before the document's.
    pub given: Option<GivenToken>,
    /// Needed to refresh a token, and by `inlet login`.
    pub client: Option<OAuthClient>,
    /// Where the token document is.
    pub document: TokenPath,
    /// Where tokens are validated and refreshed.
    pub oauth: OAuthUrl,
}

impl Serialize for CredentialConfig {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        use serde::ser::SerializeMap as _;
        let (given, client) = (self.given.as_ref(), self.client.as_ref());
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("TWITCH_BOT_USERNAME", &given.map(|given| &given.username))?;
        map.serialize_entry("TWITCH_BOT_ACCESS_TOKEN", &given.map(|given| &given.access))?;
        map.serialize_entry("TWITCH_BOT_REFRESH_TOKEN", &given.and_then(|given| given.refresh.as_ref()))?;
        map.serialize_entry("TWITCH_CLIENT_ID", &client.map(|client| &client.id))?;
        map.serialize_entry("TWITCH_CLIENT_SECRET", &client.and_then(|client| client.secret.as_ref()))?;
        map.serialize_entry("TWITCH_TOKEN_DOC", &self.document.to_string())?;
        map.serialize_entry("TWITCH_OAUTH_URL", &self.oauth.to_string())?;
        map.end()
    }
}

impl CredentialArgs {
    /// Checks the settings. `login` reads a login.
    pub(in crate::source::twitch) fn check(
        &self,
        login: impl FnOnce(&str) -> Result<String, String>,
        environment: &Environment,
        problems: &mut Problems,
    ) -> Option<CredentialConfig> {
        let before = problems.lines().len();
        let username =
            problems.parse_optional("TWITCH_BOT_USERNAME", self.twitch_bot_username.as_ref(), login);
        let id = problems.parse_optional("TWITCH_CLIENT_ID", self.twitch_client_id.as_ref(), |text| {
            if is_token_text(text) {
                Ok(text.to_owned())
            } else {
                Err("is no client id of Twitch".to_owned())
            }
        });
        let document = problems.parse("TWITCH_TOKEN_DOC", &self.twitch_token_doc, TokenPath::parse);
        let oauth = problems.parse("TWITCH_OAUTH_URL", &self.twitch_oauth_url, OAuthUrl::parse);
        let mut secret = |name: &str| {
            let before = problems.lines().len();
            let secret = environment.secret(name, problems);
            let is_fine = secret.as_ref().is_none_or(|secret| is_token_text(secret.expose()));
            if !is_fine {
                problems.add(name, "holds what no token holds, such as white space");
            }
            (problems.lines().len() == before).then_some(secret)
        };
        let access = secret("TWITCH_BOT_ACCESS_TOKEN");
        let refresh = secret("TWITCH_BOT_REFRESH_TOKEN");
        let client_secret = secret("TWITCH_CLIENT_SECRET");
        if let (Some(username), Some(id)) = (&username, &id) {
            let is_set = [
                ("TWITCH_BOT_USERNAME", username.is_some()),
                ("TWITCH_BOT_ACCESS_TOKEN", !matches!(access, Some(None))),
                ("TWITCH_BOT_REFRESH_TOKEN", !matches!(refresh, Some(None))),
                ("TWITCH_CLIENT_ID", id.is_some()),
                ("TWITCH_CLIENT_SECRET", !matches!(client_secret, Some(None))),
            ];
            go_together(&is_set, problems);
        }
        if problems.lines().len() > before {
            return None;
        }
        let given = username?.zip(access?).map(|(username, access)| {
            let access = Secret::new(access.expose().trim_start_matches("oauth:"));
            GivenToken { username, access, refresh: refresh.flatten() }
        });
        let client = id?.map(|id| OAuthClient { id, secret: client_secret.flatten() });
        Some(CredentialConfig { given, client, document: document?, oauth: oauth? })
    }
}

/// What makes no sense without another.
const NEEDS: [(&str, &str); 5] = [
    ("TWITCH_BOT_USERNAME", "TWITCH_BOT_ACCESS_TOKEN"),
    ("TWITCH_BOT_ACCESS_TOKEN", "TWITCH_BOT_USERNAME"),
    ("TWITCH_BOT_REFRESH_TOKEN", "TWITCH_BOT_ACCESS_TOKEN"),
    ("TWITCH_BOT_REFRESH_TOKEN", "TWITCH_CLIENT_ID"),
    ("TWITCH_CLIENT_SECRET", "TWITCH_CLIENT_ID"),
];

fn go_together(is_set: &[(&str, bool)], problems: &mut Problems) {
    let has = |name| is_set.iter().any(|(other, is_set)| *other == name && *is_set);
    for (name, needed) in NEEDS {
        if has(name) && !has(needed) {
            problems.add(name, format_args!("is set, but {needed} is not; it needs it"));
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        credentials: CredentialArgs,
    }

    fn check(flags: &[&str], environment: &[(&str, &str)]) -> Result<CredentialConfig, Vec<String>> {
        let arguments = std::iter::once("inlet").chain(flags.iter().copied());
        let command = Command::try_parse_from(arguments).unwrap();
        let environment = Environment::new(
            environment.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())),
        );
        let mut problems = Problems::default();
        let config = command.credentials.check(|text| Ok(text.to_lowercase()), &environment, &mut problems);
        if problems.lines().is_empty() { Ok(config.unwrap()) } else { Err(problems.lines().to_vec()) }
    }

    #[test]
    fn username_and_token_go_together_and_the_prefix_does_not_matter() {
        for token in ["secret", "oauth:secret"] {
            let given = check(&["--twitch-bot-username", "Bot"], &[("TWITCH_BOT_ACCESS_TOKEN", token)])
                .unwrap()
                .given
                .unwrap();
            assert_eq!((given.username.as_str(), given.access.expose()), ("bot", "secret"));
        }
        assert!(check(&[], &[]).unwrap().given.is_none());
    }

    #[test]
    fn what_makes_no_sense_alone_is_said_all_at_once() {
        let secrets = [("TWITCH_BOT_REFRESH_TOKEN", "hush"), ("TWITCH_CLIENT_SECRET", "hush")];
        let problems = check(&["--twitch-bot-username", "bot", "--twitch-token-doc", "a/b/c"], &secrets);
        let problems = problems.unwrap_err();
        let names: Vec<_> = problems.iter().map(|line| line.split(':').next().unwrap()).collect();
        assert_eq!(
            names,
            [
                "TWITCH_TOKEN_DOC",
                "TWITCH_BOT_USERNAME",
                "TWITCH_BOT_REFRESH_TOKEN",
                "TWITCH_BOT_REFRESH_TOKEN",
                "TWITCH_CLIENT_SECRET"
            ]
        );
        assert!(!problems.concat().contains("hush"), "{problems:?}");
        assert!(check(&[], &[("TWITCH_BOT_ACCESS_TOKEN", "x")]).is_err());
        let bad = check(&["--twitch-bot-username", "bot"], &[("TWITCH_BOT_ACCESS_TOKEN", "hush hush")]);
        let bad = bad.unwrap_err();
        assert!(bad.len() == 1 && !bad[0].contains("hush"), "{bad:?}");
    }

    #[test]
    fn the_document_has_an_even_number_of_segments_and_a_place_of_its_own() {
        let path = check(&[], &[]).unwrap().document;
        assert_eq!((&*path.collection, &*path.id), ("oauth", "twitch:bot"));
        let path = TokenPath::parse("a/b/c/d").unwrap();
        assert_eq!((&*path.collection, &*path.id, path.to_string().as_str()), ("a/b/c", "d", "a/b/c/d"));
        for bad in [
            "bot",
            "a/b/c",
            "/b",
            "a/",
            "a//b/c",
            "a/..",
            "a/__x__",
            "a/b c",
            "users/x",
            "inlet/x",
            "audit/x",
            "users/x/private/token",
        ] {
            assert!(TokenPath::parse(bad).is_err(), "{bad}");
        }
        assert!(TokenPath::parse(&format!("a/{}", "b".repeat(LONGEST_PATH))).is_err());
    }

    #[test]
    fn the_address_of_the_oauth_is_a_base() {
        assert!(check(&[], &[]).unwrap().oauth.is_tls());
        let url = OAuthUrl::parse("http://127.0.0.1:1/oauth2/").unwrap();
        assert!(!url.is_tls() && url.as_str().ends_with("/oauth2"));
        for bad in
            ["host", "ftp://host", "https://", "http://u:hush@host", "https://host?x=1", "https://host#x"]
        {
            let error = OAuthUrl::parse(bad).unwrap_err();
            assert!(!error.contains("hush"), "{error}");
        }
    }

    #[test]
    fn no_secret_is_shown() {
        let secrets = [
            ("TWITCH_BOT_ACCESS_TOKEN", "hush1"),
            ("TWITCH_BOT_REFRESH_TOKEN", "hush2"),
            ("TWITCH_CLIENT_SECRET", "hush3"),
        ];
        let config = check(&["--twitch-bot-username", "bot", "--twitch-client-id", "app"], &secrets).unwrap();
        let shown = format!("{config:?} {}", serde_json::to_string(&config).unwrap());
        assert!(!shown.contains("hush") && shown.contains("\"TWITCH_CLIENT_ID\":\"app\""), "{shown}");
    }
}
