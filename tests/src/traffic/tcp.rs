//! A TCP transfer of random bytes, verified by SHA-256 at both ends.
//!
//! Hashing costs more than sending on CPUs without instructions for it. So every transfer of one length sends the same
//! random bytes, which are hashed once, followed by a unique tail.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    panic::resume_unwind,
    sync::{Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use rand::{RngCore, SeedableRng, rngs::SmallRng};
use sha2::{Digest, Sha256};

use crate::topology::Endpoint;

/// How long either end waits for progress of the other.
const STALL: Duration = Duration::from_secs(5);
/// Bytes per read and write.
const CHUNK: usize = 256 * 1024;

/// Bytes at the end that no other transfer has.
const TAIL: usize = 64;

/// Sends `bytes` random bytes and a tail from `from` to `to` and compares the digests of both ends. Returns the time from
/// the first byte to the last, hashing at the receiving end included.
///
/// # Errors
///
/// When no connection comes about, the transfer stalls for 5 seconds or takes longer than `limit`, or what arrives is
/// not what was sent.
pub fn transfer(from: Endpoint<'_>, to: Endpoint<'_>, bytes: u64, limit: Duration) -> Result<Duration> {
    let stream = RandomStream::of_length(bytes);
    let deadline = Instant::now() + limit;
    let listener = to
        .netns
        .run(|| TcpListener::bind((to.address, 0)))?
        .with_context(|| format!("listen on {} in {}", to.address, to.netns.name()))?;
    let target = listener.local_addr().context("read the listener's port")?;
    thread::scope(|scope| {
        let receiver = scope.spawn(|| receive(&listener, deadline));
        let sent = connect(from, target).and_then(|socket| send(socket, stream, deadline));
        let received = receiver.join().unwrap_or_else(|panic| resume_unwind(panic));
        let (sent, received) = (sent.context("send over TCP")?, received.context("receive over TCP")?);
        let expected = bytes + TAIL as u64;
        ensure!(received.bytes == expected, "{} of {expected} bytes arrived over TCP", received.bytes);
        ensure!(
            received.digest == sent.digest,
            "TCP delivered other bytes than were sent: the digests differ"
        );
        Ok(received.finished.duration_since(sent.started))
    })
}

/// Random bytes that can be made again: a seed and the hash of what it gives.
#[derive(Clone)]
struct RandomStream {
    bytes: u64,
    seed: u64,
    hash: Sha256,
}

impl RandomStream {
    /// The stream of this length: made the first time, other bytes in every run.
    fn of_length(bytes: u64) -> Self {
        static KNOWN: Mutex<BTreeMap<u64, RandomStream>> = Mutex::new(BTreeMap::new());
        let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
        known.entry(bytes).or_insert_with(|| Self::new(bytes)).clone()
    }

    fn new(bytes: u64) -> Self {
        let mut stream = Self { bytes, seed: rand::random(), hash: Sha256::new() };
        let mut hash = Sha256::new();
        let hashed: Result<(), Infallible> = stream.for_each_chunk(|chunk| {
            hash.update(chunk);
            Ok(())
        });
        let Ok(()) = hashed;
        stream.hash = hash;
        stream
    }

    fn for_each_chunk<E>(&self, mut consume: impl FnMut(&[u8]) -> Result<(), E>) -> Result<(), E> {
        let mut random = SmallRng::seed_from_u64(self.seed);
        let mut buffer = vec![0; CHUNK];
        let mut left = self.bytes;
        while left > 0 {
            let length = usize::try_from(left).unwrap_or(CHUNK).min(CHUNK);
            let chunk = buffer.get_mut(..length).unwrap_or_default();
            random.fill_bytes(chunk);
            consume(chunk)?;
            left -= length as u64;
        }
        Ok(())
    }
}

struct Sent {
    started: Instant,
    digest: Vec<u8>,
}

struct Received {
    finished: Instant,
    bytes: u64,
    digest: Vec<u8>,
}

fn connect(from: Endpoint<'_>, target: SocketAddr) -> Result<TcpStream> {
    from.netns
        .run(|| TcpStream::connect_timeout(&target, STALL))?
        .with_context(|| format!("connect from {} to {target}", from.netns.name()))
}

fn send(mut socket: TcpStream, stream: RandomStream, deadline: Instant) -> Result<Sent> {
    socket.set_write_timeout(Some(STALL)).context("set the write timeout")?;
    let started = Instant::now();
    let mut sent = 0;
    stream.for_each_chunk(|chunk| {
        socket.write_all(chunk).with_context(|| format!("write after {sent} bytes"))?;
        sent += chunk.len() as u64;
        ensure!(Instant::now() < deadline, "out of time after {sent} of {} bytes", stream.bytes);
        Ok(())
    })?;
    let tail: [u8; TAIL] = rand::random();
    socket.write_all(&tail).context("write the last bytes")?;
    let mut hash = stream.hash;
    hash.update(tail);
    Ok(Sent { started, digest: hash.finalize().to_vec() })
}

fn receive(listener: &TcpListener, deadline: Instant) -> Result<Received> {
    let mut stream = accept(listener)?;
    stream.set_read_timeout(Some(STALL)).context("set the read timeout")?;
    let mut hash = Sha256::new();
    let mut chunk = vec![0; CHUNK];
    let mut bytes = 0;
    loop {
        let count = stream.read(&mut chunk).with_context(|| format!("read after {bytes} bytes"))?;
        let part = chunk.get(..count).unwrap_or_default();
        if part.is_empty() {
            return Ok(Received { finished: Instant::now(), bytes, digest: hash.finalize().to_vec() });
        }
        hash.update(part);
        bytes += count as u64;
        if Instant::now() > deadline {
            bail!("out of time after {bytes} bytes");
        }
    }
}

/// Accepts one connection. The standard library has no timeout for that, hence the polling.
pub(crate) fn accept(listener: &TcpListener) -> Result<TcpStream> {
    listener.set_nonblocking(true).context("make the listener non-blocking")?;
    let deadline = Instant::now() + STALL;
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false).context("make the connection blocking")?;
                return Ok(stream);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock && Instant::now() < deadline => {
                thread::sleep(Duration::from_millis(1));
            }
            Err(error) => return Err(error).context("accept the connection"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_can_be_made_again() {
        let stream = RandomStream::new(CHUNK as u64 + 7);
        let mut hash = Sha256::new();
        let mut bytes = 0;
        let again: Result<(), Infallible> = stream.for_each_chunk(|chunk| {
            hash.update(chunk);
            bytes += chunk.len();
            Ok(())
        });
        assert!(again.is_ok());
        assert_eq!(bytes, CHUNK + 7);
        assert_eq!(hash.finalize(), stream.hash.finalize());
    }

    #[test]
    fn streams_differ() {
        assert_ne!(RandomStream::new(100).hash.finalize(), RandomStream::new(100).hash.finalize());
    }
}
