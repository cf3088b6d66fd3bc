//! The next hops of all routes: which peer holds a subnet, from the route table, and how that peer is reached, from the kernel and
//! from ICMP.

use std::{
    collections::BTreeSet,
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use anyhow::Result;
use overlay_ebpf::abi::NextHop;
use tokio::sync::mpsc;
use tracing::{info, warn};

use crate::{
    icmp::{self, Report},
    netlink::{Link, Netlink},
    path::Paths,
    report,
    route::{NextHops, RouteChange, Routes, Subnet, diff},
};

/// Time after which the kernel is asked about all peers again although nothing was seen to change: its cached path MTUs expire
/// silently.
const REFRESH_INTERVAL: Duration = Duration::from_secs(60);
/// Share of the time that may be spent on asking: 1 in 10.
const REFRESH_SHARE: u32 = 10;

/// The next hops, and what they follow from.
pub(super) struct NextHopTable {
    paths: Paths,
    hops: NextHops,
    /// What ICMP says about outer packets; `None` without the right to hear it.
    reports: Option<mpsc::Receiver<Report>>,
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
            reports: None,
            stale: true,
            refresh: None,
        })
    }

    /// Begins to hear what ICMP says about outer packets.
    pub(super) fn listen(&mut self) {
        let reports = icmp::listen();
        let reports = reports.inspect_err(|error| {
            warn!("neither the MTU of paths nor unreachable peers are learned from ICMP: {error:#}");
        });
        self.reports = reports.ok();
    }

    /// The next report.
    pub(super) async fn next_report(&mut self) -> Report {
        match &mut self.reports {
            Some(reports) => match reports.recv().await {
                Some(report) => report,
                None => std::future::pending().await,
            },
            None => std::future::pending().await,
        }
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
        self.paths.local_ip = local_ip;
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
        // Changes that come after this are seen later.
        self.stale = false;
        let links = netlink.links().await?;
        let refreshed = self.paths.refresh(&peers, links);
        self.stale = refreshed.is_err();
        let spent = now.elapsed();
        self.refresh = Some((now + spent * REFRESH_SHARE, now + REFRESH_INTERVAL));
        refreshed?;
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
        let changes = self.recompute(routes, now);
        if !changes.is_empty() {
            info!("a router reports that the path to {peer} carries {mtu} bytes");
        }
        changes
    }

    fn recompute(&mut self, routes: &Routes, now: Instant) -> Vec<RouteChange<NextHop>> {
        let desired =
            routes.iter().map(|(subnet, peer)| (*subnet, self.paths.next_hop(*peer, now))).collect();
        let changes = diff(&self.hops, &desired);
        self.hops = desired;
        changes
    }

    /// The peer to which packets for an overlay address go.
    pub(super) fn peer_of(&self, address: Ipv4Addr) -> Option<Ipv4Addr> {
        let holders = self.hops.iter().filter(|(subnet, _)| subnet.prefix().contains(&address));
        let hop = holders.max_by_key(|(subnet, _)| subnet.prefix().prefix_len());
        hop.map(|(_, hop)| hop.peer.into())
    }

    /// The devices through which peers are reached.
    pub(super) fn devices(&self) -> impl Iterator<Item = &Link> {
        self.paths.devices().into_iter().filter_map(|index| self.paths.link(index))
    }

    /// The routes, for `overlay-agent routes`.
    pub(super) fn report(&self) -> Vec<report::Route> {
        let route = |(subnet, hop): (&Subnet, &NextHop)| report::Route {
            subnet: *subnet,
            peer: hop.peer.into(),
            device: self.paths.link(hop.ifindex).map(|link| link.name.clone()),
            mtu: (hop.ifindex != 0).then_some(hop.mtu),
            slow_path: self.paths.why_slow(hop),
        };
        self.hops.iter().map(route).collect()
    }

    /// Number of routes whose packets take the slow path for a reason of their peer.
    pub(super) fn slow_routes(&self) -> usize {
        self.hops.values().filter(|hop| hop.has(NextHop::SLOW_PATH)).count()
    }
}
