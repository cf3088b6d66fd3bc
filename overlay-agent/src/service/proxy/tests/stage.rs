//! Services, endpoints and clients for the tests.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr, SocketAddrV4},
    sync::{
        Arc,
        atomic::{AtomicU16, Ordering},
    },
    time::Duration,
};

use rand::{Rng, SeedableRng, rngs::StdRng};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpSocket, TcpStream},
    task::JoinHandle,
    time::{Instant, sleep},
};

use crate::service::{
    Catalog,
    catalog::{Endpoint, Service},
    front::Rules,
    proxy::{Counts, Options, Proxy},
    record::{EndpointState, Protocol},
};

/// The port of the services.
pub(super) const PORT: u16 = 7080;

/// A virtual address that no other test has, nor another process that runs the tests.
pub(super) fn vip() -> Ipv4Addr {
    static NEXT: AtomicU16 = AtomicU16::new(1);
    let [high, low] = NEXT.fetch_add(1, Ordering::Relaxed).to_be_bytes();
    let process = u8::try_from(std::process::id() % 128).unwrap();
    Ipv4Addr::new(127, 100 + process, high, low)
}

/// A service for the catalog of a test.
#[derive(Clone)]
pub(super) struct Spec {
    pub(super) name: String,
    pub(super) vip: Ipv4Addr,
    pub(super) port: u16,
    pub(super) protocol: Protocol,
    /// More of the record, as JSON members.
    pub(super) service: &'static str,
    /// More of the port's record.
    pub(super) port_record: &'static str,
    /// Address, weight, state.
    pub(super) endpoints: Vec<(SocketAddrV4, u16, EndpointState)>,
}

impl Spec {
    pub(super) fn new(protocol: Protocol, endpoints: &[SocketAddrV4]) -> Self {
        let endpoints = endpoints.iter().map(|address| (*address, 1, EndpointState::Ready)).collect();
        let (service, port_record) = ("", "");
        Self {
            name: "shop/web".to_owned(),
            vip: vip(),
            port: PORT,
            protocol,
            service,
            port_record,
            endpoints,
        }
    }

    pub(super) fn tcp(endpoints: &[SocketAddrV4]) -> Self {
        Self::new(Protocol::Tcp, endpoints)
    }

    pub(super) fn with(self, service: &'static str) -> Self {
        Self { service, ..self }
    }

    pub(super) fn address(&self) -> SocketAddrV4 {
        SocketAddrV4::new(self.vip, self.port)
    }

    fn service(&self) -> Service {
        let (port, protocol) = (self.port, self.protocol.name());
        let json = format!(
            r#"{{"v":1{},"ports":[{{"name":"p","port":{port},"protocol":"{protocol}"{}}}]}}"#,
            self.service, self.port_record
        );
        let endpoint = |(number, (address, weight, state)): (usize, &(SocketAddrV4, u16, EndpointState))| {
            let (ip, port) = (address.ip(), address.port());
            let json = format!(r#"{{"overlay_ip":"{ip}","ports":{{"p":{port}}},"weight":{weight}}}"#);
            let mut spec: crate::service::record::Endpoint = serde_json::from_str(&json).unwrap();
            spec.state = *state;
            Endpoint::new(format!("{}/node/{number:03}", self.name).parse().unwrap(), spec)
        };
        Service {
            name: self.name.parse().unwrap(),
            spec: serde_json::from_str(&json).unwrap(),
            vip: Some(self.vip),
            endpoints: self.endpoints.iter().enumerate().map(endpoint).collect(),
        }
    }
}

pub(super) fn catalog(specs: &[Spec]) -> Arc<Catalog> {
    let services = specs.iter().map(|spec| (spec.name.parse().unwrap(), Arc::new(spec.service())));
    Arc::new(Catalog { services: services.collect(), skipped: Vec::new() })
}

/// A proxy with these services.
pub(super) async fn proxy(options: Options, specs: &[Spec]) -> Proxy {
    let proxy = Proxy::start(options);
    apply(&proxy, specs).await;
    assert_eq!(proxy.problems(), []);
    proxy
}

pub(super) async fn apply(proxy: &Proxy, specs: &[Spec]) {
    proxy.reconcile(&catalog(specs), &Rules::default()).await;
}

/// The counters of the service `shop/web`.
pub(super) fn total(proxy: &Proxy) -> Counts {
    proxy.counters().services.get(&"shop/web".parse().unwrap()).map(|counts| counts.total).unwrap_or_default()
}

/// Random bytes, the same for the same seed.
pub(super) fn bytes(length: usize, seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; length];
    StdRng::seed_from_u64(seed).fill(bytes.as_mut_slice());
    bytes
}

/// A TCP endpoint. Its task ends with it.
pub(super) struct Server {
    pub(super) address: SocketAddrV4,
    task: JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Server {
    /// One that runs `serve` for each connection.
    pub(super) async fn start<F>(serve: impl Fn(TcpStream) -> F + Send + 'static) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let SocketAddr::V4(address) = listener.local_addr().unwrap() else { unreachable!() };
        let task = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                connections.spawn(serve(stream));
            }
        });
        Self { address, task }
    }

    /// One that sends a byte that names it, and then what it receives.
    pub(super) async fn named(name: u8) -> Self {
        Self::start(move |mut stream| async move {
            if stream.write_all(&[name]).await.is_ok() {
                let (mut from, mut to) = stream.split();
                let _ = tokio::io::copy(&mut from, &mut to).await;
                let _ = to.shutdown().await;
            }
        })
        .await
    }

    /// Named 0, 1 and so on.
    pub(super) async fn several(count: u8) -> Vec<Self> {
        let mut servers = Vec::new();
        for name in 0..count {
            servers.push(Self::named(name).await);
        }
        servers
    }
}

pub(super) fn addresses(servers: &[Server]) -> Vec<SocketAddrV4> {
    servers.iter().map(|server| server.address).collect()
}

/// An address of this host where nothing listens, and nothing will.
pub(super) fn dead() -> SocketAddrV4 {
    SocketAddrV4::new(vip(), PORT + 1)
}

/// A connection to a service, and the name of the endpoint that answers.
pub(super) async fn connect(to: SocketAddrV4) -> io::Result<(TcpStream, u8)> {
    connect_from(Ipv4Addr::LOCALHOST, to).await
}

pub(super) async fn connect_from(client: Ipv4Addr, to: SocketAddrV4) -> io::Result<(TcpStream, u8)> {
    let socket = TcpSocket::new_v4()?;
    socket.bind(SocketAddr::from((client, 0)))?;
    let mut stream = socket.connect(SocketAddr::V4(to)).await?;
    let name = stream.read_u8().await?;
    Ok((stream, name))
}

/// The name of the endpoint that serves a connection, which is closed.
pub(super) async fn name(to: SocketAddrV4) -> u8 {
    connect(to).await.unwrap().1
}

/// Fails unless the connection passes bytes both ways. Its endpoint is a named one.
pub(super) async fn exchange(stream: &mut TcpStream) -> io::Result<()> {
    let sent = bytes(1000, 1);
    stream.write_all(&sent).await?;
    let mut received = vec![0; sent.len()];
    stream.read_exact(&mut received).await?;
    assert!(sent == received);
    Ok(())
}

/// Waits until it is true, at most 5 s.
pub(super) async fn eventually(what: &str, mut is_true: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_true() {
        assert!(start.elapsed() < Duration::from_secs(5), "not within 5 s: {what}");
        sleep(Duration::from_millis(5)).await;
    }
}
