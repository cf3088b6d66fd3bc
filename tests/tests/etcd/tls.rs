//! TLS that works: what Go's client accepts is accepted, and files are read again after they changed.

use overlay_agent::{
    lease::Lease,
    store::{Event, LeaseEvent, Store, StoreError, SubnetRequest},
};
use rcgen::{PKCS_ECDSA_P384_SHA384, PKCS_ECDSA_P521_SHA512, PKCS_ED25519};

use crate::{
    authority::{Authority, serve, showing, trusting},
    hosts::{Keeper, NETWORK, TIMEOUT, ip, next},
    security::works,
};

#[tokio::test]
async fn a_ca_alone_is_enough_for_a_server_that_asks_for_no_certificate() {
    let authority = Authority::new();
    works(trusting(&authority.server(false), authority.ca())).await;
}

#[tokio::test]
async fn a_client_certificate_is_shown_to_a_server_that_asks_for_one() {
    let authority = Authority::new();
    let etcd = authority.server(true);
    works(showing(&authority.sign("client"), trusting(&etcd, authority.ca()))).await;
}

#[tokio::test]
async fn a_client_certificate_of_version_1_is_accepted_as_etcd_accepts_it() {
    let authority = Authority::new();
    let etcd = authority.server(true);
    works(showing(&authority.sign_v1("client"), trusting(&etcd, authority.ca()))).await;
}

#[tokio::test]
async fn every_kind_of_key_that_etcd_knows_works_for_ca_server_and_client() {
    for algorithm in [&PKCS_ECDSA_P521_SHA512, &PKCS_ECDSA_P384_SHA384, &PKCS_ED25519] {
        let authority = Authority::of("test CA", algorithm);
        let etcd = authority.server(true);
        works(showing(&authority.sign("client"), trusting(&etcd, authority.ca()))).await;
        works(showing(&authority.sign_v1("old"), trusting(&etcd, authority.ca()))).await;
    }
}

#[tokio::test]
async fn a_self_signed_ca_certificate_that_the_ca_file_names_is_accepted_from_a_server() {
    let authority = Authority::new();
    let pair = authority.self_signed("server", |_| {});
    let etcd = serve(&pair, None);
    works(trusting(&etcd, &pair.certificate)).await;
    // Among others, too.
    let both = ["ca.pem", "server.pem"].map(|file| std::fs::read(authority.path(file)).unwrap()).concat();
    works(trusting(&etcd, authority.write("both.pem", both))).await;
    // The same names and another key.
    let directory = Authority::new();
    let twin = directory.self_signed("server", |_| {});
    let error = Store::etcd(trusting(&etcd, &twin.certificate)).await.unwrap_err();
    assert!(matches!(error, StoreError::Unusable { heals: false, .. }), "{error:?}");
}

#[tokio::test]
async fn a_ca_certificate_that_is_named_for_the_server_must_fit_in_all_else() {
    let authority = Authority::new();
    let year = rcgen::date_time_ymd;
    let expired = authority.self_signed("expired", |params| params.not_after = year(2020, 2, 3));
    let other = authority.self_signed("other", |params| {
        params.subject_alt_names = vec![rcgen::SanType::DnsName("etcd.example.com".try_into().unwrap())];
    });
    let client = authority.self_signed("client", |params| {
        params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
    });
    let future = authority.self_signed("future", |params| params.not_before = year(2999, 2, 3));
    for (pair, part, heals) in [
        (expired, "expired on 2020-02-03", false),
        (other, "is for etcd.example.com, not for 127.0.0.1", false),
        (client, "is not for servers", false),
        (future, "is not valid before 2999-02-03", true),
    ] {
        let etcd = serve(&pair, None);
        let error = Store::etcd(trusting(&etcd, &pair.certificate)).await.unwrap_err();
        assert!(error.to_string().contains(part) && error.is_transient() == heals, "{error}");
    }
}

#[tokio::test]
async fn keys_in_openssls_older_format_work() {
    let authority = Authority::new();
    let etcd = authority.server(true);
    let pair = authority.sign("client");
    // PKCS #8 wraps the older format in an octet string.
    let pkcs8 = pem::parse(std::fs::read(&pair.key).unwrap()).unwrap();
    let start =
        pkcs8.contents().windows(5).position(|bytes| bytes.starts_with(&[0x30]) && bytes[2..] == [2, 1, 1]);
    let sec1 = pem::Pem::new("EC PRIVATE KEY", &pkcs8.contents()[start.unwrap()..]);
    std::fs::write(&pair.key, pem::encode(&sec1)).unwrap();
    works(showing(&pair, trusting(&etcd, authority.ca()))).await;
}

#[tokio::test]
async fn a_running_agent_keeps_trying_while_its_files_are_broken_and_reads_them_again() {
    let authority = Authority::new();
    let mut etcd = authority.server(true);
    let client = authority.sign("client");
    let store = Store::etcd(showing(&client, trusting(&etcd, authority.ca()))).await.unwrap();
    store.set_config(NETWORK).await.unwrap();
    let config = store.config(None).await.unwrap();
    let held = store.acquire(&SubnetRequest::any(config), ip(1)).await.unwrap();
    let mut events = store.follow::<Lease>();
    let Event::Snapshot(_) = next(&mut events).await else { panic!("no snapshot") };

    let good = std::fs::read(&client.certificate).unwrap();
    std::fs::write(&client.certificate, "").unwrap();
    etcd.restart().unwrap();
    let error = tokio::time::timeout(TIMEOUT, async {
        loop {
            match store.config(None).await {
                // A connection that is open already goes on.
                Ok(_) => tokio::time::sleep(std::time::Duration::from_millis(50)).await,
                Err(error) if error.to_string().contains("--etcd-certfile") => return error,
                Err(_) => {}
            }
        }
    });
    let error = error.await.expect("the broken file was not noticed");
    assert!(error.to_string().contains(&client.certificate.display().to_string()), "{error}");
    let mut keeper = Keeper::start(&store, held);
    match keeper.next().await {
        LeaseEvent::Unconfirmed { why, .. } => assert!(why.contains("--etcd-certfile"), "{why}"),
        other => panic!("{other:?}"),
    }
    std::fs::write(&client.certificate, good).unwrap();
    assert!(keeper.confirmed().await.is_some());
    keeper.stop().await;
}

#[tokio::test]
async fn nothing_of_a_key_is_shown() {
    let authority = Authority::new();
    let etcd = authority.server(true);
    let pair = authority.sign("client");
    let options = showing(&pair, trusting(&etcd, authority.ca()));
    let store = Store::etcd(options.clone()).await.unwrap();
    let key = std::fs::read_to_string(&pair.key).unwrap();
    let secret = key.lines().nth(1).unwrap();
    let mut shown = format!("{store:?} {options:?}");
    // Each way to break the file.
    for broken in [
        key.replace("-----END", "----END"),
        key.replacen(secret, &format!("{secret}%"), 1),
        format!("{secret}\n"),
    ] {
        std::fs::write(&pair.key, broken).unwrap();
        let error = Store::etcd(options.clone()).await.unwrap_err();
        assert!(error.to_string().contains("--etcd-keyfile"), "{error}");
        shown = format!("{shown} {error} {error:?}");
    }
    assert!(!shown.contains(secret), "{shown}");
    let bytes = pem::parse(&key).unwrap();
    assert!(!shown.contains(&format!("{:?}", &bytes.contents()[..8]).replace(['[', ']'], "")), "{shown}");
}
