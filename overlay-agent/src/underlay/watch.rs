//! Tells when the underlay's address or MTU changes, or when it is gone.
//!
//! The kernel's messages only wake the watch; what is true is listed anew each time. So a lost or repeated message does no
//! harm, and what changed before the watch began is found at its start.

use std::{net::Ipv4Addr, time::Duration};

use anyhow::{Context as _, Result};
use futures_util::StreamExt as _;
use rtnetlink::MulticastGroup;
use tokio::{
    sync::mpsc,
    time::{MissedTickBehavior, interval, sleep},
};
use tracing::warn;

use super::{Underlay, choose::best_address};
use crate::netlink::Netlink;

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

/// Watches the device of `current` in a task of its own, which ends when the receiver is dropped. `public_ip` is the
/// operator's word; without it, the public address follows the device's.
///
/// An address that the device still has stays the one in use, also when others come before it.
///
/// # Errors
///
/// When the kernel refuses a socket.
pub fn watch(current: Underlay, public_ip: Option<Ipv4Addr>) -> Result<mpsc::Receiver<UnderlayChange>> {
    let groups = [MulticastGroup::Link, MulticastGroup::Ipv4Ifaddr];
    let (connection, handle, mut messages) =
        rtnetlink::new_multicast_connection(&groups).context("subscribe to changes of network devices")?;
    tokio::spawn(connection);
    let mut netlink = Netlink::from(handle);
    let (sender, receiver) = mpsc::channel(4);
    tokio::spawn(async move {
        let mut state = State { last: current, lost: false, public_ip };
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
    last: Underlay,
    lost: bool,
    public_ip: Option<Ipv4Addr>,
}

impl State {
    async fn look(&mut self, netlink: &Netlink) -> Result<Option<UnderlayChange>> {
        let name = &self.last.link.name;
        let Some(link) = netlink.link(name).await? else {
            let why = format!("the device {name} is gone");
            return Ok(self.lose(why));
        };
        let addresses = netlink.addresses().await?;
        let keeps =
            |(index, net): &(u32, ipnet::Ipv4Net)| *index == link.index && net.addr() == self.last.local_ip;
        let local_ip = match addresses.iter().any(keeps) {
            true => Some(self.last.local_ip),
            false => best_address(&addresses, link.index),
        };
        let Some(local_ip) = local_ip else {
            let why = format!("the device {name} has no IPv4 address");
            return Ok(self.lose(why));
        };
        let now = Underlay { link, local_ip, public_ip: self.public_ip.unwrap_or(local_ip) };
        let same = !self.lost
            && now.local_ip == self.last.local_ip
            && now.link.index == self.last.link.index
            && now.link.mtu == self.last.link.mtu;
        (self.last, self.lost) = (now, false);
        Ok((!same).then(|| UnderlayChange::Changed(self.last.clone())))
    }

    /// Says it once.
    fn lose(&mut self, why: String) -> Option<UnderlayChange> {
        (!std::mem::replace(&mut self.lost, true)).then_some(UnderlayChange::Lost(why))
    }
}
