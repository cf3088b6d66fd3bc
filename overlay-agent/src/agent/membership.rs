//! This host's membership in the network: the store, this host's lease and the address in its record.

use std::{
    net::Ipv4Addr,
    path::PathBuf,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result, bail};
use backon::Retryable as _;
use tokio::{
    sync::mpsc,
    time::{Instant, timeout},
};
use tracing::warn;

use super::{
    Options, StoreOption,
    conditions::{Condition, Conditions},
    config_watch::ConfigWatch,
    log_window::LogWindow,
    notifier::HealthNotifier,
    recall::{self, Opened, Recalled},
};
use crate::{
    config::NetworkConfig,
    lease::Lease,
    report,
    route::{LocalNode, Subnet},
    store::{
        ArchiveKeeper, Event, Held, LeaseEvent, LeaseKeeper, RecalledLease, Store, StoreError, SubnetRequest,
    },
    subnet_env,
};

/// Time for the last requests to the store at shutdown.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(3);
/// Most lines about a lost lease in a window: other programs may remove our record again and again.
const LOSSES: usize = 10;
/// Time for the first snapshot of the records before the datapath starts without it.
const FIRST_SNAPSHOT: Duration = Duration::from_secs(5);

/// An opened store and the network's configuration. Without a store, all peers are fixed.
pub(super) struct Network {
    store: Option<Store>,
    pub(super) config: NetworkConfig,
    /// What an earlier run knew, where the store does not answer.
    recalled: Option<Recalled>,
}

/// Whether the subnet is ours, as far as the store tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum LeaseState {
    Held,
    /// The store cannot be asked; its last confirmation is valid until this time, or without end.
    Unconfirmed(Option<Instant>),
    Lost,
}

/// This host's lease. It is kept by a task once the agent has started.
#[derive(Debug)]
enum OwnLease {
    /// Without a store there is nothing to keep.
    Fixed,
    Held(Box<Held>),
    /// That of an earlier run, which the store has not confirmed yet.
    Recalled(Box<RecalledLease>),
    Kept(LeaseKeeper),
}

/// News for the main loop.
#[derive(Debug)]
pub(super) enum News {
    /// Records of all hosts.
    Records(Event<Lease>),
    /// This host's lease.
    Lease(LeaseEvent),
    /// The network's configuration as it is stored; `None` when it was removed.
    Config(Option<String>),
}

/// This host's place in the network, and the lease that gives it.
#[derive(Debug)]
pub(super) struct Membership {
    store: Option<Store>,
    lease: OwnLease,
    records: mpsc::Receiver<Event<Lease>>,
    /// `None` without a store.
    config: Option<ConfigWatch>,
    local: LocalNode,
    /// Our address in the store, or, without one, the address that peers know.
    recorded_ip: Ipv4Addr,
    /// Packets that had arrived when our address had just changed.
    arrived: Option<u64>,
    state: LeaseState,
    /// With less than this left, an unconfirmed lease is a danger.
    margin: Duration,
    /// When the lease ends, as the store last confirmed it; `None` when it has no end or was not confirmed yet.
    ends: Option<SystemTime>,
    lease_log: LogWindow,
    /// The file of the snapshot, unless there is to be none, and the task that writes it.
    snapshot_file: Option<PathBuf>,
    snapshot: Option<ArchiveKeeper>,
    pub(super) conditions: Conditions,
}

impl Network {
    /// Opens the store and reads the network's configuration. While etcd is away or has no configuration yet, this waits and
    /// reports the reason; but when etcd does not answer, the snapshot of an earlier run at `public_ip` takes its place.
    /// Fails when waiting does not help.
    pub(super) async fn open(
        options: &Options,
        public_ip: Ipv4Addr,
        notifier: &mut HealthNotifier,
    ) -> Result<Self> {
        let store = match &options.store {
            StoreOption::None => None,
            StoreOption::Dir(root) => Some(Store::dir(root.clone())),
            StoreOption::Etcd(etcd) => Some(Store::etcd_unreached((**etcd).clone()).context("the store")?),
        };
        let mut recalled = None;
        let mut config = match (&store, options.network) {
            (Some(store), _) => match recall::open(store, options, public_ip, notifier).await? {
                Opened::Answered(config) => config,
                Opened::Recalled(found) => {
                    let config = found.config.clone();
                    recalled = Some(*found);
                    config
                }
            },
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
        Ok(Self { store, config, recalled })
    }

    /// Acquires a subnet for the host at `public_ip`, and follows all records.
    /// Fails when no subnet is available.
    pub(super) async fn join(
        self,
        options: &Options,
        public_ip: Ipv4Addr,
        notifier: &mut HealthNotifier,
    ) -> Result<Membership> {
        let Self { mut store, config, recalled } = self;
        let network = config.network;
        // The address may be another one by now.
        let mut recalled = recalled.filter(|recalled| recalled.saved.public_ip() == public_ip);
        let mut unconfirmed = None;
        let (lease, subnet, records, config) = match (&mut store, options.subnet) {
            (None, Some(subnet)) => (OwnLease::Fixed, subnet, no_records(), None),
            (None, None) => bail!("without --store, name this host's part of the network with --subnet"),
            (Some(store), wanted) => {
                let request = SubnetRequest {
                    config: config.clone(),
                    wanted,
                    earlier: options.subnet_file.as_deref().and_then(subnet_env::read_subnet),
                    fixed: options.peers.keys().copied().collect(),
                };
                if let Some(network) = options.network {
                    store.ensure_config(network).await?;
                }
                let (lease, subnet) = match &recalled {
                    Some(Recalled { saved, why, .. }) => {
                        let lease = RecalledLease::new(saved, request, SystemTime::now());
                        unconfirmed = Some(LeaseEvent::Unconfirmed {
                            why: why.clone(),
                            expires_in: lease.expires_in(),
                        });
                        let subnet = lease.subnet();
                        (OwnLease::Recalled(Box::new(lease)), subnet)
                    }
                    None => {
                        let held = retry(notifier, || store.acquire(&request, public_ip)).await?;
                        let subnet = held.subnet;
                        (OwnLease::Held(Box::new(held)), subnet)
                    }
                };
                if options.snapshot {
                    *store = store.clone().archived(recalled.take().map(|recalled| recalled.saved));
                }
                let config = ConfigWatch::start(store, config);
                (lease, subnet, store.follow(), Some(config))
            }
        };
        let mut membership = Membership {
            store,
            lease,
            records,
            config,
            local: LocalNode { network, subnet, public_ip },
            recorded_ip: public_ip,
            arrived: None,
            state: LeaseState::Held,
            margin: options.lease_margin(),
            ends: None,
            lease_log: LogWindow::default(),
            snapshot_file: options.snapshot.then(|| options.snapshot_file()),
            snapshot: None,
            conditions: Conditions::default(),
        };
        if let Some(event) = unconfirmed {
            membership.on_lease(event);
        }
        Ok(membership)
    }
}

impl Membership {
    /// This host's place in the network.
    pub(super) fn local(&self) -> LocalNode {
        self.local
    }

    /// The store; `None` when all peers were given on the command line.
    pub(super) fn store(&self) -> Option<&Store> {
        self.store.as_ref()
    }

    /// Name of the store, for `status`.
    pub(super) fn store_name(&self) -> String {
        self.store.as_ref().map_or_else(|| "none".to_owned(), Store::name)
    }

    /// The first records; `None` when the store does not answer in time.
    pub(super) async fn first_records(&mut self) -> Option<Event<Lease>> {
        timeout(FIRST_SNAPSHOT, self.records.recv()).await.ok().flatten()
    }

    /// The first records, however long that takes: an earlier agent's programs have routes, which must not be replaced by none.
    pub(super) async fn first_snapshot(&mut self, notifier: &mut HealthNotifier) -> Option<Event<Lease>> {
        loop {
            match timeout(FIRST_SNAPSHOT, self.records.recv()).await {
                Ok(Some(Event::Lost(why))) => {
                    notifier.waiting(&format!("routes stay as an earlier agent left them: {why}"));
                }
                Ok(event) => return event,
                Err(_) => notifier.extend_start(),
            }
        }
    }

    /// When the lease ends without another renewal, RFC 3339; `None` when it has no end.
    pub(super) fn lease_ends(&self) -> Option<String> {
        self.ends.map(report::utc)
    }

    /// Starts to keep the lease, and the snapshot.
    pub(super) fn keep_lease(&mut self) {
        let Some(store) = &self.store else { return };
        let keeper = match &self.lease {
            OwnLease::Held(held) => {
                self.ends = store.lasts(held).map(|left| SystemTime::now() + left);
                store.keep((**held).clone())
            }
            OwnLease::Recalled(lease) => store.keep_recalled((**lease).clone()),
            OwnLease::Fixed | OwnLease::Kept(_) => return,
        };
        self.lease = OwnLease::Kept(keeper);
        if let Some(path) = self.snapshot_file.take() {
            self.snapshot = store.keep_archive(path);
        }
    }

    /// Stops to keep the lease, which another agent of this host is about to keep. [`Self::keep_lease`] goes on.
    pub(super) async fn pause_lease(&mut self) {
        self.lease = match std::mem::replace(&mut self.lease, OwnLease::Fixed) {
            OwnLease::Kept(keeper) => match keeper.stop().await {
                Some(held) => OwnLease::Held(Box::new(held)),
                None => OwnLease::Fixed,
            },
            other @ (OwnLease::Fixed | OwnLease::Held(_) | OwnLease::Recalled(_)) => other,
        };
    }

    /// Reports a snapshot that cannot be written.
    pub(super) fn check_snapshot(&mut self) {
        let problem = self.snapshot.as_ref().and_then(|snapshot| snapshot.problem.borrow().clone());
        self.conditions.update(Condition::Snapshot, problem);
    }

    /// The next news.
    pub(super) async fn next(&mut self) -> News {
        let lease = async {
            match &mut self.lease {
                OwnLease::Kept(keeper) => keeper.events.recv().await,
                OwnLease::Fixed | OwnLease::Held(_) | OwnLease::Recalled(_) => None,
            }
        };
        let config = async {
            match &mut self.config {
                Some(config) => config.next().await,
                None => None,
            }
        };
        tokio::select! {
            Some(event) = self.records.recv() => News::Records(event),
            Some(event) = lease => News::Lease(event),
            Some(config) = config => News::Config(config),
            else => std::future::pending().await,
        }
    }

    /// Follows the lease. Returns the subnet when it is another one.
    pub(super) fn on_lease(&mut self, event: LeaseEvent) -> Option<Subnet> {
        match event {
            LeaseEvent::Confirmed { expires_in } => {
                self.ends = expires_in.map(|left| SystemTime::now() + left);
                self.confirmed();
            }
            LeaseEvent::Unconfirmed { why, expires_in } => {
                self.ends = expires_in.map(|left| SystemTime::now() + left);
                self.state = LeaseState::Unconfirmed(expires_in.map(|left| Instant::now() + left));
                let end = expires_in.map_or_else(String::new, |left| {
                    format!(", and ends at {}", humantime::format_rfc3339_seconds(SystemTime::now() + left))
                });
                self.conditions.set(Condition::Lease, format!("the lease cannot be confirmed{end}: {why}"));
            }
            LeaseEvent::Reacquired { subnet, why } => {
                self.confirmed();
                self.lease_log.renew(Instant::now());
                if self.lease_log.take_line(LOSSES) {
                    warn!("the lease of {subnet} was lost and acquired again: {why}");
                }
            }
            LeaseEvent::Readdressed { public_ip } => {
                self.recorded_ip = public_ip;
                self.confirmed();
                self.check_address();
            }
            LeaseEvent::Moved { from, to, why } => {
                self.confirmed();
                warn!("our subnet is {to} now, no longer {from}: {why}");
                self.local.subnet = to;
                return Some(to);
            }
            LeaseEvent::Lost { why } | LeaseEvent::Superseded { why } => {
                self.state = LeaseState::Lost;
                self.conditions.set(Condition::Lease, why);
            }
        }
        None
    }

    /// Reports a stored configuration that contradicts the one of this agent.
    pub(super) fn on_config(&mut self, stored: Option<&str>) {
        let problem = self.config.as_ref().and_then(|config| config.problem(stored));
        self.conditions.update(Condition::Config, problem);
    }

    fn confirmed(&mut self) {
        self.state = LeaseState::Held;
        self.conditions.clear(Condition::Lease);
    }

    /// This host has another public address: our record follows.
    pub(super) fn set_public_ip(&mut self, public_ip: Ipv4Addr) {
        (self.local.public_ip, self.arrived) = (public_ip, None);
        if let OwnLease::Kept(keeper) = &self.lease {
            keeper.set_address(public_ip);
        }
        self.check_address();
    }

    /// Whether it matters for [`Self::on_ingress`] how many packets arrive.
    pub(super) fn counts_ingress(&self) -> bool {
        matches!(self.lease, OwnLease::Fixed) && self.recorded_ip != self.local.public_ip
    }

    /// `packets` have arrived from peers so far. Without a store, that more arrive shows that peers know our new address.
    pub(super) fn on_ingress(&mut self, packets: u64) {
        if !self.counts_ingress() {
            return;
        }
        if self.arrived.is_some_and(|before| packets > before) {
            self.recorded_ip = self.local.public_ip;
            self.check_address();
        }
        self.arrived = Some(packets);
    }

    /// Peers send to the address in our record, and accept packets from no other.
    fn check_address(&mut self) {
        let (LocalNode { public_ip, subnet, .. }, recorded) = (self.local, self.recorded_ip);
        let why = (public_ip != recorded).then(|| match self.lease {
            OwnLease::Fixed => format!(
                "our address is {public_ip}, and peers know this host by {recorded}: they are out of reach until they are given \
                 --peer {subnet}={public_ip}"
            ),
            OwnLease::Held(_) | OwnLease::Recalled(_) | OwnLease::Kept(_) => format!(
                "our address is {public_ip}, and the store still says {recorded}: peers are out of reach until it follows"
            ),
        });
        self.conditions.update(Condition::Address, why);
    }

    /// Whether peers reach this host and will.
    /// Errors: the reason why not.
    pub(super) fn health(&self, now: Instant) -> Result<(), String> {
        if let Some(why) = self.conditions.get(Condition::Address) {
            return Err(why);
        }
        let why = || self.conditions.get(Condition::Lease).unwrap_or_default();
        match self.state {
            LeaseState::Held | LeaseState::Unconfirmed(None) => Ok(()),
            LeaseState::Lost => Err(why()),
            LeaseState::Unconfirmed(Some(end)) => {
                match end.saturating_duration_since(now) < self.margin {
                    // The reason tells when.
                    true => Err(format!("the lease is about to be lost: {}", why())),
                    false => Ok(()),
                }
            }
        }
    }

    /// Releases the lease of an agent that could not start; one that existed before stays.
    pub(super) async fn give_back(self) {
        if let (Some(store), OwnLease::Held(held)) = (self.store, self.lease) {
            if !held.created {
                store.leave(&held).await;
            } else if let Err(error) = store.release(&held).await {
                warn!("release the lease: {error}");
            }
        }
    }

    /// The agent ends. Its lease stays for the next start.
    pub(super) async fn leave(self) {
        if let (Some(store), OwnLease::Kept(keeper)) = (self.store, self.lease) {
            let leave = async {
                if let Some(held) = keeper.stop().await {
                    store.leave(&held).await;
                }
            };
            if timeout(SHUTDOWN_TIMEOUT, leave).await.is_err() {
                warn!("etcd does not answer: another host can use our address only after a delay");
            }
        }
        if let Some(snapshot) = self.snapshot {
            snapshot.stop().await;
        }
    }
}

/// The records of a network without a store: none, and no changes.
fn no_records() -> mpsc::Receiver<Event<Lease>> {
    let (sender, receiver) = mpsc::channel(1);
    // Cannot fail: there is room for one.
    let _ = sender.try_send(Event::Snapshot(Vec::new()));
    receiver
}

/// Repeats a request while it may succeed without an operator's help, and reports why the start waits.
async fn retry<T, F: Future<Output = Result<T, StoreError>>>(
    notifier: &mut HealthNotifier,
    request: impl FnMut() -> F,
) -> Result<T> {
    request
        .retry(recall::pauses())
        .when(StoreError::is_transient)
        .notify(|error, _| notifier.waiting(&error.to_string()))
        .await
        .context("the store")
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 1);
    const NEW: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 9);

    fn membership() -> Membership {
        let subnet = "10.244.1.0/24".parse().unwrap();
        Membership {
            store: None,
            lease: OwnLease::Fixed,
            records: no_records(),
            config: None,
            local: LocalNode { network: "10.244.0.0/16".parse().unwrap(), subnet, public_ip: OLD },
            recorded_ip: OLD,
            arrived: None,
            state: LeaseState::Held,
            margin: Duration::from_secs(60),
            ends: None,
            lease_log: LogWindow::default(),
            snapshot_file: None,
            snapshot: None,
            conditions: Conditions::default(),
        }
    }

    #[test]
    fn a_lease_in_doubt_is_healthy_until_its_end_is_near() {
        let mut membership = membership();
        let now = Instant::now();
        let expires_in = Some(Duration::from_secs(600));
        membership.on_lease(LeaseEvent::Unconfirmed { why: "etcd is away".to_owned(), expires_in });
        assert_eq!(membership.health(now), Ok(()));
        let condition = membership.conditions.get(Condition::Lease).unwrap();
        let end = condition.strip_prefix("the lease cannot be confirmed, and ends at ").unwrap();
        let end = humantime::parse_rfc3339(end.strip_suffix(": etcd is away").unwrap()).unwrap();
        let left = end.duration_since(SystemTime::now()).unwrap().as_secs();
        assert!((500..=600).contains(&left), "{condition}");
        let why = membership.health(now + Duration::from_secs(550)).unwrap_err();
        assert_eq!(why, format!("the lease is about to be lost: {condition}"), "one time, which stays true");
        membership.on_lease(LeaseEvent::Confirmed { expires_in });
        assert_eq!((membership.health(now), membership.conditions.iter().count()), (Ok(()), 0));
        membership.on_lease(LeaseEvent::Unconfirmed { why: "etcd is away".to_owned(), expires_in: None });
        assert_eq!(membership.health(now + Duration::from_secs(1 << 30)), Ok(()), "a reservation has no end");
    }

    #[test]
    fn a_lost_lease_is_unhealthy_and_a_moved_one_is_reported() {
        let mut membership = membership();
        let now = Instant::now();
        assert_eq!(membership.on_lease(LeaseEvent::Lost { why: "removed".to_owned() }), None);
        assert_eq!(membership.health(now), Err("removed".to_owned()));
        let (from, to) = (membership.local().subnet, "10.244.2.0/24".parse().unwrap());
        let moved = membership.on_lease(LeaseEvent::Moved { from, to, why: "taken".to_owned() });
        assert_eq!((moved, membership.local().subnet, membership.health(now)), (Some(to), to, Ok(())));
    }

    #[test]
    fn an_address_that_the_store_does_not_have_yet_is_unhealthy() {
        let mut membership = membership();
        membership.recorded_ip = Ipv4Addr::new(192, 168, 77, 5);
        membership.check_address();
        assert!(membership.health(Instant::now()).unwrap_err().contains("192.168.77.5"));
        membership.on_lease(LeaseEvent::Readdressed { public_ip: OLD });
        assert_eq!(membership.health(Instant::now()), Ok(()));
    }

    #[test]
    fn without_a_store_another_address_is_unhealthy_until_peers_send_to_it() {
        let mut membership = membership();
        membership.on_ingress(7);
        membership.set_public_ip(NEW);
        let why = membership.health(Instant::now()).unwrap_err();
        assert!(why.contains("--peer 10.244.1.0/24=192.168.77.9"), "{why}");
        // Those before the first look may have been for the old address.
        for arrived in [9, 9] {
            membership.on_ingress(arrived);
            assert!(membership.health(Instant::now()).is_err());
        }
        membership.on_ingress(10);
        assert_eq!((membership.local().public_ip, membership.health(Instant::now())), (NEW, Ok(())));
        membership.set_public_ip(OLD);
        assert!(membership.health(Instant::now()).is_err());
        membership.set_public_ip(NEW);
        assert_eq!(membership.health(Instant::now()), Ok(()), "the address that peers know is back");
    }

    #[tokio::test]
    async fn a_network_without_a_store_has_no_records_and_no_news() {
        let mut membership = membership();
        assert_eq!(membership.first_records().await, Some(Event::Snapshot(Vec::new())));
        assert!(timeout(Duration::from_millis(50), membership.next()).await.is_err());
    }
}
