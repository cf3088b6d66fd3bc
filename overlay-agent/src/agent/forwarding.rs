//! Forwarding: routes from records, and the datapath that follows them.

use std::{net::Ipv4Addr, time::SystemTime};

use anyhow::{Result, bail};
use overlay_ebpf::{
    abi::{MAX_UNDERLAYS, NextHop, SourceCheck},
    rejection::Rejection,
    wire::{Bytes as _, Ipv4},
};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep_until},
};
use tracing::{debug, error, info, warn};

use super::{
    Options, StoreOption,
    bypass::ContainerWatch,
    change_log::ChangeLog,
    conditions::{Condition, Conditions},
    host_state::HostState,
    log_window::LogWindow,
    next_hops::{Happening, NextHopTable},
    readdressing::{FormerOwn, FormerPeers},
    retry::Retry,
};
use crate::{
    datapath::{Datapath, Desired, Request, UnderlayDevice, ebpf::Pins},
    device::{DeviceAlias, DeviceSpec},
    fd_store::FdStore,
    icmp::{Problem, Report},
    lease::{Lease, LeaseRecord},
    netlink::Netlink,
    report,
    route::{LocalNode, RouteChange, Routes},
    route_table::{Outcome, OwnRecord, OwnSubnet, Rival, RouteTable},
    run_record::RunRecord,
    store::Event,
    timer::sleep_until_some,
    underlay::{Iface, Underlay},
};

/// Index of the loopback device in every network namespace.
const LOOPBACK: u32 = 1;
/// Problems of one kind that are named one by one.
const NAMED: usize = 5;
/// Most lines about repairs in a window: another program may make the same change again and again.
const REPAIRS: usize = 20;

/// Route table and datapath.
pub(super) struct Forwarding {
    pub(super) table: RouteTable,
    /// The table's routes, for other tasks.
    routes: watch::Sender<Routes>,
    pub(super) datapath: Datapath,
    /// What systemd keeps for the next start.
    pub(super) fd_store: FdStore,
    failures: mpsc::Receiver<String>,
    pub(super) spec: DeviceSpec,
    /// The device with this host's address. Others come with the paths of peers.
    underlay: UnderlayDevice,
    netlink: Netlink,
    pub(super) next_hops: NextHopTable,
    pub(super) options: Options,
    /// The requested rung: that of the options until an operator asks for another.
    pub(super) request: Request,
    pub(super) former: FormerOwn,
    pub(super) former_peers: FormerPeers,
    /// For the bypass.
    pub(super) containers: ContainerWatch,
    /// Why programs cannot outlive the agent.
    pub(super) unpinned: Option<String>,
    /// Whether a snapshot of the records was seen: from then on, no route is missing.
    has_snapshot: bool,
    /// Of when the records are, while they are those of an earlier run.
    recalled: Option<SystemTime>,
    /// Whether the last reconciliation succeeded, and nothing has failed since.
    up: bool,
    retry: Retry,
    /// This host when the last attempt failed.
    failed_on: Option<HostState>,
    repair_log: LogWindow,
    change_log: ChangeLog,
    pub(super) conditions: Conditions,
}

impl Forwarding {
    /// Prepares forwarding without changing the host. `mtu` is that of the overlay device.
    /// Fails when the kernel refuses a netlink socket.
    pub(super) fn new(
        options: &Options,
        netlink: &Netlink,
        local: LocalNode,
        underlay: &Underlay,
        port: u16,
        mtu: u32,
    ) -> Result<Self> {
        let (sender, failures) = mpsc::channel(2);
        let (pins, unpinned) = match Pins::open(&options.device) {
            Ok(pins) => (Some(pins), None),
            Err(error) => (None, Some(format!("{error:#}"))),
        };
        if let Some(pins) = &pins
            && let Err(error) = pins.discard_detached()
        {
            warn!("{error:#}");
        }
        let mut datapath = Datapath::new(netlink.clone(), sender, pins, options.rung_pauses);
        if let Some((record, _)) = RunRecord::read(&options.record_file()) {
            datapath.restore(&record.tally);
        }
        let alias = DeviceAlias { network: local.network, port, underlays: vec![underlay.link.name.clone()] };
        Ok(Self {
            table: RouteTable::new(local, options.peers.clone()),
            routes: watch::Sender::new(options.peers.clone()),
            datapath,
            fd_store: FdStore::default(),
            failures,
            spec: DeviceSpec { name: options.device.clone(), alias, subnet: local.subnet, mtu },
            underlay: UnderlayDevice { link: underlay.link.clone(), local_ip: underlay.local_ip },
            netlink: netlink.clone(),
            next_hops: NextHopTable::new(underlay.local_ip, port)?,
            options: options.clone(),
            request: options.datapath,
            former: FormerOwn::default(),
            former_peers: FormerPeers::default(),
            containers: ContainerWatch::new(options),
            unpinned,
            has_snapshot: false,
            recalled: None,
            up: false,
            retry: Retry::default(),
            failed_on: None,
            repair_log: LogWindow::default(),
            change_log: ChangeLog::default(),
            conditions: Conditions::default(),
        })
    }

    /// Makes the datapath for the first time.
    /// Fails when a step fails; see [`Datapath::reconcile`].
    pub(super) async fn start(&mut self) -> Result<()> {
        self.next_hops.follow().await?;
        self.reconcile().await?;
        if let Some(why) = self.conditions.get(Condition::Paths) {
            bail!("{why}");
        }
        self.up = true;
        self.retry.succeeded(Instant::now());
        Ok(())
    }

    /// Reconciles the datapath with the options, the request, the underlay and the route table.
    pub(super) async fn reconcile(&mut self) -> Result<()> {
        let changes = self.follow_paths().await;
        let reconciled = self.reconcile_datapath().await;
        if reconciled.is_err() {
            // What works goes on with the paths as they are now.
            self.apply_next_hops(&changes);
        }
        reconciled
    }

    async fn reconcile_datapath(&mut self) -> Result<()> {
        let underlays = self.underlays();
        let excluded = underlays.iter().map(|underlay| underlay.link.index);
        let excluded = excluded.chain(self.datapath.overlay_ifindex()).collect();
        self.containers.follow(self.spec.subnet.prefix(), excluded).await;
        self.spec.alias.underlays = underlays.iter().map(|device| device.link.name.clone()).collect();
        let (source, other_ip) = self.former.addresses(self.underlay.local_ip);
        let desired = Desired {
            device: &self.spec,
            underlays: &underlays,
            source,
            other_ip,
            policy: self.options.policy,
            slow_ingress: self.options.policy.source_check != SourceCheck::Strict
                && self.next_hops.has_policies(),
            request: self.request,
            tc_attach: self.options.tc_attach,
            bypass: self.options.bypass.into(),
            containers: &self.containers.get(),
            routes: self.next_hops.hops(),
            log: self.options.datapath_log,
        };
        let report = self.datapath.reconcile(&desired).await?;
        self.fd_store.update(&self.datapath.descriptors());
        for step in &report.made {
            info!("set up: {step}");
        }
        if !report.repaired.is_empty() {
            self.repair_log.renew(Instant::now());
            if self.repair_log.take_line(REPAIRS) {
                warn!("another program changed this host; repaired: {}", report.repaired.join(", "));
            }
        }
        self.conditions.update(Condition::Diversion, sentence(report.diverted.into_iter()));
        self.conditions.update(Condition::OtherUnderlays, sentence(report.refused.into_iter()));
        self.conditions.update(Condition::Programs, report.kept);
        self.set_routes_behind(report.routes_behind);
        self.set_no_bypass(report.no_bypass);
        let slow = self.datapath.missing_capabilities().map(|missing| {
            format!("every packet takes the slow path, on the tun rung: {missing}, or choose --datapath tun")
        });
        self.conditions.update(Condition::Capabilities, slow);
        self.conditions.update(Condition::Demotion, self.demotion());
        Ok(())
    }

    /// The devices that carry outer packets, that with this host's address first.
    fn underlays(&self) -> Vec<UnderlayDevice> {
        let first = self.underlay.clone();
        let others = self.next_hops.devices().filter(|link| link.index != first.link.index);
        let others: Vec<_> = others
            .map(|link| UnderlayDevice { link: link.clone(), local_ip: first.local_ip })
            .take(MAX_UNDERLAYS as usize - 1)
            .collect();
        std::iter::once(first).chain(others).collect()
    }

    /// Asks the kernel for the paths to all peers when they may have changed, and returns the next hops that differ.
    async fn follow_paths(&mut self) -> Vec<RouteChange<NextHop>> {
        let now = Instant::now().into_std();
        if !self.next_hops.needs_refresh(now) {
            return self.next_hops.expire(self.table.routes(), now);
        }
        let refreshed = self.next_hops.refresh(&self.netlink, self.table.routes(), now).await;
        let (changes, failed) = match refreshed {
            Ok(changes) => (changes, None),
            Err(error) => (Vec::new(), Some(error)),
        };
        self.set_paths_unknown(failed);
        changes
    }

    fn set_paths_unknown(&mut self, why: Option<anyhow::Error>) {
        let why = why.map(|error| format!("the paths to peers are not known, retrying: {error:#}"));
        self.conditions.update(Condition::Paths, why);
    }

    /// Does what [`Self::due`] has returned.
    pub(super) async fn on_due(&mut self, due: Due) {
        match due {
            Due::Reconcile => self.try_reconcile().await,
            Due::Containers => self.on_containers().await,
            Due::Former => self.expire_former().await,
            Due::Happening(Happening::Report(report)) => self.on_icmp(report),
            Due::Happening(Happening::Neighbours(neighbours)) => {
                let now = Instant::now().into_std();
                let changes = self.next_hops.set_neighbours(&neighbours, self.table.routes(), now);
                if !changes.is_empty() {
                    self.apply_next_hops(&changes);
                }
            }
            Due::Happening(Happening::Policies(policies)) => {
                let now = Instant::now().into_std();
                let changes = self.next_hops.set_policies(policies, self.table.routes(), now);
                self.apply_next_hops(&changes);
                // The configuration of the programs may depend on whether there are any.
                self.try_reconcile().await;
            }
        }
    }

    /// ICMP says something about an outer packet.
    fn on_icmp(&mut self, report: Report) {
        if report.source != self.underlay.local_ip || report.port != self.spec.alias.port {
            return;
        }
        // From a device on which peers' packets arrive, or from this host: containers can forge such messages, too.
        let is_underlay = self.underlays().iter().any(|underlay| underlay.link.index == report.ifindex);
        match report.problem {
            Problem::TooLong(_) if !is_underlay => {}
            Problem::Unreachable(_) if !is_underlay && report.ifindex != LOOPBACK => {}
            Problem::TooLong(mtu) => {
                let now = Instant::now().into_std();
                let changes = self.next_hops.too_long(report.peer, mtu, self.table.routes(), now);
                self.apply_next_hops(&changes);
            }
            Problem::Unreachable(inner) => {
                let Some(header) = inner.view::<Ipv4>(0) else { return };
                let [source, destination] = [header.source(), header.destination()].map(Ipv4Addr::from);
                let is_ours = self.spec.subnet.prefix().contains(&source);
                if is_ours && self.datapath.peer_of(destination) == Some(report.peer) {
                    self.datapath.answer(&inner, Rejection::PeerUnreachable);
                }
            }
        }
    }

    /// Reconciles, and schedules another attempt when it fails.
    pub(super) async fn try_reconcile(&mut self) {
        let reconciled = self.reconcile().await;
        self.conclude(reconciled).await;
    }

    /// Notes how a reconciliation ended.
    pub(super) async fn conclude(&mut self, reconciled: Result<()>) {
        // Threads that ended meanwhile may have reported the same failure.
        while self.failures.try_recv().is_ok() {}
        let now = Instant::now();
        match reconciled {
            Ok(()) => {
                self.conditions.clear(Condition::Datapath);
                self.up = true;
                self.retry.succeeded(now);
            }
            Err(error) => {
                self.up = false;
                let why = format!("cannot set up the datapath, retrying: {error:#}");
                self.conditions.set(Condition::Datapath, why);
                self.retry.failed(now);
                self.failed_on = HostState::read(&self.netlink).await.ok();
            }
        }
    }

    /// This host's routes, rules, devices or addresses have changed. An attempt that failed is repeated at once if they are new to
    /// it: what it made and removed itself are not.
    pub(super) async fn on_host_change(&mut self) {
        self.next_hops.set_stale();
        if self.retry.is_after_failure() && HostState::read(&self.netlink).await.ok() != self.failed_on {
            self.try_reconcile().await;
        } else {
            self.check().await;
        }
    }

    /// The periodic check of the datapath. A scheduled attempt replaces it.
    pub(super) async fn check(&mut self) {
        self.change_log.flush(Instant::now());
        if self.retry.at.is_none() {
            self.try_reconcile().await;
        }
    }

    /// Reads what the kernel dropped before a device may be gone.
    pub(super) async fn check_counters(&mut self) {
        if let Err(error) = self.datapath.observe_drops().await {
            debug!("{error:#}");
        }
    }

    /// Attaches programs again that another program detached, and reads what the kernel dropped before a device may be gone.
    pub(super) async fn check_programs(&mut self) {
        self.check_counters().await;
        if let Err(error) = self.datapath.show_alive() {
            debug!("{error:#}");
        }
        let is_due = self.datapath.is_attempt_due();
        if self.retry.at.is_none() && (is_due || !self.datapath.has_programs().await) {
            self.try_reconcile().await;
        }
    }

    /// Returns when there is something to do: a part of the datapath failed, or an earlier attempt, or ICMP reports something.
    pub(super) async fn due(&mut self) -> Due {
        let retry_at = self.retry.at;
        let refresh_at = self.next_hops.refresh_at().map(Instant::from_std);
        let former = [self.former.expires_at(), self.former_peers.expires_at()];
        let expires_at = former.into_iter().flatten().min().map(Instant::from_std);
        tokio::select! {
            () = sleep_until_some(retry_at) => Due::Reconcile,
            () = sleep_until_some(refresh_at), if retry_at.is_none() => Due::Reconcile,
            () = self.containers.changed() => Due::Containers,
            () = sleep_until_some(expires_at) => Due::Former,
            happening = self.next_hops.next() => Due::Happening(happening),
            Some(failure) = self.failures.recv() => {
                error!("the datapath failed, setting it up again: {failure}");
                self.up = false;
                if let Some(at) = self.retry.lost(Instant::now()) {
                    sleep_until(at).await;
                }
                Due::Reconcile
            }
        }
    }

    /// Follows the records.
    pub(super) async fn on_records(&mut self, event: Event<Lease>) {
        match event {
            Event::Snapshot(records) => {
                self.conditions.clear(Condition::Store);
                self.recalled = None;
                self.replace_records(records).await;
            }
            Event::Recalled { records, seen } => {
                self.recalled = Some(seen);
                self.replace_records(records).await;
                self.set_store_lost("it does not answer");
            }
            Event::Changes(changes) => {
                let outcome = self.table.apply(changes);
                self.apply(&outcome).await;
                self.check_own_subnet();
            }
            Event::Lost(why) => self.set_store_lost(&why),
        }
    }

    async fn replace_records(&mut self, records: Vec<LeaseRecord>) {
        self.has_snapshot = true;
        let outcome = self.table.replace(records);
        self.apply(&outcome).await;
        self.check_own_subnet();
    }

    fn set_store_lost(&mut self, why: &str) {
        let routes = self.table.routes().len();
        let state = self.recalled.map_or_else(String::new, |seen| {
            format!(" state is of {},", humantime::format_rfc3339_seconds(seen))
        });
        let why = format!("the store cannot be read,{state} {routes} routes stay as they are: {why}");
        self.conditions.set(Condition::Store, why);
    }

    /// This host has another subnet or public address.
    pub(super) async fn set_local(&mut self, local: LocalNode) {
        let moved = self.spec.subnet != local.subnet;
        self.spec.subnet = local.subnet;
        let outcome = self.table.set_local(local);
        self.apply(&outcome).await;
        // A record that was written just now may still be on its way here: the next event shows it.
        self.conditions.clear(Condition::OwnRecord);
        if moved {
            self.try_reconcile().await;
        }
    }

    /// The underlay has another address, MTU or device. `is_announced` when a record tells peers of the address.
    pub(super) async fn set_underlay(&mut self, underlay: &Underlay, mtu: u32, is_announced: bool) {
        if underlay.local_ip != self.underlay.local_ip {
            self.former.changed(self.underlay.local_ip, is_announced, Instant::now().into_std());
        }
        self.underlay = UnderlayDevice { link: underlay.link.clone(), local_ip: underlay.local_ip };
        self.next_hops.set_local_ip(underlay.local_ip);
        self.spec.mtu = mtu;
        self.conditions.update(Condition::UnderlayName, self.misnamed());
        self.try_reconcile().await;
    }

    /// What the operator should know about another name of the underlay device.
    fn misnamed(&self) -> Option<String> {
        let (now, ifaces) = (&self.underlay.link.name, &self.options.underlay.ifaces);
        let names: Vec<_> = ifaces
            .iter()
            .filter_map(|iface| match iface {
                Iface::Name(name) => Some(name),
                Iface::Address(_) => None,
            })
            .collect();
        let named = names.first().filter(|_| !names.contains(&now) && names.len() == ifaces.len())?;
        Some(format!(
            "the underlay device is named {now} now: the agent follows it, and its next start finds no --iface {named}; rename \
             it back, or start with --iface {now}"
        ))
    }

    /// Follows the routes.
    pub(super) fn watch_routes(&self) -> watch::Receiver<Routes> {
        self.routes.subscribe()
    }

    async fn apply(&mut self, outcome: &Outcome) {
        self.change_log.log(outcome, Instant::now());
        if !outcome.changes.is_empty() {
            // One step per change: a copy of a large table for each record that flaps would cost more than the table.
            self.routes.send_modify(|routes| {
                outcome.changes.iter().for_each(|change| change.make_in(routes));
            });
        }
        // Before the changes take effect.
        if self.former_peers.note(&outcome.changes, self.next_hops.hops(), Instant::now().into_std()) {
            self.set_former_peers();
        }
        let devices = self.underlays().len();
        let (changes, known) = self.next_hops.apply(&outcome.changes, Instant::now().into_std());
        self.apply_next_hops(&changes);
        if known.is_err() {
            self.set_paths_unknown(known.err());
        }
        // A peer behind another device: packets arrive there, too.
        if self.up && self.underlays().len() != devices {
            self.try_reconcile().await;
        }
    }

    fn apply_next_hops(&mut self, changes: &[RouteChange<NextHop>]) {
        let applied = self.datapath.apply_routes(changes, self.next_hops.hops());
        self.set_routes_behind(applied.err().map(|error| format!("{error:#}")));
    }

    /// Compares what the records say about this host's subnet, which is what peers act on, with what this host believes.
    fn check_own_subnet(&mut self) {
        if !self.has_snapshot || matches!(self.options.store, StoreOption::None) {
            return;
        }
        let (own, OwnSubnet { record, rivals }) = (self.spec.subnet, self.table.own_subnet());
        let wrong = match record {
            OwnRecord::Ours => None,
            OwnRecord::Missing => {
                Some(format!("the store has no record of our subnet {own}: peers have no route to it"))
            }
            OwnRecord::Unusable => Some(format!(
                "peers skip the record of our subnet {own}, so that those that start have no route to it"
            )),
            OwnRecord::Of(other) => {
                Some(format!("the record of our subnet {own} names {other}: peers send packets for it there"))
            }
        };
        self.conditions.update(Condition::OwnRecord, wrong);
        let (diverting, other): (Vec<_>, Vec<_>) = rivals.iter().partition(|rival| rival.diverted.is_some());
        let diverted = diverting.iter().map(|Rival { record, holder, diverted }| {
            let part = diverted.map_or_else(String::new, |part| part.to_string());
            format!("peers send packets for {part}, which is ours, to {holder}: remove the record {record}")
        });
        let contested = other.iter().map(|Rival { record, holder, .. }| {
            format!("the record {record} of {holder} contests our subnet {own}, which stays ours: remove that record")
        });
        self.conditions.update(Condition::Diverted, sentence(diverted));
        self.conditions.update(Condition::Contested, sentence(contested));
    }

    /// Routes that the fast path lacks affect their destinations only.
    fn set_routes_behind(&mut self, why: Option<String>) {
        let why =
            why.map(|why| format!("the fast path's routes are behind, the next change tries again: {why}"));
        self.conditions.update(Condition::Routes, why);
    }

    /// Whether a snapshot of the records was seen and the datapath forwards.
    /// Errors: what is missing.
    pub(super) fn ready(&self) -> Result<(), String> {
        match (self.has_snapshot, self.up) {
            (false, _) => Err("the store has not listed the peers' leases yet".to_owned()),
            (true, false) => Err("the device or the datapath is not there yet".to_owned()),
            (true, true) => Ok(()),
        }
    }

    /// Whether packets are forwarded to all peers.
    /// Errors: the reason why not.
    pub(super) fn health(&self) -> Result<(), String> {
        let grave = [
            Condition::Datapath,
            Condition::Underlay,
            Condition::Diversion,
            Condition::Routes,
            Condition::Paths,
            Condition::OwnRecord,
            Condition::Diverted,
        ];
        if let Some(why) = grave.into_iter().find_map(|condition| self.conditions.get(condition)) {
            return Err(why);
        }
        match self.up {
            true => Ok(()),
            false => Err("the datapath is down and is being set up again; the log says why".to_owned()),
        }
    }

    /// The overlay device as it is; `None` while it is missing.
    pub(super) fn device(&self) -> Option<report::Device> {
        let ifindex = self.datapath.overlay_ifindex()?;
        Some(report::Device { name: self.spec.name.clone(), ifindex, mtu: self.spec.mtu })
    }

    /// The devices that carry outer packets, but that with this host's address.
    pub(super) fn other_underlays(&self) -> Vec<report::Device> {
        self.underlays().iter().skip(1).map(|device| report::Device::from(&device.link)).collect()
    }

    /// Whether the last reconciliation succeeded, and nothing has failed since.
    pub(super) fn is_up(&self) -> bool {
        self.up
    }
}

/// What forwarding has to do next.
pub(super) enum Due {
    /// To reconcile.
    Reconcile,
    /// To follow the containers.
    Containers,
    /// To forget former addresses.
    Former,
    /// To act on something.
    Happening(Happening),
}

/// The first problems of one kind, and the number of the others.
pub(super) fn sentence(problems: impl Iterator<Item = String>) -> Option<String> {
    let all: Vec<_> = problems.collect();
    let (shown, rest) = all.split_at(all.len().min(NAMED));
    let more = (!rest.is_empty()).then(|| format!("and {} more", rest.len()));
    let text = shown.iter().cloned().chain(more).collect::<Vec<_>>().join("; ");
    Some(text).filter(|text| !text.is_empty())
}
