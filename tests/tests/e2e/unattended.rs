//! What an agent leaves when it ends: what `status` says about it without an agent, counters that go on, and what is removed.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Output,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use overlay_tests::{
    agent::{DEVICE, Rung, Site},
    netns::Netns,
    pair::{Pair, Store},
    report::{Counters, Routes},
    sandbox::Sandbox,
    topology::{OVERLAY_MTU, PodOffload, Topology, UPLINK, Underlay},
    traffic::udp::every_size,
};
use serde_json::Value;

use crate::{
    foreign::attach_tcx, machine::Need, matrix::needs, restart::UNATTENDED, snapshot::Snapshot, suite::Suite,
    wait::wait_until,
};

/// Exit code of `status` without an agent, where one has left something.
const ABSENT: i32 = 3;
/// Where pins are.
const PINS: &str = "/sys/fs/bpf/overlay-agent";
/// Packets that the kernel may send by itself between two looks at counters.
const NOISE: u64 = 50;
/// Points of a start at which the agent is killed.
const KILLS: u32 = 24;

pub(crate) fn register(suite: &mut Suite) {
    let tc = needs(Rung::Tc, Rung::Tc);
    suite.add("unattended::status_reads_pins_and_counters_go_on", tc, without_agent);
    suite.add("unattended::pins_of_a_network_namespace_that_is_gone_are_removed", tc, gone_namespaces);
    suite.add(
        "unattended::a_start_that_is_killed_at_any_point_is_cleaned_up",
        &[Need::Tun, Need::Ebpf],
        killed_starts,
    );
}

/// The output of a query as JSON, of a host without an agent.
fn absent(site: &Site, subcommand: &str) -> Result<Value> {
    let output = site.try_run(subcommand, &["-o", "json"])?;
    ensure!(output.status.code() == Some(ABSENT), "`{subcommand}`: {}", describe(&output));
    serde_json::from_slice(&output.stdout).with_context(|| describe(&output))
}

fn at<'a>(value: &'a Value, pointer: &str) -> &'a Value {
    value.pointer(pointer).unwrap_or(&Value::Null)
}

fn describe(output: &Output) -> String {
    let [out, error] =
        [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned());
    format!("{}: {out}{error}", output.status)
}

fn counters(site: &Site) -> Result<Counters> {
    Ok(serde_json::from_value(absent(site, "counters")?)?)
}

/// Checks that counters only grew, and by no more than the kernel's own packets.
fn same(before: &Counters, after: &Counters) -> Result<()> {
    for (what, before, after) in [
        ("fast", before.traffic.fast(), after.traffic.fast()),
        ("slow", before.traffic.slow(), after.traffic.slow()),
        ("no_route", dropped(before), dropped(after)),
    ] {
        ensure!((before..=before + NOISE).contains(&after), "{what}: {before} packets, then {after}");
    }
    Ok(())
}

fn dropped(counters: &Counters) -> u64 {
    counters.drops.get("no_route").copied().unwrap_or_default()
}

fn without_agent(sandbox: &Arc<Sandbox>) -> Result<()> {
    let topology = Topology::build(sandbox, Underlay::Virtual, PodOffload::On)?;
    let mut pair = Pair::start_with(sandbox, topology, Rung::Tc, Rung::Tc, &["--on-exit", "keep"])?;
    let [tc, tun] = [Rung::Tc, Rung::Tun].map(|rung| {
        let keep = ["--on-exit", "keep"].map(str::to_owned);
        pair.store.arguments(&pair.topology.a, rung).into_iter().chain(keep).collect::<Vec<_>>()
    });
    let site = Arc::clone(pair.a.site());
    let traffic = |pair: &Pair| -> Result<()> {
        let (from, to) = pair.topology.pods();
        for _ in 0..3 {
            every_size(from, to, OVERLAY_MTU)?;
        }
        // A subnet that no host has: the slow path drops these, too.
        let lost = from.netns.tool("ping -c 3 -i 0.2 -W 1 10.244.200.2");
        ensure!(lost.is_err(), "somebody answered");
        Ok(())
    };
    // The slow path counts as well, and the programs of the first start are gone.
    pair.a = pair.a.crash()?.start(&tun)?;
    traffic(&pair)?;
    thread::sleep(Duration::from_millis(2500));
    pair.a = pair.a.crash()?.start(&tc)?;
    traffic(&pair)?;
    thread::sleep(Duration::from_millis(2500));
    let (routes, before) = (pair.a.routes()?, pair.a.counters()?);
    ensure!(before.traffic.slow() > 50 && before.traffic.fast() > 50 && dropped(&before) >= 6, "{before:?}");

    pair.a.crash()?;
    let frozen = Instant::now();
    same(&before, &counters(&site)?).context("read from the pins")?;
    let status = absent(&site, "status")?;
    let programs = at(&status, "/frozen/programs").as_array().context("no programs")?;
    ensure!(
        programs.len() >= 2 && programs.iter().all(|program| at(program, "/attached") == true),
        "{status}"
    );
    for (field, expected) in [
        ("/agent", "absent"),
        ("/state", "absent"),
        ("/subnet", pair.topology.a.subnet),
        ("/device/name", DEVICE),
        ("/underlay/name", UPLINK),
        ("/egress/rung", "tc"),
        ("/ingress/rung", "tc"),
    ] {
        ensure!(at(&status, field) == expected, "{field}: {status}");
    }
    ensure!(at(&status, "/routes") == 1 && at(&status, "/without_agent/forwards") == true, "{status}");
    ensure!(
        at(&status, "/frozen/since").is_string() && at(&status, "/frozen/lease_ends").is_null(),
        "{status}"
    );
    let left: Routes = serde_json::from_value(absent(&site, "routes")?)?;
    let shown = |routes: &Routes| -> Vec<_> {
        let route = |route: &overlay_tests::report::Route| {
            (route.subnet.clone(), route.peer, route.device.clone(), route.mtu)
        };
        routes.routes.iter().map(route).collect()
    };
    ensure!(shown(&left) == shown(&routes), "{left:?} instead of {routes:?}");

    let (from, to) = pair.topology.pods();
    every_size(from, to, 500)?;
    thread::sleep(UNATTENDED.saturating_sub(frozen.elapsed()));
    ensure!(at(&absent(&site, "status")?, "/frozen/neighbours_stale") == true, "trusted for ever");
    let meanwhile = counters(&site)?;
    ensure!(meanwhile.traffic.fast() > before.traffic.fast(), "the programs' packets do not count");
    let text = site.try_run("status", &[])?;
    let text = String::from_utf8_lossy(&text.stdout).into_owned();
    ensure!(text.contains("frozen since") && text.contains("ovl_egress on ovl0"), "{text}");
    // Another run directory: the programs are there, but not the time since when they are frozen.
    let elsewhere = Site::new(sandbox, &pair.topology.a.host, "elsewhere")?;
    ensure!(at(&absent(&elsewhere, "status")?, "/frozen/since").is_null(), "a time out of nothing");

    pair.a = site.start(&tc)?;
    same(&meanwhile, &pair.a.counters()?).context("after a kill and a start")?;
    let error = elsewhere.try_run("status", &[])?;
    ensure!(error.status.code() == Some(1) && describe(&error).contains("--run-dir"), "{}", describe(&error));
    traffic(&pair)?;
    let before = pair.a.counters()?;
    pair.a.stop()?;
    same(&before, &counters(&site)?).context("after SIGTERM")?;
    pair.a = site.start(&tun)?;
    same(&before, &pair.a.counters()?).context("on another rung")?;
    pair.a.stop()?;
    pair.a = site.start(&tc)?;
    same(&before, &pair.a.counters()?).context("back again")?;

    pair.a.crash()?;
    pair.topology.a.host.tool(&format!("ip link delete {DEVICE}"))?;
    let status = absent(&site, "status")?;
    ensure!(at(&status, "/without_agent/forwards") == false && at(&status, "/egress").is_null(), "{status}");
    site.down()?;
    let output = site.try_run("status", &[])?;
    ensure!(output.status.code() == Some(1), "{}", describe(&output));
    ensure!(files(&site.run_directory())?.is_empty(), "{:?}", files(&site.run_directory())?);
    pair.a = site.start(&tc)?;
    ensure!(pair.a.counters()?.traffic.slow() < NOISE, "down keeps counters");
    Ok(())
}

/// The files in a directory; none if it is missing.
fn files(directory: &Path) -> Result<Vec<PathBuf>> {
    if !directory.exists() {
        return Ok(Vec::new());
    }
    fs::read_dir(directory)?.map(|entry| Ok(entry?.path())).collect()
}

/// A host whose underlay leads nowhere.
fn lone_host(sandbox: &Arc<Sandbox>, role: &str) -> Result<Arc<Netns>> {
    let host = Netns::create(sandbox, role)?;
    host.tool(&format!("ip link add {UPLINK} type veth peer name behind"))?;
    host.tool("ip link set behind up")?;
    host.tool(&format!("ip address add 192.168.77.1/24 dev {UPLINK}"))?;
    host.tool(&format!("ip link set {UPLINK} up"))?;
    host.tool("sysctl -q -w net.ipv4.ip_forward=1")?;
    Ok(host)
}

fn lone_arguments() -> Vec<String> {
    ["--network", "10.244.0.0/16", "--subnet", "10.244.1.0/24", "--peer", "10.244.2.0/24=192.168.77.2"]
        .into_iter()
        .chain(["--iface", UPLINK, "--datapath", "tc", "--on-exit", "keep"])
        .map(str::to_owned)
        .collect()
}

/// Of three namespaces with pins of killed agents, one is gone, and an agent runs in a fourth.
fn gone_namespaces(sandbox: &Arc<Sandbox>) -> Result<()> {
    let arguments = lone_arguments();
    let [gone, frozen, detached, other] = ["gone", "frozen", "detached", "other"].map(|role| -> Result<_> {
        let host = lone_host(sandbox, role)?;
        let site = Site::new(sandbox, &host, role)?;
        Ok((site.start(&arguments)?, host))
    });
    let ((gone, gone_host), (frozen, frozen_host), (detached, detached_host), (other, other_host)) =
        (gone?, frozen?, detached?, other?);
    let foreign = Path::new(PINS).join("somebody_elses");
    fs::create_dir_all(&foreign)?;
    let only = |host: &Netns| -> Result<PathBuf> { host.pins()?.pop().context("no pins") };
    let [gone_pins, frozen_pins, detached_pins, other_pins] =
        [only(&gone_host)?, only(&frozen_host)?, only(&detached_host)?, only(&other_host)?];
    frozen.crash()?;
    detached.crash()?;
    for device in [DEVICE, UPLINK] {
        detached_host.tool(&format!("ip link delete {device}"))?;
    }
    drop(gone.crash()?);
    gone_host.keep_pins();
    drop(gone_host);
    // The kernel takes down a namespace some time after its last user is gone, and an agent looks when it starts.
    let host = lone_host(sandbox, "next")?;
    let site = Site::new(sandbox, &host, "next")?;
    wait_until("the pins of the namespace that is gone are removed", || {
        let agent = site.start(&arguments)?;
        thread::sleep(Duration::from_millis(500));
        agent.stop()?;
        Ok(!gone_pins.exists())
    })?;
    site.down()?;
    for (pins, what) in [
        (&frozen_pins, "of a host whose programs forward packets"),
        (&detached_pins, "of a namespace that lives"),
        (&other_pins, "of a running agent"),
        (&foreign, "of another program"),
    ] {
        ensure!(pins.exists(), "pins {what} were removed");
    }
    fs::remove_dir(&foreign)?;
    // Programs whose devices are gone forward nothing: their agent starts without them.
    let log = || -> Result<String> {
        detached_host.tool(&format!("ip link add {UPLINK} type veth peer name behind"))?;
        detached_host.tool(&format!("ip address add 192.168.77.1/24 dev {UPLINK}"))?;
        detached_host.tool("ip link set behind up")?;
        detached_host.tool(&format!("ip link set {UPLINK} up"))?;
        let site = Site::new(sandbox, &detached_host, "again")?;
        site.start(&arguments)?.stop()?;
        Ok(site.log())
    };
    let log = log()?;
    ensure!(log.contains("the devices of its programs are gone") && !log.contains("took over"), "{log}");
    drop(other);
    Ok(())
}

fn killed_starts(sandbox: &Arc<Sandbox>) -> Result<()> {
    let topology = Topology::build(sandbox, Underlay::Virtual, PodOffload::On)?;
    let (store, host) = (Store::create(sandbox)?, &topology.a.host);
    store.write_lease("10.244.2.0-24", "192.168.77.2")?;
    // What is not ours.
    let foreign = [PINS, "/sys/fs/bpf"].map(|parent| Path::new(parent).join("not_ours"));
    foreign.iter().try_for_each(fs::create_dir_all)?;
    host.tool("ip link add foreign0 type veth peer name foreign1")?;
    host.tool("nft add table ip foreign")?;
    let _tcx = attach_tcx(host)?;
    let (before, rules) = (Snapshot::take(host)?, host.tool("nft list ruleset")?);

    let site = Site::new(sandbox, host, "killed")?;
    let mut arguments = store.arguments(&topology.a, Rung::Xdp);
    arguments.extend(["--on-exit", "keep", "--ip-masq"].map(str::to_owned));
    let nothing_is_left = |what: &str| -> Result<()> {
        site.down()?;
        before.is_unchanged(host).with_context(|| what.to_owned())?;
        let rules_now = host.tool("nft list ruleset")?;
        ensure!(rules_now == rules, "{what}: firewall rules are left: {rules_now}");
        ensure!(host.pins()?.is_empty(), "{what}: pins are left");
        let left = files(&site.run_directory())?;
        ensure!(left.is_empty(), "{what}: {left:?}");
        ensure!(foreign.iter().all(|pins| pins.is_dir()), "{what}: foreign pins were removed");
        Ok(())
    };
    let started = Instant::now();
    let agent = site.start(&arguments)?;
    let duration = started.elapsed();
    agent.crash()?;
    nothing_is_left("killed when it ran")?;
    let (mut early, mut late) = (0, 0);
    for kill in 0..KILLS {
        // More of them at its beginning, where most is made.
        let delay = duration * (kill * kill) / ((KILLS - 2) * (KILLS - 2));
        let agent = site.launch(site.run_command(&arguments))?;
        thread::sleep(delay);
        agent.crash()?;
        let has_pins = !host.pins()?.is_empty();
        (early, late) = (early + u32::from(!has_pins), late + u32::from(has_pins));
        let what = format!("killed after {delay:?} of {duration:?}");
        match kill % 4 {
            // The next one finds what is left of several.
            0 | 1 => {}
            2 => nothing_is_left(&what)?,
            _ => {
                let agent = site.start(&arguments).with_context(|| what.clone())?;
                let status = agent.status()?;
                ensure!(status.routes == 1 && status.ingress.rung == "xdp", "{what}: {status:?}");
                agent.stop()?;
                nothing_is_left(&what)?;
            }
        }
    }
    ensure!(early > 0 && late > 3, "{early} kills before there were pins, and {late} after");
    nothing_is_left("the last one")?;
    foreign.iter().try_for_each(fs::remove_dir)?;
    Ok(())
}
