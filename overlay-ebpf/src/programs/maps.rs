//! The maps that the agent fills and reads, and the packet core's view of them.
#![allow(unsafe_code, reason = "map entries are shared with other CPUs and with the agent")]

use aya_ebpf::{
    bindings::BPF_F_NO_PREALLOC,
    helpers::bpf_ktime_get_ns,
    macros::map,
    maps::{Array, HashMap, LpmTrie, PerCpuArray, lpm_trie::Key},
};
use overlay_ebpf::{
    abi::{
        Carried, Config, Counters, DEFAULT_ROUTES, Endpoint, MAX_ENDPOINTS, MAX_MOVED, MAX_UNDERLAYS,
        NextHop, Prefix, PrefixRoute, UnderlayValue,
    },
    bypass::{Bypass, Endpoints},
    rejection::Rejection,
    route::Routes,
};

#[map]
static CONFIG: Array<Config> = Array::with_max_entries(1, 0);

/// The routes of the same length as this host's subnet. The loader sets the size. Entries are not allocated in advance: memory
/// follows the number of routes, and a replaced entry stays as it is while a program reads it.
#[map]
static ROUTES: HashMap<Prefix, NextHop> = HashMap::with_max_entries(DEFAULT_ROUTES, BPF_F_NO_PREALLOC);

/// The routes of other lengths.
#[map]
static PREFIXES: LpmTrie<[u8; 4], PrefixRoute> = LpmTrie::with_max_entries(DEFAULT_ROUTES, 0);

/// The former addresses of peers, asked for packets that no present one explains.
#[map]
static MOVED: HashMap<[u8; 4], [u8; 4]> = HashMap::with_max_entries(MAX_MOVED, BPF_F_NO_PREALLOC);

#[map]
static UNDERLAYS: HashMap<u32, UnderlayValue> = HashMap::with_max_entries(MAX_UNDERLAYS, 0);

/// Not preallocated: a program may still read an entry that was removed, and must not find another container's in it.
#[map]
static ENDPOINTS: HashMap<[u8; 4], Endpoint> = HashMap::with_max_entries(MAX_ENDPOINTS, BPF_F_NO_PREALLOC);

#[map]
static COUNTERS: PerCpuArray<Counters> = PerCpuArray::with_max_entries(1, 0);

/// Only the agent reads and writes it.
#[map]
static CARRIED: Array<Carried> = Array::with_max_entries(1, 0);

/// When each CPU logged its last line, in nanoseconds since boot.
#[map]
static LAST_LINE: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);

/// Whether failures are logged. Set by the loader, constant for the verifier, which removes the logging code if it is 0.
#[unsafe(no_mangle)]
static LOG_FAILURES: u32 = 0;

/// The [`Bypass`]. Set by the loader, constant for the verifier, which removes the code of the others.
#[unsafe(no_mangle)]
static BYPASS: u32 = Bypass::Off as u32;

/// Whether this is the loader's choice.
#[inline(always)]
pub(super) fn bypasses(which: Bypass) -> bool {
    // SAFETY: a static; volatile because the loader writes it where the compiler cannot see.
    unsafe { core::ptr::read_volatile(&raw const BYPASS) == which as u32 }
}

/// Shortest time between two lines of one CPU, in nanoseconds.
const LINE_INTERVAL: u64 = 100_000_000;

/// Whether a line may be logged now; the next is then due after [`LINE_INTERVAL`].
#[inline(always)]
pub(super) fn is_line_due() -> bool {
    // SAFETY: a static; volatile because the loader writes it where the compiler cannot see.
    if unsafe { core::ptr::read_volatile(&raw const LOG_FAILURES) } == 0 {
        return false;
    }
    let Some(last) = LAST_LINE.get_ptr_mut(0) else { return false };
    // SAFETY: the entry is this CPU's, and networking programs run with bottom halves off: no other reference exists.
    let last = unsafe { &mut *last };
    // SAFETY: a helper without parameters.
    let now = unsafe { bpf_ktime_get_ns() };
    let due = now.wrapping_sub(*last) >= LINE_INTERVAL;
    if due {
        *last = now;
    }
    due
}

/// Rejected packets of one kind that reach the slow path from one CPU in a [`REJECTION_WINDOW`]: a flood of them must not crowd out
/// the packets that the slow path carries, and their senders get few answers all the same.
const REJECTIONS: u64 = 100;
/// In nanoseconds.
const REJECTION_WINDOW: u64 = 100_000_000;

/// By kind, the start of each CPU's window in nanoseconds since boot, and its rejected packets since.
#[map]
static REJECTED: PerCpuArray<[u64; 2]> = PerCpuArray::with_max_entries(Rejection::KINDS, 0);

/// Whether a rejected packet may be handed to the slow path, which then tells the sender.
#[inline(always)]
pub(super) fn is_rejection_due(rejection: Rejection) -> bool {
    let Some(window) = REJECTED.get_ptr_mut(rejection.kind()) else { return false };
    // SAFETY: the entry is this CPU's, and networking programs run with bottom halves off: no other reference exists.
    let [start, count] = unsafe { &mut *window };
    // SAFETY: a helper without parameters.
    let now = unsafe { bpf_ktime_get_ns() };
    if now.wrapping_sub(*start) >= REJECTION_WINDOW {
        (*start, *count) = (now, 0);
    }
    *count += 1;
    *count <= REJECTIONS
}

/// The kernel's route maps, for the packet core: one lookup in the usual case that all subnets have one length.
pub(super) struct RouteMap<'a>(pub(super) &'a Config);

impl Routes for RouteMap<'_> {
    #[inline(always)]
    fn next_hop(&self, address: [u8; 4]) -> Option<NextHop> {
        let Self(config) = self;
        let exact = ROUTES.get_ptr(config.subnet.of_same_length(address));
        // SAFETY: the kernel replaces entries and writes into none that a program may see.
        let exact = exact.map(|next_hop| unsafe { *next_hop });
        if !config.has_other_lengths() {
            return exact;
        }
        match PREFIXES.get(Key::new(32, address)) {
            Some(other) if exact.is_none() || other.prefix.is_longer_than(&config.subnet) => {
                Some(other.next_hop)
            }
            _ => exact,
        }
    }

    #[inline(always)]
    fn present_address(&self, former: [u8; 4]) -> Option<[u8; 4]> {
        let address = MOVED.get_ptr(former)?;
        // SAFETY: the kernel replaces entries and writes into none that a program may see.
        Some(unsafe { *address })
    }
}

/// The kernel's map of containers, for the packet core.
pub(super) struct EndpointMap;

impl Endpoints for EndpointMap {
    #[inline(always)]
    fn endpoint(&self, address: [u8; 4]) -> Option<Endpoint> {
        let endpoint = ENDPOINTS.get_ptr(address)?;
        // SAFETY: the kernel replaces entries and writes into none that a program may see.
        Some(unsafe { *endpoint })
    }
}

/// This host's configuration. The verifier requires the check for `None`; an array map always has its entry.
#[inline(always)]
pub(super) fn config() -> Option<&'static Config> {
    CONFIG.get(0)
}

/// A device that carries outer packets, with its index.
#[inline(always)]
pub(super) fn underlay(config: &Config, ifindex: u32) -> Option<(UnderlayValue, u32)> {
    if let Some(first) = config.first_underlay(ifindex) {
        return Some((first, ifindex));
    }
    let underlay = UNDERLAYS.get_ptr(ifindex)?;
    // SAFETY: the kernel replaces entries and writes into none that a program may see.
    Some((unsafe { *underlay }, ifindex))
}

#[inline(always)]
pub(super) fn count_ingress(bytes: usize) {
    count(|counters| {
        counters.ingress_packets += 1;
        counters.ingress_bytes += bytes as u64;
    });
}

/// Changes the counters of this CPU.
#[inline(always)]
pub(super) fn count(change: impl FnOnce(&mut Counters)) {
    if let Some(counters) = COUNTERS.get_ptr_mut(0) {
        // SAFETY: the entry is this CPU's, and networking programs run with bottom halves off: no other reference exists.
        change(unsafe { &mut *counters });
    }
}
