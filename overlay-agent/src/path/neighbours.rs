//! The link-layer addresses of next hops, as far as programs may use them, and the destinations whose next hop may be another one.
//!
//! A program that writes the link-layer header itself does not use the kernel's neighbour entry, so that the kernel would never
//! notice a neighbour that is gone. Therefore an address counts only while the kernel checks the entry by a timer of its own: until
//! it becomes stale. Then packets take the kernel's way again, and the first one makes the kernel check the neighbour.
#![allow(clippy::wildcard_enum_match_arm, reason = "the kernel adds messages; only a few are read")]

use std::{
    collections::{BTreeMap, BTreeSet},
    mem,
    net::Ipv4Addr,
};

use ipnet::Ipv4Net;
use rtnetlink::packet_route::{
    AddressFamily, RouteNetlinkMessage, link::LinkMessage, neighbour::NeighbourMessage, route::RouteMessage,
};

use crate::{
    neighbour::{Mac, Neighbour},
    netlink::{self, Link},
};

/// The neighbour to which a packet is sent: the gateway, or the peer itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Via {
    /// Index of the device.
    pub(crate) ifindex: u32,
    pub(crate) address: Ipv4Addr,
}

/// The link-layer addresses of packets to a neighbour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LinkAddresses {
    /// The neighbour's.
    pub(crate) destination: Mac,
    /// The device's.
    pub(crate) source: Mac,
}

/// Most prefixes that are told apart.
const MOST_PREFIXES: usize = 64;
/// `RT_TABLE_LOCAL` (linux/rtnetlink.h).
const RT_TABLE_LOCAL: u8 = 255;
const EVERYTHING: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::UNSPECIFIED, 0);

/// What is different now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Changes {
    /// Neighbours whose addresses are known now, or not any more.
    pub(crate) neighbours: BTreeMap<Via, Option<LinkAddresses>>,
    /// Destinations with other routes.
    pub(crate) rerouted: BTreeSet<Ipv4Net>,
}

/// What the kernel says about devices and neighbours, and which changes of it and of routes were not taken yet.
#[derive(Debug, Default)]
pub(super) struct Table {
    devices: BTreeMap<u32, Mac>,
    neighbours: BTreeMap<Via, Mac>,
    /// As the changes that were taken leave it.
    taken: BTreeMap<Via, LinkAddresses>,
    changed: BTreeSet<Via>,
    rerouted: BTreeSet<Ipv4Net>,
}

impl Table {
    /// Replaces everything by lists of the kernel.
    pub(super) fn replace(&mut self, links: &[Link], neighbours: &[NeighbourMessage]) {
        self.devices = links.iter().filter_map(|link| Some((link.index, usable(link)?))).collect();
        let checked = neighbours.iter().filter_map(|message| checked(&Neighbour::of(message)?));
        self.neighbours = checked.collect();
        let all = self.neighbours.keys().chain(self.taken.keys()).chain(&self.changed);
        self.note(all.copied().collect());
    }

    /// Forgets everything: nothing is certain.
    pub(super) fn clear(&mut self) {
        self.replace(&[], &[]);
    }

    /// Makes the change that a message of the kernel reports.
    pub(super) fn apply(&mut self, message: &RouteNetlinkMessage) {
        match message {
            RouteNetlinkMessage::NewNeighbour(message) => self.set_neighbour(message, true),
            RouteNetlinkMessage::DelNeighbour(message) => self.set_neighbour(message, false),
            RouteNetlinkMessage::NewLink(message) => self.set_device(message, true),
            RouteNetlinkMessage::DelLink(message) => self.set_device(message, false),
            RouteNetlinkMessage::NewRoute(message) | RouteNetlinkMessage::DelRoute(message) => {
                self.note_route(message);
            }
            RouteNetlinkMessage::NewRule(_) | RouteNetlinkMessage::DelRule(_) => {
                self.note_rerouted(EVERYTHING)
            }
            _ => {}
        }
    }

    /// Whether there are changes to take.
    pub(super) fn has_changes(&self) -> bool {
        !self.changed.is_empty() || !self.rerouted.is_empty()
    }

    /// Takes the changes since the last time.
    pub(super) fn take_changes(&mut self) -> Changes {
        let changed = mem::take(&mut self.changed);
        let neighbours = changed.into_iter().map(|via| (via, self.addresses(via))).collect();
        record(&mut self.taken, &neighbours);
        Changes { neighbours, rerouted: mem::take(&mut self.rerouted) }
    }

    fn addresses(&self, via: Via) -> Option<LinkAddresses> {
        let (destination, source) = (*self.neighbours.get(&via)?, *self.devices.get(&via.ifindex)?);
        Some(LinkAddresses { destination, source })
    }

    fn set_neighbour(&mut self, message: &NeighbourMessage, exists: bool) {
        let Some(neighbour) = Neighbour::of(message) else { return };
        let via = Via { ifindex: neighbour.ifindex, address: neighbour.address };
        match checked(&neighbour).filter(|_| exists) {
            Some((via, mac)) => drop(self.neighbours.insert(via, mac)),
            None => drop(self.neighbours.remove(&via)),
        }
        self.note([via].into());
    }

    fn set_device(&mut self, message: &LinkMessage, exists: bool) {
        // A bridge's own message that a port is gone does not mean that the device is.
        if message.header.interface_family == AddressFamily::Bridge {
            return;
        }
        let index = message.header.index;
        let mac = netlink::link(message).as_ref().and_then(usable).filter(|_| exists);
        let before = match mac {
            Some(mac) => self.devices.insert(index, mac),
            None => self.devices.remove(&index),
        };
        if before != mac {
            let first = Via { ifindex: index, address: Ipv4Addr::UNSPECIFIED };
            let last = Via { ifindex: index, address: Ipv4Addr::BROADCAST };
            let all = self.neighbours.range(first..=last).map(|(via, _)| *via);
            self.note(all.collect());
        }
    }

    fn note_route(&mut self, message: &RouteMessage) {
        let header = &message.header;
        // Those of the local table are this host's own addresses.
        if header.address_family == AddressFamily::Inet && header.table != RT_TABLE_LOCAL {
            self.note_rerouted(netlink::destination(message).unwrap_or(EVERYTHING));
        }
    }

    fn note_rerouted(&mut self, prefix: Ipv4Net) {
        if self.rerouted.len() >= MOST_PREFIXES {
            self.rerouted = [EVERYTHING].into();
        }
        if !self.rerouted.contains(&EVERYTHING) {
            self.rerouted.insert(prefix);
        }
    }

    fn note(&mut self, all: BTreeSet<Via>) {
        for via in all {
            match self.addresses(via).as_ref() == self.taken.get(&via) {
                true => self.changed.remove(&via),
                false => self.changed.insert(via),
            };
        }
    }
}

/// Makes changes in what is known.
pub(super) fn record(
    known: &mut BTreeMap<Via, LinkAddresses>,
    changes: &BTreeMap<Via, Option<LinkAddresses>>,
) {
    for (via, addresses) in changes {
        match addresses {
            Some(addresses) => drop(known.insert(*via, *addresses)),
            None => drop(known.remove(via)),
        }
    }
}

/// The address of a device whose frames have a plain Ethernet header.
fn usable(link: &Link) -> Option<Mac> {
    link.mac.filter(|mac| link.ethernet && !link.loopback && is_unicast(mac))
}

fn checked(neighbour: &Neighbour) -> Option<(Via, Mac)> {
    let mac = neighbour.checked_mac().filter(is_unicast)?;
    Some((Via { ifindex: neighbour.ifindex, address: neighbour.address }, mac))
}

/// Neither a group (IEEE 802-2014 section 8.2.2) nor zero.
fn is_unicast(mac: &Mac) -> bool {
    let [first, ..] = mac;
    first & 1 == 0 && *mac != [0; 6]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rtnetlink::{
        RouteMessageBuilder,
        packet_route::{
            link::{LinkAttribute, LinkLayerType},
            neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourState},
            rule::RuleMessage,
        },
    };

    use super::*;

    const GATEWAY: Mac = [2, 0, 0, 0, 0, 0x54];
    const OTHER: Mac = [2, 0, 0, 0, 0, 0x55];
    const STATES: [(NeighbourState, bool); 9] = [
        (NeighbourState::Reachable, true),
        (NeighbourState::Delay, true),
        (NeighbourState::Probe, true),
        (NeighbourState::Permanent, true),
        (NeighbourState::Stale, false),
        (NeighbourState::Incomplete, false),
        (NeighbourState::Failed, false),
        (NeighbourState::Noarp, false),
        (NeighbourState::None, false),
    ];

    fn own(index: u32) -> Mac {
        [2, 0, 0, 0, 1, index as u8]
    }

    fn link(index: u32) -> Link {
        Link { mac: Some(own(index)), ..Link::ethernet(index, &format!("eth{index}")) }
    }

    fn via(index: u32, last: u8) -> Via {
        Via { ifindex: index, address: Ipv4Addr::new(192, 168, 77, last) }
    }

    fn neighbour(via: Via, mac: Mac, state: NeighbourState) -> NeighbourMessage {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Inet;
        message.header.ifindex = via.ifindex;
        message.header.state = state;
        message.attributes = vec![
            NeighbourAttribute::Destination(NeighbourAddress::Inet(via.address)),
            NeighbourAttribute::LinkLayerAddress(mac.to_vec()),
        ];
        message
    }

    fn new_link(index: u32, mac: Mac) -> LinkMessage {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.header.link_layer_type = LinkLayerType::Ether;
        message.attributes =
            vec![LinkAttribute::IfName(format!("eth{index}")), LinkAttribute::Address(mac.to_vec())];
        message
    }

    /// Two devices, without neighbours.
    fn table() -> Table {
        let mut table = Table::default();
        table.replace(&[link(2), link(3)], &[]);
        table
    }

    fn changed(table: &mut Table, message: NeighbourMessage) -> BTreeMap<Via, Option<LinkAddresses>> {
        table.apply(&RouteNetlinkMessage::NewNeighbour(message));
        table.take_changes().neighbours
    }

    fn known(destination: Mac, index: u32) -> Option<LinkAddresses> {
        Some(LinkAddresses { destination, source: own(index) })
    }

    #[test]
    fn an_address_counts_while_the_kernel_checks_the_entry() {
        for (state, counts) in STATES {
            let mut table = table();
            let changes = changed(&mut table, neighbour(via(2, 254), GATEWAY, state));
            let expected = counts.then(|| (via(2, 254), known(GATEWAY, 2)));
            assert_eq!(changes, expected.into_iter().collect(), "{state:?}");
        }
    }

    #[test]
    fn a_change_is_taken_once_and_one_that_is_undone_is_none() {
        let mut table = table();
        let entry = |mac, state| neighbour(via(2, 254), mac, state);
        assert_eq!(
            changed(&mut table, entry(GATEWAY, NeighbourState::Reachable)),
            [(via(2, 254), known(GATEWAY, 2))].into()
        );
        assert!(changed(&mut table, entry(GATEWAY, NeighbourState::Probe)).is_empty());
        table.apply(&RouteNetlinkMessage::NewNeighbour(entry(GATEWAY, NeighbourState::Stale)));
        assert!(table.has_changes());
        assert!(changed(&mut table, entry(GATEWAY, NeighbourState::Reachable)).is_empty());
        assert!(!table.has_changes());
        assert_eq!(
            changed(&mut table, entry(OTHER, NeighbourState::Reachable)),
            [(via(2, 254), known(OTHER, 2))].into()
        );
        table.apply(&RouteNetlinkMessage::DelNeighbour(entry(OTHER, NeighbourState::Reachable)));
        assert_eq!(table.take_changes().neighbours, [(via(2, 254), None)].into());
    }

    #[test]
    fn a_devices_address_is_the_source_to_its_neighbours() {
        let mut table = table();
        for via in [via(2, 1), via(3, 1)] {
            table.apply(&RouteNetlinkMessage::NewNeighbour(neighbour(
                via,
                GATEWAY,
                NeighbourState::Reachable,
            )));
        }
        assert_eq!(table.take_changes().neighbours.len(), 2);
        table.apply(&RouteNetlinkMessage::NewLink(new_link(2, OTHER)));
        let moved = LinkAddresses { destination: GATEWAY, source: OTHER };
        assert_eq!(table.take_changes().neighbours, [(via(2, 1), Some(moved))].into());
        // A bridge's message about its port.
        let mut port = new_link(3, own(3));
        port.header.interface_family = AddressFamily::Bridge;
        table.apply(&RouteNetlinkMessage::DelLink(port));
        assert!(!table.has_changes());
        table.apply(&RouteNetlinkMessage::DelLink(new_link(3, own(3))));
        assert_eq!(table.take_changes().neighbours, [(via(3, 1), None)].into());
        table.clear();
        assert_eq!(table.take_changes().neighbours, [(via(2, 1), None)].into());
    }

    #[test]
    fn what_is_no_ethernet_neighbour_does_not_count() {
        let mut table = Table::default();
        let reachable = |index, mac| neighbour(via(index, 254), mac, NeighbourState::Reachable);
        let other_layer = Link { ethernet: false, ..link(4) };
        let loopback = Link { loopback: true, ..link(5) };
        table.replace(&[link(2), other_layer, loopback], &[reachable(3, GATEWAY), reachable(4, GATEWAY)]);
        assert!(!table.has_changes());
        let mut proxy = reachable(2, GATEWAY);
        proxy.header.flags = NeighbourFlags::Proxy;
        let mut bridge = reachable(2, GATEWAY);
        bridge.header.family = AddressFamily::Bridge;
        let mut long = reachable(2, GATEWAY);
        long.attributes[1] = NeighbourAttribute::LinkLayerAddress(vec![2; 20]);
        let group = reachable(2, [1, 0, 0x5e, 0, 0, 1]);
        for message in [proxy, bridge, long, group, reachable(2, [0; 6]), reachable(5, GATEWAY)] {
            assert!(changed(&mut table, message.clone()).is_empty(), "{message:?}");
        }
        assert_eq!(changed(&mut table, reachable(2, GATEWAY)).len(), 1);
    }

    #[test]
    fn routes_are_told_by_their_destination() {
        let mut table = table();
        let route = |prefix: &str| {
            let net: Ipv4Net = prefix.parse().unwrap();
            RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(net.network(), net.prefix_len()).build()
        };
        let mut local = route("192.168.77.1/32");
        local.header.table = RT_TABLE_LOCAL;
        table.apply(&RouteNetlinkMessage::NewRoute(local));
        assert!(!table.has_changes(), "an own address");
        table.apply(&RouteNetlinkMessage::NewRoute(route("10.0.0.0/8")));
        table.apply(&RouteNetlinkMessage::DelRoute(route("192.168.77.2/32")));
        let prefixes = ["10.0.0.0/8", "192.168.77.2/32"].map(|prefix| prefix.parse().unwrap());
        assert_eq!(table.take_changes().rerouted, prefixes.into());
        table.apply(&RouteNetlinkMessage::NewRule(RuleMessage::default()));
        table.apply(&RouteNetlinkMessage::DelRoute(route("10.0.0.0/8")));
        assert!(table.take_changes().rerouted.contains(&EVERYTHING));
        for third in 0..=MOST_PREFIXES {
            table.apply(&RouteNetlinkMessage::NewRoute(route(&format!("10.0.{third}.0/24"))));
        }
        assert_eq!(table.take_changes().rerouted, [EVERYTHING].into());
        assert!(!table.has_changes());
    }

    #[derive(Clone, Debug)]
    enum Step {
        Set(Via, Mac, NeighbourState),
        Remove(Via),
        Device(u32, Option<Mac>),
        Take,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let mac = prop::sample::select(vec![GATEWAY, OTHER]);
        let via = (2_u32..4, 1_u8..4).prop_map(|(index, last)| via(index, last));
        let state = prop::sample::select(STATES.map(|(state, _)| state).to_vec());
        let step = prop_oneof![
            4 => (via.clone(), mac.clone(), state).prop_map(|(via, mac, state)| Step::Set(via, mac, state)),
            1 => via.prop_map(Step::Remove),
            1 => (2_u32..4, prop::option::of(mac)).prop_map(|(index, mac)| Step::Device(index, mac)),
            1 => Just(Step::Take),
        ];
        prop::collection::vec(step, 0..60)
    }

    proptest! {
        /// The changes that are taken add up to what a list at the end shows.
        #[test]
        fn messages_end_where_a_list_does(steps in steps()) {
            let mut table = table();
            let (mut devices, mut entries) = (BTreeMap::from([2, 3].map(|index| (index, own(index)))), BTreeMap::new());
            let mut sum = BTreeMap::new();
            for step in steps {
                match step {
                    Step::Set(via, mac, state) => {
                        entries.insert(via, (mac, state));
                        table.apply(&RouteNetlinkMessage::NewNeighbour(neighbour(via, mac, state)));
                    }
                    Step::Remove(via) => {
                        entries.remove(&via);
                        let message = neighbour(via, GATEWAY, NeighbourState::Reachable);
                        table.apply(&RouteNetlinkMessage::DelNeighbour(message));
                    }
                    Step::Device(index, Some(mac)) => {
                        devices.insert(index, mac);
                        table.apply(&RouteNetlinkMessage::NewLink(new_link(index, mac)));
                    }
                    Step::Device(index, None) => {
                        devices.remove(&index);
                        table.apply(&RouteNetlinkMessage::DelLink(new_link(index, own(index))));
                    }
                    Step::Take => record(&mut sum, &table.take_changes().neighbours),
                }
            }
            record(&mut sum, &table.take_changes().neighbours);
            let expected: BTreeMap<_, _> = entries
                .iter()
                .filter(|(_, (_, state))| STATES.contains(&(*state, true)))
                .filter_map(|(via, (mac, _))| {
                    Some((*via, LinkAddresses { destination: *mac, source: *devices.get(&via.ifindex)? }))
                })
                .collect();
            prop_assert_eq!(&sum, &expected);
            let links: Vec<_> = devices.iter().map(|(index, mac)| Link { mac: Some(*mac), ..link(*index) }).collect();
            let list: Vec<_> =
                entries.iter().map(|(via, (mac, state))| neighbour(*via, *mac, *state)).collect();
            table.replace(&links, &list);
            prop_assert!(!table.has_changes());
        }
    }
}
