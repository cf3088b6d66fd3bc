//! What the operator asked for, checked against itself before anything is changed.

use std::net::Ipv4Addr;

use anyhow::{Result, bail};
use ipnet::Ipv4Net;

use super::Options;
use crate::{config::NetworkConfig, lease, underlay::Underlay};

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
    if config.network.contains(&public_ip) || config.network.contains(&underlay.local_ip) {
        bail!(
            "the public address {public_ip} lies inside the network {}: the overlay would carry its own packets",
            config.network
        );
    }
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

fn overlaps(a: Ipv4Net, b: Ipv4Net) -> bool {
    a.contains(&b) || b.contains(&a)
}
