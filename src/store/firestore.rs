//! Cloud Firestore, and Google's emulator of it.
//!
//! Spoken to by the generated gRPC client that the crate `firestore` brings, on a channel of our own, and not by
//! the crate's `FirestoreDb`: that one dials when it is made, so a start would fail while Firestore is away, leaves
//! a dead connection unnoticed for two minutes, sets no time-out, and retries by rules of its own. What is retried
//! here is for the caller, who holds the conditions: nothing is sent twice from here.
//!
//! Writes go by `BatchWrite`: each document stands for itself, under its own precondition and with a mask of the
//! fields named. `Commit` would be all or nothing, and one conflict would throw back everybody else's write.

mod connection;
mod listen;
mod query;
mod value;

use std::collections::HashMap;
use std::sync::Arc;

use clap::Args;
use firestore::gcloud_sdk::google::firestore::v1::batch_get_documents_response::Result as Found;
use firestore::gcloud_sdk::google::firestore::v1::precondition::ConditionType;
use firestore::gcloud_sdk::google::firestore::v1::value::ValueType;
use firestore::gcloud_sdk::google::firestore::v1::write::Operation;
use firestore::gcloud_sdk::google::firestore::v1::{
    self as wire, BatchGetDocumentsRequest, BatchWriteRequest, RunQueryRequest, StructuredQuery,
    run_query_request,
};
use firestore::gcloud_sdk::tonic::Code;
use futures_util::future::BoxFuture;
use futures_util::{FutureExt as _, StreamExt as _, TryStreamExt as _, stream};
use jiff::Timestamp;
use serde::Serialize;

use super::{
    Change, Changes, Collection, Condition, Document, DocumentStore, Edits, Name, StoreError, Version, Write,
    WriteRefusal,
};
use crate::secret::without_user_info;
use crate::settings::{Environment, Problems};
use connection::{Connection, away, refusal};

/// Documents in one request to read. Firestore takes more, but answers none before it has all.
const READ_CHUNK: usize = 200;

/// Documents in one request to write. Firestore takes up to 500.
const WRITE_CHUNK: usize = 100;

/// Requests of one call under way at a time. A connection carries 100 in all.
const CHUNKS_AT_ONCE: usize = 8;

/// Outcomes in the order of the writes.
type Outcomes = Vec<Result<Version, WriteRefusal>>;

/// The project where an emulator alone is set: it takes any.
const LOCAL_PROJECT: &str = "inlet-local";

/// Settings of Firestore.
#[derive(Debug, Clone, Args)]
pub struct FirestoreArgs {
    /// The Google Cloud project that holds the database; left out with an emulator: inlet-local
    #[arg(long, env)]
    google_cloud_project: Option<String>,
    /// The database's name; left out: (default)
    #[arg(long, env)]
    firebase_database_id: Option<String>,
    /// host:port of a Firestore emulator, which needs no credentials
    #[arg(long, env)]
    firestore_emulator_host: Option<String>,
}

/// Checked settings of Firestore.
#[derive(Debug, Clone, Serialize)]
pub struct FirestoreConfig {
    #[serde(rename = "GOOGLE_CLOUD_PROJECT")]
    project: String,
    #[serde(rename = "FIREBASE_DATABASE_ID")]
    database: String,
    #[serde(rename = "FIRESTORE_EMULATOR_HOST")]
    emulator: Option<String>,
}

impl FirestoreArgs {
    #[cfg(test)]
    pub(super) fn new(project: Option<String>, database: Option<String>, emulator: Option<String>) -> Self {
        Self {
            google_cloud_project: project,
            firebase_database_id: database,
            firestore_emulator_host: emulator,
        }
    }

    /// Whether it is said where Firestore is.
    pub fn is_set(&self) -> bool {
        [&self.google_cloud_project, &self.firestore_emulator_host]
            .into_iter()
            .flatten()
            .any(|text| !text.trim().is_empty())
    }

    /// Checks the settings; the inner `None` is "neither project nor emulator".
    pub fn check(&self, _: &Environment, problems: &mut Problems) -> Option<Option<FirestoreConfig>> {
        let project =
            problems.parse_optional("GOOGLE_CLOUD_PROJECT", self.google_cloud_project.as_ref(), |text| {
                segment(text, "a project's id such as my-project", |c| {
                    c.is_ascii_alphanumeric() || "-_.:".contains(c)
                })
            });
        let database =
            problems.parse_optional("FIREBASE_DATABASE_ID", self.firebase_database_id.as_ref(), |text| {
                if text == "(default)" {
                    return Ok(text.to_owned());
                }
                segment(text, "(default) or a database's id such as people-eu", |c| {
                    c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-'
                })
            });
        let emulator =
            problems.parse_optional("FIRESTORE_EMULATOR_HOST", self.firestore_emulator_host.as_ref(), host);
        let (project, database, emulator) = (project?, database?, emulator?);
        let project = match (project, &emulator) {
            (None, None) => return Some(None),
            (None, Some(_)) => LOCAL_PROJECT.to_owned(),
            (Some(project), _) => project,
        };
        let database = database.unwrap_or_else(|| "(default)".to_owned());
        Some(Some(FirestoreConfig { project, database, emulator }))
    }
}

/// Text that stands between the slashes of a resource's name.
fn segment(text: &str, what: &str, is_fine: impl Fn(char) -> bool) -> Result<String, String> {
    if text.chars().all(is_fine) { Ok(text.to_owned()) } else { Err(format!("{text:?} is not {what}")) }
}

/// `host:port`; Google's own tools take it with a scheme too.
fn host(text: &str) -> Result<String, String> {
    let host = text.strip_prefix("http://").unwrap_or(text);
    let is_fine = host.rsplit_once(':').is_some_and(|(name, port)| {
        let is_name = |c: char| c.is_ascii_alphanumeric() || "-._[:]".contains(c);
        !name.is_empty() && name.chars().all(is_name) && port.parse::<u16>().is_ok()
    });
    if is_fine { Ok(host.to_owned()) } else { Err(format!("{:?} is not host:port", without_user_info(text))) }
}

impl FirestoreConfig {
    /// The database's name among all.
    fn database_path(&self) -> String {
        format!("projects/{}/databases/{}", self.project, self.database)
    }
}

/// A store in Firestore.
pub struct FirestoreStore {
    connection: Arc<Connection>,
}

impl FirestoreStore {
    /// A store that dials at its first call. Needs a runtime.
    pub fn new(config: &FirestoreConfig) -> Self {
        Self { connection: Arc::new(Connection::new(config)) }
    }

    async fn get_chunk(&self, names: &[Name]) -> Result<HashMap<String, Option<Document>>, StoreError> {
        let request = BatchGetDocumentsRequest {
            database: self.connection.database().to_owned(),
            documents: names.iter().map(|name| self.connection.path_of(name)).collect(),
            ..Default::default()
        };
        let mut answers = self
            .connection
            .call(request, async |mut client, request| client.batch_get_documents(request).await)
            .await?
            .into_inner();
        let mut read = HashMap::with_capacity(names.len());
        while let Some(answer) = answers.message().await.map_err(|status| refusal(&status))? {
            match answer.result {
                Some(Found::Found(found)) => {
                    let document = value::to_document(found.fields, found.update_time)?;
                    read.insert(found.name, Some(document));
                }
                Some(Found::Missing(name)) => drop(read.insert(name, None)),
                // Sent by itself when a transaction begins, which none does here.
                None => {}
            }
        }
        Ok(read)
    }

    async fn list_chunk(
        &self,
        collection: Collection,
        after: Option<Arc<str>>,
        limit: usize,
    ) -> Result<Vec<(Name, Document)>, StoreError> {
        let (parent, id) = self.connection.place_of(&collection);
        let start_at = after.map(|id| {
            let name = self.connection.path_of(&Name { collection: collection.clone(), id });
            let value = wire::Value { value_type: Some(ValueType::ReferenceValue(name)) };
            wire::Cursor { values: vec![value], before: false }
        });
        let query = StructuredQuery {
            start_at,
            limit: Some(i32::try_from(limit).unwrap_or(i32::MAX)),
            ..query::all_of(id)
        };
        let request = RunQueryRequest {
            parent,
            query_type: Some(run_query_request::QueryType::StructuredQuery(query)),
            ..Default::default()
        };
        let mut answers = self
            .connection
            .call(request, async |mut client, request| client.run_query(request).await)
            .await?
            .into_inner();
        let mut found = Vec::new();
        while let Some(answer) = answers.message().await.map_err(|status| refusal(&status))? {
            // Sent by itself with how far the query has come.
            let Some(document) = answer.document else { continue };
            if let Some(name) = self.connection.name_in(&collection, &document.name) {
                found.push((name, value::to_document(document.fields, document.update_time)?));
            }
        }
        Ok(found)
    }

    /// Outcomes in the order of the writes. Firestore refuses a request as a whole, with nothing of it done, for one
    /// document that it never takes (one too large, say); then each goes by itself, or that one would stand in the
    /// way of its neighbours for good.
    async fn write_chunk(&self, writes: &[Write]) -> Result<Outcomes, StoreError> {
        match self.write_together(writes).await {
            Err(error @ StoreError::Refused { code: "INVALID_ARGUMENT", .. }) => {
                if writes.len() == 1 {
                    return Ok(vec![Err(WriteRefusal::Failed(error))]);
                }
                let each: Vec<_> = writes.chunks(1).map(|write| self.write_together(write)).collect();
                let answers: Vec<_> = stream::iter(each).buffered(CHUNKS_AT_ONCE).collect().await;
                let one = |answer: Result<Outcomes, StoreError>| {
                    answer.unwrap_or_else(|error| vec![Err(WriteRefusal::Failed(error))])
                };
                Ok(answers.into_iter().flat_map(one).collect())
            }
            Err(error @ StoreError::GaveUp(_)) => {
                Ok(writes.iter().map(|_| Err(WriteRefusal::Failed(error.clone()))).collect())
            }
            answer => answer,
        }
    }

    async fn write_together(&self, writes: &[Write]) -> Result<Outcomes, StoreError> {
        let request = BatchWriteRequest {
            database: self.connection.database().to_owned(),
            writes: writes.iter().map(|write| self.to_wire(write)).collect(),
            ..Default::default()
        };
        let answer = self
            .connection
            .call(request, async |mut client, request| client.batch_write(request).await)
            .await?
            .into_inner();
        if answer.status.len() != writes.len() || answer.write_results.len() != writes.len() {
            return Err(away("it answered for another number of documents than were written"));
        }
        let outcomes = answer.status.iter().zip(&answer.write_results).zip(writes);
        Ok(outcomes
            .map(|((status, result), write)| match (Code::from_i32(status.code), write.condition) {
                (Code::Ok, _) if matches!(write.change, Change::Delete) => Ok(Version(0)),
                (Code::Ok, _) => value::to_version(result.update_time).map_err(WriteRefusal::Failed),
                // Deleted, or written by somebody else. An aborted write proves neither: that is contention.
                (Code::AlreadyExists, Condition::Absent)
                | (Code::FailedPrecondition | Code::NotFound, Condition::At(_)) => {
                    Err(WriteRefusal::Conflict)
                }
                (code, _) => Err(WriteRefusal::Failed(connection::by_code(code, &status.message))),
            })
            .collect())
    }

    fn to_wire(&self, write: &Write) -> wire::Write {
        let condition = match write.condition {
            Condition::Absent => Some(ConditionType::Exists(false)),
            Condition::At(version) => Some(ConditionType::UpdateTime(value::from_version(version))),
            Condition::Always => None,
        };
        let name = self.connection.path_of(&write.name);
        let (update_mask, operation) = match &write.change {
            Change::Delete => (None, Operation::Delete(name)),
            Change::Set(fields) => {
                let (fields, field_paths) = value::from_fields(fields);
                let document = wire::Document { name, fields, ..Default::default() };
                (Some(wire::DocumentMask { field_paths }), Operation::Update(document))
            }
        };
        wire::Write {
            update_mask,
            current_document: condition
                .map(|condition| wire::Precondition { condition_type: Some(condition) }),
            operation: Some(operation),
            ..Default::default()
        }
    }
}

impl DocumentStore for FirestoreStore {
    fn get_many<'a>(&'a self, names: &'a [Name]) -> BoxFuture<'a, Result<Vec<Option<Document>>, StoreError>> {
        async move {
            let chunks: Vec<_> = names.chunks(READ_CHUNK).map(|chunk| self.get_chunk(chunk)).collect();
            let read: Vec<_> = stream::iter(chunks).buffered(CHUNKS_AT_ONCE).try_collect().await?;
            let answers = names.chunks(READ_CHUNK).zip(&read).flat_map(|(chunk, read)| {
                chunk.iter().map(|name| read.get(&self.connection.path_of(name)).cloned())
            });
            // Only what is said to be missing is missing.
            answers
                .collect::<Option<_>>()
                .ok_or_else(|| away("it answered for fewer documents than were asked for"))
        }
        .boxed()
    }

    fn write_many(&self, writes: Vec<Write>) -> BoxFuture<'_, Result<Outcomes, StoreError>> {
        async move {
            let chunks: Vec<_> = writes.chunks(WRITE_CHUNK).map(|chunk| self.write_chunk(chunk)).collect();
            let answers: Vec<_> = stream::iter(chunks).buffered(CHUNKS_AT_ONCE).collect().await;
            let mut outcomes = Vec::with_capacity(writes.len());
            let is_all_lost = answers.iter().all(Result::is_err);
            for (chunk, answer) in writes.chunks(WRITE_CHUNK).zip(answers) {
                match answer {
                    Ok(answer) => outcomes.extend(answer),
                    Err(error) if is_all_lost => return Err(error),
                    // What the other chunks were told is worth keeping.
                    Err(error) => {
                        outcomes.extend(chunk.iter().map(|_| Err(WriteRefusal::Failed(error.clone()))));
                    }
                }
            }
            Ok(outcomes)
        }
        .boxed()
    }

    fn list(
        &self,
        collection: Collection,
        after: Option<Arc<str>>,
        limit: usize,
    ) -> BoxFuture<'_, Result<Vec<(Name, Document)>, StoreError>> {
        self.list_chunk(collection, after, limit).boxed()
    }

    fn edits(&self, since: Timestamp) -> BoxFuture<'_, Result<Edits, StoreError>> {
        listen::edits(Arc::clone(&self.connection), since).boxed()
    }

    fn follow(&self, collection: Collection) -> BoxFuture<'_, Result<Changes, StoreError>> {
        listen::follow(Arc::clone(&self.connection), collection).boxed()
    }
}
