//! The reference topology with an agent on each host, both on one directory store.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context, Result, ensure};

use crate::{
    agent::{Agent, Rung, Site},
    report::Counters,
    sandbox::Sandbox,
    topology::{NETWORK, Side, Topology, UPLINK},
};

/// Minimal percentage of packets that the fast path must carry.
const FAST_PERCENT: u64 = 95;
/// Most datagrams that one packet can stand for (UDP_MAX_SEGMENTS before kernel 6.9, and what the traffic here uses).
const MOST_SEGMENTS: u64 = 64;

/// Directory store with flannel's configuration record.
#[derive(Clone, Debug)]
pub struct Store {
    directory: PathBuf,
}

impl Store {
    /// An empty store of the reference network.
    pub fn create(sandbox: &Sandbox) -> Result<Self> {
        let store = Self { directory: sandbox.new_directory("store")? };
        let subnets = store.directory.join("subnets");
        fs::create_dir(&subnets).with_context(|| format!("create {}", subnets.display()))?;
        store.write(
            "config",
            &format!(r#"{{"Network":"{NETWORK}","Backend":{{"Type":"udp","Port":8285}}}}"#),
        )?;
        Ok(store)
    }

    /// Its directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Writes a record as a tool that syncs the store would: whole or not at all.
    pub fn write(&self, record: &str, value: &str) -> Result<()> {
        let (path, temporary) = (self.directory.join(record), self.directory.join("record.tmp"));
        fs::write(&temporary, value)
            .and_then(|()| path.parent().map_or(Ok(()), fs::create_dir_all))
            .and_then(|()| fs::rename(&temporary, &path))
            .with_context(|| format!("write {}", path.display()))
    }

    /// Writes the lease record of a subnet, given as `10.244.3.0-24`.
    pub fn write_lease(&self, subnet: &str, public_ip: &str) -> Result<()> {
        self.write(&format!("subnets/{subnet}"), &format!(r#"{{"PublicIP":"{public_ip}"}}"#))
    }

    /// The value of a record.
    pub fn read(&self, record: &str) -> Result<String> {
        let path = self.directory.join(record);
        fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
    }

    /// Removes a record.
    pub fn remove(&self, record: &str) -> Result<()> {
        let path = self.directory.join(record);
        fs::remove_file(&path).with_context(|| format!("remove {}", path.display()))
    }

    /// Renames the store's directory, so that agents do not find it.
    pub fn move_away(&self) -> Result<MovedStore> {
        let moved = MovedStore { from: self.directory.clone(), to: self.directory.with_extension("away") };
        fs::rename(&moved.from, &moved.to).with_context(|| format!("move {} away", moved.from.display()))?;
        Ok(moved)
    }

    /// The arguments of an agent on this store with the subnet of `side`.
    pub fn arguments(&self, side: &Side, rung: Rung) -> Vec<String> {
        let store = format!("dir:{}", self.directory.display());
        let words =
            ["--store", &store, "--subnet", side.subnet, "--iface", UPLINK, "--datapath", rung.name()];
        words.map(str::to_owned).into()
    }
}

/// A renamed store.
#[derive(Debug)]
pub struct MovedStore {
    from: PathBuf,
    to: PathBuf,
}

impl MovedStore {
    /// Moves the store back.
    pub fn move_back(self) -> Result<()> {
        fs::rename(&self.to, &self.from).with_context(|| format!("move {} back", self.from.display()))
    }
}

/// Two agents that are peers. The order of the fields stops them before their namespaces are removed.
#[derive(Debug)]
pub struct Pair {
    /// The agent on host A.
    pub a: Agent,
    /// The agent on host B.
    pub b: Agent,
    /// Their store.
    pub store: Store,
    /// Their hosts.
    pub topology: Topology,
}

impl Pair {
    /// Starts an agent on each host and waits until each has a route to the other.
    ///
    /// # Errors
    ///
    /// When an agent does not start, has another rung than asked for, or does not learn of its peer.
    pub fn start(sandbox: &Arc<Sandbox>, topology: Topology, rung_a: Rung, rung_b: Rung) -> Result<Self> {
        Self::start_with(sandbox, topology, rung_a, rung_b, &[])
    }

    /// As [`Pair::start`], with more arguments for both agents.
    ///
    /// # Errors
    ///
    /// As [`Pair::start`].
    pub fn start_with(
        sandbox: &Arc<Sandbox>,
        topology: Topology,
        rung_a: Rung,
        rung_b: Rung,
        more: &[&str],
    ) -> Result<Self> {
        let store = Store::create(sandbox)?;
        let [a, b] = [(&topology.a, rung_a), (&topology.b, rung_b)].map(|(side, rung)| {
            let site = Site::new(sandbox, &side.host, &format!("agent-{}", side.name))?;
            let mut arguments = store.arguments(side, rung);
            arguments.extend(more.iter().map(|word| (*word).to_owned()));
            let agent = site.start(&arguments)?;
            check_rung(&agent, rung)?;
            anyhow::Ok(agent)
        });
        let pair = Self { a: a?, b: b?, store, topology };
        pair.wait_for_peers()?;
        Ok(pair)
    }

    /// Waits until each agent has exactly the route to the other.
    ///
    /// # Errors
    ///
    /// When they do not within 20 seconds.
    pub fn wait_for_peers(&self) -> Result<()> {
        for (agent, peer) in [(&self.a, &self.topology.b), (&self.b, &self.topology.a)] {
            agent.wait_for_routes(&format!("a route to {} only", peer.subnet), |routes| {
                matches!(routes.routes.as_slice(), [route] if route.subnet == peer.subnet && route.peer == peer.underlay)
            })?;
        }
        Ok(())
    }

    /// Counters of both agents, A first.
    pub fn counters(&self) -> Result<[Counters; 2]> {
        Ok([self.a.counters()?, self.b.counters()?])
    }
}

/// Checks that an agent moves packets the way it was asked to.
fn check_rung(agent: &Agent, rung: Rung) -> Result<()> {
    let status = agent.status()?;
    let ingress = status.ingress.rung == rung.name();
    // tc carries egress on the xdp rung too: XDP has no egress.
    let egress = (status.egress.rung == Rung::Tun.name()) != rung.is_fast();
    ensure!(
        ingress && egress,
        "asked for {}, the agent has {:?} in and {:?} out",
        rung.name(),
        status.ingress,
        status.egress
    );
    Ok(())
}

/// Checks the counters of an agent after traffic with a peer: nothing lost, and eBPF carried what it should.
///
/// On a veth underlay the datagrams of a tun peer's socket arrive with their outer checksum unfinished, and up to 64 of a
/// UDP sender arrive in one packet. The fast path must punt both, and on egress what is too long with its outer headers.
///
/// # Errors
///
/// When packets were dropped with an error, or took another path than expected.
pub fn check_counters(counters: &Counters, rung: Rung, peer: Rung, role: &str) -> Result<()> {
    let drops = counters.wrong_drops();
    ensure!(drops.is_empty(), "agent {role} ({}) dropped packets: {drops:?}", rung.name());
    let traffic = &counters.traffic;
    let punted = |reason| counters.punts.get(reason).copied().unwrap_or_default();
    let unfinished = if peer.is_fast() { 0 } else { punted("outer_checksum_partial") };
    let not_for_fast = unfinished + punted("segmented_datagrams") * MOST_SEGMENTS;
    let too_long = punted("too_long") * MOST_SEGMENTS;
    for (direction, fast, slow, not_for_fast) in [
        ("egress", traffic.egress_fast_packets, traffic.egress_slow_packets, too_long),
        ("ingress", traffic.ingress_fast_packets, traffic.ingress_slow_packets, not_for_fast),
    ] {
        ensure!(fast + slow > 0, "agent {role} ({}) counted no {direction} packet", rung.name());
        let right = fast + not_for_fast;
        let enough = if rung.is_fast() { right * 100 >= (fast + slow) * FAST_PERCENT } else { fast == 0 };
        ensure!(
            enough,
            "agent {role} ({}) carried {fast} {direction} packets in eBPF and {slow} itself; punts: {:?}",
            rung.name(),
            counters.punts
        );
    }
    Ok(())
}
