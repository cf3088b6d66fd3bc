//! The two ways of connections to virtual addresses: eBPF programs for the sockets of this node, and the proxy in user space for those
//! that the programs do not see. Both choose endpoints alike.

use std::{path::PathBuf, time::Duration};

use anyhow::{Context as _, Result};
use tokio::time::Instant;
use tracing::{info, warn};

use crate::{
    datapath::ebpf::{SERVICE_OBJECT, ServiceSet},
    service::{
        Catalog, LbRequest,
        front::Rules,
        outcome::Outcomes,
        proxy::{self, Proxy},
    },
};

/// Pause between attempts to load programs that were asked for by name.
const PAUSE: Duration = Duration::from_secs(30);

/// The balancers of this node.
pub(super) struct Balancers {
    request: LbRequest,
    cgroup: Option<PathBuf>,
    programs: Programs,
    proxy: Option<Proxy>,
}

/// The programs, or why there are none.
enum Programs {
    NotWanted,
    /// From this time on.
    Due(Instant),
    Attached(Box<ServiceSet>),
    /// Not tried again: the proxy takes their place.
    Missing(String),
}

impl Balancers {
    /// Starts nothing yet.
    pub(super) fn new(request: LbRequest, cgroup: Option<PathBuf>) -> Self {
        let programs = match request {
            LbRequest::Auto | LbRequest::Ebpf => Programs::Due(Instant::now()),
            LbRequest::Proxy | LbRequest::Off => Programs::NotWanted,
        };
        Self { request, cgroup, programs, proxy: None }
    }

    /// Starts what is missing, and balances as the catalog says. Returns what does not work.
    pub(super) async fn reconcile(&mut self, catalog: &Catalog, rules: &Rules) -> Vec<String> {
        let mut problems = Vec::new();
        if let Err(error) = self.reconcile_programs(catalog, rules) {
            problems.push(format!("{error:#}"));
        }
        if matches!(self.request, LbRequest::Auto | LbRequest::Proxy) {
            let proxy = self.proxy.get_or_insert_with(|| Proxy::start(proxy::Options::default()));
            proxy.reconcile(catalog, rules).await;
            problems.extend(
                proxy
                    .problems()
                    .into_iter()
                    .map(|problem| format!("{} at {}: {}", problem.service, problem.address, problem.reason)),
            );
        }
        problems
    }

    fn reconcile_programs(&mut self, catalog: &Catalog, rules: &Rules) -> Result<()> {
        if let Programs::Due(time) = &self.programs {
            if Instant::now() < *time {
                return Ok(());
            }
            match self.load(catalog, rules) {
                Ok(set) => {
                    info!("eBPF programs translate virtual addresses for the sockets of this node");
                    self.programs = Programs::Attached(Box::new(set));
                    return Ok(());
                }
                Err(error) if self.request == LbRequest::Auto => {
                    warn!("connections to virtual addresses pass the proxy: {error:#}");
                    self.programs = Programs::Missing(format!("{error:#}"));
                    return Ok(());
                }
                Err(error) => {
                    self.programs = Programs::Due(Instant::now() + PAUSE);
                    return Err(error.context("--lb ebpf is not possible"));
                }
            }
        }
        if let Programs::Attached(set) = &mut self.programs {
            set.reconcile(catalog, rules).context("virtual addresses in eBPF")?;
        }
        Ok(())
    }

    /// The maps are filled before a program can see a connection.
    fn load(&self, catalog: &Catalog, rules: &Rules) -> Result<ServiceSet> {
        let object =
            SERVICE_OBJECT.context("this binary was built without eBPF programs (cargo xtask build)")?;
        let mut set = ServiceSet::load(object)?;
        set.reconcile(catalog, rules)?;
        set.attach(self.cgroup.as_deref())?;
        Ok(set)
    }

    /// What became of connections of this node to endpoints, whichever way they took.
    pub(super) fn outcomes(&self) -> Outcomes {
        let mut sum = Outcomes::new();
        let ways = [self.proxy.as_ref().map(Proxy::outcomes)];
        for (target, outcome) in ways.into_iter().flatten().flatten() {
            *sum.entry(target).or_default() += outcome;
        }
        sum
    }

    /// How connections reach endpoints now, and why.
    pub(super) fn describe(&self) -> String {
        match (&self.programs, &self.proxy) {
            (Programs::Attached(_), Some(_)) => "ebpf, and the proxy for forwarded connections".to_owned(),
            (Programs::Attached(_), None) => "ebpf (--lb ebpf)".to_owned(),
            (Programs::Missing(why), _) => format!("proxy ({why})"),
            (Programs::NotWanted, Some(_)) => "proxy (--lb proxy)".to_owned(),
            (Programs::NotWanted | Programs::Due(_), _) => "none".to_owned(),
        }
    }

    /// Ends all: connections through the programs stay as they are, those through the proxy are reset.
    pub(super) async fn stop(self) {
        drop(self.programs);
        if let Some(proxy) = self.proxy {
            proxy.stop().await;
        }
    }
}
