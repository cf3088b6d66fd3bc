//! Keeps containers of this host from sending packets that peers would take for this host's.
//!
//! A peer accepts any inner source of this host's subnet from this host's address. A container has that address, too, when the
//! host masquerades its packets. So forwarded UDP to a peer's address and the network's port is dropped.
//!
//! The guard has a table of its own: peers come and go, which changes a few elements of a set and no rule. Listing the rules
//! without the elements tells whether another program changed them, at the same cost for one peer and for 10,000.

use std::{collections::BTreeSet, fmt, net::Ipv4Addr};

use serde_json::Value;

use super::{
    guard_rules, nft,
    nft::NftError,
    ruleset::{BadName, Names},
};
use crate::route::Routes;

/// Up to this number of peers, each check reads the elements back.
const FEW_PEERS: usize = 500;
/// Checks of the rules to one check of the elements of more peers: 10,000 take nft 30 ms, the rules alone 5 ms.
const CHECKS: u32 = 12;

/// The guard of one network, desired and applied.
#[derive(Debug)]
pub struct Guard {
    names: Names,
    port: u16,
    peers: BTreeSet<Ipv4Addr>,
    /// The kernel's listing of the table without the peers after the agent made it; a different one is a foreign change.
    applied: Option<Value>,
    checks: u32,
}

impl Guard {
    /// Prepares the guard of the network that uses the UDP port `port`, without applying it. Fails when the name of the overlay
    /// device cannot be part of a table name.
    pub fn new(device: &str, port: u16) -> Result<Self, BadName> {
        let names = Names::of(device)?;
        Ok(Self { names, port, peers: BTreeSet::new(), applied: None, checks: 0 })
    }

    /// Replaces the guard's table in one transaction. When that fails, nothing has changed.
    pub async fn apply(&mut self, routes: &Routes) -> Result<(), NftError> {
        self.replace(addresses(routes)).await
    }

    /// Follows the routes: adds and removes the peers that differ, in one transaction. While the table is not applied, that is
    /// left to [`Self::reconcile`].
    pub async fn update(&mut self, routes: &Routes) -> Result<(), NftError> {
        let wanted = addresses(routes);
        let Some(script) = guard_rules::update(&self.names, &self.peers, &wanted) else { return Ok(()) };
        if nft::run(&script).await.is_ok() {
            self.peers = wanted;
            return Ok(());
        }
        // Another program changed the set, or removed it.
        self.replace(wanted).await
    }

    /// Whether the table was applied, and no change of it has failed since.
    pub fn is_applied(&self) -> bool {
        self.applied.is_some()
    }

    /// Replaces the table if it differs from what the agent left. `true` when another program had changed it.
    pub async fn reconcile(&mut self, routes: &Routes) -> Result<bool, NftError> {
        let was_applied = self.is_applied();
        if was_applied && self.is_intact().await? {
            self.update(routes).await?;
            return Ok(false);
        }
        self.apply(routes).await?;
        Ok(was_applied)
    }

    async fn replace(&mut self, peers: BTreeSet<Ipv4Addr>) -> Result<(), NftError> {
        self.applied = None;
        nft::run(&guard_rules::replacement(&self.names, self.port, &peers)).await?;
        self.peers = peers;
        self.applied = self.list().await?;
        Ok(())
    }

    async fn is_intact(&mut self) -> Result<bool, NftError> {
        if self.list().await? != self.applied {
            return Ok(false);
        }
        self.checks = self.checks.wrapping_add(1);
        if self.peers.len() > FEW_PEERS && !self.checks.is_multiple_of(CHECKS) {
            return Ok(true);
        }
        let set = nft::list(&["set", "ip", &self.names.guard, guard_rules::PEERS]).await?;
        Ok(set.and_then(|set| guard_rules::listed(&set)).as_ref() == Some(&self.peers))
    }

    async fn list(&self) -> Result<Option<Value>, NftError> {
        let table = nft::list_without_elements(&["table", "ip", &self.names.guard]).await?;
        Ok(table.map(guard_rules::without_elements))
    }
}

/// What it means that the guard is not applied, for this reason.
pub fn unguarded(why: impl fmt::Display) -> String {
    format!("containers on this host can send packets that peers take for ours: {why}")
}

fn addresses(routes: &Routes) -> BTreeSet<Ipv4Addr> {
    routes.values().map(|peer| peer.address).collect()
}
