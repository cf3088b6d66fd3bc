//! Performs the keeper's actions on the store.

use std::net::Ipv4Addr;

use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep_until},
};
use tracing::debug;

use super::{
    Held, LeaseEvent, Leases, SubnetRequest,
    acquire::record_key,
    claim::{self, Claimed},
    keeper::{Action, Keeper, Observation},
};
use crate::{
    lease::LeaseRecord,
    store::{
        StoreError,
        backend::{Backend, KeyWatch},
    },
};

/// Keeps `held` until `stop` is done or `events` is closed, and returns what is held then. The record follows this host to
/// whatever address `address` contains.
pub(in crate::store) async fn keep(
    leases: Leases,
    held: Held,
    address: watch::Receiver<Ipv4Addr>,
    events: mpsc::Sender<LeaseEvent>,
    stop: impl Future<Output = ()>,
) -> Held {
    let has_lifetimes = leases.backend.has_lifetimes();
    let keeper = Keeper::new(held, leases.times, has_lifetimes, Instant::now());
    let mut driver = Driver { leases, keeper, address, events: events.clone(), watch: None };
    tokio::select! {
        () = driver.run() => {}
        () = stop => {}
        () = events.closed() => {}
    }
    driver.keeper.held
}

struct Driver {
    leases: Leases,
    keeper: Keeper,
    address: watch::Receiver<Ipv4Addr>,
    events: mpsc::Sender<LeaseEvent>,
    /// Open while the keeper waits for changes.
    watch: Option<KeyWatch>,
}

impl Driver {
    /// Never returns.
    async fn run(&mut self) {
        let mut action = Action::Read;
        loop {
            let observation = match self.perform(action).await {
                Ok(observation) => observation,
                Err(error) => {
                    debug!("{error}");
                    self.watch = None;
                    Observation::Failed(error)
                }
            };
            action = self.keeper.next(observation, Instant::now());
            for lifetime in std::mem::take(&mut self.keeper.revoked) {
                self.leases.backend.revoke(lifetime).await;
            }
            for event in std::mem::take(&mut self.keeper.events) {
                // A closed receiver ends `keep`.
                let _ = self.events.send(event).await;
            }
        }
    }

    async fn perform(&mut self, action: Action) -> Result<Observation, StoreError> {
        let (leases, held) = (&self.leases, &self.keeper.held);
        Ok(match action {
            Action::Read => {
                self.watch = None;
                let snapshot = leases.backend.get(self.keys()).await?;
                let mut records = snapshot.records.into_iter();
                let record = records.next().flatten().map(LeaseRecord::from);
                let claim = records.next().flatten().and_then(|claim| claim.version.lifetime.id());
                Observation::Read { revision: snapshot.revision, record, claim }
            }
            Action::Claim { address, wait: true } => Observation::Claimed(leases.claim(address).await?),
            Action::Claim { address, wait: false } => match leases.try_claim(address).await? {
                Claimed::Ours(claim) => Observation::Claimed(claim),
                Claimed::Theirs(other) => return Err(leases.same_public_ip(address, &other)),
            },
            Action::Renew(lifetime) => Observation::Renewed(leases.backend.renew(lifetime).await?),
            Action::TakeSubnet => {
                let request = SubnetRequest { earlier: Some(held.subnet), ..held.request.clone() };
                let taken = leases.take_subnet(&request, held.claim).await?;
                Observation::Taken(Box::new(taken))
            }
            Action::Restore(version) => match leases.restore(held, version).await? {
                Some(held) => Observation::Taken(Box::new(held)),
                None => Observation::Changed,
            },
            Action::MoveRecord(claim) => Observation::RecordMoved(leases.move_record(held, claim).await?),
            Action::Wait { until, changed_after } => return self.wait(until, changed_after).await,
        })
    }

    /// Our record and, where it can exist, our claim. Without the right to read the claim, the read would be refused.
    fn keys(&self) -> Vec<String> {
        let held = &self.keeper.held;
        let claim = held.claim.lifetime.map(|_| claim::key(held.public_ip()));
        [record_key(&held.key)].into_iter().chain(claim).collect()
    }

    async fn wait(
        &mut self,
        until: Option<Instant>,
        changed_after: Option<i64>,
    ) -> Result<Observation, StoreError> {
        match changed_after {
            None => self.watch = None,
            Some(revision) if self.watch.is_none() => {
                self.watch = Some(self.leases.backend.watch_keys(&self.keys(), revision).await?);
            }
            Some(_) => {}
        }
        let due = async {
            match until {
                Some(until) => sleep_until(until).await,
                None => std::future::pending().await,
            }
        };
        let changed = async {
            match &mut self.watch {
                Some(watch) => watch.changed().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = due => Ok(Observation::Due),
            changed = changed => changed.map(|()| Observation::Changed),
            Ok(()) = self.address.changed() => {
                // Packets to the old address no longer arrive.
                if let Backend::Etcd(etcd) = &self.leases.backend {
                    etcd.forget_connection().await;
                }
                Ok(Observation::AddressChanged(*self.address.borrow_and_update()))
            }
        }
    }
}
