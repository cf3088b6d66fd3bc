//! Host state that the agent maintains: underlay changes, firewall rules, the blackhole route, subnet.env.

use std::{
    env, fs,
    net::Ipv4Addr,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use overlay_tests::{
    agent::{Agent, DEVICE, Rung, Site},
    pair::{Pair, Store},
    sandbox::Sandbox,
    topology::{Endpoint, NETWORK, OVERLAY_MTU, PodOffload, Side, Topology, UPLINK, Underlay},
    traffic::{
        ping::ping_with_ttl,
        steady::{meanwhile, without_loss},
        udp::every_size,
    },
};

use crate::{datapath::attached, machine::Need, matrix::needs, suite::Suite, wait::wait_until};

/// A small MTU of the underlay, and the resulting MTU of the overlay.
const SMALL: (usize, usize) = (1400, 1372);

pub(crate) fn register(suite: &mut Suite) {
    for rung in [Rung::Xdp, Rung::Tc, Rung::Tun] {
        let word = rung.name();
        suite.add(
            format!("node::mtu_is_followed_without_loss_on_{word}"),
            needs(rung, rung),
            move |sandbox| follows_mtu(sandbox, rung),
        );
        suite.add(format!("node::address_is_followed_on_{word}"), needs(rung, rung), move |sandbox| {
            follows_address(sandbox, rung)
        });
    }
    suite.add("node::unusable_underlay_is_reported", &[Need::Tun], unusable_underlay);
    suite.add("node::removed_address_is_used_again_when_it_returns", &[Need::Tun], address_flaps);
    suite.add("node::unwritable_subnet_file_is_retried", &[Need::Tun], subnet_file_blocked);
    suite.add(
        "node::rules_and_blackhole_exist_only_while_the_agent_runs",
        &[Need::Tun, Need::Nftables],
        rules_come_and_go,
    );
    suite.add("node::masquerading_needs_nft", &[Need::Tun], no_nft);
    let nft = &[Need::Tun, Need::Nftables];
    suite.add("node::hanging_nft_blocks_neither_start_nor_stop", nft, hanging_nft);
    suite.add("node::failing_nft_is_reported_until_it_works", nft, failing_nft);
}

fn pair(sandbox: &Arc<Sandbox>, rung: Rung) -> Result<Pair> {
    Pair::start(sandbox, Topology::build(sandbox, Underlay::Virtual, PodOffload::On)?, rung, rung)
}

fn subnet_file(agent: &Agent) -> Result<String> {
    let path = agent.site().subnet_file();
    fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
}

fn has_mtu(side: &Side, mtu: usize) -> Result<bool> {
    Ok(side.host.tool(&format!("ip link show {DEVICE}"))?.contains(&format!(" mtu {mtu} ")))
}

fn follows_mtu(sandbox: &Arc<Sandbox>, rung: Rung) -> Result<()> {
    let pair = pair(sandbox, rung)?;
    let (a, b) = (&pair.topology.a, &pair.topology.b);
    let (from, to) = pair.topology.pods();
    let pid = pair.a.status()?.pid;
    let file = |mtu: usize| {
        format!(
            "FLANNEL_NETWORK={NETWORK}\nFLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_MTU={mtu}\nFLANNEL_IPMASQ=false\n"
        )
    };
    ensure!(subnet_file(&pair.a)? == file(OVERLAY_MTU), "at first: {}", subnet_file(&pair.a)?);
    let programs = [attached(a)?, attached(b)?];
    for (underlay, overlay) in [SMALL, (1500, OVERLAY_MTU)] {
        without_loss(from, to, || {
            for side in [a, b] {
                side.host.tool(&format!("ip link set {UPLINK} mtu {underlay}"))?;
            }
            wait_until("both devices have the MTU", || Ok(has_mtu(a, overlay)? && has_mtu(b, overlay)?))?;
            wait_until("subnet.env has the MTU", || Ok(subnet_file(&pair.a)? == file(overlay)))?;
            // Traffic with the new MTU.
            thread::sleep(Duration::from_millis(300));
            Ok(())
        })?;
        ensure!(pair.a.status()?.device.mtu == overlay, "status has another MTU");
        every_size(from, to, overlay)?;
    }
    ensure!(
        pair.a.status()?.pid == pid && pair.a.status()?.state == "running",
        "the agent was started again"
    );
    ensure!([attached(a)?, attached(b)?] == programs, "programs were attached again: {programs:?}");
    pair.a.stop()?;
    pair.b.stop()
}

fn follows_address(sandbox: &Arc<Sandbox>, rung: Rung) -> Result<()> {
    let pair = pair(sandbox, rung)?;
    let (a, moved) = (&pair.topology.a, Ipv4Addr::new(192, 168, 77, 11));
    let (from, to) = pair.topology.pods();
    let pid = pair.a.status()?.pid;
    let programs = [attached(a)?, attached(&pair.topology.b)?];
    a.host.tool(&format!("ip address add {moved}/24 dev {UPLINK}"))?;
    // Without this, removing the first address would remove the second of the same network.
    a.host.tool(&format!("sysctl -q -w net.ipv4.conf.{UPLINK}.promote_secondaries=1"))?;
    let host = Endpoint { netns: &pair.topology.b.host, address: pair.topology.b.underlay };
    let address = Endpoint { netns: &a.host, address: a.underlay };
    // The underlay loses all datagrams to the old address, one in a second; the overlay must not lose more.
    let (((), overlay), underlay) = meanwhile(host, address, || {
        meanwhile(from, to, || {
            // Until both flows run.
            thread::sleep(Duration::from_millis(300));
            a.host.tool(&format!("ip address delete {}/24 dev {UPLINK}", a.underlay))?;
            wait_until("B routes to the new address", || {
                let routes = pair.b.routes()?.routes;
                Ok(routes.iter().any(|route| route.subnet == a.subnet && route.peer == moved))
            })?;
            wait_until("containers reach each other", || {
                Ok(ping_with_ttl(from.netns, to.address, 60).is_ok())
            })?;
            thread::sleep(Duration::from_millis(300));
            Ok(())
        })
    })?;
    ensure!(overlay.lost <= underlay.lost, "the overlay lost {overlay:?}, the underlay {underlay:?}");
    ensure!([attached(a)?, attached(&pair.topology.b)?] == programs, "programs were attached again");
    ensure!(
        pair.store.read("subnets/10.244.1.0-24")?.starts_with(&format!(r#"{{"PublicIP":"{moved}","PublicIPv6":null,"#))
    );
    wait_until("containers reach each other", || Ok(ping_with_ttl(from.netns, to.address, 60).is_ok()))?;
    every_size(from, to, OVERLAY_MTU)?;
    let status = pair.a.status()?;
    ensure!(status.public_ip == moved && status.pid == pid && status.state == "running", "{status:?}");
    ensure!(status.egress.rung == if rung.is_fast() { "tc" } else { "tun" }, "{status:?}");
    pair.a.stop()?;
    pair.b.stop()
}

fn unusable_underlay(sandbox: &Arc<Sandbox>) -> Result<()> {
    let pair = pair(sandbox, Rung::Tun)?;
    let (a, address) = (&pair.topology.a, pair.topology.a.underlay);
    let (from, to) = pair.topology.pods();
    let unhealthy = |words: &str| {
        wait_until(&format!("status reports `{words}`"), || {
            let status = pair.a.status()?;
            Ok(status.state == "unhealthy" && status.problems.iter().any(|problem| problem.contains(words)))
        })
    };
    a.host.tool(&format!("ip link set {UPLINK} mtu 500"))?;
    unhealthy("too small")?;
    a.host.tool(&format!("ip link set {UPLINK} mtu 1500"))?;
    wait_until("the agent runs again", || Ok(pair.a.status()?.state == "running"))?;
    a.host.tool(&format!("ip address delete {address}/24 dev {UPLINK}"))?;
    unhealthy("has no IPv4 address")?;
    // An underlay address inside the overlay would cause a routing loop.
    a.host.tool(&format!("ip address add 10.244.7.7/32 dev {UPLINK}"))?;
    unhealthy("lies inside the network")?;
    a.host.tool(&format!("ip address delete 10.244.7.7/32 dev {UPLINK}"))?;
    a.host.tool(&format!("ip address add {address}/24 dev {UPLINK}"))?;
    wait_until("containers reach each other", || Ok(ping_with_ttl(from.netns, to.address, 60).is_ok()))?;
    wait_until("the agent runs at last", || Ok(pair.a.status()?.state == "running"))
}

/// Another address of the device is used meanwhile, unless the operator named the missing one.
fn address_flaps(sandbox: &Arc<Sandbox>) -> Result<()> {
    for named in [false, true] {
        let topology = Topology::build(sandbox, Underlay::Virtual, PodOffload::On)?;
        let store = Store::create(sandbox)?;
        let (a, b) = (&topology.a, &topology.b);
        let other = Ipv4Addr::new(192, 168, 77, 21);
        a.host.tool(&format!("ip address add {other}/32 dev {UPLINK}"))?;
        let mut arguments = store.arguments(a, Rung::Tun);
        if named {
            arguments.push(format!("--public-ip={}", a.underlay));
        }
        let agent = Site::new(sandbox, &a.host, "agent-a")?.start(&arguments)?;
        let peer = Site::new(sandbox, &b.host, "agent-b")?.start(&store.arguments(b, Rung::Tun))?;
        let recorded = || store.read("subnets/10.244.1.0-24");
        let (from, to) = topology.pods();
        a.host.tool(&format!("ip address delete {}/24 dev {UPLINK}", a.underlay))?;
        match named {
            true => wait_until("status reports the missing address", || {
                Ok(agent
                    .status()?
                    .problems
                    .iter()
                    .any(|problem| problem.contains("no device holds the address")))
            })?,
            false => {
                wait_until("the other address is used", || Ok(recorded()?.contains(&other.to_string())))?
            }
        }
        a.host.tool(&format!("ip address add {}/24 dev {UPLINK}", a.underlay))?;
        wait_until("the first address is used again", || {
            Ok(recorded()?.contains(&format!("\"{}\"", a.underlay)) && agent.status()?.state == "running")
        })?;
        wait_until("containers reach each other", || Ok(ping_with_ttl(from.netns, to.address, 60).is_ok()))?;
        ensure!(agent.status()?.public_ip == a.underlay, "{:?}", agent.status()?);
        agent.stop()?;
        peer.stop()?;
    }
    Ok(())
}

fn subnet_file_blocked(sandbox: &Arc<Sandbox>) -> Result<()> {
    let pair = pair(sandbox, Rung::Tun)?;
    let file = pair.a.site().subnet_file();
    // A directory in its place cannot be replaced by a file.
    fs::remove_file(&file)?;
    fs::create_dir(&file)?;
    pair.topology.a.host.tool(&format!("ip link set {UPLINK} mtu 1400"))?;
    wait_until("status reports that the file cannot be written", || {
        Ok(pair.a.status()?.problems.iter().any(|problem| problem.contains("subnet.env")))
    })?;
    fs::remove_dir(&file)?;
    wait_until("the file is written", || {
        Ok(subnet_file(&pair.a).is_ok_and(|text| text.contains("MTU=1372")))
    })?;
    wait_until("the agent runs again", || Ok(pair.a.status()?.state == "running"))
}

fn rules_come_and_go(sandbox: &Arc<Sandbox>) -> Result<()> {
    let topology = Topology::build(sandbox, Underlay::Virtual, PodOffload::On)?;
    let store = Store::create(sandbox)?;
    let a = &topology.a;
    let site = Site::new(sandbox, &a.host, "agent-a")?;
    let arguments = [
        store.arguments(a, Rung::Tun),
        ["--ip-masq", "--ip-blackhole-route", "--iptables-resync=1"].map(str::to_owned).into(),
    ]
    .concat();
    let rules = || Ok::<_, anyhow::Error>(tables(&a.host.tool("nft --stateless list ruleset")?));
    let blackhole =
        || Ok::<_, anyhow::Error>(a.host.tool("ip route show type blackhole")?.contains("10.244.1.0/24"));
    a.host.tool("nft add table ip filter")?;
    a.host.tool("nft add chain ip filter FORWARD { type filter hook forward priority 0 ; policy drop ; }")?;
    let before = rules()?;
    let agent = site.start(&arguments)?;
    let applied = rules()?;
    let text = applied.concat();
    ensure!(
        text.contains("masquerade fully-random") && text.matches("accept comment").count() == 2,
        "{text}"
    );
    ensure!(blackhole()?, "there is no blackhole route");
    ensure!(subnet_file(&agent)?.ends_with("FLANNEL_IPMASQ=true\n"), "{}", subnet_file(&agent)?);
    a.host.tool(
        "nft flush ruleset ; add table ip filter ; \
         add chain ip filter FORWARD { type filter hook forward priority 0 ; policy drop ; }",
    )?;
    wait_until("the rules are restored", || Ok(rules()? == applied))?;
    agent.stop()?;
    ensure!(rules()? == before && !blackhole()?, "left behind: {:?}", rules()?);

    // The next agent, with other flags, replaces what a killed one left, and `down` removes it.
    let site = site.start(&arguments)?.crash()?;
    ensure!(rules()? == applied && blackhole()?, "a killed agent's rules are missing: {:?}", rules()?);
    let plain = [store.arguments(a, Rung::Tun), vec!["--iptables-forward-rules=false".to_owned()]].concat();
    let agent = site.start(&plain)?;
    // Whatever its flags, it guards its peers.
    host_has_only_the_guard(&rules()?, &before)?;
    ensure!(!blackhole()?, "an earlier agent's blackhole route is still there");
    agent.stop()?;
    ensure!(rules()? == before, "left behind: {:?}", rules()?);
    let site = site.start(&arguments)?.crash()?;
    a.host.tool(&format!("ip link delete {DEVICE}"))?;
    let removed = || -> Result<Vec<String>> {
        let answer: serde_json::Value = serde_json::from_str(&site.output("down", &["-o", "json"])?)?;
        Ok(serde_json::from_value(
            answer.get("removed").context("the output of down lacks `removed`")?.clone(),
        )?)
    };
    let gone = removed()?;
    for item in ["the blackhole route for 10.244.1.0/24", "the firewall's rules of ovl0"] {
        ensure!(gone.iter().any(|line| line == item), "down removed: {gone:?}");
    }
    ensure!(removed()?.is_empty(), "there was more to remove");
    ensure!(rules()? == before && !blackhole()?, "left by down: {:?}", rules()?);
    Ok(())
}

/// The tables of a ruleset in the order of their texts: the kernel lists them in the order in which they were made, which is not
/// always the same when the agent restores them.
fn tables(ruleset: &str) -> Vec<String> {
    let mut tables: Vec<String> = Vec::new();
    for line in ruleset.lines() {
        match tables.last_mut().filter(|_| !line.starts_with("table ")) {
            Some(table) => *table += &format!("\n{line}"),
            None => tables.push(line.to_owned()),
        }
    }
    tables.sort();
    tables
}

fn host_has_only_the_guard(rules: &[String], before: &[String]) -> Result<()> {
    let others: Vec<_> = rules.iter().filter(|table| !before.contains(table)).collect();
    let is_guard = |table: &str| table.starts_with(&format!("table ip overlay-guard-{DEVICE} {{"));
    ensure!(
        rules.len() == before.len() + 1 && others.len() == 1 && others.iter().all(|table| is_guard(table)),
        "an earlier agent's rules are still there, or the guard is not: {rules:?}"
    );
    Ok(())
}

fn no_nft(sandbox: &Arc<Sandbox>) -> Result<()> {
    let topology = Topology::build(sandbox, Underlay::Virtual, PodOffload::On)?;
    let store = Store::create(sandbox)?;
    let site = Site::new(sandbox, &topology.a.host, "agent-a")?;
    let empty = sandbox.new_directory("empty-path")?;
    let arguments = store.arguments(&topology.a, Rung::Tun);
    let mut masquerading = site.run_command(&[arguments.clone(), vec!["--ip-masq".to_owned()]].concat());
    masquerading.env("PATH", &empty);
    let error = site.refused(masquerading)?;
    ensure!(error.contains("--ip-masq") && error.contains("nftables"), "{error}");
    let links = topology.a.host.tool("ip link show")?;
    ensure!(!links.contains(DEVICE), "a refused agent left its device: {links}");
    // Without masquerading, the agent works and says what containers can do.
    let mut plain = site.run_command(&arguments);
    plain.env("PATH", &empty);
    let mut agent = site.launch(plain)?;
    agent.wait_until_running()?;
    ensure!(site.log().contains("install the package nftables"), "{}", site.log());
    let reported = |agent: &Agent, remedy: &str| -> Result<()> {
        let state = agent.state()?;
        let guard = format!("containers on this host can send packets that peers take for ours: {remedy}");
        ensure!(
            state.state == "degraded" && state.problems.iter().any(|why| why.starts_with(&guard)),
            "{state:?}"
        );
        Ok(())
    };
    reported(&agent, "the program nft is missing: install the package nftables")?;
    agent.stop()?;
    let site = Site::of_device(sandbox, &topology.a.host, "agent-named", "ovl,0")?;
    let agent = site.start(&arguments)?;
    reported(&agent, "the device name \"ovl,0\" cannot be part of an nftables name")?;
    agent.stop()
}

/// A directory for PATH with only `nft`, which can be replaced while an agent runs.
struct Tools {
    directory: PathBuf,
}

impl Tools {
    fn new(sandbox: &Arc<Sandbox>) -> Result<Self> {
        let tools = Self { directory: sandbox.new_directory("tools")? };
        tools.work()?;
        Ok(tools)
    }

    /// Makes nft work.
    fn work(&self) -> Result<()> {
        let path = env::var_os("PATH").unwrap_or_default();
        let nft = env::split_paths(&path).map(|directory| directory.join("nft")).find(|nft| nft.is_file());
        self.become_link_to(&nft.context("find nft")?)
    }

    /// Makes nft hang.
    fn hang(&self) -> Result<()> {
        self.become_script("hang", &format!(": > {}; exec /bin/sleep 3600", self.started().display()))
    }

    /// Makes nft fail with a message.
    fn fail(&self) -> Result<()> {
        self.become_script("fail", "echo 'Error: simulated failure' >&2; exit 1")
    }

    /// A file that exists once the hanging nft was started.
    fn started(&self) -> PathBuf {
        self.directory.join("started")
    }

    fn become_script(&self, name: &str, text: &str) -> Result<()> {
        let script = self.directory.join(name);
        fs::write(&script, format!("#!/bin/sh\n{text}\n"))?;
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
        self.become_link_to(&script)
    }

    /// Atomically, so that nft exists at any time.
    fn become_link_to(&self, program: &Path) -> Result<()> {
        let link = self.directory.join("new");
        symlink(program, &link)?;
        fs::rename(link, self.directory.join("nft")).context("exchange nft")
    }

    fn run(&self, site: &Site, arguments: &[String]) -> Command {
        let mut command = site.run_command(arguments);
        command.env("PATH", &self.directory);
        command
    }
}

fn hanging_nft(sandbox: &Arc<Sandbox>) -> Result<()> {
    let topology = Topology::build(sandbox, Underlay::Virtual, PodOffload::On)?;
    let (store, tools) = (Store::create(sandbox)?, Tools::new(sandbox)?);
    let host = &topology.a.host;
    let site = Site::new(sandbox, host, "agent-a")?;
    let mut arguments = store.arguments(&topology.a, Rung::Tun);
    arguments.extend(["--ip-masq", "--iptables-resync=1"].map(str::to_owned));
    let no_device = || -> Result<()> {
        let links = host.tool("ip link show")?;
        ensure!(!links.contains(DEVICE), "the device is still there: {links}");
        Ok(())
    };
    tools.hang()?;
    let error = site.refused(tools.run(&site, &arguments))?;
    ensure!(error.contains("--ip-masq") && error.contains("nft does not answer"), "{error}");
    no_device()?;

    tools.work()?;
    fs::remove_file(tools.started())?;
    let mut agent = site.launch(tools.run(&site, &arguments))?;
    agent.wait_until_running()?;
    tools.hang()?;
    wait_until("the agent waits for nft", || Ok(tools.started().exists()))?;
    agent.stop()?;
    no_device()?;
    let rules = format!("the firewall's rules of {DEVICE}");
    ensure!(site.log().contains(&format!("{rules} stay")), "{}", site.log());
    // A working nft removes them later.
    let removed = site.output("down", &[])?;
    ensure!(removed.contains(&rules), "down prints: {removed}");
    Ok(())
}

fn failing_nft(sandbox: &Arc<Sandbox>) -> Result<()> {
    let topology = Topology::build(sandbox, Underlay::Virtual, PodOffload::On)?;
    let (store, tools) = (Store::create(sandbox)?, Tools::new(sandbox)?);
    let site = Site::new(sandbox, &topology.a.host, "agent-a")?;
    let mut arguments = store.arguments(&topology.a, Rung::Tun);
    arguments.extend(["--ip-masq", "--iptables-resync=1"].map(str::to_owned));
    let mut agent = site.launch(tools.run(&site, &arguments))?;
    agent.wait_until_running()?;
    tools.fail()?;
    wait_until("status reports that the rules may be missing, and why", || {
        let status = agent.status()?;
        let reported = |problem: &String| {
            problem.contains(&format!("the firewall's rules of {DEVICE} may be missing"))
                && problem.contains("simulated failure")
        };
        Ok(status.state == "degraded" && status.problems.iter().any(reported))
    })?;
    tools.work()?;
    wait_until("the agent runs again", || Ok(agent.status()?.state == "running"))?;
    agent.stop()
}
