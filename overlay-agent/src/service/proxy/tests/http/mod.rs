//! HTTP ports: real clients and real endpoints.

mod balancing;
mod bodies;
mod failures;
mod malformed;
mod routing;
mod upgrade;

use std::{
    convert::Infallible,
    net::{Ipv4Addr, SocketAddr, SocketAddrV4},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use http_body_util::{BodyExt, Full, combinators::BoxBody};
use hyper::{
    Request, Response,
    body::{Bytes, Incoming},
    client::conn::http1::SendRequest,
    server::conn::http1::Builder,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    time::timeout,
};

use super::stage::*;
use crate::service::{
    proxy::{HttpCounts, Limits, Options, Proxy},
    record::Protocol,
};

type Body = BoxBody<Bytes, hyper::Error>;

const SOON: Duration = Duration::from_secs(10);

/// A service with an HTTP port.
fn http(endpoints: &[SocketAddrV4]) -> Spec {
    Spec { port_record: r#","app":"http""#, ..Spec::new(Protocol::Tcp, endpoints) }
}

fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(|never: Infallible| match never {}).boxed()
}

/// An endpoint, and the number of connections that it has accepted.
struct HttpServer {
    server: Server,
    connections: Arc<AtomicUsize>,
}

impl HttpServer {
    async fn start<F>(answer: impl Fn(Request<Incoming>) -> F + Clone + Send + Sync + 'static) -> Self
    where
        F: Future<Output = Response<Body>> + Send + 'static,
    {
        let connections = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&connections);
        let server = Server::start(move |stream| {
            let answer = answer.clone();
            counter.fetch_add(1, Ordering::Relaxed);
            async move {
                let service = service_fn(move |request| {
                    let answer = answer(request);
                    async move { Ok::<_, Infallible>(answer.await) }
                });
                let connection = Builder::new().serve_connection(TokioIo::new(stream), service);
                let _ = connection.with_upgrades().await;
            }
        });
        Self { server: server.await, connections }
    }

    /// One that answers with its name, and the request as it has arrived.
    async fn named(name: usize) -> Self {
        Self::start(move |request| async move {
            let (head, body) = request.into_parts();
            let body = body.collect().await.unwrap().to_bytes();
            let mut text = format!("{} {}\n", head.method, head.uri);
            let mut lines: Vec<String> = head
                .headers
                .iter()
                .map(|(name, value)| format!("{name}: {}\n", value.to_str().unwrap()))
                .collect();
            lines.sort();
            text.extend(lines);
            text.push('\n');
            let answer = [text.as_bytes(), &body].concat();
            Response::builder().header("x-name", name.to_string()).body(full(answer)).unwrap()
        })
        .await
    }

    async fn several(count: usize) -> Vec<Self> {
        let mut servers = Vec::new();
        for name in 0..count {
            servers.push(Self::named(name).await);
        }
        servers
    }

    fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }
}

fn http_addresses(servers: &[HttpServer]) -> Vec<SocketAddrV4> {
    servers.iter().map(|server| server.server.address).collect()
}

/// A response with its body.
#[derive(Debug)]
struct Reply {
    status: u16,
    head: hyper::http::response::Parts,
    body: Bytes,
}

impl Reply {
    /// The name of the endpoint.
    fn name(&self) -> usize {
        assert_eq!(self.status, 200, "{self:?}");
        self.head.headers["x-name"].to_str().unwrap().parse().unwrap()
    }

    fn text(&self) -> &str {
        str::from_utf8(&self.body).unwrap()
    }
}

/// A connection of a client.
struct HttpClient {
    sender: SendRequest<Body>,
}

impl HttpClient {
    async fn connect(to: SocketAddrV4) -> Self {
        Self::connect_from(Ipv4Addr::LOCALHOST, to).await
    }

    async fn connect_from(from: Ipv4Addr, to: SocketAddrV4) -> Self {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind(SocketAddr::from((from, 0))).unwrap();
        let stream = socket.connect(to.into()).await.unwrap();
        let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection.with_upgrades());
        Self { sender }
    }

    async fn send(&mut self, request: Request<Body>) -> hyper::Result<Reply> {
        self.sender.ready().await?;
        let (head, body) = self.sender.send_request(request).await?.into_parts();
        let body = body.collect().await?.to_bytes();
        Ok(Reply { status: head.status.as_u16(), head, body })
    }

    async fn get_with(&mut self, path: &str, headers: &[(&str, &str)]) -> Reply {
        let mut request = Request::builder().uri(path);
        if !headers.iter().any(|(name, _)| *name == "host") {
            request = request.header("host", "web.shop");
        }
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        timeout(SOON, self.send(request.body(full("")).unwrap())).await.unwrap().unwrap()
    }

    async fn get(&mut self, path: &str) -> Reply {
        self.get_with(path, &[]).await
    }

    async fn post(&mut self, path: &str, body: Body) -> hyper::Result<Reply> {
        let request = Request::post(path).header("host", "web.shop").body(body).unwrap();
        timeout(SOON, self.send(request)).await.unwrap()
    }
}

/// A request over a connection of its own.
async fn get(spec: &Spec, path: &str) -> Reply {
    HttpClient::connect(spec.address()).await.get(path).await
}

/// Sends bytes and returns all that comes back until the connection ends, however it ends.
async fn raw(to: SocketAddrV4, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(to).await.unwrap();
    let _ = stream.write_all(bytes).await;
    rest(&mut stream).await
}

/// All that comes until the connection ends.
async fn rest(stream: &mut TcpStream) -> String {
    let mut received = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        match timeout(SOON, stream.read(&mut buffer)).await.expect("the connection does not end") {
            Ok(0) | Err(_) => return String::from_utf8_lossy(&received).into_owned(),
            Ok(length) => received.extend_from_slice(&buffer[..length]),
        }
    }
}

/// What was counted of the requests to `shop/web`.
fn counts(proxy: &Proxy) -> HttpCounts {
    let counters = proxy.counters();
    counters.services.get(&"shop/web".parse().unwrap()).map(|counts| counts.http).unwrap_or_default()
}
