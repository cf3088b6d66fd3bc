//! The bypass of the host's stack: the datapath follows the containers of this host.

use anyhow::Result;
use clap::ValueEnum as _;
use tokio::sync::mpsc;
use tracing::debug;

use super::{
    conditions::Condition,
    forwarding::{Forwarding, sentence},
};
use crate::{
    containers::{self, Facts},
    datapath::{BypassRequest, Rung},
    report,
};

/// Sends a message when containers may have changed, unless there is no bypass.
/// Fails when the kernel refuses a socket.
pub(super) fn watch(request: BypassRequest) -> Result<mpsc::Receiver<()>> {
    match request {
        BypassRequest::Off => Ok(mpsc::channel(1).1),
        BypassRequest::Flows | BypassRequest::All => containers::watch(),
    }
}

impl Forwarding {
    /// Looks for the containers of this host. Returns whether they have changed; fails when the kernel does not answer, and they stay
    /// as they were.
    pub(super) async fn find_containers(&mut self) -> Result<bool> {
        if self.options.bypass == BypassRequest::Off {
            return Ok(false);
        }
        let facts = Facts::read(&self.netlink).await?;
        let underlays = self.underlays();
        let excluded = underlays.iter().map(|underlay| underlay.link.index);
        let excluded: Vec<_> = excluded.chain(self.datapath.overlay_ifindex()).collect();
        let found = containers::find(&facts, self.spec.subnet, &self.options.container_ifaces, &excluded);
        Ok(std::mem::replace(&mut self.containers, found) != self.containers)
    }

    /// Containers may have changed.
    pub(super) async fn on_containers(&mut self) {
        match self.find_containers().await {
            Ok(false) => {}
            Ok(true) => match self.datapath.set_containers(&self.containers).await {
                Ok(report) => {
                    self.conditions.update(Condition::Bypass, sentence(report.no_bypass.into_iter()))
                }
                Err(error) => self.conditions.set(Condition::Bypass, format!("{error:#}")),
            },
            Err(error) => debug!("look for containers: {error:#}"),
        }
    }

    /// The bypass, for `status`.
    pub(super) fn bypass(&self) -> report::Bypass {
        let (devices, containers) = self.datapath.bypassed();
        let request = self.options.bypass;
        let refused = self.datapath.bypass_refused();
        let (mode, why) = match (request, self.datapath.egress().rung) {
            (BypassRequest::Off, _) => (BypassRequest::Off, "--bypass off".to_owned()),
            (_, Rung::Tun) => (BypassRequest::Off, "the tun rung has none".to_owned()),
            (_, Rung::Xdp | Rung::Tc) if let Some(why) = refused => (BypassRequest::Off, why.to_owned()),
            (_, Rung::Xdp | Rung::Tc) => (request, format!("--bypass {}", name(request))),
        };
        let skipped = match mode {
            BypassRequest::Off => Vec::new(),
            BypassRequest::Flows | BypassRequest::All => self.containers.skipped.clone(),
        };
        report::Bypass { mode: name(mode), why, devices, containers, skipped }
    }
}

fn name(request: BypassRequest) -> String {
    request.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
}
