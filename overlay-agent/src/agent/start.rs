//! The start of an agent, in an order that leaves nothing half-done.

use std::{net::SocketAddrV4, sync::Arc};

use anyhow::Result;
use tracing::{info, warn};

use super::{
    Options,
    checks::{check_addresses, inner_mtu},
    forwarding::Forwarding,
    host::HostSetup,
    membership::{Membership, Network},
    notifier::HealthNotifier,
    takeover::TakeOver,
};
use crate::{
    config::NetworkConfig,
    datapath::{
        Inherited,
        tun::{Endpoint, Socket},
    },
    device,
    lease::Lease,
    netlink::Netlink,
    store::Event,
    subnet_env,
    underlay::Underlay,
};

/// The parts of an agent that has changed nothing on its host yet. Getting this far may take long: etcd may be away.
pub(super) struct Prepared {
    pub(super) options: Options,
    pub(super) config: NetworkConfig,
    pub(super) membership: Membership,
    pub(super) forwarding: Forwarding,
    pub(super) host: HostSetup,
    pub(super) underlay: Underlay,
    /// The first records, where an earlier agent's programs must not be without routes.
    first: Option<Event<Lease>>,
    /// The agent that forwards until this one does.
    take_over: Option<TakeOver>,
}

/// What is there of an earlier agent of this device.
pub(super) struct Before {
    /// Descriptors that systemd kept.
    pub(super) kept: Inherited,
    /// The agent that runs.
    pub(super) take_over: Option<TakeOver>,
}

impl Before {
    /// Whether there is nothing.
    fn is_none(&self) -> bool {
        self.kept.is_empty() && self.take_over.is_none()
    }
}

impl Prepared {
    /// Checks everything that can be refused, and acquires the lease last.
    /// Fails when the options, the network config and this host do not fit together, or no lease is available.
    pub(super) async fn new(
        options: Options,
        netlink: &Netlink,
        notifier: &mut HealthNotifier,
        before: Before,
    ) -> Result<Self> {
        // Looked up now to refuse at once what cannot work, and again when etcd, perhaps hours later, has answered.
        let underlay = Underlay::find(netlink, &options.underlay).await?;
        if let Some(file) = &options.subnet_file {
            subnet_env::check(file)?;
        }
        let network = Network::open(&options, underlay.public_ip, notifier).await?;
        let underlay = Underlay::find(netlink, &options.underlay).await?;
        check_addresses(&options, &network.config, &underlay)?;
        device::preflight(netlink, &options.device, network.config.network).await?;
        let mtu = inner_mtu(&underlay.link)?;
        let config = network.config.clone();
        let port = config.port;
        let address = SocketAddrV4::new(underlay.local_ip, port);
        if before.is_none() {
            drop(Socket::bind(Endpoint { address, ifindex: underlay.link.index }, Arc::default())?);
        }
        let Before { kept, take_over } = before;
        if let Some(take_over) = &take_over {
            take_over.check(config.network, underlay.public_ip, port, options.subnet)?;
        }
        let mut membership = network.join(&options, underlay.public_ip, notifier).await?;
        let local = membership.local();
        info!("{} is {} in {}, MTU {mtu}, port {port}", local.public_ip, local.subnet, local.network);
        let mut forwarding = Forwarding::new(&options, netlink, local, &underlay, port, mtu)?;
        forwarding.datapath.inherit(kept);
        // Those of an earlier agent have routes, which must not be replaced by none.
        let first = match forwarding.datapath.is_adopting() || take_over.is_some() {
            true => membership.first_snapshot(notifier).await,
            false => None,
        };
        let host = HostSetup::new(&options);
        Ok(Self { options, config, membership, forwarding, host, underlay, first, take_over })
    }

    /// Changes the host: datapath with its routes first, then firewall and routes.
    /// Fails when a step fails; the host is then as it was before, and a new lease is given back.
    pub(super) async fn apply(mut self, netlink: &Netlink) -> Result<Self> {
        let is_adopting = self.forwarding.datapath.is_adopting() || self.take_over.is_some();
        match self.try_apply(netlink).await {
            Ok(()) => Ok(self),
            Err(error) => {
                if is_adopting {
                    // An earlier agent's programs forward packets.
                    self.forwarding.datapath.leave();
                    self.host.leave().await;
                    return Err(error);
                }
                remove(&mut self.forwarding, &mut self.host, netlink).await.unwrap_or_else(|error| {
                    warn!("{error:#}");
                });
                self.membership.give_back().await;
                Err(error)
            }
        }
    }

    async fn try_apply(&mut self, netlink: &Netlink) -> Result<()> {
        // The programs get their routes before they see a packet.
        let first = match self.first.take() {
            Some(event) => Some(event),
            None => self.membership.first_records().await,
        };
        if let Some(event) = first {
            self.forwarding.on_records(event).await;
        }
        if let Some(take_over) = &mut self.take_over {
            self.forwarding.datapath.inherit(take_over.take().await?);
        }
        self.forwarding.start().await?;
        let (port, routes) = (self.forwarding.spec.alias.port, self.forwarding.watch_routes());
        self.host.apply(netlink, self.membership.local(), port, routes).await?;
        match self.take_over.take() {
            Some(take_over) => take_over.finish().await,
            None => Ok(()),
        }
    }
}

/// Removes what the parts have changed on the host: programs first, then rules, then the device.
/// Fails when the device is not ours any more or the kernel refuses.
pub(super) async fn remove(
    forwarding: &mut Forwarding,
    host: &mut HostSetup,
    netlink: &Netlink,
) -> Result<()> {
    let removed = forwarding.datapath.remove().await;
    host.clear(netlink).await;
    removed
}
