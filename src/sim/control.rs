//! What an operator or a test can make the simulator do while it runs.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use serde::Serialize;
use tokio::time::Instant;

use super::hub::{Hub, Peer};

/// Twitch keeps a connection for a while after its RECONNECT (up to 30 s); the simulator is quicker.
const RECONNECT_GRACE: Duration = Duration::from_secs(10);
/// How long a raw line waits for room at a connection that does not read.
const RAW_PATIENCE: Duration = Duration::from_secs(10);

/// A disturbance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Closes every connection at once; what is queued for them is lost.
    DropAll,
    /// Closes the connection with this number at once.
    Drop(u64),
    /// Sends `RECONNECT` to every connection that asked for Twitch's commands, and closes all of them 10 s later.
    Reconnect,
    /// Stops generating messages; connections stay.
    Pause,
    /// Goes on after a pause. The time spent in it is not made up for.
    Resume,
    /// Sends these bytes, as they are, to every connection. They need be neither a line nor UTF-8.
    Raw(Vec<u8>),
}

/// One line an operator typed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ControlLine {
    /// Something to do.
    Do(Command),
    /// Wants the numbers.
    Stats,
    /// Wants an end.
    Quit,
    /// Nothing.
    Empty,
}

/// Numbers of a running simulator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Stats {
    /// Open connections.
    pub connections: usize,
    /// Channels joined, summed over the connections.
    pub joined: usize,
    /// Messages queued, summed over the connections.
    pub sent: u64,
    /// Messages made, whether or not somebody was there to get them.
    pub generated: u64,
}

impl ControlLine {
    /// Reads one line: `drop`, `drop N`, `reconnect`, `pause`, `resume`, `raw TEXT`, `stats`, `quit`. `None`: unknown.
    pub fn parse(line: &[u8]) -> Option<Self> {
        let line = line.strip_suffix(b"\n").unwrap_or(line);
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        if let Some(text) = line.strip_prefix(b"raw ") {
            return Some(Self::Do(Command::Raw([text, b"\r\n"].concat())));
        }
        let words = std::str::from_utf8(line).ok()?.split_whitespace().collect::<Vec<_>>();
        Some(match words[..] {
            [] => Self::Empty,
            ["drop"] => Self::Do(Command::DropAll),
            ["drop", id] => Self::Do(Command::Drop(id.parse().ok()?)),
            ["reconnect"] => Self::Do(Command::Reconnect),
            ["pause"] => Self::Do(Command::Pause),
            ["resume"] => Self::Do(Command::Resume),
            ["stats"] => Self::Stats,
            ["quit"] => Self::Quit,
            _ => return None,
        })
    }
}

/// Does what `command` says.
pub(super) async fn act(command: Command, hub: &Hub) {
    match command {
        Command::DropAll => close(hub, |_| true),
        Command::Drop(id) => close(hub, |peer| peer.id == id),
        Command::Reconnect => {
            let peers = hub.members("");
            let by = Instant::now() + RECONNECT_GRACE;
            for peer in &peers {
                peer.queue.close_at(by);
            }
            let asked = peers.into_iter().filter(|peer| peer.commands.load(Ordering::Relaxed));
            tell(asked, Bytes::from_static(b":tmi.twitch.tv RECONNECT\r\n")).await;
        }
        Command::Pause => {
            hub.paused.send_replace(true);
        }
        Command::Resume => {
            hub.paused.send_replace(false);
        }
        Command::Raw(bytes) => tell(hub.members("").into_iter(), Bytes::from(bytes)).await,
    }
}

fn close(hub: &Hub, which: impl Fn(&Peer) -> bool) {
    for peer in hub.members("").iter().filter(|peer| which(peer)) {
        peer.queue.close();
    }
}

async fn tell(peers: impl Iterator<Item = Arc<Peer>>, bytes: Bytes) {
    for peer in peers {
        peer.queue.push(&bytes, Some(RAW_PATIENCE)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read() {
        let cases: [(&[u8], Option<ControlLine>); 9] = [
            (b"drop\n", Some(ControlLine::Do(Command::DropAll))),
            (b"drop 12\r\n", Some(ControlLine::Do(Command::Drop(12)))),
            (b"drop x", None),
            (b" reconnect ", Some(ControlLine::Do(Command::Reconnect))),
            (b"raw :a  b\xff\n", Some(ControlLine::Do(Command::Raw(b":a  b\xff\r\n".to_vec())))),
            (b"stats", Some(ControlLine::Stats)),
            (b"quit\n", Some(ControlLine::Quit)),
            (b"\n", Some(ControlLine::Empty)),
            (b"explode", None),
        ];
        for (line, wanted) in cases {
            assert_eq!(ControlLine::parse(line), wanted, "{line:?}");
        }
    }
}
