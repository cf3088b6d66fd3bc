//! IPsec policies: what the agent reads agrees with what the kernel does, and changes are followed.

use std::{
    fmt::Write as _,
    fs,
    io::ErrorKind,
    net::{Ipv4Addr, SocketAddrV4, UdpSocket},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use nix::net::if_::if_nametoindex;
use overlay_agent::xfrm::{Flow, Policies, Policy, list, watch};
use overlay_tests::{
    agent::{Agent, Rung},
    netns::Netns,
    pair::Pair,
    report::Counters,
    sandbox::Sandbox,
    topology::{PodOffload, Side, Topology, UPLINK, Underlay},
    traffic::ping::ping,
};
use rustix::thread::{CapabilitySet, capabilities, set_capabilities};
use tokio::{
    sync::watch::Receiver,
    time::{Instant, timeout, timeout_at},
};

use crate::{firewall::inside, guard::bind, machine::Need, suite::Suite, wait::wait_until};

const IPSEC: &[Need] = &[Need::Ipsec];
const SECOND: Duration = Duration::from_secs(1);
const PORT: u16 = 8285;
const A: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 1);
const B: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 2);
/// Source ports: that of the tun rung, and some of the eBPF rungs.
const SOURCES: [u16; 5] = [PORT, 49152, 50000, 60000, 65535];
/// Without a state, the kernel drops the packets of such a policy.
const TEMPLATE: &str = "tmpl src 192.168.77.1 dst 192.168.77.2 proto esp mode transport";

pub(crate) fn register(suite: &mut Suite) {
    suite.add("xfrm::policies_cover_a_peer_exactly_when_the_kernel_restricts_packets", IPSEC, agreement);
    suite.add("xfrm::changes_of_policies_arrive_within_a_second", IPSEC, changes);
    suite.add("xfrm::thousands_of_policies_are_listed", IPSEC, thousands);
    suite.add("xfrm::reading_policies_needs_net_admin_alone", IPSEC, privileges);
    for (rung, needs) in [
        (Rung::Xdp, &[Need::Ipsec, Need::Tun, Need::Ebpf][..]),
        (Rung::Tc, &[Need::Ipsec, Need::Tun, Need::Ebpf]),
        (Rung::Tun, &[Need::Ipsec, Need::Tun]),
    ] {
        let name = format!("xfrm::policies_are_obeyed_on_{}", rung.name());
        suite.add(name, needs, move |sandbox| obeys(sandbox, rung));
    }
}

fn host(sandbox: &Arc<Sandbox>) -> Result<Arc<Netns>> {
    let host = Netns::create(sandbox, "host")?;
    host.tool(&format!("ip link add {UPLINK} type veth peer name peer"))?;
    Ok(host)
}

/// The flow of the host in `netns`.
fn flow(netns: &Netns, local: Ipv4Addr, peer: Ipv4Addr) -> Result<Flow> {
    let ifindex = netns.run(|| if_nametoindex(UPLINK))?.with_context(|| format!("look up {UPLINK}"))?;
    Ok(Flow { local, peer, port: PORT, ifindex })
}

/// The covering policy, or `none`.
fn covering(policies: &Policies, flow: &Flow) -> String {
    policies.covering(flow).map_or_else(|| "none".to_owned(), Policy::to_string)
}

/// Sets of policies of host A for what it sends, or of host B for what it receives. Each line follows `ip xfrm policy`.
const SETS: &[&[&str]] = &[
    &[],
    &["add dir D action block"],
    &["add dir D action allow"],
    &["add src 192.168.77.1 dst 192.168.77.2 proto udp dir D action block"],
    &["add src 192.168.77.2 dst 192.168.77.1 proto udp dir D action block"],
    &["add src 192.168.77.0/24 dst 192.168.0.0/16 dir D action block"],
    &["add src 192.168.77.0/31 dst 192.168.77.2/31 dir D action block"],
    &["add dst 192.168.77.3 dir D action block"],
    &["add proto tcp dir D action block"],
    &["add proto udp dport 8285 dir D action block"],
    &["add proto udp dport 8286 dir D action block"],
    &["add proto udp sport 8285 dir D action block"],
    &["add proto udp sport 60000 dir D action block"],
    &["add dir fwd action block"],
    &["add dir D action block mark 0 mask 0xff"],
    &["add dir D action block mark 5 mask 0xff"],
    &["add dir D action block if_id 7"],
    &["add dir D TEMPLATE"],
    &["add dir D priority 1 action allow", "add dir D proto udp priority 2 action block"],
    &["add dir D priority 3 action allow", "add dir D proto udp priority 2 action block"],
    &["add dir D proto udp priority 2 action block", "add dir D priority 2 action allow"],
    &["add dir D proto udp sport 8285 priority 1 action allow", "add dir D priority 2 action block"],
    &["add dst 192.168.77.0/24 dir D priority 1 action allow", "add dir D priority 2 TEMPLATE"],
    &["add dst 192.168.77.3 dir D priority 1 action allow", "add dir D priority 2 TEMPLATE"],
    &["add dir D ptype sub priority 1 action allow", "add dir D priority 2 action block"],
    &["add dir D priority 1 action allow", "add dir D ptype sub priority 2 action block"],
    &["setdefault D block"],
    &["setdefault D block", "add dir D proto udp action allow"],
    &["setdefault D block", "add dir D proto tcp action allow"],
    &["setdefault fwd block"],
];
/// A device in a selector means another one in each direction.
const DEVICES: [(&str, &str); 3] = [
    ("out", "add dev eth0 dir out action block"),
    ("out", "add dev lo dir out action block"),
    ("in", "add dev lo dir in action block"),
];

fn agreement(sandbox: &Arc<Sandbox>) -> Result<()> {
    let topology = Topology::build(sandbox, Underlay::Virtual, PodOffload::On)?;
    let Topology { a, b } = &topology;
    for (direction, side, flow) in [("out", a, flow(&a.host, A, B)?), ("in", b, flow(&b.host, B, A)?)] {
        for set in SETS {
            let replace =
                |line: &&str| line.replace("TEMPLATE", TEMPLATE).replace(" D ", &format!(" {direction} "));
            let lines: Vec<_> = set.iter().map(replace).collect();
            agrees(&topology, side, &flow, &lines)?;
        }
        for (_, line) in DEVICES.iter().filter(|(of, _)| *of == direction) {
            agrees(&topology, side, &flow, &[(*line).to_owned()])?;
        }
    }
    Ok(())
}

fn agrees(topology: &Topology, side: &Side, flow: &Flow, lines: &[String]) -> Result<()> {
    for line in lines {
        side.host.tool(&format!("ip xfrm policy {line}"))?;
    }
    let policies = inside(&side.host, list())??;
    let restricted = !all_arrive(topology)?;
    ensure!(
        policies.covering(flow).is_some() == restricted,
        "{lines:?}: the kernel restricts the flow: {restricted}; covering: {}",
        covering(&policies, flow)
    );
    for line in ["flush", "flush ptype sub", "setdefault in accept fwd accept out accept"] {
        side.host.tool(&format!("ip xfrm policy {line}"))?;
    }
    Ok(())
}

/// Whether datagrams from host A to the network's port on host B arrive from each source port.
fn all_arrive(topology: &Topology) -> Result<bool> {
    let receiver = bind(&topology.b.host, B, PORT)?;
    for source in SOURCES {
        let sender = bind(&topology.a.host, A, source)?;
        match sender.send_to(b"datagram", SocketAddrV4::new(B, PORT)) {
            Ok(_) if receives(&receiver)? => {}
            Ok(_) => return Ok(false),
            // What the kernel says about a policy that drops.
            Err(error) if error.kind() == ErrorKind::PermissionDenied => return Ok(false),
            Err(error) => return Err(error).context("send"),
        }
    }
    Ok(true)
}

fn receives(receiver: &UdpSocket) -> Result<bool> {
    loop {
        match receiver.recv(&mut [0; 64]) {
            Ok(_) => return Ok(true),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                return Ok(false);
            }
            // Receiving is interrupted when a child process ends.
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error).context("receive"),
        }
    }
}

fn changes(sandbox: &Arc<Sandbox>) -> Result<()> {
    const OUT: &str = "src 192.168.77.1 dst 192.168.77.2 proto udp dir out";
    const OUT_TEXT: &str = "the IPsec policy out src 192.168.77.1/32 dst 192.168.77.2/32 proto udp";
    const IN: &str = "the IPsec policy in src 0.0.0.0/0 dst 0.0.0.0/0 (block)";
    let host = host(sandbox)?;
    let flow = flow(&host, A, B)?;
    let policy = |line: &str| host.tool(&format!("ip xfrm policy {line}"));
    inside(&host, async {
        policy("add dir in action block")?;
        let mut watched = watch().await?;
        ensure!(covering(&watched.borrow(), &flow) == IN, "the first value lacks an existing policy");
        for (line, expected) in [
            ("flush", "none"),
            (&format!("add {OUT} action block"), &format!("{OUT_TEXT} (block)")),
            (&format!("update {OUT} {TEMPLATE}"), &format!("{OUT_TEXT} (require)")),
            (&format!("update {OUT} action allow"), "none"),
            ("add dir in action block", IN),
            ("delete src 0.0.0.0/0 dst 0.0.0.0/0 dir in", "none"),
            ("add dir in ptype sub action block", IN),
            ("flush ptype sub", "none"),
            ("setdefault in block", "the default IPsec policy in (block)"),
            ("setdefault out block in accept", "none"),
            (&format!("delete {OUT}"), "the default IPsec policy out (block)"),
            ("setdefault out accept", "none"),
        ] {
            policy(line)?;
            expect(&mut watched, line, &flow, expected, SECOND).await?;
        }
        // The kernel removes it itself, and does not announce that as a deletion.
        policy("add dir in action block limit time-hard 2")?;
        expect(&mut watched, "a temporary policy", &flow, IN, SECOND).await?;
        expect(&mut watched, "the end of its lifetime", &flow, "none", 3 * SECOND).await?;
        // What cannot concern the overlay.
        for line in
            ["src fd00::1 dir out action block", "dir fwd action block", "proto tcp dir in action block"]
        {
            policy(&format!("add {line}"))?;
        }
        ensure!(timeout(SECOND / 2, watched.changed()).await.is_err(), "a change of nothing is reported");
        Ok(())
    })?
}

/// Waits until the watch has reported that the policy covers the flow, up to the limit.
async fn expect(
    watched: &mut Receiver<Arc<Policies>>,
    what: &str,
    flow: &Flow,
    expected: &str,
    limit: Duration,
) -> Result<()> {
    let deadline = Instant::now() + limit;
    loop {
        let changed = timeout_at(deadline, watched.changed()).await;
        let found = covering(&watched.borrow_and_update(), flow);
        if found == expected {
            return Ok(());
        }
        changed.with_context(|| format!("{what}: expected {expected}, the last report is {found}"))??;
    }
}

/// As on a host that has a policy for each peer in each direction.
fn thousands(sandbox: &Arc<Sandbox>) -> Result<()> {
    const PEERS: u32 = 4000;
    let host = host(sandbox)?;
    let peer = |number: u32| Ipv4Addr::from(u32::from(Ipv4Addr::new(172, 16, 0, 1)) + number);
    let mut lines = String::new();
    for number in 0..PEERS {
        let peer = peer(number);
        writeln!(lines, "xfrm policy add src {A} dst {peer} dir out action block")?;
        writeln!(lines, "xfrm policy add src {peer} dst {A} dir in action block")?;
    }
    let file = sandbox.new_directory("policies")?.join("lines");
    fs::write(&file, lines).with_context(|| format!("write {}", file.display()))?;
    let flow = flow(&host, A, B)?;
    inside(&host, async {
        let mut watched = watch().await?;
        host.tool(&format!("ip -batch {}", file.display()))?;
        host.tool("ip xfrm policy add dir in action block")?;
        let last = "the IPsec policy in src 0.0.0.0/0 dst 0.0.0.0/0 (block)";
        expect(&mut watched, "the last policy", &flow, last, SECOND).await?;
        let policies = list().await?;
        for number in 0..PEERS {
            let peer = peer(number);
            let found = covering(&policies, &Flow { peer, ..flow });
            let expected = format!("the IPsec policy out src {A}/32 dst {peer}/32 (block)");
            ensure!(found == expected, "expected {expected}, found {found}");
        }
        Ok(())
    })?
}

fn privileges(sandbox: &Arc<Sandbox>) -> Result<()> {
    let host = host(sandbox)?;
    host.tool("ip xfrm policy add dir out action block")?;
    // The capabilities of one thread, which ends with the work.
    let with = |kept: CapabilitySet| {
        inside(&host, async move {
            let mut sets = capabilities(None).context("read the capabilities")?;
            sets.effective &= kept;
            set_capabilities(None, sets).context("drop capabilities")?;
            Ok::<_, anyhow::Error>((list().await, watch().await.map(|watched| watched.borrow().is_empty())))
        })?
    };
    let (listed, watched) = with(CapabilitySet::NET_ADMIN)?;
    ensure!(!listed?.is_empty() && !watched?, "the policy is not read");
    let (listed, watched) = with(!CapabilitySet::NET_ADMIN)?;
    for refused in [listed.err(), watched.err()] {
        let text = format!("{:#}", refused.context("read without CAP_NET_ADMIN")?);
        ensure!(text.contains("CAP_NET_ADMIN") && text.contains("policies"), "the error is: {text}");
    }
    Ok(())
}

/// Peers that a policy covers are left to the slow path, whose socket obeys it, while it is there.
fn obeys(sandbox: &Arc<Sandbox>, rung: Rung) -> Result<()> {
    let topology = Topology::build(sandbox, Underlay::Virtual, PodOffload::On)?;
    let pair = Pair::start(sandbox, topology, rung, rung)?;
    let Topology { a, b } = &pair.topology;
    let answered = || Ok(ping(&a.pod, b.pod_address, 2)?.received > 0);
    let failed =
        || Ok::<_, anyhow::Error>(pair.a.counters()?.wrong_drops().get("send_failed").copied().unwrap_or(0));
    let is_slow = |agent: &Agent, what: &str, reason: Option<&str>| {
        agent.wait_for_routes(what, |routes| {
            let why = routes.routes.iter().map(|route| route.slow_path.as_deref().unwrap_or_default());
            why.into_iter().all(|why| reason.map_or(why.is_empty(), |reason| why.contains(reason)))
        })
    };
    wait_until("the pods reach each other", answered)?;
    a.host.tool("ip xfrm policy add proto udp dport 8285 dir out action block")?;
    is_slow(&pair.a, "the policy", Some("the IPsec policy out src"))?;
    let before = failed()?;
    ensure!(!answered()? && failed()? >= before + 2, "packets pass, or are not counted as send_failed");
    if rung.is_fast() {
        let status = pair.a.text("status")?;
        ensure!(status.contains("1 on the slow path"), "{status}");
        ensure!(pair.a.counters()?.punts.get("slow_peer").is_some_and(|count| *count >= 2), "no punts");
    }
    a.host.tool("ip xfrm policy flush")?;
    is_slow(&pair.a, "no policy", None)?;
    let fast = || Ok::<_, anyhow::Error>(pair.a.counters()?.traffic.egress_fast_packets);
    let before = fast()?;
    wait_until("the pods reach each other again", answered)?;
    ensure!((fast()? > before) == rung.is_fast(), "the fast path is not used again");
    // A policy that requires encryption, which has no state yet: nothing may leave in clear.
    a.host.tool(&format!("ip xfrm policy add src {A} dst {B} dir out {TEMPLATE}"))?;
    is_slow(&pair.a, "the policy", Some("the IPsec policy out src"))?;
    let arrived =
        |counters: &Counters| counters.traffic.ingress_slow_packets + counters.traffic.ingress_fast_packets;
    let before = arrived(&pair.b.counters()?);
    ensure!(!answered()? && arrived(&pair.b.counters()?) == before, "packets leave in clear");
    a.host.tool("ip xfrm policy flush")?;
    is_slow(&pair.a, "no policy", None)?;
    b.host.tool("ip xfrm policy add proto udp dport 8285 dir in action block")?;
    is_slow(&pair.b, "the policy", Some("the IPsec policy in src"))?;
    let before = pair.counters()?;
    ensure!(!answered()?, "packets are accepted");
    let after = pair.counters()?;
    ensure!(arrived(&before[1]) == arrived(&after[1]), "host B decapsulates blocked packets");
    let drops: Vec<_> =
        after[1].wrong_drops().into_keys().filter(|name| *name != "socket_buffer_full").collect();
    ensure!(drops.is_empty(), "the agent sees what the kernel drops: {:?}", after[1].drops);
    Ok(())
}
