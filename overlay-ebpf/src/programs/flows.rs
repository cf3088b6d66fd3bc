//! The maps of flows, and what the programs at the entrance and at the exit of the host's stack do with them.
#![allow(
    unsafe_code,
    reason = "map entries are shared with other CPUs and with the agent, and kernel memory is read"
)]

use aya_ebpf::{
    EbpfContext as _,
    bindings::{BPF_EXIST, BPF_NOEXIST},
    helpers::bpf_probe_read_kernel,
    macros::map,
    maps::{LruHashMap, RingBuf},
    programs::TcContext,
};
use overlay_ebpf::{
    abi::{MAX_FLOWS, QUESTION_BYTES},
    flow::{Decision, Flow, FlowKey, FlowState, Question, Released, Tracking, Way, decide},
    wire::Ipv4,
};

use super::{heartbeat::now, memory::Packet};

/// Flows that may skip the host's stack, or are to be observed in it.
#[map]
static FLOWS: LruHashMap<FlowKey, FlowState> = LruHashMap::with_max_entries(MAX_FLOWS, 0);

/// What the agent has told connection tracking; the programs only read it.
#[map]
static RELEASED: LruHashMap<FlowKey, Released> = LruHashMap::with_max_entries(MAX_FLOWS, 0);

/// Requests to the agent.
#[map]
static QUESTIONS: RingBuf = RingBuf::with_byte_size(QUESTION_BYTES, 0);

/// Offset in bytes of `_nfct` in the kernel's `struct sk_buff`; 0 when the kernel has no connection tracking. Set by the loader.
#[unsafe(no_mangle)]
static NFCT_OFFSET: u32 = 0;

/// At the entrance: whether the packet at `offset` in `packet` may skip the host's stack. Remembers its flow otherwise.
#[inline(always)]
pub(super) fn may_bypass(packet: &Packet, offset: usize, header: &Ipv4) -> bool {
    let Some(flow) = Flow::of(packet, offset, header) else { return false };
    // What is known about a connection stays: a packet that ends it may be forged. The exit confirms no such packet.
    if flow.is_control {
        return false;
    }
    let now = now();
    let Some(state) = FLOWS.get_ptr_mut(flow.key) else {
        // Another CPU may have seen the flow at the same time.
        let _ = FLOWS.insert(flow.key, FlowState::new(now), BPF_NOEXIST as u64);
        return false;
    };
    // SAFETY: other CPUs may write the same times; each is read and written whole.
    let state = unsafe { &mut *state };
    match state.way(now) {
        Way::Bypass => true,
        Way::Stack => false,
        Way::Sample => {
            // The kernel may give the entry to another flow meanwhile: that flow is then sampled a second later, no more.
            state.sampled = now;
            false
        }
    }
}

/// At the exit: the packet at `offset` in `packet` has passed the host's stack as it arrived, if its flow is remembered.
#[inline(always)]
pub(super) fn confirm(ctx: &TcContext, packet: &Packet, offset: usize, header: &Ipv4) {
    let Some(flow) = Flow::of(packet, offset, header) else { return };
    if flow.is_control {
        return;
    }
    let Some(entry) = FLOWS.get_ptr_mut(flow.key) else { return };
    // SAFETY: other CPUs may write the same times; each is read and written whole.
    let entry = unsafe { &mut *entry };
    let (state, now) = (*entry, now());
    if state.is_fresh(now) {
        return;
    }
    let Some(tracking) = tracking(ctx) else { return };
    // SAFETY: the agent replaces entries, and writes into none that a program may see.
    let released = RELEASED.get_ptr(flow.key).map(|released| unsafe { *released });
    match decide(&state, tracking, released, now) {
        Decision::Confirm => {
            // Replaced, not written: the kernel may have given the entry to another flow, which is not confirmed.
            let _ = FLOWS.insert(flow.key, FlowState { confirmed: now, ..state }, BPF_EXIST as u64);
        }
        Decision::Wait => {}
        Decision::Ask => {
            entry.asked = now;
            let question = Question { flow: flow.key, connection: tracking.connection(), time: now };
            // When there is no room, the next packet asks.
            let _ = QUESTIONS.output::<Question>(question, 0);
        }
    }
}

/// How connection tracking sees the packet; `None` when the kernel does not let it be read.
#[inline(always)]
fn tracking(ctx: &TcContext) -> Option<Tracking> {
    // SAFETY: a static; volatile because the loader writes it where the compiler cannot see.
    let offset = unsafe { core::ptr::read_volatile(&raw const NFCT_OFFSET) };
    if offset == 0 {
        return Some(Tracking(0));
    }
    // SAFETY: the kernel's `struct sk_buff` is at the address that the program has as its context; the helper checks the access.
    let read = unsafe { bpf_probe_read_kernel(ctx.as_ptr().cast::<u8>().add(offset as usize).cast::<u64>()) };
    read.ok().map(Tracking)
}
