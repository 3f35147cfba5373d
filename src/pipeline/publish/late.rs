//! What is sent so late that the stream may have forgotten its id: it is looked for in the stream before.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use tokio::time::Instant;

use super::Publish;
use crate::pipeline::enrich::Enriched;
use crate::pipeline::look_back::Late;
use crate::pipeline::outbox::Outbox;

/// Until the stream was seen for the first time: the window of one that Inlet makes.
const USUAL_DUPLICATE_WINDOW: Duration = Duration::from_mins(10);

/// Which events are late now.
#[derive(Clone, Copy)]
pub(super) struct Lateness {
    /// What can have been published before this.
    before: Timestamp,
    /// What was taken in before this: the other clock may have been set back since. `None`: the machine is younger.
    taken_in_before: Option<Instant>,
    /// What an earlier run put into the outbox: neither clock says when it was sent.
    rows_before: u64,
}

impl Lateness {
    pub(super) fn holds(&self, event: &Enriched) -> bool {
        event.not_published_before < self.before
            || self.taken_in_before.is_some_and(|before| Instant::from_std(event.taken_in) <= before)
            || event.row.is_some_and(|row| row < self.rows_before)
    }
}

impl Publish {
    pub(super) fn lateness(&self) -> Lateness {
        let half = self.stream_window() / 2;
        Lateness {
            before: self.clock.now() - half,
            taken_in_before: Instant::now().checked_sub(half),
            rows_before: self.outbox.as_ref().map_or(0, Outbox::first_own_row),
        }
    }

    /// Whether the stream was read back for late events. If not, that is begun, for all that wait behind them too; nothing
    /// is sent meanwhile.
    pub(super) fn has_looked_back_for(&mut self, late: Option<Late>) -> bool {
        let Some(late) = late else { return true };
        if self.look_back.is_good(&*self.bus, &late, self.stream_window()) {
            return true;
        }
        if self.look_back.is_at_odds(&*self.bus) {
            // Another stream, and the bus has not noticed: it will.
            self.mode = super::Mode::Waiting(Instant::now() + self.backoff.next_wait());
        } else {
            let lateness = self.lateness();
            let behind = self.ready.iter().chain(&self.waiting).filter(|event| lateness.holds(event));
            let late = late.and(Late::all(behind.map(|event| (event, None))));
            self.look_back.begin(Arc::clone(&self.bus), late);
        }
        false
    }

    fn stream_window(&self) -> Duration {
        self.bus.stream().map_or(USUAL_DUPLICATE_WINDOW, |stream| stream.duplicate_window)
    }
}
