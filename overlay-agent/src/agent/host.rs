//! What an agent does to its host beside the overlay device: rules of the firewall, and a route that discards.

use std::time::Duration;

use anyhow::{Context as _, Result};
use ipnet::Ipv4Net;
use tokio::{sync::watch, task::JoinHandle, time::timeout};
use tracing::{debug, warn};

use super::Options;
use crate::{
    firewall::{self, Firewall, Rules},
    netlink::Netlink,
};

/// How long the end of the agent waits for a change of the firewall that is under way, and again for the rules' removal: the
/// device has to go also where `nft` hangs.
const FAREWELL: Duration = Duration::from_secs(5);

/// What was done, and what keeps it so.
pub(super) struct Host {
    device: String,
    /// The subnet that packets are discarded for when no container takes them.
    blackhole: Option<Ipv4Net>,
    /// Why that is not this host's subnet.
    misplaced: Option<String>,
    keeper: Option<RuleKeeper>,
}

struct RuleKeeper {
    subnet: watch::Sender<Ipv4Net>,
    trouble: watch::Receiver<Option<String>>,
    task: JoinHandle<()>,
}

impl Host {
    /// Applies what `options` ask for.
    ///
    /// # Errors
    ///
    /// When masquerading or the route cannot be had. Without the rules that only accept forwarded packets the overlay works
    /// on most hosts, so that is a warning.
    pub(super) async fn prepare(
        options: &Options,
        netlink: &Netlink,
        network: Ipv4Net,
        subnet: Ipv4Net,
    ) -> Result<Self> {
        let mut host =
            Self { device: options.device.clone(), blackhole: None, misplaced: None, keeper: None };
        let done = async {
            if options.host.blackhole_route {
                netlink.add_blackhole(subnet).await?;
                host.blackhole = Some(subnet);
            }
            // An earlier agent, which was killed, may have had another subnet or other flags.
            for stale in netlink.blackholes().await? {
                if network.contains(&stale) && host.blackhole != Some(stale) {
                    netlink.remove_blackhole(stale).await?;
                }
            }
            host.keeper = keep_rules(options, network, subnet).await?;
            anyhow::Ok(())
        };
        match done.await {
            Ok(()) => Ok(host),
            Err(error) => {
                host.clear(netlink).await;
                Err(error)
            }
        }
    }

    /// Follows this host to another subnet.
    pub(super) async fn follow(&mut self, netlink: &Netlink, subnet: Ipv4Net) {
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
    }

    async fn move_blackhole(&mut self, netlink: &Netlink, from: Ipv4Net, to: Ipv4Net) -> Result<()> {
        netlink.add_blackhole(to).await?;
        self.blackhole = Some(to);
        netlink.remove_blackhole(from).await?;
        Ok(())
    }

    /// What is not as the operator asked for, if anything.
    pub(super) fn trouble(&self) -> Option<String> {
        let rules = self.keeper.as_ref().and_then(|keeper| keeper.trouble.borrow().clone());
        let troubles: Vec<String> = rules.into_iter().chain(self.misplaced.clone()).collect();
        (!troubles.is_empty()).then(|| troubles.join("; "))
    }

    /// Undoes everything.
    pub(super) async fn clear(self, netlink: &Netlink) {
        if let Some(keeper) = self.keeper {
            keeper.end().await;
            match timeout(FAREWELL, firewall::remove(&self.device)).await {
                Ok(Ok(_)) => {}
                Ok(Err(error)) => warn!("remove the firewall's rules of {}: {error}", self.device),
                Err(_) => warn!(
                    "nft does not answer: the firewall's rules of {} stay, `overlay-agent down` removes them",
                    self.device
                ),
            }
        }
        if let Some(subnet) = self.blackhole
            && let Err(error) = netlink.remove_blackhole(subnet).await
        {
            warn!("{error:#}");
        }
    }
}

impl RuleKeeper {
    /// Two changes at once would leave the rules of the one that ends last: when this returns, the keeper makes none.
    async fn end(mut self) {
        drop(self.subnet);
        if timeout(FAREWELL, &mut self.task).await.is_err() {
            self.task.abort();
            // Only that it was aborted.
            let _ = self.task.await;
        }
    }
}

async fn keep_rules(options: &Options, network: Ipv4Net, subnet: Ipv4Net) -> Result<Option<RuleKeeper>> {
    let wish = &options.host;
    let rules = Rules {
        device: options.device.clone(),
        network,
        subnet,
        masquerade: wish.masquerade,
        fully_random: wish.fully_random,
        forward: wish.forward_rules,
    };
    let wanted = rules.masquerade || rules.forward;
    let mut firewall = match (Firewall::new(rules), wanted) {
        (Ok(firewall), _) => firewall,
        // No rules can have been made under such a name.
        (Err(_), false) => return Ok(None),
        (Err(error), true) if !wish.masquerade => {
            warn!("forwarded packets of the overlay are not accepted explicitly: {error}");
            return Ok(None);
        }
        (Err(error), true) => return Err(error.into()),
    };
    // Also when none are wanted: an earlier agent may have left some.
    match firewall.apply().await {
        Ok(()) => {}
        Err(error) if wish.masquerade => return Err(error).context("--ip-masq"),
        Err(error) if wanted => {
            warn!("forwarded packets of the overlay are not accepted explicitly: {error}");
            if let Some(why) = firewall::legacy_warning(network) {
                warn!("{why}");
            }
            return Ok(None);
        }
        Err(error) => debug!("no rules are wanted, and none can be looked for: {error}"),
    }
    if !wanted {
        return Ok(None);
    }
    let (subnet, subnet_receiver) = watch::channel(subnet);
    let (trouble_sender, trouble) = watch::channel(None);
    let task = tokio::spawn(firewall.run(wish.resync, subnet_receiver, trouble_sender));
    Ok(Some(RuleKeeper { subnet, trouble, task }))
}
