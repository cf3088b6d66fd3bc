//! `overlay-agent run`.

use std::{ffi::OsString, io::IsTerminal as _, net::Ipv4Addr, path::PathBuf, time::Duration};

use anyhow::{Result, bail};
use clap::{
    Args,
    builder::{OsStringValueParser, TypedValueParser as _},
};
use overlay_ebpf::abi::{SourceCheck, TosRule};
use tracing_subscriber::EnvFilter;

use super::{
    AgentArgs, host_args::HostArgs, service_args::ServiceArgs, state_args::StateArgs, store_args::StoreArgs,
    underlay_args::UnderlayArgs,
};
use crate::{
    agent::{self, OnExit, Options, StoreOption},
    datapath::{BypassRequest, Pauses, Policy, Request, ebpf::TcAttach},
    route::{Peer, Routes, Subnet, SubnetError},
};

/// flanneld's path, which container runtimes read.
const SUBNET_FILE: &str = "/run/flannel/subnet.env";

#[derive(Debug, Args)]
pub(super) struct RunArgs {
    /// Network of the overlay; written to the store when it has no config
    #[arg(long, env = "OVERLAY_AGENT_NETWORK", value_name = "CIDR")]
    network: Option<Subnet>,
    /// Subnet of this host [default: the one it holds, else a free one]
    #[arg(long, env = "OVERLAY_AGENT_SUBNET", value_name = "CIDR")]
    subnet: Option<Subnet>,
    /// Static peer, in addition to those in the store; may be repeated. With `,no-offload`, its host runs flanneld or another
    /// program that cannot take super-packets and unfinished checksums
    #[arg(long = "peer", value_name = "SUBNET=ADDRESS[,no-offload]", value_parser = parse_peer)]
    peers: Vec<(Subnet, Peer)>,
    /// UDP port of all hosts [default: from the config, else 8285]
    #[arg(long, env = "OVERLAY_AGENT_PORT", value_parser = clap::value_parser!(u16).range(1..))]
    port: Option<u16>,
    /// Datapath of both directions
    #[arg(long, env = "OVERLAY_AGENT_DATAPATH", value_enum, default_value_t)]
    datapath: Request,
    /// Pause before the first attempt of `--datapath auto` to return to a faster rung; further ones wait twice as long, up to 20 times this
    #[arg(long, value_name = "SECONDS", default_value_t = 30, hide = true, value_parser = clap::value_parser!(u16).range(1..))]
    rung_pause: u16,
    /// Which packets between containers and peers skip the host's stack, on the eBPF rungs
    #[arg(long, env = "OVERLAY_AGENT_BYPASS", value_enum, default_value_t)]
    bypass: BypassRequest,
    /// Device that leads to containers, for --bypass: a bridge, or a veth; may be repeated, and end with `*` [default: those of
    /// the subnet's gateway address and of routes inside the subnet]
    #[arg(long = "container-iface", value_name = "NAME")]
    container_ifaces: Vec<String>,
    /// Attachment of tc programs
    #[arg(long, env = "OVERLAY_AGENT_TC_ATTACH", value_enum, default_value_t)]
    tc_attach: TcAttach,
    /// DSCP of outer packets: that of the inner packet, or always this number. ECN is always copied
    #[arg(long, env = "OVERLAY_AGENT_DSCP", value_name = "copy|0..63", default_value = "copy", value_parser = parse_dscp)]
    dscp: TosRule,
    /// Which inner sources a packet from a peer may have
    #[arg(long, env = "OVERLAY_AGENT_SOURCE_CHECK", value_enum, default_value_t)]
    source_check: SourceCheckArg,
    /// What stays when the agent ends on SIGTERM: `overlay-agent down` removes it
    #[arg(long, env = "OVERLAY_AGENT_ON_EXIT", value_enum, default_value_t)]
    on_exit: OnExit,
    /// Take over from the agent that runs on this device, if one does, without a loss of packets: it ends when this one forwards. Not for
    /// a unit of systemd, which has its own way to restart without loss
    #[arg(long)]
    take_over: bool,
    /// Log failures inside the eBPF programs (rate-limited)
    #[arg(long, env = "OVERLAY_AGENT_DATAPATH_LOG", value_parser = clap::builder::FalseyValueParser::new())]
    datapath_log: bool,
    /// Write FLANNEL_NETWORK, FLANNEL_SUBNET, FLANNEL_MTU and FLANNEL_IPMASQ to this file, for container runtimes; `none` or
    /// an empty value writes no file [default: /run/flannel/subnet.env with leases in etcd, else none]
    #[arg(
        long,
        env = "OVERLAY_AGENT_SUBNET_FILE",
        value_name = "PATH|none",
        value_parser = OsStringValueParser::new().map(SubnetFile::from)
    )]
    subnet_file: Option<SubnetFile>,
    // Before the groups with a heading: a heading applies to all arguments that follow.
    #[command(flatten)]
    agent: AgentArgs,
    #[command(flatten)]
    state: StateArgs,
    #[command(flatten)]
    store: StoreArgs,
    /// Renew the lease when it has this many minutes left [default: 60]
    #[arg(long, value_name = "MINUTES", value_parser = clap::value_parser!(u16).range(1..=1439))]
    subnet_lease_renew_margin: Option<u16>,
    #[command(flatten)]
    underlay: UnderlayArgs,
    #[command(flatten)]
    services: ServiceArgs,
    #[command(flatten)]
    host: HostArgs,
}

/// Value of `--source-check`.
#[derive(Clone, Copy, Debug, Default, clap::ValueEnum)]
enum SourceCheckArg {
    /// Those of the subnet that the sending host holds
    #[default]
    Strict,
    /// Those of any peer's subnet: for hosts whose packets come from another address than their record says, such as behind NAT
    Loose,
    /// All but those of this host's subnet, as with flanneld
    Off,
}

impl From<SourceCheckArg> for SourceCheck {
    fn from(arg: SourceCheckArg) -> Self {
        match arg {
            SourceCheckArg::Strict => Self::Strict,
            SourceCheckArg::Loose => Self::Loose,
            SourceCheckArg::Off => Self::Off,
        }
    }
}

/// Value of `--subnet-file`.
#[derive(Clone, Debug)]
enum SubnetFile {
    Off,
    Path(PathBuf),
}

impl From<OsString> for SubnetFile {
    fn from(value: OsString) -> Self {
        match value.is_empty() || value == "none" {
            true => Self::Off,
            false => Self::Path(value.into()),
        }
    }
}

pub(super) async fn run(args: RunArgs) -> Result<()> {
    start_log(args.host.v);
    agent::run(args.options()?).await
}

fn start_log(verbosity: i64) {
    let level = match verbosity {
        ..=0 => "info",
        // flannel's own messages use levels up to 4, its libraries higher ones.
        1..=4 => "info,overlay_agent=debug",
        5.. => "debug,overlay_agent=trace",
    };
    // RUST_LOG takes precedence.
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .init();
}

impl RunArgs {
    fn options(self) -> Result<Options> {
        let mut peers = Routes::new();
        for (subnet, peer) in self.peers {
            if let Some(other) = peers.insert(subnet, peer) {
                bail!("--peer names {subnet} twice, at {other} and at {peer}");
            }
        }
        let mut store = self.store.option(peers.is_empty())?;
        if let Some(minutes) = self.subnet_lease_renew_margin {
            let StoreOption::Etcd(etcd) = &mut store else {
                bail!(
                    "--subnet-lease-renew-margin applies only to leases in etcd: remove it, or add --store etcd"
                )
            };
            etcd.renew_margin = Duration::from_secs(u64::from(minutes) * 60);
        }
        let subnet_file = match self.subnet_file {
            Some(SubnetFile::Path(path)) => Some(path),
            Some(SubnetFile::Off) => None,
            None => matches!(store, StoreOption::Etcd(_)).then(|| PathBuf::from(SUBNET_FILE)),
        };
        Ok(Options {
            store,
            network: self.network.map(Subnet::prefix),
            subnet: self.subnet,
            peers,
            underlay: self.underlay.into(),
            device: self.agent.device,
            port: self.port,
            datapath: self.datapath,
            rung_pauses: Pauses::from_first(Duration::from_secs(self.rung_pause.into())),
            bypass: self.bypass,
            container_ifaces: self.container_ifaces,
            tc_attach: self.tc_attach,
            policy: Policy { tos: self.dscp, source_check: self.source_check.into() },
            datapath_log: self.datapath_log,
            subnet_file,
            run_dir: self.agent.run_dir,
            state_dir: self.state.state_dir,
            snapshot: !self.state.no_snapshot,
            host: self.host.into(),
            services: self.services.into(),
            on_exit: self.on_exit,
            take_over: self.take_over,
        })
    }
}

fn parse_peer(text: &str) -> Result<(Subnet, Peer), String> {
    let example = || {
        "expected SUBNET=ADDRESS or SUBNET=ADDRESS,no-offload, for example 10.244.2.0/24=192.168.77.2"
            .to_owned()
    };
    let (subnet, peer) = text.split_once('=').ok_or_else(example)?;
    let (address, takes_unfinished) = match peer.split_once(',') {
        None => (peer, true),
        Some((address, "no-offload")) => (address, false),
        Some(_) => return Err(example()),
    };
    let address: Ipv4Addr = address.parse().map_err(|_| example())?;
    let subnet = subnet.parse().map_err(|error: SubnetError| error.to_string())?;
    Ok((subnet, Peer { address, takes_unfinished }))
}

fn parse_dscp(text: &str) -> Result<TosRule, String> {
    match (text, text.parse()) {
        ("copy", _) => Ok(TosRule::COPY),
        (_, Ok(dscp @ 0..=63)) => Ok(TosRule::fixed(dscp)),
        _ => Err("expected copy, or a number from 0 to 63 (RFC 2474)".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory as _, Parser as _};

    use super::{
        super::{Cli, Command, flannel_args::command_line},
        *,
    };
    use crate::{store::etcd::EtcdOptions, underlay::Selector};

    fn options(line: &str) -> Result<Options, String> {
        let words = command_line(line.split(' ').map(OsString::from), |_| None)?;
        let cli = Cli::try_parse_from(words).map_err(|error| error.to_string())?;
        let Command::Run(args) = cli.command else { panic!("not run: {line}") };
        args.options().map_err(|error| error.to_string())
    }

    fn etcd(options: &Options) -> &EtcdOptions {
        let StoreOption::Etcd(etcd) = &options.store else { panic!("not etcd: {options:?}") };
        etcd
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn flanneld_without_flags_has_flannelds_defaults() {
        let options = options("flanneld").unwrap();
        let etcd = etcd(&options);
        assert_eq!(etcd.endpoints, ["http://127.0.0.1:4001", "http://127.0.0.1:2379"]);
        assert_eq!(etcd.prefix, "/coreos.com/network");
        assert_eq!(etcd.renew_margin, Duration::from_secs(3600));
        assert!(etcd.password.is_none() && etcd.username.is_none() && etcd.ca_file.is_none());
        assert_eq!(options.subnet_file, Some(PathBuf::from("/run/flannel/subnet.env")));
        assert_eq!(options.underlay, Selector::default());
        let defaults = agent::HostOptions {
            masquerade: false,
            fully_random: true,
            forward_rules: true,
            resync: Duration::from_secs(5),
            blackhole_route: false,
            healthz: None,
        };
        assert_eq!(options.host, defaults);
    }

    #[test]
    fn flannelds_flags_set_the_options() {
        let options = options(
            "flanneld -etcd-endpoints=https://a:1,https://b:2 -etcd-prefix /n -etcd-cafile=/ca -etcd-certfile=/c \
             -etcd-keyfile=/k -etcd-username=u -etcd-password=s3cret -iface=eth1 -iface 10.0.0.1 -iface-regex ^en \
             -iface-can-reach=10.0.0.9 -public-ip=1.2.3.4 -subnet-file=/s.env -subnet-lease-renew-margin=30 -ip-masq \
             -ip-masq-fully-random-disable -iptables-resync=9 -iptables-forward-rules=false -ip-blackhole-route \
             -healthz-ip=127.0.0.1 -healthz-port=8471 -v=3 -ip-masq=true",
        )
        .unwrap();
        let etcd = etcd(&options);
        assert_eq!(etcd.endpoints, ["https://a:1", "https://b:2"]);
        assert_eq!(etcd.prefix, "/n");
        assert_eq!(etcd.renew_margin, Duration::from_secs(1800));
        assert_eq!(options.underlay.ifaces.len(), 2);
        assert_eq!(options.underlay.public_ip, Some(Ipv4Addr::new(1, 2, 3, 4)));
        assert_eq!(options.subnet_file, Some(PathBuf::from("/s.env")));
        let host = agent::HostOptions {
            masquerade: true,
            fully_random: false,
            forward_rules: false,
            resync: Duration::from_secs(9),
            blackhole_route: true,
            healthz: Some("127.0.0.1:8471".parse().unwrap()),
        };
        assert_eq!(options.host, host);
        assert!(!format!("{options:?}").contains("s3cret"));
    }

    #[test]
    fn numbers_below_their_range_mean_what_they_mean_to_flanneld() {
        for (line, healthz) in [
            ("flanneld -v=-1 -healthz-port -1 -iptables-resync=0", None),
            (
                "flanneld -v=300 -healthz-port=65535 -iptables-resync=-5",
                Some("0.0.0.0:65535".parse().unwrap()),
            ),
        ] {
            let host = options(line).unwrap().host;
            assert_eq!((host.healthz, host.resync), (healthz, Duration::from_secs(1)), "{line}");
        }
    }

    #[test]
    fn wrong_flags_are_refused_without_showing_a_password() {
        for (flags, words) in [
            ("-iface fe80::1", "IPv6"),
            ("-healthz-port=65536", "65535"),
            ("-v=1.5", "--v"),
            ("-public-ip=fd00::1", "IPv4"),
            ("-iface-regex=(", "iface-regex"),
            ("-subnet-lease-renew-margin=0", "1..=1439"),
            ("-subnet-lease-renew-margin=1440", "1..=1439"),
            ("-etcd-password=s3cret", "--etcd-username"),
            ("-etcd-keyfile=/k", "--etcd-certfile"),
            ("--store dir:/a -etcd-prefix=/b", "--etcd-prefix"),
            ("--peer 10.244.2.0/24=192.168.77.2 -subnet-lease-renew-margin 5", "margin"),
        ] {
            let error = options(&format!("x run {flags}")).unwrap_err();
            assert!(error.contains(words) && !error.contains("s3cret"), "{error}");
        }
    }

    #[test]
    fn the_subnet_file_can_be_switched_off() {
        for line in [
            "flanneld -subnet-file none",
            "flanneld --subnet-file=",
            "flanneld -subnet-file=/a -subnet-file=",
        ] {
            assert_eq!(options(line).unwrap().subnet_file, None, "{line}");
        }
        assert_eq!(
            options("flanneld -subnet-file ./none").unwrap().subnet_file,
            Some(PathBuf::from("./none"))
        );
    }

    #[test]
    fn another_store_has_no_etcd_options() {
        etcd(&options("x run --peer 10.244.2.0/24=192.168.77.2 --store etcd").unwrap());
        for line in ["x run --store dir:/a", "x run --peer 10.244.2.0/24=192.168.77.2"] {
            let options = options(line).unwrap();
            let is_etcd = matches!(options.store, StoreOption::Etcd(_));
            assert!(!is_etcd && options.subnet_file.is_none(), "{line}");
        }
    }

    #[test]
    fn invalid_networks_and_peers_are_refused_with_an_example() {
        assert!(parse_peer("10.244.1.5/24=192.168.77.2").unwrap_err().contains("10.244.1.0/24"));
        assert!(parse_peer("10.244.1.0=192.168.77.2").unwrap_err().contains("such as"));
        for (text, takes_unfinished) in
            [("10.244.2.0/24=192.168.77.2", true), ("10.244.2.0/24=192.168.77.2,no-offload", false)]
        {
            let peer = Peer { address: Ipv4Addr::new(192, 168, 77, 2), takes_unfinished };
            assert_eq!(parse_peer(text).unwrap(), ("10.244.2.0/24".parse().unwrap(), peer));
        }
        assert!(parse_peer("10.244.2.0/24=192.168.77.2,fast").unwrap_err().contains("no-offload"));
        assert!(parse_peer("10.244.2.0/24").unwrap_err().contains("SUBNET=ADDRESS"));
    }

    #[test]
    fn policy_for_packets_is_read() {
        let policy = |flags: &str| options(&format!("x run {flags}")).map(|options| options.policy);
        assert_eq!(policy("--device x").unwrap(), policy("--dscp copy --source-check strict").unwrap());
        let set = policy("--dscp 46 --source-check loose").unwrap();
        assert_eq!((set.tos, set.source_check), (TosRule::fixed(46), SourceCheck::Loose));
        assert_eq!(policy("--source-check off").unwrap().source_check, SourceCheck::Off);
        for bad in ["64", "-1", "EF", ""] {
            assert!(policy(&format!("--dscp={bad}")).unwrap_err().contains("0 to 63"), "{bad}");
        }
    }
}
