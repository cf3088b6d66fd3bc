//! TLS that does not work: each error names the file or the server, the reason and the remedy, and says whether waiting may help.

use std::{
    io::{Read as _, Write as _},
    net::TcpListener,
    path::PathBuf,
    thread,
};

use overlay_agent::store::{Store, StoreError, etcd::EtcdOptions};
use overlay_tests::etcd::Etcd;
use rcgen::{ExtendedKeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PKCS_ED25519, SanType, date_time_ymd};

use crate::authority::{Authority, Pair, options, serve, showing, trusting};

/// The refusal of a start that waiting does not help.
async fn refused(options: EtcdOptions) -> String {
    let error = Store::etcd(options).await.unwrap_err();
    assert!(!error.is_transient(), "{error:?}");
    assert!(matches!(error, StoreError::Unusable { .. } | StoreError::Option { .. }), "{error:?}");
    let text = error.to_string();
    // Neither of these is wrong.
    assert!(!text.contains("that etcd runs"), "{text}");
    text
}

/// The refusal of a start that may succeed later.
async fn waiting(options: EtcdOptions) -> String {
    let error = Store::etcd(options).await.unwrap_err();
    assert!(error.is_transient(), "{error:?}");
    error.to_string()
}

#[tokio::test]
async fn an_unusable_file_is_named_with_its_option_and_the_reason() {
    let authority = Authority::new();
    let Pair { certificate, key } = authority.sign("client");
    let other = authority.sign("other").key;
    let der = pem::parse(std::fs::read(&certificate).unwrap()).unwrap().into_contents();
    let text = std::fs::read_to_string(&certificate).unwrap();
    let empty = authority.write("empty", "");
    let cut = authority.write("cut", text.split("-----END").next().unwrap());
    let garbled = authority.write("garbled", text.replacen("\nM", "\n!", 1));
    let hollow = authority.write("hollow", pem::encode(&pem::Pem::new("CERTIFICATE", "nothing")));
    let encrypted =
        authority.write("encrypted", pem::encode(&pem::Pem::new("ENCRYPTED PRIVATE KEY", "nothing")));
    let hollow_key = authority.write("hollow.key", pem::encode(&pem::Pem::new("PRIVATE KEY", "nothing")));
    let der = authority.write("der", der);
    let missing = authority.path("missing");
    let ca_file = |file: &PathBuf| (Some(file.clone()), None);
    let identity = |certificate: &PathBuf, key: &PathBuf| (None, Some((certificate.clone(), key.clone())));
    for ((ca_file, identity), option, file, reason) in [
        (ca_file(&empty), "--etcd-cafile", &empty, "it is empty"),
        (ca_file(&key), "--etcd-cafile", &key, "only a private key"),
        (ca_file(&der), "--etcd-cafile", &der, "DER format"),
        (ca_file(&cut), "--etcd-cafile", &cut, "no end line"),
        (ca_file(&garbled), "--etcd-cafile", &garbled, "not base64"),
        (ca_file(&hollow), "--etcd-cafile", &hollow, "damaged"),
        (ca_file(&missing), "--etcd-cafile", &missing, "No such file"),
        (identity(&empty, &key), "--etcd-certfile", &empty, "it is empty"),
        (identity(&key, &key), "--etcd-certfile", &key, "only a private key"),
        (identity(&hollow, &key), "--etcd-certfile", &hollow, "damaged"),
        (identity(&missing, &key), "--etcd-certfile", &missing, "No such file"),
        (identity(&certificate, &empty), "--etcd-keyfile", &empty, "it is empty"),
        (identity(&certificate, &certificate), "--etcd-keyfile", &certificate, "only a certificate"),
        (identity(&certificate, &encrypted), "--etcd-keyfile", &encrypted, "is encrypted"),
        (identity(&certificate, &hollow_key), "--etcd-keyfile", &hollow_key, "must be RSA"),
        (identity(&certificate, &other), "--etcd-keyfile", &other, "does not belong to the certificate in"),
        (identity(&certificate, &missing), "--etcd-keyfile", &missing, "No such file"),
    ] {
        let (cert_file, key_file) = identity.unzip();
        let endpoints = vec!["https://127.0.0.1:1".to_owned()];
        let text =
            refused(EtcdOptions { endpoints, ca_file, cert_file, key_file, ..EtcdOptions::default() }).await;
        let file = file.display().to_string();
        assert!(text.starts_with(option) && text.contains(&file) && text.contains(reason), "{text}");
    }
}

#[tokio::test]
async fn a_servers_certificate_that_does_not_fit_is_described() {
    let authority = Authority::new();
    let ca = authority.ca().display().to_string();
    let expired = authority.sign_with("expired", |params| params.not_after = date_time_ymd(2020, 2, 3));
    let future = authority.sign_with("future", |params| params.not_before = date_time_ymd(2999, 2, 3));
    let misnamed = authority.sign_with("misnamed", |params| {
        params.subject_alt_names = ["a.example.com", "*.example.com"]
            .map(|name| SanType::DnsName(name.try_into().unwrap()))
            .into_iter()
            .chain([SanType::IpAddress("10.0.0.1".parse().unwrap())])
            .collect();
    });
    let nameless = authority.sign_with("nameless", |params| params.subject_alt_names.clear());
    let client = authority.sign_with("client", |params| {
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    });
    let alone = authority.self_signed("alone", |params| params.is_ca = rcgen::IsCa::NoCa);
    let ca_alone = authority.self_signed("CA alone", |_| {});
    for (pair, parts) in [
        (
            misnamed,
            vec![
                "(CN=misnamed) is for a.example.com, *.example.com, 10.0.0.1, not for 127.0.0.1",
                "--etcd-endpoints",
            ],
        ),
        (expired, vec!["(CN=expired) expired on 2020-02-03 00:00 UTC: renew it", "this host's clock"]),
        (nameless, vec!["(CN=nameless) has no subject alternative name"]),
        (client, vec!["(CN=client) is not for servers"]),
        (alone, vec!["(CN=alone) is self-signed and not in --etcd-cafile", &ca]),
        (ca_alone, vec!["(CN=CA alone) is that of a CA", "--etcd-cafile"]),
    ] {
        let etcd = serve(&pair, None);
        let text = refused(trusting(&etcd, authority.ca())).await;
        assert!(text.starts_with(&format!("cannot use etcd at {}: ", etcd.endpoint())), "{text}");
        assert!(parts.iter().all(|part| text.contains(part)), "{text}");
    }
    let etcd = serve(&future, None);
    let text = waiting(trusting(&etcd, authority.ca())).await;
    let part = "(CN=future) is not valid before 2999-02-03 00:00 UTC";
    assert!(text.contains(part) && text.contains("this host's clock"), "{text}");
    assert!(!text.contains("that etcd runs"), "{text}");
}

#[tokio::test]
async fn an_unknown_ca_is_named_beside_the_file_that_does_not_have_it() {
    let authority = Authority::new();
    let server = authority.server(false);
    let stranger = Authority::of("stranger", &PKCS_ECDSA_P256_SHA256);
    let text = refused(trusting(&server, stranger.ca())).await;
    let ca = stranger.ca().display().to_string();
    assert!(
        text.contains(&format!("(CN=server) is signed by CN=test CA, which is not in --etcd-cafile {ca}")),
        "{text}"
    );
    // A CA that was made again has the same name.
    let twin = Authority::new();
    let text = refused(trusting(&server, twin.ca())).await;
    assert!(
        text.contains("the CA has another key now") && text.contains(&twin.ca().display().to_string()),
        "{text}"
    );
    let twin = Authority::of("test CA", &PKCS_ED25519);
    let text = refused(trusting(&server, twin.ca())).await;
    assert!(
        text.contains("the CA has another key now") && text.contains(&twin.ca().display().to_string()),
        "{text}"
    );
    let text = refused(options(&server)).await;
    assert!(
        text.contains("not among the system's CA certificates") && text.contains("with --etcd-cafile"),
        "{text}"
    );
}

#[tokio::test]
async fn a_server_that_refuses_our_certificate_or_misses_it_is_understood() {
    let authority = Authority::new();
    let etcd = authority.server(true);
    let text = refused(trusting(&etcd, authority.ca())).await;
    assert!(
        text.contains("requires a client certificate") && text.contains("give --etcd-certfile"),
        "{text}"
    );

    let stranger = Authority::of("stranger", &PKCS_ECDSA_P256_SHA256);
    let expired = authority.sign_with("expired", |params| params.not_after = date_time_ymd(2020, 2, 3));
    let server_only = authority.sign_with("server only", |params| {
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    });
    for (pair, part) in [
        (stranger.sign("client"), "--trusted-ca-file"),
        (expired, "it expired on 2020-02-03"),
        (server_only, "be for clients"),
    ] {
        let text = refused(showing(&pair, trusting(&etcd, authority.ca()))).await;
        let file = pair.certificate.display().to_string();
        assert!(text.contains(&format!("--etcd-certfile {file}")) && text.contains(part), "{text}");
    }
}

#[tokio::test]
async fn the_wrong_scheme_is_understood() {
    let plain = Etcd::start().unwrap();
    let endpoints = vec![plain.endpoint().replace("http:", "https:")];
    let text = waiting(EtcdOptions { endpoints, ..EtcdOptions::default() }).await;
    assert!(text.contains("without TLS") && text.contains("write http://"), "{text}");

    let authority = Authority::new();
    let secure = authority.server(false);
    let endpoints = vec![secure.endpoint().replace("https:", "http:")];
    let text = waiting(EtcdOptions { endpoints, ..EtcdOptions::default() }).await;
    assert!(text.contains("with TLS") && text.contains("write https://"), "{text}");
}

/// A server that answers every connection with these bytes.
fn answering(bytes: &'static [u8]) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let _ = stream.read(&mut [0; 1024]);
            let _ = stream.write_all(bytes);
            // Until the client closes the connection.
            let _ = stream.read_to_end(&mut Vec::new());
        }
    });
    address.to_string()
}

#[tokio::test]
async fn a_server_that_is_not_etcd_is_understood() {
    let of = |scheme: &str, address: String| EtcdOptions {
        endpoints: vec![format!("{scheme}://{address}")],
        ..EtcdOptions::default()
    };
    let http = answering(b"HTTP/1.1 400 Bad Request\r\n\r\n");
    let text = refused(of("https", http.clone())).await;
    assert!(text.contains("does not speak TLS"), "{text}");
    let text = waiting(of("http", http)).await;
    assert!(text.contains("HTTP/1"), "{text}");
    // A TLS alert: handshake failure.
    let tls = answering(&[0x15, 3, 1, 0, 2, 2, 40]);
    let text = refused(of("http", tls.clone())).await;
    assert!(text.contains("speaks TLS: write https://"), "{text}");
    let text = refused(of("https", tls)).await;
    assert!(text.contains("TLS alert 40") && text.contains("--etcd-certfile"), "{text}");
}
