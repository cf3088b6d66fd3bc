//! Reports changes of the underlay's device and address, and their loss.
//!
//! Netlink messages only trigger a new listing of the host's state, so lost and repeated messages do no harm, and changes from
//! before the subscription are found by the first listing.

use std::{net::Ipv4Addr, time::Duration};

use anyhow::Result;
use futures_util::{FutureExt as _, StreamExt as _};
use ipnet::Ipv4Net;
use rtnetlink::MulticastGroup;
use tokio::{
    sync::mpsc,
    time::{MissedTickBehavior, interval, sleep},
};
use tracing::warn;

use super::{Iface, Selector, Underlay, choose::best_address};
use crate::{
    device, lease,
    netlink::{Link, Netlink, subscribe},
};

/// Delay before listing: replacing an address removes the old one first.
const SETTLE_TIME: Duration = Duration::from_millis(100);
/// Interval of listings without a message: the kernel drops messages when the socket buffer is full.
const RESYNC_INTERVAL: Duration = Duration::from_secs(30);

/// A change of the underlay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UnderlayChange {
    /// Its address or something about its device is another: created again, renamed, set down, without carrier, another MTU.
    Changed(Underlay),
    /// The device is gone or has no usable address, with the reason, once for each reason. [`UnderlayChange::Changed`] follows when
    /// it is back, even if it is the same as before.
    Lost(String),
}

/// Watches `current`, which `selector` selected, in a task that ends when the receiver is dropped.
///
/// An address that the operator named is never replaced by another, but may move to another device. Otherwise the device stays
/// the same, also under another name, and its initial address is used whenever the device holds it. Fails when the kernel
/// refuses a socket.
pub fn watch(current: Underlay, selector: &Selector) -> Result<mpsc::Receiver<UnderlayChange>> {
    let groups = [MulticastGroup::Link, MulticastGroup::Ipv4Ifaddr];
    let (mut netlink, mut messages) = subscribe(&groups)?;
    let (sender, receiver) = mpsc::channel(4);
    let mut state = State::new(current, selector);
    tokio::spawn(async move {
        let mut tick = interval(RESYNC_INTERVAL);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                // Immediately the first time, for changes since the selection.
                _ = tick.tick() => {}
                message = messages.next() => {
                    sleep(SETTLE_TIME).await;
                    if message.is_none() {
                        // The connection failed.
                        match subscribe(&groups) {
                            Ok(renewed) => (netlink, messages) = renewed,
                            Err(error) => warn!("{error:#}"),
                        }
                    }
                    while messages.next().now_or_never().flatten().is_some() {}
                }
                () = sender.closed() => return,
            }
            match state.refresh(&netlink).await {
                Ok(None) => {}
                // Without a receiver, the loop ends above.
                Ok(Some(change)) => drop(sender.send(change).await),
                Err(error) => warn!("list the state of the underlay: {error:#}"),
            }
        }
    });
    Ok(receiver)
}

struct State {
    /// The selected address.
    initial: Ipv4Addr,
    /// The name of the selected device.
    name: String,
    last: Underlay,
    /// Why there is none.
    lost: Option<String>,
    /// The public address that the operator configured; without it, the device's address is public.
    public_ip: Option<Ipv4Addr>,
    /// Whether the operator named the address.
    pinned: bool,
}

impl State {
    fn new(current: Underlay, selector: &Selector) -> Self {
        let initial = current.local_ip;
        let pinned =
            selector.public_ip == Some(initial) || selector.ifaces.contains(&Iface::Address(initial));
        let name = current.link.name.clone();
        Self { initial, name, last: current, lost: None, public_ip: selector.public_ip, pinned }
    }

    async fn refresh(&mut self, netlink: &Netlink) -> Result<Option<UnderlayChange>> {
        let (links, addresses) = (netlink.links().await?, netlink.addresses().await?);
        let (link, local_ip) = match self.find(&links, &addresses) {
            Ok(found) => found,
            Err(why) => {
                let is_new = self.lost.replace(why.clone()).as_ref() != Some(&why);
                return Ok(is_new.then_some(UnderlayChange::Lost(why)));
            }
        };
        let now = Underlay { link, local_ip, public_ip: self.public_ip.unwrap_or(local_ip) };
        let same = self.lost.is_none() && now == self.last;
        (self.last, self.lost) = (now, None);
        Ok((!same).then(|| UnderlayChange::Changed(self.last.clone())))
    }

    /// The device and its address, or why there is none.
    fn find(&self, links: &[Link], addresses: &[(u32, Ipv4Net)]) -> Result<(Link, Ipv4Addr), String> {
        let holds = |link: &Link, address: Ipv4Addr| {
            addresses.iter().any(|(index, net)| *index == link.index && net.addr() == address)
        };
        if self.pinned {
            let address = self.initial;
            let can_hold = |link: &&Link| !device::is_ours(link) && !link.loopback;
            let holder = links.iter().filter(can_hold).find(|link| holds(link, address));
            let holder = holder.ok_or_else(|| format!("no device holds the address {address} any more"))?;
            return Ok((holder.clone(), address));
        }
        let is_renamed = |link: &&Link| {
            link.index == self.last.link.index && link.mac.is_some() && link.mac == self.last.link.mac
        };
        // Its name first: a bridge may take name and address of a card, which gets another name.
        let named = links.iter().find(|link| link.name == self.name);
        let link = named
            .or_else(|| links.iter().find(is_renamed))
            .or_else(|| links.iter().find(|link| link.name == self.last.link.name));
        let link = link.ok_or_else(|| format!("the device {} is gone", self.last.link.name))?;
        let name = &link.name;
        let kept = [self.initial, self.last.local_ip].into_iter().find(|address| holds(link, *address));
        let Some(address) = kept.or_else(|| best_address(addresses, link.index)) else {
            return Err(format!("the device {name} has no IPv4 address"));
        };
        // A host without a DHCP lease assigns itself a link-local address: not an address for peers.
        let temporary = address.is_link_local() && !self.initial.is_link_local();
        match temporary || !lease::is_host(address) {
            true => Err(format!(
                "the device {name} has only the address {address}, at which no peer can reach it"
            )),
            false => Ok((link.clone(), address)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The result, such as `eth0 10.0.0.1`, when eth0 and eth1 have these addresses.
    fn found(state: &State, eth0: &[&str], eth1: &[&str]) -> String {
        let held = eth0.iter().map(|address| (1, address)).chain(eth1.iter().map(|address| (2, address)));
        let addresses: Vec<_> =
            held.map(|(index, address)| (index, format!("{address}/24").parse().unwrap())).collect();
        describe(state.find(&[Link::ethernet(1, "eth0"), Link::ethernet(2, "eth1")], &addresses))
    }

    fn describe(found: Result<(Link, Ipv4Addr), String>) -> String {
        match found {
            Ok((link, address)) => format!("{} {address}", link.name),
            Err(why) => why,
        }
    }

    fn state(selector: &Selector) -> State {
        let home = Ipv4Addr::new(10, 0, 0, 1);
        State::new(Underlay { link: Link::ethernet(1, "eth0"), local_ip: home, public_ip: home }, selector)
    }

    #[test]
    fn the_initial_address_is_preferred() {
        let mut state = state(&Selector::default());
        assert_eq!(found(&state, &["10.0.0.5", "10.0.0.1"], &[]), "eth0 10.0.0.1");
        assert_eq!(found(&state, &["10.0.0.5"], &["10.0.0.1"]), "eth0 10.0.0.5");
        state.last.local_ip = Ipv4Addr::new(10, 0, 0, 6);
        assert_eq!(found(&state, &["10.0.0.5", "10.0.0.6"], &[]), "eth0 10.0.0.6");
        assert_eq!(found(&state, &["10.0.0.6", "10.0.0.1"], &[]), "eth0 10.0.0.1");
        assert!(found(&state, &[], &["10.0.0.1"]).contains("no IPv4 address"));
        assert!(found(&state, &["169.254.3.4"], &[]).contains("no peer can reach"));
    }

    #[test]
    fn a_renamed_device_is_followed_until_another_one_takes_its_name() {
        let mut state = state(&Selector::default());
        state.last.link.mac = Some([2, 0, 0, 0, 0, 1]);
        let card = |name| Link { mac: state.last.link.mac, ..Link::ethernet(1, name) };
        let addresses = |index| [(index, "10.0.0.1/24".parse().unwrap())];
        assert_eq!(describe(state.find(&[card("nic7")], &addresses(1))), "nic7 10.0.0.1");
        assert_eq!(
            describe(state.find(&[card("nic7"), Link::ethernet(2, "eth0")], &addresses(2))),
            "eth0 10.0.0.1"
        );
        // Another device with the index of one that is gone is not it.
        assert_eq!(
            describe(state.find(&[Link::ethernet(1, "nic7")], &addresses(1))),
            "the device eth0 is gone"
        );
        state.last.link = card("nic7");
        // Created again, under its new name or its old one.
        for name in ["nic7", "eth0"] {
            assert_eq!(
                describe(state.find(&[Link::ethernet(5, name)], &addresses(5))),
                format!("{name} 10.0.0.1")
            );
        }
        assert_eq!(describe(state.find(&[], &addresses(5))), "the device nic7 is gone");
    }

    #[test]
    fn a_named_address_is_not_replaced() {
        let home = Ipv4Addr::new(10, 0, 0, 1);
        for selector in [
            Selector { public_ip: Some(home), ..Selector::default() },
            Selector { ifaces: vec![Iface::Address(home)], ..Selector::default() },
        ] {
            let state = state(&selector);
            assert!(found(&state, &["10.0.0.5"], &[]).contains("no device holds"));
            assert_eq!(found(&state, &["10.0.0.5", "10.0.0.1"], &[]), "eth0 10.0.0.1");
            assert_eq!(found(&state, &["10.0.0.5"], &["10.0.0.1"]), "eth1 10.0.0.1");
        }
        // Behind NAT, the device's address is not the one that the operator named.
        let translated = Selector { public_ip: Some(Ipv4Addr::new(203, 0, 113, 1)), ..Selector::default() };
        assert_eq!(found(&state(&translated), &["10.0.0.5"], &[]), "eth0 10.0.0.5");
    }
}
