//! etcd in a host's namespace, with a client for the test.

use std::{
    net::Ipv4Addr,
    ops::{Deref, DerefMut},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use etcd_client::{Client, ConnectOptions, Error, GetOptions, KeyValue, PutOptions};
use overlay_tests::{etcd::Etcd, netns::Netns, sandbox::Sandbox};

/// Prefix of flannel's keys.
pub(crate) const PREFIX: &str = "/coreos.com/network";
/// How long a server may take to answer, including its start.
const TIMEOUT: Duration = Duration::from_secs(20);

/// A record and its etcd lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Stored {
    pub(crate) key: String,
    pub(crate) value: String,
    pub(crate) mod_revision: i64,
    /// Its etcd lease; 0 for none.
    pub(crate) lease: i64,
}

/// The server; dereferences to [`Etcd`].
pub(crate) struct Server {
    etcd: Etcd,
    host: Arc<Netns>,
    user: Option<(&'static str, &'static str)>,
}

impl Deref for Server {
    type Target = Etcd;

    fn deref(&self) -> &Etcd {
        &self.etcd
    }
}

impl DerefMut for Server {
    fn deref_mut(&mut self) -> &mut Etcd {
        &mut self.etcd
    }
}

impl Server {
    /// A server that `restart` will start.
    pub(crate) fn prepare(sandbox: &Sandbox, host: &Arc<Netns>, address: Ipv4Addr) -> Result<Self> {
        let etcd = Etcd::prepare(sandbox, host, address)?;
        Ok(Self { etcd, host: Arc::clone(host), user: None })
    }

    pub(crate) fn start(sandbox: &Sandbox, host: &Arc<Netns>, address: Ipv4Addr) -> Result<Self> {
        let mut server = Self::prepare(sandbox, host, address)?;
        server.restart()?;
        Ok(server)
    }

    /// Makes the client log in.
    pub(crate) fn log_in(&mut self, user: &'static str, password: &'static str) {
        self.user = Some((user, password));
    }

    /// Makes the client a user without a name.
    pub(crate) fn log_out(&mut self) {
        self.user = None;
    }

    /// Retries an operation with a client until it succeeds.
    pub(crate) fn ask<T: Send>(
        &self,
        work: impl AsyncFn(&mut Client) -> Result<T, Error> + Sync,
    ) -> Result<T> {
        let user = self.user.map(|(user, password)| ConnectOptions::new().with_user(user, password));
        let asked = self.host.run(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                let deadline = Instant::now() + TIMEOUT;
                loop {
                    let attempt = async {
                        let mut client = Client::connect([self.endpoint()], user.clone()).await?;
                        work(&mut client).await
                    };
                    match tokio::time::timeout(TIMEOUT, attempt).await {
                        Ok(Ok(done)) => return Ok(done),
                        Ok(Err(error)) if Instant::now() > deadline => bail!("etcd fails: {error}"),
                        Ok(Err(_)) => tokio::time::sleep(Duration::from_millis(100)).await,
                        Err(_) => bail!("etcd does not answer"),
                    }
                }
            })
        })?;
        asked.with_context(|| format!("ask etcd at {}", self.endpoint()))
    }

    pub(crate) fn put(&self, key: &str, value: &[u8], lease: i64) -> Result<()> {
        let options = (lease != 0).then(|| PutOptions::new().with_lease(lease));
        self.ask(async |client| client.put(key, value, options.clone()).await).map(drop)
    }

    pub(crate) fn write_config(&self, config: &str) -> Result<()> {
        self.put(&format!("{PREFIX}/config"), config.as_bytes(), 0)
    }

    /// Writes a lease record as an operator does: without an etcd lease.
    pub(crate) fn put_record(&self, key: &str, value: impl AsRef<[u8]> + Sync) -> Result<()> {
        self.put(&format!("{PREFIX}/subnets/{key}"), value.as_ref(), 0)
    }

    pub(crate) fn remove_record(&self, key: &str) -> Result<()> {
        let key = format!("{PREFIX}/subnets/{key}");
        self.ask(async |client| client.delete(key.clone(), None).await).map(drop)
    }

    /// The record of a subnet, if there is one.
    pub(crate) fn record(&self, key: &str) -> Result<Option<Stored>> {
        Ok(self
            .below(&format!("{PREFIX}/subnets/{key}"))?
            .into_iter()
            .find(|stored| stored.key.ends_with(key)))
    }

    /// All lease records.
    pub(crate) fn records(&self) -> Result<Vec<Stored>> {
        self.below(&format!("{PREFIX}/subnets/"))
    }

    /// All keys that begin with `prefix`.
    pub(crate) fn below(&self, prefix: &str) -> Result<Vec<Stored>> {
        let mut answer =
            self.ask(async |client| client.get(prefix, Some(GetOptions::new().with_prefix())).await)?;
        let stored = |kv: KeyValue| Stored {
            key: String::from_utf8_lossy(kv.key()).into_owned(),
            value: String::from_utf8_lossy(kv.value()).into_owned(),
            mod_revision: kv.mod_revision(),
            lease: kv.lease(),
        };
        Ok(answer.take_kvs().into_iter().map(stored).collect())
    }

    /// A new etcd lease, as long as flannel's.
    pub(crate) fn grant(&self) -> Result<i64> {
        Ok(self.ask(async |client| client.lease_grant(86400, None).await)?.id())
    }

    /// Revokes an etcd lease with all its keys, which has the same effect as its expiry.
    pub(crate) fn revoke(&self, lease: i64) -> Result<()> {
        self.ask(async |client| client.lease_revoke(lease).await).map(drop)
    }

    /// Compacts the history.
    pub(crate) fn compact(&self) -> Result<()> {
        let answer = self.ask(async |client| client.get("/", None).await)?;
        let revision = answer.header().context("etcd's answer has no header")?.revision();
        self.ask(async |client| client.compact(revision, None).await).map(drop)
    }
}
