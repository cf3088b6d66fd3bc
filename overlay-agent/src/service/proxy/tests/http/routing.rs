//! Routes from one service to others.

use super::*;
use crate::service::{Catalog, front::Rules};

const ROUTES: &str = r#","app":"http","routes":[
    {"path_prefix":"/api","service":"shop/api"},
    {"host":"*.shop.example","service":"shop/api","port":"p"},
    {"host":"gone.example","service":"shop/gone"},
    {"path_prefix":"/noport","service":"shop/api","port":"other"}]"#;

#[tokio::test]
async fn requests_go_where_routes_lead() {
    let servers = HttpServer::several(4).await;
    let addresses = http_addresses(&servers);
    let web = Spec { port_record: ROUTES, ..http(&addresses[..2]) };
    let api = Spec { name: "shop/api".to_owned(), ..http(&addresses[2..]) };
    let proxy = Proxy::start(Options::default());
    apply(&proxy, &[web.clone(), api.clone()]).await;
    let mut client = HttpClient::connect(web.address()).await;
    for (host, path, names) in [
        ("web", "/", [0, 1]),
        ("web", "/apis", [0, 1]),
        ("web", "/api", [2, 3]),
        ("web", "/api/x?y=/", [2, 3]),
        ("EU.shop.example:80", "/", [2, 3]),
        ("shop.example", "/", [0, 1]),
    ] {
        for expected in names {
            assert_eq!(client.get_with(path, &[("host", host)]).await.name(), expected, "{host}{path}");
        }
    }
    for (host, path, words) in [
        ("gone.example", "/", "shop/web leads to shop/gone, which is missing"),
        ("web", "/noport", "shop/web leads to shop/api, port other, which is missing"),
    ] {
        let reply = client.get_with(path, &[("host", host)]).await;
        assert_eq!(reply.status, 503);
        assert!(reply.text().contains(words), "{}", reply.text());
        assert_eq!(reply.head.headers["retry-after"], "1");
    }
    let reasons: Vec<String> = proxy.problems().into_iter().map(|problem| problem.reason).collect();
    assert_eq!(reasons.len(), 2, "{reasons:?}");
    assert!(reasons[0].contains("route 3 leads to shop/gone") && reasons[1].contains("route 4 leads to"));
    let counters = proxy.counters();
    let of = |name: &str| counters.services[&name.parse().unwrap()].http;
    assert_eq!((of("shop/web").requests, of("shop/web").failures, of("shop/api").requests), (8, 2, 6));

    // The missing service comes, and the other one goes.
    let gone = Spec { name: "shop/gone".to_owned(), ..http(&addresses[..1]) };
    apply(&proxy, &[web.clone(), gone.clone()]).await;
    assert_eq!(client.get_with("/", &[("host", "gone.example")]).await.name(), 0);
    assert_eq!(client.get_with("/api", &[("host", "web")]).await.status, 503);
    let reasons: Vec<String> = proxy.problems().into_iter().map(|problem| problem.reason).collect();
    assert!(reasons.len() == 3 && reasons.iter().all(|reason| reason.contains("shop/api")), "{reasons:?}");
}

#[tokio::test]
async fn a_service_without_endpoints_only_routes() {
    let server = HttpServer::named(0).await;
    let routes = r#","app":"http","routes":[{"path_prefix":"/api","service":"shop/api"}]"#;
    let web = Spec { port_record: routes, ..http(&[]) };
    let api = Spec { name: "shop/api".to_owned(), ..http(&[server.server.address]) };
    let proxy = proxy(Options::default(), &[web.clone(), api.clone()]).await;
    assert_eq!(get(&web, "/api").await.name(), 0);
    let reply = get(&web, "/").await;
    assert_eq!(
        (reply.status, reply.text()),
        (404, "shop/web has no route for this request, and no endpoints\n")
    );
    assert!(!reply.head.headers.contains_key("retry-after"));
    // Without routes, it has no endpoints.
    apply(&proxy, &[http(&[]).with_address(&web), api]).await;
    let reply = get(&web, "/").await;
    assert_eq!((reply.status, reply.text()), (503, "no endpoint of shop/web takes requests\n"));
}

impl Spec {
    /// At the address of another one.
    fn with_address(self, other: &Self) -> Self {
        Self { vip: other.vip, ..self }
    }
}

#[tokio::test]
async fn routes_lead_to_services_without_a_virtual_address() {
    let servers = HttpServer::several(3).await;
    let addresses = http_addresses(&servers);
    let routes = r#","app":"http","routes":[{"path_prefix":"/api","service":"shop/api"}]"#;
    let web = Spec { port_record: routes, ..http(&addresses[..1]) };
    let mut api = Spec { name: "shop/api".to_owned(), ..http(&addresses[1..]) };
    let headless = |api: &Spec| {
        let catalog = catalog(&[web.clone(), api.clone()]);
        let mut services = catalog.services.clone();
        let mut service = services[&"shop/api".parse().unwrap()].as_ref().clone();
        service.vip = None;
        services.insert(service.name.clone(), Arc::new(service));
        Catalog { services, skipped: Vec::new() }
    };
    let proxy = Proxy::start(Options { drain: Duration::from_millis(200), ..Options::default() });
    proxy.reconcile(&headless(&api), &Rules::default()).await;
    assert_eq!(proxy.problems(), []);
    let mut client = HttpClient::connect(web.address()).await;
    for expected in [1, 2, 1, 2] {
        assert_eq!(client.get("/api").await.name(), expected);
    }
    let counters = proxy.counters();
    let of_api = &counters.services[&"shop/api".parse().unwrap()];
    assert_eq!((of_api.http.requests, of_api.endpoints.len()), (4, 2));
    // It follows its endpoints.
    api.endpoints.remove(0);
    proxy.reconcile(&headless(&api), &Rules::default()).await;
    for _ in 0..3 {
        assert_eq!(client.get("/api").await.name(), 2);
    }
    proxy.reconcile(&catalog(std::slice::from_ref(&web)), &Rules::default()).await;
    assert_eq!(client.get("/api").await.status, 503);
    assert_eq!(client.get("/").await.name(), 0);
}
