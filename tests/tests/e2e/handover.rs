//! A planned restart loses nothing on any rung: the next agent gets the queues of the last one, from it or from systemd.

use std::{fs::File, net::UdpSocket, sync::Arc, thread, time::Duration};

use anyhow::{Context as _, Result, ensure};
use nix::sys::socket::{setsockopt, sockopt::BindToDevice};
use overlay_tests::{
    agent::{Agent, Rung},
    cpu::OneCpu,
    pair::Pair,
    sandbox::Sandbox,
    topology::{OVERLAY_MTU, PodOffload, Topology, UPLINK, Underlay},
    traffic::{numbered, stream::Stream, udp::every_size},
};
use tun_rs::{DeviceBuilder, Layer};

use crate::{fd_store::FdStore, machine::Need, suite::Suite};

/// When one of two agents is killed, in milliseconds after the start of the second.
const MOMENTS: [u64; 6] = [5, 40, 80, 120, 200, 320];

pub(crate) fn register(suite: &mut Suite) {
    let (tun, ebpf) = (&[Need::Tun], &[Need::Tun, Need::Ebpf]);
    suite.add("handover::an_agent_takes_over_on_tun_without_loss", tun, |sandbox| {
        take_over(sandbox, Rung::Tun)
    });
    suite.add("handover::an_agent_takes_over_on_tc_without_loss", ebpf, |sandbox| {
        take_over(sandbox, Rung::Tc)
    });
    suite.add("handover::systemd_keeps_the_queues_over_restart_and_crash", tun, systemd);
    suite.add("handover::descriptors_are_checked_and_others_refused", tun, wrong_descriptors);
    suite.add("handover::one_agent_is_left_when_either_is_killed", tun, killed);
    suite.add("handover::what_no_agent_read_is_reported_and_another_host_cannot_take_over", tun, losses);
}

fn pair(sandbox: &Arc<Sandbox>, rung: Rung) -> Result<(Pair, Vec<String>)> {
    let topology = Topology::build(sandbox, Underlay::Virtual, PodOffload::On)?;
    let keep = ["--on-exit", "keep"];
    let pair = Pair::start_with(sandbox, topology, rung, rung, &keep)?;
    let arguments = pair.store.arguments(&pair.topology.a, rung).into_iter().chain(keep.map(str::to_owned));
    let arguments = arguments.collect();
    Ok((pair, arguments))
}

fn taking_over(arguments: &[String]) -> Vec<String> {
    arguments.iter().cloned().chain(["--take-over".to_owned()]).collect()
}

/// Starts an agent that takes over from `before`, and waits for the end of that.
fn replace(before: Agent, arguments: &[String]) -> Result<Agent> {
    let site = before.site();
    let mut agent = site.launch(site.run_command(&taking_over(arguments)))?;
    agent.wait_until_taken_over()?;
    before.wait_for_end()?;
    Ok(agent)
}

fn take_over(sandbox: &Arc<Sandbox>, rung: Rung) -> Result<()> {
    let _one = OneCpu::enter()?;
    let (mut pair, arguments) = pair(sandbox, rung)?;
    let (from, to) = pair.topology.pods();
    // One after the other: in both directions at once, two agents on the tun rung need more than one CPU.
    for (from, to) in [(from, to), (to, from)] {
        pair.a = numbered::without_loss(from, to, || replace(pair.a, &arguments))?;
    }
    let stream = Stream::start(from, to)?;
    stream.advance(1 << 20)?;
    pair.a = replace(pair.a, &arguments)?;
    stream.advance(1 << 20)?;
    stream.finish()?;
    let drops = pair.a.counters()?;
    ensure!(drops.wrong_drops().is_empty(), "{drops:?}");
    pair.a.stop()
}

fn systemd(sandbox: &Arc<Sandbox>) -> Result<()> {
    let _one = OneCpu::enter()?;
    let (mut pair, arguments) = pair(sandbox, Rung::Tun)?;
    let store = FdStore::start(sandbox)?;
    let site = Arc::clone(pair.a.site());
    pair.a.stop()?;
    pair.a = store.start_agent(&site, &arguments)?;
    let names = store.names()?;
    ensure!(names.len() == 2 && names.iter().any(|name| name == "tun-ovl0"), "{names:?}");
    let (from, to) = pair.topology.pods();
    every_size(from, to, OVERLAY_MTU)?;
    for (is_crash, from, to) in [(false, from, to), (false, to, from), (true, from, to), (true, to, from)] {
        pair.a = numbered::without_loss(from, to, || {
            if is_crash {
                drop(pair.a.crash()?)
            } else {
                pair.a.stop()?
            }
            store.start_agent(&site, &arguments)
        })?;
    }
    let stream = Stream::start(from, to)?;
    stream.advance(1 << 20)?;
    pair.a.stop()?;
    pair.a = store.start_agent(&site, &arguments)?;
    stream.advance(1 << 20)?;
    stream.finish()?;
    ensure!(store.names()? == names, "{:?}", store.names()?);
    let log = site.log();
    ensure!(!log.contains("while no agent read them"), "{}", site.log_tail());
    // What is removed is not left with systemd.
    let site = pair.a.crash()?;
    let remove: Vec<_> = arguments.iter().map(|word| word.replace("keep", "remove")).collect();
    store.start_agent(&site, &remove)?.stop()?;
    ensure!(store.names()?.is_empty(), "{:?}", store.names()?);
    ensure!(site.netns().tool("ip link show ovl0").is_err(), "the device is left");
    Ok(())
}

fn wrong_descriptors(sandbox: &Arc<Sandbox>) -> Result<()> {
    let (mut pair, arguments) = pair(sandbox, Rung::Tun)?;
    let (store, host) = (FdStore::start(sandbox)?, Arc::clone(&pair.topology.a.host));
    let file = sandbox.new_directory("file")?.join("a-file");
    store.add("tun-ovl0", File::create(&file)?)?;
    let other = host.run(|| DeviceBuilder::new().name("other0").layer(Layer::L3).build_sync())??;
    let other = std::os::fd::AsFd::as_fd(&other).try_clone_to_owned()?;
    store.add("tun-ovl0", other)?;
    // One of the right name in another network namespace.
    let elsewhere =
        pair.topology.a.pod.run(|| DeviceBuilder::new().name("ovl0").layer(Layer::L3).build_sync())??;
    store.add("tun-ovl0", std::os::fd::AsFd::as_fd(&elsewhere).try_clone_to_owned()?)?;
    let address = pair.topology.a.underlay;
    let socket = host.run(|| UdpSocket::bind((address, 9999)))?.context("bind a socket")?;
    setsockopt(&socket, BindToDevice, &UPLINK.into()).context("bind a socket to a device")?;
    store.add("udp", socket)?;
    let site = Arc::clone(pair.a.site());
    pair.a.stop()?;
    pair.a = store.start_agent(&site, &arguments)?;
    let log = site.log();
    for text in [
        format!("it is {}", file.display()),
        "it is the queue of the tun device other0".to_owned(),
        format!("it is a socket bound to {address}:9999 on {UPLINK}"),
        "the queue that was kept is of another device ovl0, in another network namespace".to_owned(),
    ] {
        ensure!(log.contains(&text), "no {text:?} in the log:\n{log}");
    }
    let names = store.names()?;
    ensure!(names.len() == 2, "{names:?}");
    let (from, to) = pair.topology.pods();
    every_size(from, to, OVERLAY_MTU)?;
    Ok(())
}

fn killed(sandbox: &Arc<Sandbox>) -> Result<()> {
    let (mut pair, arguments) = pair(sandbox, Rung::Tun)?;
    let site = Arc::clone(pair.a.site());
    let (mut went_on, mut took_over) = (0, 0);
    for (number, moment) in MOMENTS.into_iter().enumerate() {
        let mut next = site.launch(site.run_command(&taking_over(&arguments)))?;
        thread::sleep(Duration::from_millis(moment));
        pair.a = if number % 2 == 0 {
            drop(next.crash()?);
            // A moment in which it has noticed, or ended because the other one had taken over already.
            thread::sleep(Duration::from_millis(500));
            if pair.a.is_running()? {
                went_on += 1;
                pair.a
            } else {
                pair.a.wait_for_end()?;
                site.start(&arguments)?
            }
        } else {
            drop(pair.a.crash()?);
            took_over += 1;
            next.wait_until_taken_over()?;
            next
        };
        pair.a.wait_until_running().with_context(|| format!("after {moment} ms"))?;
        let (from, to) = pair.topology.pods();
        every_size(from, to, OVERLAY_MTU).with_context(|| format!("after {moment} ms"))?;
    }
    ensure!(went_on > 0 && took_over > 0, "{went_on} went on, {took_over} took over");
    pair.a = replace(pair.a, &arguments)?;
    pair.a.stop()
}

fn losses(sandbox: &Arc<Sandbox>) -> Result<()> {
    let (mut pair, arguments) = pair(sandbox, Rung::Tun)?;
    let (from, to) = pair.topology.pods();
    let other_host =
        taking_over(&arguments).into_iter().map(|word| word.replace("10.244.1.0/24", "10.244.9.0/24"));
    let other_host = other_host.collect::<Vec<_>>();
    let site = Arc::clone(pair.a.site());
    let (agent, flow) = numbered::meanwhile(from, to, || {
        let reason = site.refused(site.run_command(&other_host))?;
        ensure!(reason.contains("cannot be taken over") && reason.contains("10.244.9.0/24"), "{reason}");
        let site = pair.a.crash()?;
        thread::sleep(Duration::from_millis(200));
        site.start(&arguments)
    })?;
    pair.a = agent;
    ensure!(flow.lost() > 0, "{flow:?}");
    let log = site.log();
    let report =
        log.lines().find(|line| line.contains("packets for peers were dropped while no agent read them"));
    let report = report.with_context(|| format!("no report of the loss in the log:\n{log}"))?;
    let numbers = report.split_whitespace().filter_map(|word| word.parse::<u64>().ok());
    let reported = numbers.max().context("the report has no number")?;
    // Those that were in the queue when the agent was killed are in no statistic.
    ensure!(reported > 0 && reported <= flow.lost(), "{report} {flow:?}");
    Ok(())
}
