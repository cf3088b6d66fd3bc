//! What happens to connections when the catalog changes.

use std::{io, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::{Instant, sleep, timeout},
};

use super::stage::*;
use crate::service::{
    Catalog,
    front::Rules,
    proxy::{Options, Proxy},
    record::{EndpointState, LoadBalancing, Policy},
};

const DRAIN: Duration = Duration::from_millis(600);

fn options() -> Options {
    Options { drain: DRAIN, bind_retry: Duration::from_millis(50), ..Options::default() }
}

/// Exchanges bytes until the connection is reset. Returns when that was.
async fn traffic(mut stream: TcpStream) -> (Duration, io::ErrorKind) {
    let start = Instant::now();
    loop {
        if let Err(error) = exchange(&mut stream).await {
            return (start.elapsed(), error.kind());
        }
        sleep(Duration::from_millis(2)).await;
    }
}

fn assert_drained((after, kind): (Duration, io::ErrorKind)) {
    assert_eq!(kind, io::ErrorKind::ConnectionReset);
    assert!((DRAIN - Duration::from_millis(100)..DRAIN * 2).contains(&after), "{after:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_removed_endpoint_gets_no_new_connection_and_its_old_ones_are_drained() {
    let servers = Server::several(2).await;
    let both = Spec::tcp(&addresses(&servers));
    let proxy = proxy(options(), std::slice::from_ref(&both)).await;
    let (first, second) = (connect(both.address()).await.unwrap(), connect(both.address()).await.unwrap());
    assert_eq!((first.1, second.1), (0, 1));
    let (first, mut second) = (tokio::spawn(traffic(first.0)), second.0);
    let mut one = both.clone();
    one.endpoints.remove(0);
    apply(&proxy, std::slice::from_ref(&one)).await;
    for _ in 0..20 {
        assert_eq!(name(both.address()).await, 1);
    }
    assert_drained(first.await.unwrap());
    exchange(&mut second).await.unwrap();
    // It is forgotten with the next change.
    apply(&proxy, std::slice::from_ref(&one)).await;
    assert_eq!(proxy.counters().services.values().next().unwrap().endpoints.len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn endpoints_that_are_down_are_drained_and_draining_ones_keep_their_connections() {
    let servers = Server::several(3).await;
    let mut spec = Spec::tcp(&addresses(&servers));
    let proxy = proxy(options(), std::slice::from_ref(&spec)).await;
    let mut streams = Vec::new();
    for _ in 0..3 {
        streams.push(connect(spec.address()).await.unwrap().0);
    }
    let (mut ready, mut draining) = (streams.pop().unwrap(), streams.pop().unwrap());
    let down = tokio::spawn(traffic(streams.pop().unwrap()));
    spec.endpoints[0].2 = EndpointState::Down;
    spec.endpoints[1].2 = EndpointState::Draining;
    apply(&proxy, std::slice::from_ref(&spec)).await;
    assert_eq!(name(spec.address()).await, 2);
    assert_drained(down.await.unwrap());
    sleep(DRAIN).await;
    exchange(&mut draining).await.unwrap();
    exchange(&mut ready).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_endpoint_that_comes_back_in_time_keeps_its_connections() {
    let servers = Server::several(2).await;
    let mut spec = Spec::tcp(&addresses(&servers));
    let proxy = proxy(options(), std::slice::from_ref(&spec)).await;
    let (mut stream, _) = connect(spec.address()).await.unwrap();
    for state in [EndpointState::Down, EndpointState::Ready] {
        spec.endpoints[0].2 = state;
        apply(&proxy, std::slice::from_ref(&spec)).await;
        sleep(DRAIN * 2 / 3).await;
    }
    exchange(&mut stream).await.unwrap();
    // When all are down, all are used.
    for endpoint in &mut spec.endpoints {
        endpoint.2 = EndpointState::Down;
    }
    apply(&proxy, std::slice::from_ref(&spec)).await;
    sleep(DRAIN * 3 / 2).await;
    exchange(&mut stream).await.unwrap();
    name(spec.address()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_removed_service_closes_its_port_at_once() {
    let server = Server::named(0).await;
    let spec = Spec::tcp(&[server.address]);
    let proxy = proxy(options(), std::slice::from_ref(&spec)).await;
    let (stream, _) = connect(spec.address()).await.unwrap();
    let running = tokio::spawn(traffic(stream));
    apply(&proxy, &[]).await;
    assert_eq!(connect(spec.address()).await.unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    assert!(proxy.counters().services.is_empty());
    assert_drained(running.await.unwrap());
    // It can come back at once.
    for _ in 0..50 {
        apply(&proxy, std::slice::from_ref(&spec)).await;
        assert_eq!(name(spec.address()).await, 0);
        apply(&proxy, &[]).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_service_can_take_an_address_over() {
    let servers = Server::several(2).await;
    let web = Spec::tcp(&[servers[0].address]);
    let proxy = proxy(options(), std::slice::from_ref(&web)).await;
    let (stream, _) = connect(web.address()).await.unwrap();
    let running = tokio::spawn(traffic(stream));
    let mut api = Spec { name: "shop/api".to_owned(), ..web };
    api.endpoints[0].0 = servers[1].address;
    apply(&proxy, std::slice::from_ref(&api)).await;
    assert_eq!(name(api.address()).await, 1);
    assert_drained(running.await.unwrap());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn endpoints_change_under_load_without_a_failed_connection() {
    let servers = Server::several(3).await;
    let spec = Spec::tcp(&addresses(&servers));
    let proxy = proxy(options(), std::slice::from_ref(&spec)).await;
    let address = spec.address();
    let clients: Vec<_> = (0..4)
        .map(|_| {
            tokio::spawn(async move {
                for _ in 0..200 {
                    let (mut stream, _) = connect(address).await.unwrap();
                    exchange(&mut stream).await.unwrap();
                }
            })
        })
        .collect();
    let mut turn = 0;
    while clients.iter().any(|client| !client.is_finished()) {
        let mut changed = spec.clone();
        changed.endpoints.remove(turn % 3);
        apply(&proxy, std::slice::from_ref(&changed)).await;
        turn += 1;
        sleep(Duration::from_millis(1)).await;
    }
    for client in clients {
        client.await.unwrap();
    }
    assert_eq!(total(&proxy).failures, 0);
    assert!(turn > 10, "{turn}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_port_in_use_is_a_problem_of_its_service_until_it_is_free() {
    let server = Server::named(0).await;
    let occupied = TcpListener::bind("0.0.0.0:0").await.unwrap();
    let port = occupied.local_addr().unwrap().port();
    let web = Spec { port, ..Spec::tcp(&[server.address]) };
    let api = Spec { name: "shop/api".to_owned(), ..Spec::tcp(&[server.address]) };
    let proxy = Proxy::start(options());
    apply(&proxy, &[web.clone(), api.clone()]).await;
    let problems = proxy.problems();
    assert_eq!(problems.len(), 1, "{problems:?}");
    assert_eq!((problems[0].service.name(), problems[0].address), ("web", web.address()));
    assert!(problems[0].reason.contains(&format!("tcp port {port}: another process of this host")));
    assert_eq!(name(api.address()).await, 0);
    drop(occupied);
    eventually("the port is served", || proxy.problems().is_empty()).await;
    assert_eq!(name(web.address()).await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_services_come_and_go() {
    let server = Server::named(0).await;
    let specs: Vec<Spec> = (0..100)
        .map(|number| Spec { name: format!("shop/web-{number}"), ..Spec::tcp(&[server.address]) })
        .collect();
    let proxy = proxy(options(), &specs).await;
    for spec in &specs {
        assert_eq!(name(spec.address()).await, 0);
    }
    apply(&proxy, &specs[..50]).await;
    for (number, spec) in specs.iter().enumerate() {
        assert_eq!(connect(spec.address()).await.is_ok(), number < 50, "{number}");
    }
    apply(&proxy, &specs).await;
    assert_eq!(proxy.problems(), []);
    let (mut stream, _) = connect(specs[99].address()).await.unwrap();
    let stopped = timeout(Duration::from_secs(5), proxy.stop()).await;
    stopped.unwrap();
    stream.write_all(b"x").await.ok();
    assert!(stream.read_u8().await.is_err());
    for spec in &specs {
        assert_eq!(connect(spec.address()).await.unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    }
    apply(&proxy, &specs).await;
    assert!(connect(specs[0].address()).await.is_err());
}

#[tokio::test]
async fn services_that_are_shared_by_catalogs_follow_the_default_policy_and_nothing_else() {
    let servers = Server::several(2).await;
    let (web, api) = (Spec::tcp(&addresses(&servers)), Spec::tcp(&addresses(&servers)));
    let api = Spec { name: "shop/api".to_owned(), ..api };
    let proxy = proxy(options(), &[web.clone(), api.clone()]).await;
    let both = catalog(&[web.clone(), api.clone()]);
    let apply = async |services: &Catalog, policy| {
        let default = LoadBalancing { policy, ..LoadBalancing::default() };
        proxy.reconcile(services, &Rules { default, ..Rules::default() }).await;
    };
    apply(&both, Policy::RoundRobin).await;
    let mut only_web = Catalog::clone(&both);
    only_web.services.remove(&"shop/api".parse().unwrap());
    for services in [&only_web, &both, &only_web] {
        apply(services, Policy::RoundRobin).await;
        assert_eq!(connect(api.address()).await.is_ok(), services.services.len() == 2);
        let names = [name(web.address()).await, name(web.address()).await];
        assert_ne!(names[0], names[1]);
    }
    apply(&only_web, Policy::SourceHash).await;
    let names = [name(web.address()).await, name(web.address()).await, name(web.address()).await];
    assert!(names[0] == names[1] && names[1] == names[2], "{names:?}");
    assert_eq!(proxy.counters().services.len(), 1);
}
