//! The UDP sessions of the node: their number is limited, and idle ones end.

use std::{
    collections::HashMap,
    net::SocketAddrV4,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use tokio::{net::UdpSocket, sync::Notify};

use super::{aging::AgeOrder, counters::Opened, endpoint::Endpoint};

/// The datagrams between a client and an endpoint.
#[derive(Debug)]
pub(super) struct Session {
    /// The client.
    pub(super) client: SocketAddrV4,
    /// The endpoint.
    pub(super) endpoint: Arc<Endpoint>,
    /// Connected to the endpoint.
    pub(super) socket: UdpSocket,
    pub(super) opened: Opened,
    /// When a datagram last passed, in nanoseconds since the start of the proxy.
    used: AtomicU64,
    has_ended: AtomicBool,
    end: Notify,
}

impl Session {
    pub(super) fn new(
        client: SocketAddrV4,
        endpoint: Arc<Endpoint>,
        socket: UdpSocket,
        opened: Opened,
        now: u64,
    ) -> Self {
        let (used, has_ended) = (AtomicU64::new(now), AtomicBool::new(false));
        Self { client, endpoint, socket, opened, used, has_ended, end: Notify::new() }
    }

    /// A datagram passes.
    pub(super) fn note_use(&self, now: u64) {
        self.used.store(now, Ordering::Relaxed);
    }

    /// Ends it: its task closes the socket.
    pub(super) fn end(&self) {
        self.has_ended.store(true, Ordering::Relaxed);
        self.end.notify_one();
    }

    pub(super) fn has_ended(&self) -> bool {
        self.has_ended.load(Ordering::Relaxed)
    }

    /// Returns when it has ended. One task waits for it.
    pub(super) async fn ended(&self) {
        self.end.notified().await;
    }
}

/// All sessions.
#[derive(Debug)]
pub(super) struct Sessions {
    most: usize,
    known: Mutex<Known>,
}

#[derive(Debug)]
struct Known {
    by_id: HashMap<u64, Arc<Session>>,
    order: AgeOrder<u64>,
    next: u64,
}

impl Sessions {
    pub(super) fn new(most: usize) -> Self {
        let known = Known { by_id: HashMap::new(), order: AgeOrder::new(), next: 0 };
        Self { most: most.max(1), known: Mutex::new(known) }
    }

    /// Open sessions.
    pub(super) fn len(&self) -> usize {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).by_id.len()
    }

    /// Adds a session and returns its number. If there are too many, the one that was used least recently ends.
    pub(super) fn add(&self, session: Arc<Session>) -> u64 {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        while known.by_id.len() >= self.most && known.end_oldest(u64::MAX) {}
        let id = known.next;
        known.next += 1;
        known.order.add(id, session.used.load(Ordering::Relaxed));
        known.by_id.insert(id, session);
        id
    }

    /// Removes a session that has ended.
    pub(super) fn remove(&self, id: u64) {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).by_id.remove(&id);
    }

    /// Ends the sessions that were last used at `limit` or before.
    pub(super) fn end_idle(&self, limit: u64) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        while known.end_oldest(limit) {}
    }
}

impl Known {
    /// Whether there was one to end.
    fn end_oldest(&mut self, limit: u64) -> bool {
        let Self { by_id, order, .. } = self;
        let used = |id: &u64| by_id.get(id).map(|session| session.used.load(Ordering::Relaxed));
        let oldest = order.take_oldest(limit, used);
        if let Some(session) = oldest.and_then(|id| by_id.remove(&id)) {
            session.end();
        }
        oldest.is_some()
    }
}
