//! A datapath reconciled with one desired state after another: what it leaves alone, makes and repairs.

use std::{
    net::{Ipv4Addr, UdpSocket},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use aya::{
    maps::{Array, HashMap, Map, MapData, MapInfo},
    programs::{SchedClassifier, tc::TcAttachType},
};
use overlay_agent::{
    containers::Containers,
    datapath::{
        Datapath, Desired, Pauses, Policy, Report, Request, Rung, UnderlayDevice,
        ebpf::{OBJECT, Pins, TcAttach},
    },
    device::{DeviceAlias, DeviceSpec},
    netlink::Netlink,
    route::{NextHops, RouteChange},
};
use overlay_ebpf::{
    abi::{Config, NextHop, Prefix},
    bypass::Bypass,
};
use overlay_tests::{
    netns::Netns,
    sandbox::Sandbox,
    topology::{PodOffload, Side, Topology, UPLINK, Underlay},
    traffic::ping::ping,
};
use tokio::{sync::mpsc, time::sleep};

use crate::{firewall::inside, foreign::attach_xdp, machine::Need, suite::Suite};

const DEVICE: &str = "ovl0";
const BOTH: &[Need] = &[Need::Tun, Need::Ebpf];

pub(crate) fn register(suite: &mut Suite) {
    suite.add("datapath::changes_touch_only_what_differs", BOTH, changes);
    suite.add("datapath::foreign_changes_are_repaired_and_reported", BOTH, repairs);
    suite.add("datapath::foreign_detached_filter_is_attached_again", BOTH, detached_filter);
    suite.add("datapath::recreated_devices_get_programs_again", BOTH, recreated);
    suite.add("datapath::datagrams_in_a_replaced_socket_are_delivered", &[Need::Tun], replaced_socket);
    suite.add("datapath::refused_explicit_request_leaves_nothing_attached", BOTH, refused);
}

/// One host, and what its datapath should be.
pub(crate) struct Host<'a> {
    netns: &'a Netns,
    netlink: Netlink,
    datapath: Datapath,
    failures: mpsc::Receiver<String>,
    spec: DeviceSpec,
    local_ip: Ipv4Addr,
    request: Request,
    tc_attach: TcAttach,
    routes: NextHops,
    pub(crate) bypass: Bypass,
    pub(crate) log: bool,
}

impl<'a> Host<'a> {
    /// Inside the namespace of `side`, with a route to `peer`.
    fn new(side: &'a Side, peer: &Side, request: Request) -> Result<Self> {
        Self::make(side, peer, request, None)
    }

    /// As [`Self::new`], with what an agent there has pinned.
    pub(crate) fn with_pins(side: &'a Side, peer: &Side, request: Request) -> Result<Self> {
        Self::make(side, peer, request, Some(Pins::open(DEVICE)?))
    }

    fn make(side: &'a Side, peer: &Side, request: Request, pins: Option<Pins>) -> Result<Self> {
        let netlink = Netlink::connect()?;
        let (sender, failures) = mpsc::channel(2);
        let underlays = vec![UPLINK.to_owned()];
        let alias = DeviceAlias { network: "10.244.0.0/16".parse()?, port: 8285, underlays };
        Ok(Self {
            netns: &side.host,
            datapath: Datapath::new(netlink.clone(), sender, pins, Pauses::default()),
            netlink,
            failures,
            spec: DeviceSpec { name: DEVICE.to_owned(), alias, subnet: side.subnet.parse()?, mtu: 1472 },
            local_ip: side.underlay,
            request,
            tc_attach: TcAttach::Auto,
            routes: NextHops::from([(peer.subnet.parse()?, next_hop(peer.underlay)?)]),
            bypass: Bypass::Off,
            log: false,
        })
    }

    pub(crate) async fn reconcile(&mut self) -> Result<Report> {
        let link = self.netlink.link(UPLINK).await?.context("there is no underlay")?;
        let desired = Desired {
            device: &self.spec,
            underlays: &[UnderlayDevice { link, local_ip: self.local_ip }],
            source: self.local_ip,
            other_ip: self.local_ip,
            policy: Policy::default(),
            slow_ingress: false,
            request: self.request,
            tc_attach: self.tc_attach,
            bypass: self.bypass,
            containers: &Containers::default(),
            routes: &self.routes,
            log: self.log,
        };
        self.datapath.reconcile(&desired).await
    }

    /// Packets of the programs.
    pub(crate) async fn counted(&self) -> Result<u64> {
        let counters = self.datapath.counters().await?.fast;
        Ok(counters.egress_packets + counters.ingress_packets)
    }

    /// Leaves what is pinned.
    pub(crate) fn leave(&mut self) {
        self.datapath.leave();
    }

    /// Reconciles and checks that this is all that was repaired.
    async fn repairs(&mut self, expected: &[&str]) -> Result<()> {
        let report = self.reconcile().await?;
        ensure!(report.repaired == expected, "expected {expected:?}, {report:?}");
        self.is_settled().await
    }

    async fn is_settled(&mut self) -> Result<()> {
        let report = self.reconcile().await?;
        ensure!(report == Report::default(), "not settled: {report:?}");
        Ok(())
    }

    /// Revisions of the hooks and ids of the programs: of the overlay's egress, of the underlay's ingress.
    fn hooks(&self) -> Result<[(u64, Vec<u32>); 2]> {
        Ok([hook(DEVICE, TcAttachType::Egress)?, hook(UPLINK, TcAttachType::Ingress)?])
    }

    /// Sends packets to the peer's subnet.
    async fn send(&self) -> Result<u64> {
        ping(self.netns, "10.244.2.0".parse()?, 3)?;
        let counters = self.datapath.counters().await?;
        Ok(counters.fast.egress_packets + counters.slow.egress_packets)
    }

    fn rungs(&self) -> [Rung; 2] {
        [self.datapath.egress().rung, self.datapath.ingress().rung]
    }
}

/// The way to a peer on the underlay device of this namespace.
fn next_hop(peer: Ipv4Addr) -> Result<NextHop> {
    let ifindex = nix::net::if_::if_nametoindex(UPLINK)?;
    Ok(NextHop { peer: peer.octets(), ifindex, mtu: 1472, ..NextHop::default() })
}

fn hook(device: &str, direction: TcAttachType) -> Result<(u64, Vec<u32>)> {
    let (revision, programs) = SchedClassifier::query_tcx(device, direction)?;
    Ok((revision, programs.iter().map(|program| program.id()).collect()))
}

/// Revisions of the tc hooks of an agent's devices with the ids of their programs, and the id of the XDP program. A revision
/// counts every attaching and detaching.
pub(crate) fn attached(side: &Side) -> Result<impl PartialEq + std::fmt::Debug + use<>> {
    inside(&side.host, async {
        let netlink = Netlink::connect()?;
        let index = netlink.link(UPLINK).await?.context("no underlay")?.index;
        let xdp = netlink.xdp_program(index).await?;
        anyhow::Ok((hook(DEVICE, TcAttachType::Egress)?, hook(UPLINK, TcAttachType::Ingress)?, xdp))
    })?
}

/// Another descriptor of a map that the program on the overlay device uses.
fn map(name: &str) -> Result<MapData> {
    let (_, programs) = SchedClassifier::query_tcx(DEVICE, TcAttachType::Egress)?;
    for id in programs.iter().filter_map(|program| program.map_ids().ok()??.into()).flatten() {
        if MapInfo::from_id(id)?.name_as_str() == Some(name) {
            return Ok(MapData::from_id(id)?);
        }
    }
    bail!("no map {name}")
}

fn changes(sandbox: &Arc<Sandbox>) -> Result<()> {
    ensure!(OBJECT.is_some(), "the tests were built without the eBPF programs");
    let Topology { a, b } = &Topology::build(sandbox, Underlay::Virtual, PodOffload::On)?;
    inside(&a.host, async {
        let mut host = Host::new(a, b, Request::Tc)?;
        let report = host.reconcile().await?;
        ensure!(report.repaired.is_empty() && host.rungs() == [Rung::Tc; 2], "{report:?}");
        host.is_settled().await?;
        let (hooks, ifindex) = (host.hooks()?, host.datapath.overlay_ifindex());
        let before = host.send().await?;
        ensure!(before > 0, "nothing was sent");

        let moved = Ipv4Addr::new(192, 168, 77, 11);
        a.host.tool(&format!("ip address add {moved}/24 dev {UPLINK}"))?;
        host.local_ip = moved;
        host.spec.subnet = "10.244.7.0/24".parse()?;
        host.spec.mtu = 1300;
        let report = host.reconcile().await?;
        ensure!(report.repaired.is_empty() && report.made.len() == 4, "{report:?}");
        host.is_settled().await?;
        ensure!(host.hooks()? == hooks, "a program was attached again: {hooks:?}, {:?}", host.hooks()?);
        ensure!(host.datapath.overlay_ifindex() == ifindex, "another device");
        let shown = a.host.tool(&format!("ip address show {DEVICE}"))?;
        ensure!(shown.contains("10.244.7.0/32") && !shown.contains("10.244.1.0"), "{shown}");
        ensure!(a.host.tool("ip route show 10.244.0.0/16")?.contains("src 10.244.7.0"));
        let sockets = a.host.tool("ss -Hlun sport = 8285")?;
        ensure!(sockets.contains("192.168.77.11%eth0:8285") && sockets.lines().count() == 1, "{sockets}");
        let after = host.send().await?;
        ensure!(after > before, "counters did not continue: {before}, then {after}");

        host.request = Request::Xdp;
        host.reconcile().await?;
        ensure!(host.rungs() == [Rung::Tc, Rung::Xdp] && host.hooks()? == hooks, "{:?}", host.rungs());
        let index = host.netlink.link(UPLINK).await?.context("no underlay")?.index;
        ensure!(host.netlink.xdp_program(index).await?.is_some(), "XDP is not attached");
        host.is_settled().await?;
        host.request = Request::Tc;
        host.reconcile().await?;
        ensure!(host.hooks()? == hooks && host.netlink.xdp_program(index).await?.is_none(), "XDP stayed");
        host.request = Request::Auto;
        let report = host.reconcile().await?;
        ensure!(report == Report::default() && host.hooks()? == hooks, "{report:?}");

        // Logging is a constant of the programs: others take their place, and count on.
        host.log = true;
        host.reconcile().await?;
        host.is_settled().await?;
        let after = host.send().await?.max(after);
        ensure!(host.hooks()? != hooks && host.rungs() == [Rung::Tc; 2], "{:?}", host.hooks()?);

        host.request = Request::Tun;
        host.reconcile().await?;
        ensure!(host.rungs() == [Rung::Tun; 2] && hook(UPLINK, TcAttachType::Ingress)?.1.is_empty());
        let slow = host.send().await?;
        ensure!(slow > after, "counters did not continue: {after}, then {slow}");
        host.datapath.remove().await?;
        ensure!(host.netlink.link(DEVICE).await?.is_none() && host.failures.try_recv().is_err());
        Ok(())
    })?
}

fn repairs(sandbox: &Arc<Sandbox>) -> Result<()> {
    let Topology { a, b } = &Topology::build(sandbox, Underlay::Virtual, PodOffload::On)?;
    inside(&a.host, async {
        let mut host = Host::new(a, b, Request::Tc)?;
        host.reconcile().await?;
        for (change, repaired) in [
            ("ip link set ovl0 alias mine", &["alias of ovl0"][..]),
            ("ip route delete 10.244.0.0/16", &["route of ovl0"]),
            ("ip link set ovl0 mtu 1000", &["state and MTU of ovl0"]),
            ("ip link set ovl0 down", &["state and MTU of ovl0", "route of ovl0"]),
            ("ip address add 10.9.9.9/32 dev ovl0", &["address of ovl0"]),
            ("ip address flush dev ovl0", &["address of ovl0", "route of ovl0"]),
        ] {
            a.host.tool(change)?;
            host.repairs(repaired).await.with_context(|| change.to_owned())?;
        }

        let mut routes: HashMap<_, [u8; 8], [u8; size_of::<NextHop>()]> =
            HashMap::try_from(Map::HashMap(map("ROUTES")?))?;
        let key = |third, length| bytemuck::cast(Prefix::new([10, 244, third, 0], length));
        routes.remove(&key(2, 24))?;
        routes.insert(key(3, 24), [3; size_of::<NextHop>()], 0)?;
        // Of a length that belongs into the other map.
        routes.insert(key(4, 25), [3; size_of::<NextHop>()], 0)?;
        // Reading back is limited to a share of the time.
        tokio::time::sleep(std::time::Duration::from_millis(500)).await;
        host.repairs(&["3 routes in the kernel's map"]).await?;
        let repaired = routes.get(&key(2, 24), 0)?;
        ensure!(repaired[..4] == b.underlay.octets(), "not repaired: {repaired:?}");

        // A removal of what is gone already is no error.
        routes.remove(&key(2, 24))?;
        let remove = RouteChange::Remove("10.244.2.0/24".parse()?);
        let kept = std::mem::take(&mut host.routes);
        host.datapath.apply_routes(&[remove], &host.routes)?;
        host.is_settled().await?;
        host.routes = kept;
        host.reconcile().await?;

        let mut config: Array<_, [u8; size_of::<Config>()]> = Array::try_from(Map::Array(map("CONFIG")?))?;
        config.set(0, [0; size_of::<Config>()], 0)?;
        host.repairs(&["configuration in the kernel's map"]).await?;
        ensure!(host.send().await? > 0, "nothing was sent");
        host.datapath.remove().await
    })?
}

fn detached_filter(sandbox: &Arc<Sandbox>) -> Result<()> {
    let Topology { a, b } = &Topology::build(sandbox, Underlay::Virtual, PodOffload::On)?;
    inside(&a.host, async {
        let mut host = Host::new(a, b, Request::Auto)?;
        host.tc_attach = TcAttach::Clsact;
        host.reconcile().await?;
        host.is_settled().await?;
        a.host.tool(&format!("tc filter delete dev {UPLINK} ingress"))?;
        host.repairs(&["program ovl_ingress on eth0"]).await?;
        a.host.tool(&format!("tc qdisc delete dev {DEVICE} clsact"))?;
        host.repairs(&["program ovl_egress on ovl0"]).await?;

        // The other way to attach is used before the present one ends.
        host.tc_attach = TcAttach::Tcx;
        let report = host.reconcile().await?;
        ensure!(report.made.len() == 4 && host.hooks()?.iter().all(|(_, ids)| ids.len() == 1), "{report:?}");
        let filters = a.host.tool(&format!("tc filter show dev {UPLINK} ingress"))?;
        ensure!(filters.is_empty(), "{filters}");
        host.datapath.remove().await
    })?
}

fn recreated(sandbox: &Arc<Sandbox>) -> Result<()> {
    let Topology { a, b } = &Topology::build(sandbox, Underlay::Virtual, PodOffload::On)?;
    inside(&a.host, async {
        let mut host = Host::new(a, b, Request::Tc)?;
        host.reconcile().await?;
        let [egress, _] = host.hooks()?;
        a.host.tool(&format!("ip link delete {UPLINK}"))?;
        a.host.tool(&format!("ip link add {UPLINK} type veth peer name {UPLINK} netns {}", b.host.name()))?;
        a.host.tool(&format!("ip address add {}/24 dev {UPLINK}", a.underlay))?;
        a.host.tool(&format!("ip link set {UPLINK} up"))?;
        b.host.tool(&format!("ip link set {UPLINK} up"))?;
        let report = host.reconcile().await?;
        ensure!(report.repaired.is_empty(), "{report:?}");
        let [same, ingress] = host.hooks()?;
        ensure!(same == egress && ingress.1.len() == 1, "{same:?} {ingress:?}");
        let before = host.send().await?;
        ensure!(before > 0, "nothing was sent");

        let index = host.datapath.overlay_ifindex();
        a.host.tool(&format!("ip link delete {DEVICE}"))?;
        let failure = host.failures.recv().await.context("no failure was reported")?;
        ensure!(failure.contains("overlay device"), "{failure}");
        let report = host.reconcile().await?;
        ensure!(report.repaired == ["device ovl0"], "{report:?}");
        ensure!(host.datapath.overlay_ifindex() != index && host.hooks()?[1] == ingress, "{report:?}");
        ensure!(host.send().await? > before, "counters did not continue");
        host.datapath.remove().await
    })?
}

/// The socket's address changes while datagrams wait in it.
fn replaced_socket(sandbox: &Arc<Sandbox>) -> Result<()> {
    /// More than the agent delivers until the socket is replaced, less than the socket takes.
    const COUNT: u64 = 5000;
    /// An empty datagram from container A to container B.
    const INNER: [u8; 28] =
        [0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17, 0, 0, 10, 244, 1, 2, 10, 244, 2, 2, 0, 9, 0, 9, 0, 8, 0, 0];
    let Topology { a, b } = &Topology::build(sandbox, Underlay::Virtual, PodOffload::On)?;
    let sender = a.host.run(|| UdpSocket::bind((a.underlay, 0)))??;
    let moved = Ipv4Addr::new(192, 168, 77, 12);
    b.host.tool(&format!("ip address add {moved}/24 dev {UPLINK}"))?;
    inside(&b.host, async {
        let mut host = Host::new(b, a, Request::Tun)?;
        host.reconcile().await?;
        for _ in 0..COUNT {
            sender.send_to(&INNER, (b.underlay, host.spec.alias.port))?;
        }
        host.local_ip = moved;
        host.reconcile().await?;
        let mut delivered = 0;
        for _ in 0..200 {
            delivered = host.datapath.counters().await?.slow.ingress_packets;
            if delivered == COUNT {
                return host.datapath.remove().await;
            }
            sleep(Duration::from_millis(20)).await;
        }
        let counters = host.datapath.counters().await?;
        bail!("{delivered} of {COUNT} datagrams were delivered: {counters:?}")
    })?
}

fn refused(sandbox: &Arc<Sandbox>) -> Result<()> {
    let Topology { a, b } = &Topology::build(sandbox, Underlay::Virtual, PodOffload::On)?;
    inside(&a.host, async {
        attach_xdp(&a.host, &sandbox.new_directory("foreign")?)?;
        let mut host = Host::new(a, b, Request::Xdp)?;
        let Err(error) = host.reconcile().await else { bail!("XDP was attached") };
        ensure!(
            format!("{error:#}").contains("--datapath xdp is not possible: another XDP program"),
            "{error:#}"
        );
        ensure!(hook(UPLINK, TcAttachType::Ingress)?.1.is_empty(), "a program stayed attached");
        host.request = Request::Auto;
        host.reconcile().await?;
        ensure!(host.rungs() == [Rung::Tc; 2], "{:?}", host.rungs());
        host.datapath.remove().await
    })?
}
