//! A host keeps its subnet across restarts and the loss of its lease, unless another host acquired it.

use std::{fs, os::unix::fs::MetadataExt, sync::Arc, thread, time::Duration};

use anyhow::{Context, Result, ensure};
use overlay_tests::{
    agent::{Agent, Rung, Site},
    sandbox::Sandbox,
    topology::{NETWORK, OVERLAY_MTU, PodOffload, Topology, Underlay},
    traffic::{ping::ping_with_ttl, steady, udp::every_size},
};

use super::{
    Fixture, arguments, config, key, peer,
    server::{PREFIX, Server},
    start, value, wait_for_log, wait_for_route, wait_until,
};
use crate::{datapath::attached, machine::Need, matrix::needs, suite::Suite};

pub(super) fn register(suite: &mut Suite) {
    let tc = needs(Rung::Tc, Rung::Tun);
    suite.add("etcd::a_restarted_agent_keeps_its_subnet", &[Need::Tun], restart_keeps_subnet);
    suite.add("etcd::a_paused_agent_yields_to_the_new_owner", tc, paused_agent_yields);
    suite.add("etcd::a_revoked_lease_is_acquired_again", tc, revoked_lease_is_acquired_again);
}

fn restart_keeps_subnet(sandbox: &Arc<Sandbox>) -> Result<()> {
    let topology = Topology::build(sandbox, Underlay::Virtual, PodOffload::On)?;
    let server = Server::start(sandbox, &topology.a.host, topology.a.underlay)?;
    server.write_config(&config(NETWORK))?;
    let site = Site::new(sandbox, &topology.a.host, "agent")?;
    let arguments = arguments(&server, Rung::Tun);
    let subnet_of = |agent: &Agent| anyhow::Ok(agent.status()?.subnet);

    let agent = site.start(&arguments)?;
    let subnet = subnet_of(&agent)?;
    let record = server.record(&key(&subnet))?.context("the agent runs without a record")?;
    agent.stop()?;

    // By the record with its address, without the file.
    let file = site.subnet_file();
    let text = fs::read_to_string(&file).context("read the subnet file")?;
    fs::remove_file(&file).context("remove the subnet file")?;
    let agent = site.start(&arguments)?;
    ensure!(subnet_of(&agent)? == subnet, "{} is not {subnet}", subnet_of(&agent)?);
    ensure!(server.record(&key(&subnet))?.as_ref() == Some(&record), "a correct record was rewritten");
    ensure!(fs::read_to_string(&file)? == text, "the subnet file changed: {text}");

    // Also after a crash, without waiting for the expiry of the old claim on the address.
    agent.crash()?;
    let agent = site.start(&arguments)?;
    ensure!(subnet_of(&agent)? == subnet, "{} is not {subnet}", subnet_of(&agent)?);
    agent.stop()?;

    // By the file, when the record expired while the agent was down.
    server.revoke(record.lease)?;
    ensure!(server.records()?.is_empty(), "the record outlived its lease");
    let agent = site.start(&arguments)?;
    ensure!(subnet_of(&agent)? == subnet, "{} is not {subnet}", subnet_of(&agent)?);
    let again = server.record(&key(&subnet))?.context("the agent runs without a record")?;
    ensure!(again.value == record.value && again.lease != record.lease, "{again:?} after {record:?}");
    agent.stop()?;

    // Not by the file when another host holds the subnet.
    server.revoke(again.lease)?;
    server.put_record(&key(&subnet), value(peer(99)))?;
    let agent = site.start(&arguments)?;
    ensure!(subnet_of(&agent)? != subnet, "another host holds {subnet}");
    agent.stop()
}

/// Revokes an agent's claims on its subnet and on its address, which has the same effect as their expiry.
fn expire(server: &Server, subnet: &str) -> Result<()> {
    let claims =
        [format!("{PREFIX}/subnets/{}", key(subnet)), format!("{PREFIX}/overlay-agent/owners/192.168.77.1")];
    for claim in claims {
        let lease = server.below(&claim)?.first().with_context(|| format!("there is no {claim}"))?.lease;
        server.revoke(lease)?;
    }
    Ok(())
}

/// A fixture without --subnet for A, which uses the subnet of its record. With --subnet, an agent waits for that subnet.
fn without_wishes(sandbox: &Arc<Sandbox>) -> Result<Fixture> {
    let topology = Topology::build(sandbox, Underlay::Virtual, PodOffload::On)?;
    let server = Server::start(sandbox, &topology.a.host, topology.a.underlay)?;
    server.write_config(&config(NETWORK))?;
    let (subnet, lease) = (key(topology.a.subnet), server.grant()?);
    server.put(&format!("{PREFIX}/subnets/{subnet}"), value(topology.a.underlay).as_bytes(), lease)?;
    let site = Site::new(sandbox, &topology.a.host, "agent-a")?;
    let a = site.start(&arguments(&server, Rung::Tc))?;
    let b = start(sandbox, &topology.b, &server, Rung::Tun)?;
    wait_for_route(&a, topology.b.subnet, topology.b.underlay)?;
    Ok(Fixture { a, b, server, topology })
}

fn paused_agent_yields(sandbox: &Arc<Sandbox>) -> Result<()> {
    let fixture = without_wishes(sandbox)?;
    let Fixture { a, b, server, topology } = &fixture;
    let (host, old) = (&topology.a.host, topology.a.subnet);
    let programs = attached(&topology.a)?;
    a.pause()?;
    expire(server, old)?;
    let theirs = server.grant()?;
    server.put(&format!("{PREFIX}/subnets/{}", key(old)), value(peer(99)).as_bytes(), theirs)?;
    let record = server.record(&key(old))?.context("the new owner has no record")?;
    a.resume()?;

    wait_for_log(a.site(), &format!("no longer {old}"))?;
    // Containers of the old subnet would keep its packets here: the agent says so until they are gone.
    wait_until("the containers' device is reported", || {
        Ok(a.status()?.problems.iter().any(|problem| problem.contains("leave through veth0")))
    })?;
    host.tool("ip address flush dev veth0")?;
    wait_until("the agent runs with another subnet", || {
        Ok(a.status().is_ok_and(|status| status.subnet != old && status.state == "running"))
    })?;
    let subnet = a.status()?.subnet;
    let (base, _) = subnet.split_once('/').context("a subnet without a length")?;
    let log = a.site().log();
    ensure!(log.contains(&format!("our subnet is {subnet} now, no longer {old}")), "{log}");
    ensure!(log.contains("192.168.77.99"), "the log does not name the new owner: {log}");
    ensure!(server.record(&key(&subnet))?.map(|record| record.value) == Some(value(topology.a.underlay)));

    let addresses = host.tool("ip -4 -oneline address show dev ovl0")?;
    ensure!(
        addresses.lines().count() == 1 && addresses.contains(&format!("inet {base}/32")),
        "ovl0 has {addresses}"
    );
    let routes = host.tool("ip -4 route show dev ovl0")?;
    ensure!(routes.contains(NETWORK) && routes.contains(&format!("src {base}")), "ovl0 has {routes}");
    let gateway = base.strip_suffix('0').context("a subnet that does not end in 0")?;
    let line = format!("FLANNEL_SUBNET={gateway}1/24");
    wait_until(&format!("the subnet file contains {line}"), || {
        Ok(fs::read_to_string(a.site().subnet_file())?.lines().any(|found| found == line))
    })?;
    wait_for_route(a, old, peer(99))?;
    wait_for_route(b, old, peer(99))?;
    wait_for_route(b, &subnet, topology.a.underlay)?;
    ping_with_ttl(&topology.b.host, base.parse()?, 62)?;
    ensure!(attached(&topology.a)? == programs, "programs were attached again: {programs:?}");

    // Everything that was due during the pause is done, and the new owner's record is unchanged.
    thread::sleep(Duration::from_secs(1));
    ensure!(server.record(&key(old))?.as_ref() == Some(&record), "{:?}", server.record(&key(old))?);
    fixture.stop().map(drop)
}

fn revoked_lease_is_acquired_again(sandbox: &Arc<Sandbox>) -> Result<()> {
    let fixture = Fixture::start(sandbox, Rung::Tc, Rung::Tun)?;
    let Fixture { a, b, server, topology } = &fixture;
    let subnet = topology.a.subnet;
    let file = fs::metadata(a.site().subnet_file()).context("read the metadata of the subnet file")?;
    let lost = server.record(&key(subnet))?.context("the agent runs without a record")?;
    let (from, to) = topology.pods();
    let ((), flow) = steady::meanwhile(from, to, || {
        thread::sleep(Duration::from_millis(300));
        server.revoke(lost.lease)?;
        wait_for_log(a.site(), &format!("the lease of {subnet} was lost and acquired again"))?;
        wait_until("the record is back", || Ok(server.record(&key(subnet))?.is_some()))?;
        wait_for_route(b, subnet, topology.a.underlay)?;
        thread::sleep(Duration::from_secs(1));
        Ok(())
    })?;
    // B has no route between the end of the old record and the new one: one or two packets may be lost.
    ensure!(flow.lost <= 2 && flow.answered > 20, "{flow:?}");
    every_size(from, to, OVERLAY_MTU)?;
    let again = server.record(&key(subnet))?.context("the record is missing again")?;
    ensure!(again.value == lost.value && again.lease != lost.lease, "{again:?} after {lost:?}");
    let now = fs::metadata(a.site().subnet_file()).context("read the metadata of the subnet file")?;
    ensure!(
        (now.ino(), now.mtime_nsec()) == (file.ino(), file.mtime_nsec()),
        "the subnet file was written again"
    );
    ensure!(a.status()?.state == "running", "{}", a.text("status")?);
    fixture.stop().map(drop)
}
