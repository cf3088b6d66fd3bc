//! Endpoints that fail, and what of it clients see.

use std::sync::atomic::AtomicBool;

use tokio::time::{Instant, sleep};

use super::*;

#[tokio::test]
async fn a_request_that_was_not_sent_goes_to_another_endpoint() {
    let servers = HttpServer::several(1).await;
    let spec = http(&[dead(), servers[0].server.address]);
    let proxy = proxy(Options::default(), std::slice::from_ref(&spec)).await;
    let mut client = HttpClient::connect(spec.address()).await;
    for number in 0..4 {
        let reply = client.post("/", full(format!("body {number}"))).await.unwrap();
        assert!(reply.text().ends_with(&format!("body {number}")), "{}", reply.text());
    }
    let counted = counts(&proxy);
    assert_eq!((counted.requests, counted.retries, counted.failures), (4, 2, 0));
    let endpoints = proxy.counters().services.values().next().unwrap().endpoints.clone();
    let of = |address: SocketAddrV4| endpoints.iter().find(|one| one.address == address).unwrap().counts;
    let alive = of(servers[0].server.address);
    assert_eq!((alive.connections, alive.failures), (1, 0));
    let dead = endpoints.iter().find(|one| one.address != servers[0].server.address).unwrap().counts;
    assert_eq!((dead.connections, dead.failures), (0, 2));
}

#[tokio::test]
async fn failures_have_a_status_and_a_reason() {
    let silent = Server::start(|mut stream| async move {
        let _ = stream.read(&mut [0; 1024]).await;
        sleep(Duration::from_secs(60)).await;
    })
    .await;
    let limits = Limits { response_timeout: Duration::from_millis(200), ..Limits::default() };
    let options = Options { http: limits, ..Options::default() };
    let mut spec = http(&[]);
    let proxy = proxy(options, std::slice::from_ref(&spec)).await;
    let mut client = HttpClient::connect(spec.address()).await;
    for (endpoint, status, words) in [
        (None, 503, "no endpoint of shop/web takes requests"),
        (Some(dead()), 502, "no endpoint of shop/web answers: no connection"),
        (Some(silent.address), 504, "no endpoint of shop/web answers: no response in time"),
    ] {
        let endpoints = endpoint.iter().copied().collect::<Vec<_>>();
        spec.endpoints = http(&endpoints).endpoints;
        apply(&proxy, std::slice::from_ref(&spec)).await;
        let reply = client.get("/").await;
        assert!(reply.status == status && reply.text().contains(words), "{reply:?}");
        assert_eq!(reply.head.headers.contains_key("retry-after"), status == 503);
        assert_eq!(reply.head.headers["content-type"], "text/plain; charset=utf-8");
    }
    let counted = counts(&proxy);
    assert_eq!((counted.requests, counted.failures, counted.status_5xx), (3, 3, 3));
}

/// An endpoint that reads a request and closes without an answer, and the number of requests that it got.
async fn closing() -> (Server, Arc<AtomicUsize>) {
    let requests = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&requests);
    let server = Server::start(move |mut stream| {
        let counter = Arc::clone(&counter);
        async move {
            if stream.read(&mut [0; 4096]).await.is_ok_and(|length| length > 0) {
                counter.fetch_add(1, Ordering::Relaxed);
            }
        }
    });
    (server.await, requests)
}

#[tokio::test]
async fn only_what_changes_nothing_is_sent_again() {
    for (method, body, is_repeated) in [
        ("GET", "", true),
        ("HEAD", "", true),
        ("OPTIONS", "", true),
        ("PUT", "", true),
        ("DELETE", "", true),
        ("POST", "", false),
        ("PATCH", "", false),
        ("PUT", "x", false),
        ("POST", "x", false),
    ] {
        let (broken, got) = closing().await;
        let servers = HttpServer::several(1).await;
        let spec = http(&[broken.address, servers[0].server.address]);
        let proxy = proxy(Options::default(), std::slice::from_ref(&spec)).await;
        let mut client = HttpClient::connect(spec.address()).await;
        let request =
            Request::builder().method(method).uri("/").header("host", "a").body(full(body)).unwrap();
        let reply = client.send(request).await.unwrap();
        assert_eq!(reply.status, if is_repeated { 200 } else { 502 }, "{method} {body:?}");
        assert_eq!((got.load(Ordering::Relaxed), servers[0].connections()), (1, usize::from(is_repeated)));
        assert_eq!(counts(&proxy).retries, u64::from(is_repeated));
    }
}

#[tokio::test]
async fn attempts_are_bounded() {
    let mut servers = Vec::new();
    for _ in 0..6 {
        servers.push(closing().await);
    }
    let addresses: Vec<_> = servers.iter().map(|(server, _)| server.address).collect();
    let spec = http(&addresses);
    let proxy = proxy(Options { attempts: 4, ..Options::default() }, std::slice::from_ref(&spec)).await;
    assert_eq!(get(&spec, "/").await.status, 502);
    let got: usize = servers.iter().map(|(_, got)| got.load(Ordering::Relaxed)).sum();
    assert_eq!((got, counts(&proxy).retries), (4, 3));
}

#[tokio::test]
async fn a_connection_that_the_endpoint_closed_meanwhile_costs_no_request() {
    // It closes each connection a moment after a response.
    let server = Server::start(|mut stream| async move {
        let _ = stream.read(&mut [0; 4096]).await;
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await;
        sleep(Duration::from_millis(3)).await;
    })
    .await;
    let spec = http(&[server.address]);
    let proxy = proxy(Options::default(), std::slice::from_ref(&spec)).await;
    let mut client = HttpClient::connect(spec.address()).await;
    for number in 0..200_u64 {
        assert_eq!(client.get("/").await.status, 200);
        sleep(Duration::from_micros(2500 + number * 5)).await;
    }
    assert_eq!(counts(&proxy).failures, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_endpoint_killed_under_load_fails_no_get() {
    let mut servers = HttpServer::several(3).await;
    let spec = http(&http_addresses(&servers));
    let proxy = proxy(Options::default(), std::slice::from_ref(&spec)).await;
    let address = spec.address();
    let (end, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let clients: Vec<_> = (0..16)
        .map(|_| {
            let (end, answered) = (Arc::clone(&end), Arc::clone(&answered));
            tokio::spawn(async move {
                let mut client = HttpClient::connect(address).await;
                while !end.load(Ordering::Relaxed) {
                    let reply = client.get("/").await;
                    assert_eq!(reply.status, 200, "{}", reply.text());
                    answered.fetch_add(1, Ordering::Relaxed);
                }
            })
        })
        .collect();
    let reached = |count| move |answered: &AtomicUsize| answered.load(Ordering::Relaxed) >= count;
    eventually("there is load", || reached(300)(&answered)).await;
    servers.remove(1);
    eventually("the others answer", || reached(900)(&answered)).await;
    end.store(true, Ordering::Relaxed);
    for client in clients {
        client.await.unwrap();
    }
    let requests = answered.load(Ordering::Relaxed) as u64;
    let counted = counts(&proxy);
    assert_eq!((counted.status_2xx, counted.failures), (requests, 0));
    assert!(counted.retries > 0, "{requests} {counted:?}");
}

/// Connections to endpoints that wait for a request.
fn pooled(proxy: &Proxy) -> usize {
    let listeners = proxy.listeners();
    let endpoints = listeners.ports().flat_map(|(_, endpoints)| endpoints.values());
    endpoints.map(|endpoint| endpoint.pool.len()).sum()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn endpoints_and_ports_that_go_leave_nothing_behind() {
    let servers = HttpServer::several(2).await;
    let mut spec = http(&http_addresses(&servers));
    let options = Options { drain: Duration::from_millis(300), ..Options::default() };
    let proxy = proxy(options, std::slice::from_ref(&spec)).await;
    let mut client = HttpClient::connect(spec.address()).await;
    for name in [0, 1] {
        assert_eq!(client.get("/").await.name(), name);
    }
    let pooled = || pooled(&proxy);
    eventually("both connections wait", || pooled() == 2).await;
    // A removed endpoint loses its connections at once.
    spec.endpoints.remove(0);
    apply(&proxy, std::slice::from_ref(&spec)).await;
    assert_eq!(pooled(), 1);
    assert_eq!(client.get("/").await.name(), 1);
    // A removed port closes the connections of clients that wait.
    apply(&proxy, &[]).await;
    eventually("the client's connection is closed", || proxy.counters().open_connections == 0).await;
    eventually("the client sees it", || client.sender.is_closed()).await;
}

#[tokio::test]
async fn connections_that_wait_for_long_are_closed() {
    let servers = HttpServer::several(1).await;
    let spec = http(&http_addresses(&servers));
    let limits = Limits { pool_idle: Duration::from_millis(200), ..Limits::default() };
    let proxy = proxy(Options { http: limits, ..Options::default() }, std::slice::from_ref(&spec)).await;
    get(&spec, "/").await;
    let pooled = || pooled(&proxy);
    assert_eq!(pooled(), 1);
    eventually("the connection is closed", || pooled() == 0).await;
    get(&spec, "/").await;
    assert_eq!(servers[0].connections(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_response_that_takes_longer_than_the_drain_is_reset() {
    let server = HttpServer::start(|_| async {
        let frames = futures_util::stream::unfold((), |()| async {
            sleep(Duration::from_millis(10)).await;
            Some((Ok(hyper::body::Frame::data(Bytes::from_static(b"piece"))), ()))
        });
        let frames: std::pin::Pin<Box<dyn futures_util::Stream<Item = _> + Send + Sync>> = Box::pin(frames);
        Response::new(BoxBody::new(http_body_util::StreamBody::new(frames)))
    })
    .await;
    let drain = Duration::from_millis(400);
    let mut spec = http(&[server.server.address]);
    let proxy = proxy(Options { drain, ..Options::default() }, std::slice::from_ref(&spec)).await;
    let mut client = HttpClient::connect(spec.address()).await;
    let request = Request::get("/").header("host", "a").body(full("")).unwrap();
    let mut response = client.sender.send_request(request).await.unwrap();
    response.frame().await.unwrap().unwrap();
    let start = Instant::now();
    spec.endpoints.clear();
    apply(&proxy, std::slice::from_ref(&spec)).await;
    while let Some(Ok(_)) = timeout(SOON, response.frame()).await.unwrap() {}
    assert!((drain * 3 / 4..drain * 4).contains(&start.elapsed()), "{:?}", start.elapsed());
}
