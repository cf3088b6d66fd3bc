//! Changes that the agent must not undo: while packets are lost, status and `/healthz` say so with the remedy, and the end of it
//! needs no operator.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use overlay_tests::{
    agent::{Agent, Rung, Site},
    netns::Netns,
    pair::{Pair, Store},
    sandbox::Sandbox,
    topology::{NETWORK, OVERLAY_MTU, PodOffload, Side, Topology, UPLINK, Underlay},
    traffic::{ping::ping, udp::every_size},
};

use crate::{
    etcd::health::{HEALTHZ, get},
    matrix::needs,
    suite::Suite,
    wait::wait_until,
};

/// A change of host A, unless its end B is named, that is not the agent's to undo.
struct Change {
    make: &'static [&'static str],
    undo: &'static [&'static str],
    on_b: bool,
    state: &'static str,
    /// Parts of the problem that is reported.
    words: &'static [&'static str],
}

const fn change(make: &'static [&'static str], undo: &'static [&'static str]) -> Change {
    Change { make, undo, on_b: false, state: "unhealthy", words: &[] }
}

const CHANGES: [Change; 10] = [
    Change {
        words: &["the underlay device eth0 is down", "(ip link set eth0 up)"],
        ..change(&["ip link set eth0 down"], &["ip link set eth0 up"])
    },
    Change {
        on_b: true,
        words: &["the underlay device eth0 has no carrier", "cable"],
        ..change(&["ip link set eth0 down"], &["ip link set eth0 up"])
    },
    Change {
        words: &["the device eth0 has no IPv4 address"],
        ..change(&["ip address flush dev eth0"], &["ip address add 192.168.77.1/24 dev eth0"])
    },
    Change {
        state: "degraded",
        words: &["the underlay device is named nic7 now", "start with --iface nic7"],
        ..change(&["ip link set eth0 name nic7"], &["ip link set nic7 name eth0"])
    },
    Change {
        state: "degraded",
        words: &["net.ipv4.ip_forward is 0", "(sysctl -w net.ipv4.ip_forward=1)"],
        ..change(&["sysctl -q -w net.ipv4.ip_forward=0"], &["sysctl -q -w net.ipv4.ip_forward=1"])
    },
    Change {
        state: "degraded",
        words: &["reach this host and not its containers", "(sysctl -w net.ipv4.conf.ovl0.forwarding=1)"],
        ..change(
            &["sysctl -q -w net.ipv4.conf.ovl0.forwarding=0"],
            &["sysctl -q -w net.ipv4.conf.ovl0.forwarding=1"],
        )
    },
    Change {
        state: "degraded",
        words: &["do not reach the overlay", "(sysctl -w net.ipv4.conf.veth0.forwarding=1)"],
        ..change(
            &["sysctl -q -w net.ipv4.conf.veth0.forwarding=0"],
            &["sysctl -q -w net.ipv4.conf.veth0.forwarding=1"],
        )
    },
    Change {
        words: &[
            "packets for 10.244.2.0/24 leave through veth0",
            "(ip route delete 10.244.2.128/25 dev veth0)",
        ],
        ..change(&["ip route add 10.244.2.128/25 dev veth0"], &["ip route delete 10.244.2.128/25 dev veth0"])
    },
    Change {
        words: &["packets from 10.244.1.0 to 10.244.2.0 leave through veth0", "ip rule"],
        ..change(
            &[
                "ip route add default dev veth0 table 77",
                "ip rule add from 10.244.1.0/24 to 10.244.2.0/24 table 77",
            ],
            &["ip rule delete table 77", "ip route flush table 77"],
        )
    },
    // Renamed back once the name is free.
    Change {
        words: &["it was renamed to foo", "a device ovl0 exists that overlay-agent did not make"],
        ..change(
            &["ip link set ovl0 name foo", "ip link add ovl0 type veth peer name ovl1"],
            &["ip link delete ovl0"],
        )
    },
];
/// How often another device takes the name: if each failed attempt delayed the next, these would take minutes.
const FAILURES: usize = 8;

pub(crate) fn register(suite: &mut Suite) {
    for rung in [Rung::Xdp, Rung::Tc, Rung::Tun] {
        let word = rung.name();
        suite.add(
            format!("unrepairable::dead_directions_are_reported_on_{word}"),
            needs(rung, rung),
            move |sandbox| all_changes(sandbox, rung),
        );
        suite.add(
            format!("unrepairable::static_peers_that_know_another_address_are_reported_on_{word}"),
            needs(rung, rung),
            move |sandbox| static_peers(sandbox, rung),
        );
    }
    suite.add(
        "unrepairable::a_change_cuts_the_pause_after_failed_attempts",
        needs(Rung::Tc, Rung::Tc),
        pause_is_cut,
    );
    suite.add(
        "unrepairable::an_agent_that_starts_on_a_dead_link_says_so",
        needs(Rung::Tun, Rung::Tun),
        starts_on_dead_link,
    );
}

fn start(sandbox: &Sandbox, side: &Side, mut arguments: Vec<String>) -> Result<Agent> {
    arguments.extend(["--healthz-ip=127.0.0.1".to_owned(), format!("--healthz-port={HEALTHZ}")]);
    Site::new(sandbox, &side.host, &format!("agent-{}", side.name))?.start(&arguments)
}

fn pair(sandbox: &Arc<Sandbox>, rung: Rung) -> Result<Pair> {
    let topology = Topology::build(sandbox, Underlay::Virtual, PodOffload::On)?;
    let store = Store::create(sandbox)?;
    let a = start(sandbox, &topology.a, store.arguments(&topology.a, rung))?;
    let b = start(sandbox, &topology.b, store.arguments(&topology.b, rung))?;
    let pair = Pair { a, b, store, topology };
    pair.wait_for_peers()?;
    Ok(pair)
}

/// Whether status and `/healthz` of host A are in this state, with these words.
fn reports(agent: &Agent, host: &Netns, state: &str, words: &[&str]) -> Result<bool> {
    let (status, (code, text)) = (agent.state()?, get(host, "/healthz")?);
    let expected = if state == "unhealthy" { 503 } else { 200 };
    let problems = status.problems.join("; ");
    let said = |word: &&str| problems.contains(*word) && text.contains(*word);
    Ok(status.state == state && code == expected && words.iter().all(said))
}

fn is_well(pair: &Pair) -> Result<bool> {
    let (from, to) = pair.topology.pods();
    Ok(reports(&pair.a, &pair.topology.a.host, "running", &[])?
        && ping(from.netns, to.address, 1)?.received == 1)
}

fn run_all(host: &Netns, lines: &[&str]) -> Result<()> {
    lines.iter().try_for_each(|line| host.tool(line).map(drop))
}

/// All together have the time of one wait: the agent does not wait for its periodic check.
fn all_changes(sandbox: &Arc<Sandbox>, rung: Rung) -> Result<()> {
    let pair = pair(sandbox, rung)?;
    let (a, b) = (&pair.topology.a.host, &pair.topology.b.host);
    let (mut changes, mut made) = (CHANGES.iter(), None::<&Change>);
    let mut at: &[&str] = &[];
    let waited = wait_until("all changes are reported, and their ends", || {
        let host = |change: &Change| if change.on_b { b } else { a };
        match made {
            Some(change) if reports(&pair.a, a, change.state, change.words)? => {
                run_all(host(change), change.undo)?;
                made = None;
            }
            None if is_well(&pair)? => {
                let Some(change) = changes.next() else { return Ok(true) };
                at = change.make;
                run_all(host(change), change.make)?;
                made = Some(change);
            }
            Some(_) | None => {}
        }
        Ok(false)
    });
    waited.with_context(|| format!("at {at:?}: {:?}, {:?}", pair.a.state(), get(a, "/healthz")))?;
    let (from, to) = pair.topology.pods();
    every_size(from, to, OVERLAY_MTU)?;
    let rung_now = pair.a.status()?.ingress.rung;
    ensure!(rung_now == rung.name(), "the agent is on {rung_now} at the end");
    pair.a.stop()?;
    pair.b.stop()
}

fn pause_is_cut(sandbox: &Arc<Sandbox>) -> Result<()> {
    let pair = pair(sandbox, Rung::Tc)?;
    let host = &pair.topology.a.host;
    let [.., taken] = &CHANGES;
    let (mut failures, mut is_taken) = (0, false);
    wait_until("each failure ends when its cause does", || {
        if is_taken && reports(&pair.a, host, taken.state, taken.words)? {
            run_all(host, taken.undo)?;
            is_taken = false;
        } else if !is_taken && is_well(&pair)? {
            if failures == FAILURES {
                return Ok(true);
            }
            run_all(host, taken.make)?;
            (is_taken, failures) = (true, failures + 1);
        }
        Ok(false)
    })
    .with_context(|| format!("after {failures} failures: {:?}", pair.a.state()))
}

fn static_arguments(own: &Side, peer: &Side, address: &str, rung: Rung) -> Vec<String> {
    let peer = format!("{}={address}", peer.subnet);
    let words = [
        "--network",
        NETWORK,
        "--subnet",
        own.subnet,
        "--peer",
        &peer,
        "--iface",
        UPLINK,
        "--datapath",
        rung.name(),
    ];
    words.map(str::to_owned).into()
}

fn static_peers(sandbox: &Arc<Sandbox>, rung: Rung) -> Result<()> {
    let Topology { a, b } = Topology::build(sandbox, Underlay::Virtual, PodOffload::On)?;
    let agent = start(sandbox, &a, static_arguments(&a, &b, "192.168.77.2", rung))?;
    let peer = start(sandbox, &b, static_arguments(&b, &a, "192.168.77.1", rung))?;
    let reached = || Ok(ping(&a.pod, b.pod_address, 1)?.received == 1);
    wait_until("containers reach each other", reached)?;
    for command in ["ip address flush dev eth0", "ip address add 192.168.77.9/24 dev eth0"] {
        a.host.tool(command)?;
    }
    let words = ["our address is 192.168.77.9", "--peer 10.244.1.0/24=192.168.77.9"];
    wait_until("the other address is reported", || reports(&agent, &a.host, "unhealthy", &words))
        .with_context(|| format!("{:?}", agent.state()))?;
    peer.stop()?;
    let peer = start(sandbox, &b, static_arguments(&b, &a, "192.168.77.9", rung))?;
    wait_until("containers reach each other again", reached)?;
    // One packet may have arrived before the agent looked.
    wait_until("the problem ends with the peer's packets", || {
        Ok(reached()? && reports(&agent, &a.host, "running", &[])?)
    })
    .with_context(|| format!("{:?}", agent.state()))?;
    every_size(a.pod(), b.pod(), OVERLAY_MTU)?;
    agent.stop()?;
    peer.stop()
}

fn starts_on_dead_link(sandbox: &Arc<Sandbox>) -> Result<()> {
    let topology = Topology::build(sandbox, Underlay::Virtual, PodOffload::On)?;
    let (host, store) = (&topology.a.host, Store::create(sandbox)?);
    topology.b.host.tool("ip link set eth0 down")?;
    let site = Site::new(sandbox, host, "agent-a")?;
    let mut arguments = store.arguments(&topology.a, Rung::Tun);
    arguments.extend(["--healthz-ip=127.0.0.1".to_owned(), format!("--healthz-port={HEALTHZ}")]);
    let agent = site.launch(site.run_command(&arguments))?;
    // It does not answer at once.
    let is = |state, words| reports(&agent, host, state, words).or(Ok(false));
    wait_until("the dead link is reported", || is("unhealthy", &["the underlay device eth0 has no carrier"]))
        .with_context(|| format!("{:?}", agent.state()))?;
    topology.b.host.tool("ip link set eth0 up")?;
    wait_until("the agent runs", || is("running", &[])).with_context(|| format!("{:?}", agent.state()))?;
    agent.stop()
}
