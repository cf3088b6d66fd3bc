//! The overlay is a router to its containers: it says by ICMP why packets do not arrive, and not too often.

use std::{net::Ipv4Addr, process::Command, sync::Arc};

use anyhow::{Context as _, Result, ensure};
use overlay_tests::{
    agent::Rung,
    netns::Netns,
    pair::Pair,
    sandbox::Sandbox,
    topology::{PodOffload, Topology, UPLINK, Underlay},
    traffic::ping::ping_with_ttl,
};

use crate::{
    matrix::{diagnosis, needs},
    suite::Suite,
    wait::wait_until,
};

/// This host, as a traceroute shows it.
const OWN: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 0);
/// The other host.
const PEER: Ipv4Addr = Ipv4Addr::new(10, 244, 2, 0);

pub(crate) fn register(suite: &mut Suite) {
    for (a, b) in
        [(Rung::Xdp, Rung::Xdp), (Rung::Tc, Rung::Tc), (Rung::Tun, Rung::Tun), (Rung::Tc, Rung::Tun)]
    {
        let mix = format!("{}_{}", a.name(), b.name());
        suite.add(format!("icmp::every_hop_is_shown_on_{mix}"), needs(a, b), move |sandbox| {
            every_hop(sandbox, a, b)
        });
    }
    for rung in [Rung::Xdp, Rung::Tc, Rung::Tun] {
        let word = rung.name();
        suite.add(
            format!("icmp::unreachable_destinations_are_reported_on_{word}"),
            needs(rung, rung),
            move |sandbox| unreachable(sandbox, rung),
        );
        suite.add(format!("icmp::path_mtu_is_reported_on_{word}"), needs(rung, rung), move |sandbox| {
            too_long(sandbox, rung)
        });
        suite.add(format!("icmp::a_flood_gets_few_answers_on_{word}"), needs(rung, rung), move |sandbox| {
            flood(sandbox, rung)
        });
    }
}

fn pair(sandbox: &Arc<Sandbox>, a: Rung, b: Rung) -> Result<Pair> {
    Pair::start(sandbox, Topology::build(sandbox, Underlay::Virtual, PodOffload::On)?, a, b)
}

/// What one `ping` shows.
fn ping(from: &Netns, arguments: &str, to: Ipv4Addr) -> Result<String> {
    let words = arguments.split_whitespace();
    let mut command = Command::new("ping");
    command.args(["-n", "-c", "1", "-W", "2"]).args(words).arg(to.to_string()).env("LC_ALL", "C");
    Ok(String::from_utf8_lossy(&from.output(&mut command)?.stdout).into_owned())
}

/// Whether a ping is answered by `from` with `text`.
fn is_answered(shown: &str, from: Ipv4Addr, text: &str) -> bool {
    shown.lines().any(|line| line.starts_with(&format!("From {from} ")) && line.contains(text))
}

fn every_hop(sandbox: &Arc<Sandbox>, a: Rung, b: Rung) -> Result<()> {
    let pair = pair(sandbox, a, b)?;
    let (from, to) = pair.topology.pods();
    let gateway = Ipv4Addr::new(10, 244, 1, 1);
    // The sending host's routing, its end of the overlay, the other end, the receiving host's routing.
    for (ttl, hop) in [(1, gateway), (2, OWN), (3, PEER), (4, PEER)] {
        let shown = ping(from.netns, &format!("-t {ttl}"), to.address)?;
        ensure!(
            is_answered(&shown, hop, "Time to live exceeded"),
            "TTL {ttl}: {shown}; {}",
            diagnosis(&pair, "traceroute")
        );
    }
    ensure!(ping(from.netns, "-t 5", to.address)?.contains("1 received"), "the destination does not answer");
    let dropped = |agent: &overlay_tests::agent::Agent| -> Result<u64> {
        Ok(agent.counters()?.drops.get("ttl_expired").copied().unwrap_or_default())
    };
    ensure!((dropped(&pair.a)?, dropped(&pair.b)?) == (1, 1), "{}", diagnosis(&pair, "each end drops one"));
    // A host's own packets, too.
    let shown = ping(&pair.topology.a.host, "-t 1", to.address)?;
    ensure!(is_answered(&shown, OWN, "Time to live exceeded"), "{shown}");
    Ok(())
}

fn unreachable(sandbox: &Arc<Sandbox>, rung: Rung) -> Result<()> {
    let pair = pair(sandbox, rung, rung)?;
    let pod = &pair.topology.a.pod;
    let shown = ping(pod, "", Ipv4Addr::new(10, 244, 77, 7))?;
    ensure!(is_answered(&shown, OWN, "Destination Net Unreachable"), "no lease: {shown}");
    // An address of the host's own subnet that no container has is not the overlay's: the host's ARP fails.
    // A peer to which this host has no route, and one that does not answer.
    pair.store.write_lease("10.244.8.0-24", "203.0.113.8")?;
    pair.store.write_lease("10.244.9.0-24", "192.168.77.99")?;
    pair.a.wait_for_routes("three routes", |routes| routes.routes.len() == 3)?;
    let shown = ping(pod, "", Ipv4Addr::new(10, 244, 8, 8))?;
    ensure!(is_answered(&shown, OWN, "Destination Host Unreachable"), "no route: {shown}");
    let routes = pair.a.text("routes")?;
    ensure!(routes.contains("unreachable"), "{routes}");
    // The kernel takes three seconds to give up a neighbour.
    wait_until("the dead peer is reported", || {
        let shown = ping(pod, "-W 4", Ipv4Addr::new(10, 244, 9, 9))?;
        Ok(is_answered(&shown, OWN, "Destination Host Unreachable"))
    })
    .with_context(|| diagnosis(&pair, "a dead peer"))?;
    // A route that appears is followed at once.
    pair.topology.a.host.tool(&format!("ip route add 203.0.113.0/24 via 192.168.77.2 dev {UPLINK}"))?;
    pair.a.wait_for_routes("a way to the peer", |routes| {
        routes.routes.iter().all(|route| route.device.as_deref() == Some(UPLINK))
    })?;
    Ok(())
}

fn too_long(sandbox: &Arc<Sandbox>, rung: Rung) -> Result<()> {
    let pair = pair(sandbox, rung, rung)?;
    let (from, to) = pair.topology.pods();
    let host = &pair.topology.a.host;
    let has_mtu = |mtu: usize| {
        let expected = Some(mtu);
        pair.a.wait_for_routes("the route's MTU", move |routes| {
            routes.routes.iter().all(|route| route.mtu == expected)
        })
    };
    has_mtu(1472)?;
    host.tool(&format!("ip route add 192.168.77.2/32 dev {UPLINK} mtu 1300"))?;
    has_mtu(1272)?;
    // 1272 bytes with the headers of IP and ICMP.
    ensure!(ping(from.netns, "-M do -s 1244", to.address)?.contains("1 received"), "1272 bytes do not pass");
    let shown = ping(from.netns, "-M do -s 1245", to.address)?;
    ensure!(is_answered(&shown, OWN, "Frag needed and DF set (mtu = 1272)"), "{shown}");
    // Without DF, the packet is fragmented: by the agent, for the container does not know of the MTU.
    from.netns.tool("ip route flush cache")?;
    let shown = ping(from.netns, "-M dont -s 1400", to.address)?;
    ensure!(shown.contains("1 received"), "{shown}; {}", diagnosis(&pair, "fragments"));
    host.tool("ip route delete 192.168.77.2/32")?;
    has_mtu(1472)?;
    from.netns.tool("ip route flush cache")?;
    ensure!(ping(from.netns, "-M do -s 1444", to.address)?.contains("1 received"), "1472 bytes do not pass");
    Ok(())
}

fn flood(sandbox: &Arc<Sandbox>, rung: Rung) -> Result<()> {
    let pair = pair(sandbox, rung, rung)?;
    let (pod, nowhere) = (&pair.topology.a.pod, Ipv4Addr::new(10, 244, 77, 7));
    let mut command = Command::new("ping");
    command.args(["-n", "-q", "-i", "0.002", "-c", "1000", &nowhere.to_string()]).env("LC_ALL", "C");
    let output = pod.output(&mut command)?;
    let shown = String::from_utf8_lossy(&output.stdout).into_owned();
    let number = |word: &str| -> Result<u64> {
        let part = shown.lines().flat_map(|line| line.split(", ")).find(|part| part.contains(word));
        part.and_then(|part| {
            part.split_whitespace().find_map(|word| word.trim_start_matches('+').parse().ok())
        })
        .with_context(|| format!("no `{word}` in {shown}"))
    };
    let (sent, errors) = (number("packets transmitted")?, number("errors")?);
    ensure!(sent == 1000 && errors >= 20, "the flood did not happen: {shown}");
    // 20 at once and 10 a second.
    ensure!(errors < sent / 2, "{sent} requests got {errors} answers");
    let counters = pair.a.counters()?;
    let dropped = counters.drops.get("no_route").copied().unwrap_or_default();
    ensure!(dropped == sent, "{sent} requests, {dropped} counted as dropped: {counters:?}");
    ping_with_ttl(pod, pair.topology.b.pod_address, 60).map(drop)
}
