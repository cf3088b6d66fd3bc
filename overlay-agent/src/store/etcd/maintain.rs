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
use tracing::{debug, warn};

use super::{
    EtcdStore,
    acquire::Held,
    error::EtcdError,
    owner::Claim,
    records::Entry,
    session::{Backoff, Connection, REQUEST, STEADY, Shared},
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
        let mut keeper = Keeper::new(self.session.clone(), held, public_ip, events.clone());
        tokio::select! {
            () = keeper.run() => {}
            () = stop => {}
            () = events.closed() => {}
        }
        keeper.held
    }
}

/// How long etcd takes to do what it has said already.
const SETTLING: Duration = Duration::from_millis(200);

/// What stands in etcd where our claim should be.
enum Found {
    /// Our record, and the revision at which it came to be.
    Ours(i64),
    /// A record with our address, but not the one that we wrote: an operator made it a reservation, or a flanneld wrote it.
    Adopted(Entry),
    /// Our record under the address to which this host moves: that it was written was never answered.
    Arrived,
    /// Our record, overwritten with something that cannot be read.
    Spoilt(Entry),
    /// A new record that cannot be read, so that nobody knows whose it is.
    Unreadable(Entry),
    /// Nothing.
    Missing,
    /// A record of somebody else.
    Theirs(Entry, Ipv4Addr),
}

/// Waits for another value, for ever when there will be none.
async fn changed(public_ip: &mut watch::Receiver<Ipv4Addr>) {
    if public_ip.changed().await.is_err() {
        std::future::pending().await
    }
}

pub(super) struct Keeper {
    pub(super) session: Shared,
    pub(super) held: Held,
    /// This host's address as it should stand in the record.
    pub(super) public_ip: watch::Receiver<Ipv4Addr>,
    /// The address under which the record stood when that was said last.
    said_under: Ipv4Addr,
    /// Why what stands in etcd is not our record, while that is so.
    pub(super) lost: Option<String>,
    /// Whoever overwrites our record again and again is answered at this pace.
    pub(super) put_back_at: Instant,
    events: mpsc::Sender<Event>,
    /// When the claim ends if nothing is heard from etcd any more, counted from before the last renewal was asked for.
    expires: Option<Instant>,
    renew_at: Instant,
    pub(super) claim_at: Instant,
    /// The last event of trouble, so that each is said once.
    pub(super) trouble: Option<LeaseEvent>,
}

impl Keeper {
    fn new(
        session: Shared,
        held: Held,
        public_ip: watch::Receiver<Ipv4Addr>,
        events: mpsc::Sender<Event>,
    ) -> Self {
        let now = Instant::now();
        Self {
            expires: held.lease.map(|_| now + session.options.lease_ttl),
            said_under: held.public_ip,
            session,
            held,
            public_ip,
            events,
            lost: None,
            trouble: None,
            put_back_at: now,
            renew_at: now,
            claim_at: now,
        }
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
                    self.pause(self.session.options.owner_ttl / 3).await;
                }
                Err(error) => {
                    debug!("{error}");
                    self.report_failure(&error).await;
                    self.pause(backoff.next()).await;
                }
            }
        }
    }

    async fn check_and_wait(&mut self, backoff: &mut Backoff) -> Result<(), EtcdError> {
        let revision = match self.check().await {
            Ok(revision) if !self.is_moving() => revision,
            // What is wrong under the old address may be right under the new one.
            Err(error) if error.is_transient() || !self.is_moving() => return Err(error),
            checked => {
                self.follow_address(checked.is_err()).await?;
                let revision = self.check().await?;
                if self.is_moving() && self.lost.is_none() {
                    sleep(SETTLING).await;
                    return Ok(());
                }
                revision
            }
        };
        let (mut watch, connection) = self.open_watch(revision + 1).await?;
        let steady = sleep(STEADY);
        tokio::pin!(steady);
        let mut is_steady = false;
        loop {
            tokio::select! {
                () = &mut steady, if !is_steady => {
                    is_steady = true;
                    backoff.reset();
                }
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
                () = sleep_until(self.renew_at), if self.held.lease.is_some() && self.lost.is_none() => {
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
            // What follows may fail for a long time, in which nobody waits for the time of the next renewal.
            if Instant::now() >= self.claim_at && !self.renew_claim().await? {
                sleep(SETTLING).await;
                continue;
            }
            let done = match self.found(record) {
                Found::Ours(born) => {
                    self.held.born = born;
                    self.confirm().await?
                }
                Found::Arrived => {
                    self.arrive().await?;
                    false
                }
                Found::Spoilt(entry) => {
                    self.put_back(&entry).await?;
                    false
                }
                Found::Unreadable(entry) => {
                    self.say_unreadable(&entry).await;
                    true
                }
                Found::Adopted(entry) => {
                    self.adopt(&entry).await;
                    false
                }
                Found::Missing => {
                    self.retake("its record was removed, or its time ran out").await?;
                    false
                }
                Found::Theirs(entry, who) => {
                    if self.held.lease == Some(entry.lease) {
                        // It is theirs with the record: to end it would remove what they wrote.
                        self.held.lease = None;
                    }
                    self.move_away(&format!("its record is that of {who} now")).await?;
                    false
                }
            };
            if done {
                return Ok(revision);
            }
        }
    }

    /// Our record and our claim on the address, of one revision.
    pub(super) async fn read(&self) -> Result<(i64, Option<KeyValue>, Option<KeyValue>), EtcdError> {
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
        let is_still_ours = self.held.lease == Some(entry.lease) || entry.create_revision == self.held.born;
        match entry.parsed().map(|value| value.public_ip) {
            None if is_still_ours => Found::Spoilt(entry),
            None => Found::Unreadable(entry),
            Some(holder) if holder == self.held.public_ip => {
                match entry.lease == self.held.lease.unwrap_or(0) {
                    true => Found::Ours(entry.create_revision),
                    false => Found::Adopted(entry),
                }
            }
            Some(holder) if is_still_ours && holder == *self.public_ip.borrow() => Found::Arrived,
            Some(holder) => Found::Theirs(entry, holder),
        }
    }

    /// The record is ours: renew it and say so.
    async fn confirm(&mut self) -> Result<bool, EtcdError> {
        self.lost = None;
        if self.held.lease.is_some() {
            if self.renew().await? {
                return Ok(true);
            }
            // The etcd lease has ended and etcd is about to remove the record.
            sleep(SETTLING).await;
            return Ok(false);
        }
        self.say_confirmed(None).await;
        Ok(true)
    }

    /// Says that the claim holds, and under which address if that is another one than was said before. Nothing is said while
    /// there is more to put right than the claim: the record has yet to follow this host, or is not ours.
    async fn say_confirmed(&mut self, expires_in: Option<Duration>) {
        if self.is_moving() || self.lost.is_some() {
            return;
        }
        self.trouble = None;
        let public_ip = self.held.public_ip;
        if self.said_under != public_ip {
            self.said_under = public_ip;
            self.send(LeaseEvent::Readdressed { public_ip }).await;
        }
        self.send(LeaseEvent::Confirmed { expires_in }).await;
    }

    /// Whether this host has another address than its record.
    pub(super) fn is_moving(&self) -> bool {
        *self.public_ip.borrow() != self.held.public_ip
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

    /// Renews the etcd lease of the record. `false` when it has ended.
    async fn renew(&mut self) -> Result<bool, EtcdError> {
        let Some(lease) = self.held.lease else { return Ok(true) };
        let asked = Instant::now();
        let Some(ttl) = self.session.keep_alive(lease).await? else { return Ok(false) };
        self.expires = Some(asked + ttl);
        self.renew_at = asked + self.session.options.renew_after(ttl);
        self.say_confirmed(Some(ttl)).await;
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

    /// What a failure means for the claim: without a record it is lost, with one it is in doubt.
    async fn report_failure(&mut self, error: &EtcdError) {
        if let Some(why) = &self.lost {
            // The first says by itself whose the subnet is.
            let why = if matches!(error, EtcdError::Wanted(_)) {
                error.to_string()
            } else {
                format!("{why}: {error}")
            };
            self.report(LeaseEvent::Unheld { why }).await;
        } else if !matches!(self.trouble, Some(LeaseEvent::Superseded { .. })) {
            let expires_in = self.expires.map(|expires| expires.saturating_duration_since(Instant::now()));
            self.report(LeaseEvent::Unconfirmed { why: error.to_string(), expires_in }).await;
        }
    }

    /// Says what is wrong, once, and of a lost claim whenever the reason is another one.
    pub(super) async fn report(&mut self, trouble: LeaseEvent) {
        let is_said = match (&self.trouble, &trouble) {
            (Some(said @ LeaseEvent::Unheld { .. }), LeaseEvent::Unheld { .. }) => *said == trouble,
            (Some(said), _) => std::mem::discriminant(said) == std::mem::discriminant(&trouble),
            (None, _) => false,
        };
        if !is_said {
            self.trouble = Some(trouble.clone());
            self.send(trouble).await;
        }
    }

    /// Waits, but not when this host has another address meanwhile.
    async fn pause(&mut self, time: Duration) {
        tokio::select! {
            () = sleep(time) => {}
            () = changed(&mut self.public_ip) => self.session.forget_connection().await,
        }
    }

    pub(super) async fn send(&self, event: LeaseEvent) {
        // Whoever no longer listens has no use for it, and `maintain` ends.
        let _ = self.events.send(Event::Lease(event)).await;
    }
}
