//! Where traffic and DNS are measured: two hosts with agents, a container behind each, and services on a directory store.
//!
//! One agent offers both ways of balancing (`--lb auto`), so all systems share hosts, links and agents: a process in the cgroup of its
//! eBPF programs has its connections translated, one outside of it reaches the proxy, and both reach the endpoint's own address.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddrV4},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};

use super::{
    clients,
    servers::{self, Servers},
    traffic::System,
};
use crate::{
    agent::{Agent, Rung, Site},
    cgroup::Cgroup,
    netns::Netns,
    pair::Store,
    sandbox::Sandbox,
    topology::{PodOffload, Topology, Underlay},
};

/// The network's config.
const CONFIG: &str = r#"{"Network":"10.244.0.0/16","Services":{"Pool":"10.251.0.0/16"}}"#;
/// The virtual address of the service with all servers.
const VIP: Ipv4Addr = Ipv4Addr::new(10, 251, 0, 1);
/// The address of the node's DNS server: the last one of the pool that is no broadcast address.
pub(super) const DNS: Ipv4Addr = Ipv4Addr::new(10, 251, 255, 254);
/// Names for the part DNS.
pub(super) const NAMES: u8 = 200;
/// The kernel's default, whatever this machine's is: BBR paces a stream by timers and by the round trip that it has seen, so that on hosts
/// that share CPUs it measures the scheduler.
const CONGESTION_CONTROL: &str = "/proc/sys/net/ipv4/tcp_congestion_control";
/// How long the agent may take to have the services.
const TIMEOUT: Duration = Duration::from_secs(30);

/// The parts. The order of the fields stops agents before their namespaces are removed.
pub(super) struct Scene {
    /// The agent on host A, which balances.
    pub(super) agent: Agent,
    _other: Agent,
    servers: Servers,
    pub(super) topology: Topology,
    // Behind the agents, whose programs are attached to it.
    cgroup: Cgroup,
}

impl Scene {
    /// Builds hosts, starts agents and servers, and checks that each system takes the way that it is named after.
    pub(super) fn start(sandbox: &Arc<Sandbox>) -> Result<Self> {
        let cgroup = Cgroup::create("bench")?;
        let topology = Topology::build(sandbox, Underlay::Virtual, PodOffload::On)?;
        for side in [&topology.a, &topology.b] {
            for netns in [&side.host, &side.pod] {
                netns
                    .run(|| fs::write(CONGESTION_CONTROL, "cubic"))?
                    .context("choose the congestion control")?;
            }
        }
        let store = Store::create(sandbox)?;
        publish(&store, topology.b.pod_address)?;
        let path = cgroup.path().display().to_string();
        let agent = start(sandbox, &topology.a, &store, &["--lb", "auto", "--service-cgroup", &path])?;
        let other = start(sandbox, &topology.b, &store, &["--lb", "off"])?;
        agent.wait_for_routes("the other host", |routes| routes.routes.len() == 1)?;
        let servers = Servers::start(&topology.b.pod, topology.b.pod_address)?;
        let scene = Self { agent, _other: other, servers, topology, cgroup };
        await_services(&scene.agent, usize::from(NAMES) + 1, 1)?;
        for system in System::ALL {
            scene.check(system).with_context(|| format!("connect by {}", system.name()))?;
        }
        Ok(scene)
    }

    /// The client's namespace.
    pub(super) fn client(&self) -> &Netns {
        &self.topology.a.pod
    }

    /// Puts this process where a system needs it, and returns where to connect to.
    pub(super) fn enter(&self, system: System, port: u16) -> Result<SocketAddrV4> {
        match system {
            System::Ebpf => self.cgroup.join()?,
            System::Direct | System::Proxy => self.cgroup.leave()?,
        }
        let address = if system == System::Direct { self.topology.b.pod_address } else { VIP };
        Ok(SocketAddrV4::new(address, port))
    }

    /// Puts this process outside of the cgroup.
    pub(super) fn leave(&self) -> Result<()> {
        self.cgroup.leave()
    }

    /// The endpoint sees the container, except where the proxy of its host is between.
    fn check(&self, system: System) -> Result<()> {
        let to = self.enter(system, servers::ECHO)?;
        let expected = match system {
            System::Direct | System::Ebpf => self.topology.a.pod_address,
            System::Proxy => self.topology.a.host_address,
        };
        let deadline = Instant::now() + TIMEOUT;
        loop {
            // A service without endpoints yet refuses.
            let asked = self.client().run(|| clients::connect_once(to))?;
            if asked.is_ok() && self.servers.last_client() == expected {
                return Ok(());
            }
            ensure!(
                Instant::now() < deadline,
                "the endpoint was reached from {} instead of {expected}: {asked:?}",
                self.servers.last_client()
            );
            thread::sleep(Duration::from_millis(20));
        }
    }
}

fn start(
    sandbox: &Arc<Sandbox>,
    side: &crate::topology::Side,
    store: &Store,
    more: &[&str],
) -> Result<Agent> {
    let site = Site::new(sandbox, &side.host, &format!("agent-{}", side.name))?;
    let mut arguments = store.arguments(side, Rung::Tc);
    arguments.extend(more.iter().map(|word| (*word).to_owned()));
    site.start(&arguments)
}

/// The name of a service for DNS, and its virtual address.
pub(super) fn name(number: u8) -> (String, Ipv4Addr) {
    (format!("s-{number}.dns.svc.overlay"), Ipv4Addr::new(10, 251, 1, number))
}

/// Writes all records. The virtual addresses are assigned already, as in a network that has been running.
fn publish(store: &Store, endpoint: Ipv4Addr) -> Result<()> {
    store.write("config", CONFIG)?;
    let port = |name: &str, port: u16, protocol: &str| {
        format!(r#"{{"name":"{name}","port":{port},"protocol":"{protocol}"}}"#)
    };
    let ports = [
        port("stream", servers::STREAM, "tcp"),
        port("echo", servers::ECHO, "tcp"),
        port("udp", servers::UDP, "udp"),
        port("http", servers::HTTP, "tcp"),
    ];
    store.write("services/bench/all", &format!(r#"{{"v":1,"ports":[{}]}}"#, ports.join(",")))?;
    store.write(&format!("vips/{VIP}"), "bench/all")?;
    store.write("endpoints/bench/all/b/1", &format!(r#"{{"overlay_ip":"{endpoint}"}}"#))?;
    for number in 0..NAMES {
        let ports = port("web", 80, "tcp");
        store.write(&format!("services/dns/s-{number}"), &format!(r#"{{"v":1,"ports":[{ports}]}}"#))?;
        store.write(&format!("vips/{}", name(number).1), &format!("dns/s-{number}"))?;
    }
    Ok(())
}

/// Waits until an agent's status has so many services and endpoints: by then, its maps are filled.
pub(super) fn await_services(agent: &Agent, services: usize, endpoints: usize) -> Result<()> {
    let deadline = Instant::now() + TIMEOUT;
    loop {
        let status: serde_json::Value =
            serde_json::from_str(&agent.site().output("status", &["-o", "json"])?)
                .context("read the status")?;
        let count =
            |field: &str| status.pointer(&format!("/services/{field}")).and_then(serde_json::Value::as_u64);
        if count("services") == Some(services as u64) && count("endpoints") == Some(endpoints as u64) {
            return Ok(());
        }
        ensure!(
            Instant::now() < deadline,
            "the agent has {:?} instead of {services} services with {endpoints} endpoints; the end of its log:\n{}",
            status.pointer("/services"),
            agent.site().log_tail()
        );
        thread::sleep(Duration::from_millis(20));
    }
}
