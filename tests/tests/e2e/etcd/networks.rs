//! Two networks on the same hosts, each with its own prefix, addresses, device and port.

use std::{net::Ipv4Addr, sync::Arc};

use anyhow::{Context, Result, ensure};
use overlay_tests::{
    agent::{Agent, DEVICE, Rung, Site},
    sandbox::Sandbox,
    switch::{HUB, Host, Switch},
    topology::Endpoint,
    traffic::{ping::ping_with_ttl, steady::without_loss, udp::every_size},
};

use super::{arguments, server::Server, wait_until};
use crate::{machine::Need, matrix::needs, suite::Suite};

pub(super) fn register(suite: &mut Suite) {
    let cases: [(Rung, Rung, &[Need]); 3] = [
        (Rung::Tun, Rung::Tun, &[Need::Tun]),
        (Rung::Tc, Rung::Tc, needs(Rung::Tc, Rung::Tc)),
        // A device runs one XDP program, and the tc programs of both networks behind it.
        (Rung::Xdp, Rung::Tc, needs(Rung::Xdp, Rung::Tc)),
    ];
    for (first, second, needs) in cases {
        let name = format!("etcd::two_networks_side_by_side_on_{}_and_{}", first.name(), second.name());
        suite.add(name, needs, move |sandbox| side_by_side(sandbox, first, second));
    }
    let needs = needs(Rung::Xdp, Rung::Tc);
    suite.add("etcd::killed_agents_of_two_networks_leave_each_others_pins_alone", needs, killed);
}

/// One network.
struct Network {
    prefix: &'static str,
    config: &'static str,
    device: &'static str,
    /// The hosts' subnets, in order.
    subnets: [&'static str; 2],
    /// The hosts' overlay addresses.
    addresses: [Ipv4Addr; 2],
}

const FIRST: Network = Network {
    prefix: "/coreos.com/network",
    config: r#"{"Network":"10.244.0.0/16","Backend":{"Type":"udp"}}"#,
    device: DEVICE,
    subnets: ["10.244.1.0/24", "10.244.2.0/24"],
    addresses: [Ipv4Addr::new(10, 244, 1, 0), Ipv4Addr::new(10, 244, 2, 0)],
};
const SECOND: Network = Network {
    prefix: "/blue/network",
    config: r#"{"Network":"10.99.0.0/16","Backend":{"Type":"udp","Port":9285}}"#,
    device: "blue0",
    subnets: ["10.99.7.0/24", "10.99.8.0/24"],
    addresses: [Ipv4Addr::new(10, 99, 7, 0), Ipv4Addr::new(10, 99, 8, 0)],
};

impl Network {
    fn start(&self, sandbox: &Sandbox, server: &Server, switch: &Switch, rung: Rung) -> Result<Vec<Agent>> {
        server.put(&format!("{}/config", self.prefix), self.config.as_bytes(), 0)?;
        let agents = switch.hosts.iter().zip(self.subnets).map(|(host, subnet)| {
            let site = Site::of_device(sandbox, &host.netns, "agent", self.device)?;
            site.start(&self.arguments(server, rung, subnet))
        });
        let agents = agents.collect::<Result<Vec<_>>>()?;
        for agent in &agents {
            wait_until("the other host's route and no more", || Ok(agent.routes()?.routes.len() == 1))?;
        }
        Ok(agents)
    }

    fn arguments(&self, server: &Server, rung: Rung, subnet: &str) -> Vec<String> {
        let mut arguments = arguments(server, rung);
        let more = ["--etcd-prefix", self.prefix, "--subnet", subnet];
        arguments.extend(more.map(str::to_owned));
        arguments
    }

    fn ends<'a>(&self, switch: &'a Switch) -> Result<(Endpoint<'a>, Endpoint<'a>)> {
        let [a, b] = switch.hosts.as_slice() else { anyhow::bail!("not two hosts") };
        let end = |host: &'a Host, address| Endpoint { netns: &host.netns, address };
        let [of_a, of_b] = self.addresses;
        Ok((end(a, of_a), end(b, of_b)))
    }
}

fn side_by_side(sandbox: &Arc<Sandbox>, rung: Rung, other_rung: Rung) -> Result<()> {
    let switch = Switch::build(sandbox, 2)?;
    for host in &switch.hosts {
        // Packets that come through the device of the other network are lost.
        host.netns.tool("sysctl -q -w net.ipv4.conf.all.rp_filter=1")?;
    }
    let server = Server::start(sandbox, &switch.hub, HUB)?;
    let first = FIRST.start(sandbox, &server, &switch, rung)?;
    let second = SECOND.start(sandbox, &server, &switch, other_rung)?;
    let ((a, b), (blue_a, blue_b)) = (FIRST.ends(&switch)?, SECOND.ends(&switch)?);
    for agent in &second {
        let status = agent.status()?;
        ensure!((status.port, status.device.name.as_str()) == (9285, "blue0"), "{status:?}");
    }

    // Both run, then one stops while the other forwards traffic.
    without_loss(a, b, || {
        without_loss(blue_a, blue_b, || every_size(blue_b, blue_a, first_mtu(&second)?))?;
        every_size(b, a, first_mtu(&first)?)?;
        ping_with_ttl(blue_a.netns, blue_b.address, 62)?;
        second.into_iter().try_for_each(Agent::stop)
    })?;
    for host in &switch.hosts {
        let links = host.netns.tool("ip -oneline link")?;
        ensure!(links.contains(" ovl0: ") && !links.contains(" blue0: "), "after the end of one: {links}");
    }
    without_loss(a, b, || every_size(b, a, first_mtu(&first)?))?;
    for agent in &first {
        ensure!(agent.status()?.state == "running", "{}", agent.text("status")?);
        ensure!(agent.status()?.ingress.rung == rung.name(), "{}", agent.text("status")?);
        let counters = agent.counters()?;
        ensure!(counters.wrong_drops().is_empty(), "{:?}", counters.wrong_drops());
        let on_its_rung = if rung.is_fast() { counters.traffic.fast() } else { counters.traffic.slow() };
        ensure!(on_its_rung > 1000, "{counters:?}");
    }
    first.into_iter().try_for_each(Agent::stop)
}

/// All agents are killed. Those of one network start again, and `down` removes what those of the other one left.
fn killed(sandbox: &Arc<Sandbox>) -> Result<()> {
    let switch = Switch::build(sandbox, 2)?;
    let server = Server::start(sandbox, &switch.hub, HUB)?;
    let first = FIRST.start(sandbox, &server, &switch, Rung::Xdp)?;
    let second = SECOND.start(sandbox, &server, &switch, Rung::Tc)?;
    let ((a, b), (blue_a, blue_b)) = (FIRST.ends(&switch)?, SECOND.ends(&switch)?);
    let have_pins = |count: usize, when: &str| {
        switch.hosts.iter().try_for_each(|host| {
            let pins = host.netns.pins()?;
            ensure!(pins.len() == count, "{when}: {pins:?}");
            Ok(())
        })
    };
    let (agents, blue_sites) = without_loss(a, b, || {
        without_loss(blue_a, blue_b, || {
            let sites = first.into_iter().map(Agent::crash).collect::<Result<Vec<_>>>()?;
            let blue_sites = second.into_iter().map(Agent::crash).collect::<Result<Vec<_>>>()?;
            have_pins(2, "killed")?;
            let started = sites.iter().zip(FIRST.subnets);
            let started =
                started.map(|(site, subnet)| site.start(&FIRST.arguments(&server, Rung::Xdp, subnet)));
            let agents = started.collect::<Result<Vec<_>>>()?;
            have_pins(2, "one network's agents run again")?;
            every_size(blue_b, blue_a, 1400)?;
            Ok((agents, blue_sites))
        })
    })?;
    without_loss(a, b, || {
        blue_sites.iter().try_for_each(|site| site.down())?;
        have_pins(1, "the other network is down")?;
        every_size(b, a, first_mtu(&agents)?).map(drop)
    })?;
    agents.into_iter().try_for_each(Agent::stop)?;
    have_pins(0, "all are stopped")
}

fn first_mtu(agents: &[Agent]) -> Result<usize> {
    Ok(agents.first().context("no agent")?.status()?.device.mtu)
}
