//! Users that change under a running agent: authentication switched off and on, another password, a revoked role.

use std::time::Duration;

use etcd_client::{Client, ConnectOptions};
use overlay_agent::{
    lease::Lease,
    store::{Event, Held, LeaseEvent, Store},
};
use tokio::{sync::mpsc, time::sleep};

use crate::{
    hosts::{Keeper, Network, ip, key_of, next, subnet_key, value},
    security::{PASSWORD, USER, user, with_users},
};

/// An agent that keeps a lease and follows the records, and a client with all rights.
struct Agent {
    held: Held,
    keeper: Keeper,
    events: mpsc::Receiver<Event<Lease>>,
}

impl Agent {
    async fn start(network: &Network) -> Self {
        let store = Store::etcd(user(network, PASSWORD)).await.unwrap();
        let held = store.acquire(&network.request(), ip(1)).await.unwrap();
        let mut events = store.follow::<Lease>();
        assert!(matches!(next(&mut events).await, Event::Snapshot(records) if records.len() == 1));
        let mut keeper = Keeper::start(&store, held.clone());
        keeper.confirmed().await;
        Self { held, keeper, events }
    }

    /// Deletes the agent's record with `client`, and waits until the agent has written it again.
    async fn loses_its_record_and_takes_it_back(&mut self, client: &mut Client) {
        let key = subnet_key(&key_of(&self.held));
        client.delete(key.clone(), None).await.unwrap();
        loop {
            match self.keeper.next().await {
                LeaseEvent::Reacquired { subnet, .. } if subnet == self.held.subnet => break,
                LeaseEvent::Unconfirmed { .. } | LeaseEvent::Lost { .. } | LeaseEvent::Confirmed { .. } => {}
                other => panic!("{other:?}"),
            }
        }
        let record = client.get(key, None).await.unwrap().take_kvs().pop().unwrap();
        assert_eq!(record.value_str().unwrap(), value(1));
    }
}

async fn root(network: &Network) -> Client {
    let as_root = ConnectOptions::new().with_user("root", "root-secret");
    Client::connect([network.etcd.endpoint()], Some(as_root)).await.unwrap()
}

#[tokio::test]
async fn authentication_that_is_switched_off_and_on_costs_no_lease() {
    let mut network = Network::start().await;
    with_users(&mut network).await;
    let mut agent = Agent::start(&network).await;
    root(&network).await.auth_disable().await.unwrap();
    let mut client = Client::connect([network.etcd.endpoint()], None).await.unwrap();
    agent.loses_its_record_and_takes_it_back(&mut client).await;
    // The agent's connection is now one without a login.
    client.auth_enable().await.unwrap();
    agent.loses_its_record_and_takes_it_back(&mut root(&network).await).await;
    agent.keeper.stop().await;
}

#[tokio::test]
async fn a_changed_password_is_reported_until_it_is_changed_back() {
    let mut network = Network::start().await;
    with_users(&mut network).await;
    let mut agent = Agent::start(&network).await;
    let mut root = root(&network).await;
    root.user_change_password(USER, "another").await.unwrap();
    root.delete(subnet_key(&key_of(&agent.held)), None).await.unwrap();
    let why = loop {
        match agent.keeper.next().await {
            LeaseEvent::Unconfirmed { why, .. } | LeaseEvent::Lost { why }
                if why.contains("etcd refuses") =>
            {
                break why;
            }
            LeaseEvent::Unconfirmed { .. } | LeaseEvent::Lost { .. } | LeaseEvent::Confirmed { .. } => {}
            other => panic!("{other:?}"),
        }
    };
    assert!(why.contains("--etcd-password") && !why.contains(PASSWORD), "{why}");
    root.user_change_password(USER, PASSWORD).await.unwrap();
    agent.loses_its_record_and_takes_it_back(&mut root).await;
    agent.keeper.stop().await;
}

#[tokio::test]
async fn a_role_that_is_revoked_and_granted_again_costs_no_lease() {
    let mut network = Network::start().await;
    with_users(&mut network).await;
    let mut agent = Agent::start(&network).await;
    let mut root = root(&network).await;
    root.user_revoke_role(USER, "overlay").await.unwrap();
    root.delete(subnet_key(&key_of(&agent.held)), None).await.unwrap();
    // The watch, which etcd permitted before, shows what peers see.
    assert!(matches!(next(&mut agent.events).await, Event::Changes(_)));
    loop {
        match agent.keeper.next().await {
            LeaseEvent::Unconfirmed { why, .. } | LeaseEvent::Lost { why } if why.contains("permission") => {
                break;
            }
            LeaseEvent::Unconfirmed { .. } | LeaseEvent::Confirmed { .. } => {}
            other => panic!("{other:?}"),
        }
    }
    sleep(Duration::from_secs(1)).await;
    root.user_grant_role(USER, "overlay").await.unwrap();
    loop {
        match agent.keeper.next().await {
            LeaseEvent::Reacquired { subnet, .. } if subnet == agent.held.subnet => break,
            LeaseEvent::Unconfirmed { .. } | LeaseEvent::Lost { .. } => {}
            other => panic!("{other:?}"),
        }
    }
    agent.keeper.stop().await;
}
