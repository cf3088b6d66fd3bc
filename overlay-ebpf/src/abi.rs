//! What the agent and the eBPF programs share in maps. All fields are fixed-size; addresses in network byte order.

use bytemuck::{Pod, Zeroable};

use crate::{
    reason::{DropReason, PuntReason},
    wire::Ethernet,
};

pub use crate::source::SourceCheck;

/// Routes that the kernel's maps hold in any network. A /16 network with /24 leases needs 256; flannel's smallest subnets (/30) in
/// a /14 need 65536.
pub const DEFAULT_ROUTES: u32 = 65536;
/// Most routes that the kernel's maps hold in a network of more than [`DEFAULT_ROUTES`] subnets.
pub const MAX_ROUTES: u32 = 1 << 20;

/// Version of the maps. Increment it when the layout or the meaning of a map's key or value changes: agents and programs of different
/// versions must not share maps. It is part of the path of pinned maps. [`Mark`] and [`Counters`] are shared by all versions and have rules
/// of their own.
pub const ABI_VERSION: u16 = if cfg!(feature = "next-abi") { 7 } else { 6 };

/// Most containers of this host that the programs know.
pub const MAX_ENDPOINTS: u32 = 16384;

/// Most flows that the programs remember, each direction of a connection being one.
pub const MAX_FLOWS: u32 = 65536;

/// Size in bytes of the ring buffer for questions to the agent.
pub const QUESTION_BYTES: u32 = 65536;

/// Most devices that carry outer packets.
pub const MAX_UNDERLAYS: u32 = 64;

/// What XDP writes in front of a packet that it decapsulated and validated, for the tc program behind it. Only an XDP program on
/// the same device can put metadata there, so no packet on the wire can forge it. It names the network, because programs of
/// several networks may be on the device.
///
/// Its bytes never change. An upgrade replaces the programs of a device one by one, so the tc program of one [`ABI_VERSION`] runs behind
/// the XDP program of another, in either order: it must take every packet that the other decapsulated. What a later version has to
/// hand over as well goes in front of the mark, where earlier tc programs do not look, and must be of no importance to them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Mark {
    /// Always the same: `ov`, and 5 in big endian, the [`ABI_VERSION`] with which the format became final.
    magic: [u8; 4],
    /// The network's overlay device, big endian.
    overlay_ifindex: [u8; 4],
}

/// An IPv4 prefix: address and mask, network byte order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Prefix {
    #[cfg(feature = "next-abi")]
    mask: [u8; 4],
    address: [u8; 4],
    #[cfg(not(feature = "next-abi"))]
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

    /// The prefix of the same length that contains `address`.
    #[inline(always)]
    pub fn of_same_length(&self, address: [u8; 4]) -> Self {
        let address = u32::from_ne_bytes(address) & u32::from_ne_bytes(self.mask);
        Self { address: address.to_ne_bytes(), mask: self.mask }
    }

    /// First address, network byte order.
    pub fn address(&self) -> [u8; 4] {
        self.address
    }

    /// Length in bits.
    pub fn length(&self) -> u8 {
        u32::from_ne_bytes(self.mask).count_ones() as u8
    }

    /// Whether prefixes of this length are longer than those of `other`'s.
    #[inline(always)]
    pub fn is_longer_than(&self, other: &Self) -> bool {
        u32::from_be_bytes(self.mask) > u32::from_be_bytes(other.mask)
    }
}

/// Most former addresses of peers in the map `MOVED`, whose key is an address that a peer had, and whose value is the one that it has now.
pub const MAX_MOVED: u32 = 4096;

/// This host's place in the network: the one entry of the map `CONFIG`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Config {
    /// This host's underlay address: the source of outer packets.
    pub public_ip: [u8; 4],
    /// The whole overlay.
    pub network: Prefix,
    /// This host's subnet.
    pub subnet: Prefix,
    /// UDP port of the network, host byte order.
    pub port: u16,
    /// How the outer TOS follows from the inner one.
    pub tos: TosRule,
    /// The overlay device.
    pub overlay_ifindex: u32,
    source_check: u8,
    slow_ingress: u8,
    other_lengths: u8,
    reserved: u8,
    first_ifindex: u32,
    first_mac: [u8; 6],
    /// 48 bytes in all: arrays of bytes of that size can be cast.
    padding: [u8; PADDING],
    /// See [`Config::with_other_ip`]. Zero, which is no address of a host, where an earlier agent wrote the configuration.
    other_ip: [u8; 4],
}

/// With another layout, 64 bytes in all.
const PADDING: usize = if cfg!(feature = "next-abi") { 18 } else { 2 };

/// The outer TOS: the inner one's bits that the mask keeps, and fixed ones. ECN is always copied (RFC 6040).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct TosRule {
    mask: u8,
    fixed: u8,
}

impl TosRule {
    /// The outer DSCP is the inner one (RFC 2983, uniform model).
    pub const COPY: Self = Self { mask: 0xff, fixed: 0 };

    /// The outer DSCP is always this one (RFC 2983, pipe model); its lower six bits count.
    pub fn fixed(dscp: u8) -> Self {
        Self { mask: 0b11, fixed: dscp << 2 }
    }

    /// The outer TOS of a packet with this inner TOS.
    #[inline(always)]
    pub fn outer(self, inner: u8) -> u8 {
        (inner & self.mask) | self.fixed
    }
}

impl Default for TosRule {
    fn default() -> Self {
        Self::COPY
    }
}

impl Config {
    /// The configuration of one host in one network.
    pub fn new(public_ip: [u8; 4], network: Prefix, subnet: Prefix, port: u16) -> Self {
        let tos = TosRule::COPY;
        Self {
            public_ip,
            network,
            subnet,
            port,
            tos,
            overlay_ifindex: 0,
            source_check: 0,
            slow_ingress: 0,
            other_lengths: 0,
            reserved: 0,
            first_ifindex: 0,
            first_mac: [0; 6],
            padding: [0; PADDING],
            other_ip: public_ip,
        }
    }

    /// The same configuration with another rule for the outer TOS and another source check.
    pub fn with_policy(self, tos: TosRule, source_check: SourceCheck) -> Self {
        Self { tos, source_check: source_check as u8, ..self }
    }

    /// The same configuration with all arriving packets on the slow path, or not.
    pub fn with_slow_ingress(self, slow_ingress: bool) -> Self {
        Self { slow_ingress: slow_ingress as u8, ..self }
    }

    /// Whether all arriving packets take the slow path.
    #[inline(always)]
    pub fn is_ingress_slow(&self) -> bool {
        self.slow_ingress != 0
    }

    /// The same configuration with the first underlay device of the map `UNDERLAYS`, where nearly all packets arrive: programs need
    /// no lookup for those. 0 and any address for none.
    pub fn with_first_underlay(self, ifindex: u32, mac: [u8; 6]) -> Self {
        Self { first_ifindex: ifindex, first_mac: mac, ..self }
    }

    /// The entry of `UNDERLAYS` for the device with this index, if it is the first.
    #[inline(always)]
    pub fn first_underlay(&self, ifindex: u32) -> Option<UnderlayValue> {
        (ifindex == self.first_ifindex).then(|| UnderlayValue::new(self.first_mac, true))
    }

    /// The same configuration with routes in the map `PREFIXES`, or none there.
    pub fn with_other_lengths(self, other_lengths: bool) -> Self {
        Self { other_lengths: other_lengths as u8, ..self }
    }

    /// Whether the map `PREFIXES` has routes. Without, one lookup in `ROUTES` answers for an address: all routes have the length
    /// of this host's subnet.
    #[inline(always)]
    pub fn has_other_lengths(&self) -> bool {
        self.other_lengths != 0
    }

    /// How sources are checked; an unknown value is the strictest.
    #[inline(always)]
    pub fn source_check(&self) -> SourceCheck {
        match self.source_check {
            value if value == SourceCheck::Loose as u8 => SourceCheck::Loose,
            value if value == SourceCheck::Off as u8 => SourceCheck::Off,
            _ => SourceCheck::Strict,
        }
    }

    /// The same configuration with another address to which peers may send: that before the last change, or that after the next.
    pub fn with_other_ip(self, other_ip: [u8; 4]) -> Self {
        Self { other_ip, ..self }
    }

    /// Whether peers send to this address.
    #[inline(always)]
    pub fn is_own_address(&self, address: [u8; 4]) -> bool {
        address == self.public_ip || address == self.other_ip
    }

    /// The mark of this network's XDP program.
    #[inline(always)]
    pub fn mark(&self) -> Mark {
        Mark { magic: *b"ov\0\x05", overlay_ifindex: self.overlay_ifindex.to_be_bytes() }
    }

    /// The same configuration with the overlay device, which only the eBPF programs need.
    pub fn with_device(self, overlay_ifindex: u32) -> Self {
        Self { overlay_ifindex, ..self }
    }
}

/// Value of the map `ROUTES`: how packets for a subnet reach the peer that holds it. The key is the subnet, a [`Prefix`] of the
/// length of this host's own. All numbers in host byte order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct NextHop {
    /// Underlay address of the peer.
    pub peer: [u8; 4],
    /// The device through which the kernel reaches it; 0 when the kernel has no route to it.
    pub ifindex: u32,
    /// Largest inner packet that the path carries, in bytes.
    pub mtu: u16,
    /// [`NextHop::SLOW_PATH`], [`NextHop::FINISHED_ONLY`] and [`NextHop::RESOLVED`].
    pub flags: u16,
    /// With [`NextHop::RESOLVED`], the hardware address of the peer or of the gateway to it; otherwise zero.
    pub mac: [u8; 6],
    /// With [`NextHop::RESOLVED`], the hardware address of the device; otherwise zero.
    pub source_mac: [u8; 6],
}

/// Value of the map `PREFIXES`, which has the routes of other lengths than that of this host's subnet. The key is the kernel's for
/// longest-prefix-match tries: prefix length in bits (u32, host byte order), then the address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct PrefixRoute {
    /// The subnet.
    pub prefix: Prefix,
    /// The way to its holder.
    pub next_hop: NextHop,
}

impl NextHop {
    /// All packets to and from this peer take the slow path: the host's IPsec policies cover them, or its device is none for
    /// programs.
    pub const SLOW_PATH: u16 = 1;
    /// Only finished packets may be sent to this peer: neither it nor the devices on the way complete checksums or cut
    /// super-packets.
    pub const FINISHED_ONLY: u16 = 2;
    /// Programs write the link-layer header. Without it, the kernel looks up route and neighbour of each packet, and asks for the
    /// neighbour's address when it does not know it.
    pub const RESOLVED: u16 = 4;

    /// Whether a flag is set.
    #[inline(always)]
    pub fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    /// The same way with link-layer addresses, which programs write in front of packets.
    pub fn resolved(self, mac: [u8; 6], source_mac: [u8; 6]) -> Self {
        Self { flags: self.flags | Self::RESOLVED, mac, source_mac, ..self }
    }

    /// What stands in front of outer packets: the link-layer header, or [`Ethernet::UNRESOLVED_IPV4`] for the kernel to replace.
    #[inline(always)]
    pub fn ethernet(&self) -> Ethernet {
        Ethernet::ipv4(self.mac, self.source_mac)
    }
}

/// Value of the map `UNDERLAYS`, whose key is the index of a device that carries outer packets (u32, host byte order).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct UnderlayValue {
    /// Its hardware address.
    pub mac: [u8; 6],
    is_first: u8,
    reserved: u8,
}

impl UnderlayValue {
    /// The value for a device with this hardware address, which is the first or another one.
    #[inline(always)]
    pub fn new(mac: [u8; 6], is_first: bool) -> Self {
        Self { mac, is_first: is_first as u8, reserved: 0 }
    }

    /// Whether it is the value of the first device.
    pub fn is_first(&self) -> bool {
        self.is_first != 0
    }

    /// The value of [`Sender::device`](crate::source::Sender::device) for the device with this index.
    #[inline(always)]
    pub fn sender_device(&self, ifindex: u32) -> u32 {
        match self.is_first {
            0 => ifindex,
            _ => 0,
        }
    }
}

/// A container of this host, by its address: the entries of the map `ENDPOINTS`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Endpoint {
    /// The host's device that leads to it and to nothing else: its veth, also where that is the port of a bridge.
    pub ifindex: u32,
    /// Its hardware address.
    pub mac: [u8; 6],
    /// The hardware address of its gateway: of the bridge or of the veth.
    pub gateway_mac: [u8; 6],
    /// [`Endpoint::PEER`].
    pub flags: u32,
}

impl Endpoint {
    /// The device is one end of a veth pair whose other end is in another network namespace: finished packets are handed to that end.
    pub const PEER: u32 = 1;
}

/// Counters of one CPU: the one entry of the per-CPU map `COUNTERS`. Packets are counted as the kernel hands them over:
/// a super-packet of many segments (GSO, GRO) counts once. Bytes are those of the inner packets.
///
/// Counters go on when an agent of another [`ABI_VERSION`] replaces the programs: it reads those of the replaced ones. So the layout is
/// the same in all versions. Reasons keep their index, and new ones take the room behind them.
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
    /// Of the encapsulated packets, those that came straight from a container.
    pub egress_bypass_packets: u64,
    /// Of the decapsulated packets, those that went straight to a container.
    pub ingress_bypass_packets: u64,
    /// Packets handed to the slow path, by [`PuntReason::index`].
    pub punts: [u64; PUNT_ROOM],
    /// Packets discarded, by [`DropReason::index`].
    pub drops: [u64; DROP_ROOM],
}

/// Room for reasons, in every version.
const PUNT_ROOM: usize = 24;
const DROP_ROOM: usize = 32;
const _: () = assert!(PuntReason::COUNT <= PUNT_ROOM && DropReason::COUNT <= DROP_ROOM);

impl Counters {
    /// All counters at zero.
    pub const ZERO: Self = Self {
        egress_packets: 0,
        egress_bytes: 0,
        ingress_packets: 0,
        ingress_bytes: 0,
        egress_bypass_packets: 0,
        ingress_bypass_packets: 0,
        punts: [0; PUNT_ROOM],
        drops: [0; DROP_ROOM],
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
        sum(&mut self.egress_bypass_packets, other.egress_bypass_packets);
        sum(&mut self.ingress_bypass_packets, other.ingress_bypass_packets);
        self.punts.iter_mut().zip(other.punts).for_each(|(into, from)| sum(into, from));
        self.drops.iter_mut().zip(other.drops).for_each(|(into, from)| sum(into, from));
    }
}

/// The one entry of the map `CARRIED`: what the programs before these have counted in maps that are gone. Only the agent writes it, and
/// the layout is the same in every version, as that of [`Counters`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Carried {
    /// The kernel's number of the map `COUNTERS` that was added last: it is not added again when it is still there.
    pub last_map: u64,
    /// The sum.
    pub counters: Counters,
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
    fn a_prefix_of_the_same_length_contains_the_address() {
        let prefix = Prefix::new([10, 244, 1, 0], 26);
        assert_eq!(prefix.of_same_length([10, 9, 8, 0x8f]), Prefix::new([10, 9, 8, 0x80], 26));
        assert_eq!((prefix.length(), Prefix::default().length()), (26, 0));
        assert!(prefix.is_longer_than(&Prefix::new([10, 244, 1, 0], 25)));
        assert!(!prefix.is_longer_than(&prefix) && !prefix.is_longer_than(&Prefix::new([10, 0, 0, 0], 32)));
    }

    #[test]
    fn a_mark_names_the_network_and_has_the_same_bytes_in_every_version() {
        let mark = Config::default().with_device(0x0102_0304).mark();
        assert_eq!(bytemuck::bytes_of(&mark), [b'o', b'v', 0, 5, 1, 2, 3, 4]);
    }

    #[test]
    fn counters_have_the_same_layout_in_every_version() {
        let mut carried = Carried { last_map: 1, counters: Counters::ZERO };
        carried.counters.ingress_bypass_packets = 2;
        carried.counters.punt(PuntReason::OuterOptions);
        carried.counters.drop(DropReason::Truncated);
        carried.counters.drop(DropReason::DeviceFailed);
        let mut expected = [0u64; 1 + 6 + 24 + 32];
        for (index, value) in [(0, 1), (6, 2), (7, 1), (31, 1), (50, 1)] {
            expected[index] = value;
        }
        assert_eq!(bytemuck::bytes_of(&carried), bytemuck::cast_slice::<u64, u8>(&expected));
    }

    #[test]
    fn an_unknown_source_check_is_the_strictest() {
        let check = |source_check| Config { source_check, ..Config::default() }.source_check();
        assert_eq!([0, 1, 2].map(check), [SourceCheck::Strict, SourceCheck::Loose, SourceCheck::Off]);
        assert_eq!([3, 0x80, 0xff].map(check), [SourceCheck::Strict; 3]);
    }

    #[test]
    fn a_next_hop_has_both_addresses_or_leaves_them_to_the_kernel() {
        let unresolved = NextHop { ifindex: 2, flags: NextHop::FINISHED_ONLY, ..NextHop::default() };
        assert_eq!(unresolved.ethernet(), Ethernet::UNRESOLVED_IPV4);
        let resolved = unresolved.resolved([2, 0, 0, 0, 0, 7], [2, 0, 0, 0, 0, 9]);
        assert!(resolved.has(NextHop::RESOLVED) && resolved.has(NextHop::FINISHED_ONLY));
        assert!(!unresolved.has(NextHop::RESOLVED));
        assert_eq!(bytemuck::bytes_of(&resolved.ethernet()), [2, 0, 0, 0, 0, 7, 2, 0, 0, 0, 0, 9, 8, 0]);
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
