//! Packets arrive at containers with correct checksums, whatever rungs and offloads they have passed.

use std::{sync::Arc, time::Duration};

use anyhow::{Context, Result, ensure};
use overlay_tests::{
    agent::Rung,
    capture::{Capture, Direction},
    pair::Pair,
    sandbox::Sandbox,
    topology::{OVERLAY_MTU, POD_LINK, PodOffload, Topology, UPLINK, Underlay},
    traffic::{
        checksum::Verified,
        ping::ping,
        tcp,
        udp::{every_size, segmented, zero_sum},
    },
};
use serde_json::Value;

use crate::{
    frames,
    matrix::{PAIRS, diagnosis, needs},
    suite::Suite,
};

const TCP_BYTES: u64 = 4 << 20;
const LIMIT: Duration = Duration::from_secs(10);
/// What arrives at each container at least: full segments one way, datagrams of each size, requests or answers.
const EXPECTED: [(Verified, u64); 3] = [
    (Verified::Tcp, TCP_BYTES / OVERLAY_MTU as u64),
    (Verified::Udp, OVERLAY_MTU as u64 - 28),
    (Verified::Icmp, 6),
];

pub(crate) fn register(suite: &mut Suite) {
    for (a, b) in PAIRS {
        for underlay in [Underlay::Virtual, Underlay::Wire] {
            let name = format!(
                "checksums::captures_at_both_containers_contain_no_bad_checksum_on_{}_{}_{}",
                a.name(),
                b.name(),
                underlay.name()
            );
            suite.add(name, needs(a, b), move |sandbox| captured(sandbox, a, b, underlay));
        }
    }
    suite.add("checksums::a_bad_checksum_is_found", &[], bad_checksum);
}

fn captured(sandbox: &Arc<Sandbox>, a: Rung, b: Rung, underlay: Underlay) -> Result<()> {
    // Hosts finish checksums on the links to their containers, so that a capture there can be verified.
    let topology = Topology::build(sandbox, underlay, PodOffload::Off)?;
    let pair = Pair::start(sandbox, topology, a, b)?;
    exchange(&pair, Direction::Both).with_context(|| diagnosis(&pair, "finished by the containers"))?;
    for side in [&pair.topology.a, &pair.topology.b] {
        side.pod.tool(&format!("ethtool -K {UPLINK} tx on tso on gso on"))?;
    }
    exchange(&pair, Direction::Incoming).with_context(|| diagnosis(&pair, "unfinished by the containers"))
}

/// TCP, UDP and ICMP both ways, captured at both containers.
fn exchange(pair: &Pair, direction: Direction) -> Result<()> {
    let (a, b) = pair.topology.pods();
    let captures = [Capture::start(a.netns, direction)?, Capture::start(b.netns, direction)?];
    for (from, to) in [(a, b), (b, a)] {
        tcp::transfer(from, to, TCP_BYTES, LIMIT)?;
        segmented(from, to, OVERLAY_MTU)?;
        // It may not wait for all answers on a busy machine; the captures do.
        ensure!(ping(from.netns, to.address, 3)?.received > 0, "no echo request was answered");
    }
    every_size(a, b, OVERLAY_MTU)?;
    zero_sum(a, b)?;
    for (capture, container) in captures.into_iter().zip(["A", "B"]) {
        let seen = capture.finish()?;
        seen.is_clean(&EXPECTED).with_context(|| format!("captured at container {container}"))?;
    }
    Ok(())
}

/// The capture itself, without an agent: a host sends its container an echo request, correct, then corrupted.
fn bad_checksum(sandbox: &Arc<Sandbox>) -> Result<()> {
    let Topology { a, .. } = Topology::build(sandbox, Underlay::Virtual, PodOffload::Off)?;
    let link = a.pod.tool(&format!("ip -json link show dev {UPLINK}"))?;
    let link: Value = serde_json::from_str(&link).context("read the output of ip -json")?;
    let mac = link.pointer("/0/address").and_then(Value::as_str).context("no address")?;
    let good = frames::from_hex(ECHO_REQUEST)?;
    let mut bad = good.clone();
    *bad.last_mut().context("an empty frame")? ^= 1;
    for (frame, is_bad) in [(good, false), (bad, true)] {
        let frames = vec![frames::addressed_to(&frame, mac)?];
        let capture = Capture::start(&a.pod, Direction::Incoming)?;
        ensure!(a.host.run(|| frames::send(POD_LINK, &frames))?? == 1, "the frame was not sent");
        let seen = capture.finish()?;
        ensure!(seen.bad == u64::from(is_bad), "{seen:?}");
        ensure!(seen.is_clean(&[(Verified::Icmp, 1)]).is_err() == is_bad, "{seen:?}");
    }
    Ok(())
}

/// From 10.244.1.1 to 10.244.1.2, captured between two containers.
const ECHO_REQUEST: &str =
    "bad0532056102a74a322b6e2080045000025478a40004001db630af401010af401020800cfa4144a0001000102030405060708";
