//! The eBPF programs: thin shells over the packet core. On any other target this is an empty program, so that the
//! workspace builds without a BPF toolchain.

#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(target_arch = "bpf")]
mod programs;

#[cfg(not(target_arch = "bpf"))]
fn main() {}
