//! The service needs no rights: as a user who may write nowhere but in `DATA_DIR`, it does all that it does, and writes
//! nowhere else.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::harness::child::{Child, clean};
use crate::harness::inlet::{BINARY, Simulator};
use crate::harness::{eventually, free_port};

/// Whoever runs the tests as root lends the service this user, who owns nothing. Anybody else is unprivileged already.
const NOBODY: u32 = 65_534;

fn set_mode(path: &Path, mode: u32) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

/// `serve` as a user without rights, and who that is.
fn unprivileged(folder: &Path) -> (Command, u32) {
    let own = std::fs::metadata("/proc/self").unwrap().uid();
    if own != 0 {
        return (clean(BINARY), own);
    }
    // The build's folder may be closed to others.
    let binary = folder.join("inlet");
    std::fs::copy(BINARY, &binary).unwrap();
    set_mode(&binary, 0o555);
    chown(folder.join("data"), Some(NOBODY), Some(NOBODY)).unwrap();
    let mut command = clean("setpriv");
    let id = NOBODY.to_string();
    command.args(["--reuid", &id, "--regid", &id, "--clear-groups", "--no-new-privs"]).arg(binary);
    (command, NOBODY)
}

/// The regular files that a process has open for writing.
fn written(process: u32) -> Vec<PathBuf> {
    let descriptors = std::fs::read_dir(format!("/proc/{process}/fd")).unwrap();
    let open = descriptors.filter_map(|entry| {
        let entry = entry.ok()?;
        // It may be closed by now.
        let is_file = std::fs::metadata(entry.path()).ok()?.is_file();
        let info = std::fs::read_to_string(format!("/proc/{process}/fdinfo/{}", entry.file_name().to_str()?))
            .ok()?;
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap();
        let access = u32::from_str_radix(flags.trim(), 8).unwrap() & 3;
        (is_file && access != 0).then(|| std::fs::read_link(entry.path()).ok())?
    });
    open.collect()
}

fn files_in(folder: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect()
}

#[tokio::test]
async fn a_user_who_may_write_nowhere_but_in_data_dir_runs_the_service() {
    let simulator = Simulator::start(&["--channels", "alpha", "--rate", "200"]).await;
    let folder = tempfile::tempdir().unwrap();
    set_mode(folder.path(), 0o755);
    let (data, closed) = (folder.path().join("data"), folder.path().join("closed"));
    for path in [&data, &closed] {
        std::fs::create_dir(path).unwrap();
    }
    let (mut command, user) = unprivileged(folder.path());
    set_mode(&closed, 0o555);
    let port = free_port();
    // What usually takes a program's files: the working folder, the home, the temporary folder.
    command.arg("serve").current_dir(&closed).env("HOME", &closed).env("TMPDIR", &closed);
    command.env("XDG_CACHE_HOME", &closed).env("XDG_CONFIG_HOME", &closed);
    command.env("PORT", port.to_string()).env("DATA_DIR", &data);
    command.env("TWITCH_CHANNELS", "alpha").env("TWITCH_IRC_URL", simulator.url());
    let log = folder.path().join("log");
    let mut service = Child::start("inlet serve", &mut command, &log);
    let said = || std::fs::read_to_string(&log).unwrap();
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let get = async |path: &str| {
        let response = client.get(format!("http://127.0.0.1:{port}{path}")).send().await.ok()?;
        response.text().await.ok()
    };
    let open = RefCell::new(BTreeSet::new());
    eventually("chat is published, and users are met", || async {
        assert!(std::fs::exists(format!("/proc/{}", service.id())).unwrap(), "{}", said());
        open.borrow_mut().extend(written(service.id()));
        let metrics = get("/metrics").await?;
        let of = |name: &str| {
            let line = metrics.lines().find(|line| line.starts_with(name))?;
            line.rsplit_once(' ')?.1.parse::<f64>().ok()
        };
        let is_published = of("inlet_events_published_total{source=\"twitch\"}")? >= 300.0;
        (is_published && of("inlet_users_created_total")? >= 1.0).then_some(())
    })
    .await;
    let status = std::fs::read_to_string(format!("/proc/{}/status", service.id())).unwrap();
    let of = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().to_owned();
    assert!(of("Uid:").split_whitespace().all(|id| id == user.to_string()), "{status}");
    assert_eq!(of("CapEff:").trim_start_matches('0'), "", "no capability");
    service.signal("TERM");
    assert_eq!(service.wait(Duration::from_secs(15)).await.code(), Some(0), "{}", said());
    let open = open.into_inner();
    assert!(open.iter().any(|path| path.starts_with(&data)), "its files are seen: {open:?}");
    let elsewhere: Vec<_> = open.iter().filter(|path| !path.starts_with(&data) && **path != log).collect();
    assert!(elsewhere.is_empty(), "written outside of DATA_DIR: {elsewhere:?}");
    assert_eq!(files_in(&closed), [] as [PathBuf; 0]);
    for file in ["lock", "stream.redb", "twitch.json", "users.redb"] {
        assert!(data.join(file).exists(), "{file} is not in {:?}", files_in(&data));
    }
    // Nothing it says is about a right that it lacks.
    assert!(!said().to_lowercase().contains("denied"), "{}", said());
    set_mode(&closed, 0o755);
}
