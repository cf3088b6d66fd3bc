//! Keeping the host as it should be: a datapath that failed, a device that someone changed, an underlay that moved.

use std::{net::SocketAddrV4, time::Duration};

use tokio::time::Instant;
use tracing::{error, info, warn};

use super::{
    Agent,
    checks::{check_underlay, inner_mtu},
    host::Host,
    problems::Concern,
};
use crate::{
    datapath::tun,
    device,
    route_table::Own,
    underlay::{Underlay, UnderlayChange},
};

/// First pause before a lost datapath is made again.
const RETRY: Duration = Duration::from_secs(1);
/// Longest pause.
const LONGEST_RETRY: Duration = Duration::from_secs(30);
/// A datapath that lived longer than this was a good one.
const STABLE: Duration = Duration::from_secs(10);

impl Agent {
    /// Drops the datapath and schedules a new one.
    pub(super) fn on_failure(&mut self, failure: &str) {
        if self.datapath.is_some() {
            error!("the datapath failed and is made again: {failure}");
            self.drop_datapath();
            self.retry_at = Some(self.next_retry());
        }
    }

    /// Makes the datapath anew where it has to be another one.
    pub(super) async fn remake_datapath(&mut self, why: &str) {
        if self.datapath.is_some() {
            info!("the datapath is made anew: {why}");
            self.drop_datapath();
            self.restart_datapath().await;
        }
    }

    fn drop_datapath(&mut self) {
        if let Some(datapath) = self.datapath.take() {
            match datapath.counters() {
                Ok(counters) => self.counted = self.counted.plus(&counters),
                Err(error) => warn!("the lost datapath's counters are lost too: {error:#}"),
            }
        }
        // Its threads have ended: what they still said is about what is gone.
        while self.failures.1.try_recv().is_ok() {}
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
        let attempt = async {
            device::preflight(&self.netlink, &self.options.device, self.place.own.network).await?;
            let underlay = &self.place.underlay;
            let socket =
                tun::bind(SocketAddrV4::new(underlay.local_ip, self.place.port), &underlay.link.name)?;
            self.start_datapath(socket).await
        };
        self.retry_at = match attempt.await {
            Ok(()) => {
                self.problems.clear(Concern::Datapath);
                info!("the datapath is back");
                None
            }
            Err(error) => {
                let why = format!("the datapath cannot be made, trying again: {error:#}");
                self.problems.set(Concern::Datapath, why);
                // Not at once, however long the last one lived.
                self.made_at = Some(Instant::now());
                self.retries = self.retries.max(1);
                Some(self.next_retry())
            }
        };
    }

    /// Puts right what someone changed under us, and tries again what did not work.
    pub(super) async fn care(&mut self) {
        let restored = self.put_device_right().await;
        if !restored.is_empty() {
            warn!("someone changed {}: restored its {}", self.options.device, restored.join(", "));
        }
        if self.problems.get(Concern::Routes).is_some()
            && let Some(datapath) = &mut self.datapath
        {
            let written = datapath.set_routes(self.table.routes());
            self.note_routes(written);
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
        } else if let Some(datapath) = &self.datapath {
            datapath.set_mtu(mtu);
            self.put_device_right().await;
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

    async fn put_device_right(&mut self) -> Vec<&'static str> {
        let Own { network, subnet, .. } = self.place.own;
        match device::restore(&self.netlink, &self.options.device, network, subnet, self.place.mtu).await {
            Ok(restored) => restored,
            Err(error) => {
                warn!("look after {}: {error:#}", self.options.device);
                Vec::new()
            }
        }
    }
}
