//! The agent in place of flanneld: invoked by its name, with its flags and environment.

use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    process::{Command, Stdio},
    sync::Arc,
};

use anyhow::{Context, Result, ensure};
use overlay_tests::{
    agent::{Agent, Site},
    sandbox::Sandbox,
    switch::{HUB, Host, Switch},
    topology::UPLINK,
    traffic::ping::ping_with_ttl,
};

use super::{server::Server, value, wait_for_route};
use crate::{machine::Need, suite::Suite};

pub(super) fn register(suite: &mut Suite) {
    let tun: &[Need] = &[Need::Tun];
    suite.add("etcd::runs_when_invoked_as_flanneld", tun, invoked_as_flanneld);
}

/// flanneld as a unit file starts it: some flags with one dash, the rest in the environment.
fn flanneld(sandbox: &Sandbox, host: &Host, server: &Server, role: &str) -> Result<(Arc<Site>, Command)> {
    let site = Site::new(sandbox, &host.netns, role)?;
    let link = sandbox.new_directory("bin")?.join("flanneld");
    symlink(site.binary(), &link).with_context(|| format!("link {}", link.display()))?;
    let mut command = Command::new(link);
    command.stdin(Stdio::null()).env_remove("RUST_LOG");
    command.arg("-etcd-prefix=/flannel/network").args(["-iface", UPLINK, "-v", "1"]);
    command.arg("-ip-masq=false").arg(format!("-subnet-file={}", site.subnet_file().display()));
    command.env("FLANNELD_ETCD_ENDPOINTS", server.endpoint());
    command.env("FLANNELD_IFACE", "nosuch0").env("FLANNELD_SUBNET_LEASE_RENEW_MARGIN", "30");
    command.env("OVERLAY_AGENT_STATE_DIR", site.state_directory());
    command.env("OVERLAY_AGENT_RUN_DIR", site.run_directory()).env("OVERLAY_AGENT_DATAPATH", "tun");
    Ok((site, command))
}

fn invoked_as_flanneld(sandbox: &Arc<Sandbox>) -> Result<()> {
    let switch = Switch::build(sandbox, 2)?;
    let server = Server::start(sandbox, &switch.hub, HUB)?;
    let config = r#"{"Network":"10.5.0.0/16","SubnetLen":24,"Backend":{"Type":"UDP","Port":7890}}"#;
    server.put("/flannel/network/config", config.as_bytes(), 0)?;
    let start = |host, role| -> Result<Agent> {
        let (site, command) = flanneld(sandbox, host, &server, role)?;
        let mut agent = site.launch(command)?;
        agent.wait_until_running()?;
        Ok(agent)
    };
    let [first, second] = switch.hosts.as_slice() else { anyhow::bail!("not two hosts") };
    let (a, b) = (start(first, "a")?, start(second, "b")?);

    let subnet = b.status()?.subnet;
    let (base, _) = subnet.split_once('/').context("a subnet without a length")?;
    wait_for_route(&a, &subnet, second.underlay)?;
    wait_for_route(&b, &a.status()?.subnet, first.underlay)?;
    ping_with_ttl(&first.netns, base.parse()?, 62)?;
    ensure!(b.status()?.port == 7890, "{}", b.text("status")?);
    let records = server.below("/flannel/network/subnets/")?;
    ensure!(
        records.len() == 2 && records.iter().any(|record| record.value == value(second.underlay)),
        "{records:?}"
    );

    let file = b.site().subnet_file();
    let gateway = base.strip_suffix('0').context("a subnet that does not end in 0")?;
    let expected = format!(
        "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET={gateway}1/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=false\n"
    );
    let text = fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
    ensure!(text == expected, "the subnet file contains {text}");
    let mode = fs::metadata(&file)?.permissions().mode() & 0o777;
    ensure!(mode == 0o644, "the subnet file has mode {mode:o}");
    a.stop()?;
    b.stop()
}
