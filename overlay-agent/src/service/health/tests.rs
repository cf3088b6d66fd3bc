//! The view of a node: what it knows on top of the followed catalog.

use std::{
    net::{Ipv4Addr, SocketAddrV4, TcpListener},
    time::Duration,
};

use super::*;
use crate::service::{
    catalog::{self, FULL_SHARE},
    outcome::Outcome,
    record::{EndpointState, Protocol},
};

/// A service that is not checked.
pub(super) const WEB: &str = r#"{"v":1,"ports":[{"name":"http","port":80}]}"#;

/// The catalog of these services and endpoints, given as keys and values.
pub(super) fn catalog(services: &[(&str, &str)], endpoints: &[(&str, &str)]) -> Arc<Catalog> {
    let (services, endpoints) = (catalog::tests::records(services), catalog::tests::records(endpoints));
    let catalog = Catalog::new(&services, &[], &endpoints, &Catalog::default());
    assert_eq!(catalog.skipped, []);
    Arc::new(catalog)
}

fn web(view: &Catalog) -> &Arc<catalog::Service> {
    &view.services[&"shop/web".parse().unwrap()]
}

fn serving(view: &Catalog) -> Vec<String> {
    web(view)
        .serving()
        .iter()
        .map(|endpoint| format!("{}/{}", endpoint.name.node, endpoint.name.id))
        .collect()
}

fn at(ip: [u8; 4]) -> (Protocol, SocketAddrV4) {
    (Protocol::Tcp, SocketAddrV4::new(Ipv4Addr::from(ip), 80))
}

#[tokio::test]
async fn the_view_has_the_verdicts_of_this_node_at_once() {
    // A port of an address of this machine, which no record may have: the address is changed afterwards.
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    let service = r#"{"v":1,"health":{"kind":"tcp","interval_ms":100,"fall":2,"rise":2},
        "ports":[{"name":"http","port":80}]}"#;
    let record = format!(r#"{{"overlay_ip":"10.244.1.1","ports":{{"http":{}}}}}"#, address.port());
    let endpoints = [("shop/web/a/1", record.as_str()), ("shop/web/b/1", r#"{"overlay_ip":"10.244.2.1"}"#)];
    let mut followed = (*catalog(&[("shop/web", service), ("shop/api", WEB)], &endpoints)).clone();
    let own = followed.services.get_mut(&"shop/web".parse().unwrap()).unwrap();
    Arc::make_mut(own).endpoints[0].spec.overlay_ip = Ipv4Addr::LOCALHOST;
    let followed = Arc::new(followed);

    let mut health = Health::new("a".to_owned());
    let view = health.view();
    health.follow(&followed);
    assert!(Arc::ptr_eq(&view.borrow(), &followed));
    drop(listener);
    health.changed().await;
    assert_eq!(serving(&view.borrow()), ["b/1"]);
    assert!(health.down()[0].contains("refused"), "{:?}", health.down());
    let api = "shop/api".parse().unwrap();
    assert!(Arc::ptr_eq(&view.borrow().services[&api], &followed.services[&api]));
    // The same catalog from the store changes nothing, and without the others, those that are down serve.
    health.follow(&followed);
    assert_eq!(serving(&view.borrow()), ["b/1"]);
    let mut alone = (*followed).clone();
    Arc::make_mut(alone.services.get_mut(&"shop/web".parse().unwrap()).unwrap()).endpoints.truncate(1);
    health.follow(&Arc::new(alone));
    assert_eq!(serving(&view.borrow()), ["a/1"]);
    assert_eq!(web(&view.borrow()).endpoints[0].spec.state, EndpointState::Down);
    health.follow(&followed);
    let _listener = TcpListener::bind(address).unwrap();
    health.changed().await;
    assert!(Arc::ptr_eq(&view.borrow(), &followed) && health.down().is_empty());
}

#[tokio::test]
async fn connections_that_fail_eject_and_the_return_is_slow() {
    let service = r#"{"v":1,"health":{"kind":"tcp","slow_start_s":60},"ports":[{"name":"http","port":80}]}"#;
    let [first, second] = [[10, 244, 2, 1], [10, 244, 2, 2]];
    let endpoints = |state: &str| {
        let one = format!(r#"{{"overlay_ip":"10.244.2.1","state":"{state}"}}"#);
        let two = r#"{"overlay_ip":"10.244.2.2"}"#;
        catalog(&[("shop/web", service)], &[("shop/web/b/1", one.as_str()), ("shop/web/b/2", two)])
    };
    let mut health = Health::new("a".to_owned());
    let view = health.view();
    health.follow(&endpoints("ready"));
    let fails = Outcome { established: 0, failed: 5 };
    health.observe(&Outcomes::from([(at(first), fails), (at(second), fails)]));
    assert_eq!(serving(&view.borrow()), ["b/2"]);
    let [ejected] = &health.ejected()[..] else { panic!("{:?}", health.ejected()) };
    assert_eq!((&*ejected.endpoint.id, ejected.target), ("1", at(first)));
    let left = ejected.until.duration_since(Instant::now());
    assert!(left > Duration::from_secs(25) && left <= Duration::from_secs(30), "{left:?}");
    assert_eq!(web(&view.borrow()).endpoints[0].spec.state, EndpointState::Ready, "its connections stay");

    // The only other one goes down: those that could serve do.
    let mut down = (*endpoints("ready")).clone();
    Arc::make_mut(down.services.values_mut().next().unwrap()).endpoints[1].spec.state = EndpointState::Down;
    health.follow(&Arc::new(down));
    assert_eq!(serving(&view.borrow()), ["b/1"]);

    health.follow(&endpoints("down"));
    health.observe(&Outcomes::new());
    health.follow(&endpoints("ready"));
    health.observe(&Outcomes::new());
    assert_eq!(health.ejected(), []);
    let shares: Vec<u16> =
        web(&view.borrow()).endpoints.iter().map(|endpoint| endpoint.local.share).collect();
    assert_eq!(shares, [10, FULL_SHARE]);
}

/// A measurement with a wide limit: `cargo test --release -p overlay-agent the_view_is_cheap -- --nocapture`.
#[tokio::test]
async fn the_view_is_cheap_among_many_endpoints() {
    let name = |number: usize| format!("ns-{}/service-{number}", number % 100);
    let services: Vec<_> = (0..10_000).map(|number| (name(number), WEB)).collect();
    let endpoints: Vec<_> = (0..100_000usize)
        .map(|number| {
            let ip = Ipv4Addr::from_bits(0x0af4_0000 + number as u32 / 4 + 1);
            (format!("{}/node/{number}", name(number % 10_000)), format!(r#"{{"overlay_ip":"{ip}"}}"#))
        })
        .collect();
    let services: Vec<_> = services.iter().map(|(key, value)| (key.as_str(), *value)).collect();
    let endpoints: Vec<_> = endpoints.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
    let followed = catalog(&services, &endpoints);
    let mut health = Health::new("a".to_owned());
    let view = health.view();
    let time = |what: &str, work: &mut dyn FnMut()| {
        let started = Instant::now();
        work();
        let elapsed = started.elapsed();
        println!("{what}: {elapsed:?}");
        elapsed
    };
    time("the first catalog", &mut || health.follow(&followed));
    let idle = time("a second without failures", &mut || health.observe(&Outcomes::new()));
    let failing = followed.services.values().next().unwrap().endpoints[0].spec.overlay_ip;
    let outcomes = Outcomes::from([(at(failing.octets()), Outcome { established: 0, failed: 5 })]);
    let ejection = time("a second with an ejection", &mut || health.observe(&outcomes));
    time("a second while endpoints are out", &mut || health.observe(&outcomes));
    assert!(!health.ejected().is_empty() && idle < ejection);
    let mut next = (*followed).clone();
    Arc::make_mut(next.services.values_mut().last().unwrap()).endpoints.pop();
    let next = Arc::new(next);
    time("a changed service", &mut || health.follow(&next));
    let view = view.borrow();
    let copied = view.services.iter().filter(|(name, service)| !Arc::ptr_eq(service, &next.services[*name]));
    let concerned: BTreeSet<_> =
        health.ejected().into_iter().map(|ejected| ejected.endpoint.service).collect();
    assert_eq!(copied.count(), concerned.len());
}
