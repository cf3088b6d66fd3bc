//! Tables of slots: every policy chooses a slot of a table, and a slot is an endpoint. Pure.

use overlay_ebpf::service::hash::mix;

use super::{catalog::Backend, record::Policy};

/// Most slots of a table that repeats endpoints by weight. Weights are rounded where it takes more, and with more endpoints all have one.
const MOST_SLOTS: u64 = 4096;
/// Slots of a Maglev table, a prime number: at least ten for each endpoint keep their shares within some percent of each other.
const MAGLEV_SLOTS: u64 = 1021;
/// The same from [`MANY_ENDPOINTS`] endpoints on.
const MANY_MAGLEV_SLOTS: u64 = 8191;
/// From here on, the larger table.
const MANY_ENDPOINTS: usize = 100;

/// The table of a policy: for each slot, an index in `backends`. Empty when there are none.
pub(super) fn table(policy: Policy, backends: &[Backend]) -> Vec<u32> {
    match policy {
        Policy::RoundRobin | Policy::Random | Policy::SourceHash => by_weight(backends),
        // Weighted by the numbers of connections.
        Policy::LeastConn => (0..).zip(backends).map(|(index, _)| index).collect(),
        Policy::Maglev => {
            let slots = if backends.len() < MANY_ENDPOINTS { MAGLEV_SLOTS } else { MANY_MAGLEV_SLOTS };
            maglev(backends, slots)
        }
    }
}

/// Each endpoint as often as its weight says, spread out: in each step, all earn their weight, and the richest pays for a slot
/// with all that was earned.
fn by_weight(backends: &[Backend]) -> Vec<u32> {
    let weights = small_weights(backends);
    let total: i64 = weights.iter().sum();
    let mut credits = vec![0; weights.len()];
    let mut slots = Vec::with_capacity(usize::try_from(total).unwrap_or_default());
    for _ in 0..total {
        let mut richest: Option<(u32, &mut i64)> = None;
        for ((index, credit), weight) in (0..).zip(&mut credits).zip(&weights) {
            *credit += weight;
            if richest.as_ref().is_none_or(|(_, most)| *credit > **most) {
                richest = Some((index, credit));
            }
        }
        if let Some((index, credit)) = richest {
            *credit -= total;
            slots.push(index);
        }
    }
    slots
}

/// The smallest weights in the same relation, rounded if their sum would be above [`MOST_SLOTS`].
fn small_weights(backends: &[Backend]) -> Vec<i64> {
    let weights = || backends.iter().map(|backend| u64::from(backend.weight.max(1)));
    let divisor = weights().fold(0, greatest_common_divisor).max(1);
    let total: u64 = weights().sum::<u64>() / divisor;
    let small = weights().map(|weight| match weight / divisor {
        weight if total <= MOST_SLOTS => weight,
        weight => ((weight * MOST_SLOTS + total / 2) / total).max(1),
    });
    small.map(|weight| i64::try_from(weight).unwrap_or(1)).collect()
}

fn greatest_common_divisor(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { greatest_common_divisor(b, a % b) }
}

/// The table of "Maglev: A Fast and Reliable Software Network Load Balancer" (NSDI 2016), section 3.4: each endpoint has its own order
/// of all slots, and in turns each takes the first free one of its order. Endpoints of less weight skip turns. `slots` is prime.
fn maglev(backends: &[Backend], slots: u64) -> Vec<u32> {
    /// An endpoint's order of slots: the next one, and the distance to the one after it.
    struct Order {
        next: u64,
        skip: u64,
        weight: u64,
        credit: u64,
    }
    let mut orders: Vec<Order> = Vec::with_capacity(backends.len());
    for backend in backends {
        let address = u64::from(backend.address.ip().to_bits()) << 16 | u64::from(backend.address.port());
        let hash = mix(address);
        orders.push(Order {
            next: hash % slots,
            skip: mix(hash) % (slots - 1) + 1,
            weight: u64::from(backend.weight.max(1)),
            credit: 0,
        });
    }
    let heaviest = orders.iter().map(|order| order.weight).max().unwrap_or(1);
    let mut table: Vec<Option<u32>> = vec![None; if backends.is_empty() { 0 } else { slots as usize }];
    let mut free = table.len();
    while free > 0 {
        for (index, order) in (0..).zip(&mut orders) {
            order.credit += order.weight;
            if free == 0 || order.credit < heaviest {
                continue;
            }
            order.credit -= heaviest;
            // As the number of slots is prime, the order comes to every slot, so also to a free one.
            loop {
                let place = table.get_mut(order.next as usize);
                order.next = (order.next + order.skip) % slots;
                if let Some(place @ None) = place {
                    *place = Some(index);
                    free -= 1;
                    break;
                }
            }
        }
    }
    table.into_iter().flatten().collect()
}

#[cfg(test)]
mod tests {
    use std::{
        collections::BTreeMap,
        net::{Ipv4Addr, SocketAddrV4},
    };

    use super::*;

    fn backends(weights: &[u16]) -> Vec<Backend> {
        let backend = |(number, weight): (u32, &u16)| Backend {
            address: SocketAddrV4::new(Ipv4Addr::from_bits(0x0af4_0102 + number), 8080),
            weight: *weight,
        };
        (0..).zip(weights).map(backend).collect()
    }

    fn counts(table: &[u32]) -> BTreeMap<u32, usize> {
        let mut counts = BTreeMap::new();
        for index in table {
            *counts.entry(*index).or_default() += 1;
        }
        counts
    }

    #[test]
    fn without_endpoints_there_are_no_slots() {
        let policies =
            [Policy::RoundRobin, Policy::Random, Policy::LeastConn, Policy::SourceHash, Policy::Maglev];
        for policy in policies {
            assert!(table(policy, &[]).is_empty());
        }
    }

    #[test]
    fn equal_weights_take_turns() {
        assert_eq!(table(Policy::RoundRobin, &backends(&[1, 1, 1])), [0, 1, 2]);
        assert_eq!(table(Policy::RoundRobin, &backends(&[256, 256])), [0, 1]);
        assert_eq!(table(Policy::LeastConn, &backends(&[3, 1])), [0, 1]);
    }

    #[test]
    fn weights_are_kept_and_spread_out() {
        // By hand: credits 5 1 1, then -2 1 1 + 5 1 1 = 3 2 2, and so on.
        assert_eq!(table(Policy::RoundRobin, &backends(&[5, 1, 1])), [0, 0, 1, 0, 2, 0, 0]);
        assert_eq!(table(Policy::RoundRobin, &backends(&[50, 10, 10])).len(), 7);
        assert_eq!(table(Policy::RoundRobin, &backends(&[2, 1])), [0, 1, 0]);
    }

    #[test]
    fn many_weights_are_rounded_and_none_is_lost() {
        let weights: Vec<u16> = (0..100).map(|number| if number < 50 { 256 } else { 85 }).collect();
        let table = table(Policy::RoundRobin, &backends(&weights));
        let counts = counts(&table);
        assert_eq!(counts.len(), 100);
        assert!(table.len().abs_diff(MOST_SLOTS as usize) <= 100, "{}", table.len());
        let relation = counts[&0] as f64 / counts[&99] as f64;
        assert!((relation - 256.0 / 85.0).abs() < 0.1, "{relation}");
        let many = vec![1_u16; 5000];
        assert_eq!(super::table(Policy::RoundRobin, &backends(&many)).len(), 5000);
        let lopsided: Vec<u16> = (0..5000).map(|number| if number == 0 { 256 } else { 1 }).collect();
        assert_eq!(super::tests::counts(&super::table(Policy::RoundRobin, &backends(&lopsided))).len(), 5000);
    }

    #[test]
    fn maglev_fills_every_slot_in_proportion_to_the_weights() {
        for count in [1, 2, 3, 10, 50] {
            let table = table(Policy::Maglev, &backends(&vec![7; count]));
            assert_eq!(table.len(), MAGLEV_SLOTS as usize);
            let counts = counts(&table);
            let (least, most) = (counts.values().min().unwrap(), counts.values().max().unwrap());
            // In turns: they differ by one.
            assert!(counts.len() == count && most - least <= 1, "{counts:?}");
        }
        let weighted = counts(&table(Policy::Maglev, &backends(&[1, 2, 7])));
        for (index, expected) in [(0, 102.1), (1, 204.2), (2, 714.7)] {
            assert!((weighted[&index] as f64 - expected).abs() <= 2.0, "{weighted:?}");
        }
        assert_eq!(table(Policy::Maglev, &backends(&[1; 100])).len(), MANY_MAGLEV_SLOTS as usize);
    }

    #[test]
    fn maglev_moves_few_slots_of_the_endpoints_that_stay() {
        let all = backends(&[1; 10]);
        let before = table(Policy::Maglev, &all);
        for removed in 0..10 {
            let mut rest = all.clone();
            rest.remove(removed);
            let after = table(Policy::Maglev, &rest);
            let stays = |slot: &usize| before[*slot] as usize != removed;
            let moved = (0..before.len())
                .filter(stays)
                .filter(|slot| all[before[*slot] as usize].address != rest[after[*slot] as usize].address)
                .count();
            // The paper's figure 12 has up to some percent for small tables. A plain modulo would move nine in ten.
            assert!(moved < before.len() / 10, "{moved} of {} slots moved", before.len());
        }
    }
}
