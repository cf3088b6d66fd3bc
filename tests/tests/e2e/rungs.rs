//! The rung changes while the agent runs: on request, because a program is removed again and again, and back.

use std::{process::Command, sync::Arc, thread, time::Duration};

use anyhow::{Context as _, Result, ensure};
use overlay_tests::{
    agent::{Agent, Rung, Site},
    cpu::OneCpu,
    pair::Pair,
    sandbox::Sandbox,
    topology::{Endpoint, OVERLAY_MTU, PodOffload, Topology, Underlay},
    traffic::{
        numbered::{self, Numbered},
        stream::Stream,
        udp::every_size,
    },
};
use serde_json::Value;

use crate::{
    foreign::attach_xdp, machine::Need, matrix::diagnosis, privileges, suite::Suite, wait::wait_until,
};

/// Every change from one rung to another, once.
const CHANGES: [Rung; 6] = [Rung::Xdp, Rung::Tc, Rung::Tun, Rung::Xdp, Rung::Tun, Rung::Tc];
/// Traffic before and after a change.
const TRAFFIC: Duration = Duration::from_millis(400);

pub(crate) fn register(suite: &mut Suite) {
    let needs = &[Need::Tun, Need::Ebpf];
    suite.add("rungs::datapath_set_changes_the_rung_under_traffic", needs, changes);
    suite.add("rungs::an_impossible_request_leaves_the_rung_that_is_in_use", needs, impossible);
    suite.add("rungs::a_program_that_others_remove_again_and_again_is_left_out_for_a_while", needs, removed);
}

/// Answer of `datapath set`.
fn set(agent: &Agent, rung: &str) -> Result<Value> {
    let answer = agent.site().output("datapath set", &[rung, "-o", "json"])?;
    serde_json::from_str(&answer).with_context(|| format!("parse the answer {answer}"))
}

fn word<'a>(answer: &'a Value, path: &str) -> Result<&'a str> {
    answer.pointer(path).and_then(Value::as_str).with_context(|| format!("{answer} has no {path}"))
}

/// A direction of traffic.
type Way<'a> = (Endpoint<'a>, Endpoint<'a>);

/// Numbered datagrams on some ways while `work` is done.
fn numbered_on<T>(ways: &[Way<'_>], work: impl FnOnce() -> Result<T>) -> Result<(T, Vec<Numbered>)> {
    let (mut flows, mut work) = (Vec::new(), Some(work));
    let mut once = || work.take().context("the work is done once")?();
    let result = on_ways(ways, &mut flows, &mut once)?;
    Ok((result, flows))
}

fn on_ways<T>(ways: &[Way<'_>], flows: &mut Vec<Numbered>, work: &mut dyn FnMut() -> Result<T>) -> Result<T> {
    let Some(((from, to), others)) = ways.split_first() else { return work() };
    let (result, flow) = numbered::meanwhile(*from, *to, || on_ways(others, flows, work))?;
    flows.push(flow);
    Ok(result)
}

/// What full queues in front of the slow path have dropped: it carries less than the programs, and less yet on a busy machine.
fn overflows(agent: &Agent) -> Result<u64> {
    let counters = agent.counters()?;
    Ok(["device_queue_full", "socket_buffer_full"].iter().filter_map(|name| counters.kernel.get(*name)).sum())
}

/// No datagram is lost but those that full queues dropped, which had `before` when the traffic began.
fn lost_none(agent: &Agent, before: u64, flows: &[Numbered]) -> Result<()> {
    let lost: u64 = flows.iter().map(Numbered::lost).sum();
    let dropped = overflows(agent)? - before;
    if dropped > 0 {
        println!("    the slow path was too slow for {dropped} packets");
    }
    ensure!(lost <= dropped, "{lost} were lost, and full queues dropped {dropped}: {flows:?}");
    Ok(())
}

/// Host A goes through every change, while containers send in both directions, and hosts do where programs carry all packets. A connection
/// outlives the same changes.
fn changes(sandbox: &Arc<Sandbox>) -> Result<()> {
    let _one = OneCpu::enter()?;
    let topology = Topology::build(sandbox, Underlay::Virtual, PodOffload::On)?;
    let pair = Pair::start_with(sandbox, topology, Rung::Tc, Rung::Tc, &["--on-exit", "keep"])?;
    let ((from, to), (host, other)) = (pair.topology.pods(), pair.topology.hosts());
    let all = [(from, to), (to, from), (host, other), (other, host)];
    let mut stream = Some(Stream::start(from, to)?);
    let mut before = Rung::Tc;
    for rung in CHANGES {
        let name = format!("from {} to {}", before.name(), rung.name());
        let is_fast = before.is_fast() && rung.is_fast();
        if !is_fast && let Some(stream) = stream.take() {
            stream.finish()?;
        }
        let ways = if is_fast { &all[..] } else { &all[..2] };
        let dropped = overflows(&pair.a)?;
        let (answer, flows) = numbered_on(ways, || {
            thread::sleep(TRAFFIC);
            stream.as_ref().map_or(Ok(()), |stream| stream.advance(1 << 20))?;
            let answer = set(&pair.a, rung.name())?;
            stream.as_ref().map_or(Ok(()), |stream| stream.advance(1 << 20))?;
            thread::sleep(TRAFFIC);
            Ok(answer)
        })
        .with_context(|| diagnosis(&pair, &name))?;
        is_answered(&pair, &answer, rung).with_context(|| name.clone())?;
        let sent: u64 = flows.iter().map(|flow| flow.sent).sum();
        let lost: u64 = flows.iter().map(Numbered::lost).sum();
        let reordered: u64 = flows.iter().map(|flow| flow.reordered).sum();
        println!("{name}: of {sent} datagrams {lost} were lost and {reordered} overtaken");
        lost_none(&pair.a, dropped, &flows).with_context(|| diagnosis(&pair, &name))?;
        // What waits in the slow path's queues arrives behind what takes the programs already. On veth, XDP may reorder.
        ensure!(reordered == 0 || before == Rung::Tun || rung == Rung::Xdp, "{name}: {flows:?}");
        before = rung;
    }
    let stream = Stream::start(from, to)?;
    for rung in [Rung::Tun, Rung::Xdp, Rung::Tun, Rung::Tc] {
        stream.advance(1 << 20)?;
        set(&pair.a, rung.name())?;
    }
    stream.advance(1 << 20)?;
    stream.finish()?;
    let counters = pair.a.counters()?;
    let count = |name: &str| counters.rungs.get(name).copied();
    // Egress changes with tun only.
    ensure!(count("rung_changes") == Some(18) && count("demotions") == Some(0), "{:?}", counters.rungs);
    Ok(())
}

/// The answer of `datapath set` names the rung, and programs are pinned if there are any.
fn is_answered(pair: &Pair, answer: &Value, rung: Rung) -> Result<()> {
    let egress = if rung == Rung::Tun { "tun" } else { "tc" };
    let rungs = (word(answer, "/egress/rung")?, word(answer, "/ingress/rung")?);
    ensure!(rungs == (egress, rung.name()) && word(answer, "/requested")? == rung.name(), "{answer}");
    ensure!(word(answer, "/at_start")? == "tc", "{answer}");
    let has_pins = !pair.topology.a.host.pins()?.is_empty();
    ensure!(has_pins == rung.is_fast(), "pins are there: {has_pins}");
    Ok(())
}

fn impossible(sandbox: &Arc<Sandbox>) -> Result<()> {
    let topology = Topology::build(sandbox, Underlay::Virtual, PodOffload::On)?;
    let site = Site::new(sandbox, &topology.b.host, "absent")?;
    let error = site.output("datapath show", &[]).err().context("an agent answers that does not run")?;
    ensure!(format!("{error:#}").contains("no agent answers"), "{error:#}");
    let pair = Pair::start_with(sandbox, topology, Rung::Tc, Rung::Tc, &["--on-exit", "keep"])?;
    let (host, (from, to)) = (&pair.topology.a.host, pair.topology.pods());
    attach_xdp(host, &sandbox.new_directory("foreign")?)?;
    for rung in [Rung::Tc, Rung::Tun] {
        set(&pair.a, rung.name())?;
        let before = pair.a.status()?;
        let dropped = overflows(&pair.a)?;
        let (error, flows) = numbered_on(&[(from, to)], || {
            let refused = set(&pair.a, "xdp").err().context("XDP is there twice")?;
            thread::sleep(TRAFFIC);
            Ok(format!("{refused:#}"))
        })?;
        lost_none(&pair.a, dropped, &flows)?;
        let stays = format!("the datapath stays {}", rung.name());
        for words in
            ["exit status: 1", "another XDP program is on eth0", "ip link set dev eth0 xdp off", &stays]
        {
            ensure!(error.contains(words), "{error}");
        }
        let after = pair.a.status()?;
        ensure!(
            after.state == "running"
                && after.ingress.rung == rung.name()
                && after.egress.rung == before.egress.rung,
            "{after:?}"
        );
        ensure!(host.pins()?.is_empty() == (rung == Rung::Tun), "half of it is attached");
        let links = host.tool("ip -details link show dev eth0")?;
        ensure!(links.contains("prog/xdp"), "the other program is gone: {links}");
    }
    // An operator takes the other program away, and asks again.
    host.tool("ip link set dev eth0 xdpdrv off")?;
    let answer = set(&pair.a, "xdp")?;
    ensure!(word(&answer, "/ingress/rung")? == "xdp", "{answer}");
    every_size(from, to, OVERLAY_MTU)?;

    let mut wrong = Command::new(pair.a.site().binary());
    wrong.args(["datapath", "set", "fast"]);
    let output = wrong.output().context("run the agent's binary")?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(2), "{}: {error}", output.status);
    ensure!(error.contains("'fast'") && error.contains("auto, xdp, tc, tun"), "{error}");
    Ok(())
}

fn removed(sandbox: &Arc<Sandbox>) -> Result<()> {
    let topology = Topology::build(sandbox, Underlay::Virtual, PodOffload::On)?;
    let more = ["--datapath", "auto", "--rung-pause", "5", "--bypass", "off"];
    let pair = Pair::start_with(sandbox, topology, Rung::Tc, Rung::Tc, &more)?;
    let (from, to) = pair.topology.pods();
    let rungs = || {
        let status = pair.a.status()?;
        anyhow::Ok([status.egress.rung, status.ingress.rung])
    };
    let mut detached = 0;
    wait_until("the program is left out", || {
        if rungs()? == ["tc", "tun"] {
            return Ok(true);
        }
        let repaired = pair.a.site().log().matches("repaired: program ovl_ingress").count();
        if repaired == detached {
            detach_ingress(&pair.a)?;
            detached += 1;
        }
        Ok(false)
    })
    .with_context(|| diagnosis(&pair, "demotion"))?;
    ensure!(detached > 2, "it was left out after {detached} removals");
    every_size(from, to, OVERLAY_MTU)?;
    let status = pair.a.status()?;
    let problem =
        status.problems.iter().any(|problem| problem.starts_with("ovl_ingress on eth0 is left out"));
    ensure!(status.state == "degraded" && problem, "{status:?}");
    let shown = pair.a.text("datapath show")?;
    ensure!(shown.contains("another program removed it") && shown.contains("next attempt at"), "{shown}");

    wait_until("the program is attached again after the pause", || Ok(rungs()? == ["tc", "tc"]))
        .with_context(|| diagnosis(&pair, "promotion"))?;
    every_size(from, to, OVERLAY_MTU)?;
    ensure!(pair.a.status()?.state == "running", "{:?}", pair.a.status()?);

    detach_ingress(&pair.a)?;
    wait_until("one removal is enough now", || Ok(rungs()? == ["tc", "tun"]))
        .with_context(|| diagnosis(&pair, "second demotion"))?;
    let answer = set(&pair.a, "auto")?;
    ensure!(word(&answer, "/ingress/rung")? == "tc", "a request does not wait: {answer}");
    every_size(from, to, OVERLAY_MTU)?;
    let counters = pair.a.counters()?;
    let [all, demotions, promotions] =
        ["rung_changes", "demotions", "promotions"].map(|name| counters.rungs.get(name).copied());
    ensure!((all, demotions, promotions) == (Some(4), Some(2), Some(2)), "{:?}", counters.rungs);
    let log = pair.a.site().log();
    for words in ["ingress is demoted from tc to tun", "ingress is promoted from tun to tc"] {
        ensure!(log.contains(words), "the log lacks `{words}`: {}", pair.a.site().log_tail());
    }
    Ok(())
}

/// Detaches the program on the underlay.
fn detach_ingress(agent: &Agent) -> Result<()> {
    privileges::detach(agent, "(ingress)")
}
