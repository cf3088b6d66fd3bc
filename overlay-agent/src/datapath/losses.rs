//! Packets that the kernel drops in the queues around the agent and its programs, by its own statistics.
//!
//! These statistics belong to a device or a socket and go with it, so what they grow by is added up here.

use std::sync::{
    Mutex, PoisonError,
    atomic::{AtomicU64, Ordering::Relaxed},
};

use crate::netlink::LinkDrops;

/// Packets that the kernel dropped before the slow path read them, or after a program had delivered them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KernelDrops {
    /// Inner packets for the slow path.
    pub device_queue_full: u64,
    /// Inner packets from the fast path.
    pub delivery_refused: u64,
    /// Outer packets for the slow path.
    pub socket_buffer_full: u64,
}

impl KernelDrops {
    /// No drops.
    pub const ZERO: Self = Self { device_queue_full: 0, delivery_refused: 0, socket_buffer_full: 0 };

    /// The name of each counter, and what it means.
    pub const DESCRIPTIONS: [(&'static str, &'static str); 3] = [
        (
            "device_queue_full",
            "The overlay device's queue was full, or no agent was there: packets were not read as fast as they came.",
        ),
        (
            "delivery_refused",
            "A packet that a program had decapsulated found the kernel's queue of received packets full (net.core.netdev_max_backlog), or the overlay device down.",
        ),
        (
            "socket_buffer_full",
            "The UDP socket's receive buffer was full: the agent did not read packets as fast as they came. The kernel may count a wrong outer UDP checksum here, too.",
        ),
    ];

    /// The counts in the order of [`Self::DESCRIPTIONS`].
    pub const fn counts(&self) -> [u64; 3] {
        [self.device_queue_full, self.delivery_refused, self.socket_buffer_full]
    }
}

/// Drops of one overlay device after the other.
#[derive(Debug, Default)]
pub(super) struct DeviceLosses(Mutex<DeviceSeen>);

#[derive(Debug, Default)]
struct DeviceSeen {
    /// The present device, and the statistics that are in `total`.
    device: Option<(u32, LinkDrops)>,
    total: LinkDrops,
}

impl DeviceLosses {
    /// Goes on from what an earlier agent has added up, up to these statistics of a device.
    pub(super) fn restore(&self, device: Option<(u32, LinkDrops)>, total: LinkDrops) {
        self.seen(|seen| *seen = DeviceSeen { device, total });
    }

    /// Follows a device from now on: what it dropped before, for an agent that is not known, does not count. What the device that was
    /// followed last has dropped since does.
    pub(super) fn follow(&self, index: u32, drops: LinkDrops) {
        self.observe(index, drops);
        self.seen(|seen| seen.device = Some((index, drops)));
    }

    /// The present device with its statistics that are in the total, and the total.
    pub(super) fn state(&self) -> (Option<(u32, LinkDrops)>, LinkDrops) {
        self.seen(|seen| (seen.device, seen.total))
    }

    /// Adds what the device dropped since it was last observed. Another device than the one that is followed counts nothing.
    pub(super) fn observe(&self, index: u32, drops: LinkDrops) {
        self.seen(|seen| {
            if let Some((followed, before)) = &mut seen.device
                && *followed == index
            {
                seen.total.received += drops.received.saturating_sub(before.received);
                seen.total.sent += drops.sent.saturating_sub(before.sent);
                *before = drops;
            }
        });
    }

    pub(super) fn total(&self) -> LinkDrops {
        self.seen(|seen| seen.total)
    }

    /// Packets on their way out that a device, whose statistics are `drops` now, has dropped since it was last observed, by whichever
    /// agent; all of them if that is not known.
    pub(super) fn unobserved(&self, index: u32, drops: LinkDrops) -> u64 {
        self.seen(|seen| match seen.device {
            Some((followed, before)) if followed == index => drops.sent.saturating_sub(before.sent),
            Some(_) | None => drops.sent,
        })
    }

    fn seen<T>(&self, use_it: impl FnOnce(&mut DeviceSeen) -> T) -> T {
        use_it(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Drops of all UDP sockets, also of those that are closed.
#[derive(Debug, Default)]
pub(crate) struct SocketLosses(AtomicU64);

impl SocketLosses {
    /// Goes on from the sum of an earlier agent.
    pub(super) fn restore(&self, total: u64) {
        self.0.fetch_add(total, Relaxed);
    }

    pub(super) fn add(&self, drops: u32) {
        self.0.fetch_add(u64::from(drops), Relaxed);
    }

    pub(super) fn total(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drops_of_devices_add_up_and_those_of_an_earlier_agent_do_not_count() {
        let drops = |received, sent| LinkDrops { received, sent };
        let losses = DeviceLosses::default();
        assert_eq!(losses.unobserved(7, drops(9, 8)), 8);
        losses.observe(7, drops(9, 9));
        assert_eq!(losses.total(), drops(0, 0), "no device is followed");
        losses.follow(7, drops(100, 50));
        assert_eq!((losses.unobserved(7, drops(101, 55)), losses.unobserved(6, drops(0, 1))), (5, 1));
        losses.observe(7, drops(101, 55));
        losses.observe(7, drops(103, 55));
        assert_eq!(losses.total(), drops(3, 5));
        losses.follow(8, drops(0, 0));
        losses.observe(7, drops(200, 200));
        losses.observe(8, drops(1, 2));
        assert_eq!(losses.total(), drops(4, 7));
    }

    #[test]
    fn an_agent_goes_on_from_what_the_one_before_added_up() {
        let drops = |received, sent| LinkDrops { received, sent };
        let losses = DeviceLosses::default();
        losses.restore(Some((7, drops(100, 50))), drops(1, 2));
        losses.follow(7, drops(100, 53));
        assert_eq!(losses.total(), drops(1, 5), "what the device dropped meanwhile counts");
        losses.observe(7, drops(101, 53));
        assert_eq!(losses.total(), drops(2, 5));

        let losses = DeviceLosses::default();
        losses.restore(Some((7, drops(100, 50))), drops(1, 2));
        losses.follow(8, drops(900, 900));
        assert_eq!(losses.total(), drops(1, 2), "another device");
    }
}
