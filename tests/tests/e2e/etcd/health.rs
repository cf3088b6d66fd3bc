//! Reports of the agent: over `/healthz`, to systemd, and to the store when the host's address changes.

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    os::unix::net::UnixDatagram,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use overlay_tests::{
    agent::{Rung, Site},
    netns::Netns,
    sandbox::Sandbox,
    topology::{NETWORK, OVERLAY_MTU, PodOffload, Topology, UPLINK, Underlay},
    traffic::{ping::ping_with_ttl, udp::every_size},
};

use super::{Fixture, arguments, config, key, server::Server, value};
use crate::{machine::Need, matrix::needs, suite::Suite, wait::wait_until};

pub(crate) const HEALTHZ: u16 = 8471;

pub(crate) fn register(suite: &mut Suite) {
    suite.add("etcd::health_endpoints_follow_the_agents_state", &[Need::Tun], health);
    suite.add("etcd::systemd_is_notified_of_start_state_and_stop", &[Need::Tun], systemd);
    suite.add("etcd::lease_follows_the_hosts_address", needs(Rung::Tc, Rung::Tc), follows_address);
}

/// Status code and body of an answer over HTTP.
pub(crate) fn get(netns: &Netns, path: &str) -> Result<(u16, String)> {
    netns.run(|| {
        let mut stream = TcpStream::connect(SocketAddr::from((Ipv4Addr::LOCALHOST, HEALTHZ)))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        stream.write_all(format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n").as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").context("an answer without a body")?;
        let code = head.split(' ').nth(1).context("an answer without a code")?;
        Ok((code.parse()?, body.trim_end().to_owned()))
    })?
}

fn health(sandbox: &Arc<Sandbox>) -> Result<()> {
    let topology = Topology::build(sandbox, Underlay::Virtual, PodOffload::On)?;
    let host = &topology.a.host;
    let mut server = Server::prepare(sandbox, &topology.b.host, topology.b.underlay)?;
    let site = Site::new(sandbox, host, "agent-a")?;
    let mut arguments = arguments(&server, Rung::Tun);
    arguments.extend(["--healthz-ip=127.0.0.1".to_owned(), format!("--healthz-port={HEALTHZ}")]);
    let mut agent = site.launch(site.run_command(&arguments))?;
    let expect = |code: (u16, u16), words: &str| {
        wait_until(&format!("/healthz and /readyz answer {code:?} with `{words}`"), || {
            let Ok((health, ready)) =
                get(host, "/healthz").and_then(|health| Ok((health, get(host, "/readyz")?)))
            else {
                return Ok(false);
            };
            Ok((health.0, ready.0) == code && health.1.contains(words) && ready.1.contains(words))
        })
        .with_context(|| format!("they say {:?} and {:?}", get(host, "/healthz"), get(host, "/readyz")))
    };
    expect((200, 503), "waiting: ")?;
    ensure!(!site.subnet_file().exists(), "there is a subnet.env before there is a subnet");
    server.restart()?;
    expect((200, 503), "there is no network config yet at /coreos.com/network/config")?;
    server.write_config(&config(NETWORK))?;
    expect((200, 200), "ok")?;
    agent.wait_until_running()?;
    ensure!(site.subnet_file().exists(), "it is ready, and there is no subnet.env");

    server.kill();
    expect((200, 200), "degraded: ")?;
    server.restart()?;
    expect((200, 200), "ok")?;

    // Peers are out of reach.
    host.tool(&format!("ip address delete {}/24 dev {UPLINK}", topology.a.underlay))?;
    expect((503, 503), "unhealthy: the device eth0 has no IPv4 address")?;
    host.tool(&format!("ip address add {}/24 dev {UPLINK}", topology.a.underlay))?;
    expect((200, 200), "ok")?;
    agent.stop()
}

fn systemd(sandbox: &Arc<Sandbox>) -> Result<()> {
    let topology = Topology::build(sandbox, Underlay::Virtual, PodOffload::On)?;
    let mut server = Server::prepare(sandbox, &topology.b.host, topology.b.underlay)?;
    let site = Site::new(sandbox, &topology.a.host, "agent-a")?;
    let path = sandbox.new_directory("systemd")?.join("notify");
    let socket = UnixDatagram::bind(&path).context("listen as systemd does")?;
    socket.set_read_timeout(Some(Duration::from_secs(20)))?;
    let mut command = site.run_command(&arguments(&server, Rung::Tun));
    command.env("NOTIFY_SOCKET", &path).env("WATCHDOG_USEC", "1000000").env_remove("WATCHDOG_PID");
    let mut agent = site.launch(command)?;
    let expect = |words: &str| -> Result<String> {
        let mut buffer = [0; 1024];
        loop {
            let length =
                socket.recv(&mut buffer).with_context(|| format!("systemd is not notified of `{words}`"))?;
            let text = String::from_utf8_lossy(buffer.get(..length).unwrap_or_default()).into_owned();
            ensure!(words == "READY=1" || !text.contains("READY=1"), "ready too early: {text}");
            if text.contains(words) {
                return Ok(text);
            }
        }
    };
    expect("STATUS=not ready: waiting: ")?;
    expect("EXTEND_TIMEOUT_USEC=")?;
    server.restart()?;
    server.write_config(&config(NETWORK))?;
    let ready = expect("READY=1")?;
    ensure!(ready.contains("STATUS=ok"), "{ready}");
    agent.wait_until_running()?;
    expect("WATCHDOG=1")?;
    server.kill();
    expect("STATUS=degraded: ")?;
    expect("WATCHDOG=1")?;
    agent.stop()?;
    expect("STOPPING=1").map(drop)
}

fn follows_address(sandbox: &Arc<Sandbox>) -> Result<()> {
    let fixture = Fixture::start(sandbox, Rung::Tc, Rung::Tc)?;
    let b = &fixture.topology.b;
    let moved = Ipv4Addr::new(192, 168, 77, 12);
    let before = fixture.server.record(&key(b.subnet))?.context("B has no record")?;
    b.host.tool(&format!("ip address delete {}/24 dev {UPLINK}", b.underlay))?;
    b.host.tool(&format!("ip address add {moved}/24 dev {UPLINK}"))?;
    super::wait_for_route(&fixture.a, b.subnet, moved)?;
    let after = fixture.server.record(&key(b.subnet))?.context("B's record is gone")?;
    ensure!(after.value == value(moved) && after.lease == before.lease, "{before:?} became {after:?}");
    let (from, to) = fixture.topology.pods();
    wait_until("containers reach each other", || Ok(ping_with_ttl(from.netns, to.address, 60).is_ok()))?;
    every_size(from, to, OVERLAY_MTU)?;
    wait_until("B runs", || Ok(fixture.b.status()?.state == "running"))?;
    ensure!(fixture.b.status()?.public_ip == moved, "{:?}", fixture.b.status()?);
    fixture.stop().map(drop)
}
