//! One row of the demo: a topology, its datapath, its checks and measurements.

use std::sync::Arc;

use anyhow::{Context, Error, Result};

use crate::{
    agent::Rung,
    comparison::Comparison,
    demo::rates::Rates,
    pair::{Pair, check_counters},
    report::Counters,
    sandbox::Sandbox,
    topology::{PodOffload, Topology, Underlay},
    verify::{CHECKS, Check, Plan},
};

/// Limit of bytes of a TCP transfer over routing or VXLAN, which the demo does not have to prove.
const COMPARISON_BYTES: u64 = 16 << 20;

/// The connection between the hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Connection {
    /// Without the agent.
    Comparison(Comparison),
    /// With an agent on host A and one on host B, on these rungs.
    Overlay(Rung, Rung),
}

#[derive(Debug)]
enum Network {
    Comparison(Topology),
    Overlay(Box<Pair>),
}

/// A topology, connected one way.
#[derive(Debug)]
pub struct Lane {
    connection: Connection,
    plan: Plan,
    network: Option<Network>,
    passed: usize,
    failures: Vec<String>,
    rates: Vec<Rates>,
    counters: Option<[Counters; 2]>,
}

impl Lane {
    /// A lane that is not connected yet.
    pub fn new(connection: Connection, tcp_bytes: u64) -> Self {
        let plan = match connection {
            Connection::Comparison(comparison) => {
                Plan::plain(comparison.mtu(), tcp_bytes.min(COMPARISON_BYTES))
            }
            Connection::Overlay(..) => Plan::overlay(tcp_bytes),
        };
        Self {
            connection,
            plan,
            network: None,
            passed: 0,
            failures: Vec::new(),
            rates: Vec::new(),
            counters: None,
        }
    }

    /// Its connection.
    pub const fn connection(&self) -> Connection {
        self.connection
    }

    /// The name of its row.
    pub fn name(&self) -> String {
        match self.connection {
            Connection::Comparison(comparison) => comparison.name().to_owned(),
            Connection::Overlay(a, b) => format!("{}/{}", a.name(), b.name()),
        }
    }

    /// Builds the topology and connects it. Returns a short description.
    pub fn connect(&mut self, sandbox: &Arc<Sandbox>, underlay: Underlay) -> Result<String> {
        let topology = Topology::build(sandbox, underlay, PodOffload::On)?;
        match self.connection {
            Connection::Comparison(comparison) => {
                comparison.install(&topology)?;
                self.network = Some(Network::Comparison(topology));
                Ok(format!("MTU {}", self.plan.mtu))
            }
            Connection::Overlay(a, b) => {
                let pair = Pair::start(sandbox, topology, a, b)?;
                let [first, second] = [pair.a.status()?, pair.b.status()?];
                self.network = Some(Network::Overlay(Box::new(pair)));
                let rungs = |status: &crate::report::Status| {
                    format!("in {}, out {}", status.ingress.rung, status.egress.rung)
                };
                Ok(format!("A: {}; B: {}", rungs(&first), rungs(&second)))
            }
        }
    }

    /// The topology, once connected.
    pub fn topology(&self) -> Option<&Topology> {
        match self.network.as_ref()? {
            Network::Comparison(topology) => Some(topology),
            Network::Overlay(pair) => Some(&pair.topology),
        }
    }

    /// Runs one check.
    pub fn check(&mut self, check: &Check) -> Result<String> {
        let topology = self.topology().context("the lane is not connected")?;
        let seen = check.run(topology, &self.plan)?;
        self.passed += 1;
        Ok(seen)
    }

    /// Reads the agents' counters of the verified traffic, and checks them; `None` where there are no agents.
    pub fn read_counters(&mut self) -> Result<Option<String>> {
        let (Some(Network::Overlay(pair)), Connection::Overlay(a, b)) = (&self.network, self.connection)
        else {
            return Ok(None);
        };
        let counters = pair.counters()?;
        let [first, second] = &counters;
        let checked = check_counters(first, a, b, "A").and_then(|()| check_counters(second, b, a, "B"));
        self.counters = Some(counters);
        checked?;
        Ok(Some(format!("{} packets fast, {} slow", self.fast().unwrap_or(0), self.slow().unwrap_or(0))))
    }

    /// Records a failure.
    pub fn fail(&mut self, step: &str, error: &Error) {
        self.failures.push(format!("{step}: {error:#}"));
    }

    /// Records a measurement.
    pub fn add_rates(&mut self, rates: Rates) {
        self.rates.push(rates);
    }

    /// The median of what was measured.
    pub fn rates(&self) -> Option<Rates> {
        Rates::median(&self.rates)
    }

    /// Failures, each with the lane's name.
    pub fn failures(&self) -> Vec<String> {
        self.failures.iter().map(|failure| format!("{}: {failure}", self.name())).collect()
    }

    /// Passed checks of all checks.
    pub fn verified(&self) -> String {
        if self.network.is_none() && self.failures.is_empty() {
            return "not here".to_owned();
        }
        let word = if self.failures.is_empty() { "ok" } else { "FAILED" };
        format!("{word} {}/{}", self.passed, CHECKS.len())
    }

    /// Packets that eBPF carried on both hosts.
    pub fn fast(&self) -> Option<u64> {
        self.sum(|counters| counters.traffic.fast())
    }

    /// Packets that the agents carried.
    pub fn slow(&self) -> Option<u64> {
        self.sum(|counters| counters.traffic.slow())
    }

    /// Packets dropped for a reason that means an error.
    pub fn drops(&self) -> Option<u64> {
        self.sum(|counters| counters.wrong_drops().values().sum())
    }

    fn sum(&self, value: impl Fn(&Counters) -> u64) -> Option<u64> {
        self.counters.as_ref().map(|both| both.iter().map(value).sum())
    }
}
