//! What an agent does to its host beside the overlay device: rules of the firewall, and a route that discards.

use std::time::Duration;

use anyhow::{Context as _, Result};
use ipnet::Ipv4Net;
use tokio::{sync::watch, task::JoinHandle};
use tracing::{debug, warn};

use super::Options;
use crate::{
    firewall::{self, Firewall, Rules},
    netlink::Netlink,
};

/// How long the end of the agent waits for a change of the firewall that is under way.
const FAREWELL: Duration = Duration::from_secs(5);

/// What was done, and what keeps it so.
pub(super) struct Host {
    device: String,
    /// The subnet that packets are discarded for when no container takes them.
    blackhole: Option<Ipv4Net>,
    keeper: Option<RuleKeeper>,
}

struct RuleKeeper {
    subnet: watch::Sender<Ipv4Net>,
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
        let mut host = Self { device: options.device.clone(), blackhole: None, keeper: None };
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
        if let Some(before) = self.blackhole.replace(subnet).filter(|before| *before != subnet) {
            let moved = async {
                netlink.add_blackhole(subnet).await?;
                netlink.remove_blackhole(before).await
            };
            if let Err(error) = moved.await {
                warn!("{error:#}");
            }
        }
        if let Some(keeper) = &self.keeper {
            // The task ends only with the agent.
            let _ = keeper.subnet.send(subnet);
        }
    }

    /// Undoes everything.
    pub(super) async fn clear(self, netlink: &Netlink) {
        if let Some(RuleKeeper { subnet, task }) = self.keeper {
            drop(subnet);
            // Two changes at once would leave the rules of the one that ends last.
            if tokio::time::timeout(FAREWELL, task).await.is_err() {
                warn!("nft does not end");
            }
            if let Err(error) = firewall::remove(&self.device).await {
                warn!("remove the firewall's rules of {}: {error}", self.device);
            }
        }
        if let Some(subnet) = self.blackhole
            && let Err(error) = netlink.remove_blackhole(subnet).await
        {
            warn!("{error:#}");
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
            return Ok(None);
        }
        Err(error) => debug!("no rules are wanted, and none can be looked for: {error}"),
    }
    if !wanted {
        return Ok(None);
    }
    let (sender, receiver) = watch::channel(subnet);
    let task = tokio::spawn(firewall.keep(wish.resync, receiver));
    Ok(Some(RuleKeeper { subnet: sender, task }))
}
