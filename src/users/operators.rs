//! Operators edit documents beside us. One listener hears of it, so that a note stands in the user's next envelope
//! without a read for every message.

use std::time::Duration;

use futures_util::StreamExt as _;

use super::Users;
use crate::errors::ErrorCode;
use crate::retry::Backoff;
use crate::telemetry::logs::Said;

/// Operators' clocks differ from ours, and a listener hears nothing while it is not attached: it asks for this much more
/// than it seems to need.
const MARGIN: Duration = Duration::from_mins(5);

/// Whoever was edited since a listener was attached is heard of with every write of theirs, and each is billed as a read:
/// it is attached anew before there are many.
const LONGEST_HEARING: Duration = Duration::from_hours(1);

const FIRST_RETRY: Duration = Duration::from_millis(250);
const LONGEST_RETRY: Duration = Duration::from_secs(10);

impl Users {
    /// Follows what operators change. Does not end.
    pub async fn follow_operators(self) {
        let shared = &*self.0;
        let mut backoff = Backoff::new(FIRST_RETRY, LONGEST_RETRY);
        let mut said = Said::default();
        let mut attached_at = shared.clock.now();
        loop {
            shared.circuit.until(false).await;
            match shared.store.edits(attached_at - MARGIN).await {
                Ok(mut edits) => {
                    said.over();
                    let heard_out = tokio::time::Instant::now() + LONGEST_HEARING;
                    loop {
                        let heard = tokio::time::timeout_at(heard_out, edits.next()).await;
                        if !matches!(heard, Ok(None | Some(Err(_)))) {
                            attached_at = shared.clock.now();
                            backoff.reset();
                        }
                        let Ok(Some(Ok(changed))) = heard else { break };
                        {
                            let mut table = shared.table();
                            for (name, document) in &changed {
                                table.edited(&name.id, document);
                            }
                        }
                        // Somebody may have been forgotten while an operator said something of them.
                        shared.erase_forgotten_of(changed.iter().map(|(name, _)| &name.id));
                    }
                    tracing::debug!("the listener for operators' edits begins anew");
                }
                Err(error) if !error.is_transient() => {
                    said.failure(ErrorCode::StoreRefused, &error, "operators' edits cannot be followed");
                }
                Err(error) => tracing::debug!(error = %error, "operators' edits cannot be followed now"),
            }
            tokio::time::sleep(backoff.next_wait()).await;
        }
    }
}
