//! The path to each peer: device, MTU, and whether programs may use it.
//!
//! The kernel's routes are asked for peer by peer, because rules, equal-cost routes and exceptions decide about single addresses.
//! [`Paths`] knows the answers and what limits them, and makes a [`NextHop`] of a peer.

mod learned;
mod neighbour_watch;
mod neighbours;
mod query;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{Ipv4Addr, UdpSocket},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};
use ipnet::Ipv4Net;
use overlay_ebpf::{abi::NextHop, wire::OVERHEAD};

use crate::{
    netlink::Link,
    route::Peer,
    xfrm::{Flow, Policies, Policy},
};
pub(crate) use learned::LOWEST;
use learned::LearnedMtus;
pub(crate) use neighbour_watch::NeighbourWatch;
use neighbours::LinkAddresses;
pub(crate) use neighbours::{Changes, Via};
use query::{Answer, KernelRoute, RouteQuery};

/// Most bytes that ESP adds to a packet (RFC 4303): an IP header in tunnel mode, 8 of header, 16 of initialization vector, up to 17
/// of padding and trailer, up to 32 of integrity check.
const ESP_OVERHEAD: u16 = 20 + 8 + 16 + 17 + 32;

/// How long routes may be missing after this host's address has changed.
const SETTLE_TIME: Duration = Duration::from_secs(2);

/// The paths to all peers, from one address of this host.
#[derive(Debug)]
pub(crate) struct Paths {
    /// Source of outer packets.
    local_ip: Ipv4Addr,
    /// When it became another one.
    readdressed: Option<Instant>,
    /// UDP port of the network.
    port: u16,
    query: RouteQuery,
    kernel: BTreeMap<Ipv4Addr, KernelRoute>,
    /// The devices in `kernel`, which are asked for at each change of a record.
    devices: BTreeSet<u32>,
    learned: LearnedMtus,
    links: BTreeMap<u32, Link>,
    /// The neighbours whose addresses programs may use.
    neighbours: BTreeMap<Via, LinkAddresses>,
    /// What the host wants to be done with packets to and from peers.
    pub(crate) policies: Arc<Policies>,
}

impl Paths {
    /// Paths to no peers yet. Fails when the kernel refuses a netlink socket.
    pub(crate) fn new(local_ip: Ipv4Addr, port: u16) -> Result<Self> {
        Ok(Self {
            local_ip,
            readdressed: None,
            port,
            query: RouteQuery::open()?,
            kernel: BTreeMap::new(),
            devices: BTreeSet::new(),
            learned: LearnedMtus::default(),
            links: BTreeMap::new(),
            neighbours: BTreeMap::new(),
            policies: Arc::default(),
        })
    }

    /// Outer packets have another source.
    pub(crate) fn set_local_ip(&mut self, local_ip: Ipv4Addr) {
        if local_ip != self.local_ip {
            (self.local_ip, self.readdressed) = (local_ip, Some(Instant::now()));
        }
    }

    /// Asks the kernel about all of `peers` again, with the devices as they are now. Fails when the kernel does not answer; the
    /// paths stay as they were.
    pub(crate) fn refresh(&mut self, peers: &BTreeSet<Ipv4Addr>, links: Vec<Link>) -> Result<()> {
        let all: Vec<_> = peers.iter().copied().collect();
        self.ask(&all)?;
        self.kernel.retain(|peer, _| peers.contains(peer));
        self.devices = self.kernel.values().map(|route| route.ifindex).collect();
        self.links = links.into_iter().map(|link| (link.index, link)).collect();
        Ok(())
    }

    /// Asks the kernel about new peers. Fails when it does not answer.
    pub(crate) fn add(&mut self, peers: &BTreeSet<Ipv4Addr>) -> Result<()> {
        let new: Vec<_> = peers.iter().copied().filter(|peer| !self.kernel.contains_key(peer)).collect();
        self.ask(&new)
    }

    /// What is known about a peer stays while the kernel says nothing, and about all of them while this host has lost its address:
    /// then it refuses every question. Fails when there is no route at all, just after the address has changed: the kernel removes the routes
    /// of an address before it adds those of the next one.
    fn ask(&mut self, peers: &[Ipv4Addr]) -> Result<()> {
        let answers = self.query.ask(self.local_ip, self.port, peers)?;
        // A source that no device holds is EINVAL or ENETUNREACH, by the version of the kernel.
        let is_settling = self.readdressed.is_some_and(|at| at.elapsed() < SETTLE_TIME);
        let is_cut_off = answers.values().all(|answer| !matches!(answer, Answer::Route(_)));
        if is_settling && is_cut_off && !answers.is_empty() {
            bail!("there is no route from {}, the new address, yet", self.local_ip);
        }
        let is_addressless = is_cut_off && !is_held(self.local_ip);
        for (peer, answer) in answers {
            match answer {
                Answer::Route(route) => {
                    self.kernel.insert(peer, route);
                    self.devices.insert(route.ifindex);
                }
                Answer::NoRoute | Answer::Invalid if is_addressless => {}
                Answer::NoRoute | Answer::Invalid => drop(self.kernel.remove(&peer)),
                Answer::Unknown => {}
            }
        }
        Ok(())
    }

    /// Notes that a packet of more than `mtu` bytes does not reach `peer`. `true` when that changes its path.
    pub(crate) fn too_long(&mut self, peer: Ipv4Addr, mtu: u16, now: Instant) -> bool {
        self.learned.report(peer, mtu, learned::lifetime(), now)
    }

    /// Forgets what has expired. `true` when that changes a path.
    pub(crate) fn expire(&mut self, now: Instant) -> bool {
        self.learned.expire(now)
    }

    /// Notes which addresses of neighbours are known.
    pub(crate) fn set_neighbours(&mut self, changes: &BTreeMap<Via, Option<LinkAddresses>>) {
        neighbours::record(&mut self.neighbours, changes);
    }

    /// The peers with addresses in some prefixes.
    pub(crate) fn peers_in(&self, prefixes: &BTreeSet<Ipv4Net>) -> BTreeSet<Ipv4Addr> {
        let ranges = prefixes.iter().map(|prefix| prefix.network()..=prefix.broadcast());
        ranges.flat_map(|range| self.kernel.range(range)).map(|(peer, _)| *peer).collect()
    }

    /// Asks the kernel about some peers again, and follows it where the device is the same: programs are attached to another one
    /// with the next refresh, on both ends of the path. Fails when the kernel does not answer.
    pub(crate) fn ask_again(&mut self, peers: &BTreeSet<Ipv4Addr>) -> Result<()> {
        let peers: Vec<_> = peers.iter().copied().collect();
        for (peer, answer) in self.query.ask(self.local_ip, self.port, &peers)? {
            if let (Answer::Route(route), Some(known)) = (answer, self.kernel.get_mut(&peer))
                && route.ifindex == known.ifindex
            {
                *known = route;
            }
        }
        Ok(())
    }

    /// The neighbour to which packets for a peer are sent; `None` where only the kernel knows.
    pub(crate) fn via(&self, peer: Ipv4Addr) -> Option<Via> {
        let route = self.kernel.get(&peer)?;
        Some(Via { ifindex: route.ifindex, address: route.neighbour? })
    }

    /// The way to a peer.
    pub(crate) fn next_hop(&self, peer: Peer, now: Instant) -> NextHop {
        let learned = self.learned.mtu(peer.address, now);
        let mut hop = next_hop(peer, self.kernel.get(&peer.address), &self.links, learned);
        if self.policy(&hop).is_some() {
            hop.flags |= NextHop::SLOW_PATH;
            // Encrypted packets are longer.
            hop.mtu = hop.mtu.saturating_sub(ESP_OVERHEAD).max(LOWEST - OVERHEAD as u16);
        }
        let addresses = self.via(peer.address).and_then(|via| self.neighbours.get(&via));
        match addresses.filter(|_| hop.ifindex != 0 && !hop.has(NextHop::SLOW_PATH)) {
            Some(LinkAddresses { destination, source }) => hop.resolved(*destination, *source),
            None => hop,
        }
    }

    /// The IPsec policy that covers packets by this next hop.
    fn policy(&self, hop: &NextHop) -> Option<&Policy> {
        let (local, port, ifindex) = (self.local_ip, self.port, hop.ifindex);
        self.policies.covering(&Flow { local, peer: hop.peer.into(), port, ifindex })
    }

    /// Why packets by this next hop take the slow path; `None` when they do not.
    pub(crate) fn why_slow(&self, hop: &NextHop) -> Option<String> {
        hop.has(NextHop::SLOW_PATH).then(|| match (self.policy(hop), self.links.get(&hop.ifindex)) {
            (Some(policy), _) => policy.to_string(),
            (None, Some(link)) => format!("{} is no Ethernet device", link.name),
            (None, None) => "the device of the path is new".to_owned(),
        })
    }

    /// The devices of all paths.
    pub(crate) fn devices(&self) -> &BTreeSet<u32> {
        &self.devices
    }

    /// Whether the kernel was asked about a peer and has a route to it.
    pub(crate) fn has(&self, peer: Ipv4Addr) -> bool {
        self.kernel.contains_key(&peer)
    }

    /// Whether a path has a device that was not there at the last refresh.
    pub(crate) fn has_unknown_device(&self) -> bool {
        self.devices.iter().any(|index| !self.links.contains_key(index))
    }

    /// A device as it was at the last refresh; `None` for overlay devices.
    pub(crate) fn link(&self, index: u32) -> Option<&Link> {
        self.links.get(&index).filter(|link| !crate::device::is_ours(link))
    }
}

/// Whether a device of this host has the address.
fn is_held(address: Ipv4Addr) -> bool {
    UdpSocket::bind((address, 0)).is_ok()
}

/// The way to a peer by the kernel's route, with the MTU that routers `learned` us, if any.
fn next_hop(
    peer: Peer,
    route: Option<&KernelRoute>,
    links: &BTreeMap<u32, Link>,
    learned: Option<u16>,
) -> NextHop {
    let unreachable = NextHop { peer: peer.address.octets(), ..NextHop::default() };
    let Some(route) = route else { return unreachable };
    // A device that appeared after the last refresh is looked at soon; until then the kernel's socket is right.
    let link = links.get(&route.ifindex);
    // The overlay cannot carry its own packets.
    if link.is_some_and(crate::device::is_ours) {
        return unreachable;
    }
    let limits = [link.map(|link| link.mtu), route.mtu, learned.map(u32::from)];
    // Of a device that is not known yet, the socket refuses what does not fit.
    let path_mtu = limits.into_iter().flatten().min().unwrap_or(u32::from(u16::MAX)).max(u32::from(LOWEST));
    let mtu = path_mtu.min(u32::from(u16::MAX)) as u16 - OVERHEAD as u16;
    let mut flags = 0;
    if !link.is_some_and(|link| link.ethernet) {
        flags |= NextHop::SLOW_PATH;
    }
    if !peer.takes_unfinished && passes_unfinished(route.ifindex, links, 0) {
        flags |= NextHop::FINISHED_ONLY;
    }
    NextHop { ifindex: route.ifindex, mtu, flags, ..unreachable }
}

/// Deepest stack of devices that is followed.
const DEEPEST: u32 = 4;

/// Whether a device may hand super-packets and unfinished checksums to its other end. The kernel finishes encapsulated packets for
/// hardware and virtio devices, also below others.
fn passes_unfinished(index: u32, links: &BTreeMap<u32, Link>, depth: u32) -> bool {
    let Some(link) = links.get(&index) else { return true };
    if depth > DEEPEST {
        return true;
    }
    match link.kind.as_deref() {
        None => false,
        Some("vlan" | "macvlan" | "macvtap" | "ipvlan") => {
            link.lower.is_none_or(|lower| passes_unfinished(lower, links, depth + 1))
        }
        Some("bridge" | "bond" | "team") => {
            let mut ports = links.values().filter(|port| port.controller == Some(index)).peekable();
            ports.peek().is_none() || ports.any(|port| passes_unfinished(port.index, links, depth + 1))
        }
        Some(_) => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PEER: Peer = Peer { address: Ipv4Addr::new(192, 168, 77, 2), takes_unfinished: true };
    const FLANNELD: Peer = Peer { takes_unfinished: false, ..PEER };

    fn link(index: u32, kind: Option<&str>) -> Link {
        Link { kind: kind.map(str::to_owned), ..Link::ethernet(index, &format!("dev{index}")) }
    }

    fn links(all: impl IntoIterator<Item = Link>) -> BTreeMap<u32, Link> {
        all.into_iter().map(|link| (link.index, link)).collect()
    }

    fn route(ifindex: u32, mtu: Option<u32>) -> KernelRoute {
        KernelRoute { ifindex, mtu, neighbour: None }
    }

    #[test]
    fn the_lowest_of_device_route_and_report_is_the_path_mtu() {
        let links = links([link(2, None)]);
        let mtu = |route_mtu, learned| next_hop(PEER, Some(&route(2, route_mtu)), &links, learned).mtu + 28;
        assert_eq!(mtu(None, None), 1500);
        assert_eq!(mtu(Some(1450), None), 1450);
        assert_eq!(mtu(Some(1450), Some(1400)), 1400);
        assert_eq!(mtu(Some(9000), Some(1600)), 1500);
        assert_eq!(mtu(Some(100), None), LOWEST);
    }

    #[test]
    fn a_peer_without_a_usable_route_is_unreachable() {
        let mut own = link(3, Some("tun"));
        own.alias = Some("overlay-agent 10.244.0.0/16 8285 eth0".to_owned());
        let links = links([link(2, None), own]);
        let ifindex = |route: Option<KernelRoute>| next_hop(PEER, route.as_ref(), &links, None).ifindex;
        assert_eq!(ifindex(None), 0);
        assert_eq!(ifindex(Some(route(3, None))), 0, "a loop");
        assert_eq!(ifindex(Some(route(2, None))), 2);
    }

    #[test]
    fn peers_behind_a_device_without_ethernet_take_the_slow_path() {
        let links = links([link(2, None), Link { ethernet: false, ..link(3, Some("wireguard")) }]);
        let is_slow = |index| next_hop(PEER, Some(&route(index, None)), &links, None).has(NextHop::SLOW_PATH);
        assert_eq!((is_slow(2), is_slow(3), is_slow(99)), (false, true, true));
    }

    #[test]
    fn only_devices_that_finish_nothing_need_peers_that_do() {
        let over = |kind, lower| Link { lower: Some(lower), ..link(10, Some(kind)) };
        let port = |index, kind| Link { controller: Some(10), ..link(index, kind) };
        let flag = |peer, all: Vec<Link>| {
            next_hop(peer, Some(&route(10, None)), &links(all), None).has(NextHop::FINISHED_ONLY)
        };
        assert!(!flag(FLANNELD, vec![link(10, None)]), "hardware, virtio");
        assert!(flag(FLANNELD, vec![link(10, Some("veth"))]));
        assert!(!flag(PEER, vec![link(10, Some("veth"))]));
        for (below, expected) in [(None, false), (Some("veth"), true)] {
            assert_eq!(flag(FLANNELD, vec![over("vlan", 2), link(2, below)]), expected);
            let bridge = vec![link(10, Some("bridge")), port(2, None), port(3, below)];
            assert_eq!(flag(FLANNELD, bridge), expected);
        }
        assert!(flag(FLANNELD, vec![link(10, Some("bridge"))]), "no ports yet");
        assert!(flag(FLANNELD, vec![over("vlan", 10)]), "a loop ends");
    }

    #[test]
    fn the_addresses_of_the_paths_neighbour_are_used_and_no_others() {
        let gateway = Ipv4Addr::new(192, 168, 77, 254);
        let mut paths = Paths::new(Ipv4Addr::new(192, 168, 77, 1), 8285).unwrap();
        paths.links = links([link(2, None), Link { ethernet: false, ..link(3, Some("wireguard")) }]);
        let known = |address, last| {
            let addresses = LinkAddresses { destination: [2, 0, 0, 0, 0, last], source: [2, 0, 0, 0, 0, 1] };
            [2, 3].map(|ifindex| (Via { ifindex, address }, Some(addresses)))
        };
        paths.set_neighbours(&[known(gateway, 0x54), known(PEER.address, 2)].concat().into_iter().collect());
        let mut hop = |ifindex, neighbour| {
            paths.kernel.insert(PEER.address, KernelRoute { ifindex, mtu: None, neighbour });
            paths.next_hop(PEER, Instant::now())
        };
        let resolved = hop(2, Some(gateway));
        assert!(resolved.has(NextHop::RESOLVED));
        assert_eq!((resolved.mac, resolved.source_mac), ([2, 0, 0, 0, 0, 0x54], [2, 0, 0, 0, 0, 1]));
        assert_eq!(hop(2, Some(PEER.address)).mac, [2, 0, 0, 0, 0, 2]);
        for unresolved in [hop(2, None), hop(2, Some(Ipv4Addr::LOCALHOST)), hop(3, Some(gateway))] {
            assert_eq!((unresolved.mac, unresolved.source_mac), ([0; 6], [0; 6]));
            assert!(!unresolved.has(NextHop::RESOLVED));
        }
        assert_eq!(paths.via(Ipv4Addr::LOCALHOST), None, "no route");
        paths.kernel.insert(PEER.address, KernelRoute { ifindex: 2, mtu: None, neighbour: Some(gateway) });
        let everything = ["192.168.77.0/30", "10.0.0.0/8"].map(|prefix| prefix.parse().unwrap()).into();
        assert_eq!(paths.peers_in(&everything), [PEER.address].into());
        assert_eq!(paths.peers_in(&["192.168.77.3/32".parse().unwrap()].into()), BTreeSet::new());
        paths.set_neighbours(&[(Via { ifindex: 2, address: gateway }, None)].into());
        assert!(!paths.next_hop(PEER, Instant::now()).has(NextHop::RESOLVED));
    }
}
