//! The log of what was sent: the truth that tests count against.
//!
//! One record per line and connection, written after the message lies in that connection's queue; the pump keeps a
//! place in this log before it queues anything, so nothing queued goes unrecorded. The way here is bounded: a slow
//! disk slows the chat.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::io;
use std::path::Path;
use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde::Serialize;
use tokio::fs::File;
use tokio::io::{AsyncWriteExt, BufWriter};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{MissedTickBehavior, interval};

use super::lines::{Chunk, LineKind, Mark};

/// At least so often what is buffered goes to the file.
const FLUSH_EVERY: Duration = Duration::from_millis(100);

/// One line sent to one connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SentRecord {
    /// When it was queued, Unix milliseconds.
    pub time: i64,
    /// The number of the connection; `None` when nobody was there to get it.
    pub connection: Option<u64>,
    /// The channel, without `#`; empty for a replayed line that names none (it goes to every connection).
    pub channel: String,
    /// The `user-id` tag.
    pub user: Option<String>,
    /// The `id` tag.
    pub id: Option<String>,
    /// What it is.
    pub kind: LineKind,
    /// The `source-id` tag: of shared chat, the id of the message it is a copy of (its own for the original).
    pub source: Option<String>,
    /// The line itself, without its end, where it has no `id` to be known by.
    pub line: Option<Vec<u8>>,
    /// The record before it once more: sent twice.
    pub copy: bool,
}

/// What the records of one chunk share, as it is written to the file.
#[derive(Serialize)]
struct Head<'a> {
    time: i64,
    connection: Option<u64>,
    channel: &'a str,
}

/// The rest of a record.
#[derive(Serialize)]
struct Row<'a> {
    user: Option<Cow<'a, str>>,
    id: Option<Cow<'a, str>>,
    kind: LineKind,
    #[serde(skip_serializing_if = "Option::is_none")]
    source: Option<Cow<'a, str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    line: Option<&'a str>,
    /// In base64: a line that is no UTF-8.
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes: Option<String>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    copy: bool,
}

/// What the log is told.
pub(super) enum Note {
    Sent { time: i64, connection: Option<u64>, chunk: Chunk },
    Snapshot(oneshot::Sender<Vec<SentRecord>>),
}

/// The log itself.
pub(super) struct SentLog {
    file: Option<BufWriter<File>>,
    kept: VecDeque<SentRecord>,
    keep: usize,
}

impl SentLog {
    /// Writes to `path` if there is one, and keeps the last `keep` records in memory.
    pub(super) async fn open(path: Option<&Path>, keep: usize) -> io::Result<Self> {
        let file = match path {
            Some(path) => Some(BufWriter::with_capacity(256 * 1024, File::create(path).await?)),
            None => None,
        };
        Ok(Self { file, kept: VecDeque::new(), keep })
    }

    /// Takes notes until every sender is gone, then writes out the rest.
    pub(super) async fn run(mut self, mut notes: mpsc::Receiver<Note>) -> io::Result<()> {
        let mut flush = interval(FLUSH_EVERY);
        flush.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut rows = Vec::new();
        let mut unflushed = false;
        loop {
            tokio::select! {
                biased;
                _ = flush.tick(), if unflushed => {
                    self.flush().await?;
                    unflushed = false;
                }
                note = notes.recv() => match note {
                    Some(Note::Sent { time, connection, chunk }) => {
                        self.note(time, connection, &chunk, &mut rows).await?;
                        unflushed = true;
                    }
                    Some(Note::Snapshot(answer)) => {
                        if answer.send(self.kept.iter().cloned().collect()).is_err() {
                            tracing::debug!("nobody waits for the records any more");
                        }
                    }
                    None => return self.flush().await,
                },
            }
        }
    }

    async fn flush(&mut self) -> io::Result<()> {
        match &mut self.file {
            Some(file) => file.flush().await,
            None => Ok(()),
        }
    }

    async fn note(
        &mut self,
        time: i64,
        connection: Option<u64>,
        chunk: &Chunk,
        rows: &mut Vec<u8>,
    ) -> io::Result<()> {
        rows.clear();
        let head = Head { time, connection, channel: &chunk.channel };
        let mut start = serde_json::to_vec(&head)?;
        start.pop();
        for mark in chunk.marks.iter() {
            let row = row(chunk, mark);
            if self.file.is_some() {
                rows.extend_from_slice(&start);
                let joint = rows.len();
                serde_json::to_writer(&mut *rows, &row)?;
                // Two objects made one: the second's bracket is the comma behind the first's last field.
                rows[joint] = b',';
                rows.push(b'\n');
            }
            if self.keep > 0 {
                if self.kept.len() >= self.keep {
                    self.kept.pop_front();
                }
                self.kept.push_back(row.to_record(&head, raw(chunk, mark)));
            }
        }
        match &mut self.file {
            Some(file) => file.write_all(rows).await,
            None => Ok(()),
        }
    }
}

/// The bytes of a line that has no id, without its end.
fn raw<'a>(chunk: &'a Chunk, mark: &Mark) -> Option<&'a [u8]> {
    let line = &chunk.bytes[mark.line.clone()];
    mark.id.is_none().then(|| line.strip_suffix(b"\r\n").unwrap_or(line))
}

fn row<'a>(chunk: &'a Chunk, mark: &Mark) -> Row<'a> {
    let text = |range: &Option<std::ops::Range<usize>>| {
        range.as_ref().map(|range| String::from_utf8_lossy(&chunk.bytes[range.clone()]))
    };
    let raw = raw(chunk, mark);
    let line = raw.and_then(|raw| std::str::from_utf8(raw).ok());
    Row {
        user: text(&mark.user),
        id: text(&mark.id),
        kind: mark.kind,
        source: text(&mark.source),
        line,
        bytes: raw.filter(|_| line.is_none()).map(|raw| BASE64_STANDARD.encode(raw)),
        copy: mark.copy,
    }
}

impl Row<'_> {
    fn to_record(&self, head: &Head<'_>, raw: Option<&[u8]>) -> SentRecord {
        let text = |value: &Option<Cow<'_, str>>| value.as_deref().map(str::to_owned);
        SentRecord {
            time: head.time,
            connection: head.connection,
            channel: head.channel.to_owned(),
            user: text(&self.user),
            id: text(&self.id),
            kind: self.kind,
            source: text(&self.source),
            line: raw.map(<[u8]>::to_vec),
            copy: self.copy,
        }
    }
}
