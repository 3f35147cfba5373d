//! The environment's token as it has become: each refresh brings a new one, and the environment cannot be written. It is
//! kept in `DATA_DIR`, with a mark of the token that it came from: whoever changes the environment means the new one.

use std::io;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use futures_util::future::BoxFuture;
use futures_util::stream::{self, BoxStream};
use futures_util::{FutureExt as _, StreamExt as _};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sha2::{Digest as _, Sha256};

use super::settings::GivenToken;
use super::token::Token;
use super::{Change, Stored, TokenStore, TokenStoreError};
use crate::data_dir::{self, NewerFormat};
use crate::errors::ErrorCode;

const FILE_NAME: &str = "twitch-token.json";
const FORMAT: u32 = 1;

/// What stands in it.
#[derive(Serialize, Deserialize)]
struct Content {
    format: u32,
    /// SHA-256 of the environment's tokens, in base64.
    origin: String,
    #[serde(flatten)]
    token: Map<String, Value>,
}

/// The environment's token, and the file.
#[derive(Debug, Clone)]
pub struct TokenFile {
    path: PathBuf,
    origin: String,
    given: Token,
}

impl TokenFile {
    /// The file in `folder`, of one holder at a time. Fails if a later version wrote it.
    pub fn open(folder: &Path, given: &GivenToken) -> Result<Self, NewerFormat> {
        let path = folder.join(FILE_NAME);
        data_dir::check_format(&path, &std::fs::read(&path).unwrap_or_default(), FORMAT)?;
        Ok(Self { path, origin: origin(given), given: token_of(given) })
    }

    /// The file's token, if it came from the environment's; else that. One that is torn is as good as none.
    fn token(&self) -> Token {
        let text = match std::fs::read(&self.path) {
            Ok(text) => text,
            Err(error) => {
                if error.kind() != io::ErrorKind::NotFound {
                    tracing::warn!(error_code = %ErrorCode::TokenUnusable, path = %self.path.display(), error = %error, "the stored token cannot be read");
                }
                return self.given.clone();
            }
        };
        // The library's own words would quote what stands there.
        let content = serde_json::from_slice::<Content>(&text).ok();
        let stored =
            content.map(|content| (content.origin == self.origin, Token::from_fields(&content.token)));
        match stored {
            Some((true, Ok(token))) => token,
            Some((false, Ok(_))) => self.given.clone(),
            Some((_, Err(_))) | None => {
                tracing::warn!(error_code = %ErrorCode::TokenUnusable, path = %self.path.display(), "the stored token is damaged; the environment's is taken");
                self.given.clone()
            }
        }
    }

    fn put(&self, token: &Token) -> io::Result<()> {
        let content = Content { format: FORMAT, origin: self.origin.clone(), token: token.to_fields() };
        data_dir::replace(&self.path, &serde_json::to_vec(&content)?)
    }
}

fn token_of(given: &GivenToken) -> Token {
    Token {
        access: given.access.clone(),
        refresh: given.refresh.clone(),
        expires_in: None,
        obtained: None::<Timestamp>,
        scope: Vec::new(),
        user_id: None,
        login: Some(given.username.clone()),
    }
}

fn origin(given: &GivenToken) -> String {
    let refresh = given.refresh.as_ref().map_or("", |refresh| refresh.expose());
    URL_SAFE_NO_PAD.encode(Sha256::digest(format!(
        "{}\n{}\n{refresh}",
        given.username,
        given.access.expose()
    )))
}

impl TokenStore for TokenFile {
    fn read(&self) -> BoxFuture<'_, Result<Option<Stored>, TokenStoreError>> {
        let this = self.clone();
        async move {
            let reading = tokio::task::spawn_blocking(move || this.token()).await;
            let token = reading.map_err(|error| TokenStoreError::Away(error.to_string()))?;
            Ok(Some(Stored { token, claim: None, revision: 0 }))
        }
        .boxed()
    }

    /// Of one holder, who needs no claim and has no rival.
    fn write(&self, change: Change, revision: u64) -> BoxFuture<'_, Result<u64, TokenStoreError>> {
        let this = self.clone();
        async move {
            let Change::Token(token) = change else { return Ok(revision) };
            let writing = tokio::task::spawn_blocking(move || this.put(&token)).await;
            let written = writing.unwrap_or_else(|error| Err(io::Error::other(error)));
            written.map(|()| revision).map_err(|error| TokenStoreError::Away(error.to_string()))
        }
        .boxed()
    }

    fn replace(&self, token: Token) -> BoxFuture<'_, Result<(), TokenStoreError>> {
        self.write(Change::Token(token), 0).map(|written| written.map(drop)).boxed()
    }

    fn changes(&self) -> BoxStream<'static, ()> {
        stream::pending().boxed()
    }

    fn place(&self) -> &'static str {
        "environment"
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::secret::Secret;

    fn given(access: &str, refresh: &str) -> GivenToken {
        GivenToken {
            username: "bot".into(),
            access: Secret::new(access),
            refresh: Some(Secret::new(refresh)),
        }
    }

    fn next(access: &str) -> Token {
        Token {
            expires_in: Some(60),
            obtained: Timestamp::from_millisecond(1_000).ok(),
            ..token_of(&given(access, "r2"))
        }
    }

    #[tokio::test]
    async fn the_rotated_token_stands_until_the_environment_changes() {
        let folder = tempfile::tempdir().unwrap();
        let open = |access, refresh| TokenFile::open(folder.path(), &given(access, refresh)).unwrap();
        let access =
            async |file: &TokenFile| file.read().await.unwrap().unwrap().token.access.expose().to_owned();
        let file = open("a1", "r1");
        assert_eq!(access(&file).await, "a1");
        file.write(Change::Token(next("a2")), 0).await.unwrap();
        let path = folder.path().join(FILE_NAME);
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        // A crash in the middle of the next write, by somebody with another umask.
        std::fs::write(path.with_extension("json.new"), "torn").unwrap();
        let again = open("a1", "r1");
        assert_eq!(access(&again).await, "a2");
        assert!(again.read().await.unwrap().unwrap().token.expires_at().is_some());
        again.write(Change::Token(next("a3")), 0).await.unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(access(&open("a1", "r1")).await, "a3");
        for (access_token, refresh_token) in [("new", "r1"), ("a1", "new")] {
            assert_eq!(access(&open(access_token, refresh_token)).await, access_token);
        }
    }

    #[tokio::test]
    async fn a_torn_file_is_as_good_as_none_and_a_later_versions_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let file = TokenFile::open(folder.path(), &given("a1", "r1")).unwrap();
        file.write(Change::Token(next("a2")), 0).await.unwrap();
        let path = folder.path().join(FILE_NAME);
        let whole = std::fs::read(&path).unwrap();
        for length in 0..whole.len() {
            std::fs::write(&path, &whole[..length]).unwrap();
            assert_eq!(file.token().access.expose(), "a1", "{length} bytes of it");
        }
        std::fs::write(&path, br#"{"format":2,"what":"ever"}"#).unwrap();
        let error = TokenFile::open(folder.path(), &given("a1", "r1")).unwrap_err();
        assert!(error.to_string().contains("has format 2"), "{error}");
    }
}
