//! Keeps rules and guard while the agent runs: restores them, and follows this host's subnet and its peers.

use std::time::Duration;

use ipnet::Ipv4Net;
use tokio::{
    sync::watch,
    time::{Instant, MissedTickBehavior, interval, sleep_until},
};
use tracing::info;

use super::{Firewall, Guard, guard::unguarded, nft::NftError};
use crate::route::Routes;

/// Shortest time between two updates of the guard's peers: records that flap must not start one `nft` each.
const PEERS_INTERVAL: Duration = Duration::from_millis(250);

/// What a [`Keeper`] follows.
#[derive(Debug)]
pub struct Wanted {
    /// This host's subnet.
    pub subnet: watch::Receiver<Ipv4Net>,
    /// The routes to the peers.
    pub peers: watch::Receiver<Routes>,
}

/// Why rules may be missing; `None` when they are applied.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Problems {
    /// Masquerading and forwarding.
    pub rules: Option<String>,
    /// The guard.
    pub guard: Option<String>,
}

/// Rules and guard of one overlay device.
#[derive(Debug)]
pub struct Keeper {
    /// Masquerading and forwarding, when either is wanted.
    pub rules: Option<Firewall>,
    /// The guard.
    pub guard: Guard,
}

impl Keeper {
    /// Reconciles every `period` and on each change, until a sender of `wanted` is dropped; the rules stay.
    pub async fn run(mut self, period: Duration, mut wanted: Wanted, problems: watch::Sender<Problems>) {
        let mut tick = interval(period);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut next_peers = Instant::now();
        loop {
            // The pause comes before the wait for a change: a branch that is dropped in its pause has taken no change.
            let peers_changed = async {
                sleep_until(next_peers).await;
                wanted.peers.changed().await
            };
            let followed = tokio::select! {
                _ = tick.tick() => {
                    self.reconcile(&mut wanted.peers, &problems).await;
                    Ok(())
                }
                changed = wanted.subnet.changed() => {
                    let subnet = *wanted.subnet.borrow_and_update();
                    self.follow_subnet(subnet, &problems).await;
                    changed
                }
                changed = peers_changed => {
                    self.follow_peers(&mut wanted.peers, &problems).await;
                    next_peers = Instant::now() + PEERS_INTERVAL;
                    changed
                }
            };
            if followed.is_err() {
                return;
            }
        }
    }

    async fn reconcile(&mut self, peers: &mut watch::Receiver<Routes>, problems: &watch::Sender<Problems>) {
        if let Some(rules) = &mut self.rules {
            let restored = rules.reconcile().await;
            if matches!(restored, Ok(true)) {
                info!("restored {}, which were changed or missing", rules.name());
            }
            self.report_rules(restored.err(), problems);
        }
        let routes = peers.borrow_and_update().clone();
        let restored = self.guard.reconcile(&routes).await;
        if matches!(restored, Ok(true)) {
            info!(
                "restored the rules that keep containers from sending to peers, which were changed or missing"
            );
        }
        report_guard(restored.err(), problems);
    }

    async fn follow_subnet(&mut self, subnet: Ipv4Net, problems: &watch::Sender<Problems>) {
        if let Some(rules) = &mut self.rules {
            let applied = rules.set_subnet(subnet).await;
            self.report_rules(applied.err(), problems);
        }
    }

    async fn follow_peers(
        &mut self,
        peers: &mut watch::Receiver<Routes>,
        problems: &watch::Sender<Problems>,
    ) {
        // An `nft` that fails is not started for each change of a peer, only periodically.
        if self.guard.is_applied() {
            let routes = peers.borrow_and_update().clone();
            report_guard(self.guard.update(&routes).await.err(), problems);
        }
    }

    fn report_rules(&mut self, error: Option<NftError>, problems: &watch::Sender<Problems>) {
        if let Some(rules) = &mut self.rules {
            let why = error.map(|error| format!("{} may be missing: {error}", rules.name()));
            problems.send_modify(|problems| problems.rules = why);
            rules.warn_about_legacy();
        }
    }
}

fn report_guard(error: Option<NftError>, problems: &watch::Sender<Problems>) {
    problems.send_modify(|problems| problems.guard = error.map(unguarded));
}
