//! Where events come from. A source brings what it receives to the [`crate::pipeline::Intake`] and tells how it
//! is; it knows nothing of what becomes of it.

pub mod twitch;
