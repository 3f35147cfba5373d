//! The spine: what passes the door meets its user, is made an envelope and published, in order.
//!
//! One task, batches end to end. Shutdown flows down the path: when every source has let go of its [`Intake`], the
//! door closes, what it held is enriched and published, and [`run`] returns.

mod enrich;
mod intake;
mod look_back;
mod metrics;
mod outbox;
mod publish;
#[cfg(test)]
mod tests_support;
mod window;

use std::pin::pin;

use tokio::sync::mpsc;

pub use enrich::{Enrich, Enriched};
pub use intake::{Door, Intake, IntakeArgs, IntakeConfig, KnownIds, Offered, Patience, open_door};
pub use metrics::{PipelineMetrics, RefusedReason};
pub use outbox::{Bounds, Outbox, OutboxArgs, OutboxConfig, OutboxError, OutboxMetrics, OutboxPart};
pub use publish::{Publish, PublishArgs, PublishConfig};

/// Carries events from the door to the stream, until the door is closed and everything is settled, or the bus is
/// gone for good: then this ends early, and its owner stops the service.
pub async fn run(door: Door, enrich: Enrich, publish: Publish) {
    // One batch is on its way from the one to the other.
    let (enriched, to_publish) = mpsc::channel(1);
    let largest = publish.largest_message();
    let mut publishing = pin!(publish.run(to_publish, door.closing()));
    tokio::select! {
        biased;
        () = &mut publishing => return,
        () = enrich.run(door, enriched, largest) => {}
    }
    publishing.await;
}
