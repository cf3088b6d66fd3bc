//! Selects the underlay from devices, addresses and routes. Pure.

use std::net::Ipv4Addr;

use anyhow::{Result, bail};
use ipnet::Ipv4Net;

use super::{Iface, Pattern, Selector, Underlay};
use crate::{
    device,
    netlink::{Hop, Link},
};

/// The devices, addresses and routes of this host.
#[derive(Debug, Default)]
pub(super) struct HostView {
    pub(super) links: Vec<Link>,
    /// Addresses with the index of their device, in the kernel's order: primary addresses first.
    pub(super) addresses: Vec<(u32, Ipv4Net)>,
    /// The device of the default route.
    pub(super) default: Option<u32>,
    /// The route to [`Selector::can_reach`].
    pub(super) reached: Option<Hop>,
}

/// Selects the device and its address as flannel does. Fails with why each criterion found no device, and the devices that can
/// be named.
pub(super) fn choose(selector: &Selector, host: &HostView) -> Result<Underlay> {
    let mut tried = Vec::new();
    let has_criteria =
        !selector.ifaces.is_empty() || !selector.patterns.is_empty() || selector.can_reach.is_some();
    let named = selector.ifaces.iter().map(|iface| host.named(iface));
    let matching = selector.patterns.iter().map(|pattern| host.matching(pattern));
    let reaching = selector.can_reach.map(|address| host.reaching(address));
    let fallback = (!has_criteria).then(|| match selector.public_ip {
        Some(address) => host.holding(address).ok_or_else(|| {
            format!("--public-ip {address}: no device holds that address, so name the device with --iface")
        }),
        None => host.default_route(),
    });
    for attempt in named.chain(matching).chain(reaching).chain(fallback) {
        match attempt {
            Ok((link, address)) => {
                // Peers send to the public address: if the device holds it, the agent listens there.
                let held = |public_ip: &Ipv4Addr| host.of_link(&link).any(|address| address == *public_ip);
                let local_ip = selector.public_ip.filter(held).unwrap_or(address);
                return Ok(Underlay { link, local_ip, public_ip: selector.public_ip.unwrap_or(address) });
            }
            Err(reason) => tried.push(reason),
        }
    }
    let available = host.names().join(", ");
    let remedy = match available.is_empty() {
        true => "this host has no device with an IPv4 address".to_owned(),
        false => format!("--iface can be one of {available}"),
    };
    bail!("found no device for the underlay: {}; {remedy}", tried.join("; "))
}

/// A device and its address, or why a criterion finds none.
type Found = Result<(Link, Ipv4Addr), String>;

/// The address of a device that flannel would select: not a loopback address, and a link-local one only if there is no other.
pub(super) fn best_address(addresses: &[(u32, Ipv4Net)], index: u32) -> Option<Ipv4Addr> {
    let own = || {
        let own = addresses.iter().filter(move |(holder, _)| *holder == index);
        own.map(|(_, net)| net.addr()).filter(|address| !address.is_loopback())
    };
    own().find(|address| !address.is_link_local()).or_else(|| own().next())
}

impl HostView {
    /// Devices that can be an underlay: all but overlay devices and the loopback device, whose packets never leave the host.
    fn candidates(&self) -> impl Iterator<Item = &Link> {
        self.links.iter().filter(|link| !device::is_ours(link) && !link.loopback)
    }

    /// Whether the operator names the loopback device.
    fn is_loopback(&self, iface: &Iface) -> bool {
        self.links.iter().filter(|link| link.loopback).any(|link| match iface {
            Iface::Name(name) => link.name == *name,
            Iface::Address(address) => self.of_link(link).any(|own| own == *address),
        })
    }

    fn by_index(&self, index: u32) -> Option<&Link> {
        self.candidates().find(|link| link.index == index)
    }

    /// The addresses of a device.
    fn of_link(&self, link: &Link) -> impl Iterator<Item = Ipv4Addr> {
        let own = self.addresses.iter().filter(|(holder, _)| *holder == link.index);
        own.map(|(_, net)| net.addr())
    }

    /// The device with its best address.
    fn with_address(&self, link: &Link) -> Option<(Link, Ipv4Addr)> {
        Some((link.clone(), best_address(&self.addresses, link.index)?))
    }

    fn holding(&self, address: Ipv4Addr) -> Option<(Link, Ipv4Addr)> {
        let (index, _) = self.addresses.iter().find(|(_, net)| net.addr() == address)?;
        Some((self.by_index(*index)?.clone(), address))
    }

    fn named(&self, iface: &Iface) -> Found {
        let refused = |why| format!("--iface {iface}: {why}");
        if self.is_loopback(iface) {
            return Err(refused(
                "packets on the loopback device never leave this host, so name the device that leads to the other hosts",
            ));
        }
        match iface {
            Iface::Address(address) => {
                self.holding(*address).ok_or_else(|| refused("no device holds that address"))
            }
            Iface::Name(name) => {
                let link = self.candidates().find(|link| link.name == *name);
                let link = link.ok_or_else(|| refused("there is no device of that name"))?;
                self.with_address(link).ok_or_else(|| refused("the device has no IPv4 address"))
            }
        }
    }

    /// Matches the addresses of all devices before their names.
    fn matching(&self, pattern: &Pattern) -> Found {
        let matches = |address: &Ipv4Addr| !address.is_loopback() && pattern.0.is_match(&address.to_string());
        for link in self.candidates() {
            if let Some(address) = self.of_link(link).find(matches) {
                return Ok((link.clone(), address));
            }
        }
        let link = self.candidates().find(|link| pattern.0.is_match(&link.name));
        let link = link.ok_or_else(|| format!("--iface-regex {pattern}: matches no address and no name"))?;
        self.with_address(link).ok_or_else(|| {
            format!("--iface-regex {pattern}: matches the device {}, which has no IPv4 address", link.name)
        })
    }

    /// Not for an address of this host: its route uses the loopback device.
    fn reaching(&self, address: Ipv4Addr) -> Found {
        let found = self.reached.and_then(|hop| {
            let link = self.by_index(hop.index)?;
            hop.source.map(|source| (link.clone(), source)).or_else(|| self.with_address(link))
        });
        found.ok_or_else(|| {
            format!("--iface-can-reach {address}: no route to it through a device with an IPv4 address")
        })
    }

    fn default_route(&self) -> Found {
        let link = self.default.and_then(|index| self.by_index(index));
        link.and_then(|link| self.with_address(link)).ok_or_else(|| {
            "there is no default route through a device with an IPv4 address, so name the device with --iface"
                .to_owned()
        })
    }

    /// The candidates that have an address, with it.
    fn names(&self) -> Vec<String> {
        let found = self.candidates().filter_map(|link| self.with_address(link));
        found.map(|(link, address)| format!("{} ({address})", link.name)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(index: u32, name: &str) -> Link {
        Link { loopback: name == "lo", ..Link::ethernet(index, name) }
    }

    /// lo, eth0 with two addresses, eth1 with a link-local one first, eth2 without addresses, and an overlay device.
    fn host() -> HostView {
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
        HostView {
            links: vec![link(1, "lo"), link(2, "eth0"), link(3, "eth1"), link(4, "eth2"), overlay],
            addresses: addresses.map(|(index, net)| (index, net.parse().unwrap())).into(),
            default: Some(2),
            reached: None,
        }
    }

    fn found(selector: &Selector, host: &HostView) -> String {
        let Underlay { link, local_ip, public_ip } = choose(selector, host).unwrap();
        format!("{} {local_ip} {public_ip}", link.name)
    }

    fn selector(ifaces: &[&str], patterns: &[&str]) -> Selector {
        let iface =
            |text: &&str| text.parse().map_or_else(|_| Iface::Name((*text).to_owned()), Iface::Address);
        Selector {
            ifaces: ifaces.iter().map(iface).collect(),
            patterns: patterns.iter().map(|text| text.parse().unwrap()).collect(),
            ..Selector::default()
        }
    }

    fn refusal(selector: &Selector, host: &HostView) -> String {
        choose(selector, host).unwrap_err().to_string()
    }

    #[test]
    fn the_first_existing_interface_is_selected() {
        for (ifaces, patterns, expected) in [
            (&["eth7", "eth2", "eth1", "eth0"][..], &[][..], "eth1 192.168.7.1 192.168.7.1"),
            (&["10.9.9.9", "172.16.0.1"], &[], "eth0 172.16.0.1 172.16.0.1"),
            (&["nosuch"], &["eth1"], "eth1 192.168.7.1 192.168.7.1"),
            (&["eth1"], &["eth0"], "eth1 192.168.7.1 192.168.7.1"),
        ] {
            assert_eq!(found(&selector(ifaces, patterns), &host()), expected);
        }
    }

    #[test]
    fn patterns_match_addresses_before_names_and_never_an_overlay_device() {
        let host = host();
        assert_eq!(found(&selector(&[], &[r"^172\.16\."]), &host), "eth0 172.16.0.1 172.16.0.1");
        assert_eq!(found(&selector(&[], &[r"\d"]), &host), "eth0 10.0.0.1 10.0.0.1");
        assert_eq!(found(&selector(&[], &["^nosuch", "eth[12]"]), &host), "eth1 192.168.7.1 192.168.7.1");
        assert!(choose(&selector(&[], &["^ovl"]), &host).is_err());
        assert!(choose(&selector(&[], &["^lo$", r"^127\."]), &host).is_err());
    }

    #[test]
    fn the_loopback_device_is_refused_with_the_reason_whatever_address_it_holds() {
        let mut host = host();
        host.addresses.push((1, "10.3.3.3/32".parse().unwrap()));
        for iface in ["lo", "10.3.3.3", "127.0.0.1"] {
            let text = refusal(&selector(&[iface], &[]), &host);
            assert!(
                text.contains("packets on the loopback device never leave") && text.contains("eth0"),
                "{text}"
            );
        }
        for patterns in [&["^lo$"][..], &[r"^10\.3\."]] {
            assert!(choose(&selector(&[], patterns), &host).is_err(), "{patterns:?}");
        }
        let public_ip = Some(Ipv4Addr::new(10, 3, 3, 3));
        assert!(choose(&Selector { public_ip, ..Selector::default() }, &host).is_err());
        // A router has its address on the loopback device, and sends through another one.
        let router = Selector { public_ip, ..selector(&["eth0"], &[]) };
        assert_eq!(found(&router, &host), "eth0 10.0.0.1 10.3.3.3");
    }

    #[test]
    fn a_reachable_address_selects_device_and_source() {
        let address = Ipv4Addr::new(192, 168, 7, 9);
        let selector = Selector { can_reach: Some(address), ..selector(&["nosuch"], &[]) };
        let hop = |index, source| HostView { reached: Some(Hop { index, source }), ..host() };
        let source = Some(Ipv4Addr::new(169, 254, 3, 4));
        assert_eq!(found(&selector, &hop(3, source)), "eth1 169.254.3.4 169.254.3.4");
        assert_eq!(found(&selector, &hop(3, None)), "eth1 192.168.7.1 192.168.7.1");
        assert!(choose(&selector, &hop(1, source)).is_err(), "the host's own address");
        assert!(choose(&selector, &host()).is_err());
    }

    #[test]
    fn the_public_address_is_the_last_criterion_and_may_be_on_no_device() {
        let host = host();
        let public =
            |address: [u8; 4], ifaces| Selector { public_ip: Some(address.into()), ..selector(ifaces, &[]) };
        assert_eq!(found(&public([192, 168, 7, 1], &[]), &host), "eth1 192.168.7.1 192.168.7.1");
        assert_eq!(found(&public([203, 0, 113, 5], &["eth0"]), &host), "eth0 10.0.0.1 203.0.113.5");
        assert_eq!(found(&public([172, 16, 0, 1], &["eth0"]), &host), "eth0 172.16.0.1 172.16.0.1");
        assert!(refusal(&public([203, 0, 113, 5], &[]), &host).contains("--public-ip"));
        assert_eq!(found(&Selector::default(), &host), "eth0 10.0.0.1 10.0.0.1");
    }

    #[test]
    fn the_error_lists_the_criteria_and_the_available_devices() {
        let host = HostView { default: None, ..host() };
        let selector =
            Selector { can_reach: Some(Ipv4Addr::new(8, 8, 8, 8)), ..selector(&["eth7", "eth2"], &["^en"]) };
        let text = refusal(&selector, &host);
        for part in
            ["eth7: there is no", "eth2: the device has no", "^en: matches no", "8.8.8.8", "eth0 (10.0.0.1)"]
        {
            assert!(text.contains(part), "{part} is missing: {text}");
        }
        assert!(!text.contains("ovl0") && !text.contains("lo (") && !text.contains('\n'), "{text}");
        assert!(refusal(&Selector::default(), &host).contains("default route"));
        assert!(refusal(&Selector::default(), &HostView::default()).contains("no device with"));
    }
}
