//! Writes the records of virtual addresses: assigns, releases, and ends quarantines where the store does not.

use std::{collections::BTreeMap, net::Ipv4Addr, sync::Arc, time::Duration};

use tokio::{
    sync::watch,
    task::JoinHandle,
    time::{Instant, sleep},
};
use tracing::{debug, info};

use super::{Surplus, VipOptions, Work, candidates, is_usable, usable};
use crate::{
    service::{
        name::ServiceName,
        record::{Released, Services, Vip, Vips},
    },
    store::{Condition, LifetimeId, Record, Store, StoreError, Version},
    timer::sleep_until_some,
};

/// Agents act at different times after a change: the first one does the work, the others find it done.
const JITTER: Duration = Duration::from_millis(300);
/// Pause before another attempt at work that is left over.
const RETRY: Duration = Duration::from_secs(5);
/// Services after which an agent looks whether others have done some of the work.
const LOOK: usize = 32;

/// Services without an address, with the reason.
pub type Problems = BTreeMap<ServiceName, String>;

/// A task that assigns virtual addresses. Ends when it is dropped.
#[derive(Debug)]
pub struct VipKeeper {
    /// Services without an address, with the reason.
    pub problems: watch::Receiver<Problems>,
    task: JoinHandle<()>,
}

impl Drop for VipKeeper {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Does `work` in a task, whenever there is some.
pub fn keep(store: &Store, options: VipOptions, work: watch::Receiver<Arc<Work>>) -> VipKeeper {
    let (sender, problems) = watch::channel(Problems::new());
    let mut keeper = Keeper { store: store.clone(), options, work, problems: sender, seen: BTreeMap::new() };
    let task = tokio::spawn(async move { keeper.run().await });
    VipKeeper { problems, task }
}

struct Keeper {
    store: Store,
    options: VipOptions,
    work: watch::Receiver<Arc<Work>>,
    problems: watch::Sender<Problems>,
    /// Released addresses that the store does not end by itself, with the time at which this agent saw them first.
    seen: BTreeMap<Ipv4Addr, (Version, Instant)>,
}

impl Keeper {
    /// Returns when no more work can come.
    async fn run(&mut self) {
        loop {
            let work = Arc::clone(&self.work.borrow_and_update());
            let mut retry = !work.missing.is_empty() || !work.surplus.is_empty();
            if let Err(error) = self.act(&work).await {
                debug!("virtual addresses: {error}");
                retry = true;
            }
            let retry = retry.then(|| Instant::now() + RETRY);
            let ends = self.seen.values().map(|(_, since)| *since + self.options.quarantine);
            let next = ends.chain(retry).min();
            tokio::select! {
                changed = self.work.changed() => if changed.is_err() { return },
                () = sleep_until_some(next) => {}
            }
            sleep(rand::random_range(Duration::ZERO..JITTER)).await;
        }
    }

    async fn act(&mut self, work: &Work) -> Result<(), StoreError> {
        self.end_quarantines(work).await?;
        let mut lifetime = None;
        let mut is_used = false;
        for surplus in &work.surplus {
            is_used |= self.release(surplus, &mut lifetime).await?;
        }
        if let Some(lifetime) = lifetime.filter(|_| !is_used) {
            self.store.revoke_lifetime(lifetime).await;
        }
        let Some(problems) = self.assign_all(work).await? else { return Ok(()) };
        self.problems.send_if_modified(|before| {
            let changed = *before != problems;
            *before = problems;
            changed
        });
        Ok(())
    }

    /// Assigns addresses to all services that need one. `None` when newer work has come meanwhile.
    async fn assign_all(&self, work: &Work) -> Result<Option<Problems>, StoreError> {
        let mut taken = work.taken.clone();
        let earlier = work.released.iter().filter_map(|record| match (&record.id, &record.value) {
            (Ok(vip), Ok(Vip::Released(Released { by, .. }))) => Some((by, *vip)),
            _ => None,
        });
        let earlier: BTreeMap<_, _> = earlier.filter(|(_, vip)| is_usable(self.options.pool, *vip)).collect();
        let mut problems = Problems::new();
        // Agents that have the same work begin at different places.
        let first = rand::random_range(0..work.missing.len().max(1));
        let (before, behind) = work.missing.split_at_checked(first).unwrap_or_default();
        let mut is_full = false;
        for (number, service) in behind.iter().chain(before).enumerate() {
            if number % LOOK == LOOK - 1 && self.work.has_changed().unwrap_or(true) {
                return Ok(None);
            }
            let Ok(name) = &service.id else { continue };
            let earlier = earlier.get(name).copied();
            if let Err(why) = self.assign(name, service, earlier, &mut taken, &mut is_full).await? {
                problems.insert(name.clone(), why);
            }
        }
        Ok(Some(problems))
    }

    /// Assigns an address to a service, if it wants no other its `earlier` one. The inner error is the reason why it cannot have one.
    /// `is_full` remembers that no address is free.
    async fn assign(
        &self,
        name: &ServiceName,
        service: &Record<Services>,
        earlier: Option<Ipv4Addr>,
        taken: &mut BTreeMap<Ipv4Addr, Record<Vips>>,
        is_full: &mut bool,
    ) -> Result<Result<(), String>, StoreError> {
        let pool = self.options.pool;
        let was_ours = |record: &Record<Vips>| matches!(&record.value, Ok(Vip::Released(Released { by, .. })) if by == name);
        let wanted = service.value.as_ref().ok().and_then(|service| service.vip);
        if let Some(wanted) = wanted {
            if !is_usable(pool, wanted) {
                return Ok(Err(format!(
                    "the wanted address {wanted} is no usable address of the pool {pool}"
                )));
            }
            return match taken.get(&wanted) {
                Some(record) if !was_ours(record) => Ok(Err(self.why_not(wanted, record))),
                known => match self.take(name, wanted, known, service).await? {
                    Taken::Ours | Taken::Stale => Ok(Ok(())),
                    Taken::Other(record) => Ok(Err(self.why_not(wanted, &record))),
                },
            };
        }
        let others = candidates(pool, name).take(if *is_full { 0 } else { usize::MAX });
        for vip in earlier.into_iter().chain(others) {
            let known = taken.get(&vip);
            if known.is_some_and(|record| !was_ours(record)) {
                continue;
            }
            match self.take(name, vip, known, service).await? {
                Taken::Ours => {
                    let record =
                        Record::parse(&vip.to_string(), name.to_string().as_bytes(), Version::default());
                    taken.insert(vip, record);
                    return Ok(Ok(()));
                }
                // It changed, so new work follows.
                Taken::Stale => return Ok(Ok(())),
                Taken::Other(record) => drop(taken.insert(vip, record)),
            }
        }
        *is_full = true;
        let count = usable(pool).len();
        Ok(Err(format!(
            "all {count} addresses of the pool {pool} are in use, or were released less than {} s ago: remove services, or set a \
             larger Services.Pool in the network config",
            self.options.quarantine.as_secs()
        )))
    }

    /// Writes the record that a service holds an address, over `known`, the record of its release, if there is one.
    async fn take(
        &self,
        name: &ServiceName,
        vip: Ipv4Addr,
        known: Option<&Record<Vips>>,
        service: &Record<Services>,
    ) -> Result<Taken, StoreError> {
        let (held, conditions) = (Vip::Held(name.clone()), [Condition::unchanged(service)]);
        let written = match known {
            None => self.store.create_record::<Vips>(&vip, &held, None, &conditions).await?,
            Some(known) => {
                self.store.replace_record::<Vips>(&vip, known.version, &held, None, &conditions).await?
            }
        };
        if written.is_some() {
            info!("the service {name} has the virtual address {vip}");
            return Ok(Taken::Ours);
        }
        Ok(match self.store.get::<Vips>(&vip).await? {
            Some(record) if record.value.as_ref() == Ok(&held) => Taken::Ours,
            Some(record) if known.is_none_or(|known| known.version != record.version) => Taken::Other(record),
            // The service changed, or the address was freed just now.
            Some(_) | None => Taken::Stale,
        })
    }

    /// Why a service cannot have an address that has this record.
    fn why_not(&self, vip: Ipv4Addr, record: &Record<Vips>) -> String {
        match &record.value {
            Ok(Vip::Held(holder)) => format!("{holder} holds the wanted address {vip}"),
            Ok(Vip::Released(Released { by, .. })) => format!(
                "{by} had the wanted address {vip} less than {} s ago: clients may still use it for that service",
                self.options.quarantine.as_secs()
            ),
            Err(error) => format!("the record of the wanted address {vip} cannot be used: {error}"),
        }
    }

    /// Begins the quarantine of an address, if it is still held for nothing.
    async fn release(
        &self,
        surplus: &Surplus,
        lifetime: &mut Option<LifetimeId>,
    ) -> Result<bool, StoreError> {
        let Surplus { vip: record, service } = surplus;
        let (Ok(vip), Ok(Vip::Held(holder))) = (&record.id, &record.value) else { return Ok(false) };
        // The kinds are followed one by one: the services that are known may be older than the addresses.
        let conditions = match service {
            Some(service) => [Condition::unchanged(service)],
            None => [Condition::absent::<Services>(holder)],
        };
        if lifetime.is_none() && self.store.has_lifetimes() {
            *lifetime = Some(self.store.grant_lifetime(self.options.quarantine).await?);
        }
        let released = Vip::Released(Released { by: holder.clone(), nonce: rand::random() });
        let version = record.version;
        let written =
            self.store.replace_record::<Vips>(vip, version, &released, *lifetime, &conditions).await?;
        if written.is_some() {
            info!("the virtual address {vip} of {holder} was released");
        }
        Ok(written.is_some())
    }

    /// Removes records of releases that have no end of their own, once they were seen for the quarantine.
    async fn end_quarantines(&mut self, work: &Work) -> Result<(), StoreError> {
        let endless: BTreeMap<_, _> = work
            .released
            .iter()
            .filter(|record| record.version.lifetime.id().is_none())
            .filter_map(|record| Some((*record.id.as_ref().ok()?, record)))
            .collect();
        self.seen
            .retain(|vip, (version, _)| endless.get(vip).is_some_and(|record| record.version == *version));
        let now = Instant::now();
        for (vip, record) in endless {
            let (_, since) = self.seen.entry(vip).or_insert((record.version, now));
            if *since + self.options.quarantine <= now {
                self.store.remove(record).await?;
                self.seen.remove(&vip);
            }
        }
        Ok(())
    }
}

/// What came of an attempt at an address.
enum Taken {
    Ours,
    /// The attempt was based on records that have changed since.
    Stale,
    Other(Record<Vips>),
}
