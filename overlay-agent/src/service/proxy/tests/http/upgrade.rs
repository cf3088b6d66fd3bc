//! Upgrades to other protocols: tunnels through the proxy.

use hyper::StatusCode;
use tokio::time::{Instant, sleep};

use super::*;

/// An endpoint that switches to a protocol in which all bytes come back, and sends `hello` at once.
async fn switching() -> HttpServer {
    HttpServer::start(|mut request| async move {
        if request.headers().get("upgrade").is_none_or(|protocol| protocol != "echo") {
            return Response::builder().status(StatusCode::UPGRADE_REQUIRED).body(full("")).unwrap();
        }
        let upgrade = hyper::upgrade::on(&mut request);
        tokio::spawn(async move {
            let mut stream = TokioIo::new(upgrade.await.unwrap());
            stream.write_all(b"hello").await.unwrap();
            let mut buffer = vec![0; 1 << 16];
            while let Ok(length @ 1..) = stream.read(&mut buffer).await {
                if stream.write_all(&buffer[..length]).await.is_err() {
                    return;
                }
            }
            let _ = stream.shutdown().await;
        });
        let response = Response::builder().status(StatusCode::SWITCHING_PROTOCOLS);
        response.header("connection", "Upgrade").header("upgrade", "echo").body(full("")).unwrap()
    })
    .await
}

/// Begins a tunnel. `early` follows the request without a pause.
async fn begin(to: SocketAddrV4, early: &[u8]) -> TcpStream {
    let mut stream = TcpStream::connect(to).await.unwrap();
    let request = b"GET /chat HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n";
    stream.write_all(&[request, early].concat()).await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(timeout(SOON, stream.read_u8()).await.unwrap().unwrap());
    }
    let head = String::from_utf8(head).unwrap().to_lowercase();
    assert!(head.starts_with("http/1.1 101 switching protocols\r\n"), "{head}");
    assert!(head.contains("upgrade: echo\r\n") && head.contains("connection: upgrade\r\n"), "{head}");
    let mut hello = [0; 5];
    timeout(SOON, stream.read_exact(&mut hello)).await.unwrap().unwrap();
    assert_eq!(&hello, b"hello");
    stream
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_pass_both_ways_after_an_upgrade() {
    let server = switching().await;
    let spec = http(&[server.server.address]);
    let proxy = proxy(Options::default(), std::slice::from_ref(&spec)).await;
    let mut stream = begin(spec.address(), b"early").await;
    let mut early = [0; 5];
    timeout(SOON, stream.read_exact(&mut early)).await.unwrap().unwrap();
    assert_eq!(&early, b"early");
    for _ in 0..3 {
        exchange(&mut stream).await.unwrap();
    }
    assert_eq!((total(&proxy).open, counts(&proxy).status_1xx), (1, 1));
    stream.shutdown().await.unwrap();
    assert_eq!(rest(&mut stream).await, "");
    eventually("the tunnel has ended", || total(&proxy).open == 0).await;
    assert_eq!(total(&proxy).bytes_to_endpoints, 5 + 3000);
    eventually("the place is free", || proxy.counters().open_connections == 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tunnel_ends_with_its_endpoint() {
    let server = switching().await;
    let mut spec = http(&[server.server.address]);
    let drain = Duration::from_millis(300);
    let proxy = proxy(Options { drain, ..Options::default() }, std::slice::from_ref(&spec)).await;
    let mut stream = begin(spec.address(), b"").await;
    spec.endpoints.clear();
    apply(&proxy, std::slice::from_ref(&spec)).await;
    let start = Instant::now();
    while exchange(&mut stream).await.is_ok() {
        sleep(Duration::from_millis(5)).await;
    }
    assert!((drain * 3 / 4..drain * 4).contains(&start.elapsed()), "{:?}", start.elapsed());
}

#[tokio::test]
async fn a_refused_upgrade_is_a_response_like_others() {
    let server = switching().await;
    let spec = http(&[server.server.address]);
    let _proxy = proxy(Options::default(), std::slice::from_ref(&spec)).await;
    let mut client = HttpClient::connect(spec.address()).await;
    for protocol in ["other", "h2c"] {
        let reply = client.get_with("/", &[("connection", "upgrade"), ("upgrade", protocol)]).await;
        assert_eq!(reply.status, 426, "{protocol}");
    }
}
