//! Bodies of requests and responses, large and slow ones.

use std::io::ErrorKind;

use http_body_util::StreamBody;
use hyper::body::Frame;
use tokio::{
    sync::mpsc,
    time::{Instant, sleep},
};

use super::*;

const MIB: usize = 1 << 20;

/// A body that is sent piece by piece. Its length is not known before its end.
fn pieces(receiver: mpsc::Receiver<Bytes>) -> Body {
    let frames = futures_util::stream::unfold(receiver, |mut receiver| async move {
        receiver.recv().await.map(|piece| (Ok(Frame::data(piece)), receiver))
    });
    BoxBody::new(StreamBody::new(
        Box::pin(frames) as std::pin::Pin<Box<dyn futures_util::Stream<Item = _> + Send + Sync>>
    ))
}

/// Sends the body back as it arrives.
async fn echo() -> HttpServer {
    HttpServer::start(|request| async move { Response::new(request.into_body().boxed()) }).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_bodies_pass_unchanged_both_ways() {
    let server = echo().await;
    let spec = http(&[server.server.address]);
    let proxy = proxy(Options::default(), std::slice::from_ref(&spec)).await;
    let mut client = HttpClient::connect(spec.address()).await;
    let sent = Bytes::from(bytes(24 * MIB + 7, 1));
    // With a length, and in chunks.
    let reply = client.post("/", full(sent.clone())).await.unwrap();
    assert!(reply.body == sent);
    let (sender, receiver) = mpsc::channel(4);
    let to_send = sent.clone();
    let sending = tokio::spawn(async move {
        for piece in to_send.chunks(70_001) {
            sender.send(Bytes::copy_from_slice(piece)).await.unwrap();
        }
    });
    let reply = client.post("/", pieces(receiver)).await.unwrap();
    assert!(reply.body == sent);
    sending.await.unwrap();
    let counted = total(&proxy);
    assert_eq!(
        (counted.bytes_to_endpoints, counted.bytes_to_clients),
        (2 * sent.len() as u64, 2 * sent.len() as u64)
    );
    assert_eq!(server.connections(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_piece_passes_at_once() {
    let server = echo().await;
    let spec = http(&[server.server.address]);
    let _proxy = proxy(Options::default(), std::slice::from_ref(&spec)).await;
    let mut client = HttpClient::connect(spec.address()).await;
    let (sender, receiver) = mpsc::channel(1);
    let request = Request::post("/").header("host", "a").body(pieces(receiver)).unwrap();
    let mut response = client.sender.send_request(request).await.unwrap();
    for number in 0..20_u8 {
        sender.send(Bytes::from(vec![number; 3])).await.unwrap();
        let frame = timeout(SOON, response.frame()).await.unwrap().unwrap().unwrap();
        assert_eq!(frame.data_ref().unwrap().as_ref(), [number; 3]);
    }
    drop(sender);
    assert!(timeout(SOON, response.frame()).await.unwrap().is_none());
}

#[tokio::test]
async fn a_get_with_a_body_in_chunks_keeps_it() {
    let server = HttpServer::named(0).await;
    let spec = http(&[server.server.address]);
    let _proxy = proxy(Options::default(), std::slice::from_ref(&spec)).await;
    let request =
        b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n";
    let reply = raw(spec.address(), request).await;
    assert!(reply.contains("transfer-encoding: chunked\n") && reply.contains("\n\nabc"), "{reply}");
}

#[tokio::test]
async fn a_slow_reader_fills_no_memory() {
    let server = HttpServer::start(|_| async move {
        let frames = futures_util::stream::repeat_with(|| Ok(Frame::data(Bytes::from_static(&[7; 1 << 16]))));
        Response::new(BoxBody::new(StreamBody::new(frames)))
    })
    .await;
    let spec = http(&[server.server.address]);
    let proxy = proxy(Options::default(), std::slice::from_ref(&spec)).await;
    let mut slow = TcpStream::connect(spec.address()).await.unwrap();
    slow.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
    sleep(Duration::from_millis(400)).await;
    let passed = total(&proxy).bytes_to_clients;
    sleep(Duration::from_millis(100)).await;
    // What has passed lies in the kernel's buffers: 6 MiB at most each.
    assert_eq!(total(&proxy).bytes_to_clients, passed);
    assert!((1..24 << 20).contains(&passed), "{passed}");
    drop(slow);
    eventually("the response has ended", || total(&proxy).open == 0).await;
}

#[tokio::test]
async fn a_client_that_waits_for_100_is_told_to_continue() {
    let server = HttpServer::named(0).await;
    let spec = http(&[server.server.address]);
    let _proxy = proxy(Options::default(), std::slice::from_ref(&spec)).await;
    let mut stream = TcpStream::connect(spec.address()).await.unwrap();
    let head = b"POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n";
    stream.write_all(head).await.unwrap();
    let mut line = [0; 25];
    timeout(SOON, stream.read_exact(&mut line)).await.unwrap().unwrap();
    assert_eq!(&line, b"HTTP/1.1 100 Continue\r\n\r\n");
    stream.write_all(b"hello").await.unwrap();
    let reply = rest(&mut stream).await;
    assert!(reply.starts_with("HTTP/1.1 200 OK") && reply.ends_with("\n\nhello"), "{reply}");
}

#[tokio::test]
async fn a_response_that_breaks_off_is_reset_and_not_taken_for_complete() {
    // The second has no length: its end is the end of the connection.
    for head in [
        "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\n",
    ] {
        let server = Server::start(move |mut stream| async move {
            let _ = stream.read(&mut [0; 1024]).await;
            stream.write_all(head.as_bytes()).await.unwrap();
            stream.write_all(b"abc").await.unwrap();
            sleep(Duration::from_millis(100)).await;
            let _ = stream.set_zero_linger();
        })
        .await;
        let spec = http(&[server.address]);
        let _proxy = proxy(Options::default(), std::slice::from_ref(&spec)).await;
        let mut stream = TcpStream::connect(spec.address()).await.unwrap();
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n").await.unwrap();
        let mut received = Vec::new();
        let error = timeout(SOON, stream.read_to_end(&mut received)).await.unwrap().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    }
}

fn impatient() -> Options {
    let limits = Limits {
        header_timeout: Duration::from_millis(300),
        response_timeout: Duration::from_millis(400),
        idle: Duration::from_millis(600),
        ..Limits::default()
    };
    Options { http: limits, ..Options::default() }
}

#[tokio::test]
async fn slow_clients_lose_their_place() {
    let server = HttpServer::named(0).await;
    let spec = http(&[server.server.address]);
    let proxy = proxy(Options { max_connections: 3, ..impatient() }, std::slice::from_ref(&spec)).await;
    let start = Instant::now();
    // Nothing; a header byte by byte; the middle of a body.
    let silent = TcpStream::connect(spec.address()).await.unwrap();
    let mut trickling = TcpStream::connect(spec.address()).await.unwrap();
    let mut stuck = TcpStream::connect(spec.address()).await.unwrap();
    stuck.write_all(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nabc").await.unwrap();
    let trickle = tokio::spawn(async move {
        for byte in b"GET / HTTP/1.1\r\nX-Slow: ".iter().chain(std::iter::repeat(&b'a')) {
            if trickling.write_all(&[*byte]).await.is_err() {
                return;
            }
            sleep(Duration::from_millis(20)).await;
        }
    });
    eventually("all places are taken", || proxy.counters().open_connections == 3).await;
    eventually("all places are free", || proxy.counters().open_connections == 0).await;
    assert!(start.elapsed() < Duration::from_secs(4), "{:?}", start.elapsed());
    timeout(SOON, trickle).await.unwrap().unwrap();
    drop((silent, stuck));
    assert_eq!(get(&spec, "/").await.name(), 0);
    assert!(counts(&proxy).status_2xx == 1);
}

#[tokio::test]
async fn a_client_that_does_not_read_loses_its_place() {
    let server = HttpServer::start(|_| async move { Response::new(full(vec![7; 64 << 20])) }).await;
    let spec = http(&[server.server.address]);
    let proxy = proxy(impatient(), std::slice::from_ref(&spec)).await;
    let mut stream = TcpStream::connect(spec.address()).await.unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
    eventually("the request is open", || total(&proxy).open == 1).await;
    eventually("the place is free", || proxy.counters().open_connections == 0).await;
    eventually("the request has ended", || total(&proxy).open == 0).await;
}

#[tokio::test]
async fn an_upload_that_moves_is_not_late() {
    let server = HttpServer::named(0).await;
    let spec = http(&[server.server.address]);
    let _proxy = proxy(impatient(), std::slice::from_ref(&spec)).await;
    let mut client = HttpClient::connect(spec.address()).await;
    let (sender, receiver) = mpsc::channel(1);
    let sending = tokio::spawn(async move {
        for _ in 0..10 {
            sleep(Duration::from_millis(100)).await;
            sender.send(Bytes::from_static(b"piece")).await.unwrap();
        }
    });
    let reply = client.post("/", pieces(receiver)).await.unwrap();
    assert!(reply.text().ends_with(&"piece".repeat(10)));
    sending.await.unwrap();
}
