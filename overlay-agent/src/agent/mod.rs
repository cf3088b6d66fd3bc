//! The running agent: a main loop that selects events and delegates them to its parts.
//!
//! `start` puts the parts together. `membership` is this host's lease and the records of all hosts, `forwarding` makes routes
//! of the records and the datapath of the routes, `host` is everything else on this machine, `notifier` reports the health,
//! `status` answers queries.

mod bypass;
mod change_log;
mod checks;
mod conditions;
mod config_watch;
mod forwarding;
mod host;
mod host_state;
mod host_watch;
mod log_window;
mod membership;
mod next_hops;
mod notifier;
mod options;
mod readdressing;
mod recall;
mod record;
mod retry;
mod rungs;
mod services;
mod start;
mod status;
mod successor;
mod sysctl;
mod takeover;

use std::{pin::pin, time::Duration};

use anyhow::{Context as _, Result};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc,
    time::{Instant, MissedTickBehavior, interval_at},
};
use tracing::{debug, info};

pub use options::{HostOptions, OnExit, Options, ServiceOptions, StoreOption};

use crate::{
    capabilities,
    control::{self, Control, QueryRequest},
    datapath::{PathCounters, Request, ebpf},
    fd_store::FdStore,
    handover::Channel,
    left::Left,
    netlink::Netlink,
    route::LocalNode,
    run_record::RecordFile,
    store::LeaseEvent,
    underlay::{self, Underlay, UnderlayChange},
};
use checks::{check_underlay, dead_link, inner_mtu};
use conditions::Condition;
use forwarding::Forwarding;
use host::HostSetup;
use membership::{Membership, News};
use notifier::HealthNotifier;
use services::Services;
use start::{Before, Prepared};
use successor::Successor;
use takeover::TakeOver;

/// Interval of checks of the host's state.
const CHECK_INTERVAL: Duration = Duration::from_secs(5);
/// Interval of checks of what changes without a message of the kernel: attached programs, and switches.
const SILENT_CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// Runs until SIGTERM or SIGINT, then leaves or removes what it made, as [`Options::on_exit`] says. The lease stays for the next start.
/// Fails when the agent cannot start: the host is then as it was before.
pub async fn run(options: Options) -> Result<()> {
    check_capabilities(options.datapath)?;
    let mut stop = StopSignals::new()?;
    let netlink = Netlink::connect()?;
    let kept = FdStore::take();
    let path = control::path(&options.run_dir, &options.device);
    let take_over = match options.take_over {
        true => TakeOver::request(&path, &options.device).await?,
        false => None,
    };
    let is_taking_over = take_over.is_some();
    let (query_sender, mut queries) = mpsc::channel(8);
    let (successor_sender, mut successors) = mpsc::channel(1);
    let listen = || {
        let control = Control::listen(path.clone())?;
        tokio::spawn(control.serve(query_sender.clone(), successor_sender.clone()));
        anyhow::Ok(())
    };
    // First, so that `down` and a second agent find this one while it waits for etcd.
    if !is_taking_over {
        listen()?;
    }
    let healthz = options.host.healthz;
    let mut notifier = HealthNotifier::start(healthz.filter(|_| !is_taking_over)).await?;
    let report = notifier.subscribe();
    let (device, run_dir) = (options.device.clone(), options.run_dir.clone());
    let record_file = RecordFile::new(options.record_file())?;
    let prepared = {
        let store = status::store_name(&options);
        let before = Before { kept, take_over };
        let mut preparing = pin!(Prepared::new(options, &netlink, &mut notifier, before));
        loop {
            tokio::select! {
                prepared = &mut preparing => break prepared?,
                () = stop.wait() => return Ok(()),
                Some((query, answer)) = queries.recv() => {
                    let health = report.borrow().health().clone();
                    let left = Left::find(&netlink, &device, &run_dir).await.ok().flatten();
                    // The client may be gone.
                    let _ = answer.send(status::answer_while_starting(query, &health, &store, left.as_ref()));
                }
                Some(channel) = successors.recv() => successor::refuse(channel, "it is starting").await,
            }
        }
    };
    // Not interrupted: half of it would stay. It takes a moment; a signal meanwhile ends the main loop at once.
    let Prepared { options, config, mut membership, forwarding, host, underlay, .. } =
        prepared.apply(&netlink).await?;
    if is_taking_over {
        listen()?;
        notifier.serve(healthz).await?;
    }
    tokio::task::spawn_blocking(remove_old_pins);
    let underlay_changes = underlay::watch(underlay.clone(), &options.underlay)?;
    let host_changes = host_watch::watch()?;
    membership.keep_lease();
    let services = Services::start(&options, &config, membership.store(), &underlay, &netlink).await;
    let mut agent = Agent {
        netlink,
        membership,
        forwarding,
        host,
        services,
        notifier,
        underlay_changes,
        host_changes,
        queries,
        successors,
        successor: None,
        underlay,
        record_file,
        running: false,
    };
    agent.check_link();
    agent.check_silent().await;
    match agent.run_until(&mut stop).await {
        End::Stopped => agent.stop().await,
        End::TakenOver => agent.end().await,
    }
}

/// Why the main loop ends.
enum End {
    Stopped,
    /// Another agent forwards now.
    TakenOver,
}

/// Removes pins of network namespaces that are gone.
fn remove_old_pins() {
    match ebpf::sweep() {
        Ok(removed) => {
            for directory in removed {
                info!("removed {}: its network namespace is gone", directory.display());
            }
        }
        Err(error) => debug!("pins of other network namespaces: {error:#}"),
    }
}

/// Refuses at once what cannot work. With [`Request::Auto`], an agent that may not use eBPF takes the tun rung.
fn check_capabilities(request: Request) -> Result<()> {
    let needed = match request {
        Request::Xdp | Request::Tc => [capabilities::NETWORK, capabilities::EBPF].concat(),
        Request::Auto | Request::Tun => capabilities::NETWORK.to_vec(),
    };
    capabilities::check(&needed).with_context(|| format!("overlay-agent run {}", request.flag()))
}

struct StopSignals {
    terminate: Signal,
    interrupt: Signal,
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

struct Agent {
    netlink: Netlink,
    membership: Membership,
    forwarding: Forwarding,
    host: HostSetup,
    services: Services,
    notifier: HealthNotifier,
    underlay_changes: mpsc::Receiver<UnderlayChange>,
    /// Changes that may have been made to what the agent made.
    host_changes: mpsc::Receiver<()>,
    queries: mpsc::Receiver<QueryRequest>,
    /// Agents that ask to take over.
    successors: mpsc::Receiver<Channel>,
    /// The one that prepares to.
    successor: Option<Successor>,
    underlay: Underlay,
    record_file: RecordFile,
    /// Whether everything was there once.
    running: bool,
}

impl Agent {
    async fn run_until(&mut self, stop: &mut StopSignals) -> End {
        let [mut check, mut silent_check] = [CHECK_INTERVAL, SILENT_CHECK_INTERVAL].map(|period| {
            let mut interval = interval_at(Instant::now() + period, period);
            interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
            interval
        });
        loop {
            self.run_if_ready();
            let health = self.health();
            self.notifier.notify(health);
            tokio::select! {
                () = stop.wait() => return End::Stopped,
                Some(channel) = self.successors.recv() => self.offer(channel).await,
                message = successor::next(&mut self.successor) => {
                    if self.on_successor(message).await {
                        return End::TakenOver;
                    }
                }
                news = self.membership.next() => self.on_news(news).await,
                Some(change) = self.underlay_changes.recv() => self.on_underlay(change).await,
                Some((query, answer)) = self.queries.recv() => self.respond(query, answer).await,
                due = self.forwarding.due() => self.forwarding.on_due(due).await,
                Some(()) = self.host_changes.recv() => self.forwarding.on_host_change().await,
                _ = silent_check.tick() => self.check_silent().await,
                _ = check.tick() => self.check_periodically().await,
                () = self.notifier.watchdog() => self.notifier.ping_watchdog(),
            }
        }
    }

    /// Writes the subnet for container runtimes and reports readiness, once everything is there. A file that cannot be written
    /// does not withhold readiness: units that systemd starts after the agent would wait for it.
    fn run_if_ready(&mut self) {
        if self.running || self.forwarding.ready().is_err() {
            return;
        }
        self.write_subnet_file();
        self.running = true;
        info!("running: {} routes, see `overlay-agent status`", self.forwarding.table.routes().len());
    }

    async fn on_news(&mut self, news: News) {
        match news {
            News::Records(event) => self.forwarding.on_records(event).await,
            News::Config(config) => self.membership.on_config(config.as_deref()),
            News::Lease(event) => {
                if matches!(event, LeaseEvent::Readdressed { .. }) {
                    self.forwarding.announced();
                }
                let Some(subnet) = self.membership.on_lease(event) else { return };
                self.forwarding.set_local(self.membership.local()).await;
                self.host.set_subnet(&self.netlink, subnet.prefix()).await;
                self.write_subnet_file();
                info!("containers that exist have addresses of the old subnet: create them again");
            }
        }
    }

    async fn on_underlay(&mut self, change: UnderlayChange) {
        let underlay = match change {
            UnderlayChange::Changed(underlay) => underlay,
            UnderlayChange::Lost(why) => {
                let why = format!("{why}: peers are out of reach until it is back");
                return self.forwarding.conditions.set(Condition::Underlay, why);
            }
        };
        let network = self.membership.local().network;
        let mtu = match check_underlay(network, &underlay).and_then(|()| inner_mtu(&underlay.link)) {
            Ok(mtu) => mtu,
            Err(error) => {
                return self.forwarding.conditions.set(Condition::Underlay, format!("{error:#}"));
            }
        };
        let (before, link) = (std::mem::replace(&mut self.underlay, underlay.clone()), &underlay.link);
        if underlay.local_ip != before.local_ip {
            info!("the address of {} was {} and is {}", link.name, before.local_ip, underlay.local_ip);
        }
        if link.index != before.link.index {
            info!("the device {} was created again", link.name);
        } else if link.name != before.link.name {
            info!("the device {} is named {} now", before.link.name, link.name);
        }
        self.check_link();
        let resized = mtu != self.forwarding.spec.mtu;
        if resized {
            info!("the MTU of {} is {}: that of the overlay is {mtu} now", link.name, link.mtu);
        }
        let is_announced = self.membership.store().is_some();
        self.forwarding.set_underlay(&underlay, mtu, is_announced).await;
        if underlay.public_ip != self.membership.local().public_ip {
            self.membership.set_public_ip(underlay.public_ip);
            // Packets to the old address do not count any more.
            self.count_ingress().await;
            self.forwarding.set_local(self.membership.local()).await;
        }
        if resized && self.running {
            self.write_subnet_file();
        }
    }

    fn check_link(&mut self) {
        self.forwarding.conditions.update(Condition::Underlay, dead_link(&self.underlay.link));
    }

    /// Checks what changes without a message of the kernel.
    async fn check_silent(&mut self) {
        self.forwarding.check_programs().await;
        let LocalNode { subnet, .. } = self.membership.local();
        let problem = sysctl::forwarding_problem(&self.netlink, &self.forwarding.spec.name, subnet).await;
        self.host.conditions.update(Condition::Forwarding, problem);
        self.host.conditions.update(Condition::Services, self.services.problem());
        self.membership.check_snapshot();
        self.count_ingress().await;
        self.keep_record();
    }

    async fn count_ingress(&mut self) {
        if self.membership.counts_ingress()
            && let Ok(PathCounters { fast, slow, .. }) = self.forwarding.datapath.counters().await
        {
            self.membership.on_ingress(fast.ingress_packets + slow.ingress_packets);
        }
    }

    /// Repairs what other programs changed, and repeats what failed.
    async fn check_periodically(&mut self) {
        self.forwarding.check().await;
        self.host.check();
        if self.running && !self.host.has_subnet_file() {
            self.write_subnet_file();
        }
        if !self.running {
            self.notifier.extend_start();
        }
    }

    fn write_subnet_file(&mut self) {
        self.host.write_subnet_file(self.membership.local(), self.forwarding.spec.mtu);
    }

    async fn stop(mut self) -> Result<()> {
        self.notifier.stopping();
        let record = self.run_record();
        self.services.stop().await;
        self.forwarding.check_counters().await;
        let datapath = &mut self.forwarding.datapath;
        if self.forwarding.options.on_exit == OnExit::Keep
            && (datapath.is_pinned() || datapath.is_slow_only())
        {
            match datapath.is_pinned() {
                true => info!(
                    "the eBPF programs go on with {} routes: `overlay-agent down` removes them",
                    self.forwarding.table.routes().len()
                ),
                false => {
                    info!("the overlay device stays for the next agent: `overlay-agent down` removes it")
                }
            }
            self.host.leave().await;
            self.membership.leave().await;
            // Last: the slow path goes on until here, and packets wait in what systemd keeps open.
            self.forwarding.datapath.leave();
            record::end(&mut self.record_file, &self.forwarding, record);
            return Ok(());
        }
        self.forwarding.fd_store.clear();
        let removed = start::remove(&mut self.forwarding, &mut self.host, &self.netlink).await;
        record::end(&mut self.record_file, &self.forwarding, record);
        self.membership.leave().await;
        removed
    }

    /// Ends after another agent has taken over: what this one made is that agent's now.
    async fn end(self) -> Result<()> {
        self.notifier.stopping();
        self.services.stop().await;
        self.membership.leave().await;
        Ok(())
    }
}
