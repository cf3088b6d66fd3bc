//! Other programs change what the agent made: it notices at once and repairs it.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use overlay_tests::{
    agent::Rung,
    netns::Netns,
    pair::Pair,
    sandbox::Sandbox,
    topology::{NETWORK, OVERLAY_MTU, PodOffload, Topology, Underlay},
    traffic::{ping::ping, udp::every_size},
};

use crate::{faults, matrix::needs, privileges, suite::Suite, wait::wait_until};

/// Changes of the overlay device. Each shows in the output of `ip` until it is repaired.
const CHANGES: [&str; 9] = [
    "ip link set ovl0 alias mine",
    "ip link set ovl0 name foo",
    "ip route delete 10.244.0.0/16",
    "ip route replace 10.244.0.0/16 dev veth0",
    "ip route prepend 10.244.0.0/16 dev veth0",
    "ip address add 10.99.0.1/32 dev ovl0",
    "ip link set ovl0 mtu 1000",
    "ip link set ovl0 down",
    "ip address flush dev ovl0",
];
/// How often each is made. All together have the time of one wait: the agent acts on the kernel's messages, and does not wait for
/// its next periodic check, of which each change would need one.
const REPEATS: usize = 2;
/// How often the device is moved away.
const MOVES: usize = 3;
/// How often a program is detached: so often that the periodic check of everything would take longer than one wait.
const DETACHED: usize = 12;

pub(crate) fn register(suite: &mut Suite) {
    for rung in [Rung::Xdp, Rung::Tc, Rung::Tun] {
        let name = format!("repair::changes_of_the_overlay_device_are_repaired_at_once_on_{}", rung.name());
        suite.add(name, needs(rung, rung), move |sandbox| repairs(sandbox, rung));
        let name = format!("repair::a_device_moved_to_another_namespace_is_made_again_on_{}", rung.name());
        suite.add(name, needs(rung, rung), move |sandbox| moved(sandbox, rung));
    }
    suite.add("repair::detached_links_are_attached_again", needs(Rung::Xdp, Rung::Xdp), |sandbox| {
        let pair = faults::pair(sandbox, Rung::Xdp)?;
        let detach = |words| move |pair: &Pair| privileges::detach(&pair.a, words);
        detached(
            &pair,
            &[
                ("ovl_ingress on eth0", &detach("(ingress)")),
                ("ovl_egress on ovl0", &detach("(egress)")),
                ("ovl_xdp on eth0", &detach("link_type:\txdp")),
            ],
        )
    });
    suite.add("repair::removed_clsact_qdiscs_are_made_again", needs(Rung::Tc, Rung::Tc), |sandbox| {
        let pair = faults::clsact_pair(sandbox)?;
        let remove = |device| {
            move |pair: &Pair| {
                pair.topology.a.host.tool(&format!("tc qdisc delete dev {device} clsact")).map(drop)
            }
        };
        detached(&pair, &[("ovl_ingress on eth0", &remove("eth0")), ("ovl_egress on ovl0", &remove("ovl0"))])
    });
}

/// What others can change about the device and its route.
fn shown(host: &Netns) -> Result<String> {
    // There is none while it has another name.
    let Ok(link) = host.tool("ip -oneline link show dev ovl0") else { return Ok(String::new()) };
    let address = host.tool("ip -4 -oneline address show dev ovl0")?;
    let route = host.tool(&format!("ip route show {NETWORK}"))?;
    Ok(format!("{link} {address} {route}"))
}

fn repairs(sandbox: &Arc<Sandbox>, rung: Rung) -> Result<()> {
    let topology = Topology::build(sandbox, Underlay::Virtual, PodOffload::On)?;
    let pair = Pair::start(sandbox, topology, rung, rung)?;
    let host = &pair.topology.a.host;
    let before = shown(host)?;
    let mut changes = CHANGES.iter().cycle().take(CHANGES.len() * REPEATS);
    wait_until("all changes are repaired, one after the other", || {
        if shown(host)? != before {
            return Ok(false);
        }
        let Some(change) = changes.next() else { return Ok(true) };
        host.tool(change)?;
        ensure!(shown(host)? != before, "`{change}` changes nothing that is compared");
        Ok(false)
    })
    .with_context(|| format!("it was {before}, and is {:?}", shown(host)))?;
    let (from, to) = pair.topology.pods();
    every_size(from, to, OVERLAY_MTU)?;
    let status = pair.a.status()?;
    ensure!(status.state == "running", "{status:?}");
    let log = pair.a.site().log();
    ensure!(log.contains("another program changed this host; repaired: "), "{}", pair.a.site().log_tail());
    pair.a.stop()?;
    pair.b.stop()
}

fn moved(sandbox: &Arc<Sandbox>, rung: Rung) -> Result<()> {
    let topology = Topology::build(sandbox, Underlay::Virtual, PodOffload::On)?;
    let pair = Pair::start(sandbox, topology, rung, rung)?;
    let (host, (from, to)) = (&pair.topology.a.host, pair.topology.pods());
    let mut moves = 0;
    wait_until("each device is replaced, one after the other", || {
        // Until it is replaced there is none to move.
        if ping(from.netns, to.address, 1)?.received == 0 {
            return Ok(false);
        }
        if moves == MOVES {
            return Ok(true);
        }
        let other = Netns::create(sandbox, &format!("other{moves}"))?;
        host.tool(&format!("ip link set ovl0 netns {}", other.name()))?;
        moves += 1;
        Ok(false)
    })
    .with_context(|| format!("after {moves} moves: {:?}", pair.a.state()))?;
    every_size(from, to, OVERLAY_MTU)?;
    let status = pair.a.status()?;
    ensure!(status.state == "running" && status.ingress.rung == rung.name(), "{status:?}");
    ensure!(pair.a.site().log().contains("repaired: device ovl0"), "{}", pair.a.site().log_tail());
    pair.a.stop()?;
    pair.b.stop()
}

/// A program on a device as the log names it, and how to detach it.
type Detaching<'a> = (&'static str, &'a dyn Fn(&Pair) -> Result<()>);

fn detached(pair: &Pair, programs: &[Detaching]) -> Result<()> {
    let mut steps = programs.iter().cycle().take(DETACHED).enumerate();
    let mut expected = None;
    wait_until("all programs are attached again, one after the other", || {
        let repaired = |(round, program): (usize, &str)| {
            pair.a.site().log().matches(&format!("repaired: program {program}")).count() > round
        };
        if expected.is_some_and(|step| !repaired(step)) {
            return Ok(false);
        }
        let Some((step, (program, detach))) = steps.next() else { return Ok(true) };
        detach(pair)?;
        expected = Some((step / programs.len(), program));
        Ok(false)
    })
    .with_context(|| format!("{expected:?}; {}", pair.a.site().log_tail()))?;
    let (from, to) = pair.topology.pods();
    every_size(from, to, OVERLAY_MTU)?;
    let status = pair.a.status()?;
    ensure!(status.state == "running", "{status:?}");
    Ok(())
}
