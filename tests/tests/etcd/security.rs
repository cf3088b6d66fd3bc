//! A user with a password.

use etcd_client::{Client, Permission, PermissionType, RoleRevokePermissionOptions};
use overlay_agent::{
    lease::Lease,
    store::{Event, Store, StoreError, SubnetRequest, etcd::EtcdOptions},
};

use crate::hosts::{NETWORK, Network, PREFIX, ip, next};

/// The whole way: config, lease, watch.
pub(crate) async fn works(options: EtcdOptions) {
    let store = Store::etcd(options).await.unwrap();
    store.set_config(NETWORK).await.unwrap();
    let config = store.config(None).await.unwrap();
    let held = store.acquire(&SubnetRequest::any(config), ip(1)).await.unwrap();
    let Event::Snapshot(records) = next(&mut store.follow::<Lease>()).await else { panic!("no snapshot") };
    assert_eq!(records[0].subnet(), Some(held.subnet));
    store.release(&held).await.unwrap();
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

/// The options of that user with a password.
pub(crate) fn user(network: &Network, password: &str) -> EtcdOptions {
    EtcdOptions {
        username: Some(USER.to_owned()),
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
