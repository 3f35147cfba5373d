//! An independent reader of user documents, and an operator's hand in them: a project of the Firestore emulator over REST,
//! nothing of ours in between.

use std::collections::BTreeMap;

use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use reqwest::{Method, RequestBuilder};
use serde_json::{Map, Value, json};

use super::firestore::Project;
use super::proxy::{Mode, Proxy};

/// Documents by key, their fields as plain JSON: times are RFC 3339 strings.
pub type Documents = BTreeMap<String, Map<String, Value>>;

/// The emulator's own way around the rules: the service.
const OWNER: &str = "owner";
const PAGE: &str = "100";

impl Project {
    /// Every user's document.
    pub async fn users(&self) -> Documents {
        self.read_all("users").await
    }

    /// Every document of a collection.
    pub async fn read_all(&self, collection: &str) -> Documents {
        let mut found = Documents::new();
        let mut token = String::new();
        loop {
            let query = [("pageSize", PAGE), ("pageToken", &token)];
            let page = answer(self.request(Method::GET, collection, &query)).await;
            for document in page["documents"].as_array().into_iter().flatten() {
                let key = document["name"].as_str().unwrap().rsplit('/').next().unwrap();
                found.insert(key.to_owned(), plain_fields(document));
            }
            match page["nextPageToken"].as_str() {
                Some(next) => next.clone_into(&mut token),
                None => return found,
            }
        }
    }

    /// An operator's edit: sets these fields of a user's document, or makes it; nothing else in it is touched. Fields
    /// whose name ends with `At` hold times.
    pub async fn edit(&self, key: &str, fields: Value) {
        self.write("users", key, fields).await;
    }

    /// The same for a document of any collection.
    pub async fn write(&self, collection: &str, id: &str, fields: Value) {
        let Value::Object(fields) = fields else { panic!("fields by name") };
        let mask: Vec<_> = fields.keys().map(|name| ("updateMask.fieldPaths", name.as_str())).collect();
        let stored: Map<_, _> =
            fields.iter().map(|(name, value)| (name.clone(), stored(name, value))).collect();
        let path = format!("{collection}/{}", escaped(id));
        let request = self.request(Method::PATCH, &path, &mask);
        answer(request.json(&json!({ "fields": stored }))).await;
    }

    /// Takes a user's document away.
    pub async fn delete_user(&self, key: &str) {
        answer(self.request(Method::DELETE, &user_path(key), &[])).await;
    }

    fn request(&self, method: Method, path: &str, query: &[(&str, &str)]) -> RequestBuilder {
        let Self { host, id, .. } = self;
        let query: Vec<_> = query.iter().map(|(name, value)| format!("{name}={}", escaped(value))).collect();
        let url = format!(
            "http://{host}/v1/projects/{id}/databases/(default)/documents/{path}?{}",
            query.join("&")
        );
        self.client.request(method, url).bearer_auth(OWNER)
    }
}

async fn answer(request: RequestBuilder) -> Value {
    let response = request.send().await.unwrap();
    let status = response.status();
    let text = response.text().await.unwrap();
    assert!(status.is_success(), "the emulator says {status}: {text}");
    serde_json::from_str(&text).unwrap()
}

/// A colon in the last segment of a path would be taken for the start of a verb.
fn user_path(key: &str) -> String {
    format!("users/{}", escaped(key))
}

fn escaped(text: &str) -> String {
    utf8_percent_encode(text, NON_ALPHANUMERIC).to_string()
}

fn plain_fields(document: &Value) -> Map<String, Value> {
    let fields = document["fields"].as_object().into_iter().flatten();
    fields.map(|(name, value)| (name.clone(), plain(value))).collect()
}

/// A value as plain JSON.
fn plain(value: &Value) -> Value {
    let (kind, value) = value.as_object().and_then(|typed| typed.iter().next()).unwrap();
    match kind.as_str() {
        "nullValue" => Value::Null,
        "integerValue" => json!(value.as_str().unwrap().parse::<i64>().unwrap()),
        "arrayValue" => value["values"].as_array().into_iter().flatten().map(plain).collect(),
        "mapValue" => Value::Object(plain_fields(value)),
        _ => value.clone(),
    }
}

/// Plain JSON as it is written.
fn stored(name: &str, value: &Value) -> Value {
    match value {
        Value::Null => json!({ "nullValue": null }),
        Value::Bool(value) => json!({ "booleanValue": value }),
        Value::Number(value) if value.is_f64() => json!({ "doubleValue": value }),
        Value::Number(value) => json!({ "integerValue": value.to_string() }),
        Value::String(value) if name.ends_with("At") => json!({ "timestampValue": value }),
        Value::String(value) => json!({ "stringValue": value }),
        Value::Array(values) => {
            let values: Vec<_> = values.iter().map(|value| stored("", value)).collect();
            json!({ "arrayValue": { "values": values } })
        }
        Value::Object(fields) => {
            let fields: Map<_, _> = fields.iter().map(|(k, value)| (k.clone(), stored(k, value))).collect();
            json!({ "mapValue": { "fields": fields } })
        }
    }
}

#[tokio::test]
async fn documents_are_read_as_they_were_written_and_edits_leave_the_rest() {
    let emulator = Project::new();
    assert!(emulator.users().await.is_empty(), "a project of its own");
    let whole = json!({
        "notes": "kind", "operatorUpdatedAt": "2026-11-20T05:51:20.612Z", "messageCountAllTime": 7, "share": 0.5,
        "tags": ["regular", "vip"], "empty": [], "flag": true, "nothing": null,
        "profiles": { "twitch": { "login": "some_login", "seenAt": "2026-11-20T05:51:20Z" } },
    });
    emulator.edit("twitch:1%3A", whole.clone()).await;
    emulator.edit("twitch:1%3A", json!({ "notes": "kinder" })).await;
    let mut expected = whole.as_object().unwrap().clone();
    expected.insert("notes".to_owned(), json!("kinder"));
    assert_eq!(emulator.users().await, Documents::from([("twitch:1%3A".to_owned(), expected)]));
    assert!(Project::new().users().await.is_empty(), "nobody else's");
    emulator.delete_user("twitch:1%3A").await;
    assert!(emulator.users().await.is_empty());
}

#[tokio::test]
async fn all_pages_are_read() {
    let emulator = Project::new();
    let count = 2 * PAGE.parse::<usize>().unwrap() + 1;
    let edits = (0..count).map(|user| {
        let emulator = &emulator;
        async move { emulator.edit(&format!("twitch:{user}"), json!({ "user": user })).await }
    });
    futures_util::future::join_all(edits).await;
    let found = emulator.users().await;
    assert_eq!(found.len(), count);
    assert!(found.iter().all(|(key, fields)| key == &format!("twitch:{}", fields["user"])));
}

#[tokio::test]
async fn a_proxy_before_it_can_cut_it_off() {
    let emulator = Project::new();
    emulator.edit("twitch:1", json!({ "notes": "kind" })).await;
    let proxy = Proxy::to(emulator.address().await).await;
    let url =
        format!("http://{}/v1/projects/{}/databases/(default)/documents/users", proxy.addr(), emulator.id);
    let ask = async || emulator.client.get(&url).bearer_auth(OWNER).send().await;
    assert!(ask().await.unwrap().status().is_success());
    proxy.set(Mode::Cut);
    assert!(ask().await.is_err());
}
