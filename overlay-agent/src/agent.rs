//! The running agent: start in an order that leaves nothing half-done, then follow the store until told to stop.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddrV4},
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use ipnet::Ipv4Net;
use overlay_ebpf::{
    abi::{self, Prefix},
    wire::OVERHEAD,
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    time::{Instant, MissedTickBehavior, sleep_until},
};
use tracing::{debug, error, info, warn};

use crate::{
    config::NetworkConfig,
    control::{self, Asked, Control, Question},
    datapath::{Datapath, Plan, Request, ebpf::TcAttach, tun},
    device::{self, OverlayDevice},
    lease,
    netlink::Netlink,
    report::{self, CounterList, Device, Route, RouteList, Status},
    route_table::{Change, Own, RouteTable, diff},
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
    let mut agent = tokio::select! {
        agent = Agent::start(options, netlink.clone()) => agent?,
        () = stop.wait() => return Ok(()),
    };
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
    store_lost: Option<String>,
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
        check_addresses(&options, &config, underlay.public_ip)?;
        device::preflight(&netlink, &options.device, config.network).await?;
        let mtu = underlay.link.mtu.checked_sub(OVERHEAD as u32).filter(|mtu| *mtu >= 576);
        let mtu = mtu.with_context(|| {
            format!("the MTU of {} is {}: too small for an overlay", underlay.link.name, underlay.link.mtu)
        })?;
        let control = Control::listen(control::path(&options.run_dir, &options.device)).await?;
        let socket = tun::bind(SocketAddrV4::new(underlay.public_ip, config.port))?;

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
            store_lost: None,
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
            if let Err(error) = device::remove(&agent.netlink, &agent.options.device).await {
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
        let device =
            OverlayDevice::create(&self.netlink, &self.options.device, own.network, own.subnet, *mtu).await?;
        let config = abi::Config::new(own.public_ip.octets(), prefix(own.network), prefix(own.subnet), *port);
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
                _ = care.tick() => self.care_for_device().await,
            }
        }
    }

    fn on_store(&mut self, event: Event) {
        match event {
            Event::Snapshot(records) => {
                if self.store_lost.take().is_some() {
                    info!("the store can be read again");
                }
                let table =
                    RouteTable::build(self.place.own, &self.options.peers, &records, &self.table.routes);
                self.apply(table);
            }
            Event::Lost(why) => {
                if self.store_lost.is_none() {
                    warn!(
                        "the store cannot be read, the {} routes stay as they are: {why}",
                        self.table.routes.len()
                    );
                }
                self.store_lost = Some(why);
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
        if self.datapath.take().is_some() {
            error!("the datapath failed and is made again: {failure}");
            self.retry_at = Some(Instant::now());
        }
        // The other thread's word on the same loss.
        while self.failures.1.try_recv().is_ok() {}
    }

    async fn restart_datapath(&mut self) {
        let address = SocketAddrV4::new(self.place.own.public_ip, self.place.port);
        let attempt = match tun::bind(address) {
            Ok(socket) => self.start_datapath(socket).await,
            Err(error) => Err(error),
        };
        self.retry_at = match attempt {
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

    async fn care_for_device(&self) {
        let Own { network, subnet, .. } = self.place.own;
        match device::restore(&self.netlink, &self.options.device, network, subnet, self.place.mtu).await {
            Ok(restored) if restored.is_empty() => {}
            Ok(restored) => {
                warn!("someone changed {}: restored its {}", self.options.device, restored.join(", "))
            }
            Err(error) => warn!("look after {}: {error:#}", self.options.device),
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
            Question::Counters => serde_json::to_value(CounterList::from(self.datapath()?.counters()?))?,
        })
    }

    fn status(&self) -> Result<Status> {
        let datapath = self.datapath()?;
        let Place { underlay, own, port, mtu } = &self.place;
        Ok(Status {
            state: "running".to_owned(),
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
                lost: self.store_lost.clone(),
            },
            drops: report::errors(&datapath.counters()?),
        })
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

fn network_config(options: &Options, store: Option<&DirStore>) -> Result<NetworkConfig> {
    let mut config = match (store, options.network) {
        (Some(store), network) => store.config(network)?,
        (None, Some(network)) => NetworkConfig::of_network(network)?,
        (None, None) => bail!(
            "without --store, name the network with --network, this host's part with --subnet and the others with --peer"
        ),
    };
    match options.port {
        Some(port) if store.is_some() && port != config.port => bail!(
            "--port is {port}, but the network's config says {}: all hosts of a network use one port",
            config.port
        ),
        Some(port) => config.port = port,
        None => {}
    }
    Ok(config)
}

/// What the operator wrote must make sense together.
fn check_addresses(options: &Options, config: &NetworkConfig, public_ip: Ipv4Addr) -> Result<()> {
    if config.network.contains(&public_ip) {
        bail!(
            "the public address {public_ip} lies inside the network {}: the overlay would carry its own packets",
            config.network
        );
    }
    if let Some(subnet) = options.subnet
        && (!config.network.contains(&subnet) || subnet == config.network)
    {
        bail!("the subnet {subnet} is not a part of the network {}: choose another --subnet", config.network);
    }
    let peers: Vec<_> = options.peers.iter().collect();
    for (position, (subnet, peer)) in peers.iter().enumerate() {
        if !config.network.contains(*subnet) || **subnet == config.network {
            bail!("--peer {subnet}={peer}: the subnet is not a part of the network {}", config.network);
        }
        if !lease::is_host(**peer) || config.network.contains(*peer) || **peer == public_ip {
            bail!("--peer {subnet}={peer}: {peer} cannot be the underlay address of another host");
        }
        let later = peers.iter().skip(position + 1).map(|(other, _)| *other).chain(options.subnet.as_ref());
        for other in later {
            if subnet.contains(other) || other.contains(*subnet) {
                bail!("--peer {subnet}={peer}: the subnet overlaps {other}");
            }
        }
    }
    Ok(())
}

fn acquire(
    options: &Options,
    store: Option<&DirStore>,
    config: &NetworkConfig,
    public_ip: Ipv4Addr,
) -> Result<Acquired> {
    let earlier = options.subnet_file.as_deref().and_then(subnet_env::read_subnet);
    match (store, options.subnet) {
        (Some(store), wanted) => store.acquire(config, public_ip, wanted, earlier),
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
