//! Agents on a real etcd that runs on host A: they find each other through it, and outlive it.

use std::{
    fs::File,
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use overlay_agent::{
    lease,
    store::etcd::{EtcdOptions, EtcdStore},
};
use overlay_tests::{
    agent::{Agent, Rung, Site},
    netns::Netns,
    session::Session,
    topology::{NETWORK, OVERLAY_MTU, PodOffload, Side, Topology, UPLINK, Underlay},
    traffic::{
        ping::ping_with_ttl,
        udp::{every_size, is_answered, with_echo},
    },
};

use crate::{matrix::needs, suite::Suite};

const ENDPOINT: &str = "http://192.168.77.1:2379";

pub(crate) fn register(suite: &mut Suite) {
    let tc = needs(Rung::Tc, Rung::Tun);
    suite.add("etcd::hosts_find_each_other_and_outlive_etcd", tc, hosts_outlive_etcd);
    suite.add("etcd::agent_waits_for_etcd_and_for_the_config", tc, agent_waits);
}

/// etcd in a host's namespace; it ends when this is dropped.
struct Server {
    host: Arc<Netns>,
    directory: PathBuf,
    child: Child,
}

impl Server {
    fn start(host: &Arc<Netns>, directory: PathBuf) -> Result<Self> {
        let log = File::create(directory.join("log")).context("create etcd's log")?;
        let mut command = Command::new("etcd");
        command.arg("--data-dir").arg(directory.join("data"));
        command.args(["--listen-client-urls", ENDPOINT, "--advertise-client-urls", ENDPOINT]);
        command.args(["--listen-peer-urls", "http://127.0.0.1:2380"]);
        command.stdin(Stdio::null()).stdout(log.try_clone().context("share the log")?).stderr(log);
        let child = host.spawn(&mut command)?;
        Ok(Self { host: Arc::clone(host), directory, child })
    }

    /// Kills it and starts it again on the same data after `pause`.
    fn restart(mut self, pause: impl FnOnce() -> Result<()>) -> Result<Self> {
        self.child.kill().context("kill etcd")?;
        self.child.wait().context("wait for etcd")?;
        let paused = pause();
        let again = Self::start(&self.host, self.directory.clone())?;
        paused.map(|()| again)
    }

    /// Does something with a client of our own in the host's namespace.
    fn with_store<T: Send>(&self, work: impl AsyncFnOnce(EtcdStore) -> Result<T> + Send) -> Result<T> {
        self.host.run(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                let options = EtcdOptions { endpoints: vec![ENDPOINT.to_owned()], ..EtcdOptions::default() };
                let deadline = Instant::now() + Duration::from_secs(10);
                loop {
                    match EtcdStore::connect(options.clone()).await {
                        Ok(store) => return work(store).await,
                        Err(error) if Instant::now() > deadline => bail!("etcd does not start: {error}"),
                        Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
                    }
                }
            })
        })?
    }

    fn write_config(&self) -> Result<()> {
        let config = format!(r#"{{"Network":"{NETWORK}","Backend":{{"Type":"udp"}}}}"#);
        self.with_store(async |store| Ok(store.set_config(&config).await.map(drop)?))
    }

    /// The subnet's record, if there is one.
    fn record(&self, subnet: &'static str) -> Result<Option<String>> {
        let subnet = subnet.parse()?;
        self.with_store(async |store| {
            let listed =
                store.leases().await?.into_iter().find(|listed| listed.record.key == lease::key(subnet));
            Ok(listed.map(|listed| String::from_utf8_lossy(&listed.record.value).into_owned()))
        })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Gone already is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn arguments(side: &Side, rung: Rung) -> Vec<String> {
    let words = [
        "--store",
        "etcd",
        "--etcd-endpoints",
        ENDPOINT,
        "--subnet",
        side.subnet,
        "--iface",
        UPLINK,
        "--datapath",
        rung.name(),
    ];
    words.map(str::to_owned).into()
}

fn start(session: &Session, side: &Side, rung: Rung) -> Result<Agent> {
    Site::new(session, &side.host, &format!("agent-{}", side.name))?.start(&arguments(side, rung))
}

fn wait_until(what: &str, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !done()? {
        ensure!(Instant::now() < deadline, "not so after 20 seconds: {what}");
        thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

fn hosts_outlive_etcd(session: &Arc<Session>) -> Result<()> {
    let topology = Topology::build(session, Underlay::Virtual, PodOffload::On)?;
    let server = Server::start(&topology.a.host, session.new_directory("etcd")?)?;
    server.write_config()?;
    let a = start(session, &topology.a, Rung::Tc)?;
    let b = start(session, &topology.b, Rung::Tun)?;
    a.wait_for_routes("a route to B", |routes| {
        routes.routes.iter().any(|route| route.subnet == topology.b.subnet)
    })?;
    let (from, to) = topology.pods();
    ping_with_ttl(from.netns, to.address, 60)?;
    every_size(from, to, OVERLAY_MTU)?;
    ensure!(
        server.record(topology.b.subnet)?.as_deref()
            == Some(r#"{"PublicIP":"192.168.77.2","PublicIPv6":null}"#),
        "B's record is not what flannel writes: {:?}",
        server.record(topology.b.subnet)?
    );

    // etcd is away under traffic: nothing is lost, nothing is forgotten, and status says so.
    let server = server.restart(|| {
        with_echo(from, to, |socket| {
            for index in 0..300 {
                ensure!(
                    is_answered(socket, index, Duration::from_millis(500))?,
                    "packet {index} was lost while etcd was away"
                );
                thread::sleep(Duration::from_millis(10));
            }
            Ok(())
        })?;
        wait_until("status says that etcd is away", || Ok(a.status()?.state == "degraded"))?;
        ensure!(a.routes()?.routes.len() == 1, "a route went with etcd");
        Ok(())
    })?;
    wait_until("status is well again", || Ok(a.status()?.state == "running"))?;

    // Our record is removed under us: it comes back.
    let subnet = topology.a.subnet.parse()?;
    server.with_store(async |store| {
        let listed = store.leases().await?.into_iter().find(|listed| listed.record.key == lease::key(subnet));
        ensure!(store.remove(&listed.context("A has no record")?).await?, "A's record changed meanwhile");
        Ok(())
    })?;
    wait_until("A's record is back", || Ok(server.record(topology.a.subnet)?.is_some()))?;
    b.wait_for_routes("B still routes to A", |routes| {
        routes.routes.iter().any(|route| route.subnet == topology.a.subnet)
    })?;
    ping_with_ttl(from.netns, to.address, 60)?;

    a.stop()?;
    b.stop()?;
    ensure!(server.record(topology.a.subnet)?.is_some(), "a normal end gave the subnet away");
    Ok(())
}

fn agent_waits(session: &Arc<Session>) -> Result<()> {
    let topology = Topology::build(session, Underlay::Virtual, PodOffload::On)?;
    let directory = session.new_directory("etcd")?;
    let host = Arc::clone(&topology.a.host);
    let late = thread::spawn(move || -> Result<Server> {
        thread::sleep(Duration::from_secs(2));
        let server = Server::start(&host, directory)?;
        thread::sleep(Duration::from_secs(2));
        server.write_config()?;
        Ok(server)
    });
    let began = Instant::now();
    let agent = start(session, &topology.a, Rung::Tun);
    let server = late.join().map_err(|_| anyhow::anyhow!("the thread that starts etcd panicked"))??;
    let agent = agent?;
    ensure!(began.elapsed() > Duration::from_secs(4), "the agent ran before there was a config");
    ensure!(server.record(topology.a.subnet)?.is_some(), "the agent runs without a record");
    agent.stop()
}
