//! One IPsec policy: which outer packets it matches, and what becomes of them. Pure.

use std::{fmt, net::Ipv4Addr};

use ipnet::Ipv4Net;
use overlay_ebpf::entropy::FIRST_PORT;

/// The protocol number of UDP.
pub(super) const UDP: u8 = 17;

/// The outer packets between this host and a peer, in both directions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// This host's underlay address.
    pub local: Ipv4Addr,
    /// The peer's underlay address.
    pub peer: Ipv4Addr,
    /// The network's UDP port, at which both listen. Sent packets have a hash as their source port on the eBPF rungs, and this
    /// port on the tun rung. The source port of received ones is the peer's choice.
    pub port: u16,
    /// Index of the underlay device.
    pub ifindex: u32,
}

/// An IPsec policy that can match outer packets.
///
/// The order is that of the index in [`Policies`](super::Policies): direction, addresses, then the kernel's order of evaluation.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Policy {
    pub(super) direction: Direction,
    /// This host's addresses.
    pub(super) local: Ipv4Net,
    /// The other hosts' addresses.
    pub(super) remote: Ipv4Net,
    pub(super) kind: Kind,
    /// Lower values are evaluated first.
    pub(super) priority: u32,
    /// 0 for any.
    pub(super) protocol: u8,
    pub(super) source_port: PortMatch,
    pub(super) destination_port: PortMatch,
    /// Index of a device; 0 for any.
    pub(super) ifindex: u32,
    pub(super) action: Action,
    /// Whether it has a condition that this type does not express, such as a security label: it may match, or not.
    pub(super) conditional: bool,
}

/// Directions of packets that end or begin at this host. The kernel's third one is for forwarded packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Direction {
    Out,
    In,
}

/// Where a policy stands. The kernel evaluates policies of each type apart; both verdicts apply. The default decides about packets
/// that no policy of type main matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    /// `ptype sub`.
    Sub,
    /// `ptype main`.
    Main,
    /// `ip xfrm policy setdefault`.
    Default,
}

/// What becomes of the packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Action {
    /// They pass in clear.
    Allow,
    /// They must be transformed, or come from such a transformation.
    Require,
    /// They are dropped.
    Block,
}

/// The ports with the same bits as `port` where `mask` has ones; a mask of 0 is any port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct PortMatch {
    pub(super) port: u16,
    pub(super) mask: u16,
}

/// How much of a flow a policy matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Extent {
    Nothing,
    /// Some packets, or it is not certain which.
    Part,
    Everything,
}

impl Policy {
    /// The default of a direction, where that is to drop.
    pub(super) fn default_block(direction: Direction) -> Self {
        Self {
            direction,
            local: Ipv4Net::default(),
            remote: Ipv4Net::default(),
            kind: Kind::Default,
            priority: 0,
            protocol: 0,
            source_port: PortMatch::default(),
            destination_port: PortMatch::default(),
            ifindex: 0,
            action: Action::Block,
            conditional: false,
        }
    }

    /// How much of the flow's packets in the policy's direction it matches.
    pub(super) fn extent(&self, flow: &Flow) -> Extent {
        let addresses = self.local.contains(&flow.local) && self.remote.contains(&flow.peer);
        let protocol = self.protocol == 0 || self.protocol == UDP;
        if !addresses || !protocol || !self.destination_port.matches(flow.port) {
            return Extent::Nothing;
        }
        let certain = if self.conditional { Extent::Part } else { Extent::Everything };
        self.source_ports(flow).min(self.device(flow)).min(certain)
    }

    fn source_ports(&self, flow: &Flow) -> Extent {
        let ports = self.source_port;
        match self.direction {
            Direction::In if ports.mask == 0 => Extent::Everything,
            Direction::In => Extent::Part,
            Direction::Out => {
                // The range of the hash is all ports that begin with the ones of its first port.
                let touches_range = (ports.port ^ FIRST_PORT) & ports.mask & FIRST_PORT == 0;
                let contains_range = touches_range && ports.mask & !FIRST_PORT == 0;
                match (contains_range, touches_range, ports.matches(flow.port)) {
                    (true, _, true) => Extent::Everything,
                    (false, false, false) => Extent::Nothing,
                    (true, _, false) | (false, true, _) | (false, false, true) => Extent::Part,
                }
            }
        }
    }

    fn device(&self, flow: &Flow) -> Extent {
        match self.direction {
            _any if self.ifindex == 0 => Extent::Everything,
            // A flow may also be looked up with the VRF of its device.
            Direction::Out if self.ifindex == flow.ifindex => Extent::Part,
            Direction::Out => Extent::Nothing,
            // The kernel compares the device of the route to this host's address: loopback, or a VRF.
            Direction::In => Extent::Part,
        }
    }
}

impl PortMatch {
    fn matches(self, port: u16) -> bool {
        (port ^ self.port) & self.mask == 0
    }
}

impl fmt::Display for Policy {
    /// As a part of a sentence: `the IPsec policy out src 192.168.77.1/32 dst 192.168.77.2/32 proto udp (block)`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, source, destination) = match self.direction {
            Direction::Out => ("out", self.local, self.remote),
            Direction::In => ("in", self.remote, self.local),
        };
        let action = match self.action {
            Action::Allow => "allow",
            Action::Require => "require",
            Action::Block => "block",
        };
        if self.kind == Kind::Default {
            return write!(f, "the default IPsec policy {name} ({action})");
        }
        write!(f, "the IPsec policy {name} src {source} dst {destination}")?;
        if self.protocol == UDP {
            write!(f, " proto udp")?;
        }
        for (word, PortMatch { port, mask }) in
            [("sport", self.source_port), ("dport", self.destination_port)]
        {
            match mask {
                0 => {}
                u16::MAX => write!(f, " {word} {port}")?,
                mask => write!(f, " {word} {port} mask {mask:#x}")?,
            }
        }
        if self.ifindex != 0 {
            write!(f, " on the device {}", self.ifindex)?;
        }
        write!(f, " ({action})")
    }
}
