//! A TCP connection that carries data at a steady rate while something happens to its path. Every byte is verified.

use std::{
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    panic::resume_unwind,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};

use crate::{topology::Endpoint, traffic::tcp::accept};

/// How long either end waits for progress of the other: programs and agents may be away for a while.
const STALL: Duration = Duration::from_secs(20);
/// Bytes of a write, a multiple of 8.
const CHUNK: usize = 64 << 10;
/// Pause after each write: about 50 MB per second, far more than any window in a second.
const PAUSE: Duration = Duration::from_millis(1);
/// How long a connection attempt may take.
const CONNECT: Duration = Duration::from_secs(5);

/// A running transfer.
#[derive(Debug)]
pub struct Stream {
    stop: Arc<AtomicBool>,
    paused: Arc<AtomicBool>,
    received: Arc<AtomicU64>,
    sender: JoinHandle<Result<u64>>,
    receiver: JoinHandle<Result<(u64, SocketAddr)>>,
}

impl Stream {
    /// Connects from `from` to `to` and starts to send.
    pub fn start(from: Endpoint<'_>, to: Endpoint<'_>) -> Result<Self> {
        let listener = to.netns.run(|| TcpListener::bind((to.address, 0)))?.context("listen")?;
        let target = listener.local_addr().context("read the listener's port")?;
        Self::start_at(from, &listener, target)
    }

    /// Connects from `from` to `target`, by which packets reach `listener`, and starts to send.
    pub fn start_at(from: Endpoint<'_>, listener: &TcpListener, target: SocketAddr) -> Result<Self> {
        let connected = from.netns.run(|| TcpStream::connect_timeout(&target, CONNECT))?;
        let out = connected.with_context(|| format!("connect from {} to {target}", from.netns.name()))?;
        let socket = accept(listener)?;
        let [stop, paused] = [(), ()].map(|()| Arc::new(AtomicBool::new(false)));
        let received = Arc::new(AtomicU64::new(0));
        let (end, pause, count) = (Arc::clone(&stop), Arc::clone(&paused), Arc::clone(&received));
        let sender = thread::spawn(move || send(out, &end, &pause));
        let receiver = thread::spawn(move || receive(socket, &count));
        Ok(Self { stop, paused, received, sender, receiver })
    }

    /// Bytes that have arrived so far.
    pub fn received(&self) -> u64 {
        self.received.load(Relaxed)
    }

    /// Waits until so many bytes have arrived from now on.
    ///
    /// # Errors
    ///
    /// When they have not for a long time.
    pub fn advance(&self, bytes: u64) -> Result<()> {
        let (target, deadline) = (self.received() + bytes, Instant::now() + STALL);
        while self.received() < target {
            ensure!(Instant::now() < deadline, "the transfer stands still at {} bytes", self.received());
            thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// Sends nothing for a while.
    pub fn pause(&self, duration: Duration) {
        self.paused.store(true, Relaxed);
        thread::sleep(duration);
        self.paused.store(false, Relaxed);
    }

    /// Ends the transfer. Returns its bytes, and the address of the sender as the receiver has seen it.
    ///
    /// # Errors
    ///
    /// When it stood still, or other bytes arrived than were sent.
    pub fn finish(self) -> Result<(u64, SocketAddr)> {
        self.stop.store(true, Relaxed);
        let sent = self.sender.join().unwrap_or_else(|panic| resume_unwind(panic));
        let received = self.receiver.join().unwrap_or_else(|panic| resume_unwind(panic));
        let (sent, (received, peer)) = (sent.context("send")?, received.context("receive")?);
        ensure!(sent == received, "{sent} bytes were sent and {received} arrived");
        Ok((sent, peer))
    }
}

fn send(mut socket: TcpStream, stop: &AtomicBool, paused: &AtomicBool) -> Result<u64> {
    socket.set_write_timeout(Some(STALL)).context("set the write timeout")?;
    let (mut position, mut chunk) = (0, vec![0; CHUNK]);
    while !stop.load(Relaxed) {
        if paused.load(Relaxed) {
            thread::sleep(PAUSE);
            continue;
        }
        fill(position, &mut chunk);
        socket.write_all(&chunk).with_context(|| format!("write after {position} bytes"))?;
        position += CHUNK as u64;
        thread::sleep(PAUSE);
    }
    Ok(position)
}

fn receive(mut socket: TcpStream, received: &AtomicU64) -> Result<(u64, SocketAddr)> {
    let peer = socket.peer_addr().context("read the sender's address")?;
    socket.set_read_timeout(Some(STALL)).context("set the read timeout")?;
    let (mut position, mut chunk, mut expected) = (0, vec![0; CHUNK], vec![0; CHUNK]);
    loop {
        let mut filled = 0;
        while let Some(rest) = chunk.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            match socket.read(rest) {
                Ok(0) if filled == 0 => return Ok((position, peer)),
                Ok(0) => bail!("the connection ended in the middle, after {position} bytes"),
                Ok(count) => filled += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error).with_context(|| format!("read after {position} bytes")),
            }
        }
        fill(position, &mut expected);
        ensure!(chunk == expected, "wrong bytes behind byte {position}");
        position += CHUNK as u64;
        received.store(position, Relaxed);
    }
}

/// The bytes at a position, which is a multiple of [`CHUNK`]: no two chunks are equal.
fn fill(position: u64, chunk: &mut [u8]) {
    for (number, word) in (position / 8..).zip(chunk.chunks_exact_mut(8)) {
        word.copy_from_slice(&number.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_ne_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_differ_everywhere() {
        let (mut first, mut second) = (vec![0; CHUNK], vec![0; CHUNK]);
        fill(0, &mut first);
        fill(CHUNK as u64, &mut second);
        assert!(first.chunks(8).zip(second.chunks(8)).all(|(a, b)| a != b));
    }
}
