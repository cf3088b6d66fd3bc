//! Entries of the kernel's IPv4 neighbour table.

use std::net::Ipv4Addr;

use rtnetlink::packet_route::{
    AddressFamily,
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState},
};

use crate::netlink::attribute;

/// A hardware address of Ethernet.
pub(crate) type Mac = [u8; 6];

/// An IPv4 neighbour of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Neighbour {
    /// Index of the device.
    pub(crate) ifindex: u32,
    pub(crate) address: Ipv4Addr,
    mac: Option<Mac>,
    state: NeighbourState,
}

impl Neighbour {
    /// The entry that a message is about; `None` for other families, and for addresses that this host answers for (proxy ARP).
    pub(crate) fn of(message: &NeighbourMessage) -> Option<Self> {
        let (header, attributes) = (&message.header, &message.attributes);
        if header.family != AddressFamily::Inet || header.flags.contains(NeighbourFlags::Proxy) {
            return None;
        }
        let address = attribute!(attributes,
            NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) => *address)?;
        let mac = attribute!(attributes, NeighbourAttribute::LinkLayerAddress(mac) => mac.as_slice());
        let mac = mac.and_then(|mac| Mac::try_from(mac).ok());
        Some(Self { ifindex: header.ifindex, address, mac, state: header.state })
    }

    /// The hardware address, if the kernel would send to it.
    pub(crate) fn mac(&self) -> Option<Mac> {
        self.mac.filter(|_| self.is_checked() || self.state == NeighbourState::Stale)
    }

    /// The hardware address, if the kernel would send to it and checks without further packets that it is still right: a timer runs
    /// that ends in another state, or the entry is an operator's.
    pub(crate) fn checked_mac(&self) -> Option<Mac> {
        self.mac.filter(|_| self.is_checked())
    }

    fn is_checked(&self) -> bool {
        matches!(
            self.state,
            NeighbourState::Reachable
                | NeighbourState::Delay
                | NeighbourState::Probe
                | NeighbourState::Permanent
        )
    }
}
