//! Tests of the whole: the real binary, a real nats-server, real sockets. One binary, so one link.

#![allow(unreachable_pub, reason = "the harness is a library within one binary")]

mod bad_input;
mod commands;
mod contract;
mod faults;
mod forms;
mod harness;
mod operator;
mod path;
mod structure;
mod tls;
