//! The directory store: flannel's records as files, for a demo, a test, one machine, or a mesh whose directory another tool
//! synchronises. `DIR/config` and `DIR/subnets/10.244.1.0-24` hold the same JSON as the keys of the same names in etcd.
//!
//! Records have no end here. Files are written whole (temporary file, fsync, rename) and watched with inotify.

#[cfg(test)]
mod nested_tests;
#[cfg(test)]
mod tests;

use std::{
    ffi::OsString,
    fs::File,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    io::{self, ErrorKind, Read as _, Write as _},
    os::unix::{
        ffi::{OsStrExt as _, OsStringExt as _},
        fs::{OpenOptionsExt as _, PermissionsExt as _},
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use futures_util::{FutureExt as _, StreamExt as _};
use inotify::{EventMask, EventStream, Inotify, WatchDescriptor, WatchMask, Watches};
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};
use tokio::sync::mpsc;

use super::{
    StoreError,
    backend::{Expected, Write, Written},
    record::{Event, Kind, Lifetime, MAX_VALUE, RawRecord, Record, Version, key_bytes, key_text},
};

/// Interval of lists without a notification: some file systems (NFS, FUSE) send none.
const RESYNC: Duration = Duration::from_secs(30);
/// Wait for further changes before listing: a tool that copies many files causes many notifications.
const SETTLE: Duration = Duration::from_millis(10);
/// Pause before another attempt to read or watch the directory.
const RETRY: Duration = Duration::from_secs(1);
/// How long to wait for another process that writes, and how often to try.
const LOCK_TIMEOUT: Duration = Duration::from_secs(5);
const LOCK_PAUSE: Duration = Duration::from_millis(20);

/// All changes that a list would show.
const CHANGES: WatchMask = WatchMask::CREATE
    .union(WatchMask::CLOSE_WRITE)
    .union(WatchMask::DELETE)
    .union(WatchMask::MOVE)
    .union(WatchMask::DELETE_SELF)
    .union(WatchMask::MOVE_SELF);

/// A directory that holds one network's records.
#[derive(Debug)]
pub(super) struct Dir {
    /// Need not exist yet.
    pub(super) root: PathBuf,
}

impl Dir {
    /// The file or directory of a key or prefix.
    pub(super) fn path(&self, key: &str) -> PathBuf {
        self.root.join(OsString::from_vec(key_bytes(key)))
    }

    /// Runs file operations where they cannot delay the agent: the directory may be on a network, or locked.
    pub(super) async fn blocking<T: Send + 'static>(
        self: &Arc<Self>,
        operation: impl FnOnce(&Self) -> Result<T> + Send + 'static,
    ) -> Result<T, StoreError> {
        let dir = Arc::clone(self);
        let done = tokio::task::spawn_blocking(move || operation(&dir)).await;
        let result = done.map_err(anyhow::Error::from).and_then(|result| result);
        result.map_err(|error| {
            StoreError::failed(format!("the store {}", self.root.display()), format!("{error:#}"))
        })
    }

    /// A file that cannot be read is a record with an empty value.
    pub(super) fn get(&self, keys: &[String]) -> Vec<Option<RawRecord>> {
        let read = |key: &String| match read_regular(&self.path(key)) {
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            value => Some(raw(key.clone(), value.unwrap_or_default())),
        };
        keys.iter().map(read).collect()
    }

    pub(super) fn list<K: Kind>(&self) -> Result<Vec<Record<K>>> {
        let mut keys = self.names(K::PREFIX, K::SEGMENTS)?;
        keys.sort();
        // Files that were removed since are missing.
        Ok(self.get(&keys).into_iter().flatten().map(Record::from).collect())
    }

    /// All keys with a prefix, and of keys with fewer `segments` those that are files. Files whose names begin with a dot are not
    /// records: tools keep temporary files there.
    fn names(&self, prefix: &str, segments: usize) -> Result<Vec<String>> {
        let mut keys = Vec::new();
        walk(self, prefix, segments, &mut |key| keys.push(key), &mut |_| Ok(()))?;
        Ok(keys)
    }

    pub(super) fn write(&self, write: &Write) -> Result<Option<Written>> {
        let path = self.path(&write.key);
        let directory = path.parent().unwrap_or(&self.root);
        create(&self.root)?;
        let _lock = self.lock()?;
        // Under the lock, under which the removal of the last record of a directory removes the directory, too.
        create(directory)?;
        for (key, expected) in &write.when {
            let found = self.get(std::slice::from_ref(key)).pop().flatten();
            let holds = match (expected, found) {
                (Expected::Absent, found) => found.is_none(),
                (Expected::Unchanged(version), Some(found)) => found.version == *version,
                (Expected::Unchanged(_), None) | (Expected::Attached(_), _) => false,
            };
            if !holds {
                return Ok(None);
            }
        }
        let is_new = write.when.contains(&(write.key.clone(), Expected::Absent));
        let done = match &write.value {
            Some(value) => put(&path, directory, value, is_new),
            None => std::fs::remove_file(&path).map(|()| true),
        };
        if write.value.is_none() {
            self.remove_empty(&write.key);
        }
        if !done.with_context(|| format!("write {}", path.display()))? {
            return Ok(None);
        }
        let keys = write.list.map_or(Ok(Vec::new()), |prefix| self.names(prefix, 1))?;
        let value = write.value.clone().unwrap_or_default().into_bytes();
        Ok(Some(Written { version: raw(write.key.clone(), value).version, keys }))
    }

    /// Removes the directories of a removed key that are empty, but not that of its kind.
    fn remove_empty(&self, key: &str) {
        let mut key = key;
        while let Some((parent, _)) = key.rsplit_once('/').filter(|(parent, _)| parent.contains('/')) {
            // One that is not empty stays.
            if std::fs::remove_dir(self.path(parent)).is_err() {
                return;
            }
            key = parent;
        }
    }

    /// Agents of one machine that share the directory write one after the other. Hosts that share it through a tool find a
    /// conflict when they see each other's records.
    fn lock(&self) -> Result<Flock<File>> {
        let path = self.path(".lock");
        let deadline = Instant::now() + LOCK_TIMEOUT;
        loop {
            let file = File::create(&path).with_context(|| format!("create {}", path.display()))?;
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => return Ok(lock),
                Err((_, Errno::EWOULDBLOCK)) if Instant::now() < deadline => std::thread::sleep(LOCK_PAUSE),
                Err((_, Errno::EWOULDBLOCK)) => bail!(
                    "another process has held {} for {} seconds: end it, or remove the file if there is none",
                    path.display(),
                    LOCK_TIMEOUT.as_secs()
                ),
                Err((_, error)) => return Err(error).with_context(|| format!("lock {}", path.display())),
            }
        }
    }

    /// Creates the directory of a kind's records.
    pub(super) fn create<K: Kind>(&self) -> Result<()> {
        create(&self.path(K::PREFIX))
    }

    /// Watches the directory of a key, or of all keys with a prefix.
    pub(super) fn watch(&self, key: &str) -> Result<KeyWatch, StoreError> {
        let directory = key.rsplit_once('/').map_or("", |(directory, _)| directory);
        KeyWatch::new(self.path(directory))
            .map_err(|error| StoreError::failed("watch the store", format!("{error:#}")))
    }
}

/// Reports the keys below `prefix`, and the directories that lead to them, before what is inside. Directories that vanish
/// meanwhile are left out, except the first.
fn walk(
    dir: &Dir,
    prefix: &str,
    segments: usize,
    found: &mut impl FnMut(String),
    enter: &mut impl FnMut(&Path) -> io::Result<()>,
) -> Result<()> {
    let mut waiting = vec![(prefix.to_owned(), segments)];
    while let Some((prefix, segments)) = waiting.pop() {
        let directory = dir.path(&prefix);
        let mut list = || -> io::Result<()> {
            enter(&directory)?;
            for entry in std::fs::read_dir(&directory)? {
                let entry = entry?;
                let name = key_text(entry.file_name().as_bytes());
                if name.starts_with('.') {
                    continue;
                }
                match segments > 1 && entry.path().is_dir() {
                    true => waiting.push((format!("{prefix}{name}/"), segments - 1)),
                    false => found(format!("{prefix}{name}")),
                }
            }
            Ok(())
        };
        match list() {
            Err(error) if error.kind() == ErrorKind::NotFound && directory != dir.path(first(&prefix)) => {}
            result => result.with_context(|| format!("list {}", directory.display()))?,
        }
    }
    Ok(())
}

/// The first part of a key, with its slash.
fn first(key: &str) -> &str {
    key.find('/').and_then(|end| key.get(..=end)).unwrap_or(key)
}

fn create(directory: &Path) -> Result<()> {
    std::fs::create_dir_all(directory).with_context(|| format!("create {}", directory.display()))
}

/// Sends events until their receiver is closed: a snapshot at first and after every change.
pub(super) async fn follow<K: Kind>(dir: Arc<Dir>, events: mpsc::Sender<Event<K>>) {
    let run = async {
        loop {
            if let Err(error) = watch_and_list(&dir, &events).await {
                let _ = events.send(Event::Lost(error.to_string())).await;
            }
            tokio::time::sleep(RETRY).await;
        }
    };
    tokio::select! {
        () = run => {}
        () = events.closed() => {}
    }
}

/// Watches before it lists, so that no change is missed.
async fn watch_and_list<K: Kind>(dir: &Arc<Dir>, events: &mpsc::Sender<Event<K>>) -> Result<(), StoreError> {
    let mut watch = dir.watch(K::PREFIX)?;
    loop {
        watch.enter::<K>(dir)?;
        let _ = events.send(Event::Snapshot(dir.blocking(|dir| dir.list()).await?)).await;
        watch.changed().await?;
    }
}

/// Notifications about one directory, and those inside it that [`Self::enter`] found.
pub(crate) struct KeyWatch {
    directory: PathBuf,
    watches: Watches,
    /// The directory itself.
    top: WatchDescriptor,
    changes: EventStream<[u8; 4096]>,
}

impl KeyWatch {
    /// Fails when the directory cannot be watched.
    pub(crate) fn new(directory: PathBuf) -> Result<Self> {
        let inotify = Inotify::init()
            .context("start inotify: raise fs.inotify.max_user_instances if it is exhausted")?;
        let mut watches = inotify.watches();
        let top =
            watches.add(&directory, CHANGES).with_context(|| format!("watch {}", directory.display()))?;
        let changes = inotify.into_event_stream([0u8; 4096]).context("read inotify events")?;
        Ok(Self { directory, watches, top, changes })
    }

    /// Watches the directories that lead to the keys of a kind, too. Those that are watched already stay as they are.
    fn enter<K: Kind>(&mut self, dir: &Dir) -> Result<(), StoreError> {
        if K::SEGMENTS < 2 {
            return Ok(());
        }
        let mut watch = |directory: &Path| self.watches.add(directory, CHANGES).map(drop);
        walk(dir, K::PREFIX, K::SEGMENTS, &mut |_| {}, &mut watch)
            .map_err(|error| StoreError::failed("watch the store", format!("{error:#}")))
    }

    /// Returns after a change, and at least every [`RESYNC`].
    pub(crate) async fn changed(&mut self) -> Result<(), StoreError> {
        let gone = EventMask::DELETE_SELF | EventMask::MOVE_SELF | EventMask::IGNORED;
        let failed = |why: String| StoreError::failed(format!("watch {}", self.directory.display()), why);
        match tokio::time::timeout(RESYNC, self.changes.next()).await {
            Err(_) => return Ok(()),
            Ok(Some(Ok(change))) if change.wd == self.top && change.mask.intersects(gone) => {
                return Err(failed("it was removed or renamed".to_owned()));
            }
            Ok(Some(Ok(_))) => {}
            Ok(Some(Err(error))) => return Err(failed(error.to_string())),
            Ok(None) => return Err(failed("inotify ended".to_owned())),
        }
        // One list answers all notifications so far.
        tokio::time::sleep(SETTLE).await;
        while self.changes.next().now_or_never().is_some() {}
        Ok(())
    }
}

/// Writes a file whole and to disk, or not at all. `false` when it must be new and exists.
fn put(path: &Path, directory: &Path, value: &str, is_new: bool) -> io::Result<bool> {
    let mut file = tempfile::Builder::new().prefix(".new-").tempfile_in(directory)?;
    file.write_all(value.as_bytes())?;
    file.as_file().set_permissions(std::fs::Permissions::from_mode(0o644))?;
    file.as_file().sync_all()?;
    let result = if is_new { file.persist_noclobber(path) } else { file.persist(path) };
    match result {
        Ok(_) => {}
        Err(error) if is_new && error.error.kind() == ErrorKind::AlreadyExists => return Ok(false),
        Err(error) => return Err(error.error),
    }
    // The new name must survive a crash, too.
    File::open(directory)?.sync_all()?;
    Ok(true)
}

/// The first [`MAX_VALUE`] bytes of a regular file. Anything else (a FIFO would wait for its writer) is an error.
fn read_regular(path: &Path) -> io::Result<Vec<u8>> {
    let file = File::options().read(true).custom_flags(nix::libc::O_NONBLOCK).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    let mut value = Vec::new();
    file.take(MAX_VALUE as u64).read_to_end(&mut value)?;
    Ok(value)
}

fn raw(key: String, value: Vec<u8>) -> RawRecord {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    let version = Version { created: None, modified: hasher.finish() as i64, lifetime: Lifetime::Untracked };
    RawRecord { key, value: value.into(), version }
}
