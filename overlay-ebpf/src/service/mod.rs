//! Load balancing of connections to virtual service addresses: the contents of the maps and every decision, as pure functions.
//!
//! The cgroup programs of the binary `service-ebpf` and the agent's proxy call [`select::select`] with their own [`select::State`],
//! so that both choose endpoints alike.
//!
//! Reading order: [`abi`] (types in shared maps), [`hash`], [`select`] (the choice of an endpoint), [`translation`] (what a socket
//! remembers of its choices).

pub mod abi;
pub mod hash;
pub mod select;
pub mod translation;
