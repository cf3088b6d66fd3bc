//! The only place that dereferences packet memory: bounds-checked views for the packet core.
#![allow(
    unsafe_code,
    reason = "packet pointers become references here, after a check that the verifier sees"
)]

use aya_ebpf::programs::{TcContext, XdpContext};
use bytemuck::Pod;
use overlay_ebpf::wire::Bytes;

/// Brings the first `headers` bytes of a socket buffer, or all of a shorter one, into its linear part. Views taken before
/// are void. If the kernel has no memory for it, the core sees what is there.
#[inline(always)]
pub(super) fn pull_headers(ctx: &TcContext, headers: usize) {
    let wanted = headers.min(ctx.len() as usize);
    if ctx.data() + wanted > ctx.data_end() {
        let _ = ctx.pull_data(wanted as u32);
    }
}

/// The payload in bytes of each of the packets that the sender or GRO left in one buffer; 0 when it is one packet.
#[inline(always)]
pub(super) fn gso_size(ctx: &TcContext) -> usize {
    // SAFETY: the kernel hands the program a valid context.
    unsafe { (*ctx.skb.skb).gso_size as usize }
}

/// The directly accessible bytes of one packet, valid until a helper changes it.
pub(super) struct Packet {
    start: usize,
    end: usize,
}

impl Packet {
    /// The linear part of a socket buffer.
    #[inline(always)]
    pub(super) fn of_skb(ctx: &TcContext) -> Self {
        Self { start: ctx.data(), end: ctx.data_end() }
    }

    /// What an XDP program left in front of a socket buffer's first byte.
    #[inline(always)]
    pub(super) fn metadata_of_skb(ctx: &TcContext) -> Self {
        // SAFETY: the kernel hands the program a valid context.
        let start = unsafe { (*ctx.skb.skb).data_meta };
        Self { start: start as usize, end: ctx.data() }
    }

    /// The first buffer of a frame.
    #[inline(always)]
    pub(super) fn of_xdp(ctx: &XdpContext) -> Self {
        Self { start: ctx.data(), end: ctx.data_end() }
    }

    /// What this program leaves in front of a frame's first byte.
    #[inline(always)]
    pub(super) fn metadata_of_xdp(ctx: &XdpContext) -> Self {
        Self { start: ctx.metadata(), end: ctx.data() }
    }

    /// The header `T` at `offset`, for writing.
    #[inline(always)]
    pub(super) fn view_mut<T: Pod>(&mut self, offset: usize) -> Option<&mut T> {
        let pointer = self.pointer::<T>(offset)?;
        // SAFETY: `pointer` is inside the packet, `T` is valid for any bytes and has alignment 1 (checked there).
        Some(unsafe { &mut *pointer })
    }

    /// A pointer to a `T` that lies whole inside the packet. The comparison with `end` is the one that the verifier
    /// looks for.
    #[inline(always)]
    fn pointer<T: Pod>(&self, offset: usize) -> Option<*mut T> {
        const { assert!(align_of::<T>() == 1, "packet memory has no alignment") };
        let pointer = self.start + offset;
        (pointer + size_of::<T>() <= self.end).then_some(pointer as *mut T)
    }
}

impl Bytes for Packet {
    #[inline(always)]
    fn view<T: Pod>(&self, offset: usize) -> Option<&T> {
        let pointer = self.pointer::<T>(offset)?;
        // SAFETY: `pointer` is inside the packet, `T` is valid for any bytes and has alignment 1 (checked there).
        Some(unsafe { &*pointer })
    }
}
