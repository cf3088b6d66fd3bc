//! Another agent takes over from this one: the running agent's side of `handover`.

use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use tokio::time::{Instant, timeout, timeout_at};
use tracing::{info, warn};

use super::Agent;
use crate::{
    datapath::Inherited,
    handover::{Channel, Message, Offer, VERSION},
    route::LocalNode,
};

/// How long the new agent may prepare: it asks the store for the lease and the routes.
const PREPARATION: Duration = Duration::from_secs(120);
/// How long the new agent may take to set up the datapath. Meanwhile, this one does nothing else.
const SETUP: Duration = Duration::from_secs(30);

/// An agent that prepares to take over.
#[derive(Debug)]
pub(super) struct Successor {
    channel: Channel,
    until: Instant,
}

/// What the agent that prepares says next; an error when it says nothing, or has ended.
pub(super) async fn next(successor: &mut Option<Successor>) -> Result<Message> {
    let Some(Successor { channel, until }) = successor else { return std::future::pending().await };
    let received = timeout_at(*until, channel.receive()).await;
    let received = received.unwrap_or_else(|_| bail!("it is not ready within {PREPARATION:?}"))?;
    Ok(received.context("it ended")?.0)
}

/// Answers a request that cannot be met.
pub(super) async fn refuse(mut channel: Channel, why: &str) {
    // The other agent may be gone.
    let _ = channel.send(&Message::Error(why.to_owned()), &[]).await;
}

impl Agent {
    /// Another agent wants to take over. From now on it keeps the lease, until it says otherwise.
    pub(super) async fn offer(&mut self, mut channel: Channel) {
        if self.successor.is_some() {
            return refuse(channel, "another agent is taking over already").await;
        }
        let LocalNode { network, subnet, public_ip } = self.membership.local();
        let offer = Offer {
            protocol: VERSION,
            device: self.forwarding.spec.name.clone(),
            network,
            subnet,
            port: self.forwarding.spec.alias.port,
            public_ip,
        };
        info!("another agent prepares to take over");
        self.membership.pause_lease().await;
        self.successor = Some(match channel.send(&Message::Offer(offer), &[]).await {
            Ok(()) => Successor { channel, until: Instant::now() + PREPARATION },
            Err(error) => return self.go_on(&error),
        });
    }

    /// The agent that prepares says something. Returns whether it has taken over: this one has to end then.
    pub(super) async fn on_successor(&mut self, message: Result<Message>) -> bool {
        let Some(Successor { channel, .. }) = self.successor.take() else { return false };
        let stopped = match message {
            Ok(Message::Take) => self.hand_over(channel).await,
            Ok(other) => Err(anyhow!("it says {other:?}")),
            Err(error) => Err(error),
        };
        match stopped {
            Ok(()) => true,
            Err(error) => {
                self.go_on(&error);
                false
            }
        }
    }

    /// Stops to move packets and passes the descriptors on. When the other agent does not take over, starts again and fails.
    async fn hand_over(&mut self, mut channel: Channel) -> Result<()> {
        // Two agents must not change the firewall at once.
        self.host.leave().await;
        let inherited = self.forwarding.datapath.hand_over();
        let given = match &inherited {
            Ok(inherited) => give(&mut channel, inherited).await,
            Err(error) => Err(anyhow!("{error:#}")),
        };
        let Err(error) = given else {
            info!("another agent has taken over");
            return Ok(());
        };
        drop(channel);
        self.forwarding.datapath.inherit(inherited.unwrap_or_default());
        self.forwarding.try_reconcile().await;
        let (port, routes) = (self.forwarding.spec.alias.port, self.forwarding.watch_routes());
        if let Err(error) = self.host.apply(&self.netlink, self.membership.local(), port, routes).await {
            warn!("{error:#}");
        }
        Err(error)
    }

    fn go_on(&mut self, why: &anyhow::Error) {
        warn!("no other agent takes over, this one goes on: {why:#}");
        self.membership.keep_lease();
    }
}

/// Passes the descriptors on, and waits until the other agent forwards.
async fn give(channel: &mut Channel, inherited: &Inherited) -> Result<()> {
    let (names, descriptors): (Vec<_>, Vec<_>) =
        inherited.descriptors().map(|(name, descriptor)| (name.to_owned(), descriptor)).unzip();
    let exchange = async {
        channel.send(&Message::Descriptors(names), &descriptors).await?;
        channel.receive().await
    };
    let answer =
        timeout(SETUP, exchange).await.unwrap_or_else(|_| bail!("it does not set up the datapath"))?;
    let (message, _) = answer.context("it ended")?;
    if message != Message::Done {
        bail!("it says {message:?}");
    }
    // Fails when it has ended meanwhile.
    channel.send(&Message::Ended, &[]).await
}
