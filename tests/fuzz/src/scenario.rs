//! The first bytes of an input as configuration and routes, the rest as the packet.
//!
//! All zeros are the configuration and the routes of the golden packets, so that each of them is a seed; other bytes change a
//! field, most of them by exclusive or.

use std::collections::BTreeMap;

use ipnet::Ipv4Net;
use overlay_agent::route::{NextHops, Subnet, abi_prefix};
use overlay_ebpf::{
    abi::{Config, NextHop, SourceCheck, TosRule},
    route::Routes,
    source::Sender,
};

/// Bytes in front of the packet.
pub(crate) const LEN: usize = 32;
/// Where the payload of each segment stands (16 bits).
pub(crate) const GSO_SIZE: usize = 10;

/// The hardware address in the golden packets.
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

/// One host, its routes and one packet.
#[derive(Debug)]
pub(crate) struct Scenario<'a> {
    pub(crate) config: Config,
    pub(crate) network: Ipv4Net,
    pub(crate) subnet: Ipv4Net,
    pub(crate) source_check: SourceCheck,
    /// DSCP of outer packets, in the upper six bits; `None` when it is the inner one.
    pub(crate) dscp: Option<u8>,
    pub(crate) routes: Table,
    /// Payload of each segment in bytes, 0 for a packet that is one.
    pub(crate) gso_size: usize,
    /// Bytes behind those that can be seen.
    pub(crate) hidden: usize,
    /// Bytes in front of the packet.
    pub(crate) offset: usize,
    /// Of the device that received the packet.
    pub(crate) own_mac: Option<[u8; 6]>,
    /// Index of another device than the first that received the packet; 0 for the first.
    pub(crate) other_device: u32,
    /// Whether all arriving packets take the slow path.
    pub(crate) slow_ingress: bool,
    /// Source of a datagram.
    pub(crate) sender: [u8; 4],
    /// TOS of a datagram's outer header.
    pub(crate) outer_tos: u8,
    /// Of the overlay device, in bytes.
    pub(crate) device_mtu: u16,
    /// The packet, as far as it can be seen.
    pub(crate) packet: &'a [u8],
}

impl<'a> Scenario<'a> {
    /// `None` for an input that is too short.
    pub(crate) fn read(input: &'a [u8]) -> Option<Self> {
        let (
            &[
                tos_rule,
                source_check,
                subnet_len,
                network_len_and_device,
                ip0,
                ip1,
                ip2,
                ip3,
                port0,
                port1,
                gso0,
                gso1,
                hidden0,
                hidden1,
                offset,
                mac,
                ref route @ ..,
            ],
            packet,
        ) = input.split_first_chunk::<LEN>()?;
        let &[_, _, _, _, _, _, _, _, _, s0, s1, s2, s3, outer_tos, mtu0, mtu1] = route;
        let network = net([10, 244, 0, 0], 16 ^ (network_len_and_device % 32));
        let subnet = net([10, 244, 1, 0], 24 ^ (subnet_len % 32));
        let (tos, dscp) = match tos_rule {
            0 => (TosRule::COPY, None),
            rule => (TosRule::fixed(rule), Some(rule << 2)),
        };
        let source_check = match source_check % 3 {
            0 => SourceCheck::Strict,
            1 => SourceCheck::Loose,
            _ => SourceCheck::Off,
        };
        let public_ip = [192 ^ ip0, 168 ^ ip1, 77 ^ ip2, 1 ^ ip3];
        let port = 8285 ^ u16::from_be_bytes([port0, port1]);
        let slow_ingress = network_len_and_device & 0x80 != 0;
        let config = Config::new(public_ip, abi_prefix(network), abi_prefix(subnet), port);
        Some(Self {
            config: config.with_policy(tos, source_check).with_slow_ingress(slow_ingress),
            network,
            subnet,
            source_check,
            dscp,
            routes: Table::read(*route),
            gso_size: u16::from_be_bytes([gso0, gso1]).into(),
            hidden: u16::from_be_bytes([hidden0, hidden1]).into(),
            offset: usize::from(offset % 64),
            own_mac: match mac {
                1 => None,
                change => Some([MAC[0], MAC[1], MAC[2], MAC[3], MAC[4], MAC[5] ^ change]),
            },
            other_device: u32::from(network_len_and_device / 32 % 4),
            slow_ingress,
            sender: [192 ^ s0, 168 ^ s1, 77 ^ s2, 2 ^ s3],
            outer_tos,
            device_mtu: 1472 ^ u16::from_be_bytes([mtu0, mtu1]),
            packet,
        })
    }

    /// Whether the source of a packet that leaves is allowed.
    pub(crate) fn may_send_from(&self, source: [u8; 4]) -> bool {
        self.source_check == SourceCheck::Off
            || contains(self.subnet, source)
            || !contains(self.network, source)
    }

    /// What the core is told about a sender.
    pub(crate) fn sender(&self, address: [u8; 4]) -> Sender {
        Sender { address, device: self.other_device }
    }

    /// Whether a peer is believed that a packet has this source, which arrived on the scenario's device.
    pub(crate) fn believes(&self, peer: [u8; 4], source: [u8; 4]) -> bool {
        let holder = self.routes.next_hop(source);
        let is_believed = match self.source_check {
            SourceCheck::Strict => holder.is_some_and(|holder| {
                holder.peer == peer && [0, holder.ifindex].contains(&self.other_device)
            }),
            SourceCheck::Loose => holder.is_some(),
            SourceCheck::Off => true,
        };
        is_believed && !contains(self.subnet, source)
    }
}

/// Whether a prefix contains an address, in network byte order.
pub(crate) fn contains(net: Ipv4Net, address: [u8; 4]) -> bool {
    net.contains(&std::net::Ipv4Addr::from(address))
}

fn net(address: [u8; 4], len: u8) -> Ipv4Net {
    Ipv4Net::new(address.into(), len.min(32)).expect("at most 32 bits").trunc()
}

/// Routes, searched one after the other.
#[derive(Debug)]
pub(crate) struct Table(BTreeMap<Ipv4Net, NextHop>);

impl Table {
    /// The routes of the golden packets. One of them is changed, some may be missing, and one may cover every address.
    fn read(bytes: [u8; 16]) -> Self {
        let [changed, mtu0, mtu1, ifindex, flags, len, peer, missing, greedy, ..] = bytes;
        let golden = |third: u8, len: u8, last: u8, ifindex: u32, mtu: u16, flags: u16| {
            (third, len, NextHop { peer: [192, 168, 77, last], ifindex, mtu, flags, ..NextHop::default() })
        };
        let mut routes = [
            golden(2, 24, 2, 1, u16::MAX, 0),
            golden(3, 24, 3, 1, u16::MAX, 0),
            golden(128, 17, 9, 1, u16::MAX, 0),
            golden(200, 24, 4, 1, u16::MAX, 0),
            golden(5, 24, 5, 1, 1400, 0),
            golden(6, 24, 6, 0, u16::MAX, 0),
            golden(7, 24, 7, 1, u16::MAX, NextHop::SLOW_PATH),
            golden(8, 24, 8, 1, u16::MAX, NextHop::FINISHED_ONLY),
        ];
        let (_, prefix_len, via) = &mut routes[usize::from(changed % 8)];
        *prefix_len ^= len % 32;
        via.mtu ^= u16::from_be_bytes([mtu0, mtu1]);
        via.ifindex ^= u32::from(ifindex);
        via.flags ^= u16::from(flags);
        via.peer[3] ^= peer;
        let present = (0..).zip(routes).filter(|(index, _)| missing & (1 << index) == 0);
        let mut table: BTreeMap<_, _> =
            present.map(|(_, (third, len, via))| (net([10, 244, third, 0], len), via)).collect();
        if greedy != 0 {
            table.insert(
                net([0; 4], 0),
                NextHop { peer: [192, 168, 77, greedy], ifindex: 1, mtu: 1472, ..NextHop::default() },
            );
        }
        Self(table)
    }

    /// The same routes for the agent's own lookup.
    pub(crate) fn next_hops(&self) -> NextHops {
        self.0.iter().map(|(net, via)| (Subnet::containing(*net), *via)).collect()
    }
}

impl Routes for Table {
    fn next_hop(&self, address: [u8; 4]) -> Option<NextHop> {
        let containing = self.0.iter().filter(|(net, _)| contains(**net, address));
        containing.max_by_key(|(net, _)| net.prefix_len()).map(|(_, via)| *via)
    }
}
