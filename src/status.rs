//! How the parts are, for whoever asks: readiness is a set of named parts, each of which says itself whether
//! it is being waited for.

use std::sync::Arc;

use serde_json::{Map, Value};

/// One part of the service, as the probes see it.
pub trait Part: Send + Sync {
    /// Its name in `/readyz` and `/healthz`: part of the contract.
    fn name(&self) -> &'static str;

    /// Whether the service is not ready because of this part.
    fn is_waited_for(&self) -> bool;

    /// Whether it does its work, but somebody should look at it.
    fn is_degraded(&self) -> bool {
        false
    }

    /// What `/healthz` says of it; an object with at least `state`.
    fn describe(&self) -> Value;
}

/// All parts of a running service.
#[derive(Clone, Default)]
pub struct Parts(Vec<Arc<dyn Part>>);

impl Parts {
    /// The parts in the order they are shown.
    pub fn new(parts: Vec<Arc<dyn Part>>) -> Self {
        Self(parts)
    }

    /// Names of the parts that the service waits for; empty when it is ready.
    pub fn waiting_for(&self) -> Vec<&'static str> {
        self.0.iter().filter(|part| part.is_waited_for()).map(|part| part.name()).collect()
    }

    /// Whether somebody should look at one of them.
    pub fn is_degraded(&self) -> bool {
        self.0.iter().any(|part| part.is_degraded() || part.is_waited_for())
    }

    /// Every part's description under its name.
    pub fn describe(&self) -> Value {
        Value::Object(
            self.0.iter().map(|part| (part.name().to_owned(), part.describe())).collect::<Map<_, _>>(),
        )
    }
}
