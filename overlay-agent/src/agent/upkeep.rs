//! Keeping the host as it should be: a datapath that failed, a device that someone changed, an underlay that moved.

use std::net::SocketAddrV4;

use tokio::time::Instant;
use tracing::{error, info, warn};

use super::{
    Agent, RETRY,
    checks::{check_underlay, inner_mtu},
    problems::Concern,
};
use crate::{
    datapath::tun,
    device,
    route_table::Own,
    underlay::{Underlay, UnderlayChange},
};

impl Agent {
    /// Drops the datapath and schedules a new one.
    pub(super) fn on_failure(&mut self, failure: &str) {
        if self.datapath.is_some() {
            error!("the datapath failed and is made again: {failure}");
            self.drop_datapath();
        }
        // The other thread's word on the same loss.
        while self.failures.1.try_recv().is_ok() {}
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
        self.retry_at = Some(Instant::now());
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
                info!("the datapath is back");
                None
            }
            Err(error) => {
                error!("the datapath cannot be made, trying again: {error:#}");
                Some(Instant::now() + RETRY)
            }
        };
    }

    /// Puts right what someone changed under us.
    pub(super) async fn care(&mut self) {
        let restored = self.put_device_right().await;
        if !restored.is_empty() {
            warn!("someone changed {}: restored its {}", self.options.device, restored.join(", "));
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
            self.leasing.readdress(self.lease.as_ref(), own.subnet, own.public_ip, public_ip).await;
            self.place.own.public_ip = public_ip;
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
