//! The records as an operator wants to see them: who holds what, and for how long.

use std::{net::Ipv4Addr, time::Duration};

use etcd_client::{Compare, CompareOp, Txn, TxnOp};
use ipnet::Ipv4Net;
use tokio::task::JoinSet;

use super::{
    EtcdStore,
    error::{self, EtcdError},
    records::Entry,
    session::Shared,
};
use crate::route_table::Record;

/// Requests for times to live that are under way at once.
const AT_ONCE: usize = 32;

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
    /// How long the etcd lease still lasts; `None` for a reservation.
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
        let listing = self.session.list().await?;
        let mut waiting = listing.entries.into_iter();
        let mut asked = JoinSet::new();
        let mut leases = Vec::new();
        loop {
            while asked.len() < AT_ONCE
                && let Some(entry) = waiting.next()
            {
                asked.spawn(listed(self.session.clone(), entry));
            }
            match asked.join_next().await {
                Some(Ok(lease)) => leases.extend(lease?),
                Some(Err(error)) => {
                    let operation = "read a lease in etcd".to_owned();
                    return Err(EtcdError::Failed { operation, why: error.to_string() });
                }
                None => break,
            }
        }
        leases.sort_by(|a, b| a.record.key.cmp(&b.record.key));
        Ok(leases)
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

/// `None` when the record ended since it was listed.
async fn listed(session: Shared, entry: Entry) -> Result<Option<ListedLease>, EtcdError> {
    let mut expires_in = None;
    if !entry.is_reservation() {
        let (operation, lease) = ("read a lease in etcd", entry.lease);
        let answer = session
            .try_request(operation, |mut client| async move { client.lease_time_to_live(lease, None).await })
            .await?;
        let ttl = match answer {
            Ok(answer) => answer.ttl(),
            Err(error) if error::is_no_lease(&error) => -1,
            Err(error) => return Err(EtcdError::of(operation, &error)),
        };
        let Ok(seconds) = u64::try_from(ttl) else { return Ok(None) };
        expires_in = Some(Duration::from_secs(seconds));
    }
    let value = entry.parsed();
    Ok(Some(ListedLease {
        subnet: entry.subnet(),
        public_ip: value.as_ref().map(|value| value.public_ip),
        backend_type: value.and_then(|value| value.backend_type),
        etcd_lease: Some(entry.lease).filter(|_| !entry.is_reservation()),
        expires_in,
        mod_revision: entry.mod_revision,
        record: entry.record(),
    }))
}
