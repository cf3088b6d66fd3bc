//! What a datapath has counted, in a form that outlives the process: the next agent goes on from there.
//!
//! The eBPF programs count in a map that is pinned, and go on while no agent runs. What they have counted is therefore read from that
//! map, and only when it is gone from here: no packet counts twice.

use std::collections::BTreeMap;

use overlay_ebpf::{
    abi::Counters,
    reason::{DropReason, PuntReason},
};
use serde::{Deserialize, Serialize};

use super::{KernelDrops, PathCounters, RungChanges};
use crate::netlink::LinkDrops;

/// Counts of one datapath. Fields that a file lacks are zero.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Tally {
    /// Of eBPF programs whose map is gone.
    pub(super) fast: Named,
    /// Of the pinned map, as it was last read.
    pub(super) pinned: Named,
    /// Of the slow path.
    pub(super) slow: Named,
    /// Packets that the overlay device refused and counted.
    pub(super) refused: u64,
    /// The overlay device, and its statistics that are in the sums below.
    pub(super) device: Option<SeenDevice>,
    /// Sum of what overlay devices dropped on their way in and out.
    pub(super) device_received: u64,
    pub(super) device_sent: u64,
    /// Sum of what UDP sockets dropped.
    pub(super) sockets: u64,
    /// Changes of the rungs.
    pub(super) rungs: RungChanges,
}

/// A device and its statistics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SeenDevice {
    pub(super) index: u32,
    pub(super) received: u64,
    pub(super) sent: u64,
}

impl Tally {
    /// What the programs counted that is in no map; `has_map` says whether the pinned map is there.
    pub(super) fn fast_elsewhere(&self, has_map: bool) -> Counters {
        let mut sum = self.fast.counters();
        if !has_map {
            sum.add(&self.pinned.counters());
        }
        sum
    }

    /// All counters, while no agent runs. `map` is what the pinned map holds now, if it is there.
    pub(crate) fn counters(&self, map: Option<&Counters>) -> PathCounters {
        let mut fast = self.fast_elsewhere(map.is_some());
        if let Some(map) = map {
            fast.add(map);
        }
        let kernel = KernelDrops {
            device_queue_full: self.device_sent,
            delivery_refused: self.device_received.saturating_sub(self.refused),
            socket_buffer_full: self.sockets,
        };
        PathCounters { fast, slow: self.slow.counters(), kernel, rungs: self.rungs }
    }

    pub(super) fn device_total(&self) -> LinkDrops {
        LinkDrops { received: self.device_received, sent: self.device_sent }
    }
}

/// Counters by name: another version of the agent may have others.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(super) struct Named(BTreeMap<String, u64>);

impl Named {
    pub(super) fn counters(&self) -> Counters {
        let mut counters = Counters::ZERO;
        for (name, counter) in fields(&mut counters) {
            *counter = self.0.get(&name).copied().unwrap_or_default();
        }
        counters
    }
}

impl From<Counters> for Named {
    fn from(mut counters: Counters) -> Self {
        let counted = fields(&mut counters).map(|(name, counter)| (name, *counter));
        Self(counted.filter(|(_, count)| *count > 0).collect())
    }
}

/// Every counter with its name.
fn fields(counters: &mut Counters) -> impl Iterator<Item = (String, &mut u64)> {
    let Counters {
        egress_packets,
        egress_bytes,
        ingress_packets,
        ingress_bytes,
        egress_bypass_packets,
        ingress_bypass_packets,
        punts,
        drops,
    } = counters;
    let traffic = [
        ("egress_packets", egress_packets),
        ("egress_bytes", egress_bytes),
        ("ingress_packets", ingress_packets),
        ("ingress_bytes", ingress_bytes),
        ("egress_bypass_packets", egress_bypass_packets),
        ("ingress_bypass_packets", ingress_bypass_packets),
    ];
    let traffic = traffic.into_iter().map(|(name, counter)| (name.to_owned(), counter));
    // The arrays have room for reasons of later versions behind those that have names.
    let punts = PuntReason::ALL.iter().map(|reason| format!("punt:{}", reason.name())).zip(punts);
    let drops = DropReason::ALL.iter().map(|reason| format!("drop:{}", reason.name())).zip(drops);
    traffic.chain(punts).chain(drops)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every field has another value, none of them 0.
    fn counters(first: u64) -> Counters {
        let mut counters = Counters::ZERO;
        fields(&mut counters).zip(first..).for_each(|((_, field), count)| *field = count);
        counters
    }

    #[test]
    fn every_counter_is_kept_by_its_name() {
        let named = Named::from(counters(3));
        assert_eq!((named.counters(), named.0.len()), (counters(3), fields(&mut counters(3)).count()));
        assert_eq!(named.0.get("egress_bytes"), Some(&4));
        let drop = DropReason::ALL.first().unwrap();
        assert_eq!(
            named.0.get(&format!("drop:{}", drop.name())),
            counters(3).drops.get(drop.index()),
            "the names are not in the order of the counters"
        );
        let other: Named = serde_json::from_str(r#"{"egress_packets":7,"drop:unheard_of":9}"#).unwrap();
        assert_eq!(other.counters(), Counters { egress_packets: 7, ..Counters::ZERO });
    }

    #[test]
    fn what_the_pinned_map_holds_counts_once() {
        let tally = Tally {
            fast: Counters { egress_packets: 100, ..Counters::ZERO }.into(),
            pinned: Counters { egress_packets: 20, ..Counters::ZERO }.into(),
            ..Tally::default()
        };
        let now = Counters { egress_packets: 23, ..Counters::ZERO };
        assert_eq!(tally.counters(Some(&now)).fast.egress_packets, 123);
        assert_eq!(tally.counters(None).fast.egress_packets, 120, "the map is gone: its last reading counts");
        assert_eq!(tally.fast_elsewhere(true).egress_packets, 100);
    }

    #[test]
    fn packets_that_the_slow_path_counted_are_no_drops_of_the_kernel_too() {
        let tally = Tally { refused: 3, device_received: 5, device_sent: 7, sockets: 11, ..Tally::default() };
        assert_eq!(
            tally.counters(None).kernel,
            KernelDrops { device_queue_full: 7, delivery_refused: 2, socket_buffer_full: 11 }
        );
    }
}
