//! Taking a subnet and giving it back.

use std::net::Ipv4Addr;

use etcd_client::{Compare, CompareOp, GetOptions, PutOptions, Txn, TxnOp, TxnOpResponse};
use ipnet::Ipv4Net;
use tracing::{info, warn};

use super::{
    ATTEMPTS, EtcdStore,
    choose::{Choice, Wish, choose, is_overlapped},
    error::{self, EtcdError},
    records::Entry,
    session::Session,
};
use crate::{config::NetworkConfig, lease};

/// This host's claim on a subnet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// The subnet.
    pub subnet: Ipv4Net,
    /// The address that the record carries.
    pub public_ip: Ipv4Addr,
    /// Whether the record was written just now.
    pub created: bool,
    /// The part of the record's key behind `subnets/`: flannel's own may name an IPv6 subnet too.
    pub(super) key: String,
    /// The etcd lease that the record ends with; `None` for a reservation.
    pub(super) lease: Option<i64>,
    /// etcd's revision at which the record came to be: it stays while others overwrite the record. 0 where it is not known.
    pub(super) born: i64,
    /// The etcd lease of our claim on the public address; `None` when we may not make one.
    pub(super) owner: Option<i64>,
    /// The subnet that the operator asked for: it is this one or none.
    pub(super) wanted: Option<Ipv4Net>,
    /// The network in which another subnet would be looked for.
    pub(super) config: NetworkConfig,
}

impl Held {
    /// Whether an operator reserved the subnet for us: such a record has no etcd lease and gets none.
    pub fn is_reservation(&self) -> bool {
        self.lease.is_none()
    }

    /// Number of the etcd lease, as `etcdctl lease list` shows it in hexadecimal.
    pub fn etcd_lease(&self) -> Option<i64> {
        self.lease
    }
}

impl EtcdStore {
    /// Takes a subnet for the host at `public_ip`: `wanted` if given, else the one that carries its address, else `earlier`
    /// (of a previous run) if it is free, else any free one. A lease on another subnet makes room for `wanted`. What
    /// [`super::EtcdOptions::fixed`] names is not taken.
    ///
    /// When another agent claims the same address, this waits for its claim to end, which takes up to
    /// [`super::EtcdOptions::owner_ttl`] after it has died.
    ///
    /// # Errors
    ///
    /// When etcd does not answer or refuses, another live agent has the same address, `wanted` cannot be had, or the
    /// network is full.
    pub async fn acquire(
        &self,
        config: &NetworkConfig,
        public_ip: Ipv4Addr,
        wanted: Option<Ipv4Net>,
        earlier: Option<Ipv4Net>,
    ) -> Result<Held, EtcdError> {
        let owner = self.session.claim(public_ip).await?;
        let place = Place { config, public_ip, owner };
        let taken = self.session.take_subnet(&place, wanted, earlier).await;
        if taken.is_err() {
            self.session.disclaim(owner).await;
        }
        taken
    }

    /// Gives the subnet back: its record is removed if it is still ours. A reservation stays.
    ///
    /// # Errors
    ///
    /// When etcd does not answer or refuses.
    pub async fn release(&self, held: &Held) -> Result<(), EtcdError> {
        if let Some(lease) = held.lease {
            let key = self.session.keys.record(&held.key);
            let conditions = [Compare::lease(key.clone(), CompareOp::Equal, lease)]
                .into_iter()
                .chain(self.session.still_owner(held.public_ip, held.owner))
                .collect::<Vec<_>>();
            let transaction = Txn::new().when(conditions).and_then([TxnOp::delete(key, None)]);
            let operation = format!("release {} in etcd", held.subnet);
            let answer = self
                .session
                .request(&operation, |mut client| async move { client.txn(transaction).await })
                .await?;
            // An etcd lease that still has our record, though we no longer speak for the address, has another user now.
            if answer.succeeded() {
                self.session.revoke(lease).await;
            }
        }
        self.session.disclaim(held.owner).await;
        Ok(())
    }

    /// Stops speaking for the public address and leaves the record in place, for a later start of this host.
    pub async fn leave(&self, held: &Held) {
        self.session.disclaim(held.owner).await;
    }
}

/// Who takes a subnet, and where.
pub(super) struct Place<'a> {
    pub(super) config: &'a NetworkConfig,
    pub(super) public_ip: Ipv4Addr,
    pub(super) owner: Option<i64>,
}

impl Session {
    /// Takes a subnet for a host that already speaks for its address. It does not matter how often this is begun: what an
    /// earlier attempt wrote carries our address and is found again.
    pub(super) async fn take_subnet(
        &self,
        place: &Place<'_>,
        wanted: Option<Ipv4Net>,
        earlier: Option<Ipv4Net>,
    ) -> Result<Held, EtcdError> {
        // Granted at most once, whatever the number of attempts.
        let mut granted = None;
        let taken = self.try_to_take(place, wanted, earlier, &mut granted).await;
        let in_use = taken.as_ref().ok().and_then(|held| held.lease);
        if let Some(lease) = granted.filter(|lease| Some(*lease) != in_use) {
            self.revoke(lease).await;
        }
        taken
    }

    async fn try_to_take(
        &self,
        place: &Place<'_>,
        wanted: Option<Ipv4Net>,
        earlier: Option<Ipv4Net>,
        granted: &mut Option<i64>,
    ) -> Result<Held, EtcdError> {
        let held = |key: &str, subnet, lease, created, born| Held {
            subnet,
            public_ip: place.public_ip,
            created,
            key: key.to_owned(),
            lease,
            born,
            owner: place.owner,
            wanted,
            config: place.config.clone(),
        };
        for _ in 0..ATTEMPTS {
            let listing = self.list().await?;
            let wish = Wish { wanted, earlier, fixed: &self.options.fixed };
            match choose(&listing.entries, place.config, place.public_ip, wish)? {
                Choice::Keep(entry, subnet) => {
                    if self.keep(place, &entry).await? {
                        let lease = Some(entry.lease).filter(|_| !entry.is_reservation());
                        return Ok(held(&entry.key, subnet, lease, false, entry.create_revision));
                    }
                }
                Choice::Discard(entry) => {
                    match wanted {
                        Some(wanted) => info!("our lease {} makes room for --subnet {wanted}", entry.key),
                        None => {
                            info!(
                                "the lease on {} no longer fits the network config and is removed",
                                entry.key
                            );
                        }
                    }
                    let key = self.keys.record(&entry.key);
                    self.replace(place, &entry, TxnOp::delete(key, None)).await?;
                }
                Choice::Take(subnet) => {
                    let lease = match *granted {
                        Some(lease) => lease,
                        None => *granted.insert(self.grant(self.options.lease_ttl).await?),
                    };
                    if let Some(born) = self.create(place, subnet, lease).await? {
                        return Ok(held(&lease::key(subnet), subnet, Some(lease), true, born));
                    }
                }
            }
            // Somebody was faster. That it was another agent with our own address must not go on for long.
            if let super::owner::Claim::Theirs(other) = self.confirm(place).await? {
                return Err(self.same_public_ip(place.public_ip, &other));
            }
        }
        Err(EtcdError::Crowded(ATTEMPTS))
    }

    /// Makes a record that is ours already good for another term. `false` when it changed under our hands.
    async fn keep(&self, place: &Place<'_>, entry: &Entry) -> Result<bool, EtcdError> {
        if !entry.is_reservation() && self.keep_alive(entry.lease).await?.is_none() {
            return Ok(false);
        }
        match entry.parsed().and_then(|value| value.backend_type) {
            // As it stands it is a record of this backend, in whatever form flannel or the operator wrote it.
            None => Ok(true),
            Some(other) => {
                warn!("the record {} was of the {other} backend and is of udp now", entry.key);
                let lease = Some(entry.lease).filter(|_| !entry.is_reservation());
                let key = self.keys.record(&entry.key);
                self.replace(place, entry, put(key, lease::value(place.public_ip), lease)).await
            }
        }
    }

    /// Does `operation` to a record if nobody has written it since it was read.
    pub(super) async fn replace(
        &self,
        place: &Place<'_>,
        entry: &Entry,
        operation: TxnOp,
    ) -> Result<bool, EtcdError> {
        let key = self.keys.record(&entry.key);
        let conditions = [
            Compare::mod_revision(key.clone(), CompareOp::Equal, entry.mod_revision),
            Compare::lease(key, CompareOp::Equal, entry.lease),
        ]
        .into_iter()
        .chain(self.still_owner(place.public_ip, place.owner))
        .collect::<Vec<_>>();
        let transaction = Txn::new().when(conditions).and_then([operation]);
        let what = format!("replace {} in etcd", entry.key);
        let answer = self.request(&what, |mut client| async move { client.txn(transaction).await }).await?;
        Ok(answer.succeeded())
    }

    /// Writes a record that must not exist yet, and returns the revision of it. `None` when it exists, or when a record of another length overlaps it: the
    /// transaction sees all that was there before it, so of two such records exactly the later one is taken back.
    pub(super) async fn create(
        &self,
        place: &Place<'_>,
        subnet: Ipv4Net,
        lease: i64,
    ) -> Result<Option<i64>, EtcdError> {
        let key = self.keys.subnet(subnet);
        let conditions = [Compare::version(key.clone(), CompareOp::Equal, 0)]
            .into_iter()
            .chain(self.still_owner(place.public_ip, place.owner))
            .collect::<Vec<_>>();
        let others = TxnOp::get(self.keys.subnets(), Some(GetOptions::new().with_prefix().with_keys_only()));
        let transaction = Txn::new()
            .when(conditions)
            .and_then([put(key.clone(), lease::value(place.public_ip), Some(lease)), others]);
        let what = format!("take {subnet} in etcd");
        let answer = self
            .request(&what, |client| async move {
                client
                    .kv_client()
                    .max_decoding_message_size(super::records::LONGEST_ANSWER)
                    .txn(transaction)
                    .await
            })
            .await?;
        if !answer.succeeded() {
            return Ok(None);
        }
        let born = answer.header().map_or(0, |header| header.revision());
        if !is_overlapped(&self.listed_keys(answer.op_responses()), &lease::key(subnet), subnet) {
            return Ok(Some(born));
        }
        let ours = Compare::lease(key.clone(), CompareOp::Equal, lease);
        let take_back = Txn::new().when([ours]).and_then([TxnOp::delete(key, None)]);
        self.request(&what, |mut client| async move { client.txn(take_back).await }).await?;
        Ok(None)
    }

    fn listed_keys(&self, answers: Vec<TxnOpResponse>) -> Vec<String> {
        answers
            .into_iter()
            .filter_map(|answer| match answer {
                TxnOpResponse::Get(answer) => Some(answer),
                TxnOpResponse::Put(_) | TxnOpResponse::Delete(_) | TxnOpResponse::Txn(_) => None,
            })
            .flat_map(|answer| answer.kvs().iter().map(|kv| self.keys.relative(kv.key())).collect::<Vec<_>>())
            .collect()
    }

    /// Asks who speaks for our address. Changes nothing.
    async fn confirm(&self, place: &Place<'_>) -> Result<super::owner::Claim, EtcdError> {
        use super::owner::Claim;
        let Some(lease) = place.owner else { return Ok(Claim::Ours(None)) };
        let key = self.keys.owner(place.public_ip);
        let what = format!("read {key} in etcd");
        let mut answer = self.request(&what, |mut client| async move { client.get(key, None).await }).await?;
        match answer.take_kvs().pop() {
            Some(kv) if kv.lease() == lease => Ok(Claim::Ours(place.owner)),
            Some(kv) => Ok(Claim::Theirs(Box::new(kv))),
            None => Err(EtcdError::Away {
                operation: what,
                why: format!("our claim on {} has expired", place.public_ip),
            }),
        }
    }

    /// Renews an etcd lease and says for how long. `None` when it has ended.
    pub(super) async fn keep_alive(&self, lease: i64) -> Result<Option<std::time::Duration>, EtcdError> {
        let what = "renew a lease in etcd";
        let answer = self
            .try_request(what, |mut client| async move {
                let (mut keeper, mut answers) = client.lease_keep_alive(lease).await?;
                // The client swallows the first answer, and with it the time to live.
                keeper.keep_alive().await?;
                answers.message().await
            })
            .await?;
        match answer {
            Ok(Some(answer)) => Ok(u64::try_from(answer.ttl())
                .ok()
                .filter(|ttl| *ttl > 0)
                .map(std::time::Duration::from_secs)),
            Ok(None) => {
                Err(EtcdError::Away { operation: what.to_owned(), why: "the connection ended".to_owned() })
            }
            Err(error) if error::is_no_lease(&error) => Ok(None),
            Err(error) => Err(EtcdError::of(what, &error)),
        }
    }
}

pub(super) fn put(key: String, value: String, lease: Option<i64>) -> TxnOp {
    TxnOp::put(key, value, lease.map(|lease| PutOptions::new().with_lease(lease)))
}
