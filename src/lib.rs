//! Inlet turns live events (Twitch chat first) into enriched, de-duplicated envelopes on a durable stream.
//!
//! The folder tree is the path of the data, in order:
//!
//! ```text
//! source ──▶ pipeline::intake ──▶ pipeline::enrich ──▶ pipeline::publish ──▶ bus ──▶ users ──▶ store
//! Twitch IRC  bounded door,        users met, envelope  in order, acked,     the     counted,  Firestore or
//! replay      known ids dropped    written once         retried              stream  in order  embedded
//! ```
//!
//! `app` puts the parts together, `http` shows how they are, `cli` is what a person types.

pub mod app;
pub mod source;

pub mod envelope;
pub mod pipeline;

pub mod users;

pub mod bus;
pub mod store;

pub mod audit;

pub mod http;

pub mod cli;
pub mod sim;

pub mod clock;
pub mod data_dir;
pub mod errors;
pub mod recent;
pub mod redb_file;
pub mod retry;
pub mod secret;
pub mod settings;
pub mod status;
pub mod tasks;
pub mod telemetry;
pub mod tls;
