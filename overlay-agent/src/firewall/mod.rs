//! Reconciles the firewall rules for masquerading and forwarding, with the same effect as flannel's.
//!
//! Masquerading has one nftables table per overlay device, replaced in one transaction. Forwarding rules cannot: in nftables, the
//! policy of one chain drops what another chain accepted. In practice, Docker sets the policy of iptables' FORWARD chain to
//! drop, so these rules are appended to that chain, as flannel does, marked by a comment. `guard` drops what containers send to
//! peers in the network's name, in a table of its own; `keeper` keeps all of it. All changes go through `nft`.

mod guard;
mod guard_rules;
mod keeper;
mod legacy;
mod nft;
mod ruleset;

use ipnet::Ipv4Net;
use serde_json::Value;
use tracing::warn;

pub use guard::{Guard, unguarded};
pub use keeper::{Keeper, Problems, Wanted};
pub use legacy::legacy_warning;
pub use nft::NftError;
pub use ruleset::{BadName, Rules};

use ruleset::{FORWARD_CHAIN, Names, is_marked};

/// The rules of one overlay device, desired and applied.
#[derive(Debug)]
pub struct Firewall {
    rules: Rules,
    names: Names,
    /// The kernel's listing after the last change by the agent; a different listing is a foreign change.
    applied: Option<Listing>,
    /// Warnings that were logged; each is logged once.
    warned: Vec<String>,
}

/// The agent's rules in the kernel.
#[derive(Debug, PartialEq, Eq)]
struct Listing {
    /// The agent's table, if it exists.
    table: Option<Value>,
    /// The agent's rules in iptables' FORWARD chain, if the chain exists.
    forward: Option<Vec<Value>>,
}

impl Firewall {
    /// Prepares the rules without applying them. Fails when the name of the overlay device cannot be part of a table name.
    pub fn new(rules: Rules) -> Result<Self, BadName> {
        let names = Names::of(&rules.device)?;
        Ok(Self { rules, names, applied: None, warned: Vec::new() })
    }

    /// Replaces the agent's rules in the kernel, in one transaction. When that fails, nothing has changed.
    pub async fn apply(&mut self) -> Result<(), NftError> {
        let current = self.list().await?;
        if self.rules.is_empty() && current.is_empty() {
            self.applied = Some(current);
            return Ok(());
        }
        let script = |listing: &Listing| self.rules.script(&self.names, listing.forward.as_deref());
        nft::run(&script(&current)).await?;
        let listing = self.list().await?;
        // On a concurrent foreign change, the next reconciliation applies the rules again.
        let complete = listing.count() == ruleset::count(&script(&listing));
        self.applied = complete.then_some(listing);
        self.warn_about_other_drops().await;
        Ok(())
    }

    /// Applies the rules again if they differ from what [`Firewall::apply`] left. `true` when they did.
    pub async fn reconcile(&mut self) -> Result<bool, NftError> {
        if self.applied.as_ref() == Some(&self.list().await?) {
            return Ok(false);
        }
        self.apply().await?;
        Ok(true)
    }

    /// Applies the rules for another subnet of this host. When that fails, [`Firewall::reconcile`] tries again.
    pub async fn set_subnet(&mut self, subnet: Ipv4Net) -> Result<(), NftError> {
        self.rules.subnet = subnet;
        self.applied = None;
        self.apply().await
    }

    /// What the rules are called in messages.
    pub(crate) fn name(&self) -> String {
        format!("the firewall's rules of {}", self.rules.device)
    }

    /// Only a warning: the policy of iptables-legacy is nearly always to accept.
    pub(crate) fn warn_about_legacy(&mut self) {
        if self.rules.forward
            && let Some(why) = legacy_warning(self.rules.network)
        {
            self.warn_once(why);
        }
    }

    fn warn_once(&mut self, text: String) {
        if !self.warned.contains(&text) {
            warn!("{text}");
            self.warned.push(text);
        }
    }

    async fn list(&self) -> Result<Listing, NftError> {
        let table = nft::list(&["table", "ip", &self.names.table]).await?;
        let forward = forward_rules(&self.names).await?;
        Ok(Listing { table, forward })
    }

    /// Warns about chains of others that drop forwarded packets. As with flannel, they stay as they are.
    async fn warn_about_other_drops(&mut self) {
        if !self.rules.forward {
            return;
        }
        let chains = match nft::list(&["chains"]).await {
            Ok(chains) => chains.unwrap_or_default(),
            Err(error) => return warn!("list the chains that drop forwarded packets: {error}"),
        };
        let network = self.rules.network;
        for place in ruleset::other_drops(&chains) {
            self.warn_once(format!(
                "the policy of {place} drops forwarded packets: accept those from {network}, and replies to it, there"
            ));
        }
    }
}

impl Listing {
    fn is_empty(&self) -> bool {
        self.table.is_none() && self.forward.as_ref().is_none_or(Vec::is_empty)
    }

    /// Number of rules.
    fn count(&self) -> usize {
        let objects = self.table.iter().filter_map(Value::as_array).flatten();
        let own = objects.filter(|object| object.get("rule").is_some()).count();
        own + self.forward.as_ref().map_or(0, Vec::len)
    }
}

/// Removes the rules that any agent left for an overlay device. `false` when there are none, or no `nft`.
pub async fn remove(device: &str) -> Result<bool, NftError> {
    // No rules exist for an invalid name.
    let Ok(names) = Names::of(device) else { return Ok(false) };
    let table = match nft::list(&["table", "ip", &names.table]).await {
        Err(NftError::Missing) => return Ok(false),
        table => table?.is_some(),
    };
    let guard = nft::list_without_elements(&["table", "ip", &names.guard]).await?.is_some();
    let forward = forward_rules(&names).await?.unwrap_or_default();
    if !table && !guard && forward.is_empty() {
        return Ok(false);
    }
    nft::run(&(guard_rules::removal(&names) + &ruleset::removal(&names, &forward))).await?;
    Ok(true)
}

/// The agent's rules in iptables' FORWARD chain; `None` when the chain does not exist.
async fn forward_rules(names: &Names) -> Result<Option<Vec<Value>>, NftError> {
    let (table, chain) = FORWARD_CHAIN;
    let listing = nft::list(&["chain", "ip", table, chain]).await?;
    Ok(listing.map(|listing| {
        let rules = listing.as_array().into_iter().flatten().filter_map(|object| object.get("rule"));
        rules.filter(|rule| is_marked(rule, names)).cloned().collect()
    }))
}
