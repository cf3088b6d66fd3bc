//! Follows the containers of this host.
//!
//! The state is listed once and then kept by the kernel's messages, because a list of 1,000 containers costs more than the changes
//! of one. Routes are listed again, because the kernel removes some without a message. Where messages were lost, and from time to
//! time, everything is listed.

use std::{mem, net::Ipv4Addr, sync::Arc, time::Duration};

use anyhow::Result;
use futures_util::{FutureExt as _, StreamExt as _};
use rtnetlink::{MulticastGroup, packet_core::NetlinkPayload, packet_route::RouteNetlinkMessage};
use tokio::{
    sync::watch,
    time::{Instant, sleep, sleep_until},
};
use tracing::{debug, warn};

use super::{Containers, Facts, Selection, facts::Effect, find};
use crate::netlink::{self, Messages, Netlink};

/// Delay after the first message of a change: the start of a container causes a dozen.
const SETTLE_TIME: Duration = Duration::from_millis(3);
/// Pause after a change.
const PAUSE: Duration = Duration::from_millis(50);
/// Interval of complete lists. Also the longest delay of one that repeats a list during which something changed.
const RESYNC_INTERVAL: Duration = Duration::from_secs(30);
/// Pause before a failed list is repeated, and the shortest delay of one that repeats a list during which something changed: the
/// kernel's lists may leave out entries while others are removed.
const RETRY: Duration = Duration::from_secs(1);
/// Size in bytes of the receive buffer: messages about some hundred devices at once, of 2 to 4 KiB each.
const RECEIVE_BUFFER: usize = 2 << 20;

const GROUPS: [MulticastGroup; 5] = [
    MulticastGroup::Link,
    MulticastGroup::Neigh,
    MulticastGroup::Ipv4Ifaddr,
    MulticastGroup::Ipv4Route,
    MulticastGroup::Tc,
];

/// The containers of the current network namespace now, and after each change, in a task that ends when the receivers are dropped.
///
/// The value is replaced only when it differs: within a few milliseconds of a first change, at most 20 times a second. While the
/// kernel cannot be queried, it stays as it is. For another selection, watch again. Fails when the kernel refuses at the beginning.
pub async fn watch(selection: Selection) -> Result<watch::Receiver<Arc<Containers>>> {
    let mut follower = Follower::start(selection).await?;
    let (sender, receiver) = watch::channel(Arc::new(find(&follower.facts, &follower.selection)));
    tokio::spawn(async move {
        tokio::select! {
            () = follower.run(&sender) => {}
            () = sender.closed() => {}
        }
    });
    Ok(receiver)
}

/// Work that messages cause, in ascending order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Work {
    None,
    /// Find the containers in the changed facts.
    Find,
    /// List the routes.
    Routes,
    /// List everything.
    List,
    /// Subscribe again, and list everything.
    Subscribe,
}

struct Follower {
    selection: Selection,
    netlink: Netlink,
    messages: Messages,
    facts: Facts,
    work: Work,
    /// Time of the next complete list.
    resync: Instant,
    /// The delay of the next list that repeats one.
    repeat: Duration,
}

impl Follower {
    async fn start(selection: Selection) -> Result<Self> {
        let (netlink, messages) = subscribe()?;
        let facts = Facts::empty(selection.subnet);
        let (work, resync) = (Work::None, Instant::now() + RESYNC_INTERVAL);
        let mut follower = Self { selection, netlink, messages, facts, work, resync, repeat: RETRY };
        follower.list().await?;
        Ok(follower)
    }

    async fn run(&mut self, sender: &watch::Sender<Arc<Containers>>) {
        loop {
            self.use_neighbours(sender).await;
            if self.work == Work::None {
                tokio::select! {
                    () = sleep_until(self.resync) => self.work = Work::List,
                    message = self.messages.next() => self.note(message),
                }
                self.drain();
                if self.work == Work::None {
                    continue;
                }
                sleep(SETTLE_TIME).await;
                self.drain();
            }
            let work = mem::replace(&mut self.work, Work::None);
            if let Err(error) = self.refresh(work).await {
                warn!("list the containers of this host: {error:#}");
                self.work = self.work.max(work);
                sleep(RETRY).await;
                continue;
            }
            let containers = find(&self.facts, &self.selection);
            sender.send_if_modified(|current| {
                let differ = **current != containers;
                if differ {
                    *current = Arc::new(containers);
                }
                differ
            });
            sleep(PAUSE).await;
        }
    }

    /// Makes the kernel check the containers that it has not heard of for a while, as it would if their packets took its stack. So
    /// it finds out that one is gone or has another hardware address.
    async fn use_neighbours(&mut self, sender: &watch::Sender<Arc<Containers>>) {
        let known: Vec<_> = {
            let containers = sender.borrow();
            let is_known = |(_, address): &(u32, Ipv4Addr)| containers.endpoints.contains_key(address);
            self.facts.stale.extract_if(.., is_known).collect()
        };
        for (device, address) in known {
            // Usually it is gone already.
            if let Err(error) = self.netlink.use_neighbour(device, address).await {
                debug!("{error:#}");
            }
        }
    }

    async fn refresh(&mut self, work: Work) -> Result<()> {
        match work {
            Work::None | Work::Find => Ok(()),
            Work::Routes => self.facts.read_routes(&self.netlink).await,
            Work::List => self.list().await,
            Work::Subscribe => {
                (self.netlink, self.messages) = subscribe()?;
                self.list().await
            }
        }
    }

    /// Lists everything, and then makes the changes that were reported meanwhile.
    async fn list(&mut self) -> Result<()> {
        self.facts = Facts::read(&self.netlink, self.selection.subnet).await?;
        let delay = match self.drain() {
            0 => {
                self.repeat = RETRY;
                RESYNC_INTERVAL
            }
            _ => {
                let delay = self.repeat;
                self.repeat = (delay * 2).min(RESYNC_INTERVAL);
                delay
            }
        };
        self.resync = Instant::now() + delay;
        Ok(())
    }

    /// Notes the messages that have arrived, and returns their number.
    fn drain(&mut self) -> usize {
        let mut count = 0;
        while self.work < Work::Subscribe
            && let Some(message) = self.messages.next().now_or_never()
        {
            self.note(message);
            count += 1;
        }
        count
    }

    fn note(&mut self, message: Option<NetlinkPayload<RouteNetlinkMessage>>) {
        let work = match message {
            Some(NetlinkPayload::InnerMessage(message)) => match self.facts.apply(&message) {
                Effect::None => Work::None,
                Effect::Changed => Work::Find,
                Effect::Routes => Work::Routes,
            },
            Some(NetlinkPayload::Overrun(_)) => Work::List,
            Some(_) => Work::None,
            // The connection failed.
            None => Work::Subscribe,
        };
        self.work = self.work.max(work);
    }
}

fn subscribe() -> Result<(Netlink, Messages)> {
    netlink::follow(&GROUPS, Some(RECEIVE_BUFFER))
}
