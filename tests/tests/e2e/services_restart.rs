//! Services outlive the agent: kill, stop and start again while sockets connect and send to a virtual address.

use std::{
    collections::BTreeSet,
    fs,
    net::{Ipv4Addr, SocketAddrV4, TcpStream, UdpSocket},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use aya::programs::{
    links::{FdLink, PinnedLink},
    loaded_programs,
};
use overlay_tests::{
    agent::{Agent, Rung, Site},
    netns::Netns,
    sandbox::Sandbox,
};
use serde_json::Value;

use crate::{
    machine::Need,
    services::{self, CONFIG, Scene, Servers, TIMEOUT, ask, exchange},
    suite::Suite,
    wait::wait_until,
};

/// Of the endpoints, for TCP and for UDP.
const PORTS: [u16; 2] = [8081, 8082];
/// How long no agent runs.
const PAUSE: Duration = Duration::from_millis(300);
const SERVICE: &str =
    r#"{"name":"shop/web","ports":[{"name":"web","port":80},{"name":"dns","port":53,"protocol":"udp"}]}"#;

pub(crate) fn register(suite: &mut Suite) {
    let needs = &[Need::Tun, Need::Ebpf, Need::CgroupV2];
    suite.add("services_go_on_without_the_agent", needs, without_agent);
    suite.add("services_leave_nothing_that_is_not_wanted", needs, removed);
}

/// Answers each datagram with the port of the endpoint and what it got.
struct UdpServers(Arc<AtomicBool>, Vec<thread::JoinHandle<()>>);

impl UdpServers {
    fn start(pod: &Netns, address: Ipv4Addr) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let mut threads = Vec::new();
        for port in PORTS {
            let socket = pod.run(|| UdpSocket::bind((address, port)))??;
            socket.set_read_timeout(Some(Duration::from_millis(50)))?;
            let stop = Arc::clone(&stop);
            threads.push(thread::spawn(move || {
                let mut buffer = [0; 64];
                while !stop.load(Ordering::Relaxed) {
                    if let Ok((length, client)) = socket.recv_from(&mut buffer) {
                        let question = buffer.get(..length).unwrap_or_default();
                        let _ = socket.send_to(&[&port.to_be_bytes(), question].concat(), client);
                    }
                }
            }));
        }
        Ok(Self(stop, threads))
    }
}

impl Drop for UdpServers {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
        for thread in self.1.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Asks, and returns the port of the endpoint. The answer has to come from the virtual address.
fn ask_by_datagram(socket: &UdpSocket, vip: Ipv4Addr) -> Result<u16> {
    let (question, to): ([u8; 16], _) = (rand::random(), SocketAddrV4::new(vip, 53));
    let sent =
        if socket.peer_addr().is_ok() { socket.send(&question) } else { socket.send_to(&question, to) };
    sent.context("send a datagram")?;
    let mut answer = [0; 64];
    let (length, from) = socket.recv_from(&mut answer).context("wait for the answer to a datagram")?;
    ensure!(from == to.into(), "the answer comes from {from}");
    let [high, low, echo @ ..] = answer.get(..length).unwrap_or_default() else {
        anyhow::bail!("an answer of {length} bytes");
    };
    ensure!(*echo == question, "the answer is not to the question");
    Ok(u16::from_be_bytes([*high, *low]))
}

fn socket() -> Result<UdpSocket> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.set_read_timeout(Some(TIMEOUT))?;
    Ok(socket)
}

/// Two hosts and a service with two endpoints on the second.
struct Stage {
    scene: Scene,
    site: Arc<Site>,
    vip: Ipv4Addr,
    _servers: (Servers, UdpServers),
}

impl Stage {
    fn new(sandbox: &Arc<Sandbox>) -> Result<Self> {
        let mut scene = Scene::start(sandbox, CONFIG, "ebpf")?;
        let b = &scene.topology.b;
        let servers =
            (Servers::start(&b.pod, b.pod_address, &PORTS)?, UdpServers::start(&b.pod, b.pod_address)?);
        let site = Arc::clone(scene.agent.site());
        let arguments = arguments(&scene, "ebpf", "keep");
        scene.agent.stop()?;
        scene.agent = site.start(&arguments)?;
        scene.operate(&["service", "set", SERVICE])?;
        let mut stage = Self { scene, site, vip: Ipv4Addr::UNSPECIFIED, _servers: servers };
        PORTS.into_iter().try_for_each(|port| stage.add(port))?;
        stage.vip = stage.scene.wait_for_name()?;
        wait_until("both endpoints are reached", || {
            let ports: BTreeSet<u16> = (0..2).filter_map(|_| stage.ask().ok()).collect();
            Ok(ports.len() == 2)
        })?;
        Ok(stage)
    }

    fn arguments(&self, lb: &str, on_exit: &str) -> Vec<String> {
        arguments(&self.scene, lb, on_exit)
    }

    fn pod(&self) -> &Arc<Netns> {
        &self.scene.topology.a.pod
    }

    fn ask(&self) -> Result<u16> {
        Ok(self.scene.ask(self.pod(), self.vip)?.0)
    }

    fn add(&self, port: u16) -> Result<()> {
        let address = self.scene.topology.b.pod_address.to_string();
        let (id, web, dns) = (format!("p{port}"), format!("web={port}"), format!("dns={port}"));
        let name = ["endpoint", "add", "shop/web", "--node", "b", "--id", &id, "--address", &address];
        self.scene.operate(&[&name[..], &["--port", &web, "--port", &dns]].concat()).map(drop)
    }

    /// A change of the agent on host A: `work` gets the running one and returns the next.
    fn replace(mut self, work: impl FnOnce(Agent) -> Result<Agent>) -> Result<Self> {
        self.scene.agent = work(self.scene.agent)?;
        Ok(self)
    }

    /// Open TCP connections to the endpoint at a port, as the agent reports them.
    fn open(&self, port: u16) -> Result<u64> {
        let text = self.scene.agent.site().output("service top", &["--once", "-o", "json"])?;
        let document: Value = serde_json::from_str(&text)?;
        let endpoints = document.pointer("/services/0/endpoints").and_then(Value::as_array);
        let is_it = |endpoint: &&Value| {
            let text = |name| endpoint.get(name).and_then(Value::as_str).unwrap_or_default();
            text("protocol") == "tcp" && text("address").ends_with(&format!(":{port}"))
        };
        let endpoint = endpoints.context("no endpoints")?.iter().find(is_it);
        endpoint
            .and_then(|endpoint| endpoint.get("open")?.as_u64())
            .with_context(|| format!("no endpoint {port} in {text}"))
    }

    /// The pins of services of host A.
    fn pins(&self) -> Result<Vec<PathBuf>> {
        let directories = self.scene.topology.a.host.pins()?.into_iter().map(|pins| pins.join("services"));
        Ok(directories.filter(|directory| directory.exists()).collect())
    }

    /// The programs that pinned links run.
    fn programs(&self) -> Result<BTreeSet<u32>> {
        let mut programs = BTreeSet::new();
        for directory in self.pins()? {
            for entry in fs::read_dir(directory)? {
                let entry = entry?;
                if !entry.file_type()?.is_dir() {
                    programs.insert(FdLink::from(PinnedLink::from_pin(entry.path())?).info()?.program_id());
                }
            }
        }
        Ok(programs)
    }
}

fn arguments(scene: &Scene, lb: &str, on_exit: &str) -> Vec<String> {
    let cgroup = scene.cgroup.path().display().to_string();
    let more = ["--lb", lb, "--service-cgroup", &cgroup, "--on-exit", on_exit].map(str::to_owned);
    scene.store.arguments(&scene.topology.a, Rung::Tc).into_iter().chain(more).collect()
}

/// Connects from the container of host A all the time, and with `sends` sends from new sockets and from one that stays, while `work` is done.
/// Nothing may fail.
fn under_load<T>(pod: &Netns, vip: Ipv4Addr, sends: bool, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let (stop, connections, datagrams) = (AtomicBool::new(false), AtomicUsize::new(0), AtomicUsize::new(0));
    let connect = || -> Result<()> {
        pod.run(|| {
            while !stop.load(Ordering::Relaxed) {
                ask(vip)?;
                connections.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        })?
    };
    let send = || -> Result<()> {
        pod.run(|| {
            let kept = socket()?;
            while sends && !stop.load(Ordering::Relaxed) {
                ask_by_datagram(&kept, vip).context("from a socket that stays")?;
                ask_by_datagram(&socket()?, vip).context("from a new socket")?;
                datagrams.fetch_add(2, Ordering::Relaxed);
            }
            Ok(())
        })?
    };
    let done = services::under_load(&stop, &[&connect, &send], work)?;
    let (connections, datagrams) = (connections.into_inner(), datagrams.into_inner());
    println!("{connections} connections and {datagrams} exchanges of datagrams, none failed");
    ensure!(
        connections > 20 && (datagrams > 20) == sends,
        "{connections} connections, {datagrams} datagrams"
    );
    Ok(done)
}

/// The line of the log about what was taken over.
fn taken_over(site: &Site) -> Result<String> {
    let log = site.log();
    let line = log.lines().find(|line| line.contains("took over") && line.contains("virtual ports"));
    line.map(str::to_owned).with_context(|| format!("nothing was taken over:\n{}", site.log_tail()))
}

fn without_agent(sandbox: &Arc<Sandbox>) -> Result<()> {
    let mut stage = Stage::new(sandbox)?;
    let (site, vip, store) = (Arc::clone(&stage.site), stage.vip, stage.scene.directory.clone());
    let arguments = stage.arguments("ebpf", "keep");
    let status = stage.scene.services()?;
    ensure!(status.contains(r#""without_agent":{"forwards":true"#), "{status}");
    let mut kept = Vec::new();
    for _ in 0..4 {
        let address = SocketAddrV4::new(vip, 80).into();
        let mut stream = stage.pod().run(|| TcpStream::connect_timeout(&address, TIMEOUT))??;
        stream.set_read_timeout(Some(TIMEOUT))?;
        kept.push((exchange(&mut stream)?.0, stream));
    }
    let datagrams = stage.pod().run(socket)??;
    ask_by_datagram(&datagrams, vip)?;
    let connected = stage.pod().run(|| -> Result<_> {
        let connect = || -> Result<_> {
            let socket = socket()?;
            socket.connect((vip, 53))?;
            let port = ask_by_datagram(&socket, vip)?;
            Ok((port, socket))
        };
        Ok([connect()?, connect()?])
    })??;
    let on = |port: u16, kept: &[(u16, TcpStream)]| kept.iter().filter(|(of, _)| *of == port).count() as u64;

    // Kill, stop, and kills at any point of a start.
    let (pod, host) = (Arc::clone(stage.pod()), Arc::clone(&stage.scene.topology.a.host));
    stage = under_load(&pod, vip, true, || {
        stage.replace(|agent| {
            agent.crash()?;
            thread::sleep(PAUSE);
            let agent = site.start(&arguments)?;
            wait_until("the agent has taken over", || Ok(taken_over(&site).is_ok()))?;
            let line = taken_over(&site)?;
            ensure!(line.contains("took over 2 virtual ports") && line.contains("and 0 of them"), "{line}");
            agent.stop()?;
            host.tool("ip link show svc0").context("the device of virtual addresses stays")?;
            thread::sleep(PAUSE);
            for pause in [60, 120, 180, 240, 300, 400, 500] {
                let agent = site.launch(site.run_command(&arguments))?;
                thread::sleep(Duration::from_millis(pause));
                agent.crash()?;
            }
            let agent = site.start(&arguments)?;
            wait_until("the agent has taken over", || Ok(taken_over(&site).is_ok()))?;
            Ok(agent)
        })
    })?;
    let line = taken_over(&site)?;
    ensure!(line.contains("took over 2 virtual ports") && line.contains("and 0 of them"), "{line}");
    for (port, stream) in &mut kept {
        ensure!(exchange(stream)?.0 == *port, "an open connection has moved");
    }
    ask_by_datagram(&datagrams, vip).context("from a socket of the first agent's time")?;
    for port in PORTS {
        wait_until("the connections are counted that are open", || Ok(stage.open(port)? == on(port, &kept)))?;
    }

    // An endpoint leaves while no agent runs. Its connections stay, and are known when it comes back.
    stage = stage.replace(|agent| {
        agent.crash()?;
        services::operate(&store, &["endpoint", "remove", "shop/web/b/p8081"])?;
        let agent = site.start(&arguments)?;
        wait_until("the agent has taken over", || Ok(taken_over(&site).is_ok()))?;
        let line = taken_over(&site)?;
        ensure!(line.contains("took over 2 virtual ports") && line.contains("and 2 of them"), "{line}");
        Ok(agent)
    })?;
    for (port, socket) in &connected {
        let is_lost = *port == 8081;
        wait_until("connected UDP sockets follow", || Ok(socket.peer_addr().is_err() == is_lost))?;
    }
    for _ in 0..4 {
        ensure!(stage.ask()? == 8082, "a connection goes to the endpoint that has left");
    }
    stage = stage.replace(|agent| {
        agent.crash()?;
        site.start(&arguments)
    })?;
    stage.add(8081)?;
    wait_until("the endpoint is back", || Ok(stage.ask()? == 8081))?;
    wait_until("its connections are counted", || Ok(stage.open(8081)? == on(8081, &kept)))?;
    kept.clear();
    for port in PORTS {
        wait_until("no connection is open", || Ok(stage.open(port)? == 0))?;
    }

    // A part is missing: all maps are made again, and no connection meets them before they are filled. Datagrams that are on their way then
    // are answered from the endpoint's address.
    let maps = stage.pins()?.first().context("no pins")?.join("v1");
    stage = under_load(&pod, vip, false, || {
        stage.replace(|agent| {
            agent.crash()?;
            fs::remove_file(maps.join("SLOTS"))?;
            let agent = site.start(&arguments)?;
            wait_until("the maps are made again", || {
                Ok(site.log().contains("SLOTS is missing") && maps.join("SLOTS").exists())
            })?;
            thread::sleep(PAUSE);
            Ok(agent)
        })
    })?;

    // What `down` leaves, and what it must leave.
    let programs = stage.programs()?;
    ensure!(programs.len() == 10, "{} programs are pinned", programs.len());
    let pins = stage.pins()?;
    let own = pins.first().and_then(|services| services.parent()).context("no pins")?;
    let foreign = own.to_str().context("a path")?.replace("ovl0", "ovl7");
    fs::create_dir_all(format!("{foreign}/services/v1"))?;
    site.down()?;
    ensure!(host.pins()? == [PathBuf::from(&foreign)], "{:?}", host.pins()?);
    ensure!(host.tool("ip link show svc0").is_err(), "svc0 is left");
    are_gone(&programs)
}

/// The kernel frees programs a moment after their last reference is gone.
fn are_gone(programs: &BTreeSet<u32>) -> Result<()> {
    wait_until("the programs are gone", || {
        let loaded: BTreeSet<u32> = loaded_programs().flatten().map(|program| program.id()).collect();
        Ok(programs.is_disjoint(&loaded))
    })
}

/// Other options of the next start, and `--on-exit remove`.
fn removed(sandbox: &Arc<Sandbox>) -> Result<()> {
    let mut stage = Stage::new(sandbox)?;
    let (site, vip, pod) = (Arc::clone(&stage.site), stage.vip, Arc::clone(stage.pod()));
    for (lb, on_exit) in [("proxy", "keep"), ("off", "keep")] {
        let [first, next] = [stage.arguments("ebpf", "keep"), stage.arguments(lb, on_exit)];
        stage = stage.replace(|agent| {
            agent.crash()?;
            site.start(&first)
        })?;
        wait_until("the programs are pinned", || Ok(stage.programs()?.len() == 10))?;
        let programs = stage.programs()?;
        stage = stage.replace(|agent| {
            agent.stop()?;
            site.start(&next)
        })?;
        wait_until("nothing is pinned", || Ok(stage.pins()?.is_empty()))?;
        are_gone(&programs)?;
        let device = stage.scene.topology.a.host.tool("ip link show svc0");
        ensure!(device.is_ok() == (lb == "proxy"), "svc0 with --lb {lb}");
        ensure!(pod.run(|| ask(vip))?.is_ok() == (lb == "proxy"), "with --lb {lb}");
    }
    let last = stage.arguments("ebpf", "remove");
    stage = stage.replace(|agent| {
        agent.crash()?;
        site.start(&last)
    })?;
    wait_until("the programs are pinned", || Ok(stage.programs()?.len() == 10))?;
    let Scene { agent, topology, .. } = stage.scene;
    agent.stop()?;
    ensure!(topology.a.host.pins()?.is_empty(), "{:?}", topology.a.host.pins()?);
    ensure!(topology.a.host.tool("ip link show svc0").is_err(), "svc0 is left");
    Ok(())
}
