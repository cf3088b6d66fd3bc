//! Performs the keeper's actions on the store.

use std::{net::Ipv4Addr, time::Duration};

use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinHandle,
    time::Instant,
};
use tracing::debug;

use super::{
    Held, LeaseEvent, RecalledLease, SubnetRequest,
    acquire::record_key,
    claim,
    keeper::{Action, Keeper, Observation},
};
use crate::{
    lease::LeaseRecord,
    store::{
        Store, StoreError,
        backend::{Backend, KeyWatch},
    },
    timer::sleep_until_some,
};

impl Store {
    /// How long a lease that was just acquired lasts without a renewal; `None` for a record without end.
    pub fn lasts(&self, held: &Held) -> Option<Duration> {
        held.lifetime.map(|_| self.times.lease_ttl)
    }

    /// Keeps a lease in a task: renews it, acquires it again when it is lost, moves it to another address of this host.
    pub fn keep(&self, held: Held) -> LeaseKeeper {
        let keeper = Keeper::new(held, self.times, self.backend.has_lifetimes(), Instant::now());
        self.start_keeper(keeper)
    }

    /// As [`Self::keep`], for a lease of which the store has not been asked yet.
    pub fn keep_recalled(&self, lease: RecalledLease) -> LeaseKeeper {
        let RecalledLease { held, ends } = lease;
        self.start_keeper(Keeper::recalled(held, self.times, ends, Instant::now()))
    }

    fn start_keeper(&self, keeper: Keeper) -> LeaseKeeper {
        let (sender, events) = mpsc::channel(64);
        let (address, addresses) = watch::channel(keeper.held.public_ip());
        let (stop, stopped) = oneshot::channel::<()>();
        let mut driver =
            Driver { store: self.clone(), keeper, address: addresses, events: sender.clone(), watch: None };
        let task = tokio::spawn(async move {
            tokio::select! {
                () = driver.run() => {}
                // A dropped sender means the same.
                _ = stopped => {}
                () = sender.closed() => {}
            }
            driver.keeper.held
        });
        LeaseKeeper { events, address, _stop: stop, task }
    }
}

/// A task that keeps a lease. Ends when it is dropped.
#[derive(Debug)]
pub struct LeaseKeeper {
    /// News about the lease.
    pub events: mpsc::Receiver<LeaseEvent>,
    address: watch::Sender<Ipv4Addr>,
    _stop: oneshot::Sender<()>,
    task: JoinHandle<Held>,
}

impl LeaseKeeper {
    /// This host has another public address: the record follows, and [`LeaseEvent::Readdressed`] confirms it.
    pub fn set_address(&self, public_ip: Ipv4Addr) {
        self.address.send_replace(public_ip);
    }

    /// Stops and returns what is held.
    pub async fn stop(self) -> Option<Held> {
        let Self { events, _stop, task, .. } = self;
        drop((_stop, events));
        task.await.ok()
    }
}

struct Driver {
    store: Store,
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
            self.store.revoke(std::mem::take(&mut self.keeper.revoked)).await;
            for event in std::mem::take(&mut self.keeper.events) {
                self.archive(&event);
                // A closed receiver ends the task.
                let _ = self.events.send(event).await;
            }
        }
    }

    async fn perform(&mut self, action: Action) -> Result<Observation, StoreError> {
        let (store, held) = (&self.store, &self.keeper.held);
        Ok(match action {
            Action::Read => {
                self.watch = None;
                let snapshot = store.backend.get(self.keys()).await?;
                let mut records = snapshot.records.into_iter();
                let record = records.next().flatten().map(LeaseRecord::from);
                let claim = records.next().flatten().and_then(|claim| claim.version.lifetime.id());
                Observation::Read { revision: snapshot.revision, record, claim }
            }
            Action::Claim { address, wait } => Observation::Claimed(store.claim(address, wait).await?),
            Action::RenewClaim(lifetime) => {
                Observation::ClaimRenewed(store.backend.lifetimes()?.renew(lifetime).await?)
            }
            Action::Renew(lifetime) => {
                let lifetimes = store.backend.lifetimes()?;
                let lives = lifetimes.renew(lifetime).await?;
                let duration = if lives { lifetimes.duration(lifetime).await? } else { None };
                Observation::Renewed(duration)
            }
            Action::TakeSubnet => {
                let request = SubnetRequest { earlier: Some(held.subnet), ..held.request.clone() };
                let taken = store.take_subnet(&request, held.claim).await?;
                Observation::Taken(Box::new(taken))
            }
            Action::Restore(version) => match store.restore(held, version).await? {
                Some(held) => Observation::Taken(Box::new(held)),
                None => Observation::Changed,
            },
            Action::MoveRecord(claim) => Observation::RecordMoved(store.move_record(held, claim).await?),
            Action::Wait { until, changed_after } => return self.wait(until, changed_after).await,
        })
    }

    /// A host that starts without the store takes what was confirmed last, and nothing when that was lost.
    fn archive(&self, event: &LeaseEvent) {
        let Some(archive) = &self.store.archive else { return };
        match event {
            LeaseEvent::Confirmed { .. } => archive.set_own(Some(self.keeper.to_own_lease(Instant::now()))),
            LeaseEvent::Lost { .. } | LeaseEvent::Superseded { .. } => archive.set_own(None),
            LeaseEvent::Unconfirmed { .. }
            | LeaseEvent::Reacquired { .. }
            | LeaseEvent::Moved { .. }
            | LeaseEvent::Readdressed { .. } => {}
        }
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
                self.watch = Some(self.store.backend.watch_keys(&self.keys(), revision).await?);
            }
            Some(_) => {}
        }
        let due = sleep_until_some(until);
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
                if let Backend::Etcd(etcd) = &self.store.backend {
                    etcd.forget_connection().await;
                }
                Ok(Observation::AddressChanged(*self.address.borrow_and_update()))
            }
        }
    }
}
