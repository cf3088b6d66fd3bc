//! Which addresses are endpoints, for hosts written down here; `messages` has the kernel's messages.

mod generated;
mod messages;

use std::net::Ipv4Addr;

use overlay_ebpf::abi::Endpoint;

use super::{
    Containers, Facts, Selection,
    facts::{Mac, Route, Side},
    find,
};
use crate::netlink::Link;

const UPLINK: u32 = 2;
const OVERLAY: u32 = 3;
const BRIDGE: u32 = 10;
const PORT_A: u32 = 11;
const PORT_B: u32 = 12;

/// A hardware address of a container.
fn mac(number: u8) -> Mac {
    [0x02, 0, 0, 0, 1, number]
}

/// The hardware address of a device of the host.
fn own_mac(index: u32) -> Mac {
    [0x02, 0, 0, 0, 0, index as u8]
}

fn address(last: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 244, 1, last)
}

fn device(index: u32, name: &str, kind: &str) -> Link {
    Link { mac: Some(own_mac(index)), kind: Some(kind.to_owned()), ..Link::ethernet(index, name) }
}

/// A veth of a container.
fn veth(index: u32) -> Link {
    Link { leads_elsewhere: true, lower: Some(2), ..device(index, &format!("veth{index}"), "veth") }
}

/// A veth of a container at the bridge.
fn port(index: u32) -> Link {
    Link { controller: Some(BRIDGE), ..veth(index) }
}

fn selection(named: &[&str]) -> Selection {
    Selection {
        subnet: "10.244.1.0/24".parse().unwrap(),
        excluded: [UPLINK, OVERLAY].into(),
        own_clsact: false,
        named: named.iter().map(|name| (*name).to_owned()).collect(),
    }
}

impl Facts {
    /// A host with an uplink and an overlay device, without containers.
    fn host() -> Self {
        let mut facts = Self::empty("10.244.1.0/24".parse().unwrap());
        facts.link(Link { loopback: true, ..Link::ethernet(1, "lo") });
        facts.link(Link::ethernet(UPLINK, "eth0"));
        facts.link(Link { ethernet: false, mac: None, ..device(OVERLAY, "ovl0", "tun") });
        facts.addresses.insert((OVERLAY, "10.244.1.0/32".parse().unwrap()));
        facts.route("0.0.0.0/0", 0, None);
        facts.route("10.244.0.0/16", 0, Some(OVERLAY));
        // The agent's own, which keeps packets for containers that are gone from the overlay.
        facts.route("10.244.1.0/24", u32::MAX, None);
        facts
    }

    /// With the bridge, and two containers at it: address 2 at the first port, address 3 at the second.
    fn bridge() -> Self {
        let mut facts = Self::host();
        facts.link(device(BRIDGE, "cni0", "bridge"));
        facts.addresses.insert((BRIDGE, "10.244.1.1/24".parse().unwrap()));
        facts.route("10.244.1.0/24", 0, Some(BRIDGE));
        for (index, number) in [(PORT_A, 2), (PORT_B, 3)] {
            facts.link(port(index));
            facts.neighbour(BRIDGE, number, mac(number));
            facts.fdb.insert((BRIDGE, mac(number)), index);
        }
        facts
    }

    /// With two containers at veths of their own.
    fn routed() -> Self {
        let mut facts = Self::host();
        for (index, number) in [(21, 2), (22, 3)] {
            facts.link(veth(index));
            facts.route(&format!("10.244.1.{number}/32"), 0, Some(index));
            facts.neighbour(index, number, mac(number));
        }
        facts
    }

    fn link(&mut self, link: Link) {
        self.links.insert(link.index, link);
    }

    fn route(&mut self, destination: &str, metric: u32, device: Option<u32>) {
        self.routes.push(Route { destination: destination.parse().unwrap(), metric, device });
    }

    fn neighbour(&mut self, device: u32, last: u8, mac: Mac) {
        self.neighbours.insert((device, address(last)), mac);
    }

    fn change(&mut self, index: u32, change: impl FnOnce(&mut Link)) {
        change(self.links.get_mut(&index).unwrap());
    }

    fn find(&self) -> Containers {
        find(self, &selection(&[]))
    }

    /// The endpoints in short: the last octet of the address and the index of the device.
    fn endpoints(&self) -> Vec<(u8, u32)> {
        self.find().short()
    }
}

impl Containers {
    fn short(&self) -> Vec<(u8, u32)> {
        self.endpoints.iter().map(|(address, endpoint)| (address.octets()[3], endpoint.ifindex)).collect()
    }

    fn arrivals(&self) -> Vec<u32> {
        self.arrivals.keys().copied().collect()
    }

    fn gateways(&self) -> Vec<u32> {
        self.gateways.keys().copied().collect()
    }
}

#[test]
fn containers_at_a_bridge_are_reached_at_their_ports() {
    let found = Facts::bridge().find();
    let endpoint = |ifindex, number| Endpoint {
        ifindex,
        mac: mac(number),
        gateway_mac: own_mac(BRIDGE),
        flags: Endpoint::PEER,
    };
    assert_eq!(
        found.endpoints,
        [(address(2), endpoint(PORT_A, 2)), (address(3), endpoint(PORT_B, 3))].into()
    );
    assert_eq!((found.arrivals(), found.gateways()), (vec![PORT_A, PORT_B], vec![BRIDGE]));
    assert_eq!(found.skipped, [""; 0]);
}

#[test]
fn containers_at_routed_veths_are_reached_there() {
    let found = Facts::routed().find();
    let endpoint = |ifindex, number| Endpoint {
        ifindex,
        mac: mac(number),
        gateway_mac: own_mac(ifindex),
        flags: Endpoint::PEER,
    };
    assert_eq!(found.endpoints, [(address(2), endpoint(21, 2)), (address(3), endpoint(22, 3))].into());
    assert_eq!((found.arrivals(), found.gateways()), (vec![21, 22], vec![21, 22]));
    assert_eq!(found.skipped, [""; 0]);
}

#[test]
fn a_veth_with_the_gateway_address_is_found_without_routes_to_containers() {
    let mut facts = Facts::host();
    facts.link(veth(21));
    facts.addresses.insert((21, "10.244.1.1/24".parse().unwrap()));
    assert_eq!(facts.find().arrivals(), [21]);
    facts.route("10.244.1.0/24", 0, Some(21));
    facts.neighbour(21, 9, mac(9));
    assert_eq!(facts.endpoints(), [(9, 21)]);
}

#[test]
fn a_host_without_containers_has_none() {
    assert_eq!(Facts::host().find(), Containers::default());
}

#[test]
fn a_neighbour_where_the_route_does_not_lead_is_ignored() {
    let mut facts = Facts::routed();
    // The container at 22 claims the other's address.
    facts.neighbour(22, 2, mac(3));
    assert_eq!(facts.endpoints(), [(2, 21), (3, 22)]);
    facts.neighbours.remove(&(21, address(2)));
    assert_eq!(facts.endpoints(), [(3, 22)]);

    let mut facts = Facts::bridge();
    facts.link(veth(21));
    facts.route("10.244.1.7/32", 0, Some(21));
    facts.neighbour(BRIDGE, 7, mac(2));
    assert_eq!(facts.endpoints(), [(2, PORT_A), (3, PORT_B)]);
}

#[test]
fn the_route_with_the_longest_prefix_and_then_the_lowest_metric_decides() {
    for (destination, metric, device, endpoints) in [
        ("10.244.1.2/32", 0, None, vec![(3, PORT_B)]),
        ("10.244.1.2/32", 0, Some(OVERLAY), vec![(3, PORT_B)]),
        ("10.244.1.2/32", 5, Some(BRIDGE), vec![(2, PORT_A), (3, PORT_B)]),
        ("10.244.1.0/25", 4000, None, vec![]),
        ("10.244.1.128/25", 0, None, vec![(2, PORT_A), (3, PORT_B)]),
        ("10.244.1.0/24", 1, Some(UPLINK), vec![(2, PORT_A), (3, PORT_B)]),
        ("10.244.0.0/23", 0, None, vec![(2, PORT_A), (3, PORT_B)]),
        // The first of equal routes counts.
        ("10.244.1.0/24", 0, None, vec![(2, PORT_A), (3, PORT_B)]),
    ] {
        let mut facts = Facts::bridge();
        facts.route(destination, metric, device);
        assert_eq!(facts.endpoints(), endpoints, "{destination} metric {metric} to {device:?}");
    }
    let mut facts = Facts::bridge();
    let route = facts.routes.iter_mut().find(|route| route.device == Some(BRIDGE)).unwrap();
    route.metric = 7;
    facts.route("10.244.1.0/24", 6, None);
    assert_eq!(facts.endpoints(), []);
}

#[test]
fn own_and_shared_addresses_are_no_endpoints() {
    let mut facts = Facts::bridge();
    for last in [0, 1, 255, 254] {
        facts.neighbour(BRIDGE, last, mac(2));
    }
    assert_eq!(facts.endpoints(), [(2, PORT_A), (3, PORT_B), (254, PORT_A)]);
    // An address of another device of this host.
    facts.addresses.insert((1, "10.244.1.254/32".parse().unwrap()));
    assert_eq!(facts.endpoints(), [(2, PORT_A), (3, PORT_B)]);
    // On a link between two, the last address is no broadcast address.
    let mut facts = Facts::routed();
    facts.addresses.insert((21, "10.244.1.4/31".parse().unwrap()));
    facts.route("10.244.1.4/31", 0, Some(21));
    facts.neighbour(21, 5, mac(2));
    assert_eq!(facts.endpoints(), [(2, 21), (3, 22), (5, 21)]);
}

#[test]
fn a_container_follows_its_hardware_address_from_port_to_port() {
    let mut facts = Facts::bridge();
    facts.fdb.insert((BRIDGE, mac(2)), PORT_B);
    assert_eq!(facts.endpoints(), [(2, PORT_B), (3, PORT_B)]);
    // Not yet learned, or aged.
    facts.fdb.remove(&(BRIDGE, mac(2)));
    assert_eq!(facts.endpoints(), [(3, PORT_B)]);
    // Known to another bridge only.
    facts.fdb.insert((99, mac(2)), PORT_A);
    assert_eq!(facts.endpoints(), [(3, PORT_B)]);
}

#[test]
fn a_new_container_with_an_old_address_replaces_the_old_one() {
    let mut facts = Facts::bridge();
    facts.neighbour(BRIDGE, 2, mac(9));
    assert_eq!(facts.endpoints(), [(3, PORT_B)]);
    facts.fdb.insert((BRIDGE, mac(9)), PORT_A);
    let found = facts.find();
    assert_eq!(found.endpoints[&address(2)].mac, mac(9));
    // Several addresses of one container.
    facts.neighbour(BRIDGE, 77, mac(9));
    assert_eq!(facts.endpoints(), [(2, PORT_A), (3, PORT_B), (77, PORT_A)]);
}

#[test]
fn only_running_devices_have_endpoints() {
    type Change = fn(&mut Link);
    let changes: [Change; 2] = [|link| link.up = false, |link| link.carrier = false];
    for change in changes {
        let mut facts = Facts::bridge();
        facts.change(PORT_A, change);
        assert_eq!(facts.endpoints(), [(3, PORT_B)]);
        // Programs stay attached.
        assert_eq!(facts.find().arrivals(), [PORT_A, PORT_B]);
        facts.change(BRIDGE, change);
        assert_eq!(facts.endpoints(), []);
        let mut facts = Facts::routed();
        facts.change(21, change);
        assert_eq!(facts.endpoints(), [(3, 22)]);
        assert_eq!(facts.find().arrivals(), [21, 22]);
    }
}

#[test]
fn a_port_that_left_the_bridge_or_the_host_is_not_used() {
    for controller in [None, Some(99)] {
        let mut facts = Facts::bridge();
        facts.change(PORT_A, |link| link.controller = controller);
        assert_eq!(facts.endpoints(), [(3, PORT_B)]);
        assert_eq!(facts.find().arrivals(), [PORT_B]);
    }
    let mut facts = Facts::bridge();
    facts.links.remove(&PORT_A);
    assert_eq!(facts.endpoints(), [(3, PORT_B)]);
    facts.links.remove(&BRIDGE);
    let found = facts.find();
    assert_eq!((found.short(), found.arrivals(), found.gateways()), (vec![], vec![], vec![]));
}

#[test]
fn a_tap_has_no_other_end() {
    let mut facts = Facts::bridge();
    facts.link(Link { controller: Some(BRIDGE), ..device(PORT_A, "tap0", "tun") });
    let found = facts.find();
    assert_eq!(found.short(), [(2, PORT_A), (3, PORT_B)]);
    assert_eq!(found.endpoints[&address(2)].flags, 0);
    assert_eq!(found.endpoints[&address(3)].flags, Endpoint::PEER);
}

#[test]
fn ports_that_may_lead_to_several_machines_are_left_out() {
    let hardware = Link { kind: None, ..device(PORT_A, "eth7", "") };
    let kinds = ["vxlan", "bond", "vlan", "bridge", "macvlan", "geneve", "netkit"];
    let others = kinds.map(|kind| device(PORT_A, "other", kind));
    // The other end is in this namespace, perhaps the port of another bridge.
    let nested = Link { leads_elsewhere: false, ..veth(PORT_A) };
    for link in others.into_iter().chain([hardware, nested]) {
        let mut facts = Facts::bridge();
        facts.link(Link { controller: Some(BRIDGE), ..link.clone() });
        let found = facts.find();
        assert_eq!((found.short(), found.arrivals()), (vec![(3, PORT_B)], vec![PORT_B]), "{link:?}");
        assert_eq!(found.skipped.len(), 1);
        assert!(found.skipped[0].starts_with(&format!("{}: a port of a bridge", link.name)));
    }
}

#[test]
fn a_bridge_that_filters_vlans_is_left_out() {
    let mut facts = Facts::bridge();
    facts.change(BRIDGE, |link| link.vlan_filtering = true);
    for named in [&[][..], &["cni0"], &["veth11"]] {
        let found = find(&facts, &selection(named));
        assert_eq!(found.skipped, ["cni0: the bridge filters VLANs, which the bypass would not do"]);
        assert_eq!(Containers { skipped: vec![], ..found }, Containers::default());
    }
}

#[test]
fn hardware_addresses_of_groups_and_zero_are_refused() {
    for bad in [[0; 6], [0xff; 6], [0x01, 0, 0x5e, 0, 0, 1]] {
        let mut facts = Facts::bridge();
        facts.neighbour(BRIDGE, 2, bad);
        facts.fdb.insert((BRIDGE, bad), PORT_A);
        assert_eq!(facts.endpoints(), [(3, PORT_B)]);
        let mut facts = Facts::routed();
        facts.neighbour(21, 2, bad);
        facts.change(22, |link| link.mac = Some(bad));
        assert_eq!(facts.endpoints(), []);
    }
    let mut facts = Facts::bridge();
    facts.change(BRIDGE, |link| link.mac = None);
    assert_eq!(facts.endpoints(), []);
}

#[test]
fn excluded_and_unsuitable_devices_are_never_used() {
    let mut facts = Facts::host();
    for device in [UPLINK, OVERLAY, 1] {
        facts.addresses.insert((device, "10.244.1.1/24".parse().unwrap()));
        facts.route("10.244.1.4/30", 0, Some(device));
        facts.neighbour(device, 5, mac(5));
    }
    assert_eq!(facts.find(), Containers::default());
    let found = find(&facts, &selection(&["eth0", "ovl0", "lo", "gone"]));
    assert_eq!(
        found.skipped,
        [
            "eth0: belongs to the overlay or the underlay",
            "gone: no device has such a name",
            "lo: is no Ethernet device",
            "ovl0: belongs to the overlay or the underlay"
        ]
    );
    assert_eq!(Containers { skipped: vec![], ..found }, Containers::default());
    // The uplink as a port, and a veth whose other end is an underlay.
    let mut facts = Facts::bridge();
    let excluded = Selection { excluded: [PORT_A].into(), ..selection(&[]) };
    let found = find(&facts, &excluded);
    assert_eq!((found.short(), found.arrivals(), found.skipped), (vec![(3, PORT_B)], vec![PORT_B], vec![]));
    facts.link(Link { controller: Some(BRIDGE), ..Link::ethernet(UPLINK, "eth0") });
    assert_eq!(facts.find().skipped, [""; 0]);
}

#[test]
fn other_devices_than_veths_are_used_only_when_named() {
    let mut facts = Facts::host();
    for (index, kind) in [(21, "macvlan"), (22, "dummy")] {
        facts.link(device(index, kind, kind));
        facts.addresses.insert((index, "10.244.1.1/32".parse().unwrap()));
    }
    facts.route("10.244.1.8/29", 0, Some(21));
    facts.neighbour(21, 9, mac(9));
    let found = facts.find();
    assert_eq!((found.short(), found.gateways(), found.skipped.len()), (vec![], vec![], 2));
    let found = find(&facts, &selection(&["macvlan"]));
    assert_eq!((found.short(), found.gateways(), found.skipped.len()), (vec![(9, 21)], vec![21], 0));
    assert_eq!(found.endpoints[&address(9)].flags, 0);
}

#[test]
fn names_choose_devices() {
    let facts = {
        let mut facts = Facts::bridge();
        facts.link(veth(21));
        facts.route("10.244.1.7/32", 0, Some(21));
        facts.neighbour(21, 7, mac(7));
        facts
    };
    for (named, endpoints, arrivals, gateways) in [
        (&["cni0"][..], vec![(2, PORT_A), (3, PORT_B)], vec![PORT_A, PORT_B], vec![BRIDGE]),
        (&["veth21"], vec![(7, 21)], vec![21], vec![21]),
        // Some ports of a bridge.
        (&["veth12"], vec![(3, PORT_B)], vec![PORT_B], vec![BRIDGE]),
        (&["veth1*"], vec![(2, PORT_A), (3, PORT_B)], vec![PORT_A, PORT_B], vec![BRIDGE]),
        (&["veth12", "cni*"], vec![(2, PORT_A), (3, PORT_B)], vec![PORT_A, PORT_B], vec![BRIDGE]),
        (&["cni0", "veth12"], vec![(2, PORT_A), (3, PORT_B)], vec![PORT_A, PORT_B], vec![BRIDGE]),
        (&["*"], vec![(2, PORT_A), (3, PORT_B), (7, 21)], vec![PORT_A, PORT_B, 21], vec![BRIDGE, 21]),
    ] {
        let found = find(&facts, &selection(named));
        assert_eq!(
            (found.short(), found.arrivals(), found.gateways()),
            (endpoints, arrivals, gateways),
            "{named:?}"
        );
        assert_eq!(found.skipped, [""; 0]);
    }
    assert_eq!(
        find(&facts, &selection(&["eni*", "veth"])).skipped,
        ["eni*: no device has such a name", "veth: no device has such a name"]
    );
}

#[test]
fn a_route_to_a_port_is_reported() {
    let mut facts = Facts::bridge();
    facts.route("10.244.1.8/32", 0, Some(PORT_A));
    facts.neighbour(PORT_A, 8, mac(2));
    let found = facts.find();
    assert_eq!(found.short(), [(2, PORT_A), (3, PORT_B)]);
    assert!(found.skipped[0].starts_with("veth11: has an address or route"));
}

#[test]
fn what_changes_while_programs_are_attached_is_left_out() {
    let mut facts = Facts::bridge();
    let before = facts.find();
    for index in [BRIDGE, PORT_B] {
        facts.change(index, |link| (link.mtu, link.alias) = (1400, Some("x".to_owned())));
    }
    assert_eq!(facts.find(), before);
}

#[test]
fn devices_with_traffic_control_are_left_to_the_stack() {
    let mut facts = Facts::bridge();
    facts.traffic_control.insert((PORT_A, Side::Egress), "tbf".to_owned());
    let found = facts.find();
    assert_eq!((found.short(), found.arrivals()), (vec![(3, PORT_B)], vec![PORT_B]));
    assert_eq!(found.skipped, ["veth11: has traffic control (tbf), which the bypass would skip"]);
    facts.traffic_control.insert((BRIDGE, Side::Ingress), "ingress".to_owned());
    assert!(facts.find().gateways().is_empty());
    let mut facts = Facts::routed();
    facts.traffic_control.insert((21, Side::Ingress), "clsact".to_owned());
    assert_eq!(facts.endpoints(), [(3, 22)]);
    for named in [&["veth21"][..], &["veth*"]] {
        assert!(!find(&facts, &selection(named)).arrivals().contains(&21), "{named:?}");
    }
    let own_clsact = Selection { own_clsact: true, ..selection(&[]) };
    assert_eq!(find(&facts, &own_clsact).short(), [(2, 21), (3, 22)]);
}
