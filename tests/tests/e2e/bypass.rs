//! The bypass of the hosts' stacks: everything arrives as without it, and rules of the host keep their meaning with `flows`.

use std::{
    net::{SocketAddr, TcpListener, UdpSocket},
    sync::Arc,
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use overlay_tests::{
    agent::Rung,
    balance::flood_both_ways,
    netns::Netns,
    pair::{Pair, check_counters},
    report::Counters,
    sandbox::Sandbox,
    topology::{POD_LINK, PodOffload, Topology, Underlay},
    traffic::{
        stream::Stream,
        tcp,
        udp::{is_answered, passes, with_echo},
    },
    verify::{CHECKS, Plan},
};

use crate::{
    matrix::{diagnosis, needs},
    suite::Suite,
    wait::wait_until,
};

const TCP_BYTES: u64 = 32 << 20;
/// Datagrams of which each arrives or is in a counter.
const DATAGRAMS: u64 = 5000;
/// Bytes after which samples of a stream have passed the stacks a few times: more than any window in between.
const LONG: u64 = 200 << 20;

pub(crate) fn register(suite: &mut Suite) {
    for bypass in ["flows", "all"] {
        for (rung, peer) in [(Rung::Xdp, Rung::Xdp), (Rung::Tc, Rung::Tc), (Rung::Tc, Rung::Tun)] {
            for underlay in [Underlay::Virtual, Underlay::Wire] {
                let name = format!("bypass::{bypass}_{}_{}_{}", rung.name(), peer.name(), underlay.name());
                suite.add(name, needs(rung, peer), move |sandbox| {
                    every_check(sandbox, [rung, peer], bypass, underlay)
                });
            }
        }
    }
    let needs = needs(Rung::Tc, Rung::Tc);
    suite.add("bypass::flows_of_a_translated_service_take_the_stack", needs, service);
    suite.add("bypass::masqueraded_flows_take_the_stack", needs, masquerade);
    suite.add("bypass::a_new_rule_ends_flows_that_skip_the_stack", needs, new_rule);
    for (name, rung) in [("tc", Rung::Tc), ("xdp", Rung::Xdp)] {
        suite.add(
            format!("bypass::connection_tracking_takes_no_sample_for_invalid_on_{name}"),
            needs,
            move |sandbox| tracked(sandbox, rung),
        );
    }
    suite.add("bypass::tracked_connections_fall_back_and_return", needs, fall_back);
    suite.add("bypass::tracked_connections_outlive_the_agent", needs, restart);
    suite.add("bypass::connections_that_tracking_forgets_go_on", needs, forgotten);
    suite.add("bypass::rules_that_start_tracking_find_connections_that_skip_it", needs, tracking_begins);
    suite.add("bypass::one_way_flows_need_no_answer_without_tracking", needs, one_way);
    suite.add("bypass::connections_that_a_helper_reads_take_the_stack", needs, helper);
    suite.add("bypass::devices_with_traffic_control_are_left_to_the_stack", needs, traffic_control);
    suite.add("bypass::status_shows_it", needs, status);
}

/// Two agents with this bypass on the reference topology.
fn start(sandbox: &Arc<Sandbox>, rungs: [Rung; 2], bypass: &str, underlay: Underlay) -> Result<Pair> {
    let topology = Topology::build(sandbox, underlay, PodOffload::On)?;
    let [a, b] = rungs;
    Pair::start_with(sandbox, topology, a, b, &["--bypass", bypass])
}

fn start_flows(sandbox: &Arc<Sandbox>) -> Result<Pair> {
    start(sandbox, [Rung::Tc; 2], "flows", Underlay::Virtual)
}

/// Packets that have skipped a host's stack, in both directions.
fn bypassed(counters: &Counters) -> u64 {
    counters.traffic.egress_bypass_packets + counters.traffic.ingress_bypass_packets
}

/// What both hosts have bypassed.
fn bypassed_by(pair: &Pair) -> Result<[u64; 2]> {
    Ok(pair.counters()?.map(|counters| bypassed(&counters)))
}

/// Whether both hosts have bypassed more than so many packets in between.
fn grew(before: [u64; 2], after: [u64; 2], packets: u64) -> bool {
    before.iter().zip(after).all(|(before, after)| before + packets < after)
}

fn every_check(sandbox: &Arc<Sandbox>, rungs: [Rung; 2], bypass: &str, underlay: Underlay) -> Result<()> {
    let pair = start(sandbox, rungs, bypass, underlay)?;
    let plan = Plan::overlay(TCP_BYTES);
    for check in CHECKS {
        check.run(&pair.topology, &plan).with_context(|| diagnosis(&pair, check.name))?;
    }
    let [a, b] = pair.counters()?;
    let [rung, peer] = rungs;
    check_counters(&a, rung, peer, "A")?;
    check_counters(&b, peer, rung, "B")?;
    for (name, counters, rung) in [("A", &a, rung), ("B", &b, peer)] {
        let traffic = &counters.traffic;
        for (direction, bypass, all) in [
            ("egress", traffic.egress_bypass_packets, traffic.egress_fast_packets),
            ("ingress", traffic.ingress_bypass_packets, traffic.ingress_fast_packets),
        ] {
            // About half of the traffic is between the hosts themselves; on `flows`, many flows are short; and XDP counts frames that
            // reach the bypass many in one packet.
            let enough = if rung.is_fast() { bypass * 50 >= all } else { bypass == 0 };
            ensure!(enough, "{bypass} of {all} {direction} packets skip the stack of {name}");
        }
    }
    flood_both_ways(&pair, DATAGRAMS).with_context(|| diagnosis(&pair, "flood"))?;
    let Pair { a, b, topology: _topology, .. } = pair;
    a.stop()?;
    b.stop()
}

/// Runs nft with one line of commands.
pub(crate) fn nft(host: &Netns, commands: &str) -> Result<()> {
    let mut nft = std::process::Command::new("nft");
    let output = host.output(nft.arg(commands))?;
    ensure!(output.status.success(), "nft {commands}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// Rules as kube-proxy's: what connection tracking takes for invalid is dropped.
const TRACKING: &str = "table ip test { chain forward { type filter hook forward priority 0; ct state invalid counter drop; ct state \
                        established,related accept; }; }";

fn service(sandbox: &Arc<Sandbox>) -> Result<()> {
    let pair = start_flows(sandbox)?;
    let (a, b) = pair.topology.pods();
    let host = &pair.topology.a.host;
    // The virtual address is one of the overlay, too: only the stack knows where it leads.
    nft(
        host,
        "table ip test { chain prerouting { type nat hook prerouting priority -100; ip daddr 10.244.7.7 dnat to 10.244.2.2; }; }",
    )?;
    let listener = b.netns.run(|| TcpListener::bind((b.address, 0)))?.context("listen")?;
    let port = listener.local_addr().context("read the listener's port")?.port();
    let stream = Stream::start_at(a, &listener, SocketAddr::from(([10, 244, 7, 7], port)))?;
    stream.advance(LONG)?;
    let [on_a, on_b] = bypassed_by(&pair)?;
    ensure!(on_a == 0, "{on_a} packets of a translated flow have skipped the stack that translates them");
    ensure!(on_b > 0, "the host of the server translates nothing");
    stream.finish()?;
    // A flow that is not translated skips it.
    tcp_stream(&pair, LONG)?;
    ensure!(bypassed_by(&pair)?[0] > 0, "no packet has skipped the stack");
    Ok(())
}

/// Sends so many bytes from container A to container B.
fn tcp_stream(pair: &Pair, bytes: u64) -> Result<SocketAddr> {
    let (a, b) = pair.topology.pods();
    let stream = Stream::start(a, b)?;
    stream.advance(bytes)?;
    Ok(stream.finish()?.1)
}

fn masquerade(sandbox: &Arc<Sandbox>) -> Result<()> {
    let pair = start_flows(sandbox)?;
    let host = &pair.topology.a.host;
    nft(
        host,
        "table ip test { chain postrouting { type nat hook postrouting priority 100; oifname ovl0 ip saddr 10.244.1.2 masquerade; }; }",
    )?;
    let seen = tcp_stream(&pair, LONG)?;
    ensure!(seen.ip() == pair.topology.a.host_address, "the server has seen {seen}");
    let [on_a, on_b] = bypassed_by(&pair)?;
    ensure!(
        on_a == 0 && on_b > 0,
        "{on_a} packets have skipped the stack that masquerades, {on_b} the other"
    );
    Ok(())
}

fn new_rule(sandbox: &Arc<Sandbox>) -> Result<()> {
    let pair = start_flows(sandbox)?;
    let (a, b) = pair.topology.pods();
    for (name, host, rule) in [
        ("leaving", &pair.topology.a.host, "ip saddr 10.244.1.2 drop"),
        ("arriving", &pair.topology.b.host, "ip daddr 10.244.2.2 drop"),
    ] {
        with_echo(a, b, |socket| {
            let mut index = 0;
            let mut answered = || {
                index += 1;
                is_answered(socket, index, Duration::from_millis(100))
            };
            let before = bypassed_by(&pair)?;
            wait_until("the flow skips both stacks both ways", || {
                ensure!(answered()?, "a datagram was lost without a rule");
                Ok(grew(before, bypassed_by(&pair)?, 20))
            })?;
            nft(
                host,
                &format!(
                    "table ip test {{ chain forward {{ type filter hook forward priority 0; {rule}; }}; }}"
                ),
            )?;
            // Until then, one that checks whether the stack still lets the flow through may be lost.
            let mut lost_in_a_row = 0;
            wait_until("a rule ends a flow that skips the stack", || {
                lost_in_a_row = if answered()? { 0 } else { lost_in_a_row + 1 };
                Ok(lost_in_a_row == 5)
            })?;
            // It stays ended, however often the flow tries.
            for _ in 0..50 {
                ensure!(!answered()?, "a datagram has passed a rule that drops it");
            }
            nft(host, "delete table ip test")?;
            wait_until("the flow passes again without the rule", &mut answered)
        })
        .with_context(|| diagnosis(&pair, name))?;
    }
    Ok(())
}

/// Both hosts track connections and drop what is invalid; the stream goes on for many samples.
fn tracked(sandbox: &Arc<Sandbox>, rung: Rung) -> Result<()> {
    let pair = start(sandbox, [rung; 2], "flows", Underlay::Wire)?;
    for side in [&pair.topology.a, &pair.topology.b] {
        nft(&side.host, TRACKING)?;
    }
    tcp_stream(&pair, LONG).with_context(|| diagnosis(&pair, "stream"))?;
    let [on_a, on_b] = bypassed_by(&pair)?;
    ensure!(on_a > 1000 && on_b > 1000, "only {on_a} and {on_b} packets have skipped the stacks");
    no_invalid(&pair)?;
    // UDP, and connections that live for a moment.
    let (a, b) = pair.topology.pods();
    for _ in 0..20 {
        tcp::transfer(a, b, 100_000, Duration::from_secs(10))?;
    }
    let before = bypassed_by(&pair)?;
    with_echo(a, b, |socket| {
        let mut index = 0;
        wait_until("a tracked flow of UDP skips both stacks both ways", || {
            index += 1;
            ensure!(is_answered(socket, index, Duration::from_secs(2))?, "a datagram was lost");
            Ok(grew(before, bypassed_by(&pair)?, 20))
        })
    })?;
    no_invalid(&pair)
}

/// Connection tracking has taken no packet for invalid.
fn no_invalid(pair: &Pair) -> Result<()> {
    for side in [&pair.topology.a, &pair.topology.b] {
        let rules = side.host.tool("nft list table ip test")?;
        ensure!(rules.contains("invalid counter packets 0 "), "host {}: {rules}", side.name);
    }
    Ok(())
}

/// Host A forgets the container now and then: its packets take the stack again, far behind the last window that it saw.
fn fall_back(sandbox: &Arc<Sandbox>) -> Result<()> {
    let pair = start_flows(sandbox)?;
    let (a, b) = pair.topology.pods();
    let hosts = [&pair.topology.a.host, &pair.topology.b.host];
    for host in hosts {
        nft(host, TRACKING)?;
    }
    let stream = Stream::start(a, b)?;
    stream.advance(LONG)?;
    for host in hosts.iter().cycle().take(6) {
        host.tool(&format!("ip neighbour flush dev {POD_LINK}"))?;
        stream.advance(LONG / 8).with_context(|| diagnosis(&pair, "the stream falls back"))?;
    }
    let before = bypassed_by(&pair)?;
    stream.advance(LONG / 4)?;
    let after = bypassed_by(&pair)?;
    ensure!(grew(before, after, 0), "{before:?} {after:?}");
    stream.finish()?;
    no_invalid(&pair)
}

/// The agents are killed while a stream skips tracking, and start again.
fn restart(sandbox: &Arc<Sandbox>) -> Result<()> {
    let pair = start_flows(sandbox)?;
    let (a, b) = pair.topology.pods();
    for side in [&pair.topology.a, &pair.topology.b] {
        nft(&side.host, TRACKING)?;
    }
    let stream = Stream::start(a, b)?;
    stream.advance(LONG)?;
    let Pair { a: agent_a, b: agent_b, store, topology } = pair;
    let more = ["--bypass", "flows"].map(str::to_owned);
    let again = |agent: overlay_tests::agent::Agent, side| {
        let mut arguments = store.arguments(side, Rung::Tc);
        arguments.extend(more.clone());
        agent.crash()?.start(&arguments)
    };
    let agent_a = again(agent_a, &topology.a)?;
    stream.advance(LONG / 4).context("after the agent of the sender's host")?;
    let agent_b = again(agent_b, &topology.b)?;
    stream.advance(LONG / 2).context("after the agent of the receiver's host")?;
    stream.finish()?;
    let pair = Pair { a: agent_a, b: agent_b, store, topology };
    let [on_a, on_b] = bypassed_by(&pair)?;
    ensure!(on_a > 1000 && on_b > 100, "{on_a} and {on_b} packets have skipped the stacks since the restart");
    no_invalid(&pair)
}

/// Connection tracking forgets a connection that pauses; the connection goes on.
fn forgotten(sandbox: &Arc<Sandbox>) -> Result<()> {
    let pair = start_flows(sandbox)?;
    let (a, b) = pair.topology.pods();
    for side in [&pair.topology.a, &pair.topology.b] {
        nft(&side.host, TRACKING)?;
        side.host.tool("sysctl -q -w net.netfilter.nf_conntrack_tcp_timeout_established=2")?;
        side.host.tool("sysctl -q -w net.netfilter.nf_conntrack_udp_timeout_stream=2")?;
    }
    with_echo(a, b, |socket| {
        for index in 0..4 {
            ensure!(is_answered(socket, index, Duration::from_secs(2))?, "datagram {index} was lost");
            thread::sleep(Duration::from_secs(if index == 1 { 5 } else { 0 }));
        }
        Ok(())
    })?;
    let stream = Stream::start(a, b)?;
    for _ in 0..2 {
        stream.advance(LONG)?;
        stream.pause(Duration::from_secs(5));
    }
    stream.advance(LONG)?;
    stream.finish()?;
    no_invalid(&pair)
}

/// A connection skips hosts that track nothing; then a rule makes them track.
fn tracking_begins(sandbox: &Arc<Sandbox>) -> Result<()> {
    let pair = start_flows(sandbox)?;
    let (a, b) = pair.topology.pods();
    let stream = Stream::start(a, b)?;
    stream.advance(LONG / 2)?;
    for side in [&pair.topology.a, &pair.topology.b] {
        nft(&side.host, TRACKING)?;
    }
    stream.advance(LONG).with_context(|| diagnosis(&pair, "tracking begins"))?;
    let before = bypassed_by(&pair)?;
    stream.advance(LONG / 2)?;
    let after = bypassed_by(&pair)?;
    ensure!(grew(before, after, 0), "{before:?} {after:?}");
    stream.finish().map(drop)
}

/// Datagrams without answers skip stacks that track nothing, and take stacks that do.
fn one_way(sandbox: &Arc<Sandbox>) -> Result<()> {
    let pair = start_flows(sandbox)?;
    let (a, b) = pair.topology.pods();
    let receiver = b.netns.run(|| UdpSocket::bind((b.address, 0)))?.context("bind the receiver")?;
    let target = receiver.local_addr().context("read the receiver's port")?;
    let send = |count: u64| -> Result<[u64; 2]> {
        let sender = a.netns.run(|| UdpSocket::bind((a.address, 0)))?.context("bind the sender")?;
        let before = bypassed_by(&pair)?;
        for _ in 0..count {
            sender.send_to(&[0; 64], target).context("send")?;
            thread::sleep(Duration::from_micros(200));
        }
        let after = bypassed_by(&pair)?;
        let [a, b] = [before, after].map(|[a, _]| a);
        let [c, d] = [before, after].map(|[_, b]| b);
        Ok([b - a, d - c])
    };
    send(10)?;
    let skipped = send(1000)?;
    ensure!(skipped.iter().all(|count| *count > 900), "{skipped:?} of 1000 have skipped the stacks");
    for side in [&pair.topology.a, &pair.topology.b] {
        nft(&side.host, TRACKING)?;
    }
    let skipped = send(1000)?;
    ensure!(skipped == [0, 0], "{skipped:?} have skipped the stacks before there was an answer");
    Ok(())
}

/// A helper of connection tracking would find addresses in what bypasses it.
fn helper(sandbox: &Arc<Sandbox>) -> Result<()> {
    let pair = start_flows(sandbox)?;
    let (a, b) = pair.topology.pods();
    let listener = b.netns.run(|| TcpListener::bind((b.address, 0)))?.context("listen")?;
    let target = listener.local_addr().context("read the listener's port")?;
    let rules = format!(
        "table ip test {{ ct helper ftp {{ type \"ftp\" protocol tcp; }}; chain prerouting {{ type filter hook prerouting priority 0; tcp \
         dport {} ct helper set \"ftp\"; }}; }}",
        target.port()
    );
    for side in [&pair.topology.a, &pair.topology.b] {
        nft(&side.host, &rules)?;
    }
    let stream = Stream::start_at(a, &listener, target)?;
    stream.advance(LONG)?;
    stream.finish()?;
    ensure!(bypassed_by(&pair)? == [0, 0], "{:?} packets have skipped a helper", bypassed_by(&pair)?);
    tcp_stream(&pair, LONG)?;
    ensure!(bypassed_by(&pair)?.iter().all(|count| *count > 0), "no packet has skipped the stack");
    Ok(())
}

/// A limit that the operator sets on a container's device holds, whatever the bypass.
fn traffic_control(sandbox: &Arc<Sandbox>) -> Result<()> {
    for bypass in ["flows", "all"] {
        let pair = start(sandbox, [Rung::Tc; 2], bypass, Underlay::Virtual)?;
        let host = &pair.topology.b.host;
        tcp_stream(&pair, LONG / 4)?;
        ensure!(bypassed_by(&pair)?.iter().all(|count| *count > 0), "no packet has skipped the stack");
        host.tool(&format!("tc qdisc add dev {POD_LINK} root tbf rate 8gbit burst 1mb latency 50ms"))?;
        let why = format!("{POD_LINK}: has traffic control (tbf), which the bypass would skip");
        wait_until("the device is left to the stack", || Ok(pair.b.text("status")?.contains(&why)))?;
        let before = bypassed_by(&pair)?;
        tcp_stream(&pair, LONG / 4)?;
        let after = bypassed_by(&pair)?;
        ensure!(before[0] < after[0] && before[1] == after[1], "{bypass}: {before:?} {after:?}");
        host.tool(&format!("tc qdisc delete dev {POD_LINK} root"))?;
        wait_until("the device is bypassed again", || Ok(!pair.b.text("status")?.contains(&why)))?;
        tcp_stream(&pair, LONG / 4)?;
        ensure!(bypassed_by(&pair)?[1] > after[1], "{bypass}: no packet has skipped the stack again");
    }
    Ok(())
}

fn status(sandbox: &Arc<Sandbox>) -> Result<()> {
    for (bypass, line) in [
        ("all", "all (--bypass all), 1 containers behind 1 devices"),
        ("flows", "flows (--bypass flows), 1 containers behind 2 devices"),
        ("off", "off (--bypass off)"),
    ] {
        let pair = start(sandbox, [Rung::Tc, Rung::Tun], bypass, Underlay::Virtual)?;
        let (a, b) = pair.topology.pods();
        ensure!(passes(a, b, 100)?, "a datagram was lost");
        wait_until(line, || Ok(pair.a.text("status")?.contains(line)))?;
        let off = if bypass == "off" { line } else { "off (the tun rung has none)" };
        ensure!(pair.b.text("status")?.contains(off), "{}", pair.b.text("status")?);
    }
    Ok(())
}
