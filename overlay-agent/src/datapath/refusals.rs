//! What [`Request::Auto`] goes without for a while: programs that the kernel refuses, and programs that others remove again and again.
//! Each is attempted again after a pause, which grows with the failures in a row. Pure: times are passed in.
//!
//! [`Request::Auto`]: super::Request::Auto

use std::time::{Duration, Instant};

use super::ebpf::Target;

/// Removals by others within [`Pauses::window`] that are repaired; one more ends the repairs for a while.
const REPAIRED: usize = 2;

/// How long to wait before the next attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pauses {
    /// After the first failure. Each further one doubles it.
    first: Duration,
    /// The longest pause. What works for as long is as if it had never failed.
    longest: Duration,
    /// The time in which removals count together.
    window: Duration,
}

impl Pauses {
    /// Pauses from `first` to 20 times as long.
    pub const fn from_first(first: Duration) -> Self {
        Self { first, longest: first.saturating_mul(20), window: first.saturating_mul(2) }
    }

    fn after(&self, failures: u32) -> Duration {
        let doublings = failures.saturating_sub(1).min(16);
        self.first.saturating_mul(2_u32.saturating_pow(doublings)).min(self.longest)
    }
}

/// From 30 s to 10 min.
impl Default for Pauses {
    fn default() -> Self {
        Self::from_first(Duration::from_secs(30))
    }
}

/// What can be refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Subject {
    /// All programs.
    Programs,
    /// One program on one device.
    Target(Target),
}

/// Who stands in the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cause {
    /// The kernel, or a self-test.
    Kernel,
    /// Another program of this host.
    Removal,
}

/// One subject that is left out.
#[derive(Debug)]
pub(super) struct Refusal<'a> {
    pub(super) subject: Subject,
    pub(super) cause: Cause,
    pub(super) why: &'a str,
    /// When it is attempted again.
    pub(super) until: Instant,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// It works, but for removals that were repaired.
    Repaired,
    /// It is left out.
    Refused { until: Instant },
    /// It was left out, and is attempted or works since.
    Trial { since: Instant },
}

#[derive(Debug)]
struct Entry {
    subject: Subject,
    state: State,
    cause: Cause,
    why: String,
    /// Failures since it worked for long.
    failures: u32,
    /// The last removals.
    removals: Vec<Instant>,
}

/// What is left out, and what was before.
#[derive(Debug, Default)]
pub(super) struct Refusals {
    pauses: Pauses,
    entries: Vec<Entry>,
}

impl Refusals {
    pub(super) fn new(pauses: Pauses) -> Self {
        Self { pauses, entries: Vec::new() }
    }

    /// Leaves out nothing, with no memory of failures.
    pub(super) fn clear(&mut self) {
        self.entries.clear();
    }

    /// Why there are no programs at all.
    pub(super) fn of_programs(&self) -> Option<&str> {
        self.why(Subject::Programs)
    }

    /// Why this program is left out.
    pub(super) fn of(&self, target: Target) -> Option<&str> {
        self.why(Subject::Target(target))
    }

    fn why(&self, subject: Subject) -> Option<&str> {
        self.iter().find(|refusal| refusal.subject == subject).map(|refusal| refusal.why)
    }

    /// What is left out.
    pub(super) fn iter(&self) -> impl Iterator<Item = Refusal<'_>> {
        self.entries.iter().filter_map(|entry| match entry.state {
            State::Refused { until } => {
                Some(Refusal { subject: entry.subject, cause: entry.cause, why: &entry.why, until })
            }
            State::Repaired | State::Trial { .. } => None,
        })
    }

    /// The time of the next attempt.
    pub(super) fn next_attempt(&self) -> Option<Instant> {
        self.iter().map(|refusal| refusal.until).min()
    }

    /// Lets through what has waited for long enough, and forgets failures that are long ago. To be called before each attempt.
    pub(super) fn advance(&mut self, now: Instant) {
        let Pauses { longest, window, .. } = self.pauses;
        for entry in &mut self.entries {
            entry.removals.retain(|removal| now.duration_since(*removal) <= window);
            if let State::Refused { until } = entry.state
                && until <= now
            {
                entry.state = State::Trial { since: now };
            }
        }
        self.entries.retain(|entry| match entry.state {
            State::Refused { .. } => true,
            State::Trial { since } => now.duration_since(since) < longest,
            State::Repaired => !entry.removals.is_empty(),
        });
    }

    /// The kernel refused it, or a self-test failed. Returns whether it is for another reason than last time.
    pub(super) fn refuse(&mut self, subject: Subject, why: String, now: Instant) -> bool {
        let pauses = self.pauses;
        let entry = self.entry(subject, now);
        let is_new = entry.why != why;
        (entry.cause, entry.why) = (Cause::Kernel, why);
        entry.fail(pauses, now);
        is_new
    }

    /// Another program removed it. Returns whether it is left out from now on.
    pub(super) fn removed(&mut self, target: Target, now: Instant) -> bool {
        let pauses = self.pauses;
        let entry = self.entry(Subject::Target(target), now);
        entry.removals.retain(|removal| now.duration_since(*removal) <= pauses.window);
        entry.removals.push(now);
        let count = entry.removals.len();
        let is_trial = matches!(entry.state, State::Trial { .. });
        if count <= REPAIRED && !is_trial {
            return false;
        }
        entry.cause = Cause::Removal;
        entry.why = match is_trial {
            true => "another program removed it again".to_owned(),
            false => format!("another program removed it {count} times within {:?}", pauses.window),
        };
        entry.removals.clear();
        entry.fail(pauses, now);
        true
    }

    fn entry(&mut self, subject: Subject, now: Instant) -> &mut Entry {
        self.advance(now);
        let new = || Entry {
            subject,
            state: State::Repaired,
            cause: Cause::Kernel,
            why: String::new(),
            failures: 0,
            removals: Vec::new(),
        };
        let position = self.entries.iter().position(|entry| entry.subject == subject);
        let entry = position.map_or_else(new, |position| self.entries.swap_remove(position));
        self.entries.push_mut(entry)
    }
}

impl Entry {
    fn fail(&mut self, pauses: Pauses, now: Instant) {
        self.failures = self.failures.saturating_add(1);
        self.state = State::Refused { until: now + pauses.after(self.failures) };
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::ebpf::{
            TcMode,
            overlay_set::{INGRESS, XDP},
        },
        *,
    };

    const SECOND: Duration = Duration::from_secs(1);
    const TC: Target = Target { hook: INGRESS, ifindex: 1, mode: TcMode::Tcx };
    const NATIVE: Target = Target { hook: XDP, ifindex: 1, mode: TcMode::Tcx };

    /// Seconds from `now` until the next attempt.
    fn pause(refusals: &Refusals, now: Instant) -> Option<u64> {
        refusals.next_attempt().map(|at| at.duration_since(now).as_secs())
    }

    #[test]
    fn a_removal_now_and_then_is_repaired_and_a_third_at_once_is_not() {
        let (mut refusals, start) = (Refusals::default(), Instant::now());
        // One every 31 s for an hour: two within each 60 s.
        for round in 0..116 {
            assert!(!refusals.removed(TC, start + round * 31 * SECOND), "{round}");
        }
        let now = start + 4000 * SECOND;
        assert!(!refusals.removed(TC, now) && !refusals.removed(TC, now + SECOND));
        assert!(refusals.of(TC).is_none());
        // Of another program, for itself.
        assert!(!refusals.removed(NATIVE, now + SECOND));
        assert!(refusals.removed(TC, now + 60 * SECOND));
        assert_eq!(refusals.of(TC), Some("another program removed it 3 times within 60s"));
        assert!(refusals.of(NATIVE).is_none() && refusals.of_programs().is_none());
        assert_eq!(pause(&refusals, now + 60 * SECOND), Some(30));
    }

    #[test]
    fn pauses_double_up_to_the_longest_until_it_works_for_long() {
        let (mut refusals, mut now) = (Refusals::default(), Instant::now());
        for _ in 0..3 {
            refusals.removed(TC, now);
        }
        for expected in [30, 60, 120, 240, 480, 600, 600] {
            assert_eq!(pause(&refusals, now), Some(expected));
            refusals.advance(now + (expected - 1) as u32 * SECOND);
            assert!(refusals.of(TC).is_some(), "not before its time");
            now += expected as u32 * SECOND;
            refusals.advance(now);
            assert_eq!((refusals.of(TC), refusals.next_attempt()), (None, None), "it is attempted");
            // On trial, one removal is enough.
            now += 599 * SECOND;
            assert!(refusals.removed(TC, now));
        }
        now += 600 * SECOND;
        refusals.advance(now);
        now += 600 * SECOND;
        refusals.advance(now);
        assert!(!refusals.removed(TC, now) && !refusals.removed(TC, now), "as if it had never failed");
        assert!(refusals.removed(TC, now));
        assert_eq!(pause(&refusals, now), Some(30));
    }

    #[test]
    fn what_the_kernel_refuses_is_attempted_again() {
        let (mut refusals, start) = (Refusals::default(), Instant::now());
        assert!(refusals.refuse(Subject::Programs, "no memory".to_owned(), start));
        assert!(refusals.refuse(Subject::Target(NATIVE), "no driver".to_owned(), start + 10 * SECOND));
        assert_eq!((refusals.of_programs(), refusals.of(NATIVE)), (Some("no memory"), Some("no driver")));
        assert_eq!(pause(&refusals, start), Some(30), "the earliest counts");
        let now = start + 30 * SECOND;
        refusals.advance(now);
        assert_eq!((refusals.of_programs(), refusals.of(NATIVE)), (None, Some("no driver")));
        assert!(!refusals.refuse(Subject::Programs, "no memory".to_owned(), now), "that is known");
        assert_eq!(pause(&refusals, now), Some(10));
        refusals.advance(now + 10 * SECOND);
        assert_eq!(pause(&refusals, now + 10 * SECOND), Some(50));
        refusals.clear();
        assert_eq!((refusals.iter().count(), refusals.next_attempt()), (0, None));
    }

    #[test]
    fn shorter_pauses_keep_their_proportions() {
        let pauses = Pauses::from_first(SECOND);
        let seconds: Vec<_> = (0..8).map(|failures| pauses.after(failures).as_secs()).collect();
        assert_eq!(seconds, [1, 1, 2, 4, 8, 16, 20, 20]);
        assert_eq!(Pauses::from_first(Duration::MAX).after(u32::MAX), Duration::MAX);
    }

    /// Whatever happens in whatever order: a refusal ends, and never later than the longest pause from its last failure.
    #[test]
    fn no_sequence_of_events_refuses_for_ever() {
        let (mut refusals, mut now, mut seed) = (Refusals::default(), Instant::now(), 1_u64);
        for _ in 0..20_000 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            now += Duration::from_millis(seed >> 49);
            match seed >> 40 & 7 {
                0 => drop(refusals.refuse(Subject::Programs, "no".to_owned(), now)),
                1 => drop(refusals.refuse(Subject::Target(NATIVE), "no".to_owned(), now)),
                2..5 => drop(refusals.removed(TC, now)),
                _ => refusals.advance(now),
            }
            assert!(refusals.entries.len() <= 3);
            assert!(refusals.next_attempt().is_none_or(|at| at <= now + refusals.pauses.longest));
        }
        refusals.advance(now + refusals.pauses.longest);
        assert_eq!(refusals.iter().count(), 0);
    }
}
