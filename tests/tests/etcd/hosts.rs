//! What the tests share: a server with one network in it, hosts on that network, and events as they come.

use std::{net::Ipv4Addr, time::Duration};

use etcd_client::{Client, GetOptions, KeyValue, PutOptions};
use overlay_agent::{
    config::NetworkConfig,
    store::{Held, LeaseEvent, LeaseKeeper, Store, StoreError, SubnetRequest, etcd::EtcdOptions},
};
use overlay_tests::etcd::Etcd;
use tokio::{sync::mpsc, time::timeout};

pub(crate) const PREFIX: &str = "/coreos.com/network";
pub(crate) const NETWORK: &str = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"udp"}}"#;
/// Longer than anything here takes, and much shorter than waiting for a lease of 24 hours.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(40);

/// A server, a client of its own, and the network's configuration.
pub(crate) struct Network {
    pub(crate) etcd: Etcd,
    pub(crate) raw: Client,
    pub(crate) config: NetworkConfig,
}

impl Network {
    pub(crate) async fn start() -> Self {
        Self::of(NETWORK).await
    }

    pub(crate) async fn of(config: &str) -> Self {
        let etcd = Etcd::start().unwrap();
        let raw = Client::connect([etcd.endpoint()], None).await.unwrap();
        let network = Self { etcd, raw, config: NetworkConfig::parse(config).unwrap() };
        network.store(1).await.set_config(config).await.unwrap();
        network
    }

    pub(crate) fn options(&self, host: u8) -> EtcdOptions {
        EtcdOptions {
            endpoints: vec![self.etcd.endpoint()],
            prefix: PREFIX.to_owned(),
            owner_ttl: Duration::from_secs(3),
            instance: Some(format!("host {host}")),
            ..EtcdOptions::default()
        }
    }

    pub(crate) async fn store(&self, host: u8) -> Store {
        Store::etcd(self.options(host)).await.unwrap()
    }

    /// A store whose leases last only seconds.
    pub(crate) async fn short_store(&self, host: u8, seconds: u64) -> Store {
        let ttl = Duration::from_secs(seconds);
        let options = EtcdOptions { lease_ttl: ttl, renew_margin: ttl / 2, ..self.options(host) };
        Store::etcd(options).await.unwrap()
    }

    pub(crate) fn request(&self) -> SubnetRequest {
        SubnetRequest::any(self.config.clone())
    }

    pub(crate) fn wanting(&self, subnet: &str) -> SubnetRequest {
        SubnetRequest { wanted: Some(subnet.parse().unwrap()), ..self.request() }
    }

    /// A request of a host that had this subnet in an earlier run.
    pub(crate) fn preferring(&self, subnet: &str) -> SubnetRequest {
        SubnetRequest { earlier: Some(subnet.parse().unwrap()), ..self.request() }
    }

    /// The host's agent acquires a subnet under another host's address.
    pub(crate) async fn acquire_as(&self, host: u8, address: u8) -> Result<Held, StoreError> {
        self.store(host).await.acquire(&self.request(), ip(address)).await
    }

    pub(crate) async fn acquire(&self, host: u8) -> Held {
        self.acquire_as(host, host).await.unwrap()
    }

    pub(crate) async fn try_take(&self, host: u8, subnet: &str) -> Result<Held, StoreError> {
        self.store(host).await.acquire(&self.wanting(subnet), ip(host)).await
    }

    pub(crate) async fn take(&self, host: u8, subnet: &str) -> Held {
        self.try_take(host, subnet).await.unwrap()
    }

    /// The etcd lease of a held subnet's record, 0 for a reservation.
    pub(crate) async fn lease_of(&mut self, held: &Held) -> i64 {
        self.get(&key_of(held)).await.unwrap().lease()
    }

    /// Writes a record by hand, as an operator does: without an etcd lease unless one is given.
    pub(crate) async fn put(&mut self, key: &str, value: impl Into<Vec<u8>>, lease: i64) {
        let options = (lease != 0).then(|| PutOptions::new().with_lease(lease));
        self.raw.put(subnet_key(key), value, options).await.unwrap();
    }

    pub(crate) async fn get(&mut self, key: &str) -> Option<KeyValue> {
        self.raw.get(subnet_key(key), None).await.unwrap().take_kvs().pop()
    }

    /// All records.
    pub(crate) async fn records(&mut self) -> Vec<KeyValue> {
        let options = GetOptions::new().with_prefix();
        self.raw.get(subnet_key(""), Some(options)).await.unwrap().take_kvs()
    }

    /// Waits until a record has changed to what `wanted` says.
    pub(crate) async fn wait_for(&mut self, key: &str, wanted: impl Fn(Option<&KeyValue>) -> bool) {
        let waited = timeout(TIMEOUT, async {
            loop {
                // The server may be on its way up.
                if let Ok(mut answer) = self.raw.get(subnet_key(key), None).await
                    && wanted(answer.take_kvs().pop().as_ref())
                {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        });
        assert!(waited.await.is_ok(), "{key} did not change as expected");
    }
}

pub(crate) fn ip(host: u8) -> Ipv4Addr {
    Ipv4Addr::new(192, 168, 77, host)
}

/// What an agent writes: as flannel's udp backend, with a note of what its host takes.
pub(crate) fn value(host: u8) -> String {
    format!(
        r#"{{"PublicIP":"192.168.77.{host}","PublicIPv6":null,"BackendData":{{"TakesUnfinishedPackets":true}}}}"#
    )
}

pub(crate) fn subnet_key(key: &str) -> String {
    format!("{PREFIX}/subnets/{key}")
}

pub(crate) fn key_of(held: &Held) -> String {
    overlay_agent::lease::key(held.subnet)
}

/// The next event, within a time that fails the test.
pub(crate) async fn next<T>(events: &mut mpsc::Receiver<T>) -> T {
    timeout(TIMEOUT, events.recv()).await.expect("no event came").expect("the events ended")
}

/// A task that keeps a lease.
pub(crate) struct Keeper(pub(crate) LeaseKeeper);

impl Keeper {
    pub(crate) fn start(store: &Store, held: Held) -> Self {
        Self(store.keep(held))
    }

    pub(crate) async fn next(&mut self) -> LeaseEvent {
        next(&mut self.0.events).await
    }

    /// The next event that is more than a confirmation.
    pub(crate) async fn news(&mut self) -> LeaseEvent {
        loop {
            match self.next().await {
                LeaseEvent::Confirmed { .. } => {}
                event => return event,
            }
        }
    }

    pub(crate) async fn confirmed(&mut self) -> Option<Duration> {
        match self.next().await {
            LeaseEvent::Confirmed { expires_in } => expires_in,
            other => panic!("not a confirmation: {other:?}"),
        }
    }

    pub(crate) fn is_silent(&mut self) -> bool {
        self.0.events.try_recv().is_err()
    }

    pub(crate) async fn stop(self) -> Held {
        self.0.stop().await.unwrap()
    }
}
