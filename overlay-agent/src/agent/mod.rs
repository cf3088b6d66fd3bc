//! The running agent: start in an order that leaves nothing half-done, then follow the store until told to stop.

mod checks;
mod leasing;
mod problems;

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddr, SocketAddrV4},
    os::fd::OwnedFd,
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use checks::check_addresses;
use ipnet::Ipv4Net;
use leasing::{Lease, Leasing};
use overlay_ebpf::{
    abi::{self, Prefix},
    wire::OVERHEAD,
};
use problems::{Concern, Problems};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    time::{Instant, MissedTickBehavior, sleep_until},
};
use tracing::{debug, error, info, warn};

use crate::{
    control::{self, Asked, Control, Question},
    datapath::{Datapath, PathCounters, Plan, Request, ebpf::TcAttach, tun},
    device::{self, Note, OverlayDevice},
    lease,
    netlink::Netlink,
    report::{self, CounterList, Device, Route, RouteList, Status},
    route_table::{Change, Own, Record, RouteTable, diff},
    store::{Event, LeaseEvent, RecordChange, dir::DirStore, etcd::EtcdOptions},
    subnet_env,
    underlay::{self, Underlay},
};

/// Pause before a lost datapath is made again.
const RETRY: Duration = Duration::from_secs(1);

/// How often to see whether the device still has its address, MTU and route.
const CARE: Duration = Duration::from_secs(5);

/// Where leases live.
#[derive(Clone, Debug)]
pub enum StoreOption {
    /// Nowhere: all peers are given on the command line.
    None,
    /// In a directory.
    Dir(PathBuf),
    /// In etcd.
    Etcd(Box<EtcdOptions>),
}

/// What the operator asked for.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where leases live.
    pub store: StoreOption,
    /// The whole overlay, when the store need not say it.
    pub network: Option<Ipv4Net>,
    /// The subnet to take.
    pub subnet: Option<Ipv4Net>,
    /// Peers that need no record.
    pub peers: BTreeMap<Ipv4Net, Ipv4Addr>,
    /// Which device carries the outer packets, and the address by which peers reach this host.
    pub underlay: underlay::Wish,
    /// Name of the overlay device.
    pub device: String,
    /// UDP port, when the store need not say it.
    pub port: Option<u16>,
    /// Which rung.
    pub datapath: Request,
    /// How tc programs are attached.
    pub tc_attach: TcAttach,
    /// Where to write `subnet.env`.
    pub subnet_file: Option<PathBuf>,
    /// Directory of the control socket.
    pub run_dir: PathBuf,
    /// What else to do on this host.
    pub host: HostOptions,
}

/// What an agent does on its host beside carrying packets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostOptions {
    /// Hide the overlay's addresses from the rest of the world, as flannel's ip-masq.
    pub masquerade: bool,
    /// Choose the ports of masqueraded connections at random.
    pub fully_random: bool,
    /// Accept forwarded packets of the overlay where the host's policy drops.
    pub forward_rules: bool,
    /// How often to see that the firewall's rules are still there.
    pub resync: Duration,
    /// Drop packets for addresses of this host's subnet that no container has.
    pub blackhole_route: bool,
    /// Where to answer questions after the agent's health.
    pub healthz: Option<SocketAddr>,
}

/// Runs until SIGTERM or SIGINT, then removes what it made.
///
/// # Errors
///
/// When the agent cannot start: the host is then as it was before.
pub async fn run(options: Options) -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("overlay-agent run needs root: it makes a network device and loads eBPF programs");
    }
    let mut stop = StopSignals::new()?;
    let netlink = Netlink::connect()?;
    let prepared = tokio::select! {
        prepared = Prepared::new(options, &netlink) => prepared?,
        () = stop.wait() => return Ok(()),
    };
    // Not interrupted: what is half-made would stay. It takes a moment; a signal meanwhile ends `follow` at once.
    let mut agent = Agent::start(prepared, netlink).await?;
    agent.follow(&mut stop).await;
    agent.stop().await
}

struct StopSignals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

impl StopSignals {
    fn new() -> Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate()).context("listen for SIGTERM")?,
            interrupt: signal(SignalKind::interrupt()).context("listen for SIGINT")?,
        })
    }

    async fn wait(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => info!("SIGTERM: shutting down"),
            _ = self.interrupt.recv() => info!("SIGINT: shutting down"),
        }
    }
}

/// What is fixed once the agent has found its place.
struct Place {
    underlay: Underlay,
    own: Own,
    port: u16,
    mtu: u32,
}

/// What an agent has before it changes anything on the host. Finding it may take long: etcd may be away.
struct Prepared {
    options: Options,
    leasing: Leasing,
    lease: Lease,
    place: Place,
    control: Control,
    socket: OwnedFd,
}

impl Prepared {
    /// Looks at everything that can be refused, and takes the lease last.
    async fn new(options: Options, netlink: &Netlink) -> Result<Self> {
        let underlay = Underlay::find(netlink, &options.underlay).await?;
        let (leasing, config) = Leasing::open(&options).await?;
        check_addresses(&options, &config, &underlay)?;
        device::preflight(netlink, &options.device, config.network).await?;
        let mtu = underlay.link.mtu.checked_sub(OVERHEAD as u32).filter(|mtu| *mtu >= 576);
        let mtu = mtu.with_context(|| {
            format!("the MTU of {} is {}: too small for an overlay", underlay.link.name, underlay.link.mtu)
        })?;
        let control = Control::listen(control::path(&options.run_dir, &options.device)).await?;
        let socket = tun::bind(SocketAddrV4::new(underlay.local_ip, config.port), &underlay.link.name)?;
        let lease = leasing.acquire(&options, &config, underlay.public_ip).await?;
        let subnet = lease.subnet().context("the lease has no subnet")?;
        let own = Own { network: config.network, subnet, public_ip: underlay.public_ip };
        info!("{} is {} in {}, MTU {mtu}, port {}", own.public_ip, own.subnet, own.network, config.port);
        Ok(Self {
            options,
            leasing,
            lease,
            place: Place { underlay, own, port: config.port, mtu },
            control,
            socket,
        })
    }
}

struct Agent {
    options: Options,
    netlink: Netlink,
    place: Place,
    /// `None` while a lost one is being made again.
    datapath: Option<Datapath>,
    retry_at: Option<Instant>,
    /// The store's records as last heard, by key.
    records: BTreeMap<String, Record>,
    table: RouteTable,
    leasing: Leasing,
    lease: Option<Lease>,
    problems: Problems,
    /// Whether the overlay device is ours to remove.
    device_made: bool,
    /// What datapaths counted that are gone.
    counted: PathCounters,
    events: mpsc::Receiver<Event>,
    questions: mpsc::Receiver<Asked>,
    failures: (mpsc::Sender<String>, mpsc::Receiver<String>),
}

impl Agent {
    async fn start(prepared: Prepared, netlink: Netlink) -> Result<Self> {
        let Prepared { options, leasing, lease, place, control, socket } = prepared;
        let (question_sender, questions) = mpsc::channel(8);
        let (event_sender, mut events) = mpsc::channel(4);
        let (own, mtu) = (place.own, place.mtu);
        let mut agent = Self {
            options,
            netlink,
            place,
            datapath: None,
            retry_at: None,
            records: BTreeMap::new(),
            table: RouteTable::default(),
            leasing,
            lease: None,
            problems: Problems::default(),
            device_made: false,
            counted: PathCounters::ZERO,
            events: mpsc::channel(1).1,
            questions,
            failures: mpsc::channel(2),
        };
        let finish = async {
            agent.start_datapath(socket).await?;
            if let Some(records) = agent.leasing.list()? {
                agent.on_snapshot(records);
            }
            if let Some(file) = &agent.options.subnet_file {
                subnet_env::write(file, own.network, own.subnet, mtu)?;
            }
            anyhow::Ok(())
        };
        if let Err(error) = finish.await {
            agent.datapath = None;
            if agent.device_made
                && let Err(error) = device::remove(&agent.netlink, &agent.options.device).await
            {
                warn!("{error:#}");
            }
            agent.leasing.give_back(lease, own.public_ip).await;
            return Err(error);
        }
        // Watches before it lists, so nothing that happened meanwhile is missed.
        agent.lease = Some(agent.leasing.follow(lease, event_sender));
        if matches!(agent.leasing, Leasing::Etcd(_)) {
            agent.await_first_snapshot(&mut events).await;
        }
        agent.events = events;
        tokio::spawn(control.serve(question_sender));
        warn_about_forwarding();
        info!("running: {} routes, see `overlay-agent status`", agent.table.routes.len());
        Ok(agent)
    }

    /// The agent says that it runs once it knows its peers, or that they cannot be known.
    async fn await_first_snapshot(&mut self, events: &mut mpsc::Receiver<Event>) {
        while let Some(event) = events.recv().await {
            let enough = matches!(event, Event::Snapshot(_) | Event::Lost(_));
            self.on_store(event);
            if enough {
                return;
            }
        }
    }

    async fn start_datapath(&mut self, socket: OwnedFd) -> Result<()> {
        let Place { underlay, own, port, mtu } = &self.place;
        let note = Note { network: own.network, port: *port, underlay: underlay.link.name.clone() };
        let device =
            OverlayDevice::create(&self.netlink, &self.options.device, &note, own.subnet, *mtu).await?;
        self.device_made = true;
        let config =
            abi::Config::new(underlay.local_ip.octets(), prefix(own.network), prefix(own.subnet), *port);
        let plan = Plan {
            request: self.options.datapath,
            tc_attach: self.options.tc_attach,
            config,
            underlay: &underlay.link,
        };
        let mut datapath = Datapath::start(&plan, device, socket, self.failures.0.clone())?;
        datapath.set_routes(&self.table.routes)?;
        self.datapath = Some(datapath);
        Ok(())
    }

    /// Follows the store and answers questions until told to stop.
    async fn follow(&mut self, stop: &mut StopSignals) {
        let mut care = tokio::time::interval(CARE);
        care.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let retry_at = self.retry_at;
            let retry = async move {
                match retry_at {
                    Some(at) => sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = stop.wait() => return,
                Some(event) = self.events.recv() => self.on_store(event),
                Some((question, back)) = self.questions.recv() => {
                    // Whoever asked may be gone.
                    let _ = back.send(self.answer(question).map_err(|error| format!("{error:#}")));
                }
                Some(failure) = self.failures.1.recv() => self.on_failure(&failure),
                () = retry => self.restart_datapath().await,
                _ = care.tick() => self.care().await,
            }
        }
    }

    fn on_store(&mut self, event: Event) {
        match event {
            Event::Snapshot(records) => self.on_snapshot(records),
            Event::Changes(changes) => {
                for change in changes {
                    match change {
                        RecordChange::Put(record) => drop(self.records.insert(record.key.clone(), record)),
                        RecordChange::Delete { key } => drop(self.records.remove(&key)),
                    }
                }
                self.rebuild();
            }
            Event::Lost(why) => {
                let routes = self.table.routes.len();
                let why = format!("the store cannot be read, {routes} routes stay as they are: {why}");
                self.problems.set(Concern::Store, why);
            }
            Event::Lease(event) => self.on_lease(event),
        }
    }

    fn on_snapshot(&mut self, records: Vec<Record>) {
        self.problems.clear(Concern::Store);
        self.records = records.into_iter().map(|record| (record.key.clone(), record)).collect();
        if let Some(store) = self.leasing.dir().cloned() {
            self.check_own_record(store);
        }
        self.rebuild();
    }

    fn rebuild(&mut self) {
        let (own, fixed, records) = (self.place.own, &self.options.peers, self.records.values());
        self.apply(RouteTable::build(own, fixed, records, &self.table.routes));
    }

    /// What etcd's keeper has to say about our own lease.
    fn on_lease(&mut self, event: LeaseEvent) {
        match event {
            LeaseEvent::Confirmed { .. } => self.problems.clear(Concern::Lease),
            LeaseEvent::Unconfirmed { why, expires_in } => {
                let left =
                    expires_in.map_or_else(String::new, |left| format!(", it ends in {} s", left.as_secs()));
                self.problems.set(Concern::Lease, format!("the lease cannot be confirmed{left}: {why}"));
            }
            LeaseEvent::Retaken { subnet, why } => {
                self.problems.clear(Concern::Lease);
                warn!("the lease of {subnet} was lost and taken again: {why}");
            }
            LeaseEvent::Moved { from, to, why } => {
                self.problems.clear(Concern::Lease);
                warn!("our subnet is {to} now, no longer {from}: {why}");
                self.place.own.subnet = to;
                self.on_failure("our subnet changed");
                self.rebuild();
                if let Some(file) = &self.options.subnet_file
                    && let Err(error) = subnet_env::write(file, self.place.own.network, to, self.place.mtu)
                {
                    warn!("{error:#}");
                }
            }
            LeaseEvent::Unheld { why } | LeaseEvent::Superseded { why } => {
                self.problems.set(Concern::Lease, why)
            }
        }
    }

    /// Our own record makes peers route to us: it must be there, and be ours.
    fn check_own_record(&mut self, store: DirStore) {
        let own = self.place.own;
        let record = self.records.values().find(|record| lease::parse_key(&record.key) == Ok(own.subnet));
        match record.map(|record| lease::parse_value(&record.value)) {
            Some(Ok(value)) if value.public_ip == own.public_ip => self.problems.clear(Concern::Lease),
            Some(Ok(value)) => self.problems.set(
                Concern::Lease,
                format!(
                    "the store says that {} holds our subnet {}: stop one of the two, remove the record and start again",
                    value.public_ip, own.subnet
                ),
            ),
            Some(Err(error)) => {
                self.problems.set(Concern::Lease, format!("the record of our subnet {} is broken: {error}", own.subnet));
            }
            None => {
                self.problems.set(Concern::Lease, format!("the record of our subnet {} was removed: writing it again", own.subnet));
                tokio::task::spawn_blocking(move || {
                    if let Err(error) = store.reclaim(own.subnet, own.public_ip) {
                        warn!("write our record again: {error:#}");
                    }
                });
            }
        }
    }

    fn apply(&mut self, table: RouteTable) {
        for change in diff(&self.table.routes, &table.routes) {
            match change {
                Change::Set(subnet, peer) => info!("route {subnet} via {peer}"),
                Change::Remove(subnet) => info!("route {subnet} removed"),
            }
        }
        for skipped in table.skipped.iter().filter(|skipped| !self.table.skipped.contains(skipped)) {
            warn!("no route for the record {}: {}", skipped.record, skipped.why);
        }
        self.table = table;
        if let Some(datapath) = &mut self.datapath
            && let Err(error) = datapath.set_routes(&self.table.routes)
        {
            error!("the fast path's routes are behind, the next change tries again: {error:#}");
        }
    }

    /// Drops the datapath and schedules a new one.
    fn on_failure(&mut self, failure: &str) {
        if let Some(datapath) = self.datapath.take() {
            match datapath.counters() {
                Ok(counters) => self.counted = self.counted.plus(&counters),
                Err(error) => warn!("the lost datapath's counters are lost too: {error:#}"),
            }
            error!("the datapath failed and is made again: {failure}");
            self.retry_at = Some(Instant::now());
        }
        // The other thread's word on the same loss.
        while self.failures.1.try_recv().is_ok() {}
    }

    async fn restart_datapath(&mut self) {
        let attempt = async {
            device::preflight(&self.netlink, &self.options.device, self.place.own.network).await?;
            let underlay = &self.place.underlay;
            let socket =
                tun::bind(SocketAddrV4::new(underlay.local_ip, self.place.port), &underlay.link.name)?;
            self.start_datapath(socket).await
        };
        self.retry_at = match attempt.await {
            Ok(()) => {
                info!("the datapath is back");
                None
            }
            Err(error) => {
                error!("the datapath cannot be made, trying again: {error:#}");
                Some(Instant::now() + RETRY)
            }
        };
    }

    /// Puts right what someone changed under us.
    async fn care(&mut self) {
        self.care_for_underlay().await;
        let Own { network, subnet, .. } = self.place.own;
        match device::restore(&self.netlink, &self.options.device, network, subnet, self.place.mtu).await {
            Ok(restored) if restored.is_empty() => {}
            Ok(restored) => {
                warn!("someone changed {}: restored its {}", self.options.device, restored.join(", "))
            }
            Err(error) => warn!("look after {}: {error:#}", self.options.device),
        }
    }

    /// A device that was made anew has another index, and our programs went with the old one.
    async fn care_for_underlay(&mut self) {
        let known = &self.place.underlay;
        match Underlay::find(&self.netlink, &self.options.underlay).await {
            Err(error) => self.problems.set(Concern::Underlay, format!("{error:#}")),
            Ok(found) if found.local_ip != known.local_ip || found.link.name != known.link.name => {
                let why = format!(
                    "the underlay was {} on {} and is {} on {}: start the agent again to follow",
                    known.local_ip, known.link.name, found.local_ip, found.link.name
                );
                self.problems.set(Concern::Underlay, why);
            }
            Ok(found) => {
                self.problems.clear(Concern::Underlay);
                if found.link.index != known.link.index {
                    self.place.underlay = found;
                    self.on_failure("the underlay device was made anew");
                }
            }
        }
    }

    fn answer(&self, question: Question) -> Result<serde_json::Value> {
        debug!("asked for {question:?}");
        Ok(match question {
            Question::Status => serde_json::to_value(self.status()?)?,
            Question::Routes => serde_json::to_value(RouteList {
                routes: self
                    .table
                    .routes
                    .iter()
                    .map(|(subnet, peer)| Route { subnet: *subnet, peer: *peer })
                    .collect(),
                skipped: self.table.skipped.clone(),
            })?,
            Question::Counters => serde_json::to_value(CounterList::from(self.counters()?))?,
        })
    }

    fn status(&self) -> Result<Status> {
        let datapath = self.datapath()?;
        let Place { underlay, own, port, mtu } = &self.place;
        Ok(Status {
            state: if self.problems.is_empty() { "running" } else { "degraded" }.to_owned(),
            problems: self.problems.list(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            network: own.network,
            subnet: own.subnet,
            public_ip: own.public_ip,
            port: *port,
            device: Device {
                name: self.options.device.clone(),
                ifindex: datapath.overlay_ifindex,
                mtu: *mtu,
            },
            underlay: Device::from(&underlay.link),
            egress: datapath.egress.clone(),
            ingress: datapath.ingress.clone(),
            routes: self.table.routes.len(),
            store: report::Store { name: self.leasing.name(), lost: self.problems.get(Concern::Store) },
            drops: report::errors(&self.counters()?),
        })
    }

    fn counters(&self) -> Result<PathCounters> {
        Ok(self.counted.plus(&self.datapath()?.counters()?))
    }

    fn datapath(&self) -> Result<&Datapath> {
        self.datapath.as_ref().context("the datapath is down and being made again; the log says why")
    }

    /// Programs first, then the device: nothing may redirect into what is gone. The lease stays: a restart keeps it.
    async fn stop(mut self) -> Result<()> {
        self.datapath = None;
        device::remove(&self.netlink, &self.options.device).await?;
        if let Some(lease) = self.lease.take() {
            self.leasing.leave(lease).await;
        }
        Ok(())
    }
}

fn prefix(net: Ipv4Net) -> Prefix {
    Prefix::new(net.network().octets(), net.prefix_len())
}

fn warn_about_forwarding() {
    let forwarding = std::fs::read_to_string("/proc/sys/net/ipv4/ip_forward").unwrap_or_default();
    if forwarding.trim() == "0" {
        warn!(
            "net.ipv4.ip_forward is 0: this host's own packets cross the overlay, those of its containers do not (sysctl -w net.ipv4.ip_forward=1)"
        );
    }
}
