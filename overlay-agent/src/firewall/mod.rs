//! The host's firewall, as far as the overlay needs it: masquerading and forwarding, to flannel's effect.
//!
//! Masquerading lives in a table of its own per overlay device, made in one transaction. Forwarding cannot: to nftables,
//! a packet that one chain accepts is still dropped by another's policy. What drops containers' packets in practice is the
//! policy of iptables' FORWARD chain, set by Docker, and that is where flannel appends its rules. So do we, marked with a
//! comment, where that chain exists. `nft` makes all changes: its text is what an administrator reads, too.

mod legacy;
mod nft;
mod ruleset;

use std::time::Duration;

use ipnet::Ipv4Net;
use serde_json::Value;
use tokio::{
    sync::watch,
    time::{MissedTickBehavior, interval},
};
use tracing::{info, warn};

pub use legacy::out_of_reach;
pub use nft::NftError;
pub use ruleset::{BadName, Rules};

use ruleset::{FORWARD_CHAIN, Names, is_marked};

/// The rules of one overlay device, and what the kernel made of them.
#[derive(Debug)]
pub struct Firewall {
    rules: Rules,
    names: Names,
    /// What the kernel listed after the last change of ours; anything else means that someone changed it.
    seen: Option<Listing>,
    /// What was warned about.
    warned: Vec<String>,
}

/// What the kernel has of ours.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Listing {
    /// Our table, if it is there.
    table: Option<Value>,
    /// Our rules in iptables' FORWARD chain, if that is there.
    forward: Option<Vec<Value>>,
}

impl Firewall {
    /// Rules that are not in force yet.
    ///
    /// # Errors
    ///
    /// When the overlay device has a name that cannot be part of a table's.
    pub fn new(rules: Rules) -> Result<Self, BadName> {
        let names = Names::of(&rules.device)?;
        Ok(Self { rules, names, seen: None, warned: Vec::new() })
    }

    /// Replaces what is there of ours by the rules, in one transaction.
    ///
    /// # Errors
    ///
    /// When `nft` is missing or refuses; nothing has changed then.
    pub async fn apply(&mut self) -> Result<(), NftError> {
        let there = self.list().await?;
        if self.rules.is_empty() && there.is_empty() {
            self.seen = Some(there);
            return Ok(());
        }
        let script = |there: &Listing| self.rules.script(&self.names, there.forward.as_deref());
        nft::run(&script(&there)).await?;
        let now = self.list().await?;
        // Someone may have changed things in between: then this is not how they should look, and the next look tries again.
        let right = now.count() == ruleset::count(&script(&now));
        self.seen = right.then_some(now);
        self.warn_about_other_drops().await;
        Ok(())
    }

    /// Puts the rules back if they are not as [`Firewall::apply`] left them. `true` when they were not.
    ///
    /// # Errors
    ///
    /// As [`Firewall::apply`].
    pub async fn restore(&mut self) -> Result<bool, NftError> {
        if self.seen.as_ref() == Some(&self.list().await?) {
            return Ok(false);
        }
        self.apply().await?;
        Ok(true)
    }

    /// Follows this host to another subnet.
    ///
    /// # Errors
    ///
    /// As [`Firewall::apply`]; [`Firewall::restore`] tries again.
    pub async fn set_subnet(&mut self, subnet: Ipv4Net) -> Result<(), NftError> {
        self.rules.subnet = subnet;
        self.seen = None;
        self.apply().await
    }

    /// Looks every `period` whether the rules are still there, puts them back where they are not, and follows this host's
    /// subnet. `trouble` says why they may not be in force; `None` while all is well. Ends when the sender of the subnet is
    /// gone; the rules stay then.
    pub async fn keep(
        mut self,
        period: Duration,
        mut subnet: watch::Receiver<Ipv4Net>,
        trouble: watch::Sender<Option<String>>,
    ) {
        let mut tick = interval(period);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let restored = tokio::select! {
                _ = tick.tick() => self.restore().await,
                changed = subnet.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let subnet = *subnet.borrow_and_update();
                    self.set_subnet(subnet).await.map(|()| false)
                }
            };
            let device = &self.rules.device;
            if let Ok(true) = restored {
                info!("the firewall's rules of {device} were changed or missing, and are back");
            }
            let failed = restored
                .err()
                .map(|error| format!("the firewall's rules of {device} may be missing: {error}"));
            trouble.send_replace(failed);
            self.warn_about_legacy();
        }
    }

    /// Where a packet may be dropped out of our sight. Said once, and no trouble: the policy there is nearly always to accept.
    fn warn_about_legacy(&mut self) {
        let forward = self.rules.forward.then_some(self.rules.network);
        if let Some(why) = forward.and_then(out_of_reach)
            && !self.warned.contains(&why)
        {
            warn!("{why}");
            self.warned.push(why);
        }
    }

    async fn list(&self) -> Result<Listing, NftError> {
        let table = nft::list(&["table", "ip", &self.names.table]).await?;
        let forward = forward_rules(&self.names).await?;
        Ok(Listing { table, forward })
    }

    /// Where packets are dropped that flannel, too, would leave dropped.
    async fn warn_about_other_drops(&mut self) {
        if !self.rules.forward {
            return;
        }
        let chains = match nft::list(&["chains"]).await {
            Ok(chains) => chains.unwrap_or_default(),
            Err(error) => return warn!("cannot look for chains that drop forwarded packets: {error}"),
        };
        for place in ruleset::other_drops(&chains) {
            if !self.warned.contains(&place) {
                warn!(
                    "the policy of {place} drops forwarded packets: accept those from and to {} there",
                    self.rules.network
                );
                self.warned.push(place);
            }
        }
    }
}

impl Listing {
    fn is_empty(&self) -> bool {
        self.table.is_none() && self.forward.as_ref().is_none_or(Vec::is_empty)
    }

    /// How many rules there are.
    fn count(&self) -> usize {
        let objects = self.table.iter().filter_map(Value::as_array).flatten();
        let own = objects.filter(|object| object.get("rule").is_some()).count();
        own + self.forward.as_ref().map_or(0, Vec::len)
    }
}

/// Removes what any agent left for an overlay device. `false` when there is nothing, also because there is no `nft`.
///
/// # Errors
///
/// When `nft` refuses.
pub async fn remove(device: &str) -> Result<bool, NftError> {
    // Under a name that no rules can have there are none.
    let Ok(names) = Names::of(device) else { return Ok(false) };
    let table = match nft::list(&["table", "ip", &names.table]).await {
        Err(NftError::Missing) => return Ok(false),
        table => table?.is_some(),
    };
    let forward = forward_rules(&names).await?.unwrap_or_default();
    if !table && forward.is_empty() {
        return Ok(false);
    }
    nft::run(&ruleset::removal(&names, &forward)).await?;
    Ok(true)
}

/// Our rules in iptables' FORWARD chain; `None` when there is no such chain.
async fn forward_rules(names: &Names) -> Result<Option<Vec<Value>>, NftError> {
    let (table, chain) = FORWARD_CHAIN;
    let listing = nft::list(&["chain", "ip", table, chain]).await?;
    Ok(listing.map(|listing| {
        let rules = listing.as_array().into_iter().flatten().filter_map(|object| object.get("rule"));
        rules.filter(|rule| is_marked(rule, names)).cloned().collect()
    }))
}
