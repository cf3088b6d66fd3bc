//! The control plane: time until a large network is routed, time until one change is routed, load on etcd, memory.

use std::{
    net::Ipv4Addr,
    path::PathBuf,
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use clap::Args;
use serde::Serialize;

use super::{
    limit::{self, Measured},
    lone_host,
    metrics::{self, Memory, Requests},
    network::{self, Hosts},
    open_json,
    route_map::{self, Observer},
    spread::percentile,
    write_json,
};
use crate::{
    agent::{self, Agent, Site},
    etcd::Etcd,
    progress::Progress,
    sandbox::{Kind, Sandbox},
    topology::UPLINK,
};

/// Examples at the end of `--help`.
const EXAMPLES: &str = "\
Examples:
  cargo xtask bench control                          10,000 leases, 500 changes, a table
  cargo xtask bench control --leases 50000           five times as many leases
  cargo xtask bench control --json /tmp/control.json the results for scripts as well
  cargo xtask bench control --check                  exit code 1 when a limit is missed";

/// Measure the time from leases in etcd to routes in the kernel, and its cost
///
/// Fills a real etcd with leases, starts an agent and watches the kernel's route map: time from the agent's start to all
/// routes, time from a write to etcd to the route of one change, requests to etcd, memory.
#[derive(Clone, Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Options {
    /// Leases of other hosts in etcd
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=50_000))]
    leases: u32,
    /// Changes to measure, one at a time
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    changes: u32,
    /// Write the results to this file as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Exit with 1 when a limit is missed
    #[arg(long)]
    check: bool,
}

/// Measured values.
struct Outcome {
    /// From the start of the process to its first route.
    first_route: Duration,
    /// From the start of the process to all routes.
    all_routes: Duration,
    /// One for each change, in order of size.
    changes: Vec<Duration>,
    memory: Memory,
    requests: Requests,
}

/// The output of `--json`.
#[derive(Serialize)]
struct Report {
    leases: u32,
    initial_list_s: f64,
    change_p50_ms: f64,
    change_p99_ms: f64,
    rss_mb: f64,
    requests_per_lease: f64,
}

pub(super) fn run(options: &Options) -> Result<ExitCode> {
    // A file that cannot be written fails before the measurement.
    let json = options.json.as_deref().map(open_json).transpose()?;
    let agent = agent::binary()?;
    Sandbox::remove_on_signals()?;
    let sandbox = Sandbox::start(Kind::Bench)?;
    let progress = Progress::start();
    progress.line(&format!(
        "one host with an agent on tc, etcd beside it on loopback; agent: {}",
        agent.display()
    ));
    let host = lone_host::build(&sandbox, "host")?;
    let site = Site::new(&sandbox, &host, "agent")?;
    let mut etcd = Etcd::prepare(&sandbox, &host, Ipv4Addr::LOCALHOST)?;
    etcd.restart()?;
    // A thread in the namespace: sockets belong there.
    let outcome = host.run(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(measure(&site, &etcd, options, &progress))
    })??;
    progress.line("removing the host");
    drop((etcd, site, host, sandbox));

    let report = Report::new(options, &outcome);
    let measured = report.measured(&outcome);
    println!("{}", limit::table(&measured));
    if let Some(file) = json {
        write_json(file, &report)?;
    }
    Ok(limit::exit_code(&measured, options.check))
}

async fn measure(site: &Arc<Site>, etcd: &Etcd, options: &Options, progress: &Progress) -> Result<Outcome> {
    let mut hosts = Hosts::connect(&etcd.endpoint()).await?;
    hosts.fill(options.leases).await?;
    progress.line(&format!("etcd holds {} leases ({} requests)", options.leases, hosts.requests));

    let (before, own_requests) = (metrics::requests(&etcd.endpoint())?, hosts.requests);
    let (first, last) = (network::subnet(0), network::subnet(options.leases - 1));
    let started = Instant::now();
    let agent = launch(site, etcd)?;
    let map = route_map::await_map(agent.pid(), first).map_err(|error| with_log(error, &agent))?;
    let first_route = started.elapsed();
    for number in 0..options.leases {
        map.await_peer(network::subnet(number), Some(network::public_ip(number)))?;
    }
    let all_routes = started.elapsed();
    ensure!(map.len()? == options.leases as usize, "the map holds {} routes up to {last}", map.len()?);
    progress.line(&format!("all routes are in the kernel's map after {} s", seconds(all_routes)));

    let observer = Observer::start(map);
    let mut changes = Vec::new();
    for number in 0..options.changes {
        changes.push(change(&mut hosts, &observer, number, options.leases).await?);
    }
    progress.line(&format!("measured {} changes", changes.len()));
    changes.sort_unstable();

    let memory = metrics::memory(agent.pid())?;
    let mut requests = metrics::since(&before, &metrics::requests(&etcd.endpoint())?);
    subtract_own(&mut requests, hosts.requests - own_requests, options.changes)?;
    agent.stop()?;
    Ok(Outcome { first_route, all_routes, changes, memory, requests })
}

fn launch(site: &Arc<Site>, etcd: &Etcd) -> Result<Agent> {
    let endpoint = etcd.endpoint();
    let words = [
        "--store",
        "etcd",
        "--etcd-endpoints",
        &endpoint,
        "--subnet",
        network::OWN_SUBNET,
        "--iface",
        UPLINK,
        "--datapath",
        "tc",
    ];
    site.launch(site.run_command(&words.map(str::to_owned)))
}

fn with_log(error: anyhow::Error, agent: &Agent) -> anyhow::Error {
    error.context(format!("the end of the agent's log:\n{}", agent.site().log_tail()))
}

/// Makes one change and waits for it in the kernel's map. In turn: a new host, a moved host, a removed host.
async fn change(hosts: &mut Hosts, observer: &Observer, number: u32, leases: u32) -> Result<Duration> {
    let (kind, round) = (number % 3, number / 3);
    // The new hosts are removed again; the moved ones are spread over all.
    let new = network::subnet(leases + round);
    let moved = network::subnet(round.wrapping_mul(7919) % leases);
    let address = network::public_ip(network::MOST + round);
    let begun = match kind {
        0 => {
            observer.watch(new, Some(address))?;
            let begun = Instant::now();
            hosts.put(new, address).await?;
            begun
        }
        1 => {
            observer.watch(moved, Some(address))?;
            let begun = Instant::now();
            hosts.put(moved, address).await?;
            begun
        }
        _ => {
            observer.watch(new, None)?;
            let begun = Instant::now();
            hosts.delete(new).await?;
            begun
        }
    };
    Ok(observer.seen()?.saturating_duration_since(begun))
}

/// Takes this program's own requests out of etcd's counters: one for each change.
fn subtract_own(requests: &mut Requests, own: u64, changes: u32) -> Result<()> {
    let deletes = u64::from(changes / 3);
    ensure!(own == u64::from(changes), "{own} requests were made for {changes} changes");
    for (method, own) in [("DeleteRange", deletes), ("Put", own - deletes)] {
        let count = requests.entry(method.to_owned()).or_default();
        ensure!(*count >= own, "etcd counts {count} requests {method}, but {own} were made");
        *count -= own;
    }
    requests.retain(|_, count| *count > 0);
    Ok(())
}

impl Report {
    fn new(options: &Options, outcome: &Outcome) -> Self {
        let milliseconds = |share| round(percentile(&outcome.changes, share).as_secs_f64() * 1000.0, 3);
        let requests: u64 = outcome.requests.values().sum();
        Self {
            leases: options.leases,
            initial_list_s: round(outcome.all_routes.as_secs_f64(), 3),
            change_p50_ms: milliseconds(0.50),
            change_p99_ms: milliseconds(0.99),
            rss_mb: round(outcome.memory.now as f64 / 1e6, 1),
            requests_per_lease: round(requests as f64 / f64::from(options.leases), 5),
        }
    }

    fn measured(&self, outcome: &Outcome) -> Vec<Measured> {
        let by_method: Vec<_> =
            outcome.requests.iter().map(|(method, count)| format!("{count} {method}")).collect();
        let longest = outcome.changes.last().copied().unwrap_or_default();
        vec![
            Measured::new(
                format!("agent's start to {} routes in the kernel", self.leases),
                self.initial_list_s,
                "s",
            )
            .below(2.0),
            Measured::new("  of that until the first route", outcome.first_route.as_secs_f64(), "s"),
            Measured::new(
                format!("write to etcd until in the kernel, median of {}", outcome.changes.len()),
                self.change_p50_ms,
                "ms",
            ),
            Measured::new("  99th percentile", self.change_p99_ms, "ms").below(50.0),
            Measured::new("  longest", longest.as_secs_f64() * 1000.0, "ms"),
            Measured::new("agent's memory (RSS)", self.rss_mb, "MB").below(60.0),
            Measured::new("  at its highest", outcome.memory.peak as f64 / 1e6, "MB"),
            Measured::new(
                format!("requests to etcd per lease ({})", by_method.join(", ")),
                self.requests_per_lease,
                "",
            )
            .below(1.0),
        ]
    }
}

fn round(value: f64, digits: i32) -> f64 {
    let scale = 10f64.powi(digits);
    (value * scale).round() / scale
}

fn seconds(duration: Duration) -> String {
    format!("{:.2}", duration.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_requests_are_not_the_agents() {
        let mut requests =
            Requests::from([("Put".to_owned(), 4), ("DeleteRange".to_owned(), 2), ("Range".to_owned(), 9)]);
        subtract_own(&mut requests, 6, 6).unwrap();
        assert_eq!(requests, Requests::from([("Range".to_owned(), 9)]));
        assert!(subtract_own(&mut requests, 6, 6).is_err());
    }
}
