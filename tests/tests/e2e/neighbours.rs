//! The fast path sends to hardware addresses that it was told: it follows the kernel's neighbours at once, under traffic.

use std::{process::Command, sync::Arc, thread, time::Duration};

use anyhow::{Context as _, Result, ensure};
use overlay_tests::{
    agent::{Agent, Rung},
    netns::Netns,
    pair::Pair,
    router::{self, Router},
    sandbox::Sandbox,
    topology::{PodOffload, Topology, UPLINK, Underlay},
    traffic::{
        ping::ping_with_ttl,
        steady::{self, Flow},
        tcp,
    },
    verify::transfer_limit,
};

use crate::{
    matrix::{diagnosis, needs},
    suite::Suite,
    wait::wait_until,
};

const TCP_BYTES: u64 = 8 << 20;
/// Another hardware address for a device that had one of the kernel's choice.
const OTHER_MAC: &str = "02:00:5e:00:77:99";
/// Time in which the kernel gives up a neighbour that does not answer, with the settings of [`hurry`]: 3 seconds until it doubts, 1
/// until it asks, 0.6 until it gives up, and some for a busy machine.
const GIVE_UP: Duration = Duration::from_secs(8);
/// Time between a change of routes and the end of the old gateway. Regular looks at the routes come later than this.
const TAKEOVER: Duration = Duration::from_millis(60);

type Test = fn(&Arc<Sandbox>, Rung) -> Result<()>;

pub(crate) fn register(suite: &mut Suite) {
    let tests: [(&str, Test, &[Rung]); 9] = [
        ("an_announced_new_address_of_the_gateway_is_followed", announced, &[Rung::Tc, Rung::Xdp]),
        ("a_silent_new_address_of_the_gateway_is_found", silent, &[Rung::Tc]),
        ("another_gateway_takes_over_at_once", takeover, &[Rung::Tc]),
        ("a_new_address_of_the_peer_is_followed", peer_moves, &[Rung::Tc, Rung::Xdp]),
        ("an_own_new_address_is_the_source", own_address, &[Rung::Tc]),
        ("a_flushed_neighbour_is_resolved_again", flushed, &[Rung::Tc]),
        ("an_operators_entry_is_obeyed", permanent, &[Rung::Tc]),
        ("a_dead_gateway_is_reported_and_comes_back", dead_gateway, &[Rung::Tc]),
        ("a_busy_neighbour_stays_known_and_an_idle_one_is_left_alone", busy_and_idle, &[Rung::Tc]),
    ];
    for (name, test, rungs) in tests {
        for rung in rungs.iter().copied() {
            let name = format!("neighbours::{name}_on_{}", rung.name());
            suite.add(name, needs(rung, rung), move |sandbox| test(sandbox, rung));
        }
    }
}

/// Lets the kernel doubt neighbours after 1 to 3 seconds instead of 15 to 45.
fn hurry(host: &Netns) -> Result<()> {
    let setting = format!("net.ipv4.neigh.{UPLINK}");
    host.tool(&format!(
        "sysctl -q -w {setting}.base_reachable_time_ms=2000 {setting}.delay_first_probe_time=1 \
         {setting}.retrans_time_ms=200"
    ))?;
    Ok(())
}

fn start(sandbox: &Arc<Sandbox>, topology: Topology, rung: Rung) -> Result<Pair> {
    for side in [&topology.a, &topology.b] {
        hurry(&side.host)?;
    }
    Pair::start(sandbox, topology, rung, rung)
}

/// A pair with a link between the hosts.
fn on_link(sandbox: &Arc<Sandbox>, rung: Rung) -> Result<Pair> {
    start(sandbox, Topology::build(sandbox, Underlay::Virtual, PodOffload::On)?, rung)
}

/// A pair with a router between the hosts.
fn routed(sandbox: &Arc<Sandbox>, rung: Rung) -> Result<(Router, Pair)> {
    let topology = Topology::build(sandbox, Underlay::Virtual, PodOffload::On)?;
    let router = Router::insert(sandbox, &topology, Underlay::Virtual)?;
    Ok((router, start(sandbox, topology, rung)?))
}

fn mac(netns: &Netns, device: &str) -> Result<String> {
    let shown = netns.tool(&format!("ip -oneline link show {device}"))?;
    let mut words = shown.split_whitespace().skip_while(|word| *word != "link/ether");
    Ok(words.nth(1).with_context(|| format!("no address in {shown}"))?.to_owned())
}

fn link_address(agent: &Agent) -> Result<Option<String>> {
    let routes = agent.routes()?.routes;
    Ok(routes.first().context("no route")?.link_address.clone())
}

/// Waits, with traffic, until the fast path of A sends to this address.
fn wait_for(pair: &Pair, mac: &str) -> Result<()> {
    let (from, to) = pair.topology.pods();
    wait_until(&format!("packets are sent to {mac}"), || {
        // One that is lost is sent again.
        let _ = ping_with_ttl(from.netns, to.address, 60);
        Ok(link_address(&pair.a)?.as_deref() == Some(mac))
    })
    .with_context(|| diagnosis(pair, "the link-layer address"))
}

/// Transfers both ways, and nothing takes the slow path that should not.
fn both_ways(pair: &Pair, what: &str) -> Result<()> {
    let (from, to) = pair.topology.pods();
    for (from, to) in [(from, to), (to, from)] {
        tcp::transfer(from, to, TCP_BYTES, transfer_limit(TCP_BYTES))
            .with_context(|| diagnosis(pair, what))?;
    }
    Ok(())
}

/// A steady flow during a change, and at most some lost datagrams.
fn under_traffic(pair: &Pair, most_lost: u32, change: impl FnOnce() -> Result<()>) -> Result<()> {
    let (from, to) = pair.topology.pods();
    let ((), Flow { answered, lost }) =
        steady::meanwhile(from, to, change).with_context(|| diagnosis(pair, "traffic meanwhile"))?;
    ensure!(lost <= most_lost, "{lost} of {} datagrams were lost", answered + lost);
    Ok(())
}

fn announced(sandbox: &Arc<Sandbox>, rung: Rung) -> Result<()> {
    let (router, pair) = routed(sandbox, rung)?;
    let port = router::port(&pair.topology.a);
    router.netns.tool(&format!("sysctl -q -w net.ipv4.conf.{port}.arp_notify=1"))?;
    wait_for(&pair, &mac(&router.netns, &port)?)?;
    both_ways(&pair, "before")?;
    // A datagram that is on its way to the old address is lost.
    under_traffic(&pair, 1, || {
        router.netns.tool(&format!("ip link set {port} address {OTHER_MAC}"))?;
        wait_until("the new address is used", || Ok(link_address(&pair.a)?.as_deref() == Some(OTHER_MAC)))
    })?;
    both_ways(&pair, "after")
}

fn silent(sandbox: &Arc<Sandbox>, rung: Rung) -> Result<()> {
    let (router, pair) = routed(sandbox, rung)?;
    let port = router::port(&pair.topology.a);
    wait_for(&pair, &mac(&router.netns, &port)?)?;
    // Each lost datagram takes a second.
    under_traffic(&pair, GIVE_UP.as_secs() as u32, || {
        router.netns.tool(&format!("ip link set {port} address {OTHER_MAC}"))?;
        wait_until("the new address is used", || Ok(link_address(&pair.a)?.as_deref() == Some(OTHER_MAC)))
    })?;
    both_ways(&pair, "after")
}

fn takeover(sandbox: &Arc<Sandbox>, rung: Rung) -> Result<()> {
    let (router, pair) = routed(sandbox, rung)?;
    let host = &pair.topology.a.host;
    let second = router.add_second_gateway(sandbox, &pair.topology.a)?;
    host.tool(&format!("ip route add {}/32 dev {UPLINK}", router::SECOND_ADDRESS))?;
    wait_for(&pair, &mac(&router.netns, router::BRIDGE)?)?;
    both_ways(&pair, "by the first gateway")?;
    under_traffic(&pair, 0, || {
        host.tool(&format!("ip route replace default via {}", router::SECOND_ADDRESS))?;
        wait_for(&pair, &mac(&second, UPLINK)?)
    })?;
    both_ways(&pair, "by the second gateway")?;
    under_traffic(&pair, 0, || {
        host.tool(&format!("ip route replace default via {}", router::ADDRESS))?;
        thread::sleep(TAKEOVER);
        second.tool("sysctl -q -w net.ipv4.ip_forward=0")?;
        thread::sleep(Duration::from_secs(1));
        Ok(())
    })?;
    both_ways(&pair, "by the first gateway again")
}

fn peer_moves(sandbox: &Arc<Sandbox>, rung: Rung) -> Result<()> {
    let pair = on_link(sandbox, rung)?;
    let peer = &pair.topology.b.host;
    peer.tool(&format!("sysctl -q -w net.ipv4.conf.{UPLINK}.arp_notify=1"))?;
    wait_for(&pair, &mac(peer, UPLINK)?)?;
    both_ways(&pair, "before")?;
    under_traffic(&pair, 1, || {
        peer.tool(&format!("ip link set {UPLINK} address {OTHER_MAC}"))?;
        wait_until("the new address is used", || Ok(link_address(&pair.a)?.as_deref() == Some(OTHER_MAC)))
    })?;
    both_ways(&pair, "after")
}

fn own_address(sandbox: &Arc<Sandbox>, rung: Rung) -> Result<()> {
    let (router, pair) = routed(sandbox, rung)?;
    let (host, port) = (&pair.topology.a.host, router::port(&pair.topology.a));
    let gateway = mac(&router.netns, &port)?;
    wait_for(&pair, &gateway)?;
    host.tool(&format!("sysctl -q -w net.ipv4.conf.{UPLINK}.arp_notify=1"))?;
    under_traffic(&pair, 1, || {
        host.tool(&format!("ip link set {UPLINK} address {OTHER_MAC}"))?;
        wait_for(&pair, &gateway)
    })?;
    for line in [
        "add table netdev seen".to_owned(),
        format!(
            "add chain netdev seen arriving {{ type filter hook ingress device \"{port}\" priority 0; }}"
        ),
        format!("add rule netdev seen arriving udp dport 8285 ether saddr {OTHER_MAC} counter accept"),
        "add rule netdev seen arriving udp dport 8285 counter".to_owned(),
    ] {
        router.netns.tool(&format!("nft {line}"))?;
    }
    both_ways(&pair, "after")?;
    let shown = router.netns.tool("nft list table netdev seen")?;
    let packets = shown.lines().filter_map(|line| line.split_once("counter packets ")?.1.split(' ').next());
    let packets: Vec<u64> = packets.map(str::parse).collect::<Result<_, _>>()?;
    ensure!(matches!(packets[..], [new, 0] if new > 0), "{shown}");
    wait_for(&pair, &gateway)
}

fn flushed(sandbox: &Arc<Sandbox>, rung: Rung) -> Result<()> {
    let pair = on_link(sandbox, rung)?;
    let host = &pair.topology.a.host;
    let peer = mac(&pair.topology.b.host, UPLINK)?;
    wait_for(&pair, &peer)?;
    // The kernel keeps packets while it asks for the address.
    under_traffic(&pair, 0, || {
        for _ in 0..20 {
            host.tool(&format!("ip neighbour flush dev {UPLINK}"))?;
            thread::sleep(Duration::from_millis(20));
        }
        wait_until("the address is known again", || Ok(link_address(&pair.a)?.as_deref() == Some(&peer)))
    })?;
    both_ways(&pair, "after")
}

fn permanent(sandbox: &Arc<Sandbox>, rung: Rung) -> Result<()> {
    let pair = on_link(sandbox, rung)?;
    let (host, address) = (&pair.topology.a.host, pair.topology.b.underlay);
    let peer = mac(&pair.topology.b.host, UPLINK)?;
    let entry = |mac: &str| format!("ip neighbour replace {address} lladdr {mac} dev {UPLINK} nud permanent");
    under_traffic(&pair, 0, || {
        host.tool(&entry(&peer))?;
        wait_for(&pair, &peer)?;
        // It stays an operator's entry, whatever its age.
        thread::sleep(GIVE_UP);
        ensure!(link_address(&pair.a)?.as_deref() == Some(&peer), "{:?}", pair.a.routes()?);
        let shown = host.tool(&format!("ip neighbour show {address}"))?;
        ensure!(shown.contains("PERMANENT"), "{shown}");
        Ok(())
    })?;
    host.tool(&entry(OTHER_MAC))?;
    wait_until("the wrong address is used", || Ok(link_address(&pair.a)?.as_deref() == Some(OTHER_MAC)))?;
    host.tool(&format!("ip neighbour delete {address} dev {UPLINK}"))?;
    wait_for(&pair, &peer)?;
    both_ways(&pair, "after")
}

fn dead_gateway(sandbox: &Arc<Sandbox>, rung: Rung) -> Result<()> {
    let (router, pair) = routed(sandbox, rung)?;
    let (pod, to) = (&pair.topology.a.pod, pair.topology.b.pod_address);
    let port = router::port(&pair.topology.a);
    let gateway = mac(&router.netns, &port)?;
    wait_for(&pair, &gateway)?;
    let set = |arp_ignore: u8, forward: u8| {
        router.netns.tool(&format!(
            "sysctl -q -w net.ipv4.conf.{port}.arp_ignore={arp_ignore} net.ipv4.ip_forward={forward}"
        ))
    };
    // It answers nothing and forwards nothing, but the link stays up.
    set(8, 0)?;
    wait_until("the containers are told", || {
        let mut ping = Command::new("ping");
        ping.args(["-n", "-c", "3", "-i", "0.3", "-W", "1", &to.to_string()]).env("LC_ALL", "C");
        let shown = pod.output(&mut ping)?.stdout;
        Ok(String::from_utf8_lossy(&shown).contains("Destination Host Unreachable"))
    })
    .with_context(|| diagnosis(&pair, "a dead gateway"))?;
    ensure!(link_address(&pair.a)?.is_none(), "{:?}", pair.a.routes()?);
    set(0, 1)?;
    wait_for(&pair, &gateway)?;
    both_ways(&pair, "after")
}

fn busy_and_idle(sandbox: &Arc<Sandbox>, rung: Rung) -> Result<()> {
    let pair = on_link(sandbox, rung)?;
    let (host, address) = (&pair.topology.a.host, pair.topology.b.underlay);
    let peer = mac(&pair.topology.b.host, UPLINK)?;
    wait_for(&pair, &peer)?;
    let (mut known, mut all) = (0, 0);
    under_traffic(&pair, 0, || {
        // The kernel doubts the neighbour several times.
        for _ in 0..100 {
            known += usize::from(link_address(&pair.a)?.is_some());
            all += 1;
            thread::sleep(Duration::from_millis(80));
        }
        Ok(())
    })?;
    ensure!(known * 10 >= all * 7, "the address was known {known} of {all} times");
    ensure!(known < all, "the kernel never doubted the neighbour");
    let is_stale =
        || -> Result<bool> { Ok(host.tool(&format!("ip neighbour show {address}"))?.contains("STALE")) };
    wait_until("the idle neighbour's entry becomes stale", is_stale)?;
    for _ in 0..40 {
        ensure!(is_stale()?, "the kernel was made to check an idle neighbour");
        ensure!(link_address(&pair.a)?.is_none(), "{:?}", pair.a.routes()?);
        thread::sleep(Duration::from_millis(100));
    }
    both_ways(&pair, "after")
}
