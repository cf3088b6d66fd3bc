//! Answers to queries, in every state of the agent.

use std::time::SystemTime;

use serde::Serialize;
use tokio::{sync::oneshot, time::Instant};
use tracing::debug;

use super::{Agent, Condition, OnExit, Options, StoreOption};
use crate::{
    control::{Answer, Query},
    datapath::PathCounters,
    health::Health,
    left::Left,
    report::{self, CounterList, Device, RouteList, Status},
    service::traffic::Traffic,
};

/// Name of the store before it is opened.
pub(super) fn store_name(options: &Options) -> String {
    match &options.store {
        StoreOption::None => "none".to_owned(),
        StoreOption::Dir(root) => format!("dir:{}", root.display()),
        StoreOption::Etcd(etcd) => format!("etcd at {}", etcd.endpoints.join(", ")),
    }
}

/// The answer of an agent that has no parts yet. `left` is what an earlier agent left.
pub(super) fn answer_while_starting(
    query: Query,
    health: &Health,
    store: &str,
    left: Option<&Left>,
) -> Answer {
    match query {
        Query::Status => {
            let frozen = left.map(|left| left.frozen(SystemTime::now()));
            let goes_on = left.filter(|left| left.forwards()).map(|left| {
                let since = frozen.as_ref().and_then(|frozen| frozen.since.clone());
                let since = since.map_or_else(String::new, |since| format!(" of {since}"));
                format!("forwarding goes on by the {} routes{since} of an earlier agent", left.route_count())
            });
            json(&Status {
                problems: std::iter::once(health.to_string()).chain(goes_on).collect(),
                routes: left.map_or(0, Left::route_count),
                store: report::Store { name: store.to_owned(), lost: None },
                frozen,
                ..Status::starting()
            })
        }
        Query::Routes => {
            json(&left.map_or_else(|| RouteList { routes: Vec::new(), skipped: Vec::new() }, Left::routes))
        }
        Query::Counters => json(&left.map_or_else(|| CounterList::from(PathCounters::ZERO), Left::counters)),
        Query::Traffic => json(&Traffic::default()),
        Query::Datapath | Query::SetDatapath(_) => {
            Err(format!("the agent has no datapath yet, it is starting: {health}"))
        }
    }
}

impl Agent {
    /// Answers at once, or where that may take time, later.
    pub(super) async fn respond(&mut self, query: Query, answer: oneshot::Sender<Answer>) {
        if query == Query::Traffic {
            let traffic = self.services.traffic();
            // The client may be gone.
            tokio::spawn(async move { drop(answer.send(traffic.await)) });
            return;
        }
        if let Query::SetDatapath(request) = query
            && let Err(why) = self.forwarding.set_request(request).await
        {
            let _ = answer.send(Err(why));
            return;
        }
        let _ = answer.send(self.answer(query).await);
    }

    async fn answer(&self, query: Query) -> Answer {
        debug!("query {query:?}");
        match query {
            Query::Status => json(&self.status().await),
            Query::Routes => {
                let (table, next_hops) = (&self.forwarding.table, &self.forwarding.next_hops);
                json(&RouteList { routes: next_hops.report(), skipped: table.skipped() })
            }
            Query::Counters => {
                let counters = self.forwarding.datapath.counters().await;
                let counters = counters.map_err(|error| format!("{error:#}"))?;
                let writes = self.forwarding.datapath.route_writes();
                json(&CounterList::from(counters).with_writes(writes))
            }
            Query::Traffic => self.services.traffic().await,
            Query::Datapath | Query::SetDatapath(_) => json(&self.forwarding.datapath_report()),
        }
    }

    async fn status(&self) -> Status {
        let (local, spec) = (self.membership.local(), &self.forwarding.spec);
        let (datapath, health) = (self.forwarding.datapath_report(), self.health());
        let mut problems = self.problems();
        let counters = self.forwarding.datapath.counters().await;
        if let Err(error) = &counters {
            problems.push(format!("counters cannot be read: {error:#}"));
        }
        let state = match (self.running, &health.healthy, problems.is_empty()) {
            (_, Err(_), _) => "unhealthy",
            (false, Ok(()), _) => "starting",
            (true, Ok(()), true) => "running",
            (true, Ok(()), false) => "degraded",
        };
        // A condition names the cause of nearly every failure.
        if problems.is_empty() {
            problems.extend(health.healthy.err());
        }
        Status {
            state: state.to_owned(),
            problems,
            network: Some(local.network),
            subnet: Some(local.subnet),
            public_ip: Some(local.public_ip),
            port: Some(spec.alias.port),
            device: self.forwarding.device(),
            underlay: Some(Device::from(&self.underlay.link)),
            other_underlays: self.forwarding.other_underlays(),
            slow_routes: self.forwarding.next_hops.slow_routes(),
            egress: datapath.egress,
            ingress: datapath.ingress,
            datapath: Some(datapath.request),
            without_agent: Some(self.without_agent()),
            bypass: self.running.then(|| self.forwarding.bypass()),
            services: self.services.report(),
            routes: self.forwarding.table.routes().len(),
            store: report::Store {
                name: self.membership.store_name(),
                lost: self.forwarding.conditions.get(Condition::Store),
            },
            drops: counters.as_ref().map_or(0, report::errors),
            ..Status::starting()
        }
    }

    /// What happens when this process ends.
    fn without_agent(&self) -> report::WithoutAgent {
        let why = match (&self.forwarding.unpinned, self.forwarding.options.on_exit) {
            (Some(why), _) => why.clone(),
            (None, _) if !self.forwarding.datapath.is_pinned() => "the tun rung needs the agent".to_owned(),
            (None, OnExit::Remove) => "--on-exit remove; only a kill leaves the eBPF programs".to_owned(),
            (None, OnExit::Keep) => "the eBPF programs are pinned in the BPF file system".to_owned(),
        };
        let forwards =
            self.forwarding.datapath.is_pinned() && self.forwarding.options.on_exit == OnExit::Keep;
        report::WithoutAgent { forwards, why }
    }

    /// The problems of all parts, in order of their subjects.
    fn problems(&self) -> Vec<String> {
        let parts = [&self.forwarding.conditions, &self.membership.conditions, &self.host.conditions];
        let mut problems: Vec<_> = parts.into_iter().flat_map(|conditions| conditions.iter()).collect();
        problems.sort();
        problems.into_iter().map(|(_, why)| why.to_owned()).collect()
    }

    pub(super) fn health(&self) -> Health {
        let problems = self.problems();
        let ready = match self.running {
            true => Ok(()),
            false => self.forwarding.ready(),
        };
        let healthy = self.forwarding.health().and_then(|()| self.membership.health(Instant::now()));
        Health {
            ready,
            // What fails first, then everything that may explain it.
            healthy: healthy.map_err(|why| {
                let others = problems.iter().filter(|problem| !why.contains(*problem)).cloned();
                std::iter::once(why.clone()).chain(others).collect::<Vec<_>>().join("; ")
            }),
            degraded: (!problems.is_empty()).then(|| problems.join("; ")),
        }
    }
}

pub(super) fn json(answer: &impl Serialize) -> Answer {
    serde_json::to_value(answer).map_err(|error| error.to_string())
}
