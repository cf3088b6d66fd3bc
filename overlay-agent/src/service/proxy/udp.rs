//! UDP: a socket for each port of a virtual address, and for each client that sends to it a session with one endpoint.

use std::{
    collections::HashMap,
    io,
    net::{Ipv4Addr, SocketAddr, SocketAddrV4},
    sync::{Arc, Mutex, PoisonError, Weak},
    time::Duration,
};

use rustix::net::{SendFlags, send, sockopt::set_socket_recv_buffer_size_force};
use tokio::{
    net::UdpSocket,
    select,
    sync::watch,
    task::{JoinSet, yield_now},
    time::{Instant, sleep},
};
use tracing::debug;

use super::{
    balancer::VirtualPort,
    counters::{Direction, Opened},
    sessions::Session,
    shared::Shared,
};
use crate::timer::sleep_until_some;

/// Datagrams that a socket passes on before the other tasks of its thread have their turn.
const TURN: u32 = 64;
/// Bytes of the kernel for datagrams that the proxy has not read yet: with its overhead, some of the largest size.
const RECEIVE_BUFFER: usize = 2 << 20;
/// The pause after an error that may come again at once.
const PAUSE: Duration = Duration::from_millis(10);

/// Opens the socket of a port. Fails when another process has it, or the address is not one of this host.
pub(super) fn bind(address: SocketAddrV4) -> io::Result<UdpSocket> {
    let socket = std::net::UdpSocket::bind(address)?;
    // Without CAP_NET_ADMIN it stays as it is.
    let _ = set_socket_recv_buffer_size_force(&socket, RECEIVE_BUFFER);
    socket.set_nonblocking(true)?;
    UdpSocket::from_std(socket)
}

type ByClient = Arc<Mutex<HashMap<SocketAddrV4, Arc<Session>>>>;

/// Passes datagrams on until the task ends. Its sessions end with it.
pub(super) async fn serve(socket: UdpSocket, port: Arc<VirtualPort>, shared: Arc<Shared>) {
    let mut server = Server {
        socket: Arc::new(socket),
        port,
        shared,
        sessions: ByClient::default(),
        tasks: JoinSet::new(),
    };
    loop {
        if server.socket.readable().await.is_err() {
            sleep(PAUSE).await;
            continue;
        }
        let mut buffer = server.shared.buffers.take();
        for _ in 0..TURN {
            match server.socket.try_recv_from(&mut buffer) {
                Ok((length, SocketAddr::V4(client))) => {
                    server.forward(client, buffer.get(..length).unwrap_or_default());
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                // An error of an earlier reply, which this call has removed.
                Ok((_, SocketAddr::V6(_))) | Err(_) => {}
            }
        }
        server.shared.buffers.give(buffer);
        yield_now().await;
    }
}

struct Server {
    socket: Arc<UdpSocket>,
    port: Arc<VirtualPort>,
    shared: Arc<Shared>,
    sessions: ByClient,
    /// A task for each session.
    tasks: JoinSet<()>,
}

impl Server {
    /// Passes a datagram of a client on. It is lost where the kernel has no room for it: no client waits for another one.
    fn forward(&mut self, client: SocketAddrV4, datagram: &[u8]) {
        let Some(session) = self.session(client) else {
            self.port.table().tally.count_failure();
            return;
        };
        let sent = match send(&session.socket, datagram, SendFlags::DONTWAIT) {
            // An ICMP error about an earlier datagram, which this call has removed.
            Err(rustix::io::Errno::CONNREFUSED) => {
                session.opened.count_failure();
                send(&session.socket, datagram, SendFlags::DONTWAIT)
            }
            sent => sent,
        };
        match sent {
            Ok(length) => session.opened.count_bytes(Direction::ToEndpoint, length),
            Err(error) => {
                session.opened.count_failure();
                debug!(%client, endpoint = %session.endpoint.address, %error, "datagram lost");
            }
        }
    }

    /// The client's session: the one that it has, unless its endpoint is removed or down, or else a new one.
    fn session(&mut self, client: SocketAddrV4) -> Option<Arc<Session>> {
        let now = self.shared.now();
        let known = lock(&self.sessions).get(&client).cloned();
        if let Some(session) = known {
            if !session.has_ended() && session.endpoint.is_kept() {
                session.note_use(now);
                return Some(session);
            }
            session.end();
        }
        while self.tasks.try_join_next().is_some() {}
        let session = Arc::new(self.open(client, now)?);
        lock(&self.sessions).insert(client, Arc::clone(&session));
        let id = self.shared.sessions.add(Arc::clone(&session));
        let task = SessionTask {
            id,
            session: Arc::clone(&session),
            replies: Arc::downgrade(&self.socket),
            sessions: Arc::clone(&self.sessions),
            shared: Arc::clone(&self.shared),
        };
        self.tasks.spawn(task.run());
        Some(session)
    }

    /// Opens a session with the chosen endpoint, or with one behind it where the kernel refuses.
    fn open(&self, client: SocketAddrV4, now: u64) -> Option<Session> {
        let mut choice = self.port.choose(*client.ip(), &self.shared)?;
        while let Some(endpoint) = choice.next() {
            let opened = Opened::new(&choice.table.tally, &endpoint.tally);
            match self.connect(endpoint.address) {
                Ok(socket) => {
                    if choice.is_substitute() {
                        self.port.keep(*client.ip(), &choice.table, endpoint.address, &self.shared);
                    }
                    opened.count_connection();
                    return Some(Session::new(client, endpoint, socket, opened, now));
                }
                Err(error) => {
                    endpoint.tally.count_failure();
                    debug!(%client, endpoint = %endpoint.address, %error, "endpoint cannot be reached");
                }
            }
        }
        None
    }

    fn connect(&self, endpoint: SocketAddrV4) -> io::Result<UdpSocket> {
        if self.shared.is_virtual(*endpoint.ip()) {
            return Err(io::Error::other("the endpoint is a virtual address"));
        }
        let socket = std::net::UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        socket.connect(endpoint)?;
        socket.set_nonblocking(true)?;
        UdpSocket::from_std(socket)
    }
}

/// The half of a session that passes on what the endpoint sends. Dropped, it removes the session.
struct SessionTask {
    id: u64,
    session: Arc<Session>,
    /// The socket of the virtual address, which is gone when the service is.
    replies: Weak<UdpSocket>,
    sessions: ByClient,
    shared: Arc<Shared>,
}

impl SessionTask {
    async fn run(self) {
        select! {
            () = self.session.ended() => {}
            () = reset(self.session.endpoint.reset_time()) => {}
            () = self.replies() => {}
        }
    }

    /// Returns when the virtual address is gone.
    async fn replies(&self) {
        let session = &self.session;
        loop {
            if session.socket.readable().await.is_err() {
                sleep(PAUSE).await;
                continue;
            }
            let mut buffer = self.shared.buffers.take();
            for _ in 0..TURN {
                match session.socket.try_recv(&mut buffer) {
                    Ok(length) => {
                        let Some(replies) = self.replies.upgrade() else { return };
                        session.note_use(self.shared.now());
                        let datagram = buffer.get(..length).unwrap_or_default();
                        match replies.send_to(datagram, SocketAddr::V4(session.client)).await {
                            Ok(length) => session.opened.count_bytes(Direction::ToClient, length),
                            Err(_) => session.opened.count_failure(),
                        }
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) => {
                        session.opened.count_failure();
                        debug!(client = %session.client, endpoint = %session.endpoint.address, %error, "endpoint");
                        sleep(PAUSE).await;
                    }
                }
            }
            self.shared.buffers.give(buffer);
            yield_now().await;
        }
    }
}

impl Drop for SessionTask {
    fn drop(&mut self) {
        self.session.end();
        self.shared.sessions.remove(self.id);
        let mut sessions = lock(&self.sessions);
        if sessions.get(&self.session.client).is_some_and(|session| Arc::ptr_eq(session, &self.session)) {
            sessions.remove(&self.session.client);
        }
    }
}

fn lock(sessions: &ByClient) -> std::sync::MutexGuard<'_, HashMap<SocketAddrV4, Arc<Session>>> {
    sessions.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Returns at the time at which connections of an endpoint are reset.
async fn reset(mut reset_at: watch::Receiver<Option<Instant>>) {
    loop {
        let at = *reset_at.borrow_and_update();
        select! {
            () = sleep_until_some(at) => return,
            changed = reset_at.changed() => if changed.is_err() { return },
        }
    }
}
