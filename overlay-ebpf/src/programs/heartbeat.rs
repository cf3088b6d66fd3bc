//! Whether the agent is there: it runs a program once a second, which notes the time. Programs outlive the agent, and what only the agent
//! keeps up to date is not used then: link-layer addresses of neighbours, and the containers that skip the host's stack.
#![allow(unsafe_code, reason = "a map entry and constants that the agent writes")]

use aya_ebpf::{helpers::bpf_jiffies64, macros::map, maps::Array};

/// How long one run of the program counts, in nanoseconds. The kernel itself trusts a neighbour's address for longer.
const VALIDITY: u64 = 5_000_000_000;

/// Until when the agent counts as alive, in nanoseconds of [`now`].
#[map]
static ALIVE_UNTIL: Array<u64> = Array::with_max_entries(1, 0);

/// Nanoseconds of the kernel's tick. Set by the loader.
#[unsafe(no_mangle)]
static TICK: u32 = 0;

/// The time in nanoseconds, as exact as the kernel's tick.
#[inline(always)]
pub(super) fn now() -> u64 {
    // SAFETY: a static; volatile because the loader writes it where the compiler cannot see.
    let tick = unsafe { core::ptr::read_volatile(&raw const TICK) };
    // SAFETY: a helper without parameters. The verifier replaces it by a read of the kernel's variable; helpers that read a clock
    // would cost more than the rest of what is done about flows.
    unsafe { bpf_jiffies64() }.wrapping_mul(tick as u64)
}

/// Notes that the agent is alive.
#[inline(always)]
pub(super) fn beat() {
    if let Some(until) = ALIVE_UNTIL.get_ptr_mut(0) {
        // SAFETY: only this program writes it, and the agent runs it once at a time; other CPUs read it whole.
        unsafe { until.write_volatile(now().wrapping_add(VALIDITY)) };
    }
}

/// Whether the agent has been alive a moment ago.
#[inline(always)]
pub(super) fn is_agent_alive() -> bool {
    let Some(until) = ALIVE_UNTIL.get_ptr(0) else { return false };
    // SAFETY: the entry lives as long as the map, and is written whole.
    now() < unsafe { until.read_volatile() }
}
