//! What the operator asked for, checked against itself before anything is changed.

use std::net::Ipv4Addr;

use anyhow::{Result, bail};
use ipnet::Ipv4Net;
use overlay_ebpf::wire::OVERHEAD;

use super::Options;
use crate::{config::NetworkConfig, lease, netlink::Link, underlay::Underlay};

/// What every IPv4 host must accept (RFC 791, section 3.1).
const SMALLEST_MTU: u32 = 576;

/// Address blocks that no host routes (RFC 6890).
const RESERVED: [(Ipv4Net, &str); 3] = [
    (Ipv4Net::new_assert(Ipv4Addr::UNSPECIFIED, 8), "\"this network\""),
    (Ipv4Net::new_assert(Ipv4Addr::new(127, 0, 0, 0), 8), "loopback"),
    (Ipv4Net::new_assert(Ipv4Addr::new(224, 0, 0, 0), 3), "multicast and reserved"),
];

/// What the operator wrote must make sense together.
pub(super) fn check_addresses(options: &Options, config: &NetworkConfig, underlay: &Underlay) -> Result<()> {
    let public_ip = underlay.public_ip;
    if let Some((block, what)) = RESERVED.iter().find(|(block, _)| overlaps(config.network, *block)) {
        bail!("the network {} overlaps {block}, {what}: choose another", config.network);
    }
    check_underlay(config.network, underlay)?;
    if let Some(subnet) = options.subnet
        && (!config.network.contains(&subnet) || subnet == config.network)
    {
        bail!("the subnet {subnet} is not a part of the network {}: choose another --subnet", config.network);
    }
    let peers: Vec<_> = options.peers.iter().collect();
    for (position, (subnet, peer)) in peers.iter().enumerate() {
        if !config.network.contains(*subnet) || **subnet == config.network {
            bail!("--peer {subnet}={peer}: the subnet is not a part of the network {}", config.network);
        }
        if !lease::is_host(**peer) || config.network.contains(*peer) || **peer == public_ip {
            bail!("--peer {subnet}={peer}: {peer} cannot be the underlay address of another host");
        }
        let later = peers.iter().skip(position + 1).map(|(other, _)| *other).chain(options.subnet.as_ref());
        for other in later {
            if subnet.contains(other) || other.contains(*subnet) {
                bail!("--peer {subnet}={peer}: the subnet overlaps {other}");
            }
        }
    }
    Ok(())
}

/// The largest inner packet that the underlay carries, in bytes.
pub(super) fn inner_mtu(link: &Link) -> Result<u32> {
    match link.mtu.checked_sub(OVERHEAD as u32).filter(|mtu| *mtu >= SMALLEST_MTU) {
        Some(mtu) => Ok(mtu),
        None => bail!("the MTU of {} is {}: too small for an overlay", link.name, link.mtu),
    }
}

/// An underlay inside the overlay would carry its own packets.
pub(super) fn check_underlay(network: Ipv4Net, underlay: &Underlay) -> Result<()> {
    let public_ip = underlay.public_ip;
    if network.contains(&public_ip) || network.contains(&underlay.local_ip) {
        bail!(
            "the public address {public_ip} lies inside the network {network}: the overlay would carry its own packets"
        );
    }
    Ok(())
}

fn overlaps(a: Ipv4Net, b: Ipv4Net) -> bool {
    a.contains(&b) || b.contains(&a)
}
