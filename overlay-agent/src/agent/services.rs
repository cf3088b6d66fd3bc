//! Services on this node, in a network whose config has them.

use std::time::Instant;

use anyhow::Result;
use ipnet::Ipv4Net;
use tracing::warn;

use super::{OnExit, Options, ServiceOptions, status::json};
use crate::{
    config::NetworkConfig,
    control::Answer,
    netlink::Netlink,
    report,
    service::{
        LbRequest,
        device::{self, ServiceDevice},
        files::FileOptions,
        front::Rules,
        health::Ejected,
        node::{NodeOptions, ServiceNode, remove_left},
    },
    store::Store,
    underlay::Underlay,
};

/// What runs for services on this node.
pub(super) enum Services {
    /// The network has none, this node ignores them, or there is no store.
    Off,
    /// Why there are none, although the network has them.
    Refused(String),
    Running(ServiceNode),
}

impl Services {
    /// Starts what the network's config and the options say, and removes what an earlier agent left and this one does not take over.
    pub(super) async fn start(
        options: &Options,
        config: &NetworkConfig,
        store: Option<&Store>,
        underlay: &Underlay,
        netlink: &Netlink,
    ) -> Self {
        let services = Self::try_start(options, config, store, underlay, netlink);
        let device = matches!(services, Self::Running(_)).then_some(options.services.device.as_str());
        if let Err(error) = remove_unused(&options.device, device, netlink).await {
            warn!("remove what an earlier agent left of services: {error:#}");
        }
        services
    }

    fn try_start(
        options: &Options,
        config: &NetworkConfig,
        store: Option<&Store>,
        underlay: &Underlay,
        netlink: &Netlink,
    ) -> Self {
        let Some((options, store)) = node_options(options, config).zip(store) else { return Self::Off };
        let own = [underlay.local_ip, underlay.public_ip].map(Ipv4Net::from);
        if let Some(address) = config.services.as_ref().and_then(|services| services.overlap(own)) {
            return Self::Refused(format!(
                "services are off: their pool {} contains this host's address {}: choose another pool in the network's config \
                 (Services.Pool)",
                options.pool,
                address.addr()
            ));
        }
        match ServiceNode::start(options, netlink.clone(), store) {
            Ok(node) => Self::Running(node),
            Err(error) => Self::Refused(format!("services are off: {error:#}")),
        }
    }

    /// What does not work.
    pub(super) fn problem(&self) -> Option<String> {
        match self {
            Self::Off => None,
            Self::Refused(why) => Some(why.clone()),
            Self::Running(node) => {
                let problems = node.state().problems;
                (!problems.is_empty()).then(|| format!("services: {}", problems.join("; ")))
            }
        }
    }

    /// For `status`; `None` when there are no services.
    pub(super) fn report(&self) -> Option<report::Services> {
        let Self::Running(node) = self else { return None };
        let state = node.state();
        Some(report::Services {
            services: state.services,
            endpoints: state.endpoints,
            skipped: state.skipped,
            load_balancer: state.balancers,
            without_agent: Some(report::WithoutAgent {
                forwards: state.without_agent.0,
                why: state.without_agent.1,
            }),
            dns: state.dns,
            down: state.down,
            ejected: state.ejected.iter().map(ejected).collect(),
        })
    }

    /// What was counted of services on this node.
    pub(super) fn traffic(&self) -> impl Future<Output = Answer> + Send + 'static {
        let traffic = match self {
            Self::Off => {
                Err("this node has no services: the network's config has none, or --lb is off".to_owned())
            }
            Self::Refused(why) => Err(why.clone()),
            Self::Running(node) => Ok(node.traffic()),
        };
        async move { json(&traffic?.await?) }
    }

    /// Removes what was made for services, or leaves what can go on.
    pub(super) async fn stop(self) {
        if let Self::Running(node) = self {
            node.stop().await;
        }
    }
}

/// Removes what an agent with the overlay device `owner` left, unless services run with the service device `device`, which takes it over.
async fn remove_unused(owner: &str, device: Option<&str>, netlink: &Netlink) -> Result<()> {
    if device.is_none() {
        remove_left(owner)?;
    }
    for left in device::left(netlink, owner).await? {
        if device != Some(left.name()) {
            left.remove(netlink).await?;
        }
    }
    Ok(())
}

fn ejected(ejected: &Ejected) -> report::EjectedEndpoint {
    let (protocol, address) = ejected.target;
    let left_s = ejected.until.saturating_duration_since(Instant::now()).as_secs();
    report::EjectedEndpoint { endpoint: ejected.endpoint.to_string(), address, protocol, left_s }
}

/// What this node is to do for services; `None` when the network has none, or this node ignores them.
fn node_options(options: &Options, config: &NetworkConfig) -> Option<NodeOptions> {
    let ServiceOptions { lb, device, cgroup, dns_upstreams, manage_resolv_conf, node, zone, files } =
        &options.services;
    let services = config.services.as_ref().filter(|_| *lb != LbRequest::Off)?;
    let rules = Rules {
        default: services.load_balancing.clone(),
        node: node.clone(),
        zone: zone.clone(),
        http: false,
        proxy_protocol: false,
    };
    Some(NodeOptions {
        device: ServiceDevice::new(device, &options.device),
        overlay: options.device.clone(),
        keep: options.on_exit == OnExit::Keep,
        pool: services.pool,
        domain: services.domain.clone(),
        lb: *lb,
        rules,
        cgroup: cgroup.clone(),
        dns_upstreams: dns_upstreams.clone(),
        manage_resolv_conf: *manage_resolv_conf,
        files: files.clone().map(|directory| FileOptions {
            directory,
            state_file: options.services_file(),
            node: node.clone(),
        }),
    })
}
