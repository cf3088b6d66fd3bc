//! Agents that take over from an earlier one: its programs while etcd is away, and its lease.

use std::{
    sync::Arc,
    thread,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result, ensure};
use overlay_tests::{
    agent::{Agent, Rung},
    sandbox::Sandbox,
    traffic::numbered,
};

use super::{
    Fixture, arguments, key, peer, value, wait_for_problem, wait_for_route, wait_for_state, wait_until,
};
use crate::{matrix::needs, suite::Suite};

/// Subnets of hosts that do not exist, 10.244.10.0/24 and on.
const OTHERS: usize = 20;

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

/// How many routes the agent has written and removed in the kernel's map, link-layer addresses aside.
fn changes(agent: &Agent) -> Result<[u64; 2]> {
    let changes = agent.counters()?.route_changes;
    let count = |name: &str| changes.get(name).copied().with_context(|| format!("{name}: {changes:?}"));
    Ok([count("written")?, count("removed")?])
}

/// A killed agent starts while etcd is away: routes stay, and when etcd is back, only those are written that differ.
fn start_without_etcd(sandbox: &Arc<Sandbox>) -> Result<()> {
    let Fixture { a, b, mut server, topology } = Fixture::start(sandbox, Rung::Tc, Rung::Tc)?;
    let (from, to) = topology.pods();
    for number in (10..).take(OTHERS) {
        server.put_record(&key(&format!("10.244.{number}.0/24")), value(peer(number)))?;
    }
    let mut arguments = arguments(&server, Rung::Tc);
    arguments.extend(["--subnet", topology.a.subnet, "--on-exit", "keep"].map(str::to_owned));
    let site = Arc::clone(a.site());
    a.stop()?;
    let a = site.start(&arguments)?;
    wait_until("routes to all", || Ok(a.routes()?.routes.len() == OTHERS + 1))?;
    wait_for_route(&b, topology.a.subnet, topology.a.underlay)?;
    ensure!(changes(&a)? == [OTHERS as u64 + 1, 0], "{:?}", changes(&a)?);
    // The snapshot is written a moment after its records are known.
    wait_until("the snapshot has all", || {
        let text = std::fs::read(site.snapshot_file()).unwrap_or_default();
        Ok(String::from_utf8_lossy(&text).contains("10.244.29.0-24"))
    })?;
    let goes_on = format!("forwarding goes on by the {} routes", OTHERS + 1);
    let a = numbered::without_loss(from, to, || {
        let site = a.crash()?;
        server.kill();
        let status = site.try_run("status", &["-o", "json"])?;
        let status: serde_json::Value = serde_json::from_slice(&status.stdout)?;
        let end = status
            .pointer("/frozen/lease_ends")
            .and_then(|end| end.as_str())
            .and_then(|end| humantime::parse_rfc3339(end).ok());
        // A day after the last renewal.
        let hours =
            end.and_then(|end| end.duration_since(SystemTime::now()).ok()).map(|left| left.as_secs() / 3600);
        ensure!(
            hours == Some(23) && status.pointer("/agent").is_some_and(|agent| agent == "absent"),
            "{status}"
        );
        let mut a = site.launch(site.run_command(&arguments))?;
        wait_until("it answers", || Ok(a.state().is_ok_and(|state| state.state == "starting")))?;
        wait_for_problem_while_starting(&a, &goes_on)?;
        // With the snapshot's records.
        // Its main loop answers a moment later on a busy machine.
        wait_until("it starts without etcd", || Ok(a.state().is_ok_and(|state| state.state == "degraded")))?;
        wait_for_problem(&a, "degraded", "the store cannot be read, state is of")?;
        ensure!(a.routes()?.routes.len() == OTHERS + 1, "{:?}", a.routes()?);
        ensure!(changes(&a)? == [0, 0], "without etcd: {:?}", changes(&a)?);
        // On another port, the agents see neither the changes nor, after compaction, their history.
        server.restart_elsewhere()?;
        server.remove_record("10.244.10.0-24")?;
        server.put_record("10.244.11.0-24", value(peer(111)))?;
        server.put_record("10.244.99.0-24", value(peer(99)))?;
        server.compact()?;
        server.restart_back()?;
        a.wait_until_running()?;
        wait_for_route(&a, "10.244.99.0/24", peer(99))?;
        Ok(a)
    })?;
    let routes = a.routes()?.routes;
    ensure!(routes.len() == OTHERS + 1, "{routes:?}");
    ensure!(routes.iter().all(|route| route.subnet != "10.244.10.0/24"), "{routes:?}");
    wait_for_route(&a, "10.244.11.0/24", peer(111))?;
    ensure!(changes(&a)? == [2, 1], "of {} routes, {:?} were written and removed", OTHERS + 1, changes(&a)?);
    let log = site.log();
    // Link-layer addresses may be others by now.
    let taken = format!("took over {} routes of an earlier agent", OTHERS + 1);
    ensure!(log.contains(&taken), "no `{taken}`: {log}");

    // Without a snapshot it waits for etcd.
    arguments.push("--no-snapshot".to_owned());
    let a = numbered::without_loss(from, to, || {
        let site = a.crash()?;
        server.kill();
        let mut a = site.launch(site.run_command(&arguments))?;
        wait_until("it answers", || Ok(a.state().is_ok_and(|state| state.state == "starting")))?;
        wait_for_problem_while_starting(&a, &goes_on)?;
        server.restart()?;
        a.wait_until_running()?;
        Ok(a)
    })?;
    ensure!(changes(&a)? == [0, 0], "{:?}", changes(&a)?);
    Ok(())
}

fn wait_for_problem_while_starting(agent: &Agent, words: &str) -> Result<()> {
    let is_it = |problem: &String| problem.contains(words);
    wait_until(words, || Ok(agent.state().is_ok_and(|state| state.problems.iter().any(is_it))))
        .with_context(|| format!("{:?}", agent.state()))
}
