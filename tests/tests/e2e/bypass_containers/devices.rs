//! The devices of containers: which have programs, which get them back, and which keep none.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use aya::programs::{SchedClassifier, tc::TcAttachType};
use nix::net::if_::if_nametoindex;
use overlay_tests::{
    agent::{Agent, Rung},
    netns::Netns,
    pair::Pair,
    sandbox::Sandbox,
    topology::{OVERLAY_MTU, Underlay},
    traffic::{
        stream::Stream,
        udp::{every_size, passes},
    },
};

use super::place::{BRIDGE, BRIDGE_MAC, Container, Kind, Place, make_bridge, skipped};
use crate::{containers::batch, privileges, wait::wait_until};

const TC: (Rung, Underlay) = (Rung::Tc, Underlay::Virtual);

/// The programs on all devices of a host, but those of the overlay and the underlay: `DEVICE DIRECTION`.
fn programs(host: &Netns) -> Result<Vec<String>> {
    let links = host.tool("ip -brief link")?;
    let names = links.lines().filter_map(|line| line.split([' ', '@']).next());
    let devices: Vec<&str> = names.filter(|name| !["ovl0", "eth0"].contains(name)).collect();
    let mut found = Vec::new();
    for (direction, attach_type) in [("ingress", TcAttachType::Ingress), ("egress", TcAttachType::Egress)] {
        for device in &devices {
            let (_, links) = host.run(|| SchedClassifier::query_tcx(device, attach_type))??;
            let filters = host.tool(&format!("tc filter show dev {device} {direction}"))?;
            let count = links.len() + filters.matches("direct-action").count();
            found.extend(std::iter::repeat_n(format!("{device} {direction}"), count));
        }
    }
    found.sort();
    Ok(found)
}

/// The programs that a host with these containers at its bridge should have.
fn expected(bypass: &str, containers: &[&Container]) -> Vec<String> {
    let gateway = (bypass == "flows").then(|| format!("{BRIDGE} egress"));
    let mut names: Vec<String> =
        containers.iter().map(|container| format!("{} ingress", container.veth)).chain(gateway).collect();
    names.sort();
    names
}

fn has_programs(place: &Place, expected: &[String]) -> Result<()> {
    wait_until("the devices of containers have their programs", || Ok(programs(place.host())? == expected))
        .with_context(|| place.diagnosis(&format!("{expected:?}, {:?}", programs(place.host()))))
}

pub(super) fn come_back(sandbox: &Arc<Sandbox>, bypass: &str, attach: &str) -> Result<()> {
    let place = Place::start_with(sandbox, Kind::Bridge, TC, &["--bypass", bypass, "--tc-attach", attach])?;
    let (first, other) = (place.first(), place.add(3)?);
    let stream = Stream::start(first.end(), place.remote())?;
    let all = expected(bypass, &[&first, &other]);
    place.skips(&other)?;
    has_programs(&place, &all)?;
    for name in &all {
        let (device, direction) = name.split_once(' ').context("a device and a direction")?;
        if attach == "tcx" {
            let index = place.host().run(|| if_nametoindex(device))??;
            let link = format!("ifindex:\t{index}\nattach_type:\t");
            privileges::detach(place.agent(), &link)?;
        } else {
            place.host().tool(&format!("tc qdisc delete dev {device} clsact"))?;
        }
        let left = programs(place.host())?;
        ensure!(left.len() <= all.len(), "{left:?} after {direction} of {device} was detached");
        has_programs(&place, &all)?;
    }
    place.settles(2)?;
    place.skips(&other)?;

    // The bridge is made again.
    place.host().tool(&format!("ip link delete {BRIDGE}"))?;
    make_bridge(place.host(), BRIDGE, BRIDGE_MAC, "10.244.1.1/24")?;
    for container in [&first, &other] {
        place.plug(container, BRIDGE)?;
    }
    place.is_reached(&other, "a container behind a new bridge")?;
    place.skips(&other)?;
    stream.advance(20 << 20)?;
    stream.finish()?;
    place.settles(2)?;
    has_programs(&place, &all)?;
    Ok(())
}

pub(super) fn named(sandbox: &Arc<Sandbox>) -> Result<()> {
    for (pattern, first_skips, other_skips) in
        [("v2", true, false), ("veth1*", false, true), ("late*", false, false)]
    {
        let arguments = ["--bypass", "all", "--container-iface", pattern];
        let place = Place::start_with(sandbox, Kind::Bridge, TC, &arguments)?;
        // The container of the peer has none of these devices.
        let missing = place.pair.b.status()?.bypass.context("no bypass")?.skipped;
        let is_missing = format!("{pattern}: no device has such a name");
        ensure!(missing == [is_missing.clone()], "{missing:?}");
        ensure!(place.pair.b.text("status")?.contains(&is_missing), "{}", place.pair.b.text("status")?);
        let (first, other) = (place.first(), place.add(3)?);
        for (container, skips) in [(&first, first_skips), (&other, other_skips)] {
            every_size(container.end(), place.remote(), 100)?;
            every_size(place.remote(), container.end(), 100)?;
            if skips {
                place.skips(container)?;
            }
        }
        place.settles(usize::from(first_skips) + usize::from(other_skips))?;
        let known: Vec<_> = [(&first, first_skips), (&other, other_skips)]
            .iter()
            .filter(|(_, skips)| *skips)
            .map(|(c, _)| *c)
            .collect();
        has_programs(&place, &expected("all", &known))?;
        if known.is_empty() {
            ensure!(place.bypass()?.skipped == [is_missing], "{:?}", place.bypass()?);
            // A device that is named only now.
            let mut late = place.prepare(4)?;
            late.veth = "late0".to_owned();
            place.connect(&late)?;
            place.is_reached(&late, "a container at a device that came late")?;
            place.skips(&late)?;
            place.settles(1)?;
            ensure!(place.bypass()?.skipped.is_empty(), "{:?}", place.bypass()?);
            ensure!(
                skipped(&place.agent().counters()?).iter().all(|count| *count > 0),
                "nothing has skipped"
            );
        }
        place.runs()?;
    }
    Ok(())
}

pub(super) fn two_bridges(sandbox: &Arc<Sandbox>) -> Result<()> {
    for bypass in ["flows", "all"] {
        let place = Place::start(sandbox, Kind::Bridge, bypass)?;
        let first = place.first();
        make_bridge(place.host(), "cni1", "02:00:00:00:08:02", "10.244.1.193/26")?;
        let other = place.prepare(200)?;
        place.link(&other)?;
        place.plug(&other, "cni1")?;
        let lines =
            format!("address add {}/26 dev eth0\nroute add default via 10.244.1.193\n", other.address);
        batch(&other.netns, "ip", &lines)?;
        for container in [&first, &other] {
            every_size(container.end(), place.remote(), OVERLAY_MTU)?;
            place.skips(container)?;
        }
        let mut all = expected(bypass, &[&first, &other]);
        if bypass == "flows" {
            all.insert(1, "cni1 egress".to_owned());
        }
        has_programs(&place, &all)?;
        let status = place.bypass()?;
        ensure!(status.containers == 2 && status.devices == all.len(), "{status:?}");
        // A container moves to the other bridge, where its address leads to nothing: the kernel still sends to the first.
        place.plug(&other, BRIDGE)?;
        wait_until("the container is forgotten", || Ok(place.bypass()?.containers == 1))?;
        ensure!(!passes(place.remote(), other.end(), 100)?, "the kernel has found the container");
        place.plug(&other, "cni1")?;
        place.is_reached(&other, "a container that is back at its bridge")?;
        place.skips(&other)?;
        place.runs()?;
    }
    Ok(())
}

/// An agent that has ended, or was killed, and its successors.
pub(super) fn left(sandbox: &Arc<Sandbox>, attach: &str) -> Result<()> {
    let arguments = |bypass| ["--bypass", bypass, "--tc-attach", attach];
    let place = Place::start_with(sandbox, Kind::Bridge, TC, &arguments("flows"))?;
    let (first, other) = (place.first(), place.add(3)?);
    let containers = [&first, &other];
    place.skips(&other)?;
    has_programs(&place, &expected("flows", &containers))?;
    let none = |host: &Netns| {
        let left = programs(host)?;
        ensure!(left.is_empty(), "programs of an agent that is gone: {left:?}");
        Ok(())
    };

    let place = place.restart(Agent::stop, none, &arguments("all"))?;
    place.is_reached(&other, "a container of a new agent")?;
    place.skips(&other)?;
    has_programs(&place, &expected("all", &containers))?;

    // Pinned links and filters stay.
    let killed = |agent: Agent| agent.crash().map(drop);
    let stay = |host: &Netns| {
        let left = programs(host)?;
        ensure!(left == expected("all", &containers), "a killed agent left {left:?}");
        Ok(())
    };
    let place = place.restart(killed, stay, &arguments("off"))?;
    none(place.host())?;
    // Counters go on where the earlier agent's ended.
    let before = skipped(&place.agent().counters()?);
    every_size(other.end(), place.remote(), OVERLAY_MTU)?;
    ensure!(skipped(&place.agent().counters()?) == before, "packets skip a stack without a bypass");

    // Killed again, and removed by `down`.
    let place = place.restart(Agent::stop, none, &arguments("flows"))?;
    place.skips(&other)?;
    has_programs(&place, &expected("flows", &containers))?;
    let Place { pair: Pair { a, topology, .. }, .. } = place;
    a.crash()?.down()?;
    none(&topology.a.host)
}
