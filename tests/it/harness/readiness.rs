//! `/readyz`, asked ten times a second through a whole case: it must name what is broken, and stop naming it.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::inlet::Inlet;

/// A broken part is named so soon.
const NAMED_WITHIN: Duration = Duration::from_secs(15);
/// And not any more so soon after the first attempt that can succeed.
const CLEARED_WITHIN: Duration = Duration::from_secs(5);
const PERIOD: Duration = Duration::from_millis(100);
/// An answer that takes longer is none.
const ANSWER: Duration = Duration::from_secs(2);

/// What an answer said at a time: the parts that are waited for.
type Sample = (Instant, Vec<String>);

/// Asks until it is dropped. A thread of its own and a plain socket: whatever a test does meanwhile, it goes on.
pub struct Watch {
    samples: Arc<Mutex<Vec<Sample>>>,
    is_over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    /// Begins.
    pub fn on(inlet: &Inlet) -> Self {
        Self::at(inlet.port)
    }

    /// Begins, at a port of this machine.
    pub fn at(port: u16) -> Self {
        let (samples, is_over) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicBool::new(false)));
        let (seen, end, addr) =
            (Arc::clone(&samples), Arc::clone(&is_over), SocketAddr::from(([127, 0, 0, 1], port)));
        let thread = std::thread::spawn(move || {
            while !end.load(Ordering::Relaxed) {
                let asked = Instant::now();
                if let Some(parts) = waiting_for(addr) {
                    seen.lock().unwrap().push((Instant::now(), parts));
                }
                std::thread::sleep(PERIOD.saturating_sub(asked.elapsed()));
            }
        });
        Self { samples, is_over, thread: Some(thread) }
    }

    /// `part` was named soon after `broken`, and not any more soon after `can_succeed`, the first attempt that could
    /// succeed, and never again since.
    pub fn assert_named(&self, part: &str, broken: Instant, can_succeed: Instant) {
        let samples = self.samples();
        let names = |parts: &[String]| parts.iter().any(|name| name == part);
        let named = samples.iter().find(|(at, parts)| *at >= broken && names(parts));
        let Some((named, _)) = named else { panic!("/readyz never named {part}") };
        let last = samples.iter().rposition(|(_, parts)| names(parts)).unwrap();
        let Some(cleared) = samples.get(last + 1) else {
            panic!("/readyz still names {part}; changes since the fault: {:?}", changes(&samples, broken))
        };
        let (named, cleared) = (*named - broken, cleared.0.saturating_duration_since(can_succeed));
        println!(
            "readiness: {part} named after {named:?}, cleared after {cleared:?}, {} answers",
            samples.len()
        );
        let changes = changes(&samples, broken);
        assert!(named <= NAMED_WITHIN, "{part} named after {named:?}: {changes:?}");
        assert!(cleared <= CLEARED_WITHIN, "{part} cleared after {cleared:?}: {changes:?}");
    }

    fn samples(&self) -> Vec<Sample> {
        self.samples.lock().unwrap().clone()
    }

    /// Whether an answer since then named `part`.
    pub fn has_named(&self, part: &str, since: Instant) -> bool {
        let samples = self.samples();
        samples.iter().any(|(at, parts)| *at >= since && parts.iter().any(|name| name == part))
    }

    /// Whether the last answer named nothing.
    pub fn is_ready(&self) -> bool {
        self.samples().last().is_some_and(|(_, parts)| parts.is_empty())
    }

    /// No part was ever named since.
    pub fn assert_ready_since(&self, since: Instant) {
        let samples = self.samples();
        let mut later = samples.iter().filter(|(at, _)| *at >= since).peekable();
        assert!(later.peek().is_some(), "nobody answered");
        let named = later.find(|(_, parts)| !parts.is_empty());
        assert!(named.is_none(), "after {:?}: {:?}", named.map(|(at, _)| *at - since), named);
    }
}

/// When the answer changed, after `since`, and to what.
fn changes(samples: &[Sample], since: Instant) -> Vec<(Duration, &[String])> {
    let mut changes: Vec<(Duration, &[String])> = Vec::new();
    for (at, parts) in samples {
        if changes.last().is_none_or(|(_, before)| before != parts) {
            changes.push((at.saturating_duration_since(since), parts));
        }
    }
    changes
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

/// The parts that `/readyz` names; none where nobody answers.
fn waiting_for(addr: SocketAddr) -> Option<Vec<String>> {
    let mut stream = TcpStream::connect_timeout(&addr, ANSWER).ok()?;
    stream.set_read_timeout(Some(ANSWER)).ok()?;
    stream.write_all(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    let body: Value = serde_json::from_str(answer.split_once("\r\n\r\n")?.1).ok()?;
    let names = body["waitingFor"].as_array().cloned().unwrap_or_default();
    Some(names.iter().filter_map(|name| Some(name.as_str()?.to_owned())).collect())
}
