//! Who may do what in Firestore: `firestore.rules` in the emulator, and `firestore.indexes.json` against the fields.

use std::collections::BTreeMap;

use inlet::store::document::{History, User, is_time, write_counts, write_history};
use jiff::Timestamp;
use serde_json::{Value, json};

use crate::harness::firestore::Project;

const RULES: &str = include_str!("../../firestore.rules");

/// What the emulator takes for the token of a person who signed in: unsigned.
fn signed_in(project: &str) -> String {
    let part = |value: &Value| data_encoding::BASE64URL_NOPAD.encode(value.to_string().as_bytes());
    let claims = json!({
        "iss": format!("https://securetoken.google.com/{project}"), "aud": project, "sub": "somebody",
        "user_id": "somebody", "email": "somebody@example.org", "iat": 0, "exp": 4_000_000_000_u32, "auth_time": 0,
        "firebase": { "sign_in_provider": "password", "identities": {} }, "admin": true,
    });
    format!("Bearer {}.{}.", part(&json!({ "alg": "none", "typ": "JWT" })), part(&claims))
}

#[tokio::test]
async fn clients_are_denied_everything_and_the_service_nothing() {
    let project = Project::new();
    project.load_rules(RULES).await;
    let person = signed_in(&project.id);
    let body = || Some(json!({ "fields": { "notes": { "stringValue": "x" } } }));
    for document in
        ["users/twitch:1", "oauth/twitch:bot", "inlet/INLET@1", "others/a", "users/twitch:1/deep/er"]
    {
        let collection = document.rsplit_once('/').unwrap().0;
        let create = format!("{collection}?documentId=new");
        for client in [None, Some(person.as_str())] {
            assert_eq!(project.rest("GET", document, client, None).await, 403, "{document} {client:?}");
            assert_eq!(project.rest("GET", collection, client, None).await, 403, "{collection} {client:?}");
            assert_eq!(project.rest("PATCH", document, client, body()).await, 403, "{document} {client:?}");
            assert_eq!(project.rest("POST", &create, client, body()).await, 403, "{document} {client:?}");
            assert_eq!(project.rest("DELETE", document, client, None).await, 403, "{document} {client:?}");
        }
        let service = Some("Bearer owner");
        assert_eq!(project.rest("PATCH", document, service, body()).await, 200);
        assert_eq!(project.rest("GET", document, service, None).await, 200);
        // Also of what is there.
        for client in [None, Some(person.as_str())] {
            assert_eq!(project.rest("GET", document, client, None).await, 403, "{document} {client:?}");
            assert_eq!(project.rest("DELETE", document, client, None).await, 403, "{document} {client:?}");
        }
        assert_eq!(project.rest("DELETE", document, service, None).await, 200);
    }
}

#[tokio::test]
async fn the_token_of_a_person_is_one_that_other_rules_let_in() {
    let project = Project::new();
    let open = RULES.replace("if false", "if request.auth.uid == 'somebody'");
    assert_ne!(open, RULES);
    project.load_rules(&open).await;
    let person = signed_in(&project.id);
    let body = Some(json!({ "fields": {} }));
    assert_eq!(project.rest("PATCH", "users/a", Some(&person), body).await, 200);
    assert_eq!(project.rest("GET", "users/a", None, None).await, 403);
}

#[test]
fn what_rises_with_every_message_is_not_indexed_and_what_is_followed_is() {
    let file: Value = serde_json::from_str(include_str!("../../firestore.indexes.json")).unwrap();
    let overrides: BTreeMap<_, _> = file["fieldOverrides"]
        .as_array()
        .unwrap()
        .iter()
        .map(|field| {
            assert_eq!(field["collectionGroup"], "users");
            (field["fieldPath"].as_str().unwrap(), &field["indexes"])
        })
        .collect();
    let exempt: Vec<_> = overrides
        .iter()
        .filter(|(_, indexes)| indexes.as_array().unwrap().is_empty())
        .map(|(name, _)| *name)
        .collect();
    // Every time of a user's that Inlet writes, and the positions.
    let at = Some(Timestamp::UNIX_EPOCH.into());
    let history = History {
        first_seen_at: at,
        last_seen_at: at,
        last_message_at: at,
        session_started_at: at,
        session_activity_at: at,
        ..History::default()
    };
    let mut written = write_history(&history);
    write_counts(&mut written, &User { history, ..User::default() });
    let rising = written.keys().filter(|name| is_time(name) || *name == "applied");
    assert_eq!(exempt, rising.collect::<Vec<_>>());
    assert_eq!(exempt.len(), 6);
    assert_eq!(
        *overrides["operatorUpdatedAt"],
        json!([{ "order": "ASCENDING", "queryScope": "COLLECTION" }])
    );
}
