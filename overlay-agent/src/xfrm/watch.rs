//! Follows the IPsec policies of the network namespace.
//!
//! Netlink messages only trigger a new listing, so lost and repeated messages do no harm.

use std::{future::pending, sync::Arc, time::Duration};

use anyhow::Result;
use futures_util::{FutureExt as _, StreamExt as _};
use tokio::{
    sync::watch,
    time::{Instant, MissedTickBehavior, interval_at, sleep},
};
use tracing::warn;

use super::{
    Policies,
    kernel::{Changes, Kernel, subscribe},
};

/// Pause after a listing: a daemon adds several policies at once.
const SETTLE_TIME: Duration = Duration::from_millis(100);
/// Interval of listings without a message.
const RESYNC_INTERVAL: Duration = Duration::from_secs(30);
/// Pause before another attempt after a failure.
const RETRY: Duration = Duration::from_secs(1);

/// The policies of the thread's network namespace now, and after each change, in a task that ends when the receivers are dropped.
///
/// The value is replaced only when it differs. While the kernel cannot be queried, it stays as it is. Fails when the kernel
/// refuses at the beginning, as [`list`](super::list) does.
pub async fn watch() -> Result<watch::Receiver<Arc<Policies>>> {
    let subscription = subscribe()?;
    let (sender, receiver) = watch::channel(Arc::new(listed(&subscription).await?));
    tokio::spawn(follow(subscription, sender));
    Ok(receiver)
}

/// `None` on a kernel without IPsec. Its module may be installed later.
type Subscription = Option<(Kernel, Changes)>;

async fn follow(mut subscription: Subscription, sender: watch::Sender<Arc<Policies>>) {
    let mut tick = interval_at(Instant::now() + RESYNC_INTERVAL, RESYNC_INTERVAL);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let failed = tokio::select! {
            _ = tick.tick() => false,
            change = next(&mut subscription) => change.is_none(),
            () = sender.closed() => return,
        };
        match refreshed(&mut subscription, failed).await {
            Ok(policies) => {
                sender.send_if_modified(|current| {
                    let differs = **current != policies;
                    if differs {
                        *current = Arc::new(policies);
                    }
                    differs
                });
                // The first of several policies counts at once, the others together.
                sleep(SETTLE_TIME).await;
            }
            Err(error) => {
                warn!("{error:#}");
                subscription = None;
                tick.reset_after(RETRY);
            }
        }
    }
}

/// The policies after a message or a tick, on a new connection after a failure.
async fn refreshed(subscription: &mut Subscription, failed: bool) -> Result<Policies> {
    if failed || subscription.is_none() {
        *subscription = subscribe()?;
    }
    if let Some((_, changes)) = subscription {
        while changes.next().now_or_never().flatten().is_some() {}
    }
    listed(subscription).await
}

async fn listed(subscription: &Subscription) -> Result<Policies> {
    match subscription {
        Some((kernel, _)) => kernel.policies().await,
        None => Ok(Policies::default()),
    }
}

async fn next(subscription: &mut Subscription) -> Option<()> {
    match subscription {
        Some((_, changes)) => changes.next().await,
        None => pending().await,
    }
}
