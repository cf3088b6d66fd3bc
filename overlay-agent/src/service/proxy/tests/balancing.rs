//! Which endpoint a connection gets.

use std::{
    cell::Cell,
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddrV4},
    time::Duration,
};

use overlay_ebpf::service::{
    abi::{Affinity, Backend, ClientKey, MemberKey, ServiceEntry, SlotKey},
    select::{State, select},
};
use rand::{Rng, SeedableRng, rngs::StdRng};
use tokio::time::sleep;

use super::stage::*;
use crate::service::{
    front::{Rules, abi_address, fronts},
    proxy::Options,
    record::EndpointState,
};

#[tokio::test]
async fn connections_take_turns_in_order() {
    let servers = Server::several(3).await;
    let spec = Spec::tcp(&addresses(&servers));
    let _proxy = proxy(Options::default(), std::slice::from_ref(&spec)).await;
    let mut names = Vec::new();
    for _ in 0..9 {
        names.push(name(spec.address()).await);
    }
    assert_eq!(names, [0, 1, 2, 0, 1, 2, 0, 1, 2]);
}

#[tokio::test]
async fn weights_are_shares() {
    let servers = Server::several(3).await;
    let mut spec = Spec::tcp(&addresses(&servers));
    for (endpoint, weight) in spec.endpoints.iter_mut().zip([5, 1, 0]) {
        endpoint.1 = weight;
    }
    let _proxy = proxy(Options::default(), std::slice::from_ref(&spec)).await;
    let mut counts = [0; 3];
    for _ in 0..60 {
        counts[usize::from(name(spec.address()).await)] += 1;
    }
    assert_eq!(counts, [50, 10, 0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn chance_distributes_evenly() {
    let servers = Server::several(4).await;
    let spec = Spec::tcp(&addresses(&servers)).with(r#","lb":{"policy":"random"}"#);
    let _proxy = proxy(Options::default(), std::slice::from_ref(&spec)).await;
    let total = 1000_u32;
    let mut counts = [0_u32; 4];
    for _ in 0..total {
        counts[usize::from(name(spec.address()).await)] += 1;
    }
    // 5 standard deviations of a binomial distribution.
    let expected = f64::from(total) / 4.0;
    let deviation = (expected * 0.75).sqrt();
    for count in counts {
        assert!((f64::from(count) - expected).abs() < 5.0 * deviation, "{counts:?}");
    }
}

#[tokio::test]
async fn a_client_stays_at_its_endpoint() {
    let servers = Server::several(3).await;
    let affinity = r#","affinity":{"client_ip":true,"ttl_s":1}"#;
    let mut spec = Spec::tcp(&addresses(&servers)).with(affinity);
    let proxy = proxy(Options::default(), std::slice::from_ref(&spec)).await;
    let clients: Vec<Ipv4Addr> = (1..=6).map(|number| Ipv4Addr::new(127, 0, 1, number)).collect();
    let mut first = Vec::new();
    for client in &clients {
        first.push(connect_from(*client, spec.address()).await.unwrap().1);
    }
    assert_eq!(first, [0, 1, 2, 0, 1, 2]);
    for (client, name) in clients.iter().zip(&first).rev() {
        assert_eq!(connect_from(*client, spec.address()).await.unwrap().1, *name, "{client}");
    }
    // Its endpoint goes: it moves, and stays where it moved to.
    spec.endpoints.remove(1);
    apply(&proxy, std::slice::from_ref(&spec)).await;
    let moved = connect_from(clients[1], spec.address()).await.unwrap().1;
    assert_ne!(moved, 1);
    assert_eq!(connect_from(clients[1], spec.address()).await.unwrap().1, moved);
    assert_eq!(connect_from(clients[0], spec.address()).await.unwrap().1, 0);
    // After its time it has a turn like others: of two in a row, one moves.
    sleep(Duration::from_millis(1100)).await;
    let after = [
        connect_from(clients[0], spec.address()).await.unwrap().1,
        connect_from(clients[3], spec.address()).await.unwrap().1,
    ];
    assert_ne!(after[0], after[1]);
}

#[tokio::test]
async fn a_client_stays_where_it_was_passed_on_to() {
    let servers = Server::several(2).await;
    let affinity = r#","affinity":{"client_ip":true,"ttl_s":60}"#;
    let spec = Spec::tcp(&[dead(), servers[0].address, servers[1].address]).with(affinity);
    let proxy = proxy(Options::default(), std::slice::from_ref(&spec)).await;
    for _ in 0..3 {
        assert_eq!(name(spec.address()).await, 0);
    }
    let counters = proxy.counters();
    let failures: u64 = counters
        .services
        .values()
        .flat_map(|service| &service.endpoints)
        .map(|endpoint| endpoint.counts.failures)
        .sum();
    assert_eq!(failures, 1);
}

#[tokio::test]
async fn the_endpoint_with_the_fewest_open_connections_is_next() {
    let servers = Server::several(3).await;
    let spec = Spec::tcp(&addresses(&servers)).with(r#","lb":{"policy":"least_conn"}"#);
    let proxy = proxy(Options::default(), std::slice::from_ref(&spec)).await;
    let mut open = Vec::new();
    for _ in 0..9 {
        open.push(connect(spec.address()).await.unwrap());
    }
    let count = |open: &[(tokio::net::TcpStream, u8)], wanted: u8| {
        open.iter().filter(|(_, name)| *name == wanted).count()
    };
    assert_eq!([0, 1, 2].map(|name| count(&open, name)), [3, 3, 3]);
    open.retain(|(_, name)| *name != 1);
    eventually("the connections are closed", || total(&proxy).open == 6).await;
    for _ in 0..3 {
        let (stream, name) = connect(spec.address()).await.unwrap();
        assert_eq!(name, 1);
        open.push((stream, name));
    }
}

/// Another implementation of the inputs of the choice: maps like those of the eBPF programs.
struct Maps {
    slots: BTreeMap<u32, Backend>,
    turn: Cell<u64>,
}

impl State for Maps {
    fn slot(&self, key: SlotKey) -> Option<Backend> {
        self.slots.get(&key.slot).copied()
    }
    fn member(&self, _: MemberKey) -> Option<Backend> {
        None
    }
    fn turn(&self, _: u32) -> u64 {
        self.turn.replace(self.turn.get() + 1)
    }
    fn random(&self) -> u32 {
        0
    }
    fn connections(&self, _: u32) -> u64 {
        0
    }
    fn affinity(&self, _: ClientKey) -> Option<Affinity> {
        None
    }
    fn keep(&self, _: ClientKey, _: Affinity) {}
    fn now(&self) -> u64 {
        0
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_proxy_chooses_as_the_programs_do() {
    let servers = Server::several(7).await;
    let policies = [
        r#","lb":{"policy":"round_robin"}"#,
        r#","lb":{"policy":"source_hash"}"#,
        r#","lb":{"policy":"maglev"}"#,
    ];
    let mut random = StdRng::seed_from_u64(7);
    for policy in policies {
        let mut spec = Spec::tcp(&addresses(&servers)).with(policy);
        for endpoint in &mut spec.endpoints {
            endpoint.1 = random.random_range(0..5);
            let states = [EndpointState::Ready, EndpointState::Ready, EndpointState::Draining];
            endpoint.2 = states[random.random_range(0..3)];
        }
        spec.endpoints[0].1 = 1;
        spec.endpoints[0].2 = EndpointState::Ready;
        let _proxy = proxy(Options::default(), std::slice::from_ref(&spec)).await;
        let front =
            fronts(&catalog(std::slice::from_ref(&spec)), &Rules::default()).into_values().next().unwrap();
        let table = front.slots();
        let backend = |index: &u32| Backend {
            address: abi_address(front.backends[*index as usize].address),
            weight: 1,
            id: *index,
        };
        let slots = (0..).zip(table.iter().map(backend)).collect();
        let maps = Maps { slots, turn: Cell::new(0) };
        let entry = ServiceEntry {
            slots: u32::try_from(table.len()).unwrap(),
            policy: front.abi_policy() as u32,
            ..ServiceEntry::default()
        };
        for _ in 0..300 {
            let [a, b] = random.random::<[u8; 2]>();
            let client = Ipv4Addr::new(127, 1, a, b);
            let expected = select(&entry, u64::from(client.to_bits()), &maps).unwrap().address;
            let (_, name) = connect_from(client, spec.address()).await.unwrap();
            let found: SocketAddrV4 = servers[usize::from(name)].address;
            assert_eq!(abi_address(found), expected, "{policy}, {client}");
        }
    }
}
