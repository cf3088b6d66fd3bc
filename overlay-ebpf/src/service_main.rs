//! The eBPF programs of virtual service addresses: an object of its own, so that a node without services loads none of its maps.
//! On any other target this is an empty program, so that the workspace builds without a BPF toolchain.

#![cfg_attr(target_arch = "bpf", no_std, no_main)]
// Every compiler that builds for BPF accepts unstable features: it builds `core`, too.
#![cfg_attr(target_arch = "bpf", feature(core_intrinsics), allow(internal_features))]

#[cfg(target_arch = "bpf")]
#[path = "programs/service/mod.rs"]
mod programs;

#[cfg(not(target_arch = "bpf"))]
fn main() {}
