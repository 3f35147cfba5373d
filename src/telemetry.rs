//! What the service says of itself: counters and log lines. Nothing here decides anything.

pub mod logs;
pub mod metrics;
pub mod tally;
