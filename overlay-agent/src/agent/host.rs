//! Changes to the host beside the datapath: firewall rules, the blackhole route and `subnet.env`.

use std::time::Duration;

use anyhow::{Context as _, Result};
use ipnet::Ipv4Net;
use tokio::{sync::watch, task::JoinHandle, time::timeout};
use tracing::{debug, warn};

use super::{
    Options,
    conditions::{Condition, Conditions},
};
use crate::{
    firewall::{self, Firewall, Guard, Keeper, NftError, Problems, Rules, Wanted},
    netlink::Netlink,
    route::{LocalNode, Routes},
    subnet_env,
};

/// How long shutdown waits for a running change of the firewall, and again for the removal of the rules: the device must be
/// removed even if `nft` hangs.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(5);

/// What was changed on the host, and the tasks that keep it.
pub(super) struct HostSetup {
    options: Options,
    /// The subnet of the blackhole route.
    blackhole: Option<Ipv4Net>,
    /// Why the blackhole route is not for this host's subnet.
    misplaced: Option<String>,
    keeper: Option<RuleKeeper>,
    /// Why no keeper can guard the peers.
    unguarded: Option<String>,
    pub(super) conditions: Conditions,
}

struct RuleKeeper {
    subnet: watch::Sender<Ipv4Net>,
    problems: watch::Receiver<Problems>,
    task: JoinHandle<()>,
}

impl HostSetup {
    /// A setup that has changed nothing yet.
    pub(super) fn new(options: &Options) -> Self {
        Self {
            options: options.clone(),
            blackhole: None,
            misplaced: None,
            keeper: None,
            unguarded: None,
            conditions: Conditions::default(),
        }
    }

    /// Applies firewall rules and the blackhole route.
    /// Fails when masquerading or the route is not available. Without the rules that only accept forwarded packets
    /// the overlay works on most hosts, so that is a warning; without the guard it works, too, and a condition says what
    /// containers can do. After an error, [`Self::clear`] removes what was applied. `port` is the network's UDP port,
    /// `routes` are those to the peers.
    pub(super) async fn apply(
        &mut self,
        netlink: &Netlink,
        local: LocalNode,
        port: u16,
        routes: watch::Receiver<Routes>,
    ) -> Result<()> {
        let subnet = local.subnet.prefix();
        if self.options.host.blackhole_route {
            netlink.add_blackhole(subnet).await?;
            self.blackhole = Some(subnet);
        }
        // A killed agent may have had another subnet or other flags.
        for stale in netlink.blackholes().await? {
            if local.network.contains(&stale) && self.blackhole != Some(stale) {
                netlink.remove_blackhole(stale).await?;
            }
        }
        let (rules, failed) = apply_rules(&self.options, local.network, subnet).await?;
        match Guard::new(&self.options.device, port) {
            Ok(guard) => {
                let keeper = Keeper { rules, guard };
                let period = self.options.host.resync;
                self.keeper = Some(RuleKeeper::start(keeper, failed, subnet, routes, period).await);
            }
            Err(error) => self.unguarded = Some(firewall::unguarded(error)),
        }
        self.check();
        Ok(())
    }

    /// Writes `subnet.env`, if there is a path for it. `mtu` is that of the overlay device.
    pub(super) fn write_subnet_file(&mut self, local: LocalNode, mtu: u32) {
        let Some(file) = &self.options.subnet_file else { return };
        let written = subnet_env::write(file, local, mtu, self.options.host.masquerade);
        let why = written
            .err()
            .map(|error| format!("container runtimes cannot read this host's subnet, retrying: {error:#}"));
        self.conditions.update(Condition::SubnetFile, why);
    }

    /// Whether container runtimes can read the subnet, as far as this host is concerned.
    pub(super) fn has_subnet_file(&self) -> bool {
        self.conditions.get(Condition::SubnetFile).is_none()
    }

    /// Follows this host to another subnet.
    pub(super) async fn set_subnet(&mut self, netlink: &Netlink, subnet: Ipv4Net) {
        if let Some(before) = self.blackhole.filter(|before| *before != subnet) {
            let moved = self.move_blackhole(netlink, before, subnet).await;
            self.misplaced = moved.err().map(|error| {
                format!("the blackhole route is not for {subnet} alone: {error:#}; start the agent again")
            });
        }
        if let Some(keeper) = &self.keeper {
            // The task ends only with the agent.
            let _ = keeper.subnet.send(subnet);
        }
        self.check();
    }

    async fn move_blackhole(&mut self, netlink: &Netlink, from: Ipv4Net, to: Ipv4Net) -> Result<()> {
        netlink.add_blackhole(to).await?;
        self.blackhole = Some(to);
        netlink.remove_blackhole(from).await?;
        Ok(())
    }

    /// Updates the conditions from what the tasks report.
    pub(super) fn check(&mut self) {
        let Problems { rules, guard } =
            self.keeper.as_ref().map(|keeper| keeper.problems.borrow().clone()).unwrap_or_default();
        self.conditions.update(Condition::Guard, guard.or_else(|| self.unguarded.clone()));
        let problems: Vec<String> = rules.into_iter().chain(self.misplaced.clone()).collect();
        self.conditions.update(Condition::Firewall, (!problems.is_empty()).then(|| problems.join("; ")));
    }

    /// Leaves firewall rules and the blackhole route to the next agent.
    pub(super) async fn leave(&mut self) {
        if let Some(keeper) = self.keeper.take() {
            keeper.end().await;
        }
    }

    /// Removes firewall rules and the blackhole route.
    pub(super) async fn clear(&mut self, netlink: &Netlink) {
        let device = &self.options.device;
        if let Some(keeper) = self.keeper.take() {
            keeper.end().await;
            match timeout(SHUTDOWN_TIMEOUT, firewall::remove(device)).await {
                Ok(Ok(_)) => {}
                Ok(Err(error)) => warn!("remove the firewall's rules of {device}: {error}"),
                Err(_) => warn!(
                    "nft does not answer: the firewall's rules of {device} stay, `overlay-agent down` removes them"
                ),
            }
        }
        if let Some(subnet) = self.blackhole.take()
            && let Err(error) = netlink.remove_blackhole(subnet).await
        {
            warn!("{error:#}");
        }
    }
}

impl RuleKeeper {
    /// Applies the guard, and keeps it and the rules. When an `nft` has just failed, which may have taken its whole time limit,
    /// the start does not wait for another one.
    async fn start(
        mut keeper: Keeper,
        failed: Option<NftError>,
        subnet: Ipv4Net,
        mut peers: watch::Receiver<Routes>,
        period: Duration,
    ) -> Self {
        let failed = match failed {
            Some(error) => Some(error),
            None => {
                let routes = peers.borrow_and_update().clone();
                keeper.guard.apply(&routes).await.err()
            }
        };
        let first = Problems { rules: None, guard: failed.map(firewall::unguarded) };
        let (subnet, subnet_receiver) = watch::channel(subnet);
        let (problem_sender, problems) = watch::channel(first);
        let wanted = Wanted { subnet: subnet_receiver, peers };
        let task = tokio::spawn(keeper.run(period, wanted, problem_sender));
        Self { subnet, problems, task }
    }

    /// Of two changes at once, the one that ends last would win: when this returns, the keeper makes no more changes.
    async fn end(mut self) {
        drop(self.subnet);
        if timeout(SHUTDOWN_TIMEOUT, &mut self.task).await.is_err() {
            self.task.abort();
            // Only confirms the abort.
            let _ = self.task.await;
        }
    }
}

/// Applies the rules for masquerading and forwarding. Returns them unless there are none to keep, and why `nft` failed where the
/// agent can run without them.
async fn apply_rules(
    options: &Options,
    network: Ipv4Net,
    subnet: Ipv4Net,
) -> Result<(Option<Firewall>, Option<NftError>)> {
    let host = &options.host;
    let rules = Rules {
        device: options.device.clone(),
        network,
        subnet,
        masquerade: host.masquerade,
        fully_random: host.fully_random,
        forward: host.forward_rules,
    };
    let wanted = rules.masquerade || rules.forward;
    let mut firewall = match (Firewall::new(rules), wanted) {
        (Ok(firewall), _) => firewall,
        // No rules can exist under such a name.
        (Err(_), false) => return Ok((None, None)),
        (Err(error), true) if !host.masquerade => {
            warn!("forwarded packets of the overlay are not accepted explicitly: {error}");
            return Ok((None, None));
        }
        (Err(error), true) => return Err(error.into()),
    };
    // Even if no rules are wanted: an earlier agent may have left some.
    match firewall.apply().await {
        Ok(()) => Ok((wanted.then_some(firewall), None)),
        Err(error) if host.masquerade => Err(error).context("--ip-masq"),
        Err(error) if wanted => {
            warn!("forwarded packets of the overlay are not accepted explicitly: {error}");
            if let Some(why) = firewall::legacy_warning(network) {
                warn!("{why}");
            }
            Ok((None, Some(error)))
        }
        Err(error) => {
            debug!("no rules are wanted, and none can be listed: {error}");
            Ok((None, Some(error)))
        }
    }
}
