//! Chooses the devices that lead to containers. Pure.

use std::collections::{BTreeMap, BTreeSet};

use super::{Facts, Selection, facts::Side};
use crate::netlink::Link;

/// The chosen devices, and why others were not.
pub(super) struct Gateways<'a> {
    devices: BTreeMap<u32, Gateway<'a>>,
    skipped: BTreeSet<String>,
}

/// A device to which the host hands packets for containers, and those on which packets of the containers arrive: the ports of a
/// bridge, otherwise the device itself.
struct Gateway<'a> {
    link: &'a Link,
    arrivals: BTreeMap<u32, &'a Link>,
}

/// The ports that an operator wants of a bridge.
enum Ports {
    All,
    Only(BTreeSet<u32>),
}

pub(super) fn is_bridge(link: &Link) -> bool {
    link.kind.as_deref() == Some("bridge")
}

/// Whether it is one end of a veth pair whose other end is in another network namespace.
pub(super) fn is_container_veth(link: &Link) -> bool {
    link.kind.as_deref() == Some("veth") && link.leads_elsewhere
}

/// Whether a device leads to one container or virtual machine. Other devices may lead to many machines, and in several ways.
fn leads_to_container(link: &Link) -> bool {
    link.ethernet && (is_container_veth(link) || link.kind.as_deref() == Some("tun"))
}

impl<'a> Gateways<'a> {
    pub(super) fn choose(facts: &'a Facts, selection: &Selection) -> Self {
        let mut gateways = Self { devices: BTreeMap::new(), skipped: BTreeSet::new() };
        if selection.named.is_empty() {
            gateways.discover(facts, selection);
        } else {
            gateways.take_named(facts, selection);
        }
        gateways
    }

    /// The gateway device with this index.
    pub(super) fn get(&self, index: u32) -> Option<&'a Link> {
        self.devices.get(&index).map(|gateway| gateway.link)
    }

    /// The device `index`, if packets of the containers behind `gateway` arrive there.
    pub(super) fn arrival(&self, gateway: u32, index: u32) -> Option<&'a Link> {
        self.devices.get(&gateway)?.arrivals.get(&index).copied()
    }

    pub(super) fn devices(&self) -> impl Iterator<Item = &'a Link> {
        self.devices.values().map(|gateway| gateway.link)
    }

    pub(super) fn arrivals(&self) -> impl Iterator<Item = &'a Link> {
        self.devices.values().flat_map(|gateway| gateway.arrivals.values().copied())
    }

    pub(super) fn skipped(self) -> Vec<String> {
        self.skipped.into_iter().collect()
    }

    fn skip(&mut self, link: &Link, why: &str) {
        self.skipped.insert(format!("{}: {why}", link.name));
    }

    /// Devices with addresses of the subnet, and those to which routes inside the subnet lead.
    fn discover(&mut self, facts: &'a Facts, selection: &Selection) {
        let holders = facts.addresses.iter().map(|(index, _)| *index);
        let inside = facts.routes.iter().filter(|route| facts.subnet.contains(&route.destination));
        let routed = inside.filter_map(|route| route.device);
        let indexes: BTreeSet<u32> = holders.chain(routed).collect();
        // A device that is gone since its addresses and routes were listed is in no list of devices.
        for link in indexes.iter().filter_map(|index| facts.links.get(index)) {
            if selection.excluded.contains(&link.index) || link.loopback || !link.ethernet {
                continue;
            }
            if let Some(why) = traffic_control(facts, selection, link) {
                self.skip(link, &why);
            } else if is_bridge(link) {
                self.take_bridge(facts, selection, link, &Ports::All);
            } else if bridge_of(facts, link).is_some() {
                self.skip(
                    link,
                    "has an address or route of the subnet, but as the port of a bridge it receives nothing",
                );
            } else if leads_to_container(link) {
                self.take_device(link);
            } else {
                let kind = link.kind.as_deref().unwrap_or("hardware");
                self.skip(
                    link,
                    &format!("devices of kind {kind} may lead to several machines: bypassed only when named"),
                );
            }
        }
    }

    fn take_named(&mut self, facts: &'a Facts, selection: &Selection) {
        let mut bridges: BTreeMap<u32, Ports> = BTreeMap::new();
        for pattern in &selection.named {
            let (prefix, is_exact) = match pattern.strip_suffix('*') {
                Some(prefix) => (prefix, false),
                None => (pattern.as_str(), true),
            };
            let matches =
                |link: &&Link| if is_exact { link.name == prefix } else { link.name.starts_with(prefix) };
            let mut links = facts.links.values().filter(matches).peekable();
            if links.peek().is_none() {
                self.skipped.insert(format!("{pattern}: no device has such a name"));
            }
            for link in links {
                let controlled = traffic_control(facts, selection, link);
                match unsuitable(selection, link) {
                    // A pattern is not about those of its devices that cannot be used.
                    Some(why) if is_exact => self.skip(link, why),
                    Some(_) => {}
                    None if let Some(why) = controlled => self.skip(link, &why),
                    None if is_bridge(link) => drop(bridges.insert(link.index, Ports::All)),
                    None => match bridge_of(facts, link) {
                        None => self.take_device(link),
                        Some(_) if !leads_to_container(link) && is_exact => {
                            self.skip(link, NO_CONTAINER_PORT)
                        }
                        Some(bridge) => {
                            let ports = bridges.entry(bridge.index).or_insert(Ports::Only(BTreeSet::new()));
                            if let Ports::Only(ports) = ports {
                                ports.insert(link.index);
                            }
                        }
                    },
                }
            }
        }
        for (index, ports) in &bridges {
            let Some(bridge) = facts.links.get(index) else { continue };
            match unsuitable(selection, bridge) {
                Some(why) => self.skip(bridge, why),
                None if let Some(why) = traffic_control(facts, selection, bridge) => self.skip(bridge, &why),
                None => self.take_bridge(facts, selection, bridge, ports),
            }
        }
    }

    fn take_device(&mut self, link: &'a Link) {
        let arrivals = BTreeMap::from([(link.index, link)]);
        self.devices.insert(link.index, Gateway { link, arrivals });
    }

    fn take_bridge(&mut self, facts: &'a Facts, selection: &Selection, bridge: &'a Link, wanted: &Ports) {
        if bridge.vlan_filtering {
            self.skip(bridge, "the bridge filters VLANs, which the bypass would not do");
            return;
        }
        let mut arrivals = BTreeMap::new();
        for port in facts.links.values().filter(|link| link.controller == Some(bridge.index)) {
            let is_wanted = match wanted {
                Ports::All => true,
                Ports::Only(ports) => ports.contains(&port.index),
            };
            if !is_wanted || selection.excluded.contains(&port.index) {
                continue;
            }
            if let Some(why) = traffic_control(facts, selection, port) {
                self.skip(port, &why);
            } else if leads_to_container(port) {
                arrivals.insert(port.index, port);
            } else {
                self.skip(port, NO_CONTAINER_PORT);
            }
        }
        self.devices.insert(bridge.index, Gateway { link: bridge, arrivals });
    }
}

const NO_CONTAINER_PORT: &str = "a port of a bridge that may lead to several machines: only taps and veths into other network namespaces are bypassed";

/// Why a device cannot lead to containers.
fn unsuitable(selection: &Selection, link: &Link) -> Option<&'static str> {
    if selection.excluded.contains(&link.index) {
        Some("belongs to the overlay or the underlay")
    } else if link.loopback || !link.ethernet {
        Some("is no Ethernet device")
    } else {
        None
    }
}

/// Why packets of a device must not skip its traffic control, if it has any: limits and filters of the operator.
fn traffic_control(facts: &Facts, selection: &Selection, link: &Link) -> Option<String> {
    let of_device = facts.traffic_control.range((link.index, Side::Egress)..=(link.index, Side::Ingress));
    let mut kinds = of_device.map(|(_, kind)| kind.as_str());
    let kind = kinds.find(|kind| !(selection.own_clsact && *kind == "clsact"))?;
    Some(format!("has traffic control ({kind}), which the bypass would skip"))
}

/// The bridge that a device is a port of.
fn bridge_of<'a>(facts: &'a Facts, link: &Link) -> Option<&'a Link> {
    facts.links.get(&link.controller?).filter(|controller| is_bridge(controller))
}
