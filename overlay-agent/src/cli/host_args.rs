//! What an agent does on its host beside carrying packets, as flanneld's flags say it.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use clap::{ArgAction, Args};

use crate::agent::HostOptions;

#[derive(Debug, Args)]
#[command(next_help_heading = "The host")]
pub(super) struct HostArgs {
    /// Give packets that leave the overlay an address of this host
    #[arg(
        long,
        value_name = "BOOL",
        num_args = 0..=1,
        require_equals = true,
        default_value_t = false,
        default_missing_value = "true",
        action = ArgAction::Set
    )]
    ip_masq: bool,
    /// Do not choose the ports of such packets at random
    #[arg(
        long,
        value_name = "BOOL",
        num_args = 0..=1,
        require_equals = true,
        default_value_t = false,
        default_missing_value = "true",
        action = ArgAction::Set
    )]
    ip_masq_fully_random_disable: bool,
    /// Accept forwarded packets of the overlay where the host's FORWARD policy drops them
    #[arg(
        long,
        value_name = "BOOL",
        num_args = 0..=1,
        require_equals = true,
        default_value_t = true,
        default_missing_value = "true",
        action = ArgAction::Set
    )]
    iptables_forward_rules: bool,
    /// Look this often whether the firewall's rules are still there
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = 5,
        value_parser = clap::value_parser!(u32).range(1..)
    )]
    iptables_resync: u32,
    /// Drop packets for addresses of this host's subnet that no container has, rather than route them on
    #[arg(
        long,
        value_name = "BOOL",
        num_args = 0..=1,
        require_equals = true,
        default_value_t = false,
        default_missing_value = "true",
        action = ArgAction::Set
    )]
    ip_blackhole_route: bool,
    /// Address that /healthz and /readyz answer at
    #[arg(long, value_name = "ADDRESS", default_value = "0.0.0.0")]
    healthz_ip: IpAddr,
    /// Port that /healthz and /readyz answer at; 0 for none
    #[arg(long, value_name = "PORT", default_value_t = 0)]
    healthz_port: u16,
    /// How much to log: 0 what an operator needs, 1 to 4 what a developer needs, 5 and more everything
    #[arg(long, value_name = "LEVEL", default_value_t = 0)]
    v: u8,
}

impl HostArgs {
    pub(super) const fn verbosity(&self) -> u8 {
        self.v
    }
}

impl From<HostArgs> for HostOptions {
    fn from(args: HostArgs) -> Self {
        Self {
            masquerade: args.ip_masq,
            fully_random: !args.ip_masq_fully_random_disable,
            forward_rules: args.iptables_forward_rules,
            resync: Duration::from_secs(args.iptables_resync.into()),
            blackhole_route: args.ip_blackhole_route,
            healthz: (args.healthz_port != 0).then(|| SocketAddr::new(args.healthz_ip, args.healthz_port)),
        }
    }
}
