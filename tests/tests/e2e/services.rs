//! Services through agents: names, virtual addresses and balancing between the pods of two hosts.

#[path = "services_top.rs"]
mod top;
#[path = "services_udp.rs"]
mod udp;

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket},
    panic::resume_unwind,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use overlay_tests::{
    agent::{Agent, Rung, Site, binary},
    netns::Netns,
    pair::Store,
    sandbox::Sandbox,
    topology::{PodOffload, Topology, Underlay},
};

use crate::{machine::Need, socket_lb::Cgroup, suite::Suite, wait::wait_until};

pub(crate) const CONFIG: &str = r#"{"Network":"10.244.0.0/16","Services":{"Pool":"10.251.0.0/24"}}"#;
/// Where the DNS servers of the pool above answer.
const DNS: &str = "10.251.0.254:53";
const DEVICE: &str = "svc0";
pub(crate) const TIMEOUT: Duration = Duration::from_secs(3);

pub(crate) fn register(suite: &mut Suite) {
    let needs = &[Need::Tun, Need::Ebpf, Need::CgroupV2];
    suite.add("services_reach_endpoints_of_other_hosts_by_ebpf", needs, |sandbox| by_name(sandbox, "ebpf"));
    suite.add("services_reach_endpoints_of_other_hosts_by_proxy", needs, |sandbox| by_name(sandbox, "proxy"));
    suite.add("services_reach_endpoints_of_other_hosts_by_both", needs, |sandbox| by_name(sandbox, "auto"));
    suite.add("services_show_their_traffic_by_ebpf", needs, top::by_ebpf);
    suite.add("services_show_their_traffic_by_proxy", needs, top::by_proxy);
    suite.add("services_end_connections_of_udp_sockets", needs, udp::end_with_endpoint);
    suite.add("services_make_nothing_in_a_network_without_them", needs, none);
    suite.add("services_of_a_killed_agent_are_taken_over_or_removed", needs, leftovers);
    suite.add("services_leave_the_device_of_another_program", needs, foreign_device);
}

/// Two hosts on a directory store, the first with services.
pub(crate) struct Scene {
    pub(crate) agent: Agent,
    pub(crate) _other: Agent,
    pub(crate) store: Store,
    pub(crate) topology: Topology,
    // Behind the agents.
    pub(crate) cgroup: Cgroup,
    pub(crate) directory: String,
}

/// Runs a command of an operator on the store in a directory.
pub(crate) fn operate(store: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(binary()?).args(arguments).args(["--store", store]).output()?;
    ensure!(
        output.status.success(),
        "overlay-agent {}: {}",
        arguments.join(" "),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs `load` in threads while `work` is done. `load` returns when `stop` becomes true. Fails when one of it fails.
pub(crate) fn under_load<T>(
    stop: &AtomicBool,
    load: &[&(dyn Fn() -> Result<()> + Sync)],
    work: impl FnOnce() -> Result<T>,
) -> Result<T> {
    thread::scope(|scope| {
        let threads: Vec<_> = load.iter().map(|load| scope.spawn(load)).collect();
        let done = work();
        stop.store(true, Ordering::Relaxed);
        for thread in threads {
            thread.join().unwrap_or_else(|panic| resume_unwind(panic)).context("under load")?;
        }
        done
    })
}

impl Scene {
    pub(crate) fn start(sandbox: &Arc<Sandbox>, config: &str, lb: &str) -> Result<Self> {
        let cgroup = Cgroup::enter()?;
        let topology = Topology::build(sandbox, Underlay::Virtual, PodOffload::On)?;
        let store = Store::create(sandbox)?;
        store.write("config", config)?;
        let directory = store.arguments(&topology.a, Rung::Tc).get(1).cloned().context("the store")?;
        let agent = start(sandbox, &topology, &store, &cgroup, lb)?;
        let site = Site::new(sandbox, &topology.b.host, "agent-b")?;
        let mut arguments = store.arguments(&topology.b, Rung::Tc);
        arguments.extend(["--lb", "off"].map(str::to_owned));
        let other = site.start(&arguments)?;
        let scene = Self { agent, _other: other, store, topology, cgroup, directory };
        scene.agent.wait_for_routes("the other host", |routes| routes.routes.len() == 1)?;
        Ok(scene)
    }

    /// Runs a command of an operator on the store.
    pub(crate) fn operate(&self, arguments: &[&str]) -> Result<String> {
        operate(&self.directory, arguments)
    }

    /// Writes the service `shop/web` and its endpoints at these ports of pod B.
    pub(crate) fn publish(&self, ports: &[u16]) -> Result<()> {
        self.operate(&["service", "set", r#"{"name":"shop/web","ports":[{"name":"web","port":80}]}"#])?;
        ports.iter().try_for_each(|port| self.add(*port))
    }

    fn add(&self, port: u16) -> Result<()> {
        let address = self.topology.b.pod_address.to_string();
        let (id, port) = (format!("p{port}"), format!("web={port}"));
        let line = [
            "endpoint",
            "add",
            "shop/web",
            "--address",
            &address,
            "--node",
            "b",
            "--id",
            &id,
            "--port",
            &port,
        ];
        self.operate(&line).map(drop)
    }

    /// The `services` part of the agent's status.
    pub(crate) fn services(&self) -> Result<String> {
        let status = self.agent.site().output("status", &["-o", "json"])?;
        let status: serde_json::Value = serde_json::from_str(&status)?;
        Ok(status.get("services").map(ToString::to_string).unwrap_or_default())
    }

    pub(crate) fn problems(&self) -> Result<String> {
        Ok(self.agent.status()?.problems.join("; "))
    }

    /// The address of the service, as a container of host A learns it from the DNS server.
    fn resolve(&self) -> Result<Option<Ipv4Addr>> {
        self.topology.a.pod.run(|| resolve("web.shop.svc.overlay"))?
    }

    /// Waits until the name has an address.
    pub(crate) fn wait_for_name(&self) -> Result<Ipv4Addr> {
        let mut found = None;
        wait_until("the name of the service has an address", || {
            found = self.resolve()?;
            Ok(found.is_some())
        })?;
        found.context("an address")
    }

    /// Connects from `client` and returns the port of the endpoint, and the client's address as the endpoint sees it.
    pub(crate) fn ask(&self, client: &Netns, vip: Ipv4Addr) -> Result<(u16, Ipv4Addr)> {
        client.run(|| ask(vip))?
    }
}

pub(crate) fn start(
    sandbox: &Arc<Sandbox>,
    topology: &Topology,
    store: &Store,
    cgroup: &Cgroup,
    lb: &str,
) -> Result<Agent> {
    let site = Site::new(sandbox, &topology.a.host, "agent-a")?;
    let mut arguments = store.arguments(&topology.a, Rung::Tc);
    let cgroup = cgroup.path().display().to_string();
    arguments.extend(["--lb", lb, "--service-cgroup", &cgroup].map(str::to_owned));
    site.start(&arguments)
}

/// Servers at ports of a pod. Each answers every 32 bytes with its port, the address of its client and the bytes.
pub(crate) struct Servers {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Servers {
    pub(crate) fn start(pod: &Netns, address: Ipv4Addr, ports: &[u16]) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let mut threads = Vec::new();
        for port in ports {
            let listener = pod.run(|| TcpListener::bind((address, *port)))??;
            listener.set_nonblocking(true)?;
            let (stop, port) = (Arc::clone(&stop), *port);
            threads.push(thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    match listener.accept() {
                        Ok((stream, client)) => drop(thread::spawn(move || answer(stream, client, port))),
                        Err(_) => thread::sleep(Duration::from_millis(1)),
                    }
                }
            }));
        }
        Ok(Self { stop, threads })
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn answer(mut stream: TcpStream, client: SocketAddr, port: u16) {
    let mut question = [0; 32];
    let SocketAddr::V4(client) = client else { return };
    let _ = stream.set_nonblocking(false);
    while stream.read_exact(&mut question).is_ok() {
        let answer = [&port.to_be_bytes(), &client.ip().octets()[..], &question].concat();
        if stream.write_all(&answer).is_err() {
            return;
        }
    }
}

pub(crate) fn ask(vip: Ipv4Addr) -> Result<(u16, Ipv4Addr)> {
    let address = SocketAddrV4::new(vip, 80);
    let mut stream = TcpStream::connect_timeout(&address.into(), TIMEOUT)
        .with_context(|| format!("connect to {address}"))?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    exchange(&mut stream)
}

/// Asks over a connection.
pub(crate) fn exchange(stream: &mut TcpStream) -> Result<(u16, Ipv4Addr)> {
    let question: [u8; 32] = rand::random();
    stream.write_all(&question)?;
    let mut answer = [0; 38];
    stream.read_exact(&mut answer).context("wait for the answer")?;
    let [high, low, a, b, c, d, echo @ ..] = answer;
    ensure!(echo == question, "the answer is not to the question");
    Ok((u16::from_be_bytes([high, low]), Ipv4Addr::new(a, b, c, d)))
}

/// Asks for the A record of a name (RFC 1035 section 4.1). `None` when there is none, or no answer.
pub(crate) fn resolve(name: &str) -> Result<Option<Ipv4Addr>> {
    let id: [u8; 2] = rand::random();
    let mut query = [&id[..], &[1, 0, 0, 1, 0, 0, 0, 0, 0, 0]].concat();
    for label in name.split('.') {
        query.push(u8::try_from(label.len())?);
        query.extend(label.bytes());
    }
    query.extend([0, 0, 1, 0, 1]);
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.set_read_timeout(Some(Duration::from_millis(500)))?;
    socket.connect(DNS)?;
    let mut answer = [0; 512];
    let Ok(length) = socket.send(&query).and_then(|_| socket.recv(&mut answer)) else { return Ok(None) };
    let answer = answer.get(..length).unwrap_or_default();
    ensure!(answer.get(..2) == Some(&id[..]), "the answer to another query");
    // Without EDNS, the only record is the last, and its data are the last bytes.
    let has_answer = answer.get(6..8) == Some(&[0, 1]);
    let address = answer.last_chunk::<4>().copied().filter(|_| has_answer);
    Ok(address.map(Ipv4Addr::from))
}

fn by_name(sandbox: &Arc<Sandbox>, lb: &str) -> Result<()> {
    let scene = Scene::start(sandbox, CONFIG, lb)?;
    let (a, b) = (&scene.topology.a, &scene.topology.b);
    let _servers = Servers::start(&b.pod, b.pod_address, &[8081, 8082, 8083])?;
    ensure!(scene.services()?.contains("\"services\":0"), "{}", scene.services()?);
    ensure!(a.host.tool(&format!("ip link show {DEVICE}")).is_err(), "there is no service yet");
    scene.publish(&[8081, 8082])?;
    let vip = scene.wait_for_name()?;
    let described = scene.services()?;
    let ways = match lb {
        "ebpf" => "ebpf (--lb ebpf)",
        "proxy" => "proxy (--lb proxy)",
        _ => "ebpf, and the proxy",
    };
    ensure!(described.contains(ways), "{described}");

    // Both endpoints in turn, and the client's address is kept where no proxy is between.
    let mut ports = Vec::new();
    wait_until("both endpoints are known", || {
        ports = vec![scene.ask(&a.pod, vip)?.0, scene.ask(&a.pod, vip)?.0];
        ports.sort_unstable();
        Ok(ports == [8081, 8082])
    })?;
    for _ in 0..10 {
        let [first, second] = [scene.ask(&a.pod, vip)?, scene.ask(&a.pod, vip)?];
        ensure!(first.0 != second.0, "{first:?} twice in a row");
        let expected = if lb == "proxy" { Ipv4Addr::new(10, 244, 1, 0) } else { a.pod_address };
        ensure!(first.1 == expected && second.1 == expected, "{first:?} {second:?}, not {expected}");
    }
    scene.ask(&a.host, vip).context("from the host itself")?;
    for client in [&a.pod, &a.host] {
        client.tool(&format!("ping -c 1 -W 2 -q {vip}"))?;
    }

    // An endpoint that is removed, drained or added counts from then on.
    scene.operate(&["endpoint", "remove", "shop/web/b/p8081"])?;
    wait_until("the removed endpoint gets no connection", || {
        Ok((0..4)
            .map(|_| scene.ask(&a.pod, vip))
            .collect::<Result<Vec<_>>>()?
            .iter()
            .all(|(port, _)| *port == 8082))
    })?;
    scene.add(8083)?;
    wait_until("the new endpoint gets connections", || Ok(scene.ask(&a.pod, vip)?.0 == 8083))?;
    scene.operate(&["endpoint", "drain", "shop/web/b/p8082"])?;
    wait_until("the draining endpoint gets no connection", || {
        Ok((0..4)
            .map(|_| scene.ask(&a.pod, vip))
            .collect::<Result<Vec<_>>>()?
            .iter()
            .all(|(port, _)| *port == 8083))
    })?;

    scene.operate(&["service", "remove", "shop/web"])?;
    wait_until("the removed service is refused", || Ok(scene.ask(&a.pod, vip).is_err()))?;
    wait_until("its name has no address", || Ok(scene.resolve()?.is_none()))?;
    let Scene { agent, topology, .. } = scene;
    agent.stop()?;
    ensure!(topology.a.host.tool(&format!("ip link show {DEVICE}")).is_err(), "{DEVICE} is left");
    Ok(())
}

fn none(sandbox: &Arc<Sandbox>) -> Result<()> {
    let scene = Scene::start(sandbox, r#"{"Network":"10.244.0.0/16"}"#, "auto")?;
    scene.publish(&[8081])?;
    thread::sleep(Duration::from_secs(1));
    ensure!(scene.services()? == "null", "{}", scene.services()?);
    ensure!(scene.topology.a.host.tool(&format!("ip link show {DEVICE}")).is_err(), "{DEVICE} was made");
    ensure!(scene.store.read("services/shop/web").is_ok());
    ensure!(scene.store.read("vips").is_err(), "an address was assigned");
    Ok(())
}

fn leftovers(sandbox: &Arc<Sandbox>) -> Result<()> {
    let scene = Scene::start(sandbox, CONFIG, "ebpf")?;
    let b = &scene.topology.b;
    let _servers = Servers::start(&b.pod, b.pod_address, &[8081])?;
    scene.publish(&[8081])?;
    let vip = scene.wait_for_name()?;
    // Dropped in reverse order: the cgroup when no agent is in it any more.
    let Scene { cgroup, topology, store, _other, agent, .. } = scene;
    let link = format!("ip link show {DEVICE}");
    agent.crash()?;
    topology.a.host.tool(&link).context("the device stays when the agent is killed")?;
    let agent = start(sandbox, &topology, &store, &cgroup, "ebpf")?;
    wait_until("the next agent serves the same address", || {
        Ok(topology.a.pod.run(|| ask(vip))?.is_ok_and(|(port, _)| port == 8081))
    })?;
    let site = agent.crash()?;
    topology.a.host.tool(&link)?;
    site.down()?;
    ensure!(topology.a.host.tool(&link).is_err(), "down left {DEVICE}");
    Ok(())
}

fn foreign_device(sandbox: &Arc<Sandbox>) -> Result<()> {
    let scene = Scene::start(sandbox, CONFIG, "proxy")?;
    let (a, b) = (&scene.topology.a, &scene.topology.b);
    a.host.tool(&format!("ip link add {DEVICE} type bridge"))?;
    let _servers = Servers::start(&b.pod, b.pod_address, &[8081])?;
    scene.publish(&[8081])?;
    wait_until("the agent reports the device", || Ok(scene.problems()?.contains("--service-device")))?;
    ensure!(scene.agent.status()?.state == "degraded");
    a.host.tool(&format!("ip link show {DEVICE}")).context("the device of another program is gone")?;
    a.host.tool(&format!("ip link delete {DEVICE}"))?;
    let vip = scene.wait_for_name()?;
    wait_until("the service is reached", || Ok(scene.ask(&a.pod, vip).is_ok()))?;
    wait_until("the problem is gone", || Ok(!scene.problems()?.contains(DEVICE)))?;
    // Somebody removes the agent's own.
    a.host.tool(&format!("ip link delete {DEVICE}"))?;
    wait_until("the device is made again", || Ok(a.host.tool(&format!("ip link show {DEVICE}")).is_ok()))?;
    wait_until("the service is reached again", || Ok(scene.ask(&a.pod, vip).is_ok()))?;
    Ok(())
}
