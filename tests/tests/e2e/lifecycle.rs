//! Agents start, stop, crash and restart; peers join, move and leave.

use std::{
    io::{BufRead as _, BufReader},
    net::UdpSocket,
    process::Command,
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
    comparison::Comparison,
    pair::{Pair, Store},
    report::Status,
    sandbox::Sandbox,
    topology::{Endpoint, OVERLAY_MTU, PodOffload, Topology, UPLINK, Underlay},
    traffic::{
        ping::ping_with_ttl,
        udp::{every_size, is_answered, with_echo},
    },
};

use crate::{machine::Need, matrix::needs, snapshot::Snapshot, suite::Suite};

const RUNGS: [Rung; 3] = [Rung::Xdp, Rung::Tc, Rung::Tun];
/// Needs of tests that do not depend on the rung.
const ANY: &[Need] = &[Need::Tun];

pub(crate) fn register(suite: &mut Suite) {
    for rung in RUNGS {
        let word = rung.name();
        suite.add(
            format!("lifecycle::{word}_leaves_nothing_on_sigterm"),
            needs(rung, rung),
            move |sandbox| sigterm_leaves_nothing(sandbox, rung),
        );
        suite.add(
            format!("lifecycle::{word}_leaves_nothing_after_crash_and_down"),
            needs(rung, rung),
            move |sandbox| down_after_crash_leaves_nothing(sandbox, rung),
        );
        suite.add(format!("lifecycle::{word}_runs_again_after_crash"), needs(rung, rung), move |sandbox| {
            runs_again_after_crash(sandbox, rung)
        });
        suite.add(
            format!("lifecycle::{word}_knows_all_peers_from_the_first_packet_on"),
            needs(rung, rung),
            move |sandbox| peers_from_the_first_packet(sandbox, rung),
        );
        suite.add(
            format!("lifecycle::changed_peer_mac_costs_{word}_no_more_than_routing"),
            needs(rung, rung),
            move |sandbox| changed_peer_mac(sandbox, rung),
        );
    }
    suite.add("lifecycle::second_agent_is_refused_and_first_keeps_running", ANY, second_agent_is_refused);
    suite.add(
        "lifecycle::down_leaves_the_device_of_an_agent_with_another_run_directory",
        ANY,
        down_elsewhere,
    );
    suite.add("lifecycle::peer_that_joins_later_is_followed", ANY, peer_that_joins_later);
    suite.add("lifecycle::route_of_a_leaving_peer_is_removed", ANY, peer_that_leaves);
    suite.add("lifecycle::peer_with_a_new_address_is_followed", ANY, peer_with_a_new_address);
    suite.add("lifecycle::malformed_record_changes_no_other_route", ANY, malformed_record);
    suite.add("lifecycle::removed_store_removes_no_route", ANY, removed_store);
    suite.add("lifecycle::status_watch_prints_every_change", ANY, status_watch);
}

fn pair(sandbox: &Arc<Sandbox>, rung: Rung) -> Result<Pair> {
    Pair::start(sandbox, Topology::build(sandbox, Underlay::Virtual, PodOffload::On)?, rung, rung)
}

fn sigterm_leaves_nothing(sandbox: &Arc<Sandbox>, rung: Rung) -> Result<()> {
    let topology = Topology::build(sandbox, Underlay::Virtual, PodOffload::On)?;
    let host = Arc::clone(&topology.a.host);
    let before = Snapshot::take(&host)?;
    let pair = Pair::start(sandbox, topology, rung, rung)?;
    before.is_changed(&host)?;
    ping_pods(&pair)?;
    let socket = pair.a.site().socket();
    let Pair { a, b, topology: _topology, .. } = pair;
    a.stop()?;
    // XDP on one end of a veth changes what the other end offers.
    b.stop()?;
    before.is_unchanged(&host)?;
    ensure!(!socket.exists(), "{} is left", socket.display());
    Ok(())
}

/// Sends datagrams from one container to another, answered or not, until `finished`.
fn flood(from: Endpoint<'_>, to: Endpoint<'_>, finished: &AtomicBool) -> Result<u64> {
    from.netns.run(|| {
        let socket = UdpSocket::bind((from.address, 0)).context("open a socket in a container")?;
        let mut sent = 0;
        while !finished.load(Ordering::Relaxed) {
            // Fails while there is no route, as between two agents.
            sent += u64::from(socket.send_to(&[0xa5; 64], (to.address, 9)).is_ok());
            thread::sleep(Duration::from_millis(1));
        }
        Ok(sent)
    })?
}

/// Traffic in both directions is on its way before the agent starts: whatever it sees first has a route and a known source.
fn peers_from_the_first_packet(sandbox: &Arc<Sandbox>, rung: Rung) -> Result<()> {
    let Pair { mut a, b, store, topology } = pair(sandbox, rung)?;
    let (from, to) = topology.pods();
    let finished = AtomicBool::new(false);
    let sent = thread::scope(|scope| {
        let floods = [(from, to), (to, from)];
        let finished = &finished;
        let floods = floods.map(|(from, to)| scope.spawn(move || flood(from, to, finished)));
        let restarts = || {
            for _ in 0..4 {
                let site = Arc::clone(a.site());
                a.stop()?;
                a = site.start(&store.arguments(&topology.a, rung))?;
                thread::sleep(Duration::from_millis(300));
                let counters = a.counters()?;
                let carried = counters.traffic.fast() + counters.traffic.slow();
                ensure!(carried > 100, "only {carried} packets were carried: {counters:?}");
                let unknown =
                    ["no_route", "unknown_source"].map(|reason| counters.drops.get(reason).copied());
                ensure!(unknown.iter().all(|count| count.unwrap_or(0) == 0), "{:?}", counters.wrong_drops());
            }
            a.stop()
        };
        let result = restarts();
        finished.store(true, Ordering::Relaxed);
        let sent: Result<Vec<_>> = floods
            .into_iter()
            .map(|flood| flood.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect();
        result.and(sent)
    })?;
    ensure!(sent.iter().all(|sent| *sent > 500), "only {sent:?} datagrams were sent");
    b.stop()
}

fn down_after_crash_leaves_nothing(sandbox: &Arc<Sandbox>, rung: Rung) -> Result<()> {
    let topology = Topology::build(sandbox, Underlay::Virtual, PodOffload::On)?;
    let host = Arc::clone(&topology.a.host);
    let before = Snapshot::take(&host)?;
    let pair = Pair::start(sandbox, topology, rung, rung)?;
    ping_pods(&pair)?;
    let Pair { a, b, topology: _topology, .. } = pair;
    let site = a.crash()?;
    b.stop()?;
    before.is_changed(&host).context("a killed agent leaves its device")?;
    site.down()?;
    before.is_unchanged(&host)?;
    ensure!(!site.socket().exists(), "{} is left", site.socket().display());
    site.down().context("the second time, with nothing to remove")
}

fn runs_again_after_crash(sandbox: &Arc<Sandbox>, rung: Rung) -> Result<()> {
    let Pair { a, b, store, topology } = pair(sandbox, rung)?;
    let site = a.crash()?;
    let a = site.start(&store.arguments(&topology.a, rung)).context("start again what was killed")?;
    let pair = Pair { a, b, store, topology };
    pair.wait_for_peers()?;
    ping_pods(&pair)?;
    let (from, to) = pair.topology.pods();
    every_size(from, to, OVERLAY_MTU).map(drop)
}

fn second_agent_is_refused(sandbox: &Arc<Sandbox>) -> Result<()> {
    let mut pair = pair(sandbox, Rung::Tun)?;
    let before = Snapshot::take(&pair.topology.a.host)?;
    let arguments = pair.store.arguments(&pair.topology.a, Rung::Tun);
    // With another run directory it finds the device, with the same one the control socket.
    let elsewhere = Site::new(sandbox, &pair.topology.a.host, "second")?;
    elsewhere.refused(elsewhere.run_command(&arguments))?;
    let mut same_place = elsewhere.run_command(&arguments);
    same_place.arg("--run-dir").arg(pair.a.site().run_directory());
    elsewhere.refused(same_place)?;
    before.is_unchanged(&pair.topology.a.host)?;
    ensure!(pair.a.is_running()?, "the first agent ended");
    pair.wait_for_peers()?;
    ping_pods(&pair)
}

fn down_elsewhere(sandbox: &Arc<Sandbox>) -> Result<()> {
    let mut pair = pair(sandbox, Rung::Tun)?;
    let host = Arc::clone(&pair.topology.a.host);
    let before = Snapshot::take(&host)?;
    let elsewhere = Site::new(sandbox, &host, "elsewhere")?;
    let error = elsewhere.down().err().context("down removed what a running agent holds")?.to_string();
    let holder = format!("process {} holds the device", pair.a.pid());
    ensure!(error.contains(&holder) && error.contains("--run-dir"), "{error}");
    // A process of another PID namespace cannot be named.
    let mut hidden = Command::new("unshare");
    hidden.args(["--pid", "--fork", "--mount-proc"]).arg(elsewhere.binary()).arg("down");
    hidden.arg("--run-dir").arg(elsewhere.run_directory()).args(["--device", DEVICE]);
    let output = host.output(&mut hidden)?;
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.code() == Some(1) && error.contains("a process holds the device"), "{error}");
    before.is_unchanged(&host)?;
    ensure!(pair.a.is_running()?, "the agent ended");
    ping_pods(&pair)?;
    // What a killed agent left is removed from any directory.
    let Pair { a, b: _b, topology: _topology, .. } = pair;
    a.crash()?;
    elsewhere.down()?;
    ensure!(!host.tool("ip -o link")?.contains(DEVICE), "the device of a killed agent is left");
    Ok(())
}

fn peer_that_joins_later(sandbox: &Arc<Sandbox>) -> Result<()> {
    let topology = Topology::build(sandbox, Underlay::Virtual, PodOffload::On)?;
    let store = Store::create(sandbox)?;
    let [site_a, site_b] = sites(sandbox, &topology)?;
    let a = site_a.start(&store.arguments(&topology.a, Rung::Tun))?;
    a.wait_for_routes("no route without a peer", |routes| routes.routes.is_empty())?;
    let b = site_b.start(&store.arguments(&topology.b, Rung::Tun))?;
    let pair = Pair { a, b, store, topology };
    pair.wait_for_peers()?;
    ping_pods(&pair)
}

fn peer_that_leaves(sandbox: &Arc<Sandbox>) -> Result<()> {
    let pair = pair(sandbox, Rung::Tun)?;
    pair.store.write_lease("10.244.3.0-24", "192.168.77.3")?;
    pair.a.wait_for_routes("a route to the new peer", |routes| routes.routes.len() == 2)?;
    pair.store.remove("subnets/10.244.3.0-24")?;
    pair.wait_for_peers()?;
    ping_pods(&pair)
}

fn peer_with_a_new_address(sandbox: &Arc<Sandbox>) -> Result<()> {
    const MOVED: &str = "192.168.77.12";
    let Pair { a, b, store, topology } = pair(sandbox, Rung::Tun)?;
    ping_with_ttl(&topology.a.pod, topology.b.pod_address, 60)?;
    let site = Arc::clone(b.site());
    b.stop()?;
    topology.b.host.tool(&format!("ip address add {MOVED}/24 dev {UPLINK}"))?;
    // The record has to be moved with the host: another address cannot claim a held subnet.
    store.write_lease("10.244.2.0-24", MOVED)?;
    let mut arguments = store.arguments(&topology.b, Rung::Tun);
    arguments.extend(["--public-ip".to_owned(), MOVED.to_owned()]);
    let _b = site.start(&arguments)?;
    a.wait_for_routes("the peer's new address", |routes| {
        routes.routes.iter().any(|route| route.subnet == topology.b.subnet && route.peer.to_string() == MOVED)
    })?;
    ping_with_ttl(&topology.a.pod, topology.b.pod_address, 60)?;
    ping_with_ttl(&topology.b.pod, topology.a.pod_address, 60).map(drop)
}

fn malformed_record(sandbox: &Arc<Sandbox>) -> Result<()> {
    let pair = pair(sandbox, Rung::Tun)?;
    let expected = pair.a.routes()?.routes;
    pair.store.write("subnets/10.244.9.0-24", "{ this is no JSON")?;
    pair.store.write("subnets/not-a-subnet", r#"{"PublicIP":"192.168.77.9"}"#)?;
    pair.a.wait_for_routes("two records skipped and no route changed", |routes| {
        routes.skipped.len() == 2 && routes.routes == expected
    })?;
    ping_pods(&pair)
}

fn removed_store(sandbox: &Arc<Sandbox>) -> Result<()> {
    let pair = pair(sandbox, Rung::Tun)?;
    let moved = pair.store.move_away()?;
    // Time in which the agent might wrongly remove its routes.
    thread::sleep(Duration::from_millis(500));
    pair.wait_for_peers()?;
    ping_pods(&pair)?;
    moved.move_back()?;
    pair.store.write_lease("10.244.3.0-24", "192.168.77.3")?;
    pair.a.wait_for_routes("a change after the store came back", |routes| routes.routes.len() == 2)
}

fn status_watch(sandbox: &Arc<Sandbox>) -> Result<()> {
    let Pair { a, b: _b, store, topology: _topology } = pair(sandbox, Rung::Tun)?;
    let mut watch = a.site().watch_status()?;
    let mut lines = BufReader::new(watch.stdout.take().context("the watch has no output")?).lines();
    let mut wait_for_routes = |count: usize| -> Result<()> {
        loop {
            let line = lines.next().context("the watch ended")??;
            let status: Status = serde_json::from_str(&line).with_context(|| format!("parse {line}"))?;
            if status.routes == count {
                return Ok(());
            }
        }
    };
    wait_for_routes(1)?;
    store.write_lease("10.244.3.0-24", "192.168.77.3")?;
    wait_for_routes(2)?;
    store.remove("subnets/10.244.3.0-24")?;
    wait_for_routes(1)?;
    a.stop()?;
    let output = watch.wait_with_output()?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.code() == Some(1) && error.contains("the agent ended"),
        "{}: {error}",
        output.status
    );
    Ok(())
}

/// Changes the hardware address of host B's underlay device while packets cross, with the overlay and without.
fn changed_peer_mac(sandbox: &Arc<Sandbox>, rung: Rung) -> Result<()> {
    // Random variation.
    const TOLERANCE: u32 = 2;
    let routed = Topology::build(sandbox, Underlay::Virtual, PodOffload::On)?;
    Comparison::Routed.install(&routed)?;
    let plain = lost_while_mac_changes(&routed)?;
    drop(routed);
    let pair = pair(sandbox, rung)?;
    let lost = lost_while_mac_changes(&pair.topology)?;
    ensure!(lost <= plain + TOLERANCE, "{lost} of {PROBES} packets lost, and {plain} with routing alone");
    Ok(())
}

/// Round trips tried, 5 ms apart: 1.5 seconds before the change, because for one second a neighbour's entry that is new
/// is not overwritten (`locktime` in `man 7 arp`), and 1.5 after it.
const PROBES: u32 = 600;

fn lost_while_mac_changes(topology: &Topology) -> Result<u32> {
    let (a, b) = topology.pods();
    // Gratuitous ARP, as after a change of the network card; without it, routing loses packets for half a minute.
    topology.b.host.tool("sysctl -q -w net.ipv4.conf.eth0.arp_notify=1")?;
    with_echo(a, b, |socket| {
        let mut lost = 0;
        for index in 0..PROBES {
            if index == PROBES / 2 {
                topology.b.host.tool(&format!("ip link set {UPLINK} address 02:00:00:00:77:02"))?;
            }
            lost += u32::from(!probe(socket, index)?);
        }
        let alive = probe(socket, PROBES)?;
        ensure!(alive, "traffic does not recover after the peer's MAC address changed");
        Ok(lost)
    })
}

fn probe(socket: &UdpSocket, index: u32) -> Result<bool> {
    thread::sleep(Duration::from_millis(5));
    is_answered(socket, index, Duration::from_millis(50))
}

fn sites(sandbox: &Arc<Sandbox>, topology: &Topology) -> Result<[Arc<Site>; 2]> {
    Ok([Site::new(sandbox, &topology.a.host, "agent-a")?, Site::new(sandbox, &topology.b.host, "agent-b")?])
}

fn ping_pods(pair: &Pair) -> Result<()> {
    let (a, b) = pair.topology.pods();
    ping_with_ttl(a.netns, b.address, 60)?;
    ping_with_ttl(b.netns, a.address, 60).map(drop)
}
