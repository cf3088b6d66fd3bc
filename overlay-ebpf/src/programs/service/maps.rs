//! The maps that the agent fills, and the selection's view of them.
#![allow(unsafe_code, reason = "map entries are shared with other CPUs and with the agent")]

use core::intrinsics::{AtomicOrdering, atomic_xadd};

use aya_ebpf::{
    EbpfContext,
    bindings::BPF_F_NO_PREALLOC,
    helpers::{bpf_get_netns_cookie, bpf_get_prandom_u32, bpf_get_socket_cookie, bpf_ktime_get_ns},
    macros::map,
    maps::{Array, HashMap, LruHashMap},
    programs::SockAddrContext,
};
use overlay_ebpf::service::{
    abi::{
        Affinity, Backend, ClientKey, Counts, LATENCY_BUCKETS, MAX_BACKENDS, MAX_CLIENTS, MAX_SERVICES,
        MAX_SLOTS, MAX_UDP_SOCKETS, MemberKey, ServiceEntry, ServiceKey, SlotKey, latency_bucket,
    },
    select::State,
    translation::Translation,
};

// Not preallocated: memory follows the number of services, and a replaced entry stays as it is while a program reads it.

#[map]
static SERVICES: HashMap<ServiceKey, ServiceEntry> =
    HashMap::with_max_entries(MAX_SERVICES, BPF_F_NO_PREALLOC);

#[map]
static SLOTS: HashMap<SlotKey, Backend> = HashMap::with_max_entries(MAX_SLOTS, BPF_F_NO_PREALLOC);

#[map]
static MEMBERS: HashMap<MemberKey, Backend> = HashMap::with_max_entries(MAX_SLOTS, BPF_F_NO_PREALLOC);

/// By [`ServiceEntry::service`].
#[map]
static TURNS: Array<u64> = Array::with_max_entries(MAX_SERVICES, 0);

/// Open connections, by [`Backend::id`].
#[map]
static CONNECTIONS: Array<u64> = Array::with_max_entries(MAX_BACKENDS, 0);

/// By [`Backend::id`]. The agent makes and removes the entries: an array for all numbers would take 19 MB for each CPU.
#[map]
static BACKEND_COUNTS: HashMap<u32, Counts> = HashMap::with_max_entries(MAX_BACKENDS, BPF_F_NO_PREALLOC);

/// By [`ServiceEntry::service`]; otherwise as the one before.
#[map]
static SERVICE_COUNTS: HashMap<u32, Counts> = HashMap::with_max_entries(MAX_SERVICES, BPF_F_NO_PREALLOC);

/// The connections of UDP sockets by the cookie of the socket, for the agent alone: the kernel does not tell it the storage of UDP sockets
/// (`inet_sk_diag_fill` in net/ipv4/inet_diag.c). A socket that finds no room keeps its endpoint when that goes away.
#[map]
static UDP_SOCKETS: HashMap<u64, Translation> = HashMap::with_max_entries(MAX_UDP_SOCKETS, BPF_F_NO_PREALLOC);

#[map]
static CLIENTS: LruHashMap<ClientKey, Affinity> = LruHashMap::with_max_entries(MAX_CLIENTS, 0);

/// The service at a virtual port.
#[inline(always)]
pub(super) fn service(key: ServiceKey) -> Option<ServiceEntry> {
    let entry = SERVICES.get_ptr(key)?;
    // SAFETY: the kernel replaces entries and writes into none that a program may see.
    Some(unsafe { *entry })
}

/// The client: the network namespace of its socket, because a socket that is about to connect has no address yet.
#[inline(always)]
pub(super) fn client(ctx: &SockAddrContext) -> u64 {
    // SAFETY: the context is the one the kernel gave us.
    unsafe { bpf_get_netns_cookie(ctx.as_ptr()) }
}

/// Tells the agent the connection of a UDP socket.
#[inline(always)]
pub(super) fn publish(ctx: &impl EbpfContext, connection: &Translation) {
    // SAFETY: the context is the one the kernel gave us.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    let _ = UDP_SOCKETS.insert(cookie, connection, 0);
}

/// The UDP socket has another connection, none, or is closed.
#[inline(always)]
pub(super) fn withdraw(ctx: &impl EbpfContext) {
    // SAFETY: the context is the one the kernel gave us.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    let _ = UDP_SOCKETS.remove(cookie);
}

/// Counts one more connection to an endpoint.
#[inline(always)]
pub(super) fn opened(backend: u32) {
    add(&CONNECTIONS, backend, 1);
}

/// Counts one connection less.
#[inline(always)]
pub(super) fn closed(backend: u32) {
    add(&CONNECTIONS, backend, u64::MAX);
}

/// Counts an endpoint that was chosen at a virtual port.
#[inline(always)]
pub(super) fn picked(service: u32, backend: u32) {
    count(service, backend, |counts| &raw mut counts.picks);
}

/// Counts a call at a virtual port without usable endpoint.
#[inline(always)]
pub(super) fn refused(service: u32) {
    if let Some(counts) = counts(&SERVICE_COUNTS, service) {
        increase(&raw mut counts.refused, 1);
    }
}

/// Counts a TCP connection that failed.
#[inline(always)]
pub(super) fn failed(service: u32, backend: u32) {
    count(service, backend, |counts| &raw mut counts.failed);
}

/// Counts a TCP connection that was established within so many nanoseconds.
#[inline(always)]
pub(super) fn established(service: u32, backend: u32, latency: u64) {
    let microseconds = latency / 1000;
    let bucket = latency_bucket(microseconds);
    for counts in [counts(&SERVICE_COUNTS, service), counts(&BACKEND_COUNTS, backend)].into_iter().flatten() {
        increase(&raw mut counts.latency_sum, microseconds);
        // The mask tells the verifier what the function guarantees.
        if let Some(counter) = counts.latency.get_mut(bucket & (LATENCY_BUCKETS - 1)) {
            increase(counter, 1);
        }
    }
}

#[inline(always)]
fn count(service: u32, backend: u32, counter: impl Fn(&mut Counts) -> *mut u64) {
    if let Some(counts) = counts(&SERVICE_COUNTS, service) {
        increase(counter(counts), 1);
    }
    if let Some(counts) = counts(&BACKEND_COUNTS, backend) {
        increase(counter(counts), 1);
    }
}

/// The counters; `None` when the agent has removed them.
#[inline(always)]
fn counts(map: &'static HashMap<u32, Counts>, number: u32) -> Option<&'static mut Counts> {
    let counts = map.get_ptr_mut(number)?;
    // SAFETY: the entry outlives the run of the program, and its counters are only changed by atomic operations.
    Some(unsafe { &mut *counts })
}

/// Adds to a counter of all CPUs: connections are rare beside packets, and counters of each CPU would take memory for each endpoint and CPU.
#[inline(always)]
fn increase(counter: *mut u64, value: u64) {
    // SAFETY: a field of a map's value, with 8 bytes of alignment.
    unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(counter, value) };
}

/// Adds to a counter, modulo 2^64, and returns what it was.
#[inline(always)]
fn add(map: &'static Array<u64>, index: u32, value: u64) -> u64 {
    let Some(counter) = map.get_ptr_mut(index) else { return 0 };
    // Not relaxed: for that order, LLVM 22 takes an instruction that does not return the former value, also where it is used.
    // SAFETY: array entries live as long as the program and have 8 bytes of alignment; all accesses are atomic. The methods of atomic
    // types are missing for this target, which has no compare-and-swap in its first version.
    unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::AcqRel }>(counter, value) }
}

/// Nanoseconds of the monotonic clock.
#[inline(always)]
pub(super) fn now() -> u64 {
    // SAFETY: a helper without parameters.
    unsafe { bpf_ktime_get_ns() }
}

/// The kernel's maps, for the selection.
pub(super) struct Maps;

impl State for Maps {
    #[inline(always)]
    fn slot(&self, key: SlotKey) -> Option<Backend> {
        let backend = SLOTS.get_ptr(key)?;
        // SAFETY: the kernel replaces entries and writes into none that a program may see.
        Some(unsafe { *backend })
    }

    #[inline(always)]
    fn member(&self, key: MemberKey) -> Option<Backend> {
        let backend = MEMBERS.get_ptr(key)?;
        // SAFETY: the kernel replaces entries and writes into none that a program may see.
        Some(unsafe { *backend })
    }

    #[inline(always)]
    fn turn(&self, service: u32) -> u64 {
        add(&TURNS, service, 1)
    }

    #[inline(always)]
    fn random(&self) -> u32 {
        // SAFETY: a helper without parameters.
        unsafe { bpf_get_prandom_u32() }
    }

    #[inline(always)]
    fn connections(&self, id: u32) -> u64 {
        let Some(connections) = CONNECTIONS.get_ptr(id) else { return 0 };
        // SAFETY: array entries live as long as the program; volatile because other CPUs change them. Reads of 8 bytes are whole.
        unsafe { core::ptr::read_volatile(connections) }
    }

    #[inline(always)]
    fn affinity(&self, key: ClientKey) -> Option<Affinity> {
        let affinity = CLIENTS.get_ptr(key)?;
        // SAFETY: a copy. The kernel may give the entry to another client meanwhile: whatever it says then, only an endpoint of the
        // service is used.
        Some(unsafe { *affinity })
    }

    #[inline(always)]
    fn keep(&self, key: ClientKey, affinity: Affinity) {
        // Without room in the map, the client has no affinity.
        let _ = CLIENTS.insert(key, affinity, 0);
    }

    #[inline(always)]
    fn now(&self) -> u64 {
        now()
    }
}
