//! The choice itself, from what the kernel has listed.

use std::{fmt, net::Ipv4Addr};

use ipnet::Ipv4Net;
use thiserror::Error;

use super::{Iface, Pattern, Underlay, Wish};
use crate::{
    device,
    netlink::{Hop, Link},
};

/// What the kernel says.
#[derive(Debug, Default)]
pub(super) struct Scene {
    pub(super) links: Vec<Link>,
    /// With the index of their device, in the kernel's order: primary addresses first.
    pub(super) addresses: Vec<(u32, Ipv4Net)>,
    /// The default route's device.
    pub(super) default: Option<u32>,
    /// How the address is reached that the wish names.
    pub(super) reached: Option<Hop>,
}

/// Why there is no underlay.
#[derive(Debug, Error, PartialEq, Eq)]
pub struct NoUnderlay {
    tried: Vec<Miss>,
    /// The host's devices with their addresses.
    there: Vec<String>,
}

impl fmt::Display for NoUnderlay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tried: Vec<_> = self.tried.iter().map(Miss::to_string).collect();
        write!(f, "found no device for the underlay: {}", tried.join("; "))?;
        match self.there.is_empty() {
            true => write!(f, "; this host has no device with an IPv4 address"),
            false => write!(f, "; --iface can be one of {}", self.there.join(", ")),
        }
    }
}

/// Why one way did not lead to a device.
#[derive(Debug, Error, PartialEq, Eq)]
enum Miss {
    #[error("--iface {0}: there is no device of that name")]
    Name(String),
    #[error("--iface {0}: no device holds that address")]
    Address(Ipv4Addr),
    #[error("--iface {0}: the device has no IPv4 address")]
    Bare(String),
    #[error("--iface-regex {0}: matches the device {1}, which has no IPv4 address")]
    BareMatch(String, String),
    #[error("--iface-regex {0}: matches no address and no name")]
    Match(String),
    #[error("--iface-can-reach {0}: no route leads there through a device with an IPv4 address")]
    Reach(Ipv4Addr),
    #[error("--public-ip {0}: no device holds that address, so name the device with --iface")]
    Public(Ipv4Addr),
    #[error(
        "there is no default route through a device with an IPv4 address, so name the device with --iface"
    )]
    Default,
}

/// Chooses as flannel does: the device, and the address of it that fits the way it was found.
pub(super) fn choose(wish: &Wish, scene: &Scene) -> Result<Underlay, NoUnderlay> {
    let mut tried = Vec::new();
    let asked = !wish.ifaces.is_empty() || !wish.patterns.is_empty() || wish.can_reach.is_some();
    let named = wish.ifaces.iter().map(|iface| scene.named(iface));
    let matching = wish.patterns.iter().map(|pattern| scene.matching(pattern));
    let reaching = wish.can_reach.map(|address| scene.reaching().ok_or(Miss::Reach(address)));
    let unasked = (!asked).then(|| match wish.public_ip {
        Some(address) => scene.holding(address).ok_or(Miss::Public(address)),
        None => scene.leading_out().ok_or(Miss::Default),
    });
    for way in named.chain(matching).chain(reaching).chain(unasked) {
        match way {
            Ok((link, address)) => {
                // Peers send to the public address: where the device has it, it is the one to listen at.
                let held = |public_ip: &Ipv4Addr| {
                    scene
                        .addresses
                        .iter()
                        .any(|(holder, net)| *holder == link.index && net.addr() == *public_ip)
                };
                let local_ip = wish.public_ip.filter(held).unwrap_or(address);
                return Ok(Underlay { link, local_ip, public_ip: wish.public_ip.unwrap_or(address) });
            }
            Err(miss) => tried.push(miss),
        }
    }
    Err(NoUnderlay { tried, there: scene.names() })
}

/// The address of a device that flannel would take: not one that only this host or this link knows, unless there is no
/// other than the latter.
pub(super) fn best_address(addresses: &[(u32, Ipv4Net)], index: u32) -> Option<Ipv4Addr> {
    let own = || {
        let own = addresses.iter().filter(move |(holder, _)| *holder == index);
        own.map(|(_, net)| net.addr()).filter(|address| !address.is_loopback())
    };
    own().find(|address| !address.is_link_local()).or_else(|| own().next())
}

impl Scene {
    /// Devices that can be an underlay. An overlay device cannot, also when a pattern matches its name.
    fn candidates(&self) -> impl Iterator<Item = &Link> {
        self.links.iter().filter(|link| !device::is_ours(link))
    }

    fn by_index(&self, index: u32) -> Option<&Link> {
        self.candidates().find(|link| link.index == index)
    }

    /// The device with the address that fits it best.
    fn with_address(&self, link: &Link) -> Option<(Link, Ipv4Addr)> {
        Some((link.clone(), best_address(&self.addresses, link.index)?))
    }

    fn named(&self, iface: &Iface) -> Result<(Link, Ipv4Addr), Miss> {
        match iface {
            Iface::Address(address) => self.holding(*address).ok_or(Miss::Address(*address)),
            Iface::Name(name) => {
                let link = self.candidates().find(|link| link.name == *name);
                let link = link.ok_or_else(|| Miss::Name(name.clone()))?;
                self.with_address(link).ok_or_else(|| Miss::Bare(name.clone()))
            }
        }
    }

    /// Addresses of all devices go before names.
    fn matching(&self, pattern: &Pattern) -> Result<(Link, Ipv4Addr), Miss> {
        let matches = |address: &Ipv4Addr| !address.is_loopback() && pattern.is_in(&address.to_string());
        for link in self.candidates() {
            let own = self.addresses.iter().filter(|(holder, _)| *holder == link.index);
            if let Some(address) = own.map(|(_, net)| net.addr()).find(matches) {
                return Ok((link.clone(), address));
            }
        }
        match self.candidates().find(|link| pattern.is_in(&link.name)) {
            Some(link) => {
                self.with_address(link).ok_or_else(|| Miss::BareMatch(pattern.to_string(), link.name.clone()))
            }
            None => Err(Miss::Match(pattern.to_string())),
        }
    }

    /// An address of this host is reached through the loopback device, which leads to no peer.
    fn reaching(&self) -> Option<(Link, Ipv4Addr)> {
        let hop = self.reached?;
        let link = self.by_index(hop.index).filter(|link| link.name != "lo")?;
        match hop.source {
            Some(source) => Some((link.clone(), source)),
            None => self.with_address(link),
        }
    }

    fn holding(&self, address: Ipv4Addr) -> Option<(Link, Ipv4Addr)> {
        let (index, _) = self.addresses.iter().find(|(_, net)| net.addr() == address)?;
        Some((self.by_index(*index)?.clone(), address))
    }

    fn leading_out(&self) -> Option<(Link, Ipv4Addr)> {
        self.with_address(self.by_index(self.default?)?)
    }

    fn names(&self) -> Vec<String> {
        let named = |link: &Link| {
            let address = best_address(&self.addresses, link.index)?;
            Some(format!("{} ({address})", link.name))
        };
        self.candidates().filter_map(named).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(index: u32, name: &str) -> Link {
        Link { name: name.to_owned(), index, mtu: 1500, up: true, ethernet: true, kind: None, alias: None }
    }

    /// lo, eth0 with two addresses, eth1 with a link-local one first, a bare eth2, and an earlier agent's device.
    fn scene() -> Scene {
        let mut overlay = link(5, "ovl0");
        (overlay.kind, overlay.alias) =
            (Some("tun".to_owned()), Some("overlay-agent 10.9.0.0/16 8285 eth0".to_owned()));
        let addresses = [
            (1, "127.0.0.1/8"),
            (2, "10.0.0.1/24"),
            (2, "172.16.0.1/24"),
            (3, "169.254.3.4/16"),
            (3, "192.168.7.1/24"),
            (5, "10.9.1.0/32"),
        ];
        Scene {
            links: vec![link(1, "lo"), link(2, "eth0"), link(3, "eth1"), link(4, "eth2"), overlay],
            addresses: addresses.map(|(index, net)| (index, net.parse().unwrap())).into(),
            default: Some(2),
            reached: None,
        }
    }

    fn found(wish: &Wish, scene: &Scene) -> String {
        let Underlay { link, local_ip, public_ip } = choose(wish, scene).unwrap();
        format!("{} {local_ip} {public_ip}", link.name)
    }

    fn wish(ifaces: &[&str], patterns: &[&str]) -> Wish {
        let iface =
            |text: &&str| text.parse().map_or_else(|_| Iface::Name((*text).to_owned()), Iface::Address);
        Wish {
            ifaces: ifaces.iter().map(iface).collect(),
            patterns: patterns.iter().map(|text| text.parse().unwrap()).collect(),
            ..Wish::default()
        }
    }

    #[test]
    fn the_first_interface_that_is_there_is_taken() {
        let scene = scene();
        assert_eq!(
            found(&wish(&["eth7", "eth2", "eth1", "eth0"], &[]), &scene),
            "eth1 192.168.7.1 192.168.7.1"
        );
        assert_eq!(found(&wish(&["10.9.9.9", "172.16.0.1"], &[]), &scene), "eth0 172.16.0.1 172.16.0.1");
        assert_eq!(found(&wish(&["nosuch"], &["eth1"]), &scene), "eth1 192.168.7.1 192.168.7.1");
        assert_eq!(found(&wish(&["eth1"], &["eth0"]), &scene), "eth1 192.168.7.1 192.168.7.1");
    }

    #[test]
    fn patterns_match_addresses_before_names_and_never_an_overlay_device() {
        let scene = scene();
        assert_eq!(found(&wish(&[], &[r"^172\.16\."]), &scene), "eth0 172.16.0.1 172.16.0.1");
        assert_eq!(found(&wish(&[], &[r"\d"]), &scene), "eth0 10.0.0.1 10.0.0.1");
        assert_eq!(found(&wish(&[], &["^nosuch", "eth[12]"]), &scene), "eth1 192.168.7.1 192.168.7.1");
        assert!(choose(&wish(&[], &["^ovl"]), &scene).is_err());
        assert!(choose(&wish(&[], &["^lo$", r"^127\."]), &scene).is_err());
    }

    #[test]
    fn a_reachable_address_chooses_device_and_source() {
        let address = Ipv4Addr::new(192, 168, 7, 9);
        let asked = Wish { can_reach: Some(address), ..wish(&["nosuch"], &[]) };
        let hop = |index, source| Scene { reached: Some(Hop { index, source }), ..scene() };
        let source = Some(Ipv4Addr::new(169, 254, 3, 4));
        assert_eq!(found(&asked, &hop(3, source)), "eth1 169.254.3.4 169.254.3.4");
        assert_eq!(found(&asked, &hop(3, None)), "eth1 192.168.7.1 192.168.7.1");
        assert!(choose(&asked, &hop(1, source)).is_err(), "the host's own address");
        assert!(choose(&asked, &scene()).is_err());
    }

    #[test]
    fn the_public_address_counts_last_and_may_be_held_by_nobody() {
        let scene = scene();
        let public = |address: [u8; 4], ifaces| Wish { public_ip: Some(address.into()), ..wish(ifaces, &[]) };
        assert_eq!(found(&public([192, 168, 7, 1], &[]), &scene), "eth1 192.168.7.1 192.168.7.1");
        assert_eq!(found(&public([203, 0, 113, 5], &["eth0"]), &scene), "eth0 10.0.0.1 203.0.113.5");
        assert_eq!(found(&public([172, 16, 0, 1], &["eth0"]), &scene), "eth0 172.16.0.1 172.16.0.1");
        assert!(
            choose(&public([203, 0, 113, 5], &[]), &scene).unwrap_err().to_string().contains("--public-ip")
        );
        assert_eq!(found(&Wish::default(), &scene), "eth0 10.0.0.1 10.0.0.1");
    }

    #[test]
    fn failing_tells_what_was_tried_and_what_there_is() {
        let scene = Scene { default: None, ..scene() };
        let asked = Wish { can_reach: Some(Ipv4Addr::new(8, 8, 8, 8)), ..wish(&["eth7", "eth2"], &["^en"]) };
        let text = choose(&asked, &scene).unwrap_err().to_string();
        for part in
            ["eth7: there is no", "eth2: the device has no", "^en: matches no", "8.8.8.8", "eth0 (10.0.0.1)"]
        {
            assert!(text.contains(part), "{part} is missing: {text}");
        }
        assert!(!text.contains("ovl0") && !text.contains("lo (") && !text.contains('\n'), "{text}");
        assert!(choose(&Wish::default(), &scene).unwrap_err().to_string().contains("default route"));
        assert!(
            choose(&Wish::default(), &Scene::default()).unwrap_err().to_string().contains("no device with")
        );
    }
}
