//! Writes the file: some seconds after a change, at times without one, and at the end.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio::{
    sync::{oneshot, watch},
    task::JoinHandle,
    time::{Instant, sleep, sleep_until},
};
use tracing::debug;

use super::{Archive, file};

/// Shortest time between two files.
const INTERVAL: Duration = Duration::from_secs(5);
/// Writing takes at most one part of the time in this many: a large network may change all the time.
const SHARE: u32 = 20;
/// A file without changes is written again after this time, while the store can be read: it says until when its leases were alive.
const REFRESH: Duration = Duration::from_secs(60 * 60);
/// Pause before another attempt after a failure.
const RETRY: Duration = Duration::from_secs(30);

/// A task that keeps the file. Dropped, it ends at once, and the file stays as it is.
#[derive(Debug)]
pub struct ArchiveKeeper {
    /// Why the file cannot be written.
    pub problem: watch::Receiver<Option<String>>,
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl ArchiveKeeper {
    /// Writes what has changed, and ends.
    pub async fn stop(self) {
        // The task may have ended.
        let _ = self.stop.send(());
        let _ = self.task.await;
    }
}

/// Keeps the file at `path` in a task.
pub(in crate::store) fn keep(archive: Arc<Archive>, path: PathBuf) -> ArchiveKeeper {
    let (problems, problem) = watch::channel(None);
    let (stop, stopped) = oneshot::channel();
    let mut changes = archive.changes.subscribe();
    if *changes.borrow() > 0 {
        changes.mark_changed();
    }
    let mut keeper = Keeper { archive, path: Arc::new(path), problems, changes, is_behind: false };
    let task = tokio::spawn(async move {
        let mut stopped = stopped;
        tokio::select! {
            () = keeper.run() => {}
            asked = &mut stopped => if asked.is_err() { return },
        }
        if keeper.has_more() {
            keeper.write().await;
        }
    });
    ArchiveKeeper { problem, stop, task }
}

struct Keeper {
    archive: Arc<Archive>,
    path: Arc<PathBuf>,
    problems: watch::Sender<Option<String>>,
    changes: watch::Receiver<u64>,
    /// Whether the last attempt failed.
    is_behind: bool,
}

impl Keeper {
    /// Returns when nothing can change any more.
    async fn run(&mut self) {
        loop {
            let due = Instant::now() + if self.is_behind { RETRY } else { REFRESH };
            tokio::select! {
                changed = self.changes.changed() => if changed.is_err() { return },
                // Without a store, it would only look younger than it is.
                () = sleep_until(due) => if !self.is_behind && !self.archive.is_current() { continue },
            }
            // What changes meanwhile is in the next file.
            let pause = self.write().await;
            sleep(pause).await;
        }
    }

    fn has_more(&self) -> bool {
        self.is_behind || self.changes.has_changed().unwrap_or(false)
    }

    /// Writes the file, if everything for it is known. Returns the time until the next may be written.
    async fn write(&mut self) -> Duration {
        self.changes.mark_unchanged();
        let now = SystemTime::now();
        let Some(content) = self.archive.complete(now) else { return INTERVAL };
        let (archive, path, started) = (Arc::clone(&self.archive), Arc::clone(&self.path), Instant::now());
        let written =
            tokio::task::spawn_blocking(move || file::write(&path, &archive.identity, now, &content));
        let written = written.await.unwrap_or_else(|error| Err(std::io::Error::other(error)));
        self.is_behind = written.is_err();
        let problem = written.err().map(|error| {
            format!(
                "the snapshot {} cannot be written, so that this host cannot start without etcd: {error}; name another --state-dir, \
                 or say --no-snapshot",
                self.path.display()
            )
        });
        self.problems.send_if_modified(|before| std::mem::replace(before, problem.clone()) != problem);
        let took = started.elapsed();
        debug!("the snapshot {}: {took:?}", self.path.display());
        INTERVAL.max(took * SHARE)
    }
}
