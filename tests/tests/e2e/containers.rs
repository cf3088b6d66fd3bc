//! Containers that the agent finds on a real kernel: bridges, veths, neighbours, and what follows when they change.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::Write as _,
    net::Ipv4Addr,
    sync::{Arc, mpsc},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use nix::net::if_::if_nametoindex;
use overlay_agent::{
    containers::{Containers, Facts, Selection, find, watch},
    netlink::Netlink,
};
use overlay_ebpf::abi::Endpoint;
use overlay_tests::{netns::Netns, sandbox::Sandbox};
use tokio::{
    runtime::{Builder, Runtime},
    sync::watch::Receiver,
    time::{sleep, timeout},
};

use crate::{machine::Need, suite::Suite};

/// Containers of the test with many.
const CROWD: usize = 400;
/// Longest time from a change to its report. The watch needs a few milliseconds; the machine is busy.
const PROMPT: Duration = Duration::from_secs(2);

pub(crate) fn register(suite: &mut Suite) {
    suite.add("containers::at_a_bridge_are_followed", &[], bridge);
    suite.add("containers::at_routed_veths_are_followed", &[], routed);
    suite.add("containers::of_many_are_followed_through_lost_messages", &[], crowd);
    suite.add("containers::that_leave_silently_are_forgotten", &[], silent);
    suite.add("containers::behind_a_vxlan_port_are_not_found", &[Need::Vxlan], remote);
}

/// A host with a bridge that has the gateway's address.
struct Host {
    netns: Arc<Netns>,
    runtime: Runtime,
}

/// A container with the address 10.244.1.`last`.
struct Container {
    netns: Arc<Netns>,
    veth: String,
    last: u8,
}

impl Host {
    fn start(sandbox: &Arc<Sandbox>) -> Result<Self> {
        let netns = Netns::create(sandbox, "host")?;
        // With an address of its own: otherwise it takes that of a port, and the kernel then forgets its neighbours.
        netns.tool("ip link add cni0 address 02:00:00:00:07:01 type bridge")?;
        netns.tool("ip address add 10.244.1.1/24 dev cni0")?;
        netns.tool("ip link set cni0 up")?;
        // Its threads begin in the namespace of the thread that starts them.
        let runtime = netns.run(|| Builder::new_multi_thread().worker_threads(1).enable_all().build())?;
        Ok(Self { netns, runtime: runtime.context("start a runtime")? })
    }

    fn run<T: Send>(&self, work: impl Future<Output = T> + Send) -> Result<T> {
        self.netns.run(|| self.runtime.block_on(work))
    }

    /// A container whose veth has this name.
    fn container(&self, sandbox: &Arc<Sandbox>, veth: &str, last: u8) -> Result<Container> {
        let netns = Netns::create(sandbox, "pod")?;
        let container = Container { netns, veth: veth.to_owned(), last };
        self.connect(&container)?;
        Ok(container)
    }

    fn connect(&self, Container { netns, veth, last }: &Container) -> Result<()> {
        let pod = netns.name();
        self.netns.tool(&format!("ip link add {veth} type veth peer name eth0 netns {pod}"))?;
        self.netns.tool(&format!("ip link set {veth} up"))?;
        netns.tool(&format!("ip link set eth0 address {}", mac_text(*last)))?;
        netns.tool(&format!("ip address add 10.244.1.{last}/24 dev eth0"))?;
        netns.tool("ip link set eth0 up")?;
        Ok(())
    }

    fn index(&self, name: &str) -> Result<u32> {
        self.netns.run(|| if_nametoindex(name))?.with_context(|| format!("the index of {name}"))
    }

    fn mac(&self, name: &str) -> Result<[u8; 6]> {
        let shown = self.netns.tool(&format!("ip -brief link show dev {name}"))?;
        let text = shown.split_whitespace().nth(2).context("a hardware address")?;
        let octets: Result<Vec<u8>, _> = text.split(':').map(|octet| u8::from_str_radix(octet, 16)).collect();
        octets?.try_into().ok().context("6 octets")
    }

    fn endpoint(&self, container: &Container, gateway: &str) -> Result<(Ipv4Addr, Endpoint)> {
        let endpoint = Endpoint {
            ifindex: self.index(&container.veth)?,
            mac: mac(container.last),
            gateway_mac: self.mac(gateway)?,
            flags: Endpoint::PEER,
        };
        Ok((address(container.last), endpoint))
    }

    /// Waits until the watch reports `expected`, and compares with a complete list.
    fn expect(
        &self,
        watched: &mut Receiver<Arc<Containers>>,
        what: &str,
        expected: &BTreeMap<Ipv4Addr, Endpoint>,
    ) -> Result<()> {
        self.run(async {
            let reported = timeout(PROMPT, watched.wait_for(|now| now.endpoints == *expected)).await;
            let reported = reported.is_ok_and(|reported| reported.is_ok());
            ensure!(reported, "{what}: expected {expected:?}, the watch reports {:?}", watched.borrow());
            // Other parts may be reported later.
            let listed = list(&[]).await?;
            let same = timeout(PROMPT, watched.wait_for(|now| **now == listed)).await.is_ok();
            ensure!(same, "{what}: the watch reports {:?}, a list has {listed:?}", watched.borrow());
            watched.mark_unchanged();
            Ok(())
        })?
    }

    /// Waits until the watch reports this number of containers, and compares with a complete list.
    fn count(&self, watched: &mut Receiver<Arc<Containers>>, count: usize) -> Result<()> {
        self.run(async {
            let limit = Duration::from_secs(10);
            let reached = timeout(limit, watched.wait_for(|now| now.endpoints.len() == count)).await.is_ok();
            ensure!(reached, "{} of {count} containers are known", watched.borrow().endpoints.len());
            // What was reported stays.
            sleep(Duration::from_millis(200)).await;
            let listed = list(&[]).await?;
            ensure!(**watched.borrow() == listed, "the watch and a list differ");
            Ok(())
        })?
    }

    /// No report follows.
    fn silence(&self, watched: &mut Receiver<Arc<Containers>>, what: &str) -> Result<()> {
        self.run(async {
            match timeout(Duration::from_millis(300), watched.changed()).await {
                Err(_) => Ok(()),
                Ok(_) => anyhow::bail!("{what}: the watch reports {:?}", watched.borrow()),
            }
        })?
    }
}

impl Container {
    /// Sends to the gateway, so that the host learns the addresses.
    fn ping(&self) -> Result<()> {
        self.netns.tool("ping -c 1 -W 2 10.244.1.1").map(drop)
    }
}

fn address(last: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 244, 1, last)
}

fn mac(last: u8) -> [u8; 6] {
    [0x02, 0, 0, 0, 7, last]
}

fn mac_text(last: u8) -> String {
    format!("02:00:00:00:07:{last:02x}")
}

fn selection(named: &[&str]) -> Selection {
    Selection {
        subnet: "10.244.0.0/16".parse().unwrap_or_default(),
        own_clsact: false,
        excluded: BTreeSet::new(),
        named: named.iter().map(|name| (*name).to_owned()).collect(),
    }
}

async fn list(named: &[&str]) -> Result<Containers> {
    let selection = selection(named);
    Ok(find(&Facts::read(&Netlink::connect()?, selection.subnet).await?, &selection))
}

fn bridge(sandbox: &Arc<Sandbox>) -> Result<()> {
    let host = Host::start(sandbox)?;
    let mut watched = host.run(watch(selection(&[])))??;
    let mut expected = BTreeMap::new();
    let mut start = |veth, last| {
        let pod = host.container(sandbox, veth, last)?;
        host.netns.tool(&format!("ip link set {veth} master cni0"))?;
        pod.ping()?;
        expected.extend([host.endpoint(&pod, "cni0")?]);
        host.expect(&mut watched, "a container that started", &expected)?;
        anyhow::Ok(pod)
    };
    let (a, b) = (&start("va", 2)?, &start("vb", 3)?);
    let arrivals: Vec<u32> = watched.borrow().arrivals.keys().copied().collect();
    ensure!(arrivals == [host.index("va")?, host.index("vb")?], "packets arrive at {arrivals:?}");

    // What has no effect on containers.
    for line in [
        "ip neighbour change 10.244.1.2 dev cni0 nud stale",
        "ip neighbour change 10.244.1.2 dev cni0 nud reachable",
        "ip link set va mtu 1400",
        "ip link add other type bridge",
        "ip neighbour add 10.244.1.9 lladdr 02:00:00:00:00:99 dev cni0 nud permanent",
    ] {
        host.netns.tool(line)?;
    }
    host.silence(&mut watched, "what has no effect")?;

    // The bridge forgets the hardware address, and the neighbour stays.
    host.netns.tool("ip link set vb nomaster")?;
    let without_b = BTreeMap::from([host.endpoint(a, "cni0")?]);
    host.expect(&mut watched, "a port that left the bridge", &without_b)?;
    host.netns.tool("ip link set vb master cni0")?;
    b.ping()?;
    host.expect(&mut watched, "a port that came back", &expected)?;

    // The same container at another port.
    host.netns.tool("ip link delete vb")?;
    host.expect(&mut watched, "a container that is gone", &without_b)?;
    let moved = Container { netns: Arc::clone(&b.netns), veth: "vc".to_owned(), last: 3 };
    host.connect(&moved)?;
    host.netns.tool("ip link set vc master cni0")?;
    moved.ping()?;
    let now = BTreeMap::from([host.endpoint(a, "cni0")?, host.endpoint(&moved, "cni0")?]);
    host.expect(&mut watched, "a container at another port", &now)?;

    // A hardware address that moves from port to port, as when a machine migrates. Sticky: no packet of the container moves it.
    host.netns.tool(&format!("bridge fdb replace {} dev vc master static sticky", mac_text(2)))?;
    let port = host.index("vc")?;
    let at_port = now.iter().map(|(address, endpoint)| (*address, Endpoint { ifindex: port, ..*endpoint }));
    host.expect(&mut watched, "a hardware address at another port", &at_port.collect())?;
    host.netns.tool(&format!("bridge fdb replace {} dev va master static sticky", mac_text(2)))?;
    host.expect(&mut watched, "a hardware address at its old port", &now)?;

    host.netns.tool("ip address add 10.244.1.2/32 dev lo")?;
    let only_moved = BTreeMap::from([host.endpoint(&moved, "cni0")?]);
    host.expect(&mut watched, "an address that the host has taken", &only_moved)?;
    host.netns.tool("ip address delete 10.244.1.2/32 dev lo")?;
    host.expect(&mut watched, "an address that the host has released", &now)?;

    host.netns.tool("ip link delete cni0")?;
    host.expect(&mut watched, "a bridge that is gone", &BTreeMap::new())?;
    ensure!(watched.borrow().arrivals.is_empty(), "packets still arrive: {:?}", watched.borrow());
    Ok(())
}

fn routed(sandbox: &Arc<Sandbox>) -> Result<()> {
    let host = Host::start(sandbox)?;
    let mut watched = host.run(watch(selection(&[])))??;
    let pod = host.container(sandbox, "vr", 7)?;
    host.netns.tool("ip route add 10.244.1.7/32 dev vr")?;
    pod.ping()?;
    let expected = BTreeMap::from([host.endpoint(&pod, "vr")?]);
    host.expect(&mut watched, "a container at a routed veth", &expected)?;

    // Another container with the address of the first: its packets make a neighbour on its own device.
    let thief = host.container(sandbox, "vt", 7)?;
    host.netns.tool("ip route add 10.244.1.8/32 dev vt")?;
    host.netns.tool(&format!("ip neighbour replace 10.244.1.7 lladdr {} dev vt nud stale", mac_text(8)))?;
    host.expect(&mut watched, "a container with the address of another", &expected)?;
    drop(thief);
    host.netns.tool("ip route replace 10.244.1.7/32 dev cni0")?;
    host.expect(&mut watched, "a route to elsewhere", &BTreeMap::new())?;
    host.netns.tool("ip route replace 10.244.1.7/32 dev vr")?;
    host.expect(&mut watched, "the route of the container", &expected)?;

    // The kernel removes the route, and sends no message about that.
    host.netns.tool("ip link set vr down")?;
    host.expect(&mut watched, "a veth that is down", &BTreeMap::new())?;
    host.netns.tool("ip link set vr up")?;
    host.netns
        .tool(&format!("ip neighbour replace 10.244.1.7 lladdr {} dev vr nud permanent", mac_text(7)))?;
    host.expect(&mut watched, "a veth that is up again, without route", &BTreeMap::new())?;
    host.netns.tool("ip route add 10.244.1.7/32 dev vr")?;
    host.expect(&mut watched, "a veth with a route again", &expected)?;
    pod.netns.tool("ip link set eth0 down")?;
    host.expect(&mut watched, "a veth without carrier", &BTreeMap::new())?;
    Ok(())
}

/// Many containers come and go while the agent has no time to read the kernel's messages.
fn crowd(sandbox: &Arc<Sandbox>) -> Result<()> {
    let host = Host::start(sandbox)?;
    let pods = Netns::create(sandbox, "pods")?;
    let mut watched = host.run(watch(selection(&[])))??;
    // Occupies the only thread that could read them.
    let busy = || {
        let (release, released) = mpsc::channel::<()>();
        host.runtime.spawn(async move { released.recv().ok() });
        release
    };
    let number = |index: usize| (index / 250 + 2, index % 250 + 1);
    let mac = |index| {
        let (high, low) = number(index);
        format!("02:00:00:01:{high:02x}:{low:02x}")
    };
    let pod = pods.name();
    let (mut links, mut fdb) = (String::new(), String::new());
    for index in 0..CROWD {
        let ((high, low), mac) = (number(index), mac(index));
        links += &format!("link add v{index} type veth peer name e{index} netns {pod}\n");
        links += &format!("link set v{index} master cni0 up\n");
        links += &format!("route add 10.244.{high}.{low} dev cni0\n");
        links += &format!("neighbour add 10.244.{high}.{low} lladdr {mac} dev cni0 nud permanent\n");
        fdb += &format!("fdb add {mac} dev v{index} master static\n");
    }
    let peers: String = (0..CROWD).map(|index| format!("link set e{index} up\n")).collect();
    let blocked = busy();
    batch(&host.netns, "ip", &links)?;
    batch(&pods, "ip", &peers)?;
    batch(&host.netns, "bridge", &fdb)?;
    drop(blocked);
    host.count(&mut watched, CROWD)?;

    // One removed, while the agent has time.
    host.netns.tool("ip link delete v0")?;
    host.count(&mut watched, CROWD - 1)?;
    let removed: String = (1..CROWD).step_by(2).map(|index| format!("link delete v{index}\n")).collect();
    let blocked = busy();
    batch(&host.netns, "ip", &removed)?;
    drop(blocked);
    host.count(&mut watched, CROWD / 2 - 1)
}

/// A container gives up its address without a word. No packet for it takes the host's stack, which would notice.
fn silent(sandbox: &Arc<Sandbox>) -> Result<()> {
    let host = Host::start(sandbox)?;
    let settings = ["base_reachable_time_ms=200", "delay_first_probe_time=0", "retrans_time_ms=50"];
    let words = settings.map(|setting| format!("net.ipv4.neigh.cni0.{setting}")).join(" ");
    host.netns.tool(&format!("sysctl -q -w {words}"))?;
    let mut watched = host.run(watch(selection(&[])))??;
    let (stays, leaves) = (host.container(sandbox, "va", 2)?, host.container(sandbox, "vb", 3)?);
    for container in [&stays, &leaves] {
        host.netns.tool(&format!("ip link set {} master cni0", container.veth))?;
        container.ping()?;
    }
    let one = host.endpoint(&stays, "cni0")?;
    let both = BTreeMap::from([one, host.endpoint(&leaves, "cni0")?]);
    host.expect(&mut watched, "two containers", &both)?;
    // Probed several times, a container that is there stays.
    host.silence(&mut watched, "containers that are there")?;
    leaves.netns.tool("ip address flush dev eth0")?;
    host.expect(&mut watched, "a container without its address", &BTreeMap::from([one]))?;
    host.silence(&mut watched, "the other container")
}

/// Runs the lines as one program.
pub(crate) fn batch(netns: &Netns, tool: &str, lines: &str) -> Result<()> {
    let mut file = tempfile::NamedTempFile::new()?;
    file.write_all(lines.as_bytes())?;
    netns.tool(&format!("{tool} -batch {}", file.path().display())).map(drop)
}

/// A VXLAN port of the bridge, with remote machines in both of its tables.
fn remote(sandbox: &Arc<Sandbox>) -> Result<()> {
    let host = Host::start(sandbox)?;
    let mut watched = host.run(watch(selection(&[])))??;
    for line in [
        "ip link add vx type vxlan id 7 dstport 4789 local 127.0.0.1 nolearning",
        "ip link set vx master cni0 up",
        "bridge fdb append 02:00:00:00:07:05 dev vx dst 192.0.2.9 self",
        "bridge fdb add 02:00:00:00:07:05 dev vx master static",
        "ip neighbour add 10.244.1.5 lladdr 02:00:00:00:07:05 dev cni0 nud permanent",
    ] {
        host.netns.tool(line)?;
    }
    host.expect(&mut watched, "a machine behind a VXLAN port", &BTreeMap::new())?;
    let skipped = watched.borrow().skipped.clone();
    ensure!(matches!(&skipped[..], [why] if why.starts_with("vx: a port")), "skipped: {skipped:?}");
    // A container that takes over both addresses.
    host.netns.tool("bridge fdb delete 02:00:00:00:07:05 dev vx master static")?;
    host.netns.tool("ip neighbour delete 10.244.1.5 dev cni0")?;
    let pod = host.container(sandbox, "va", 5)?;
    host.netns.tool("ip link set va master cni0")?;
    pod.ping()?;
    host.expect(&mut watched, "a container", &BTreeMap::from([host.endpoint(&pod, "cni0")?]))
}
