//! Keeping a subnet: renewed in time, acquired again when lost, never taken from another host.

use std::{thread, time::Duration};

use overlay_agent::store::{LeaseEvent, Store};
use tokio::{sync::mpsc, time::sleep};

use crate::hosts::{Keeper, NETWORK, Network, PREFIX, ip, key_of, next, subnet_key, value};

#[tokio::test]
async fn a_short_lease_is_renewed_again_and_again() {
    let mut network = Network::start().await;
    let store = network.short_store(1, 3).await;
    let held = store.acquire(&network.request(), ip(1)).await.unwrap();
    let mut keeper = Keeper::start(&store, held.clone());
    for _ in 0..4 {
        assert_eq!(keeper.confirmed().await, Some(Duration::from_secs(3)));
    }
    sleep(Duration::from_secs(5)).await;
    let record = network.get(&key_of(&held)).await.unwrap();
    keeper.stop().await;
    assert_eq!(record.version(), 1, "renewing does not write the record");
}

#[tokio::test]
async fn a_revoked_lease_and_a_deleted_key_are_taken_back() {
    let mut network = Network::start().await;
    let held = network.acquire(1).await;
    let mut keeper = Keeper::start(&network.store(1).await, held.clone());
    keeper.confirmed().await;
    let first = network.lease_of(&held).await;
    network.raw.lease_revoke(first).await.unwrap();
    let news = keeper.news().await;
    assert!(matches!(news, LeaseEvent::Reacquired { subnet, .. } if subnet == held.subnet), "{news:?}");
    let second = network.get(&key_of(&held)).await.unwrap();
    assert_eq!(second.value_str().unwrap(), value(1));
    assert!(second.lease() != 0 && second.lease() != first);
    network.raw.delete(subnet_key(&key_of(&held)), None).await.unwrap();
    let news = keeper.news().await;
    assert!(matches!(news, LeaseEvent::Reacquired { subnet, .. } if subnet == held.subnet), "{news:?}");
    let third = network.lease_of(&held).await;
    keeper.stop().await;
    let leases: Vec<_> =
        network.raw.leases().await.unwrap().leases().iter().map(|lease| lease.id()).collect();
    assert!(leases.contains(&third) && !leases.contains(&second.lease()) && !leases.contains(&first));
}

#[tokio::test]
async fn a_subnet_that_somebody_else_holds_meanwhile_is_left_to_them() {
    let mut network = Network::start().await;
    let held = network.acquire(1).await;
    let mut keeper = Keeper::start(&network.store(1).await, held.clone());
    keeper.confirmed().await;
    let lease = network.lease_of(&held).await;
    // One write: the key is never free.
    let theirs = network.raw.lease_grant(600, None).await.unwrap().id();
    network.put(&key_of(&held), value(50), theirs).await;
    let before = network.get(&key_of(&held)).await.unwrap();
    let LeaseEvent::Moved { from, to, why } = keeper.news().await else { panic!("not moved") };
    assert!(from == held.subnet && to != from && why.contains("192.168.77.50"), "{to} {why}");
    let moved = keeper.stop().await;
    assert_eq!(moved.subnet, to);
    assert_eq!(network.get(&key_of(&moved)).await.unwrap().value_str().unwrap(), value(1));
    let after = network.get(&key_of(&held)).await.unwrap();
    assert_eq!((after.mod_revision(), after.lease()), (before.mod_revision(), theirs));
    assert!(!network.raw.leases().await.unwrap().leases().iter().any(|other| other.id() == lease));
}

/// An agent in a thread of its own that can be stopped as SIGSTOP stops a process: all of it at once, its connections
/// included, while time continues.
struct Pausable {
    events: mpsc::Receiver<LeaseEvent>,
    pause: mpsc::UnboundedSender<Duration>,
    thread: thread::JoinHandle<()>,
}

impl Pausable {
    fn start(network: &Network, seconds: u64) -> Self {
        let ttl = Duration::from_secs(seconds);
        let mut options = network.options(1);
        options.lease_ttl = ttl;
        options.renew_margin = ttl / 2;
        let request = network.preferring("10.5.9.0/24");
        let (sender, events) = mpsc::channel(64);
        let (pause, mut pauses) = mpsc::unbounded_channel::<Duration>();
        let thread = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async move {
                let store = Store::etcd(options).await.unwrap();
                let held = store.acquire(&request, ip(1)).await.unwrap();
                let mut keeper = store.keep(held);
                loop {
                    tokio::select! {
                        Some(event) = keeper.events.recv() => sender.send(event).await.unwrap(),
                        pause = pauses.recv() => match pause {
                            // Blocks the only thread of this runtime.
                            Some(pause) => thread::sleep(pause),
                            None => return,
                        },
                    }
                }
            });
        });
        Self { events, pause, thread }
    }

    /// The next event that is neither a confirmation nor about requests that timed out during the pause.
    async fn news(&mut self) -> LeaseEvent {
        loop {
            match next(&mut self.events).await {
                LeaseEvent::Unconfirmed { .. } | LeaseEvent::Confirmed { .. } => {}
                news => return news,
            }
        }
    }

    fn stop(self) {
        drop(self.pause);
        self.thread.join().unwrap();
    }
}

#[tokio::test]
async fn an_agent_that_was_paused_past_its_lease_does_not_overwrite_the_new_owner() {
    let mut network = Network::start().await;
    let mut agent = Pausable::start(&network, 2);
    next(&mut agent.events).await;
    agent.pause.send(Duration::from_secs(9)).unwrap();
    network.wait_for("10.5.9.0-24", |record| record.is_none()).await;
    let theirs = network.take(2, "10.5.9.0/24").await;
    let before = network.get("10.5.9.0-24").await.unwrap();
    let news = agent.news().await;
    assert!(
        matches!(&news, LeaseEvent::Moved { from, to, .. } if *from == theirs.subnet && to != from),
        "{news:?}"
    );
    // Long enough for every timer that was due in its sleep.
    sleep(Duration::from_secs(2)).await;
    let after = network.get("10.5.9.0-24").await.unwrap();
    assert_eq!(
        (after.mod_revision(), after.value_str().unwrap()),
        (before.mod_revision(), value(2).as_str())
    );
    agent.stop();
}

#[tokio::test]
async fn a_paused_agent_whose_subnet_no_host_took_acquires_it_again() {
    let mut network = Network::start().await;
    let mut agent = Pausable::start(&network, 2);
    next(&mut agent.events).await;
    agent.pause.send(Duration::from_secs(6)).unwrap();
    network.wait_for("10.5.9.0-24", |record| record.is_none()).await;
    let news = agent.news().await;
    assert!(
        matches!(&news, LeaseEvent::Reacquired { subnet, .. } if *subnet == "10.5.9.0/24".parse().unwrap()),
        "{news:?}"
    );
    assert_eq!(network.get("10.5.9.0-24").await.unwrap().value_str().unwrap(), value(1));
    agent.stop();
}

#[tokio::test]
async fn an_etcd_that_is_away_makes_a_lease_unconfirmed_once_and_confirmed_after() {
    let mut network = Network::start().await;
    let held = network.acquire(1).await;
    let mut keeper = Keeper::start(&network.store(1).await, held.clone());
    keeper.confirmed().await;
    network.etcd.kill();
    let news = keeper.news().await;
    let LeaseEvent::Unconfirmed { expires_in: Some(left), .. } = &news else { panic!("{news:?}") };
    assert!(*left > Duration::from_secs(86000), "{left:?}");
    sleep(Duration::from_secs(3)).await;
    network.etcd.restart().unwrap();
    // No other event in between: the problem is reported once.
    assert_eq!(keeper.confirmed().await, Some(Duration::from_secs(86400)));
    assert_eq!(network.get(&key_of(&held)).await.unwrap().version(), 1);
    keeper.stop().await;
}

#[tokio::test]
async fn after_etcd_lost_its_data_our_lease_is_written_again() {
    let mut network = Network::start().await;
    let held = network.acquire(1).await;
    let mut keeper = Keeper::start(&network.store(1).await, held.clone());
    keeper.confirmed().await;
    network.etcd.wipe().unwrap();
    network.etcd.restart().unwrap();
    let news = loop {
        match keeper.news().await {
            LeaseEvent::Unconfirmed { .. } => {}
            news => break news,
        }
    };
    assert!(matches!(&news, LeaseEvent::Reacquired { subnet, .. } if *subnet == held.subnet), "{news:?}");
    let record = network.get(&key_of(&held)).await.unwrap();
    assert_eq!(record.value_str().unwrap(), value(1));
    keeper.stop().await;
}

#[tokio::test]
async fn a_config_that_is_gone_keeps_no_lease_from_being_kept() {
    let mut network = Network::start().await;
    let held = network.acquire(1).await;
    let mut keeper = Keeper::start(&network.store(1).await, held.clone());
    keeper.confirmed().await;
    network.raw.delete(format!("{PREFIX}/config"), None).await.unwrap();
    network.raw.delete(subnet_key(&key_of(&held)), None).await.unwrap();
    let news = keeper.news().await;
    assert!(matches!(&news, LeaseEvent::Reacquired { subnet, .. } if *subnet == held.subnet), "{news:?}");
    assert!(network.store(1).await.set_config(NETWORK).await.unwrap().is_none());
    keeper.stop().await;
}
