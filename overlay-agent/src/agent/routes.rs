//! Routes on their way from records to the datapath.

use anyhow::Result;
use tracing::{info, warn};

use super::{Agent, problems::Concern};
use crate::{
    route::{RouteChange, Subnet},
    route_table::{Change, Outcome, Record, Skipped},
};

/// How many changes of one kind are told one by one.
const TOLD: usize = 5;

impl Agent {
    pub(super) fn on_snapshot(&mut self, records: Vec<Record>) {
        self.problems.clear(Concern::Store);
        self.informed = true;
        let outcome = self.table.replace(records);
        if let Some(store) = self.leasing.dir().cloned() {
            self.check_own_record(store);
        }
        self.apply(&outcome);
    }

    /// Our own place in the network has changed, and with it what the records mean.
    pub(super) fn rebuild(&mut self) {
        let outcome = self.table.set_own(self.place.own);
        self.apply(&outcome);
    }

    /// Tells what has changed, and makes the datapath follow.
    pub(super) fn apply(&mut self, outcome: &Outcome) {
        tell(outcome);
        if !self.up {
            return;
        }
        let change = |change: &Change| match *change {
            Change::Set(subnet, peer) => RouteChange::set(Subnet::containing(subnet), peer.into()),
            Change::Remove(subnet) => RouteChange::Remove(Subnet::containing(subnet)),
        };
        let changes: Vec<_> = outcome.changes.iter().map(change).collect();
        let routes = self.routes();
        let written = self.datapath.apply_routes(&changes, &routes);
        self.note_routes(written);
    }

    /// Routes that the fast path lacks are a problem of this host's, not the end of its other routes.
    pub(super) fn note_routes(&mut self, written: Result<()>) {
        match written {
            Ok(()) => self.problems.clear(Concern::Routes),
            Err(error) => {
                let why =
                    format!("the fast path's routes are behind, the next change tries again: {error:#}");
                self.problems.set(Concern::Routes, why);
            }
        }
    }
}

/// Thousands of routes come at once when an agent starts in a large network: a count says more than as many lines.
fn tell(outcome: &Outcome) {
    for change in outcome.changes.iter().take(TOLD) {
        match change {
            Change::Set(subnet, peer) => info!("route {subnet} via {peer}"),
            Change::Remove(subnet) => info!("route {subnet} removed"),
        }
    }
    let rest = outcome.changes.get(TOLD..).unwrap_or_default();
    if !rest.is_empty() {
        let removed = rest.iter().filter(|change| matches!(change, Change::Remove(_))).count();
        info!("and {} more routes, {removed} more removed", rest.len() - removed);
    }
    for Skipped { record, why } in outcome.skipped.iter().take(TOLD) {
        warn!("no route for the record {record}: {why}");
    }
    let rest = outcome.skipped.len().saturating_sub(TOLD);
    if rest > 0 {
        warn!("and no route for {rest} more records: `overlay-agent routes` lists them");
    }
}
