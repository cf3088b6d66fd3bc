//! Requests that are none, and generated ones: the proxy answers or closes, and passes on nothing that it does not understand.

use proptest::{
    prelude::*,
    test_runner::{Config, TestRunner},
};
use tokio::sync::mpsc;

use super::*;

/// An endpoint that reports the first bytes of each connection, up to the end of the header, and answers.
async fn recorder() -> (Server, mpsc::UnboundedReceiver<String>) {
    let (sender, receiver) = mpsc::unbounded_channel();
    let server = Server::start(move |mut stream| {
        let sender = sender.clone();
        async move {
            let mut received = Vec::new();
            let mut buffer = [0; 4096];
            while let Ok(length @ 1..) = stream.read(&mut buffer).await {
                received.extend_from_slice(&buffer[..length]);
                if received.windows(4).any(|end| end == b"\r\n\r\n") {
                    let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
                    let _ = stream.write_all(answer).await;
                    // What else arrives in a moment.
                    while let Ok(Ok(length @ 1..)) =
                        timeout(Duration::from_millis(20), stream.read(&mut buffer)).await
                    {
                        received.extend_from_slice(&buffer[..length]);
                    }
                    break;
                }
            }
            let _ = sender.send(String::from_utf8_lossy(&received).into_owned());
        }
    });
    (server.await, receiver)
}

#[tokio::test]
async fn what_is_no_request_is_refused_and_not_passed_on() {
    let (server, mut seen) = recorder().await;
    let spec = http(&[server.address]);
    let _proxy = proxy(Options::default(), std::slice::from_ref(&spec)).await;
    let long = format!("GET / HTTP/1.1\r\nHost: a\r\nX: {}\r\n\r\n", "a".repeat(100_000));
    let many = format!("GET / HTTP/1.1\r\nHost: a\r\n{}\r\n", "X: a\r\n".repeat(200));
    for (request, status) in [
        ("GET / HTTP/1.1\r\n\r\n", "400"),
        ("GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", "400"),
        ("GET / HTTP/1.1\r\nHost: a b\r\n\r\n", "400"),
        ("GET / HTTP/1.1\r\nHost : a\r\n\r\n", "400"),
        ("GET / HTTP/1.1\r\nHost: a\r\n folded: b\r\n\r\n", "400"),
        ("GET / HTTP/1.1\r\nHost: a\r\nX\0: b\r\n\r\n", "400"),
        ("GET / HTTP/1.1\r\nHost: a\r\nX: b\0\r\n\r\n", "400"),
        ("GET  / HTTP/1.1\r\nHost: a\r\n\r\n", "400"),
        ("GET / HTTP/2.0\r\nHost: a\r\n\r\n", "400"),
        ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", ""),
        ("\x16\x03\x01\x02\x00\x01\x00\x01\r\n\r\n", "400"),
        ("CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\n\r\n", "501"),
        ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab", "400"),
        ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n", "400"),
        ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +1\r\n\r\na", "400"),
        ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0x1\r\n\r\na", "400"),
        ("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n", "400"),
        ("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, gzip\r\n\r\n", "400"),
        ("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", "501"),
        (
            "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            "501",
        ),
        ("POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "400"),
        (&long, "431"),
        (&many, "431"),
        (&format!("GET /{} HTTP/1.1\r\nHost: a\r\n\r\n", "a".repeat(70_000)), "4"),
    ] {
        // A server that closes after a failure closes by itself; the others are told to.
        let request = request.replacen("Host: a\r\n", "Host: a\r\nConnection: close\r\n", 1);
        let reply = raw(spec.address(), request.as_bytes()).await;
        let begin = &request[..request.len().min(80)];
        assert!(
            reply.starts_with(&format!("HTTP/1.1 {status}")) || status.is_empty(),
            "{begin:?}: {reply:?}"
        );
    }
    assert!(seen.try_recv().is_err(), "something was passed on");
    assert_eq!(get(&spec, "/").await.status, 200);
}

/// A request with two lengths is passed on with one, and ends its connection (RFC 9112 section 6.1): what follows it is not taken for a
/// request, neither by the proxy nor by the endpoint.
#[tokio::test]
async fn nothing_is_smuggled_behind_a_request_with_two_lengths() {
    for headers in [
        "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n",
        "Transfer-Encoding: chunked\r\nContent-Length: 4\r\n",
    ] {
        let (server, mut seen) = recorder().await;
        let spec = http(&[server.address]);
        let proxy = proxy(Options::default(), std::slice::from_ref(&spec)).await;
        let request = format!(
            "POST / HTTP/1.1\r\nHost: a\r\n{headers}\r\n0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"
        );
        let reply = raw(spec.address(), request.as_bytes()).await;
        assert_eq!(reply.matches("HTTP/1.1 ").count(), 1, "{reply}");
        let passed = timeout(SOON, seen.recv()).await.unwrap().unwrap();
        assert!(passed.to_lowercase().contains("transfer-encoding: chunked\r\n"), "{passed}");
        assert!(
            !passed.to_lowercase().contains("content-length") && !passed.contains("smuggled"),
            "{passed}"
        );
        assert_eq!(counts(&proxy).requests, 1);
    }
}

#[tokio::test]
async fn a_body_that_breaks_is_no_complete_request() {
    let (sender, mut bodies) = mpsc::unbounded_channel();
    let server = HttpServer::start(move |request| {
        let sender = sender.clone();
        async move {
            let body = request.into_body().collect().await;
            sender.send(body.is_ok()).unwrap();
            Response::new(full(""))
        }
    })
    .await;
    let spec = http(&[server.server.address]);
    let proxy = proxy(Options::default(), std::slice::from_ref(&spec)).await;
    let head = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
    for body in ["3\r\nabc\r\nzz\r\n", "3\r\nabcd\r\n", "ffffffffffffffffff\r\n", "3\r\nab"] {
        let mut stream = TcpStream::connect(spec.address()).await.unwrap();
        stream.write_all(format!("{head}{body}").as_bytes()).await.unwrap();
        stream.shutdown().await.unwrap();
        let reply = rest(&mut stream).await;
        assert!(!reply.contains(" 200 "), "{body:?}: {reply}");
        if let Ok(complete) = timeout(Duration::from_secs(1), bodies.recv()).await {
            assert_eq!(complete, Some(false), "{body:?}");
        }
    }
    let endpoints = proxy.counters().services.values().next().unwrap().endpoints.clone();
    assert_eq!(endpoints[0].counts.failures, 0, "the endpoint has not failed");
}

#[tokio::test]
async fn responses_that_are_none_are_502() {
    for answer in [
        "",
        "nonsense\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        "HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n",
        "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: a\r\n\r\n",
        "HTTP/1.1 20 OK\r\n\r\n",
        "HTTP/1.1 200 OK\r\nX: \0\r\n\r\n",
    ] {
        let server = Server::start(move |mut stream| async move {
            let _ = stream.read(&mut [0; 4096]).await;
            let _ = stream.write_all(answer.as_bytes()).await;
        })
        .await;
        let spec = http(&[server.address]);
        let _proxy = proxy(Options::default(), std::slice::from_ref(&spec)).await;
        let reply = get(&spec, "/").await;
        assert!(reply.status == 502 && reply.text().contains("shop/web"), "{answer:?}: {reply:?}");
    }
}

#[tokio::test]
async fn a_response_with_two_lengths_is_passed_on_with_one() {
    let server = Server::start(|mut stream| async move {
        let _ = stream.read(&mut [0; 4096]).await;
        let answer =
            "HTTP/1.1 200 OK\r\nContent-Length: 99\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n";
        let _ = stream.write_all(answer.as_bytes()).await;
    })
    .await;
    let spec = http(&[server.address]);
    let _proxy = proxy(Options::default(), std::slice::from_ref(&spec)).await;
    let reply = get(&spec, "/").await;
    assert_eq!((reply.text(), reply.head.headers.get("content-length")), ("ok", None));
}

/// Pieces of requests, in any order.
fn request() -> impl Strategy<Value = Vec<u8>> {
    let piece = prop_oneof![
        4 => prop::sample::select(&[
            "GET / HTTP/1.1\r\n", "POST /a HTTP/1.1\r\n", "GET / HTTP/1.0\r\n", "OPTIONS * HTTP/1.1\r\n", "Host: a\r\n", "Host: ",
            "\r\n", "\n", "Content-Length: 3\r\n", "Content-Length: 0\r\n", "Transfer-Encoding: chunked\r\n", "Connection: close\r\n",
            "Connection: upgrade\r\n", "Upgrade: websocket\r\n", "Expect: 100-continue\r\n", "3\r\nabc\r\n", "0\r\n\r\n", "abc",
            "X-A: b\r\n", " ", "\t", ":", "\0", "\r",
        ][..]).prop_map(|piece| piece.as_bytes().to_vec()),
        1 => prop::collection::vec(any::<u8>(), 0..12),
    ];
    let pieces = prop::collection::vec(piece, 0..14);
    (any::<bool>(), pieces).prop_map(|(is_begun, pieces)| {
        let begin: &[u8] = if is_begun { b"POST / HTTP/1.1\r\nHost: a\r\n" } else { b"" };
        [begin, &pieces.concat()].concat()
    })
}

#[test]
fn generated_requests_end_or_are_answered() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (spec, server, proxy) = runtime.block_on(async {
        let server = HttpServer::named(0).await;
        let spec = http(&[server.server.address]);
        let limits = Limits { header_timeout: Duration::from_millis(500), ..Limits::default() };
        let proxy = proxy(Options { http: limits, ..Options::default() }, std::slice::from_ref(&spec)).await;
        (spec, server, proxy)
    });
    let mut runner = TestRunner::new(Config { cases: 400, failure_persistence: None, ..Config::default() });
    let result = runner.run(&request(), |bytes| {
        let reply = runtime.block_on(async {
            let mut stream = TcpStream::connect(spec.address()).await.unwrap();
            let _ = stream.write_all(&bytes).await;
            let _ = stream.shutdown().await;
            rest(&mut stream).await
        });
        prop_assert!(reply.is_empty() || reply.starts_with("HTTP/1."), "{:?}", reply);
        Ok(())
    });
    result.unwrap();
    runtime.block_on(async {
        assert_eq!(get(&spec, "/").await.name(), 0);
        eventually("nothing is left", || total(&proxy).open == 0 && proxy.counters().open_connections <= 1)
            .await;
    });
    drop(server);
}
