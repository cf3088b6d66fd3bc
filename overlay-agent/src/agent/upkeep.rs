//! Keeping the host as it should be: a datapath that failed, a device that someone changed, an underlay that moved.

use std::time::Duration;

use tokio::time::Instant;
use tracing::{error, info};

use super::{
    Agent,
    checks::{check_underlay, inner_mtu},
    host::Host,
    problems::Concern,
};
use crate::underlay::{Underlay, UnderlayChange};

/// First pause before a lost datapath is made again.
const RETRY: Duration = Duration::from_secs(1);
/// Longest pause.
const LONGEST_RETRY: Duration = Duration::from_secs(30);
/// A datapath that lived longer than this was a good one.
const STABLE: Duration = Duration::from_secs(10);

impl Agent {
    /// Schedules a new attempt.
    pub(super) fn on_failure(&mut self, failure: &str) {
        // What a thread reported that a reconciliation has replaced since needs nothing.
        if self.up && !self.datapath.is_alive() {
            error!("the datapath failed and is made again: {failure}");
            self.up = false;
            self.retry_at = Some(self.next_retry());
        }
    }

    /// Makes the datapath follow our place.
    pub(super) async fn remake_datapath(&mut self, why: &str) {
        if self.up {
            info!("the datapath follows: {why}");
            self.restart_datapath().await;
        }
    }

    /// At once after a long life, later and later after short ones.
    fn next_retry(&mut self) -> Instant {
        if self.made_at.is_none_or(|made| made.elapsed() > STABLE) {
            self.retries = 0;
        }
        let pause = match self.retries {
            0 => Duration::ZERO,
            count => (RETRY * 2_u32.saturating_pow(count - 1)).min(LONGEST_RETRY),
        };
        self.retries = self.retries.saturating_add(1);
        Instant::now() + pause
    }

    pub(super) async fn restart_datapath(&mut self) {
        let was_up = self.up;
        self.retry_at = match self.reconcile().await {
            Ok(()) => {
                self.problems.clear(Concern::Datapath);
                if !was_up {
                    info!("the datapath is back");
                }
                None
            }
            Err(error) => {
                let why = format!("the datapath cannot be made, trying again: {error:#}");
                self.problems.set(Concern::Datapath, why);
                self.up = false;
                // Not at once, however long the last one lived.
                self.made_at = Some(Instant::now());
                self.retries = self.retries.max(1);
                Some(self.next_retry())
            }
        };
    }

    /// Puts right what someone changed under us, and tries again what did not work.
    pub(super) async fn care(&mut self) {
        if self.up {
            self.restart_datapath().await;
        }
        if self.running && self.problems.get(Concern::SubnetFile).is_some() {
            self.write_subnet_file();
        }
        if !self.running {
            self.outlook.still_starting();
        }
        match self.host.as_ref().and_then(Host::trouble) {
            Some(why) => self.problems.set(Concern::Firewall, why),
            None => self.problems.clear(Concern::Firewall),
        }
    }

    /// The underlay has another address or MTU, or its device was made anew, and our programs went with the old one.
    pub(super) async fn on_underlay(&mut self, change: UnderlayChange) {
        match change {
            UnderlayChange::Lost(why) => {
                self.problems
                    .set(Concern::Underlay, format!("{why}: peers are out of reach until it is back"));
            }
            UnderlayChange::Changed(found) => self.follow_underlay(found).await,
        }
    }

    async fn follow_underlay(&mut self, found: Underlay) {
        let usable = check_underlay(self.place.own.network, &found).and_then(|()| inner_mtu(&found.link));
        let mtu = match usable {
            Ok(mtu) => mtu,
            Err(error) => return self.problems.set(Concern::Underlay, format!("{error:#}")),
        };
        self.problems.clear(Concern::Underlay);
        let (known, own) = (&self.place.underlay, self.place.own);
        let moved = found.local_ip != known.local_ip;
        let remade = found.link.index != known.link.index;
        let resized = mtu != self.place.mtu;
        if moved {
            info!("the address of {} was {} and is {}", found.link.name, known.local_ip, found.local_ip);
        }
        if resized {
            info!("the MTU of {} is {}: that of the overlay is {mtu} now", found.link.name, found.link.mtu);
        }
        self.place.mtu = mtu;
        self.place.underlay = found;
        let public_ip = self.place.underlay.public_ip;
        if moved || remade {
            let why =
                if remade { "the underlay device was made anew" } else { "the underlay's address changed" };
            self.remake_datapath(why).await;
        } else if resized {
            self.remake_datapath("the underlay's MTU changed").await;
        }
        if public_ip != own.public_ip {
            self.place.own.public_ip = public_ip;
            let events = self.event_sender.clone();
            self.leasing.readdress(self.lease.as_ref(), own.subnet, self.recorded_ip, public_ip, events);
            self.note_address();
            self.rebuild();
        }
        if resized && self.running {
            self.write_subnet_file();
        }
    }
}
