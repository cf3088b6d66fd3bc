//! The running agent: start in an order that leaves nothing half-done, then follow the store until told to stop.

mod checks;
mod problems;

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddrV4},
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use checks::{check_addresses, network_config};
use ipnet::Ipv4Net;
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
    config::NetworkConfig,
    control::{self, Asked, Control, Question},
    datapath::{Datapath, PathCounters, Plan, Request, ebpf::TcAttach, tun},
    device::{self, Note, OverlayDevice},
    lease,
    netlink::Netlink,
    report::{self, CounterList, Device, Route, RouteList, Status},
    route_table::{Change, Own, Record, RouteTable, diff},
    store::dir::{Acquired, DirStore, Event},
    subnet_env,
    underlay::Underlay,
};

/// Pause before a lost datapath is made again.
const RETRY: Duration = Duration::from_secs(1);

/// How often to see whether the device still has its address, MTU and route.
const CARE: Duration = Duration::from_secs(5);

/// What the operator asked for.
#[derive(Clone, Debug)]
pub struct Options {
    /// Directory store, if there is one.
    pub store: Option<PathBuf>,
    /// The whole overlay, when the store need not say it.
    pub network: Option<Ipv4Net>,
    /// The subnet to take.
    pub subnet: Option<Ipv4Net>,
    /// Peers that need no record.
    pub peers: BTreeMap<Ipv4Net, Ipv4Addr>,
    /// Underlay device, by name or address.
    pub iface: Option<String>,
    /// Address by which peers reach this host.
    pub public_ip: Option<Ipv4Addr>,
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
    // Not interrupted: what is half-made would stay. It takes a moment; a signal meanwhile ends `follow` at once.
    let mut agent = Agent::start(options, netlink).await?;
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

struct Agent {
    options: Options,
    netlink: Netlink,
    place: Place,
    /// `None` while a lost one is being made again.
    datapath: Option<Datapath>,
    retry_at: Option<Instant>,
    table: RouteTable,
    store: Option<DirStore>,
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
    /// Everything that can be refused is looked at before anything is changed.
    async fn start(options: Options, netlink: Netlink) -> Result<Self> {
        let underlay = Underlay::find(&netlink, options.iface.as_deref(), options.public_ip).await?;
        let store = options.store.clone().map(DirStore::new);
        let config = network_config(&options, store.as_ref())?;
        check_addresses(&options, &config, &underlay)?;
        device::preflight(&netlink, &options.device, config.network).await?;
        let mtu = underlay.link.mtu.checked_sub(OVERHEAD as u32).filter(|mtu| *mtu >= 576);
        let mtu = mtu.with_context(|| {
            format!("the MTU of {} is {}: too small for an overlay", underlay.link.name, underlay.link.mtu)
        })?;
        let control = Control::listen(control::path(&options.run_dir, &options.device)).await?;
        let socket = tun::bind(SocketAddrV4::new(underlay.local_ip, config.port), &underlay.link.name)?;

        let acquired = acquire(&options, store.as_ref(), &config, underlay.public_ip)?;
        let own = Own { network: config.network, subnet: acquired.subnet, public_ip: underlay.public_ip };
        let place = Place { underlay, own, port: config.port, mtu };
        info!("{} is {} in {}, MTU {mtu}, port {}", own.public_ip, own.subnet, own.network, config.port);

        let (question_sender, questions) = mpsc::channel(8);
        let (event_sender, events) = mpsc::channel(1);
        let failures = mpsc::channel(2);
        let mut agent = Self {
            options,
            netlink,
            place,
            datapath: None,
            retry_at: None,
            table: RouteTable::default(),
            store: store.clone(),
            problems: Problems::default(),
            device_made: false,
            counted: PathCounters::ZERO,
            events,
            questions,
            failures,
        };
        let finish = async {
            agent.start_datapath(socket).await?;
            let first = match &store {
                Some(store) => store.list()?,
                None => Vec::new(),
            };
            agent.apply(RouteTable::build(agent.place.own, &agent.options.peers, &first, &BTreeMap::new()));
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
            if let (Some(store), true) = (&store, acquired.created)
                && let Err(error) = store.release(own.subnet, own.public_ip)
            {
                warn!("{error:#}");
            }
            return Err(error);
        }
        if let Some(store) = store {
            // Watches before it lists, so nothing that happened since the list above is missed.
            tokio::spawn(store.watch(event_sender));
        }
        tokio::spawn(control.serve(question_sender));
        warn_about_forwarding();
        info!("running: {} routes, see `overlay-agent status`", agent.table.routes.len());
        Ok(agent)
    }

    async fn start_datapath(&mut self, socket: std::os::fd::OwnedFd) -> Result<()> {
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
            Event::Snapshot(records) => {
                self.problems.clear(Concern::Store);
                self.check_own_record(&records);
                let table =
                    RouteTable::build(self.place.own, &self.options.peers, &records, &self.table.routes);
                self.apply(table);
            }
            Event::Lost(why) => {
                let routes = self.table.routes.len();
                self.problems.set(
                    Concern::Store,
                    format!("the store cannot be read, {routes} routes stay as they are: {why}"),
                );
            }
        }
    }

    /// Our own record makes peers route to us: it must be there, and be ours.
    fn check_own_record(&mut self, records: &[Record]) {
        let own = self.place.own;
        let record = records.iter().find(|record| lease::parse_key(&record.key) == Ok(own.subnet));
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
                if let Some(store) = self.store.clone() {
                    tokio::task::spawn_blocking(move || {
                        if let Err(error) = store.reclaim(own.subnet, own.public_ip) {
                            warn!("write our record again: {error:#}");
                        }
                    });
                }
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
        match Underlay::find(&self.netlink, self.options.iface.as_deref(), self.options.public_ip).await {
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
            store: report::Store {
                name: self
                    .options
                    .store
                    .as_ref()
                    .map_or_else(|| "none".to_owned(), |path| format!("dir:{}", path.display())),
                lost: self.problems.get(Concern::Store),
            },
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
        Ok(())
    }
}

fn acquire(
    options: &Options,
    store: Option<&DirStore>,
    config: &NetworkConfig,
    public_ip: Ipv4Addr,
) -> Result<Acquired> {
    let earlier = options.subnet_file.as_deref().and_then(subnet_env::read_subnet);
    match (store, options.subnet) {
        (Some(store), wanted) => {
            if let Some(network) = options.network {
                store.ensure_config(network)?;
            }
            store.acquire(config, public_ip, wanted, earlier, &options.peers)
        }
        (None, Some(subnet)) => Ok(Acquired { subnet, created: false }),
        (None, None) => bail!("without --store, name this host's part of the network with --subnet"),
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
