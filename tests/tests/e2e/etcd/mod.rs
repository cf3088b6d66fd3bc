//! Agents on a real etcd: discovery, outages, invalid records, health, and replacement of flanneld.

mod credentials;
mod crowd;
mod flanneld;
pub(crate) mod health;
mod networks;
mod outage;
mod own_record;
mod pinned;
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

use crate::{suite::Suite, wait::wait_until};
pub(crate) use server::{PREFIX, Server};

pub(crate) fn register(suite: &mut Suite) {
    outage::register(suite);
    waiting::register(suite);
    crowd::register(suite);
    subnets::register(suite);
    records::register(suite);
    networks::register(suite);
    own_record::register(suite);
    suite.alone(pinned::register);
    credentials::register(suite);
    flanneld::register(suite);
    health::register(suite);
}

/// The reference topology with etcd on host A and an agent on each host, with the subnets of their pods. The order of the fields
/// stops the agents first.
struct Fixture {
    a: Agent,
    b: Agent,
    server: Server,
    topology: Topology,
}

impl Fixture {
    fn start(sandbox: &Arc<Sandbox>, rung_a: Rung, rung_b: Rung) -> Result<Self> {
        let topology = Topology::build(sandbox, Underlay::Virtual, PodOffload::On)?;
        let server = Server::start(sandbox, &topology.a.host, topology.a.underlay)?;
        server.write_config(&config(NETWORK))?;
        let a = start(sandbox, &topology.a, &server, rung_a)?;
        let b = start(sandbox, &topology.b, &server, rung_b)?;
        wait_for_route(&a, topology.b.subnet, topology.b.underlay)?;
        Ok(Self { a, b, server, topology })
    }

    /// Stops both agents.
    fn stop(self) -> Result<Server> {
        self.a.stop()?;
        self.b.stop()?;
        Ok(self.server)
    }
}

/// flannel's config of a network with the default port.
pub(crate) fn config(network: &str) -> String {
    format!(r#"{{"Network":"{network}","Backend":{{"Type":"udp"}}}}"#)
}

/// The record that an agent writes: as flannel's udp backend, with a note of what its host takes.
pub(crate) fn value(public_ip: impl Into<Ipv4Addr>) -> String {
    let public_ip = public_ip.into();
    format!(
        r#"{{"PublicIP":"{public_ip}","PublicIPv6":null,"BackendData":{{"TakesUnfinishedPackets":true}}}}"#
    )
}

/// An underlay address that no host has by default.
pub(crate) const fn peer(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(192, 168, 77, number)
}

/// The name of a subnet's record.
pub(crate) fn key(subnet: &str) -> String {
    subnet.replace('/', "-")
}

/// The arguments of an agent that acquires any subnet.
pub(crate) fn arguments(server: &Server, rung: Rung) -> Vec<String> {
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

pub(crate) fn wait_for_route(agent: &Agent, subnet: &str, peer: Ipv4Addr) -> Result<()> {
    wait_until(&format!("a route to {subnet} via {peer}"), || {
        Ok(agent.routes()?.routes.iter().any(|route| route.subnet == subnet && route.peer == peer))
    })
}

/// Waits for a state with a problem that contains `words`.
pub(crate) fn wait_for_problem(agent: &Agent, state: &str, words: &str) -> Result<()> {
    wait_until(&format!("{state} with `{words}`"), || {
        let status = agent.status()?;
        Ok(status.state == state && status.problems.iter().any(|problem| problem.contains(words)))
    })
    .with_context(|| format!("{:?}", agent.status()))
}

pub(crate) fn wait_for_state(agent: &Agent, state: &str) -> Result<()> {
    wait_until(state, || Ok(agent.status()?.state == state)).with_context(|| format!("{:?}", agent.status()))
}

/// Waits for a text in the log of an agent.
pub(crate) fn wait_for_log(site: &Site, text: &str) -> Result<()> {
    wait_until(&format!("the log contains `{text}`"), || Ok(site.log().contains(text)))
        .with_context(|| format!("the end of the log:\n{}", site.log_tail()))
}

/// The lines of a log about routes that were set or removed, sorted.
pub(crate) fn route_lines(log: &str) -> Vec<&str> {
    let messages =
        log.lines().filter_map(|line| line.split_once(" INFO ").map(|(_, message)| message.trim()));
    let mut lines: Vec<_> = messages.filter(|message| message.starts_with("route ")).collect();
    lines.sort_unstable();
    lines
}
