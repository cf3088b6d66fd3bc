//! Moves the bytes of a TCP connection between client and endpoint, both ways at once.

use std::{
    io,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpStream,
        tcp::{ReadHalf, WriteHalf},
    },
    select,
    sync::watch,
    time::{Instant, sleep_until},
    try_join,
};

use super::{
    counters::{Direction, Opened},
    shared::{Buffers, Shared},
};

/// Full buffers that one direction moves before the other tasks of its thread have their turn.
const TURN: u32 = 16;

/// Moves bytes until both sides have ended their direction. A direction that ends is ended at the other side, while the other direction
/// goes on. Fails when a side fails, when nothing moves for too long, and at `reset_at`.
pub(super) async fn relay(
    client: &mut TcpStream,
    server: &mut TcpStream,
    opened: &Opened,
    reset_at: watch::Receiver<Option<Instant>>,
    shared: &Shared,
) -> io::Result<()> {
    let activity = Activity::new();
    let (from_client, to_client) = client.split();
    let (from_server, to_server) = server.split();
    let forward = OneWay { opened, direction: Direction::ToEndpoint, activity: &activity };
    let backward = OneWay { opened, direction: Direction::ToClient, activity: &activity };
    let both = async {
        try_join!(
            forward.copy(from_client, to_server, &shared.buffers),
            backward.copy(from_server, to_client, &shared.buffers)
        )
    };
    select! {
        moved = both => moved.map(|_| ()),
        () = activity.limits(shared.options.tcp_idle, reset_at) => Err(io::ErrorKind::TimedOut.into()),
    }
}

/// When bytes last moved.
#[derive(Debug)]
pub(super) struct Activity {
    start: Instant,
    last_ms: AtomicU64,
}

impl Activity {
    pub(super) fn new() -> Self {
        Self { start: Instant::now(), last_ms: AtomicU64::new(0) }
    }

    pub(super) fn note(&self) {
        let now = u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last_ms.store(now, Ordering::Relaxed);
    }

    /// Returns when nothing has moved for `idle`, or at `reset_at`.
    pub(super) async fn limits(&self, idle: Duration, mut reset_at: watch::Receiver<Option<Instant>>) {
        loop {
            let idle_at = self.start + Duration::from_millis(self.last_ms.load(Ordering::Relaxed)) + idle;
            let reset = *reset_at.borrow_and_update();
            let until = reset.map_or(idle_at, |reset| reset.min(idle_at));
            if until <= Instant::now() {
                return;
            }
            select! {
                () = sleep_until(until) => {}
                // It fails when the endpoint is gone, which the connection itself holds.
                _ = reset_at.changed() => {}
            }
        }
    }
}

/// One direction of a connection.
struct OneWay<'a> {
    opened: &'a Opened,
    direction: Direction,
    activity: &'a Activity,
}

impl OneWay<'_> {
    async fn copy(&self, mut from: ReadHalf<'_>, mut to: WriteHalf<'_>, buffers: &Buffers) -> io::Result<()> {
        loop {
            from.readable().await?;
            let mut buffer = buffers.take();
            let has_ended = self.copy_available(&mut from, &mut to, &mut buffer).await?;
            buffers.give(buffer);
            if has_ended {
                return to.shutdown().await;
            }
        }
    }

    /// Copies what is there now. Returns whether the direction has ended.
    async fn copy_available(
        &self,
        from: &mut ReadHalf<'_>,
        to: &mut WriteHalf<'_>,
        buffer: &mut [u8],
    ) -> io::Result<bool> {
        let full = buffer.len();
        for _ in 0..TURN {
            let length = from.read(buffer).await?;
            if length == 0 {
                return Ok(true);
            }
            self.activity.note();
            to.write_all(buffer.get(..length).unwrap_or_default()).await?;
            self.activity.note();
            self.opened.count_bytes(self.direction, length);
            if length < full {
                return Ok(false);
            }
        }
        tokio::task::yield_now().await;
        Ok(false)
    }
}
