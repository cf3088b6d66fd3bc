//! Services on this node: a task that keeps the virtual addresses, the load balancers and the DNS server as the catalog says.
//!
//! Nothing is made before the network has a service.

mod balancers;
mod names;

pub(crate) use names::restore as restore_resolv_conf;

pub(crate) use balancers::remove_left;

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use anyhow::Result;
use ipnet::Ipv4Net;
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinHandle,
    time::{MissedTickBehavior, interval, timeout},
};
use tracing::{info, warn};

use self::{balancers::Balancers, names::NameServer};
use super::{
    Catalog, LbRequest,
    device::ServiceDevice,
    files::{self, FileOptions, ServiceFiles},
    follow::{Following, follow},
    front::Rules,
    health::{self, Ejected, Health, Publishing},
    traffic::Traffic,
    vip::{self, VipKeeper, VipOptions},
};
use crate::{netlink::Netlink, store::Store};

/// Interval of attempts to make what is missing.
const RETRY: Duration = Duration::from_secs(2);
/// How long the task may take to report its traffic.
const TRAFFIC_TIMEOUT: Duration = Duration::from_secs(2);
/// Interval of looks at what became of connections.
const LOOK: Duration = Duration::from_secs(1);
/// How long the end of the agent waits for the removal.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(5);

/// What this node does for services.
#[derive(Clone, Debug)]
pub struct NodeOptions {
    /// The device of the virtual addresses.
    pub device: ServiceDevice,
    /// The overlay device.
    pub overlay: String,
    /// Whether the end of the agent leaves what can go on without it.
    pub keep: bool,
    /// The virtual addresses of the network.
    pub pool: Ipv4Net,
    /// The domain below which services have names.
    pub domain: String,
    /// How connections to virtual addresses reach an endpoint.
    pub lb: LbRequest,
    /// What the catalog does not say about the choice.
    pub rules: Rules,
    /// The cgroup whose processes can connect to virtual addresses; `None` for the root.
    pub cgroup: Option<PathBuf>,
    /// DNS servers for names that are none of services; empty for those of `/etc/resolv.conf`.
    pub dns_upstreams: Vec<SocketAddr>,
    /// Whether `/etc/resolv.conf` is replaced while the agent runs.
    pub manage_resolv_conf: bool,
    /// Files of services and of this node's endpoints.
    pub files: Option<FileOptions>,
}

/// Services as this node has them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeState {
    /// Number of services.
    pub services: usize,
    /// Number of endpoints of all nodes.
    pub endpoints: usize,
    /// Records that are left out.
    pub skipped: usize,
    /// How connections to virtual addresses reach an endpoint.
    pub balancers: String,
    /// Whether they reach one when this process ends, and why, or why not.
    pub without_agent: (bool, String),
    /// Where the DNS server answers, once it does.
    pub dns: Option<SocketAddr>,
    /// Endpoints of this node that do not pass their checks, each with the reason.
    pub down: Vec<String>,
    /// Endpoints that get no connections of this node for a while.
    pub ejected: Vec<Ejected>,
    /// What does not work, with the remedy.
    pub problems: Vec<String>,
}

/// Asks for the traffic.
type Question = oneshot::Sender<Result<Traffic, String>>;

/// The running task.
#[derive(Debug)]
pub struct ServiceNode {
    state: watch::Receiver<NodeState>,
    questions: mpsc::Sender<Question>,
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl ServiceNode {
    /// Starts the task, which follows the services of the store.
    /// Fails when the options cannot be used.
    pub fn start(options: NodeOptions, netlink: Netlink, store: &Store) -> Result<Self> {
        let (sender, receiver) = watch::channel(NodeState::default());
        let (stop, stopped) = oneshot::channel();
        let (questions, asked) = mpsc::channel(8);
        // What a killed agent left.
        names::restore();
        let address = vip::dns_address(options.pool);
        let names = NameServer::new(&options, address)?;
        let following = follow(store, options.pool);
        let vip_options = VipOptions { pool: options.pool, quarantine: vip::QUARANTINE };
        let vips = vip::keep(store, vip_options, following.work.clone());
        let health = Health::new(options.rules.node.clone());
        let files = options.files.clone().map(|options| files::keep(store, options, health.verdicts()));
        let balancers = Balancers::new(options.lb, options.cgroup.clone(), &options.overlay);
        // What an earlier agent left follows the store, too, when there is no service any more.
        let is_active = balancers.has_left();
        let keeper = Keeper {
            options,
            netlink,
            store: store.clone(),
            following,
            vips,
            files,
            health,
            balancers,
            names,
            state: sender,
            questions: asked,
            host_problems: Vec::new(),
            is_active,
        };
        Ok(Self { state: receiver, questions, stop, task: tokio::spawn(keeper.run(stopped)) })
    }

    /// The present state.
    pub fn state(&self) -> NodeState {
        self.state.borrow().clone()
    }

    /// What was counted so far. Fails with a text when the task has no catalog yet, or its parts cannot be read.
    pub(crate) fn traffic(&self) -> impl Future<Output = Result<Traffic, String>> + Send + 'static {
        let questions = self.questions.clone();
        async move {
            let (question, answer) = oneshot::channel();
            let asked = async { questions.send(question).await.ok().and(answer.await.ok()) };
            let answer = timeout(TRAFFIC_TIMEOUT, asked).await.ok().flatten();
            answer.unwrap_or_else(|| Err("the services of the store have not been read yet".to_owned()))
        }
    }

    /// Removes what the task made, or leaves what can go on if [`NodeOptions::keep`] says so, and ends it.
    pub async fn stop(mut self) {
        // The task may have ended.
        let _ = self.stop.send(());
        if timeout(SHUTDOWN_TIMEOUT, &mut self.task).await.is_err() {
            warn!(
                "services: their removal takes longer than {} s: `overlay-agent down` removes the rest",
                SHUTDOWN_TIMEOUT.as_secs()
            );
            self.task.abort();
        }
    }
}

struct Keeper {
    options: NodeOptions,
    netlink: Netlink,
    store: Store,
    following: Following,
    vips: VipKeeper,
    files: Option<ServiceFiles>,
    health: Health,
    balancers: Balancers,
    names: NameServer,
    state: watch::Sender<NodeState>,
    questions: mpsc::Receiver<Question>,
    /// What is missing on this host.
    host_problems: Vec<String>,
    /// Whether there has been a service.
    is_active: bool,
}

impl Keeper {
    async fn run(mut self, mut stop: oneshot::Receiver<()>) {
        let catalog = tokio::select! {
            catalog = self.following.catalog() => catalog,
            _ = &mut stop => None,
        };
        if let Some(catalog) = catalog {
            self.follow(catalog, &mut stop).await;
        }
        self.remove().await;
    }

    async fn follow(&mut self, mut catalog: watch::Receiver<Arc<Catalog>>, stop: &mut oneshot::Receiver<()>) {
        let _publishing = self.publish(&catalog);
        let mut view = self.health.view();
        let [mut retry, mut look] = [RETRY, LOOK].map(|period| {
            let mut ticks = interval(period);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            ticks
        });
        let (mut is_due, mut has_changed) = (true, true);
        self.health.follow(&catalog.borrow_and_update().clone());
        loop {
            let present = Arc::clone(&view.borrow_and_update());
            if has_changed && (self.is_active || !present.services.is_empty()) {
                // Not at every change of the catalog: it lists the host's devices and routes.
                if is_due || !self.is_active {
                    self.check_host(&view).await;
                }
                self.is_active = true;
                self.reconcile(&present).await;
            }
            (is_due, has_changed) = (false, true);
            tokio::select! {
                _ = &mut *stop => return,
                changed = catalog.changed() => match changed {
                    Ok(()) => self.health.follow(&catalog.borrow_and_update().clone()),
                    Err(_) => return,
                },
                () = self.health.changed() => {}
                _ = look.tick(), if self.is_active => {
                    self.health.observe(&self.balancers.outcomes());
                    // Its sender is here.
                    has_changed = view.has_changed().unwrap_or(true);
                }
                _ = retry.tick() => is_due = true,
                Some(question) = self.questions.recv() => {
                    // The client may be gone.
                    let _ = question.send(self.traffic(&present));
                    has_changed = view.has_changed().unwrap_or(true);
                }
            }
        }
    }

    /// Tells other nodes which endpoints are down. Those of files are written by the task that keeps these.
    fn publish(&self, catalog: &watch::Receiver<Arc<Catalog>>) -> Publishing {
        let kept = self.files.as_ref().map(|files| files.named.clone());
        health::publish(&self.store, self.health.verdicts(), catalog.clone(), kept)
    }

    fn traffic(&self, present: &Catalog) -> Result<Traffic, String> {
        let mut measures = self.balancers.measures().map_err(|error| format!("{error:#}"))?;
        measures.dns = self.names.counters();
        Ok(measures.traffic(present))
    }

    /// Makes what is missing on this host: the device of the virtual addresses, and the DNS server.
    async fn check_host(&mut self, catalog: &watch::Receiver<Arc<Catalog>>) {
        let NodeOptions { device, pool, .. } = &self.options;
        self.host_problems.clear();
        match device.reconcile(&self.netlink, *pool).await {
            Ok(true) => info!("the device {} holds the virtual addresses {pool}", device.name()),
            Ok(false) => {}
            Err(error) => self.host_problems.push(format!("{error:#}")),
        }
        if let Err(error) = self.names.reconcile(catalog).await {
            self.host_problems.push(format!("{error:#}"));
        }
    }

    async fn reconcile(&mut self, present: &Catalog) {
        let mut problems = self.host_problems.clone();
        problems.extend(self.balancers.reconcile(present, &self.options.rules).await);
        let unassigned = self.vips.problems.borrow().clone();
        problems.extend(unassigned.into_iter().map(|(name, why)| format!("{name}: {why}")));
        if let Some(files) = &self.files {
            let state = files.state.borrow().clone();
            problems.extend(state.skipped.into_iter().map(|(what, why)| format!("{what}: {why}")));
            problems.extend(state.problem);
            problems.extend(files.endpoints.borrow().problem.clone());
        }
        let unchecked = self.health.problems().iter();
        problems.extend(unchecked.map(|(name, why)| format!("{name}: {why}")));
        let lost = self.following.state.borrow().lost.clone();
        problems.extend(lost.map(|why| format!("services cannot be read, the last known ones stay: {why}")));
        let state = NodeState {
            services: present.services.len(),
            endpoints: present.services.values().map(|service| service.endpoints.len()).sum(),
            skipped: present.skipped.len(),
            balancers: self.balancers.describe(),
            without_agent: self.balancers.without_agent(self.options.keep),
            dns: self.names.address(),
            down: self.health.down(),
            ejected: self.health.ejected(),
            problems,
        };
        self.state.send_if_modified(|before| {
            let differs = *before != state;
            *before = state;
            differs
        });
    }

    async fn remove(self) {
        let Self { options, netlink, files, balancers, mut names, is_active, .. } = self;
        let records = async {
            if let Some(files) = files {
                files.stop().await;
            }
        };
        let host = async {
            if !is_active {
                return;
            }
            names.stop();
            let (leave, _) = balancers.without_agent(options.keep);
            balancers.stop(leave).await;
            if leave {
                // Nothing else refuses what the programs do not translate.
                info!(
                    "the eBPF programs go on with the present endpoints: `overlay-agent down` removes them"
                );
                return;
            }
            if let Err(error) = options.device.remove(&netlink).await {
                warn!("remove the device {}: {error:#}", options.device.name());
            }
        };
        // The store may be away, which must not hold up the rest.
        tokio::join!(records, host);
    }
}
