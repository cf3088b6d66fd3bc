//! Under a policy that drops forwarded packets, containers reach everything and outside hosts reach no container.

use std::{net::Ipv4Addr, sync::Arc};

use anyhow::{Result, ensure};
use overlay_tests::{
    agent::Rung,
    netns::Netns,
    pair::Pair,
    sandbox::Sandbox,
    topology::{Endpoint, Side, UPLINK},
};

use crate::{
    firewall::{DROP_POLICY, expect, hosts, on_underlay},
    guard::{INNER_PORT, arrives, bind, datagram, loosen, send_raw},
    machine::Need,
    suite::Suite,
};

pub(crate) fn register(suite: &mut Suite) {
    let fast = &[Need::Tun, Need::Ebpf, Need::Nftables];
    suite.add("forward_policy::outside_hosts_are_kept_out_on_tun", &[Need::Tun, Need::Nftables], |sandbox| {
        drop_policy(sandbox, Rung::Tun)
    });
    suite.add("forward_policy::outside_hosts_are_kept_out_on_tc", fast, |sandbox| {
        drop_policy(sandbox, Rung::Tc)
    });
}

fn drop_policy(sandbox: &Arc<Sandbox>, rung: Rung) -> Result<()> {
    let topology = hosts(sandbox)?;
    for command in DROP_POLICY {
        topology.a.host.tool(command)?;
    }
    let neighbour = neighbour(sandbox, &topology.a)?;
    let pair = Pair::start(sandbox, topology, rung, rung)?;
    let (a, b) = (&pair.topology.a, &pair.topology.b);
    loosen(&a.host)?;
    let second = Endpoint { netns: &neighbour, address: Ipv4Addr::new(10, 244, 1, 3) };
    let outside = on_underlay(b);
    expect("container to its peer", a.pod(), b.pod(), Some(a.pod_address))?;
    expect("container from its peer", b.pod(), a.pod(), Some(b.pod_address))?;
    expect("container from the peer's host", b.host(), a.pod(), Some(b.host_address))?;
    expect("container to another one of its host", a.pod(), second, Some(a.pod_address))?;
    expect("container to an outside host", a.pod(), outside, Some(a.pod_address))?;
    expect("an outside host to a container", outside, a.pod(), None)?;

    // Published by DNAT.
    for command in [
        "nft add table ip publishing".to_owned(),
        "nft add chain ip publishing pre { type nat hook prerouting priority -100 ; }".to_owned(),
        format!(
            "nft add rule ip publishing pre ip daddr {} udp dport 7777 dnat to {}:{INNER_PORT}",
            a.underlay, a.pod_address
        ),
    ] {
        a.host.tool(&command)?;
    }
    let published = arrives(&a.pod, a.pod_address, INNER_PORT, || {
        bind(&b.host, b.underlay, 0)?.send_to(b"published", (a.underlay, 7777))?;
        Ok(())
    })?;
    ensure!(published, "a published port is not reachable");

    // An outside host that uses a container's address; the reverse path filter is off.
    let packet = datagram((Ipv4Addr::new(10, 244, 2, 9), 1), (a.pod_address, INNER_PORT), b"forged")?;
    let forged = || {
        arrives(&a.pod, a.pod_address, INNER_PORT, || send_raw(&b.host, UPLINK, (&a.host, UPLINK), &packet))
    };
    ensure!(!forged()?, "an outside host reached a container with an address of the overlay");
    // That the packet is a good one shows without the policy.
    a.host.tool("nft add chain ip filter FORWARD { policy accept ; }")?;
    ensure!(forged()?, "the forged packet does not arrive although nothing drops it");
    expect("an outside host to a container without policy", outside, a.pod(), Some(b.underlay))?;
    // The mark is gone once the packet has passed the FORWARD chain.
    a.host.tool("nft add table ip probe")?;
    a.host.tool("nft add chain ip probe post { type filter hook postrouting priority 0 ; }")?;
    a.host.tool("nft add rule ip probe post ip saddr 10.244.0.0/16 meta mark != 0 drop")?;
    expect("container to its peer, unmarked", a.pod(), b.pod(), Some(a.pod_address))
}

/// A second container of the host, with the address 10.244.1.3.
fn neighbour(sandbox: &Arc<Sandbox>, side: &Side) -> Result<Arc<Netns>> {
    let pod = Netns::create(sandbox, "neighbour")?;
    let host = &side.host;
    host.tool(&format!("ip link add veth1 type veth peer name {UPLINK} netns {}", pod.name()))?;
    host.tool("ip link set veth1 up")?;
    host.tool("ip route add 10.244.1.3/32 dev veth1")?;
    for device in ["veth0", "veth1"] {
        // By default, the kernel waits up to 0.8 s before it answers for another address.
        host.tool(&format!(
            "sysctl -q -w net.ipv4.conf.{device}.proxy_arp=1 net.ipv4.neigh.{device}.proxy_delay=0"
        ))?;
    }
    pod.tool(&format!("ip address add 10.244.1.3/32 dev {UPLINK}"))?;
    pod.tool(&format!("ip link set {UPLINK} up"))?;
    pod.tool(&format!("ip route add 10.244.1.1/32 dev {UPLINK}"))?;
    pod.tool("ip route add default via 10.244.1.1")?;
    Ok(pod)
}
