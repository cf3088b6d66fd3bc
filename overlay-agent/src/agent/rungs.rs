//! The rungs while the agent runs: requests of operators, and what `status` says about them.

use anyhow::Result;
use tracing::info;

use super::forwarding::{Forwarding, sentence};
use crate::{
    datapath::{ActiveRung, Request},
    report,
};

impl Forwarding {
    /// Changes the requested rung, until the agent ends. What was refused before is attempted again. Fails when the rung cannot be had: the
    /// request that was before stays.
    pub(super) async fn set_request(&mut self, request: Request) -> Result<(), String> {
        let before = std::mem::replace(&mut self.request, request);
        info!("an operator asks for the datapath {request}; it was {before}");
        self.datapath.forget_refusals();
        let Err(error) = self.reconcile().await else {
            self.conclude(Ok(())).await;
            return Ok(());
        };
        info!("the datapath stays {before}: {error:#}");
        self.request = before;
        self.try_reconcile().await;
        let state = match self.rungs() {
            Some([egress, ingress]) => {
                format!("egress on {} and ingress on {}", egress.choice.rung, ingress.choice.rung)
            }
            None => "the datapath is down, see `overlay-agent status`".to_owned(),
        };
        Err(format!("{error:#}; the datapath stays {before}: {state}"))
    }

    /// The rungs of egress and ingress; `None` while the datapath is down.
    pub(super) fn rungs(&self) -> Option<[&ActiveRung; 2]> {
        self.is_up().then(|| self.datapath.rungs())
    }

    /// What is left out because other programs remove it, as a sentence with the remedy.
    pub(super) fn demotion(&self) -> Option<String> {
        let removed = self.datapath.postponed().into_iter().filter(|postponed| postponed.is_removed);
        sentence(removed.map(|postponed| {
            format!(
                "{} is left out until {}: {}; once nothing removes it any more, `overlay-agent datapath set auto` attempts it at once",
                postponed.what,
                report::utc(postponed.next_attempt),
                postponed.why
            )
        }))
    }

    /// The datapath, for `datapath show` and `status`.
    pub(super) fn datapath_report(&self) -> report::Datapath {
        let postponed = self.datapath.postponed().into_iter().map(|postponed| report::Postponed {
            what: postponed.what,
            why: postponed.why,
            next_attempt: report::utc(postponed.next_attempt),
        });
        let [egress, ingress] = self.rungs().map_or([None, None], |rungs| rungs.map(Some));
        let active = |rung: &ActiveRung| report::ActiveRung {
            choice: rung.choice.clone(),
            since: Some(report::utc(rung.since)),
        };
        report::Datapath {
            request: report::DatapathRequest {
                requested: self.request,
                at_start: self.options.datapath,
                postponed: postponed.collect(),
            },
            egress: egress.map(active),
            ingress: ingress.map(active),
        }
    }
}
