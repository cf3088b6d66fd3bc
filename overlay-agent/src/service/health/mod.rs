//! Health of endpoints: each node checks its own, and tells the others through the store; and each node sees how its connections fare.
//!
//! In reading order: `check` (what services want), `plan` (what to check, pure), `probe` (one check), `verdict` (what checks in a row mean, pure), `prober` (all
//! checks of a node), `publish` (the verdict in the store), `outliers` (which endpoints connections fail to, pure), `slow_start` (the
//! share of those that return, pure), `layer` (the catalog with all of this, pure).
//!
//! The catalog that balancers and DNS of this node see is the followed one with what the node knows itself on top: the verdicts of its
//! checks, also while the store is away, then ejections, then shares.

mod check;
mod layer;
mod outliers;
mod plan;
mod probe;
mod prober;
mod publish;
mod slow_start;
mod verdict;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Instant,
};

use tokio::sync::watch;
use tracing::{info, warn};

pub use self::{
    check::{CheckKind, HealthCheck},
    outliers::Ejected,
    prober::VerdictReceiver,
    publish::{Publishing, publish},
    verdict::{Verdict, Verdicts},
};
use self::{
    layer::Layer,
    outliers::{News, Outliers},
    prober::Prober,
    slow_start::SlowStart,
};
use super::{Catalog, ServiceName, catalog::Endpoint, outcome::Outcomes};

/// The health of endpoints as this node knows it. Dropped, its checks end.
pub struct Health {
    prober: Prober,
    verdicts: VerdictReceiver,
    outliers: Outliers,
    slow_start: SlowStart,
    /// The followed catalog, and on top of each other what this node knows.
    followed: Arc<Catalog>,
    with_verdicts: Layer,
    with_ejections: Layer,
    with_shares: Layer,
    view: watch::Sender<Arc<Catalog>>,
}

impl Health {
    /// Checks nothing yet. `node` is this node, in the names of its endpoints.
    pub fn new(node: String) -> Self {
        let prober = Prober::new(node);
        Self {
            verdicts: prober.verdicts(),
            prober,
            outliers: Outliers::default(),
            slow_start: SlowStart::default(),
            followed: Arc::default(),
            with_verdicts: Layer::default(),
            with_ejections: Layer::default(),
            with_shares: Layer::default(),
            view: watch::Sender::new(Arc::default()),
        }
    }

    /// What the checks of this node say, as it changes.
    pub fn verdicts(&self) -> VerdictReceiver {
        self.prober.verdicts()
    }

    /// The catalog as this node uses it, as it changes.
    pub fn view(&self) -> watch::Receiver<Arc<Catalog>> {
        self.view.subscribe()
    }

    /// Takes the followed catalog, checks its endpoints on this node, and publishes the view.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub fn follow(&mut self, catalog: &Arc<Catalog>) {
        self.prober.follow(catalog);
        self.followed = Arc::clone(catalog);
        self.publish_view();
    }

    /// Waits until a verdict has changed, and publishes the view. Nothing is lost when it is not waited for until the end.
    pub async fn changed(&mut self) {
        // The sender is here: it cannot be gone.
        let _ = self.verdicts.changed().await;
        self.publish_view();
    }

    /// Takes what became of connections up to now, once a second, and publishes the view.
    pub fn observe(&mut self, outcomes: &Outcomes) {
        let now = Instant::now();
        let catalog = self.lay_verdicts();
        for news in self.outliers.observe(now, outcomes, &catalog) {
            match news {
                News::Ejected { endpoint, target: (protocol, address), duration } => warn!(
                    "connections of this node to the endpoint {endpoint} at {} {address} fail: it gets none for {} s",
                    protocol.name(),
                    duration.as_secs()
                ),
                News::LetIn { endpoint } => {
                    info!("the endpoint {endpoint} gets connections of this node again")
                }
            }
        }
        self.slow_start.grow(now);
        self.publish_view();
    }

    /// The endpoints of this node that do not pass, each with the reason as far as it is known.
    pub fn down(&self) -> Vec<String> {
        let verdicts = self.verdicts.borrow();
        let down = verdicts.iter().flat_map(|verdicts| verdicts.iter()).filter(|(_, verdict)| !verdict.is_up);
        let text = |(name, verdict): (&_, &Verdict)| match &verdict.why {
            Some(why) => format!("{name}: {why}"),
            None => format!("{name}: it was down before"),
        };
        down.map(text).collect()
    }

    /// The endpoints that get no connections of this node for a while.
    pub fn ejected(&self) -> Vec<Ejected> {
        self.outliers.ejected().collect()
    }

    /// Services whose endpoints cannot be checked, each with the reason.
    pub fn problems(&self) -> &BTreeMap<ServiceName, String> {
        self.prober.problems()
    }

    fn publish_view(&mut self) {
        let with_verdicts = self.lay_verdicts();
        let Self { outliers, slow_start, with_ejections, with_shares, .. } = self;
        let with_ejections = with_ejections.lay(&with_verdicts, &outliers.services(), |endpoint| {
            endpoint.local.is_ejected = outliers.is_ejected(&endpoint.name);
        });
        slow_start.follow(&with_ejections, Instant::now());
        let view = with_shares.lay(&with_ejections, &slow_start.services(), |endpoint| {
            endpoint.local.share = slow_start.share(&endpoint.name);
        });
        self.view.send_if_modified(|before| {
            let changed = !Arc::ptr_eq(before, &view);
            *before = view;
            changed
        });
    }

    /// The followed catalog with the verdicts of this node.
    fn lay_verdicts(&mut self) -> Arc<Catalog> {
        let verdicts = self.verdicts.borrow_and_update().clone().unwrap_or_default();
        let state = |endpoint: &Endpoint| {
            let verdict = verdicts.get(&endpoint.name);
            verdict.map_or(endpoint.spec.state, |verdict| verdict.state(endpoint.spec.state))
        };
        let concerned = verdicts.keys().filter(|name| {
            let service = self.followed.services.get(&name.service);
            let endpoint = service.and_then(|service| service.endpoint(name));
            endpoint.is_some_and(|endpoint| state(endpoint) != endpoint.spec.state)
        });
        let concerned = concerned.map(|name| name.service.clone()).collect::<BTreeSet<_>>();
        self.with_verdicts.lay(&self.followed, &concerned, |endpoint| endpoint.spec.state = state(endpoint))
    }
}

#[cfg(test)]
mod tests;
