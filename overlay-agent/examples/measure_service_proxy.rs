//! Measures the proxy of services on loopback, beside direct connections: one TCP stream, and the time for a connection with one byte
//! there and back.
//!
//! `cargo run --release -p overlay-agent --example measure_service_proxy`

#![allow(clippy::unwrap_used, reason = "a measurement that fails has no result")]

use std::{
    collections::BTreeMap,
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use overlay_agent::service::{
    Catalog,
    catalog::{Endpoint, Service},
    front::Rules,
    proxy::{Options, Proxy},
};

/// Rounds, of which the median counts.
const ROUNDS: usize = 9;
/// Bytes of a stream.
const STREAM: usize = 1 << 30;
/// Connections of a round.
const CONNECTIONS: usize = 2000;

/// 's' as the first byte asks to count a stream, anything else is sent back.
fn serve(mut stream: TcpStream) {
    stream.set_nodelay(true).unwrap();
    let mut first = [0];
    if stream.read_exact(&mut first).is_err() {
        return;
    }
    if first != *b"s" {
        let _ = stream.write_all(&first);
        return;
    }
    let mut buffer = vec![0; 1 << 17];
    let mut total: u64 = 0;
    loop {
        match stream.read(&mut buffer) {
            Ok(0) | Err(_) => break,
            Ok(length) => total += length as u64,
        }
    }
    let _ = stream.write_all(&total.to_be_bytes());
}

fn server() -> SocketAddrV4 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let SocketAddr::V4(address) = listener.local_addr().unwrap() else { unreachable!("bound to IPv4") };
    thread::spawn(move || {
        for stream in listener.incoming() {
            let stream = stream.unwrap();
            thread::spawn(move || serve(stream));
        }
    });
    address
}

/// Bytes per second.
fn throughput(to: SocketAddrV4) -> f64 {
    let mut stream = TcpStream::connect(to).unwrap();
    let block = vec![5; 1 << 17];
    let start = Instant::now();
    stream.write_all(b"s").unwrap();
    for _ in 0..STREAM / block.len() {
        stream.write_all(&block).unwrap();
    }
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut total = [0; 8];
    stream.read_exact(&mut total).unwrap();
    assert_eq!(u64::from_be_bytes(total), STREAM as u64, "bytes are missing");
    STREAM as f64 / start.elapsed().as_secs_f64()
}

/// Seconds for a connection and a byte there and back: the median and the 99th percentile.
fn latency(to: SocketAddrV4) -> (f64, f64) {
    let mut times = Vec::with_capacity(CONNECTIONS);
    for _ in 0..CONNECTIONS {
        let start = Instant::now();
        let mut stream = TcpStream::connect(to).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.write_all(b"x").unwrap();
        stream.read_exact(&mut [0]).unwrap();
        times.push(start.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    let at = |place: usize| times.get(place).copied().unwrap_or_default();
    (at(CONNECTIONS / 2), at(CONNECTIONS * 99 / 100))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}

fn catalog(vip: SocketAddrV4, endpoint: SocketAddrV4) -> Catalog {
    let ports = format!(r#"{{"v":1,"ports":[{{"name":"p","port":{},"protocol":"tcp"}}]}}"#, vip.port());
    let spec = format!(r#"{{"overlay_ip":"127.0.0.1","ports":{{"p":{}}}}}"#, endpoint.port());
    let endpoint = Endpoint::new("shop/web/node/1".parse().unwrap(), serde_json::from_str(&spec).unwrap());
    let service = Service {
        name: "shop/web".parse().unwrap(),
        spec: serde_json::from_str(&ports).unwrap(),
        vip: Some(*vip.ip()),
        endpoints: vec![endpoint],
    };
    Catalog { services: BTreeMap::from([(service.name.clone(), Arc::new(service))]), skipped: Vec::new() }
}

fn main() {
    let endpoint = server();
    let vip = SocketAddrV4::new(Ipv4Addr::new(127, 99, 0, 1), 7080);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let proxy = runtime.block_on(async {
        let proxy = Proxy::start(Options::default());
        proxy.reconcile(&catalog(vip, endpoint), &Rules::default()).await;
        assert!(proxy.problems().is_empty(), "{:?}", proxy.problems());
        proxy
    });
    let (mut direct, mut proxied) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        direct.push((throughput(endpoint), latency(endpoint)));
        proxied.push((throughput(vip), latency(vip)));
        thread::sleep(Duration::from_millis(100));
    }
    for (name, rounds) in [("direct", &direct), ("proxy", &proxied)] {
        let stream = median(rounds.iter().map(|round| round.0).collect()) * 8.0 / 1e9;
        let p50 = median(rounds.iter().map(|round| round.1.0).collect()) * 1e6;
        let p99 = median(rounds.iter().map(|round| round.1.1).collect()) * 1e6;
        println!("{name:7} {stream:6.2} Gbit/s, connection and byte {p50:6.1} us (p99 {p99:6.1} us)");
    }
    let ratios = |of: fn(&(f64, (f64, f64))) -> f64| {
        median(proxied.iter().zip(&direct).map(|(proxied, direct)| of(proxied) / of(direct)).collect())
    };
    println!("ratio   {:.2} of the stream, {:.2} times the latency", ratios(|r| r.0), ratios(|r| r.1.0));
    runtime.block_on(proxy.stop());
}
