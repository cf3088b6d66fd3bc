//! Which endpoint a request gets, and what it is told.

use super::*;

#[tokio::test]
async fn requests_of_one_connection_take_turns_over_kept_connections() {
    let servers = HttpServer::several(3).await;
    let spec = http(&http_addresses(&servers));
    let proxy = proxy(Options::default(), std::slice::from_ref(&spec)).await;
    let mut client = HttpClient::connect(spec.address()).await;
    let mut names = Vec::new();
    for _ in 0..30 {
        names.push(client.get("/").await.name());
    }
    assert_eq!(names, [0, 1, 2].repeat(10));
    assert_eq!(servers.iter().map(HttpServer::connections).collect::<Vec<_>>(), [1, 1, 1]);
    // Other clients use the same connections.
    for _ in 0..6 {
        get(&spec, "/").await.name();
    }
    assert_eq!(servers.iter().map(HttpServer::connections).collect::<Vec<_>>(), [1, 1, 1]);
    let counted = counts(&proxy);
    assert_eq!((counted.requests, counted.status_2xx, counted.retries, counted.failures), (36, 36, 0, 0));
    assert_eq!((total(&proxy).connections, total(&proxy).failures), (3, 0));
    eventually("no request is open", || total(&proxy).open == 0).await;
}

#[tokio::test]
async fn endpoints_are_told_the_client_and_the_host() {
    let server = HttpServer::named(0).await;
    let spec = http(&[server.server.address]);
    let _proxy = proxy(Options::default(), std::slice::from_ref(&spec)).await;
    let mut client = HttpClient::connect_from(Ipv4Addr::new(127, 0, 9, 8), spec.address()).await;
    let headers = [("x-forwarded-for", "192.0.2.1"), ("connection", "x-hop"), ("x-hop", "1")];
    let reply = client.get_with("/a%20b?c=d", &headers).await;
    let expected = "GET /a%20b?c=d\nhost: web.shop\nx-forwarded-for: 192.0.2.1, 127.0.9.8\n\
                    x-forwarded-host: web.shop\nx-forwarded-proto: http\n\n";
    assert_eq!(reply.text(), expected);
    assert!(!reply.head.headers.contains_key("via") && reply.head.headers.contains_key("date"));
}

#[tokio::test]
async fn clients_of_http_1_0_are_served() {
    let server = HttpServer::start(|request| async move {
        let chunks = request.uri().query() == Some("chunks");
        let body = full("hello");
        // Without a known length, the endpoint sends chunks.
        let body = if chunks { BodyExt::boxed(body.map_frame(|frame| frame)) } else { body };
        Response::new(body)
    })
    .await;
    let spec = http(&[server.server.address]);
    let _proxy = proxy(Options::default(), std::slice::from_ref(&spec)).await;
    for target in ["/", "/?chunks"] {
        let reply = raw(spec.address(), format!("GET {target} HTTP/1.0\r\n\r\n").as_bytes()).await;
        assert!(reply.starts_with("HTTP/1.0 200 OK\r\n") && reply.ends_with("\r\n\r\nhello"), "{reply}");
        assert!(!reply.contains("chunked"), "{reply}");
    }
    let kept =
        raw(spec.address(), b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\nGET / HTTP/1.0\r\n\r\n").await;
    assert_eq!(kept.matches("200 OK").count(), 2, "{kept}");
}

#[tokio::test]
async fn responses_without_a_body_keep_their_length() {
    let server = HttpServer::start(|request| async move {
        let status: u16 = request.uri().path()[1..].parse().unwrap();
        let body = if status == 200 { full("12345") } else { full("") };
        Response::builder().status(status).body(body).unwrap()
    })
    .await;
    let spec = http(&[server.server.address]);
    let _proxy = proxy(Options::default(), std::slice::from_ref(&spec)).await;
    let mut client = HttpClient::connect(spec.address()).await;
    for (method, path, length) in [
        ("HEAD", "/200", Some("5")),
        ("GET", "/200", Some("5")),
        ("GET", "/204", None),
        ("GET", "/304", None),
    ] {
        let request = Request::builder().method(method).uri(path).header("host", "a");
        let reply = client.send(request.body(full("")).unwrap()).await.unwrap();
        let found = reply.head.headers.get("content-length").map(|value| value.to_str().unwrap());
        assert_eq!(found, length, "{method} {path}");
        assert_eq!(reply.body.len(), if method == "GET" && path == "/200" { 5 } else { 0 });
    }
    assert_eq!(server.connections(), 1);
}

#[tokio::test]
async fn a_header_decides_where_the_service_says_so() {
    let servers = HttpServer::several(4).await;
    for policy in ["source_hash", "maglev"] {
        let lb: &str = format!(r#","lb":{{"policy":"{policy}","hash_key":"X-User"}}"#).leak();
        let spec = http(&http_addresses(&servers)).with(lb);
        let _proxy = proxy(Options::default(), std::slice::from_ref(&spec)).await;
        let mut client = HttpClient::connect(spec.address()).await;
        let mut places = std::collections::BTreeSet::new();
        for user in 0..40 {
            let user = format!("user-{user}");
            let name = client.get_with("/", &[("x-user", &user)]).await.name();
            places.insert(name);
            // Also for another client.
            let mut other = HttpClient::connect_from(Ipv4Addr::new(127, 0, 9, 7), spec.address()).await;
            assert_eq!(other.get_with("/", &[("X-USER", &user)]).await.name(), name, "{policy}, {user}");
        }
        assert_eq!(places.len(), 4, "{policy}");
        // Without it, the client's address decides.
        let first = client.get("/").await.name();
        for _ in 0..5 {
            assert_eq!(client.get("/").await.name(), first, "{policy}");
        }
    }
}

#[tokio::test]
async fn affinity_and_weights_are_those_of_connections() {
    let servers = HttpServer::several(3).await;
    let mut spec = http(&http_addresses(&servers)).with(r#","affinity":{"client_ip":true,"ttl_s":60}"#);
    let proxy = proxy(Options::default(), std::slice::from_ref(&spec)).await;
    let clients: Vec<Ipv4Addr> = (1..=3).map(|number| Ipv4Addr::new(127, 0, 1, number)).collect();
    for _ in 0..3 {
        for (number, client) in clients.iter().enumerate() {
            let mut client = HttpClient::connect_from(*client, spec.address()).await;
            assert_eq!((client.get("/").await.name(), client.get("/").await.name()), (number, number));
        }
    }
    spec = spec.with("");
    for (endpoint, weight) in spec.endpoints.iter_mut().zip([3, 1, 0]) {
        endpoint.1 = weight;
    }
    apply(&proxy, std::slice::from_ref(&spec)).await;
    let mut client = HttpClient::connect(spec.address()).await;
    let mut counts = [0; 3];
    for _ in 0..40 {
        counts[client.get("/").await.name()] += 1;
    }
    assert_eq!(counts, [30, 10, 0]);
}

#[tokio::test]
async fn the_endpoint_with_the_fewest_open_requests_is_next() {
    let (release, wait) = tokio::sync::watch::channel(false);
    let mut servers = Vec::new();
    for name in 0..2 {
        let wait = wait.clone();
        servers.push(
            HttpServer::start(move |request| {
                let mut wait = wait.clone();
                async move {
                    if request.uri().path() == "/slow" {
                        wait.wait_for(|released| *released).await.unwrap();
                    }
                    Response::builder().header("x-name", name).body(full("")).unwrap()
                }
            })
            .await,
        );
    }
    let spec = http(&http_addresses(&servers)).with(r#","lb":{"policy":"least_conn"}"#);
    let proxy = proxy(Options::default(), std::slice::from_ref(&spec)).await;
    let address = spec.address();
    let slow = tokio::spawn(async move { HttpClient::connect(address).await.get("/slow").await.name() });
    eventually("the slow request is open", || total(&proxy).open == 1).await;
    let mut names = Vec::new();
    for _ in 0..6 {
        names.push(get(&spec, "/").await.name());
    }
    release.send(true).unwrap();
    let busy = slow.await.unwrap();
    assert_eq!(names, [1 - busy; 6]);
}

#[tokio::test]
async fn with_the_proxy_protocol_each_request_has_its_connection() {
    let (sender, mut headers) = tokio::sync::mpsc::unbounded_channel();
    let server = Server::start(move |mut stream| {
        let sender = sender.clone();
        async move {
            let mut begin = [0; 28 + 3];
            stream.read_exact(&mut begin).await.unwrap();
            sender.send(begin).unwrap();
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await.unwrap();
            let _ = stream.read_u8().await;
        }
    })
    .await;
    let spec = Spec { port_record: r#","app":"http","proxy_protocol":true"#, ..http(&[server.address]) };
    let _proxy = proxy(Options::default(), std::slice::from_ref(&spec)).await;
    for client in [3, 4] {
        let mut client_of = HttpClient::connect_from(Ipv4Addr::new(127, 0, 9, client), spec.address()).await;
        for _ in 0..2 {
            assert_eq!(client_of.get("/").await.text(), "ok");
            let begin = timeout(SOON, headers.recv()).await.unwrap().unwrap();
            assert_eq!((&begin[16..20], &begin[28..]), (&[127, 0, 9, client][..], &b"GET"[..]));
        }
    }
}
