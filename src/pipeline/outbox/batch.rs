//! What goes to the disk, and what becomes of it.

use crate::pipeline::Enriched;

/// What a commit puts on disk.
#[derive(Default)]
pub(in crate::pipeline) struct Batch {
    /// Events that are under way, by their numbers in the window.
    pub(in crate::pipeline) sent: Vec<u64>,
    /// Events that are not sent yet.
    pub(in crate::pipeline) unsent: Vec<Enriched>,
    /// Numbers in the window of events that a dead letter took the place of.
    pub(in crate::pipeline) buried: Vec<u64>,
}

/// What the disk did.
pub(in crate::pipeline) enum Stored {
    /// The batch is on disk, its events in this row.
    Written(Batch, u64),
    /// It is not.
    Failed(Batch),
    /// Events to be sent next, read back.
    Read(Vec<Enriched>),
    /// So many events are gone: their rows were not what was written.
    Torn(u64),
    /// Nothing to be known.
    Nothing,
}
