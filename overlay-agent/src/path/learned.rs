//! Path MTUs that routers reported (RFC 1191). Time is passed in.

use std::{
    collections::BTreeMap,
    net::Ipv4Addr,
    time::{Duration, Instant},
};

/// Lowest path MTU in bytes: what every host must take (RFC 791 section 3.1). A forged report costs no more.
pub(crate) const LOWEST: u16 = 576;
/// Time between two reports about one peer that are believed.
const INTERVAL: Duration = Duration::from_millis(100);
/// Where the kernel says how long it remembers path MTUs, in seconds.
const EXPIRES: &str = "/proc/sys/net/ipv4/route/mtu_expires";
/// Its default.
const TEN_MINUTES: Duration = Duration::from_secs(600);

/// The reported path MTU of each peer, until it expires.
#[derive(Debug, Default)]
pub(super) struct LearnedMtus {
    peers: BTreeMap<Ipv4Addr, Learned>,
}

#[derive(Debug)]
struct Learned {
    mtu: u16,
    at: Instant,
    expires: Instant,
}

impl LearnedMtus {
    /// Notes a report, which counts for `lifetime`. `true` when the path MTU is lower than it was.
    pub(super) fn report(&mut self, peer: Ipv4Addr, mtu: u16, lifetime: Duration, now: Instant) -> bool {
        let mtu = mtu.max(LOWEST);
        let known = self.peers.get(&peer).filter(|known| known.expires > now);
        if let Some(known) = known
            && (mtu > known.mtu || now.saturating_duration_since(known.at) < INTERVAL)
        {
            return false;
        }
        let is_lower = known.is_none_or(|known| mtu < known.mtu);
        self.peers.insert(peer, Learned { mtu, at: now, expires: now + lifetime });
        is_lower
    }

    /// The path MTU in bytes that counts for a peer.
    pub(super) fn mtu(&self, peer: Ipv4Addr, now: Instant) -> Option<u16> {
        self.peers.get(&peer).filter(|learned| learned.expires > now).map(|learned| learned.mtu)
    }

    /// Forgets what has expired. `true` when something has.
    pub(super) fn expire(&mut self, now: Instant) -> bool {
        let before = self.peers.len();
        self.peers.retain(|_, learned| learned.expires > now);
        self.peers.len() != before
    }
}

/// How long a reported path MTU counts: as long as in the kernel.
pub(super) fn lifetime() -> Duration {
    let seconds = std::fs::read_to_string(EXPIRES).ok().and_then(|text| text.trim().parse().ok());
    seconds.map_or(TEN_MINUTES, Duration::from_secs)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PEER: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 2);

    #[test]
    fn a_reported_mtu_counts_until_it_expires() {
        let (mut learned, start) = (LearnedMtus::default(), Instant::now());
        assert!(learned.report(PEER, 1400, TEN_MINUTES, start));
        let end = start + TEN_MINUTES;
        assert_eq!(learned.mtu(PEER, end - INTERVAL), Some(1400));
        assert!(!learned.expire(end - INTERVAL));
        assert_eq!(learned.mtu(PEER, end), None);
        assert!(learned.expire(end) && !learned.expire(end));
        assert_eq!(learned.mtu(Ipv4Addr::new(192, 168, 77, 3), start), None);
    }

    #[test]
    fn reports_only_lower_the_mtu_and_not_below_the_floor() {
        let (mut learned, start) = (LearnedMtus::default(), Instant::now());
        let at = |count| start + count * INTERVAL;
        assert!(learned.report(PEER, 1400, TEN_MINUTES, at(0)));
        assert!(!learned.report(PEER, 1450, TEN_MINUTES, at(1)));
        assert_eq!(learned.mtu(PEER, at(1)), Some(1400));
        assert!(learned.report(PEER, 68, TEN_MINUTES, at(2)));
        assert_eq!(learned.mtu(PEER, at(2)), Some(LOWEST));
        assert!(!learned.report(PEER, 0, TEN_MINUTES, at(3)), "it is there already");
        assert!(learned.report(PEER, 1450, TEN_MINUTES, at(3) + TEN_MINUTES), "the old one has expired");
    }

    #[test]
    fn a_flood_of_reports_changes_little() {
        let (mut learned, start) = (LearnedMtus::default(), Instant::now());
        let flood = (600..1400u16).rev();
        let changes = flood.filter(|mtu| learned.report(PEER, *mtu, TEN_MINUTES, start)).count();
        assert_eq!((changes, learned.mtu(PEER, start)), (1, Some(1399)));
    }
}
