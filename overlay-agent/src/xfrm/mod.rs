//! The kernel's IPsec policies, as far as they concern the outer packets.
//!
//! The kernel applies these policies (`ip xfrm policy`) to what sockets send and receive. The eBPF programs bypass them: a packet
//! that has to be encrypted would leave in clear, and one that has to be dropped would be accepted. Peers that a policy covers
//! must be left to the slow path, whose packets pass through a socket.
//!
//! `policy` says which packets one policy matches, `policies` which policy decides about a peer (both pure); `kernel` lists them,
//! `message` reads the kernel's messages, `watch` follows changes.

mod kernel;
mod message;
mod policies;
mod policy;
#[cfg(test)]
mod tests;
mod watch;

pub use kernel::list;
pub use policies::Policies;
pub use policy::{Flow, Policy};
pub use watch::watch;
