//! Answers that only a store makes possible which others write as well, or which does not answer.

use std::collections::BTreeMap;

use futures_util::future::BoxFuture;
use futures_util::{FutureExt as _, StreamExt as _};
use prometheus::Registry;
use tokio::sync::watch;

use super::*;
use crate::source::twitch::{Roster, Sights};
use crate::store::measured::StoreMetrics;
use crate::store::{Changes, DocumentStore, Edits, Version};

/// Holds these documents. Whatever is written, somebody else was faster.
struct Contended(Vec<(Name, Document)>);

impl DocumentStore for Contended {
    fn get_many<'a>(&'a self, names: &'a [Name]) -> BoxFuture<'a, Result<Vec<Option<Document>>, StoreError>> {
        async { Ok(vec![None; names.len()]) }.boxed()
    }

    fn write_many(
        &self,
        writes: Vec<Write>,
    ) -> BoxFuture<'_, Result<Vec<Result<Version, WriteRefusal>>, StoreError>> {
        async move { Ok(writes.iter().map(|_| Err(WriteRefusal::Conflict)).collect()) }.boxed()
    }

    fn list(
        &self,
        _: Collection,
        _: Option<Arc<str>>,
        limit: usize,
    ) -> BoxFuture<'_, Result<Vec<(Name, Document)>, StoreError>> {
        async move { Ok(self.0.iter().take(limit).cloned().collect()) }.boxed()
    }

    fn edits(&self, _: Timestamp) -> BoxFuture<'_, Result<Edits, StoreError>> {
        async { Ok(futures_util::stream::pending().boxed()) }.boxed()
    }

    fn follow(&self, _: Collection) -> BoxFuture<'_, Result<Changes, StoreError>> {
        std::future::pending().boxed()
    }
}

fn channels(count: usize, fixed: &[&str]) -> Channels {
    let document = |n: usize| {
        let all = fields([("login", json!(format!("c{n}"))), ("addedAt", json!(Timestamp::UNIX_EPOCH))]);
        (Key::Room(n as u64 + 1).name(), Document { fields: all, version: Version(1) })
    };
    let documents = Arc::new(Contended((0..count).map(document).collect()));
    let store = Store::new(documents, Arc::new(StoreMetrics::new(&Registry::new()).unwrap()));
    let fixed: Vec<_> = fixed.iter().map(|login| (*login).to_owned()).collect();
    Channels::new(store, &fixed, Clock::system())
}

#[tokio::test]
async fn there_is_an_end_to_channels_and_to_patience() {
    let full = channels(MOST_CHANNELS, &[]);
    let error = full.add("another").await.unwrap_err();
    assert!(matches!(error, ChannelError::TooMany) && error.code() == ErrorCode::Conflict, "{error}");
    assert!(matches!(full.add("c7").await, Ok(Added::Known(_))));
    let nearly = channels(MOST_CHANNELS - 1, &["fixed"]);
    for error in [nearly.add("another").await.unwrap_err(), nearly.remove("c7").await.unwrap_err()] {
        assert!(matches!(error, ChannelError::Contended) && error.code() == ErrorCode::Conflict, "{error}");
    }
}

/// A store that does not answer at all keeps nobody from following what Twitch says of a room.
#[tokio::test(start_paused = true)]
async fn a_rename_is_followed_while_the_store_is_away() {
    let channels = channels(0, &["alpha"]);
    let wanted = watch::Sender::new(Arc::new(Roster::fixed(&["alpha".to_owned()])));
    let (mut roster, sights) = (wanted.subscribe(), watch::Sender::new(Sights::default()));
    let follow = Follow::new(channels, true, wanted, sights.subscribe()).run();
    let renaming = async {
        for login in ["alpha", "beta"] {
            let at = Timestamp::UNIX_EPOCH;
            sights.send_modify(|sights| sights.note(7, login, at, &roster.borrow()));
            let is_followed = |roster: &Arc<Roster>| roster.rooms() == BTreeMap::from([(7, login)]);
            roster.wait_for(is_followed).await.unwrap();
        }
    };
    tokio::select! {
        () = follow => panic!("it does not end"),
        done = tokio::time::timeout(Duration::from_mins(1), renaming) => done.unwrap(),
    }
}
