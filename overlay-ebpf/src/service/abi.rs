//! Types in the maps of `service-ebpf`. All bytes are fields, none is padding.

use bytemuck::{Pod, Zeroable};

/// Version of the types below, part of the path of pinned maps. To be raised with every change of their layout or meaning.
pub const SERVICE_ABI_VERSION: u16 = 1;

/// Most virtual ports: entries of `SERVICES` and of the counters.
pub const MAX_SERVICES: u32 = 16_384;
/// Most slots of all tables. The kernel allocates 16 bytes for each in advance, and the rest with the slot.
pub const MAX_SLOTS: u32 = 262_144;
/// Most endpoints of all services, and of all those that were removed but still have connections.
pub const MAX_BACKENDS: u32 = 262_144;
/// Most clients of services with affinity. Beyond, those without a connection for the longest time may move.
pub const MAX_CLIENTS: u32 = 65_536;
/// Most connected UDP sockets that the agent can find when their endpoint goes away.
pub const MAX_UDP_SOCKETS: u32 = 65_536;
/// Slots that [`Policy::LeastConn`] compares for one connection.
pub const COMPARED_SLOTS: u32 = 16;

/// TCP in the IP header.
pub const TCP: u8 = 6;
/// UDP in the IP header.
pub const UDP: u8 = 17;

/// An address with its port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Pod, Zeroable)]
#[repr(C)]
pub struct Address {
    /// Network byte order.
    pub ip: [u8; 4],
    /// Network byte order.
    pub port: [u8; 2],
}

/// A port of a virtual address: the key of `SERVICES`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Pod, Zeroable)]
#[repr(C)]
pub struct ServiceKey {
    /// The virtual address.
    pub address: Address,
    /// [`TCP`] or [`UDP`].
    pub protocol: u8,
    reserved: u8,
}

impl ServiceKey {
    /// The key of a virtual port.
    #[inline(always)]
    pub const fn new(address: Address, protocol: u8) -> Self {
        Self { address, protocol, reserved: 0 }
    }
}

/// Where connections to a virtual port go. Replaced as a whole, so that no connection sees parts of two versions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct ServiceEntry {
    /// The version of the table of slots. A version is never written again.
    pub table: u32,
    /// Slots of the table; 0 when no endpoint is usable.
    pub slots: u32,
    /// Index of its counter, and its number in other maps. No two virtual ports share one.
    pub service: u32,
    /// Seconds without a connection after which the affinity of a client ends; 0 for no affinity.
    pub affinity_ttl_s: u32,
    /// A [`Policy`].
    pub policy: u32,
    /// None is defined.
    pub flags: u32,
}

/// How a connection chooses a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Policy {
    /// One after the other.
    RoundRobin = 0,
    /// By chance.
    Random = 1,
    /// Of [`COMPARED_SLOTS`] slots in a row, the one with the fewest connections in relation to its weight.
    LeastConn = 2,
    /// By a hash of the client. So does Maglev, with another table.
    ClientHash = 3,
}

impl Policy {
    /// The policy with this number. Others are those of newer agents: they take turns.
    #[inline(always)]
    pub const fn of(number: u32) -> Self {
        match number {
            1 => Self::Random,
            2 => Self::LeastConn,
            3 => Self::ClientHash,
            _ => Self::RoundRobin,
        }
    }
}

/// The key of `SLOTS`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Pod, Zeroable)]
#[repr(C)]
pub struct SlotKey {
    /// See [`ServiceEntry::table`].
    pub table: u32,
    /// From 0 on.
    pub slot: u32,
}

/// An endpoint: the value of `SLOTS` and `MEMBERS`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Backend {
    /// Where it listens.
    pub address: Address,
    /// Its share beside the others', at least 1.
    pub weight: u16,
    /// Index of its number of connections.
    pub id: u32,
}

/// Buckets of [`Counts::latency`].
pub const LATENCY_BUCKETS: usize = 32;

/// The value of `BACKEND_COUNTS` and `SERVICE_COUNTS`: what was counted of an endpoint, or of a virtual port. Only grows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Counts {
    /// TCP connections, UDP connections, and destinations of unconnected UDP sockets for which it was chosen.
    pub picks: u64,
    /// Calls that failed because the virtual port had no usable endpoint.
    pub refused: u64,
    /// TCP connections that the endpoint refused, reset, or did not answer.
    pub failed: u64,
    /// Sum of the times in which TCP connections were established, in microseconds.
    pub latency_sum: u64,
    /// TCP connections that were established, by the time that it took: see [`latency_bucket`].
    pub latency: [u64; LATENCY_BUCKETS],
}

/// The bucket of a time in microseconds: the number of its binary digits, so bucket 0 has less than 1, and bucket `n` what is less than
/// 2^n. The last one has all that is longer, too.
#[inline(always)]
pub const fn latency_bucket(microseconds: u64) -> usize {
    let digits = (u64::BITS - microseconds.leading_zeros()) as usize;
    if digits < LATENCY_BUCKETS { digits } else { LATENCY_BUCKETS - 1 }
}

/// The key of `MEMBERS`: the endpoints that take connections of a service.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Pod, Zeroable)]
#[repr(C)]
pub struct MemberKey {
    /// See [`ServiceEntry::service`].
    pub service: u32,
    /// The endpoint's.
    pub address: Address,
    reserved: [u8; 2],
}

impl MemberKey {
    /// The key of an endpoint.
    #[inline(always)]
    pub const fn new(service: u32, address: Address) -> Self {
        Self { service, address, reserved: [0; 2] }
    }
}

/// The key of `CLIENTS`: a client of a service with affinity.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Pod, Zeroable)]
#[repr(C)]
pub struct ClientKey {
    /// What identifies the client: for sockets, their network namespace; for the proxy, the client's address.
    pub client: u64,
    /// See [`ServiceEntry::service`].
    pub service: u32,
    reserved: u32,
}

impl ClientKey {
    /// The key of a client.
    #[inline(always)]
    pub const fn new(client: u64, service: u32) -> Self {
        Self { client, service, reserved: 0 }
    }
}

/// The endpoint of a client.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Affinity {
    /// When it was last used, in nanoseconds of the monotonic clock.
    pub used: u64,
    /// The endpoint.
    pub address: Address,
    reserved: [u8; 2],
}

impl Affinity {
    /// An endpoint that is used now.
    #[inline(always)]
    pub const fn new(address: Address, now: u64) -> Self {
        Self { used: now, address, reserved: [0; 2] }
    }

    /// Whether it has not ended.
    #[inline(always)]
    pub const fn is_valid(&self, ttl_s: u32, now: u64) -> bool {
        now.saturating_sub(self.used) < ttl_s as u64 * 1_000_000_000
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_powers_of_two() {
        let buckets = [0, 1, 2, 3, 4, 1023, 1024, 1_000_000].map(latency_bucket);
        assert_eq!(buckets, [0, 1, 2, 2, 3, 10, 11, 20]);
        assert_eq!(latency_bucket((1 << 30) - 1), 30);
        assert_eq!([1 << 30, 1 << 31, u64::MAX].map(latency_bucket), [31; 3]);
    }
}
