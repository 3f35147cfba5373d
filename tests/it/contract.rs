//! One suite for every implementation of a port.

mod bus;
mod firestore;
mod store;
