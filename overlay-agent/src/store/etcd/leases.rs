//! The records as an operator wants to see them: who holds what, and for how long.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
    time::Duration,
};

use etcd_client::{Compare, CompareOp, Txn, TxnOp};
use ipnet::Ipv4Net;
use tokio::task::JoinSet;

use super::{
    EtcdStore,
    error::{self, EtcdError},
    records::Entry,
    session::Session,
};
use crate::route_table::Record;

/// Requests for times to live that are under way at once.
const AT_ONCE: usize = 32;
/// What these requests are called in errors.
const READ: &str = "read a lease in etcd";

/// One record, with what etcd says about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListedLease {
    /// Key and value.
    pub record: Record,
    /// The subnet that the key names, if it names one.
    pub subnet: Option<Ipv4Net>,
    /// The holder's address, if the value can be read.
    pub public_ip: Option<Ipv4Addr>,
    /// The holder's backend where it is another one than udp.
    pub backend_type: Option<String>,
    /// Number of the etcd lease; `None` for a reservation.
    pub etcd_lease: Option<i64>,
    /// How long the etcd lease still lasts; `None` for a reservation, and where it was not asked for.
    pub expires_in: Option<Duration>,
    mod_revision: i64,
}

impl EtcdStore {
    /// All records with the times that their etcd leases still last, in order of their keys. This asks etcd once per lease:
    /// [`Self::watch`] is the way to follow records.
    ///
    /// # Errors
    ///
    /// When etcd does not answer or refuses.
    pub async fn leases(&self) -> Result<Vec<ListedLease>, EtcdError> {
        let mut leases = self.records().await?;
        self.ask_times(&mut leases).await?;
        Ok(leases)
    }

    /// All records in order of their keys, in few requests, because it does not ask how long their etcd leases still last.
    ///
    /// # Errors
    ///
    /// When etcd does not answer or refuses.
    pub async fn records(&self) -> Result<Vec<ListedLease>, EtcdError> {
        let listing = self.session.list().await?;
        Ok(listing.entries.into_iter().map(ListedLease::from).collect())
    }

    /// Asks how long the etcd leases of these records still last, once per etcd lease. Records whose lease has ended are left
    /// out.
    ///
    /// # Errors
    ///
    /// When etcd does not answer or refuses.
    pub async fn ask_times(&self, leases: &mut Vec<ListedLease>) -> Result<(), EtcdError> {
        let distinct: BTreeSet<i64> = leases.iter().filter_map(|lease| lease.etcd_lease).collect();
        let mut waiting = distinct.into_iter();
        let mut asked = JoinSet::new();
        let mut times = BTreeMap::new();
        loop {
            while asked.len() < AT_ONCE
                && let Some(number) = waiting.next()
            {
                let session = self.session.clone();
                asked.spawn(async move { (number, time_left(&session, number).await) });
            }
            match asked.join_next().await {
                Some(Ok((number, left))) => times.insert(number, left?),
                Some(Err(error)) => {
                    return Err(EtcdError::Failed { operation: READ.to_owned(), why: error.to_string() });
                }
                None => break,
            };
        }
        leases.retain_mut(|lease| match lease.etcd_lease {
            None => true,
            Some(number) => {
                lease.expires_in = times.get(&number).copied().flatten();
                lease.expires_in.is_some()
            }
        });
        Ok(())
    }

    /// Whose running agent speaks for a public address, in words; `None` when no agent does. Hosts that run flannel are not
    /// seen by this.
    ///
    /// # Errors
    ///
    /// When etcd does not answer or refuses.
    pub async fn owner(&self, public_ip: Ipv4Addr) -> Result<Option<String>, EtcdError> {
        self.session.owner(public_ip).await
    }

    /// Removes a record of any host, if it is still what was listed. `false` when it changed meanwhile.
    ///
    /// # Errors
    ///
    /// When etcd does not answer or refuses.
    pub async fn remove(&self, lease: &ListedLease) -> Result<bool, EtcdError> {
        let key = self.session.keys.record(&lease.record.key);
        let unchanged = [
            Compare::mod_revision(key.clone(), CompareOp::Equal, lease.mod_revision),
            Compare::lease(key.clone(), CompareOp::Equal, lease.etcd_lease.unwrap_or(0)),
        ];
        let transaction = Txn::new().when(unchanged).and_then([TxnOp::delete(key.clone(), None)]);
        let operation = format!("remove {key} in etcd");
        let answer = self
            .session
            .request(&operation, |mut client| async move { client.txn(transaction).await })
            .await?;
        Ok(answer.succeeded())
    }
}

impl From<Entry> for ListedLease {
    fn from(entry: Entry) -> Self {
        let value = entry.parsed();
        Self {
            subnet: entry.subnet(),
            public_ip: value.as_ref().map(|value| value.public_ip),
            backend_type: value.and_then(|value| value.backend_type),
            etcd_lease: Some(entry.lease).filter(|_| !entry.is_reservation()),
            expires_in: None,
            mod_revision: entry.mod_revision,
            record: Record { key: entry.key, value: entry.value },
        }
    }
}

/// `None` when the etcd lease has ended.
async fn time_left(session: &Session, lease: i64) -> Result<Option<Duration>, EtcdError> {
    let answer = session
        .try_request(READ, |mut client| async move { client.lease_time_to_live(lease, None).await })
        .await?;
    match answer {
        // -1 says that it has ended.
        Ok(answer) => Ok(u64::try_from(answer.ttl()).ok().map(Duration::from_secs)),
        Err(error) if error::is_no_lease(&error) => Ok(None),
        Err(error) => Err(EtcdError::of(READ, &error)),
    }
}
