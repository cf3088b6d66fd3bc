//! What the records say about a host's own subnet: others that contest it, and its own record when it is spoilt.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use overlay_tests::{
    agent::Rung,
    sandbox::Sandbox,
    topology::OVERLAY_MTU,
    traffic::{steady::without_loss, udp::every_size},
};

use super::{
    Fixture, config, key, peer, value, wait_for_problem, wait_for_route, wait_for_state, wait_until,
};
use crate::{matrix::needs, suite::Suite};

pub(super) fn register(suite: &mut Suite) {
    let tun = needs(Rung::Tun, Rung::Tun);
    suite.add("etcd::later_records_for_a_held_subnet_are_reported_by_its_holder", tun, contested);
    suite.add("etcd::own_record_of_another_backend_is_restored", tun, other_backend);
    suite.add("etcd::a_config_that_changes_under_agents_is_reported", tun, changed_config);
}

fn contested(sandbox: &Arc<Sandbox>) -> Result<()> {
    let fixture = Fixture::start(sandbox, Rung::Tun, Rung::Tun)?;
    let Fixture { a, b, server, topology } = &fixture;
    let (from, to) = topology.pods();
    let impostor = value(peer(50));
    without_loss(from, to, || {
        // A key in another spelling names no subnet, although it comes before B's own.
        server.put_record("010.244.2.0-24", &impostor)?;
        // flannel's key of a host with IPv4 and IPv6 names B's subnet, too.
        let dual_stack = "10.244.2.0-24&2001:cafe::-64";
        server.put_record(dual_stack, &impostor)?;
        wait_for_problem(b, "degraded", dual_stack)?;
        wait_until("A skips both", || Ok(a.routes()?.skipped.len() == 2))?;
        wait_for_route(a, topology.b.subnet, topology.b.underlay)?;
        every_size(from, to, OVERLAY_MTU)?;
        server.remove_record(dual_stack)
    })?;
    wait_for_state(b, "running")?;
    // The longest prefix wins: peers send a part of B's packets to another host.
    server.put_record("10.244.2.128-25", &impostor)?;
    wait_for_route(a, "10.244.2.128/25", peer(50))?;
    wait_for_problem(b, "unhealthy", "peers send packets for 10.244.2.128/25")?;
    server.remove_record("10.244.2.128-25")?;
    wait_for_state(b, "running")?;
    fixture.stop().map(drop)
}

fn other_backend(sandbox: &Arc<Sandbox>) -> Result<()> {
    let fixture = Fixture::start(sandbox, Rung::Tun, Rung::Tun)?;
    let Fixture { a, b, server, topology } = &fixture;
    let name = key(topology.b.subnet);
    let before = server.record(&name)?.context("B has no record")?;
    let vxlan = format!(r#"{{"PublicIP":"{}","BackendType":"vxlan"}}"#, topology.b.underlay);
    server.put_record(&name, vxlan)?;
    wait_until("B's record is as it was", || {
        let record = server.record(&name)?.context("B's record is gone")?;
        Ok((&record.value, record.lease) == (&before.value, before.lease))
    })?;
    wait_for_route(a, topology.b.subnet, topology.b.underlay)?;
    let log = b.site().log();
    ensure!(log.contains("overwritten with one of the \"vxlan\" backend"), "{}", b.site().log_tail());
    wait_for_state(b, "running")?;
    let (from, to) = topology.pods();
    every_size(from, to, OVERLAY_MTU)?;
    fixture.stop().map(drop)
}

fn changed_config(sandbox: &Arc<Sandbox>) -> Result<()> {
    let fixture = Fixture::start(sandbox, Rung::Tun, Rung::Tun)?;
    let Fixture { a, b, server, topology } = &fixture;
    let (from, to) = topology.pods();
    let network = overlay_tests::topology::NETWORK;
    let other_port = format!(r#"{{"Network":"{network}","Backend":{{"Type":"udp","Port":4789}}}}"#);
    without_loss(from, to, || {
        for (changed, words) in [
            (other_port.as_str(), "Backend.Port is 4789 and this agent uses 8285"),
            (r#"{"Network":"10.9.0.0/16"}"#, "Network is 10.9.0.0/16"),
            (r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#, "cannot be used any more"),
        ] {
            server.write_config(changed)?;
            for agent in [a, b] {
                wait_for_problem(agent, "degraded", words)?;
            }
            server.write_config(&config(network))?;
            for agent in [a, b] {
                wait_for_state(agent, "running")?;
            }
        }
        Ok(())
    })?;
    fixture.stop().map(drop)
}
