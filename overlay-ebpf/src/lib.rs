//! The packet core: every decision about a packet, as pure functions of its headers and a route lookup.
//!
//! The XDP program, the tc programs (this package's binary) and the tun datapath (in `overlay-agent`) are thin shells
//! that call [`egress::decide`] and [`ingress::decide`] and act on the verdict. So the kernel, user space and the tests
//! cannot disagree about a packet.
//!
//! Reading order: [`checksum`], [`wire`] (typed header views), [`reason`] (why a packet is dropped or punted), [`abi`] (types in
//! shared maps), [`route`] (the lookup trait), [`source`] (source validation), [`entropy`] (the outer source port), [`inner`],
//! [`hop`], [`bypass`] (what skips the host's stack), [`flow`], [`unfinished`] (what the kernel left for hardware), [`rejection`] (what senders are told by ICMP), [`verdict`], [`egress`], [`ingress`].
//! [`service`] stands beside that: it is about sockets, not packets.
//!
//! # Panics
//!
//! Nothing in this library panics, allocates or does I/O, and it contains no `unsafe`: it runs inside the kernel.

#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

pub mod abi;
pub mod bypass;
pub mod checksum;
pub mod egress;
pub mod entropy;
pub mod flow;
pub mod hop;
pub mod ingress;
pub mod inner;
pub mod reason;
pub mod rejection;
pub mod route;
pub mod service;
pub mod source;
pub mod unfinished;
pub mod verdict;
pub mod wire;
