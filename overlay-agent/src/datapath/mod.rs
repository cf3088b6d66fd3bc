//! How packets move. [`Datapath::reconcile`] takes the desired state, compares it with what it made and with what the kernel
//! says, and makes the steps that differ.

mod desired;
mod diversion;
pub mod ebpf;
mod fast;
mod inherited;
mod local;
mod losses;
mod plan;
mod refusals;
mod rungs;
mod tally;
pub mod tun;

pub use desired::{
    BypassRequest, Choice, Desired, PathCounters, Policy, Report, Request, Rung, UnderlayDevice,
};
pub(crate) use inherited::{Descriptor, Inherited};
pub use losses::KernelDrops;
pub use refusals::Pauses;
pub use rungs::{ActiveRung, Postponed, RungChanges};
pub(crate) use tally::Tally;

use std::{
    net::{Ipv4Addr, SocketAddrV4},
    sync::Arc,
};

use anyhow::{Context as _, Result};
use overlay_ebpf::{abi::NextHop, rejection::Rejection};
use tokio::sync::mpsc;
use tracing::{debug, warn};
use tun::{Endpoint, Settings, SlowCounters, Socket, TunRung};

use crate::{
    capabilities::Missing,
    containers::Containers,
    device::{self, DeviceSpec, OverlayDevice},
    icmp::Answers,
    netlink::{LinkDrops, Netlink, Route},
    route::{NextHops, RouteChange},
};
use ebpf::{
    Pins, RouteWrites, detach_left,
    overlay_set::{FormerAddresses, LOCAL},
};
use fast::{FastPath, Wanted};
use losses::{DeviceLosses, SocketLosses};
use tally::SeenDevice;

/// A datapath: the overlay device, the slow path on it, and as much of the fast path as is requested and possible.
/// Dropping it detaches the programs and stops the threads; [`Datapath::remove`] also removes the device.
pub struct Datapath {
    netlink: Netlink,
    failures: mpsc::Sender<String>,
    // Dropped first: no program may redirect to a device that is gone.
    fast: FastPath,
    slow: Option<TunRung>,
    sockets: Vec<Arc<Socket>>,
    counters: Arc<SlowCounters>,
    answers: Arc<Answers>,
    device_losses: DeviceLosses,
    socket_losses: Arc<SocketLosses>,
    /// What the last reconciliation made of the device.
    device: Option<DeviceSpec>,
    /// What an earlier agent left open, until it is taken over.
    inherited: Inherited,
    /// Whether the filters that a killed agent left on devices of containers are removed.
    is_swept: bool,
}

impl Datapath {
    /// A datapath without device and programs. When its slow path has to stop, the reason comes through `failures`; the next
    /// [`Datapath::reconcile`] makes what was lost again. With `pins`, programs and maps can outlive the process. [`Request::Auto`]
    /// attempts after `pauses` what was refused.
    pub fn new(netlink: Netlink, failures: mpsc::Sender<String>, pins: Option<Pins>, pauses: Pauses) -> Self {
        Self {
            fast: FastPath::new(netlink.clone(), pins, pauses),
            netlink,
            failures,
            slow: None,
            sockets: Vec::new(),
            counters: Arc::default(),
            answers: Arc::new(Answers::open()),
            device_losses: DeviceLosses::default(),
            socket_losses: Arc::default(),
            device: None,
            inherited: Inherited::default(),
            is_swept: false,
        }
    }

    /// Goes on from what an earlier agent has counted.
    pub(crate) fn restore(&mut self, tally: &Tally) {
        self.fast.restore(tally);
        self.fast.rungs.changes = tally.rungs;
        self.counters.restore(&tally.slow.counters(), tally.refused);
        let device =
            tally.device.map(|SeenDevice { index, received, sent }| (index, LinkDrops { received, sent }));
        self.device_losses.restore(device, tally.device_total());
        self.socket_losses.restore(tally.sockets);
    }

    /// What was counted until now, for [`Self::restore`]. Fails when the kernel's map cannot be read.
    pub(crate) fn tally(&self) -> Result<Tally> {
        let (fast, pinned) = self.fast.tally()?;
        let (device, total) = self.device_losses.state();
        Ok(Tally {
            fast: fast.into(),
            pinned: pinned.into(),
            slow: self.counters.read().into(),
            refused: self.counters.refused(),
            device: device.map(|(index, LinkDrops { received, sent })| SeenDevice { index, received, sent }),
            device_received: total.received,
            device_sent: total.sent,
            sockets: self.socket_losses.total(),
            rungs: self.fast.rungs.changes,
        })
    }

    /// Changes that were made in the route maps of the present programs.
    pub(crate) fn route_writes(&self) -> RouteWrites {
        self.fast.route_writes()
    }

    /// Makes the datapath what `desired` says, and repairs what was changed by others. Programs, threads and sockets that
    /// `desired` does not change stay as they are.
    ///
    /// Fails when the slow path cannot start or an explicit request cannot be met. The steps before stay, and the next call
    /// continues; but programs are detached when none were attached before.
    pub async fn reconcile(&mut self, desired: &Desired<'_>) -> Result<Report> {
        let mut report = Report::default();
        let sockets = self.bind_sockets(desired, &mut report)?;
        let (opened, others_routes) = self.reconcile_device(desired.device, &mut report).await?;
        let ifindex = opened.as_ref().map(|device| device.index).or_else(|| self.overlay_ifindex());
        let ifindex = ifindex.context("the overlay device is not open")?;
        let config = desired.config(ifindex)?;
        let settings = Settings {
            config,
            own: desired.device.subnet.base(),
            mtu: desired.device.mtu as usize,
            sockets: sockets.clone(),
        };
        if let Some(device) = opened {
            let shared = (Arc::clone(&self.counters), Arc::clone(&self.answers));
            self.slow = Some(TunRung::start(device, settings, desired.routes, shared, &self.failures)?);
        } else if let Some(rung) = &self.slow {
            rung.set_settings(settings);
            rung.set_routes(desired.routes);
        }
        // Replaced sockets are closed with the settings that had them.
        self.sockets = sockets;
        let plan = desired.plan(ifindex);
        let (routes, containers) = (desired.routes, desired.containers);
        self.fast.reconcile(Wanted { plan: &plan, config: &config, routes, containers }, &mut report).await?;
        if !self.is_swept {
            // They would go on with the routes and containers of that time.
            detach_left(&self.netlink, desired.device.alias.port, &LOCAL).await?;
        }
        self.fast.set_containers(desired.containers, &mut report).await?;
        if !self.is_swept && !self.fast.is_adopting {
            self.fast.unpin_others()?;
            self.is_swept = true;
        }
        let found =
            diversion::find(&self.netlink, &others_routes, ifindex, desired.device, desired.routes).await;
        self.inherited.discard();
        // The next check is not far.
        report.diverted =
            found.inspect_err(|error| debug!("look for other routes: {error:#}")).unwrap_or_default();
        Ok(report)
    }

    /// A socket for each underlay device: the present one where it is bound to the same address, port and device.
    fn bind_sockets(&mut self, desired: &Desired<'_>, report: &mut Report) -> Result<Vec<Arc<Socket>>> {
        let mut sockets = Vec::new();
        for UnderlayDevice { link, local_ip } in desired.underlays {
            let address = SocketAddrV4::new(*local_ip, desired.device.alias.port);
            let endpoint = Endpoint { address, ifindex: link.index };
            let present = self.sockets.iter().find(|socket| socket.endpoint == endpoint);
            sockets.push(match present {
                Some(socket) => Arc::clone(socket),
                None => {
                    let losses = Arc::clone(&self.socket_losses);
                    let socket = match self.inherited.take_socket(endpoint) {
                        Some(kept) => Socket::adopt(kept, endpoint, losses),
                        None => Socket::bind(endpoint, losses),
                    };
                    let socket = match socket {
                        Ok(socket) => socket,
                        // Other devices than the first come and go with routes.
                        Err(error) if !sockets.is_empty() => {
                            report.refused.push(format!("{error:#}"));
                            continue;
                        }
                        Err(error) => return Err(error),
                    };
                    report.made.push(format!("UDP socket {address} on {}", link.name));
                    Arc::new(socket)
                }
            });
        }
        Ok(sockets)
    }

    /// Opens the overlay device if it is missing, else repairs its attributes. Returns it if it was opened, and the kernel's
    /// routes as they were.
    async fn reconcile_device(
        &mut self,
        spec: &DeviceSpec,
        report: &mut Report,
    ) -> Result<(Option<OverlayDevice>, Vec<Route>)> {
        let links = self.netlink.links().await?;
        let rung = self.slow.as_ref().filter(|rung| rung.is_alive());
        let open = rung.and_then(|rung| Some((rung.ifindex, rung.device_name()?)));
        let Some(link) = open.and_then(|(index, name)| device::find(&links, index, &name)) else {
            // Ends what is left of it: the name is free only when its descriptor is closed.
            self.slow = None;
            device::preflight(&self.netlink, &spec.name, spec.alias.network).await?;
            let kept = self.inherited.take_queue(&spec.name);
            let is_kept = kept.is_some();
            let device = OverlayDevice::open(&self.netlink, spec, kept).await?;
            if let Some(drops) = self.netlink.drops(device.index).await? {
                if !is_kept {
                    self.report_unobserved(device.index, drops);
                }
                self.device_losses.follow(device.index, drops);
            }
            let lost = self.device.replace(spec.clone()).is_some_and(|before| before.name == spec.name);
            report.add(lost, format!("device {}", spec.name));
            return Ok((Some(device), self.netlink.routes().await?));
        };
        let (set, routes) = device::reconcile(&self.netlink, link, &links, spec)
            .await
            .with_context(|| format!("set up the overlay device {}", spec.name))?;
        let same = self.device.replace(spec.clone()).as_ref() == Some(spec);
        for attribute in set {
            report.add(same, format!("{attribute} of {}", spec.name));
        }
        Ok((None, routes))
    }

    /// Reports at the start of an agent what the device has dropped without one.
    fn report_unobserved(&self, index: u32, drops: LinkDrops) {
        let lost = self.device_losses.unobserved(index, drops);
        if self.device.is_none() && lost > 0 {
            warn!(
                "{lost} packets for peers were dropped while no agent read them, by the statistics of the overlay device; what peers \
                 sent to this host meanwhile is in no statistic"
            );
        }
    }

    /// Takes over what an earlier agent left open, at the next [`Datapath::reconcile`]: packets wait there.
    pub(crate) fn inherit(&mut self, inherited: Inherited) {
        self.inherited = inherited;
    }

    /// What the next agent can take over, without a loss of packets that arrive meanwhile.
    pub(crate) fn descriptors(&self) -> Vec<Descriptor<'_>> {
        let queue = self.slow.as_ref().zip(self.device.as_ref());
        let queue = queue.map(|(rung, spec)| Descriptor::of_queue(&spec.name, rung.queue()));
        queue.into_iter().chain(self.sockets.iter().map(|socket| socket.descriptor())).collect()
    }

    /// Makes `changes`, which lead to `routes`, in both paths. Fails when the kernel refuses an update of its map, or the map is
    /// full: the slow path has the routes then all the same, and the next call compares all routes.
    pub fn apply_routes(&mut self, changes: &[RouteChange<NextHop>], routes: &NextHops) -> Result<()> {
        if let Some(rung) = &self.slow {
            rung.apply_routes(changes);
        }
        self.fast.apply_routes(changes, routes)
    }

    /// Accepts packets from these former addresses of peers, and from no other one. Fails when the kernel refuses an update of its map: the slow
    /// path accepts them then all the same.
    pub(crate) fn set_former(&mut self, former: FormerAddresses) -> Result<()> {
        if let Some(rung) = &self.slow {
            rung.set_former(&former);
        }
        self.fast.set_former(former)
    }

    /// Makes the bypass what `containers` says. Fails when the kernel refuses an update of its map.
    pub(crate) async fn set_containers(&mut self, containers: &Containers) -> Result<Report> {
        let mut report = Report::default();
        self.fast.set_containers(containers, &mut report).await?;
        Ok(report)
    }

    /// How many devices and containers the bypass has.
    pub(crate) fn bypassed(&self) -> (usize, usize) {
        self.fast.bypass().size()
    }

    /// Why the kernel cannot have the bypass that was asked for.
    pub(crate) fn bypass_refused(&self) -> Option<&str> {
        self.fast.bypass().refused.as_deref()
    }

    /// The peer to which the slow path sends packets for an overlay address.
    pub(crate) fn peer_of(&self, address: Ipv4Addr) -> Option<Ipv4Addr> {
        Some(self.slow.as_ref()?.next_hop(address)?.peer.into())
    }

    /// Tells the sender of an inner packet, of which `packet` shows the first bytes, why it did not arrive.
    pub(crate) fn answer(&self, packet: &[u8], rejection: Rejection) {
        if let Some(device) = &self.device {
            self.answers.send(packet, device.subnet.base(), rejection);
        }
    }

    /// Whether the programs that were attached still are, as far as the kernel tells. [`Datapath::reconcile`] repairs others.
    pub async fn has_programs(&self) -> bool {
        self.fast.has_programs().await
    }

    /// How inner packets leave.
    pub fn egress(&self) -> &Choice {
        &self.fast.rungs.egress.choice
    }

    /// How outer packets arrive.
    pub fn ingress(&self) -> &Choice {
        &self.fast.rungs.ingress.choice
    }

    /// The rungs of egress and ingress, with their history.
    pub(crate) fn rungs(&self) -> [&ActiveRung; 2] {
        [&self.fast.rungs.egress, &self.fast.rungs.ingress]
    }

    /// Attempts at the next reconciliation what was refused before, as if it had never been.
    pub(crate) fn forget_refusals(&mut self) {
        self.fast.forget_refusals();
    }

    /// Whether the next reconciliation attempts something that was refused.
    pub(crate) fn is_attempt_due(&self) -> bool {
        self.fast.is_attempt_due()
    }

    /// What [`Request::Auto`] goes without for a while.
    pub(crate) fn postponed(&self) -> Vec<Postponed> {
        self.fast.postponed()
    }

    /// The capabilities for whose lack [`Request::Auto`] has chosen the tun rung.
    pub(crate) fn missing_capabilities(&self) -> Option<&Missing> {
        self.fast.missing_capabilities()
    }

    /// Index of the overlay device; `None` while there is none.
    pub fn overlay_ifindex(&self) -> Option<u32> {
        self.slow.as_ref().map(|rung| rung.ifindex)
    }

    /// What both paths and the kernel's queues have counted since this value was made. Fails when the kernel's map or statistics
    /// cannot be read.
    pub async fn counters(&self) -> Result<PathCounters> {
        self.observe_drops().await?;
        let device = self.device_losses.total();
        let kernel = KernelDrops {
            device_queue_full: device.sent,
            // The device counts the agent's packets that it refused as well; the agent has counted them as `device_failed`.
            delivery_refused: device.received.saturating_sub(self.counters.refused()),
            socket_buffer_full: self.socket_losses.total(),
        };
        let rungs = self.fast.rungs.changes;
        Ok(PathCounters { fast: self.fast.counters()?, slow: self.counters.read(), kernel, rungs })
    }

    /// Reads what the overlay device and the sockets dropped. A device that another program removes takes with it what it dropped since
    /// the last reading. Fails when the kernel does not say.
    pub(crate) async fn observe_drops(&self) -> Result<()> {
        if let Some(index) = self.overlay_ifindex()
            && let Some(drops) = self.netlink.drops(index).await?
        {
            self.device_losses.observe(index, drops);
        }
        self.sockets.iter().try_for_each(|socket| socket.count_losses())
    }

    /// Tells the programs that the agent keeps up to date what only an agent can. To be called at least every few seconds: otherwise the
    /// programs leave neighbours and containers to the kernel. Fails when the kernel refuses it.
    pub(crate) fn show_alive(&mut self) -> Result<()> {
        self.fast.show_alive()
    }

    /// Whether an earlier agent's programs are attached, which no reconciliation has replaced yet.
    pub(crate) fn is_adopting(&self) -> bool {
        self.fast.is_adopting
    }

    /// Whether programs are attached that would go on without this process.
    pub(crate) fn is_pinned(&self) -> bool {
        self.fast.is_pinned()
    }

    /// Whether no eBPF program carries packets.
    pub(crate) fn is_slow_only(&self) -> bool {
        [self.egress(), self.ingress()].iter().all(|choice| choice.rung == Rung::Tun)
    }

    /// Leaves programs, maps and device in the kernel, which forwards packets by the routes of this moment, and stops the threads. What
    /// is not pinned is removed.
    pub fn leave(&mut self) {
        self.fast.leave();
        self.slow = None;
        self.sockets.clear();
        self.device = None;
    }

    /// As [`Self::leave`], and returns what the next agent needs to lose nothing. If there is none, this value can go on with it.
    /// Fails when the kernel has no descriptors for their duplicates.
    pub(crate) fn hand_over(&mut self) -> Result<Inherited> {
        let duplicate = |descriptor: Descriptor<'_>| {
            let fd = descriptor
                .fd
                .try_clone_to_owned()
                .with_context(|| format!("duplicate {}", descriptor.name))?;
            anyhow::Ok((descriptor.name, fd))
        };
        let kept = self.descriptors().into_iter().map(duplicate).collect::<Result<_>>()?;
        self.leave();
        self.fast.expect_links();
        Ok(Inherited::new(kept))
    }

    /// Detaches the programs, stops the threads and removes the overlay device, in this order: nothing may redirect to a
    /// device that is gone. Fails when the device is not ours any more or the kernel refuses.
    pub async fn remove(&mut self) -> Result<()> {
        self.fast.unload();
        self.slow = None;
        self.sockets.clear();
        if let Some(spec) = self.device.take() {
            device::remove(&self.netlink, &spec.name).await?;
        }
        Ok(())
    }
}
