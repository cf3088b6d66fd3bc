//! The maps that the agent fills and reads, and the packet core's view of them.
#![allow(unsafe_code, reason = "map entries are shared with other CPUs and with the agent")]

use aya_ebpf::{
    helpers::bpf_ktime_get_ns,
    macros::map,
    maps::{Array, LpmTrie, PerCpuArray, lpm_trie::Key},
};
use overlay_ebpf::{
    abi::{Config, Counters, MAX_ROUTES, RouteValue},
    reason::{DropReason, PuntReason},
    route::Routes,
};

#[map]
static CONFIG: Array<Config> = Array::with_max_entries(1, 0);

#[map]
static ROUTES: LpmTrie<[u8; 4], RouteValue> = LpmTrie::with_max_entries(MAX_ROUTES, 0);

#[map]
static COUNTERS: PerCpuArray<Counters> = PerCpuArray::with_max_entries(1, 0);

/// When each CPU logged its last line, in nanoseconds since boot.
#[map]
static LAST_LINE: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);

/// Whether failures are logged. Set by the loader, constant for the verifier, which removes the logging code if it is 0.
#[unsafe(no_mangle)]
static LOG_FAILURES: u32 = 0;

/// Whether failures are logged.
#[inline(always)]
pub(super) fn logs_failures() -> bool {
    // SAFETY: a static; volatile because the loader writes it where the compiler cannot see.
    unsafe { core::ptr::read_volatile(&raw const LOG_FAILURES) != 0 }
}

/// Calls `check` with the time of this CPU's last line; `false` without such an entry, which cannot be.
#[inline(always)]
pub(super) fn with_last_line(check: impl FnOnce(&mut u64) -> bool) -> bool {
    // SAFETY: the entry is this CPU's, and networking programs run with bottom halves off: no other reference exists.
    LAST_LINE.get_ptr_mut(0).is_some_and(|last| check(unsafe { &mut *last }))
}

/// Nanoseconds since boot.
#[inline(always)]
pub(super) fn now() -> u64 {
    // SAFETY: a helper without parameters.
    unsafe { bpf_ktime_get_ns() }
}

/// The kernel's route map, for the packet core.
pub(super) struct RouteMap;

impl Routes for RouteMap {
    #[inline(always)]
    fn peer_of(&self, address: [u8; 4]) -> Option<[u8; 4]> {
        ROUTES.get(Key::new(32, address)).map(|route| route.peer)
    }
}

/// This host's configuration. The verifier requires the check for `None`; an array map always has its entry.
#[inline(always)]
pub(super) fn config() -> Option<&'static Config> {
    CONFIG.get(0)
}

#[inline(always)]
pub(super) fn count_egress(bytes: usize) {
    with_counters(|counters| {
        counters.egress_packets += 1;
        counters.egress_bytes += bytes as u64;
    });
}

#[inline(always)]
pub(super) fn count_ingress(bytes: usize) {
    with_counters(|counters| {
        counters.ingress_packets += 1;
        counters.ingress_bytes += bytes as u64;
    });
}

#[inline(always)]
pub(super) fn count_punt(reason: PuntReason) {
    with_counters(|counters| counters.punt(reason));
}

#[inline(always)]
pub(super) fn count_drop(reason: DropReason) {
    with_counters(|counters| counters.drop(reason));
}

#[inline(always)]
fn with_counters(count: impl FnOnce(&mut Counters)) {
    if let Some(counters) = COUNTERS.get_ptr_mut(0) {
        // SAFETY: the entry is this CPU's, and networking programs run with bottom halves off: no other reference exists.
        count(unsafe { &mut *counters });
    }
}
