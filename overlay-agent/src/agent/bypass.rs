//! The bypass of the host's stack: the datapath follows the containers of this host.

use std::{collections::BTreeSet, sync::Arc};

use clap::ValueEnum as _;
use ipnet::Ipv4Net;
use tokio::sync::watch;
use tracing::warn;

use super::{
    Options,
    conditions::Condition,
    forwarding::{Forwarding, sentence},
};
use crate::{
    containers::{self, Containers, Selection},
    datapath::{BypassRequest, Rung, ebpf::TcMode},
    report,
};

/// Follows the containers of this host, if there is a bypass.
pub(super) struct ContainerWatch {
    request: BypassRequest,
    named: Vec<String>,
    own_clsact: bool,
    following: Option<(Selection, watch::Receiver<Arc<Containers>>)>,
    none: Arc<Containers>,
}

impl ContainerWatch {
    /// Follows nothing yet.
    pub(super) fn new(options: &Options) -> Self {
        Self {
            request: options.bypass,
            named: options.container_ifaces.clone(),
            // The handle does not matter.
            own_clsact: options.tc_attach.mode(1) != TcMode::Tcx,
            following: None,
            none: Arc::default(),
        }
    }

    /// Follows the containers of a subnet, on other devices than `excluded`. While the kernel refuses, there are none.
    pub(super) async fn follow(&mut self, subnet: Ipv4Net, excluded: BTreeSet<u32>) {
        if self.request == BypassRequest::Off {
            return;
        }
        let (named, own_clsact) = (self.named.clone(), self.own_clsact);
        let selection = Selection { subnet, excluded, own_clsact, named };
        if self.following.as_ref().is_some_and(|(present, _)| *present == selection) {
            return;
        }
        self.following = match containers::watch(selection.clone()).await {
            Ok(receiver) => Some((selection, receiver)),
            Err(error) => {
                warn!("every packet takes the host's stack: {error:#}");
                None
            }
        };
    }

    /// The containers at present.
    pub(super) fn get(&mut self) -> Arc<Containers> {
        let present = self.following.as_mut().map(|(_, receiver)| Arc::clone(&receiver.borrow_and_update()));
        present.unwrap_or_else(|| Arc::clone(&self.none))
    }

    /// Returns when the containers are others than [`ContainerWatch::get`] has returned.
    pub(super) async fn changed(&mut self) {
        let changed = match &mut self.following {
            Some((_, receiver)) => receiver.changed().await.is_ok(),
            None => false,
        };
        if !changed {
            std::future::pending().await
        }
    }

    /// Why devices are left out.
    fn skipped(&self) -> Vec<String> {
        let following = self.following.as_ref();
        following.map(|(_, receiver)| receiver.borrow().skipped.clone()).unwrap_or_default()
    }
}

impl Forwarding {
    /// Containers have come, gone or moved.
    pub(super) async fn on_containers(&mut self) {
        let containers = self.containers.get();
        match self.datapath.set_containers(&containers).await {
            Ok(report) => self.set_no_bypass(report.no_bypass),
            Err(error) => self.set_no_bypass(vec![format!("{error:#}")]),
        }
    }

    pub(super) fn set_no_bypass(&mut self, why: Vec<String>) {
        self.conditions.update(Condition::Bypass, sentence(why.into_iter()));
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
            BypassRequest::Flows | BypassRequest::All => self.containers.skipped(),
        };
        report::Bypass { mode: name(mode), why, devices, containers, skipped }
    }
}

fn name(request: BypassRequest) -> String {
    request.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
}
