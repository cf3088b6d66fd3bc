//! The rungs that are in use: since when, and how often they have changed.

use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use tracing::{info, warn};

use super::{Choice, Rung};

/// The rung of one direction as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ActiveRung {
    /// The rung, and why it is that one.
    pub choice: Choice,
    /// Since when it is that rung.
    pub since: SystemTime,
}

/// Changes of the rungs of both directions, those by earlier agents included. The first choice of an agent is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RungChanges {
    /// All of them: those below, and those that follow from a request, a device or an option.
    pub changes: u64,
    /// To a slower rung, because a program was refused or removed.
    pub demotions: u64,
    /// Back to a faster one, because a program is not refused any more.
    pub promotions: u64,
}

impl RungChanges {
    /// No changes.
    pub const ZERO: Self = Self { changes: 0, demotions: 0, promotions: 0 };

    /// The name of each counter, and what it means.
    pub const DESCRIPTIONS: [(&'static str, &'static str); 3] = [
        ("rung_changes", "Changes of the rung of egress or ingress, for any reason."),
        ("demotions", "Changes to a slower rung because a program was refused or removed."),
        ("promotions", "Changes back to a faster rung, because a program is not refused any more."),
    ];

    /// The counts in the order of [`Self::DESCRIPTIONS`].
    pub const fn counts(&self) -> [u64; 3] {
        [self.changes, self.demotions, self.promotions]
    }
}

/// A program that [`Request::Auto`](super::Request::Auto) goes without for a while.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Postponed {
    /// The program and its device.
    pub what: String,
    /// Why.
    pub why: String,
    /// Whether another program removed it again and again; otherwise the kernel refuses it.
    pub is_removed: bool,
    /// When it is attempted again.
    pub next_attempt: SystemTime,
}

/// Why the rungs may differ from those before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Trigger {
    /// Another request, device or option.
    Plan,
    /// Under the same plan, something was refused, or is not any more.
    Refusals,
}

/// The rungs of both directions.
#[derive(Debug)]
pub(super) struct ActiveRungs {
    pub(super) egress: ActiveRung,
    pub(super) ingress: ActiveRung,
    pub(super) changes: RungChanges,
    /// Whether they were chosen once.
    is_chosen: bool,
}

impl ActiveRungs {
    pub(super) fn new(now: SystemTime) -> Self {
        let choice = Choice { rung: Rung::Tun, why: "not started".to_owned() };
        let none = ActiveRung { choice, since: now };
        Self { egress: none.clone(), ingress: none, changes: RungChanges::ZERO, is_chosen: false }
    }

    /// Takes the present choices, counts and logs what changes.
    pub(super) fn set(&mut self, egress: Choice, ingress: Choice, trigger: Trigger, now: SystemTime) {
        let is_first = !std::mem::replace(&mut self.is_chosen, true);
        for (direction, active, choice) in
            [("egress", &mut self.egress, egress), ("ingress", &mut self.ingress, ingress)]
        {
            let before = active.choice.rung;
            if active.choice == choice {
                continue;
            }
            let Choice { rung, why } = &choice;
            if is_first || before == *rung {
                info!("{direction}: {rung}, {why}");
            } else {
                self.changes.changes += 1;
                match (trigger, *rung > before) {
                    (Trigger::Refusals, true) => {
                        self.changes.demotions += 1;
                        warn!("{direction} is demoted from {before} to {rung}: {why}");
                    }
                    (Trigger::Refusals, false) => {
                        self.changes.promotions += 1;
                        info!("{direction} is promoted from {before} to {rung}: {why}");
                    }
                    (Trigger::Plan, _) => info!("{direction} changes from {before} to {rung}: {why}"),
                }
            }
            if is_first || before != *rung {
                active.since = now;
            }
            active.choice = choice;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn changes_are_counted_by_direction_and_reason() {
        let start = SystemTime::UNIX_EPOCH;
        let mut rungs = ActiveRungs::new(start);
        let choice = |rung| Choice { rung, why: format!("{rung}") };
        let steps = [
            // Egress, ingress, trigger; changes, demotions, promotions.
            (Rung::Tc, Rung::Xdp, Trigger::Plan, [0, 0, 0]),
            (Rung::Tc, Rung::Xdp, Trigger::Refusals, [0, 0, 0]),
            (Rung::Tc, Rung::Tc, Trigger::Refusals, [1, 1, 0]),
            (Rung::Tc, Rung::Tun, Trigger::Refusals, [2, 2, 0]),
            (Rung::Tc, Rung::Xdp, Trigger::Refusals, [3, 2, 1]),
            (Rung::Tun, Rung::Tun, Trigger::Plan, [5, 2, 1]),
            (Rung::Tc, Rung::Tc, Trigger::Plan, [7, 2, 1]),
        ];
        for (second, (egress, ingress, trigger, counts)) in (1..).zip(steps) {
            let now = start + Duration::from_secs(second);
            rungs.set(choice(egress), choice(ingress), trigger, now);
            assert_eq!((rungs.egress.choice.rung, rungs.ingress.choice.rung), (egress, ingress));
            assert_eq!(rungs.changes.counts(), counts, "step {second}");
        }
        assert_eq!(rungs.egress.since, start + Duration::from_secs(7));
    }

    #[test]
    fn another_reason_for_the_same_rung_is_no_change() {
        let (start, second) = (SystemTime::UNIX_EPOCH, Duration::from_secs(1));
        let mut rungs = ActiveRungs::new(start);
        let choice = |why: &str| Choice { rung: Rung::Tc, why: why.to_owned() };
        rungs.set(choice("a"), choice("a"), Trigger::Plan, start + second);
        rungs.set(choice("b"), choice("a"), Trigger::Refusals, start + 2 * second);
        assert_eq!((rungs.egress.choice.why.as_str(), rungs.changes), ("b", RungChanges::ZERO));
        assert_eq!(rungs.egress.since, start + second);
    }
}
