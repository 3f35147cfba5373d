//! The `inlet` command.

use std::process::ExitCode;

/// Chosen by measuring the whole path; see `docs/adr`.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    inlet::cli::main()
}
