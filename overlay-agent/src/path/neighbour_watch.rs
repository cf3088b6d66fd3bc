//! Follows the kernel's neighbours, the addresses of devices, and changes of routes, in a task.
//!
//! Neighbours and devices are listed once and then kept by the kernel's messages, which arrive in the order of the changes. Where messages were lost,
//! they are listed again; while that fails, no address is known, and packets take the kernel's way.

use std::{future::pending, mem, pin::pin, sync::Arc, time::Duration};

use anyhow::Result;
use futures_util::{FutureExt as _, StreamExt as _};
use rtnetlink::{
    MulticastGroup,
    packet_core::NetlinkPayload,
    packet_route::{AddressFamily, RouteNetlinkMessage},
};
use tokio::{
    sync::{Notify, mpsc},
    time::{Instant, sleep},
};
use tracing::warn;

use super::neighbours::{Changes, Table};
use crate::{
    netlink::{self, Messages, Netlink},
    timer::sleep_until_some,
};

/// Time in which the next packet of a flow makes the kernel check a neighbour whose entry has become stale. The kernel sends no
/// message about that.
const CHECK_DELAY: Duration = Duration::from_millis(200);
/// Share of the time that may be spent on lists: 1 in 50.
const LIST_SHARE: u32 = 50;
/// Pause before a failed list is repeated.
const RETRY: Duration = Duration::from_secs(1);
/// Size in bytes of the receive buffer: messages about some thousand neighbours at once.
const RECEIVE_BUFFER: usize = 4 << 20;

const GROUPS: [MulticastGroup; 4] =
    [MulticastGroup::Neigh, MulticastGroup::Link, MulticastGroup::Ipv4Route, MulticastGroup::Ipv4Rule];

/// The changes of the neighbours of this network namespace.
#[derive(Debug)]
pub(crate) struct NeighbourWatch {
    changes: mpsc::Receiver<Changes>,
    look_again: Arc<Notify>,
}

impl NeighbourWatch {
    /// Begins to follow them, in a task that ends with this value. The first changes are all that is known at the beginning.
    /// Fails when the kernel refuses a socket or a list.
    pub(crate) async fn start() -> Result<Self> {
        let (netlink, messages) = subscribe()?;
        let now = Instant::now();
        let mut follower = Follower {
            netlink,
            messages,
            table: Table::default(),
            work: Work::None,
            list_at: None,
            earliest: now,
        };
        follower.list().await?;
        let (sender, changes) = mpsc::channel(1);
        let look_again = Arc::new(Notify::new());
        let noticed = Arc::clone(&look_again);
        tokio::spawn(async move { follower.run(&sender, &noticed).await });
        Ok(Self { changes, look_again })
    }

    /// The next changes; never returns when there are none any more.
    pub(crate) async fn next(&mut self) -> Changes {
        match self.changes.recv().await {
            Some(changes) => changes,
            None => pending().await,
        }
    }

    /// Looks again, a moment later, whether the kernel checks neighbours for whose addresses this asked before.
    pub(crate) fn look_again(&self) {
        self.look_again.notify_one();
    }
}

/// Work that messages cause, in ascending order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Work {
    None,
    /// List everything.
    List,
    /// Subscribe again, and list everything.
    Subscribe,
}

struct Follower {
    netlink: Netlink,
    messages: Messages,
    table: Table,
    work: Work,
    /// Time of the next list.
    list_at: Option<Instant>,
    /// Earliest time of a list that was asked for.
    earliest: Instant,
}

impl Follower {
    /// Returns when the receiver is dropped.
    async fn run(&mut self, sender: &mpsc::Sender<Changes>, look_again: &Notify) {
        loop {
            let work = mem::replace(&mut self.work, Work::None);
            if work != Work::None
                && let Err(error) = self.refresh(work).await
            {
                warn!("list the neighbours of this host: {error:#}");
                self.table.clear();
                (self.work, self.list_at) = (Work::Subscribe, None);
                self.send_all(sender).await;
                sleep(RETRY).await;
                continue;
            }
            let list_at = pin!(sleep_until_some(self.list_at));
            tokio::select! {
                permit = sender.reserve(), if self.table.has_changes() => match permit {
                    Ok(permit) => permit.send(self.table.take_changes()),
                    Err(_) => return,
                },
                message = self.messages.next() => self.note(message),
                () = list_at => self.work = Work::List,
                () = look_again.notified() => {
                    let at = (Instant::now() + CHECK_DELAY).max(self.earliest);
                    self.list_at.get_or_insert(at);
                }
                () = sender.closed() => return,
            }
            self.drain();
        }
    }

    async fn send_all(&mut self, sender: &mpsc::Sender<Changes>) {
        if self.table.has_changes()
            && let Ok(permit) = sender.reserve().await
        {
            permit.send(self.table.take_changes());
        }
    }

    async fn refresh(&mut self, work: Work) -> Result<()> {
        if work == Work::Subscribe {
            (self.netlink, self.messages) = subscribe()?;
        }
        self.list().await
    }

    /// Lists everything, and then makes the changes that were reported before and meanwhile: the last of them is the list's.
    async fn list(&mut self) -> Result<()> {
        let start = Instant::now();
        let links = self.netlink.links().await?;
        let neighbours = self.netlink.neighbour_messages(AddressFamily::Inet).await?;
        self.table.replace(&links, &neighbours);
        self.drain();
        (self.list_at, self.earliest) = (None, Instant::now() + start.elapsed() * LIST_SHARE);
        Ok(())
    }

    fn drain(&mut self) {
        while self.work < Work::Subscribe
            && let Some(message) = self.messages.next().now_or_never()
        {
            self.note(message);
        }
    }

    fn note(&mut self, message: Option<NetlinkPayload<RouteNetlinkMessage>>) {
        let work = match message {
            Some(NetlinkPayload::InnerMessage(message)) => {
                self.table.apply(&message);
                Work::None
            }
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
