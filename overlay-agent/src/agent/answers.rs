//! What the agent says about itself.

use anyhow::{Context as _, Result};
use tokio::time::Instant;
use tracing::debug;

use super::{Agent, Claim, Place, problems::Concern};
use crate::{
    control::Query,
    datapath::{Datapath, PathCounters},
    health::Health,
    report::{self, CounterList, Device, Route, RouteList, Status},
};

impl Agent {
    pub(super) fn answer(&self, question: Query) -> Result<serde_json::Value> {
        debug!("asked for {question:?}");
        Ok(match question {
            Query::Status => serde_json::to_value(self.status()?)?,
            Query::Routes => serde_json::to_value(RouteList {
                routes: self
                    .table
                    .routes()
                    .iter()
                    .map(|(subnet, peer)| Route { subnet: *subnet, peer: *peer })
                    .collect(),
                skipped: self.table.skipped(),
            })?,
            Query::Counters => serde_json::to_value(CounterList::from(self.counters()?))?,
        })
    }

    fn status(&self) -> Result<Status> {
        let datapath = self.datapath()?;
        let Place { underlay, own, port, mtu } = &self.place;
        Ok(Status {
            state: self.state().to_owned(),
            problems: self.problems.list(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            network: own.network,
            subnet: own.subnet,
            public_ip: own.public_ip,
            port: *port,
            device: Device {
                name: self.options.device.clone(),
                ifindex: datapath.overlay_ifindex().unwrap_or_default(),
                mtu: *mtu,
            },
            underlay: Device::from(&underlay.link),
            egress: datapath.egress().clone(),
            ingress: datapath.ingress().clone(),
            routes: self.table.routes().len(),
            store: report::Store { name: self.leasing.name(), lost: self.problems.get(Concern::Store) },
            drops: report::errors(&self.counters()?),
        })
    }

    fn counters(&self) -> Result<PathCounters> {
        self.datapath()?.counters()
    }

    fn datapath(&self) -> Result<&Datapath> {
        self.up
            .then_some(&self.datapath)
            .context("the datapath is down and being made again; the log says why")
    }

    fn state(&self) -> &'static str {
        match (self.running, self.problems.is_empty()) {
            (false, _) => "starting",
            (true, true) => "running",
            (true, false) => "degraded",
        }
    }

    pub(super) fn health(&self) -> Health {
        let problems = self.problems.list().join("; ");
        Health {
            ready: match (self.running, self.informed) {
                (true, _) => Ok(()),
                (false, true) => {
                    let why = self.problems.get(Concern::SubnetFile);
                    Err(why.unwrap_or_else(|| "the device or the datapath is not there yet".to_owned()))
                }
                (false, false) => Err("the store has not told the peers' leases yet".to_owned()),
            },
            healthy: self.fit(),
            degraded: Some(problems).filter(|problems| !problems.is_empty()),
        }
    }

    /// Whether packets move and will go on to.
    fn fit(&self) -> Result<(), String> {
        let grave = [Concern::Datapath, Concern::Underlay, Concern::Address, Concern::Routes];
        if let Some(why) = grave.into_iter().find_map(|concern| self.problems.get(concern)) {
            return Err(why);
        }
        if !self.up {
            return Err("the datapath is down and being made again; the log says why".to_owned());
        }
        let why = || self.problems.get(Concern::Lease).unwrap_or_default();
        match self.claim {
            Claim::Firm | Claim::Doubtful(None) => Ok(()),
            Claim::Lost => Err(why()),
            Claim::Doubtful(Some(end)) => {
                let left = end.saturating_duration_since(Instant::now());
                match left < self.options.lease_margin() {
                    true => Err(format!("the lease is about to be lost, in {} s: {}", left.as_secs(), why())),
                    false => Ok(()),
                }
            }
        }
    }
}
