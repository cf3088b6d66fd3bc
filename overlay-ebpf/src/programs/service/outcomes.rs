//! What becomes of TCP connections to virtual addresses: established within some time, or failed.
#![allow(unsafe_code, reason = "fields of the kernel's context")]

use aya_ebpf::{
    bindings::{
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG,
        BPF_SOCK_OPS_TCP_CONNECT_CB, BPF_TCP_CLOSE, bpf_sock_ops,
    },
    programs::SockOpsContext,
};

use super::{maps, sockets};

/// The kernel does what it would do without the program.
pub(super) const CONTINUE: u32 = 1;

/// Something happens to a TCP socket.
#[inline(always)]
pub(super) fn observe(ctx: &SockOpsContext) {
    // SAFETY: the context is the one the kernel gave us. Volatile: the verifier refuses accesses that the compiler would merge.
    let operation = unsafe { core::ptr::read_volatile(&raw const (*ctx.ops).op) };
    match operation {
        BPF_SOCK_OPS_TCP_CONNECT_CB => start(ctx),
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB => establish(ctx),
        BPF_SOCK_OPS_STATE_CB if new_state(ctx.ops) == BPF_TCP_CLOSE => fail(ctx),
        _ => {}
    }
}

/// The first packet is about to be sent, to the endpoint that was chosen for the connection.
#[inline(always)]
fn start(ctx: &SockOpsContext) {
    let Some(connection) = sockets::connection_of(ctx) else { return };
    if connection.start(maps::now()) {
        // SAFETY: as above.
        let flags = unsafe { core::ptr::read_volatile(&raw const (*ctx.ops).bpf_sock_ops_cb_flags) };
        // Beside those of other programs, which might rely on them: so they stay when the connection is established, too. The kernel
        // knows this one since Linux 4.16.
        let _ = ctx.set_cb_flags((flags | BPF_SOCK_OPS_STATE_CB_FLAG) as i32);
    }
}

#[inline(always)]
fn establish(ctx: &SockOpsContext) {
    let Some(connection) = sockets::connection_of(ctx) else { return };
    if let Some(latency) = connection.establish(maps::now())
        && let Some(backend) = connection.translation.counted()
    {
        maps::established(connection.service, backend, latency);
    }
}

#[inline(always)]
fn fail(ctx: &SockOpsContext) {
    let Some(connection) = sockets::connection_of(ctx) else { return };
    if connection.fail()
        && let Some(backend) = connection.translation.counted()
    {
        maps::failed(connection.service, backend);
    }
}

/// The second argument of a change of state; the first is the former one.
#[inline(always)]
fn new_state(ops: *mut bpf_sock_ops) -> u32 {
    // SAFETY: as above.
    unsafe { core::ptr::read_volatile(&raw const (*ops).__bindgen_anon_1.args[1]) }
}
