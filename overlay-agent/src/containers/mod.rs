//! Finds the containers of this host, for the shortcut past the host's stack (`--bypass`).
//!
//! `facts` is what the kernel says, [`find`] derives the containers from that, and `watch` does so again after changes. The
//! kernel's own routes, neighbours and bridge tables decide: an address is an endpoint only where the kernel itself would hand
//! packets for it to the same port with the same hardware address.

mod facts;
mod gateways;
#[cfg(test)]
mod tests;
mod watch;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
};

use ipnet::Ipv4Net;
use overlay_ebpf::abi::Endpoint;

pub use self::{facts::Facts, watch::watch};
use self::{
    facts::{Mac, Route},
    gateways::Gateways,
};
use crate::netlink::Link;

/// The devices in which to look for containers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Selection {
    /// The subnet of this host.
    pub subnet: Ipv4Net,
    /// Indexes of devices that are none of containers: those of the overlay and of the underlay.
    pub excluded: BTreeSet<u32>,
    /// Whether the programs themselves are filters of `clsact` queueing disciplines, so that one says nothing about other programs.
    pub own_clsact: bool,
    /// Names of devices; a trailing `*` stands for any characters. Empty: all that the subnet's addresses and routes lead to.
    pub named: Vec<String>,
}

/// The containers of this host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Containers {
    /// How to reach each container, by its address.
    pub endpoints: BTreeMap<Ipv4Addr, Endpoint>,
    /// Devices on which packets of containers arrive, by index, without what may change while programs are attached: ports of
    /// bridges, and veths to which routes lead.
    pub arrivals: BTreeMap<u32, Link>,
    /// Devices to which the host hands packets for containers, likewise: bridges, and the same veths.
    pub gateways: BTreeMap<u32, Link>,
    /// Why devices were left out, in order, each reason once.
    pub skipped: Vec<String>,
}

/// Finds the containers. `facts` are those of the same subnet.
pub fn find(facts: &Facts, selection: &Selection) -> Containers {
    let gateways = Gateways::choose(facts, selection);
    let routes = RouteTable::new(&facts.routes);
    let own = own_addresses(facts);
    let endpoints = facts.neighbours.iter().filter_map(|((device, address), mac)| {
        let is_endpoint = !own.contains(address) && routes.device(*address) == Some(*device);
        let endpoint = if is_endpoint { endpoint(facts, &gateways, *device, *mac) } else { None };
        Some((*address, endpoint?))
    });
    Containers {
        endpoints: endpoints.collect(),
        arrivals: gateways.arrivals().map(|link| (link.index, link.identity())).collect(),
        gateways: gateways.devices().map(|link| (link.index, link.identity())).collect(),
        skipped: gateways.skipped(),
    }
}

/// The endpoint with a hardware address behind a gateway device.
fn endpoint(facts: &Facts, gateways: &Gateways<'_>, device: u32, mac: Mac) -> Option<Endpoint> {
    let gateway = gateways.get(device).filter(|link| is_running(link))?;
    let gateway_mac = gateway.mac.filter(is_unicast)?;
    let port = if gateways::is_bridge(gateway) { *facts.fdb.get(&(device, mac))? } else { device };
    let port = gateways.arrival(device, port).filter(|link| is_running(link))?;
    let flags = if gateways::is_container_veth(port) { Endpoint::PEER } else { 0 };
    is_unicast(&mac).then_some(Endpoint { ifindex: port.index, mac, gateway_mac, flags })
}

fn is_running(link: &Link) -> bool {
    link.up && link.carrier
}

/// Whether it is the address of one network card: the lowest bit of the first octet marks groups (IEEE 802).
fn is_unicast(mac: &Mac) -> bool {
    mac[0] & 1 == 0 && *mac != [0; 6]
}

/// This host's addresses, and those with which it reaches all hosts of a network (RFC 919, and the old form with zeros).
fn own_addresses(facts: &Facts) -> BTreeSet<Ipv4Addr> {
    let nets = facts.addresses.iter().map(|(_, net)| net);
    nets.flat_map(|net| {
        let shared = (net.prefix_len() <= 30).then(|| [net.network(), net.broadcast()]);
        shared.into_iter().flatten().chain([net.addr()])
    })
    .collect()
}

/// Routes by destination.
struct RouteTable<'a> {
    best: BTreeMap<Ipv4Net, &'a Route>,
    /// Longest first.
    lengths: Vec<u8>,
}

impl<'a> RouteTable<'a> {
    fn new(routes: &'a [Route]) -> Self {
        let mut best: BTreeMap<Ipv4Net, &Route> = BTreeMap::new();
        for route in routes {
            // Of several with the same metric, the kernel takes the first.
            let kept = best.entry(route.destination.trunc()).or_insert(route);
            if route.metric < kept.metric {
                *kept = route;
            }
        }
        let lengths: BTreeSet<u8> = best.keys().map(Ipv4Net::prefix_len).collect();
        Self { best, lengths: lengths.into_iter().rev().collect() }
    }

    /// The device on which an address is a neighbour, by the route with the longest prefix.
    fn device(&self, address: Ipv4Addr) -> Option<u32> {
        let net = |length: &u8| Ipv4Net::new(address, *length).ok();
        let nets = self.lengths.iter().filter_map(net);
        nets.into_iter().find_map(|net| self.best.get(&net.trunc()))?.device
    }
}
