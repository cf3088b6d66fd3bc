//! Changes of services, and of the agent that balances them, under traffic.

use std::{
    net::{Ipv4Addr, SocketAddrV4, TcpStream},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use overlay_tests::sandbox::Sandbox;

use crate::{
    machine::Need,
    services::{self, CONFIG, Scene, Servers, TIMEOUT, ask, exchange, start},
    suite::Suite,
    wait::wait_until,
};

pub(crate) fn register(suite: &mut Suite) {
    let needs = &[Need::Tun, Need::Ebpf, Need::CgroupV2];
    suite.add("services_removed_endpoint_gets_no_connection_by_ebpf", needs, |sandbox| {
        removed(sandbox, "ebpf")
    });
    suite.add("services_removed_endpoint_gets_no_connection_by_proxy", needs, |sandbox| {
        removed(sandbox, "proxy")
    });
    suite.add("services_are_many_by_ebpf", needs, |sandbox| many(sandbox, "ebpf"));
    suite.add("services_are_many_by_proxy", needs, |sandbox| many(sandbox, "proxy"));
    suite.add("services_removed_under_traffic_refuse_and_keep_connections", needs, service_removed);
    suite.add("services_keep_connections_when_the_agent_restarts", needs, restart);
}

/// When a connection began, and the port of the endpoint that answered.
type Connections = Vec<(Instant, u16)>;

/// Connects from the container of host A all the time, while `work` runs. Every connection has to succeed.
fn under_load<T>(scene: &Scene, vip: Ipv4Addr, work: impl FnOnce() -> Result<T>) -> Result<(Connections, T)> {
    let stop = AtomicBool::new(false);
    let connections = Mutex::new(Connections::new());
    let connect = || -> Result<()> {
        scene.topology.a.pod.run(|| {
            while !stop.load(Ordering::Relaxed) {
                let begun = Instant::now();
                let (port, _) = ask(vip)?;
                connections.lock().unwrap_or_else(PoisonError::into_inner).push((begun, port));
            }
            Ok(())
        })?
    };
    let done = services::under_load(&stop, &[&connect, &connect], work)?;
    Ok((connections.into_inner().unwrap_or_else(PoisonError::into_inner), done))
}

/// The beginning is the node's own: when its status no longer has the endpoint. So it does not depend on the store's speed.
fn removed(sandbox: &Arc<Sandbox>, lb: &str) -> Result<()> {
    const ALLOWED: Duration = Duration::from_millis(100);
    let scene = Scene::start(sandbox, CONFIG, lb)?;
    let b = &scene.topology.b;
    let _servers = Servers::start(&b.pod, b.pod_address, &[8081, 8082, 8083])?;
    scene.publish(&[8081, 8082, 8083])?;
    let vip = scene.wait_for_name()?;
    wait_until("the service is reached", || Ok(scene.ask(&scene.topology.a.pod, vip).is_ok()))?;
    let (connections, seen) = under_load(&scene, vip, || {
        thread::sleep(Duration::from_millis(300));
        scene.operate(&["endpoint", "remove", "shop/web/b/p8081"])?;
        wait_until("the node knows of the removal", || Ok(scene.services()?.contains("\"endpoints\":2")))?;
        let seen = Instant::now();
        thread::sleep(Duration::from_millis(600));
        Ok(seen)
    })?;
    let after: Vec<_> = connections.iter().filter(|(begun, _)| *begun > seen + ALLOWED).collect();
    println!("{} connections, {} of them after the removal", connections.len(), after.len());
    ensure!(connections.iter().any(|(_, port)| *port == 8081), "the endpoint was never in use");
    ensure!(after.len() > 10, "{} connections after the removal are no load", after.len());
    ensure!(after.iter().all(|(_, port)| *port != 8081), "a new connection goes to the removed endpoint");
    for port in [8082, 8083] {
        ensure!(after.iter().any(|(_, other)| *other == port), "the endpoint {port} gets no connection");
    }
    Ok(())
}

/// More services than there were anywhere when only forty were expected.
fn many(sandbox: &Arc<Sandbox>, lb: &str) -> Result<()> {
    const COUNT: u16 = 60;
    let scene = Scene::start(sandbox, CONFIG, lb)?;
    let b = &scene.topology.b;
    let ports: Vec<u16> = (9000..9000 + COUNT).collect();
    let _servers = Servers::start(&b.pod, b.pod_address, &ports)?;
    let vip = |port: u16| Ipv4Addr::new(10, 251, 0, 1 + (port - 9000) as u8);
    for port in &ports {
        let ports = format!(r#"[{{"name":"web","port":80,"protocol":"tcp","target_port":{port}}}]"#);
        let service = format!(r#"{{"v":1,"vip":"{}","ports":{ports}}}"#, vip(*port));
        scene.store.write(&format!("services/many/s-{port}"), &service)?;
        let endpoint = format!(r#"{{"overlay_ip":"{}"}}"#, b.pod_address);
        scene.store.write(&format!("endpoints/many/s-{port}/b/1"), &endpoint)?;
    }
    let expected = format!("\"endpoints\":{COUNT}");
    wait_until("the node knows all services", || Ok(scene.services()?.contains(&expected)))?;
    // Their addresses are assigned after that, one by one.
    for port in &ports {
        let mut found = 0;
        wait_until("a service is reached", || {
            found = scene.ask(&scene.topology.a.pod, vip(*port)).map_or(0, |(port, _)| port);
            Ok(found != 0)
        })?;
        ensure!(found == *port, "{} leads to {found} instead of {port}", vip(*port));
    }
    ensure!(scene.problems()?.is_empty(), "{}", scene.problems()?);
    Ok(())
}

fn connect(scene: &Scene, vip: Ipv4Addr) -> Result<TcpStream> {
    let address = SocketAddrV4::new(vip, 80).into();
    let stream = scene.topology.a.pod.run(|| TcpStream::connect_timeout(&address, TIMEOUT))??;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    Ok(stream)
}

/// A service with two endpoints on the other host, and its virtual address, once it is reached by eBPF.
fn two_endpoints(sandbox: &Arc<Sandbox>) -> Result<(Scene, Servers, Ipv4Addr)> {
    let scene = Scene::start(sandbox, CONFIG, "ebpf")?;
    let b = &scene.topology.b;
    let servers = Servers::start(&b.pod, b.pod_address, &[8081, 8082])?;
    scene.publish(&[8081, 8082])?;
    let vip = scene.wait_for_name()?;
    wait_until("the service is reached", || Ok(scene.ask(&scene.topology.a.pod, vip).is_ok()))?;
    Ok((scene, servers, vip))
}

fn service_removed(sandbox: &Arc<Sandbox>) -> Result<()> {
    let (scene, _servers, vip) = two_endpoints(sandbox)?;
    let mut kept = connect(&scene, vip)?;
    let (port, _) = exchange(&mut kept)?;
    // While a container connects all the time, which fails only after the removal.
    let stop = AtomicBool::new(false);
    let failed = Mutex::new(None);
    let removed = thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                if scene.ask(&scene.topology.a.pod, vip).is_err() {
                    failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_with(Instant::now);
                }
            }
        });
        thread::sleep(Duration::from_millis(200));
        let begun = Instant::now();
        let removed = scene.operate(&["service", "remove", "shop/web"]);
        let refused = wait_until("the removed service is refused", || {
            Ok(failed.lock().unwrap_or_else(PoisonError::into_inner).is_some())
        });
        stop.store(true, Ordering::Relaxed);
        removed.and(refused).map(|()| begun)
    })?;
    let failed = failed.into_inner().unwrap_or_else(PoisonError::into_inner).context("nothing failed")?;
    ensure!(failed > removed, "a connection failed before the service was removed");
    for _ in 0..3 {
        ensure!(exchange(&mut kept)?.0 == port, "the open connection has moved");
    }
    Ok(())
}

fn restart(sandbox: &Arc<Sandbox>) -> Result<()> {
    let (scene, _servers, vip) = two_endpoints(sandbox)?;
    let mut kept = connect(&scene, vip)?;
    let (port, _) = exchange(&mut kept)?;
    // Dropped in reverse order: the cgroup when no agent is in it any more.
    let Scene { cgroup, topology, store, _other, agent, .. } = scene;
    // The connection is in use all the time: what is sent without an agent arrives later.
    let stop = AtomicBool::new(false);
    let (exchanges, restarted) = thread::scope(|scope| {
        let traffic = scope.spawn(|| {
            let mut exchanges = 0;
            while !stop.load(Ordering::Relaxed) {
                ensure!(exchange(&mut kept)?.0 == port, "the open connection has moved");
                exchanges += 1;
            }
            ensure!(exchange(&mut kept)?.0 == port, "the open connection has moved");
            Ok(exchanges)
        });
        let restarted = agent.stop().and_then(|()| start(sandbox, &topology, &store, &cgroup, "ebpf"));
        stop.store(true, Ordering::Relaxed);
        let exchanges = traffic.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        (exchanges, restarted)
    });
    let _agent = restarted?;
    println!(
        "{} exchanges over the connection that was kept",
        exchanges.context("over the open connection")?
    );
    wait_until("new connections reach the same address", || {
        Ok(topology.a.pod.run(|| ask(vip))?.is_ok_and(|(port, _)| [8081, 8082].contains(&port)))
    })
}
