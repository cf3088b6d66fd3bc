//! The systems that are compared: ways to connect the reference topology.

use std::{fmt, sync::Arc, time::Duration};

use anyhow::{Context, Result, ensure};

use crate::{
    agent::Rung,
    comparison::Comparison,
    pair::Pair,
    proxy::FlannelProxy,
    sandbox::Sandbox,
    topology::{Endpoint, PodOffload, Topology, Underlay},
    traffic::{
        ping::ping,
        rate::{datagrams, forwarding},
        tcp,
    },
};

/// Bytes of the TCP transfer that warms up and verifies a system.
const WARM_UP_BYTES: u64 = 4 << 20;
/// Limit of its time.
const WARM_UP_LIMIT: Duration = Duration::from_secs(20);
/// Duration of each kind of UDP traffic of the warm-up.
const WARM_UP_UDP: Duration = Duration::from_millis(100);

/// The shortcuts that the agents may take past their hosts' stacks: `--bypass`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Bypass {
    Off,
    Flows,
    All,
}

impl Bypass {
    const fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Flows => "flows",
            Self::All => "all",
        }
    }

    /// What it means for the packets.
    const fn path(self) -> &'static str {
        match self {
            Self::Off => "every packet passes the host's stack",
            Self::Flows => "the host's stack decides about the first packets of a flow",
            Self::All => "no packet passes the host's stack",
        }
    }
}

/// One row of the results.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum System {
    /// Without the agent.
    Comparison(Comparison),
    /// The reference proxy on both hosts.
    Proxy,
    /// The agent on both hosts.
    Agent(Rung, Bypass),
}

impl System {
    pub(super) const ROUTED: Self = Self::Comparison(Comparison::Routed);
    pub(super) const VXLAN: Self = Self::Comparison(Comparison::Vxlan);

    /// Every system, in the order of the tables.
    pub(super) const ALL: [Self; 10] = [
        Self::ROUTED,
        Self::VXLAN,
        Self::Proxy,
        Self::Agent(Rung::Xdp, Bypass::Off),
        Self::Agent(Rung::Tc, Bypass::Off),
        Self::Agent(Rung::Tun, Bypass::Off),
        Self::Agent(Rung::Xdp, Bypass::Flows),
        Self::Agent(Rung::Tc, Bypass::Flows),
        Self::Agent(Rung::Xdp, Bypass::All),
        Self::Agent(Rung::Tc, Bypass::All),
    ];

    /// The systems that others are compared with.
    pub(super) const BASELINES: [Self; 3] = [Self::ROUTED, Self::VXLAN, Self::Proxy];

    /// Name on the command line and in results.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Comparison(comparison) => comparison.name(),
            Self::Proxy => "proxy",
            Self::Agent(Rung::Xdp, Bypass::Off) => "xdp",
            Self::Agent(Rung::Xdp, Bypass::Flows) => "xdp+flows",
            Self::Agent(Rung::Xdp, Bypass::All) => "xdp+bypass",
            Self::Agent(Rung::Tc, Bypass::Off) => "tc",
            Self::Agent(Rung::Tc, Bypass::Flows) => "tc+flows",
            Self::Agent(Rung::Tc, Bypass::All) => "tc+bypass",
            Self::Agent(Rung::Tun, Bypass::Off) => "tun",
            Self::Agent(Rung::Tun, Bypass::Flows) => "tun+flows",
            Self::Agent(Rung::Tun, Bypass::All) => "tun+bypass",
        }
    }

    /// What it is, for the report.
    pub(super) fn description(self) -> String {
        match self {
            Self::Comparison(Comparison::Routed) => "routes over the underlay, no overlay".to_owned(),
            Self::Comparison(Comparison::Vxlan) => "the kernel's VXLAN, set up as flannel's VXLAN backend does; inner packets \
                                                    are 22 bytes shorter"
                .to_owned(),
            Self::Proxy => "a reference proxy of this project, not flannel itself: one packet for each system call, as \
                            flannel's UDP backend; it cannot take unfinished packets, so the links of the pods have no \
                            offloads"
                .to_owned(),
            Self::Agent(rung, bypass) => {
                let (rung, name, path) = (rung.name(), bypass.name(), bypass.path());
                format!("the agent with `--datapath {rung} --bypass {name}`: {path}")
            }
        }
    }

    /// Whether eBPF programs of the agent carry its packets.
    pub(super) const fn is_ebpf(self) -> bool {
        matches!(self, Self::Agent(rung, _) if rung.is_fast())
    }

    /// Builds the topology, connects it and sends some traffic of each kind.
    ///
    /// # Errors
    ///
    /// When it cannot be built or does not carry the traffic.
    pub(super) fn connect(self, sandbox: &Arc<Sandbox>, underlay: Underlay) -> Result<Connected> {
        let offload = if self == Self::Proxy { PodOffload::Off } else { PodOffload::On };
        let topology = Topology::build(sandbox, underlay, offload)?;
        let connected = match self {
            Self::Comparison(comparison) => {
                comparison.install(&topology)?;
                Connected::Comparison(topology)
            }
            Self::Proxy => {
                let a = FlannelProxy::start(&topology.a, topology.b.underlay)?;
                let b = FlannelProxy::start(&topology.b, topology.a.underlay)?;
                Connected::Proxy { _proxies: [a, b], topology }
            }
            Self::Agent(rung, bypass) => {
                let more = ["--bypass", bypass.name()];
                Connected::Agents(Box::new(Pair::start_with(sandbox, topology, rung, rung, &more)?))
            }
        };
        self.warm_up(&connected).context("warm up")?;
        Ok(connected)
    }

    fn warm_up(self, connected: &Connected) -> Result<()> {
        let (a, b) = connected.pods();
        let seen = ping(a.netns, b.address, 3)?;
        ensure!(seen.received == seen.sent, "{} of {} echo requests answered", seen.received, seen.sent);
        tcp::transfer(a, b, WARM_UP_BYTES, WARM_UP_LIMIT)?;
        datagrams(a, b, Some(1e4), WARM_UP_UDP)?;
        forwarding(a, b, WARM_UP_UDP)?;
        if let (true, Connected::Agents(pair)) = (self.is_ebpf(), connected) {
            for (counters, host) in pair.counters()?.iter().zip(["A", "B"]) {
                let (fast, slow) = (counters.traffic.fast(), counters.traffic.slow());
                ensure!(
                    fast > slow,
                    "the agent on host {host} carried {fast} packets in eBPF and {slow} itself; punts: {:?}",
                    counters.punts
                );
            }
        }
        Ok(())
    }
}

impl fmt::Display for System {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

/// A connected topology. The order of the fields ends programs before their namespaces are removed.
pub(super) enum Connected {
    Comparison(Topology),
    Proxy { _proxies: [FlannelProxy; 2], topology: Topology },
    Agents(Box<Pair>),
}

impl Connected {
    /// The containers, A first.
    pub(super) fn pods(&self) -> (Endpoint<'_>, Endpoint<'_>) {
        match self {
            Self::Comparison(topology) | Self::Proxy { topology, .. } => topology.pods(),
            Self::Agents(pair) => pair.topology.pods(),
        }
    }
}
