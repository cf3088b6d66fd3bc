//! Notices that another program has changed devices, addresses, routes or rules of this host.
//!
//! A message only triggers a check of the whole state, so lost and repeated messages do no harm: the periodic check follows.

use std::time::Duration;

use anyhow::Result;
use futures_util::{FutureExt as _, StreamExt as _};
use rtnetlink::MulticastGroup;
use tokio::{sync::mpsc, time::sleep};
use tracing::warn;

use crate::netlink;

/// Delay before a check: changes come in groups.
const SETTLE_TIME: Duration = Duration::from_millis(100);
/// Pause after a check: on a host where containers come and go, something changes all the time.
const PAUSE: Duration = Duration::from_millis(400);
/// Pause before another attempt to subscribe.
const RETRY: Duration = Duration::from_secs(1);

const GROUPS: [MulticastGroup; 5] = [
    MulticastGroup::Link,
    MulticastGroup::Ipv4Ifaddr,
    MulticastGroup::Ipv4Route,
    MulticastGroup::Ipv4Rule,
    MulticastGroup::Nexthop,
];

/// Sends a message after changes, in a task that ends when the receiver is dropped.
/// Fails when the kernel refuses a socket.
pub(super) fn watch() -> Result<mpsc::Receiver<()>> {
    let (_, mut messages) = netlink::subscribe(&GROUPS)?;
    let (sender, receiver) = mpsc::channel(1);
    tokio::spawn(async move {
        loop {
            let message = tokio::select! {
                message = messages.next() => message,
                () = sender.closed() => return,
            };
            sleep(SETTLE_TIME).await;
            while messages.next().now_or_never().flatten().is_some() {}
            // One that waits already covers this change, too.
            let _ = sender.try_send(());
            if message.is_none() {
                // The connection failed.
                sleep(RETRY).await;
                match netlink::subscribe(&GROUPS) {
                    Ok((_, renewed)) => messages = renewed,
                    Err(error) => warn!("{error:#}"),
                }
            }
            sleep(PAUSE).await;
        }
    });
    Ok(receiver)
}
