//! etcd goes away under traffic, and comes back with what it had, with something else, or with nothing.

use std::{sync::Arc, thread, time::Duration};

use anyhow::{Result, ensure};
use overlay_tests::{
    agent::{Agent, Rung},
    sandbox::Sandbox,
    topology::{NETWORK, OVERLAY_MTU},
    traffic::{ping::ping_with_ttl, steady::without_loss, udp::every_size},
};

use super::{Scene, config, key, peer, route_lines, start, value, wait_for_log, wait_for_route, wait_until};
use crate::{matrix::needs, suite::Suite};

pub(super) fn register(suite: &mut Suite) {
    let tc = needs(Rung::Tc, Rung::Tun);
    suite.add("etcd::hosts_find_each_other_and_outlive_etcd", tc, hosts_outlive_etcd);
    suite.add("etcd::after_an_outage_exactly_what_differs_is_changed", tc, difference_after_outage);
    suite.add("etcd::wiped_data_removes_no_route_and_is_written_again", tc, wiped_data);
}

fn wait_for_state(agent: &Agent, state: &str) -> Result<()> {
    wait_until(&format!("status says {state}"), || Ok(agent.status()?.state == state))
}

fn hosts_outlive_etcd(sandbox: &Arc<Sandbox>) -> Result<()> {
    let mut scene = Scene::start(sandbox, Rung::Tc, Rung::Tun)?;
    let Scene { a, b, server, topology } = &mut scene;
    let (from, to) = topology.pods();
    ping_with_ttl(from.netns, to.address, 60)?;
    every_size(from, to, OVERLAY_MTU)?;
    let record = server.record(&key(topology.b.subnet))?.map(|record| record.value);
    ensure!(
        record.as_deref() == Some(&value(topology.b.underlay)),
        "B's record is not what flannel writes: {record:?}"
    );

    // etcd is away under traffic: nothing is lost, nothing is forgotten, and status says so.
    without_loss(from, to, || {
        server.kill();
        wait_for_state(a, "degraded")?;
        thread::sleep(Duration::from_secs(2));
        ensure!(a.routes()?.routes.len() == 1, "a route went with etcd");
        server.restart()?;
        wait_for_state(a, "running")
    })?;

    // Our record is removed under us: it comes back.
    server.remove_record(&key(topology.a.subnet))?;
    wait_until("A's record is back", || Ok(server.record(&key(topology.a.subnet))?.is_some()))?;
    wait_for_route(b, topology.a.subnet, topology.a.underlay)?;
    ping_with_ttl(from.netns, to.address, 60)?;

    let subnet = key(topology.a.subnet);
    let server = scene.stop()?;
    ensure!(server.record(&subnet)?.is_some(), "a normal end gave the subnet away");
    Ok(())
}

fn difference_after_outage(sandbox: &Arc<Sandbox>) -> Result<()> {
    let mut scene = Scene::start(sandbox, Rung::Tc, Rung::Tun)?;
    let Scene { a, b, server, topology } = &mut scene;
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
        // On another port only this test finds it. The agents cannot know what happens there, nor read it up later.
        server.restart_elsewhere()?;
        server.remove_record("10.244.3.0-24")?;
        server.put_record("10.244.4.0-24", value(peer(40)))?;
        server.put_record("10.244.7.0-24", value(peer(7)))?;
        server.compact()?;
        for agent in [&*a, &*b] {
            ensure!(agent.routes()?.routes.len() == 5, "a route went with etcd");
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
    scene.stop().map(drop)
}

fn wiped_data(sandbox: &Arc<Sandbox>) -> Result<()> {
    let mut scene = Scene::start(sandbox, Rung::Tc, Rung::Tun)?;
    let Scene { a, b, server, topology } = &mut scene;
    // The host of this one is gone, as far as anybody can tell.
    server.put_record("10.244.9.0-24", value(peer(9)))?;
    wait_for_route(a, "10.244.9.0/24", peer(9))?;
    wait_for_route(b, "10.244.9.0/24", peer(9))?;
    let routes_before = [a.routes()?, b.routes()?];
    let (from, to) = topology.pods();
    without_loss(from, to, || {
        server.wipe()?;
        wait_for_state(a, "degraded")?;
        // Without a config: the agents know what network they are in.
        server.restart()?;
        for side in [&topology.a, &topology.b] {
            wait_until("its record is back", || {
                let record = server.record(&key(side.subnet))?.map(|record| record.value);
                Ok(record == Some(value(side.underlay)))
            })?;
        }
        for agent in [&*a, &*b] {
            wait_for_log(agent.site(), "etcd has lost its data")?;
            wait_for_log(agent.site(), "was lost and taken again")?;
            wait_for_state(agent, "running")?;
        }
        Ok(())
    })?;
    ensure!([a.routes()?, b.routes()?] == routes_before, "the routes are others than before");
    for agent in [&*a, &*b] {
        let log = agent.site().log();
        let removed = route_lines(&log).into_iter().find(|line| line.ends_with(" removed"));
        ensure!(removed.is_none(), "{removed:?} for a while");
    }

    // With a config, hosts can start again.
    server.write_config(&config(NETWORK))?;
    let Scene { a, b, server, topology } = scene;
    a.stop()?;
    let a = start(sandbox, &topology.a, &server, Rung::Tc)?;
    wait_for_route(&a, topology.b.subnet, topology.b.underlay)?;
    let (from, to) = topology.pods();
    ping_with_ttl(from.netns, to.address, 60)?;
    a.stop()?;
    b.stop()
}
