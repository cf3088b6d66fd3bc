//! Decides how to keep a lease: renew it in time, acquire it again when it is lost, never take it from another host.
//!
//! A state machine without a store and without a clock: [`Keeper::next`] takes an observation and the time, and returns the
//! next action. Every doubt (an error, a broken watch, an ended lifetime, a process that was suspended for a day) leads back
//! to reading what the store holds.

use std::{mem, net::Ipv4Addr, time::Duration};

use backon::ExponentialBackoff;
use tokio::time::Instant;
use tracing::{info, warn};

use super::{Claim, Held, LeaseEvent, Times};
use crate::{
    lease::{LeaseRecord, LeaseValue},
    store::{
        StoreError,
        backoff::{STEADY, backoff},
        record::{Lifetime, LifetimeId, Version},
    },
};

/// Pause in which the store completes what it has begun, such as removing the records of an ended lifetime.
const SETTLE: Duration = Duration::from_millis(200);
/// An overwritten record is restored at most this often.
const RESTORE_INTERVAL: Duration = Duration::from_secs(1);
/// That another program wrote our record is logged at most this often.
const ADOPTION_LOG_INTERVAL: Duration = Duration::from_secs(60);

/// A step for the driver, which leads to one observation.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Action {
    /// Read our record and our claim: [`Observation::Read`].
    Read,
    /// Claim an address, at once or after the claim of an agent that is gone has ended: [`Observation::Claimed`].
    Claim { address: Ipv4Addr, wait: bool },
    /// Renew the lifetime of our record: [`Observation::Renewed`].
    Renew(LifetimeId),
    /// Renew the lifetime of our claim: [`Observation::ClaimRenewed`].
    RenewClaim(LifetimeId),
    /// Acquire our subnet again, or another one where it is not free: [`Observation::Taken`].
    TakeSubnet,
    /// Write our record over this one: [`Observation::Taken`], or [`Observation::Changed`] when it changed meanwhile.
    Restore(Version),
    /// Write our record under another address: [`Observation::RecordMoved`].
    MoveRecord(Claim),
    /// Wait until a time, or for a change after a revision: [`Observation::Due`] or [`Observation::Changed`].
    Wait { until: Option<Instant>, changed_after: Option<i64> },
}

/// The outcome of an action.
#[derive(Debug)]
pub(super) enum Observation {
    Read {
        revision: i64,
        record: Option<LeaseRecord>,
        claim: Option<LifetimeId>,
    },
    Claimed(Claim),
    /// The new duration; `None` when the lifetime has ended.
    Renewed(Option<Duration>),
    /// `false` when the lifetime has ended.
    ClaimRenewed(bool),
    Taken(Box<Held>),
    /// `false` when the record is not ours any more.
    RecordMoved(bool),
    Due,
    Changed,
    /// This host has another address. May come instead of the outcome of [`Action::Wait`].
    AddressChanged(Ipv4Addr),
    Failed(StoreError),
}

/// The purpose of the outstanding action, where the action alone does not tell it.
#[derive(Clone, Copy, Debug, Default)]
enum Step {
    #[default]
    Other,
    Renewing {
        asked: Instant,
    },
    /// Claiming the new address of this host.
    Following {
        may_be_lost: bool,
    },
    MovingRecord {
        claim: Claim,
        may_be_lost: bool,
    },
    /// Claiming the new address, which the record carries already.
    Arriving,
}

pub(super) struct Keeper {
    pub(super) held: Held,
    times: Times,
    has_lifetimes: bool,
    /// The address that the record should carry.
    address: Ipv4Addr,
    /// The address that was reported last.
    reported_address: Ipv4Addr,
    /// Why the store does not hold our record, while that is so.
    lost: Option<String>,
    /// The last event about a problem.
    problem: Option<LeaseEvent>,
    /// The last error, while the lease is unconfirmed.
    failure: Option<StoreError>,
    /// When the lease ends without another renewal, counted from before the last renewal was requested.
    expires: Option<Instant>,
    renew_at: Instant,
    claim_at: Instant,
    /// Whether this run has claimed no address yet: the lease is of an earlier run.
    is_unclaimed: bool,
    restore_at: Instant,
    adoption_log_at: Instant,
    pauses: ExponentialBackoff,
    /// Revision of the last read, and since when changes after it are watched.
    revision: i64,
    watching_since: Option<Instant>,
    step: Step,
    /// Events for the driver to send, in order.
    pub(super) events: Vec<LeaseEvent>,
    /// Lifetimes for the driver to revoke before the next action.
    pub(super) revoked: Vec<LifetimeId>,
}

impl Keeper {
    pub(super) fn new(held: Held, times: Times, has_lifetimes: bool, now: Instant) -> Self {
        Self {
            expires: held.lifetime.map(|_| now + times.lease_ttl),
            address: held.public_ip(),
            reported_address: held.public_ip(),
            held,
            times,
            has_lifetimes,
            lost: None,
            problem: None,
            failure: None,
            renew_at: now,
            claim_at: now,
            is_unclaimed: false,
            restore_at: now,
            adoption_log_at: now,
            pauses: backoff(),
            revision: 0,
            watching_since: None,
            step: Step::Other,
            events: Vec::new(),
            revoked: Vec::new(),
        }
    }

    /// A keeper of a lease of an earlier run, in a store with lifetimes: the first claim is still to be made. `ends` is when the
    /// lease ends without a renewal; `None` for a reservation.
    pub(super) fn recalled(held: Held, times: Times, ends: Option<Instant>, now: Instant) -> Self {
        Self { expires: ends, is_unclaimed: true, ..Self::new(held, times, true, now) }
    }

    /// When the lease ends without another renewal; `None` for a reservation.
    pub(super) fn expires(&self) -> Option<Instant> {
        self.expires
    }

    /// The next action after `observation`, at the time `now`. The first one is [`Action::Read`].
    pub(super) fn next(&mut self, observation: Observation, now: Instant) -> Action {
        let step = mem::take(&mut self.step);
        if self.watching_since.is_some_and(|since| now.duration_since(since) >= STEADY) {
            self.pauses = backoff();
        }
        match observation {
            Observation::Read { revision, record, claim } => {
                self.revision = revision;
                self.on_read(record, claim, now)
            }
            Observation::Claimed(claim) => self.on_claimed(claim, step, now),
            Observation::Renewed(ttl) => self.on_renewed(ttl, step, now),
            Observation::ClaimRenewed(lives) => self.on_claim_renewed(lives, step, now),
            Observation::Taken(held) => self.on_taken(*held),
            Observation::RecordMoved(moved) => self.on_record_moved(moved, step, now),
            Observation::Due => self.on_due(now),
            Observation::Changed => self.read(),
            Observation::AddressChanged(address) => {
                self.address = address;
                self.read()
            }
            Observation::Failed(error) => self.on_failure(error, step, now),
        }
    }

    fn read(&mut self) -> Action {
        self.watching_since = None;
        Action::Read
    }

    /// Waits without watching, then reads.
    fn pause(&mut self, time: Duration, now: Instant) -> Action {
        self.watching_since = None;
        Action::Wait { until: Some(now + time), changed_after: None }
    }

    /// Waits for a change of our keys or for the next renewal.
    fn watch(&mut self, now: Instant) -> Action {
        self.watching_since.get_or_insert(now);
        let claim_at = self.held.claim.lifetime.map(|_| self.claim_at);
        let renew_at = self.held.lifetime.filter(|_| self.lost.is_none()).map(|_| self.renew_at);
        let until = claim_at.into_iter().chain(renew_at).min();
        Action::Wait { until, changed_after: Some(self.revision) }
    }

    fn on_due(&mut self, now: Instant) -> Action {
        if self.watching_since.is_none() {
            return self.read();
        }
        match (self.held.claim.lifetime, self.held.lifetime) {
            (Some(claim), _) if now >= self.claim_at => self.renew_claim(claim, now),
            (_, Some(lifetime)) if now >= self.renew_at && self.lost.is_none() => {
                self.renew_lease(lifetime, now)
            }
            _ => self.watch(now),
        }
    }

    fn renew_claim(&mut self, claim: LifetimeId, now: Instant) -> Action {
        self.step = Step::Renewing { asked: now };
        Action::RenewClaim(claim)
    }

    fn renew_lease(&mut self, lifetime: LifetimeId, now: Instant) -> Action {
        self.step = Step::Renewing { asked: now };
        Action::Renew(lifetime)
    }

    fn on_claim_renewed(&mut self, lives: bool, step: Step, now: Instant) -> Action {
        match (step, lives) {
            (Step::Renewing { asked }, true) => {
                self.claim_at = asked + self.times.claim_ttl / 3;
                if self.watching_since.is_some() { self.watch(now) } else { self.read() }
            }
            _ => self.ended(now),
        }
    }

    fn on_renewed(&mut self, ttl: Option<Duration>, step: Step, now: Instant) -> Action {
        match (step, ttl) {
            (Step::Renewing { asked }, Some(ttl)) => {
                self.expires = Some(asked + ttl);
                self.renew_at = asked + self.times.renew_after(ttl);
                self.confirmed(Some(ttl), now)
            }
            _ => self.ended(now),
        }
    }

    /// A lifetime has ended, and the store is about to remove its records.
    fn ended(&mut self, now: Instant) -> Action {
        self.pause(SETTLE, now)
    }

    fn on_read(&mut self, record: Option<LeaseRecord>, claim: Option<LifetimeId>, now: Instant) -> Action {
        let public_ip = self.held.public_ip();
        if self.is_unclaimed {
            // The claim of the earlier run may live on for a while: after a reboot, this host is another instance.
            return Action::Claim { address: public_ip, wait: true };
        }
        if self.held.claim.lifetime.is_some() && claim != self.held.claim.lifetime {
            // First: without the claim, no write would pass.
            return Action::Claim { address: public_ip, wait: false };
        }
        // The steps below may fail for a long time in which no wait ends with the renewal.
        if let Some(claim) = claim.filter(|_| now >= self.claim_at) {
            return self.renew_claim(claim, now);
        }
        let Some(record) = record else {
            self.lost = Some("its record was removed, or its time ran out".to_owned());
            return Action::TakeSubnet;
        };
        let lifetime = record.version.lifetime.id();
        let same_lifetime = lifetime.is_some() && lifetime == self.held.lifetime;
        let same_record = record.version.created.is_some() && record.version.created == self.held.created_at;
        let is_still_ours = same_lifetime || same_record;
        match &record.value {
            Err(error) if is_still_ours => {
                let why = format!("its record was overwritten and cannot be read: {error}");
                self.restore(record.version, why, now)
            }
            Err(error) => {
                let Held { subnet, key, .. } = &self.held;
                let why = format!(
                    "the record of our subnet {subnet} cannot be read, so its owner is unknown ({error}): remove the \
                     record {key}, and this host writes its own"
                );
                self.report_lost(why);
                self.settled(now)
            }
            // Peers skip such a record, whatever holds it.
            Ok(LeaseValue { public_ip: holder, backend_type: Some(backend), .. }) if *holder == public_ip => {
                let why = format!("its record was overwritten with one of the \"{backend}\" backend");
                self.restore(record.version, why, now)
            }
            Ok(value) if value.public_ip == public_ip => {
                if lifetime != self.held.lifetime {
                    self.adopt(&record, now);
                }
                self.lost = None;
                self.held.created_at = record.version.created;
                match lifetime {
                    Some(lifetime) => self.renew_lease(lifetime, now),
                    None => self.confirmed(None, now),
                }
            }
            // The answer to the write was lost. In a store without claims, an address of ours is ours.
            Ok(value) if value.public_ip == self.address && (is_still_ours || !self.has_lifetimes) => {
                self.step = Step::Arriving;
                Action::Claim { address: self.address, wait: true }
            }
            Ok(value) => {
                if same_lifetime {
                    // It belongs to their record now: to revoke it would remove what they wrote.
                    self.held.lifetime = None;
                }
                self.move_away(format!("its record is that of {} now", value.public_ip), now)
            }
        }
    }

    /// Writes our record over this one.
    fn restore(&mut self, version: Version, why: String, now: Instant) -> Action {
        self.lost = Some(why);
        if now < self.restore_at {
            return self.pause(self.restore_at - now, now);
        }
        self.restore_at = now + RESTORE_INTERVAL;
        Action::Restore(version)
    }

    fn confirmed(&mut self, expires_in: Option<Duration>, now: Instant) -> Action {
        // Nothing is reported while there is more to repair: the record has yet to follow this host's address.
        if !self.is_moving() && self.lost.is_none() {
            (self.problem, self.failure) = (None, None);
            let public_ip = self.held.public_ip();
            if mem::replace(&mut self.reported_address, public_ip) != public_ip {
                self.events.push(LeaseEvent::Readdressed { public_ip });
            }
            self.events.push(LeaseEvent::Confirmed { expires_in });
        }
        self.settled(now)
    }

    /// The record is as it should be, but perhaps under an old address.
    fn settled(&mut self, now: Instant) -> Action {
        if self.is_moving() && self.watching_since.is_none() { self.follow(false) } else { self.watch(now) }
    }

    fn is_moving(&self) -> bool {
        self.address != self.held.public_ip()
    }

    /// Another lifetime holds our record, and the one that we had holds nothing: an operator made it a reservation, or a
    /// flanneld wrote it.
    fn adopt(&mut self, record: &LeaseRecord, now: Instant) {
        let (subnet, what) = (
            self.held.subnet,
            match record.version.lifetime {
                Lifetime::Limited(_) => "was written by another program with our address",
                Lifetime::Unlimited | Lifetime::Untracked => {
                    self.expires = None;
                    "is a reservation now and no longer expires"
                }
            },
        );
        // Another program may write it again and again.
        if now >= self.adoption_log_at {
            self.adoption_log_at = now + ADOPTION_LOG_INTERVAL;
            warn!("the lease on {subnet} {what}");
        }
        self.revoked.extend(mem::replace(&mut self.held.lifetime, record.version.lifetime.id()));
    }

    /// Takes another subnet, because another host holds ours. A store without claims cannot tell which of the two is alive:
    /// there the operator decides.
    fn move_away(&mut self, why: String, now: Instant) -> Action {
        if self.has_lifetimes {
            self.lost = Some(why);
            return Action::TakeSubnet;
        }
        let why = format!(
            "another host holds our subnet {}: {why}; stop one of the two, remove the record and start again",
            self.held.subnet
        );
        self.report_lost(why);
        self.watch(now)
    }

    fn on_taken(&mut self, held: Held) -> Action {
        let old = mem::replace(&mut self.held, held);
        self.revoked.extend(old.lifetime.filter(|lifetime| Some(*lifetime) != self.held.lifetime));
        let (from, to) = (old.subnet, self.held.subnet);
        let why = self.lost.take().unwrap_or_default();
        self.problem = None;
        self.events.push(match from == to {
            true => LeaseEvent::Reacquired { subnet: to, why },
            false => LeaseEvent::Moved { from, to, why },
        });
        self.read()
    }

    /// This host has another address: its claim and its record follow. Where the record is not ours any more
    /// (`may_be_lost`), another subnet is taken under the new address.
    fn follow(&mut self, may_be_lost: bool) -> Action {
        self.step = Step::Following { may_be_lost };
        Action::Claim { address: self.address, wait: true }
    }

    fn on_claimed(&mut self, claim: Claim, step: Step, now: Instant) -> Action {
        if let Step::Following { may_be_lost } = step {
            self.step = Step::MovingRecord { claim, may_be_lost };
            return Action::MoveRecord(claim);
        }
        if matches!(step, Step::Arriving) {
            self.arrive(claim, now);
        } else {
            (self.held.claim, self.is_unclaimed) = (claim, false);
        }
        self.read()
    }

    fn on_record_moved(&mut self, moved: bool, step: Step, now: Instant) -> Action {
        let Step::MovingRecord { claim, may_be_lost } = step else { return self.read() };
        let (from, to) = (self.held.public_ip(), claim.public_ip);
        match (moved, may_be_lost) {
            (true, _) => {
                info!("the lease on {} is under {to} now, no longer under {from}", self.held.subnet);
                self.arrive(claim, now);
                self.read()
            }
            (false, true) => {
                self.arrive(claim, now);
                let why = self.lost.clone().unwrap_or_else(|| {
                    // The record is attached to it, and belongs to the host that has our old address now.
                    self.held.lifetime = None;
                    format!("another host has {from} now, which was our address")
                });
                self.move_away(why, now)
            }
            // Its owner is unknown, or it was written just now: the next read shows which.
            (false, false) => {
                self.revoked.extend(claim.lifetime);
                if self.lost.is_some() { self.watch(now) } else { self.pause(SETTLE, now) }
            }
        }
    }

    fn arrive(&mut self, claim: Claim, now: Instant) {
        self.revoked.extend(mem::replace(&mut self.held.claim, claim).lifetime);
        (self.claim_at, self.is_unclaimed) = (now, false);
    }

    fn on_failure(&mut self, error: StoreError, step: Step, now: Instant) -> Action {
        if let Step::MovingRecord { claim, .. } = step {
            self.revoked.extend(claim.lifetime);
        }
        let following = matches!(step, Step::Following { .. } | Step::MovingRecord { .. } | Step::Arriving);
        // What fails under the old address may succeed under the new one.
        if self.is_moving() && !error.is_transient() && !following {
            return self.follow(true);
        }
        if matches!(error, StoreError::SamePublicIp { .. }) {
            self.report(LeaseEvent::Superseded { why: error.to_string() });
            // The other agent may end; asking costs one request.
            return self.pause(self.times.claim_ttl / 3, now);
        }
        self.report_failure(error, now);
        let pause = self.pauses.next().unwrap_or(STEADY);
        self.pause(pause, now)
    }

    /// Without a record the lease is lost, with one it is in doubt.
    fn report_failure(&mut self, error: StoreError, now: Instant) {
        if let Some(lost) = &self.lost {
            let names_the_holder = matches!(error, StoreError::Conflict(_));
            let why = if names_the_holder { error.to_string() } else { format!("{lost}: {error}") };
            self.report(LeaseEvent::Lost { why });
        } else if !matches!(self.problem, Some(LeaseEvent::Superseded { .. })) {
            // Another kind of error calls for another remedy.
            if self.failure.as_ref().is_some_and(|before| !before.is_like(&error)) {
                self.problem = None;
            }
            let expires_in = self.expires.map(|expires| expires.saturating_duration_since(now));
            self.report(LeaseEvent::Unconfirmed { why: error.to_string(), expires_in });
            self.failure = Some(error);
        }
    }

    fn report_lost(&mut self, why: String) {
        self.lost = Some(why.clone());
        self.report(LeaseEvent::Lost { why });
    }

    /// Reports a problem once, and a lost lease again when the reason changes.
    fn report(&mut self, problem: LeaseEvent) {
        let known = match (&self.problem, &problem) {
            (Some(known @ LeaseEvent::Lost { .. }), LeaseEvent::Lost { .. }) => *known == problem,
            (Some(known), _) => mem::discriminant(known) == mem::discriminant(&problem),
            (None, _) => false,
        };
        if !known {
            self.problem = Some(problem.clone());
            self.events.push(problem);
        }
    }
}

impl Times {
    /// How long after a renewal the next one is requested: half-way, or a margin before the end.
    fn renew_after(&self, ttl: Duration) -> Duration {
        (ttl / 2).min(ttl.saturating_sub(self.renew_margin)).max(ttl / 10)
    }
}

#[cfg(test)]
mod tests;
