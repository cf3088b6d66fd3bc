//! Which endpoints get no connections of this node for a while, because those that it makes fail. Pure.
//!
//! Only counters are known, once a second: failures since the last connection that was made are failures in a row. An endpoint is
//! ejected for the longer, the more often this has happened without a connection in between. At most half of a service's endpoints
//! are out at a time, but one may be, and never all: then it is more likely this node that fails.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{Ipv4Addr, SocketAddrV4},
    time::{Duration, Instant},
};

use crate::service::{
    Catalog, EndpointName, ServiceName,
    catalog::{Endpoint, Service},
    outcome::{Outcome, Outcomes},
    record::{EndpointState, Protocol},
};

/// Failures in a row that eject an endpoint.
const FAILURES: u64 = 5;
/// How long the first ejection takes.
const FIRST: Duration = Duration::from_secs(30);
/// The longest one; and how long an endpoint has to be in, for its ejections to be forgotten.
const LONGEST: Duration = Duration::from_secs(300);

/// Where an endpoint listens.
type Target = (Protocol, SocketAddrV4);

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Outliers {
    tracks: BTreeMap<Target, Track>,
    ejections: BTreeMap<EndpointName, Ejections>,
}

/// What is known about connections to a target.
#[derive(Clone, Copy, Debug, Default)]
struct Track {
    last: Outcome,
    /// Failures when the last connection was made, or the endpoint let in.
    before: u64,
}

/// The ejections of an endpoint in a row.
#[derive(Clone, Debug)]
struct Ejections {
    count: u32,
    /// The target whose failures ejected it, and all of its targets.
    target: Target,
    targets: Vec<Target>,
    phase: Phase,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Out {
        until: Instant,
        /// Whether its node has found that it is down, since.
        was_down: bool,
    },
    In {
        since: Instant,
        /// Connections to the target that had been made by then.
        established: u64,
    },
}

/// Something to be told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum News {
    Ejected { endpoint: EndpointName, target: Target, duration: Duration },
    LetIn { endpoint: EndpointName },
}

/// An endpoint that is out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ejected {
    /// Which one.
    pub endpoint: EndpointName,
    /// The protocol, and the address whose connections fail.
    pub target: (Protocol, SocketAddrV4),
    /// When it is let in again.
    pub until: Instant,
}

impl Outliers {
    /// Takes what was counted up to now. The catalog has the states that endpoints really have. Costs a pass over all endpoints only
    /// while connections fail in a row.
    pub(super) fn observe(&mut self, now: Instant, outcomes: &Outcomes, catalog: &Catalog) -> Vec<News> {
        let suspects = self.track(outcomes);
        let mut news = Vec::new();
        self.end(now, catalog, &mut news);
        if !suspects.is_empty() {
            let addresses: BTreeSet<Ipv4Addr> = suspects.iter().map(|(_, address)| *address.ip()).collect();
            let is_suspect = |endpoint: &Endpoint| addresses.contains(&endpoint.spec.overlay_ip);
            for service in catalog.services.values() {
                if service.endpoints.iter().any(is_suspect) {
                    self.eject(now, service, &suspects, &mut news);
                }
            }
        }
        news
    }

    pub(super) fn is_ejected(&self, endpoint: &EndpointName) -> bool {
        self.ejections.get(endpoint).is_some_and(Ejections::is_out)
    }

    /// The services with endpoints that are out.
    pub(super) fn services(&self) -> BTreeSet<ServiceName> {
        self.ejected().map(|ejected| ejected.endpoint.service).collect()
    }

    /// The endpoints that are out, in order of their names.
    pub(super) fn ejected(&self) -> impl Iterator<Item = Ejected> {
        self.ejections.iter().filter_map(|(endpoint, ejections)| match ejections.phase {
            Phase::Out { until, .. } => {
                Some(Ejected { endpoint: endpoint.clone(), target: ejections.target, until })
            }
            Phase::In { .. } => None,
        })
    }

    /// Returns the targets to which connections fail in a row, and have failed since the last time.
    fn track(&mut self, outcomes: &Outcomes) -> BTreeSet<Target> {
        self.tracks.retain(|target, _| outcomes.contains_key(target));
        let mut suspects = BTreeSet::new();
        for (target, outcome) in outcomes {
            let track = self.tracks.entry(*target).or_default();
            // Counters of an endpoint that was gone begin again.
            if outcome.failed < track.last.failed || outcome.established < track.last.established {
                *track = Track::default();
            }
            if outcome.established > track.last.established {
                // Which came first is not known: all of them may have been before.
                track.before = outcome.failed;
            }
            if outcome.failed > track.last.failed && outcome.failed - track.before >= FAILURES {
                suspects.insert(*target);
            }
            track.last = *outcome;
        }
        suspects
    }

    /// Lets in those whose time is over, and forgets what does not count any more.
    fn end(&mut self, now: Instant, catalog: &Catalog, news: &mut Vec<News>) {
        let tracks = &mut self.tracks;
        self.ejections.retain(|name, ejections| {
            let service = catalog.services.get(&name.service);
            let Some(endpoint) = service.and_then(|service| service.endpoint(name)) else { return false };
            let made = tracks.get(&ejections.target).map_or(0, |track| track.last.established);
            match &mut ejections.phase {
                Phase::Out { until, was_down } => {
                    *was_down |= endpoint.spec.state == EndpointState::Down;
                    // Its node has checked it since: that counts more.
                    let is_back = *was_down && endpoint.spec.state == EndpointState::Ready;
                    if is_back || *until <= now {
                        for target in &ejections.targets {
                            if let Some(track) = tracks.get_mut(target) {
                                track.before = track.last.failed;
                            }
                        }
                        ejections.phase = Phase::In { since: now, established: made };
                        news.push(News::LetIn { endpoint: name.clone() });
                    }
                    !is_back
                }
                Phase::In { since, established } => {
                    made <= *established && now.saturating_duration_since(*since) < LONGEST
                }
            }
        });
    }

    fn eject(&mut self, now: Instant, service: &Service, suspects: &BTreeSet<Target>, news: &mut Vec<News>) {
        let could_serve =
            |endpoint: &&Endpoint| endpoint.spec.state == EndpointState::Ready && endpoint.spec.weight > 0;
        let candidates: Vec<&Endpoint> = service.endpoints.iter().filter(could_serve).collect();
        let most = (candidates.len() / 2).max(1).min(candidates.len().saturating_sub(1));
        let mut out = candidates.iter().filter(|endpoint| self.is_ejected(&endpoint.name)).count();
        for endpoint in candidates {
            if out >= most {
                return;
            }
            let targets = targets(service, endpoint);
            let failing = targets.iter().find(|target| suspects.contains(target)).copied();
            let Some(target) = failing.filter(|_| !self.is_ejected(&endpoint.name)) else { continue };
            let count = self.ejections.get(&endpoint.name).map_or(0, |ejections| ejections.count) + 1;
            let duration = FIRST.saturating_mul(count).min(LONGEST);
            let phase = Phase::Out { until: now + duration, was_down: false };
            let name = endpoint.name.clone();
            self.ejections.insert(name.clone(), Ejections { count, target, targets, phase });
            news.push(News::Ejected { endpoint: name, target, duration });
            out += 1;
        }
    }
}

impl Ejections {
    fn is_out(&self) -> bool {
        matches!(self.phase, Phase::Out { .. })
    }
}

fn targets(service: &Service, endpoint: &Endpoint) -> Vec<Target> {
    service.spec.ports.iter().map(|port| (port.protocol, endpoint.backend(port).address)).collect()
}

#[cfg(test)]
mod tests;
