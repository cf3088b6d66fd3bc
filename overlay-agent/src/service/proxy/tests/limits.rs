//! Many connections, slow ones and idle ones.

use std::{io, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{Instant, sleep, timeout},
};

use super::stage::*;
use crate::service::proxy::Options;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_beyond_the_limit_are_refused() {
    let server = Server::named(0).await;
    let spec = Spec::tcp(&[server.address]);
    let options = Options { max_connections: 5, ..Options::default() };
    let proxy = proxy(options, std::slice::from_ref(&spec)).await;
    let mut open = Vec::new();
    for _ in 0..5 {
        open.push(connect(spec.address()).await.unwrap().0);
    }
    for _ in 0..3 {
        let error = connect(spec.address()).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "{error}");
    }
    let counters = proxy.counters();
    assert_eq!((counters.open_connections, counters.refused), (5, 3));
    for stream in &mut open {
        exchange(stream).await.unwrap();
    }
    open.pop();
    eventually("a place is free", || proxy.counters().open_connections == 4).await;
    connect(spec.address()).await.unwrap();
}

#[tokio::test]
async fn a_slow_reader_delays_no_other_connection_and_fills_no_memory() {
    // One thread, so that nothing runs beside a task that would block it.
    let server = Server::start(|mut stream| async move {
        let block = vec![7; 1 << 16];
        let length = stream.read_u32().await.unwrap();
        for _ in 0..length {
            if stream.write_all(&block).await.is_err() {
                return;
            }
        }
    })
    .await;
    let spec = Spec::tcp(&[server.address]);
    let proxy = proxy(Options::default(), std::slice::from_ref(&spec)).await;
    let mut slow = TcpStream::connect(spec.address()).await.unwrap();
    slow.write_u32(10_000).await.unwrap();
    sleep(Duration::from_millis(300)).await;
    let passed = total(&proxy).bytes_to_clients;
    sleep(Duration::from_millis(100)).await;
    // What has passed lies in the kernel's buffers: 6 MiB at most each (tcp_rmem, tcp_wmem). 655 MB are waiting.
    assert_eq!(total(&proxy).bytes_to_clients, passed);
    assert!(passed < 24 << 20, "{passed}");
    for _ in 0..20 {
        let start = Instant::now();
        let mut fast = TcpStream::connect(spec.address()).await.unwrap();
        fast.write_u32(16).await.unwrap();
        let mut received = Vec::new();
        fast.read_to_end(&mut received).await.unwrap();
        assert_eq!(received.len(), 1 << 20);
        // The slow one reads nothing meanwhile: behind it, this would take without end.
        assert!(start.elapsed() < Duration::from_secs(30), "{:?}", start.elapsed());
    }
    // The slow one still gets all that it reads.
    let mut block = vec![0; 8 << 20];
    slow.read_exact(&mut block).await.unwrap();
    assert!(block.iter().all(|byte| *byte == 7));
}

#[tokio::test]
async fn an_idle_connection_is_reset_and_one_that_moves_is_not() {
    let server = Server::named(0).await;
    let spec = Spec::tcp(&[server.address]);
    let idle = Duration::from_millis(300);
    let options = Options { tcp_idle: idle, ..Options::default() };
    let proxy = proxy(options, std::slice::from_ref(&spec)).await;
    let (mut still, _) = connect(spec.address()).await.unwrap();
    let (mut moving, _) = connect(spec.address()).await.unwrap();
    let start = Instant::now();
    let end = tokio::spawn(async move { still.read_u8().await.map_err(|error| error.kind()) });
    while start.elapsed() < idle * 3 {
        exchange(&mut moving).await.unwrap();
        sleep(idle / 10).await;
    }
    let end = timeout(Duration::from_millis(10), end).await.unwrap().unwrap();
    assert_eq!(end, Err(io::ErrorKind::ConnectionReset));
    assert_eq!(total(&proxy).open, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_connections_leave_nothing_behind() {
    let servers = Server::several(2).await;
    let spec = Spec::tcp(&addresses(&servers));
    let proxy = proxy(Options::default(), std::slice::from_ref(&spec)).await;
    let address = spec.address();
    let clients = (0..200).map(|number| async move {
        let (mut stream, _) = connect(address).await.unwrap();
        exchange(&mut stream).await.unwrap();
        if number % 3 == 0 {
            stream.set_zero_linger().unwrap();
        }
    });
    futures_util::future::join_all(clients).await;
    eventually("all are closed", || proxy.counters().open_connections == 0).await;
    let counters = proxy.counters();
    let service = counters.services.values().next().unwrap();
    assert_eq!((service.total.connections, service.total.open), (200, 0));
    assert_eq!(service.endpoints.iter().map(|endpoint| endpoint.counts.open).sum::<u64>(), 0);
    assert_eq!(service.endpoints.iter().map(|endpoint| endpoint.counts.connections).sum::<u64>(), 200);
}
