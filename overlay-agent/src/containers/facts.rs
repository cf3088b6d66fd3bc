//! The kernel's state that decides where containers are, listed once and then kept by the kernel's messages.
//!
//! Entries that cannot matter are not kept: addresses, routes and neighbours outside of the subnet, neighbours without a valid
//! hardware address. So a message about them, or about the age of an entry, changes nothing.
#![allow(
    clippy::wildcard_enum_match_arm,
    reason = "the kernel adds messages and attributes; only a few are read"
)]

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
};

use anyhow::Result;
use ipnet::Ipv4Net;
use rtnetlink::packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::AddressMessage,
    link::LinkMessage,
    neighbour::{NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState},
    route::{RouteAttribute, RouteHeader, RouteMessage, RouteType},
    tc::{TcAttribute, TcHandle, TcMessage},
};

pub(super) use crate::neighbour::Mac;
use crate::{
    neighbour,
    netlink::{self, Link, Netlink, attribute},
};

/// Devices of this host, and the addresses, routes and neighbours of one subnet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    pub(super) subnet: Ipv4Net,
    pub(super) links: BTreeMap<u32, Link>,
    /// Addresses of this host in the subnet, with the index of their device.
    pub(super) addresses: BTreeSet<(u32, Ipv4Net)>,
    /// Routes of the main table that overlap the subnet, in the kernel's order.
    pub(super) routes: Vec<Route>,
    /// Hardware addresses of neighbours, by device and address.
    pub(super) neighbours: BTreeMap<(u32, Ipv4Addr), Mac>,
    /// Neighbours of which the kernel has not heard for a while. It checks whether they are still there when it has a packet for them;
    /// packets that bypass it do not count.
    pub(super) stale: BTreeSet<(u32, Ipv4Addr)>,
    /// Ports of bridges, by bridge and the hardware address behind the port. Neither the bridges' own addresses nor those of VLANs.
    pub(super) fdb: BTreeMap<(u32, Mac), u32>,
    /// Traffic control that packets of a device have to pass, by device and side: the kind of a queueing discipline.
    pub(super) traffic_control: BTreeMap<(u32, Side), String>,
}

/// A side of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Side {
    /// Packets that it transmits.
    Egress,
    /// Packets that it receives, or both with `clsact`.
    Ingress,
}

/// Queueing disciplines that the kernel takes by itself, and that only order packets.
const QUEUES: [&str; 6] = ["noqueue", "pfifo", "pfifo_fast", "fq", "fq_codel", "mq"];

/// A route of the main table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Route {
    pub(super) destination: Ipv4Net,
    /// The lowest is preferred.
    pub(super) metric: u32,
    /// The device on which the destinations themselves are neighbours. `None` when there is a gateway between, when packets go
    /// several ways or none, or when the route is for some packets only.
    pub(super) device: Option<u32>,
}

/// The effect of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Effect {
    /// Nothing that is kept differs.
    None,
    /// Something is different now.
    Changed,
    /// Routes may be different: the kernel removes routes of a device or an address without a message, so they have to be listed.
    Routes,
}

impl From<bool> for Effect {
    fn from(changed: bool) -> Self {
        if changed { Self::Changed } else { Self::None }
    }
}

impl Facts {
    /// No facts about a subnet.
    pub(super) fn empty(subnet: Ipv4Net) -> Self {
        Self {
            subnet: subnet.trunc(),
            links: BTreeMap::new(),
            addresses: BTreeSet::new(),
            routes: Vec::new(),
            neighbours: BTreeMap::new(),
            stale: BTreeSet::new(),
            fdb: BTreeMap::new(),
            traffic_control: BTreeMap::new(),
        }
    }

    /// Lists them. Fails when the kernel returns an error. The lists are made one after another and may disagree with each other.
    pub async fn read(netlink: &Netlink, subnet: Ipv4Net) -> Result<Self> {
        let mut facts = Self::empty(subnet);
        facts.links = netlink.links().await?.into_iter().map(|link| (link.index, link)).collect();
        let addresses = netlink.addresses().await?;
        facts.addresses = addresses.into_iter().filter(|(_, net)| subnet.contains(&net.addr())).collect();
        facts.read_routes(netlink).await?;
        for family in [AddressFamily::Inet, AddressFamily::Bridge] {
            for message in netlink.neighbour_messages(family).await? {
                facts.set_neighbour(&message);
            }
        }
        for message in netlink.qdisc_messages().await? {
            facts.set_qdisc(&message);
        }
        Ok(facts)
    }

    /// Lists the routes again. Fails when the kernel returns an error.
    pub(super) async fn read_routes(&mut self, netlink: &Netlink) -> Result<()> {
        let messages = netlink.route_messages().await?;
        self.routes = messages.iter().filter_map(|message| self.route_in(message)).collect();
        Ok(())
    }

    /// Makes the change that a message of the kernel reports.
    pub(super) fn apply(&mut self, message: &RouteNetlinkMessage) -> Effect {
        match message {
            RouteNetlinkMessage::NewLink(message) => self.set_link(message),
            RouteNetlinkMessage::DelLink(message) => self.remove_link(message),
            RouteNetlinkMessage::NewAddress(message) => self.set_address(message),
            RouteNetlinkMessage::DelAddress(message) => self.remove_address(message),
            RouteNetlinkMessage::NewNeighbour(message) => self.set_neighbour(message).into(),
            RouteNetlinkMessage::DelNeighbour(message) => self.remove_neighbour(message).into(),
            RouteNetlinkMessage::NewQueueDiscipline(message) => self.set_qdisc(message).into(),
            RouteNetlinkMessage::DelQueueDiscipline(message) => self.remove_qdisc(message).into(),
            RouteNetlinkMessage::NewRoute(message) | RouteNetlinkMessage::DelRoute(message) => {
                if self.route_in(message).is_some() { Effect::Routes } else { Effect::None }
            }
            _ => Effect::None,
        }
    }

    fn set_link(&mut self, message: &LinkMessage) -> Effect {
        if is_about_port(message) {
            return Effect::None;
        }
        let Some(link) = netlink::link(message) else { return Effect::None };
        let up = link.up;
        let before = self.links.insert(link.index, link);
        match before {
            Some(before) if before.up != up => Effect::Routes,
            before => (before.as_ref() != self.links.get(&message.header.index)).into(),
        }
    }

    /// Removes a device and all that refers to it: the messages about those follow later, or never.
    fn remove_link(&mut self, message: &LinkMessage) -> Effect {
        let index = message.header.index;
        if is_about_port(message) || self.links.remove(&index).is_none() {
            return Effect::None;
        }
        self.addresses.retain(|(device, _)| *device != index);
        self.routes.retain(|route| route.device != Some(index));
        self.neighbours.retain(|(device, _), _| *device != index);
        self.traffic_control.retain(|(device, _), _| *device != index);
        self.stale.retain(|(device, _)| *device != index);
        self.fdb.retain(|(bridge, _), port| *bridge != index && *port != index);
        Effect::Routes
    }

    fn set_address(&mut self, message: &AddressMessage) -> Effect {
        match self.address(message) {
            Some(address) => self.addresses.insert(address).into(),
            None => Effect::None,
        }
    }

    fn remove_address(&mut self, message: &AddressMessage) -> Effect {
        if let Some(address) = self.address(message) {
            self.addresses.remove(&address);
        }
        // It may have been the source address of routes.
        Effect::Routes
    }

    fn address(&self, message: &AddressMessage) -> Option<(u32, Ipv4Net)> {
        let address = netlink::address(message).filter(|net| self.subnet.contains(&net.addr()))?;
        Some((message.header.index, address))
    }

    /// A route of the main table that matters for the subnet.
    pub(super) fn route_in(&self, message: &RouteMessage) -> Option<Route> {
        let header = &message.header;
        if header.address_family != AddressFamily::Inet || header.table != RouteHeader::RT_TABLE_MAIN {
            return None;
        }
        let destination = netlink::destination(message)?;
        if !destination.contains(&self.subnet) && !self.subnet.contains(&destination) {
            return None;
        }
        let metric = attribute!(message.attributes, RouteAttribute::Priority(metric) => *metric).unwrap_or(0);
        let is_indirect = attribute!(message.attributes, RouteAttribute::Gateway(_)
            | RouteAttribute::Via(_)
            | RouteAttribute::MultiPath(_)
            | RouteAttribute::Encap(_) => ())
        .is_some();
        let is_direct = header.kind == RouteType::Unicast && header.tos == 0 && !is_indirect;
        let device = netlink::device(message).filter(|_| is_direct);
        Some(Route { destination, metric, device })
    }

    fn set_qdisc(&mut self, message: &TcMessage) -> bool {
        match qdisc(message) {
            Some((key, kind)) if QUEUES.contains(&kind) => self.traffic_control.remove(&key).is_some(),
            Some((key, kind)) => {
                self.traffic_control.insert(key, kind.to_owned()).is_none_or(|before| before != kind)
            }
            None => false,
        }
    }

    fn remove_qdisc(&mut self, message: &TcMessage) -> bool {
        // The message about one that replaces it comes first, or later.
        let gone = qdisc(message)
            .filter(|(key, kind)| self.traffic_control.get(key).is_some_and(|present| present == kind));
        gone.is_some_and(|(key, _)| self.traffic_control.remove(&key).is_some())
    }

    fn set_neighbour(&mut self, message: &NeighbourMessage) -> bool {
        let neighbour = Neighbour::of(message, self.subnet);
        if let Some(Neighbour::Ip { key, .. }) = neighbour {
            match message.header.state {
                NeighbourState::Stale => self.stale.insert(key),
                _ => self.stale.remove(&key),
            };
        }
        match neighbour {
            Some(Neighbour::Ip { key, mac: Some(mac) }) => self.neighbours.insert(key, mac) != Some(mac),
            Some(Neighbour::Ip { key, mac: None }) => self.neighbours.remove(&key).is_some(),
            Some(Neighbour::Bridge { key, port: Some(port) }) => self.fdb.insert(key, port) != Some(port),
            Some(Neighbour::Bridge { key, port: None }) => self.fdb.remove(&key).is_some(),
            None => false,
        }
    }

    fn remove_neighbour(&mut self, message: &NeighbourMessage) -> bool {
        match Neighbour::of(message, self.subnet) {
            Some(Neighbour::Ip { key, .. }) => {
                self.stale.remove(&key);
                self.neighbours.remove(&key).is_some()
            }
            Some(Neighbour::Bridge { key, .. }) => self.fdb.remove(&key).is_some(),
            None => false,
        }
    }
}

/// The device, side and kind of a queueing discipline; `None` for one inside of another.
fn qdisc(message: &TcMessage) -> Option<((u32, Side), &str)> {
    let side = match message.header.parent {
        TcHandle::ROOT => Side::Egress,
        TcHandle::INGRESS => Side::Ingress,
        _ => return None,
    };
    let kind = attribute!(message.attributes, TcAttribute::Kind(kind) => kind.as_str())?;
    Some(((u32::try_from(message.header.index).ok()?, side), kind))
}

/// Bridges send messages of their own about their ports: one that a device is gone means that it is no port any more.
fn is_about_port(message: &LinkMessage) -> bool {
    message.header.interface_family == AddressFamily::Bridge
}

/// An entry of a neighbour table.
enum Neighbour {
    /// An IPv4 neighbour, without hardware address when the entry is not valid.
    Ip { key: (u32, Ipv4Addr), mac: Option<Mac> },
    /// A hardware address in a bridge's table, without port when it is an address of the bridge or its ports.
    Bridge { key: (u32, Mac), port: Option<u32> },
}

impl Neighbour {
    fn of(message: &NeighbourMessage, subnet: Ipv4Net) -> Option<Self> {
        if let Some(neighbour) = neighbour::Neighbour::of(message) {
            let key = (neighbour.ifindex, neighbour.address);
            return subnet.contains(&neighbour.address).then_some(Self::Ip { key, mac: neighbour.mac() });
        }
        let (header, attributes) = (&message.header, &message.attributes);
        let mac = attribute!(attributes, NeighbourAttribute::LinkLayerAddress(mac) => mac.as_slice());
        let mac = mac.and_then(|mac| Mac::try_from(mac).ok());
        match header.family {
            // Entries with the flag belong to the device itself, such as the remote hosts of a VXLAN device.
            AddressFamily::Bridge if !header.flags.contains(NeighbourFlags::Own) => {
                let bridge = attribute!(attributes, NeighbourAttribute::Controller(bridge) => *bridge)?;
                let has_vlan = attribute!(attributes, NeighbourAttribute::Vlan(_) => ()).is_some();
                let is_local = header.state == NeighbourState::Permanent;
                let port = (!is_local).then_some(header.ifindex);
                (!has_vlan).then_some(Self::Bridge { key: (bridge, mac?), port })
            }
            _ => None,
        }
    }
}
