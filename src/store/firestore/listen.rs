//! What operators change, by one listener on a query.

use std::collections::HashMap;
use std::sync::Arc;

use firestore::gcloud_sdk::google::firestore::v1::listen_response::ResponseType;
use firestore::gcloud_sdk::google::firestore::v1::structured_query::field_filter::Operator;
use firestore::gcloud_sdk::google::firestore::v1::structured_query::filter::FilterType;
use firestore::gcloud_sdk::google::firestore::v1::structured_query::{
    CollectionSelector, Direction, FieldFilter, FieldReference, Filter, Order,
};
use firestore::gcloud_sdk::google::firestore::v1::target::query_target::QueryType;
use firestore::gcloud_sdk::google::firestore::v1::target::{QueryTarget, TargetType};
use firestore::gcloud_sdk::google::firestore::v1::target_change::TargetChangeType;
use firestore::gcloud_sdk::google::firestore::v1::value::ValueType;
use firestore::gcloud_sdk::google::firestore::v1::{
    self as wire, ListenRequest, ListenResponse, StructuredQuery, Target, TargetChange, listen_request,
};
use firestore::gcloud_sdk::tonic::{Code, Streaming};
use futures_util::{StreamExt as _, stream};
use jiff::Timestamp;
use tokio::sync::oneshot;

use super::connection::{Connection, LONGEST_REQUEST, away, by_code, refusal};
use super::value;
use crate::store::document::EDITED_AT;
use crate::store::{Collection, Document, Edits, Name, StoreError, Version, in_time};

/// Ours to choose; there is one.
const TARGET: i32 = 1;

struct Listener {
    connection: Arc<Connection>,
    answers: Streaming<ListenResponse>,
    /// What was brought, and at which version: Firestore may begin anew at any time and send everything again.
    brought: HashMap<Arc<str>, Version>,
    /// Ends our half of the stream with this one; the transport would keep it.
    _open: oneshot::Sender<()>,
}

/// Follows the users whose `operatorUpdatedAt` is later than `since`.
pub(super) async fn follow(connection: Arc<Connection>, since: Timestamp) -> Result<Edits, StoreError> {
    let (open, closed) = oneshot::channel::<()>();
    let request = ListenRequest {
        database: connection.database().to_owned(),
        target_change: Some(listen_request::TargetChange::AddTarget(target(&connection, since))),
        ..Default::default()
    };
    // Kept open: the end of our half would end theirs.
    let requests = stream::once(async { request }).chain(stream::pending()).take_until(closed);
    let answers = connection
        .call(requests, async |mut client, requests| client.listen(requests).await)
        .await?
        .into_inner();
    let mut listener = Listener { connection, answers, brought: HashMap::new(), _open: open };
    let stored = listener.until_current().await?;
    let changes = stream::unfold(Some(listener), |listener| async {
        let mut listener = listener?;
        match listener.next().await {
            Ok(edit) => Some((Ok(vec![edit]), Some(listener))),
            Err(error) => Some((Err(error), None)),
        }
    });
    Ok(stream::once(async { Ok(stored) }).chain(changes).boxed())
}

fn target(connection: &Connection, since: Timestamp) -> Target {
    let field = || Some(FieldReference { field_path: EDITED_AT.to_owned() });
    let since = value::from_time(since.max(Timestamp::UNIX_EPOCH)).map(ValueType::TimestampValue);
    let query = StructuredQuery {
        from: vec![CollectionSelector {
            collection_id: Collection::Users.as_str().to_owned(),
            all_descendants: false,
        }],
        r#where: Some(Filter {
            filter_type: Some(FilterType::FieldFilter(FieldFilter {
                field: field(),
                op: Operator::GreaterThan.into(),
                value: Some(wire::Value { value_type: since }),
            })),
        }),
        order_by: vec![Order { field: field(), direction: Direction::Ascending.into() }],
        ..Default::default()
    };
    Target {
        target_id: TARGET,
        target_type: Some(TargetType::Query(QueryTarget {
            parent: connection.documents(),
            query_type: Some(QueryType::StructuredQuery(query)),
        })),
        ..Default::default()
    }
}

impl Listener {
    /// What there is already. Each answer has its time, not all of them together: there may be many.
    async fn until_current(&mut self) -> Result<Vec<(Name, Document)>, StoreError> {
        let mut stored = Vec::new();
        loop {
            match in_time(LONGEST_REQUEST, self.answer()).await? {
                ResponseType::DocumentChange(change) => stored.extend(self.edit(change)?),
                ResponseType::TargetChange(change) => {
                    if check(&change)? == TargetChangeType::Current {
                        return Ok(stored);
                    }
                }
                ResponseType::DocumentDelete(_)
                | ResponseType::DocumentRemove(_)
                | ResponseType::Filter(_) => {}
            }
        }
    }

    async fn next(&mut self) -> Result<(Name, Document), StoreError> {
        loop {
            match self.answer().await? {
                ResponseType::DocumentChange(change) => {
                    if let Some(edit) = self.edit(change)? {
                        return Ok(edit);
                    }
                }
                ResponseType::TargetChange(change) => drop(check(&change)?),
                // Of what is gone nothing is to be shown; who writes it next learns of it by a conflict.
                ResponseType::DocumentDelete(_)
                | ResponseType::DocumentRemove(_)
                | ResponseType::Filter(_) => {}
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

    /// `None` for a change by which a document leaves the query, and for none at all.
    fn edit(&mut self, change: wire::DocumentChange) -> Result<Option<(Name, Document)>, StoreError> {
        let Some(found) = change.document.filter(|_| change.target_ids.contains(&TARGET)) else {
            return Ok(None);
        };
        let users = format!("{}/{}/", self.connection.documents(), Collection::Users.as_str());
        let Some(id) = found.name.strip_prefix(&users) else { return Ok(None) };
        let document = value::to_document(found.fields, found.update_time)?;
        let id: Arc<str> = id.into();
        let is_known = self.brought.insert(Arc::clone(&id), document.version) == Some(document.version);
        Ok((!is_known).then(|| (Name::user(id), document)))
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
