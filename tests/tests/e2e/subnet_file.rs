//! The subnet file on a file system that cannot be written yet.

use std::{fs, os::unix::net::UnixDatagram, path::Path, process::Command, sync::Arc, time::Duration};

use anyhow::{Context, Result, ensure};
use overlay_tests::{
    agent::{Rung, Site},
    pair::Store,
    sandbox::Sandbox,
    topology::{PodOffload, Topology, Underlay},
};

use crate::{machine::Need, suite::Suite};

const PROBLEM: &str = "container runtimes cannot read this host's subnet";

pub(crate) fn register(suite: &mut Suite) {
    suite.add(
        "subnet_file::read_only_file_system_degrades_a_ready_agent_until_it_is_writable",
        &[Need::Tun],
        read_only,
    );
}

/// The agent runs in its own mount namespace, with an empty file system at `directory` that is read-only.
fn command(site: &Site, arguments: &[String], directory: &Path) -> Command {
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "sh", "-c"]);
    command.arg(r#"mount -t tmpfs -o ro none "$0" && exec "$@""#).arg(directory).arg(site.binary());
    command.args(site.run_command(arguments).get_args());
    command.arg("--subnet-file").arg(directory.join("subnet.env"));
    command
}

fn read_only(sandbox: &Arc<Sandbox>) -> Result<()> {
    let topology = Topology::build(sandbox, Underlay::Virtual, PodOffload::On)?;
    let (store, host) = (Store::create(sandbox)?, &topology.a.host);
    let site = Site::new(sandbox, host, "agent-a")?;
    let directory = sandbox.new_directory("read-only")?;
    let notify = sandbox.new_directory("systemd")?.join("notify");
    let socket = UnixDatagram::bind(&notify).context("listen as systemd does")?;
    socket.set_read_timeout(Some(Duration::from_secs(20)))?;

    let mut command = command(&site, &store.arguments(&topology.a, Rung::Tun), &directory);
    command.env("NOTIFY_SOCKET", &notify);
    let mut agent = site.launch(command)?;
    let mut buffer = [0; 1024];
    loop {
        let length = socket.recv(&mut buffer).context("systemd is not notified of READY=1")?;
        let text = String::from_utf8_lossy(buffer.get(..length).unwrap_or_default()).into_owned();
        if text.contains("READY=1") {
            ensure!(text.contains("STATUS=degraded: ") && text.contains(PROBLEM), "{text}");
            break;
        }
    }
    let state = agent.state()?;
    ensure!(state.state == "degraded", "{state:?}");
    ensure!(state.problems.iter().any(|problem| problem.contains("Read-only file system")), "{state:?}");

    let (pid, path) = (agent.pid(), directory.display());
    host.tool(&format!("nsenter --mount=/proc/{pid}/ns/mnt mount -o remount,rw {path}"))?;
    agent.wait_until_running()?;
    let text = fs::read_to_string(format!("/proc/{pid}/root{path}/subnet.env"));
    let text = text.context("read the subnet file")?;
    ensure!(text.contains("FLANNEL_SUBNET=10.244.1.1/24"), "{text}");
    let log = site.log();
    let lines: Vec<_> = log.lines().filter(|line| line.contains(PROBLEM)).collect();
    ensure!(lines.len() == 2, "not one line at its start and one at its end: {lines:?}");
    agent.stop()
}
