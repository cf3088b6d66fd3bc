//! How the agent fares, for machines: `/healthz` and `/readyz` over HTTP.

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

/// Most connections at a time. One more ends the oldest: whoever opens connections and says nothing must not keep others
/// from asking.
const CONNECTIONS: usize = 32;

/// How the agent fares. Texts are for people: what is wrong and, where there is one, the remedy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Health {
    /// Whether lease, device, datapath and first snapshot are there, else what is missing.
    pub ready: Result<(), String>,
    /// Whether packets move and will go on to, else why not.
    pub healthy: Result<(), String>,
    /// What is wrong but does no harm yet, such as an etcd that is away.
    pub degraded: Option<String>,
}

impl Health {
    /// An agent that has just been started.
    pub fn starting() -> Self {
        Self { ready: Err("starting".to_owned()), healthy: Ok(()), degraded: None }
    }
}

/// One line: the worst there is to say.
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

/// What the agent's main loop said last. A loop that hangs says nothing: then it is not what holds.
#[derive(Clone, Debug)]
pub struct Report {
    health: Health,
    at: Instant,
}

impl Report {
    /// A report of now.
    pub fn now(health: Health) -> Self {
        Self { health, at: Instant::now() }
    }

    /// What was said.
    pub const fn health(&self) -> &Health {
        &self.health
    }

    /// Puts a new report in the place of this one. `true` when it says something else.
    pub fn renew(&mut self, health: Health) -> bool {
        let news = self.health != health;
        *self = Self::now(health);
        news
    }

    /// What holds now.
    fn holds(&self, limits: Limits) -> Health {
        let limit = if self.health.ready.is_ok() { limits.ready } else { limits.starting };
        let silence = self.at.elapsed();
        let why = || format!("the agent's main loop has not been heard of for {} s", silence.as_secs());
        match silence > limit {
            true => Health { healthy: Err(why()), ..self.health.clone() },
            false => self.health.clone(),
        }
    }
}

/// How long things may take.
#[derive(Clone, Copy, Debug)]
struct Limits {
    /// The main loop's silence once the agent is ready: it then reports every 5 s.
    ready: Duration,
    /// Its silence until then: it reports at every attempt to reach the store, and those are up to 70 s apart.
    starting: Duration,
    /// One connection: a question and its answer.
    connection: Duration,
}

const LIMITS: Limits = Limits {
    ready: Duration::from_secs(30),
    starting: Duration::from_secs(120),
    connection: Duration::from_secs(5),
};

/// A server that listens and does not answer yet.
#[derive(Debug)]
pub struct HealthServer {
    listener: TcpListener,
    address: SocketAddr,
    limits: Limits,
}

impl HealthServer {
    /// Listens.
    ///
    /// # Errors
    ///
    /// When the address cannot be listened at, with the flags that choose it.
    pub async fn listen(address: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind(address).await.with_context(|| {
            format!("listen for /healthz at {address}: choose another --healthz-ip or --healthz-port")
        })?;
        let address = listener.local_addr().context("read the address of /healthz")?;
        Ok(Self { listener, address, limits: LIMITS })
    }

    /// Where it listens.
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// Answers, until the sender of the reports is gone.
    pub async fn serve(self, mut reports: watch::Receiver<Report>) {
        info!("/healthz and /readyz at http://{}", self.address);
        let mut open = VecDeque::new();
        loop {
            let stream = tokio::select! {
                accepted = self.listener.accept() => accepted,
                () = closed(&mut reports) => return,
            };
            match stream {
                Ok((stream, _)) => {
                    make_room(&mut open);
                    let conversation = converse(stream, reports.clone(), self.limits);
                    open.push_back(tokio::spawn(conversation).abort_handle());
                }
                Err(error) => {
                    warn!("cannot accept a connection to /healthz: {error}");
                    // Out of file descriptors, most likely: trying at once would only burn the CPU.
                    sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }
}

/// Forgets the connections that ended, and ends the oldest of those that are too many. The oldest come first.
fn make_room(open: &mut VecDeque<AbortHandle>) {
    open.retain(|connection| !connection.is_finished());
    while open.len() >= CONNECTIONS
        && let Some(oldest) = open.pop_front()
    {
        oldest.abort();
    }
}

/// Waits until the sender is gone.
async fn closed(reports: &mut watch::Receiver<Report>) {
    while reports.changed().await.is_ok() {}
}

async fn converse(stream: TcpStream, reports: watch::Receiver<Report>, limits: Limits) {
    let service = service_fn(move |request: Request<Incoming>| {
        let health = reports.borrow().holds(limits);
        let answer = answer(request.method(), request.uri().path(), &health);
        async move { Ok::<_, Infallible>(answer) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.connection)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    match timeout(limits.connection, connection).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => debug!("a connection to /healthz failed: {error}"),
        Err(_) => debug!("a connection to /healthz lasted too long"),
    }
}

fn answer(method: &Method, path: &str, health: &Health) -> Response<Full<Bytes>> {
    let (status, text) = match (path, method) {
        ("/healthz" | "/readyz", &Method::GET | &Method::HEAD) => {
            let well = health.healthy.is_ok() && (path == "/healthz" || health.ready.is_ok());
            let text = match well && health.ready.is_err() {
                // Alive, and on the way.
                true => format!("ok, {health}"),
                false => health.to_string(),
            };
            (if well { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, text)
        }
        ("/healthz" | "/readyz", _) => (StatusCode::METHOD_NOT_ALLOWED, "use GET".to_owned()),
        _ => (StatusCode::NOT_FOUND, "there are /healthz and /readyz".to_owned()),
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

    /// Longer than anything here takes on a busy machine.
    const GENEROUS: Duration = Duration::from_secs(30);

    async fn ask(address: SocketAddr, request: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(format!("{request} HTTP/1.1\r\nhost: x\r\n\r\n").as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    /// Status code and body.
    async fn get(address: SocketAddr, path: &str) -> (u16, String) {
        let answer = ask(address, &format!("GET {path}")).await;
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
    }

    async fn start() -> (SocketAddr, watch::Sender<Report>, tokio::task::JoinHandle<()>) {
        start_with(LIMITS).await
    }

    async fn start_with(limits: Limits) -> (SocketAddr, watch::Sender<Report>, tokio::task::JoinHandle<()>) {
        let mut server = HealthServer::listen("127.0.0.1:0".parse().unwrap()).await.unwrap();
        server.limits = limits;
        let (sender, receiver) = watch::channel(Report::now(Health::starting()));
        (server.address(), sender, tokio::spawn(server.serve(receiver)))
    }

    fn well() -> Health {
        Health { ready: Ok(()), healthy: Ok(()), degraded: None }
    }

    #[tokio::test]
    async fn answers_follow_the_agents_health() {
        let (address, sender, server) = start().await;
        assert_eq!(get(address, "/healthz").await, (200, "ok, not ready: starting\n".to_owned()));
        assert_eq!(get(address, "/readyz").await, (503, "not ready: starting\n".to_owned()));

        sender.send_replace(Report::now(well()));
        for path in ["/healthz", "/readyz", "/readyz?verbose"] {
            assert_eq!(get(address, path).await, (200, "ok\n".to_owned()), "{path}");
        }

        sender.send_replace(Report::now(Health { degraded: Some("etcd is away".to_owned()), ..well() }));
        for path in ["/healthz", "/readyz"] {
            assert_eq!(get(address, path).await, (200, "degraded: etcd is away\n".to_owned()), "{path}");
        }

        sender
            .send_replace(Report::now(Health { healthy: Err("the datapath is down".to_owned()), ..well() }));
        for path in ["/healthz", "/readyz"] {
            assert_eq!(
                get(address, path).await,
                (503, "unhealthy: the datapath is down\n".to_owned()),
                "{path}"
            );
        }
        drop(sender);
        timeout(GENEROUS, server).await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn other_questions_are_refused_and_nonsense_does_no_harm() {
        let (address, _sender, _server) = start().await;
        assert_eq!(get(address, "/metrics").await.0, 404);
        assert!(ask(address, "POST /healthz").await.starts_with("HTTP/1.1 405"));
        let head = ask(address, "HEAD /healthz").await;
        assert!(head.starts_with("HTTP/1.1 200") && head.ends_with("\r\n\r\n"), "{head}");
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(&[0xff; 4096]).await.unwrap();
        let _silent = TcpStream::connect(address).await.unwrap();
        assert_eq!(get(address, "/healthz").await.0, 200);
    }

    #[tokio::test]
    async fn silent_connections_keep_nobody_from_asking() {
        // So that no place becomes free because a connection's time has passed.
        let limits = Limits { connection: Duration::from_secs(3600), ..LIMITS };
        let (address, _sender, _server) = start_with(limits).await;
        let mut silent = Vec::new();
        for _ in 0..CONNECTIONS + 8 {
            silent.push(TcpStream::connect(address).await.unwrap());
        }
        assert_eq!(timeout(GENEROUS, get(address, "/healthz")).await.unwrap().0, 200);
        // The oldest made room; the newest is still there.
        assert_eq!(timeout(GENEROUS, silent[0].read(&mut [0])).await.unwrap().unwrap(), 0);
        let newest = silent.last_mut().unwrap();
        newest.write_all(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        timeout(GENEROUS, newest.read_to_string(&mut answer)).await.unwrap().unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }

    #[tokio::test]
    async fn connections_are_bounded() {
        let mut open = VecDeque::new();
        let tasks: Vec<_> = (0..3 * CONNECTIONS)
            .map(|_| {
                make_room(&mut open);
                let task = tokio::spawn(std::future::pending::<()>());
                open.push_back(task.abort_handle());
                task
            })
            .collect();
        assert_eq!(open.len(), CONNECTIONS);
        let (ended, kept) = tasks.split_at(2 * CONNECTIONS);
        while !ended.iter().all(tokio::task::JoinHandle::is_finished) {
            tokio::task::yield_now().await;
        }
        assert!(kept.iter().all(|task| !task.is_finished()));
        make_room(&mut open);
        assert!(open.len() < CONNECTIONS);
    }

    #[tokio::test]
    async fn a_main_loop_that_is_silent_is_not_healthy() {
        let limits = Limits { ready: Duration::ZERO, starting: Duration::from_secs(3600), ..LIMITS };
        let (address, sender, _server) = start_with(limits).await;
        assert_eq!(get(address, "/healthz").await.0, 200, "a start may take longer");
        sender.send_replace(Report::now(well()));
        for path in ["/healthz", "/readyz"] {
            let (code, text) = get(address, path).await;
            assert!(code == 503 && text.contains("main loop has not been heard of for"), "{code} {text}");
        }
    }

    #[test]
    fn a_report_says_how_old_it_is() {
        let aged = |health: Health, seconds| {
            let at = Instant::now().checked_sub(Duration::from_secs(seconds)).unwrap();
            Report { health, at }
        };
        assert_eq!(aged(well(), 20).holds(LIMITS), well());
        let why = "the agent's main loop has not been heard of for 31 s";
        assert_eq!(aged(well(), 31).holds(LIMITS).healthy, Err(why.to_owned()));
        assert_eq!(aged(Health::starting(), 31).holds(LIMITS), Health::starting());
        assert!(aged(Health::starting(), 121).holds(LIMITS).healthy.is_err());
        // The same word again is no news, but a sign of life.
        let mut report = aged(well(), 31);
        assert!(!report.renew(well()));
        assert_eq!(report.holds(LIMITS), well());
        assert!(report.renew(Health::starting()));
    }

    #[tokio::test]
    async fn an_address_in_use_is_refused_with_the_flags_that_choose_it() {
        let (address, _sender, _server) = start().await;
        let error = HealthServer::listen(address).await.unwrap_err();
        assert!(error.to_string().contains("--healthz-port"), "{error}");
    }
}
