//! Agents on a real etcd: how they find each other through it, outlive it, and behave when it says what nobody expects.

mod credentials;
mod crowd;
mod flanneld;
mod health;
mod networks;
mod outage;
mod records;
mod server;
mod subnets;
mod waiting;

use std::{net::Ipv4Addr, sync::Arc};

use anyhow::{Context, Result};
use overlay_tests::{
    agent::{Agent, Rung, Site},
    sandbox::Sandbox,
    topology::{NETWORK, PodOffload, Side, Topology, UPLINK, Underlay},
};

use crate::{wait::wait_until, suite::Suite};
use server::Server;

pub(crate) fn register(suite: &mut Suite) {
    outage::register(suite);
    waiting::register(suite);
    crowd::register(suite);
    subnets::register(suite);
    records::register(suite);
    networks::register(suite);
    credentials::register(suite);
    flanneld::register(suite);
    health::register(suite);
}

/// The reference topology with etcd on host A and an agent on each host, both with a subnet of their pods. They end before
/// what they run on, in the order of the fields.
struct Scene {
    a: Agent,
    b: Agent,
    server: Server,
    topology: Topology,
}

impl Scene {
    fn start(sandbox: &Arc<Sandbox>, rung_a: Rung, rung_b: Rung) -> Result<Self> {
        let topology = Topology::build(sandbox, Underlay::Virtual, PodOffload::On)?;
        let server = Server::start(sandbox, &topology.a.host, topology.a.underlay)?;
        server.write_config(&config(NETWORK))?;
        let a = start(sandbox, &topology.a, &server, rung_a)?;
        let b = start(sandbox, &topology.b, &server, rung_b)?;
        wait_for_route(&a, topology.b.subnet, topology.b.underlay)?;
        Ok(Self { a, b, server, topology })
    }

    /// Both agents end as they should.
    fn stop(self) -> Result<Server> {
        self.a.stop()?;
        self.b.stop()?;
        Ok(self.server)
    }
}

/// What flannel's `config` says of a network with its usual port.
fn config(network: &str) -> String {
    format!(r#"{{"Network":"{network}","Backend":{{"Type":"udp"}}}}"#)
}

/// What flannel's udp backend writes, byte for byte.
fn value(public_ip: impl Into<Ipv4Addr>) -> String {
    format!(r#"{{"PublicIP":"{}","PublicIPv6":null}}"#, public_ip.into())
}

/// An underlay address that no host here has, unless the test says otherwise.
const fn peer(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(192, 168, 77, number)
}

/// The name of a subnet's record.
fn key(subnet: &str) -> String {
    subnet.replace('/', "-")
}

/// The arguments of an agent that takes what subnet it gets.
fn arguments(server: &Server, rung: Rung) -> Vec<String> {
    let endpoint = server.endpoint();
    let words = ["--etcd-endpoints", &endpoint, "--iface", UPLINK, "--datapath", rung.name()];
    words.map(str::to_owned).into()
}

/// An agent with the subnet of the side's pod.
fn start(sandbox: &Sandbox, side: &Side, server: &Server, rung: Rung) -> Result<Agent> {
    let site = Site::new(sandbox, &side.host, &format!("agent-{}", side.name))?;
    let mut arguments = arguments(server, rung);
    arguments.extend(["--subnet".to_owned(), side.subnet.to_owned()]);
    site.start(&arguments)
}

fn wait_for_route(agent: &Agent, subnet: &str, peer: Ipv4Addr) -> Result<()> {
    wait_until(&format!("a route to {subnet} via {peer}"), || {
        Ok(agent.routes()?.routes.iter().any(|route| route.subnet == subnet && route.peer == peer))
    })
}

/// Waits for words in the log of an agent.
fn wait_for_log(site: &Site, words: &str) -> Result<()> {
    wait_until(&format!("the log says `{words}`"), || Ok(site.log().contains(words)))
        .with_context(|| format!("the end of the log:\n{}", site.log_tail()))
}

/// The lines of a log about routes that were set or removed, sorted.
fn route_lines(log: &str) -> Vec<&str> {
    let said = log.lines().filter_map(|line| line.split_once(" INFO ").map(|(_, said)| said.trim()));
    let mut lines: Vec<_> = said.filter(|said| said.starts_with("route ")).collect();
    lines.sort_unstable();
    lines
}
