//! The token document: a bot's token in the user store, where every instance and `inlet login` find it.

use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::stream::{self, BoxStream};
use futures_util::{FutureExt as _, StreamExt as _};
use jiff::Timestamp;
use serde_json::{Value, json};

use crate::retry::Backoff;
use crate::source::twitch::credentials::settings::TokenPath;
use crate::source::twitch::credentials::{Change, Claim, Stored, Token, TokenStore, TokenStoreError};
use crate::store::measured::Store;
use crate::store::{Change as StoreChange, Changes};
use crate::store::{Collection, Condition, Document, Fields, Name, StoreError, Version, Write, WriteRefusal};

/// For a read or a write.
const STORE_TIMEOUT: Duration = Duration::from_secs(5);
/// Waits before following again.
const FIRST_RETRY: Duration = Duration::from_millis(250);
const LONGEST_RETRY: Duration = Duration::from_mins(1);

/// Beside the token: who is getting the next one, and until when that word is good, in Unix milliseconds.
const CLAIMED_BY: &str = "refreshingBy";
const CLAIMED_UNTIL: &str = "refreshingUntil";

/// The document.
#[derive(Clone)]
pub struct TokenDocument {
    store: Store,
    name: Name,
}

impl TokenDocument {
    /// The document at `path`.
    pub fn new(store: Store, path: &TokenPath) -> Self {
        let collection = Collection::Other(path.collection.clone());
        Self { store, name: Name { collection, id: path.id.clone() } }
    }

    async fn write_one(&self, write: Write) -> Result<Version, TokenStoreError> {
        let outcomes =
            self.store.write_many(vec![write], STORE_TIMEOUT).await.map_err(|error| away(&error))?;
        match outcomes.into_iter().next() {
            Some(Ok(version)) => Ok(version),
            Some(Err(WriteRefusal::Conflict)) => Err(TokenStoreError::Conflict),
            Some(Err(WriteRefusal::Failed(error))) => Err(away(&error)),
            None => Err(TokenStoreError::Away("it gave no answer".to_owned())),
        }
    }
}

fn away(error: &StoreError) -> TokenStoreError {
    TokenStoreError::Away(error.to_string())
}

/// The fields of a token that nobody claims to be refreshing.
fn fields_of(token: &Token) -> Fields {
    let mut fields = token.to_fields();
    fields.insert(CLAIMED_BY.to_owned(), Value::Null);
    fields.insert(CLAIMED_UNTIL.to_owned(), Value::Null);
    fields
}

fn read(document: &Document) -> Result<Stored, TokenStoreError> {
    let by = document.fields.get(CLAIMED_BY).and_then(Value::as_str);
    let until = document.fields.get(CLAIMED_UNTIL).and_then(Value::as_i64);
    let until = until.and_then(|milliseconds| Timestamp::from_millisecond(milliseconds).ok());
    Ok(Stored {
        token: Token::from_fields(&document.fields)?,
        claim: by.zip(until).map(|(by, until)| Claim { by: by.to_owned(), until }),
        revision: document.version.0,
    })
}

impl TokenStore for TokenDocument {
    fn read(&self) -> BoxFuture<'_, Result<Option<Stored>, TokenStoreError>> {
        async move {
            let names = std::slice::from_ref(&self.name);
            let documents = self.store.get_many(names, STORE_TIMEOUT).await.map_err(|error| away(&error))?;
            documents.into_iter().next().flatten().as_ref().map(read).transpose()
        }
        .boxed()
    }

    fn write(&self, change: Change, revision: u64) -> BoxFuture<'_, Result<u64, TokenStoreError>> {
        async move {
            let fields = match change {
                Change::Token(token) => fields_of(&token),
                Change::Claim(Claim { by, until }) => {
                    let until = json!(until.as_millisecond());
                    [(CLAIMED_BY.to_owned(), json!(by)), (CLAIMED_UNTIL.to_owned(), until)]
                        .into_iter()
                        .collect()
                }
            };
            let condition = Condition::At(Version(revision));
            let write = Write { name: self.name.clone(), change: StoreChange::Set(fields), condition };
            self.write_one(write).await.map(|version| version.0)
        }
        .boxed()
    }

    fn replace(&self, token: Token) -> BoxFuture<'_, Result<(), TokenStoreError>> {
        async move { self.write_one(Write::set(self.name.clone(), fields_of(&token))).await.map(drop) }
            .boxed()
    }

    fn changes(&self) -> BoxStream<'static, ()> {
        let following = Following {
            document: self.clone(),
            changes: None,
            backoff: Backoff::new(FIRST_RETRY, LONGEST_RETRY),
        };
        stream::unfold(following, async |mut following| {
            following.next().await;
            Some(((), following))
        })
        .boxed()
    }

    fn place(&self) -> &'static str {
        "document"
    }
}

/// What is heard of the document.
struct Following {
    document: TokenDocument,
    changes: Option<Changes>,
    backoff: Backoff,
}

impl Following {
    /// Waits until the document may have changed.
    async fn next(&mut self) {
        let Name { collection, .. } = &self.document.name;
        loop {
            let Some(changes) = &mut self.changes else {
                match self.document.store.follow(collection.clone()).await {
                    Ok(changes) => self.changes = Some(changes),
                    Err(error) => {
                        tracing::debug!(error = %error, "the token document cannot be followed now");
                        tokio::time::sleep(self.backoff.next_wait()).await;
                    }
                }
                continue;
            };
            if let Some(Ok(batch)) = changes.next().await {
                self.backoff.reset();
                // Nothing at all: the first batch of an empty collection.
                if batch.is_empty() || batch.iter().any(|(name, _)| *name == self.document.name) {
                    return;
                }
            } else {
                self.changes = None;
                tokio::time::sleep(self.backoff.next_wait()).await;
            }
        }
    }
}
