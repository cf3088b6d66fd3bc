//! Many hosts: simultaneous start on a network with exactly as many subnets, and two hosts with one address.

use std::{collections::BTreeSet, sync::Arc};

use anyhow::{Context, Result, ensure};
use overlay_tests::{
    agent::{Agent, Rung, Site},
    sandbox::Sandbox,
    switch::{HUB, Host, Switch},
    topology::{Endpoint, NETWORK},
    traffic::{ping::ping_with_ttl, steady::without_loss},
};

use super::{arguments, config, key, server::Server, value, wait_for_log, wait_for_route, wait_until};
use crate::{machine::Need, suite::Suite};

const HOSTS: u8 = 40;
/// As many subnets as hosts.
const CONFIG: &str = r#"{"Network":"10.244.0.0/16","SubnetMin":"10.244.1.0","SubnetMax":"10.244.40.0"}"#;

pub(super) fn register(suite: &mut Suite) {
    let tun: &[Need] = &[Need::Tun];
    suite.add("etcd::forty_hosts_at_once_share_a_network_of_forty_subnets", tun, forty_hosts);
    suite.add("etcd::a_second_host_with_the_same_public_address_is_refused", tun, same_public_ip);
}

fn site(sandbox: &Sandbox, host: &Host) -> Result<Arc<Site>> {
    Site::new(sandbox, &host.netns, "agent")
}

/// The host with the overlay address that its agent gave it.
fn overlay<'a>(host: &'a Host, agent: &Agent) -> Result<Endpoint<'a>> {
    let subnet = agent.status()?.subnet;
    let address = subnet.split('/').next().context("a subnet without a length")?.parse()?;
    Ok(Endpoint { netns: &host.netns, address })
}

fn forty_hosts(sandbox: &Arc<Sandbox>) -> Result<()> {
    // One host more than subnets.
    let switch = Switch::build(sandbox, HOSTS + 1)?;
    let server = Server::start(sandbox, &switch.hub, HUB)?;
    server.write_config(CONFIG)?;
    let (late, crowd) = switch.hosts.split_last().context("there are no hosts")?;
    let launch = |host| {
        let site = site(sandbox, host)?;
        site.launch(site.run_command(&arguments(&server, Rung::Tun)))
    };
    let mut agents = crowd.iter().map(launch).collect::<Result<Vec<_>>>()?;
    for agent in &mut agents {
        agent.wait_until_running()?;
    }

    let mut subnets = BTreeSet::new();
    for (agent, host) in agents.iter().zip(crowd) {
        let subnet = agent.status()?.subnet;
        let record = server.record(&key(&subnet))?.map(|record| record.value);
        ensure!(record == Some(value(host.underlay)), "{subnet} of {} has {record:?}", host.underlay);
        subnets.insert(subnet);
    }
    ensure!(subnets.len() == agents.len(), "{} hosts share {subnets:?}", agents.len());
    for agent in &agents {
        wait_until("39 routes", || Ok(agent.routes()?.routes.len() == agents.len() - 1))?;
        ensure!(agent.routes()?.skipped.is_empty(), "{:?}", agent.routes()?.skipped);
    }
    for (number, from) in crowd.iter().enumerate().step_by(8) {
        let to = (number + 1) % agents.len();
        let (to, agent) = (crowd.get(to).context("no host")?, agents.get(to).context("no agent")?);
        ping_with_ttl(&from.netns, overlay(to, agent)?.address, 62)?;
    }

    let late = site(sandbox, late)?;
    let error = late.refused(late.run_command(&arguments(&server, Rung::Tun)))?;
    ensure!(error.contains("the network 10.244.0.0/16 is full"), "{error}");
    ensure!(error.contains("SubnetMax"), "the error names no remedy: {error}");
    ensure!(server.records()?.len() == agents.len(), "the refusal changed the records");
    agents.into_iter().try_for_each(Agent::stop)
}

fn same_public_ip(sandbox: &Arc<Sandbox>) -> Result<()> {
    let switch = Switch::build(sandbox, 3)?;
    let server = Server::start(sandbox, &switch.hub, HUB)?;
    server.write_config(&config(NETWORK))?;
    let [first, other, twin] = switch.hosts.as_slice() else { anyhow::bail!("not three hosts") };
    let arguments = arguments(&server, Rung::Tun);
    let a = site(sandbox, first)?.start(&arguments)?;
    let b = site(sandbox, other)?.start(&arguments)?;
    wait_for_route(&b, &a.status()?.subnet, first.underlay)?;
    wait_for_route(&a, &b.status()?.subnet, other.underlay)?;
    let before = server.records()?;

    let twin = site(sandbox, twin)?;
    let mut same = arguments.clone();
    same.extend(["--public-ip".to_owned(), first.underlay.to_string()]);
    let error =
        without_loss(overlay(first, &a)?, overlay(other, &b)?, || twin.refused(twin.run_command(&same)))?;
    ensure!(error.contains("192.168.77.1 is already in use by another agent"), "{error}");
    ensure!(error.contains("--public-ip"), "the error names no remedy: {error}");
    ensure!(server.records()? == before, "the refusal changed the records: {:?}", server.records()?);
    ensure!(a.status()?.state == "running", "the first agent is not running: {}", a.text("status")?);

    // A stopped agent releases its address, and another host can use it immediately, with its subnet.
    let subnet = a.status()?.subnet;
    a.stop()?;
    let heir = twin.start(&same)?;
    ensure!(heir.status()?.subnet == subnet, "{} is not {subnet}", heir.status()?.subnet);
    wait_for_log(&twin, &format!("192.168.77.1 is {subnet}"))?;
    heir.stop()?;
    b.stop()
}
