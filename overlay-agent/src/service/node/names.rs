//! The DNS server of this node, and the host's `resolv.conf`.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::Path,
    sync::Arc,
};

use anyhow::{Context as _, Result, anyhow};
use tokio::{sync::watch, task::JoinHandle};
use tracing::{info, warn};

use super::{Catalog, NodeOptions};
use crate::service::dns::{
    self, DnsServer, Statistics, Zone,
    resolv_conf::{self, Content, ResolvConf},
};

/// Port of DNS.
const PORT: u16 = 53;

/// Keeps the server.
pub(super) struct NameServer {
    address: Ipv4Addr,
    zone: Zone,
    upstreams: Vec<SocketAddr>,
    manage_resolv_conf: bool,
    task: Option<JoinHandle<Result<()>>>,
    statistics: Option<Statistics>,
}

impl NameServer {
    /// Starts nothing yet. Fails when the domain is no domain name.
    pub(super) fn new(options: &NodeOptions, address: Ipv4Addr) -> Result<Self> {
        let zone = Zone::new(&options.domain).context("the network config's Services.Domain")?;
        Ok(Self {
            address,
            zone: zone.with_reverse(vec![options.pool]),
            upstreams: options.dns_upstreams.clone(),
            manage_resolv_conf: options.manage_resolv_conf,
            task: None,
            statistics: None,
        })
    }

    fn listen(&self) -> SocketAddr {
        SocketAddr::new(IpAddr::V4(self.address), PORT)
    }

    /// Where the server answers, while it runs.
    pub(super) fn address(&self) -> Option<SocketAddr> {
        self.task.as_ref().filter(|task| !task.is_finished()).map(|_| self.listen())
    }

    /// What the server has counted, while it runs.
    pub(super) fn counters(&self) -> Option<dns::Counters> {
        self.address().and(self.statistics.as_ref()).map(Statistics::snapshot)
    }

    /// Starts the server if it does not run, and lets the host ask it, if that is wanted. Fails when one of the two is not possible.
    pub(super) async fn reconcile(&mut self, catalog: &watch::Receiver<Arc<Catalog>>) -> Result<()> {
        if let Some(task) = self.task.take_if(|task| task.is_finished()) {
            let why = task.await;
            let why = why.map_err(anyhow::Error::from).and_then(|result| result);
            warn!("the DNS server ended: {:#}", why.err().unwrap_or_else(|| anyhow!("without a reason")));
        }
        if self.task.is_none() {
            self.start(catalog).await?;
        }
        if self.manage_resolv_conf {
            let content =
                Content { nameserver: IpAddr::V4(self.address), search: self.zone.search_list(None) };
            if ResolvConf::at(Path::new(resolv_conf::PATH))?.install(&content)? {
                info!("{} names the DNS server {} while the agent runs", resolv_conf::PATH, self.address);
            }
        }
        Ok(())
    }

    async fn start(&mut self, catalog: &watch::Receiver<Arc<Catalog>>) -> Result<()> {
        let listen = self.listen();
        let mut options = dns::Options::new(vec![listen], self.zone.clone());
        options.upstreams = match self.upstreams.is_empty() {
            true => ResolvConf::at(Path::new(resolv_conf::PATH))?.upstreams(&[listen])?,
            false => self.upstreams.clone(),
        };
        let server = DnsServer::bind(options, catalog.clone()).await?;
        info!("the DNS server answers at {listen} for names below {}", self.zone.services());
        self.statistics = Some(server.statistics());
        self.task = Some(tokio::spawn(server.run()));
        Ok(())
    }

    /// Ends the server.
    pub(super) fn stop(&mut self) {
        restore();
        if let Some(task) = self.task.take() {
            task.abort();
        }
    }
}

/// Puts the host's `resolv.conf` back, also what a killed agent left. Returns whether there was something to do.
pub(crate) fn restore() -> bool {
    match ResolvConf::at(Path::new(resolv_conf::PATH)).and_then(|file| file.restore()) {
        Ok(true) => {
            info!("{} is as it was before", resolv_conf::PATH);
            true
        }
        Ok(false) => false,
        Err(error) => {
            warn!("{error:#}");
            false
        }
    }
}
