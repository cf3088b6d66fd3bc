//! The etcd store: flannel's records in etcd, version 3 of its API. The only module that knows etcd.
//!
//! In reading order: `options` is what the operator says, `keys` flannel's schema, `session` the connection, `records`
//! reads the records, `choose` decides which subnet a host should have, `owner` keeps two hosts with one address apart,
//! `acquire` takes a subnet, `readdress` moves it to another
//! address, `maintain` keeps it and `regain` gets it back, `watch` follows everybody's, `leases` is for operators.
//!
//! What is written here is written by transactions that name what they replace: nothing of anybody else is ever overwritten.

use std::sync::Arc;

use crate::config::NetworkConfig;

mod acquire;
mod choose;
mod error;
mod keys;
mod leases;
mod maintain;
mod options;
mod owner;
mod readdress;
mod records;
mod regain;
mod session;
mod watch;

pub use acquire::Held;
pub use error::EtcdError;
pub use leases::ListedLease;
pub use options::{EtcdOptions, LEASE_TTL, OWNER_TTL, RENEW_MARGIN};

use etcd_client::{Compare, CompareOp, Txn, TxnOp};
use session::{Session, Shared};

/// How often a transaction is tried again because somebody else wrote in between.
const ATTEMPTS: usize = 64;

/// One network's records in etcd. Clones share the connection.
#[derive(Clone, Debug)]
pub struct EtcdStore {
    session: Shared,
}

impl EtcdStore {
    /// Connects to the first endpoint that answers.
    ///
    /// # Errors
    ///
    /// When the options cannot be used, etcd refuses the user, or no endpoint answers (the only one of these that
    /// [`EtcdError::is_transient`]).
    pub async fn connect(options: EtcdOptions) -> Result<Self, EtcdError> {
        let session = Arc::new(Session::new(options)?);
        session.connection().await?;
        Ok(Self { session })
    }

    /// The endpoints, for messages.
    pub fn endpoints(&self) -> String {
        self.session.endpoints()
    }

    /// The key of the network's configuration, for messages.
    pub fn config_key(&self) -> String {
        self.session.keys.config()
    }

    /// The network's configuration as it stands in etcd; `None` when there is none.
    ///
    /// # Errors
    ///
    /// When etcd does not answer or refuses.
    pub async fn config_text(&self) -> Result<Option<String>, EtcdError> {
        let found = self.session.read_config().await?;
        Ok(found.map(|found| found.text))
    }

    /// The network's configuration; `None` when there is none.
    ///
    /// # Errors
    ///
    /// When etcd does not answer or refuses, or the configuration cannot be used.
    pub async fn config(&self) -> Result<Option<NetworkConfig>, EtcdError> {
        let Some(text) = self.config_text().await? else { return Ok(None) };
        self.parse_config(&text).map(Some)
    }

    /// Writes the network's configuration, which must be one that can be used. What stood there before is returned.
    ///
    /// # Errors
    ///
    /// When `text` cannot be used, or etcd does not answer or refuses.
    pub async fn set_config(&self, text: &str) -> Result<Option<String>, EtcdError> {
        self.parse_config(text)?;
        let key = self.config_key();
        let operation = format!("write {key} in etcd");
        for _ in 0..ATTEMPTS {
            let before = self.session.read_config().await?;
            let revision = before.as_ref().map_or(0, |before| before.mod_revision);
            let transaction = Txn::new()
                .when([Compare::mod_revision(key.clone(), CompareOp::Equal, revision)])
                .and_then([TxnOp::put(key.clone(), text, None)]);
            let answer = self
                .session
                .request(&operation, |mut client| async move { client.txn(transaction).await })
                .await?;
            if answer.succeeded() {
                return Ok(before.map(|before| before.text));
            }
        }
        Err(EtcdError::Crowded(ATTEMPTS))
    }

    fn parse_config(&self, text: &str) -> Result<NetworkConfig, EtcdError> {
        NetworkConfig::parse(text).map_err(|source| EtcdError::Config { key: self.config_key(), source })
    }
}

/// The configuration as etcd has it.
struct FoundConfig {
    text: String,
    mod_revision: i64,
}

impl Session {
    async fn read_config(&self) -> Result<Option<FoundConfig>, EtcdError> {
        let key = self.keys.config();
        let operation = format!("read {key} in etcd");
        let mut answer =
            self.request(&operation, |mut client| async move { client.get(key, None).await }).await?;
        Ok(answer.take_kvs().pop().map(|kv| FoundConfig {
            text: String::from_utf8_lossy(kv.value()).into_owned(),
            mod_revision: kv.mod_revision(),
        }))
    }
}
