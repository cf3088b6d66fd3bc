//! flanneld's flags for the underlay.

use std::net::{Ipv4Addr, Ipv6Addr};

use clap::Args;

use crate::underlay::{Iface, Pattern, Selector};

#[derive(Debug, Args)]
#[command(next_help_heading = "Underlay")]
pub(super) struct UnderlayArgs {
    /// Underlay device, by name or address; may be repeated, the first that exists is used
    /// [default: the device that holds --public-ip, else the device of the default route]
    #[arg(long, env = "OVERLAY_AGENT_IFACE", value_name = "NAME|ADDRESS", value_parser = parse_iface)]
    iface: Vec<Iface>,
    /// Regular expression for the address or name of the underlay device, if no --iface exists; may be repeated
    #[arg(long, value_name = "REGEX")]
    iface_regex: Vec<Pattern>,
    /// Use the device of the route to this address, if neither --iface nor --iface-regex finds one
    #[arg(long, value_name = "ADDRESS", value_parser = parse_address)]
    iface_can_reach: Option<Ipv4Addr>,
    /// Address at which peers reach this host [default: the first of the underlay device]
    #[arg(long, env = "OVERLAY_AGENT_PUBLIC_IP", value_name = "ADDRESS", value_parser = parse_address)]
    public_ip: Option<Ipv4Addr>,
}

impl From<UnderlayArgs> for Selector {
    fn from(args: UnderlayArgs) -> Self {
        Self {
            ifaces: args.iface,
            patterns: args.iface_regex,
            can_reach: args.iface_can_reach,
            public_ip: args.public_ip,
        }
    }
}

fn parse_iface(text: &str) -> Result<Iface, String> {
    if text.parse::<Ipv6Addr>().is_ok() {
        return Err("IPv6 is not supported: name the device or give its IPv4 address".to_owned());
    }
    Ok(text.parse().map_or_else(|_| Iface::Name(text.to_owned()), Iface::Address))
}

fn parse_address(text: &str) -> Result<Ipv4Addr, String> {
    text.parse().map_err(|_| "expected an IPv4 address such as 192.168.77.1".to_owned())
}
