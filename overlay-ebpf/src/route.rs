//! The one question that the packet core asks of its surroundings: which peer holds an overlay address?

/// A route table: subnets of the overlay and the peers that hold them.
///
/// Implemented by the eBPF programs (a longest-prefix-match map) and by the tun datapath (the agent's own table).
pub trait Routes {
    /// The underlay address of the peer whose subnet contains `address`, the longest prefix first; `None` when no
    /// lease covers it. Network byte order.
    fn peer_of(&self, address: [u8; 4]) -> Option<[u8; 4]>;
}
