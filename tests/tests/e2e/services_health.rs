//! Health of endpoints through agents on a real etcd: the node of an endpoint checks it, and connections of other nodes follow.

use std::{
    collections::BTreeMap,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use overlay_tests::{
    agent::{Agent, Rung, Site, binary},
    netns::Netns,
    sandbox::Sandbox,
    topology::{PodOffload, Side, Topology, Underlay},
};

use crate::{
    etcd::{self, Server},
    machine::Need,
    socket_lb::Cgroup,
    suite::Suite,
    wait::wait_until,
};

const CONFIG: &str =
    r#"{"Network":"10.244.0.0/16","Backend":{"Type":"udp"},"Services":{"Pool":"10.251.0.0/24"}}"#;
/// The address of the service `shop/web`.
const VIP: Ipv4Addr = Ipv4Addr::new(10, 251, 0, 10);
/// The ports of the endpoints `p8081` and so on, all in pod B.
const PORTS: [u16; 3] = [8081, 8082, 8083];
const TIMEOUT: Duration = Duration::from_secs(3);

pub(crate) fn register(suite: &mut Suite) {
    let needs = &[Need::Tun, Need::Ebpf, Need::CgroupV2];
    suite.add("services_health_keeps_connections_from_a_dead_endpoint_by_ebpf", needs, |sandbox| {
        dead_endpoint(sandbox, "ebpf")
    });
    suite.add("services_health_keeps_connections_from_a_dead_endpoint_by_proxy", needs, |sandbox| {
        dead_endpoint(sandbox, "proxy")
    });
    suite.add("services_health_sends_connections_although_all_endpoints_are_down", needs, all_down);
    suite.add("services_health_counts_on_its_node_while_etcd_is_away", needs, autonomy);
    suite.add("services_health_of_endpoints_in_files_keeps_their_lifetime", needs, files);
    suite.add("services_health_ejects_an_endpoint_without_checks", needs, ejection);
}

/// Two hosts with services on etcd. The endpoints are on host B.
struct Scene {
    a: Agent,
    b: Agent,
    server: Server,
    topology: Topology,
    // Behind the agents.
    cgroup: Cgroup,
}

impl Scene {
    /// With the service `shop/web`, and endpoints as an operator writes them.
    fn start(sandbox: &Arc<Sandbox>, lb: &str, health: &str) -> Result<Self> {
        let scene = Self::without_services(sandbox, lb, &[])?;
        let service =
            format!(r#"{{"name":"shop/web","vip":"{VIP}","ports":[{{"name":"web","port":80}}]{health}}}"#);
        scene.operate(&["service", "set", &service])?;
        let address = scene.topology.b.pod_address.to_string();
        for port in PORTS {
            let (id, port) = (format!("p{port}"), format!("web={port}"));
            let endpoint = ["endpoint", "add", "shop/web", "--address", &address, "--node", "b", "--id", &id];
            scene.operate(&[&endpoint[..], &["--port", &port]].concat())?;
        }
        Ok(scene)
    }

    fn without_services(sandbox: &Arc<Sandbox>, lb: &str, arguments_b: &[&str]) -> Result<Self> {
        let cgroup = Cgroup::enter()?;
        let topology = Topology::build(sandbox, Underlay::Virtual, PodOffload::On)?;
        let server = Server::start(sandbox, &topology.a.host, topology.a.underlay)?;
        server.write_config(CONFIG)?;
        let a = start(sandbox, &topology.a, &server, &["--lb", lb], &cgroup)?;
        let b = start(sandbox, &topology.b, &server, &[&["--lb", "proxy"], arguments_b].concat(), &cgroup)?;
        etcd::wait_for_route(&a, topology.b.subnet, topology.b.underlay)?;
        Ok(Self { a, b, server, topology, cgroup })
    }

    /// Runs a command of an operator on the store.
    fn operate(&self, arguments: &[&str]) -> Result<()> {
        let endpoint = self.server.endpoint();
        let mut command = Command::new(binary()?);
        command.args(arguments).args(["--etcd-endpoints", &endpoint]);
        let output = self.topology.a.host.output(&mut command)?;
        let error = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "overlay-agent {}: {error}", arguments.join(" "));
        Ok(())
    }

    /// Waits until the records of the endpoints say these states, in order of [`PORTS`].
    fn wait_for_states(&self, wanted: [&str; 3]) -> Result<()> {
        let mut found = Vec::new();
        let done = wait_until(&format!("the states are {wanted:?}"), || {
            let records = self.server.below(&format!("{}/endpoints/", etcd::PREFIX))?;
            let state = |value: &str| {
                let record: serde_json::Value = serde_json::from_str(value)?;
                Ok(record.get("state").and_then(|state| state.as_str()).unwrap_or("ready").to_owned())
            };
            found = records.iter().map(|record| state(&record.value)).collect::<Result<Vec<String>>>()?;
            Ok(found == wanted)
        });
        done.with_context(|| format!("{found:?}"))
    }

    /// Asks from a namespace until a number of connections in a row went to these ports only, and to each of them.
    fn wait_for_ports(&self, client: &Netns, wanted: &[u16]) -> Result<()> {
        let mut found = BTreeMap::new();
        let done = wait_until(&format!("connections go to {wanted:?}"), || {
            found = client.run(|| answers(12))?;
            Ok(found.keys().copied().collect::<Vec<_>>() == wanted)
        });
        done.with_context(|| format!("{found:?}"))
    }
}

fn start(sandbox: &Sandbox, side: &Side, server: &Server, more: &[&str], cgroup: &Cgroup) -> Result<Agent> {
    let site = Site::new(sandbox, &side.host, &format!("agent-{}", side.name))?;
    let mut arguments = etcd::arguments(server, Rung::Tc);
    let cgroup = cgroup.path().display().to_string();
    let words = ["--subnet", side.subnet, "--node", side.name, "--service-cgroup", &cgroup];
    arguments.extend(words.iter().chain(more).map(|word| (*word).to_owned()));
    site.start(&arguments)
}

/// A server at a port of a pod that answers with its port. Dropped, its port is closed; the namespace stays.
struct Answering {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    /// Connections that sent something, so not those of checks.
    served: Arc<AtomicUsize>,
}

impl Answering {
    fn start(pod: &Netns, address: Ipv4Addr, port: u16) -> Result<Self> {
        let listener = pod.run(|| TcpListener::bind((address, port)))??;
        listener.set_nonblocking(true)?;
        let (stop, served) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let (stopped, count) = (Arc::clone(&stop), Arc::clone(&served));
        let thread = thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                match listener.accept() {
                    Ok((stream, _)) => {
                        let count = Arc::clone(&count);
                        drop(thread::spawn(move || answer(stream, port, &count)));
                    }
                    Err(_) => thread::sleep(Duration::from_millis(1)),
                }
            }
        });
        Ok(Self { stop, thread: Some(thread), served })
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn answer(mut stream: TcpStream, port: u16, served: &AtomicUsize) {
    let mut question = [0];
    if stream.set_nonblocking(false).is_ok() && stream.read_exact(&mut question).is_ok() {
        served.fetch_add(1, Ordering::Relaxed);
        let _ = stream.write_all(&port.to_be_bytes());
    }
}

fn ask() -> Result<u16> {
    let address = SocketAddrV4::new(VIP, 80);
    let mut stream = TcpStream::connect_timeout(&address.into(), TIMEOUT)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.write_all(b"?")?;
    let mut port = [0; 2];
    stream.read_exact(&mut port)?;
    Ok(u16::from_be_bytes(port))
}

/// The ports that answer some connections, each with its number; 0 for a connection that fails.
fn answers(count: usize) -> BTreeMap<u16, usize> {
    let mut ports = BTreeMap::new();
    for _ in 0..count {
        *ports.entry(ask().unwrap_or(0)).or_default() += 1;
    }
    ports
}

const CHECKED: &str = r#","health":{"kind":"tcp","interval_ms":200,"timeout_ms":200,"fall":2,"rise":2}"#;

fn dead_endpoint(sandbox: &Arc<Sandbox>, lb: &str) -> Result<()> {
    let scene = Scene::start(sandbox, lb, CHECKED)?;
    let (client, b) = (&scene.topology.a.pod, &scene.topology.b);
    let serve = |port| Answering::start(&b.pod, b.pod_address, port);
    // Nothing listens yet.
    scene.wait_for_states(["down"; 3])?;
    let mut servers = PORTS.map(|port| serve(port).map(Some)).into_iter().collect::<Result<Vec<_>>>()?;
    scene.wait_for_states(["ready"; 3])?;
    scene.wait_for_ports(client, &PORTS)?;

    servers.remove(1);
    scene.wait_for_states(["ready", "down", "ready"])?;
    scene.wait_for_ports(client, &[8081, 8083])?;
    let answered = client.run(|| answers(60))?;
    ensure!(answered.keys().eq([&8081, &8083]), "connections to a dead endpoint: {answered:?}");
    let problems = scene.b.status()?.problems;
    ensure!(problems.is_empty(), "a dead endpoint is no problem of the agent: {problems:?}");
    let status = scene.b.site().output("status", &[])?;
    ensure!(status.contains("down: shop/web/b/p8082: 10.244.2.2:8082"), "{status}");

    let _returned = serve(8082)?;
    scene.wait_for_states(["ready"; 3])?;
    scene.wait_for_ports(client, &PORTS)?;

    // A draining endpoint stays so, whatever its checks say.
    scene.operate(&["endpoint", "drain", "shop/web/b/p8081"])?;
    scene.wait_for_ports(client, &[8082, 8083])?;
    servers.remove(0);
    thread::sleep(Duration::from_secs(1));
    scene.wait_for_states(["draining", "ready", "ready"])
}

/// The servers do not speak HTTP, so no check passes.
fn all_down(sandbox: &Arc<Sandbox>) -> Result<()> {
    let check = r#","health":{"kind":"http","interval_ms":200,"timeout_ms":200,"fall":2}"#;
    let scene = Scene::start(sandbox, "ebpf", check)?;
    let (client, b) = (&scene.topology.a.pod, &scene.topology.b);
    let servers = PORTS.map(|port| Answering::start(&b.pod, b.pod_address, port));
    let _servers = servers.into_iter().collect::<Result<Vec<_>>>()?;
    scene.wait_for_states(["down"; 3])?;
    scene.wait_for_ports(client, &PORTS)?;
    let answered = client.run(|| answers(30))?;
    ensure!(answered == BTreeMap::from(PORTS.map(|port| (port, 10))), "{answered:?}");
    Ok(())
}

/// What happens on host B counts there at once, without etcd; and for host A when etcd is back.
fn autonomy(sandbox: &Arc<Sandbox>) -> Result<()> {
    let mut scene = Scene::start(sandbox, "proxy", CHECKED)?;
    let (pod, address) = (Arc::clone(&scene.topology.b.pod), scene.topology.b.pod_address);
    let serve = |port| Answering::start(&pod, address, port);
    let (one, _two, _three) = (serve(8081)?, serve(8082)?, serve(8083)?);
    scene.wait_for_states(["ready"; 3])?;
    scene.wait_for_ports(&pod, &PORTS)?;
    scene.server.kill();
    drop(one);
    scene.wait_for_ports(&pod, &[8082, 8083])?;
    let one = serve(8081)?;
    scene.wait_for_ports(&pod, &PORTS)?;
    drop(one);
    scene.wait_for_ports(&pod, &[8082, 8083])?;
    scene.server.restart()?;
    scene.wait_for_states(["down", "ready", "ready"])?;
    // An agent that was killed is followed by one that finds the endpoint as it is now.
    scene.b.crash()?;
    let _one = serve(8081)?;
    scene.b = start(sandbox, &scene.topology.b, &scene.server, &["--lb", "proxy"], &scene.cgroup)?;
    scene.wait_for_states(["ready"; 3])
}

/// Endpoints that the agent of host B keeps under its lifetime, and a return with a small share.
fn files(sandbox: &Arc<Sandbox>) -> Result<()> {
    let directory = sandbox.new_directory("services")?;
    let endpoint =
        |port: u16| format!(r#"{{"address":"10.244.2.2","id":"p{port}","ports":{{"web":{port}}}}}"#);
    let file = format!(
        r#"{{"shop/web":{{"vip":"{VIP}","ports":[{{"name":"web","port":80}}],"endpoints":[{}],
        "health":{{"kind":"tcp","interval_ms":200,"timeout_ms":200,"fall":2,"rise":2,"slow_start_s":20}}}}}}"#,
        PORTS.map(endpoint).join(",")
    );
    std::fs::write(directory.join("web.json"), file)?;
    let path = directory.display().to_string();
    let scene = Scene::without_services(sandbox, "proxy", &["--services-dir", &path])?;
    let (client, b) = (&scene.topology.a.pod, &scene.topology.b);
    let serve = |port| Answering::start(&b.pod, b.pod_address, port);
    let (_one, two, _three) = (serve(8081)?, serve(8082)?, serve(8083)?);
    scene.wait_for_states(["ready"; 3])?;
    scene.wait_for_ports(client, &PORTS)?;
    drop(two);
    scene.wait_for_states(["ready", "down", "ready"])?;
    let records = scene.server.below(&format!("{}/endpoints/", etcd::PREFIX))?;
    ensure!(records.iter().all(|record| record.lease != 0), "a record has no lifetime: {records:?}");
    scene.wait_for_ports(client, &[8081, 8083])?;

    let _two = serve(8082)?;
    let mut few = 0;
    wait_until("the endpoint has connections again", || {
        few = client.run(|| answers(60))?.get(&8082).copied().unwrap_or_default();
        Ok(few > 0)
    })?;
    ensure!(few <= 12, "{few} of 60 connections at once, where 20 are its full share");
    wait_until("it has its full share", || Ok(client.run(|| answers(60))?.get(&8082) == Some(&20)))?;
    scene.wait_for_states(["ready"; 3])
}

/// Without checks, an endpoint whose connections fail gets none for a while.
fn ejection(sandbox: &Arc<Sandbox>) -> Result<()> {
    let scene = Scene::start(sandbox, "proxy", "")?;
    let (client, b) = (&scene.topology.a.pod, &scene.topology.b);
    let serve = |port| Answering::start(&b.pod, b.pod_address, port);
    let (_one, _two) = (serve(8081)?, serve(8082)?);
    wait_until("the service answers", || Ok(client.run(ask)?.is_ok()))?;
    let started = Instant::now();
    wait_until("the endpoint is ejected", || {
        client.run(|| answers(6))?;
        Ok(scene
            .a
            .site()
            .output("status", &[])?
            .contains("connections to shop/web/b/p8083 at tcp 10.244.2.2:8083 fail"))
    })?;
    ensure!(
        scene.a.site().log().contains("shop/web/b/p8083 at tcp 10.244.2.2:8083 fail: it gets none for 30 s")
    );
    // It would answer now, and gets no connection all the same.
    let three = serve(8083)?;
    let answered = client.run(|| answers(30))?;
    ensure!(answered.keys().eq([&8081, &8082]) && three.served.load(Ordering::Relaxed) == 0, "{answered:?}");
    thread::sleep(Duration::from_secs(20));
    scene.wait_for_ports(client, &PORTS)?;
    ensure!(started.elapsed() >= Duration::from_secs(28), "let in after {:?}", started.elapsed());
    scene.wait_for_states(["ready"; 3])
}
