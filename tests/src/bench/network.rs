//! Writes the records of a large network to etcd.

use std::net::Ipv4Addr;

use anyhow::{Context, Result};
use etcd_client::{Client, PutOptions, Txn, TxnOp};

/// The whole overlay.
pub(super) const NETWORK: &str = "10.0.0.0/8";
/// The agent's own subnet: the last one of the network, no other host's.
pub(super) const OWN_SUBNET: &str = "10.255.255.0/24";
/// Most subnets that other hosts may have.
pub(super) const MOST: u32 = 65_000;

const PREFIX: &str = "/coreos.com/network";
/// TTL of a host's lease in seconds.
const LEASE_TTL: i64 = 86_400;
/// etcd's limit of operations per transaction.
const AT_ONCE: usize = 128;
/// Records that share an etcd lease. Real hosts have one each, which makes no difference to readers.
const SHARED: usize = 512;

/// The subnet of the host with this number.
pub(super) fn subnet(number: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 0, 1, 0)) + (number << 8))
}

/// The public address of the host with this number.
pub(super) fn public_ip(number: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(Ipv4Addr::new(172, 16, 0, 1)) + number)
}

/// A client that writes for all other hosts and counts its requests.
pub(super) struct Hosts {
    client: Client,
    lease: i64,
    /// Requests so far.
    pub(super) requests: u64,
}

impl Hosts {
    pub(super) async fn connect(endpoint: &str) -> Result<Self> {
        let client = Client::connect([endpoint], None).await.context("connect to etcd")?;
        Ok(Self { client, lease: 0, requests: 0 })
    }

    /// Writes the network's config and `leases` records.
    pub(super) async fn fill(&mut self, leases: u32) -> Result<()> {
        let config = format!(r#"{{"Network":"{NETWORK}","Backend":{{"Type":"udp"}}}}"#);
        self.requests += 1;
        self.client.put(format!("{PREFIX}/config"), config, None).await.context("write the config")?;
        let numbers: Vec<u32> = (0..leases).collect();
        for shared in numbers.chunks(SHARED) {
            self.requests += 1;
            self.lease = self.client.lease_grant(LEASE_TTL, None).await.context("make an etcd lease")?.id();
            for at_once in shared.chunks(AT_ONCE) {
                let put = |number: &u32| {
                    let options = PutOptions::new().with_lease(self.lease);
                    TxnOp::put(key(subnet(*number)), value(public_ip(*number)), Some(options))
                };
                let puts: Vec<_> = at_once.iter().map(put).collect();
                self.requests += 1;
                self.client.txn(Txn::new().and_then(puts)).await.context("write leases")?;
            }
        }
        Ok(())
    }

    /// Writes one record.
    pub(super) async fn put(&mut self, subnet: Ipv4Addr, public_ip: Ipv4Addr) -> Result<()> {
        self.requests += 1;
        let options = PutOptions::new().with_lease(self.lease);
        self.client.put(key(subnet), value(public_ip), Some(options)).await.context("write a lease")?;
        Ok(())
    }

    /// Removes one record.
    pub(super) async fn delete(&mut self, subnet: Ipv4Addr) -> Result<()> {
        self.requests += 1;
        self.client.delete(key(subnet), None).await.context("remove a lease")?;
        Ok(())
    }
}

fn key(subnet: Ipv4Addr) -> String {
    format!("{PREFIX}/subnets/{subnet}-24")
}

fn value(public_ip: Ipv4Addr) -> String {
    format!(r#"{{"PublicIP":"{public_ip}","PublicIPv6":null,"BackendData":{{"TakesUnfinishedPackets":true}}}}"#)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_have_subnets_beside_ours_and_addresses_outside_the_network() {
        assert_eq!(subnet(0), Ipv4Addr::new(10, 0, 1, 0));
        assert_eq!(subnet(255), Ipv4Addr::new(10, 1, 0, 0));
        assert!(subnet(MOST) < Ipv4Addr::new(10, 255, 255, 0));
        assert!(public_ip(2 * MOST) < Ipv4Addr::new(172, 32, 0, 0));
        assert_eq!(key(subnet(1)), "/coreos.com/network/subnets/10.0.2.0-24");
    }
}
