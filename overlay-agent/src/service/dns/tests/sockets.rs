//! The server with clients and upstream servers on loopback.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use hickory_proto::{
    op::{Message, ResponseCode},
    rr::RecordType,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpStream, UdpSocket},
    sync::watch,
    task::JoinSet,
    time::timeout,
};

use super::{
    super::*,
    catalog, query, records, texts,
    upstream::{Behaviour, Upstream},
    with_edns, zone,
};
use crate::service::{
    Catalog,
    record::{Endpoints, Services, Vips},
};

/// Of 127.0.0.1, other programs may hold all ports.
const LOCAL: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(127, 0, 53, 1)), 0);

/// A running server.
struct Server {
    address: SocketAddr,
    statistics: Statistics,
    catalog: watch::Sender<Arc<Catalog>>,
    _task: JoinSet<anyhow::Result<()>>,
}

impl Server {
    async fn start(change: impl FnOnce(&mut Options)) -> Self {
        let mut options = Options::new(vec![LOCAL], zone());
        change(&mut options);
        let (catalog, receiver) = watch::channel(Arc::new(catalog()));
        let server = DnsServer::bind(options, receiver).await.unwrap();
        let (address, statistics) = (server.addresses()[0], server.statistics());
        let mut task = JoinSet::new();
        task.spawn(server.run());
        Self { address, statistics, catalog, _task: task }
    }

    async fn with_upstreams(behaviours: &[Behaviour]) -> (Self, Vec<Upstream>) {
        let mut upstreams = Vec::new();
        for behaviour in behaviours {
            upstreams.push(Upstream::start(*behaviour).await);
        }
        let addresses = upstreams.iter().map(|upstream| upstream.address).collect();
        let server = Self::start(|options| {
            options.upstreams = addresses;
            options.upstream_timeout = Duration::from_secs(1);
        });
        (server.await, upstreams)
    }

    /// Gives the server a catalog, and waits until it answers by it: `endpoints` is the number of addresses of `many.shop`.
    async fn update(&self, endpoints: u8) {
        self.catalog.send(Arc::new(large(endpoints))).unwrap();
        let asked = query("many.shop.svc.overlay.", RecordType::A);
        let start = Instant::now();
        while self.tcp(&asked).await.answers.len() != usize::from(endpoints) {
            assert!(start.elapsed() < Duration::from_secs(5));
        }
    }

    async fn udp(&self, message: &Message) -> Message {
        let socket = UdpSocket::bind(LOCAL).await.unwrap();
        socket.connect(self.address).await.unwrap();
        socket.send(&message.to_vec().unwrap()).await.unwrap();
        let mut buffer = vec![0; 65_535];
        let length =
            timeout(Duration::from_secs(5), socket.recv(&mut buffer)).await.expect("an answer").unwrap();
        let limit =
            message.edns.as_ref().map_or(512, |edns| edns.max_payload().clamp(512, DEFAULT_UDP_PAYLOAD));
        assert!(length <= usize::from(limit), "{length}");
        let response = Message::from_vec(&buffer[..length]).unwrap();
        assert_eq!((response.metadata.id, &response.queries), (message.metadata.id, &message.queries));
        response
    }

    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    async fn tcp(&self, message: &Message) -> Message {
        let mut stream = self.connect().await;
        send(&mut stream, message).await;
        receive(&mut stream).await.unwrap()
    }
}

async fn send(stream: &mut TcpStream, message: &Message) {
    let bytes = message.to_vec().unwrap();
    let length = u16::try_from(bytes.len()).unwrap();
    stream.write_all(&[&length.to_be_bytes(), &bytes[..]].concat()).await.unwrap();
}

/// The next message; `None` when the connection ends.
async fn receive(stream: &mut TcpStream) -> Option<Message> {
    let read = async {
        let length = stream.read_u16().await.ok()?;
        let mut bytes = vec![0; usize::from(length)];
        stream.read_exact(&mut bytes).await.ok()?;
        Some(Message::from_vec(&bytes).unwrap())
    };
    timeout(Duration::from_secs(5), read).await.expect("an answer or an end")
}

fn public(name: &str) -> Message {
    query(name, RecordType::A)
}

/// A headless service with so many endpoints.
fn large(endpoints: u8) -> Catalog {
    let service = r#"{"v":1,"headless":true,"ports":[{"name":"http","port":80,"protocol":"tcp"}]}"#;
    let value = |number| format!(r#"{{"overlay_ip":"10.244.1.{number}"}}"#);
    let endpoint = |number| (format!("shop/many/node-a/{number}"), value(number));
    let endpoints: Vec<_> = (1..=endpoints).map(endpoint).collect();
    let endpoints: Vec<_> = endpoints.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
    let services = records::<Services>(&[("shop/many", service)]);
    Catalog::new(&services, &records::<Vips>(&[]), &records::<Endpoints>(&endpoints), &Catalog::default())
}

#[tokio::test]
async fn services_are_answered_over_udp_and_tcp() {
    let server = Server::start(|_| ()).await;
    for (name, kind, expected) in [
        ("web.shop.svc.overlay.", RecordType::A, "30 10.251.0.9"),
        ("_http._tcp.web.shop.svc.overlay.", RecordType::SRV, "30 0 0 80 web.shop.svc.overlay."),
        ("9.0.251.10.in-addr.arpa.", RecordType::PTR, "5 web.shop.svc.overlay."),
    ] {
        assert_eq!(texts(&server.udp(&query(name, kind)).await.answers), [expected]);
        assert_eq!(texts(&server.tcp(&query(name, kind)).await.answers), [expected]);
    }
    let response = server.udp(&query("web.shop.svc.overlay.", RecordType::AAAA)).await;
    assert_eq!((response.metadata.response_code, response.answers.len()), (ResponseCode::NoError, 0));
    let response = server.udp(&query("none.shop.svc.overlay.", RecordType::A)).await;
    assert_eq!(response.metadata.response_code, ResponseCode::NXDomain);
    let mut next_version = with_edns(query("web.shop.svc.overlay.", RecordType::A), 1232);
    next_version.edns.as_mut().unwrap().set_version(1);
    assert_eq!(u16::from(server.udp(&next_version).await.metadata.response_code), 16);
    let counters = server.statistics.snapshot();
    assert_eq!((counters.queries, counters.no_error, counters.no_name, counters.other), (9, 7, 1, 1));
}

#[tokio::test]
async fn changes_of_the_catalog_are_answered() {
    let server = Server::start(|_| ()).await;
    server.update(1).await;
    let asked = query("many.shop.svc.overlay.", RecordType::A);
    assert_eq!(server.udp(&asked).await.answers.len(), 1);
    let gone = server.udp(&query("web.shop.svc.overlay.", RecordType::A)).await;
    assert_eq!(gone.metadata.response_code, ResponseCode::NXDomain);
    let Server { address, statistics, catalog, _task } = server;
    drop(catalog);
    let server = Server { address, statistics, catalog: watch::channel(Arc::default()).0, _task };
    assert_eq!(server.udp(&asked).await.answers.len(), 1, "the last catalog stays");
}

#[tokio::test]
async fn repeated_queries_get_their_own_identifier_and_the_latest_records() {
    let server = Server::start(|_| ()).await;
    let mut asked = query("web.shop.svc.overlay.", RecordType::A);
    for id in [1, 2, 3] {
        asked.metadata.id = id;
        assert_eq!(texts(&server.udp(&asked).await.answers), ["30 10.251.0.9"]);
    }
    assert!(server.udp(&with_edns(asked.clone(), 1232)).await.edns.is_some());
    assert!(server.udp(&asked).await.edns.is_none());
    let mut first = std::collections::BTreeSet::new();
    for id in 0..2 {
        let mut asked = query("db.data.svc.overlay.", RecordType::A);
        asked.metadata.id = id;
        first.insert(texts(&server.udp(&asked).await.answers)[0].clone());
    }
    assert_eq!(first.len(), 2, "several addresses are in turn the first one");
    server.catalog.send(Arc::default()).unwrap();
    let start = Instant::now();
    while server.udp(&asked).await.metadata.response_code != ResponseCode::NXDomain {
        assert!(start.elapsed() < Duration::from_secs(5));
    }
    let counters = server.statistics.snapshot();
    assert_eq!(counters.queries, counters.no_error + counters.no_name);
}

#[tokio::test]
async fn what_does_not_fit_is_truncated_and_whole_over_tcp() {
    let server = Server::start(|_| ()).await;
    server.update(200).await;
    let asked = query("many.shop.svc.overlay.", RecordType::A);
    for asked in [asked.clone(), with_edns(asked.clone(), 4096)] {
        let response = server.udp(&asked).await;
        assert!(response.metadata.truncation && response.answers.is_empty());
        assert_eq!(response.edns.is_some(), asked.edns.is_some());
        let whole = server.tcp(&asked).await;
        assert!(!whole.metadata.truncation);
        assert_eq!(whole.answers.len(), 200);
    }
    assert_eq!(server.statistics.snapshot().truncated, 2);
    // Twenty SRV records fit into 1232 bytes without the addresses of their targets, which may be left out.
    server.update(20).await;
    let asked = with_edns(query("_http._tcp.many.shop.svc.overlay.", RecordType::SRV), 1232);
    let response = server.udp(&asked).await;
    assert_eq!(
        (response.metadata.truncation, response.answers.len(), response.additionals.len()),
        (false, 20, 0)
    );
    assert_eq!(server.tcp(&asked).await.additionals.len(), 20);
}

#[tokio::test]
async fn other_names_are_forwarded_and_cached() {
    let (server, upstreams) = Server::with_upstreams(&[Behaviour::Good]).await;
    for asked in
        [public("www.example.com."), public("WWW.example.COM."), with_edns(public("www.Example.com."), 1232)]
    {
        let response = server.udp(&asked).await;
        assert_eq!(texts(&response.answers), ["60 192.0.2.1"]);
        assert!(response.metadata.recursion_available && !response.metadata.authoritative);
        assert_eq!(response.edns.is_some(), asked.edns.is_some());
        let echoed = response.queries[0].name().to_ascii();
        assert_eq!(echoed, asked.queries[0].name().to_ascii(), "in the case of the client");
    }
    assert_eq!(upstreams[0].queries(), 1);
    for _ in 0..2 {
        let response = server.tcp(&public("nothing.example.com.")).await;
        assert_eq!(
            (response.metadata.response_code, response.authorities.len()),
            (ResponseCode::NXDomain, 1)
        );
    }
    assert_eq!(upstreams[0].queries(), 2);
    tokio::time::sleep(Duration::from_millis(1100)).await;
    let response = server.udp(&public("www.example.com.")).await;
    assert!(response.answers[0].ttl < 60, "{}", response.answers[0].ttl);
    let counters = server.statistics.snapshot();
    assert_eq!((counters.forwarded, counters.cache_hits), (2, 4));
}

#[tokio::test]
async fn the_next_server_is_asked_when_one_is_silent_fails_or_is_not_there() {
    for bad in [Some(Behaviour::Silent), Some(Behaviour::Failing), None] {
        let good = Upstream::start(Behaviour::Good).await;
        let bad_server = match bad {
            Some(behaviour) => Some(Upstream::start(behaviour).await),
            None => None,
        };
        let nothing = UdpSocket::bind(LOCAL).await.unwrap().local_addr().unwrap();
        let first = bad_server.as_ref().map_or(nothing, |upstream| upstream.address);
        let server = Server::start(|options| {
            options.upstreams = vec![first, good.address];
            options.upstream_timeout = Duration::from_millis(300);
        });
        let server = server.await;
        let start = Instant::now();
        assert_eq!(texts(&server.udp(&public("a.example.com.")).await.answers), ["60 192.0.2.1"], "{bad:?}");
        let first_took = start.elapsed();
        assert_eq!(
            first_took >= Duration::from_millis(300),
            bad == Some(Behaviour::Silent),
            "{bad:?} {first_took:?}"
        );
        // The server that answered is asked first.
        server.udp(&public("b.example.com.")).await;
        assert_eq!(server.statistics.snapshot().upstream_failures, 1, "{bad:?}");
    }
}

#[tokio::test]
async fn without_an_answer_the_client_gets_an_error() {
    let (server, _upstreams) = Server::with_upstreams(&[Behaviour::Silent, Behaviour::Silent]).await;
    let response = server.udp(&public("www.example.com.")).await;
    assert_eq!(response.metadata.response_code, ResponseCode::ServFail);
    let (server, _upstreams) = Server::with_upstreams(&[Behaviour::Failing]).await;
    let response = server.udp(&with_edns(public("www.example.com."), 1232)).await;
    assert_eq!((response.metadata.response_code, response.edns.is_some()), (ResponseCode::ServFail, true));
    let alone = Server::start(|_| ()).await;
    assert_eq!(alone.udp(&public("www.example.com.")).await.metadata.response_code, ResponseCode::Refused);
}

#[tokio::test]
async fn forged_answers_are_not_taken() {
    let (server, _upstreams) = Server::with_upstreams(&[Behaviour::Forging]).await;
    assert_eq!(texts(&server.udp(&public("www.example.com.")).await.answers), ["60 192.0.2.2"]);
    // The one from another port does not reach the socket.
    assert_eq!(server.statistics.snapshot().upstream_mismatches, 2);
}

#[tokio::test]
async fn truncated_answers_are_asked_again_over_tcp() {
    let (server, _upstreams) = Server::with_upstreams(&[Behaviour::Truncating]).await;
    let response = server.udp(&public("www.example.com.")).await;
    assert!(response.metadata.truncation && response.answers.is_empty());
    assert_eq!(server.tcp(&public("www.example.com.")).await.answers.len(), 100);
    assert_eq!(server.statistics.snapshot().forwarded, 1);
}

#[tokio::test]
async fn a_server_without_edns_is_asked_without_it() {
    let (server, upstreams) = Server::with_upstreams(&[Behaviour::WithoutEdns]).await;
    let response = server.udp(&with_edns(public("www.example.com."), 1232)).await;
    assert_eq!(texts(&response.answers), ["60 192.0.2.1"]);
    assert_eq!(upstreams[0].queries(), 2);
}

#[tokio::test]
async fn equal_questions_at_the_same_time_are_asked_once() {
    let (server, upstreams) = Server::with_upstreams(&[Behaviour::Silent]).await;
    let asked = public("www.example.com.");
    let answers = futures_util::future::join_all((0..20).map(|_| server.udp(&asked))).await;
    assert!(answers.iter().all(|answer| answer.metadata.response_code == ResponseCode::ServFail));
    assert_eq!(upstreams[0].queries(), 1);
    // Nothing remains of it: the next question is asked.
    server.udp(&asked).await;
    assert_eq!(upstreams[0].queries(), 2);
}

#[tokio::test]
async fn silent_upstreams_and_idle_clients_delay_no_other_client() {
    let (server, upstreams) = Server::with_upstreams(&[Behaviour::Silent]).await;
    let _idle: Vec<TcpStream> = futures_util::future::join_all((0..20).map(|_| server.connect())).await;
    let socket = UdpSocket::bind(LOCAL).await.unwrap();
    socket.connect(server.address).await.unwrap();
    for number in 0..300 {
        let message = public(&format!("name-{number}.example.com.")).to_vec().unwrap();
        socket.send(&message).await.unwrap();
    }
    let start = Instant::now();
    server.udp(&query("web.shop.svc.overlay.", RecordType::A)).await;
    server.tcp(&query("web.shop.svc.overlay.", RecordType::A)).await;
    // One after the other, the questions to the upstream server take minutes.
    assert!(start.elapsed() < Duration::from_secs(30), "{:?}", start.elapsed());
    // What exceeds the limit of a client fails at once.
    assert!(upstreams[0].queries() <= 128);
    assert!(server.statistics.snapshot().overloaded >= 172);
}

#[tokio::test]
async fn several_queries_on_one_connection_are_answered() {
    let (server, _upstreams) = Server::with_upstreams(&[Behaviour::Silent]).await;
    let mut stream = server.connect().await;
    for id in 0..50 {
        let mut asked = public(if id == 0 { "www.example.com." } else { "web.shop.svc.overlay." });
        asked.metadata.id = id;
        send(&mut stream, &asked).await;
    }
    stream.shutdown().await.unwrap();
    let mut ids = Vec::new();
    while let Some(response) = receive(&mut stream).await {
        ids.push(response.metadata.id);
    }
    assert_eq!(ids.last(), Some(&0), "the slow one is the last one, and delays no other");
    ids.sort();
    assert_eq!(ids, (0..50).collect::<Vec<_>>());
}

#[tokio::test]
async fn connections_are_limited_and_idle_ones_closed() {
    let server = Server::start(|options| {
        options.max_connections = 8;
        options.tcp_idle = Duration::from_secs(1);
    });
    let server = server.await;
    let asked = query("web.shop.svc.overlay.", RecordType::A);
    let mut open = Vec::new();
    for _ in 0..2 {
        let mut stream = server.connect().await;
        send(&mut stream, &asked).await;
        assert!(receive(&mut stream).await.is_some());
        open.push(stream);
    }
    let mut third = server.connect().await;
    assert!(receive(&mut third).await.is_none(), "a client has a quarter");
    assert_eq!(server.statistics.snapshot().connections_refused, 1);
    // A message that does not come to its end is as none.
    open[0].write_all(&[0, 40, 1]).await.unwrap();
    for stream in &mut open {
        assert!(receive(stream).await.is_none(), "idle");
    }
    assert_eq!(server.tcp(&asked).await.answers.len(), 1);
}

#[tokio::test]
async fn a_response_gets_no_answer_and_does_not_disturb() {
    let server = Server::start(|_| ()).await;
    let socket = UdpSocket::bind(LOCAL).await.unwrap();
    socket.connect(server.address).await.unwrap();
    let mut response = query("web.shop.svc.overlay.", RecordType::A).to_vec().unwrap();
    response[2] |= 0x80;
    for message in [&response[..], &[], &[1], &[0; 11]] {
        socket.send(message).await.unwrap();
    }
    let mut good = query("web.shop.svc.overlay.", RecordType::A);
    good.metadata.id = 7;
    socket.send(&good.to_vec().unwrap()).await.unwrap();
    let mut buffer = [0; 512];
    let length = timeout(Duration::from_secs(5), socket.recv(&mut buffer)).await.unwrap().unwrap();
    assert_eq!(Message::from_vec(&buffer[..length]).unwrap().metadata.id, 7);
    assert_eq!(server.statistics.snapshot().ignored, 4);
}

#[tokio::test]
async fn addresses_that_cannot_be_used_are_named_with_a_remedy() {
    let taken = UdpSocket::bind(LOCAL).await.unwrap();
    let address = taken.local_addr().unwrap();
    let bind = async |address: SocketAddr| {
        let catalog = watch::channel(Arc::new(catalog())).1;
        DnsServer::bind(Options::new(vec![address], zone()), catalog).await.unwrap_err().to_string()
    };
    let error = bind(address).await;
    assert!(
        error.contains(&address.to_string()) && error.contains("another program listens there"),
        "{error}"
    );
    let error = bind("192.0.2.1:53".parse().unwrap()).await;
    assert!(error.contains("192.0.2.1:53") && error.contains("no such address"), "{error}");
    assert!(bind("0.0.0.0:53".parse().unwrap()).await.contains("name one or more addresses"));
}

#[tokio::test]
async fn the_own_address_is_no_upstream() {
    // The port is free after this, so that it can be named in advance.
    let own = UdpSocket::bind(LOCAL).await.unwrap().local_addr().unwrap();
    let server = Server::start(|options| {
        options.listen = vec![own];
        options.upstreams = vec![own];
    });
    let response = server.await.udp(&public("www.example.com.")).await;
    assert_eq!(response.metadata.response_code, ResponseCode::Refused);
}
