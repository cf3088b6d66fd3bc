//! The threads that move the bytes of TCP connections.

use std::{
    io,
    num::NonZero,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use tokio::{
    net::TcpStream,
    runtime::{Builder, EnterGuard, Handle},
    sync::watch,
    task::JoinHandle,
};
use tracing::warn;

/// Threads at most, on machines with more CPUs.
const MOST: usize = 16;

/// A thread for each CPU, each with an event loop of its own. A connection stays with its thread: in a runtime whose threads take tasks
/// from each other, most messages wake a second thread, which costs more than the message.
#[derive(Debug)]
pub(super) struct Threads {
    threads: Vec<Thread>,
    next: AtomicUsize,
    /// Dropped, the threads end.
    _running: watch::Sender<()>,
}

/// One of the threads.
#[derive(Clone, Debug)]
pub(super) struct Thread {
    handle: Handle,
    /// Connections that it serves.
    connections: Arc<AtomicUsize>,
}

impl Threads {
    /// Starts the threads. Where the system refuses them, the runtime of the caller takes their place.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub(super) fn start() -> Self {
        let count = thread::available_parallelism().map_or(1, NonZero::get).min(MOST);
        let running = watch::Sender::new(());
        let started = (0..count).map(|number| start(number, running.subscribe()));
        let handles = started.collect::<io::Result<Vec<_>>>().unwrap_or_else(|error| {
            warn!(%error, "the proxy of services has no threads of its own");
            vec![Handle::current()]
        });
        let thread = |handle| Thread { handle, connections: Arc::default() };
        let threads = handles.into_iter().map(thread).collect();
        Self { threads, next: AtomicUsize::new(0), _running: running }
    }

    /// The thread for the next listener.
    pub(super) fn next(&self) -> Thread {
        let next = self.next.fetch_add(1, Ordering::Relaxed);
        let thread = self.threads.get(next % self.threads.len().max(1)).cloned();
        thread.unwrap_or_else(|| Thread { handle: Handle::current(), connections: Arc::default() })
    }

    /// Serves a connection that was accepted on the thread `here`: there, unless another one has fewer. To change threads costs a
    /// wake-up.
    pub(super) fn serve<F>(&self, here: &Thread, client: TcpStream, serve: impl FnOnce(TcpStream) -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let fewest = self.threads.iter().min_by_key(|thread| thread.load());
        match fewest.filter(|fewest| fewest.load() < here.load()) {
            Some(thread) => {
                // Its sockets belong to the event loop of its thread.
                let _guard = thread.handle.enter();
                let moved = client.into_std().and_then(TcpStream::from_std);
                // The connection ends when the process has no memory for it.
                if let Ok(client) = moved {
                    thread.run(serve(client));
                }
            }
            None => here.run(serve(client)),
        }
    }
}

impl Thread {
    /// Makes sockets that are opened belong to this thread.
    pub(super) fn enter(&self) -> EnterGuard<'_> {
        self.handle.enter()
    }

    /// Runs a task on the thread.
    pub(super) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) -> JoinHandle<()> {
        self.handle.spawn(task)
    }

    fn load(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }

    fn run(&self, serve: impl Future<Output = ()> + Send + 'static) {
        let connection = Connection::of(self);
        self.handle.spawn(async move {
            serve.await;
            drop(connection);
        });
    }
}

/// Counts as a connection of a thread until it is dropped.
struct Connection(Arc<AtomicUsize>);

impl Connection {
    fn of(thread: &Thread) -> Self {
        thread.connections.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(&thread.connections))
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn start(number: usize, mut running: watch::Receiver<()>) -> io::Result<Handle> {
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let handle = runtime.handle().clone();
    // It fails when the sender is dropped: that is the signal to end.
    let run = move || runtime.block_on(async move { while running.changed().await.is_ok() {} });
    thread::Builder::new().name(format!("proxy-{number}")).spawn(run)?;
    Ok(handle)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::{net::TcpListener, sync::oneshot};

    use super::*;

    fn loads(threads: &Threads) -> Vec<usize> {
        threads.threads.iter().map(Thread::load).collect()
    }

    /// Connections that are held go to the threads in equal shares; one at a time stays where it was accepted.
    #[tokio::test]
    async fn connections_go_where_the_fewest_are() {
        let threads = Threads::start();
        let here = threads.next();
        let _guard = here.enter();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut held = Vec::new();
        for _ in 0..4 * threads.threads.len() {
            let _client = std::net::TcpStream::connect(address).unwrap();
            let (accepted, _) = listener.accept().await.unwrap();
            let (release, released) = oneshot::channel::<()>();
            let (report, thread) = oneshot::channel();
            threads.serve(&here, accepted, |_stream| async move {
                report.send(thread::current().id()).unwrap();
                let _ = released.await;
            });
            held.push((release, thread.await.unwrap()));
        }
        assert!(loads(&threads).iter().all(|load| *load == 4), "{:?}", loads(&threads));
        let mut ids: Vec<_> = held.iter().map(|(_, id)| format!("{id:?}")).collect();
        ids.sort();
        ids.dedup();
        assert_eq!(ids.len(), threads.threads.len());
        drop(held);
        while loads(&threads).iter().any(|load| *load > 0) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}
