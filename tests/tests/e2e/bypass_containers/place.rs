//! A host with several containers behind a bridge or behind routed veths, and the reference side as its peer.

use std::{
    net::Ipv4Addr,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use overlay_tests::{
    agent::{Agent, Rung},
    netns::Netns,
    pair::Pair,
    report::{Bypass, Counters},
    sandbox::Sandbox,
    topology::{Endpoint, OVERLAY_MTU, POD_LINK, PodOffload, Side, Topology, UPLINK, Underlay},
    traffic::udp::{is_answered, with_echo},
};

use crate::{containers::batch, frames, matrix::diagnosis, wait::wait_until};

/// The bridge of the host.
pub(super) const BRIDGE: &str = "cni0";
/// The hardware address of the bridge. Without one of its own, it takes that of a port, and the kernel then forgets its neighbours.
pub(super) const BRIDGE_MAC: &str = "02:00:00:00:08:01";
/// The last number of the address of the container that is there from the beginning, as on the reference topology.
pub(super) const FIRST: u8 = 2;
/// An address outside of the overlay, on a host behind host A.
const OUTSIDE: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 2);
/// Counts, by address, the packets that the stack of the host forwards.
const SEEN: &str = "table ip seen { set from { type ipv4_addr; flags dynamic; size 65535; counter; }; \
                    set to { type ipv4_addr; flags dynamic; size 65535; counter; }; \
                    chain forward { type filter hook forward priority -10; update @from { ip saddr }; update @to { ip daddr }; }; }";

/// How containers are connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Veths that are ports of a bridge with the gateway's address.
    Bridge,
    /// A veth with a host route for each container, whose gateway is link-local and answered for by proxy ARP, as Calico has it.
    Routed,
}

impl Kind {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Bridge => "bridge",
            Self::Routed => "routed",
        }
    }
}

/// The two hosts with their agents. Host A has containers of the given kind.
pub(super) struct Place {
    pub(super) pair: Pair,
    pub(super) kind: Kind,
    outside: Arc<Netns>,
    sandbox: Arc<Sandbox>,
    devices: AtomicU32,
}

/// A container of host A.
pub(super) struct Container {
    pub(super) netns: Arc<Netns>,
    pub(super) address: Ipv4Addr,
    /// Hardware address.
    pub(super) mac: String,
    /// The end of the veth in the host.
    pub(super) veth: String,
}

impl Container {
    /// As an end of traffic.
    pub(super) fn end(&self) -> Endpoint<'_> {
        Endpoint { netns: &self.netns, address: self.address }
    }

    /// Tells its network its hardware address, as programs that start or move containers do: a gratuitous ARP request (RFC 5227
    /// section 2.3).
    pub(super) fn announce(&self) -> Result<()> {
        let mac = frames::from_hex(&self.mac.replace(':', ""))?;
        let address = self.address.octets();
        let arp = [0, 1, 8, 0, 6, 4, 0, 1];
        let frame =
            [&[0xff; 6][..], &mac, &[8, 6], &arp, &mac, &address, &[0; 6], &address, &[0; 18]].concat();
        ensure!(self.netns.run(|| frames::send(UPLINK, &[frame]))?? == 1, "the announcement was not sent");
        Ok(())
    }

    /// Packets that have arrived although they are for another address.
    pub(super) fn strays(&self) -> Result<u64> {
        let text = self.netns.tool("cat /proc/thread-self/net/snmp")?;
        let mut rows = text.lines().filter_map(|line| line.strip_prefix("Ip: ")).map(str::split_whitespace);
        let (names, values) = (rows.next().context("no names")?, rows.next().context("no values")?);
        let found = names.zip(values).find(|(name, _)| *name == "InAddrErrors");
        found.and_then(|(_, value)| value.parse().ok()).context("no count of wrong addresses")
    }
}

/// Address 10.244.1.`last`.
pub(super) fn address(last: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 244, 1, last)
}

impl Place {
    /// Both agents on tc, on a virtual underlay.
    pub(super) fn start(sandbox: &Arc<Sandbox>, kind: Kind, bypass: &str) -> Result<Self> {
        Self::start_with(sandbox, kind, (Rung::Tc, Underlay::Virtual), &["--bypass", bypass])
    }

    /// With these arguments for both agents.
    pub(super) fn start_with(
        sandbox: &Arc<Sandbox>,
        kind: Kind,
        (rung, underlay): (Rung, Underlay),
        arguments: &[&str],
    ) -> Result<Self> {
        let topology = Topology::build(sandbox, underlay, PodOffload::On)?;
        prepare(&topology.a, kind)?;
        let outside = connect_outside(sandbox, &topology.a)?;
        let pair = Pair::start_with(sandbox, topology, rung, rung, arguments)?;
        let (sandbox, devices) = (Arc::clone(sandbox), AtomicU32::new(0));
        let place = Self { pair, kind, outside, sandbox, devices };
        place.connect(&place.first())?;
        Ok(place)
    }

    /// The container that is there from the beginning.
    pub(super) fn first(&self) -> Container {
        let netns = Arc::clone(&self.pair.topology.a.pod);
        Container { netns, address: address(FIRST), mac: mac(0, FIRST), veth: format!("v{FIRST}") }
    }

    pub(super) fn host(&self) -> &Netns {
        &self.pair.topology.a.host
    }

    pub(super) fn agent(&self) -> &Agent {
        &self.pair.a
    }

    /// The container of the peer.
    pub(super) fn remote(&self) -> Endpoint<'_> {
        self.pair.topology.b.pod()
    }

    /// The end of traffic outside of the overlay.
    pub(super) fn outside(&self) -> Endpoint<'_> {
        Endpoint { netns: &self.outside, address: OUTSIDE }
    }

    /// A new container with the address 10.244.1.`last`: its hardware address is another one each time.
    pub(super) fn add(&self, last: u8) -> Result<Container> {
        let container = self.prepare(last)?;
        self.connect(&container)?;
        Ok(container)
    }

    /// A new container that is not connected.
    pub(super) fn prepare(&self, last: u8) -> Result<Container> {
        let number = self.devices.fetch_add(1, Relaxed) + 1;
        let netns = Netns::create(&self.sandbox, "container")?;
        let high = u8::try_from(number & 0xff)?;
        Ok(Container { netns, address: address(last), mac: mac(high, last), veth: format!("veth{number}") })
    }

    /// Connects a container as its kind has it.
    pub(super) fn connect(&self, container: &Container) -> Result<()> {
        self.link(container)?;
        self.configure(container)?;
        match self.kind {
            Kind::Bridge => self.plug(container, BRIDGE),
            Kind::Routed => {
                let Container { address, veth, .. } = container;
                batch(self.host(), "ip", &format!("route replace {address}/32 dev {veth}"))
            }
        }
    }

    /// Makes the veth of a container, not yet in the bridge.
    pub(super) fn link(&self, Container { netns, mac, veth, .. }: &Container) -> Result<()> {
        let pod = netns.name();
        batch(
            self.host(),
            "ip",
            &format!(
                "link add {veth} mtu {OVERLAY_MTU} type veth peer name {UPLINK} address {mac} mtu {OVERLAY_MTU} netns {pod}\n\
                 link set {veth} up\n"
            ),
        )?;
        if self.kind == Kind::Routed {
            let proxy = "net.ipv4.conf.VETH.proxy_arp=1 net.ipv4.neigh.VETH.proxy_delay=0";
            self.host().tool(&format!("sysctl -q -w {}", proxy.replace("VETH", veth)))?;
        }
        batch(netns, "ip", &format!("link set {UPLINK} up"))
    }

    /// Gives a container its address and its routes.
    pub(super) fn configure(&self, Container { netns, address, .. }: &Container) -> Result<()> {
        let lines = match self.kind {
            Kind::Bridge => {
                format!("address add {address}/24 dev {UPLINK}\nroute replace default via 10.244.1.1\n")
            }
            Kind::Routed => format!(
                "address add {address}/32 dev {UPLINK}\nroute replace 169.254.1.1 dev {UPLINK} scope link\n\
                 route replace default via 169.254.1.1 dev {UPLINK}\n"
            ),
        };
        batch(netns, "ip", &lines)
    }

    /// Makes the veth of a container a port of a bridge.
    pub(super) fn plug(&self, Container { veth, .. }: &Container, bridge: &str) -> Result<()> {
        batch(self.host(), "ip", &format!("link set {veth} master {bridge}"))
    }

    /// Removes the veth of a container.
    pub(super) fn remove(&self, container: &Container) -> Result<()> {
        self.host().tool(&format!("ip link delete {}", container.veth)).map(drop)
    }

    /// Ends the agent of host A and starts another one with these arguments. `check` sees the host in between.
    pub(super) fn restart(
        self,
        end: impl FnOnce(Agent) -> Result<()>,
        check: impl FnOnce(&Netns) -> Result<()>,
        arguments: &[&str],
    ) -> Result<Self> {
        let Self { pair: Pair { a, b, store, topology }, kind, outside, sandbox, devices } = self;
        let site = Arc::clone(a.site());
        end(a)?;
        check(&topology.a.host)?;
        let mut words = store.arguments(&topology.a, Rung::Tc);
        words.extend(arguments.iter().map(|word| (*word).to_owned()));
        let a = site.start(&words)?;
        let pair = Pair { a, b, store, topology };
        pair.wait_for_peers()?;
        Ok(Self { pair, kind, outside, sandbox, devices })
    }

    /// What the agent of host A reports.
    pub(super) fn bypass(&self) -> Result<Bypass> {
        self.agent().status()?.bypass.context("the agent reports no bypass")
    }

    /// Waits until the agent knows exactly so many containers, has the programs on their devices and no problem.
    pub(super) fn settles(&self, containers: usize) -> Result<()> {
        let count = |bypass: &Bypass| match (self.kind, bypass.mode.as_str()) {
            (_, "all") => containers,
            (Kind::Bridge, _) => containers + 1,
            (Kind::Routed, _) => containers * 2,
        };
        let what = format!("{containers} containers are known");
        wait_until(&what, || {
            let bypass = self.bypass()?;
            Ok(bypass.containers == containers && bypass.devices == count(&bypass))
        })
        .with_context(|| format!("the bypass is {:?}", self.bypass()))?;
        self.runs()
    }

    /// The agents run without a problem.
    pub(super) fn runs(&self) -> Result<()> {
        for agent in [&self.pair.a, &self.pair.b] {
            let status = agent.status()?;
            ensure!(status.state == "running", "{status:?}");
        }
        Ok(())
    }

    /// Waits until packets between the peer and a container skip the stack of host A in both directions, but for those that check
    /// whether it still lets them through. Nothing else may use the address.
    pub(super) fn skips(&self, container: &Container) -> Result<()> {
        const COUNT: u32 = 20;
        let (address, mut index) = (container.address, 0);
        with_echo(self.remote(), container.end(), |socket| {
            wait_until(&format!("packets of {address} skip the stack"), || {
                let before = self.forwarded(address)?;
                for _ in 0..COUNT {
                    index += 1;
                    ensure!(is_answered(socket, index, Duration::from_secs(2))?, "datagram {index} was lost");
                }
                let after = self.forwarded(address)?;
                Ok(after.iter().zip(before).all(|(after, before)| after - before <= 2))
            })
        })
        .with_context(|| self.diagnosis(&format!("container {address}")))
    }

    /// Packets that the stack of host A has forwarded from and to an address.
    fn forwarded(&self, address: Ipv4Addr) -> Result<[u64; 2]> {
        let text = self.host().tool("nft list table ip seen")?;
        let mut counts = text.split("set ").skip(1).map(|set| {
            let element = format!("{address} counter packets ");
            let found = set.split(&element).nth(1).and_then(|rest| rest.split_whitespace().next());
            found.map_or(Ok(0), |count| count.parse::<u64>().context("a count of packets"))
        });
        Ok([counts.next().context("no set")??, counts.next().context("no set")??])
    }

    /// Waits until a container answers the peer for good: for a moment, the stack may reach it and the bypass not yet.
    pub(super) fn is_reached(&self, container: &Container, what: &str) -> Result<()> {
        self.answers(container, 5, what)
    }

    /// Waits until a container answers so many datagrams of the peer in a row.
    pub(super) fn answers(&self, container: &Container, in_a_row: u32, what: &str) -> Result<()> {
        let (mut index, mut answered) = (0, 0);
        with_echo(self.remote(), container.end(), |socket| {
            wait_until(what, || {
                index += 1;
                answered =
                    if is_answered(socket, index, Duration::from_millis(50))? { answered + 1 } else { 0 };
                Ok(answered == in_a_row)
            })
        })
        .with_context(|| self.diagnosis(what))
    }

    /// Makes the kernel ask its neighbours after a second or two whether they are still there, not after half a minute.
    pub(super) fn forget_neighbours_soon(&self) -> Result<()> {
        let settings = ["base_reachable_time_ms=1000", "delay_first_probe_time=1", "retrans_time_ms=100"];
        let words = settings.map(|setting| format!("net.ipv4.neigh.{BRIDGE}.{setting}"));
        self.host().tool(&format!("sysctl -q -w {}", words.join(" "))).map(drop)
    }

    /// The containers have got no packet that is for another one.
    pub(super) fn no_strays<'a>(&self, containers: impl IntoIterator<Item = &'a Container>) -> Result<()> {
        for container in containers {
            let strays = container.strays()?;
            ensure!(strays == 0, "{strays} packets for others have reached {}", container.address);
        }
        Ok(())
    }

    pub(super) fn diagnosis(&self, step: &str) -> String {
        let shown = ["ip neighbour", "bridge fdb", "nft list table ip seen", "ip -brief link"]
            .map(|line| self.host().tool(line).unwrap_or_else(|error| format!("{error:#}")));
        format!("{}\n{}", diagnosis(&self.pair, step), shown.join("\n"))
    }
}

/// Hardware addresses of containers.
fn mac(high: u8, last: u8) -> String {
    format!("02:00:00:01:{high:02x}:{last:02x}")
}

/// Replaces the device that leads to the container of the reference topology.
fn prepare(side: &Side, kind: Kind) -> Result<()> {
    let host = &side.host;
    host.tool(&format!("ip link delete {POD_LINK}"))?;
    match kind {
        Kind::Bridge => make_bridge(host, BRIDGE, BRIDGE_MAC, "10.244.1.1/24")?,
        // Proxy ARP answers for addresses to which there is a route.
        Kind::Routed => drop(host.tool(&format!("ip route add default via 192.168.77.2 dev {UPLINK}"))?),
    }
    super::nft(host, SEEN)
}

/// A bridge with the address of a gateway.
pub(super) fn make_bridge(host: &Netns, name: &str, mac: &str, gateway: &str) -> Result<()> {
    let lines = format!(
        "link add {name} mtu {OVERLAY_MTU} address {mac} type bridge\naddress add {gateway} dev {name}\nlink set {name} up\n"
    );
    batch(host, "ip", &lines)
}

/// Connects a host outside of the overlay.
fn connect_outside(sandbox: &Arc<Sandbox>, side: &Side) -> Result<Arc<Netns>> {
    let outside = Netns::create(sandbox, "outside")?;
    let name = outside.name();
    let lines = format!(
        "link add outside type veth peer name {UPLINK} netns {name}\naddress add 203.0.113.1/24 dev outside\nlink set outside up\n"
    );
    batch(&side.host, "ip", &lines)?;
    let lines = format!(
        "address add {OUTSIDE}/24 dev {UPLINK}\nlink set {UPLINK} up\nroute add default via 203.0.113.1\n"
    );
    batch(&outside, "ip", &lines)?;
    Ok(outside)
}

/// Packets that have skipped a host's stack: from containers, and to them.
pub(super) fn skipped(counters: &Counters) -> [u64; 2] {
    [counters.traffic.egress_bypass_packets, counters.traffic.ingress_bypass_packets]
}
