//! The packet core: every decision about a packet, as pure functions of its headers and a route lookup.
//!
//! The XDP program, the tc programs (this package's binary) and the tun datapath (in `overlay-agent`) are thin shells
//! that call [`egress::decide`] and [`ingress::decide`] and act on the verdict. So the kernel, user space and the tests
//! cannot disagree about a packet.
//!
//! Reading order: [`wire`] (typed header views), [`checksum`], [`route`] (the lookup trait), [`source`] (who may send
//! what), [`entropy`] (the outer source port), [`verdict`], [`egress`], [`ingress`], [`abi`] (what lies in shared maps).
//!
//! # Panics
//!
//! Nothing in this library panics, allocates or does I/O, and it contains no `unsafe`: it runs inside the kernel.

#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

pub mod abi;
pub mod checksum;
pub mod egress;
pub mod entropy;
pub mod ingress;
pub mod route;
pub mod source;
pub mod verdict;
pub mod wire;
