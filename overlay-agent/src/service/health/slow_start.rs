//! Slow start: an endpoint that begins to take connections while others take them, too, gets a share that grows. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant},
};

use crate::service::{
    Catalog, EndpointName, ServiceName,
    catalog::{FULL_SHARE, Service},
};

/// The share at the beginning, in percent.
const FIRST_SHARE: u16 = 10;

/// The endpoints that have begun to take connections a short time ago.
#[derive(Debug, Default)]
pub(super) struct SlowStart {
    /// `None` before the first one: at the start of the agent, endpoints are known as they are.
    catalog: Option<Arc<Catalog>>,
    starting: BTreeMap<EndpointName, Starting>,
}

#[derive(Clone, Copy, Debug)]
struct Starting {
    since: Instant,
    share: u16,
}

impl SlowStart {
    /// Takes a catalog, and finds the endpoints that take connections in it and did not in the last one. Looks only at services that
    /// have changed.
    pub(super) fn follow(&mut self, catalog: &Arc<Catalog>, now: Instant) {
        let Some(before) = self.catalog.replace(Arc::clone(catalog)) else { return };
        if Arc::ptr_eq(&before, catalog) {
            return;
        }
        for (name, service) in &catalog.services {
            let Some(before) = before.services.get(name).filter(|before| !Arc::ptr_eq(before, service))
            else {
                continue;
            };
            if duration(service).is_zero() {
                continue;
            }
            let was_taking: BTreeSet<&EndpointName> = taking(before).collect();
            let (old, new): (Vec<_>, Vec<_>) = taking(service).partition(|name| was_taking.contains(name));
            if !old.is_empty() {
                let begin = |name: &EndpointName| (name.clone(), Starting { since: now, share: FIRST_SHARE });
                self.starting.extend(new.into_iter().map(begin));
            }
        }
        self.end(now);
    }

    /// Lets the shares grow.
    pub(super) fn grow(&mut self, now: Instant) {
        self.end(now);
        let Some(catalog) = &self.catalog else { return };
        for (name, starting) in &mut self.starting {
            if let Some(service) = catalog.services.get(&name.service) {
                starting.share = share(now.saturating_duration_since(starting.since), duration(service));
            }
        }
    }

    /// Forgets endpoints that have their full share, and those that do not take connections any more.
    fn end(&mut self, now: Instant) {
        let Some(catalog) = &self.catalog else { return };
        self.starting.retain(|name, starting| {
            let service = catalog.services.get(&name.service);
            service.is_some_and(|service| {
                now.saturating_duration_since(starting.since) < duration(service)
                    && service.endpoint(name).is_some_and(|endpoint| endpoint.is_taking())
            })
        });
    }

    /// The share of an endpoint, in percent.
    pub(super) fn share(&self, name: &EndpointName) -> u16 {
        self.starting.get(name).map_or(FULL_SHARE, |starting| starting.share)
    }

    /// The services with such endpoints.
    pub(super) fn services(&self) -> BTreeSet<ServiceName> {
        self.starting.keys().map(|name| name.service.clone()).collect()
    }
}

fn duration(service: &Service) -> Duration {
    let seconds = service.spec.health.as_ref().map_or(0, |health| health.slow_start_s);
    Duration::from_secs(u64::from(seconds))
}

fn taking(service: &Service) -> impl Iterator<Item = &EndpointName> {
    service.endpoints.iter().filter(|endpoint| endpoint.is_taking()).map(|endpoint| &endpoint.name)
}

/// Grows linearly, in whole percents.
fn share(elapsed: Duration, duration: Duration) -> u16 {
    if elapsed >= duration {
        return FULL_SHARE;
    }
    let part = elapsed.as_millis() * u128::from(FULL_SHARE - FIRST_SHARE) / duration.as_millis().max(1);
    FIRST_SHARE + u16::try_from(part).unwrap_or(FULL_SHARE - FIRST_SHARE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::health::tests;

    const SLOW: &str =
        r#"{"v":1,"health":{"kind":"tcp","slow_start_s":100},"ports":[{"name":"p","port":80}]}"#;
    const NONE: &str = r#"{"v":1,"health":{"kind":"tcp"},"ports":[{"name":"p","port":80}]}"#;

    /// A catalog of one service with endpoints of these states.
    fn catalog(service: &str, states: &[&str]) -> Arc<Catalog> {
        let endpoint = |(number, state): (usize, &&str)| {
            (format!("shop/web/a/{number}"), format!(r#"{{"overlay_ip":"10.244.1.1","state":"{state}"}}"#))
        };
        let endpoints: Vec<_> = states.iter().enumerate().map(endpoint).collect();
        let endpoints: Vec<_> = endpoints.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
        tests::catalog(&[("shop/web", service)], &endpoints)
    }

    fn shares<const N: usize>(slow: &SlowStart) -> [u16; N] {
        std::array::from_fn(|number| slow.share(&format!("shop/web/a/{number}").parse().unwrap()))
    }

    fn at(seconds: u64) -> Instant {
        static START: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
        *START.get_or_init(Instant::now) + Duration::from_secs(seconds)
    }

    #[test]
    fn the_share_grows_linearly() {
        for (seconds, expected) in [(0, 10), (1, 10), (2, 11), (50, 55), (99, 99), (100, 100), (1000, 100)] {
            assert_eq!(share(Duration::from_secs(seconds), Duration::from_secs(100)), expected, "{seconds}");
        }
        assert_eq!(share(Duration::ZERO, Duration::ZERO), 100);
    }

    #[test]
    fn an_endpoint_that_returns_begins_small() {
        let mut slow = SlowStart::default();
        slow.follow(&catalog(SLOW, &["ready", "ready", "down"]), at(0));
        assert_eq!(shares(&slow), [100; 3], "the start of the agent");
        slow.follow(&catalog(SLOW, &["ready", "down", "down"]), at(10));
        slow.follow(&catalog(SLOW, &["ready", "ready", "down"]), at(20));
        assert_eq!(shares(&slow), [100, 10, 100]);
        slow.grow(at(70));
        assert_eq!(shares(&slow), [100, 55, 100]);
        // A new one, which others are not disturbed by. Shares change only when they are told to.
        slow.follow(&catalog(SLOW, &["ready", "ready", "ready", "ready"]), at(80));
        assert_eq!(shares(&slow), [100, 55, 10, 10]);
        slow.grow(at(120));
        assert_eq!(shares(&slow), [100, 100, 46, 46]);
        slow.follow(&catalog(SLOW, &["ready", "ready", "draining"]), at(121));
        assert_eq!(shares(&slow), [100; 4]);
        assert!(slow.services().is_empty());
    }

    #[test]
    fn nothing_begins_small_where_no_other_serves_or_none_is_wanted() {
        let mut slow = SlowStart::default();
        slow.follow(&catalog(SLOW, &["down", "down"]), at(0));
        slow.follow(&catalog(SLOW, &["ready", "ready"]), at(1));
        assert_eq!(shares(&slow), [100; 2]);
        slow.follow(&catalog(NONE, &["ready", "down"]), at(2));
        slow.follow(&catalog(NONE, &["ready", "ready"]), at(3));
        assert_eq!(shares(&slow), [100; 2]);
        // A service that is new is known as it is.
        slow.follow(&Arc::default(), at(4));
        slow.follow(&catalog(SLOW, &["ready", "ready"]), at(5));
        assert_eq!(shares(&slow), [100; 2]);
    }

    #[test]
    fn an_ejected_endpoint_that_is_let_in_begins_small() {
        let ready = catalog(SLOW, &["ready", "ready"]);
        let mut ejected = (*ready).clone();
        let service = ejected.services.values_mut().next().unwrap();
        Arc::make_mut(service).endpoints[1].local.is_ejected = true;
        let mut slow = SlowStart::default();
        slow.follow(&ready, at(0));
        slow.follow(&Arc::new(ejected), at(1));
        slow.follow(&ready, at(2));
        assert_eq!(shares(&slow), [100, 10]);
    }
}
