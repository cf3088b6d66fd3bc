//! Tests of `overlay-agent service top`.

use super::*;

fn counts(connections: u64, slow: bool) -> TrafficCounts {
    let mut buckets = [0; 32];
    buckets[if slow { 20 } else { 7 }] = connections;
    TrafficCounts { connections, latency: buckets.into(), ..TrafficCounts::default() }
}

fn endpoint(number: u8, counts: TrafficCounts) -> EndpointTraffic {
    EndpointTraffic {
        protocol: Protocol::Tcp,
        address: SocketAddrV4::new(Ipv4Addr::new(10, 244, 1, number), 8080),
        endpoint: Some(format!("a/{number}")),
        state: Some(EndpointState::Ready),
        counts,
    }
}

fn service(name: &str, counts: TrafficCounts, endpoints: Vec<EndpointTraffic>) -> ServiceTraffic {
    let http = HttpCounts { requests: 9, retries: 1, status_2xx: 8, status_5xx: 1, ..HttpCounts::default() };
    let vip = Some(Ipv4Addr::new(10, 251, 0, 1));
    ServiceTraffic { name: name.parse().unwrap(), vip, counts, endpoints, http }
}

fn traffic(services: Vec<ServiceTraffic>) -> Traffic {
    Traffic { services, ..Traffic::default() }
}

fn names(top: &Top) -> Vec<String> {
    top.services.iter().map(|row| row.name.to_string()).collect()
}

const TWO_SECONDS: Duration = Duration::from_secs(2);

#[test]
fn the_busiest_come_first_and_the_rest_is_counted() {
    let before = traffic(vec![
        service("a/idle", counts(1000, false), Vec::new()),
        service(
            "a/busy",
            counts(10, false),
            vec![endpoint(1, counts(8, false)), endpoint(2, counts(2, false))],
        ),
    ]);
    let now = traffic(vec![
        service("a/idle", counts(1000, false), Vec::new()),
        service(
            "a/busy",
            counts(110, false),
            vec![
                endpoint(1, counts(8, false)),
                endpoint(2, counts(102, true)),
                endpoint(3, counts(0, false)),
            ],
        ),
        service("b/new", counts(6, false), Vec::new()),
    ]);
    let top = Top::new(&before, &now, TWO_SECONDS, None, 2);
    assert_eq!(names(&top), ["a/busy", "b/new"]);
    assert_eq!(top.more_services, 1);
    let busy = &top.services[0];
    assert_eq!((busy.rates.connections_per_second, busy.rates.connections), (50.0, 110));
    assert_eq!(top.services[1].rates.connections_per_second, 3.0);
    let of_busy = busy.endpoints.iter();
    let of_busy = of_busy.map(|row| (row.address.ip().octets()[3], row.rates.connections_per_second));
    assert_eq!(of_busy.collect::<Vec<_>>(), [(2, 50.0), (1, 0.0)]);
    assert_eq!(busy.more_endpoints, 1);

    let all = Top::new(&before, &now, TWO_SECONDS, None, 0);
    assert_eq!(names(&all), ["a/busy", "b/new", "a/idle"]);
    assert_eq!((all.more_services, all.services[0].more_endpoints), (0, 0));
    for (filter, expected) in
        [("a", &["a/busy", "a/idle"][..]), ("b/new", &["b/new"]), ("a/b", &[]), ("new", &[])]
    {
        assert_eq!(names(&Top::new(&before, &now, TWO_SECONDS, Some(filter), 0)), expected, "{filter}");
    }
}

#[test]
fn times_are_those_of_the_interval_if_it_has_any() {
    let before = traffic(vec![service("a/b", counts(100, false), Vec::new())]);
    let mut grown = counts(100, false);
    grown += counts(4, true);
    let now = traffic(vec![service("a/b", grown, Vec::new())]);
    let rates = &Top::new(&before, &now, TWO_SECONDS, None, 0).services[0].rates;
    assert!(rates.latency.unwrap().p50_us < 128.0, "{rates:?}");
    assert!(rates.recent_latency.unwrap().p50_us > 500_000.0, "{rates:?}");
    let idle = &Top::new(&now, &now, TWO_SECONDS, None, 0).services[0].rates;
    assert!(idle.recent_latency.is_none() && idle.latency.is_some());
    assert_eq!(row(String::new(), idle)[6], microseconds(idle.latency.unwrap().p50_us));
}

#[test]
fn an_agent_that_starts_again_has_no_negative_rates() {
    let before = traffic(vec![service("a/b", counts(100, false), Vec::new())]);
    let now = traffic(vec![service("a/b", counts(4, false), Vec::new())]);
    let rates = &Top::new(&before, &now, TWO_SECONDS, None, 0).services[0].rates;
    assert_eq!(rates.connections_per_second, 2.0);
    assert_eq!(per_second(1, 2, 0.0), 0.0);
}

#[test]
fn the_table_has_a_line_for_each_service_and_endpoint() {
    let now = Traffic {
        services: vec![service("a/b", counts(4, false), vec![endpoint(1, counts(4, false))])],
        dns: Some(dns::Counters { queries: 7, ..dns::Counters::default() }),
        uncounted: Some("no permission".to_owned()),
        proxy_refused: 3,
    };
    let text = text(&Top::new(&Traffic::default(), &now, TWO_SECONDS, None, 0));
    for expected in [
        "a/b (10.251.0.1)",
        "tcp 10.244.1.1:8080 a/1",
        "DNS: 3.5 queries/s, 7 in all",
        "HTTP a/b: 9 requests, 0 without an answer of an endpoint, 1 sent again; responses: 0 1xx, 8 2xx",
        "no permission",
        "refused 3",
    ] {
        assert!(text.contains(expected), "{text}");
    }
    let none = super::text(&Top::new(&Traffic::default(), &Traffic::default(), TWO_SECONDS, None, 0));
    assert_eq!(none, "no services");
}

#[test]
fn numbers_have_units() {
    assert_eq!([85.4, 1234.0, 2_100_000.0].map(microseconds), ["85 us", "1.2 ms", "2.1 s"]);
    assert_eq!(
        [0, 1023, 1024, 1 << 20, u64::MAX].map(bytes),
        ["-", "1023 B", "1.0 KiB", "1.0 MiB", "16.0 EiB"]
    );
}

#[test]
fn the_json_has_the_names_that_scripts_read() {
    let now = traffic(vec![service("a/b", counts(4, false), vec![endpoint(1, counts(4, false))])]);
    let json = serde_json::to_value(Top::new(&Traffic::default(), &now, TWO_SECONDS, None, 0)).unwrap();
    let endpoint = &json["services"][0]["endpoints"][0];
    assert_eq!(endpoint["address"], "10.244.1.1:8080");
    assert_eq!(endpoint["state"], "ready");
    assert_eq!((&endpoint["connections"], &endpoint["connections_per_second"]), (&4.into(), &2.0.into()));
    assert!(endpoint["latency"]["p99_us"].is_number() && json["dns"].is_null());
}
