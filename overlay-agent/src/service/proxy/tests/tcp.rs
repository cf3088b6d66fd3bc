//! Bytes of TCP connections, and their ends.

use std::{io, net::SocketAddrV4, sync::Arc, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::mpsc,
    time::{Instant, timeout},
};

use super::stage::*;
use crate::service::proxy::Options;

const MIB: usize = 1 << 20;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_arrive_unchanged_both_ways_at_once() {
    let (request, reply) = (Arc::new(bytes(6 * MIB + 1, 1)), Arc::new(bytes(5 * MIB + 7, 2)));
    let (expected, to_send) = (Arc::clone(&request), Arc::clone(&reply));
    let server = Server::start(move |mut stream| {
        let (expected, to_send) = (Arc::clone(&expected), Arc::clone(&to_send));
        async move {
            let (mut from, mut to) = stream.split();
            let mut received = Vec::new();
            let (sent, read) = tokio::join!(
                async {
                    to.write_all(&to_send).await?;
                    to.shutdown().await
                },
                from.read_to_end(&mut received)
            );
            assert!(sent.is_ok() && read.is_ok());
            // The client sees that as a missing end.
            assert!(received == *expected);
        }
    })
    .await;
    let spec = Spec::tcp(&[server.address]);
    let proxy = proxy(Options::default(), std::slice::from_ref(&spec)).await;
    let mut stream = tokio::net::TcpStream::connect(spec.address()).await.unwrap();
    let (mut from, mut to) = stream.split();
    let mut received = Vec::new();
    let (sent, read) = tokio::join!(
        async {
            to.write_all(&request).await?;
            to.shutdown().await
        },
        from.read_to_end(&mut received)
    );
    sent.unwrap();
    read.unwrap();
    assert!(received == *reply);
    eventually("the connection is closed", || total(&proxy).open == 0).await;
    let counts = total(&proxy);
    assert_eq!((counts.connections, counts.failures), (1, 0));
    assert_eq!(counts.bytes_to_endpoints, request.len() as u64);
    assert_eq!(counts.bytes_to_clients, reply.len() as u64);
    assert_eq!(proxy.counters().open_connections, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reply_arrives_after_the_end_of_the_request() {
    let server = Server::start(|mut stream| async move {
        let mut request = Vec::new();
        stream.read_to_end(&mut request).await.unwrap();
        request.reverse();
        stream.write_all(&request).await.unwrap();
    })
    .await;
    let spec = Spec::tcp(&[server.address]);
    let _proxy = proxy(Options::default(), std::slice::from_ref(&spec)).await;
    let mut request = bytes(3 * MIB, 3);
    let mut stream = tokio::net::TcpStream::connect(spec.address()).await.unwrap();
    stream.write_all(&request).await.unwrap();
    stream.shutdown().await.unwrap();
    let mut reply = Vec::new();
    stream.read_to_end(&mut reply).await.unwrap();
    request.reverse();
    assert!(reply == request);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_arrives_after_the_end_of_the_reply() {
    let (sender, mut arrived) = mpsc::unbounded_channel();
    let server = Server::start(move |mut stream| {
        let sender = sender.clone();
        async move {
            stream.write_all(b"reply").await.unwrap();
            stream.shutdown().await.unwrap();
            let mut request = Vec::new();
            stream.read_to_end(&mut request).await.unwrap();
            sender.send(request).unwrap();
        }
    })
    .await;
    let spec = Spec::tcp(&[server.address]);
    let _proxy = proxy(Options::default(), std::slice::from_ref(&spec)).await;
    let mut stream = tokio::net::TcpStream::connect(spec.address()).await.unwrap();
    let mut reply = Vec::new();
    stream.read_to_end(&mut reply).await.unwrap();
    assert_eq!(reply, b"reply");
    let request = bytes(2 * MIB, 4);
    stream.write_all(&request).await.unwrap();
    stream.shutdown().await.unwrap();
    assert!(timeout(Duration::from_secs(5), arrived.recv()).await.unwrap().unwrap() == request);
}

#[tokio::test]
async fn a_reset_of_one_side_resets_the_other() {
    let (sender, mut ends) = mpsc::unbounded_channel();
    let server = Server::start(move |mut stream| {
        let sender = sender.clone();
        async move {
            // 'r' asks for a reset.
            match stream.read_u8().await {
                Ok(b'r') => stream.set_zero_linger().unwrap(),
                Ok(_) => {
                    stream.write_all(b"x").await.unwrap();
                    sender.send(stream.read_u8().await.unwrap_err().kind()).unwrap();
                }
                Err(_) => {}
            }
        }
    })
    .await;
    let spec = Spec::tcp(&[server.address]);
    let _proxy = proxy(Options::default(), std::slice::from_ref(&spec)).await;
    let mut stream = tokio::net::TcpStream::connect(spec.address()).await.unwrap();
    stream.write_all(b"r").await.unwrap();
    assert_eq!(stream.read_u8().await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);

    let mut stream = tokio::net::TcpStream::connect(spec.address()).await.unwrap();
    stream.write_all(b"x").await.unwrap();
    stream.read_u8().await.unwrap();
    stream.set_zero_linger().unwrap();
    drop(stream);
    let end = timeout(Duration::from_secs(5), ends.recv()).await.unwrap().unwrap();
    assert_eq!(end, io::ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn an_endpoint_that_cannot_be_reached_is_passed_over() {
    let server = Server::named(7).await;
    let spec = Spec::tcp(&[dead(), server.address, dead()]);
    let proxy = proxy(Options::default(), std::slice::from_ref(&spec)).await;
    for _ in 0..9 {
        let (mut stream, name) = connect(spec.address()).await.unwrap();
        assert_eq!(name, 7);
        exchange(&mut stream).await.unwrap();
    }
    let counters = proxy.counters();
    let service = counters.services.values().next().unwrap();
    assert_eq!((service.total.connections, service.total.failures), (9, 0));
    // Three turns each: the first one fails alone, the third one and then the first.
    let failures = |address: SocketAddrV4| {
        service.endpoints.iter().find(|endpoint| endpoint.address == address).unwrap().counts.failures
    };
    assert_eq!(failures(spec.endpoints[0].0), 6);
    assert_eq!(failures(spec.endpoints[2].0), 3);
    assert_eq!(failures(server.address), 0);
}

#[tokio::test]
async fn without_an_endpoint_a_connection_is_reset() {
    let spec = Spec::tcp(&[dead(), dead()]);
    let empty = Spec { name: "shop/empty".to_owned(), ..Spec::tcp(&[]) };
    let proxy = proxy(Options::default(), &[spec.clone(), empty.clone()]).await;
    for address in [spec.address(), empty.address()] {
        let error = connect(address).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "{error}");
    }
    assert_eq!(total(&proxy).failures, 1);
    assert_eq!(proxy.counters().services[&"shop/empty".parse().unwrap()].total.failures, 1);
}

#[tokio::test]
async fn at_most_three_endpoints_are_tried() {
    let server = Server::named(1).await;
    let spec = Spec::tcp(&[dead(), dead(), dead(), server.address]).with(r#","lb":{"policy":"round_robin"}"#);
    let _proxy = proxy(Options::default(), std::slice::from_ref(&spec)).await;
    assert_eq!(connect(spec.address()).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    assert_eq!(name(spec.address()).await, 1);
}

#[tokio::test]
async fn an_endpoint_that_does_not_answer_costs_the_timeout_only() {
    // A listener whose queue is full drops further connections silently.
    let silent = tokio::net::TcpSocket::new_v4().unwrap();
    silent.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let silent = silent.listen(0).unwrap();
    let address: SocketAddrV4 = silent.local_addr().unwrap().to_string().parse().unwrap();
    let _fill = tokio::net::TcpStream::connect(address).await.unwrap();
    let _more: Vec<_> = (0..3).map(|_| tokio::spawn(tokio::net::TcpStream::connect(address))).collect();
    tokio::time::sleep(Duration::from_millis(50)).await;

    let server = Server::named(1).await;
    let spec = Spec::tcp(&[address, server.address]);
    let options = Options { connect_timeout: Duration::from_millis(200), ..Options::default() };
    let _proxy = proxy(options, std::slice::from_ref(&spec)).await;
    let start = Instant::now();
    assert_eq!(name(spec.address()).await, 1);
    let elapsed = start.elapsed();
    // The kernel gives up after two minutes.
    assert!((Duration::from_millis(200)..Duration::from_secs(30)).contains(&elapsed), "{elapsed:?}");
}

#[tokio::test]
async fn a_connection_to_a_virtual_address_is_refused() {
    let spec = Spec::tcp(&[]);
    let endpoints = vec![(spec.address(), 1, crate::service::record::EndpointState::Ready)];
    let looping = Spec { endpoints, ..spec };
    let proxy = crate::service::proxy::Proxy::start(Options::default());
    apply(&proxy, std::slice::from_ref(&looping)).await;
    assert_eq!(connect(looping.address()).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    assert_eq!(total(&proxy).connections, 0);
    let problems = proxy.problems();
    assert!(problems.len() == 1 && problems[0].reason.contains("is a virtual address"), "{problems:?}");
}

#[tokio::test]
async fn the_endpoint_is_told_the_client() {
    let (sender, mut headers) = mpsc::unbounded_channel();
    let server = Server::start(move |mut stream| {
        let sender = sender.clone();
        async move {
            let mut begin = [0; 28 + 5];
            stream.read_exact(&mut begin).await.unwrap();
            sender.send(begin).unwrap();
            stream.write_all(b"r").await.unwrap();
        }
    })
    .await;
    let spec = Spec { port_record: r#","proxy_protocol":true"#, ..Spec::tcp(&[server.address]) };
    let proxy = proxy(Options::default(), std::slice::from_ref(&spec)).await;
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind("127.0.9.8:0".parse().unwrap()).unwrap();
    let mut stream = socket.connect(spec.address().into()).await.unwrap();
    stream.write_all(b"hello").await.unwrap();
    let begin = timeout(Duration::from_secs(5), headers.recv()).await.unwrap().unwrap();
    let mut expected =
        b"\x0d\x0a\x0d\x0a\x00\x0d\x0a\x51\x55\x49\x54\x0a\x21\x11\x00\x0c\x7f\x00\x09\x08".to_vec();
    expected.extend(spec.vip.octets());
    expected.extend(stream.local_addr().unwrap().port().to_be_bytes());
    expected.extend(PORT.to_be_bytes());
    expected.extend(b"hello");
    assert_eq!(begin.as_slice(), expected);
    assert_eq!(stream.read_u8().await.unwrap(), b'r');
    // The header is no payload.
    eventually("the bytes are counted", || total(&proxy).bytes_to_endpoints == 5).await;
}
