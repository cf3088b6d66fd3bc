//! The DNS server of the node: its sockets, and what they share.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Error, Result, bail};
use arc_swap::ArcSwap;
use hickory_proto::op::ResponseCode;
use tokio::{
    net::{TcpListener, UdpSocket},
    sync::watch,
    task::JoinSet,
};

use super::{
    DEFAULT_UDP_PAYLOAD,
    answer::{Answer, Question, answer},
    counters::{CounterCells, Counters},
    forward::{Forwarder, Permit},
    records::Records,
    tcp, udp,
    zone::Zone,
};
use crate::service::Catalog;

/// Room in the kernel for queries that wait, in bytes: about 2,000.
const RECEIVE_BUFFER: usize = 2 << 20;
/// Most attempts to find a port that is free for UDP and TCP.
const FREE_PORTS: u32 = 100;

/// What a server is told.
#[derive(Clone, Debug)]
pub struct Options {
    /// Addresses and ports to listen at, for UDP and TCP. Port 0 is any free one. `0.0.0.0` and `::` are refused: answers would leave
    /// with another source address than the one that was asked.
    pub listen: Vec<SocketAddr>,
    /// The names that the server answers itself.
    pub zone: Zone,
    /// Servers for all other names, in order of preference. Addresses of `listen` are left out. When there is none, such names are
    /// refused.
    pub upstreams: Vec<SocketAddr>,
    /// How long an upstream server may take, before the next one is asked.
    pub upstream_timeout: Duration,
    /// Memory for answers of upstream servers, in bytes.
    pub cache_bytes: usize,
    /// Largest datagram that is sent, in bytes, to clients that take it: 512 to 4096.
    pub udp_payload: u16,
    /// Most open TCP connections at each address.
    pub max_connections: usize,
    /// How long a TCP connection may send nothing, or take nothing, before it is closed.
    pub tcp_idle: Duration,
}

impl Options {
    /// Options with defaults for the rest.
    pub fn new(listen: Vec<SocketAddr>, zone: Zone) -> Self {
        Self {
            listen,
            zone,
            upstreams: Vec::new(),
            upstream_timeout: Duration::from_secs(2),
            cache_bytes: 8 << 20,
            udp_payload: DEFAULT_UDP_PAYLOAD,
            max_connections: 128,
            tcp_idle: Duration::from_secs(10),
        }
    }
}

/// A server that listens.
#[derive(Debug)]
pub struct DnsServer {
    sockets: Vec<(UdpSocket, TcpListener)>,
    addresses: Vec<SocketAddr>,
    shared: Arc<Shared>,
    zone: Arc<Zone>,
    catalog: watch::Receiver<Arc<Catalog>>,
}

/// Reads the counters of a server, also while it runs.
#[derive(Clone, Debug)]
pub struct Statistics(Arc<Shared>);

impl Statistics {
    /// The counters now.
    pub fn snapshot(&self) -> Counters {
        self.0.counters.snapshot()
    }
}

/// What all tasks of a server use.
#[derive(Debug)]
pub(super) struct Shared {
    records: ArcSwap<Records>,
    forwarder: Arc<Forwarder>,
    pub(super) counters: CounterCells,
    pub(super) udp_payload: u16,
    pub(super) max_connections: usize,
    pub(super) tcp_idle: Duration,
}

impl DnsServer {
    /// Listens at all addresses, and answers by the catalog as it is at each moment. Fails when an address cannot be used, and says which
    /// and what to do about it.
    pub async fn bind(options: Options, mut catalog: watch::Receiver<Arc<Catalog>>) -> Result<Self> {
        if options.listen.is_empty() {
            bail!("the DNS server has no address to listen at");
        }
        if !(512..=4096).contains(&options.udp_payload) {
            bail!("the largest DNS datagram is {} bytes: expected 512 to 4096", options.udp_payload);
        }
        let mut sockets = Vec::new();
        let mut addresses = Vec::new();
        for address in options.listen {
            let (udp, tcp) = listen(address).await?;
            addresses.push(udp.local_addr().context("read the address of the DNS server")?);
            sockets.push((udp, tcp));
        }
        let upstreams =
            options.upstreams.into_iter().filter(|upstream| !addresses.contains(upstream)).collect();
        let zone = Arc::new(options.zone);
        let records = Records::new(Arc::clone(&zone), Arc::clone(&catalog.borrow_and_update()));
        let shared = Arc::new(Shared {
            records: ArcSwap::from_pointee(records),
            forwarder: Arc::new(Forwarder::new(upstreams, options.upstream_timeout, options.cache_bytes)),
            counters: CounterCells::default(),
            udp_payload: options.udp_payload,
            max_connections: options.max_connections.max(1),
            tcp_idle: options.tcp_idle,
        });
        Ok(Self { sockets, addresses, shared, zone, catalog })
    }

    /// The addresses, with the ports that the kernel chose.
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// Reads the counters.
    pub fn statistics(&self) -> Statistics {
        Statistics(Arc::clone(&self.shared))
    }

    /// Answers until it is dropped. When the sender of catalogs is gone, the last catalog stays. Fails when a part of the server ends,
    /// which it does only by an error of the program.
    pub async fn run(self) -> Result<()> {
        let Self { sockets, shared, zone, mut catalog, .. } = self;
        let mut tasks = JoinSet::new();
        for (udp, tcp) in sockets {
            tasks.spawn(udp::serve(udp, Arc::clone(&shared)));
            tasks.spawn(tcp::serve(tcp, Arc::clone(&shared)));
        }
        tasks.spawn(async move {
            while catalog.changed().await.is_ok() {
                let latest = Arc::clone(&catalog.borrow_and_update());
                shared.records.store(Arc::new(Records::new(Arc::clone(&zone), latest)));
            }
            std::future::pending().await
        });
        match tasks.join_next().await {
            Some(Err(error)) => Err(error).context("the DNS server failed"),
            Some(Ok(())) | None => bail!("the DNS server ended"),
        }
    }
}

impl Shared {
    /// The records now.
    pub(super) fn records(&self) -> Arc<Records> {
        self.records.load_full()
    }

    /// Decides about a message, and counts it.
    pub(super) fn answer(&self, query: &[u8], records: &Records) -> Answer {
        self.counters.queries.add();
        let answer = answer(query, records);
        if matches!(answer, Answer::None) {
            self.counters.ignored.add();
        }
        answer
    }

    /// Writes the response to a question for upstream servers, if it is known already, and returns whether it is truncated. Else the
    /// permission to ask them is in the error.
    pub(super) fn forward_at_once(
        &self,
        question: &Question,
        client: IpAddr,
        udp_payload: Option<u16>,
        buffer: &mut Vec<u8>,
    ) -> Result<bool, Permit> {
        if let Some(message) = self.forwarder.cached(question) {
            self.counters.cache_hits.add();
            return Ok(question.respond(&message, udp_payload, buffer));
        }
        let code = if self.forwarder.is_empty() { ResponseCode::Refused } else { ResponseCode::ServFail };
        if code == ResponseCode::ServFail {
            match self.forwarder.admit(client) {
                Some(permit) => return Err(permit),
                None => self.counters.overloaded.add(),
            }
        }
        question.failure(code, buffer);
        Ok(false)
    }
}

/// Sockets for UDP and TCP at one address.
async fn listen(address: SocketAddr) -> Result<(UdpSocket, TcpListener)> {
    if address.ip().is_unspecified() {
        bail!("listen for DNS at {address}: name one or more addresses of this host instead");
    }
    let mut attempts = if address.port() == 0 { FREE_PORTS } else { 1 };
    loop {
        attempts -= 1;
        let udp = UdpSocket::bind(address).await.map_err(|error| explain(error, "UDP", address))?;
        let bound = udp.local_addr().context("read the address of the DNS server")?;
        match TcpListener::bind(bound).await {
            Ok(tcp) => {
                enlarge_buffer(&udp);
                return Ok((udp, tcp));
            }
            // A port that is free for UDP may be taken for TCP.
            Err(error) if attempts > 0 && error.kind() == io::ErrorKind::AddrInUse => {}
            Err(error) => return Err(explain(error, "TCP", bound)),
        }
    }
}

/// More than `net.core.rmem_max` needs `CAP_NET_ADMIN`; without, the kernel gives what it permits.
fn enlarge_buffer(socket: &UdpSocket) {
    use rustix::net::sockopt::{set_socket_recv_buffer_size, set_socket_recv_buffer_size_force};
    if set_socket_recv_buffer_size_force(socket, RECEIVE_BUFFER).is_err() {
        let _ = set_socket_recv_buffer_size(socket, RECEIVE_BUFFER);
    }
}

/// An error of `bind` with its remedy.
fn explain(error: io::Error, transport: &str, address: SocketAddr) -> Error {
    let remedy = if error.kind() == io::ErrorKind::AddrInUse {
        let port = address.port();
        format!(
            "another program listens there: stop it (ss -lnp 'sport = :{port}' shows it), or choose another address"
        )
    } else if error.kind() == io::ErrorKind::AddrNotAvailable {
        "this host has no such address".to_owned()
    } else if error.kind() == io::ErrorKind::PermissionDenied {
        "ports below 1024 need CAP_NET_BIND_SERVICE".to_owned()
    } else {
        "choose another address".to_owned()
    };
    Error::new(error).context(format!("listen for DNS at {transport} {address}: {remedy}"))
}
