//! The one question that the packet core asks of its surroundings: which peer holds an overlay address, and how is it reached?

use crate::abi::NextHop;

/// A route table: subnets of the overlay and the peers that hold them.
///
/// Implemented by the eBPF programs (a longest-prefix-match map) and by the tun datapath (the agent's own table).
pub trait Routes {
    /// The way to the peer whose subnet contains `address` (network byte order), the longest prefix first; `None` when no lease
    /// covers it.
    fn next_hop(&self, address: [u8; 4]) -> Option<NextHop>;

    /// The present underlay address of the peer that had `former` until a moment ago, when it may not know yet that we know. `None` for
    /// every other address.
    fn present_address(&self, former: [u8; 4]) -> Option<[u8; 4]> {
        let _ = former;
        None
    }
}
