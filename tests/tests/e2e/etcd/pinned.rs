//! Agents that take over from an earlier one: its programs while etcd is away, and its lease.

use std::{sync::Arc, thread, time::Duration};

use anyhow::{Context as _, Result, ensure};
use overlay_tests::{agent::Rung, sandbox::Sandbox, traffic::numbered};

use super::{Fixture, arguments, key, wait_for_route, wait_for_state, wait_until};
use crate::{matrix::needs, restart::UNATTENDED, suite::Suite};

pub(super) fn register(suite: &mut Suite) {
    let tc = needs(Rung::Tc, Rung::Tc);
    suite.add("etcd::an_agent_that_starts_while_etcd_is_away_keeps_pinned_routes", tc, start_without_etcd);
    let tun = needs(Rung::Tun, Rung::Tun);
    suite.add(
        "etcd::an_agent_that_takes_over_keeps_the_lease_and_one_that_fails_to_leaves_it",
        tun,
        lease_stays,
    );
}

/// The record and its etcd lease stay as they are, and no other lease is left: the hosts have a record and a claim each.
fn lease_stays(sandbox: &Arc<Sandbox>) -> Result<()> {
    let Fixture { a, b, server, topology } = Fixture::start(sandbox, Rung::Tun, Rung::Tun)?;
    let mut arguments = arguments(&server, Rung::Tun);
    arguments.push("--take-over".to_owned());
    let name = key(topology.a.subnet);
    let before = server.record(&name)?.context("A has no record")?;
    let site = Arc::clone(a.site());
    let check = |what: &str| {
        wait_until(what, || {
            let leases = server.ask(async |client| client.leases().await)?;
            Ok(leases.leases().len() == 4 && server.record(&name)?.as_ref() == Some(&before))
        })
    };
    let (from, to) = topology.pods();
    let mut a = numbered::without_loss(from, to, || {
        let mut next = site.launch(site.run_command(&arguments))?;
        next.wait_until_taken_over()?;
        a.wait_for_end()?;
        check("the lease of the agent that was taken over")?;
        Ok(next)
    })?;
    // The claim is the new agent's when it is killed.
    for moment in [60, 150] {
        let next = site.launch(site.run_command(&arguments))?;
        thread::sleep(Duration::from_millis(moment));
        drop(next.crash()?);
        thread::sleep(Duration::from_millis(500));
        if !a.is_running()? {
            a.wait_for_end()?;
            a = site.start(&arguments)?;
        }
    }
    check("the lease of the agent that goes on")?;
    wait_for_state(&a, "running")?;
    drop(b);
    a.stop()
}

/// A killed agent starts while etcd is away: routes stay, and when etcd is back, none is written again.
fn start_without_etcd(sandbox: &Arc<Sandbox>) -> Result<()> {
    let Fixture { a, b, mut server, topology } = Fixture::start(sandbox, Rung::Tc, Rung::Tc)?;
    let (from, to) = topology.pods();
    let mut arguments = arguments(&server, Rung::Tc);
    arguments.extend(["--subnet", topology.a.subnet, "--on-exit", "keep"].map(str::to_owned));
    let site = Arc::clone(a.site());
    a.stop()?;
    let a = site.start(&arguments)?;
    wait_for_route(&a, topology.b.subnet, topology.b.underlay)?;
    wait_for_route(&b, topology.a.subnet, topology.a.underlay)?;
    let a = numbered::without_loss(from, to, || {
        let site = a.crash()?;
        server.kill();
        let mut a = site.launch(site.run_command(&arguments))?;
        thread::sleep(UNATTENDED);
        ensure!(a.is_running()?, "the agent ended: {}", site.log_tail());
        server.restart()?;
        a.wait_until_running()?;
        Ok(a)
    })?;
    wait_for_route(&a, topology.b.subnet, topology.b.underlay)?;
    let log = a.site().log();
    ensure!(log.contains("took over 1 routes of an earlier agent"), "the agent took nothing over: {log}");
    Ok(())
}
