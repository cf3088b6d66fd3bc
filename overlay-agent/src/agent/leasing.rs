//! This host's dealings with the store: finding the network's configuration, taking a subnet, following everybody's, and
//! giving up what must be given up at the end.

use std::{fmt::Display, net::Ipv4Addr, time::Duration};

use anyhow::{Context as _, Result, bail};
use ipnet::Ipv4Net;
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinHandle,
    time::{sleep, timeout},
};
use tracing::{info, warn};

use super::{Options, StoreOption, outlook::Outlook};
use crate::{
    config::NetworkConfig,
    route_table::Record,
    store::{
        Event, LeaseEvent,
        dir::{Acquired, DirStore},
        etcd::{EtcdOptions, EtcdStore, Held},
    },
    subnet_env,
};

/// First and longest pause between attempts to reach etcd.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// How long the end of the agent may take for a word to etcd.
const FAREWELL: Duration = Duration::from_secs(3);

/// The store in use.
#[derive(Clone)]
pub(super) enum Leasing {
    /// All peers were given on the command line.
    Fixed,
    /// A directory.
    Dir(DirStore),
    /// etcd.
    Etcd(EtcdStore),
}

/// This host's subnet, and what keeps it.
pub(super) enum Lease {
    /// Nothing to keep: it stands until someone removes it. `created` is whether it was taken just now.
    Standing(Acquired),
    /// In etcd, before anybody keeps it.
    Held(Held),
    /// In etcd, kept by a task.
    Kept(Keeper),
}

pub(super) struct Keeper {
    public_ip: watch::Sender<Ipv4Addr>,
    stop: oneshot::Sender<()>,
    task: JoinHandle<Held>,
}

impl Leasing {
    /// Opens the store and reads the network's configuration. etcd may be away, and the configuration not yet written: this
    /// waits, and says for what.
    ///
    /// # Errors
    ///
    /// When waiting would not help.
    pub(super) async fn open(options: &Options, outlook: &mut Outlook) -> Result<(Self, NetworkConfig)> {
        let (leasing, mut config) = match &options.store {
            StoreOption::None => {
                let Some(network) = options.network else {
                    bail!(
                        "without --store, name the network with --network, this host's part with --subnet and the others with --peer"
                    );
                };
                (Self::Fixed, NetworkConfig::of_network(network)?)
            }
            StoreOption::Dir(root) => {
                let store = DirStore::new(root.clone());
                let config = store.config(options.network)?;
                (Self::Dir(store), config)
            }
            StoreOption::Etcd(etcd) => {
                let store = {
                    let fixed = options.peers.keys().copied().collect();
                    let etcd = EtcdOptions { fixed, ..(**etcd).clone() };
                    patiently(outlook, || EtcdStore::connect(etcd.clone())).await?
                };
                let config = etcd_config(&store, options, outlook).await?;
                (Self::Etcd(store), config)
            }
        };
        match options.port {
            Some(port) if !matches!(leasing, Self::Fixed) && port != config.port => bail!(
                "--port is {port}, but the network's config says {}: all hosts of a network use one port",
                config.port
            ),
            Some(port) => config.port = port,
            None => {}
        }
        Ok((leasing, config))
    }

    /// Takes a subnet for the host at `public_ip`.
    ///
    /// # Errors
    ///
    /// When none can be had.
    pub(super) async fn acquire(
        &self,
        options: &Options,
        config: &NetworkConfig,
        public_ip: Ipv4Addr,
        outlook: &mut Outlook,
    ) -> Result<Lease> {
        let earlier = options.subnet_file.as_deref().and_then(subnet_env::read_subnet);
        match (self, options.subnet) {
            (Self::Fixed, Some(subnet)) => Ok(Lease::Standing(Acquired { subnet, created: false })),
            (Self::Fixed, None) => {
                bail!("without --store, name this host's part of the network with --subnet")
            }
            (Self::Dir(store), wanted) => {
                if let Some(network) = options.network {
                    store.ensure_config(network)?;
                }
                store.acquire(config, public_ip, wanted, earlier, &options.peers).map(Lease::Standing)
            }
            (Self::Etcd(store), wanted) => {
                let held = patiently(outlook, || store.acquire(config, public_ip, wanted, earlier)).await?;
                Ok(Lease::Held(held))
            }
        }
    }

    /// The records as they are now, where reading them takes no waiting.
    ///
    /// # Errors
    ///
    /// When they cannot be read.
    pub(super) fn list(&self) -> Result<Option<Vec<Record>>> {
        match self {
            Self::Fixed => Ok(Some(Vec::new())),
            Self::Dir(store) => store.list().map(Some),
            Self::Etcd(_) => Ok(None),
        }
    }

    /// Follows the store, and keeps the lease, until nobody listens.
    pub(super) fn follow(&self, lease: Lease, public_ip: Ipv4Addr, events: mpsc::Sender<Event>) -> Lease {
        match (self, lease) {
            (Self::Dir(store), lease) => {
                tokio::spawn(store.clone().watch(events));
                lease
            }
            (Self::Etcd(store), Lease::Held(held)) => {
                let (watching, keeping) = (store.clone(), store.clone());
                let watch_events = events.clone();
                tokio::spawn(async move { watching.watch(watch_events).await });
                let (stop, stopped) = oneshot::channel::<()>();
                let (public_ip, address) = watch::channel(public_ip);
                let task = tokio::spawn(async move {
                    let stopped = async {
                        // Dropped or told: both mean to stop.
                        let _ = stopped.await;
                    };
                    keeping.maintain(held, address, events, stopped).await
                });
                Lease::Kept(Keeper { public_ip, stop, task })
            }
            (Self::Fixed | Self::Etcd(_), lease) => lease,
        }
    }

    /// Puts our record under another public address of this host, however long that takes.
    /// [`LeaseEvent::Readdressed`] says that it is there.
    pub(super) fn readdress(
        &self,
        lease: Option<&Lease>,
        subnet: Ipv4Net,
        from: Ipv4Addr,
        to: Ipv4Addr,
        events: mpsc::Sender<Event>,
    ) {
        match (self, lease) {
            (Self::Fixed, _) => {
                warn!("peers know this host by {from}: give them another --peer {subnet}={to}");
                tokio::spawn(said(events, to));
            }
            (Self::Dir(store), _) => {
                drop(tokio::spawn(readdress_file(store.clone(), subnet, from, to, events)))
            }
            (Self::Etcd(_), Some(Lease::Kept(keeper))) => {
                // Without a receiver the agent is about to end.
                let _ = keeper.public_ip.send(to);
            }
            (Self::Etcd(_), _) => {}
        }
    }

    /// Gives back a lease that was taken for nothing: the agent could not start.
    pub(super) async fn give_back(&self, lease: Lease, public_ip: Ipv4Addr) {
        let given = match (self, lease) {
            (Self::Dir(store), Lease::Standing(Acquired { subnet, created: true })) => {
                store.release(subnet, public_ip)
            }
            (Self::Etcd(store), Lease::Held(held)) => match held.created {
                true => store.release(&held).await.map_err(anyhow::Error::from),
                false => {
                    store.leave(&held).await;
                    Ok(())
                }
            },
            (Self::Fixed | Self::Dir(_) | Self::Etcd(_), _) => Ok(()),
        };
        if let Err(error) = given {
            warn!("give the lease back: {error:#}");
        }
    }

    /// The agent ends; its subnet stays its own for the next start.
    pub(super) async fn leave(&self, lease: Lease) {
        if let (Self::Etcd(store), Lease::Kept(keeper)) = (self, lease) {
            // The task may have ended by itself.
            let _ = keeper.stop.send(());
            let farewell = async {
                if let Ok(held) = keeper.task.await {
                    store.leave(&held).await;
                }
            };
            if timeout(FAREWELL, farewell).await.is_err() {
                warn!("etcd does not answer: another host can have our address only in a while");
            }
        }
    }

    /// For `status`.
    pub(super) fn name(&self) -> String {
        match self {
            Self::Fixed => "none".to_owned(),
            Self::Dir(store) => format!("dir:{}", store.root().display()),
            Self::Etcd(store) => format!("etcd at {}", store.endpoints()),
        }
    }

    /// The directory store, whose record the agent itself looks after.
    pub(super) fn dir(&self) -> Option<&DirStore> {
        match self {
            Self::Dir(store) => Some(store),
            Self::Fixed | Self::Etcd(_) => None,
        }
    }
}

impl Lease {
    /// The subnet, until somebody keeps the lease.
    pub(super) fn subnet(&self) -> Option<Ipv4Net> {
        match self {
            Self::Standing(acquired) => Some(acquired.subnet),
            Self::Held(held) => Some(held.subnet),
            Self::Kept(_) => None,
        }
    }
}

async fn said(events: mpsc::Sender<Event>, public_ip: Ipv4Addr) {
    // Nobody listens to the end of an agent.
    let _ = events.send(Event::Lease(LeaseEvent::Readdressed { public_ip })).await;
}

/// Tries until it is done. A record that is not ours is for whoever looks at the next listing.
async fn readdress_file(
    store: DirStore,
    subnet: Ipv4Net,
    from: Ipv4Addr,
    to: Ipv4Addr,
    events: mpsc::Sender<Event>,
) {
    loop {
        let again = store.clone();
        // It waits for a lock.
        let done = tokio::task::spawn_blocking(move || again.readdress(subnet, from, to)).await;
        let error = match done {
            Ok(Ok(true | false)) => return said(events, to).await,
            Ok(Err(error)) => error,
            Err(error) => error.into(),
        };
        warn!("put {subnet} under {to}, trying again: {error:#}");
        tokio::select! {
            () = sleep(LONGEST_PAUSE) => {}
            () = events.closed() => return,
        }
    }
}

async fn etcd_config(store: &EtcdStore, options: &Options, outlook: &mut Outlook) -> Result<NetworkConfig> {
    let mut pause = Pause::default();
    loop {
        if let Some(config) = patiently(outlook, || store.config()).await? {
            return match options.network {
                Some(network) if network.trunc() != config.network => bail!(
                    "--network is {network}, but {} in etcd says {}: change one of them",
                    store.config_key(),
                    config.network
                ),
                _ => Ok(config),
            };
        }
        pause
            .wait(
                outlook,
                format!("there is no {} in etcd yet: write the network's config there", store.config_key()),
            )
            .await;
    }
}

/// Asks again and again while etcd is away.
async fn patiently<T, F: Future<Output = Result<T, crate::store::etcd::EtcdError>>>(
    outlook: &mut Outlook,
    mut ask: impl FnMut() -> F,
) -> Result<T> {
    let mut pause = Pause::default();
    loop {
        match ask().await {
            Ok(answer) => return Ok(answer),
            Err(error) if error.is_transient() => pause.wait(outlook, error).await,
            Err(error) => return Err(error).context("the store"),
        }
    }
}

/// Longer and longer waits, each new reason said once.
#[derive(Default)]
struct Pause {
    last: Option<Duration>,
    said: String,
}

impl Pause {
    async fn wait(&mut self, outlook: &mut Outlook, why: impl Display) {
        let why = why.to_string();
        outlook.waiting(&why);
        if why != self.said {
            info!("waiting: {why}");
            self.said = why;
        }
        let pause = self.last.map_or(FIRST_PAUSE, |last| (last * 2).min(LONGEST_PAUSE));
        self.last = Some(pause);
        sleep(pause).await;
    }
}
