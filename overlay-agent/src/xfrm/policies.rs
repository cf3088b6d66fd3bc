//! All IPsec policies that can concern the overlay, and the one that decides about a peer. Pure.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;

use super::policy::{Action, Direction, Extent, Flow, Kind, Policy};

/// The policies of a network namespace that can match IPv4 UDP packets of this host. The default value has none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policies {
    /// Sorted, without duplicates: a policy's place in the kernel's listing says nothing about its rank.
    policies: Vec<Policy>,
    /// The prefix lengths of local and remote addresses that occur. There are few, so that one search for each is faster than a
    /// look at each policy where every peer has its own.
    lengths: Vec<(Direction, u8, u8)>,
}

impl FromIterator<Policy> for Policies {
    fn from_iter<I: IntoIterator<Item = Policy>>(policies: I) -> Self {
        let mut policies: Vec<_> = policies.into_iter().collect();
        policies.sort_unstable();
        policies.dedup();
        let length =
            |policy: &Policy| (policy.direction, policy.local.prefix_len(), policy.remote.prefix_len());
        let mut lengths: Vec<_> = policies.iter().map(length).collect();
        lengths.sort_unstable();
        lengths.dedup();
        Self { policies, lengths }
    }
}

impl Policies {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.policies.is_empty()
    }

    /// The policy because of which packets of this flow must not bypass the kernel; `None` when all may.
    ///
    /// That is one which drops or transforms any packet that this host sends or accepts, unless another lets *all* packets of the
    /// flow pass first: the kernel applies the first that matches. Where this is not certain, a policy covers the flow, because the
    /// slow path is always right.
    pub fn covering(&self, flow: &Flow) -> Option<&Policy> {
        // By far the most common case.
        if self.is_empty() {
            return None;
        }
        [Direction::Out, Direction::In].into_iter().find_map(|direction| self.restricting(flow, direction))
    }

    fn restricting(&self, flow: &Flow, direction: Direction) -> Option<&Policy> {
        let matching = || {
            let candidates = self.candidates(flow, direction).map(|policy| (policy, policy.extent(flow)));
            candidates.filter(|(_, extent)| *extent != Extent::Nothing)
        };
        // The lowest priority at which all packets of the flow pass in clear.
        let clear = |kind| {
            let clear = matching().filter(|(policy, extent)| {
                policy.kind == kind && policy.action == Action::Allow && *extent == Extent::Everything
            });
            clear.map(|(policy, _)| policy.priority).min()
        };
        let (clear_sub, clear_main) = (clear(Kind::Sub), clear(Kind::Main));
        let is_shadowed = |policy: &Policy| match policy.kind {
            // Of equal priorities, the older one is first, which a listing does not tell.
            Kind::Sub => clear_sub.is_some_and(|priority| priority < policy.priority),
            Kind::Main => clear_main.is_some_and(|priority| priority < policy.priority),
            Kind::Default => clear_main.is_some(),
        };
        matching()
            .map(|(policy, _)| policy)
            .filter(|policy| policy.action != Action::Allow && !is_shadowed(policy))
            .min_by_key(|policy| (policy.kind, policy.priority))
    }

    /// The policies of a direction whose addresses are those of the flow.
    fn candidates(&self, flow: &Flow, direction: Direction) -> impl Iterator<Item = &Policy> {
        let lengths = self.lengths.iter().filter(move |(of, _, _)| *of == direction);
        lengths.flat_map(move |(_, local, remote)| {
            let prefixes = (prefix(flow.local, *local), prefix(flow.peer, *remote));
            let (Some(local), Some(remote)) = prefixes else { return &[][..] };
            let key = (direction, local, remote);
            let start = self.policies.partition_point(|policy| addresses(policy) < key);
            let rest = self.policies.get(start..).unwrap_or_default();
            let count = rest.partition_point(|policy| addresses(policy) <= key);
            rest.get(..count).unwrap_or_default()
        })
    }
}

/// The first part of a policy's order.
fn addresses(policy: &Policy) -> (Direction, Ipv4Net, Ipv4Net) {
    (policy.direction, policy.local, policy.remote)
}

/// The prefix of this length that contains the address.
fn prefix(address: Ipv4Addr, length: u8) -> Option<Ipv4Net> {
    Ipv4Net::new(address, length).ok().map(|net| net.trunc())
}
