//! Where operators look after users: the operations with what a service has at hand, and what the stream still holds
//! of somebody who is forgotten.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::operations::{self, Edit, Filter, Forgotten, Page, UserError, UserKey, UserView};
use crate::bus::{Bus, Start, Wanted};
use crate::clock::Clock;
use crate::store::measured::Store;

/// How long the stream is asked what it holds.
const BUS_PATIENCE: Duration = Duration::from_secs(3);

/// Where operators look after users. Cheap to clone.
#[derive(Clone)]
pub struct Desk {
    store: Store,
    clock: Clock,
    bus: Option<Arc<dyn Bus>>,
}

/// What the stream may still hold of somebody who is forgotten: what they said before. Nothing is deleted in it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Remains {
    /// The stream; left out where it could not be asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stream: Option<String>,
    /// For how long it keeps a message.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_age_seconds: Option<u64>,
    /// How many bytes it keeps.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_bytes: Option<u64>,
    /// When its oldest message, of whomever, was stored.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub oldest_at: Option<Timestamp>,
    /// By when what is in it now is gone for its age. Left out where it keeps messages without end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gone_by: Option<Timestamp>,
}

/// Who is forgotten, and what remains.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Farewell {
    /// Who.
    #[serde(flatten)]
    pub forgotten: Forgotten,
    /// What the stream may still hold.
    pub remains: Remains,
}

impl Desk {
    /// On a store. Without a `bus`, nobody is asked what the stream holds.
    pub fn new(store: Store, clock: Clock, bus: impl Into<Option<Arc<dyn Bus>>>) -> Self {
        Self { store, clock, bus: bus.into() }
    }

    /// See [`operations::show`].
    pub async fn show(&self, key: &UserKey) -> Result<UserView, UserError> {
        operations::show(&self.store, key).await
    }

    /// See [`operations::list`].
    pub async fn list(&self, filter: &Filter) -> Result<Page, UserError> {
        operations::list(&self.store, filter).await
    }

    /// See [`operations::edit`].
    pub async fn edit(&self, key: &UserKey, edit: &Edit) -> Result<UserView, UserError> {
        operations::edit(&self.store, &self.clock, key, edit).await
    }

    /// See [`operations::ignore`].
    pub async fn ignore(&self, key: &UserKey) -> Result<UserView, UserError> {
        operations::ignore(&self.store, &self.clock, key).await
    }

    /// See [`operations::unignore`].
    pub async fn unignore(&self, key: &UserKey) -> Result<UserView, UserError> {
        operations::unignore(&self.store, key).await
    }

    /// See [`operations::unforget`].
    pub async fn unforget(&self, key: &UserKey) -> Result<UserView, UserError> {
        operations::unforget(&self.store, &self.clock, key).await
    }

    /// See [`operations::forget`].
    pub async fn forget(&self, key: &UserKey) -> Result<Farewell, UserError> {
        let forgotten = operations::forget(&self.store, &self.clock, key).await?;
        let remains = match &self.bus {
            Some(bus) => remains(&**bus, self.clock.now()).await,
            None => Remains::default(),
        };
        Ok(Farewell { forgotten, remains })
    }
}

async fn remains(bus: &dyn Bus, now: Timestamp) -> Remains {
    let oldest = async {
        let batch = bus.follow(Start::Position(0), Wanted::Headers).await.ok()?.next().await?.ok()?;
        batch.messages.first().map(|stored| stored.stored_at)
    };
    let Some(stream) = bus.stream() else { return Remains::default() };
    Remains {
        stream: Some(stream.identity),
        max_age_seconds: stream.max_age.map(|age| age.as_secs()),
        max_bytes: stream.max_bytes,
        oldest_at: tokio::time::timeout(BUS_PATIENCE, oldest).await.ok().flatten(),
        gone_by: stream.max_age.map(|age| now + age),
    }
}
