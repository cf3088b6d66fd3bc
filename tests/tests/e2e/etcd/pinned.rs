//! Programs that outlive their agent, while etcd is away.

use std::{sync::Arc, thread};

use anyhow::{Result, ensure};
use overlay_tests::{agent::Rung, sandbox::Sandbox, traffic::numbered};

use super::{Fixture, arguments, wait_for_route};
use crate::{matrix::needs, restart::UNATTENDED, suite::Suite};

pub(super) fn register(suite: &mut Suite) {
    let tc = needs(Rung::Tc, Rung::Tc);
    suite.add("etcd::an_agent_that_starts_while_etcd_is_away_keeps_pinned_routes", tc, start_without_etcd);
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
