//! Measures HTTP ports of the proxy of services on loopback, beside direct connections: the time of a GET over a kept connection, requests per
//! second of many clients, and one large response.
//!
//! `cargo run --release -p overlay-agent --example measure_http_proxy`

#![allow(clippy::unwrap_used, reason = "a measurement that fails has no result")]

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Read, Write},
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
const ROUNDS: usize = 7;
/// Requests for the time of one.
const REQUESTS: usize = 3000;
/// Clients at once, and how long.
const CLIENTS: usize = 16;
const TIME: Duration = Duration::from_millis(500);
/// Bytes of a large response, and of a small one.
const LARGE: usize = 512 << 20;
const SMALL: usize = 512;

/// Reads the lines of a header. Returns the path of a request, and the length of a body.
fn head(stream: &mut BufReader<TcpStream>) -> Option<(String, usize)> {
    let (mut path, mut length) = (None, 0);
    loop {
        let mut line = String::new();
        if stream.read_line(&mut line).ok()? == 0 {
            return None;
        }
        let line = line.trim_end().to_lowercase();
        if line.is_empty() {
            return Some((path?, length));
        }
        if let Some(value) = line.strip_prefix("content-length: ") {
            length = value.parse().unwrap();
        }
        path = path.or_else(|| line.split(' ').nth(1).map(str::to_owned));
    }
}

fn serve(stream: TcpStream) {
    stream.set_nodelay(true).unwrap();
    let mut stream = BufReader::new(stream);
    let block = vec![7; 1 << 18];
    while let Some((path, _)) = head(&mut stream) {
        let length = if path == "/large" { LARGE } else { SMALL };
        let mut answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n").into_bytes();
        answer.resize(answer.len() + length.min(SMALL), 7);
        let mut left = length - length.min(SMALL);
        if stream.get_mut().write_all(&answer).is_err() {
            return;
        }
        while left > 0 {
            let part = block.get(..left.min(block.len())).unwrap_or_default();
            if stream.get_mut().write_all(part).is_err() {
                return;
            }
            left -= part.len();
        }
    }
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

fn connect(to: SocketAddrV4) -> BufReader<TcpStream> {
    let stream = TcpStream::connect(to).unwrap();
    stream.set_nodelay(true).unwrap();
    BufReader::with_capacity(1 << 18, stream)
}

fn get(stream: &mut BufReader<TcpStream>, path: &str, buffer: &mut [u8]) {
    let request = format!("GET {path} HTTP/1.1\r\nHost: web.shop\r\n\r\n");
    stream.get_mut().write_all(request.as_bytes()).unwrap();
    let (_, mut left) = head(stream).unwrap();
    while left > 0 {
        let most = left.min(buffer.len());
        let length = stream.read(buffer.get_mut(..most).unwrap_or_default()).unwrap();
        assert!(length > 0, "the response breaks off");
        left -= length;
    }
}

/// Seconds of a GET: the median and the 99th percentile.
fn latency(to: SocketAddrV4) -> (f64, f64) {
    let (mut stream, mut buffer) = (connect(to), vec![0; SMALL]);
    let mut times = Vec::with_capacity(REQUESTS);
    for _ in 0..REQUESTS {
        let start = Instant::now();
        get(&mut stream, "/small", &mut buffer);
        times.push(start.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    let at = |place: usize| times.get(place).copied().unwrap_or_default();
    (at(REQUESTS / 2), at(REQUESTS * 99 / 100))
}

/// Requests per second.
fn rate(to: SocketAddrV4) -> f64 {
    let start = Instant::now();
    let clients = (0..CLIENTS).map(|_| {
        thread::spawn(move || {
            let (mut stream, mut buffer) = (connect(to), vec![0; SMALL]);
            let mut requests = 0_u32;
            while start.elapsed() < TIME {
                get(&mut stream, "/small", &mut buffer);
                requests += 1;
            }
            requests
        })
    });
    let clients: Vec<_> = clients.collect();
    let requests: u32 = clients.into_iter().map(|client| client.join().unwrap()).sum();
    f64::from(requests) / start.elapsed().as_secs_f64()
}

/// Bytes per second.
fn throughput(to: SocketAddrV4) -> f64 {
    let (mut stream, mut buffer) = (connect(to), vec![0; 1 << 18]);
    let start = Instant::now();
    get(&mut stream, "/large", &mut buffer);
    LARGE as f64 / start.elapsed().as_secs_f64()
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}

fn catalog(vip: SocketAddrV4, endpoint: SocketAddrV4) -> Catalog {
    let ports = format!(r#"{{"v":1,"ports":[{{"name":"p","port":{},"app":"http"}}]}}"#, vip.port());
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
    let vip = SocketAddrV4::new(Ipv4Addr::new(127, 99, 0, 2), 7080);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let proxy = runtime.block_on(async {
        let proxy = Proxy::start(Options::default());
        proxy.reconcile(&catalog(vip, endpoint), &Rules::default()).await;
        assert!(proxy.problems().is_empty(), "{:?}", proxy.problems());
        proxy
    });
    let measure = |to| {
        let (p50, p99) = latency(to);
        [p50, p99, rate(to), throughput(to)]
    };
    let rounds: Vec<_> = (0..ROUNDS).map(|_| [measure(endpoint), measure(vip)]).collect();
    for (place, name) in ["direct", "proxy"].into_iter().enumerate() {
        let of =
            |value: usize| median(rounds.iter().filter_map(|round| round.get(place)?.get(value).copied()));
        let (p50, p99, rate, stream) = (of(0) * 1e6, of(1) * 1e6, of(2), of(3) * 8.0 / 1e9);
        println!(
            "{name:7} GET {p50:6.1} us (p99 {p99:6.1} us), {CLIENTS} clients {rate:8.0}/s, one response {stream:6.2} Gbit/s"
        );
    }
    runtime.block_on(proxy.stop());
}
