//! Keeps the record of this run, for `status` without an agent and for the next agent.

use anyhow::Result;
use tracing::warn;

use super::{Agent, Condition, OnExit, forwarding::Forwarding};
use crate::run_record::{RecordFile, RunRecord};

impl Agent {
    /// Makes the record what the agent is now. To be called every second: what is counted later is lost when the agent is killed.
    pub(super) fn keep_record(&mut self) {
        let kept = self.run_record().and_then(|record| self.record_file.keep(record));
        let why = kept
            .err()
            .map(|error| format!("counters of the slow path begin again with the next agent: {error:#}"));
        self.host.conditions.update(Condition::Record, why);
    }

    /// Fails when the counters cannot be read.
    pub(super) fn run_record(&self) -> Result<RunRecord> {
        let local = self.membership.local();
        let rungs = self.forwarding.rungs().map(|rungs| rungs.map(|active| active.choice.clone()));
        let (egress, ingress) = rungs.map(|[egress, ingress]| (egress, ingress)).unzip();
        Ok(RunRecord {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            network: Some(local.network),
            subnet: Some(local.subnet),
            public_ip: Some(local.public_ip),
            port: Some(self.forwarding.spec.alias.port),
            store: self.membership.store_name(),
            lease_ends: self.membership.lease_ends(),
            egress,
            ingress,
            tally: self.forwarding.datapath.tally()?,
            ..RunRecord::default()
        })
    }
}

/// Writes the last record of a run: `record`, with what was counted until now. With `--on-exit remove`, none stays.
pub(super) fn end(file: &mut RecordFile, forwarding: &Forwarding, record: Result<RunRecord>) {
    let ended = match forwarding.options.on_exit {
        OnExit::Remove => file.remove(),
        OnExit::Keep => {
            let tally = forwarding.datapath.tally();
            record.and_then(|record| file.keep(RunRecord { tally: tally?, ..record }))
        }
    };
    if let Err(error) = ended {
        warn!("{error:#}");
    }
}
