//! The maps that the agent fills and reads, and the packet core's view of them.
#![allow(unsafe_code, reason = "map entries are shared with other CPUs and with the agent")]

use aya_ebpf::{
    macros::map,
    maps::{Array, LpmTrie, PerCpuArray, lpm_trie::Key},
};
use overlay_ebpf::{
    abi::{Config, Counters, MAX_ROUTES, RouteValue},
    route::Routes,
    reason::{DropReason, PuntReason},
};

#[map]
static CONFIG: Array<Config> = Array::with_max_entries(1, 0);

#[map]
static ROUTES: LpmTrie<[u8; 4], RouteValue> = LpmTrie::with_max_entries(MAX_ROUTES, 0);

#[map]
static COUNTERS: PerCpuArray<Counters> = PerCpuArray::with_max_entries(1, 0);

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
