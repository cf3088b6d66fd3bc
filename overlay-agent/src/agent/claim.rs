//! What becomes of this host's own lease.

use ipnet::Ipv4Net;
use tokio::time::Instant;
use tracing::{info, warn};

use super::{Agent, problems::Concern};
use crate::store::{LeaseEvent, dir::DirStore};

/// How sure the subnet is ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Claim {
    /// The store says so.
    Firm,
    /// The store cannot be asked; what it said last is good until then, or for ever.
    Doubtful(Option<Instant>),
    /// The store says otherwise.
    Lost,
}

impl Agent {
    /// What etcd's keeper has to say about our own lease.
    pub(super) async fn on_lease(&mut self, event: LeaseEvent) {
        match event {
            LeaseEvent::Confirmed { .. } => self.confirm_claim(),
            LeaseEvent::Unconfirmed { why, expires_in } => {
                self.claim = Claim::Doubtful(expires_in.map(|left| Instant::now() + left));
                let left =
                    expires_in.map_or_else(String::new, |left| format!(", it ends in {} s", left.as_secs()));
                self.problems.set(Concern::Lease, format!("the lease cannot be confirmed{left}: {why}"));
            }
            LeaseEvent::Retaken { subnet, why } => {
                self.confirm_claim();
                warn!("the lease of {subnet} was lost and taken again: {why}");
            }
            LeaseEvent::Readdressed { public_ip } => {
                self.recorded_ip = public_ip;
                self.confirm_claim();
                self.note_address();
            }
            LeaseEvent::Moved { from, to, why } => {
                self.confirm_claim();
                warn!("our subnet is {to} now, no longer {from}: {why}");
                self.move_to(to).await;
            }
            LeaseEvent::Unheld { why } | LeaseEvent::Superseded { why } => self.doubt_claim(why),
        }
    }

    fn confirm_claim(&mut self) {
        self.claim = Claim::Firm;
        self.problems.clear(Concern::Lease);
    }

    /// Peers send to the address in our record, and accept packets from no other.
    pub(super) fn note_address(&mut self) {
        let (public_ip, recorded) = (self.place.own.public_ip, self.recorded_ip);
        match public_ip == recorded {
            true => self.problems.clear(Concern::Address),
            false => self.problems.set(
                Concern::Address,
                format!("our address is {public_ip}, and the store still says {recorded}: peers are out of reach until it follows"),
            ),
        }
    }

    fn doubt_claim(&mut self, why: String) {
        self.claim = Claim::Lost;
        self.problems.set(Concern::Lease, why);
    }

    /// Device, routes, firewall and subnet.env follow to another subnet.
    async fn move_to(&mut self, subnet: Ipv4Net) {
        self.place.own.subnet = subnet;
        self.remake_datapath("our subnet changed").await;
        self.rebuild();
        if let Some(host) = &mut self.host {
            host.follow(&self.netlink, subnet).await;
        }
        self.write_subnet_file();
        info!("containers that were made before have addresses of the old subnet: make them again");
    }

    /// Our own record makes peers route to us: it must be there, and be ours.
    pub(super) fn check_own_record(&mut self, store: DirStore) {
        let own = self.place.own;
        match self.table.record(own.subnet) {
            Some(Ok(value)) if [own.public_ip, self.recorded_ip].contains(&value.public_ip) => {
                self.confirm_claim()
            }
            Some(Ok(value)) => {
                let why = format!(
                    "the store says that {} holds our subnet {}: stop one of the two, remove the record and start again",
                    value.public_ip, own.subnet
                );
                self.doubt_claim(why);
            }
            Some(Err(error)) => {
                let why = format!("the record of our subnet {} is broken: {error}", own.subnet);
                self.doubt_claim(why);
            }
            None => {
                let why = format!("the record of our subnet {} was removed: writing it again", own.subnet);
                self.problems.set(Concern::Lease, why);
                tokio::task::spawn_blocking(move || {
                    if let Err(error) = store.reclaim(own.subnet, own.public_ip) {
                        warn!("write our record again: {error:#}");
                    }
                });
            }
        }
    }
}
