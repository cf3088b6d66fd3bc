//! How the agent fares, for machines: `/healthz` and `/readyz` over HTTP.

use std::{convert::Infallible, fmt, net::SocketAddr, sync::Arc, time::Duration};

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
    sync::{Semaphore, watch},
    time::{sleep, timeout},
};
use tracing::{debug, info, warn};

/// How long one connection may last: a question and its answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// Most connections at a time; more wait.
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

/// A server that listens and does not answer yet.
#[derive(Debug)]
pub struct HealthServer {
    listener: TcpListener,
    address: SocketAddr,
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
        Ok(Self { listener, address })
    }

    /// Where it listens.
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// Answers, until the sender of `health` is gone.
    pub async fn serve(self, mut health: watch::Receiver<Health>) {
        info!("/healthz and /readyz at http://{}", self.address);
        let free = Arc::new(Semaphore::new(CONNECTIONS));
        loop {
            let Ok(place) = Arc::clone(&free).acquire_owned().await else { return };
            let stream = tokio::select! {
                accepted = self.listener.accept() => accepted,
                () = closed(&mut health) => return,
            };
            match stream {
                Ok((stream, _)) => {
                    let health = health.clone();
                    tokio::spawn(async move {
                        converse(stream, health).await;
                        drop(place);
                    });
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

/// Waits until the sender is gone.
async fn closed(health: &mut watch::Receiver<Health>) {
    while health.changed().await.is_ok() {}
}

async fn converse(stream: TcpStream, health: watch::Receiver<Health>) {
    let service = service_fn(move |request: Request<Incoming>| {
        let answer = answer(request.method(), request.uri().path(), &health.borrow());
        async move { Ok::<_, Infallible>(answer) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(PATIENCE)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    match timeout(PATIENCE, connection).await {
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

    async fn start() -> (SocketAddr, watch::Sender<Health>, tokio::task::JoinHandle<()>) {
        let server = HealthServer::listen("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let (sender, receiver) = watch::channel(Health::starting());
        (server.address(), sender, tokio::spawn(server.serve(receiver)))
    }

    #[tokio::test]
    async fn answers_follow_the_agents_health() {
        let (address, sender, server) = start().await;
        assert_eq!(get(address, "/healthz").await, (200, "ok, not ready: starting\n".to_owned()));
        assert_eq!(get(address, "/readyz").await, (503, "not ready: starting\n".to_owned()));

        let well = Health { ready: Ok(()), healthy: Ok(()), degraded: None };
        sender.send_replace(well.clone());
        for path in ["/healthz", "/readyz", "/readyz?verbose"] {
            assert_eq!(get(address, path).await, (200, "ok\n".to_owned()), "{path}");
        }

        sender.send_replace(Health { degraded: Some("etcd is away".to_owned()), ..well.clone() });
        for path in ["/healthz", "/readyz"] {
            assert_eq!(get(address, path).await, (200, "degraded: etcd is away\n".to_owned()), "{path}");
        }

        sender.send_replace(Health { healthy: Err("the datapath is down".to_owned()), ..well });
        for path in ["/healthz", "/readyz"] {
            assert_eq!(
                get(address, path).await,
                (503, "unhealthy: the datapath is down\n".to_owned()),
                "{path}"
            );
        }
        drop(sender);
        timeout(PATIENCE, server).await.unwrap().unwrap();
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
    async fn an_address_in_use_is_refused_with_the_flags_that_choose_it() {
        let (address, _sender, _server) = start().await;
        let error = HealthServer::listen(address).await.unwrap_err();
        assert!(error.to_string().contains("--healthz-port"), "{error}");
    }
}
