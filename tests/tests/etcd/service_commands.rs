//! The commands for services and endpoints, through the real binary, on etcd and on a directory.

use etcd_client::PutOptions;

use crate::{
    commands::{Answer, on, on_directory, run},
    hosts::{Network, PREFIX},
    services::WEB,
};

const YAML: &str = "\
shop/web:
  ports: [{name: http, port: 80, target_port: 8080}]
  health: {kind: http, path: /ok}
bank/db:
  headless: true
  ports:
    - name: pg
      port: 5432
";

/// What holds on each kind of store.
fn services_are_written_listed_and_removed(command: &dyn Fn(&[&str]) -> Answer) {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("services.yaml");
    std::fs::write(&file, YAML).unwrap();
    let file = file.to_str().unwrap();
    let config = r#"{"Network":"10.5.0.0/16","Services":{}}"#;
    command(&["config", "set", config]).done();
    assert_eq!(command(&["service", "list"]).done().trim(), "no services");
    let text = command(&["service", "set", file]).done();
    assert!(text.contains("wrote bank/db, which is new") && text.contains("wrote shop/web"), "{text}");
    let again = command(&["service", "set", file, "-o", "json"]).json();
    assert_eq!((&again[0]["name"], &again[0]["change"]), (&"bank/db".into(), &"unchanged".into()));
    let changed = r#"{"name": "shop/web", "ports": [{"name": "http", "port": 81}]}"#;
    assert_eq!(command(&["service", "set", changed, "-o", "json"]).json()[0]["change"], "replaced");

    // Nothing of input that is partly bad is written.
    let partly = "{shop/new: {ports: [{name: a, port: 1}]}, shop/bad: {ports: []}}";
    let error = command(&["service", "set", partly]).refused();
    assert!(error.contains("shop/bad: the service: a service has 1 to 16 ports"), "{error}");
    for (input, words) in [
        (
            "{shop/new: {vip: 10.9.0.1, ports: [{name: a, port: 1}]}}",
            "no usable address of the pool 10.251.0.0/16",
        ),
        (
            "{shop/a: {vip: 10.251.0.1, ports: [{name: a, port: 1}]}, shop/b: {vip: 10.251.0.1, ports: [{name: a, port: 1}]}}",
            "both want",
        ),
        ("/does/not/exist", "/does/not/exist"),
        ("{name: shop/new, ports: [{name: a, port: 1}], endpoints: [{address: 10.5.1.1}]}", "endpoint add"),
    ] {
        let error = command(&["service", "set", input]).refused();
        assert!(error.contains(words), "{error}");
    }
    let list = command(&["service", "list", "-o", "json"]).json();
    let names: Vec<_> = list["services"].as_array().unwrap().iter().map(|service| &service["name"]).collect();
    assert_eq!(names, ["bank/db", "shop/web"]);
    assert_eq!(
        (&list["services"][0]["headless"], &list["services"][1]["ports"][0]["port"]),
        (&true.into(), &81.into())
    );

    let add = ["endpoint", "add", "shop/web", "--node", "node-a", "--address", "10.5.1.2"];
    let text =
        command(&[&add[..], &["--port", "http=8081", "--weight", "3", "--zone", "z1"]].concat()).done();
    assert!(
        text.contains("shop/web/node-a/10-5-1-2, which is new") && text.contains("until it is removed"),
        "{text}"
    );
    command(&["endpoint", "add", "shop/web", "--node", "node-b", "--id", "b", "--address", "10.5.2.2"])
        .done();
    let answer = command(&["endpoint", "add", "shop/none", "--node", "a", "--address", "10.5.1.3"]);
    assert!(answer.stderr.contains("warning: there is no service shop/none yet"), "{}", answer.all());
    answer.done();
    for (more, words) in [
        (&["--port", "dns=53"][..], "the service has no port \"dns\""),
        (&["--id", "Upper"], "no DNS label"),
        (&["--address", "127.0.0.1"], "no address of a host"),
    ] {
        let error = command(&[&add[..], more].concat()).refused();
        assert!(error.contains(words), "{error}");
    }
    for usage in [&["--weight", "257"][..], &["--port", "http"], &["--address", "x"]] {
        assert_eq!(command(&[&add[..], usage].concat()).code, Some(2), "{usage:?}");
    }
    assert_eq!(command(&["service", "show", "shop"]).code, Some(2));
    let text = command(&["endpoint", "drain", "shop/web/node-b/b"]).done();
    assert!(text.contains("draining"), "{text}");

    let text = command(&["service", "list"]).done();
    let line = text.lines().find(|line| line.contains("shop/web")).unwrap();
    assert!(["none yet", "http 81/tcp", "1/2"].iter().all(|word| line.contains(word)), "{line}");
    assert!(text.contains("endpoints/shop/none/a/10-5-1-3") && text.contains("no usable service"), "{text}");
    let shown = command(&["service", "show", "shop/web", "-o", "json"]).json();
    assert_eq!((&shown["service"]["v"], &shown["endpoints"][0]["ports"]["http"]), (&1.into(), &8081.into()));
    let text = command(&["service", "show", "shop/web"]).done();
    for words in ["node-a", "10.5.1.2", "http=8081", "z1", "draining", "default"] {
        assert!(text.contains(words), "{words}: {text}");
    }
    let list = command(&["endpoint", "list", "shop/web", "-o", "json"]).json();
    let endpoints = list["endpoints"].as_array().unwrap();
    assert_eq!(
        (endpoints.len(), &endpoints[0]["expires_in_s"], &endpoints[1]["state"]),
        (2, &().into(), &"draining".into())
    );
    // Added again, it takes connections again.
    command(&["endpoint", "add", "shop/web", "--node", "node-b", "--id", "b", "--address", "10.5.2.2"])
        .done();
    let list = command(&["endpoint", "list", "-o", "json"]).json();
    assert_eq!(
        (&list["endpoints"][2]["state"], list["endpoints"].as_array().unwrap().len()),
        (&"ready".into(), 3)
    );

    let removed = command(&["service", "remove", "shop/web", "-o", "json"]).json();
    assert_eq!((&removed["key"], &removed["endpoints"]), (&"shop/web".into(), &2.into()));
    for name in ["shop/web/node-a/10-5-1-2", "shop/web/node-b/b", "shop/none/a/10-5-1-3"] {
        command(&["endpoint", "remove", name]).done();
    }
    assert!(command(&["endpoint", "list"]).done().contains("no endpoints"));
    for (arguments, words) in [
        (["service", "show", "shop/web"], "there is no service shop/web"),
        (["service", "remove", "shop/web"], "there is no service shop/web"),
        (["endpoint", "remove", "shop/web/node-b/b"], "there is no endpoint shop/web/node-b/b"),
        (["endpoint", "drain", "shop/web/node-b/b"], "there is no endpoint shop/web/node-b/b"),
    ] {
        let error = command(&arguments).refused();
        assert!(error.contains(words), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn services_are_kept_in_etcd() {
    let network = Network::start().await;
    services_are_written_listed_and_removed(&|arguments| on(&network, arguments));
}

#[test]
fn services_are_kept_in_a_directory() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path().join("net");
    let error = on_directory(
        &root,
        &["service", "set", &format!("{{name: a/b, {}}}", "ports: [{name: a, port: 1}]")],
    )
    .refused();
    assert!(error.contains("no store") && !root.exists(), "{error}");
    on_directory(&root, &["config", "set", r#"{"Network":"10.5.0.0/16"}"#]).done();
    services_are_written_listed_and_removed(&|arguments| on_directory(&root, arguments));
}

#[tokio::test(flavor = "multi_thread")]
async fn records_that_agents_skip_are_shown_with_the_reason_and_can_be_removed() {
    let mut network = Network::start().await;
    for (key, value) in [
        ("services/shop/web", WEB),
        ("services/shop/bad", "{}"),
        ("services/junk\u{1b}[31m", WEB),
        ("vips/10.251.0.7", "shop/web"),
        ("vips/10.251.0.8", "Shop"),
        ("endpoints/shop/web/a", "{}"),
    ] {
        network.raw.put(format!("{PREFIX}/{key}"), value, None).await.unwrap();
    }
    let text = on(&network, &["service", "list"]).done();
    assert!(text.contains("10.251.0.7") && !text.contains('\u{1b}'), "{text}");
    for key in ["services/shop/bad", "vips/10.251.0.8", "endpoints/shop/web/a", r"services/junk\x1b[31m"] {
        assert!(text.contains(key), "{key}: {text}");
    }
    let error = on(&network, &["service", "show", "shop/bad"]).refused();
    assert!(error.contains("cannot be used") && error.contains("missing field"), "{error}");
    for key in ["shop/bad", r"junk\x1b[31m"] {
        on(&network, &["service", "remove", key]).done();
    }
    on(&network, &["endpoint", "remove", "shop/web/a"]).done();
    let wanted = "{name: shop/api, vip: 10.251.0.7, ports: [{name: a, port: 1}]}";
    let error = on(&network, &["service", "set", wanted]).refused();
    assert!(error.contains("shop/web holds the virtual address 10.251.0.7"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_that_an_agent_keeps_is_its_own() {
    let mut network = Network::start().await;
    let lease = network.raw.lease_grant(1000, None).await.unwrap().id();
    let options = PutOptions::new().with_lease(lease);
    let key = format!("{PREFIX}/endpoints/shop/web/node-a/1");
    network.raw.put(key, r#"{"overlay_ip":"10.5.1.2"}"#, Some(options)).await.unwrap();
    let add = ["endpoint", "add", "shop/web", "--node", "node-a", "--id", "1", "--address", "10.5.1.3"];
    assert!(on(&network, &add).refused().contains("the agent of the node node-a keeps the endpoint"));
    let name = "shop/web/node-a/1";
    assert!(on(&network, &["endpoint", "drain", name]).refused().contains("services file"));
    assert!(on(&network, &["endpoint", "remove", name]).refused().contains("--force"));
    let left =
        on(&network, &["endpoint", "list", "-o", "json"]).json()["endpoints"][0]["expires_in_s"].as_u64();
    assert!((900..=1000).contains(&left.unwrap()), "{left:?}");
    on(&network, &["endpoint", "remove", name, "--force"]).done();
}

#[test]
fn the_config_has_the_pool_of_virtual_addresses() {
    let own = r#"{"Network":"10.5.0.0/16","Services":{"Pool":"10.9.0.0/24","domain":"example"}}"#;
    let json = run(&["config", "check", own, "-o", "json"], &[], "").json();
    assert_eq!(
        (&json["effective"]["Services"]["Pool"], &json["unknown_keys"]),
        (&"10.9.0.0/24".into(), &serde_json::json!([]))
    );
    assert_eq!(json["effective"]["Services"]["LoadBalancing"]["policy"], "round_robin");
    let inside = r#"{"Network":"10.5.0.0/16","Services":{"Pool":"10.5.9.0/24"}}"#;
    let error = run(&["config", "check", inside], &[], "").refused();
    assert!(error.contains("Services.Pool") && error.contains("10.5.0.0/16"), "{error}");
    let misspelt = r#"{"Network":"10.5.0.0/16","Services":{"Poool":"10.9.0.0/24"}}"#;
    let answer = run(&["config", "check", misspelt], &[], "");
    assert!(answer.stderr.contains("Services.Poool"), "{}", answer.all());
}
