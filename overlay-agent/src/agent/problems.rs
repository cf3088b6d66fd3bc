//! What is wrong with a running agent, told once when it begins and once when it ends.

use std::collections::BTreeMap;

use tracing::{info, warn};

/// What a problem concerns; there is at most one of each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Concern {
    /// Reading leases.
    Store,
    /// Our own lease.
    Lease,
    /// The device that carries outer packets.
    Underlay,
    /// Making the datapath.
    Datapath,
    /// The address under which peers know this host.
    Address,
    /// Telling container runtimes.
    SubnetFile,
    /// The kernel's route map.
    Routes,
    /// What else the agent does on the host: the firewall's rules, the blackhole route.
    Firewall,
}

/// The problems of the moment.
#[derive(Debug, Default)]
pub(super) struct Problems(BTreeMap<Concern, String>);

impl Problems {
    pub(super) fn set(&mut self, concern: Concern, why: String) {
        if self.0.get(&concern) != Some(&why) {
            warn!("{why}");
            self.0.insert(concern, why);
        }
    }

    pub(super) fn clear(&mut self, concern: Concern) {
        if let Some(why) = self.0.remove(&concern) {
            info!("no longer so: {why}");
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn get(&self, concern: Concern) -> Option<String> {
        self.0.get(&concern).cloned()
    }

    pub(super) fn list(&self) -> Vec<String> {
        self.0.values().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_concern_has_one_problem_until_it_is_cleared() {
        let mut problems = Problems::default();
        problems.set(Concern::Store, "away".to_owned());
        problems.set(Concern::Store, "still away".to_owned());
        problems.set(Concern::Lease, "gone".to_owned());
        assert_eq!(problems.list(), ["still away", "gone"]);
        problems.clear(Concern::Store);
        assert_eq!((problems.get(Concern::Store), problems.is_empty()), (None, false));
        problems.clear(Concern::Lease);
        assert!(problems.is_empty());
    }
}
