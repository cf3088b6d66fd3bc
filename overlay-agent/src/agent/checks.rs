//! Checks of options, network config and underlay against each other, before anything is changed.

use anyhow::{Result, bail};
use ipnet::Ipv4Net;
use overlay_ebpf::wire::OVERHEAD;

use super::Options;
use crate::{config::NetworkConfig, lease, netlink::Link, underlay::Underlay};

/// The packet size that every IPv4 host must accept (RFC 791, section 3.1), in bytes.
const SMALLEST_MTU: u32 = 576;

/// Refuses networks, subnets and peers that cannot work together.
pub(super) fn check_addresses(options: &Options, config: &NetworkConfig, underlay: &Underlay) -> Result<()> {
    let public_ip = underlay.public_ip;
    check_underlay(config.network, underlay)?;
    if let Some(subnet) = options.subnet.filter(|subnet| !subnet.is_part_of(config.network)) {
        bail!("the subnet {subnet} is not a part of the network {}: choose another --subnet", config.network);
    }
    let subnets: Vec<_> = options.peers.keys().copied().collect();
    for (position, (subnet, peer)) in options.peers.iter().enumerate() {
        if !subnet.is_part_of(config.network) {
            bail!("--peer {subnet}={peer}: the subnet is not a part of the network {}", config.network);
        }
        let address = peer.address;
        if !lease::is_host(address) || config.network.contains(&address) || address == public_ip {
            bail!("--peer {subnet}={peer}: {peer} cannot be the underlay address of another host");
        }
        let later = subnets.iter().skip(position + 1).chain(&options.subnet);
        if let Some(other) = later.copied().find(|other| subnet.overlaps(*other)) {
            bail!("--peer {subnet}={peer}: the subnet overlaps {other}");
        }
    }
    Ok(())
}

/// The size of the largest inner packet that the underlay carries, in bytes.
pub(super) fn inner_mtu(link: &Link) -> Result<u32> {
    match link.mtu.checked_sub(OVERHEAD as u32).filter(|mtu| *mtu >= SMALLEST_MTU) {
        Some(mtu) => Ok(mtu),
        None => bail!("the MTU of {} is {}: too small for an overlay", link.name, link.mtu),
    }
}

/// Why no packet leaves or arrives through the device, with the remedy.
pub(super) fn dead_link(link: &Link) -> Option<String> {
    let name = &link.name;
    match (link.up, link.carrier) {
        (true, true) => None,
        (false, _) => Some(format!(
            "the underlay device {name} is down: peers are out of reach until it is up (ip link set {name} up)"
        )),
        (true, false) => Some(format!(
            "the underlay device {name} has no carrier: peers are out of reach until its cable, or the other end of its link, is \
             back"
        )),
    }
}

/// Refuses an underlay address inside the overlay.
pub(super) fn check_underlay(network: Ipv4Net, underlay: &Underlay) -> Result<()> {
    let public_ip = underlay.public_ip;
    if network.contains(&public_ip) || network.contains(&underlay.local_ip) {
        bail!(
            "the public address {public_ip} lies inside the network {network}: the overlay would carry its own packets"
        );
    }
    Ok(())
}
