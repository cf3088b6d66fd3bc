//! Ends connections of UDP sockets whose endpoint went away: no packet tells such a socket that its endpoint is gone, so it would send to
//! it for as long as it lives.
//!
//! The program's next call that waits for a datagram fails with ECONNABORTED, one that sends with EDESTADDRREQ, and the socket can connect
//! again, to another endpoint. Draining endpoints keep their sockets. In reading order: `kept` (which sockets stay, pure), `message` (the kernel's messages), `walk` (all network namespaces).

mod kept;
mod message;
mod walk;

use std::{
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Duration,
};

use tokio::{
    sync::{oneshot, watch},
    task::JoinHandle,
    time::sleep,
};
use tracing::{debug, info, warn};

use self::{kept::Kept, walk::Report};
use super::{Catalog, front::Rules};
use crate::datapath::ebpf::UdpSockets;

/// How long endpoints that leave are collected for one walk through the namespaces. Also programs that chose an endpoint just before it
/// left have connected by then.
const BATCH: Duration = Duration::from_millis(100);
/// The shortest time between two walks.
const PAUSE: Duration = Duration::from_secs(1);

/// A task that ends such connections in the background. Dropped, it ends.
#[derive(Debug)]
pub struct SocketKeeper {
    wanted: watch::Sender<Wanted>,
    problem: Arc<Mutex<Option<String>>>,
    task: JoinHandle<()>,
}

#[derive(Debug, Default)]
struct Wanted {
    kept: Arc<Kept>,
    /// How often an endpoint left.
    losses: u64,
}

impl SocketKeeper {
    /// Starts the task. `sockets` are the sockets that the programs connected.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub fn start(sockets: Arc<UdpSockets>) -> Self {
        let (wanted, receiver) = watch::channel(Wanted::default());
        let problem = Arc::new(Mutex::new(None));
        let task = tokio::spawn(keep(sockets, receiver, Arc::clone(&problem)));
        Self { wanted, problem, task }
    }

    /// Tells which endpoints are there, once new connections go to no others. Returns at once.
    pub fn update(&self, catalog: &Catalog, rules: &Rules) {
        let kept = Kept::new(catalog, rules);
        self.wanted.send_if_modified(|wanted| {
            let is_loss = wanted.kept.loses_by(&kept);
            wanted.losses += u64::from(is_loss);
            wanted.kept = Arc::new(kept);
            is_loss
        });
    }

    /// Looks at all sockets soon, also if no endpoint has left since: some may have before.
    pub fn look(&self) {
        self.wanted.send_modify(|wanted| wanted.losses += 1);
    }

    /// Why connections cannot be ended, all or some.
    pub fn problem(&self) -> Option<String> {
        self.problem.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for SocketKeeper {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn keep(
    sockets: Arc<UdpSockets>,
    mut wanted: watch::Receiver<Wanted>,
    problem: Arc<Mutex<Option<String>>>,
) {
    let mut done = 0;
    while wanted.wait_for(|wanted| wanted.losses != done).await.is_ok() {
        sleep(BATCH).await;
        let kept = {
            let wanted = wanted.borrow_and_update();
            done = wanted.losses;
            Arc::clone(&wanted.kept)
        };
        let Some(report) = walk(&sockets, kept).await else { continue };
        let Report { destroyed, namespaces, .. } = report;
        match destroyed {
            0 => debug!("no UDP socket of {namespaces} network namespaces had an endpoint that is gone"),
            _ => info!(
                "ended connections of {destroyed} UDP sockets whose endpoint is gone, in {namespaces} network namespaces"
            ),
        }
        set_problem(&problem, report.problem());
        sleep(PAUSE).await;
    }
}

/// Logs what is new.
fn set_problem(problem: &Mutex<Option<String>>, now: Option<String>) {
    let mut before = problem.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(why) = now.as_ref().filter(|_| *before != now) {
        warn!("{why}");
    }
    *before = now;
}

/// Walks in a thread of its own, which ends afterwards: it changes its network namespace. `None` when there can be no thread.
async fn walk(sockets: &Arc<UdpSockets>, kept: Arc<Kept>) -> Option<Report> {
    let (sender, receiver) = oneshot::channel();
    let sockets = Arc::clone(sockets);
    let thread = thread::Builder::new().name("udp-sockets".to_owned()).spawn(move || {
        // The task may have ended.
        drop(sender.send(walk::run(&sockets, &kept)));
    });
    if let Err(error) = thread {
        warn!("start a thread that looks for UDP sockets of endpoints that are gone: {error}");
        return None;
    }
    receiver.await.ok()
}
