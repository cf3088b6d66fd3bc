//! Generated hosts: the endpoints are those that the plain definition of one gives.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

/// Devices of all sorts under few indexes, so that entries refer to right, wrong and missing ones.
fn link() -> impl Strategy<Value = Link> {
    let kinds = prop::sample::select(vec!["veth", "veth", "veth", "tun", "vxlan", "bridge"]);
    let controller = prop::option::of(prop::sample::select(vec![BRIDGE, BRIDGE, 20]));
    (11_u32..16, kinds, controller, prop::array::uniform4(prop::bool::weighted(0.85))).prop_map(
        |(index, kind, controller, [up, carrier, leads_elsewhere, ethernet])| Link {
            controller,
            up,
            carrier,
            leads_elsewhere,
            ethernet,
            ..device(index, &format!("d{index}"), kind)
        },
    )
}

fn indexes() -> impl Strategy<Value = u32> {
    prop::sample::select(vec![BRIDGE, BRIDGE, 11, 12, 13, 14, 15, 20])
}

prop_compose! {
    fn host()(
        links in prop::collection::vec(link(), 0..6),
        neighbours in prop::collection::vec((indexes(), 0_u8..8, 0_u8..5), 0..12),
        fdb in prop::collection::vec((prop::sample::select(vec![BRIDGE, 20]), 0_u8..5, 11_u32..16), 0..8),
        routes in prop::collection::vec((0_u8..8, 29_u8..33, 0_u32..3, prop::option::of(indexes())), 0..6),
        addresses in prop::collection::vec((indexes(), 0_u8..8, 29_u8..33), 0..2),
        filtering in prop::bool::weighted(0.1),
    ) -> Facts {
        let mut facts = Facts::host();
        facts.link(Link { vlan_filtering: filtering, ..device(BRIDGE, "cni0", "bridge") });
        facts.addresses.insert((BRIDGE, "10.244.1.1/24".parse().unwrap()));
        facts.route("10.244.1.0/24", 1, Some(BRIDGE));
        for link in links {
            facts.link(link);
        }
        for (device, last, number) in neighbours {
            facts.neighbour(device, last, mac(number));
        }
        facts.fdb.extend(fdb.into_iter().map(|(bridge, number, port)| ((bridge, mac(number)), port)));
        for (last, length, metric, device) in routes {
            facts.route(&format!("{}/{length}", address(last)), metric, device);
        }
        for (device, last, length) in addresses {
            facts.addresses.insert((device, format!("{}/{length}", address(last)).parse().unwrap()));
        }
        facts
    }
}

/// The endpoint at an address, straight from the definition.
fn expected(facts: &Facts, address: Ipv4Addr) -> Option<Endpoint> {
    let own = |net: &ipnet::Ipv4Net| {
        let shared = net.prefix_len() <= 30 && (address == net.network() || address == net.broadcast());
        address == net.addr() || shared
    };
    if facts.addresses.iter().any(|(_, net)| own(net)) {
        return None;
    }
    let routes = facts.routes.iter().filter(|route| route.destination.contains(&address));
    let best = routes.min_by_key(|route| (32 - route.destination.prefix_len(), route.metric))?;
    let device = best.device.filter(|device| ![UPLINK, OVERLAY].contains(device))?;
    let gateway = facts.links.get(&device)?;
    let mac = *facts.neighbours.get(&(device, address))?;
    let is_gateway = facts.addresses.iter().any(|(index, _)| *index == device)
        || facts
            .routes
            .iter()
            .any(|route| route.device == Some(device) && route.destination.prefix_len() >= 24);
    let is_bridge = gateway.kind.as_deref() == Some("bridge");
    let port = if is_bridge { facts.links.get(facts.fdb.get(&(device, mac))?)? } else { gateway };
    let at_bridge = |link: &Link| {
        let controller = link.controller.and_then(|index| facts.links.get(&index));
        controller.is_some_and(|controller| controller.kind.as_deref() == Some("bridge"))
    };
    let is_port = if is_bridge { port.controller == Some(device) } else { !at_bridge(port) };
    let is_veth = port.kind.as_deref() == Some("veth");
    let is_single = is_veth && port.leads_elsewhere || port.kind.as_deref() == Some("tun");
    let runs = [gateway, port].iter().all(|link| link.up && link.carrier && link.ethernet);
    (is_gateway && is_port && is_single && runs && !gateway.vlan_filtering).then(|| Endpoint {
        ifindex: port.index,
        mac,
        gateway_mac: gateway.mac.unwrap(),
        flags: u32::from(is_veth),
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn endpoints_are_those_of_the_definition(facts in host()) {
        let found = facts.find();
        let addresses: BTreeMap<_, _> =
            (0..=255).filter_map(|last| Some((address(last), expected(&facts, address(last))?))).collect();
        prop_assert_eq!(&found.endpoints, &addresses);
        for endpoint in found.endpoints.values() {
            prop_assert!(found.arrivals.contains_key(&endpoint.ifindex));
        }
    }
}
