//! The next hops of all routes: which peer holds a subnet, from the route table, and how that peer is reached, from the kernel and
//! from ICMP.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use overlay_ebpf::abi::NextHop;
use tokio::sync::{mpsc, watch};
use tracing::{info, warn};

use crate::{
    icmp::{self, Report},
    netlink::{Link, Netlink},
    path::{Changes, NeighbourWatch, Paths, Via},
    report,
    route::{NextHops, Peer, RouteChange, Routes, Subnet, diff},
    xfrm::{self, Policies},
};

/// Time after which the kernel is asked about all peers again although nothing was seen to change: its cached path MTUs expire
/// silently.
const REFRESH_INTERVAL: Duration = Duration::from_secs(60);
/// Pause after the kernel did not answer.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);
/// Peers about which the kernel may be asked at any time.
const MOST_AT_ONCE: usize = 256;
/// Share of the time that may be spent on asking: 1 in 10.
const REFRESH_SHARE: u32 = 10;

/// What changes next hops beside the store and the host's routes.
pub(super) enum Happening {
    /// ICMP says something about an outer packet.
    Report(Report),
    /// The host has other IPsec policies.
    Policies(Arc<Policies>),
    /// Other addresses of neighbours are known, or other routes.
    Neighbours(Changes),
}

/// The next hops, and what they follow from.
pub(super) struct NextHopTable {
    paths: Paths,
    hops: NextHops,
    /// The routes by each neighbour, and perhaps some that go elsewhere by now.
    by_neighbour: BTreeMap<Via, BTreeSet<Subnet>>,
    /// What ICMP says about outer packets; `None` without the right to hear it.
    reports: Option<mpsc::Receiver<Report>>,
    /// The host's IPsec policies; `None` when they cannot be read.
    policies: Option<watch::Receiver<Arc<Policies>>>,
    /// The neighbours of this host; `None` when the kernel refuses to tell.
    neighbours: Option<NeighbourWatch>,
    /// Whether something has changed since the kernel was asked about all peers.
    stale: bool,
    /// When the kernel may be asked about all peers again, and when it should be.
    refresh: Option<(Instant, Instant)>,
}

impl NextHopTable {
    /// No next hops yet. `local_ip` is the source of outer packets, `port` the network's UDP port.
    /// Fails when the kernel refuses a netlink socket.
    pub(super) fn new(local_ip: Ipv4Addr, port: u16) -> Result<Self> {
        Ok(Self {
            paths: Paths::new(local_ip, port)?,
            hops: NextHops::new(),
            by_neighbour: BTreeMap::new(),
            reports: None,
            policies: None,
            neighbours: None,
            stale: true,
            refresh: None,
        })
    }

    /// Begins to hear what ICMP says about outer packets, and to follow the host's IPsec policies and neighbours.
    /// Fails when the policies cannot be read: packets that they concern might leave in clear.
    pub(super) async fn follow(&mut self) -> Result<()> {
        let mut policies = xfrm::watch().await.context("follow the IPsec policies")?;
        self.paths.policies = Arc::clone(&policies.borrow_and_update());
        self.policies = Some(policies);
        let reports = icmp::listen();
        let reports = reports.inspect_err(|error| {
            warn!("neither the MTU of paths nor unreachable peers are learned from ICMP: {error:#}");
        });
        self.reports = reports.ok();
        let neighbours = NeighbourWatch::start().await;
        let neighbours = neighbours.inspect_err(|error| {
            warn!("the kernel looks up the neighbour of each packet: {error:#}");
        });
        self.neighbours = neighbours.ok();
        Ok(())
    }

    /// What happens next outside of the store and the host's routes.
    pub(super) async fn next(&mut self) -> Happening {
        let Self { reports, policies, neighbours, .. } = self;
        let report = async {
            match reports {
                Some(reports) => reports.recv().await,
                None => None,
            }
        };
        let policies = async {
            match policies {
                Some(policies) => {
                    policies.changed().await.ok().map(|()| Arc::clone(&policies.borrow_and_update()))
                }
                None => None,
            }
        };
        let neighbours = async {
            match neighbours {
                Some(neighbours) => Some(neighbours.next().await),
                None => None,
            }
        };
        tokio::select! {
            Some(changes) = neighbours => Happening::Neighbours(changes),
            Some(report) = report => Happening::Report(report),
            Some(policies) = policies => Happening::Policies(policies),
            else => std::future::pending().await,
        }
    }

    /// Follows the host's IPsec policies, and returns the next hops that differ.
    pub(super) fn set_policies(
        &mut self,
        policies: Arc<Policies>,
        routes: &Routes,
        now: Instant,
    ) -> Vec<RouteChange<NextHop>> {
        self.paths.policies = policies;
        let before = self.slow_routes();
        let changes = self.recompute(routes, now);
        info!(
            "the IPsec policies have changed: {} routes take the slow path, {before} did before",
            self.slow_routes()
        );
        changes
    }

    /// All next hops.
    pub(super) fn hops(&self) -> &NextHops {
        &self.hops
    }

    /// The paths to all peers may have changed.
    pub(super) fn set_stale(&mut self) {
        self.stale = true;
    }

    /// Outer packets have another source.
    pub(super) fn set_local_ip(&mut self, local_ip: Ipv4Addr) {
        self.paths.set_local_ip(local_ip);
        self.refresh = None;
        self.stale = true;
    }

    /// Follows changes that led to `routes`. Until the first refresh, that is left to it.
    /// Fails when the kernel does not say how new peers are reached; they are unreachable until the next refresh.
    pub(super) fn apply(
        &mut self,
        changes: &[RouteChange],
        now: Instant,
    ) -> (Vec<RouteChange<NextHop>>, Result<()>) {
        if self.refresh.is_none() {
            return (Vec::new(), Ok(()));
        }
        let peers: BTreeSet<_> = changes
            .iter()
            .filter_map(|change| match change {
                RouteChange::Set(route) => Some(route.via.address),
                RouteChange::Remove(_) => None,
            })
            .collect();
        let added = self.paths.add(&peers);
        self.stale |= added.is_err() || self.paths.has_unknown_device();
        for change in changes {
            if let RouteChange::Set(route) = change {
                self.note_neighbour(route.subnet, route.via.address);
            }
        }
        let changes: Vec<_> =
            changes.iter().map(|change| change.map(|peer| self.paths.next_hop(peer, now))).collect();
        changes.iter().for_each(|change| change.make_in(&mut self.hops));
        (changes, added)
    }

    /// Whether it is time for [`Self::refresh`]: something has changed, or the last one is long ago.
    pub(super) fn needs_refresh(&self, now: Instant) -> bool {
        self.refresh.is_none_or(|(earliest, due)| now >= due || (self.stale && now >= earliest))
    }

    /// When [`Self::refresh`] is due after a change that came too early for it.
    pub(super) fn refresh_at(&self) -> Option<Instant> {
        self.refresh.filter(|_| self.stale).map(|(earliest, _)| earliest)
    }

    /// Asks the kernel about all peers of `routes`, and returns the next hops that differ.
    /// Fails when it does not answer; everything stays as it was.
    pub(super) async fn refresh(
        &mut self,
        netlink: &Netlink,
        routes: &Routes,
        now: Instant,
    ) -> Result<Vec<RouteChange<NextHop>>> {
        let peers: BTreeSet<_> = routes.values().map(|peer| peer.address).collect();
        let asked = match netlink.links().await {
            Ok(links) => self.paths.refresh(&peers, links),
            Err(error) => Err(error),
        };
        // The main loop waits here: what changes meanwhile is reported to it afterwards.
        self.stale = asked.is_err();
        let pause = match asked.is_err() {
            true => RETRY_INTERVAL,
            false => now.elapsed() * REFRESH_SHARE,
        };
        self.refresh = Some((now + pause, now + REFRESH_INTERVAL));
        asked?;
        self.paths.expire(now);
        Ok(self.recompute(routes, now))
    }

    /// Forgets what routers reported when it has expired, and returns the next hops that differ.
    pub(super) fn expire(&mut self, routes: &Routes, now: Instant) -> Vec<RouteChange<NextHop>> {
        match self.paths.expire(now) {
            true => self.recompute(routes, now),
            false => Vec::new(),
        }
    }

    /// A router reported that packets of more than `mtu` bytes do not reach `peer`. Returns the next hops that differ.
    pub(super) fn too_long(
        &mut self,
        peer: Ipv4Addr,
        mtu: u16,
        routes: &Routes,
        now: Instant,
    ) -> Vec<RouteChange<NextHop>> {
        if !self.paths.has(peer) || !self.paths.too_long(peer, mtu, now) {
            return Vec::new();
        }
        let own = routes.iter().filter(|(_, holder)| holder.address == peer);
        let own = own.map(|(subnet, holder)| (*subnet, *holder)).collect();
        let changes = self.recompute_some(&own, now);
        if !changes.is_empty() {
            info!("a router reports that the path to {peer} carries {mtu} bytes");
        }
        changes
    }

    /// Other addresses of neighbours are known, or peers have other routes. Returns the next hops that differ. Their kernel's routes
    /// are asked for at once, because programs do not notice by themselves that packets should go to another neighbour.
    pub(super) fn set_neighbours(
        &mut self,
        changes: &Changes,
        routes: &Routes,
        now: Instant,
    ) -> Vec<RouteChange<NextHop>> {
        self.paths.set_neighbours(&changes.neighbours);
        let subnets = changes.neighbours.keys().filter_map(|via| self.by_neighbour.get(via)).flatten();
        let mut concerned: Routes =
            subnets.filter_map(|subnet| Some((*subnet, *routes.get(subnet)?))).collect();
        let rerouted = self.paths.peers_in(&changes.rerouted);
        let is_too_early = self.refresh.is_none_or(|(earliest, _)| now < earliest);
        if rerouted.len() > MOST_AT_ONCE && is_too_early {
            self.stale = true;
        } else if !rerouted.is_empty() {
            self.stale |= self.paths.ask_again(&rerouted).is_err();
            let holds = |(_, peer): &(&Subnet, &Peer)| rerouted.contains(&peer.address);
            concerned.extend(routes.iter().filter(holds));
        }
        let changes = self.recompute_some(&concerned, now);
        let is_unresolved = |change: &RouteChange<NextHop>| match change {
            RouteChange::Set(route) => !route.via.has(NextHop::RESOLVED),
            RouteChange::Remove(_) => false,
        };
        if changes.iter().any(is_unresolved)
            && let Some(watch) = &self.neighbours
        {
            watch.look_again();
        }
        changes
    }

    /// Computes the next hops of some routes again, and returns those that differ.
    fn recompute_some(&mut self, routes: &Routes, now: Instant) -> Vec<RouteChange<NextHop>> {
        routes.iter().for_each(|(subnet, peer)| self.note_neighbour(*subnet, peer.address));
        let hops = routes.iter().map(|(subnet, peer)| (subnet, self.paths.next_hop(*peer, now)));
        let changed = hops.filter(|(subnet, hop)| self.hops.get(subnet) != Some(hop));
        let changes: Vec<_> = changed.map(|(subnet, hop)| RouteChange::set(*subnet, hop)).collect();
        changes.iter().for_each(|change| change.make_in(&mut self.hops));
        changes
    }

    fn recompute(&mut self, routes: &Routes, now: Instant) -> Vec<RouteChange<NextHop>> {
        self.by_neighbour.clear();
        routes.iter().for_each(|(subnet, peer)| self.note_neighbour(*subnet, peer.address));
        let desired =
            routes.iter().map(|(subnet, peer)| (*subnet, self.paths.next_hop(*peer, now))).collect();
        let changes = diff(&self.hops, &desired);
        self.hops = desired;
        changes
    }

    fn note_neighbour(&mut self, subnet: Subnet, peer: Ipv4Addr) {
        if let Some(via) = self.paths.via(peer) {
            self.by_neighbour.entry(via).or_default().insert(subnet);
        }
    }

    /// Whether the host has IPsec policies that may concern outer packets.
    pub(super) fn has_policies(&self) -> bool {
        !self.paths.policies.is_empty()
    }

    /// The devices through which peers are reached.
    pub(super) fn devices(&self) -> impl Iterator<Item = &Link> {
        self.paths.devices().iter().filter_map(|index| self.paths.link(*index))
    }

    /// The routes, for `overlay-agent routes`.
    pub(super) fn report(&self) -> Vec<report::Route> {
        let route = |(subnet, hop): (&Subnet, &NextHop)| report::Route {
            subnet: *subnet,
            peer: hop.peer.into(),
            device: self.paths.link(hop.ifindex).map(|link| link.name.clone()),
            mtu: (hop.ifindex != 0).then_some(hop.mtu),
            slow_path: self.paths.why_slow(hop),
            link_address: hop.has(NextHop::RESOLVED).then(|| report::hardware_address(hop.mac)),
        };
        self.hops.iter().map(route).collect()
    }

    /// Number of routes whose packets take the slow path for a reason of their peer.
    pub(super) fn slow_routes(&self) -> usize {
        self.hops.values().filter(|hop| hop.has(NextHop::SLOW_PATH)).count()
    }
}
