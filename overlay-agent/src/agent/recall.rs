//! The start without the store: reads the network's configuration from the store, or, when that does not answer, takes what an
//! earlier run of this host has left on disk.

use std::{
    net::Ipv4Addr,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result};
use backon::{BackoffBuilder as _, ExponentialBuilder};
use tokio::time::{Instant, sleep};
use tracing::warn;

use super::{Options, notifier::HealthNotifier};
use crate::{
    config::NetworkConfig,
    store::{Saved, Store},
    timer::sleep_until_some,
};

/// First and longest pause between attempts to reach etcd.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// How long etcd may take to answer before the snapshot takes its place. Longer than the election of a new leader.
const PATIENCE: Duration = Duration::from_secs(10);

/// What an earlier run of this host knew, and why it is needed.
#[derive(Debug)]
pub(super) struct Recalled {
    pub(super) saved: Saved,
    pub(super) config: NetworkConfig,
    /// Why the store was not asked.
    pub(super) why: String,
}

/// What the agent starts from.
#[derive(Debug)]
pub(super) enum Opened {
    /// The store, with this configuration.
    Answered(NetworkConfig),
    /// The snapshot.
    Recalled(Box<Recalled>),
}

/// Pauses between attempts to reach etcd.
pub(super) fn pauses() -> ExponentialBuilder {
    ExponentialBuilder::new().with_min_delay(FIRST_PAUSE).with_max_delay(LONGEST_PAUSE).without_max_times()
}

/// Reads the configuration. While the store is away or has none, this waits and reports the reason; a store that does not answer at
/// all is waited for as long as there is no snapshot of this host at `public_ip` that can take its place.
/// Fails when waiting does not help.
pub(super) async fn open(
    store: &Store,
    options: &Options,
    public_ip: Ipv4Addr,
    notifier: &mut HealthNotifier,
) -> Result<Opened> {
    loop {
        let (usable, refusal) = match look(store, options, public_ip).await {
            Ok(usable) => (usable, String::new()),
            Err(why) => {
                (None, format!("; the snapshot {} is not used: {why}", options.snapshot_file().display()))
            }
        };
        let why = match ask(store, options, usable.as_ref().map(|_| PATIENCE), &refusal, notifier).await? {
            Answer::Config(config) => return Ok(Opened::Answered(config)),
            Answer::Away(why) => why,
        };
        // A store without a config may have been asked for longer than the lease lasts.
        if let Some((saved, config)) = usable.filter(|(saved, _)| !saved.has_ended(SystemTime::now())) {
            warn!(
                "the store does not answer: this host starts from the snapshot of {} with {} records at revision {}: {why}",
                humantime::format_rfc3339_seconds(saved.written()),
                saved.records(),
                saved.revision()
            );
            return Ok(Opened::Recalled(Box::new(Recalled { saved, config, why })));
        }
    }
}

/// The snapshot, if there is one.
/// Fails with the reason why it is of no use to this agent.
async fn look(
    store: &Store,
    options: &Options,
    public_ip: Ipv4Addr,
) -> Result<Option<(Saved, NetworkConfig)>, String> {
    if !options.snapshot {
        return Ok(None);
    }
    let (store, path) = (store.clone(), options.snapshot_file());
    let read = tokio::task::spawn_blocking(move || {
        store.saved(&path, public_ip, SystemTime::now()).map_err(|error| {
            if error.is_broken() {
                // Worth knowing also where etcd answers.
                warn!("the snapshot {} cannot be used: {error}", path.display());
            }
            error.to_string()
        })
    });
    let Some(saved) = read.await.map_err(|error| error.to_string())?? else { return Ok(None) };
    let config = check(&saved, options)?;
    Ok(Some((saved, config)))
}

/// Whether a snapshot fits the command line.
fn check(saved: &Saved, options: &Options) -> Result<NetworkConfig, String> {
    let config = NetworkConfig::parse(saved.config())
        .map_err(|error| format!("its network config cannot be used: {error}"))?;
    let subnet = saved.subnet();
    if let Some(network) =
        options.network.map(|network| network.trunc()).filter(|network| *network != config.network)
    {
        return Err(format!("it is of the network {}, and --network is {network}", config.network));
    }
    match options.subnet {
        Some(wanted) if wanted != subnet => {
            return Err(format!("its lease is of {subnet}, and --subnet is {wanted}"));
        }
        None if !config.may_be_held(subnet, saved.is_reservation()) => {
            return Err(format!("its lease of {subnet} does not fit its network config"));
        }
        Some(_) | None => {}
    }
    match options.peers.keys().find(|peer| peer.overlaps(subnet)) {
        Some(peer) => Err(format!("its lease is of {subnet}, and a --peer has {peer}")),
        None => Ok(config),
    }
}

enum Answer {
    Config(NetworkConfig),
    /// The store did not answer in time; the last reason.
    Away(String),
}

/// Asks until the store has a configuration, and with `patience` no longer than that while the store does not answer.
async fn ask(
    store: &Store,
    options: &Options,
    patience: Option<Duration>,
    refusal: &str,
    notifier: &mut HealthNotifier,
) -> Result<Answer> {
    let deadline = patience.map(|patience| Instant::now() + patience);
    let mut pauses = pauses().build();
    let (mut is_away, mut why) = (true, format!("no answer within {} s", PATIENCE.as_secs()));
    loop {
        let attempt = async {
            store.reach().await?;
            store.config(options.network).await
        };
        let error = tokio::select! {
            answer = attempt => match answer {
                Ok(config) => return Ok(Answer::Config(config)),
                Err(error) => error,
            },
            () = sleep_until_some(deadline), if is_away => return Ok(Answer::Away(why)),
        };
        if !error.is_transient() {
            return Err(error).context("the store");
        }
        (is_away, why) = (error.is_away(), error.to_string());
        notifier.waiting(&format!("{why}{refusal}"));
        tokio::select! {
            () = sleep(pauses.next().unwrap_or(LONGEST_PAUSE)) => {}
            () = sleep_until_some(deadline), if is_away => return Ok(Answer::Away(why)),
        }
    }
}
