//! Containers cannot send in the network's name, and everything else passes.

use std::{
    collections::BTreeMap,
    env, fs,
    net::{Ipv4Addr, SocketAddrV4, UdpSocket},
    os::unix::fs::PermissionsExt as _,
    process::Command,
    sync::Arc,
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use overlay_agent::{
    firewall::Guard,
    route::{Peer, Routes, Subnet},
};
use overlay_tests::{
    agent::{DEVICE, Rung, Site},
    netns::Netns,
    pair::{Pair, Store},
    sandbox::Sandbox,
    topology::{OVERLAY_MTU, PodOffload, Side, Topology, UPLINK, Underlay},
    traffic::udp::every_size,
};

use crate::{firewall::inside, frames, machine::Need, suite::Suite, wait::wait_until};

const PORT: u16 = 8285;
/// Port of the receivers in containers.
pub(crate) const INNER_PORT: u16 = 7007;
/// A peer that does not exist.
const ABSENT: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 3);

pub(crate) fn register(suite: &mut Suite) {
    for rung in [Rung::Tun, Rung::Tc] {
        let needs: &[Need] = match rung.is_fast() {
            true => &[Need::Tun, Need::Ebpf, Need::Nftables],
            false => &[Need::Tun, Need::Nftables],
        };
        let word = rung.name();
        suite.add(format!("guard::containers_cannot_send_as_a_host_on_{word}"), needs, move |sandbox| {
            injection(sandbox, rung)
        });
        suite.add(format!("guard::peers_are_followed_on_{word}"), needs, move |sandbox| {
            following(sandbox, rung)
        });
    }
    let nft: &[Need] = &[Need::Tun, Need::Nftables];
    suite.add("guard::a_host_may_route_for_its_peers", nft, router);
    suite.add("guard::records_that_flap_start_few_programs", nft, flapping);
    suite.add("guard::many_peers_are_checked_and_restored", &[Need::Nftables], many_peers);
}

/// A UDP datagram in IPv4, without UDP checksum.
pub(crate) fn datagram(
    source: (Ipv4Addr, u16),
    destination: (Ipv4Addr, u16),
    payload: &[u8],
) -> Result<Vec<u8>> {
    let length = |headers: usize| u16::try_from(headers + payload.len()).context("too long");
    let mut packet = vec![0x45, 0];
    packet.extend(length(28)?.to_be_bytes());
    packet.extend([0, 0, 0, 0, 64, 17, 0, 0]);
    packet.extend(source.0.octets());
    packet.extend(destination.0.octets());
    let words = packet.chunks(2).map(|pair| pair.iter().fold(0, |word, byte| word << 8 | u32::from(*byte)));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    let checksum = !u16::try_from(sum)?;
    packet.splice(10..12, checksum.to_be_bytes());
    packet.extend(source.1.to_be_bytes());
    packet.extend(destination.1.to_be_bytes());
    packet.extend(length(8)?.to_be_bytes());
    packet.extend([0, 0]);
    packet.extend(payload);
    Ok(packet)
}

pub(crate) fn bind(netns: &Netns, address: Ipv4Addr, port: u16) -> Result<UdpSocket> {
    let address = SocketAddrV4::new(address, port);
    let socket = netns.run(|| UdpSocket::bind(address))?.with_context(|| format!("bind to {address}"))?;
    socket.set_read_timeout(Some(Duration::from_millis(500)))?;
    Ok(socket)
}

/// Whether `send` makes a datagram arrive at `address` in `netns`.
pub(crate) fn arrives(
    netns: &Netns,
    address: Ipv4Addr,
    port: u16,
    send: impl FnOnce() -> Result<()>,
) -> Result<bool> {
    let receiver = bind(netns, address, port)?;
    send()?;
    Ok(receiver.recv(&mut [0; 64]).is_ok())
}

/// Sends `packet` from a device to the Ethernet address of another namespace's device.
pub(crate) fn send_raw(from: &Netns, device: &str, to: (&Netns, &str), packet: &[u8]) -> Result<()> {
    let link = to.0.tool(&format!("ip -json link show dev {}", to.1))?;
    let link: serde_json::Value = serde_json::from_str(&link).context("read the output of ip -json")?;
    let mac =
        link.pointer("/0/address").and_then(serde_json::Value::as_str).context("no Ethernet address")?;
    let frame = frames::addressed_to(&[&[0; 12], [8, 0].as_slice(), packet].concat(), mac)?;
    ensure!(from.run(|| frames::send(device, &[frame]))?? == 1, "the frame could not be sent");
    Ok(())
}

/// The container behind A sends to B what B should believe to come from host A, without any privilege. Whether B's container
/// gets it.
fn plain_injection(pair: &Pair) -> Result<bool> {
    let (a, b) = (&pair.topology.a, &pair.topology.b);
    // The address of another container of host A.
    let inner = datagram((Ipv4Addr::new(10, 244, 1, 99), 1), (b.pod_address, INNER_PORT), b"plain")?;
    arrives(&b.pod, b.pod_address, INNER_PORT, || {
        bind(&a.pod, a.pod_address, 0)?.send_to(&inner, (b.underlay, PORT))?;
        Ok(())
    })
}

/// The same with a forged outer source: the address of a third host.
fn forged_injection(pair: &Pair) -> Result<bool> {
    let (a, b) = (&pair.topology.a, &pair.topology.b);
    let inner = datagram((Ipv4Addr::new(10, 244, 3, 5), 1), (b.pod_address, INNER_PORT), b"forged")?;
    let outer = datagram((ABSENT, PORT), (b.underlay, PORT), &inner)?;
    arrives(&b.pod, b.pod_address, INNER_PORT, || send_raw(&a.pod, UPLINK, (&a.host, "veth0"), &outer))
}

/// Masquerades what the containers of a host send to the underlay, and switches the reverse path filter off.
fn open_host(side: &Side) -> Result<()> {
    masquerade(side)?;
    loosen(&side.host)
}

fn masquerade(side: &Side) -> Result<()> {
    for command in [
        "nft add table ip masquerading",
        "nft add chain ip masquerading post { type nat hook postrouting priority 100 ; }",
        "nft add rule ip masquerading post oifname eth0 ip saddr 10.244.0.0/16 masquerade",
    ] {
        side.host.tool(command)?;
    }
    Ok(())
}

pub(crate) fn loosen(host: &Netns) -> Result<()> {
    for device in ["all", UPLINK, "veth0", DEVICE] {
        host.tool(&format!("sysctl -q -w net.ipv4.conf.{device}.rp_filter=0"))?;
    }
    Ok(())
}

fn pair(sandbox: &Arc<Sandbox>, rung: Rung) -> Result<Pair> {
    let topology = Topology::build(sandbox, Underlay::Virtual, PodOffload::On)?;
    let pair = Pair::start(sandbox, topology, rung, rung)?;
    pair.store.write_lease("10.244.3.0-24", &ABSENT.to_string())?;
    for agent in [&pair.a, &pair.b] {
        agent.wait_for_routes("two routes", |list| list.routes.len() == 2)?;
    }
    open_host(&pair.topology.a)?;
    let peers = ["192.168.77.2", "192.168.77.3"];
    wait_until("both peers are guarded", || Ok(guarded(&pair.topology.a.host)? == peers))?;
    Ok(pair)
}

/// The guarded addresses, in order.
fn guarded(host: &Netns) -> Result<Vec<String>> {
    let line = format!("-j list set ip overlay-guard-{DEVICE} peers");
    let output = host.output(Command::new("nft").args(line.split(' ')))?;
    let listing: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    let elements = listing.pointer("/nftables/1/set/elem").and_then(serde_json::Value::as_array);
    let mut addresses: Vec<_> =
        elements.into_iter().flatten().filter_map(|address| Some(address.as_str()?.to_owned())).collect();
    addresses.sort();
    Ok(addresses)
}

fn carried_and_dropped(pair: &Pair) -> Result<(u64, BTreeMap<String, u64>)> {
    let counters = pair.b.counters()?;
    let carried = counters.traffic.ingress_fast_packets + counters.traffic.ingress_slow_packets;
    let drops = counters.wrong_drops().into_iter().map(|(reason, count)| (reason.to_owned(), count));
    Ok((carried, drops.collect()))
}

fn injection(sandbox: &Arc<Sandbox>, rung: Rung) -> Result<()> {
    let pair = pair(sandbox, rung)?;
    let host = &pair.topology.a.host;
    let table = format!("overlay-guard-{DEVICE}");
    let dropped = || -> Result<()> {
        let before = carried_and_dropped(&pair)?;
        ensure!(!plain_injection(&pair)?, "a container sent as its host");
        ensure!(!forged_injection(&pair)?, "a container sent as another host");
        ensure!(carried_and_dropped(&pair)? == before, "a packet reached the peer: {before:?}");
        Ok(())
    };
    dropped()?;
    let counted = host.tool(&format!("nft list table ip {table}"))?;
    ensure!(counted.contains("counter packets 2 "), "the rule counts otherwise: {counted}");
    let (from, to) = pair.topology.pods();
    every_size(from, to, OVERLAY_MTU)?;
    every_size(to, from, OVERLAY_MTU)?;

    // Without the rules, the same packets arrive; the agent may restore them at any time.
    for (what, attack) in
        [("plain", plain_injection as fn(&Pair) -> Result<bool>), ("forged", forged_injection)]
    {
        wait_until(&format!("the {what} packet arrives where nothing drops it"), || {
            let _ = host.output(Command::new("nft").args(["delete", "table", "ip", &table]))?;
            attack(&pair)
        })?;
    }
    for damage in [
        "nft flush ruleset",
        &format!("nft delete table ip {table}"),
        &format!("nft flush chain ip {table} forward"),
        &format!("nft flush chain ip {table} to_peers"),
        &format!("nft flush set ip {table} peers"),
    ] {
        wait_until("the guard is there", || Ok(has_rules(host)? && guarded(host)?.len() == 2))?;
        host.tool(damage)?;
        if damage.ends_with("ruleset") {
            masquerade(&pair.topology.a)?;
        }
        wait_until(
            &format!("restored after {damage}"),
            || Ok(has_rules(host)? && guarded(host)?.len() == 2),
        )?;
        dropped().context(damage.to_owned())?;
    }
    pair.a.stop()?;
    let left = host.tool("nft list ruleset")?;
    ensure!(!left.contains(&table), "left behind: {left}");
    Ok(())
}

/// Whether both chains of the guard have their rules.
fn has_rules(host: &Netns) -> Result<bool> {
    let rules = host.tool("nft list ruleset")?;
    Ok(rules.contains("goto to_peers") && rules.contains("counter packets"))
}

/// An address on which another overlay may use the same port is reachable unless, and as long as, it is that of a peer.
fn following(sandbox: &Arc<Sandbox>, rung: Rung) -> Result<()> {
    let pair = pair(sandbox, rung)?;
    let (a, b) = (&pair.topology.a, &pair.topology.b);
    let other = Ipv4Addr::new(192, 168, 77, 50);
    b.host.tool(&format!("ip address add {other}/24 dev {UPLINK}"))?;
    let reachable = || {
        arrives(&b.host, other, PORT, || {
            bind(&a.pod, a.pod_address, 0)?.send_to(b"another overlay", (other, PORT))?;
            Ok(())
        })
    };
    ensure!(reachable()?, "not reachable although it is no peer");
    for _ in 0..2 {
        pair.store.write_lease("10.244.50.0-24", &other.to_string())?;
        wait_until("the new peer is guarded", || Ok(!reachable()?))?;
        ensure!(
            guarded(&a.host)? == ["192.168.77.2", "192.168.77.3", "192.168.77.50"],
            "{:?}",
            guarded(&a.host)?
        );
        // Its second subnet: one of them may go.
        pair.store.write_lease("10.244.51.0-24", &other.to_string())?;
        pair.a.wait_for_routes("four routes", |list| list.routes.len() == 4)?;
        pair.store.remove("subnets/10.244.50.0-24")?;
        pair.a.wait_for_routes("three routes", |list| list.routes.len() == 3)?;
        ensure!(!reachable()?, "a peer with one subnet less is not guarded");
        pair.store.remove("subnets/10.244.51.0-24")?;
        wait_until("a host that is no peer any more is reachable", reachable)?;
    }
    ensure!(!plain_injection(&pair)? && pair.a.status()?.state == "running", "{:?}", pair.a.status()?);
    Ok(())
}

/// B and C are peers of A, which routes between their underlays.
fn router(sandbox: &Arc<Sandbox>) -> Result<()> {
    let pair = pair(sandbox, Rung::Tun)?;
    let (a, b) = (&pair.topology.a, &pair.topology.b);
    let c = Netns::create(sandbox, "hostc")?;
    a.host.tool(&format!("ip link add eth1 type veth peer name {UPLINK} netns {}", c.name()))?;
    a.host.tool("ip address add 192.168.78.1/24 dev eth1")?;
    a.host.tool("ip link set eth1 up")?;
    let address = Ipv4Addr::new(192, 168, 78, 3);
    c.tool(&format!("ip address add {address}/24 dev {UPLINK}"))?;
    c.tool(&format!("ip link set {UPLINK} up"))?;
    c.tool("ip route add default via 192.168.78.1")?;
    b.host.tool(&format!("ip route add 192.168.78.0/24 via {}", a.underlay))?;
    let inner = datagram((Ipv4Addr::new(10, 244, 4, 5), 1), (b.pod_address, INNER_PORT), b"routed")?;
    let sent = |from: &Netns, source| {
        arrives(&b.pod, b.pod_address, INNER_PORT, || {
            bind(from, source, PORT)?.send_to(&inner, (b.underlay, PORT))?;
            Ok(())
        })
    };
    pair.store.write_lease("10.244.4.0-24", &address.to_string())?;
    pair.b.wait_for_routes("three routes", |list| list.routes.len() == 3)?;
    wait_until("all peers are guarded", || Ok(guarded(&a.host)?.len() == 3))?;
    wait_until("a peer reaches another through the host", || sent(&c, address))?;
    // The same packet, from the container.
    let outer = datagram((address, PORT), (b.underlay, PORT), &inner)?;
    let forged =
        arrives(&b.pod, b.pod_address, INNER_PORT, || send_raw(&a.pod, UPLINK, (&a.host, "veth0"), &outer))?;
    ensure!(!forged, "a container sent as a peer for which the host routes");
    Ok(())
}

fn flapping(sandbox: &Arc<Sandbox>) -> Result<()> {
    const CHANGES: usize = 1000;
    let topology = Topology::build(sandbox, Underlay::Virtual, PodOffload::On)?;
    let (store, a) = (Store::create(sandbox)?, &topology.a);
    // An nft that counts how often it applies a script.
    let directory = sandbox.new_directory("tools")?;
    let (runs, path) = (directory.join("runs"), env::var_os("PATH").unwrap_or_default());
    let nft = env::split_paths(&path).map(|directory| directory.join("nft")).find(|nft| nft.is_file());
    let (nft, program) = (nft.context("find nft")?, directory.join("nft"));
    let script = format!(
        "#!/bin/sh\n[ \"$1\" = -f ] && echo run >> {}\nexec {} \"$@\"\n",
        runs.display(),
        nft.display()
    );
    fs::write(&program, script)?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    let count = || fs::read_to_string(&runs).map(|text| text.lines().count()).context("read the runs of nft");

    let site = Site::new(sandbox, &a.host, "agent-a")?;
    let mut command = site.run_command(&store.arguments(a, Rung::Tun));
    command.env("PATH", &directory);
    let mut agent = site.launch(command)?;
    agent.wait_until_running()?;
    let before = count()?;
    for change in 0..CHANGES {
        match change % 2 {
            0 => store.write_lease("10.244.9.0-24", "192.168.77.9")?,
            _ => store.remove("subnets/10.244.9.0-24")?,
        }
        // Slow enough for an nft between two changes.
        thread::sleep(Duration::from_millis(4));
    }
    store.write_lease("10.244.10.0-24", "192.168.77.10")?;
    wait_until(
        "the last peer is guarded, the others are not",
        || Ok(guarded(&a.host)? == ["192.168.77.10"]),
    )?;
    let runs = count()? - before;
    ensure!((1..=CHANGES / 10).contains(&runs), "{CHANGES} changes of a peer started nft {runs} times");
    ensure!(agent.status()?.state == "running", "{:?}", agent.status()?);
    agent.stop()
}

fn routes(count: u32) -> Routes {
    let route = |index: u32| {
        let [_, high, low, _] = (index << 8).to_be_bytes();
        let subnet = Subnet::containing(ipnet::Ipv4Net::new_assert(Ipv4Addr::new(10, high, low, 0), 24));
        (subnet, Peer::from(Ipv4Addr::from(0xac10_0000 + index)))
    };
    (0..count).map(route).collect()
}

fn many_peers(sandbox: &Arc<Sandbox>) -> Result<()> {
    let host = Netns::create(sandbox, "host")?;
    let mut guard = Guard::new(DEVICE, PORT)?;
    let many = routes(10_000);
    inside(&host, guard.apply(&many))??;
    ensure!(guarded(&host)?.len() == 10_000, "not all peers are guarded");
    let fewer: Routes = many.iter().skip(1).map(|(subnet, peer)| (*subnet, *peer)).collect();
    let rules = || host.tool(&format!("nft --handle --terse list table ip overlay-guard-{DEVICE}"));
    let before = rules()?;
    inside(&host, guard.update(&fewer))??;
    let after = guarded(&host)?;
    ensure!(after.len() == 9_999 && !after.contains(&"172.16.0.0".to_owned()), "the update is not complete");
    ensure!(rules()? == before, "an update of the peers replaced the rules: {}", rules()?);
    let restored = |guard: &mut Guard| -> Result<bool> {
        for _ in 0..12 {
            if inside(&host, guard.reconcile(&fewer))?? {
                return Ok(true);
            }
        }
        Ok(false)
    };
    ensure!(!restored(&mut guard)?, "an intact table was replaced");
    host.tool(&format!("nft delete element ip overlay-guard-{DEVICE} peers {{ 172.16.1.1 }}"))?;
    ensure!(restored(&mut guard)? && guarded(&host)? == after, "a removed peer was not restored");
    // An update that the changed set refuses replaces it.
    host.tool(&format!("nft flush set ip overlay-guard-{DEVICE} peers"))?;
    let small = routes(3);
    inside(&host, guard.update(&small))??;
    ensure!(guarded(&host)?.len() == 3, "{:?}", guarded(&host)?);
    Ok(())
}
