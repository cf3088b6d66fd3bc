//! The part scale: an agent with very many services in a real etcd.
//!
//! Time until the kernel's maps are filled, time from a change in etcd until the map has it, memory, and what connecting costs beside an
//! agent with one service.

mod map;
mod records;

use std::{
    net::{Ipv4Addr, SocketAddrV4, UdpSocket},
    panic::resume_unwind,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use self::{
    map::ServiceMap,
    records::{ENDPOINTS_EACH, Writer},
};
use super::{
    bars::{Bar, digits},
    options::Options,
    scene::await_services,
};
use crate::{
    agent::{Agent, Site},
    bench::{
        lone_host, metrics,
        spread::{Spread, percentile},
    },
    cgroup::Cgroup,
    cpu,
    etcd::Etcd,
    netns::Netns,
    pair::Store,
    progress::Progress,
    sandbox::Sandbox,
    table::{Row, render},
    topology::UPLINK,
};

/// How long connecting is measured in each round.
const CONNECTING: Duration = Duration::from_millis(150);
/// Rounds of connecting.
const ROUNDS: usize = 8;

/// The results of the part.
#[derive(Debug, Serialize)]
pub(super) struct Results {
    services: u32,
    endpoints: u32,
    /// From the start of the agent until its status has all services, which is after its maps were written.
    load_s: f64,
    changes: usize,
    update_p50_ms: f64,
    update_p99_ms: f64,
    update_max_ms: f64,
    rss_mb: f64,
    rss_peak_mb: f64,
    /// Of one call of `connect` on a UDP socket, over many services.
    connect_ns: f64,
    /// The same with one service.
    connect_one_ns: f64,
    connect_vs_one: f64,
}

/// One agent with its programs' cgroup.
struct Host {
    agent: Agent,
    netns: Arc<Netns>,
    // Behind the agent.
    cgroup: Cgroup,
}

/// Measures all.
pub(super) fn measure(sandbox: &Arc<Sandbox>, options: &Options, progress: &Progress) -> Result<Results> {
    let netns = lone_host::build(sandbox, "many")?;
    let mut etcd = Etcd::prepare(sandbox, &netns, Ipv4Addr::LOCALHOST)?;
    etcd.restart()?;
    let endpoint = etcd.endpoint();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    // In the namespace: the client's socket belongs there, and is opened again when it was closed.
    let many = netns.run(|| {
        let mut writer = runtime.block_on(Writer::connect(&endpoint))?;
        runtime.block_on(writer.fill(options.services))?;
        let endpoints = options.services * ENDPOINTS_EACH;
        progress.line(&format!("scale: etcd holds {} services, {endpoints} endpoints", options.services));

        let cgroup = Cgroup::create("many")?;
        let started = Instant::now();
        let store = ["--store", "etcd", "--etcd-endpoints", &endpoint, "--subnet", records::OWN_SUBNET];
        let agent = start(sandbox, &netns, &cgroup, &store)?;
        await_services(&agent, options.services as usize, endpoints as usize)?;
        let load = started.elapsed();
        let map =
            ServiceMap::find(agent.pid(), records::key(0))?.context("the agent has no map of services")?;
        let ports = map.len()?;
        ensure!(ports == records::virtual_ports(options.services), "the kernel has {ports} virtual ports");
        progress
            .line(&format!("scale: all services are in the kernel's maps after {:.2} s", load.as_secs_f64()));

        let mut changes = Vec::new();
        for number in 0..options.changes {
            changes.push(change(&runtime, &mut writer, &map, number, options.services)?);
        }
        progress.line(&format!("scale: measured {} changes", changes.len()));
        let memory = metrics::memory(agent.pid())?;
        Ok::<_, anyhow::Error>((Host { agent, netns: Arc::clone(&netns), cgroup }, load, changes, memory))
    })?;
    let (many, load, mut changes, memory) = many?;
    changes.sort_unstable();

    let one = one(sandbox)?;
    let (connect, connect_one, ratio) = connecting(&many, &one, options.services)?;
    progress.line("scale: measured connecting beside an agent with one service");
    let milliseconds = |share| percentile(&changes, share).as_secs_f64() * 1e3;
    Ok(Results {
        services: options.services,
        endpoints: options.services * ENDPOINTS_EACH,
        load_s: load.as_secs_f64(),
        changes: changes.len(),
        update_p50_ms: milliseconds(0.50),
        update_p99_ms: milliseconds(0.99),
        update_max_ms: milliseconds(1.0),
        rss_mb: memory.now as f64 / 1e6,
        rss_peak_mb: memory.peak as f64 / 1e6,
        connect_ns: connect,
        connect_one_ns: connect_one,
        connect_vs_one: ratio,
    })
}

fn start(sandbox: &Sandbox, netns: &Arc<Netns>, cgroup: &Cgroup, store: &[&str]) -> Result<Agent> {
    let path = cgroup.path().display().to_string();
    let more = ["--iface", UPLINK, "--datapath", "tc", "--lb", "ebpf", "--service-cgroup", &path];
    let arguments: Vec<String> = store.iter().chain(&more).map(|word| (*word).to_owned()).collect();
    Site::new(sandbox, netns, "agent-services")?.start(&arguments)
}

/// Adds or removes one endpoint in etcd, and waits until the kernel's map has it.
fn change(
    runtime: &tokio::runtime::Runtime,
    writer: &mut Writer,
    map: &ServiceMap,
    number: u32,
    services: u32,
) -> Result<Duration> {
    // All over the services; each endpoint that is added is removed by the next change.
    let (service, adds) = ((number / 2).wrapping_mul(7919) % services, number.is_multiple_of(2));
    let key = records::key(service);
    let address = records::added(number / 2);
    thread::scope(|scope| {
        // Polls meanwhile: a change may be in the map before etcd's answer is here.
        let observer = scope.spawn(|| map.await_endpoint(key, address, adds));
        let begun = Instant::now();
        let written = runtime.block_on(async {
            match adds {
                true => writer.add(service, number / 2).await,
                false => writer.remove(service, number / 2).await,
            }
        });
        let seen = observer.join().unwrap_or_else(|panic| resume_unwind(panic));
        written?;
        Ok(seen?.saturating_duration_since(begun))
    })
}

/// An agent with one service, on a directory.
fn one(sandbox: &Arc<Sandbox>) -> Result<Host> {
    let netns = lone_host::build(sandbox, "one")?;
    let store = Store::create(sandbox)?;
    store.write("config", records::CONFIG)?;
    for (key, value) in records::of_service(0) {
        store.write(&key, &value)?;
    }
    let cgroup = Cgroup::create("one")?;
    let directory = format!("dir:{}", store.directory().display());
    let agent = start(sandbox, &netns, &cgroup, &["--store", &directory, "--subnet", records::OWN_SUBNET])?;
    await_services(&agent, 1, ENDPOINTS_EACH as usize)?;
    Ok(Host { agent, netns, cgroup })
}

/// Nanoseconds of connecting with many services and with one, and their ratio: medians of the rounds.
fn connecting(many: &Host, one: &Host, services: u32) -> Result<(f64, f64, f64)> {
    let all: Vec<_> =
        (0..services).filter(|number| records::has_udp(*number)).map(records::udp_address).collect();
    let (mut of_many, mut of_one, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..=ROUNDS {
        let first = [records::udp_address(0)];
        let (a, b) = match round % 2 {
            0 => (connect(many, &all)?, connect(one, &first)?),
            _ => {
                let b = connect(one, &first)?;
                (connect(many, &all)?, b)
            }
        };
        // The first round warms up.
        if round > 0 {
            of_many.push(a);
            of_one.push(b);
            ratios.push(a / b);
        }
    }
    let median = |values| Spread::of(values).map(|spread| spread.median).context("there was no round");
    Ok((median(of_many)?, median(of_one)?, median(ratios)?))
}

/// Connects a UDP socket to these addresses in turn; no packet is sent. Returns nanoseconds for each time.
fn connect(host: &Host, to: &[SocketAddrV4]) -> Result<f64> {
    ensure!(host.agent.pid() > 0 && !to.is_empty(), "there is no service");
    host.cgroup.join()?;
    let connected = host.netns.run(|| {
        cpu::stay_on(&cpu::first()?)?;
        let socket = UdpSocket::bind("0.0.0.0:0").context("bind")?;
        let start = Instant::now();
        let mut count: u32 = 0;
        while start.elapsed() < CONNECTING {
            for address in to {
                socket.connect(address).with_context(|| format!("connect to {address}"))?;
                count += 1;
            }
        }
        Ok::<_, anyhow::Error>(start.elapsed().as_secs_f64() * 1e9 / f64::from(count))
    })?;
    host.cgroup.leave()?;
    connected
}

impl Results {
    /// The results beside their bars.
    pub(super) fn bars(&self) -> Vec<Bar> {
        let what = format!("{} services, {} endpoints", self.services, self.endpoints);
        vec![
            Bar::below(format!("{what}: load"), self.load_s, 5.0, "s"),
            Bar::below("  one change, p99", self.update_p99_ms, 50.0, "ms"),
            Bar::below("  agent's memory (RSS)", self.rss_mb, 200.0, "MB"),
        ]
    }

    /// The table of values.
    pub(super) fn table(&self) -> String {
        let row = |what: String, value: f64, unit: &str| Row {
            cells: vec![what, format!("{} {unit}", digits(value))],
        };
        let rows = [
            row("agent's start until all are in the kernel's maps".to_owned(), self.load_s, "s"),
            row(
                format!("change in etcd until in the map, median of {}", self.changes),
                self.update_p50_ms,
                "ms",
            ),
            row("  99th percentile".to_owned(), self.update_p99_ms, "ms"),
            row("  longest".to_owned(), self.update_max_ms, "ms"),
            row("agent's memory (RSS)".to_owned(), self.rss_mb, "MB"),
            row("  at its highest".to_owned(), self.rss_peak_mb, "MB"),
            row("connect() by eBPF".to_owned(), self.connect_ns, "ns"),
            row("  with one service".to_owned(), self.connect_one_ns, "ns"),
            row("  ratio".to_owned(), self.connect_vs_one, "x"),
        ];
        render(&[&format!("{} services, {} endpoints", self.services, self.endpoints), "result"], &rows)
    }
}
