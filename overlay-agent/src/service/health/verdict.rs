//! Whether an endpoint is up, by the checks of its node. Pure.

use std::collections::BTreeMap;

use crate::service::{
    EndpointName,
    record::{EndpointState, HealthCheck},
};

/// What the checks of this node say about one of its endpoints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Whether it is up.
    pub is_up: bool,
    /// The failure that took it down.
    pub why: Option<String>,
}

/// The endpoints that this node checks.
pub type Verdicts = BTreeMap<EndpointName, Verdict>;

impl Verdict {
    /// The state of an endpoint with this record. An operator's wish to drain it stays.
    pub fn state(&self, recorded: EndpointState) -> EndpointState {
        match (recorded, self.is_up) {
            (EndpointState::Draining, _) => EndpointState::Draining,
            (EndpointState::Ready | EndpointState::Down, true) => EndpointState::Ready,
            (EndpointState::Ready | EndpointState::Down, false) => EndpointState::Down,
        }
    }
}

/// Checks in a row: a few of one kind change the verdict, single ones do not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Streak {
    is_up: bool,
    /// Checks in a row that contradict `is_up`.
    against: u32,
}

impl Streak {
    pub(super) fn new(is_up: bool) -> Self {
        Self { is_up, against: 0 }
    }

    pub(super) fn is_up(&self) -> bool {
        self.is_up
    }

    /// Takes the result of a check. Returns whether the verdict changed.
    pub(super) fn observe(&mut self, passed: bool, check: &HealthCheck) -> bool {
        if passed == self.is_up {
            self.against = 0;
            return false;
        }
        self.against += 1;
        let needed = if self.is_up { check.fall } else { check.rise };
        let changed = self.against >= needed;
        if changed {
            *self = Self::new(passed);
        }
        changed
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn check(fall: u32, rise: u32) -> HealthCheck {
        serde_json::from_str(&format!(r#"{{"kind":"tcp","fall":{fall},"rise":{rise}}}"#)).unwrap()
    }

    #[test]
    fn only_checks_in_a_row_change_the_verdict() {
        let check = check(3, 2);
        let mut streak = Streak::new(true);
        let mut changes = Vec::new();
        for passed in [false, false, true, false, false, false, true, false, true, true, false] {
            changes.push((streak.observe(passed, &check), streak.is_up()));
        }
        let states: Vec<bool> = changes.iter().map(|(_, is_up)| *is_up).collect();
        assert_eq!(states, [true, true, true, true, true, false, false, false, false, true, true]);
        let changed: Vec<usize> = (0..changes.len()).filter(|at| changes[*at].0).collect();
        assert_eq!(changed, [5, 9]);
    }

    #[test]
    fn a_draining_endpoint_stays_so() {
        for is_up in [true, false] {
            let verdict = Verdict { is_up, why: None };
            assert_eq!(verdict.state(EndpointState::Draining), EndpointState::Draining);
            let expected = if is_up { EndpointState::Ready } else { EndpointState::Down };
            assert_eq!(
                [EndpointState::Ready, EndpointState::Down].map(|state| verdict.state(state)),
                [expected; 2]
            );
        }
    }

    proptest! {
        /// Against a definition that looks at the whole history: the last checks that are needed for a change are all of one kind.
        #[test]
        fn the_verdict_is_that_of_the_history(
            results in prop::collection::vec(any::<bool>(), 0..60), fall in 1u32..5, rise in 1u32..5, first: bool
        ) {
            let check = check(fall, rise);
            let (mut streak, mut is_up, mut since) = (Streak::new(first), first, 0);
            for end in 1..=results.len() {
                let needed = if is_up { fall } else { rise } as usize;
                let last = &results[since.max(end.saturating_sub(needed))..end];
                let changes = last.len() == needed && last.iter().all(|passed| *passed != is_up);
                if changes {
                    (is_up, since) = (!is_up, end);
                }
                prop_assert_eq!(streak.observe(results[end - 1], &check), changes);
                prop_assert_eq!(streak.is_up(), is_up);
            }
        }
    }
}
