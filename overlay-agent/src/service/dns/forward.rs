//! Asks upstream servers.
//!
//! Each query has a socket of its own, so its source port and its identifier are random, and the kernel passes on only datagrams of the
//! server that was asked. Equal questions that wait at the same time are asked once: many open queries for one name would make it
//! likely that a forged answer fits one of them.

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use hickory_proto::op::ResponseCode;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpStream, UdpSocket},
    sync::OnceCell,
    time::timeout,
};

use super::{
    answer::Question,
    cache::{Cache, Response},
    counters::CounterCells,
    wire,
};

/// Most queries that wait for upstream servers. Each has a socket.
const MAX_WAITING: usize = 512;
/// Most of them of one client, so that one that asks for names whose servers are silent leaves room for others.
const MAX_WAITING_OF_CLIENT: usize = 128;
/// Response codes of a server that cannot parse EDNS (RFC 6891 section 7).
const NO_EDNS: [u8; 2] = [1, 4];

/// What an upstream server said: the response, or nothing.
type Outcome = Option<Arc<Response>>;

/// The upstream servers and what they have answered.
#[derive(Debug)]
pub(super) struct Forwarder {
    upstreams: Vec<SocketAddr>,
    timeout: Duration,
    /// The server that is asked first: the last one that answered.
    first: AtomicUsize,
    cache: Mutex<Cache>,
    waiting: Mutex<Waiting>,
}

#[derive(Debug, Default)]
struct Waiting {
    count: usize,
    clients: HashMap<IpAddr, usize>,
    questions: HashMap<Box<[u8]>, Arc<OnceCell<Outcome>>>,
}

/// The permission to wait for upstream servers.
#[derive(Debug)]
pub(super) struct Permit {
    forwarder: Arc<Forwarder>,
    client: IpAddr,
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut waiting = lock(&self.forwarder.waiting);
        waiting.count -= 1;
        if let Some(count) = waiting.clients.get_mut(&self.client) {
            *count -= 1;
            if *count == 0 {
                waiting.clients.remove(&self.client);
            }
        }
    }
}

impl Forwarder {
    /// `cache_bytes` bounds the memory of the cache; `timeout` is for each server.
    pub(super) fn new(upstreams: Vec<SocketAddr>, timeout: Duration, cache_bytes: usize) -> Self {
        let (cache, waiting) = (Mutex::new(Cache::new(cache_bytes)), Mutex::default());
        Self { upstreams, timeout, first: AtomicUsize::new(0), cache, waiting }
    }

    /// Whether there is no upstream server.
    pub(super) fn is_empty(&self) -> bool {
        self.upstreams.is_empty()
    }

    /// The response out of the cache, with its remaining times to live.
    pub(super) fn cached(&self, question: &Question) -> Option<Vec<u8>> {
        let (response, age) = lock(&self.cache).get(&question.key(), Instant::now())?;
        Some(response.aged(age))
    }

    /// The permission to ask for a client. `None` when too many wait.
    pub(super) fn admit(self: &Arc<Self>, client: IpAddr) -> Option<Permit> {
        let mut waiting = lock(&self.waiting);
        let of_client = waiting.clients.get(&client).copied().unwrap_or(0);
        if waiting.count >= MAX_WAITING || of_client >= MAX_WAITING_OF_CLIENT {
            return None;
        }
        waiting.count += 1;
        *waiting.clients.entry(client).or_default() += 1;
        Some(Permit { forwarder: Arc::clone(self), client })
    }
}

impl Permit {
    /// Asks, and writes the response for the client into `buffer`. Takes at most the timeout twice for each server. Returns
    /// whether the response is truncated.
    pub(super) async fn ask(
        &self,
        question: &Question,
        counters: &CounterCells,
        udp_payload: Option<u16>,
        buffer: &mut Vec<u8>,
    ) -> bool {
        let key = question.key();
        let waiter = Waiter::new(&self.forwarder, key.clone());
        let outcome = match &waiter.cell {
            Some(cell) => {
                cell.get_or_init(|| self.forwarder.exchange(question, &key, counters)).await.clone()
            }
            None => None,
        };
        drop(waiter);
        match outcome {
            Some(response) => question.respond(&response.aged(0), udp_payload, buffer),
            None => {
                question.failure(ResponseCode::ServFail, buffer);
                false
            }
        }
    }
}

/// One of those that wait for the same question. The first one asks; when it goes away, because its client does, the next one does.
struct Waiter<'a> {
    forwarder: &'a Forwarder,
    key: Box<[u8]>,
    /// Gone only in `drop`.
    cell: Option<Arc<OnceCell<Outcome>>>,
}

impl<'a> Waiter<'a> {
    fn new(forwarder: &'a Forwarder, key: Box<[u8]>) -> Self {
        let cell = Arc::clone(lock(&forwarder.waiting).questions.entry(key.clone()).or_default());
        Self { forwarder, key, cell: Some(cell) }
    }
}

impl Drop for Waiter<'_> {
    /// The last one removes the question. References come and go only while `waiting` is locked, so their number is exact.
    fn drop(&mut self) {
        let mut waiting = lock(&self.forwarder.waiting);
        let Some(cell) = self.cell.take() else { return };
        let is_current = waiting.questions.get(&self.key).is_some_and(|current| Arc::ptr_eq(current, &cell));
        if is_current && (cell.initialized() || Arc::strong_count(&cell) == 2) {
            waiting.questions.remove(&self.key);
        }
        drop(cell);
    }
}

impl Forwarder {
    /// Asks one server after the other. When none answers, the error that one of them sent.
    async fn exchange(&self, question: &Question, key: &[u8], counters: &CounterCells) -> Outcome {
        counters.forwarded.add();
        let mut error = None;
        let start = self.first.load(Relaxed);
        let count = self.upstreams.len();
        for index in (0..count).map(|offset| (start + offset) % count) {
            let Some(upstream) = self.upstreams.get(index).copied() else { continue };
            let mut answer = self.ask_one(upstream, question, true, counters).await;
            if matches!(&answer, Ok(response) if NO_EDNS.contains(&response.code())) {
                answer = self.ask_one(upstream, question, false, counters).await;
            }
            match answer {
                Ok(response) if response.is_answer() => {
                    self.first.store(index, Relaxed);
                    let response = Arc::new(response);
                    lock(&self.cache).insert(key.into(), Arc::clone(&response), Instant::now());
                    return Some(response);
                }
                Ok(response) => error = Some(Arc::new(response)),
                Err(reason) => {
                    tracing::debug!("the upstream DNS server {upstream} does not answer: {reason}")
                }
            }
            counters.upstream_failures.add();
        }
        error
    }

    /// Asks one server, over UDP and, when the answer does not fit, over TCP.
    async fn ask_one(
        &self,
        upstream: SocketAddr,
        question: &Question,
        with_edns: bool,
        counters: &CounterCells,
    ) -> io::Result<Response> {
        let id = rand::random();
        let query = question.query(id, with_edns);
        let over_udp = over_udp(upstream, &query, counters);
        let message = timeout(self.timeout, over_udp).await??;
        let is_truncated = message.get(2).is_some_and(|flags| flags & 2 != 0);
        let message = match is_truncated {
            true => timeout(self.timeout, over_tcp(upstream, &query)).await??,
            false => message,
        };
        let end = wire::HEADER + question.bytes.len();
        Response::parse(&message, end).ok_or_else(|| io::Error::other("its answer is malformed"))
    }
}

async fn over_udp(upstream: SocketAddr, query: &[u8], counters: &CounterCells) -> io::Result<Vec<u8>> {
    let any: IpAddr = match upstream {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(upstream).await?;
    socket.send(query).await?;
    let mut buffer = vec![0; 4096];
    loop {
        let length = socket.recv(&mut buffer).await?;
        let message = buffer.get(..length).unwrap_or_default();
        if answers(message, query) {
            buffer.truncate(length);
            return Ok(buffer);
        }
        counters.upstream_mismatches.add();
    }
}

async fn over_tcp(upstream: SocketAddr, query: &[u8]) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(upstream).await?;
    let length = u16::try_from(query.len()).map_err(io::Error::other)?;
    stream.write_all(&[&length.to_be_bytes(), query].concat()).await?;
    let length = stream.read_u16().await?;
    let mut message = vec![0; usize::from(length)];
    stream.read_exact(&mut message).await?;
    if answers(&message, query) { Ok(message) } else { Err(io::Error::other("it answers another question")) }
}

/// Whether `message` is a response to `query`: the identifier, the operation and the question.
fn answers(message: &[u8], query: &[u8]) -> bool {
    let (Some(asked), Some(answered)) = (wire::question(query), wire::question(message)) else {
        return false;
    };
    let is_response = message.get(2).is_some_and(|flags| flags & 0xf8 == 0x80);
    let is_same = |range: std::ops::Range<usize>| match (message.get(range.clone()), query.get(range)) {
        (Some(a), Some(b)) => a.eq_ignore_ascii_case(b),
        _ => false,
    };
    let same_id = message.first_chunk::<2>() == query.first_chunk();
    is_response && same_id && wire::u16_at(message, 4) == Some(1) && asked == answered && is_same(asked)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
