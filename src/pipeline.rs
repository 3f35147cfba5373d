//! The spine: what passes the door is made an envelope and published, in order.
//!
//! One task, batches end to end. Shutdown flows down the path: when every source has let go of its
//! [`Intake`], the door closes, what it held is published, and [`run`] returns.

mod enrich;
mod intake;
mod look_back;
mod metrics;
mod publish;
#[cfg(test)]
mod tests_support;
mod window;

pub use enrich::{Enrich, Enriched};
pub use intake::{Door, Intake, IntakeArgs, IntakeConfig, Offered, Patience, open_door};
pub use metrics::PipelineMetrics;
pub use publish::{Publish, PublishArgs, PublishConfig};

/// Carries events from the door to the stream, until the door is closed and everything is settled, or the bus is
/// gone for good: then this ends early, and its owner stops the service.
pub async fn run(mut door: Door, enrich: Enrich, mut publish: Publish) {
    let mut is_open = true;
    loop {
        publish.send_what_may_go().await;
        if publish.is_bus_gone() || !is_open && publish.is_settled() {
            return;
        }
        tokio::select! {
            biased;
            happened = publish.next() => publish.handle(happened).await,
            drafts = door.next(), if is_open && publish.wants_more() => match drafts {
                Some(drafts) => publish.accept(enrich.batch(drafts, publish.largest_message())),
                None => is_open = false,
            },
        }
    }
}
