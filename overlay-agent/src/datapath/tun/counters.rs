//! Counters of the slow path, written by its two threads.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use overlay_ebpf::{abi::Counters, reason::DropReason};

/// The slow path's share of [`Counters`]; it never punts.
#[derive(Debug, Default)]
pub(crate) struct SlowCounters {
    egress_packets: AtomicU64,
    egress_bytes: AtomicU64,
    ingress_packets: AtomicU64,
    ingress_bytes: AtomicU64,
    drops: [AtomicU64; DropReason::COUNT],
    /// Of [`DropReason::DeviceFailed`], those that the device has in its statistics, too.
    refused: AtomicU64,
}

impl SlowCounters {
    /// Goes on from what an earlier agent counted.
    pub(crate) fn restore(&self, counters: &Counters, refused: u64) {
        let traffic = [
            (&self.egress_packets, counters.egress_packets),
            (&self.egress_bytes, counters.egress_bytes),
            (&self.ingress_packets, counters.ingress_packets),
            (&self.ingress_bytes, counters.ingress_bytes),
            (&self.refused, refused),
        ];
        let drops = self.drops.iter().zip(counters.drops);
        for (counter, count) in traffic.into_iter().chain(drops) {
            counter.fetch_add(count, Relaxed);
        }
    }

    pub(super) fn sent(&self, bytes: usize) {
        self.egress_packets.fetch_add(1, Relaxed);
        self.egress_bytes.fetch_add(bytes as u64, Relaxed);
    }

    pub(super) fn delivered(&self, bytes: usize) {
        self.ingress_packets.fetch_add(1, Relaxed);
        self.ingress_bytes.fetch_add(bytes as u64, Relaxed);
    }

    pub(super) fn dropped(&self, reason: DropReason) {
        if let Some(counter) = self.drops.get(reason.index()) {
            counter.fetch_add(1, Relaxed);
        }
    }

    /// The device refused a packet and counted it.
    pub(super) fn refused_by_device(&self) {
        self.dropped(DropReason::DeviceFailed);
        self.refused.fetch_add(1, Relaxed);
    }

    /// Packets that the device's statistics count as dropped, too.
    pub(crate) fn refused(&self) -> u64 {
        self.refused.load(Relaxed)
    }

    pub(crate) fn read(&self) -> Counters {
        let mut counters = Counters::ZERO;
        counters.egress_packets = self.egress_packets.load(Relaxed);
        counters.egress_bytes = self.egress_bytes.load(Relaxed);
        counters.ingress_packets = self.ingress_packets.load(Relaxed);
        counters.ingress_bytes = self.ingress_bytes.load(Relaxed);
        counters.drops.iter_mut().zip(&self.drops).for_each(|(into, from)| *into = from.load(Relaxed));
        counters
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agent_goes_on_from_what_the_one_before_counted() {
        let first = SlowCounters::default();
        first.sent(100);
        first.delivered(60);
        first.dropped(DropReason::NoRoute);
        first.refused_by_device();
        let next = SlowCounters::default();
        next.restore(&first.read(), first.refused());
        assert_eq!((next.read(), next.refused()), (first.read(), 1));
        next.sent(11);
        assert_eq!((next.read().egress_packets, next.read().egress_bytes), (2, 111));
    }
}
