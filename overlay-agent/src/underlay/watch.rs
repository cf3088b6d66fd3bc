//! Tells when the underlay's address or MTU changes, or when it is gone.
//!
//! The kernel's messages only wake the watch; what is true is listed anew each time. So a lost or repeated message does no
//! harm, and what changed before the watch began is found at its start.

use std::{net::Ipv4Addr, time::Duration};

use anyhow::{Context as _, Result};
use futures_util::StreamExt as _;
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
    netlink::{Link, Netlink},
};

/// An address that is replaced is removed first: wait a moment for the other half of the change.
const SETTLE: Duration = Duration::from_millis(100);
/// How often to look without being woken: the kernel drops messages for a socket that is full.
const LOOK: Duration = Duration::from_secs(30);

/// What became of the underlay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UnderlayChange {
    /// It has another address, another MTU, or its device was made anew.
    Changed(Underlay),
    /// The device is gone or has no address; the text says which. What follows is [`UnderlayChange::Changed`] when it is
    /// back, also when nothing about it is different.
    Lost(String),
}

/// Watches `current`, which was found by `selector`, in a task of its own that ends when the receiver is dropped.
///
/// An address that the operator named is the only one, on whatever device it is. Else the device stays the same, and so does
/// the address as long as the device has it; when it comes back after another one had to do, it is the one again.
///
/// # Errors
///
/// When the kernel refuses a socket.
pub fn watch(current: Underlay, selector: &Selector) -> Result<mpsc::Receiver<UnderlayChange>> {
    let groups = [MulticastGroup::Link, MulticastGroup::Ipv4Ifaddr];
    let (connection, handle, mut messages) =
        rtnetlink::new_multicast_connection(&groups).context("subscribe to changes of network devices")?;
    tokio::spawn(connection);
    let mut netlink = Netlink::from(handle);
    let (sender, receiver) = mpsc::channel(4);
    let mut state = State::new(current, selector);
    tokio::spawn(async move {
        let mut tick = interval(LOOK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                // At once the first time: the watch begins after the underlay was chosen.
                _ = tick.tick() => {}
                message = messages.next() => {
                    sleep(SETTLE).await;
                    if message.is_none() {
                        // The socket broke.
                        match rtnetlink::new_multicast_connection(&groups) {
                            Ok((connection, handle, another)) => {
                                tokio::spawn(connection);
                                (netlink, messages) = (Netlink::from(handle), another);
                            }
                            Err(error) => warn!("subscribe to changes of network devices: {error}"),
                        }
                    }
                    while let Ok(message) = messages.try_recv() {
                        drop(message);
                    }
                }
                () = sender.closed() => return,
            }
            match state.look(&netlink).await {
                Ok(None) => {}
                Ok(Some(change)) => {
                    if sender.send(change).await.is_err() {
                        return;
                    }
                }
                Err(error) => warn!("cannot look at the underlay: {error:#}"),
            }
        }
    });
    Ok(receiver)
}

struct State {
    /// What was chosen first.
    home: Ipv4Addr,
    last: Underlay,
    lost: bool,
    /// The operator's word on the public address; without it, it follows the device's.
    public_ip: Option<Ipv4Addr>,
    /// Whether the operator named the address.
    pinned: bool,
}

impl State {
    fn new(current: Underlay, selector: &Selector) -> Self {
        let home = current.local_ip;
        let pinned = selector.public_ip == Some(home) || selector.ifaces.contains(&Iface::Address(home));
        Self { home, last: current, lost: false, public_ip: selector.public_ip, pinned }
    }

    async fn look(&mut self, netlink: &Netlink) -> Result<Option<UnderlayChange>> {
        let (links, addresses) = (netlink.links().await?, netlink.addresses().await?);
        let (link, local_ip) = match self.find(&links, &addresses) {
            Ok(found) => found,
            Err(why) => return Ok(self.lose(why)),
        };
        let now = Underlay { link, local_ip, public_ip: self.public_ip.unwrap_or(local_ip) };
        let same = !self.lost
            && now.local_ip == self.last.local_ip
            && now.link.index == self.last.link.index
            && now.link.mtu == self.last.link.mtu;
        (self.last, self.lost) = (now, false);
        Ok((!same).then(|| UnderlayChange::Changed(self.last.clone())))
    }

    /// The device and its address, or what is missing.
    fn find(&self, links: &[Link], addresses: &[(u32, Ipv4Net)]) -> Result<(Link, Ipv4Addr), String> {
        let holds = |link: &Link, address: Ipv4Addr| {
            addresses.iter().any(|(index, net)| *index == link.index && net.addr() == address)
        };
        if self.pinned {
            let holder = links.iter().find(|link| !device::is_ours(link) && holds(link, self.home));
            let holder =
                holder.ok_or_else(|| format!("no device holds the address {} any more", self.home))?;
            return Ok((holder.clone(), self.home));
        }
        let name = &self.last.link.name;
        let link = links.iter().find(|link| link.name == *name);
        let link = link.ok_or_else(|| format!("the device {name} is gone"))?;
        let kept = [self.home, self.last.local_ip].into_iter().find(|address| holds(link, *address));
        let Some(address) = kept.or_else(|| best_address(addresses, link.index)) else {
            return Err(format!("the device {name} has no IPv4 address"));
        };
        // What a host gives itself while it waits for a better one is nothing to tell peers.
        let makeshift = address.is_link_local() && !self.home.is_link_local();
        match makeshift || !lease::is_host(address) {
            true => {
                Err(format!("the device {name} has no address but {address}, at which no peer can reach it"))
            }
            false => Ok((link.clone(), address)),
        }
    }

    /// Says it once.
    fn lose(&mut self, why: String) -> Option<UnderlayChange> {
        (!std::mem::replace(&mut self.lost, true)).then_some(UnderlayChange::Lost(why))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(index: u32, name: &str) -> Link {
        Link { name: name.to_owned(), index, mtu: 1500, up: true, ethernet: true, kind: None, alias: None }
    }

    /// What the watch sees, as `eth0 10.0.0.1`, when eth0 and eth1 have these addresses.
    fn found(state: &State, eth0: &[&str], eth1: &[&str]) -> String {
        let of = |index: u32, addresses: &[&str]| {
            addresses
                .iter()
                .map(|address| (index, format!("{address}/24").parse().unwrap()))
                .collect::<Vec<_>>()
        };
        match state.find(&[link(1, "eth0"), link(2, "eth1")], &[of(1, eth0), of(2, eth1)].concat()) {
            Ok((link, address)) => format!("{} {address}", link.name),
            Err(why) => why,
        }
    }

    fn state(selector: &Selector) -> State {
        let home = Ipv4Addr::new(10, 0, 0, 1);
        State::new(Underlay { link: link(1, "eth0"), local_ip: home, public_ip: home }, selector)
    }

    #[test]
    fn the_first_address_is_preferred_whenever_it_is_there() {
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
    fn a_named_address_is_the_only_one() {
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
        // Behind address translation the device's own address is its own affair.
        let translated = Selector { public_ip: Some(Ipv4Addr::new(203, 0, 113, 1)), ..Selector::default() };
        assert_eq!(found(&state(&translated), &["10.0.0.5"], &[]), "eth0 10.0.0.5");
    }
}
