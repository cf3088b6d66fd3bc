//! Problems of a running agent: logged when they begin and when they end.

use std::collections::BTreeMap;

use tokio::time::Instant;
use tracing::{info, warn};

use super::log_window::LogWindow;

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
    /// The name of that device.
    UnderlayName,
    /// Routes and rules that keep packets for peers away from the overlay device.
    Diversion,
    /// The kernel's switches for forwarding.
    Forwarding,
    /// The overlay device, the slow path and the programs.
    Datapath,
    /// Programs that should have been replaced.
    Programs,
    /// The capabilities that the eBPF rungs need.
    Capabilities,
    /// Programs that are left out because others remove them again and again.
    Demotion,
    /// The address under which peers know this host.
    Address,
    /// `subnet.env`.
    SubnetFile,
    /// The kernel's route map.
    Routes,
    /// The kernel's routes to peers.
    Paths,
    /// Devices that carry outer packets, but the first.
    OtherUnderlays,
    /// Containers whose packets take the host's stack although they should bypass it.
    Bypass,
    /// Firewall rules and the blackhole route.
    Firewall,
    /// Services on this node.
    Services,
    /// The snapshot on disk.
    Snapshot,
    /// The record of this run.
    Record,
    /// Rules that keep containers from sending what peers take for packets of this host.
    Guard,
}

/// Most lines about one subject in a window: a record that flaps must not fill the log.
const LINES: usize = 10;

/// The present problems of one part of the agent.
#[derive(Debug, Default)]
pub(super) struct Conditions {
    present: BTreeMap<Condition, String>,
    windows: BTreeMap<Condition, LogWindow>,
}

impl Conditions {
    /// Logs a problem that is new or has another reason.
    pub(super) fn set(&mut self, condition: Condition, why: String) {
        if self.present.get(&condition) != Some(&why) {
            if let Some(note) = self.may_log(condition, Instant::now()) {
                warn!("{why}{note}");
            }
            self.present.insert(condition, why);
        }
    }

    /// Logs the end of a problem.
    pub(super) fn clear(&mut self, condition: Condition) {
        if let Some(why) = self.present.remove(&condition)
            && let Some(note) = self.may_log(condition, Instant::now())
        {
            info!("resolved: {why}{note}");
        }
    }

    /// Whether there may be a line about a subject, and what to add to the last one for a while.
    fn may_log(&mut self, condition: Condition, now: Instant) -> Option<&'static str> {
        let window = self.windows.entry(condition).or_default();
        window.renew(now);
        window.take_line(LINES).then(|| match window.has_room(LINES) {
            true => "",
            false => " (it changes often: `overlay-agent status` shows the present state)",
        })
    }

    /// Sets or clears.
    pub(super) fn update(&mut self, condition: Condition, why: Option<String>) {
        match why {
            Some(why) => self.set(condition, why),
            None => self.clear(condition),
        }
    }

    pub(super) fn get(&self, condition: Condition) -> Option<String> {
        self.present.get(&condition).cloned()
    }

    /// The problems with their subjects.
    pub(super) fn iter(&self) -> impl Iterator<Item = (Condition, &str)> {
        self.present.iter().map(|(condition, why)| (*condition, why.as_str()))
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

    #[test]
    fn a_problem_that_comes_and_goes_takes_few_lines() {
        let (mut conditions, start) = (Conditions::default(), Instant::now());
        let mut lines = |count: usize, at| {
            (0..count).filter_map(|_| conditions.may_log(Condition::Contested, at)).collect::<Vec<_>>()
        };
        let first = lines(1000, start);
        assert!(
            first.len() == LINES && first[0].is_empty() && first[LINES - 1].contains("status"),
            "{first:?}"
        );
        assert_eq!(lines(1000, start + LogWindow::LENGTH / 2).len(), 0);
        assert_eq!(lines(1000, start + LogWindow::LENGTH).len(), LINES);
        assert!(conditions.may_log(Condition::Store, start).is_some(), "subjects are independent");
    }
}
