//! The directory store: flannel's records as files, for a demo, a test, one machine, or a mesh whose directory some other
//! tool keeps in step. `DIR/config` and `DIR/subnets/10.244.1.0-24` hold the same JSON as the keys of the same names in etcd.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{ErrorKind, Read as _, Write as _},
    net::Ipv4Addr,
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use futures_util::{FutureExt as _, StreamExt as _};
use inotify::{Inotify, WatchMask};
use ipnet::Ipv4Net;
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};
use rand::seq::IndexedRandom as _;
use tempfile::NamedTempFile;
use tokio::sync::mpsc;

use crate::{config::NetworkConfig, lease, route_table::Record, store::Event};

mod operator;
#[cfg(test)]
mod tests;

/// A record longer than this is not a lease: etcd's own limit for a request is 1.5 MiB, flannel's values are 100 bytes.
const LONGEST_RECORD: u64 = 64 * 1024;

/// List again without being told to: some file systems (NFS, FUSE) never tell.
const RESYNC: Duration = Duration::from_secs(30);

/// Wait for more changes before listing: a tool that copies many files makes many events.
const SETTLE: Duration = Duration::from_millis(10);

/// Pause before trying again after the directory could not be read or watched.
const RETRY: Duration = Duration::from_secs(1);

/// How long to wait for another agent that takes a subnet, and how often to look.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);
const LOCK_PAUSE: Duration = Duration::from_millis(20);

/// Everything that changes what a listing would show.
const CHANGES: WatchMask = WatchMask::CREATE
    .union(WatchMask::CLOSE_WRITE)
    .union(WatchMask::DELETE)
    .union(WatchMask::MOVE)
    .union(WatchMask::DELETE_SELF)
    .union(WatchMask::MOVE_SELF);

/// A directory that holds one network's records.
#[derive(Clone, Debug)]
pub struct DirStore {
    root: PathBuf,
}

/// A subnet that this host holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Acquired {
    /// The subnet.
    pub subnet: Ipv4Net,
    /// Whether the record was written just now.
    pub created: bool,
}

impl DirStore {
    /// The store in `root`, which need not exist yet.
    pub fn new(root: PathBuf) -> Self {
        Self { root }
    }

    /// Where the records lie.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The network's configuration. With `network` given the record may be missing ([`DirStore::ensure_config`] writes it),
    /// and one that says otherwise is refused.
    ///
    /// # Errors
    ///
    /// When there is no record, it cannot be read, or it is not what `network` says.
    pub fn config(&self, network: Option<Ipv4Net>) -> Result<NetworkConfig> {
        let path = self.root.join("config");
        let json = match (read_regular(&path), network) {
            (Ok(json), _) => String::from_utf8_lossy(&json).into_owned(),
            (Err(error), Some(network)) if error.kind() == ErrorKind::NotFound => config_record(network),
            (Err(error), None) if error.kind() == ErrorKind::NotFound => bail!(
                "the store has no network config: write one to {}, for example {{\"Network\":\"10.244.0.0/16\"}}, or name the network with --network",
                path.display()
            ),
            (Err(error), _) => {
                return Err(error).with_context(|| format!("read the network config {}", path.display()));
            }
        };
        let config = NetworkConfig::parse(&json).with_context(|| format!("in {}", path.display()))?;
        match network {
            Some(network) if network.trunc() != config.network => bail!(
                "--network is {network}, but {} says {}: change one of them",
                path.display(),
                config.network
            ),
            _ => Ok(config),
        }
    }

    /// Writes the configuration of `network` if there is none yet.
    ///
    /// # Errors
    ///
    /// When the directory cannot be made or written.
    pub fn ensure_config(&self, network: Ipv4Net) -> Result<()> {
        std::fs::create_dir_all(&self.root)
            .with_context(|| format!("create the store {}", self.root.display()))?;
        self.create("config", &config_record(network)).map(drop)
    }

    /// Takes a subnet for the host at `public_ip`: the one it holds already, else `wanted`, else `earlier` (of a previous
    /// run) if it is free, else any free one. Those of `fixed` peers are never free.
    ///
    /// # Errors
    ///
    /// When `wanted` cannot be had or the network is full.
    pub fn acquire(
        &self,
        config: &NetworkConfig,
        public_ip: Ipv4Addr,
        wanted: Option<Ipv4Net>,
        earlier: Option<Ipv4Net>,
        fixed: &BTreeMap<Ipv4Net, Ipv4Addr>,
    ) -> Result<Acquired> {
        let subnets = self.root.join("subnets");
        std::fs::create_dir_all(&subnets).with_context(|| format!("create {}", subnets.display()))?;
        let _lock = self.lock()?;
        let held: Vec<(Ipv4Net, Option<Ipv4Addr>)> = self
            .list()?
            .iter()
            .filter_map(|record| {
                Some((
                    lease::parse_key(&record.key).ok()?,
                    lease::parse_value(&record.value).ok().map(|value| value.public_ip),
                ))
            })
            .chain(fixed.iter().map(|(subnet, peer)| (*subnet, Some(*peer))))
            .collect();
        let ours = held.iter().find(|(_, holder)| *holder == Some(public_ip)).map(|(subnet, _)| *subnet);
        let overlapping = |subnet: Ipv4Net| {
            held.iter().find(|(other, _)| other.contains(&subnet) || subnet.contains(other))
        };
        if let Some(wanted) = wanted {
            if !config.network.contains(&wanted) || wanted == config.network {
                bail!(
                    "the subnet {wanted} is not a part of the network {}: choose another --subnet",
                    config.network
                );
            }
            if ours == Some(wanted) {
                return Ok(Acquired { subnet: wanted, created: false });
            }
            if let Some(ours) = ours {
                bail!(
                    "this host ({public_ip}) already holds {ours}: drop --subnet, or remove {}",
                    subnets.join(lease::key(ours)).display()
                );
            }
            if let Some((other, holder)) = overlapping(wanted) {
                let holder = holder
                    .map_or_else(|| "a record that cannot be read".to_owned(), |holder| holder.to_string());
                bail!("the subnet {wanted} overlaps {other}, which {holder} holds: choose another --subnet");
            }
            return self.take(wanted, public_ip);
        }
        if let Some(ours) = ours.filter(|ours| config.network.contains(ours)) {
            return Ok(Acquired { subnet: ours, created: false });
        }
        let free = |subnet: &Ipv4Net| overlapping(*subnet).is_none();
        if let Some(earlier) =
            earlier.filter(|subnet| config.subnets().any(|known| known == *subnet) && free(subnet))
        {
            return self.take(earlier, public_ip);
        }
        let candidates: Vec<Ipv4Net> = config.subnets().filter(free).take(4096).collect();
        let Some(subnet) = candidates.choose(&mut rand::rng()) else {
            bail!(
                "the network {} is full: all subnets from {} to {} are held; remove leases of hosts that are gone from {}",
                config.network,
                config.subnet_min,
                config.subnet_max,
                subnets.display()
            );
        };
        self.take(*subnet, public_ip)
    }

    /// Writes our record again after someone removed it. `false` when there is one, whose ever.
    ///
    /// # Errors
    ///
    /// When the record cannot be written.
    pub fn reclaim(&self, subnet: Ipv4Net, public_ip: Ipv4Addr) -> Result<bool> {
        let _lock = self.lock()?;
        self.create(&format!("subnets/{}", lease::key(subnet)), &lease::value(public_ip))
    }

    /// Puts our record under another public address of this host. `false` when the record is not ours.
    ///
    /// # Errors
    ///
    /// When the record cannot be written.
    pub fn readdress(&self, subnet: Ipv4Net, from: Ipv4Addr, to: Ipv4Addr) -> Result<bool> {
        let _lock = self.lock()?;
        let key = format!("subnets/{}", lease::key(subnet));
        let ours = read_regular(&self.root.join(&key))
            .is_ok_and(|value| lease::parse_value(&value).is_ok_and(|value| value.public_ip == from));
        if ours {
            self.replace(&key, &lease::value(to))?;
        }
        Ok(ours)
    }

    /// Gives a subnet back, if the record is still ours.
    ///
    /// # Errors
    ///
    /// When the record cannot be read or removed.
    pub fn release(&self, subnet: Ipv4Net, public_ip: Ipv4Addr) -> Result<()> {
        let _lock = self.lock()?;
        let path = self.root.join("subnets").join(lease::key(subnet));
        let ours = read_regular(&path)
            .is_ok_and(|value| lease::parse_value(&value).is_ok_and(|value| value.public_ip == public_ip));
        if ours {
            std::fs::remove_file(&path).with_context(|| format!("remove the lease {}", path.display()))?;
        }
        Ok(())
    }

    /// All records. Files that begin with a dot are not records: tools keep half-written ones there.
    ///
    /// # Errors
    ///
    /// When the directory cannot be read. A single file that cannot be read is a record with an empty value.
    pub fn list(&self) -> Result<Vec<Record>> {
        let directory = self.root.join("subnets");
        let mut records = Vec::new();
        for entry in std::fs::read_dir(&directory).with_context(|| format!("list {}", directory.display()))? {
            let entry = entry.with_context(|| format!("list {}", directory.display()))?;
            let key = entry.file_name().to_string_lossy().into_owned();
            if key.starts_with('.') {
                continue;
            }
            match read_regular(&entry.path()) {
                Ok(value) => records.push(Record { key, value }),
                // Removed since it was listed.
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(_) => records.push(Record { key, value: Vec::new() }),
            }
        }
        records.sort_by(|a, b| a.key.cmp(&b.key));
        Ok(records)
    }

    /// Follows the store until `events` is closed: a snapshot first, then one after every change.
    pub async fn watch(self, events: mpsc::Sender<Event>) {
        loop {
            let lost = match self.follow(&events).await {
                Ok(()) => return,
                Err(error) => format!("{error:#}"),
            };
            if events.send(Event::Lost(lost)).await.is_err() {
                return;
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    /// Watches, then lists, so that no change falls between. `Ok` when nobody listens any more.
    async fn follow(&self, events: &mpsc::Sender<Event>) -> Result<()> {
        let directory = self.root.join("subnets");
        let inotify = Inotify::init()
            .context("start inotify: raise fs.inotify.max_user_instances if it is exhausted")?;
        inotify
            .watches()
            .add(&directory, CHANGES)
            .with_context(|| format!("watch {}", directory.display()))?;
        let mut changes = inotify.into_event_stream([0u8; 4096]).context("read inotify events")?;
        loop {
            let store = self.clone();
            // A directory on a network may take its time; the agent must not wait with it.
            let records =
                tokio::task::spawn_blocking(move || store.list()).await.context("list the store")??;
            if events.send(Event::Snapshot(records)).await.is_err() {
                return Ok(());
            }
            tokio::select! {
                change = changes.next() => {
                    let change = change.context("inotify ended")?.context("read inotify events")?;
                    if change.mask.intersects(inotify::EventMask::DELETE_SELF | inotify::EventMask::MOVE_SELF | inotify::EventMask::IGNORED) {
                        bail!("{} was removed or renamed", directory.display());
                    }
                    // One listing answers for all events so far; an error among them shows up at the next one.
                    tokio::time::sleep(SETTLE).await;
                    while changes.next().now_or_never().is_some() {}
                }
                () = tokio::time::sleep(RESYNC) => {}
                () = events.closed() => return Ok(()),
            }
        }
    }

    fn take(&self, subnet: Ipv4Net, public_ip: Ipv4Addr) -> Result<Acquired> {
        let key = format!("subnets/{}", lease::key(subnet));
        if !self.create(&key, &lease::value(public_ip))? {
            bail!("{} appeared just now: start again", self.root.join(key).display());
        }
        Ok(Acquired { subnet, created: true })
    }

    /// Writes a record that must not exist yet: whole and on disk, or not at all. `false` when it exists.
    fn create(&self, key: &str, value: &str) -> Result<bool> {
        self.write(key, value, |file, path| match file.persist_noclobber(path) {
            Ok(_) => Ok(true),
            Err(error) if error.error.kind() == ErrorKind::AlreadyExists => Ok(false),
            Err(error) => Err(error.error),
        })
    }

    /// Writes a record in the place of the one that is there, in one step.
    fn replace(&self, key: &str, value: &str) -> Result<bool> {
        self.write(key, value, |file, path| Ok(file.persist(path).map(|_| true)?))
    }

    fn write(
        &self,
        key: &str,
        value: &str,
        put: impl FnOnce(NamedTempFile, &Path) -> std::io::Result<bool>,
    ) -> Result<bool> {
        let path = self.root.join(key);
        let directory = path.parent().unwrap_or(&self.root);
        let attempt = || -> std::io::Result<bool> {
            let mut file = tempfile::Builder::new().prefix(".new-").tempfile_in(directory)?;
            file.write_all(value.as_bytes())?;
            file.as_file().set_permissions(std::fs::Permissions::from_mode(0o644))?;
            file.as_file().sync_all()?;
            let done = put(file, &path)?;
            // The new name must survive a crash too.
            File::open(directory)?.sync_all()?;
            Ok(done)
        };
        attempt().with_context(|| format!("write {}", path.display()))
    }

    /// Agents of one machine that share the directory take subnets one after the other. (Hosts that share it through a tool
    /// find a conflict when they see each other's records.)
    fn lock(&self) -> Result<Flock<File>> {
        let path = self.root.join(".lock");
        let deadline = Instant::now() + LOCK_PATIENCE;
        loop {
            let file = File::create(&path).with_context(|| format!("create {}", path.display()))?;
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => return Ok(lock),
                Err((_, Errno::EWOULDBLOCK)) if Instant::now() < deadline => std::thread::sleep(LOCK_PAUSE),
                Err((_, Errno::EWOULDBLOCK)) => bail!(
                    "another process has held {} for {} seconds: end it, or remove the file if there is none",
                    path.display(),
                    LOCK_PATIENCE.as_secs()
                ),
                Err((_, error)) => return Err(error).with_context(|| format!("lock {}", path.display())),
            }
        }
    }
}

fn config_record(network: Ipv4Net) -> String {
    format!("{{\"Network\":\"{network}\",\"Backend\":{{\"Type\":\"udp\"}}}}\n")
}

/// The first [`LONGEST_RECORD`] bytes of a regular file. Anything else (a FIFO would wait for its writer) is an error.
fn read_regular(path: &Path) -> std::io::Result<Vec<u8>> {
    let file = File::options().read(true).custom_flags(nix::libc::O_NONBLOCK).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(std::io::Error::other("not a regular file"));
    }
    let mut value = Vec::new();
    file.take(LONGEST_RECORD).read_to_end(&mut value)?;
    Ok(value)
}
