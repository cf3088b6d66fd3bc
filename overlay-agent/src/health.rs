//! Reports the agent's health over HTTP: `/healthz` and `/readyz`.

use std::{collections::VecDeque, convert::Infallible, fmt, net::SocketAddr, time::Duration};

use anyhow::{Context as _, Result};
use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Incoming},
    header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, HeaderValue},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
    task::AbortHandle,
    time::{Instant, sleep, timeout},
};
use tracing::{debug, info, warn};

/// Longest age of a report once the agent is ready: it reports every 5 s.
const MAX_AGE: Duration = Duration::from_secs(30);
/// Longest age of a report before: the agent reports at each attempt to reach the store, up to 70 s apart.
const MAX_STARTING_AGE: Duration = Duration::from_secs(120);

/// Limit of a connection: one request and its response.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(5);
/// Limit of connections. One more closes the oldest, so that idle connections do not lock out other clients.
const MAX_CONNECTIONS: usize = 32;

/// Health of the agent. The texts describe the problem and, where there is one, the remedy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Health {
    /// Whether the agent has lease, device, datapath and first snapshot, else what is missing.
    pub ready: Result<(), String>,
    /// Whether packets are forwarded and will be, else why not.
    pub healthy: Result<(), String>,
    /// Problems that do not affect forwarding yet, such as an unreachable etcd.
    pub degraded: Option<String>,
}

impl Health {
    /// Health of an agent that was just started.
    pub fn starting() -> Self {
        Self { ready: Err("starting".to_owned()), healthy: Ok(()), degraded: None }
    }
}

/// One line with the most severe state.
impl fmt::Display for Health {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self { healthy: Err(why), .. } => write!(f, "unhealthy: {why}"),
            Self { ready: Err(why), .. } => write!(f, "not ready: {why}"),
            Self { degraded: Some(why), .. } => write!(f, "degraded: {why}"),
            Self { ready: Ok(()), healthy: Ok(()), degraded: None } => write!(f, "ok"),
        }
    }
}

/// The last report of the agent's main loop. It becomes stale when the main loop hangs.
#[derive(Clone, Debug)]
pub struct Report {
    health: Health,
    at: Instant,
}

impl Report {
    /// A report as of now.
    pub fn now(health: Health) -> Self {
        Self { health, at: Instant::now() }
    }

    /// The reported health.
    pub const fn health(&self) -> &Health {
        &self.health
    }

    /// Replaces the report by one as of now. `true` when the health changed.
    pub fn update(&mut self, health: Health) -> bool {
        let changed = self.health != health;
        *self = Self::now(health);
        changed
    }

    /// The health as of now: unhealthy when the report is stale.
    fn current(&self) -> Health {
        let limit = if self.health.ready.is_ok() { MAX_AGE } else { MAX_STARTING_AGE };
        let (age, mut health) = (self.at.elapsed(), self.health.clone());
        if age > limit {
            health.healthy = Err(format!("the agent's main loop has not reported for {} s", age.as_secs()));
        }
        health
    }
}

/// A listening server that does not accept connections yet.
#[derive(Debug)]
pub struct HealthServer {
    listener: TcpListener,
    address: SocketAddr,
    connection_timeout: Duration,
}

impl HealthServer {
    /// Listens at `address`. When that fails, the error names the flags.
    pub async fn listen(address: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind(address).await.with_context(|| {
            format!("listen for /healthz at {address}: choose another --healthz-ip or --healthz-port")
        })?;
        let address = listener.local_addr().context("read the address of /healthz")?;
        Ok(Self { listener, address, connection_timeout: CONNECTION_TIMEOUT })
    }

    /// Serves requests until the sender of the reports is dropped.
    pub async fn serve(self, mut reports: watch::Receiver<Report>) {
        info!("/healthz and /readyz at http://{}", self.address);
        let mut open = VecDeque::new();
        loop {
            let accepted = tokio::select! {
                accepted = self.listener.accept() => accepted,
                // Until the sender is dropped.
                () = async { while reports.changed().await.is_ok() {} } => return,
            };
            match accepted {
                Ok((stream, _)) => {
                    make_room(&mut open);
                    let connection = serve_connection(stream, reports.clone(), self.connection_timeout);
                    open.push_back(tokio::spawn(connection).abort_handle());
                }
                Err(error) => {
                    warn!("accept a connection to /healthz: {error}");
                    // Most likely out of file descriptors.
                    sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }
}

/// Forgets connections that ended, and aborts the oldest, at the front, if there are too many.
fn make_room(open: &mut VecDeque<AbortHandle>) {
    open.retain(|connection| !connection.is_finished());
    while open.len() >= MAX_CONNECTIONS
        && let Some(oldest) = open.pop_front()
    {
        oldest.abort();
    }
}

async fn serve_connection(stream: TcpStream, reports: watch::Receiver<Report>, limit: Duration) {
    let service = service_fn(move |request: Request<Incoming>| {
        let health = reports.borrow().current();
        let answer = answer(request.method(), request.uri().path(), &health);
        async move { Ok::<_, Infallible>(answer) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limit)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    match timeout(limit, connection).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => debug!("a connection to /healthz failed: {error}"),
        Err(_) => debug!("a connection to /healthz lasted too long"),
    }
}

fn answer(method: &Method, path: &str, health: &Health) -> Response<Full<Bytes>> {
    let (status, text) = match (path, method) {
        ("/healthz" | "/readyz", &Method::GET | &Method::HEAD) => {
            let ok = health.healthy.is_ok() && (path == "/healthz" || health.ready.is_ok());
            let text = match ok && health.ready.is_err() {
                true => format!("ok, {health}"),
                false => health.to_string(),
            };
            (if ok { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, text)
        }
        ("/healthz" | "/readyz", _) => (StatusCode::METHOD_NOT_ALLOWED, "use GET".to_owned()),
        _ => (StatusCode::NOT_FOUND, "not found: use /healthz or /readyz".to_owned()),
    };
    let mut response = Response::new(Full::new(Bytes::from(format!("{text}\n"))));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    if status == StatusCode::METHOD_NOT_ALLOWED {
        headers.insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
    }
    response
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    /// Ample time on a busy machine.
    const TIMEOUT: Duration = Duration::from_secs(30);

    async fn connect(address: SocketAddr) -> TcpStream {
        TcpStream::connect(address).await.unwrap()
    }

    async fn ask(mut stream: TcpStream, request: &str) -> String {
        stream.write_all(format!("{request} HTTP/1.1\r\nhost: x\r\n\r\n").as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    /// Status code and body.
    async fn get(address: SocketAddr, path: &str) -> (u16, String) {
        let answer = ask(connect(address).await, &format!("GET {path}")).await;
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
    }

    async fn start() -> (SocketAddr, watch::Sender<Report>, tokio::task::JoinHandle<()>) {
        start_with(CONNECTION_TIMEOUT).await
    }

    async fn start_with(limit: Duration) -> (SocketAddr, watch::Sender<Report>, tokio::task::JoinHandle<()>) {
        let mut server = HealthServer::listen("127.0.0.1:0".parse().unwrap()).await.unwrap();
        server.connection_timeout = limit;
        let (sender, receiver) = watch::channel(Report::now(Health::starting()));
        (server.address, sender, tokio::spawn(server.serve(receiver)))
    }

    fn healthy() -> Health {
        Health { ready: Ok(()), healthy: Ok(()), degraded: None }
    }

    #[tokio::test]
    async fn responses_follow_the_agents_health() {
        let (address, sender, server) = start().await;
        assert_eq!(get(address, "/healthz").await, (200, "ok, not ready: starting\n".to_owned()));
        assert_eq!(get(address, "/readyz").await, (503, "not ready: starting\n".to_owned()));

        for (health, code, text) in [
            (healthy(), 200, "ok\n"),
            (
                Health { degraded: Some("etcd is unreachable".to_owned()), ..healthy() },
                200,
                "degraded: etcd is unreachable\n",
            ),
            (
                Health { healthy: Err("the datapath is down".to_owned()), ..healthy() },
                503,
                "unhealthy: the datapath is down\n",
            ),
        ] {
            sender.send_replace(Report::now(health));
            for path in ["/healthz", "/readyz", "/readyz?verbose"] {
                assert_eq!(get(address, path).await, (code, text.to_owned()), "{path}");
            }
        }
        drop(sender);
        timeout(TIMEOUT, server).await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn other_requests_are_refused_and_garbage_does_no_harm() {
        let (address, _sender, _server) = start().await;
        assert_eq!(get(address, "/metrics").await.0, 404);
        assert!(ask(connect(address).await, "POST /healthz").await.starts_with("HTTP/1.1 405"));
        let head = ask(connect(address).await, "HEAD /healthz").await;
        assert!(head.starts_with("HTTP/1.1 200") && head.ends_with("\r\n\r\n"), "{head}");
        let mut stream = connect(address).await;
        stream.write_all(&[0xff; 4096]).await.unwrap();
        let _idle = connect(address).await;
        assert_eq!(get(address, "/healthz").await.0, 200);
    }

    #[tokio::test]
    async fn idle_connections_do_not_block_others() {
        // Without this, connections would also be closed by their timeout.
        let (address, _sender, _server) = start_with(Duration::from_secs(3600)).await;
        let mut idle = Vec::new();
        for _ in 0..MAX_CONNECTIONS + 8 {
            idle.push(connect(address).await);
        }
        assert_eq!(timeout(TIMEOUT, get(address, "/healthz")).await.unwrap().0, 200);
        // The oldest was closed, the newest is open.
        assert_eq!(timeout(TIMEOUT, idle[0].read(&mut [0])).await.unwrap().unwrap(), 0);
        let newest = idle.pop().unwrap();
        let answer = timeout(TIMEOUT, ask(newest, "GET /healthz")).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }

    #[tokio::test]
    async fn connections_are_bounded() {
        let (mut open, mut tasks) = (VecDeque::new(), Vec::new());
        for _ in 0..3 * MAX_CONNECTIONS {
            make_room(&mut open);
            tasks.push(tokio::spawn(std::future::pending::<()>()));
            open.push_back(tasks.last().unwrap().abort_handle());
        }
        assert_eq!(open.len(), MAX_CONNECTIONS);
        let (ended, kept) = tasks.split_at(2 * MAX_CONNECTIONS);
        while !ended.iter().all(tokio::task::JoinHandle::is_finished) {
            tokio::task::yield_now().await;
        }
        assert!(kept.iter().all(|task| !task.is_finished()));
        make_room(&mut open);
        assert!(open.len() < MAX_CONNECTIONS);
    }

    fn aged(health: Health, seconds: u64) -> Report {
        Report { health, at: Instant::now().checked_sub(Duration::from_secs(seconds)).unwrap() }
    }

    #[tokio::test]
    async fn a_main_loop_that_stops_reporting_is_unhealthy() {
        let (address, sender, _server) = start().await;
        sender.send_replace(aged(Health::starting(), 31));
        assert_eq!(get(address, "/healthz").await.0, 200, "a start may take longer");
        sender.send_replace(aged(healthy(), 31));
        for path in ["/healthz", "/readyz"] {
            let (code, text) = get(address, path).await;
            assert!(code == 503 && text.contains("main loop has not reported for"), "{code} {text}");
        }
    }

    #[test]
    fn an_old_report_is_unhealthy() {
        assert_eq!(aged(healthy(), 20).current(), healthy());
        let why = "the agent's main loop has not reported for 31 s";
        assert_eq!(aged(healthy(), 31).current().healthy, Err(why.to_owned()));
        assert_eq!(aged(Health::starting(), 31).current(), Health::starting());
        assert!(aged(Health::starting(), 121).current().healthy.is_err());
        // An unchanged report is no change, but resets the age.
        let mut report = aged(healthy(), 31);
        assert!(!report.update(healthy()));
        assert_eq!(report.current(), healthy());
        assert!(report.update(Health::starting()));
    }

    #[tokio::test]
    async fn an_address_in_use_is_refused_with_the_flags_that_choose_it() {
        let (address, _sender, _server) = start().await;
        let error = HealthServer::listen(address).await.unwrap_err();
        assert!(error.to_string().contains("--healthz-port"), "{error}");
    }
}
