//! Limits ICMP errors per reason and receiver (RFC 1812 section 4.3.2.8). Time is passed in.

use std::{
    collections::HashMap,
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use overlay_ebpf::reason::DropReason;

/// Messages to one receiver about one reason at once: traceroute sends 16 probes in parallel, and some more.
const BURST: u32 = 20;
/// Time after which one more is allowed.
const INTERVAL: Duration = Duration::from_millis(100);
/// Receivers and reasons that are remembered. When there are more, all are forgotten that are at rest, and if none is, no message
/// is sent: a container that forges sources gets no more answers than this.
const REMEMBERED: usize = 1024;

/// Decides which messages are sent.
#[derive(Debug, Default)]
pub(super) struct Limiter {
    buckets: HashMap<(Ipv4Addr, DropReason), Bucket>,
}

/// A bucket of tokens, one for each message, that is filled again as time passes.
#[derive(Debug)]
struct Bucket {
    tokens: u32,
    filled: Instant,
}

impl Bucket {
    fn fill(&mut self, now: Instant) {
        let intervals = now.saturating_duration_since(self.filled).as_millis() / INTERVAL.as_millis();
        let tokens = u32::try_from(intervals).unwrap_or(u32::MAX);
        if tokens > 0 {
            self.tokens = self.tokens.saturating_add(tokens).min(BURST);
            self.filled = now;
        }
    }
}

impl Limiter {
    /// Whether one more message about `reason` may go to `receiver`.
    pub(super) fn may_send(&mut self, receiver: Ipv4Addr, reason: DropReason, now: Instant) -> bool {
        let key = (receiver, reason);
        if self.buckets.len() >= REMEMBERED && !self.buckets.contains_key(&key) {
            self.buckets.retain(|_, bucket| {
                bucket.fill(now);
                bucket.tokens < BURST
            });
            if self.buckets.len() >= REMEMBERED {
                return false;
            }
        }
        let bucket = self.buckets.entry(key).or_insert(Bucket { tokens: BURST, filled: now });
        bucket.fill(now);
        let allowed = bucket.tokens > 0;
        bucket.tokens = bucket.tokens.saturating_sub(1);
        allowed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POD: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 2);

    #[test]
    fn a_burst_is_followed_by_one_message_in_each_interval() {
        let (mut limiter, start) = (Limiter::default(), Instant::now());
        let mut sent = |at, count: u32| {
            (0..count).filter(|_| limiter.may_send(POD, DropReason::NoRoute, start + at)).count()
        };
        assert_eq!(sent(Duration::ZERO, 1000), 20);
        assert_eq!(sent(INTERVAL / 2, 1000), 0);
        assert_eq!(sent(INTERVAL, 1000), 1);
        assert_eq!(sent(4 * INTERVAL, 1000), 3);
        assert_eq!(sent(1000 * INTERVAL, 1000), 20, "never more than a burst");
    }

    #[test]
    fn receivers_and_reasons_are_independent() {
        let (mut limiter, now) = (Limiter::default(), Instant::now());
        for _ in 0..100 {
            let _ = limiter.may_send(POD, DropReason::NoRoute, now);
        }
        assert!(limiter.may_send(POD, DropReason::TtlExpired, now));
        assert!(limiter.may_send(Ipv4Addr::new(10, 244, 1, 3), DropReason::NoRoute, now));
    }

    #[test]
    fn forged_receivers_take_bounded_memory_and_recover() {
        let (mut limiter, now) = (Limiter::default(), Instant::now());
        let forged = |number: u32| Ipv4Addr::from(0x0af4_0000 + number);
        let sent =
            (0..100_000).filter(|number| limiter.may_send(forged(*number), DropReason::NoRoute, now)).count();
        assert_eq!((sent, limiter.buckets.len()), (REMEMBERED, REMEMBERED));
        let other = Ipv4Addr::new(10, 250, 0, 1);
        assert!(!limiter.may_send(other, DropReason::NoRoute, now));
        assert!(limiter.may_send(other, DropReason::NoRoute, now + 2 * INTERVAL));
    }
}
