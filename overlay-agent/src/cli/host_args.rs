//! flanneld's flags for the firewall, the health checks and the log.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use clap::{ArgAction, Args};

use crate::agent::HostOptions;

/// Declares Go's boolean flags: `--flag`, `--flag=true` and `--flag=false`.
macro_rules! switches {
    ($($(#[$doc:meta])* $name:ident = $default:literal,)*) => {
        #[derive(Debug, Args)]
        struct Switches {$(
            $(#[$doc])*
            #[arg(
                long,
                value_name = "BOOL",
                num_args = 0..=1,
                require_equals = true,
                default_value_t = $default,
                default_missing_value = "true",
                action = ArgAction::Set
            )]
            $name: bool,
        )*}
    };
}

switches! {
    /// Masquerade packets that leave the overlay with an address of this host
    ip_masq = false,
    /// Do not randomize the source ports of masqueraded packets
    ip_masq_fully_random_disable = false,
    /// Accept forwarded packets of the overlay in the FORWARD chain of iptables
    iptables_forward_rules = true,
    /// Drop packets for unassigned addresses of this host's subnet, with a blackhole route
    ip_blackhole_route = false,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Host")]
pub(super) struct HostArgs {
    #[command(flatten)]
    switches: Switches,
    /// Interval between checks that restore missing firewall rules, at least 1
    #[arg(long, value_name = "SECONDS", default_value_t = 5)]
    iptables_resync: i64,
    /// Address on which to serve /healthz and /readyz
    #[arg(long, value_name = "ADDRESS", default_value = "0.0.0.0")]
    healthz_ip: IpAddr,
    /// Port on which to serve /healthz and /readyz; 0 or less disables them
    #[arg(long, value_name = "PORT", default_value_t = 0, value_parser = clap::value_parser!(i64).range(..=65535))]
    healthz_port: i64,
    /// Log level: 0 or less for operators, 1 to 4 for developers, 5 and higher includes libraries
    #[arg(long, value_name = "LEVEL", default_value_t = 0)]
    pub(super) v: i64,
}

impl From<HostArgs> for HostOptions {
    /// As with flanneld, numbers may be negative. It checks without a pause when the interval is 0 or less; the shortest interval
    /// here is one second.
    fn from(args: HostArgs) -> Self {
        let resync = u32::try_from(args.iptables_resync.max(1)).unwrap_or(u32::MAX);
        let port = u16::try_from(args.healthz_port).ok().filter(|port| *port != 0);
        Self {
            masquerade: args.switches.ip_masq,
            fully_random: !args.switches.ip_masq_fully_random_disable,
            forward_rules: args.switches.iptables_forward_rules,
            resync: Duration::from_secs(resync.into()),
            blackhole_route: args.switches.ip_blackhole_route,
            healthz: port.map(|port| SocketAddr::new(args.healthz_ip, port)),
        }
    }
}
