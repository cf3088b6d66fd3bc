//! Which device carries the outer packets, as flanneld's flags say it.

use std::net::{Ipv4Addr, Ipv6Addr};

use clap::Args;

use crate::underlay::{Iface, Pattern, Wish};

#[derive(Debug, Args)]
#[command(next_help_heading = "The underlay")]
pub(super) struct UnderlayArgs {
    /// Device that carries the outer packets, by name or address; of several, the first that is there
    /// [default: the one with --public-ip, else the default route's]
    #[arg(long, env = "OVERLAY_AGENT_IFACE", value_name = "NAME|ADDRESS", value_parser = parse_iface)]
    iface: Vec<Iface>,
    /// Regular expression for an address or name of that device, tried when no --iface is there; may be repeated
    #[arg(long, value_name = "REGEX")]
    iface_regex: Vec<Pattern>,
    /// Take the device through which this address is reached, when neither says one
    #[arg(long, value_name = "ADDRESS", value_parser = parse_address)]
    iface_can_reach: Option<Ipv4Addr>,
    /// Address by which peers reach this host [default: the first of the device]
    #[arg(long, env = "OVERLAY_AGENT_PUBLIC_IP", value_name = "ADDRESS", value_parser = parse_address)]
    public_ip: Option<Ipv4Addr>,
}

impl From<UnderlayArgs> for Wish {
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
        return Err(
            "IPv6 cannot apply here, the overlay carries IPv4 only: name the device or give its IPv4 address"
                .to_owned(),
        );
    }
    Ok(text.parse().map_or_else(|_| Iface::Name(text.to_owned()), Iface::Address))
}

fn parse_address(text: &str) -> Result<Ipv4Addr, String> {
    text.parse().map_err(|_| "expected an IPv4 address such as 192.168.77.1".to_owned())
}
