//! What people were told and what is known of them, judged by `scripts/verify-people`, which shares nothing with the
//! service.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use inlet::store::embedded::EmbeddedStore;
use inlet::store::{DocumentStore as _, Name};
use serde_json::Value;

use super::emulator::Documents;

fn script(arguments: &[&str]) -> Output {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/verify-people");
    Command::new("python3").arg(script).args(arguments).output().unwrap()
}

/// The check's verdict: `flags` are `--exact` or `--faults`, and what else it takes; `sent` the simulators' logs;
/// `envelopes` in the stream's order; `users` every document. Panics with the differences if there are any.
pub fn verify<'a>(
    flags: &[&str],
    sent: &[&Path],
    envelopes: impl IntoIterator<Item = &'a Value>,
    users: &Documents,
) -> Value {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: String| -> PathBuf {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let lines = envelopes.into_iter().fold(String::new(), |lines, body| lines + &body.to_string() + "\n");
    let envelopes = write("envelopes.jsonl", lines);
    let users = write("users.json", serde_json::to_string(users).unwrap());
    let paths = [&["--envelopes", text(&envelopes), "--users", text(&users), "--sent"][..]];
    let sent: Vec<_> = sent.iter().map(|path| text(path)).collect();
    let output = script(&[flags, paths[0], &sent].concat());
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_str(&said).unwrap()
}

/// The users of these envelopes, as the embedded store in a folder nobody holds has them.
pub async fn embedded_users(data_dir: &Path, found: &[Value]) -> Documents {
    let store = EmbeddedStore::open(data_dir).unwrap();
    let of = |body: &Value| body["auth"]["userRef"].as_str().map(|user| user["users/".len()..].to_owned());
    let keys: std::collections::BTreeSet<_> = found.iter().filter_map(of).collect();
    let names: Vec<_> = keys.iter().map(|key| Name::user(Arc::from(key.as_str()))).collect();
    let documents = store.get_many(&names).await.unwrap();
    keys.into_iter().zip(documents).filter_map(|(key, document)| Some((key, document?.fields))).collect()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn the_check_finds_what_is_wrong() {
    let output = script(&["--self-test"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn the_check_is_content_with_what_is_right() {
    let folder = tempfile::tempdir().unwrap();
    let sent = folder.path().join("sent");
    std::fs::write(&sent, "").unwrap();
    let summary = verify(&["--exact"], &[&sent], [], &Documents::new());
    assert_eq!((summary["ok"].as_bool(), summary["documents"].as_u64()), (Some(true), Some(0)));
}
