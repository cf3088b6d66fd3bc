//! What messages of the kernel change, given as the bytes that the kernel sends.

use nix::libc::{
    AF_BRIDGE, AF_INET, AF_UNSPEC, IFF_LOWER_UP, IFF_UP, RTM_DELADDR, RTM_DELLINK, RTM_DELNEIGH,
    RTM_DELQDISC, RTM_DELROUTE, RTM_NEWADDR, RTM_NEWLINK, RTM_NEWNEIGH, RTM_NEWQDISC, RTM_NEWROUTE,
};
use proptest::prelude::*;
use rtnetlink::{
    packet_core::{NetlinkMessage, NetlinkPayload},
    packet_route::RouteNetlinkMessage,
};

use super::{super::facts::Effect, *};

// linux/neighbour.h
const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
const NDA_VLAN: u16 = 5;
const NDA_MASTER: u16 = 9;
const INCOMPLETE: u16 = 0x01;
const REACHABLE: u16 = 0x02;
const STALE: u16 = 0x04;
const DELAY: u16 = 0x08;
const PROBE: u16 = 0x10;
const FAILED: u16 = 0x20;
const NOARP: u16 = 0x40;
const PERMANENT: u16 = 0x80;
const NTF_SELF: u8 = 0x02;
const NTF_PROXY: u8 = 0x08;
// linux/if_link.h
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_LINK: u16 = 5;
const IFLA_MASTER: u16 = 10;
const IFLA_LINKINFO: u16 = 18;
const IFLA_LINK_NETNSID: u16 = 37;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const IFLA_BR_VLAN_FILTERING: u16 = 7;
// linux/rtnetlink.h, linux/if_addr.h, linux/pkt_sched.h
const TCA_KIND: u16 = 1;
const ROOT: u32 = 0xffff_ffff;
const INGRESS: u32 = 0xffff_fff1;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PRIORITY: u16 = 6;
const IFA_LOCAL: u16 = 2;
const MAIN: u8 = 254;
const UNICAST: u8 = 1;
const BLACKHOLE: u8 = 6;

/// One message after the header of netlink: its type, the fixed part and the attributes.
#[derive(Clone, Debug)]
struct Wire {
    kind: u16,
    payload: Vec<u8>,
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut bytes = (value.len() as u16 + 4).to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

impl Wire {
    fn neighbour(kind: u16, family: i32, device: u32, state: u16, flags: u8) -> Self {
        let mut payload = vec![family as u8, 0, 0, 0];
        payload.extend(device.to_ne_bytes());
        payload.extend(state.to_ne_bytes());
        payload.extend([flags, 1]);
        Self { kind, payload }
    }

    /// An entry of the neighbour table for the container's address with this last octet.
    fn ip(kind: u16, device: u32, last: u8, mac: Mac, state: u16) -> Self {
        Self::neighbour(kind, AF_INET, device, state, 0)
            .with(NDA_DST, &address(last).octets())
            .with(NDA_LLADDR, &mac)
    }

    /// An entry of a bridge's table.
    fn fdb(kind: u16, port: u32, mac: Mac, state: u16) -> Self {
        Self::neighbour(kind, AF_BRIDGE, port, state, 0)
            .with(NDA_LLADDR, &mac)
            .with(NDA_MASTER, &BRIDGE.to_ne_bytes())
    }

    fn link(kind: u16, family: i32, index: u32, name: &str, flags: i32) -> Self {
        let mut payload = vec![family as u8, 0, 1, 0];
        payload.extend(index.to_ne_bytes());
        payload.extend((flags as u32).to_ne_bytes());
        payload.extend([0; 4]);
        Self { kind, payload }.with(IFLA_IFNAME, format!("{name}\0").as_bytes())
    }

    fn veth(kind: u16, index: u32) -> Self {
        Self::link(kind, AF_UNSPEC, index, &format!("veth{index}"), IFF_UP | IFF_LOWER_UP)
            .with(IFLA_ADDRESS, &own_mac(index))
            .with(IFLA_LINK, &2_u32.to_ne_bytes())
            .with(IFLA_LINKINFO, &attribute(IFLA_INFO_KIND, b"veth\0"))
            .with(IFLA_LINK_NETNSID, &0_u32.to_ne_bytes())
    }

    fn route(kind: u16, table: u8, route: u8, destination: [u8; 4], length: u8) -> Self {
        let payload = vec![AF_INET as u8, length, 0, 0, table, 3, 253, route, 0, 0, 0, 0];
        Self { kind, payload }.with(RTA_DST, &destination)
    }

    fn address(kind: u16, device: u32, address: Ipv4Addr) -> Self {
        let mut payload = vec![AF_INET as u8, 24, 0, 0];
        payload.extend(device.to_ne_bytes());
        Self { kind, payload }.with(IFA_LOCAL, &address.octets())
    }

    fn qdisc(kind: u16, device: u32, parent: u32, name: &str) -> Self {
        let mut payload = vec![AF_UNSPEC as u8, 0, 0, 0];
        for word in [device, 0x8001_0000, parent, 0] {
            payload.extend(word.to_ne_bytes());
        }
        Self { kind, payload }.with(TCA_KIND, format!("{name}\0").as_bytes())
    }

    fn with(mut self, kind: u16, value: &[u8]) -> Self {
        self.payload.extend(attribute(kind, value));
        self
    }

    /// As the agent reads it; `None` when it does not.
    fn parse(&self) -> Option<RouteNetlinkMessage> {
        let mut bytes = (self.payload.len() as u32 + 16).to_ne_bytes().to_vec();
        bytes.extend(self.kind.to_ne_bytes());
        bytes.extend([0; 10]);
        bytes.extend(&self.payload);
        let NetlinkPayload::InnerMessage(message) = NetlinkMessage::deserialize(&bytes).ok()?.payload else {
            return None;
        };
        Some(message)
    }
}

impl Facts {
    fn see(&mut self, wire: &Wire) -> Effect {
        let message = wire.parse().unwrap();
        let effect = self.apply(&message);
        if effect == Effect::Changed {
            assert_eq!(self.apply(&message), Effect::None, "the same message twice");
        }
        effect
    }
}

#[test]
fn a_container_starts_and_stops() {
    let mut facts = Facts::bridge();
    let before = facts.clone();
    let at_bridge = Wire::veth(RTM_NEWLINK, 13).with(IFLA_MASTER, &BRIDGE.to_ne_bytes());
    facts.see(&Wire::veth(RTM_NEWLINK, 13));
    assert_eq!(facts.find().arrivals(), [PORT_A, PORT_B]);
    assert_eq!(facts.see(&at_bridge), Effect::Changed);
    assert_eq!(facts.see(&Wire::fdb(RTM_NEWNEIGH, 13, mac(4), REACHABLE)), Effect::Changed);
    assert_eq!(facts.see(&Wire::ip(RTM_NEWNEIGH, BRIDGE, 4, mac(4), REACHABLE)), Effect::Changed);
    let found = facts.find();
    assert_eq!(found.short(), [(2, PORT_A), (3, PORT_B), (4, 13)]);
    assert_eq!(found.endpoints[&address(4)].flags, Endpoint::PEER);
    // Its device goes first; the entries of both tables may stay a while.
    assert_eq!(facts.see(&Wire::veth(RTM_DELLINK, 13)), Effect::Routes);
    assert_eq!(facts.endpoints(), [(2, PORT_A), (3, PORT_B)]);
    assert_eq!(facts.see(&Wire::fdb(RTM_DELNEIGH, 13, mac(4), REACHABLE)), Effect::None);
    assert_eq!(facts.see(&Wire::ip(RTM_DELNEIGH, BRIDGE, 4, mac(4), STALE)), Effect::Changed);
    assert_eq!(facts, before);
}

#[test]
fn traffic_control_comes_and_goes() {
    let mut facts = Facts::bridge();
    let before = facts.clone();
    let qdisc = |kind, name| Wire::qdisc(kind, PORT_A, ROOT, name);
    assert_eq!(facts.see(&qdisc(RTM_NEWQDISC, "noqueue")), Effect::None);
    assert_eq!(facts.see(&qdisc(RTM_NEWQDISC, "tbf")), Effect::Changed);
    assert_eq!(facts.see(&Wire::qdisc(RTM_NEWQDISC, PORT_A, INGRESS, "ingress")), Effect::Changed);
    assert_eq!(
        facts.see(&Wire::qdisc(RTM_NEWQDISC, PORT_B, 0x8001_0001, "netem")),
        Effect::None,
        "inside of another"
    );
    assert_eq!(facts.endpoints(), [(3, PORT_B)]);
    // Replaced: the message about the old one may come before that about the new one, or behind it.
    assert_eq!(facts.see(&qdisc(RTM_NEWQDISC, "htb")), Effect::Changed);
    assert_eq!(facts.see(&qdisc(RTM_DELQDISC, "tbf")), Effect::None);
    assert_eq!(facts.endpoints(), [(3, PORT_B)]);
    assert_eq!(facts.see(&qdisc(RTM_NEWQDISC, "fq_codel")), Effect::Changed);
    assert_eq!(facts.see(&Wire::qdisc(RTM_DELQDISC, PORT_A, INGRESS, "ingress")), Effect::Changed);
    assert_eq!(facts, before);
    facts.see(&qdisc(RTM_NEWQDISC, "tbf"));
    facts.see(&Wire::veth(RTM_DELLINK, PORT_A));
    assert!(facts.traffic_control.is_empty());
}

#[test]
fn nothing_refers_to_a_device_that_is_gone() {
    for (mut facts, gone) in [(Facts::routed(), 21), (Facts::bridge(), BRIDGE), (Facts::bridge(), PORT_A)] {
        facts.see(&Wire::veth(RTM_DELLINK, gone));
        // Another device with its index begins with nothing.
        facts.see(&Wire::veth(RTM_NEWLINK, gone));
        assert!(facts.neighbours.keys().all(|(device, _)| *device != gone));
        assert!(facts.fdb.iter().all(|((bridge, _), port)| *bridge != gone && *port != gone));
        assert!(facts.addresses.iter().all(|(device, _)| *device != gone));
        assert!(facts.routes.iter().all(|route| route.device != Some(gone)));
    }
}

#[test]
fn the_age_of_a_neighbour_changes_nothing() {
    let mut facts = Facts::bridge();
    for state in [STALE, DELAY, PROBE, REACHABLE, PERMANENT] {
        assert_eq!(facts.see(&Wire::ip(RTM_NEWNEIGH, BRIDGE, 2, mac(2), state)), Effect::None);
    }
    for state in [REACHABLE, STALE] {
        assert_eq!(facts.see(&Wire::fdb(RTM_NEWNEIGH, PORT_A, mac(2), state)), Effect::None);
    }
    for state in [INCOMPLETE, FAILED, NOARP, 0] {
        let mut facts = facts.clone();
        assert_eq!(facts.see(&Wire::ip(RTM_NEWNEIGH, BRIDGE, 2, mac(2), state)), Effect::Changed);
        assert_eq!(facts.endpoints(), [(3, PORT_B)]);
    }
    assert_eq!(facts.see(&Wire::ip(RTM_NEWNEIGH, BRIDGE, 2, mac(5), REACHABLE)), Effect::Changed);
    assert_eq!(facts.endpoints(), [(3, PORT_B)]);
}

#[test]
fn entries_that_cannot_matter_are_not_kept() {
    let mut facts = Facts::bridge();
    let before = facts.clone();
    let other_subnet = Wire::neighbour(RTM_NEWNEIGH, AF_INET, BRIDGE, REACHABLE, 0)
        .with(NDA_DST, &[10, 244, 2, 2])
        .with(NDA_LLADDR, &mac(2));
    let proxy = Wire::neighbour(RTM_NEWNEIGH, AF_INET, BRIDGE, PERMANENT, NTF_PROXY)
        .with(NDA_DST, &[10, 244, 1, 9])
        .with(NDA_LLADDR, &mac(2));
    let infiniband = Wire::neighbour(RTM_NEWNEIGH, AF_INET, BRIDGE, REACHABLE, 0)
        .with(NDA_DST, &[10, 244, 1, 9])
        .with(NDA_LLADDR, &[2; 20]);
    let vlan = Wire::fdb(RTM_NEWNEIGH, PORT_B, mac(2), REACHABLE).with(NDA_VLAN, &5_u16.to_ne_bytes());
    let own = Wire::neighbour(RTM_NEWNEIGH, AF_BRIDGE, PORT_B, REACHABLE, NTF_SELF)
        .with(NDA_LLADDR, &mac(2))
        .with(NDA_MASTER, &BRIDGE.to_ne_bytes());
    let no_bridge = Wire::neighbour(RTM_NEWNEIGH, AF_BRIDGE, PORT_B, PERMANENT, 0).with(NDA_LLADDR, &mac(2));
    let local = Wire::fdb(RTM_NEWNEIGH, PORT_B, own_mac(PORT_B), PERMANENT);
    let foreign_route = Wire::route(RTM_NEWROUTE, MAIN, UNICAST, [10, 245, 1, 0], 24);
    let other_table = Wire::route(RTM_NEWROUTE, 255, UNICAST, [10, 244, 1, 0], 24);
    let foreign_address = Wire::address(RTM_NEWADDR, UPLINK, Ipv4Addr::new(192, 0, 2, 1));
    for wire in [
        other_subnet,
        proxy,
        infiniband,
        vlan,
        own,
        no_bridge,
        local,
        foreign_route,
        other_table,
        foreign_address,
    ] {
        assert_eq!(facts.see(&wire), Effect::None, "{wire:?}");
    }
    assert_eq!(facts, before);
}

#[test]
fn a_hardware_address_that_becomes_the_bridges_own_leads_nowhere() {
    let mut facts = Facts::bridge();
    assert_eq!(facts.see(&Wire::fdb(RTM_NEWNEIGH, PORT_A, mac(2), PERMANENT)), Effect::Changed);
    assert_eq!(facts.endpoints(), [(3, PORT_B)]);
    // An entry that an operator made.
    assert_eq!(facts.see(&Wire::fdb(RTM_NEWNEIGH, PORT_B, mac(2), NOARP)), Effect::Changed);
    assert_eq!(facts.endpoints(), [(2, PORT_B), (3, PORT_B)]);
}

#[test]
fn the_bridge_reports_its_ports_without_changing_devices() {
    let mut facts = Facts::bridge();
    let before = facts.clone();
    for kind in [RTM_NEWLINK, RTM_DELLINK] {
        let about_port =
            Wire::link(kind, AF_BRIDGE, PORT_A, "veth11", IFF_UP).with(IFLA_MASTER, &BRIDGE.to_ne_bytes());
        assert_eq!(facts.see(&about_port), Effect::None);
    }
    assert_eq!(facts, before);
}

#[test]
fn a_bridge_begins_to_filter_vlans() {
    let mut facts = Facts::bridge();
    let bridge = |filtering: u8| {
        let data = attribute(IFLA_INFO_DATA, &attribute(IFLA_BR_VLAN_FILTERING, &[filtering]));
        Wire::link(RTM_NEWLINK, AF_UNSPEC, BRIDGE, "cni0", IFF_UP | IFF_LOWER_UP)
            .with(IFLA_ADDRESS, &own_mac(BRIDGE))
            .with(IFLA_LINKINFO, &[attribute(IFLA_INFO_KIND, b"bridge\0"), data].concat())
    };
    facts.see(&bridge(0));
    assert_eq!(facts.endpoints(), [(2, PORT_A), (3, PORT_B)]);
    assert_eq!(facts.see(&bridge(1)), Effect::Changed);
    assert_eq!(facts.endpoints(), []);
}

#[test]
fn routes_are_listed_after_whatever_may_remove_some() {
    let mut facts = Facts::bridge();
    let down = Wire::link(RTM_NEWLINK, AF_UNSPEC, PORT_A, "veth11", 0);
    assert_eq!(facts.see(&down), Effect::Routes);
    assert_eq!(facts.see(&Wire::veth(RTM_DELLINK, PORT_B)), Effect::Routes);
    assert_eq!(facts.see(&Wire::address(RTM_DELADDR, UPLINK, Ipv4Addr::new(192, 0, 2, 1))), Effect::Routes);
    for kind in [RTM_NEWROUTE, RTM_DELROUTE] {
        for (destination, length) in [([10, 244, 1, 7], 32), ([10, 244, 0, 0], 16), ([0; 4], 0)] {
            assert_eq!(facts.see(&Wire::route(kind, MAIN, UNICAST, destination, length)), Effect::Routes);
        }
    }
    assert_eq!(facts.see(&Wire::address(RTM_NEWADDR, PORT_A, address(77))), Effect::Changed);
}

#[test]
fn only_direct_routes_have_a_device() {
    let facts = Facts::bridge();
    let route = |wire: Wire| match wire.with(RTA_OIF, &BRIDGE.to_ne_bytes()).parse() {
        Some(RouteNetlinkMessage::NewRoute(message)) => facts.route_in(&message).unwrap(),
        other => panic!("{other:?}"),
    };
    let wire = |kind| Wire::route(RTM_NEWROUTE, MAIN, kind, [10, 244, 1, 7], 32);
    let destination = "10.244.1.7/32".parse().unwrap();
    let direct = route(wire(UNICAST).with(RTA_PRIORITY, &9_u32.to_ne_bytes()));
    assert_eq!(direct, Route { destination, metric: 9, device: Some(BRIDGE) });
    let mut for_some = wire(UNICAST);
    for_some.payload[3] = 0x10;
    for wire in [wire(BLACKHOLE), wire(UNICAST).with(RTA_GATEWAY, &[10, 244, 1, 2]), for_some] {
        assert_eq!(route(wire), Route { destination, metric: 0, device: None });
    }
}

fn wires() -> Vec<Wire> {
    vec![
        Wire::ip(RTM_NEWNEIGH, BRIDGE, 2, mac(9), REACHABLE),
        Wire::ip(RTM_DELNEIGH, BRIDGE, 2, mac(2), REACHABLE),
        Wire::fdb(RTM_NEWNEIGH, PORT_B, mac(2), REACHABLE),
        Wire::fdb(RTM_DELNEIGH, PORT_A, mac(2), REACHABLE),
        Wire::veth(RTM_NEWLINK, 13).with(IFLA_MASTER, &BRIDGE.to_ne_bytes()),
        Wire::veth(RTM_DELLINK, PORT_A),
        Wire::address(RTM_NEWADDR, BRIDGE, address(2)),
        Wire::route(RTM_NEWROUTE, MAIN, UNICAST, [10, 244, 1, 7], 32).with(RTA_OIF, &BRIDGE.to_ne_bytes()),
        Wire::qdisc(RTM_NEWQDISC, PORT_A, ROOT, "tbf"),
    ]
}

#[test]
fn messages_that_end_early_are_refused_or_read_as_far_as_they_go() {
    for wire in wires() {
        for length in 0..wire.payload.len() {
            let mut facts = Facts::bridge();
            let cut = Wire { kind: wire.kind, payload: wire.payload[..length].to_vec() };
            if let Some(message) = cut.parse() {
                facts.apply(&message);
                hold_together(&facts);
            }
        }
    }
}

/// Whatever the facts are, each endpoint follows from them.
fn hold_together(facts: &Facts) {
    for (address, endpoint) in facts.find().endpoints {
        let port = &facts.links[&endpoint.ifindex];
        let gateway = port.controller.unwrap_or(port.index);
        assert_eq!(facts.neighbours.get(&(gateway, address)), Some(&endpoint.mac));
        assert_eq!(Some(endpoint.gateway_mac), facts.links[&gateway].mac);
    }
}

proptest! {
    #[test]
    fn damaged_messages_do_no_harm(
        number in 0_usize..9,
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        length in any::<prop::sample::Index>(),
    ) {
        let mut wire = wires()[number].clone();
        for (position, value) in damage {
            let position = position.index(wire.payload.len());
            wire.payload[position] = value;
        }
        let uncut = wire.clone();
        wire.payload.truncate(length.index(wire.payload.len() + 1));
        for wire in [uncut, wire] {
            let mut facts = Facts::bridge();
            if let Some(message) = wire.parse() {
                facts.apply(&message);
                hold_together(&facts);
            }
        }
    }

    #[test]
    fn unordered_bytes_do_no_harm(kind in 16_u16..40, payload in prop::collection::vec(any::<u8>(), 0..96)) {
        let mut facts = Facts::bridge();
        if let Some(message) = (Wire { kind, payload }).parse() {
            facts.apply(&message);
            hold_together(&facts);
        }
    }
}
