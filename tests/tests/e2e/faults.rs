//! Faults while an agent runs: a removed or disabled device, malformed frames, load during the shutdown.

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use overlay_tests::{
    agent::{DEVICE, Rung, Site},
    balance::flood_both_ways,
    pair::{Pair, Store},
    report::Counters,
    sandbox::Sandbox,
    topology::{OVERLAY_MTU, PodOffload, Topology, Underlay},
    traffic::{ping::ping_with_ttl, rate::small_packets, udp::every_size},
};
use serde_json::Value;

use crate::{frames, machine::Need, matrix::needs, snapshot::Snapshot, suite::Suite};

/// Datagrams of which each arrives or is in a counter.
const DATAGRAMS: u64 = 5000;
/// Longest frame that the underlay's MTU lets through.
const LONGEST_FRAME: usize = 1514;
/// The peers of the golden vectors beside host B, in the order of their subnets' names.
const OTHER_PEERS: [(&str, &str); 7] = [
    ("10.244.3.0-24", "192.168.77.3"),
    ("10.244.5.0-24", "192.168.77.5"),
    ("10.244.6.0-24", "192.168.77.6"),
    ("10.244.7.0-24", "192.168.77.7"),
    ("10.244.8.0-24", "192.168.77.8"),
    ("10.244.128.0-17", "192.168.77.9"),
    ("10.244.200.0-24", "192.168.77.4"),
];

pub(crate) fn register(suite: &mut Suite) {
    for rung in [Rung::Xdp, Rung::Tc, Rung::Tun] {
        let word = rung.name();
        suite.add(format!("faults::{word}_recreates_a_removed_device"), needs(rung, rung), move |sandbox| {
            device_vanishes(sandbox, rung)
        });
        suite.add(
            format!("faults::every_malformed_frame_is_counted_by_{word}_and_harms_nothing"),
            needs(rung, rung),
            move |sandbox| malformed_frames(sandbox, rung),
        );
    }
    suite.add("faults::disabled_device_is_enabled_again", &[Need::Tun], device_down);
    suite.add("faults::agent_under_load_stops_on_sigterm", &[Need::Tun], ends_under_load);
    suite.add("faults::recreated_underlay_is_followed", needs(Rung::Tc, Rung::Tc), underlay_recreated);
    suite.add("faults::container_cannot_spoof_a_peer", needs(Rung::Tc, Rung::Tun), container_forges);
    suite.add(
        "faults::refused_agent_leaves_the_device_of_another_agent",
        &[Need::Tun],
        refused_on_held_device,
    );
    suite.add("faults::clsact_filters_forward_and_are_removed", needs(Rung::Tc, Rung::Tc), clsact_filters);
}

pub(crate) fn pair(sandbox: &Arc<Sandbox>, rung: Rung) -> Result<Pair> {
    Pair::start(sandbox, Topology::build(sandbox, Underlay::Virtual, PodOffload::On)?, rung, rung)
}

/// Containers reach each other again within `timeout`, in every size.
fn recovers(pair: &Pair, timeout: Duration) -> Result<()> {
    let (from, to) = pair.topology.pods();
    let deadline = std::time::Instant::now() + timeout;
    while let Err(error) = ping_with_ttl(from.netns, to.address, 60) {
        ensure!(std::time::Instant::now() < deadline, "traffic does not come back: {error:#}");
        thread::sleep(Duration::from_millis(200));
    }
    every_size(from, to, OVERLAY_MTU).map(drop)
}

fn device_vanishes(sandbox: &Arc<Sandbox>, rung: Rung) -> Result<()> {
    let mut pair = pair(sandbox, rung)?;
    for side in [&pair.topology.a, &pair.topology.b] {
        side.host.tool(&format!("ip link delete {DEVICE}"))?;
    }
    recovers(&pair, Duration::from_secs(10))?;
    flood_both_ways(&pair, DATAGRAMS)?;
    ensure!(pair.a.is_running()? && pair.b.is_running()?, "an agent ended");
    let status = pair.a.status()?;
    ensure!(status.ingress.rung == rung.name(), "the agent came back with {:?} in", status.ingress);
    Ok(())
}

fn device_down(sandbox: &Arc<Sandbox>) -> Result<()> {
    let pair = pair(sandbox, Rung::Tun)?;
    pair.topology.a.host.tool(&format!("ip link set {DEVICE} down"))?;
    pair.topology.b.host.tool(&format!("ip address flush dev {DEVICE}"))?;
    recovers(&pair, Duration::from_secs(15))
}

fn ends_under_load(sandbox: &Arc<Sandbox>) -> Result<()> {
    let Pair { a, b, store: _store, topology } = pair(sandbox, Rung::Tun)?;
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let load = scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                // Losses while the agents stop are expected.
                let _ = small_packets(topology.a.pod(), topology.b.pod(), Duration::from_millis(300));
            }
        });
        thread::sleep(Duration::from_millis(500));
        let ended =
            a.stop().context("the sending side").and_then(|()| b.stop().context("the receiving side"));
        stop.store(true, Ordering::Relaxed);
        ensure!(load.join().is_ok(), "the load panicked");
        ended
    })
}

/// Agents that attach with clsact.
pub(crate) fn clsact_pair(sandbox: &Arc<Sandbox>) -> Result<Pair> {
    let topology = Topology::build(sandbox, Underlay::Virtual, PodOffload::On)?;
    let store = Store::create(sandbox)?;
    let start = |side: &overlay_tests::topology::Side| -> Result<_> {
        let mut arguments = store.arguments(side, Rung::Tc);
        arguments.extend(["--tc-attach".to_owned(), "clsact".to_owned()]);
        Site::new(sandbox, &side.host, &format!("agent-{}", side.name))?.start(&arguments)
    };
    let (a, b) = (start(&topology.a)?, start(&topology.b)?);
    let pair = Pair { a, b, store, topology };
    pair.wait_for_peers()?;
    Ok(pair)
}

fn clsact_filters(sandbox: &Arc<Sandbox>) -> Result<()> {
    let pair = clsact_pair(sandbox)?;
    recovers(&pair, Duration::ZERO)?;
    let filters = |side: &overlay_tests::topology::Side| side.host.tool("tc filter show dev eth0 ingress");
    ensure!(filters(&pair.topology.a)?.contains("ovl_ingress"), "the program is no filter of eth0");
    let carried = pair.a.counters()?.traffic;
    ensure!(
        carried.ingress_fast_packets > 0 && carried.slow() == 0,
        "eBPF did not carry the packets: {carried:?}"
    );
    second_network_comes_and_goes(sandbox, &pair.topology)?;
    recovers(&pair, Duration::ZERO)?;
    let slow = pair.a.counters()?.traffic.slow();
    ensure!(slow == 0, "another network's agent removed the filter: {slow} packets on the slow path");
    let Pair { a, b, topology, .. } = pair;
    let site = a.crash()?;
    ensure!(
        filters(&topology.a)?.contains("ovl_ingress"),
        "the filter was removed with its agent, so the test is void"
    );
    site.down()?;
    ensure!(filters(&topology.a)?.is_empty(), "down left the filter of a killed agent");
    b.stop()?;
    ensure!(filters(&topology.b)?.is_empty(), "the agent left its filter");
    Ok(())
}

/// Runs an agent of another network on host A and stops it again.
fn second_network_comes_and_goes(sandbox: &Arc<Sandbox>, topology: &Topology) -> Result<()> {
    let words = "--device ovl1 --network 10.99.0.0/16 --subnet 10.99.1.0/24 --peer 10.99.2.0/24=192.168.77.2 \
                 --port 9999 --iface eth0 --datapath tc --tc-attach clsact";
    let arguments: Vec<String> = words.split_whitespace().map(str::to_owned).collect();
    let site = Site::new(sandbox, &topology.a.host, "other-network")?;
    let mut command = site.run_command(&arguments);
    command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
    let mut agent = topology.a.host.spawn(&mut command)?;
    let filters = || topology.a.host.tool("tc filter show dev eth0 ingress");
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    while filters()?.matches("direct-action").count() < 2 {
        if std::time::Instant::now() > deadline {
            agent.kill().context("end the second agent")?;
            anyhow::bail!("the second network's filter did not appear beside the first's");
        }
        thread::sleep(Duration::from_millis(50));
    }
    let pid = nix::unistd::Pid::from_raw(agent.id().cast_signed());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).context("end the second agent")?;
    let status = agent.wait().context("wait for the second agent")?;
    ensure!(status.success(), "the second agent ended with {status}");
    ensure!(filters()?.matches("direct-action").count() == 1, "other filters than the second were removed");
    Ok(())
}

/// Both ends of the underlay go and come back under the same names, with other indices.
fn underlay_recreated(sandbox: &Arc<Sandbox>) -> Result<()> {
    let pair = pair(sandbox, Rung::Tc)?;
    recreate_underlay(&pair.topology)?;
    recovers(&pair, Duration::from_secs(20))?;
    flood_both_ways(&pair, DATAGRAMS)?;
    let status = pair.a.status()?;
    ensure!(status.ingress.rung == Rung::Tc.name(), "the agent came back with {:?} in", status.ingress);
    Ok(())
}

/// Replaces both ends of the underlay by others with the same names.
pub(crate) fn recreate_underlay(topology: &Topology) -> Result<()> {
    let (a, b) = (&topology.a, &topology.b);
    a.host.tool("ip link delete eth0")?;
    // Another device takes the free index.
    for side in [a, b] {
        side.host.tool("ip link add spare type veth peer name spare2")?;
    }
    a.host.tool(&format!("ip link add eth0 type veth peer name eth0 netns {}", b.host.name()))?;
    for side in [a, b] {
        side.host.tool(&format!("ip address add {}/24 dev eth0", side.underlay))?;
        side.host.tool("ip link set eth0 up")?;
    }
    Ok(())
}

/// A frame that host B could send, sent by the container behind host A: with host A's reverse-path filter off, only the
/// agent can detect it.
fn container_forges(sandbox: &Arc<Sandbox>) -> Result<()> {
    for rung in [Rung::Tc, Rung::Tun] {
        let pair = pair(sandbox, rung)?;
        let host = &pair.topology.a.host;
        host.tool("sysctl -q -w net.ipv4.conf.all.rp_filter=0")?;
        for device in host.tool("ls /proc/sys/net/ipv4/conf")?.split_whitespace() {
            host.tool(&format!("sysctl -q -w net.ipv4.conf.{device}.rp_filter=0"))?;
        }
        let pod = pair.topology.a.pod().netns;
        let neighbours = pod.tool("ip neighbour show")?;
        ping_with_ttl(pod, pair.topology.b.pod().address, 60)?;
        let gateway = pod.tool("ip -json neighbour show")?;
        let gateway: Value = serde_json::from_str(&gateway).context("read the output of ip -json")?;
        let mac = gateway
            .pointer("/0/lladdr")
            .and_then(Value::as_str)
            .with_context(|| format!("no gateway: {neighbours}"))?;
        let vectors = golden_frames()?;
        let decapped = vectors.iter().filter(|vector| vector.is_delivered());
        let frames: Vec<Vec<u8>> =
            decapped.map(|vector| frames::addressed_to(&vector.frame, mac)).collect::<Result<_>>()?;
        let before = pair.a.counters()?;
        let sent = pod.run(|| frames::send("eth0", &frames))??;
        ensure!(sent > 20, "only {sent} forged frames could be sent");
        thread::sleep(Duration::from_millis(200));
        let after = pair.a.counters()?;
        ensure!(carried(&after) == carried(&before), "{} host accepted a container as a peer", rung.name());
    }
    Ok(())
}

fn refused_on_held_device(sandbox: &Arc<Sandbox>) -> Result<()> {
    let pair = pair(sandbox, Rung::Tun)?;
    let before = Snapshot::take(&pair.topology.a.host)?;
    let words = format!(
        "--device {DEVICE} --network 10.99.0.0/16 --subnet 10.99.1.0/24 --peer 10.99.2.0/24=192.168.77.2 --port 9999 --iface eth0"
    );
    let arguments: Vec<String> = words.split_whitespace().map(str::to_owned).collect();
    let site = Site::new(sandbox, &pair.topology.a.host, "second")?;
    let error = site.refused(site.run_command(&arguments))?;
    ensure!(error.contains(DEVICE), "the refusal does not name the device: {error}");
    before.is_unchanged(&pair.topology.a.host)?;
    recovers(&pair, Duration::ZERO)
}

/// Sends every golden ingress frame that fits over the real link to host A and compares what its agent counted with what
/// the vectors say.
fn malformed_frames(sandbox: &Arc<Sandbox>, rung: Rung) -> Result<()> {
    let pair = pair(sandbox, rung)?;
    for (subnet, peer) in OTHER_PEERS {
        // Replies to delivered packets need this neighbour entry, or sending fails.
        pair.topology.b.host.tool(&format!("ip address add {peer}/24 dev eth0"))?;
        pair.store.write_lease(subnet, peer)?;
    }
    let routes = 1 + OTHER_PEERS.len();
    pair.a.wait_for_routes("routes to all peers", |list| list.routes.len() == routes)?;
    let before = pair.a.counters()?;
    let mac = mac_of(&pair)?;
    let vectors = golden_frames()?;
    let frames: Vec<Vec<u8>> =
        vectors.iter().map(|vector| frames::addressed_to(&vector.frame, &mac)).collect::<Result<_>>()?;
    let sent = pair.topology.b.host.run(|| frames::send("eth0", &frames))??;
    ensure!(sent == vectors.len(), "only {sent} of {} frames could be sent", vectors.len());
    // The last frames may still be on their way through the agent.
    thread::sleep(Duration::from_millis(300));
    let after = pair.a.counters()?;
    let expected = expected_drops(&vectors, rung);
    ensure!(expected.len() > 8, "the vectors cover too few drop reasons: {expected:?}");
    let counted = grown(&before.drops, &after.drops);
    ensure!(counted == expected, "drops counted: {counted:?}, expected: {expected:?}");
    ensure!(carried(&after) > carried(&before), "no valid frame was carried");
    recovers(&pair, Duration::ZERO)?;
    flood_both_ways(&pair, DATAGRAMS)
}

/// A namespace entered alone has the machine's /sys, so the address comes from `ip`.
pub(crate) fn mac_of(pair: &Pair) -> Result<String> {
    let link = pair.topology.a.host.tool("ip -json link show dev eth0")?;
    let link: Value = serde_json::from_str(&link).context("read the output of ip -json")?;
    let address = link.pointer("/0/address").and_then(Value::as_str).context("eth0 has no address")?;
    Ok(address.to_owned())
}

pub(crate) struct GoldenFrame {
    pub(crate) frame: Vec<u8>,
    fast: Value,
    slow: Value,
    reaches_agent: bool,
}

impl GoldenFrame {
    /// Whether every rung delivers its inner packet.
    pub(crate) fn is_delivered(&self) -> bool {
        self.reaches_agent && self.slow.get("verdict").is_some_and(|verdict| verdict == "decap")
    }
}

pub(crate) fn golden_frames() -> Result<Vec<GoldenFrame>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("vectors/ingress.json");
    let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    let file: Value = serde_json::from_str(&text).with_context(|| format!("parse {}", path.display()))?;
    let vectors = file.get("vectors").and_then(Value::as_array).context("the file has no vectors")?;
    let mut frames = Vec::new();
    for vector in vectors {
        let field = |name: &str| vector.get(name).cloned().unwrap_or_default();
        let frame = frames::from_hex(field("packet").as_str().unwrap_or_default())?;
        // A sent frame has no unfinished checksum: what looks like one is wrong to the kernel.
        let partial = field("fast").get("reason").is_some_and(|reason| reason == "outer_checksum_partial");
        if (14..=LONGEST_FRAME).contains(&frame.len()) && !partial {
            let reaches_agent = field("tun") == "shell";
            frames.push(GoldenFrame { frame, fast: field("fast"), slow: field("slow"), reaches_agent });
        }
    }
    Ok(frames)
}

/// The expected count of each drop reason, on the fast path and on the slow path.
fn expected_drops(vectors: &[GoldenFrame], rung: Rung) -> BTreeMap<String, u64> {
    let mut drops = BTreeMap::new();
    for vector in vectors {
        let punted = vector.fast.get("verdict").is_some_and(|verdict| verdict == "punt");
        let decided = match rung.is_fast() && !punted {
            true => Some(&vector.fast),
            false => vector.reaches_agent.then_some(&vector.slow),
        };
        let dropped =
            decided.filter(|verdict| verdict.get("verdict").is_some_and(|verdict| verdict == "drop"));
        if let Some(reason) = dropped.and_then(|verdict| verdict.get("reason")).and_then(Value::as_str) {
            *drops.entry(reason.to_owned()).or_default() += 1;
        }
        if is_trimmed_by_kernel(vector) {
            *drops.entry("truncated".to_owned()).or_default() += 1;
        }
    }
    drops
}

/// Whether the UDP length is shorter than the IP length: the kernel's socket then returns a truncated inner packet.
fn is_trimmed_by_kernel(vector: &GoldenFrame) -> bool {
    let field = |at: usize| match vector.frame.get(at..at + 2) {
        Some([high, low]) => usize::from(u16::from_be_bytes([*high, *low])),
        _ => 0,
    };
    let (total_length, udp_length) = (field(16), field(38));
    let outer_length = vector.fast.get("reason").is_some_and(|reason| reason == "outer_length");
    outer_length
        && total_length + 14 <= vector.frame.len()
        && (8..total_length.saturating_sub(20)).contains(&udp_length)
}

pub(crate) fn grown(before: &BTreeMap<String, u64>, after: &BTreeMap<String, u64>) -> BTreeMap<String, u64> {
    let growth = |(reason, count): (&String, &u64)| {
        (reason.clone(), count - before.get(reason).copied().unwrap_or_default())
    };
    after.iter().map(growth).filter(|(_, count)| *count > 0).collect()
}

pub(crate) fn carried(counters: &Counters) -> u64 {
    counters.traffic.ingress_fast_packets + counters.traffic.ingress_slow_packets
}
