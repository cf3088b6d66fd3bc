//! TLS with a CA only and with a client certificate, and a user with a password.

use std::path::PathBuf;

use etcd_client::{Client, Permission, PermissionType, RoleRevokePermissionOptions};
use overlay_agent::{
    lease::Lease,
    store::{Event, Store, StoreError, SubnetRequest, etcd::EtcdOptions},
};
use overlay_tests::etcd::{Etcd, ServerTls};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use tempfile::TempDir;

use crate::hosts::{NETWORK, Network, PREFIX, ip, next};

/// A CA and what it signs, as files.
struct Authority {
    directory: TempDir,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, "test CA");
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap();
        std::fs::write(directory.path().join("ca.pem"), certificate.pem()).unwrap();
        Self { directory, issuer: Issuer::new(params, key) }
    }

    fn ca(&self) -> PathBuf {
        self.directory.path().join("ca.pem")
    }

    /// Certificate and key of a server at 127.0.0.1.
    fn sign(&self, name: &str) -> (PathBuf, PathBuf) {
        let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let files = ["pem", "key"].map(|kind| self.directory.path().join(format!("{name}.{kind}")));
        std::fs::write(&files[0], certificate.pem()).unwrap();
        std::fs::write(&files[1], key.serialize_pem()).unwrap();
        let [certificate, key] = files;
        (certificate, key)
    }

    fn server(&self, asks_clients: bool) -> Etcd {
        let (cert, key) = self.sign("server");
        let client_ca = asks_clients.then(|| self.ca());
        Etcd::start_with(Some(ServerTls { cert, key, client_ca })).unwrap()
    }
}

fn options(etcd: &Etcd) -> EtcdOptions {
    EtcdOptions { endpoints: vec![etcd.endpoint()], prefix: PREFIX.to_owned(), ..EtcdOptions::default() }
}

/// The whole way: config, lease, watch.
async fn works(options: EtcdOptions) {
    let store = Store::etcd(options).await.unwrap();
    store.set_config(NETWORK).await.unwrap();
    let config = store.config(None).await.unwrap();
    let held = store.acquire(&SubnetRequest::any(config), ip(1)).await.unwrap();
    let Event::Snapshot(records) = next(&mut store.follow::<Lease>()).await else { panic!("no snapshot") };
    assert_eq!(records[0].subnet(), Some(held.subnet));
    store.release(&held).await.unwrap();
}

#[tokio::test]
async fn a_ca_alone_is_enough_for_a_server_that_asks_for_no_certificate() {
    let authority = Authority::new();
    let etcd = authority.server(false);
    works(EtcdOptions { ca_file: Some(authority.ca()), ..options(&etcd) }).await;
    let without = Store::etcd(options(&etcd)).await.unwrap_err();
    assert!(without.to_string().contains("certificate"), "{without}");
    let wrong = EtcdOptions { ca_file: Some(Authority::new().ca()), ..options(&etcd) };
    let missing_file = Store::etcd(wrong).await.unwrap_err();
    assert!(matches!(missing_file, StoreError::Option { .. }), "its directory is gone: {missing_file}");
    let stranger = Authority::new();
    let wrong = EtcdOptions { ca_file: Some(stranger.ca()), ..options(&etcd) };
    assert!(Store::etcd(wrong).await.unwrap_err().to_string().contains("certificate"));
}

#[tokio::test]
async fn a_client_certificate_is_shown_to_a_server_that_asks_for_one() {
    let authority = Authority::new();
    let etcd = authority.server(true);
    let (cert, key) = authority.sign("client");
    let with_ca = EtcdOptions { ca_file: Some(authority.ca()), ..options(&etcd) };
    works(EtcdOptions { cert_file: Some(cert), key_file: Some(key), ..with_ca.clone() }).await;
    assert!(Store::etcd(with_ca).await.is_err());
}

/// The user of [`with_users`], and the password.
pub(crate) const USER: &str = "flannel";
pub(crate) const PASSWORD: &str = "hunter2";

/// Users on: root, and `flannel` with the rights on the prefix only.
pub(crate) async fn with_users(network: &mut Network) {
    let raw = &mut network.raw;
    raw.role_add("root").await.unwrap();
    raw.user_add("root", "root-secret", None).await.unwrap();
    raw.user_grant_role("root", "root").await.unwrap();
    raw.role_add("overlay").await.unwrap();
    let all = Permission::new(PermissionType::Readwrite, format!("{PREFIX}/")).with_prefix();
    raw.role_grant_permission("overlay", all).await.unwrap();
    raw.user_add(USER, PASSWORD, None).await.unwrap();
    raw.user_grant_role(USER, "overlay").await.unwrap();
    raw.auth_enable().await.unwrap();
}

fn user(network: &Network, password: &str) -> EtcdOptions {
    EtcdOptions {
        username: Some("flannel".to_owned()),
        password: Some(password.to_owned().into()),
        ..network.options(1)
    }
}

#[tokio::test]
async fn a_user_with_a_password_works_and_a_wrong_one_is_refused_without_being_shown() {
    let mut network = Network::start().await;
    with_users(&mut network).await;
    works(user(&network, "hunter2")).await;
    for options in [user(&network, "hunter3"), network.options(1)] {
        let error = match Store::etcd(options).await {
            Ok(store) => store.config(None).await.unwrap_err(),
            Err(error) => error,
        };
        assert!(matches!(error, StoreError::Denied { .. }) && !error.is_transient(), "{error:?}");
        let shown = format!("{error} {error:?}");
        assert!(shown.contains("--etcd-username") && !shown.contains("hunter"), "{shown}");
    }
    let store = Store::etcd(user(&network, "hunter2")).await.unwrap();
    assert!(!format!("{store:?}").contains("hunter2"), "{store:?}");
}

#[tokio::test]
async fn a_user_is_not_needed_and_does_no_harm_where_etcd_has_none() {
    let network = Network::start().await;
    works(user(&network, "hunter2")).await;
}

#[tokio::test]
async fn a_user_who_may_write_flannels_keys_only_gets_a_subnet_all_the_same() {
    let mut network = Network::start().await;
    with_users(&mut network).await;
    let root = etcd_client::ConnectOptions::new().with_user("root", "root-secret");
    let mut root = Client::connect([network.etcd.endpoint()], Some(root)).await.unwrap();
    let all = RoleRevokePermissionOptions::new().with_prefix();
    root.role_revoke_permission("overlay", format!("{PREFIX}/"), Some(all)).await.unwrap();
    for keys in ["config", "subnets/"] {
        let keys = Permission::new(PermissionType::Readwrite, format!("{PREFIX}/{keys}")).with_prefix();
        root.role_grant_permission("overlay", keys).await.unwrap();
    }
    let store = Store::etcd(user(&network, "hunter2")).await.unwrap();
    let held = store.acquire(&network.request(), ip(1)).await.unwrap();
    let mut keeper = crate::hosts::Keeper::start(&store, held);
    assert!(keeper.confirmed().await.is_some());
    keeper.stop().await;
}
