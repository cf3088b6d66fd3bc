//! Selection and watch of the underlay, and the blackhole route, on a real kernel.

use std::{net::Ipv4Addr, sync::Arc, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use overlay_agent::{
    netlink::Netlink,
    underlay::{Iface, Selector, Underlay, UnderlayChange, watch},
};
use overlay_tests::{netns::Netns, sandbox::Sandbox};
use tokio::{sync::mpsc::Receiver, time::timeout};

use crate::{firewall::inside, suite::Suite};

const SECOND: Duration = Duration::from_secs(1);

pub(crate) fn register(suite: &mut Suite) {
    suite.add("underlay::selection_follows_addresses_and_routes", &[], choices);
    suite.add("underlay::a_blackhole_has_the_lowest_preference", &[], blackhole);
    suite.add("underlay::changes_of_address_and_mtu_are_reported", &[], changes);
}

/// A host with two links: eth0 leads out by default, eth1 to 172.16.0.0/24.
fn host(sandbox: &Arc<Sandbox>) -> Result<Arc<Netns>> {
    let host = Netns::create(sandbox, "host")?;
    for (name, address) in [("eth0", "10.0.0.1/24"), ("eth1", "172.16.0.1/24")] {
        host.tool(&format!("ip link add {name} type veth peer name {name}p"))?;
        host.tool(&format!("ip address add {address} dev {name}"))?;
        host.tool(&format!("ip link set {name}p up"))?;
        host.tool(&format!("ip link set {name} up"))?;
    }
    host.tool("ip route add default via 10.0.0.254 metric 100")?;
    host.tool("ip route add default via 172.16.0.254 metric 200")?;
    host.tool("ip route add 10.7.0.0/16 via 172.16.0.254 src 172.16.0.1")?;
    host.tool("ip route add unreachable 10.8.0.0/16")?;
    Ok(host)
}

fn choices(sandbox: &Arc<Sandbox>) -> Result<()> {
    let host = host(sandbox)?;
    let reach = |address: [u8; 4]| Selector { can_reach: Some(address.into()), ..Selector::default() };
    let cases = [
        ("the default route of the lowest metric", Selector::default(), Some("eth0 10.0.0.1")),
        ("a neighbour", reach([172, 16, 0, 9]), Some("eth1 172.16.0.1")),
        ("a routed address", reach([10, 7, 1, 1]), Some("eth1 172.16.0.1")),
        ("an address behind the default route", reach([192, 0, 2, 1]), Some("eth0 10.0.0.1")),
        ("an unreachable address", reach([10, 8, 0, 1]), None),
        ("an address of this host", reach([10, 0, 0, 1]), None),
        (
            "the holder of the public address",
            Selector { public_ip: Some(Ipv4Addr::new(172, 16, 0, 1)), ..Selector::default() },
            Some("eth1 172.16.0.1"),
        ),
        (
            "the second of two names",
            Selector {
                ifaces: ["eth9", "eth1"].map(|name| Iface::Name(name.to_owned())).into(),
                ..Selector::default()
            },
            Some("eth1 172.16.0.1"),
        ),
    ];
    for (what, selector, expected) in cases {
        let found = inside(&host, async { Underlay::find(&Netlink::connect()?, &selector).await })?;
        let found = found.ok().map(|underlay| format!("{} {}", underlay.link.name, underlay.local_ip));
        ensure!(found.as_deref() == expected, "{what}: expected {expected:?}, found {found:?}");
    }
    Ok(())
}

fn blackhole(sandbox: &Arc<Sandbox>) -> Result<()> {
    let host = host(sandbox)?;
    let subnet = "10.244.1.0/24".parse()?;
    let route = |address: &str| host.tool(&format!("ip route get {address}"));
    inside(&host, async {
        let netlink = Netlink::connect()?;
        ensure!(!netlink.remove_blackhole(subnet).await?, "removed what was not there");
        netlink.add_blackhole(subnet).await?;
        netlink.add_blackhole(subnet).await?;
        ensure!(route("10.244.1.9").is_err(), "routed on: {:?}", route("10.244.1.9"));
        ensure!(route("10.244.2.9")?.contains("eth0"), "another subnet is not routed on");
        // A bridge that comes later, with the whole subnet.
        host.tool("ip address add 10.244.1.1/24 dev eth1")?;
        ensure!(route("10.244.1.9")?.contains("eth1"), "the bridge's packets are discarded");
        host.tool("ip route add blackhole 10.244.3.0/24 metric 5")?;
        ensure!(
            netlink.blackholes().await? == [subnet],
            "the agent's blackhole is not distinguished from others"
        );
        ensure!(netlink.remove_blackhole(subnet).await?, "not removed");
        host.tool("ip address delete 10.244.1.1/24 dev eth1")?;
        ensure!(route("10.244.1.9")?.contains("eth0"), "still discarded");
        Ok(())
    })?
}

fn changes(sandbox: &Arc<Sandbox>) -> Result<()> {
    let host = host(sandbox)?;
    inside(&host, async {
        let found = Underlay::find(&Netlink::connect()?, &Selector::default()).await?;
        // A change between the selection and the watch is reported, too.
        host.tool("ip link set eth0 mtu 1400")?;
        let mut watched = watch(found, &Selector::default())?;
        expect(&mut watched, "another MTU before the watch began", "10.0.0.1", 1400).await?;

        host.tool("ip link set eth0 mtu 1300")?;
        expect(&mut watched, "another MTU", "10.0.0.1", 1300).await?;

        host.tool("ip address add 192.168.5.1/24 dev eth0")?;
        host.tool("ip address add 172.16.0.2/24 dev eth1")?;
        host.tool("ip link set eth1 mtu 1200")?;
        silence(&mut watched, "a further address, and another device").await?;

        host.tool("ip address delete 10.0.0.1/24 dev eth0")?;
        expect(&mut watched, "another address", "192.168.5.1", 1300).await?;

        host.tool("ip address delete 192.168.5.1/24 dev eth0")?;
        expect_lost(&mut watched, "no address", "eth0 has no IPv4 address").await?;
        host.tool("ip address add 192.168.5.1/24 dev eth0")?;
        expect(&mut watched, "the old address again", "192.168.5.1", 1300).await?;

        host.tool("ip link delete eth0")?;
        expect_lost(&mut watched, "no device", "eth0 is gone").await?;
        host.tool("ip link add eth0 type veth peer name eth0p")?;
        host.tool("ip address add 10.0.0.3/24 dev eth0")?;
        expect(&mut watched, "a new device", "10.0.0.3", 1500).await
    })?
}

async fn next(watched: &mut Receiver<UnderlayChange>, what: &str) -> Result<UnderlayChange> {
    let change = timeout(5 * SECOND, watched.recv()).await;
    change.ok().flatten().with_context(|| format!("{what}: the watch reports nothing"))
}

async fn expect(watched: &mut Receiver<UnderlayChange>, what: &str, address: &str, mtu: u32) -> Result<()> {
    match next(watched, what).await? {
        UnderlayChange::Changed(now) => ensure!(
            now.local_ip.to_string() == address && now.public_ip == now.local_ip && now.link.mtu == mtu,
            "{what}: the watch reports {now:?}"
        ),
        UnderlayChange::Lost(why) => bail!("{what}: the watch reports: {why}"),
    }
    silence(watched, what).await
}

async fn expect_lost(watched: &mut Receiver<UnderlayChange>, what: &str, expected: &str) -> Result<()> {
    let change = next(watched, what).await?;
    let reported = matches!(&change, UnderlayChange::Lost(why) if why.contains(expected));
    ensure!(reported, "{what}: the watch reports {change:?}");
    silence(watched, what).await
}

/// Each change is reported once.
async fn silence(watched: &mut Receiver<UnderlayChange>, what: &str) -> Result<()> {
    match timeout(SECOND / 2, watched.recv()).await {
        Err(_) => Ok(()),
        Ok(change) => bail!("{what}: the watch reports more: {change:?}"),
    }
}
