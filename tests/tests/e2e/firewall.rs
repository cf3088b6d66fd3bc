//! Masquerading and forwarding, verified by the source addresses that the peer sees.

use std::{
    io::ErrorKind,
    net::{Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use overlay_agent::{
    firewall::{self, Firewall, Guard, Keeper, Problems, Rules, Wanted},
    route::Routes,
};
use overlay_tests::{
    agent::{DEVICE, Rung, binary},
    netns::Netns,
    pair::Pair,
    sandbox::Sandbox,
    topology::{Endpoint, NETWORK, PodOffload, Side, Topology, Underlay},
};
use tokio::{runtime, sync::watch};

use crate::{machine::Need, suite::Suite};

const NFT: &[Need] = &[Need::Nftables];
/// Docker's policy of iptables' FORWARD chain, and an administrator's rule.
pub(crate) const DROP_POLICY: [&str; 3] = [
    "nft add table ip filter",
    "nft add chain ip filter FORWARD { type filter hook forward priority 0 ; policy drop ; }",
    "nft add rule ip filter FORWARD ip saddr 203.0.113.0/24 drop",
];

pub(crate) fn register(suite: &mut Suite) {
    for rung in [Rung::Tun, Rung::Tc, Rung::Xdp] {
        let needs: &[Need] = if rung.is_fast() {
            &[Need::Tun, Need::Ebpf, Need::Nftables]
        } else {
            &[Need::Tun, Need::Nftables]
        };
        suite.add(
            format!("firewall::source_addresses_match_flannel_on_{}", rung.name()),
            needs,
            move |sandbox| sources(sandbox, rung),
        );
    }
    suite.add("firewall::forwarding_survives_a_drop_policy", NFT, forwarding);
    suite.add("firewall::removed_rules_are_restored", NFT, restoring);
    suite.add("firewall::only_the_agents_rules_are_removed", NFT, removing);
    suite.add("firewall::a_new_subnet_updates_the_rules", NFT, another_subnet);
}

fn rules(side: &Side) -> Result<Rules> {
    Ok(Rules {
        device: DEVICE.to_owned(),
        network: NETWORK.parse()?,
        subnet: side.subnet.parse()?,
        masquerade: true,
        fully_random: true,
        forward: true,
    })
}

/// Runs asynchronous work in the namespace.
pub(crate) fn inside<T: Send>(netns: &Netns, work: impl Future<Output = T> + Send) -> Result<T> {
    netns.run(|| {
        let runtime =
            runtime::Builder::new_current_thread().enable_all().build().context("start a runtime")?;
        Ok(runtime.block_on(work))
    })?
}

fn apply(side: &Side, rules: Rules) -> Result<()> {
    inside(&side.host, async { Firewall::new(rules)?.apply().await.map_err(anyhow::Error::from) })?
}

/// Two hosts without agents. The underlay address of host B also stands for an outside host: its packets for A's pods are routed
/// directly to A.
pub(crate) fn hosts(sandbox: &Arc<Sandbox>) -> Result<Topology> {
    let topology = Topology::build(sandbox, Underlay::Virtual, PodOffload::On)?;
    let Topology { a, b } = &topology;
    b.host.tool(&format!("ip rule add from {} lookup 100", b.underlay))?;
    b.host.tool(&format!("ip route add default via {} table 100", a.underlay))?;
    Ok(topology)
}

/// Sends a datagram and its reply between two endpoints. Returns the client's address as the server saw it, or `None` when a
/// datagram was lost.
pub(crate) fn seen(from: Endpoint<'_>, to: Endpoint<'_>) -> Result<Option<Ipv4Addr>> {
    let server = bind(to)?;
    let client = bind(from)?;
    for socket in [&server, &client] {
        socket.set_read_timeout(Some(Duration::from_millis(500))).context("set the read timeout")?;
    }
    client.connect(server.local_addr().context("read the server's address")?).context("connect")?;
    // No route and ICMP errors count as lost.
    if client.send(b"request").is_err() {
        return Ok(None);
    }
    let Some(client_address) = received(&server)? else { return Ok(None) };
    let SocketAddr::V4(address) = client_address else { return Ok(None) };
    if server.send_to(b"reply", client_address).is_err() || received(&client)?.is_none() {
        return Ok(None);
    }
    Ok(Some(*address.ip()))
}

fn bind(endpoint: Endpoint<'_>) -> Result<UdpSocket> {
    let address = SocketAddrV4::new(endpoint.address, 0);
    endpoint.netns.run(|| UdpSocket::bind(address).with_context(|| format!("bind to {address}")))?
}

fn received(socket: &UdpSocket) -> Result<Option<SocketAddr>> {
    loop {
        let error = match socket.recv_from(&mut [0; 64]) {
            Ok((_, from)) => return Ok(Some(from)),
            Err(error) => error,
        };
        let kind = error.kind();
        if matches!(kind, ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::ConnectionRefused) {
            return Ok(None);
        }
        // Receiving is interrupted when a child process ends.
        if kind != ErrorKind::Interrupted {
            return Err(error).context("receive");
        }
    }
}

pub(crate) fn expect(
    what: &str,
    from: Endpoint<'_>,
    to: Endpoint<'_>,
    expected: Option<Ipv4Addr>,
) -> Result<()> {
    let seen = seen(from, to)?;
    ensure!(seen == expected, "{what}: the other end sees {seen:?}, not {expected:?}");
    Ok(())
}

pub(crate) fn on_underlay(side: &Side) -> Endpoint<'_> {
    Endpoint { netns: &side.host, address: side.underlay }
}

fn sources(sandbox: &Arc<Sandbox>, rung: Rung) -> Result<()> {
    let pair = Pair::start(sandbox, hosts(sandbox)?, rung, rung)?;
    let (a, b) = (&pair.topology.a, &pair.topology.b);
    let (pod, outside) = (a.pod(), on_underlay(b));
    expect("out of the overlay, before", pod, outside, Some(a.pod_address))?;
    for side in [a, b] {
        apply(side, rules(side)?)?;
    }
    expect("out of the overlay", pod, outside, Some(a.underlay))?;
    expect("pod to pod", a.pod(), b.pod(), Some(a.pod_address))?;
    expect("pod to host", a.pod(), b.host(), Some(a.pod_address))?;
    expect("host to pod", a.host(), b.pod(), Some(a.host_address))?;
    expect("pod to its own host", a.pod(), on_underlay(a), Some(a.pod_address))?;
    expect("a host's underlay address to its own pod", on_underlay(a), a.pod(), Some(a.underlay))?;
    expect("a host's underlay address to another's pod", on_underlay(a), b.pod(), Some(a.host_address))?;
    // B's own rules would masquerade this, as flannel's: it leaves for the subnet of another host.
    inside(&b.host, firewall::remove(DEVICE))??;
    expect("from outside to a pod", outside, pod, Some(b.underlay))
}

fn forwarding(sandbox: &Arc<Sandbox>) -> Result<()> {
    let topology = hosts(sandbox)?;
    let (a, b) = (&topology.a, &topology.b);
    for command in DROP_POLICY {
        a.host.tool(command)?;
    }
    let plain = Rules { masquerade: false, forward: false, ..rules(a)? };
    apply(a, plain.clone())?;
    expect("out, dropped by policy", a.pod(), on_underlay(b), None)?;
    apply(a, Rules { forward: true, ..plain.clone() })?;
    expect("out, accepted", a.pod(), on_underlay(b), Some(a.pod_address))?;
    expect("in, a new connection, dropped by policy", on_underlay(b), a.pod(), None)?;
    // Packets neither from nor to the overlay are still dropped.
    a.host.tool("ip address add 172.30.0.1/24 dev veth0")?;
    a.pod.tool("ip address add 172.30.0.2/24 dev eth0")?;
    let stranger = Endpoint { netns: &a.pod, address: Ipv4Addr::new(172, 30, 0, 2) };
    expect("another network, still dropped", stranger, on_underlay(b), None)?;
    apply(a, plain)?;
    expect("out, dropped again", a.pod(), on_underlay(b), None)
}

fn restoring(sandbox: &Arc<Sandbox>) -> Result<()> {
    let topology = hosts(sandbox)?;
    let (a, b) = (&topology.a, &topology.b);
    for command in DROP_POLICY {
        a.host.tool(command)?;
    }
    let mut firewall = Firewall::new(rules(a)?)?;
    let (sender, subnet) = watch::channel(a.subnet.parse()?);
    let (_peers, peers) = watch::channel(Routes::new());
    let (problems, _) = watch::channel(Problems::default());
    let guard = Guard::new(DEVICE, 8285)?;
    thread::scope(|scope| {
        let keeper = scope.spawn(|| {
            inside(&a.host, async {
                firewall.apply().await?;
                let keeper = Keeper { rules: Some(firewall), guard };
                keeper.run(Duration::from_millis(200), Wanted { subnet, peers }, problems).await;
                anyhow::Ok(())
            })?
        });
        // Dropped on every exit, so that the thread ends.
        let _sender = sender;
        let good = |what: &str| -> Result<()> {
            let deadline = Instant::now() + Duration::from_secs(10);
            while seen(a.pod(), on_underlay(b))? != Some(a.underlay) {
                ensure!(Instant::now() < deadline && !keeper.is_finished(), "{what}: not restored");
            }
            Ok(())
        };
        good("at the start")?;
        for damage in [
            "nft delete table ip overlay-agent-ovl0",
            "nft flush chain ip overlay-agent-ovl0 postrouting",
            "nft insert rule ip overlay-agent-ovl0 postrouting accept",
            "nft flush chain ip filter FORWARD",
            "nft flush ruleset",
        ] {
            a.host.tool(damage)?;
            good(damage)?;
        }
        // Docker starts later: the chain is new.
        for command in DROP_POLICY {
            a.host.tool(command)?;
        }
        good("a new FORWARD chain")
    })
}

fn removing(sandbox: &Arc<Sandbox>) -> Result<()> {
    let topology = hosts(sandbox)?;
    let a = &topology.a;
    let remove = || anyhow::Ok(inside(&a.host, firewall::remove(DEVICE))??);
    ensure!(!remove()?, "something was removed although nothing existed");
    for command in DROP_POLICY {
        a.host.tool(command)?;
    }
    a.host.tool("nft add table inet mine")?;
    let ruleset = || a.host.tool("nft --stateless list ruleset");
    let before = ruleset()?;
    apply(a, Rules { device: "ovl1".to_owned(), ..rules(a)? })?;
    let with_another = ruleset()?;
    apply(a, rules(a)?)?;
    let applied = ruleset()?;
    ensure!(applied != with_another, "nothing was applied");
    apply(a, rules(a)?)?;
    ensure!(ruleset()? == applied, "the second application changed the rules:\n{applied}\n{}", ruleset()?);
    ensure!(remove()?, "nothing was removed");
    ensure!(ruleset()? == with_another, "left behind:\n{}\ninstead of\n{with_another}", ruleset()?);
    // `overlay-agent down` finds the rules of a killed agent by the name of its device.
    let down = format!("{} down --device ovl1 --run-dir /nonexistent", binary()?.display());
    let output = a.host.tool(&down)?;
    ensure!(output.contains("the firewall's rules of ovl1"), "down prints: {output}");
    ensure!(ruleset()? == before, "left behind:\n{}\ninstead of\n{before}", ruleset()?);
    Ok(())
}

fn another_subnet(sandbox: &Arc<Sandbox>) -> Result<()> {
    let topology = hosts(sandbox)?;
    let (a, b) = (&topology.a, &topology.b);
    let host_to_pod = || seen(on_underlay(b), a.pod());
    // In a subnet of another host, packets to the pod are masqueraded; in this host's subnet they are not.
    let mut firewall = Firewall::new(Rules { subnet: "10.244.9.0/24".parse()?, ..rules(a)? })?;
    firewall = inside(&a.host, async {
        firewall.apply().await?;
        anyhow::Ok(firewall)
    })??;
    let before = host_to_pod()?;
    ensure!(before == Some(Ipv4Addr::new(10, 244, 1, 1)), "masqueraded: the pod sees {before:?}");
    inside(&a.host, firewall.set_subnet(a.subnet.parse()?))??;
    let after = host_to_pod()?;
    ensure!(after == Some(b.underlay), "not masqueraded: the pod sees {after:?}");
    Ok(())
}
