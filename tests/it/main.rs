//! Tests of the whole: the real binary, a real nats-server, real sockets. One binary, so one link.

#![allow(clippy::similar_names, clippy::too_many_lines, reason = "a test tells one story")]
#![allow(unreachable_pub, reason = "the harness is a library within one binary")]
#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test that cannot go on must stop, and reads its own environment"
)]

mod accounts;
mod admin;
mod bad_input;
mod channels;
mod check;
mod client;
mod commands;
mod confined;
mod consumers;
mod contract;
mod demo;
mod faults;
mod forms;
mod fuzz;
mod harness;
mod least_privilege;
mod operator;
mod outbox;
mod overlay;
mod page;
mod path;
mod people;
mod secrets;
mod simulator;
mod stream;
mod structure;
mod tls;
mod twitch;
mod users;
