//! Which service gets which virtual address: the record `vips/<address>` names its holder. Any agent may write it; the store's
//! transactions decide between several that do.
//!
//! A service gets the address that its record wants, or a free one of the pool, where the search starts at a hash of its name: so a
//! service that comes back most often gets the address that it had. When its service is gone, an address is released but not free:
//! clients may still have it from DNS. The record says so for a quarantine that is longer than DNS answers live, and only the same
//! service gets the address back before.
//!
//! Clocks of hosts are never compared. In etcd the released record is attached to a lease that is not renewed, so etcd's own clock
//! ends the quarantine. In a directory, an agent removes a record that it has seen unchanged for the quarantine by its own clock; an
//! agent that restarts starts counting again.

mod assign;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
    time::Duration,
};

use ipnet::Ipv4Net;

use super::{
    index::Records,
    name::ServiceName,
    record::{Services, Vip, Vips},
};
use crate::store::Record;
pub use assign::{Problems, VipKeeper, keep};

/// How long a released address is kept from other services: twice the longest time to live of a DNS answer, 60 s.
pub const QUARANTINE: Duration = Duration::from_secs(120);

/// How addresses are assigned.
#[derive(Clone, Copy, Debug)]
pub struct VipOptions {
    /// The virtual addresses, without the first and the last, which are no hosts' in a network, and [`dns_address`].
    pub pool: Ipv4Net,
    /// How long a released address is kept from other services. In etcd, of whole seconds.
    pub quarantine: Duration,
}

/// What is to be done about virtual addresses.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Work {
    /// Services that need an address and have none.
    pub missing: Vec<Record<Services>>,
    /// Addresses that are held for nothing.
    pub surplus: Vec<Surplus>,
    /// Addresses in quarantine.
    pub released: Vec<Record<Vips>>,
    /// All addresses that are not free. Empty while no service needs one.
    pub taken: BTreeMap<Ipv4Addr, Record<Vips>>,
}

/// An address that is held for nothing.
#[derive(Clone, Debug, PartialEq)]
pub struct Surplus {
    /// Its record.
    pub vip: Record<Vips>,
    /// The holder's record, when there is one: it has another address, or needs none.
    pub service: Option<Record<Services>>,
}

impl Work {
    /// `held` has the addresses by the services that hold them. A service whose record cannot be used keeps what it has.
    pub(super) fn new(
        pool: Ipv4Net,
        services: &Records<Services>,
        vips: &Records<Vips>,
        held: &BTreeMap<ServiceName, BTreeSet<Ipv4Addr>>,
    ) -> Self {
        let mut work = Self::default();
        for record in services.values() {
            let (Ok(name), Ok(service)) = (&record.id, &record.value) else { continue };
            let held = held.get(name);
            let kept = match (service.headless, service.vip) {
                (true, _) => None,
                (false, Some(wanted)) => held.filter(|held| held.contains(&wanted)).map(|_| wanted),
                (false, None) => held.and_then(|held| held.iter().copied().find(|vip| is_usable(pool, *vip))),
            };
            if !service.headless && kept.is_none() {
                work.missing.push(record.clone());
            }
            let surplus = held.into_iter().flatten().filter(|vip| Some(**vip) != kept);
            work.surplus.extend(surplus.filter_map(|vip| {
                let vip = vips.get(&*vip.to_string())?.clone();
                Some(Surplus { vip, service: Some(record.clone()) })
            }));
        }
        let orphans = held.iter().filter(|(name, _)| !services.contains_key(&*name.to_string()));
        let orphans = orphans.flat_map(|(_, held)| held).filter_map(|vip| vips.get(&*vip.to_string()));
        work.surplus.extend(orphans.map(|vip| Surplus { vip: vip.clone(), service: None }));
        let released = vips.values().filter(|record| matches!(record.value, Ok(Vip::Released(_))));
        work.released = released.cloned().collect();
        if !work.missing.is_empty() {
            let taken = vips.values().filter_map(|record| Some((*record.id.as_ref().ok()?, record.clone())));
            work.taken = taken.collect();
        }
        work
    }
}

/// The address of the nodes' DNS servers: the last one in the pool that a host of a network can have. No service gets it.
pub fn dns_address(pool: Ipv4Net) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(pool.broadcast()).saturating_sub(1))
}

/// The addresses of the pool that services may have, as numbers.
fn usable(pool: Ipv4Net) -> std::ops::Range<u32> {
    u32::from(pool.network()).saturating_add(1)..u32::from(dns_address(pool))
}

/// Whether services may have an address.
pub fn is_usable(pool: Ipv4Net, vip: Ipv4Addr) -> bool {
    usable(pool).contains(&u32::from(vip))
}

/// The usable addresses of the pool, in the order in which they are tried for a service.
fn candidates(pool: Ipv4Net, name: &ServiceName) -> impl Iterator<Item = Ipv4Addr> {
    let usable = usable(pool);
    let count = u64::from(usable.end.saturating_sub(usable.start));
    let start = fnv1a(name.to_string().as_bytes()).checked_rem(count).unwrap_or(0);
    (0..count).filter_map(move |offset| {
        let offset = u32::try_from((start + offset) % count).ok()?;
        usable.start.checked_add(offset).map(Ipv4Addr::from)
    })
}

/// FNV-1a with 64 bits (draft-eastlake-fnv): the same in all versions of this program, unlike the standard library's hashes.
pub(super) fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        service::index::Index,
        store::{Change, Version},
    };

    fn pool() -> Ipv4Net {
        "10.251.0.0/16".parse().unwrap()
    }

    fn work(services: &[(&str, &str)], vips: &[(&str, &str)]) -> Work {
        let mut index = Index::new(pool());
        let put = |key: &&str, value: &&str| (key.to_string(), value.as_bytes().to_vec());
        for (key, value) in services.iter().map(|(key, value)| put(key, value)) {
            index.apply::<Services>(vec![Change::Put(Record::parse(&key, &value, Version::default()))]);
        }
        for (key, value) in vips.iter().map(|(key, value)| put(key, value)) {
            index.apply::<Vips>(vec![Change::Put(Record::parse(&key, &value, Version::default()))]);
        }
        (*index.work()).clone()
    }

    fn keys(surplus: &[Surplus]) -> Vec<&str> {
        surplus.iter().map(|surplus| &*surplus.vip.key).collect()
    }

    const WEB: &str = r#"{"v":1,"ports":[{"name":"http","port":80,"protocol":"tcp"}]}"#;
    const HEADLESS: &str = r#"{"v":1,"headless":true,"ports":[{"name":"http","port":80,"protocol":"tcp"}]}"#;
    const WANTS: &str = r#"{"v":1,"vip":"10.251.0.9","ports":[{"name":"http","port":80,"protocol":"tcp"}]}"#;

    #[test]
    fn a_service_has_one_address_and_a_headless_one_none() {
        let done = work(&[("shop/web", WEB)], &[("10.251.0.7", "shop/web")]);
        assert_eq!(done, Work::default());
        let several = work(&[("shop/web", WEB)], &[("10.251.0.7", "shop/web"), ("10.251.0.3", "shop/web")]);
        assert_eq!((keys(&several.surplus), several.missing.len()), (vec!["10.251.0.7"], 0));
        let none = work(&[("shop/web", WEB), ("shop/dns", HEADLESS)], &[("10.251.0.7", "shop/dns")]);
        assert_eq!((keys(&none.surplus), none.missing.len()), (vec!["10.251.0.7"], 1));
        assert!(none.taken.contains_key(&Ipv4Addr::new(10, 251, 0, 7)));
        // Another pool than before, and the network's own address.
        for vip in ["10.250.0.7", "10.251.0.0"] {
            let outside = work(&[("shop/web", WEB)], &[(vip, "shop/web")]);
            assert_eq!((keys(&outside.surplus), outside.missing.len()), (vec![vip], 1));
        }
    }

    #[test]
    fn a_wanted_address_replaces_another_one() {
        let moves = work(&[("shop/web", WANTS)], &[("10.251.0.3", "shop/web")]);
        assert_eq!((keys(&moves.surplus), moves.missing.len()), (vec!["10.251.0.3"], 1));
        let both = work(&[("shop/web", WANTS)], &[("10.251.0.3", "shop/web"), ("10.251.0.9", "shop/web")]);
        assert_eq!((keys(&both.surplus), both.missing.len()), (vec!["10.251.0.3"], 0));
    }

    #[test]
    fn only_the_address_of_a_service_that_is_gone_is_released() {
        let gone = work(&[], &[("10.251.0.7", "shop/web"), ("10.251.0.8", r#"{"released":"shop/web"}"#)]);
        assert_eq!((keys(&gone.surplus), gone.released.len()), (vec!["10.251.0.7"], 1));
        assert_eq!(gone.surplus[0].service, None);
        let unreadable = work(&[("shop/web", "{")], &[("10.251.0.7", "shop/web")]);
        assert_eq!(unreadable, Work::default(), "the record is there, whatever it says");
    }

    #[test]
    fn every_usable_address_is_a_candidate_once_and_the_first_depends_on_the_name() {
        let name = |text: &str| text.parse::<ServiceName>().unwrap();
        let small: Ipv4Net = "10.251.0.0/29".parse().unwrap();
        let all: BTreeSet<_> = candidates(small, &name("shop/web")).collect();
        assert_eq!((all.len(), candidates(small, &name("shop/web")).count()), (5, 5));
        assert!(all.iter().all(|vip| is_usable(small, *vip)));
        assert!(!is_usable(small, small.network()) && !is_usable(small, small.broadcast()));
        assert_eq!(dns_address(small), Ipv4Addr::new(10, 251, 0, 6));
        assert!(!is_usable(small, dns_address(small)));
        let first = |text: &str| candidates(pool(), &name(text)).next().unwrap();
        assert_eq!(first("shop/web"), first("shop/web"));
        assert_ne!(first("shop/web"), first("shop/api"));
        assert_eq!(candidates("10.251.0.0/32".parse().unwrap(), &name("shop/web")).count(), 0);
        // The test vector of the hash's authors for "foobar".
        assert_eq!(fnv1a(b"foobar"), 0x8594_4171_f739_67e8);
    }
}
