//! The demo on etcd: the agent replaces flanneld, with its name and flags, on a real etcd with an outage.

use std::{
    fs,
    os::unix::fs::symlink,
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};

use crate::{
    agent::{Agent, Site},
    demo::Options,
    etcd::Etcd,
    netns::Netns,
    progress::Progress,
    sandbox::Sandbox,
    topology::{NETWORK, PodOffload, Side, Topology, UPLINK},
    traffic::{ping::ping_with_ttl, steady::without_loss, tcp},
    verify::transfer_limit,
};

/// The name in the lines of progress.
const NAME: &str = "flanneld";
/// Bytes of the transfer.
const TCP_BYTES: u64 = 16 << 20;

/// Runs this part and returns its output for the end of the demo.
pub(super) fn run(sandbox: &Arc<Sandbox>, options: &Options, progress: &Progress) -> Result<String> {
    let topology = Topology::build(sandbox, options.underlay, PodOffload::On)?;
    let (a, b) = (&topology.a, &topology.b);
    let mut etcd = Etcd::prepare(sandbox, &a.host, a.underlay)?;
    etcd.restart().context("start etcd")?;
    let endpoint = etcd.endpoint();
    let config = format!(r#"{{"Network":"{NETWORK}","Backend":{{"Type":"udp"}}}}"#);
    run_agent(&a.host, &["config", "set", &config, "--etcd-endpoints", &endpoint])
        .context("write the config")?;
    progress.step(NAME, "etcd on host A, config written", &config);

    let bin = sandbox.new_directory("bin")?;
    let [first, second] = [a, b].map(|side| start(sandbox, side, &bin, &endpoint));
    let (first, second) = (first.context("start on host A")?, second.context("start on host B")?);
    for (agent, peer) in [(&first, b), (&second, a)] {
        agent.wait_for_routes(&format!("a route to {}", peer.subnet), |routes| routes.routes.len() == 1)?;
    }
    let rung = first.status()?.egress.rung;
    progress.step(NAME, "both hosts have a lease and a route", &format!("datapath auto: {rung}"));

    let (from, to) = topology.pods();
    ping_with_ttl(from.netns, to.address, 60).context("ping container to container")?;
    tcp::transfer(from, to, TCP_BYTES, transfer_limit(TCP_BYTES)).context("TCP container to container")?;
    progress.step(NAME, "ping and TCP container to container", "ttl=60, digests equal");

    without_loss(from, to, || {
        etcd.kill();
        let deadline = Instant::now() + Duration::from_secs(20);
        while second.status()?.state != "degraded" {
            ensure!(Instant::now() < deadline, "status does not report that etcd is unreachable");
            thread::sleep(Duration::from_millis(100));
        }
        etcd.restart()
    })
    .context("etcd killed under traffic")?;
    progress.step(NAME, "etcd killed and started again under traffic", "no datagram lost");

    let leases = run_agent(&a.host, &["leases", "--etcd-endpoints", &endpoint])?;
    let subnet_file = fs::read_to_string(first.site().subnet_file()).context("read host A's subnet file")?;
    first.stop()?;
    second.stop()?;
    Ok(format!(
        "In place of flanneld, on etcd: `overlay-agent leases` prints\n{}\nand host A's subnet.env is\n{}",
        indented(&leases),
        indented(&subnet_file)
    ))
}

/// Starts an agent as flanneld's unit file does.
fn start(sandbox: &Sandbox, side: &Side, bin: &Path, endpoint: &str) -> Result<Agent> {
    let site = Site::new(sandbox, &side.host, &format!("flanneld-{}", side.name))?;
    let link = bin.join("flanneld");
    if !link.exists() {
        symlink(site.binary(), &link).with_context(|| format!("link {}", link.display()))?;
    }
    let mut command = Command::new(link);
    command.arg(format!("-etcd-endpoints={endpoint}")).args(["-iface", UPLINK, "-ip-masq=false"]);
    command.arg(format!("-subnet-file={}", site.subnet_file().display()));
    // The containers already have addresses.
    command.env("OVERLAY_AGENT_SUBNET", side.subnet).env("OVERLAY_AGENT_RUN_DIR", site.run_directory());
    command.env("OVERLAY_AGENT_STATE_DIR", site.state_directory());
    command.env_remove("RUST_LOG").stdin(Stdio::null());
    let mut agent = site.launch(command)?;
    agent.wait_until_running()?;
    Ok(agent)
}

/// Runs the agent's binary in a host's namespace.
fn run_agent(host: &Netns, words: &[&str]) -> Result<String> {
    let output = host.output(Command::new(crate::agent::binary()?).args(words))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end().to_owned();
    ensure!(output.status.success(), "overlay-agent {}: {}", words.join(" "), text(&output.stderr));
    Ok(text(&output.stdout))
}

fn indented(text: &str) -> String {
    text.trim_end().lines().map(|line| format!("    {line}")).collect::<Vec<_>>().join("\n")
}
