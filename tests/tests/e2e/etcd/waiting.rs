//! An agent that is started before what it needs, and one that is told to end while it waits.

use std::{process::Command, sync::Arc};

use anyhow::{Result, ensure};
use overlay_tests::{
    agent::{Agent, Rung, Site},
    sandbox::Sandbox,
    topology::{NETWORK, PodOffload, Topology, Underlay},
};

use super::{arguments, config, key, server::Server, value, wait_for_log};
use crate::{machine::Need, wait::wait_until, snapshot::Snapshot, suite::Suite};

const NO_CONFIG: &str = "waiting: there is no /coreos.com/network/config in etcd yet";

pub(super) fn register(suite: &mut Suite) {
    let tun: &[Need] = &[Need::Tun];
    suite.add("etcd::agent_waits_for_etcd_and_for_the_config", tun, agent_waits);
    suite.add("etcd::a_waiting_agent_ends_at_once_and_leaves_nothing", tun, waiting_agent_ends);
}

struct Stage {
    server: Server,
    site: Arc<Site>,
    topology: Topology,
}

impl Stage {
    /// etcd is not started yet.
    fn build(sandbox: &Arc<Sandbox>) -> Result<Self> {
        let topology = Topology::build(sandbox, Underlay::Virtual, PodOffload::On)?;
        let server = Server::prepare(sandbox, &topology.a.host, topology.a.underlay)?;
        let site = Site::new(sandbox, &topology.a.host, "agent")?;
        Ok(Self { server, site, topology })
    }

    fn command(&self) -> Command {
        let mut arguments = arguments(&self.server, Rung::Tun);
        arguments.extend(["--subnet".to_owned(), self.topology.a.subnet.to_owned()]);
        self.site.run_command(&arguments)
    }
}

fn agent_waits(sandbox: &Arc<Sandbox>) -> Result<()> {
    let mut stage = Stage::build(sandbox)?;
    let no_etcd = format!("waiting: cannot reach etcd at {}", stage.server.endpoint());
    let mut agent = stage.site.begin(stage.command())?;
    wait_for_log(&stage.site, &no_etcd)?;
    ensure!(!stage.site.log().contains(NO_CONFIG), "it knows what is in an etcd that does not run");
    stage.server.restart()?;
    wait_for_log(&stage.site, NO_CONFIG)?;
    ensure!(agent.is_running()?, "it ended for want of a config");
    ensure!(stage.server.records()?.is_empty(), "it took a subnet without a config");
    stage.server.write_config(&config(NETWORK))?;
    agent.wait_until_running()?;
    let record = stage.server.record(&key(stage.topology.a.subnet))?.map(|record| record.value);
    ensure!(record == Some(value(stage.topology.a.underlay)), "the agent runs with the record {record:?}");
    // What it waits for is said once, however often it asks.
    for reason in [no_etcd.as_str(), NO_CONFIG] {
        let said = stage.site.log().matches(reason).count();
        ensure!(said == 1, "`{reason}` was said {said} times:\n{}", stage.site.log_tail());
    }
    agent.stop()
}

fn waiting_agent_ends(sandbox: &Arc<Sandbox>) -> Result<()> {
    let mut stage = Stage::build(sandbox)?;
    let before = Snapshot::take(&stage.topology.a.host)?;
    let agent = stage.site.begin(stage.command())?;
    wait_for_log(&stage.site, "waiting: cannot reach etcd")?;
    ends_without_trace(&stage, agent, &before)?;

    stage.server.restart()?;
    let agent = stage.site.begin(stage.command())?;
    wait_for_log(&stage.site, NO_CONFIG)?;
    ends_without_trace(&stage, agent, &before)?;
    // `status` and `down` find one that waits, too.
    let mut agent = stage.site.begin(stage.command())?;
    wait_for_log(&stage.site, NO_CONFIG)?;
    let answer = agent.status().err().map(|error| format!("{error:#}")).unwrap_or_default();
    ensure!(answer.contains("there is no /coreos.com/network/config"), "status says {answer}");
    stage.site.down()?;
    wait_until("the agent has ended", || Ok(!agent.is_running()?))?;
    before.is_unchanged(&stage.topology.a.host)?;
    let left = stage.server.below("/")?;
    ensure!(left.is_empty(), "it left {left:?} in etcd");
    Ok(())
}

fn ends_without_trace(stage: &Stage, agent: Agent, before: &Snapshot) -> Result<()> {
    agent.stop()?;
    before.is_unchanged(&stage.topology.a.host)?;
    for path in [stage.site.socket(), stage.site.subnet_file()] {
        ensure!(!path.exists(), "{} is left", path.display());
    }
    Ok(())
}
