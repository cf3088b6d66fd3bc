//! Agents with few capabilities: what they need, what they do without, and what they say about it.

use std::{
    fs,
    fs::File,
    process::{Command, Stdio},
    sync::Arc,
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::libc;
use overlay_tests::{
    agent::{Agent, Rung, Site},
    netns::run_tool,
    pair::{Pair, Store},
    report::Status,
    sandbox::Sandbox,
    topology::{PodOffload, Side, Topology, UPLINK, Underlay},
    verify::{CHECKS, Plan},
};

use crate::{machine::Need, matrix::diagnosis, snapshot::Snapshot, suite::Suite, wait::wait_until};

const TUN: &[Need] = &[Need::Tun];
const BOTH: &[Need] = &[Need::Tun, Need::Ebpf];
const ALL: &[Need] = &[Need::Tun, Need::Ebpf, Need::Nftables];

/// As setpriv(1) writes them.
const FOUR: [&str; 4] = ["net_admin", "net_raw", "bpf", "perfmon"];
/// The same in `/proc/PID/status`: bits 12, 13, 38 and 39.
const FOUR_MASK: &str = "000000c000003000";
/// An unprivileged user.
const USER: &str = "65534";
const TCP_BYTES: u64 = 4 << 20;

pub(crate) fn register(suite: &mut Suite) {
    for rung in [Rung::Xdp, Rung::Tc, Rung::Tun] {
        let name = format!("privileges::four_capabilities_carry_everything_on_{}", rung.name());
        suite.add(name, ALL, move |sandbox| carries_everything(sandbox, rung, &[]));
    }
    suite.add("privileges::four_capabilities_carry_everything_on_clsact", ALL, |sandbox| {
        carries_everything(sandbox, Rung::Tc, &["--tc-attach", "clsact"])
    });
    suite.add("privileges::another_user_with_four_capabilities", ALL, another_user);
    suite.add("privileges::foreign_detaching_is_noticed_and_repaired", BOTH, repairs);
    suite.add("privileges::sys_admin_is_enough_for_ebpf", BOTH, |sandbox| {
        starts(sandbox, Rung::Tc, &["net_admin", "net_raw", "sys_admin"])
    });
    suite.add("privileges::net_raw_is_for_old_kernels", BOTH, |sandbox| {
        starts(sandbox, Rung::Tc, &["net_admin", "bpf", "perfmon"])
    });
    suite.add("privileges::tun_needs_net_admin_alone", TUN, |sandbox| {
        starts(sandbox, Rung::Tun, &["net_admin"])
    });
    suite.add("privileges::auto_without_capabilities_for_ebpf_is_tun_and_degraded", BOTH, auto_is_degraded);
    suite.add("privileges::missing_capabilities_are_refused_by_name", TUN, refusals);
    suite.add("privileges::the_unit_grants_what_is_needed", &[], |_| unit_grants_what_is_needed());
}

/// `inner` as root with these capabilities alone, through setpriv(1).
fn confined(capabilities: &[&str], inner: &Command) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--bounding-set", &only(capabilities), "--inh-caps", "-all", "--no-new-privs"]);
    command.arg(inner.get_program());
    with_arguments_of(inner, command)
}

/// A list for setpriv(1).
fn only(capabilities: &[&str]) -> String {
    capabilities.iter().fold("-all".to_owned(), |list, name| format!("{list},+{name}"))
}

fn with_arguments_of(inner: &Command, mut outer: Command) -> Command {
    outer.args(inner.get_args()).env_remove("RUST_LOG").stdin(Stdio::null());
    outer
}

/// The output of `overlay-agent SUBCOMMAND` with these capabilities, or what it fails with.
fn output(site: &Site, capabilities: &[&str], subcommand: &str) -> Result<Result<String, String>> {
    let mut inner = Command::new(site.binary());
    inner.arg(subcommand).arg("--run-dir").arg(site.run_directory());
    let output = site.netns().output(&mut confined(capabilities, &inner))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ok(if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) })
}

/// A line of `/proc/PID/status`.
fn process_status(agent: &Agent, name: &str) -> Result<String> {
    let path = format!("/proc/{}/status", agent.pid());
    let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    Ok(line.with_context(|| format!("{path} has no {name}"))?.trim().to_owned())
}

fn has_exactly_four(agent: &Agent) -> Result<()> {
    for set in ["CapPrm", "CapEff", "CapBnd"] {
        let mask = process_status(agent, set)?;
        ensure!(mask == FOUR_MASK, "{set} of the agent is {mask}");
    }
    ensure!(process_status(agent, "NoNewPrivs")? == "1", "the agent may gain privileges");
    Ok(())
}

/// Everything that touches the kernel, switched on.
fn arguments(store: &Store, side: &Side, rung: Rung, more: &[&str]) -> Vec<String> {
    let all = ["--ip-masq", "--ip-blackhole-route", "--datapath-log"];
    let more = all.iter().chain(more).map(|word| (*word).to_owned());
    store.arguments(side, rung).into_iter().chain(more).collect()
}

/// The agents on two hosts, each started by `start`.
fn pair(
    sandbox: &Arc<Sandbox>,
    rungs: [Rung; 2],
    start: impl Fn(&Store, &Arc<Site>, &Side, Rung) -> Result<Agent>,
) -> Result<Pair> {
    let topology = Topology::build(sandbox, Underlay::Virtual, PodOffload::On)?;
    let store = Store::create(sandbox)?;
    let [a, b] = [(&topology.a, rungs[0]), (&topology.b, rungs[1])].map(|(side, rung)| {
        let site = Site::new(sandbox, &side.host, &format!("agent-{}", side.name))?;
        start(&store, &site, side, rung)
    });
    let pair = Pair { a: a?, b: b?, store, topology };
    pair.wait_for_peers()?;
    Ok(pair)
}

fn is_on(status: &Status, rung: Rung) -> bool {
    let egress = if rung == Rung::Xdp { Rung::Tc } else { rung };
    status.ingress.rung == rung.name() && status.egress.rung == egress.name()
}

fn traffic_is_right(pair: &Pair) -> Result<()> {
    for check in CHECKS {
        check.run(&pair.topology, &Plan::overlay(TCP_BYTES)).with_context(|| diagnosis(pair, check.name))?;
    }
    Ok(())
}

fn carries_everything(sandbox: &Arc<Sandbox>, rung: Rung, more: &'static [&str]) -> Result<()> {
    let pair = pair(sandbox, [rung; 2], |store, site, side, rung| {
        let before = Snapshot::take(&side.host)?;
        let command = confined(&FOUR, &site.run_command(&arguments(store, side, rung, more)));
        let mut agent = site.launch(command)?;
        agent.wait_until_running()?;
        // The first one is removed by `down`, with no more than the agent itself has. A clsact qdisc stays.
        if side.name == "a" && more.is_empty() {
            let removed = output(site, &FOUR, "down")?.map_err(anyhow::Error::msg)?;
            ensure!(removed.contains("the agent") && !agent.is_running()?, "{removed}");
            // It has ended: dropping it would remove what the next one makes.
            agent.leave();
            before.is_unchanged(&side.host)?;
            ensure!(side.host.tool("nft list tables")?.is_empty(), "firewall rules stayed");
            let command = confined(&FOUR, &site.run_command(&arguments(store, side, rung, more)));
            agent = site.launch(command)?;
            agent.wait_until_running()?;
        }
        Ok(agent)
    })?;
    for (agent, side) in [(&pair.a, &pair.topology.a), (&pair.b, &pair.topology.b)] {
        has_exactly_four(agent)?;
        let status = agent.status()?;
        ensure!(status.state == "running" && is_on(&status, rung), "{status:?}");
        let text = output(agent.site(), &FOUR, "status")?.map_err(anyhow::Error::msg)?;
        ensure!(text.contains("running") && text.contains(side.subnet), "{text}");
        let ipv6 = side.host.tool("sysctl -n net.ipv6.conf.ovl0.disable_ipv6");
        // A kernel without IPv6 has no such file.
        ensure!(ipv6.is_err() || ipv6.is_ok_and(|value| value.trim() == "1"), "ovl0 has IPv6");
        ensure!(side.host.tool("nft list ruleset")?.contains("masquerade"), "no rules");
        let log = agent.site().log();
        let wrong = log.lines().find(|line| line.contains("WARN") || line.contains("ERROR"));
        ensure!(wrong.is_none(), "{wrong:?}");
    }
    traffic_is_right(&pair)?;
    let Pair { a, b, topology: _topology, .. } = pair;
    a.stop()?;
    b.stop()
}

/// A user without files of its own: store, run directory and the tun device are what it needs.
fn another_user(sandbox: &Arc<Sandbox>) -> Result<()> {
    let pair = pair(sandbox, [Rung::Xdp, Rung::Tc], |store, site, side, rung| {
        let inner = site.run_command(&arguments(store, side, rung, &[]));
        let files = site.subnet_file();
        let directory = files.parent().context("the subnet file has no directory")?.to_path_buf();
        let store = store
            .arguments(side, rung)
            .into_iter()
            .find_map(|word| Some(word.strip_prefix("dir:")?.to_owned()));
        for owned in [store.context("no store")?, directory.display().to_string()] {
            run_tool(&["chown", "--recursive", &format!("{USER}:{USER}"), &owned])?;
        }
        let list = only(&FOUR);
        let mut outer = Command::new("unshare");
        outer.args(["--mount", "--propagation", "private", "sh", "-c"]);
        outer.arg(r#"mount -t tmpfs none /dev/net && mknod -m 666 /dev/net/tun c 10 200 && exec "$@""#);
        outer.args(["sh", "setpriv", "--reuid", USER, "--regid", USER, "--clear-groups", "--no-new-privs"]);
        outer.args(["--inh-caps", &list, "--ambient-caps", &list, "--bounding-set", &list]);
        // The binary may lie where only root can reach it: open it as root, run what is open.
        outer.arg("/proc/self/fd/0");
        let mut command = with_arguments_of(&inner, outer);
        command.stdin(File::open(site.binary()).context("open the agent's binary")?);
        let mut agent = site.launch(command)?;
        agent.wait_until_running()?;
        Ok(agent)
    })?;
    for (agent, rung) in [(&pair.a, Rung::Xdp), (&pair.b, Rung::Tc)] {
        has_exactly_four(agent)?;
        ensure!(process_status(agent, "Uid")?.split_whitespace().all(|id| id == USER), "another user");
        ensure!(is_on(&agent.status()?, rung), "{:?}", agent.status()?);
    }
    traffic_is_right(&pair)?;
    let Pair { a, b, topology: _topology, .. } = pair;
    a.stop()?;
    b.stop()
}

/// Starts an agent with these capabilities on a rung.
fn starts(sandbox: &Arc<Sandbox>, rung: Rung, capabilities: &'static [&str]) -> Result<()> {
    let pair = pair(sandbox, [rung; 2], |store, site, side, rung| {
        let mut agent =
            site.launch(confined(capabilities, &site.run_command(&store.arguments(side, rung))))?;
        agent.wait_until_running()?;
        Ok(agent)
    })?;
    for agent in [&pair.a, &pair.b] {
        let status = agent.status()?;
        ensure!(is_on(&status, rung) && status.problems.is_empty(), "{status:?}");
    }
    let check = CHECKS.first().context("there are no checks")?;
    check.run(&pair.topology, &Plan::overlay(TCP_BYTES))?;
    Ok(())
}

fn repairs(sandbox: &Arc<Sandbox>) -> Result<()> {
    let pair = pair(sandbox, [Rung::Tc; 2], |store, site, side, rung| {
        let mut agent = site.launch(confined(&FOUR, &site.run_command(&store.arguments(side, rung))))?;
        agent.wait_until_running()?;
        Ok(agent)
    })?;
    let repaired = format!("repaired: program ovl_ingress on {UPLINK}");
    let repairs = || pair.a.site().log().matches(&repaired).count();

    detach(&pair.a, "(ingress)")?;
    wait_until("a detached program is attached again", || Ok(repairs() == 1))?;
    traffic_is_right(&pair)?;

    let (ingress, egress) = (held_link(&pair.a, "(ingress)")?, held_link(&pair.a, "(egress)")?);
    bpf(&format!(
        "my $link = call(30, pack('L', {})); my $program = call(13, pack('L', {})); \
         call(29, pack('LLLL', $link, $program, 0, 0));",
        ingress.id, egress.program
    ))?;
    wait_until("a replaced program is attached again", || Ok(repairs() == 2))?;
    traffic_is_right(&pair)
}

/// Detaches the program of the link that an agent holds and whose description contains `words`.
pub(crate) fn detach(agent: &Agent, words: &str) -> Result<()> {
    let HeldLink { id, .. } = held_link(agent, words)?;
    bpf(&format!("my $link = call(30, pack('L', {id})); call(34, pack('L', $link));"))
}

/// A link that an agent holds.
struct HeldLink {
    id: u32,
    program: u32,
}

fn held_link(agent: &Agent, words: &str) -> Result<HeldLink> {
    let directory = format!("/proc/{}/fdinfo", agent.pid());
    let entries = fs::read_dir(&directory).with_context(|| format!("list {directory}"))?;
    for text in entries.flatten().filter_map(|entry| fs::read_to_string(entry.path()).ok()) {
        let number = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok());
        if text.contains(words)
            && let (Some(id), Some(program)) = (number("link_id:"), number("prog_id:"))
        {
            return Ok(HeldLink { id, program });
        }
    }
    bail!("{directory} has no {words}")
}

/// Runs Perl code in which `call(COMMAND, ATTRIBUTES)` is bpf(2), for what neither `ip` nor `tc` does to links: commands 13, 29,
/// 30 and 34 are BPF_PROG_GET_FD_BY_ID, BPF_LINK_UPDATE, BPF_LINK_GET_FD_BY_ID and BPF_LINK_DETACH (linux/bpf.h).
fn bpf(code: &str) -> Result<()> {
    let call = format!(
        "sub call {{ my ($command, $attributes) = @_; my $result = syscall({}, $command, $attributes, length $attributes); \
         die \"bpf $command: $!\\n\" if $result < 0; $result }} {code}",
        libc::SYS_bpf
    );
    run_tool(&["perl", "-e", &call]).map(drop)
}

fn auto_is_degraded(sandbox: &Arc<Sandbox>) -> Result<()> {
    let auto = |mut arguments: Vec<String>| {
        arguments.extend(["--datapath", "auto"].map(str::to_owned));
        arguments
    };
    let pair = pair(sandbox, [Rung::Tun; 2], |store, site, side, rung| {
        let capabilities: &[_] = match side.name {
            "a" => &["net_admin", "net_raw"],
            _ => &["net_admin", "net_raw", "bpf"],
        };
        let agent =
            site.launch(confined(capabilities, &site.run_command(&auto(store.arguments(side, rung)))))?;
        wait_until("an agent is degraded", || {
            Ok(agent.state().is_ok_and(|state| state.state == "degraded"))
        })?;
        Ok(agent)
    })?;
    for (agent, named, present) in
        [(&pair.a, &["CAP_BPF", "CAP_PERFMON"][..], None), (&pair.b, &["CAP_PERFMON"], Some("CAP_BPF"))]
    {
        let status = agent.status()?;
        let [problem] = status.problems.as_slice() else { bail!("{status:?}") };
        for word in named.iter().chain(&["tun rung", "AmbientCapabilities="]) {
            ensure!(problem.contains(word), "{word} is not in: {problem}");
        }
        ensure!(present.is_none_or(|word| !problem.contains(word)), "{problem}");
        ensure!(is_on(&status, Rung::Tun) && status.ingress.why.contains("CAP_PERFMON"), "{status:?}");
    }
    traffic_is_right(&pair)
}

fn refusals(sandbox: &Arc<Sandbox>) -> Result<()> {
    let topology = Topology::build(sandbox, Underlay::Virtual, PodOffload::On)?;
    let store = Store::create(sandbox)?;
    let site = Site::new(sandbox, &topology.a.host, "agent")?;
    let before = Snapshot::take(&topology.a.host)?;
    for (capabilities, rung, named, others) in [
        (&["net_raw", "bpf", "perfmon"][..], Rung::Tun, &["CAP_NET_ADMIN (for devices"][..], "CAP_BPF"),
        (&["net_admin", "perfmon"], Rung::Xdp, &["CAP_BPF (for eBPF maps"], "CAP_NET_ADMIN"),
        (&["net_admin", "bpf"], Rung::Tc, &["CAP_PERFMON (for pointer arithmetic"], "CAP_BPF"),
        (&["net_raw"], Rung::Xdp, &["CAP_NET_ADMIN", "CAP_BPF", "CAP_PERFMON"], "CAP_SYS_ADMIN"),
    ] {
        let command = confined(capabilities, &site.run_command(&store.arguments(&topology.a, rung)));
        let error = site.refused(command)?;
        ensure!(named.iter().all(|name| error.contains(name)) && !error.contains(others), "{error}");
        ensure!(error.contains("root") && error.contains("AmbientCapabilities="), "no remedy: {error}");
        before.is_unchanged(&topology.a.host)?;
    }
    let error = output(&site, &["net_raw"], "down")?.err().context("down did not refuse")?;
    ensure!(error.contains("CAP_NET_ADMIN (for devices"), "{error}");
    Ok(())
}

fn unit_grants_what_is_needed() -> Result<()> {
    let unit = include_str!("../../../docs/overlay-agent.service");
    // The last for services: DNS and low virtual ports.
    let names = FOUR.into_iter().chain(["net_bind_service"]);
    let four = names.map(|name| format!("CAP_{}", name.to_uppercase())).collect::<Vec<_>>().join(" ");
    for setting in ["CapabilityBoundingSet", "AmbientCapabilities"] {
        let line = format!("\n{setting}={four}\n");
        ensure!(unit.matches(setting).count() == 1 && unit.contains(&line), "{setting} is not {four}");
    }
    // The default of --state-dir, which ProtectSystem= would protect from the agent, too.
    ensure!(unit.contains("\nStateDirectory=overlay-agent\n") && unit.contains("\nProtectSystem=strict\n"));
    Ok(())
}
