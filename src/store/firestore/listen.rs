//! What others change, by a listener on a query.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use firestore::gcloud_sdk::google::firestore::v1::listen_response::ResponseType;
use firestore::gcloud_sdk::google::firestore::v1::target::query_target::QueryType;
use firestore::gcloud_sdk::google::firestore::v1::target::{QueryTarget, TargetType};
use firestore::gcloud_sdk::google::firestore::v1::target_change::TargetChangeType;
use firestore::gcloud_sdk::google::firestore::v1::{
    self as wire, ListenRequest, ListenResponse, StructuredQuery, Target, TargetChange, listen_request,
};
use firestore::gcloud_sdk::tonic::{Code, Streaming};
use futures_util::{StreamExt as _, stream};
use jiff::Timestamp;
use tokio::sync::oneshot;

use super::connection::{Connection, LONGEST_REQUEST, away, by_code, refusal};
use super::{query, value};
use crate::store::{Changes, Collection, Document, Edits, Name, StoreError, Version, in_time};

/// Ours to choose; there is one.
const TARGET: i32 = 1;

/// A document, or that it is gone.
type Changed = (Name, Option<Document>);

struct Listener {
    connection: Arc<Connection>,
    collection: Collection,
    /// Whether it stands for a collection as a whole: then what it holds must be what there is.
    is_whole: bool,
    is_current: bool,
    /// What was brought since Firestore began anew, until that is current: what it does not bring again is gone.
    anew: Option<HashSet<Arc<str>>>,
    answers: Streaming<ListenResponse>,
    /// What was brought, and at which version: Firestore may begin anew at any time and send everything again.
    brought: HashMap<Arc<str>, Version>,
    /// Ends our half of the stream with this one; the transport would keep it.
    _open: oneshot::Sender<()>,
}

/// Follows the users whose `operatorUpdatedAt` is later than `since`.
pub(super) async fn edits(connection: Arc<Connection>, since: Timestamp) -> Result<Edits, StoreError> {
    let changes = attach(connection, Collection::Users, Some(since)).await?;
    // Of what is gone nothing is to be shown; who writes it next learns of it by a conflict.
    let found =
        |batch: Vec<Changed>| batch.into_iter().filter_map(|(name, found)| Some((name, found?))).collect();
    Ok(changes.map(move |batch| batch.map(found)).boxed())
}

/// Follows a collection as a whole.
pub(super) async fn follow(
    connection: Arc<Connection>,
    collection: Collection,
) -> Result<Changes, StoreError> {
    attach(connection, collection, None).await
}

/// Of users those edited since then, or everything.
async fn attach(
    connection: Arc<Connection>,
    collection: Collection,
    since: Option<Timestamp>,
) -> Result<Changes, StoreError> {
    let (parent, id) = connection.place_of(&collection);
    let query = since.map_or_else(|| query::all_of(id), query::edited_after);
    let (open, closed) = oneshot::channel::<()>();
    let request = ListenRequest {
        database: connection.database().to_owned(),
        target_change: Some(listen_request::TargetChange::AddTarget(target(parent, query))),
        ..Default::default()
    };
    // Kept open: the end of our half would end theirs.
    let requests = stream::once(async { request }).chain(stream::pending()).take_until(closed);
    let answers = connection
        .call(requests, async |mut client, requests| client.listen(requests).await)
        .await?
        .into_inner();
    let mut listener = Listener {
        connection,
        collection,
        is_whole: since.is_none(),
        is_current: false,
        anew: None,
        answers,
        brought: HashMap::new(),
        _open: open,
    };
    let stored = listener.until_current().await?;
    let changes = stream::unfold(Some(listener), |listener| async {
        let mut listener = listener?;
        match listener.next().await {
            Ok(changed) => Some((Ok(changed), Some(listener))),
            Err(error) => Some((Err(error), None)),
        }
    });
    Ok(stream::once(async { Ok(stored) }).chain(changes).boxed())
}

fn target(parent: String, query: StructuredQuery) -> Target {
    let query_type = Some(QueryType::StructuredQuery(query));
    Target {
        target_id: TARGET,
        target_type: Some(TargetType::Query(QueryTarget { parent, query_type })),
        ..Default::default()
    }
}

impl Listener {
    /// What there is already. Each answer has its time, not all of them together: there may be many.
    async fn until_current(&mut self) -> Result<Vec<Changed>, StoreError> {
        let mut stored = Vec::new();
        while !self.is_current {
            let answer = in_time(LONGEST_REQUEST, self.answer()).await?;
            stored.extend(self.take(answer)?);
        }
        Ok(stored)
    }

    async fn next(&mut self) -> Result<Vec<Changed>, StoreError> {
        loop {
            let answer = self.answer().await?;
            let changed = self.take(answer)?;
            if !changed.is_empty() {
                return Ok(changed);
            }
        }
    }

    async fn answer(&mut self) -> Result<ResponseType, StoreError> {
        loop {
            match self.answers.message().await {
                Ok(Some(answer)) => {
                    if let Some(answer) = answer.response_type {
                        return Ok(answer);
                    }
                }
                Ok(None) => return Err(away("the listener was ended")),
                Err(status) => return Err(refusal(&status)),
            }
        }
    }

    /// What an answer says of documents.
    fn take(&mut self, answer: ResponseType) -> Result<Vec<Changed>, StoreError> {
        Ok(match answer {
            ResponseType::DocumentChange(change) => self.changed(change)?.into_iter().collect(),
            ResponseType::DocumentDelete(gone) => self.gone(&gone.document).into_iter().collect(),
            ResponseType::DocumentRemove(gone) => self.gone(&gone.document).into_iter().collect(),
            ResponseType::TargetChange(change) => match check(&change)? {
                TargetChangeType::Reset => {
                    self.anew = Some(HashSet::new());
                    Vec::new()
                }
                TargetChangeType::Current => {
                    self.is_current = true;
                    self.not_brought_again()
                }
                _ => Vec::new(),
            },
            ResponseType::Filter(filter) => {
                let held = self.anew.as_ref().map_or(self.brought.len(), HashSet::len);
                if self.is_whole && usize::try_from(filter.count) != Ok(held) {
                    return Err(away("the listener has missed what was deleted"));
                }
                Vec::new()
            }
        })
    }

    /// `None` for a change by which a document leaves the query, and for none at all.
    fn changed(&mut self, change: wire::DocumentChange) -> Result<Option<Changed>, StoreError> {
        let Some(found) = change.document.filter(|_| change.target_ids.contains(&TARGET)) else {
            return Ok(None);
        };
        let Some(name) = self.connection.name_in(&self.collection, &found.name) else { return Ok(None) };
        let document = value::to_document(found.fields, found.update_time)?;
        if let Some(anew) = &mut self.anew {
            anew.insert(Arc::clone(&name.id));
        }
        let before = self.brought.insert(Arc::clone(&name.id), document.version);
        Ok((before != Some(document.version)).then_some((name, Some(document))))
    }

    fn gone(&mut self, path: &str) -> Option<Changed> {
        let name = self.connection.name_in(&self.collection, path)?;
        self.brought.remove(&name.id)?;
        if let Some(anew) = &mut self.anew {
            anew.remove(&name.id);
        }
        Some((name, None))
    }

    fn not_brought_again(&mut self) -> Vec<Changed> {
        let Some(anew) = self.anew.take() else { return Vec::new() };
        let gone = self.brought.extract_if(|id, _| !anew.contains(id));
        let name = |id| Name { collection: self.collection.clone(), id };
        gone.map(|(id, _)| (name(id), None)).collect()
    }
}

/// An error where Firestore ended the listening.
fn check(change: &TargetChange) -> Result<TargetChangeType, StoreError> {
    match (change.target_change_type(), &change.cause) {
        (TargetChangeType::Remove, Some(cause)) => Err(by_code(Code::from_i32(cause.code), &cause.message)),
        (TargetChangeType::Remove, None) => Err(away("the listener was ended")),
        (kind, _) => Ok(kind),
    }
}
