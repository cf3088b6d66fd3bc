//! Finds peers whose packets do not reach the overlay device because another program's route or rule takes them.

use std::net::Ipv4Addr;

use anyhow::Result;

use crate::{
    device::DeviceSpec,
    netlink::{Netlink, Route, device_name},
    route::{Routes, Subnet, overlaps},
};

/// What takes packets for peers, as sentences with the remedy. `routes` are the kernel's, `index` is the overlay device's.
/// Fails when the kernel cannot be asked.
pub(super) async fn find<V>(
    netlink: &Netlink,
    routes: &[Route],
    index: u32,
    spec: &DeviceSpec,
    peers: &Routes<V>,
) -> Result<Vec<String>> {
    let name = |index| device_name(index).unwrap_or_else(|_| format!("device {index}"));
    let diverted = by_routes(routes, index, spec, peers).map(|(route, subnet)| {
        let (Route { destination, .. }, device) = (route, name(route.index));
        format!(
            "packets for {subnet} leave through {device} and not through {}: remove the route that takes them (ip route \
             delete {destination} dev {device})",
            spec.name
        )
    });
    let diverted: Vec<_> = diverted.collect();
    let Some(peer) = peers.keys().next().filter(|_| diverted.is_empty()) else { return Ok(diverted) };
    // Other tables and rules are found by asking for one packet: they seldom distinguish peers.
    let (from, to) = (spec.subnet.base(), peer.base());
    Ok(match netlink.route_between(from, to).await? {
        Some(hop) if hop.index == index => Vec::new(),
        Some(hop) => vec![by_rule(from, to, &format!("leave through {}", name(hop.index)), spec)],
        None => vec![by_rule(from, to, "have no route", spec)],
    })
}

fn by_rule(from: Ipv4Addr, to: Ipv4Addr, fate: &str, spec: &DeviceSpec) -> String {
    format!(
        "packets from {from} to {to} {fate} and not through {}: a rule or route of another program takes them (ip rule; ip route \
         get {to} from {from})",
        spec.name
    )
}

/// The routes inside the network, through other devices, that take packets for peers, each with the subnet of one such peer.
fn by_routes<'a, V>(
    routes: &'a [Route],
    index: u32,
    spec: &DeviceSpec,
    peers: &Routes<V>,
) -> impl Iterator<Item = (&'a Route, Subnet)> {
    let network = spec.alias.network;
    let is_inside =
        move |route: &&Route| network.contains(&route.destination) && route.destination != network;
    routes.iter().filter(move |route| route.index != index).filter(is_inside).filter_map(|route| {
        let subnet = Subnet::containing(route.destination);
        let (before, behind) = (peers.range(..=subnet).next_back(), peers.range(subnet..).next());
        let mut around = before.into_iter().chain(behind).map(|(peer, _)| *peer);
        around.find(|peer| overlaps(peer.prefix(), route.destination)).map(|peer| (route, peer))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{device::DeviceAlias, route::Peer};

    const OVERLAY: u32 = 9;

    #[test]
    fn routes_through_other_devices_that_take_packets_for_peers_are_found() {
        let alias = DeviceAlias {
            network: "10.244.0.0/16".parse().unwrap(),
            port: 8285,
            underlays: vec!["eth0".to_owned()],
        };
        let subnet = "10.244.1.0/24".parse().unwrap();
        let spec = DeviceSpec { name: "ovl0".to_owned(), alias, subnet, mtu: 1472 };
        let peer = Peer::from(Ipv4Addr::new(192, 168, 77, 2));
        let peers = Routes::from(["10.244.2.0/24", "10.244.8.0/22"].map(|net| (net.parse().unwrap(), peer)));
        for (destination, index, expected) in [
            ("10.244.0.0/16", OVERLAY, None),
            // The containers' bridge.
            ("10.244.1.0/24", 3, None),
            // Wider ones are not taken.
            ("10.244.0.0/15", 3, None),
            ("0.0.0.0/0", 3, None),
            // That of the whole network is repaired.
            ("10.244.0.0/16", 3, None),
            ("10.244.2.0/24", 3, Some("10.244.2.0/24")),
            ("10.244.2.0/24", OVERLAY, None),
            ("10.244.2.77/32", 3, Some("10.244.2.0/24")),
            ("10.244.3.0/24", 3, None),
            ("10.244.10.0/24", 3, Some("10.244.8.0/22")),
            ("10.244.0.0/17", 3, Some("10.244.2.0/24")),
            ("10.244.128.0/17", 3, None),
        ] {
            let routes = [Route { destination: destination.parse().unwrap(), index, metric: 0 }];
            let found: Vec<_> = by_routes(&routes, OVERLAY, &spec, &peers).map(|(_, peer)| peer).collect();
            let expected: Vec<Subnet> = expected.map(|net| net.parse().unwrap()).into_iter().collect();
            assert_eq!(found, expected, "{destination} through {index}");
        }
    }
}
