//! An agent that starts before etcd and the config, and one that is stopped while it waits.

use std::{process::Command, sync::Arc};

use anyhow::{Result, ensure};
use overlay_tests::{
    agent::{Agent, Rung, Site},
    sandbox::Sandbox,
    topology::{NETWORK, PodOffload, Topology, Underlay},
};

use super::{arguments, config, key, server::Server, value, wait_for_log};
use crate::{machine::Need, snapshot::Snapshot, suite::Suite, wait::wait_until};

const VXLAN: &str = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#;
const NO_CONFIG: &str = "waiting: there is no network config yet at /coreos.com/network/config";

pub(super) fn register(suite: &mut Suite) {
    let tun: &[Need] = &[Need::Tun];
    suite.add("etcd::agent_waits_for_etcd_and_for_the_config", tun, agent_waits);
    suite.add("etcd::a_waiting_agent_stops_immediately_and_leaves_nothing", tun, waiting_agent_ends);
}

struct Fixture {
    server: Server,
    site: Arc<Site>,
    topology: Topology,
}

impl Fixture {
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
    let mut fixture = Fixture::build(sandbox)?;
    let no_etcd = format!("waiting: cannot reach etcd at {}", fixture.server.endpoint());
    let mut agent = fixture.site.launch(fixture.command())?;
    wait_for_log(&fixture.site, &no_etcd)?;
    ensure!(!fixture.site.log().contains(NO_CONFIG), "it reports the content of an etcd that does not run");
    fixture.server.restart()?;
    wait_for_log(&fixture.site, NO_CONFIG)?;
    ensure!(agent.is_running()?, "it ended without a config");
    // One that cannot be used is as good as none.
    for (broken, reason) in [("{", "not a JSON object"), (VXLAN, "\"vxlan\"")] {
        fixture.server.write_config(broken)?;
        wait_for_log(&fixture.site, reason)?;
        ensure!(agent.is_running()?, "it ended because of the config {broken}");
        let status = agent.state()?;
        let reported = status.problems.iter().any(|problem| problem.contains(reason));
        ensure!(status.state == "starting" && reported, "status reports {status:?}");
    }
    ensure!(fixture.server.records()?.is_empty(), "it took a subnet without a config");
    fixture.server.write_config(&config(NETWORK))?;
    agent.wait_until_running()?;
    let record = fixture.server.record(&key(fixture.topology.a.subnet))?.map(|record| record.value);
    ensure!(record == Some(value(fixture.topology.a.underlay)), "the agent runs with the record {record:?}");
    // Each reason is logged once.
    for reason in [no_etcd.as_str(), NO_CONFIG] {
        let count = fixture.site.log().matches(reason).count();
        ensure!(count == 1, "`{reason}` was logged {count} times:\n{}", fixture.site.log_tail());
    }
    agent.stop()
}

fn waiting_agent_ends(sandbox: &Arc<Sandbox>) -> Result<()> {
    let mut fixture = Fixture::build(sandbox)?;
    let before = Snapshot::take(&fixture.topology.a.host)?;
    let agent = fixture.site.launch(fixture.command())?;
    wait_for_log(&fixture.site, "waiting: cannot reach etcd")?;
    ends_without_trace(&fixture, agent, &before)?;

    fixture.server.restart()?;
    let agent = fixture.site.launch(fixture.command())?;
    wait_for_log(&fixture.site, NO_CONFIG)?;
    ends_without_trace(&fixture, agent, &before)?;
    // `status` and `down` find a waiting agent.
    let mut agent = fixture.site.launch(fixture.command())?;
    wait_for_log(&fixture.site, NO_CONFIG)?;
    let status = agent.state()?;
    let reported = status.problems.iter().any(|problem| problem.contains(NO_CONFIG));
    ensure!(status.state == "starting" && reported, "status reports {status:?}");
    fixture.site.down()?;
    wait_until("the agent has ended", || Ok(!agent.is_running()?))?;
    before.is_unchanged(&fixture.topology.a.host)?;
    let left = fixture.server.below("/")?;
    ensure!(left.is_empty(), "it left {left:?} in etcd");
    Ok(())
}

fn ends_without_trace(fixture: &Fixture, agent: Agent, before: &Snapshot) -> Result<()> {
    agent.stop()?;
    before.is_unchanged(&fixture.topology.a.host)?;
    for path in [fixture.site.socket(), fixture.site.subnet_file()] {
        ensure!(!path.exists(), "{} is left", path.display());
    }
    Ok(())
}
