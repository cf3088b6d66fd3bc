//! Hosts that boot while etcd is away: they start from the snapshot on disk, and go on with etcd when it is back.
#![allow(clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::{
    fs,
    net::Ipv4Addr,
    path::PathBuf,
    process::Command,
    sync::Arc,
    thread,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result, ensure};
use overlay_tests::{
    agent::{Agent, Rung, Site},
    report::State,
    sandbox::Sandbox,
    topology::{PodOffload, Side, Topology, Underlay},
    traffic::ping::ping_with_ttl,
};

use crate::{
    etcd::{
        Server, arguments, config, key, route_lines, value, wait_for_log, wait_for_problem, wait_for_route,
        wait_for_state,
    },
    machine::Need,
    services::{Servers, ask, resolve},
    suite::Suite,
    wait::wait_until,
};

const CONFIG: &str = r#"{"Network":"10.244.0.0/16","Services":{"Pool":"10.251.0.0/24"}}"#;
const NETWORK: &str = "10.244.0.0/16";
/// What `status` says of an agent that started from its snapshot.
const RECALLED: &str = "the store cannot be read, state is of ";
/// Longer than an agent waits for etcd when it has a snapshot: 10 s.
const PATIENCE: Duration = Duration::from_secs(13);

pub(crate) fn register(suite: &mut Suite) {
    suite.add("autonomy::hosts_boot_without_etcd_and_go_on_with_it", &[Need::Tun, Need::Ebpf], boot);
    suite.add("autonomy::a_snapshot_that_must_not_be_used_is_named", &[Need::Tun], refused);
    suite.add("autonomy::a_subnet_that_was_lost_meanwhile_is_left", &[Need::Tun], moved);
    suite.add("autonomy::without_snapshots_an_agent_waits_and_writes_none", &[Need::Tun], switched_off);
}

/// Two hosts with an agent each and etcd on the first one.
struct Scene {
    a: Option<Agent>,
    b: Option<Agent>,
    server: Server,
    files: PathBuf,
    sites: [Arc<Site>; 2],
    topology: Topology,
}

impl Scene {
    fn start(sandbox: &Arc<Sandbox>) -> Result<Self> {
        let topology = Topology::build(sandbox, Underlay::Virtual, PodOffload::On)?;
        let server = Server::start(sandbox, &topology.a.host, topology.a.underlay)?;
        server.write_config(CONFIG)?;
        let files = sandbox.new_directory("services")?;
        let sites = [
            Site::new(sandbox, &topology.a.host, "agent-a")?,
            Site::new(sandbox, &topology.b.host, "agent-b")?,
        ];
        let mut scene = Self { a: None, b: None, server, files, sites, topology };
        scene.launch()?;
        for agent in scene.agents()? {
            let is_up = |state: State| state.state == "running" || state.lacks_only_nft();
            wait_until("an agent runs", || Ok(agent.state().is_ok_and(is_up)))
                .with_context(|| format!("{:?}", agent.state()))?;
        }
        Ok(scene)
    }

    /// Starts both agents, and does not wait for them.
    fn launch(&mut self) -> Result<()> {
        let launch = |site: &Arc<Site>, side: &Side| -> Result<Agent> {
            let mut words = arguments(&self.server, Rung::Tc);
            words.extend(["--subnet", side.subnet, "--lb", "proxy", "--node", side.name].map(str::to_owned));
            if side.name == "b" {
                words.extend(["--services-dir".to_owned(), self.files.display().to_string()]);
            }
            site.launch(site.run_command(&words))
        };
        let [a, b] = &self.sites;
        self.a = Some(launch(a, &self.topology.a)?);
        self.b = Some(launch(b, &self.topology.b)?);
        Ok(())
    }

    fn agents(&self) -> Result<[&Agent; 2]> {
        Ok([self.a.as_ref().context("agent A")?, self.b.as_ref().context("agent B")?])
    }

    /// Runs a command of an operator on the store.
    fn operate(&self, words: &[&str]) -> Result<()> {
        let [site, _] = &self.sites;
        let mut command = Command::new(site.binary());
        command.args(words).args(["--etcd-endpoints", &self.server.endpoint()]);
        let output = site.netns().output(&mut command)?;
        let error = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "overlay-agent {}: {error}", words.join(" "));
        Ok(())
    }

    /// Adds an endpoint of `shop/web` at a port of pod B.
    fn add(&self, port: u16) -> Result<()> {
        let (address, id, port) =
            (self.topology.b.pod_address.to_string(), format!("p{port}"), format!("web={port}"));
        let place = ["--address", &address, "--node", "b", "--id", &id, "--port", &port];
        self.operate(&[&["endpoint", "add", "shop/web"], &place[..]].concat())
    }

    /// The port of the endpoint that answers a pod of A for a name.
    fn ask(&self, name: &str) -> Result<u16> {
        self.topology.a.pod.run(|| {
            let address = resolve(name)?.with_context(|| format!("{name} has no address"))?;
            Ok(ask(address)?.0)
        })?
    }

    /// The etcd lease of the endpoint that agent B keeps; 0 while there is none.
    fn own_endpoint(&self) -> Result<i64> {
        let found = self.server.below("/coreos.com/network/endpoints/shop/own/")?;
        Ok(found.first().map_or(0, |stored| stored.lease))
    }
}

fn boot(sandbox: &Arc<Sandbox>) -> Result<()> {
    let mut scene = Scene::start(sandbox)?;
    let pod_b = (Arc::clone(&scene.topology.b.pod), scene.topology.b.pod_address);
    let _servers = Servers::start(&pod_b.0, pod_b.1, &[8081, 8082, 8083])?;
    scene.operate(&["service", "set", r#"{"name":"shop/web","ports":[{"name":"web","port":80}]}"#])?;
    scene.add(8081)?;
    let own = format!(
        r#"{{"name":"shop/own","ports":[{{"name":"web","port":80}}],"endpoints":[{{"address":"{}","id":"e","ports":{{"web":8082}}}}]}}"#,
        pod_b.1
    );
    fs::write(scene.files.join("own.json"), own)?;
    for (name, port) in [("web.shop.svc.overlay", 8081), ("own.shop.svc.overlay", 8082)] {
        wait_until("the service answers", || Ok(scene.ask(name).is_ok_and(|answer| answer == port)))?;
    }
    for site in &scene.sites {
        let parts =
            ["10.244.1.0-24", "10.244.2.0-24", "endpoints/shop/own", "vips/10.251.0.", "\"own\":{\"subnet\""];
        wait_until("the snapshot has everything", || {
            let snapshot = fs::read_to_string(site.snapshot_file()).unwrap_or_default();
            Ok(parts.iter().all(|part| snapshot.contains(part))
                && snapshot.matches("vips/10.251").count() == 2)
        })?;
    }
    let keys = [key(scene.topology.a.subnet), key(scene.topology.b.subnet)];
    let records = |server: &Server| keys.iter().map(|key| server.record(key)).collect::<Result<Vec<_>>>();
    let before = records(&scene.server)?;
    let (own_before, vips_before) = (scene.own_endpoint()?, scene.server.below("/coreos.com/network/vips/")?);
    ensure!(own_before != 0 && vips_before.len() == 2, "{own_before} {vips_before:?}");

    // A power failure: all is killed. After the reboot of host A, /run and the devices are gone, and `down` removes no snapshot.
    scene.a.take().context("agent A")?.crash()?;
    scene.b.take().context("agent B")?.crash()?;
    scene.server.kill();
    let [site_a, site_b] = scene.sites.clone();
    site_a.down()?;
    fs::remove_dir_all(site_a.run_directory())?;
    ensure!(scene.topology.a.host.tool("ip link show ovl0").is_err());
    ensure!(site_a.snapshot_file().exists(), "down removed the snapshot");
    let written = [site_a.snapshot_file(), site_b.snapshot_file()].map(fs::read);
    scene.launch()?;
    for agent in scene.agents()? {
        wait_until("the agent has started from its snapshot", || {
            Ok(agent.status().is_ok_and(|status| status.problems.iter().any(|why| why.contains(RECALLED))))
        })
        .with_context(|| agent.site().log_tail())?;
        wait_for_problem(agent, "degraded", "the lease cannot be confirmed, and ends at ")?;
        wait_for_problem(agent, "degraded", "services cannot be read, the last known ones stay")?;
        ensure!(agent.status()?.routes == 1, "{:?}", agent.routes()?);
    }
    let (from, to) = scene.topology.pods();
    ping_with_ttl(from.netns, to.address, 60)?;
    ping_with_ttl(to.netns, from.address, 60)?;
    for (name, port) in [("web.shop.svc.overlay", 8081), ("own.shop.svc.overlay", 8082)] {
        wait_until("the service answers without etcd", || {
            Ok(scene.ask(name).is_ok_and(|answer| answer == port))
        })?;
    }
    for (site, written) in scene.sites.iter().zip(written) {
        ensure!(fs::read(site.snapshot_file())? == written?, "the snapshot was written again without etcd");
    }

    // etcd is back with its data: the same leases, and nothing that is there already is written again.
    let logs = scene.sites.clone().map(|site| site.log().len());
    scene.server.restart()?;
    for agent in scene.agents()? {
        wait_until("etcd is followed again", || {
            let status = agent.status()?;
            Ok(status.state == "running"
                || status.problems.iter().all(|why| why.contains("packets that peers take")))
        })
        .with_context(|| agent.site().log_tail())?;
    }
    wait_until("the endpoint of the file has the lease of this run", || {
        let lease = scene.own_endpoint()?;
        Ok(lease != 0 && lease != own_before)
    })?;
    ensure!(records(&scene.server)? == before, "{:?} was {before:?}", records(&scene.server)?);
    ensure!(scene.server.below("/coreos.com/network/vips/")? == vips_before, "the virtual addresses changed");
    for (site, start) in scene.sites.iter().zip(logs) {
        let log = site.log();
        let changed = route_lines(log.get(start..).unwrap_or_default());
        ensure!(changed.is_empty(), "routes were written again: {changed:?}");
        let all = route_lines(&log);
        ensure!(all.len() == 1, "{} routes were written: {all:?}", all.len());
    }
    ping_with_ttl(scene.topology.a.pod().netns, scene.topology.b.pod().address, 60)?;
    scene.add(8083)?;
    scene.operate(&["endpoint", "remove", "shop/web/b/p8081"])?;
    wait_until("services change again", || {
        Ok(scene.ask("web.shop.svc.overlay").is_ok_and(|port| port == 8083))
    })?;
    scene.b.take().context("agent B")?.stop()?;
    scene.a.take().context("agent A")?.stop()
}

/// A host with a snapshot of a run that has ended, and no etcd.
struct Left {
    server: Server,
    site: Arc<Site>,
    topology: Topology,
    /// The subnet that it had.
    subnet: String,
}

impl Left {
    fn build(sandbox: &Arc<Sandbox>) -> Result<Self> {
        let topology = Topology::build(sandbox, Underlay::Virtual, PodOffload::On)?;
        let mut server = Server::start(sandbox, &topology.a.host, topology.a.underlay)?;
        server.write_config(&config(NETWORK))?;
        let site = Site::new(sandbox, &topology.a.host, "agent-a")?;
        let agent = site.start(&arguments(&server, Rung::Tun))?;
        let subnet = agent.status()?.subnet;
        // The end writes what is not written yet.
        agent.stop()?;
        ensure!(site.snapshot_file().exists(), "no snapshot was written");
        server.kill();
        Ok(Self { server, site, topology, subnet })
    }
}

/// The CRC-32 of gzip and Ethernet, bit by bit.
fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32| if crc & 1 == 1 { (crc >> 1) ^ 0xedb8_8320 } else { crc >> 1 };
    !bytes.iter().fold(!0, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), |crc, _| step(crc)))
}

/// The snapshot with another first line, and the checksum that belongs to it.
fn edited(text: &str, edit: impl Fn(&mut serde_json::Value)) -> Result<String> {
    let (header, rest) = text.split_once('\n').context("a first line")?;
    let body_end = rest.trim_end().rfind('\n').map_or(0, |at| at + 1);
    let (records, footer_text) = rest.split_at_checked(body_end).context("a last line")?;
    let mut header: serde_json::Value = serde_json::from_str(header)?;
    edit(&mut header);
    let body = format!("{header}\n{records}");
    let mut footer: serde_json::Value = serde_json::from_str(footer_text)?;
    let was = text.strip_suffix(footer_text).context("the last line is at the end")?;
    ensure!(footer["crc32"] == crc32(was.as_bytes()), "the test knows another checksum");
    footer["crc32"] = crc32(body.as_bytes()).into();
    Ok(format!("{body}{footer}\n"))
}

fn refused(sandbox: &Arc<Sandbox>) -> Result<()> {
    let mut left = Left::build(sandbox)?;
    let text = fs::read_to_string(left.site.snapshot_file())?;
    let now = u64::try_from(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_millis())?;
    let expired = edited(&text, |header| header["own"]["expires"] = (now - 1000).into())?;
    let newer = edited(&text, |header| header["format"] = 2.into())?;
    let mut damaged = text.clone().into_bytes();
    let middle = damaged.len() / 2;
    if let Some(byte) = damaged.get_mut(middle) {
        *byte ^= 1;
    }
    let cases: [(&str, Vec<u8>, &[&str], &str); 6] = [
        ("ovl1", expired.into_bytes(), &[], "its lease of"),
        ("ovl2", newer.into_bytes(), &[], "newer version of the agent (format 2"),
        ("ovl3", damaged, &[], "it is damaged"),
        ("ovl4", text.clone().into_bytes(), &["--etcd-prefix", "/other"], "it is of another network"),
        ("ovl5", text.clone().into_bytes(), &["--public-ip", "192.168.77.77"], "this host has 192.168.77.77"),
        ("ovl6", text.clone().into_bytes(), &["--subnet", "10.244.250.0/24"], "--subnet is 10.244.250.0/24"),
    ];
    let mut agents = Vec::new();
    for (device, snapshot, more, reason) in cases {
        let site = Site::of_device(sandbox, &left.topology.a.host, device, device)?;
        fs::create_dir_all(site.state_directory())?;
        fs::write(site.snapshot_file(), snapshot)?;
        let mut words = arguments(&left.server, Rung::Tun);
        words.extend(more.iter().map(|word| (*word).to_owned()));
        agents.push((site.launch(site.run_command(&words))?, reason));
    }
    thread::sleep(PATIENCE);
    for (agent, reason) in &mut agents {
        ensure!(agent.is_running()?, "it ended: {}", agent.site().log_tail());
        let state = agent.state()?;
        let why = state.problems.join("; ");
        ensure!(state.state == "starting" && why.contains("waiting: cannot reach etcd"), "{state:?}");
        let named = format!("; the snapshot {} is not used: ", agent.site().snapshot_file().display());
        ensure!(why.contains(&named) && why.contains(*reason), "{why}");
        wait_for_log(agent.site(), reason)?;
    }
    // One that waits starts with etcd as ever, and its snapshot is a good one afterwards.
    left.server.restart()?;
    let (mut damaged, _) = agents.remove(2);
    for (other, _) in agents {
        other.stop()?;
    }
    damaged.wait_until_running()?;
    ensure!(damaged.status()?.subnet == left.subnet);
    let site = Arc::clone(damaged.site());
    damaged.stop()?;
    ensure!(
        serde_json::from_str::<serde_json::Value>(
            fs::read_to_string(site.snapshot_file())?.lines().next().context("a line")?
        )
        .is_ok()
    );
    Ok(())
}

fn moved(sandbox: &Arc<Sandbox>) -> Result<()> {
    let mut left = Left::build(sandbox)?;
    let agent = left.site.launch(left.site.run_command(&arguments(&left.server, Rung::Tun)))?;
    wait_until("it starts from its snapshot", || {
        Ok(agent.status().is_ok_and(|status| status.subnet == left.subnet && status.state == "degraded"))
    })
    .with_context(|| left.site.log_tail())?;
    // Where the agent does not see it, another host takes the subnet.
    left.server.restart_elsewhere()?;
    let other = Ipv4Addr::new(192, 168, 77, 50);
    left.server.put_record(&key(&left.subnet), value(other))?;
    left.server.restart_back()?;
    wait_for_log(&left.site, "our subnet is ")?;
    wait_for_route(&agent, &left.subnet, other)?;
    wait_for_state(&agent, "running")
        .or_else(|error| if agent.state()?.lacks_only_nft() { Ok(()) } else { Err(error) })?;
    let subnet = agent.status()?.subnet;
    ensure!(subnet != left.subnet, "it kept the subnet of another host");
    // The next start is from what is true now.
    agent.stop()?;
    let snapshot = fs::read_to_string(left.site.snapshot_file())?;
    ensure!(snapshot.contains(&format!("\"own\":{{\"subnet\":\"{subnet}\"")), "{snapshot}");
    Ok(())
}

fn switched_off(sandbox: &Arc<Sandbox>) -> Result<()> {
    let left = Left::build(sandbox)?;
    let mut words = arguments(&left.server, Rung::Tun);
    words.push("--no-snapshot".to_owned());
    let written = fs::read(left.site.snapshot_file())?;
    let mut agent = left.site.launch(left.site.run_command(&words))?;
    thread::sleep(PATIENCE);
    let state = agent.state()?;
    ensure!(state.state == "starting" && !state.problems.join("").contains("snapshot"), "{state:?}");
    ensure!(agent.is_running()? && fs::read(left.site.snapshot_file())? == written);
    agent.stop()
}
