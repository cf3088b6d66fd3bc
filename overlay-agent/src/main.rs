//! Wires the command line to the agent, and chooses the allocator.

use std::process::ExitCode;

use libmimalloc_sys::{mi_option_set, mi_option_t};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// `mi_option_purge_delay` of mimalloc.h: milliseconds until memory that is free goes back to the kernel. libmimalloc-sys has no name for it.
const PURGE_DELAY: mi_option_t = 15;

#[allow(unsafe_code, reason = "options of the allocator have no safe interface")]
fn main() -> ExitCode {
    // An agent that has read a large network keeps 20 MB less than with the default of a second, in which the memory is used again.
    // SAFETY: it stores a number. No other thread runs yet.
    unsafe { mi_option_set(PURGE_DELAY, 0) };
    overlay_agent::cli::main()
}
