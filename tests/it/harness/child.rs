//! Processes of a test: started with nothing of our own environment, and gone at its end.

use std::path::Path;
use std::process::{Child as Process, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// A process. Dropping it kills it.
pub struct Child {
    process: Process,
    name: &'static str,
}

impl Child {
    /// Starts `command`; what it says goes to `log`.
    pub fn start(name: &'static str, command: &mut Command, log: &Path) -> Self {
        let log = std::fs::File::create(log).unwrap();
        let errors = log.try_clone().unwrap();
        let process = command.stdout(log).stderr(errors).spawn();
        let process = process.unwrap_or_else(|error| panic!("cannot start {name}: {error}"));
        Self { process, name }
    }

    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// Sends a signal, by name (`TERM`, `STOP`, …).
    pub fn signal(&self, signal: &str) {
        let status =
            Command::new("kill").arg(format!("-{signal}")).arg(self.id().to_string()).status().unwrap();
        assert!(status.success(), "cannot signal {}", self.name);
    }

    /// SIGSTOP, and stopped when this returns: a process of many threads does not stop at once.
    pub async fn stop(&self) {
        self.signal("STOP");
        super::eventually("it has stopped", || async { self.has_stopped().then_some(()) }).await;
    }

    /// Whether each of its threads has stopped.
    fn has_stopped(&self) -> bool {
        let threads = std::fs::read_dir(format!("/proc/{}/task", self.id())).unwrap();
        let mut stats =
            threads.filter_map(|thread| std::fs::read_to_string(thread.ok()?.path().join("stat")).ok());
        // The state stands behind the name, which is in parentheses.
        stats.all(|stat| stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T')))
    }

    /// Whether it is over.
    pub fn has_ended(&mut self) -> Option<ExitStatus> {
        self.process.try_wait().unwrap()
    }

    /// Waits for its end.
    pub async fn wait(&mut self, patience: Duration) -> ExitStatus {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(status) = self.process.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "{} still runs after {patience:?}", self.name);
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// SIGKILL, and gone when this returns.
    pub fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    /// How many descriptors it has open.
    pub fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.id())).unwrap().count()
    }

    /// From now on no file of its can grow beyond so many bytes; `None`: beyond nothing. A process that does not ignore
    /// SIGXFSZ (see [`on_a_small_disk`]) is killed by trying to.
    pub fn limit_files(&self, most_bytes: Option<u64>) {
        let most = most_bytes.map_or("unlimited".to_owned(), |most| most.to_string());
        // The soft limit alone, so that it can be taken back without being root.
        let limit = format!("--fsize={most}:");
        let status = Command::new("prlimit").args(["--pid", &self.id().to_string(), &limit]).status();
        // Of util-linux, which every Debian has.
        assert!(status.is_ok_and(|status| status.success()), "prlimit cannot limit {}", self.name);
    }

    /// What is written to its standard input.
    pub fn stdin(&mut self) -> &mut std::process::ChildStdin {
        self.process.stdin.as_mut().unwrap()
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // It may be over already; a stopped one has to be let go on to die.
        if self.process.kill().is_ok() {
            drop(self.process.wait());
        }
    }
}

/// A command whose writes fail once [`Child::limit_files`] says so, as on a full disk, instead of ending it.
pub fn on_a_small_disk(program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = clean("sh");
    command.args(["-c", r#"trap "" XFSZ; exec "$0" "$@""#]).arg(program);
    command
}

/// A command with a clean environment and no input.
pub fn clean(program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new(program);
    command.env_clear().env("PATH", std::env::var("PATH").unwrap()).stdin(Stdio::null());
    command
}
