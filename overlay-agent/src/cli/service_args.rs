//! The flags for services on this node.

use std::{net::SocketAddr, path::PathBuf};

use clap::Args;

use crate::{
    agent::ServiceOptions,
    service::{LbRequest, device, name},
};

#[derive(Debug, Args)]
#[command(next_help_heading = "Services")]
pub(super) struct ServiceArgs {
    /// How connections to virtual addresses of services reach an endpoint. Only in networks whose config has `Services`
    #[arg(long, env = "OVERLAY_AGENT_LB", value_enum, default_value_t)]
    lb: LbRequest,
    /// Name of the device that holds the virtual addresses
    #[arg(long, env = "OVERLAY_AGENT_SERVICE_DEVICE", value_name = "NAME", default_value = device::DEFAULT_NAME)]
    service_device: String,
    /// cgroup (v2) whose processes can connect to virtual addresses [default: the root, so all processes]
    #[arg(long, env = "OVERLAY_AGENT_SERVICE_CGROUP", value_name = "PATH")]
    service_cgroup: Option<PathBuf>,
    /// DNS server to ask for names that are none of services; may be repeated [default: those of /etc/resolv.conf]
    #[arg(long = "dns-upstream", value_name = "ADDRESS[:PORT]", value_parser = parse_upstream)]
    dns_upstreams: Vec<SocketAddr>,
    /// Make the node's programs ask the agent's DNS server: replace /etc/resolv.conf while the agent runs
    #[arg(long, env = "OVERLAY_AGENT_MANAGE_RESOLV_CONF", value_parser = clap::builder::FalseyValueParser::new())]
    manage_resolv_conf: bool,
    /// Name of this node, for services that prefer the endpoints of the client's node [default: the host name]
    #[arg(long, env = "OVERLAY_AGENT_NODE", value_name = "NAME", value_parser = parse_node)]
    node: Option<String>,
    /// The zone in which this node is, for services that prefer the endpoints of the client's zone
    #[arg(long, env = "OVERLAY_AGENT_ZONE", value_name = "NAME")]
    zone: Option<String>,
    /// Directory of YAML or JSON files of services and of endpoints on this node, as for `overlay-agent service set`, which the
    /// agent keeps in the store
    #[arg(long, env = "OVERLAY_AGENT_SERVICES_DIR", value_name = "DIR")]
    services_dir: Option<PathBuf>,
}

impl From<ServiceArgs> for ServiceOptions {
    fn from(args: ServiceArgs) -> Self {
        Self {
            lb: args.lb,
            device: args.service_device,
            cgroup: args.service_cgroup,
            dns_upstreams: args.dns_upstreams,
            manage_resolv_conf: args.manage_resolv_conf,
            node: args.node.unwrap_or_else(host_name),
            zone: args.zone,
            files: args.services_dir,
        }
    }
}

/// The first label of the host name, as far as it can be part of a DNS name.
pub(super) fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().to_ascii_lowercase();
    let first = name.trim().split('.').next().unwrap_or_default();
    let plain = |character: char| if character.is_ascii_alphanumeric() { character } else { '-' };
    let label: String = first.chars().map(plain).take(63).collect();
    let label = label.trim_matches('-');
    if label.is_empty() { "node".to_owned() } else { label.to_owned() }
}

fn parse_node(text: &str) -> Result<String, String> {
    name::label("node", text).map(str::to_owned).map_err(|error| error.to_string())
}

fn parse_upstream(text: &str) -> Result<SocketAddr, String> {
    let address = text.parse().map(|ip| SocketAddr::new(ip, 53));
    address
        .or_else(|_| text.parse())
        .map_err(|_| "expected an address such as 9.9.9.9, 9.9.9.9:53 or [2620:fe::fe]:53".to_owned())
}
