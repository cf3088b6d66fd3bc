//! Keeping a subnet: renewing in time, seeing when the record is lost, and taking it again without ever taking it from
//! anybody.
//!
//! The task goes round two states. In the first it reads what stands in etcd and puts it right, by transactions only; in the
//! second it waits for a change of our keys or for the time of the next renewal. Whatever is in doubt - an error, a broken
//! watch, a lease that has ended, a process that was paused for a day - leads back to the first.

use std::{net::Ipv4Addr, time::Duration};

use etcd_client::{KeyValue, Txn, TxnOp, TxnOpResponse, WatchOptions, WatchStream};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep, sleep_until, timeout},
};
use tracing::{debug, info, warn};

use super::{
    EtcdStore,
    acquire::{Held, Place},
    error::EtcdError,
    owner::Claim,
    records::Entry,
    session::{Backoff, Connection, REQUEST, Shared},
};
use crate::store::{Event, LeaseEvent};

impl EtcdStore {
    /// Keeps `held` until `stop` is done or `events` is closed, and hands back what is held then. What happens to the claim
    /// is sent to `events` as [`Event::Lease`]. The record follows this host to whatever address `public_ip` says.
    pub async fn maintain(
        &self,
        held: Held,
        public_ip: watch::Receiver<Ipv4Addr>,
        events: mpsc::Sender<Event>,
        stop: impl Future<Output = ()>,
    ) -> Held {
        let mut keeper = Keeper::new(self.clone(), held, public_ip, events.clone());
        tokio::select! {
            () = keeper.run() => {}
            () = stop => {}
            () = events.closed() => {}
        }
        keeper.held
    }
}

/// What stands in etcd where our claim should be.
enum Found {
    /// Our record.
    Ours,
    /// A record with our address, but not the one that we wrote: an operator made it a reservation, or a flanneld wrote it.
    Adopted(Entry),
    /// Nothing.
    Missing,
    /// A record of somebody else, or one that nobody can read.
    Theirs(String),
}

/// Waits for another value, for ever when there will be none.
async fn changed(public_ip: &mut watch::Receiver<Ipv4Addr>) {
    if public_ip.changed().await.is_err() {
        std::future::pending().await
    }
}

struct Keeper {
    store: EtcdStore,
    session: Shared,
    held: Held,
    /// This host's address as it should stand in the record.
    public_ip: watch::Receiver<Ipv4Addr>,
    events: mpsc::Sender<Event>,
    /// When the claim ends if nothing is heard from etcd any more, counted from before the last renewal was asked for.
    expires: Option<Instant>,
    renew_at: Instant,
    claim_at: Instant,
    /// The last event of trouble, so that each is said once.
    trouble: Option<LeaseEvent>,
}

impl Keeper {
    fn new(
        store: EtcdStore,
        held: Held,
        public_ip: watch::Receiver<Ipv4Addr>,
        events: mpsc::Sender<Event>,
    ) -> Self {
        let (now, session) = (Instant::now(), store.session.clone());
        let expires = held.lease.map(|_| now + session.options.lease_ttl);
        let (renew_at, claim_at) = (now, now);
        Self { store, session, held, public_ip, events, expires, renew_at, claim_at, trouble: None }
    }

    /// Never ends by itself.
    async fn run(&mut self) {
        let mut backoff = Backoff::default();
        loop {
            match self.check_and_wait(&mut backoff).await {
                Ok(()) => {}
                Err(EtcdError::SamePublicIp { holder, key, public_ip }) => {
                    let why = EtcdError::SamePublicIp { public_ip, holder, key }.to_string();
                    self.report(LeaseEvent::Superseded { why }).await;
                    // The other one may go; asking costs one request.
                    sleep(self.session.options.owner_ttl / 3).await;
                }
                Err(error) => {
                    debug!("{error}");
                    // A claim that is known to be lost stays in the last word about it.
                    if !matches!(
                        self.trouble,
                        Some(LeaseEvent::Unheld { .. } | LeaseEvent::Superseded { .. })
                    ) {
                        let expires_in =
                            self.expires.map(|expires| expires.saturating_duration_since(Instant::now()));
                        self.report(LeaseEvent::Unconfirmed { why: error.to_string(), expires_in }).await;
                    }
                    sleep(backoff.next()).await;
                }
            }
        }
    }

    async fn check_and_wait(&mut self, backoff: &mut Backoff) -> Result<(), EtcdError> {
        let mut revision = self.check().await?;
        let public_ip = *self.public_ip.borrow_and_update();
        if public_ip != self.held.public_ip {
            let from = self.held.public_ip;
            self.held = self.store.readdress(&self.held, public_ip).await?;
            info!("the lease on {} is under {public_ip} now, no longer under {from}", self.held.subnet);
            self.claim_at = Instant::now();
            revision = self.check().await?;
        }
        let (mut watch, connection) = self.open_watch(revision + 1).await?;
        backoff.reset();
        loop {
            tokio::select! {
                message = watch.message() => {
                    return match message {
                        // The answer to the request for a watch, or a sign of life.
                        Ok(Some(answer)) if !answer.canceled() && answer.events().is_empty() => continue,
                        // A change, or history that etcd no longer has: see what stands there now.
                        Ok(Some(answer)) if !answer.canceled() || answer.compact_revision() > 0 => Ok(()),
                        broken => {
                            self.session.drop_connection(&connection).await;
                            let why = match broken {
                                Ok(Some(answer)) => answer.cancel_reason().to_owned(),
                                Ok(None) => "the connection ended".to_owned(),
                                Err(error) => return Err(EtcdError::of("watch our lease in etcd", &error)),
                            };
                            Err(EtcdError::Away { operation: "watch our lease in etcd".to_owned(), why })
                        }
                    };
                }
                () = changed(&mut self.public_ip) => {
                    self.session.forget_connection().await;
                    return Ok(());
                }
                () = sleep_until(self.claim_at), if self.held.owner.is_some() => {
                    if !self.renew_claim().await? {
                        return Ok(());
                    }
                }
                () = sleep_until(self.renew_at), if self.held.lease.is_some() => {
                    if !self.renew().await? {
                        return Ok(());
                    }
                }
            }
        }
    }

    /// Makes true again what should be, and returns the revision of which that is known.
    async fn check(&mut self) -> Result<i64, EtcdError> {
        loop {
            let (revision, record, claim) = self.read().await?;
            if self.held.owner.is_some() && claim.as_ref().map(KeyValue::lease) != self.held.owner {
                // First of all: without it, no transaction below would pass.
                match self.session.try_claim(self.held.public_ip).await? {
                    Claim::Ours(owner) => self.held.owner = owner,
                    Claim::Theirs(other) => {
                        return Err(self.session.same_public_ip(self.held.public_ip, &other));
                    }
                }
                continue;
            }
            let done = match self.found(record) {
                Found::Ours => self.confirm().await?,
                Found::Adopted(entry) => {
                    self.adopt(&entry).await;
                    false
                }
                Found::Missing => {
                    self.retake("its record was removed, or its time ran out").await?;
                    false
                }
                Found::Theirs(who) => {
                    self.move_away(&format!("its record is {who} now")).await?;
                    false
                }
            };
            if done {
                return Ok(revision);
            }
        }
    }

    /// Our record and our claim on the address, of one revision.
    async fn read(&self) -> Result<(i64, Option<KeyValue>, Option<KeyValue>), EtcdError> {
        let keys = &self.session.keys;
        let gets = [
            TxnOp::get(keys.record(&self.held.key), None),
            TxnOp::get(keys.owner(self.held.public_ip), None),
        ];
        // Without the right to read the claim, the whole transaction would be refused.
        let count = if self.held.owner.is_some() { 2 } else { 1 };
        let gets: Vec<_> = gets.into_iter().take(count).collect();
        let answer = self
            .session
            .request("read our lease in etcd", |mut client| async move {
                client.txn(Txn::new().and_then(gets)).await
            })
            .await?;
        let revision = answer.header().map_or(0, |header| header.revision());
        let mut found = answer.op_responses().into_iter().map(|answer| match answer {
            TxnOpResponse::Get(mut answer) => answer.take_kvs().pop(),
            TxnOpResponse::Put(_) | TxnOpResponse::Delete(_) | TxnOpResponse::Txn(_) => None,
        });
        Ok((revision, found.next().flatten(), found.next().flatten()))
    }

    fn found(&self, record: Option<KeyValue>) -> Found {
        let Some(record) = record else { return Found::Missing };
        let entry = Entry::new(&self.session.keys, &record);
        match entry.parsed() {
            None => Found::Theirs("one that cannot be read".to_owned()),
            Some(value) if value.public_ip != self.held.public_ip => {
                Found::Theirs(format!("that of {}", value.public_ip))
            }
            Some(_) if entry.lease == self.held.lease.unwrap_or(0) => Found::Ours,
            Some(_) => Found::Adopted(entry),
        }
    }

    /// The record is ours: renew it and say so.
    async fn confirm(&mut self) -> Result<bool, EtcdError> {
        if self.held.lease.is_some() {
            if self.renew().await? {
                return Ok(true);
            }
            // The etcd lease has ended and etcd is about to remove the record.
            sleep(Duration::from_millis(200)).await;
            return Ok(false);
        }
        self.trouble = None;
        self.send(LeaseEvent::Confirmed { expires_in: None }).await;
        Ok(true)
    }

    /// Another etcd lease holds our record. The one that we had holds nothing any more.
    async fn adopt(&mut self, entry: &Entry) {
        match entry.is_reservation() {
            true => warn!("the lease on {} is a reservation now and no longer expires", self.held.subnet),
            false => {
                warn!("the lease on {} was written by another program with our address", self.held.subnet)
            }
        }
        if let Some(old) = self.held.lease.take() {
            self.session.revoke(old).await;
        }
        self.held.lease = Some(entry.lease).filter(|_| !entry.is_reservation());
        if self.held.lease.is_none() {
            self.expires = None;
        }
    }

    /// Writes the lost record again, if the subnet is still free.
    async fn retake(&mut self, why: &str) -> Result<(), EtcdError> {
        let lease = self.session.grant(self.session.options.lease_ttl).await?;
        let place =
            Place { config: &self.held.config, public_ip: self.held.public_ip, owner: self.held.owner };
        match self.session.create(&place, self.held.subnet, lease).await {
            Ok(true) => {
                self.held.key = crate::lease::key(self.held.subnet);
                self.held.lease = Some(lease);
                self.trouble = None;
                self.send(LeaseEvent::Retaken { subnet: self.held.subnet, why: why.to_owned() }).await;
                Ok(())
            }
            Ok(false) => {
                self.session.revoke(lease).await;
                // Either the record is there again, which the next look shows, or one that overlaps it is.
                let (_, record, _) = self.read().await?;
                match record {
                    Some(_) => Ok(()),
                    None => self.move_away(&format!("{why}, and a part of it is somebody else's now")).await,
                }
            }
            // If the record was written and only the answer lost, the next look finds it with this lease and adopts it.
            Err(error) => Err(error),
        }
    }

    /// Takes another subnet, because ours is somebody else's.
    async fn move_away(&mut self, why: &str) -> Result<(), EtcdError> {
        let place =
            Place { config: &self.held.config, public_ip: self.held.public_ip, owner: self.held.owner };
        let from = self.held.subnet;
        match self.session.take_subnet(&place, None, None).await {
            Ok(held) => {
                // Nothing of ours hangs on the old etcd lease.
                if let Some(old) = self.held.lease.filter(|old| Some(*old) != held.lease) {
                    self.session.revoke(old).await;
                }
                let to = held.subnet;
                self.held = held;
                self.trouble = None;
                let why = why.to_owned();
                self.send(if from == to {
                    LeaseEvent::Retaken { subnet: to, why }
                } else {
                    LeaseEvent::Moved { from, to, why }
                })
                .await;
                Ok(())
            }
            Err(error) => {
                if !error.is_transient() && !matches!(error, EtcdError::SamePublicIp { .. }) {
                    self.report(LeaseEvent::Unheld { why: format!("{why}: {error}") }).await;
                }
                Err(error)
            }
        }
    }

    /// Renews the etcd lease of the record. `false` when it has ended.
    async fn renew(&mut self) -> Result<bool, EtcdError> {
        let Some(lease) = self.held.lease else { return Ok(true) };
        let asked = Instant::now();
        let Some(ttl) = self.session.keep_alive(lease).await? else { return Ok(false) };
        self.expires = Some(asked + ttl);
        self.renew_at = asked + self.session.options.renew_after(ttl);
        self.trouble = None;
        self.send(LeaseEvent::Confirmed { expires_in: Some(ttl) }).await;
        Ok(true)
    }

    /// Renews the claim on the public address. `false` when it has ended.
    async fn renew_claim(&mut self) -> Result<bool, EtcdError> {
        let Some(owner) = self.held.owner else { return Ok(true) };
        let asked = Instant::now();
        let Some(ttl) = self.session.keep_alive(owner).await? else { return Ok(false) };
        self.claim_at = asked + ttl / 3;
        Ok(true)
    }

    async fn open_watch(&self, revision: i64) -> Result<(WatchStream, Connection), EtcdError> {
        let operation = "watch our lease in etcd";
        let connection = self.session.connection().await?;
        let keys = &self.session.keys;
        let options = WatchOptions::new().with_start_revision(revision);
        let opened = async {
            let mut watch = connection
                .client
                .watch_client()
                .watch(keys.record(&self.held.key), Some(options.clone()))
                .await?;
            if self.held.owner.is_some() {
                watch.watch(keys.owner(self.held.public_ip), Some(options)).await?;
            }
            Ok(watch)
        };
        let why = match timeout(REQUEST, opened).await {
            Ok(Ok(watch)) => return Ok((watch, connection)),
            Ok(Err(error)) => EtcdError::of(operation, &error),
            Err(_) => EtcdError::Away {
                operation: operation.to_owned(),
                why: format!("no answer within {} s", REQUEST.as_secs()),
            },
        };
        self.session.drop_connection(&connection).await;
        Err(why)
    }

    /// Says what is wrong, once.
    async fn report(&mut self, trouble: LeaseEvent) {
        let said = self.trouble.as_ref().map(std::mem::discriminant);
        if said != Some(std::mem::discriminant(&trouble)) {
            self.trouble = Some(trouble.clone());
            self.send(trouble).await;
        }
    }

    async fn send(&self, event: LeaseEvent) {
        // Whoever no longer listens has no use for it, and `maintain` ends.
        let _ = self.events.send(Event::Lease(event)).await;
    }
}
