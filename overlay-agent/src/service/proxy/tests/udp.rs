//! UDP: datagrams and sessions.

use std::{
    io,
    net::{Ipv4Addr, SocketAddrV4},
    time::Duration,
};

use tokio::{
    net::UdpSocket,
    task::JoinHandle,
    time::{sleep, timeout},
};

use super::stage::*;
use crate::service::{
    proxy::{Options, Proxy},
    record::Protocol,
};

/// A UDP endpoint that answers each datagram with its name and the datagram, where there is room for the name.
struct Echo {
    address: SocketAddrV4,
    task: JoinHandle<()>,
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.task.abort();
    }
}

const LARGEST: usize = 65_507;

async fn echo(name: u8) -> Echo {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap().to_string().parse().unwrap();
    let task = tokio::spawn(async move {
        let mut buffer = vec![0; LARGEST + 1];
        buffer[0] = name;
        loop {
            let (length, from) = socket.recv_from(&mut buffer[1..]).await.unwrap();
            let begin = usize::from(length == LARGEST);
            socket.send_to(&buffer[begin..=length], from).await.unwrap();
        }
    });
    Echo { address, task }
}

fn udp(endpoints: &[&Echo]) -> Spec {
    Spec::new(Protocol::Udp, &endpoints.iter().map(|echo| echo.address).collect::<Vec<_>>())
}

/// A client that takes datagrams from the virtual address only.
async fn client(to: SocketAddrV4) -> UdpSocket {
    client_from(Ipv4Addr::LOCALHOST, to).await
}

async fn client_from(address: Ipv4Addr, to: SocketAddrV4) -> UdpSocket {
    let socket = UdpSocket::bind((address, 0)).await.unwrap();
    socket.connect(to).await.unwrap();
    socket
}

async fn receive(client: &UdpSocket) -> io::Result<Vec<u8>> {
    let mut buffer = vec![0; LARGEST + 1];
    let length = timeout(Duration::from_secs(2), client.recv(&mut buffer)).await??;
    buffer.truncate(length);
    Ok(buffer)
}

/// Sends a datagram and returns who answers.
async fn ask(client: &UdpSocket) -> io::Result<u8> {
    client.send(b"?").await?;
    let reply = receive(client).await?;
    assert_eq!(&reply[1..], b"?");
    Ok(reply[0])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn datagrams_of_all_sizes_keep_their_boundaries() {
    let endpoint = echo(b'e').await;
    let spec = udp(&[&endpoint]);
    let proxy = proxy(Options::default(), std::slice::from_ref(&spec)).await;
    let client = client(spec.address()).await;
    let mut total_bytes = 0;
    for (seed, size) in (0..).zip([0, 1, 1472, 1473, 9000, LARGEST - 1, LARGEST]) {
        let sent = bytes(size, seed);
        client.send(&sent).await.unwrap();
        let received = receive(&client).await.unwrap();
        if size < LARGEST {
            assert_eq!((received[0], received.len()), (b'e', size + 1));
            assert!(received[1..] == sent);
        } else {
            assert!(received == sent);
        }
        total_bytes += size as u64;
    }
    // Several on their way at once stay apart.
    for size in [3, 0, 700, 1, 0] {
        client.send(&bytes(size, 9)).await.unwrap();
    }
    for size in [3, 0, 700, 1, 0] {
        assert_eq!(receive(&client).await.unwrap()[1..], bytes(size, 9));
    }
    let counts = total(&proxy);
    assert_eq!((counts.connections, counts.open, counts.failures), (1, 1, 0));
    assert_eq!(counts.bytes_to_endpoints, total_bytes + 704);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_client_has_its_session() {
    let endpoints = [echo(0).await, echo(1).await, echo(2).await];
    let spec = udp(&[&endpoints[0], &endpoints[1], &endpoints[2]]);
    let proxy = proxy(Options::default(), std::slice::from_ref(&spec)).await;
    let mut clients = Vec::new();
    for number in 0..30 {
        let client = client(spec.address()).await;
        assert_eq!(ask(&client).await.unwrap(), number % 3);
        clients.push((client, number % 3));
    }
    for (client, name) in clients.iter().rev() {
        assert_eq!(ask(client).await.unwrap(), *name);
    }
    assert_eq!(proxy.counters().open_sessions, 30);
    assert_eq!(total(&proxy).open, 30);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn idle_sessions_end_and_used_ones_do_not() {
    let endpoints = [echo(0).await, echo(1).await];
    let spec = udp(&[&endpoints[0], &endpoints[1]]);
    let idle = Duration::from_millis(300);
    let options = Options { udp_idle: idle, ..Options::default() };
    let proxy = proxy(options, std::slice::from_ref(&spec)).await;
    let (used, still) = (client(spec.address()).await, client(spec.address()).await);
    assert_eq!((ask(&used).await.unwrap(), ask(&still).await.unwrap()), (0, 1));
    for _ in 0..12 {
        sleep(idle / 6).await;
        assert_eq!(ask(&used).await.unwrap(), 0);
    }
    assert_eq!(proxy.counters().open_sessions, 1);
    eventually("the session's end is counted", || total(&proxy).open == 1).await;
    // A new session has the next turn.
    assert_eq!(ask(&still).await.unwrap(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_session_that_is_idle_for_longest_makes_room() {
    let endpoint = echo(0).await;
    let spec = udp(&[&endpoint]);
    let options = Options { max_sessions: 3, ..Options::default() };
    let proxy = proxy(options, std::slice::from_ref(&spec)).await;
    let mut clients = Vec::new();
    for _ in 0..3 {
        let client = client(spec.address()).await;
        ask(&client).await.unwrap();
        clients.push(client);
    }
    ask(&clients[0]).await.unwrap();
    ask(&client(spec.address()).await).await.unwrap();
    assert_eq!((proxy.counters().open_sessions, total(&proxy).connections), (3, 4));
    eventually("the session's end is counted", || total(&proxy).open == 3).await;
    // The first and the third still have theirs, the second needs a new one.
    for (client, connections) in [(0, 4), (2, 4), (1, 5)] {
        ask(&clients[client]).await.unwrap();
        assert_eq!(total(&proxy).connections, connections, "client {client}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_moves_when_its_endpoint_is_removed() {
    let endpoints = [echo(0).await, echo(1).await];
    let mut spec = udp(&[&endpoints[0], &endpoints[1]]);
    let proxy = proxy(Options::default(), std::slice::from_ref(&spec)).await;
    let (first, second) = (client(spec.address()).await, client(spec.address()).await);
    assert_eq!((ask(&first).await.unwrap(), ask(&second).await.unwrap()), (0, 1));
    // A draining endpoint keeps its sessions.
    spec.endpoints[0].2 = crate::service::record::EndpointState::Draining;
    apply(&proxy, std::slice::from_ref(&spec)).await;
    assert_eq!(ask(&first).await.unwrap(), 0);
    spec.endpoints.remove(0);
    apply(&proxy, std::slice::from_ref(&spec)).await;
    assert_eq!((ask(&first).await.unwrap(), ask(&second).await.unwrap()), (1, 1));
    eventually("the old session is closed", || total(&proxy).open == 2).await;
    spec.endpoints.clear();
    apply(&proxy, std::slice::from_ref(&spec)).await;
    first.send(b"?").await.unwrap();
    eventually("the datagram is counted as lost", || total(&proxy).failures == 1).await;
    apply(&proxy, &[]).await;
    eventually("the sessions are closed", || proxy.counters().open_sessions == 0).await;
    assert_eq!(ask(&second).await.unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn icmp_errors_end_nothing() {
    let alive = echo(1).await;
    let closed = dead();
    let spec = Spec::new(Protocol::Udp, &[closed, alive.address]);
    let proxy = proxy(Options::default(), std::slice::from_ref(&spec)).await;
    let (unlucky, lucky) = (client(spec.address()).await, client(spec.address()).await);
    for _ in 0..5 {
        unlucky.send(b"lost").await.unwrap();
        sleep(Duration::from_millis(20)).await;
        assert_eq!(ask(&lucky).await.unwrap(), 1);
    }
    assert!(total(&proxy).failures > 0);
    // Something listens there now: the session reaches it.
    let late = UdpSocket::bind(closed).await.unwrap();
    unlucky.send(b"found").await.unwrap();
    let mut buffer = [0; 16];
    let (length, from) = timeout(Duration::from_secs(2), late.recv_from(&mut buffer)).await.unwrap().unwrap();
    assert_eq!(&buffer[..length], b"found");
    late.send_to(b"reply", from).await.unwrap();
    assert_eq!(receive(&unlucky).await.unwrap(), b"reply");
    // A client that is gone does no harm either.
    drop(unlucky);
    for _ in 0..3 {
        late.send_to(b"reply", from).await.unwrap();
        sleep(Duration::from_millis(20)).await;
        assert_eq!(ask(&lucky).await.unwrap(), 1);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn affinity_holds_for_all_sockets_of_a_client() {
    let endpoints = [echo(0).await, echo(1).await];
    let spec = udp(&[&endpoints[0], &endpoints[1]]).with(r#","affinity":{"client_ip":true,"ttl_s":60}"#);
    let _proxy = proxy(Options::default(), std::slice::from_ref(&spec)).await;
    for (number, name) in [(1, 0), (2, 1), (1, 0), (2, 1), (1, 0)] {
        let client = client_from(Ipv4Addr::new(127, 0, 2, number), spec.address()).await;
        assert_eq!(ask(&client).await.unwrap(), name);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_udp_port_in_use_is_a_problem_until_it_is_free() {
    let endpoint = echo(0).await;
    let occupied = UdpSocket::bind("0.0.0.0:0").await.unwrap();
    let spec = Spec { port: occupied.local_addr().unwrap().port(), ..udp(&[&endpoint]) };
    let proxy = Proxy::start(Options { bind_retry: Duration::from_millis(50), ..Options::default() });
    apply(&proxy, std::slice::from_ref(&spec)).await;
    assert!(proxy.problems()[0].reason.contains(": another process of this host has that port"));
    drop(occupied);
    eventually("the port is served", || proxy.problems().is_empty()).await;
    assert_eq!(ask(&client(spec.address()).await).await.unwrap(), 0);
}
