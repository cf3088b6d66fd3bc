//! Several endpoints: agents spread over them, and one that cannot be used does not hide the others.

use overlay_agent::store::{Store, StoreError, etcd::EtcdOptions};
use overlay_tests::etcd::Etcd;
use rcgen::{PKCS_ECDSA_P256_SHA256, date_time_ymd};

use crate::{
    authority::{Authority, serve, trusting},
    hosts::{NETWORK, PREFIX},
    security::works,
};

const OTHER: &str = r#"{"Network":"10.6.0.0/16","Backend":{"Type":"udp"}}"#;
/// An endpoint where nothing listens.
const AWAY: &str = "https://127.0.0.1:1";

fn of(endpoints: &[String]) -> EtcdOptions {
    EtcdOptions { endpoints: endpoints.to_vec(), prefix: PREFIX.to_owned(), ..EtcdOptions::default() }
}

#[tokio::test]
async fn agents_spread_over_the_endpoints_and_each_stays_with_its_own() {
    let mut servers = [Etcd::start().unwrap(), Etcd::start().unwrap()];
    let endpoints = servers.each_ref().map(Etcd::endpoint);
    for (endpoint, config) in endpoints.iter().zip([NETWORK, OTHER]) {
        Store::etcd(of(std::slice::from_ref(endpoint))).await.unwrap().set_config(config).await.unwrap();
    }
    // The servers are no cluster, so that the network shows which of them an agent asks.
    let mut asked = [0; 2];
    let mut first = None;
    for _ in 0..64 {
        let store = Store::etcd(of(&endpoints)).await.unwrap();
        let network = store.config(None).await.unwrap().network;
        assert_eq!(store.config(None).await.unwrap().network, network);
        let server = usize::from(network.to_string() == "10.6.0.0/16");
        asked[server] += 1;
        if server == 0 {
            first = Some(store);
        }
    }
    assert!(asked.iter().all(|&times| times > 0), "all 64 agents chose one server: {asked:?}");
    // One that fails is left for the next.
    let store = first.unwrap();
    servers[0].kill();
    let network = loop {
        if let Ok(config) = store.config(None).await {
            break config.network;
        }
    };
    assert_eq!(network.to_string(), "10.6.0.0/16");
}

#[tokio::test]
async fn an_endpoint_that_works_is_used_whatever_is_wrong_with_the_others() {
    let authority = Authority::new();
    let stranger = Authority::of("stranger", &PKCS_ECDSA_P256_SHA256);
    let strange = stranger.server(false);
    let good = authority.server(false);
    let endpoints = vec![strange.endpoint(), AWAY.to_owned(), good.endpoint()];
    for _ in 0..4 {
        works(EtcdOptions { endpoints: endpoints.clone(), ..trusting(&good, authority.ca()) }).await;
    }
}

#[tokio::test]
async fn a_start_waits_only_for_endpoints_that_may_come_back() {
    let authority = Authority::new();
    let future = authority.sign_with("future", |params| params.not_before = date_time_ymd(2999, 2, 3));
    let future = serve(&future, None);
    let nameless = authority.sign_with("nameless", |params| params.subject_alt_names.clear());
    let nameless = serve(&nameless, None);
    let stranger = Authority::of("stranger", &PKCS_ECDSA_P256_SHA256);
    let strange = stranger.server(false);
    let trusting = |endpoints: &[String]| EtcdOptions {
        endpoints: endpoints.to_vec(),
        ..trusting(&future, authority.ca())
    };
    let error = Store::etcd(trusting(&[AWAY.to_owned(), nameless.endpoint()])).await.unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, StoreError::Unreachable { .. }) && error.is_transient(), "{error:?}");
    assert!(text.contains(&format!("{AWAY}: ")) && text.contains("refused"), "{text}");
    assert!(
        text.contains(&format!("{}: the server's certificate (CN=nameless)", nameless.endpoint())),
        "{text}"
    );

    for (other, part, heals) in
        [(&future, "(CN=future) is not valid before", true), (&strange, "is signed by CN=stranger", false)]
    {
        let error = Store::etcd(trusting(&[nameless.endpoint(), other.endpoint()])).await.unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, StoreError::Unusable { .. }) && error.is_transient() == heals, "{error:?}");
        assert!(
            text.contains("(CN=nameless) has no subject alternative name") && text.contains(part),
            "{text}"
        );
    }
}

#[tokio::test]
async fn an_endpoint_that_is_none_is_refused_at_the_start() {
    for endpoint in ["http://127.0.0.1:99999", "http://127.0.0.1:2379/v2", "http://10.0.0.256:2379"] {
        let error = Store::etcd(of(&[endpoint.to_owned()])).await.unwrap_err();
        assert!(matches!(error, StoreError::Option { option: "--etcd-endpoints", .. }), "{error:?}");
    }
}
