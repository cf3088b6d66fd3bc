//! Outages of etcd under traffic; it returns with the same data, with other data, or empty.

use std::{sync::Arc, thread, time::Duration};

use anyhow::{Result, ensure};
use overlay_tests::{
    agent::Rung,
    sandbox::Sandbox,
    topology::{NETWORK, OVERLAY_MTU},
    traffic::{ping::ping_with_ttl, steady::without_loss, udp::every_size},
};

use super::{
    Fixture, config, key, peer, route_lines, start, value, wait_for_log, wait_for_problem, wait_for_route,
    wait_for_state, wait_until,
};
use crate::{matrix::needs, suite::Suite};

pub(super) fn register(suite: &mut Suite) {
    let tc = needs(Rung::Tc, Rung::Tun);
    suite.add("etcd::hosts_find_each_other_and_survive_an_etcd_outage", tc, hosts_survive_outage);
    suite.add("etcd::after_an_outage_only_changed_routes_are_updated", tc, difference_after_outage);
    suite.add("etcd::wiped_data_removes_no_route_and_is_rewritten", tc, wiped_data);
}

fn hosts_survive_outage(sandbox: &Arc<Sandbox>) -> Result<()> {
    let mut fixture = Fixture::start(sandbox, Rung::Tc, Rung::Tun)?;
    let Fixture { a, b, server, topology } = &mut fixture;
    let (from, to) = topology.pods();
    ping_with_ttl(from.netns, to.address, 60)?;
    every_size(from, to, OVERLAY_MTU)?;
    let record = server.record(&key(topology.b.subnet))?.map(|record| record.value);
    ensure!(
        record.as_deref() == Some(&value(topology.b.underlay)),
        "B's record is not what an agent writes: {record:?}"
    );

    // During the outage, no packet and no route is lost, and status reports it.
    without_loss(from, to, || {
        server.kill();
        wait_for_state(a, "degraded")?;
        thread::sleep(Duration::from_secs(2));
        ensure!(a.routes()?.routes.len() == 1, "the outage removed a route");
        server.restart()?;
        wait_for_state(a, "running")
    })?;

    // The agent restores its deleted record.
    server.remove_record(&key(topology.a.subnet))?;
    wait_until("A's record is back", || Ok(server.record(&key(topology.a.subnet))?.is_some()))?;
    wait_for_route(b, topology.a.subnet, topology.a.underlay)?;
    ping_with_ttl(from.netns, to.address, 60)?;

    let subnet = key(topology.a.subnet);
    let server = fixture.stop()?;
    ensure!(server.record(&subnet)?.is_some(), "stopping the agent released the subnet");
    Ok(())
}

fn difference_after_outage(sandbox: &Arc<Sandbox>) -> Result<()> {
    let mut fixture = Fixture::start(sandbox, Rung::Tc, Rung::Tun)?;
    let Fixture { a, b, server, topology } = &mut fixture;
    for number in 3..=6 {
        server.put_record(&format!("10.244.{number}.0-24"), value(peer(number)))?;
    }
    for agent in [&*a, &*b] {
        wait_until("five routes", || Ok(agent.routes()?.routes.len() == 5))?;
    }
    let logs_before = [&*a, &*b].map(|agent| agent.site().log().len());
    let (from, to) = topology.pods();
    without_loss(from, to, || {
        server.kill();
        wait_for_state(a, "degraded")?;
        wait_for_state(b, "degraded")?;
        thread::sleep(Duration::from_secs(8));
        // On another port, the agents see neither the changes nor, after compaction, their history.
        server.restart_elsewhere()?;
        server.remove_record("10.244.3.0-24")?;
        server.put_record("10.244.4.0-24", value(peer(40)))?;
        server.put_record("10.244.7.0-24", value(peer(7)))?;
        server.compact()?;
        for agent in [&*a, &*b] {
            ensure!(agent.routes()?.routes.len() == 5, "the outage removed a route");
        }
        server.restart_back()?;
        for agent in [&*a, &*b] {
            wait_for_route(agent, "10.244.7.0/24", peer(7))?;
            wait_for_state(agent, "running")?;
        }
        Ok(())
    })?;
    for (agent, before) in [&*a, &*b].into_iter().zip(logs_before) {
        let log = agent.site().log();
        let changed = route_lines(log.get(before..).unwrap_or_default());
        ensure!(
            changed
                == [
                    "route 10.244.3.0/24 removed",
                    "route 10.244.4.0/24 via 192.168.77.40",
                    "route 10.244.7.0/24 via 192.168.77.7"
                ],
            "after the outage the agent changed {changed:?}"
        );
        ensure!(agent.routes()?.routes.len() == 5, "{:?}", agent.routes()?);
    }
    fixture.stop().map(drop)
}

fn wiped_data(sandbox: &Arc<Sandbox>) -> Result<()> {
    let mut fixture = Fixture::start(sandbox, Rung::Tc, Rung::Tun)?;
    let Fixture { a, b, server, topology } = &mut fixture;
    // A record whose host does not exist.
    server.put_record("10.244.9.0-24", value(peer(9)))?;
    wait_for_route(a, "10.244.9.0/24", peer(9))?;
    wait_for_route(b, "10.244.9.0/24", peer(9))?;
    let routes_before = [a.routes()?, b.routes()?];
    let (from, to) = topology.pods();
    without_loss(from, to, || {
        server.wipe()?;
        wait_for_state(a, "degraded")?;
        // Without a config: the agents already know the network.
        server.restart()?;
        for side in [&topology.a, &topology.b] {
            wait_until("its record is back", || {
                let record = server.record(&key(side.subnet))?.map(|record| record.value);
                Ok(record == Some(value(side.underlay)))
            })?;
        }
        for agent in [&*a, &*b] {
            wait_for_log(agent.site(), "etcd has lost its data")?;
            wait_for_log(agent.site(), "was lost and acquired again")?;
            // Hosts that start now would wait.
            wait_for_problem(agent, "degraded", "the network config at /coreos.com/network/config")?;
        }
        Ok(())
    })?;
    ensure!([a.routes()?, b.routes()?] == routes_before, "the routes changed");
    for agent in [&*a, &*b] {
        let log = agent.site().log();
        let removed = route_lines(&log).into_iter().find(|line| line.ends_with(" removed"));
        ensure!(removed.is_none(), "{removed:?} for a while");
    }

    // With a config, hosts can start again.
    server.write_config(&config(NETWORK))?;
    for agent in [&*a, &*b] {
        wait_for_state(agent, "running")?;
    }
    let Fixture { a, b, server, topology } = fixture;
    a.stop()?;
    let a = start(sandbox, &topology.a, &server, Rung::Tc)?;
    wait_for_route(&a, topology.b.subnet, topology.b.underlay)?;
    let (from, to) = topology.pods();
    ping_with_ttl(from.netns, to.address, 60)?;
    a.stop()?;
    b.stop()
}
