//! Whether the store is asked at all. One request that fails opens the circuit: from then on nothing waits for the
//! store, until a probe in the background is answered in time.

use prometheus::IntGauge;
use tokio::sync::watch;

use crate::errors::ErrorCode;
use crate::store::StoreError;

/// Open: the store is not asked.
pub(super) struct Circuit {
    state: watch::Sender<bool>,
    gauge: IntGauge,
}

impl Circuit {
    pub(super) fn new(gauge: IntGauge) -> Self {
        Self { state: watch::Sender::new(false), gauge }
    }

    pub(super) fn is_open(&self) -> bool {
        *self.state.borrow()
    }

    /// The store failed.
    pub(super) fn trip(&self, error: &StoreError) {
        let opened = self.state.send_if_modified(|is_open| !std::mem::replace(is_open, true));
        if opened {
            self.gauge.set(1);
            tracing::warn!(error_code = %ErrorCode::StoreUnavailable, error = %error, "the user store fails: events flow on without their users until it answers");
        }
    }

    /// The store answered.
    pub(super) fn close(&self) {
        let closed = self.state.send_if_modified(|is_open| std::mem::replace(is_open, false));
        if closed {
            self.gauge.set(0);
            tracing::info!("the user store answers again");
        }
    }

    /// Waits until it is as asked.
    pub(super) async fn until(&self, is_open: bool) {
        // The sender lives as long as this.
        drop(self.state.subscribe().wait_for(|state| *state == is_open).await);
    }
}
