//! The shape of the source, held: who may import whom, where a third party may be named, how long a file may be,
//! and under which licences the dependencies come.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use inlet::errors::ErrorCode;
use inlet::telemetry::metrics::Label as _;

const LEAVES: [&str; 12] = [
    "clock",
    "data_dir",
    "errors",
    "recent",
    "redb_file",
    "retry",
    "secret",
    "settings",
    "status",
    "tasks",
    "telemetry",
    "tls",
];

/// What each module may import, besides itself and the leaves.
fn allowed(module: &str) -> Option<&'static [&'static str]> {
    Some(match module {
        "envelope" | "sim" => &[],
        "bus" | "store" => &["envelope"],
        "audit" => &["store"],
        "users" => &["store", "bus", "envelope"],
        "pipeline" => &["users", "bus", "envelope"],
        "source" => &["pipeline", "envelope"],
        "channels" => &["store", "source"],
        "http" => &["channels", "pipeline", "users", "audit", "bus", "store", "envelope", "source"],
        // The composition root, the commands, and the map itself see everything.
        "app" | "cli" | "lib" | "main" => return None,
        leaf if LEAVES.contains(&leaf) => &[],
        other => panic!("{other} has no place in the order yet; give it one here"),
    })
}

/// Third parties and the only places that name them.
const WALLS: [(&str, &[&str]); 11] = [
    ("async_nats", &["bus/jetstream"]),
    ("twitch_irc", &["source/twitch/wire"]),
    ("redb", &["redb_file", "bus/embedded", "store/embedded", "pipeline/outbox"]),
    ("firestore", &["store/firestore"]),
    ("backoff", &["retry"]),
    ("axum", &["http"]),
    ("hyper", &["http/connections"]),
    ("hyper_util", &["http/connections"]),
    ("reqwest", &["cli", "source/twitch/backfill", "source/twitch/credentials", "source/twitch/helix"]),
    ("rcgen", &["sim/"]),
    ("jsonwebtoken", &[]),
];

fn sources() -> Vec<(String, String)> {
    fn walk(folder: &Path, found: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, found);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    walk(&root, &mut found);
    assert!(found.len() > 40);
    let name =
        |path: &Path| path.strip_prefix(&root).unwrap().with_extension("").to_str().unwrap().to_owned();
    found.iter().map(|path| (name(path), std::fs::read_to_string(path).unwrap())).collect()
}

/// Everything in front of the unit tests.
fn without_tests(text: &str) -> &str {
    text.split("#[cfg(test)]\nmod tests").next().unwrap()
}

/// Modules of this crate that a file names, comments left out.
fn imports(text: &str) -> BTreeSet<String> {
    let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
    let mut found = BTreeSet::new();
    for line in code {
        for rest in line.split("crate::").skip(1) {
            found.insert(rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect());
        }
    }
    found.remove("label");
    found
}

#[test]
fn imports_follow_the_path() {
    for (name, text) in sources() {
        let module = name.split('/').next().unwrap();
        let Some(allowed) = allowed(module) else { continue };
        for import in imports(without_tests(&text)) {
            let is_fine = import == module || LEAVES.contains(&&*import) || allowed.contains(&&*import);
            assert!(is_fine, "src/{name}.rs imports crate::{import}");
            // Of the source, HTTP sees what it shows of itself, not how it works.
            if module == "http" && import == "source" {
                let inner =
                    text.contains("source::twitch::connection") || text.contains("source::twitch::plan");
                assert!(!inner, "src/{name}.rs looks into the source");
            }
        }
    }
}

#[test]
fn a_leaf_imports_leaves_alone_and_the_simulator_nothing() {
    for (name, text) in sources() {
        if name.starts_with("sim") && !name.contains("tests") {
            let found = imports(without_tests(&text));
            assert!(found.iter().all(|import| import == "sim"), "src/{name}.rs imports {found:?}");
        }
    }
}

#[test]
fn third_parties_stay_behind_their_walls() {
    for (name, text) in sources() {
        let code: String = text.lines().filter(|line| !line.trim_start().starts_with("//")).collect();
        for (party, places) in WALLS {
            // A module of ours may have the same name, further inside a path.
            let path = format!("{party}::");
            let names_it = code.match_indices(&path).any(|(at, _)| !code[..at].ends_with("::"));
            assert!(
                !names_it || places.iter().any(|place| name.starts_with(place)),
                "src/{name}.rs names {party}"
            );
        }
    }
}

/// What stands between the parentheses that open before `text`.
fn arguments(text: &str) -> &str {
    let (mut depth, mut in_text, mut is_escaped) = (1, false, false);
    for (at, c) in text.char_indices() {
        match c {
            _ if is_escaped => is_escaped = false,
            '\\' if in_text => is_escaped = true,
            '"' => in_text = !in_text,
            '(' if !in_text => depth += 1,
            ')' if !in_text => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return &text[..at];
        }
    }
    text
}

#[test]
fn whatever_goes_wrong_is_logged_with_its_code_and_every_code_is_used() {
    // The simulator is a tool beside the service, and imports nothing of it.
    let is_service = |name: &str| !name.starts_with("sim") && name != "cli/simulate" && name != "errors";
    let (mut logged, mut everything) = (0, String::new());
    for (name, text) in sources().into_iter().filter(|(name, _)| is_service(name)) {
        let text = without_tests(&text);
        for call in ["warn!(", "error!("] {
            for (at, _) in text.match_indices(call) {
                let said = arguments(&text[at + call.len()..]);
                assert!(said.contains("error_code"), "src/{name}.rs logs without error_code: {said}");
                logged += 1;
            }
        }
        everything += text;
    }
    assert!(logged > 30, "{logged}");
    for code in ErrorCode::ALL {
        let is_used = ["ErrorCode", "ProblemCode"].iter().any(|code_of| {
            let name = format!("{code_of}::{code:?}");
            let mut found = everything.match_indices(&name);
            found.any(|(at, _)| !everything[at + name.len()..].starts_with(|c: char| c.is_alphanumeric()))
        });
        assert!(is_used, "nobody uses {code:?}");
    }
}

#[test]
fn files_are_short_enough_to_read() {
    for (name, text) in sources() {
        let lines = without_tests(&text).lines().count();
        assert!(lines <= 500, "src/{name}.rs has {lines} lines without its tests");
    }
}

#[test]
fn dependencies_come_under_known_licences_and_with_one_tls_stack() {
    // What is built, rather than what the lock file could build.
    let tree = Command::new(env!("CARGO"))
        .args(["tree", "--locked", "--edges", "normal,build", "--prefix", "none", "--format", "{p}|{l}"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    assert!(tree.status.success(), "{}", String::from_utf8_lossy(&tree.stderr));
    let tree = String::from_utf8(tree.stdout).unwrap();
    let fine = [
        "MIT",
        "Apache-2.0",
        "Apache-2.0 WITH LLVM-exception",
        "BSD-2-Clause",
        "BSD-3-Clause",
        "ISC",
        "Zlib",
        "Unicode-3.0",
        "CC0-1.0",
        "0BSD",
        "Unlicense",
        "BSL-1.0",
        "OpenSSL",
        "MIT-0",
        "CDLA-Permissive-2.0",
    ];
    let mut problems = BTreeMap::new();
    let packages: BTreeSet<_> = tree.lines().filter(|line| !line.is_empty()).collect();
    assert!(packages.len() > 100);
    for package in packages {
        let (name, licence) = package.split_once('|').unwrap();
        let name = name.split(' ').next().unwrap().to_owned();
        if ["openssl", "openssl-sys", "native-tls", "ring"].contains(&name.as_str()) {
            problems.insert(name.clone(), "a second TLS stack or provider".to_owned());
        }
        let licence = licence.trim_end_matches(" (*)").replace('/', " OR ");
        let is_fine = licence.split(" OR ").any(|choice| {
            choice
                .trim_matches(['(', ')', ' '])
                .split(" AND ")
                .all(|part| fine.contains(&part.trim_matches(['(', ')', ' '])))
        });
        if !is_fine {
            problems.insert(name, licence);
        }
    }
    assert!(problems.is_empty(), "{problems:?}");
}
