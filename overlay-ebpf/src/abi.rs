//! What the agent and the eBPF programs share in maps. All fields are fixed-size; addresses in network byte order.

use bytemuck::{Pod, Zeroable};

use crate::reason::{DropReason, PuntReason};

/// Most routes that the kernel's map holds. A /16 network with /24 leases needs 256; flannel's smallest subnets (/30) in
/// a /14 would need 65536.
pub const MAX_ROUTES: u32 = 65536;

/// Version of everything in this file. Increment it when the layout or the meaning of a map's key or value, or of the mark of
/// XDP, changes: agents and programs of different versions must not share maps. It is part of the path of pinned objects.
pub const ABI_VERSION: u16 = 2;

/// Most devices that carry outer packets.
pub const MAX_UNDERLAYS: u32 = 64;

/// What XDP writes in front of a packet that it decapsulated and validated, for the tc program behind it. Only an XDP program on
/// the same device can put metadata there, so no packet on the wire can forge it. It names the network, because programs of
/// several networks may be on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Mark {
    magic: [u8; 2],
    /// [`ABI_VERSION`], big endian.
    version: [u8; 2],
    /// The network's overlay device, big endian.
    overlay_ifindex: [u8; 4],
}

/// An IPv4 prefix: address and mask, network byte order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Prefix {
    address: [u8; 4],
    mask: [u8; 4],
}

impl Prefix {
    /// The prefix of `length` bits (at most 32) that contains `address`.
    pub fn new(address: [u8; 4], length: u8) -> Self {
        let mask = u32::MAX.checked_shl(32u32.saturating_sub(length as u32)).unwrap_or(0);
        let address = u32::from_be_bytes(address) & mask;
        Self { address: address.to_be_bytes(), mask: mask.to_be_bytes() }
    }

    /// Whether `address` lies in the prefix.
    #[inline(always)]
    pub fn contains(&self, address: [u8; 4]) -> bool {
        let mask = u32::from_ne_bytes(self.mask);
        u32::from_ne_bytes(address) & mask == u32::from_ne_bytes(self.address)
    }
}

/// This host's place in the network: the one entry of the map `CONFIG`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Config {
    /// This host's underlay address.
    pub public_ip: [u8; 4],
    /// The whole overlay.
    pub network: Prefix,
    /// This host's subnet.
    pub subnet: Prefix,
    /// UDP port of the network, host byte order.
    pub port: u16,
    reserved: u16,
    /// Device that carries the outer packets.
    pub underlay_ifindex: u32,
    /// The overlay device.
    pub overlay_ifindex: u32,
}

impl Config {
    /// The configuration of one host in one network.
    pub fn new(public_ip: [u8; 4], network: Prefix, subnet: Prefix, port: u16) -> Self {
        Self { public_ip, network, subnet, port, reserved: 0, underlay_ifindex: 0, overlay_ifindex: 0 }
    }

    /// The mark of this network's XDP program.
    #[inline(always)]
    pub fn mark(&self) -> Mark {
        Mark {
            magic: *b"ov",
            version: ABI_VERSION.to_be_bytes(),
            overlay_ifindex: self.overlay_ifindex.to_be_bytes(),
        }
    }

    /// The same configuration with the devices, which only the eBPF programs need.
    pub fn with_devices(self, underlay_ifindex: u32, overlay_ifindex: u32) -> Self {
        Self { underlay_ifindex, overlay_ifindex, ..self }
    }
}

/// Value of the route map: the peer that holds a subnet. The key is the kernel's for longest-prefix-match tries:
/// prefix length in bits (u32, host byte order), then the address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct RouteValue {
    /// Underlay address of the peer.
    pub peer: [u8; 4],
}

/// Value of the map `UNDERLAYS`, whose key is the index of a device that carries outer packets (u32, host byte order).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct UnderlayValue {
    /// Its hardware address.
    pub mac: [u8; 6],
    reserved: [u8; 2],
}

impl UnderlayValue {
    /// The value for a device with this hardware address.
    pub fn new(mac: [u8; 6]) -> Self {
        Self { mac, reserved: [0; 2] }
    }
}

/// Counters of one CPU: the one entry of the per-CPU map `COUNTERS`. Packets are counted as the kernel hands them over:
/// a super-packet of many segments (GSO, GRO) counts once. Bytes are those of the inner packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Counters {
    /// Inner packets encapsulated and handed to the underlay's stack, which may still drop them (no route, no neighbour).
    pub egress_packets: u64,
    /// Their bytes.
    pub egress_bytes: u64,
    /// Inner packets decapsulated and delivered.
    pub ingress_packets: u64,
    /// Their bytes.
    pub ingress_bytes: u64,
    /// Packets handed to the slow path, by [`PuntReason::index`].
    pub punts: [u64; PuntReason::COUNT],
    /// Packets discarded, by [`DropReason::index`].
    pub drops: [u64; DropReason::COUNT],
}

impl Counters {
    /// All counters at zero.
    pub const ZERO: Self = Self {
        egress_packets: 0,
        egress_bytes: 0,
        ingress_packets: 0,
        ingress_bytes: 0,
        punts: [0; PuntReason::COUNT],
        drops: [0; DropReason::COUNT],
    };

    /// Counts one punted packet.
    #[inline(always)]
    pub fn punt(&mut self, reason: PuntReason) {
        if let Some(counter) = self.punts.get_mut(reason.index()) {
            *counter = counter.wrapping_add(1);
        }
    }

    /// Counts one discarded packet.
    #[inline(always)]
    pub fn drop(&mut self, reason: DropReason) {
        if let Some(counter) = self.drops.get_mut(reason.index()) {
            *counter = counter.wrapping_add(1);
        }
    }

    /// Adds another CPU's counters.
    pub fn add(&mut self, other: &Self) {
        let sum = |into: &mut u64, from: u64| *into = into.wrapping_add(from);
        sum(&mut self.egress_packets, other.egress_packets);
        sum(&mut self.egress_bytes, other.egress_bytes);
        sum(&mut self.ingress_packets, other.ingress_packets);
        sum(&mut self.ingress_bytes, other.ingress_bytes);
        self.punts.iter_mut().zip(other.punts).for_each(|(into, from)| sum(into, from));
        self.drops.iter_mut().zip(other.drops).for_each(|(into, from)| sum(into, from));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_contains_its_first_and_last_address_and_nothing_beside() {
        let prefix = Prefix::new([10, 244, 1, 77], 24);
        assert!(prefix.contains([10, 244, 1, 0]) && prefix.contains([10, 244, 1, 255]));
        assert!(!prefix.contains([10, 244, 0, 255]) && !prefix.contains([10, 244, 2, 0]));
        assert!(Prefix::new([1, 2, 3, 4], 0).contains([255, 0, 0, 1]));
        assert!(Prefix::new([1, 2, 3, 4], 32).contains([1, 2, 3, 4]));
        assert!(!Prefix::new([1, 2, 3, 4], 32).contains([1, 2, 3, 5]));
    }

    #[test]
    fn counters_of_cpus_add_up() {
        let mut sum = Counters::ZERO;
        let mut cpu = Counters::ZERO;
        cpu.egress_packets = 3;
        cpu.drop(DropReason::NoRoute);
        cpu.punt(PuntReason::OuterGro);
        sum.add(&cpu);
        sum.add(&cpu);
        assert_eq!(sum.egress_packets, 6);
        assert_eq!(sum.drops[DropReason::NoRoute.index()], 2);
        assert_eq!(sum.punts[PuntReason::OuterGro.index()], 2);
    }
}
