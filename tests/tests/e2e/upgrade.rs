//! Programs that are attached are replaced by others, under traffic: of an agent whose maps have another version and layout, with other
//! constants, and by some that the kernel refuses.

use std::{
    env, fs,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use aya::maps::{HashMap, Map, MapData};
use object::{Object as _, ObjectSection as _, ObjectSymbol as _};
use overlay_agent::datapath::Request;
use overlay_ebpf::{
    abi::{ABI_VERSION, NextHop, Prefix},
    bypass::Bypass,
};
use overlay_tests::{
    agent::{self, Rung},
    cpu::OneCpu,
    netns::Netns,
    sandbox::Sandbox,
    topology::OVERLAY_MTU,
    traffic::{numbered, stream::Stream, udp::every_size},
};
use rand::Rng as _;

use crate::{
    datapath::Host,
    firewall::inside,
    machine::Need,
    matrix::needs,
    restart::{arguments, both_ways, pair},
    suite::Suite,
    wait::wait_until,
};

/// The program that [`broken`] makes the kernel refuse.
const REFUSED: &str = "ovl_ingress";

pub(crate) fn register(suite: &mut Suite) {
    for rung in [Rung::Xdp, Rung::Tc] {
        let name = format!("upgrade::maps_of_another_version_take_over_on_{}", rung.name());
        suite.add(name, needs(rung, rung), move |sandbox| versions(sandbox, rung));
    }
    let needs = &[Need::Tun, Need::Ebpf];
    suite.add("upgrade::a_switch_that_is_killed_loses_nothing_and_is_cleaned_up", needs, killed);
    suite.add("upgrade::programs_that_are_refused_leave_the_earlier_ones_attached", needs, refused);
    suite.add("upgrade::other_constants_replace_programs_in_place", needs, constants);
}

/// The directories of maps that are pinned on a host.
fn generations(host: &Netns) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for directory in host.pins()? {
        for entry in fs::read_dir(&directory)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                names.push(entry.file_name().to_string_lossy().into_owned());
            }
        }
    }
    names.sort();
    Ok(names)
}

fn has_only(host: &Netns, version: u16) -> Result<()> {
    let (expected, found) = (format!("v{version}"), generations(host)?);
    ensure!(found == [expected.as_str()], "{found:?} instead of {expected}");
    Ok(())
}

/// To the other version and back.
fn versions(sandbox: &Arc<Sandbox>, rung: Rung) -> Result<()> {
    let _one = OneCpu::enter()?;
    let mut pair = pair(sandbox, rung, "off")?;
    let arguments = arguments(&pair, rung, "off");
    let (from, to) = pair.topology.pods();
    let host = &pair.topology.a.host;
    has_only(host, ABI_VERSION)?;
    let now = Arc::clone(pair.a.site());
    let next = now.with_binary(agent::next_binary()?);
    let stream = Stream::start(from, to)?;
    let agent = both_ways(rung, from, to, || {
        let (mut agent, mut counted) = (pair.a, 0);
        for (site, version, is_kill) in
            [(&next, ABI_VERSION + 1, true), (&now, ABI_VERSION, false), (&next, ABI_VERSION + 1, false)]
        {
            thread::sleep(Duration::from_millis(300));
            let before = agent.counters()?.traffic.fast();
            ensure!(before > counted, "nothing was counted behind {counted}: {before}");
            if is_kill {
                drop(agent.crash()?)
            } else {
                agent.stop()?
            }
            stream.advance(1 << 20)?;
            agent = site.start(&arguments)?;
            stream.advance(1 << 20)?;
            counted = agent.counters()?.traffic.fast();
            ensure!(counted > before, "{before} packets were counted, {counted} behind the switch");
            has_only(host, version)?;
        }
        Ok(agent)
    });
    pair.a = agent?;
    stream.finish()?;
    let counters = pair.a.counters()?;
    // The kernel asks for IPv6 routers on a new device.
    let mut drops = counters.drops.iter().filter(|(reason, _)| *reason != "ipv6");
    ensure!(drops.all(|(_, count)| *count == 0), "{:?}", counters.drops);
    Ok(())
}

/// Agents of both versions are killed at any point of their start.
fn killed(sandbox: &Arc<Sandbox>) -> Result<()> {
    let _one = OneCpu::enter()?;
    let mut pair = pair(sandbox, Rung::Tc, "off")?;
    let arguments = arguments(&pair, Rung::Tc, "off");
    let (from, to) = pair.topology.pods();
    let host = Arc::clone(&pair.topology.a.host);
    let now = Arc::clone(pair.a.site());
    let next = now.with_binary(agent::next_binary()?);
    pair.a.crash()?;
    let agent = both_ways(Rung::Tc, from, to, || {
        let mut seen = Vec::new();
        for site in [&next, &now] {
            let start = Instant::now();
            site.start(&arguments)?.crash()?;
            let complete = start.elapsed();
            for site in [&now, &next, &next, &now, &next, &now] {
                let agent = site.launch(site.run_command(&arguments))?;
                thread::sleep(complete.mul_f64(rand::rng().random_range(0.05..1.0)));
                agent.crash()?;
                seen.push(generations(&host)?.join("+"));
            }
        }
        println!("maps behind kills: {}", seen.join(" "));
        now.start(&arguments)
    });
    pair.a = agent?;
    has_only(&host, ABI_VERSION)?;
    // Both directories and links of both are left, or one: `down` removes all.
    pair.a.crash()?;
    let agent = next.launch(next.run_command(&arguments))?;
    let other = format!("v{}", ABI_VERSION + 1);
    wait_until("another version's maps", || Ok(generations(&host)?.contains(&other)))?;
    agent.crash()?;
    now.down()?;
    ensure!(host.pins()?.is_empty(), "the pins are left");
    pair.a = next.start(&arguments)?;
    has_only(&host, ABI_VERSION + 1)?;
    every_size(from, to, OVERLAY_MTU)?;
    Ok(())
}

/// The kernel refuses a program of the new agent, whose maps are the same, or others.
fn refused(sandbox: &Arc<Sandbox>) -> Result<()> {
    let _one = OneCpu::enter()?;
    let mut pair = pair(sandbox, Rung::Tc, "off")?;
    let good = arguments(&pair, Rung::Tc, "off");
    let auto: Vec<String> =
        good.iter().map(|word| if word == "tc" { "auto".to_owned() } else { word.clone() }).collect();
    let (from, to) = pair.topology.pods();
    let host = Arc::clone(&pair.topology.a.host);
    let now = Arc::clone(pair.a.site());
    let object = env::var_os("OVERLAY_EBPF_OBJECT").map(PathBuf::from);
    let object =
        object.context("OVERLAY_EBPF_OBJECT names the eBPF object: run the tests with `cargo xtask test`")?;
    let next = agent::next_binary()?;
    let next_object = next.with_file_name("overlay-ebpf");
    for (binary, object, keeps_maps) in [(now.binary(), &object, true), (&next, &next_object, false)] {
        let site = now.with_binary(broken(sandbox, binary, object)?);
        let agent = numbered::without_loss(from, to, || {
            pair.a.crash()?;
            let reason = site.refused(site.run_command(&good))?;
            ensure!(reason.contains(REFUSED), "{reason}");
            has_only(&host, ABI_VERSION)?;
            let agent = site.launch(site.run_command(&auto))?;
            wait_until("the problem in the status", || {
                let problems = agent.status().map(|status| status.problems).unwrap_or_default();
                let is_it = |problem: &String| problem.contains(REFUSED) && problem.contains("earlier agent");
                Ok(problems.iter().any(is_it))
            })?;
            let status = agent.status()?;
            ensure!(
                [&status.ingress.rung, &status.egress.rung].iter().all(|rung| *rung == "tc"),
                "{status:?}"
            );
            has_only(&host, ABI_VERSION)?;
            let before = routes(&host)?;
            pair.store.write_lease("10.244.77.0-24", "192.168.77.77")?;
            agent.wait_for_routes("the new peer", |routes| routes.routes.len() == 2)?;
            let is_there = || Ok(routes(&host)? == before + 1);
            match keeps_maps {
                true => wait_until("the route in the map", is_there)?,
                false => ensure!(!is_there()?, "another version's map was written"),
            }
            pair.store.remove("subnets/10.244.77.0-24")?;
            agent.crash()?;
            now.start(&good)
        });
        pair.a = agent?;
        let status = pair.a.status()?;
        ensure!(!status.problems.iter().any(|problem| problem.contains(REFUSED)), "{status:?}");
    }
    Ok(())
}

/// How many routes the pinned map has.
fn routes(host: &Netns) -> Result<usize> {
    let pins = host.pins()?;
    let directory = pins.first().context("there are no pins")?.join(format!("v{ABI_VERSION}"));
    let map = Map::from_map_data(MapData::from_pin(directory.join("ROUTES"))?)?;
    let map: HashMap<_, [u8; size_of::<Prefix>()], [u8; size_of::<NextHop>()]> = map.try_into()?;
    Ok(map.keys().count())
}

/// A copy of an agent with the object `object` inside, of which the kernel refuses one program: it ends without a return value.
fn broken(sandbox: &Sandbox, binary: &Path, object: &Path) -> Result<PathBuf> {
    const EXIT: [u8; 8] = [0x95, 0, 0, 0, 0, 0, 0, 0];
    let (path, object) = (object, fs::read(object).with_context(|| format!("read {}", object.display()))?);
    let file = object::File::parse(&*object)?;
    let symbol = file.symbols().find(|symbol| symbol.name() == Ok(REFUSED)).context("no such program")?;
    let section = symbol.section_index().context("the program is in no section")?;
    let (start, _) = file.section_by_index(section)?.file_range().context("the section has no bytes")?;
    let program = usize::try_from(start + symbol.address())?;
    let mut bytes = fs::read(binary)?;
    // The compiler may have copied it.
    let found = bytes.windows(object.len()).enumerate().filter(|(_, window)| *window == object);
    let copies: Vec<_> = found.map(|(at, _)| at + program).collect();
    ensure!(!copies.is_empty(), "the agent was built with another eBPF object than {}", path.display());
    for at in copies {
        bytes.get_mut(at..at + EXIT.len()).context("the program is cut off")?.copy_from_slice(&EXIT);
    }
    let path = sandbox.new_directory("broken")?.join("overlay-agent");
    fs::write(&path, bytes)?;
    fs::set_permissions(&path, fs::metadata(binary)?.permissions())?;
    Ok(path)
}

/// A datapath takes over what an agent has left, and then changes the constants of the programs.
fn constants(sandbox: &Arc<Sandbox>) -> Result<()> {
    let _one = OneCpu::enter()?;
    let of_xdp = [(Bypass::Off, true), (Bypass::Flows, false), (Bypass::All, false)];
    let of_tc = [(Bypass::All, true), (Bypass::Off, true)];
    for (rung, changes) in [(Rung::Xdp, &of_xdp[..]), (Rung::Tc, &of_tc)] {
        let mut pair = pair(sandbox, rung, "off")?;
        let arguments = arguments(&pair, rung, "off");
        let (from, to) = pair.topology.pods();
        let site = pair.a.crash()?;
        let side = &pair.topology.a;
        both_ways(rung, from, to, || {
            inside(&side.host, async {
                let request = if rung == Rung::Xdp { Request::Xdp } else { Request::Tc };
                let mut host = Host::with_pins(side, &pair.topology.b, request)?;
                host.reconcile().await?;
                let mut counted = host.counted().await?;
                for (bypass, log) in changes.iter().copied() {
                    (host.bypass, host.log) = (bypass, log);
                    tokio::time::sleep(Duration::from_millis(200)).await;
                    let report = host.reconcile().await?;
                    ensure!(report.kept.is_none() && report.repaired.is_empty(), "{bypass:?}: {report:?}");
                    has_only(&side.host, ABI_VERSION)?;
                    let now = host.counted().await?;
                    ensure!(now > counted, "{bypass:?}: {now} packets after {counted}");
                    counted = now;
                }
                host.leave();
                Ok(())
            })?
        })?;
        pair.a = site.start(&arguments)?;
        every_size(from, to, OVERLAY_MTU)?;
    }
    Ok(())
}
