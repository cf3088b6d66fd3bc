//! The part DNS: the node's server beside others with the same records.
//!
//! All servers are on one host, each at an address of its own, on one CPU; the client is on the same host, on another CPU. Throughput is
//! measured with a fixed number of queries in flight. The 99th percentile is one of latency at a fixed rate that is far from the limit
//! of each server ([`client::RATE`]): at the limit, it would be the length of the queue.

mod client;
mod peer;

use std::{net::Ipv4Addr, sync::Arc};

use anyhow::{Context, Result};
use serde::Serialize;

use self::{client::Queries, peer::Peer};
use super::{
    bars::{Bar, digits},
    scene::{self, Scene},
};
use crate::{
    bench::spread::Spread,
    cpu::{self, Pinned},
    progress::Progress,
    sandbox::Sandbox,
    table::{Row, render},
};

/// The results of the part: of our server, and of the peer that answers most.
#[derive(Debug, Serialize)]
pub(super) struct Results {
    qps: f64,
    vs_peer: f64,
    p99_vs_peer: f64,
    peer: &'static str,
    vs_peer_min: f64,
    vs_peer_max: f64,
    p99_us: f64,
    p99_vs_peer_min: f64,
    p99_vs_peer_max: f64,
    /// Queries per second at which latency is measured.
    p99_rate: u32,
    peers: Vec<PeerResults>,
}

/// The results of one peer.
#[derive(Debug, Serialize)]
struct PeerResults {
    name: &'static str,
    qps: f64,
    p99_us: f64,
}

/// One server.
struct Server {
    name: &'static str,
    address: Ipv4Addr,
    qps: Vec<f64>,
    p99: Vec<f64>,
}

/// Measures all rounds.
pub(super) fn measure(
    sandbox: &Arc<Sandbox>,
    scene: &Scene,
    rounds: u32,
    progress: &Progress,
) -> Result<Results> {
    let host = &scene.topology.a.host;
    let records: Vec<_> = (0..scene::NAMES).map(scene::name).collect();
    let peers = Peer::start_all(sandbox, host, &records)?;
    let far = cpu::last()?;
    let mut pins = vec![Pinned::new(scene.agent.pid(), &far)?];
    let mut servers = vec![Server::new("overlay-agent", scene::DNS)];
    for peer in &peers {
        pins.push(Pinned::new(peer.pid(), &far)?);
        servers.push(Server::new(peer.name(), peer.address()));
    }
    let queries = Queries::new(&records);
    // The first round warms up.
    for number in 0..=rounds {
        let count = servers.len();
        for place in 0..count {
            let Some(server) = servers.get_mut((place + number as usize) % count) else { continue };
            let (qps, p99) = host
                .run(|| {
                    cpu::stay_on(&cpu::first()?)?;
                    anyhow::Ok((queries.throughput(server.address)?, queries.latency(server.address)?))
                })?
                .with_context(|| format!("ask {} at {}", server.name, server.address))?;
            if number > 0 {
                server.qps.push(qps);
                server.p99.push(p99);
            }
        }
    }
    progress.line(&format!("DNS: {} servers in {rounds} rounds", servers.len()));
    drop((pins, peers));
    Results::new(&servers)
}

impl Server {
    fn new(name: &'static str, address: Ipv4Addr) -> Self {
        Self { name, address, qps: Vec::new(), p99: Vec::new() }
    }

    fn medians(&self) -> Option<PeerResults> {
        let median = |values: &Vec<f64>| Some(Spread::of(values.clone())?.median);
        Some(PeerResults { name: self.name, qps: median(&self.qps)?, p99_us: median(&self.p99)? })
    }
}

/// The ratios of each round.
fn ratios(ours: &[f64], theirs: &[f64]) -> Result<Spread> {
    let ratios = ours.iter().zip(theirs).map(|(ours, theirs)| ours / theirs);
    Spread::of(ratios.collect()).context("there was no round")
}

impl Results {
    /// The first server is ours.
    fn new(servers: &[Server]) -> Result<Self> {
        let (ours, others) = servers.split_first().context("no server was measured")?;
        let own = ours.medians().context("there was no round")?;
        let by_qps = |server: &&Server| server.medians().map_or(0, |medians| medians.qps as u64);
        let best = others.iter().max_by_key(by_qps).context("there is no other DNS server")?;
        let (qps, p99) = (ratios(&ours.qps, &best.qps)?, ratios(&ours.p99, &best.p99)?);
        Ok(Self {
            qps: own.qps,
            vs_peer: qps.median,
            p99_vs_peer: p99.median,
            peer: best.name,
            vs_peer_min: qps.min,
            vs_peer_max: qps.max,
            p99_us: own.p99_us,
            p99_vs_peer_min: p99.min,
            p99_vs_peer_max: p99.max,
            p99_rate: client::RATE,
            peers: others.iter().filter_map(Server::medians).collect(),
        })
    }

    /// The results beside their bars.
    pub(super) fn bars(&self) -> Vec<Bar> {
        let qps = Spread { median: self.vs_peer, min: self.vs_peer_min, max: self.vs_peer_max };
        let p99 = Spread { median: self.p99_vs_peer, min: self.p99_vs_peer_min, max: self.p99_vs_peer_max };
        vec![
            Bar::at_least(format!("DNS queries/s / {}", self.peer), qps, 0.8),
            Bar::at_most(format!("DNS p99 / {}", self.peer), p99, 2.0),
        ]
    }

    /// The table of medians.
    pub(super) fn table(&self) -> String {
        let own = PeerResults { name: "overlay-agent", qps: self.qps, p99_us: self.p99_us };
        let row = |server: &PeerResults| Row {
            cells: vec![server.name.to_owned(), digits(server.qps), digits(server.p99_us)],
        };
        let rows: Vec<Row> = std::iter::once(&own).chain(&self.peers).map(row).collect();
        let title = format!("p99 us\nat {}/s", client::RATE);
        render(&["DNS", "queries/s", &title], &rows)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peer_is_the_one_that_answers_most() {
        let server = |name, qps: [f64; 2], p99: [f64; 2]| Server {
            qps: qps.into(),
            p99: p99.into(),
            ..Server::new(name, Ipv4Addr::LOCALHOST)
        };
        let servers = [
            server("overlay-agent", [100.0, 50.0], [20.0, 40.0]),
            server("slow", [10.0, 5.0], [500.0, 500.0]),
            server("fast", [200.0, 100.0], [10.0, 20.0]),
        ];
        let results = serde_json::to_value(Results::new(&servers).unwrap()).unwrap();
        assert_eq!(results["peer"], "fast");
        assert_eq!((&results["vs_peer"], &results["p99_vs_peer"]), (&0.5.into(), &2.0.into()));
        assert_eq!((&results["qps"], &results["peers"][0]["name"]), (&75.0.into(), &"slow".into()));
        assert!(Results::new(&servers[..1]).is_err());
    }
}
