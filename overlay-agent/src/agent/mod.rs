//! The running agent: start in an order that leaves nothing half-done, then follow the store until told to stop.

mod answers;
mod checks;
mod claim;
mod host;
mod leasing;
mod options;
mod outlook;
mod problems;
mod routes;
mod upkeep;

use std::{
    net::{Ipv4Addr, SocketAddrV4},
    pin::pin,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail};
pub use options::{HostOptions, Options, StoreOption};

use checks::{check_addresses, inner_mtu};
use claim::Claim;
use host::Host;
use leasing::{Lease, Leasing};
use outlook::Outlook;
use problems::{Concern, Problems};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    time::{Instant, MissedTickBehavior, sleep_until},
};
use tracing::{debug, info, warn};

use crate::{
    control::{self, Control, QueryRequest},
    datapath::{Datapath, Desired, UnderlayDevice, tun},
    device::{self, DeviceAlias, DeviceSpec},
    netlink::Netlink,
    route::{Routes, Subnet},
    route_table::{Own, RouteTable},
    store::Event,
    subnet_env,
    underlay::{self, Underlay, UnderlayChange},
};

/// How often to see whether the device still has its address, MTU and route.
const CARE: Duration = Duration::from_secs(5);

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
    // From the first moment, so that `down` and a second agent find this one also while it waits for etcd.
    let control = Control::listen(control::path(&options.run_dir, &options.device))?;
    let (question_sender, mut questions) = mpsc::channel(8);
    tokio::spawn(control.serve(question_sender));
    let mut outlook = Outlook::start(options.host.healthz).await?;
    let report = outlook.subscribe();
    let prepared = {
        let mut preparing = pin!(Prepared::new(options, &netlink, &mut outlook));
        loop {
            tokio::select! {
                prepared = &mut preparing => break prepared?,
                () = stop.wait() => return Ok(()),
                Some((_, back)) = questions.recv() => {
                    let why = report.borrow().health().to_string();
                    // Whoever asked may be gone.
                    let _ = back.send(Err(format!("the agent is starting, {why}")));
                }
            }
        }
    };
    // Not interrupted: what is half-made would stay. It takes a moment; a signal meanwhile ends `follow` at once.
    let mut agent = Agent::start(prepared, netlink, outlook, questions).await?;
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
}

impl Prepared {
    /// Looks at everything that can be refused, and takes the lease last.
    async fn new(options: Options, netlink: &Netlink, outlook: &mut Outlook) -> Result<Self> {
        // Looked for now to refuse at once what cannot work, and again when etcd, perhaps hours later, has answered.
        Underlay::find(netlink, &options.underlay).await?;
        if let Some(file) = &options.subnet_file {
            subnet_env::check(file)?;
        }
        let (leasing, config) = Leasing::open(&options, outlook).await?;
        let underlay = Underlay::find(netlink, &options.underlay).await?;
        check_addresses(&options, &config, &underlay)?;
        device::preflight(netlink, &options.device, config.network).await?;
        let mtu = inner_mtu(&underlay.link)?;
        let address = SocketAddrV4::new(underlay.local_ip, config.port);
        drop(tun::Socket::bind(tun::Endpoint { address, ifindex: underlay.link.index })?);
        let lease = leasing.acquire(&options, &config, underlay.public_ip, outlook).await?;
        let subnet = lease.subnet().context("the lease has no subnet")?;
        let own = Own { network: config.network, subnet, public_ip: underlay.public_ip };
        info!("{} is {} in {}, MTU {mtu}, port {}", own.public_ip, own.subnet, own.network, config.port);
        Ok(Self { options, leasing, lease, place: Place { underlay, own, port: config.port, mtu } })
    }
}

struct Agent {
    options: Options,
    netlink: Netlink,
    place: Place,
    datapath: Datapath,
    /// Whether the datapath is as desired; a lost one is being made again.
    up: bool,
    retry_at: Option<Instant>,
    retries: u32,
    made_at: Option<Instant>,
    /// The store's records as last heard, and the routes that they give.
    table: RouteTable,
    leasing: Leasing,
    lease: Option<Lease>,
    claim: Claim,
    /// Our address as the store has it.
    recorded_ip: Ipv4Addr,
    problems: Problems,
    outlook: Outlook,
    /// Whether all records were heard once: from then on, no route is missing.
    informed: bool,
    /// Whether everything was there once.
    running: bool,
    host: Option<Host>,
    events: mpsc::Receiver<Event>,
    event_sender: mpsc::Sender<Event>,
    underlay_changes: mpsc::Receiver<UnderlayChange>,
    questions: mpsc::Receiver<QueryRequest>,
    failures: (mpsc::Sender<String>, mpsc::Receiver<String>),
}

impl Agent {
    async fn start(
        prepared: Prepared,
        netlink: Netlink,
        outlook: Outlook,
        questions: mpsc::Receiver<QueryRequest>,
    ) -> Result<Self> {
        let Prepared { options, leasing, lease, place } = prepared;
        let (event_sender, events) = mpsc::channel(4);
        let own = place.own;
        let table = RouteTable::new(own, options.peers.clone());
        let failures = mpsc::channel(2);
        let mut agent = Self {
            options,
            datapath: Datapath::new(netlink.clone(), failures.0.clone()),
            netlink,
            place,
            up: false,
            retry_at: None,
            retries: 0,
            made_at: None,
            table,
            leasing,
            lease: None,
            claim: Claim::Firm,
            recorded_ip: own.public_ip,
            problems: Problems::default(),
            outlook,
            informed: false,
            running: false,
            host: None,
            events,
            event_sender,
            underlay_changes: mpsc::channel(1).1,
            questions,
            failures,
        };
        let finish = async {
            agent.reconcile().await?;
            agent.host = Some(Host::prepare(&agent.options, &agent.netlink, own.network, own.subnet).await?);
            agent.underlay_changes = underlay::watch(agent.place.underlay.clone(), &agent.options.underlay)?;
            if let Some(records) = agent.leasing.list()? {
                agent.on_snapshot(records);
                agent.subnet_file()?;
                agent.run_if_ready();
            }
            anyhow::Ok(())
        };
        if let Err(error) = finish.await {
            if let Err(error) = agent.remove_from_host().await {
                warn!("{error:#}");
            }
            agent.leasing.give_back(lease, own.public_ip).await;
            return Err(error);
        }
        // Watches before it lists, so nothing that happened meanwhile is missed.
        agent.lease = Some(agent.leasing.follow(lease, own.public_ip, agent.event_sender.clone()));
        warn_about_forwarding();
        Ok(agent)
    }

    /// The agent says that it runs, and container runtimes learn the subnet, once everything is there.
    fn run_if_ready(&mut self) {
        if self.running || !self.informed || !self.up {
            return;
        }
        self.write_subnet_file();
        if self.problems.get(Concern::SubnetFile).is_none() {
            self.running = true;
            info!("running: {} routes, see `overlay-agent status`", self.table.routes().len());
        }
    }

    fn subnet_file(&self) -> Result<()> {
        let (own, mtu, masquerade) = (self.place.own, self.place.mtu, self.options.host.masquerade);
        match &self.options.subnet_file {
            Some(file) => subnet_env::write(file, own.network, own.subnet, mtu, masquerade),
            None => Ok(()),
        }
    }

    /// Writes `subnet.env` again after a change of what it says.
    fn write_subnet_file(&mut self) {
        match self.subnet_file() {
            Ok(()) => self.problems.clear(Concern::SubnetFile),
            Err(error) => self.problems.set(Concern::SubnetFile, format!("{error:#}")),
        }
    }

    async fn reconcile(&mut self) -> Result<()> {
        let Place { underlay, own, port, mtu } = &self.place;
        let spec = DeviceSpec {
            name: self.options.device.clone(),
            alias: DeviceAlias { network: own.network, port: *port, underlay: underlay.link.name.clone() },
            subnet: Subnet::containing(own.subnet),
            mtu: *mtu,
        };
        let routes = self.routes();
        let desired = Desired {
            device: &spec,
            underlays: &[UnderlayDevice { link: underlay.link.clone(), local_ip: underlay.local_ip }],
            request: self.options.datapath,
            tc_attach: self.options.tc_attach,
            routes: &routes,
            log: self.options.datapath_log,
        };
        let report = self.datapath.reconcile(&desired).await?;
        if !report.made.is_empty() {
            debug!("datapath: {}", report.made.join(", "));
        }
        if !report.repaired.is_empty() {
            warn!("repaired what others had changed: {}", report.repaired.join(", "));
        }
        if !self.up {
            (self.up, self.made_at) = (true, Some(Instant::now()));
        }
        self.note_routes(report.routes_behind.map_or(Ok(()), |why| Err(anyhow!(why))));
        Ok(())
    }

    fn routes(&self) -> Routes {
        let routes = self.table.routes().iter();
        routes.map(|(subnet, peer)| (Subnet::containing(*subnet), (*peer).into())).collect()
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
                Some(event) = self.events.recv() => self.on_store(event).await,
                Some(change) = self.underlay_changes.recv() => self.on_underlay(change).await,
                Some((question, back)) = self.questions.recv() => {
                    // Whoever asked may be gone.
                    let _ = back.send(self.answer(question).map_err(|error| format!("{error:#}")));
                }
                Some(failure) = self.failures.1.recv() => self.on_failure(&failure),
                () = retry => self.restart_datapath().await,
                _ = care.tick() => self.care().await,
                () = self.outlook.watchdog() => self.outlook.alive(),
            }
            self.run_if_ready();
            let health = self.health();
            self.outlook.tell(health);
        }
    }

    async fn on_store(&mut self, event: Event) {
        match event {
            Event::Snapshot(records) => self.on_snapshot(records),
            Event::Changes(changes) => {
                let outcome = self.table.apply(changes);
                self.apply(&outcome);
            }
            Event::Lost(why) => {
                let routes = self.table.routes().len();
                let why = format!("the store cannot be read, {routes} routes stay as they are: {why}");
                self.problems.set(Concern::Store, why);
            }
            Event::Lease(event) => self.on_lease(event).await,
        }
    }

    /// The lease stays: a restart keeps it.
    async fn stop(mut self) -> Result<()> {
        self.outlook.stopping();
        let removed = self.remove_from_host().await;
        if let Some(lease) = self.lease.take() {
            self.leasing.leave(lease).await;
        }
        removed
    }

    async fn remove_from_host(&mut self) -> Result<()> {
        if let Some(host) = self.host.take() {
            host.clear(&self.netlink).await;
        }
        self.datapath.remove().await
    }
}

fn warn_about_forwarding() {
    let forwarding = std::fs::read_to_string("/proc/sys/net/ipv4/ip_forward").unwrap_or_default();
    if forwarding.trim() == "0" {
        warn!(
            "net.ipv4.ip_forward is 0: this host's own packets cross the overlay, those of its containers do not (sysctl -w net.ipv4.ip_forward=1)"
        );
    }
}
