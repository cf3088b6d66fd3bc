//! The records of very many services, and a client of etcd that writes them.

use std::net::{Ipv4Addr, SocketAddrV4};

use anyhow::{Context, Result};
use etcd_client::{Client, Txn, TxnOp};
use overlay_ebpf::service::abi::{Address, ServiceKey, TCP};

/// The network's config.
pub(super) const CONFIG: &str =
    r#"{"Network":"10.0.0.0/9","Backend":{"Type":"udp"},"Services":{"Pool":"10.251.0.0/16"}}"#;
/// The agent's own subnet.
pub(super) const OWN_SUBNET: &str = "10.127.255.0/24";
/// Endpoints of each service.
pub(super) const ENDPOINTS_EACH: u32 = 10;

const PREFIX: &str = "/coreos.com/network";
/// etcd's limit of operations per transaction.
const AT_ONCE: usize = 128;
/// Hosts of the endpoints.
const NODES: u32 = 500;
/// One in so many services has a UDP port beside its TCP port.
const WITH_UDP: u32 = 20;
/// The TCP port of the services, and of their endpoints.
const PORT: u16 = 80;
/// The UDP port.
const UDP_PORT: u16 = 53;

/// A client that writes records.
pub(super) struct Writer(Client);

impl Writer {
    pub(super) async fn connect(endpoint: &str) -> Result<Self> {
        Ok(Self(Client::connect([endpoint], None).await.context("connect to etcd")?))
    }

    /// Writes the network's config and all records of so many services.
    pub(super) async fn fill(&mut self, services: u32) -> Result<()> {
        self.0.put(format!("{PREFIX}/config"), CONFIG, None).await.context("write the config")?;
        let records: Vec<_> = (0..services).flat_map(of_service).collect();
        for at_once in records.chunks(AT_ONCE) {
            let puts = at_once
                .iter()
                .map(|(key, value)| TxnOp::put(format!("{PREFIX}/{key}"), value.as_str(), None));
            self.0.txn(Txn::new().and_then(puts.collect::<Vec<_>>())).await.context("write records")?;
        }
        Ok(())
    }

    /// Adds an endpoint with an address that no other has.
    pub(super) async fn add(&mut self, service: u32, number: u32) -> Result<()> {
        let ip = Ipv4Addr::from(added(number).ip);
        let key = format!("{PREFIX}/{}", added_key(service, number));
        self.0.put(key, format!(r#"{{"overlay_ip":"{ip}"}}"#), None).await.context("write an endpoint")?;
        Ok(())
    }

    /// Removes it.
    pub(super) async fn remove(&mut self, service: u32, number: u32) -> Result<()> {
        let key = format!("{PREFIX}/{}", added_key(service, number));
        self.0.delete(key, None).await.context("remove an endpoint")?;
        Ok(())
    }
}

fn name(service: u32) -> String {
    format!("ns-{}/service-{service}", service % 100)
}

fn vip(service: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(Ipv4Addr::new(10, 251, 0, 1).to_bits() + service)
}

fn added_key(service: u32, number: u32) -> String {
    format!("endpoints/{}/node-{}/added-{number}", name(service), number % NODES)
}

/// The keys and values of one service. Its virtual address is assigned already, as in a network that has been running.
pub(super) fn of_service(service: u32) -> Vec<(String, String)> {
    let name = name(service);
    let udp = match has_udp(service) {
        true => format!(r#",{{"name":"dns","port":{UDP_PORT},"protocol":"udp"}}"#),
        false => String::new(),
    };
    let ports = format!(r#"[{{"name":"http","port":{PORT},"protocol":"tcp"}}{udp}]"#);
    let mut records = vec![
        (format!("services/{name}"), format!(r#"{{"v":1,"ports":{ports}}}"#)),
        (format!("vips/{}", vip(service)), name.clone()),
    ];
    records.extend((0..ENDPOINTS_EACH).map(|number| {
        let number = service * ENDPOINTS_EACH + number;
        let ip = Ipv4Addr::from_bits(Ipv4Addr::new(10, 1, 0, 1).to_bits() + number);
        (format!("endpoints/{name}/node-{}/e{number}", number % NODES), format!(r#"{{"overlay_ip":"{ip}"}}"#))
    }));
    records
}

/// Whether a service has a UDP port.
pub(super) fn has_udp(service: u32) -> bool {
    service.is_multiple_of(WITH_UDP)
}

/// The virtual address and UDP port of a service.
pub(super) fn udp_address(service: u32) -> SocketAddrV4 {
    SocketAddrV4::new(vip(service), UDP_PORT)
}

/// Virtual ports of so many services.
pub(super) fn virtual_ports(services: u32) -> usize {
    (services + services.div_ceil(WITH_UDP)) as usize
}

/// The key of a service's TCP port in the kernel's map.
pub(super) fn key(service: u32) -> ServiceKey {
    ServiceKey::new(Address { ip: vip(service).octets(), port: PORT.to_be_bytes() }, TCP)
}

/// The endpoint of [`Writer::add`] in the kernel's map.
pub(super) fn added(number: u32) -> Address {
    let ip = Ipv4Addr::from_bits(Ipv4Addr::new(10, 100, 0, 1).to_bits() + number);
    Address { ip: ip.octets(), port: PORT.to_be_bytes() }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn records_are_different_and_their_addresses_of_the_network() {
        let records: Vec<_> = (0..15_000).flat_map(of_service).collect();
        let keys: BTreeSet<_> = records.iter().map(|(key, _)| key).collect();
        assert_eq!((keys.len(), records.len()), (180_000, 180_000));
        assert!(vip(15_000) < Ipv4Addr::new(10, 251, 255, 254));
        let last = Ipv4Addr::from_bits(Ipv4Addr::new(10, 1, 0, 1).to_bits() + 150_000);
        assert!(last < Ipv4Addr::from(added(0).ip) && last < Ipv4Addr::new(10, 127, 255, 0));
        assert_eq!((virtual_ports(1), virtual_ports(20), virtual_ports(21)), (2, 21, 23));
    }
}
