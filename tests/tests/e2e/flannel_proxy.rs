//! Peers that cannot take unfinished packets, such as flannel's own proxy, get finished ones.

use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use overlay_tests::{
    agent::{Agent, Rung, Site},
    pair::Store,
    proxy::FlannelProxy,
    sandbox::Sandbox,
    topology::{OVERLAY_MTU, PodOffload, Topology, Underlay},
    traffic::{ping::ping_with_ttl, tcp, udp},
    verify::transfer_limit,
};

use crate::{matrix::needs, suite::Suite};

const TCP_BYTES: u64 = 4 << 20;

/// How the agent learns of the peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Known {
    /// By a record as flanneld writes it.
    Record,
    /// By `--peer ...,no-offload`.
    Flag,
}

pub(crate) fn register(suite: &mut Suite) {
    for rung in [Rung::Xdp, Rung::Tc, Rung::Tun] {
        for underlay in [Underlay::Virtual, Underlay::Wire] {
            let name =
                format!("flannel_proxy::takes_over_every_packet_of_{}_{}", rung.name(), underlay.name());
            suite.add(name, needs(rung, rung), move |sandbox| {
                exchange(sandbox, rung, underlay, Known::Record)
            });
        }
    }
    suite.add("flannel_proxy::static_peer_is_declared", needs(Rung::Tc, Rung::Tc), |sandbox| {
        exchange(sandbox, Rung::Tc, Underlay::Virtual, Known::Flag)
    });
    suite.add("flannel_proxy::records_of_agents_cost_nothing", needs(Rung::Tc, Rung::Tc), agents);
}

fn exchange(sandbox: &Arc<Sandbox>, rung: Rung, underlay: Underlay, known: Known) -> Result<()> {
    let topology = Topology::build(sandbox, underlay, PodOffload::On)?;
    let (a, b) = (&topology.a, &topology.b);
    let store = Store::create(sandbox)?;
    let mut arguments = store.arguments(a, rung);
    match known {
        Known::Record => store.write_lease("10.244.2.0-24", &b.underlay.to_string())?,
        Known::Flag => arguments.push(format!("--peer={}={},no-offload", b.subnet, b.underlay)),
    }
    let agent = Site::new(sandbox, &a.host, "agent-a")?.start(&arguments)?;
    let _proxy = FlannelProxy::start(b, a.underlay)?;
    agent.wait_for_routes("the proxy", |routes| routes.routes.len() == 1)?;
    let (from, to) = topology.pods();
    let context = |agent: &Agent, what: &str| {
        let counters = agent.counters();
        format!("{what}; counters: {counters:?}; log:\n{}", agent.site().log_tail())
    };
    ping_with_ttl(from.netns, to.address, 60)?;
    for (from, to, way) in [(from, to, "to the proxy"), (to, from, "from the proxy")] {
        tcp::transfer(from, to, TCP_BYTES, transfer_limit(TCP_BYTES))
            .with_context(|| context(&agent, way))?;
    }
    udp::every_size(from, to, OVERLAY_MTU).with_context(|| context(&agent, "datagrams"))?;
    let counters = agent.counters()?;
    ensure!(counters.wrong_drops().is_empty(), "{counters:?}");
    let unfinished = counters.punts.get("unfinished").copied().unwrap_or_default();
    if rung.is_fast() {
        ensure!(unfinished > 0, "nothing was unfinished: {counters:?}");
    }
    agent.stop()
}

/// Records of agents say that their hosts take unfinished packets.
fn agents(sandbox: &Arc<Sandbox>) -> Result<()> {
    let topology = Topology::build(sandbox, Underlay::Virtual, PodOffload::On)?;
    let pair = overlay_tests::pair::Pair::start(sandbox, topology, Rung::Tc, Rung::Tc)?;
    let record = pair.store.read("subnets/10.244.2.0-24")?;
    ensure!(record.contains(r#""BackendData":{"TakesUnfinishedPackets":true}"#), "{record}");
    let (from, to) = pair.topology.pods();
    tcp::transfer(from, to, TCP_BYTES, transfer_limit(TCP_BYTES))?;
    let counters = pair.a.counters()?;
    ensure!(counters.punts.get("unfinished").copied().unwrap_or_default() == 0, "{counters:?}");
    Ok(())
}
