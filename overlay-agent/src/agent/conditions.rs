//! Problems of a running agent: logged when they begin and when they end.

use std::collections::BTreeMap;

use tracing::{info, warn};

/// Subject of a problem; there is at most one problem of each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Condition {
    /// Reading leases.
    Store,
    /// This host's lease.
    Lease,
    /// The record that gives this host its subnet, as peers see it.
    OwnRecord,
    /// Records by which peers send packets for this host's subnet to another host.
    Diverted,
    /// Other records that overlap this host's subnet.
    Contested,
    /// The network's configuration in the store.
    Config,
    /// The device that carries outer packets.
    Underlay,
    /// The overlay device, the slow path and the programs.
    Datapath,
    /// The address under which peers know this host.
    Address,
    /// `subnet.env`.
    SubnetFile,
    /// The kernel's route map.
    Routes,
    /// Firewall rules and the blackhole route.
    Firewall,
}

/// The present problems of one part of the agent.
#[derive(Debug, Default)]
pub(super) struct Conditions(BTreeMap<Condition, String>);

impl Conditions {
    /// Logs a problem that is new or has another reason.
    pub(super) fn set(&mut self, condition: Condition, why: String) {
        if self.0.get(&condition) != Some(&why) {
            warn!("{why}");
            self.0.insert(condition, why);
        }
    }

    /// Logs the end of a problem.
    pub(super) fn clear(&mut self, condition: Condition) {
        if let Some(why) = self.0.remove(&condition) {
            info!("resolved: {why}");
        }
    }

    /// Sets or clears.
    pub(super) fn update(&mut self, condition: Condition, why: Option<String>) {
        match why {
            Some(why) => self.set(condition, why),
            None => self.clear(condition),
        }
    }

    pub(super) fn get(&self, condition: Condition) -> Option<String> {
        self.0.get(&condition).cloned()
    }

    /// The problems with their subjects.
    pub(super) fn iter(&self) -> impl Iterator<Item = (Condition, &str)> {
        self.0.iter().map(|(condition, why)| (*condition, why.as_str()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_condition_has_one_reason_until_it_is_cleared() {
        let mut conditions = Conditions::default();
        conditions.set(Condition::Store, "away".to_owned());
        conditions.set(Condition::Store, "still away".to_owned());
        conditions.update(Condition::Lease, Some("gone".to_owned()));
        let list: Vec<_> = conditions.iter().collect();
        assert_eq!(list, [(Condition::Store, "still away"), (Condition::Lease, "gone")]);
        conditions.clear(Condition::Store);
        conditions.update(Condition::Lease, None);
        assert_eq!((conditions.get(Condition::Store), conditions.iter().count()), (None, 0));
    }
}
