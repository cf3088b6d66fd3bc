//! One check of an endpoint: a connection to each of its ports, or a request.

use std::{future::pending, io, net::SocketAddr, time::Duration};

use http_body_util::{BodyExt as _, Empty};
use hyper::{
    Request,
    body::{Bytes, Incoming},
    client::conn::http1,
    header::{CONNECTION, HOST, USER_AGENT},
};
use hyper_util::rt::TokioIo;
use tokio::{io::AsyncWriteExt as _, net::TcpStream, time::timeout};

use super::plan::{Probe, Target};
use crate::service::{proxy::header, record::CheckKind};

/// Most bytes of the head of a response.
const MAX_HEAD: usize = 16 << 10;
/// Most header fields of a response.
const MAX_FIELDS: usize = 100;
/// Most bytes of the body of a response.
const MAX_BODY: usize = 1 << 20;

impl Probe {
    /// Checks the endpoint once. The error is why it does not pass; it does not take longer than the check may.
    pub(super) async fn run(&self) -> Result<(), String> {
        let limit = Duration::from_millis(u64::from(self.check.timeout_ms));
        let attempts = async {
            for target in &self.targets {
                let attempt = async {
                    match self.check.kind {
                        CheckKind::Tcp => connect(*target).await.map(drop).map_err(|error| error.to_string()),
                        CheckKind::Http => get(*target, self.check.path.as_deref().unwrap_or("/")).await,
                    }
                };
                attempt.await.map_err(|why| format!("{}: {why}", target.address))?;
            }
            Ok(())
        };
        let late = |_| Err(format!("no answer within {} ms", self.check.timeout_ms));
        timeout(limit, attempts).await.unwrap_or_else(late)
    }
}

async fn connect(target: Target) -> io::Result<TcpStream> {
    let mut stream = TcpStream::connect(target.address).await?;
    // The kernel can give the socket the port that it connects to: then it is connected to itself.
    if stream.local_addr()? == SocketAddr::V4(target.address) {
        return Err(io::ErrorKind::ConnectionRefused.into());
    }
    if target.proxy_protocol {
        stream.write_all(&header::local()).await?;
    }
    Ok(stream)
}

/// Requests a path, and reads the whole response.
async fn get(target: Target, path: &str) -> Result<(), String> {
    let stream = connect(target).await.map_err(|error| error.to_string())?;
    let mut client = http1::Builder::new();
    client.max_buf_size(MAX_HEAD).max_headers(MAX_FIELDS);
    let (mut sender, connection) =
        client.handshake(TokioIo::new(stream)).await.map_err(|error| explain(&error))?;
    let request = Request::get(path)
        .header(HOST, target.address.to_string())
        .header(USER_AGENT, concat!("overlay-agent/", env!("CARGO_PKG_VERSION")))
        .header(CONNECTION, "close")
        .body(Empty::<Bytes>::new())
        .map_err(|error| error.to_string())?;
    let exchange = async {
        let response = sender.send_request(request).await.map_err(|error| explain(&error))?;
        let status = response.status();
        if !(status.is_success() || status.is_redirection()) {
            return Err(format!("GET {path}: status {}", status.as_u16()));
        }
        read_body(response.into_body()).await
    };
    // It ends with the response, of which parts may still wait to be read.
    let connection = async {
        let _ = connection.await;
        pending::<()>().await
    };
    tokio::select! {
        result = exchange => result,
        () = connection => Err("the connection ended".to_owned()),
    }
}

async fn read_body(mut body: Incoming) -> Result<(), String> {
    let mut length = 0;
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| explain(&error))?;
        length += frame.data_ref().map_or(0, Bytes::len);
        if length > MAX_BODY {
            return Err(format!("the body has more than {} KiB", MAX_BODY >> 10));
        }
    }
    Ok(())
}

/// The text of an error with its causes.
fn explain(error: &hyper::Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::{
        net::{Ipv4Addr, SocketAddrV4},
        time::Instant,
    };

    use tokio::{io::AsyncReadExt as _, net::TcpListener};

    use super::*;

    fn probe(check: &str, targets: &[SocketAddrV4]) -> Probe {
        let targets = targets.iter().map(|address| Target { address: *address, proxy_protocol: false });
        Probe { check: serde_json::from_str(check).unwrap(), targets: targets.collect() }
    }

    async fn listen() -> (TcpListener, SocketAddrV4) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let SocketAddr::V4(address) = listener.local_addr().unwrap() else { unreachable!() };
        (listener, address)
    }

    async fn read_request(stream: &mut TcpStream) -> io::Result<()> {
        let mut request = Vec::new();
        while !request.ends_with(b"\r\n\r\n") {
            request.push(stream.read_u8().await?);
        }
        Ok(())
    }

    /// A server that reads a request and answers these bytes; `forever` repeats them until the client is gone.
    async fn server(answer: &[u8], forever: bool) -> SocketAddrV4 {
        let (listener, address) = listen().await;
        let answer = answer.to_vec();
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let answer = answer.clone();
                tokio::spawn(async move {
                    read_request(&mut stream).await?;
                    loop {
                        stream.write_all(&answer).await?;
                        if !forever {
                            return stream.shutdown().await;
                        }
                    }
                });
            }
        });
        address
    }

    const HTTP: &str = r#"{"kind":"http","path":"/healthz?full=1","timeout_ms":500}"#;

    #[tokio::test]
    async fn every_port_has_to_accept() {
        let (_first, up) = listen().await;
        let (closed, down) = listen().await;
        drop(closed);
        let tcp = r#"{"kind":"tcp"}"#;
        assert_eq!(probe(tcp, &[up, up]).run().await, Ok(()));
        let why = probe(tcp, &[up, down]).run().await.unwrap_err();
        assert!(why.contains(&down.to_string()) && why.contains("refused"), "{why}");
    }

    #[tokio::test]
    async fn the_status_decides() {
        for (status, passes) in
            [(200, true), (204, true), (301, true), (399, true), (400, false), (500, false)]
        {
            let answer = format!("HTTP/1.1 {status} X\r\ncontent-length: 0\r\n\r\n");
            let result = probe(HTTP, &[server(answer.as_bytes(), false).await]).run().await;
            assert_eq!(result.is_ok(), passes, "{status}: {result:?}");
            if let Err(why) = result {
                assert!(why.contains(&format!("GET /healthz?full=1: status {status}")), "{why}");
            }
        }
    }

    #[tokio::test]
    async fn the_request_is_one_that_servers_take() {
        let (listener, address) = listen().await;
        let asked = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = vec![0; 4096];
            let length = stream.read(&mut request).await.unwrap();
            // Without a length: the end of the connection ends the body.
            stream.write_all(b"HTTP/1.0 200 OK\r\n\r\nfine").await.unwrap();
            String::from_utf8(request[..length].to_vec()).unwrap()
        });
        assert_eq!(probe(HTTP, &[address]).run().await, Ok(()));
        let request = asked.await.unwrap();
        let mut lines = request.split("\r\n");
        assert_eq!(lines.next(), Some("GET /healthz?full=1 HTTP/1.1"));
        let fields: Vec<_> = lines.take_while(|line| !line.is_empty()).collect();
        assert!(
            fields.contains(&format!("host: {address}").as_str()) && fields.contains(&"connection: close")
        );
    }

    #[tokio::test]
    async fn a_port_with_the_proxy_protocol_gets_its_header() {
        let (listener, address) = listen().await;
        let begun = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut header = [0; 16];
            stream.read_exact(&mut header).await.unwrap();
            read_request(&mut stream).await.unwrap();
            stream.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").await.unwrap();
            header
        });
        let mut probe = probe(HTTP, &[address]);
        probe.targets[0].proxy_protocol = true;
        assert_eq!(probe.run().await, Ok(()));
        assert_eq!(begun.await.unwrap(), header::local());
    }

    #[tokio::test]
    async fn silence_and_endless_data_do_not_pass() {
        let (_silent, silent) = listen().await;
        let head = "HTTP/1.1 200 OK\r\n\r\n";
        for (what, address, words) in [
            ("silence", silent, "no answer within 500 ms"),
            ("an endless body", server(&[head.as_bytes(), &[b'x'; 8192]].concat(), true).await, "1024 KiB"),
            ("an endless field", server(b"HTTP/1.1 200 OK\r\nx: y", true).await, ""),
            ("endless fields", server(b"HTTP/1.1 200 OK\r\nx: y\r\nx: z\r\n", true).await, ""),
            ("an endless first line", server(b"HTTP/1.1 200 OK", true).await, ""),
            ("no HTTP", server(b"SSH-2.0-OpenSSH_9.9\r\n", false).await, ""),
            ("a bad status", server(b"HTTP/1.1 99 X\r\n\r\n", false).await, ""),
            ("nothing", server(b"", false).await, ""),
            ("half a head", server(b"HTTP/1.1 200 OK\r\nx: ", false).await, ""),
            ("half a body", server(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nab", false).await, ""),
            (
                "a bad chunk",
                server(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", false).await,
                "",
            ),
        ] {
            let started = Instant::now();
            let why = probe(HTTP, &[address]).run().await.expect_err(what);
            assert!(why.contains(words), "{what}: {why}");
            assert!(started.elapsed() < Duration::from_secs(5), "{what} took {:?}", started.elapsed());
        }
    }

    #[tokio::test]
    async fn a_body_that_trickles_times_out() {
        let (listener, address) = listen().await;
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            read_request(&mut stream).await.unwrap();
            stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
            while stream.write_all(b"x").await.is_ok() {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        });
        let why = probe(HTTP, &[address]).run().await.unwrap_err();
        assert!(why.contains("no answer within 500 ms"), "{why}");
    }

    /// A listener whose queue is full answers no further connection.
    #[tokio::test]
    async fn a_port_that_does_not_accept_times_out() {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let listener = socket.listen(1).unwrap();
        let SocketAddr::V4(address) = listener.local_addr().unwrap() else { unreachable!() };
        let mut waiting = Vec::new();
        for _ in 0..8 {
            waiting.extend(timeout(Duration::from_millis(100), TcpStream::connect(address)).await);
        }
        let why = probe(r#"{"kind":"tcp","timeout_ms":200}"#, &[address]).run().await.unwrap_err();
        assert!(why.contains("no answer within 200 ms"), "{why}");
        drop((waiting, listener));
    }
}
