//! What operators may choose about packets: the DSCP of outer packets, and how strictly sources are checked.

use std::{
    process::{Command, Stdio},
    sync::Arc,
};

use anyhow::{Context as _, Result, ensure};
use overlay_tests::{
    agent::{Agent, Rung, Site},
    sandbox::Sandbox,
    topology::{NETWORK, PodOffload, Side, Topology, UPLINK, Underlay},
    traffic::ping::ping,
};

use crate::{matrix::needs, suite::Suite, wait::wait_until};

pub(crate) fn register(suite: &mut Suite) {
    for rung in [Rung::Tc, Rung::Tun] {
        suite.add(
            format!("policy::dscp_of_outer_packets_is_chosen_on_{}", rung.name()),
            needs(rung, rung),
            move |sandbox| dscp(sandbox, rung),
        );
    }
    for rung in [Rung::Xdp, Rung::Tc, Rung::Tun] {
        suite.add(
            format!("policy::sources_are_checked_as_chosen_on_{}", rung.name()),
            needs(rung, rung),
            move |sandbox| sources(sandbox, rung),
        );
    }
}

/// Starts an agent without a store that knows one peer.
fn start(sandbox: &Arc<Sandbox>, side: &Side, rung: Rung, peer: &str, flags: &[&str]) -> Result<Agent> {
    let words = [
        "--network",
        NETWORK,
        "--subnet",
        side.subnet,
        "--peer",
        peer,
        "--iface",
        UPLINK,
        "--datapath",
        rung.name(),
    ];
    let arguments: Vec<_> = words.iter().chain(flags).map(|word| (*word).to_owned()).collect();
    Site::new(sandbox, &side.host, &format!("agent-{}", side.name))?.start(&arguments)
}

/// The TOS of the next outer packet that leaves while the container pings, as tcpdump prints it.
fn outer_tos(topology: &Topology, inner: &str) -> Result<String> {
    let mut command = Command::new("timeout");
    command.args([
        "10",
        "tcpdump",
        "-n",
        "-v",
        "-l",
        "-c",
        "1",
        "-i",
        UPLINK,
        "src 192.168.77.1 and udp dst port 8285",
    ]);
    let capture =
        topology.a.host.spawn(command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()))?;
    let mut request = Command::new("ping");
    request.args([
        "-n",
        "-c",
        "20",
        "-i",
        "0.2",
        "-w",
        "5",
        "-Q",
        inner,
        &topology.b.pod_address.to_string(),
    ]);
    let pinging =
        topology.a.pod.spawn(request.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()))?;
    let printed = capture.wait_with_output().context("wait for tcpdump")?;
    pinging.wait_with_output().context("wait for ping")?;
    let text = String::from_utf8_lossy(&printed.stdout).into_owned();
    let (_, rest) = text.split_once("tos ").with_context(|| format!("no TOS in {text:?}"))?;
    Ok(rest.split(',').next().unwrap_or_default().to_owned())
}

fn dscp(sandbox: &Arc<Sandbox>, rung: Rung) -> Result<()> {
    for (flag, inner, expected) in
        [("copy", "0xb8", "0xb8"), ("10", "0xb8", "0x28"), ("10", "0xb9", "0x29"), ("0", "0xb8", "0x0")]
    {
        let topology = Topology::build(sandbox, Underlay::Virtual, PodOffload::On)?;
        let a = start(sandbox, &topology.a, rung, "10.244.2.0/24=192.168.77.2", &["--dscp", flag])?;
        let b = start(sandbox, &topology.b, rung, "10.244.1.0/24=192.168.77.1", &[])?;
        let tos = outer_tos(&topology, inner)?;
        ensure!(tos.starts_with(expected), "--dscp {flag}: a packet with TOS {inner} leaves with {tos}");
        a.stop()?;
        b.stop()?;
    }
    Ok(())
}

/// Host A knows host B by another address than that from which it sends, as behind NAT.
fn sources(sandbox: &Arc<Sandbox>, rung: Rung) -> Result<()> {
    for (flag, known, accepted) in [
        ("strict", "10.244.2.0/24=192.168.77.2", true),
        ("strict", "10.244.2.0/24=192.168.77.77", false),
        ("loose", "10.244.2.0/24=192.168.77.77", true),
        // No peer holds the subnet.
        ("loose", "10.244.3.0/24=192.168.77.3", false),
        ("off", "10.244.3.0/24=192.168.77.3", true),
    ] {
        let topology = Topology::build(sandbox, Underlay::Virtual, PodOffload::On)?;
        let a = start(sandbox, &topology.a, rung, known, &["--source-check", flag])?;
        let b = start(sandbox, &topology.b, rung, "10.244.1.0/24=192.168.77.1", &[])?;
        ping(&topology.b.pod, topology.a.pod_address, 3)?;
        let arrived = |counters: &overlay_tests::report::Counters| {
            counters.traffic.ingress_fast_packets + counters.traffic.ingress_slow_packets
        };
        let dropped = |counters: &overlay_tests::report::Counters| {
            ["spoofed_source", "unknown_source"]
                .iter()
                .filter_map(|reason| counters.drops.get(*reason))
                .sum::<u64>()
        };
        wait_until("all packets are counted", || {
            let counters = a.counters()?;
            Ok(arrived(&counters) + dropped(&counters) >= 3)
        })?;
        let counters = a.counters()?;
        let right = if accepted { dropped(&counters) == 0 } else { arrived(&counters) == 0 };
        ensure!(right, "--source-check {flag} with {known}: {counters:?}");
        a.stop()?;
        b.stop()?;
    }
    Ok(())
}
