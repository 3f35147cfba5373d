//! No anonymous tasks: each has a name and an owner that joins it. An end that nobody asked for, or a panic,
//! is something the owner hears of.

use std::collections::HashMap;
use std::future::Future;

use futures_util::FutureExt as _;
use tokio::task::{Id, JoinSet};

/// The tasks of one owner. Dropping it ends those that still run.
#[derive(Debug, Default)]
pub struct Tasks {
    running: JoinSet<()>,
    names: HashMap<Id, &'static str>,
}

/// A task that is over.
#[derive(Debug, PartialEq, Eq)]
pub struct Ended {
    /// The name it was given.
    pub name: &'static str,
    /// Whether it panicked.
    pub panicked: bool,
}

impl Tasks {
    /// Nobody yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Starts a task.
    pub fn spawn(&mut self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        let handle = self.running.spawn(task);
        self.names.insert(handle.id(), name);
    }

    /// Waits for the next one to end; `None` when none is left. Cancel safe.
    pub async fn next_end(&mut self) -> Option<Ended> {
        let (id, panicked) = match self.running.join_next_with_id().await? {
            Ok((id, ())) => (id, false),
            Err(error) => (error.id(), error.is_panic()),
        };
        let name = self.names.remove(&id).unwrap_or("unnamed");
        Some(Ended { name, panicked })
    }

    /// Lets go of those that are over, for an owner who does not care how they ended.
    pub fn forget_finished(&mut self) {
        while let Some(Some(end)) = self.next_end().now_or_never() {
            tracing::trace!(task = end.name, "ended");
        }
    }

    /// Waits until the task called `name` is over, if it runs; the ends of others on the way are returned.
    pub async fn join(&mut self, name: &'static str) -> Vec<Ended> {
        let mut ends = Vec::new();
        while self.names.values().any(|running| *running == name) {
            let Some(end) = self.next_end().await else { break };
            ends.push(end);
        }
        ends
    }

    /// How many run.
    pub fn len(&self) -> usize {
        self.running.len()
    }

    /// Whether none runs.
    pub fn is_empty(&self) -> bool {
        self.running.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn ends_are_reported_by_name_with_panics_told_apart() {
        let mut tasks = Tasks::new();
        tasks.spawn("quiet", async {});
        tasks.spawn("loud", async { panic!("on purpose") });
        let mut ends = vec![tasks.next_end().await.unwrap(), tasks.next_end().await.unwrap()];
        ends.sort_by_key(|end| end.name);
        let expected = [Ended { name: "loud", panicked: true }, Ended { name: "quiet", panicked: false }];
        assert_eq!(ends, expected);
        assert!(tasks.next_end().await.is_none() && tasks.is_empty());
    }
}
