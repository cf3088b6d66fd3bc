//! `overlay-agent run`.

use std::{io::IsTerminal as _, net::Ipv4Addr, path::PathBuf};

use anyhow::Result;
use clap::Args;
use ipnet::Ipv4Net;
use tracing_subscriber::EnvFilter;

use super::{AgentArgs, etcd_args::EtcdArgs};
use crate::{
    agent::{self, Options, StoreOption},
    datapath::{Request, ebpf::TcAttach},
};

#[derive(Debug, Args)]
pub(super) struct RunArgs {
    /// Where leases live: dir:PATH is a directory of flannel's records, etcd is flannel's own place for them
    #[arg(long, env = "OVERLAY_AGENT_STORE", value_name = "dir:PATH|etcd", value_parser = parse_store)]
    store: Option<Store>,
    /// The whole overlay; written to the store's config when there is none
    #[arg(long, env = "OVERLAY_AGENT_NETWORK", value_name = "CIDR", value_parser = parse_net)]
    network: Option<Ipv4Net>,
    /// This host's part of it [default: the one it holds, else a free one]
    #[arg(long, env = "OVERLAY_AGENT_SUBNET", value_name = "CIDR", value_parser = parse_net)]
    subnet: Option<Ipv4Net>,
    /// A peer that needs no record in the store; may be repeated
    #[arg(long = "peer", value_name = "SUBNET=ADDRESS", value_parser = parse_peer)]
    peers: Vec<(Ipv4Net, Ipv4Addr)>,
    /// Device that carries the outer packets, by name or address [default: the default route's]
    #[arg(long, env = "OVERLAY_AGENT_IFACE", value_name = "NAME|ADDRESS")]
    iface: Option<String>,
    /// Address by which peers reach this host [default: the first of --iface]
    #[arg(long, env = "OVERLAY_AGENT_PUBLIC_IP", value_name = "ADDRESS")]
    public_ip: Option<Ipv4Addr>,
    /// UDP port of every host [default: the config's, else 8285]
    #[arg(long, env = "OVERLAY_AGENT_PORT", value_parser = clap::value_parser!(u16).range(1..))]
    port: Option<u16>,
    /// How packets move
    #[arg(long, env = "OVERLAY_AGENT_DATAPATH", value_enum, default_value_t)]
    datapath: Request,
    /// How tc programs are attached
    #[arg(long, env = "OVERLAY_AGENT_TC_ATTACH", value_enum, default_value_t)]
    tc_attach: TcAttach,
    /// Write FLANNEL_NETWORK, FLANNEL_SUBNET, FLANNEL_MTU and FLANNEL_IPMASQ to this file, for container runtimes
    #[arg(long, env = "OVERLAY_AGENT_SUBNET_FILE", value_name = "PATH")]
    subnet_file: Option<PathBuf>,
    #[command(flatten)]
    agent: AgentArgs,
    #[command(flatten)]
    etcd: EtcdArgs,
}

/// What `--store` says.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Store {
    Dir(PathBuf),
    Etcd,
}

pub(super) async fn run(args: RunArgs) -> Result<()> {
    // RUST_LOG is the usual way to ask for more.
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let colours = std::io::stderr().is_terminal();
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(colours)
        .with_target(false)
        .init();
    let mut peers = std::collections::BTreeMap::new();
    for (subnet, address) in args.peers {
        if let Some(other) = peers.insert(subnet, address) {
            anyhow::bail!("--peer names {subnet} twice, at {other} and at {address}");
        }
    }
    let store = match args.store {
        None => StoreOption::None,
        Some(Store::Dir(path)) => StoreOption::Dir(path),
        Some(Store::Etcd) => StoreOption::Etcd(Box::new(args.etcd.into())),
    };
    agent::run(Options {
        store,
        network: args.network,
        subnet: args.subnet,
        peers,
        iface: args.iface,
        public_ip: args.public_ip,
        device: args.agent.device,
        port: args.port,
        datapath: args.datapath,
        tc_attach: args.tc_attach,
        subnet_file: args.subnet_file,
        run_dir: args.agent.run_dir,
    })
    .await
}

fn parse_store(text: &str) -> Result<Store, String> {
    match (text, text.strip_prefix("dir:")) {
        ("etcd", _) => Ok(Store::Etcd),
        (_, Some(path)) if !path.is_empty() => Ok(Store::Dir(path.into())),
        _ => Err("expected dir:PATH, for example dir:/var/lib/overlay, or etcd".to_owned()),
    }
}

fn parse_net(text: &str) -> Result<Ipv4Net, String> {
    match text.parse::<Ipv4Net>() {
        Ok(net) if net == net.trunc() => Ok(net),
        Ok(net) => Err(format!("host bits are set: did you mean {}?", net.trunc())),
        Err(_) => Err("expected a network such as 10.244.0.0/16".to_owned()),
    }
}

fn parse_peer(text: &str) -> Result<(Ipv4Net, Ipv4Addr), String> {
    let example = || "expected SUBNET=ADDRESS, for example 10.244.2.0/24=192.168.77.2".to_owned();
    let (subnet, address) = text.split_once('=').ok_or_else(example)?;
    Ok((parse_net(subnet)?, address.parse().map_err(|_| example())?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stores_networks_and_peers_are_parsed_or_refused_with_an_example() {
        assert_eq!(parse_store("dir:/x").unwrap(), Store::Dir(PathBuf::from("/x")));
        assert_eq!(parse_store("etcd").unwrap(), Store::Etcd);
        assert!(parse_store("/x").unwrap_err().contains("dir:"));
        assert!(parse_net("10.244.1.5/24").unwrap_err().contains("10.244.1.0/24"));
        assert!(parse_net("10.244.1.0").unwrap_err().contains("such as"));
        let peer = parse_peer("10.244.2.0/24=192.168.77.2").unwrap();
        assert_eq!(peer, ("10.244.2.0/24".parse().unwrap(), Ipv4Addr::new(192, 168, 77, 2)));
        assert!(parse_peer("10.244.2.0/24").unwrap_err().contains("SUBNET=ADDRESS"));
    }
}
