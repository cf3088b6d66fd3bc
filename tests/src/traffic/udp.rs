//! UDP datagrams, each answered with its transformed content and verified one by one.

use std::{
    collections::BTreeMap,
    io::{self, ErrorKind},
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    panic::resume_unwind,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::socket::{
    setsockopt,
    sockopt::{RcvBufForce, UdpGsoSegment},
};

use crate::{
    topology::Endpoint,
    traffic::{
        checksum::sum,
        payload::{answer, answered_index, datagram},
    },
};

/// Bytes of each socket's receive buffer.
const RECEIVE_BUFFER: usize = 4 << 20;
/// Datagrams in flight: far fewer than the capacity of any queue on the path.
const WINDOW: usize = 16;
/// How long an answer may take before the datagram counts as lost.
const TIMEOUT: Duration = Duration::from_secs(2);
/// Bytes of IPv4 and UDP headers in front of a datagram's payload.
const HEADERS: usize = 28;
/// The largest UDP payload in IPv4.
const LARGEST: usize = 65507;

/// Sends one datagram of every size from 1 byte to what fits `mtu`, and checks every answer. Returns their number.
///
/// # Errors
///
/// When a datagram is lost or answered with other bytes than expected, naming its size. None is sent twice.
pub fn every_size(from: Endpoint<'_>, to: Endpoint<'_>, mtu: usize) -> Result<usize> {
    let sizes: Vec<usize> = (1..=mtu.saturating_sub(HEADERS)).collect();
    with_echo(from, to, |socket| {
        let mut batches = sizes.chunks(WINDOW);
        batches.try_for_each(|batch| exchange_sizes(socket, batch)).map(|()| sizes.len())
    })
}

/// Sends datagrams larger than the MTU, which cross in fragments, and checks every answer. Returns their number.
pub fn oversize(from: Endpoint<'_>, to: Endpoint<'_>) -> Result<usize> {
    let sizes = [1473, 3000, 9000, 20_000, 60_000, LARGEST];
    with_echo(from, to, |socket| {
        sizes.chunks(1).try_for_each(|size| exchange_sizes(socket, size)).map(|()| sizes.len())
    })
}

/// Sends datagrams many at a time with the kernel's segmentation offload (`UDP_SEGMENT`), and checks the answer to every
/// one of them. Returns their number.
///
/// # Errors
///
/// As [`every_size`]; also when the kernel does not know `UDP_SEGMENT` (before 4.18).
pub fn segmented(from: Endpoint<'_>, to: Endpoint<'_>, mtu: usize) -> Result<usize> {
    let full = mtu.saturating_sub(HEADERS);
    // Size of each segment, how many, and how much shorter the last one is.
    let most = LARGEST.div_ceil(full.max(1));
    let bursts = [
        (full, 2, 0),
        (full, 40, 1),
        (1000, 60, 999),
        (100, 64, 50),
        (full, 45, full / 2),
        (24, 64, 0),
        // As many bytes as IPv4 allows: with outer headers, they exceed it.
        (full, most, most * full - LARGEST),
    ];
    with_echo(from, to, |socket| {
        let mut sent = 0;
        for (segment, count, shorter) in bursts {
            sent += exchange_burst(socket, segment, count, shorter)
                .with_context(|| format!("{count} datagrams of {segment} bytes in one send"))?;
        }
        Ok(sent)
    })
}

/// Sends a datagram whose checksum is computed to zero, which must be sent as all ones (RFC 768), and checks the answer.
///
/// # Errors
///
/// As [`every_size`].
pub fn zero_sum(from: Endpoint<'_>, to: Endpoint<'_>) -> Result<()> {
    with_echo(from, to, |socket| {
        let mut bytes = datagram(0, 64);
        let local = socket.local_addr().context("read the port of the UDP socket")?.port();
        let peer = socket.peer_addr().context("read the port of the peer")?.port();
        let length = u16::try_from(bytes.len() + 8).context("a long datagram")?;
        let header = [17, length, local, peer, length].map(u16::to_be_bytes).concat();
        let Some(free) = bytes.first_chunk_mut() else { bail!("an empty datagram") };
        *free = [0; 2];
        let parts = [&from.address.octets()[..], &to.address.octets(), &header, &bytes];
        let rest = (!sum(parts)).to_be_bytes();
        if let Some(free) = bytes.first_chunk_mut() {
            *free = rest;
        }
        socket.send(&bytes).context("send a datagram with a checksum of zero")?;
        let expected = BTreeMap::from([(0, answer(&bytes))]);
        receive_all(socket, expected, |_| Some(0), "number")
    })
}

/// Whether one datagram of `size` bytes and its answer arrive at this moment.
///
/// # Errors
///
/// When sockets cannot be created; a lost datagram is `Ok(false)`.
pub fn passes(from: Endpoint<'_>, to: Endpoint<'_>, size: usize) -> Result<bool> {
    with_echo(from, to, |socket| Ok(exchange_sizes(socket, &[size]).is_ok()))
}

/// One datagram and its answer, within `timeout`: whether the path works at this moment.
///
/// # Errors
///
/// When sockets cannot be created; a lost datagram is `Ok(false)`.
pub fn is_answered(socket: &UdpSocket, index: u32, timeout: Duration) -> Result<bool> {
    socket.set_read_timeout(Some(timeout)).context("set the read timeout")?;
    let bytes = datagram(index, 64);
    if socket.send(&bytes).is_err() {
        return Ok(false);
    }
    let expected = answer(&bytes);
    let mut buffer = [0; 128];
    // Answers to earlier datagrams may still come in.
    loop {
        match socket.recv(&mut buffer) {
            Ok(count) if buffer.get(..count) == Some(expected.as_slice()) => return Ok(true),
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => return Ok(false),
        }
    }
}

/// Runs an echo server at `to` while `work` uses a socket at `from` that is connected to it.
pub fn with_echo<T>(
    from: Endpoint<'_>,
    to: Endpoint<'_>,
    work: impl FnOnce(&UdpSocket) -> Result<T>,
) -> Result<T> {
    let server = bind(to)?;
    let target = server.local_addr().context("read the echo server's port")?;
    let client = bind(from)?;
    client.connect(target).with_context(|| format!("connect a UDP socket to {target}"))?;
    client.set_read_timeout(Some(TIMEOUT)).context("set the read timeout")?;
    server.set_read_timeout(Some(Duration::from_millis(20))).context("set the read timeout")?;
    let finished = AtomicBool::new(false);
    thread::scope(|scope| {
        let echo = scope.spawn(|| echo(&server, &finished));
        let result = work(&client);
        finished.store(true, Ordering::Relaxed);
        let echoed = echo.join().unwrap_or_else(|panic| resume_unwind(panic));
        let result = result.with_context(|| format!("UDP from {} to {target}", from.netns.name()))?;
        echoed.map(|()| result)
    })
}

fn bind(endpoint: Endpoint<'_>) -> Result<UdpSocket> {
    let Endpoint { netns, address } = endpoint;
    let socket = netns
        .run(|| UdpSocket::bind((address, 0)))?
        .with_context(|| format!("bind a UDP socket to {address} in {}", netns.name()))?;
    // A burst must not be lost at its very end, in the socket: each small datagram takes the room of a whole page there.
    setsockopt(&socket, RcvBufForce, &RECEIVE_BUFFER).context("enlarge the receive buffer")?;
    Ok(socket)
}

fn echo(server: &UdpSocket, finished: &AtomicBool) -> Result<()> {
    let mut buffer = vec![0; LARGEST];
    while !finished.load(Ordering::Relaxed) {
        match server.recv_from(&mut buffer) {
            Ok((count, peer)) => reply(server, buffer.get(..count).unwrap_or_default(), peer)?,
            Err(error) if is_no_datagram(&error) => {}
            Err(error) => return Err(error).context("receive in the UDP echo server"),
        }
    }
    Ok(())
}

/// Whether a socket with a timeout has received nothing, for now.
pub(crate) fn is_no_datagram(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted)
}

fn reply(server: &UdpSocket, bytes: &[u8], peer: SocketAddr) -> Result<()> {
    match server.send_to(&answer(bytes), peer) {
        Ok(_) => Ok(()),
        // The path is down; the other end counts the answer as lost.
        Err(error) if error.kind() != ErrorKind::InvalidInput => Ok(()),
        Err(error) => Err(error).with_context(|| format!("answer {} bytes to {peer}", bytes.len())),
    }
}

/// Sends a datagram of each of these different sizes, then expects their answers, which their sizes identify.
fn exchange_sizes(socket: &UdpSocket, sizes: &[usize]) -> Result<()> {
    let mut expected = BTreeMap::new();
    for &size in sizes {
        let bytes = datagram(0, size);
        socket.send(&bytes).with_context(|| format!("send a datagram of {size} bytes"))?;
        expected.insert(size, answer(&bytes));
    }
    receive_all(socket, expected, |answer| Some(answer.len()), "size")
}

/// Sends `count` datagrams with one system call, then expects their answers, which carry their numbers.
fn exchange_burst(socket: &UdpSocket, segment: usize, count: usize, shorter: usize) -> Result<usize> {
    let size = i32::try_from(segment).context("a segment is longer than a datagram")?;
    setsockopt(socket, UdpGsoSegment, &size).context("set UDP_SEGMENT")?;
    let mut burst = Vec::with_capacity(segment * count);
    let mut expected = BTreeMap::new();
    for number in 1..=count {
        let length = if number == count { segment - shorter } else { segment };
        let index = u32::try_from(number).context("too many datagrams in one send")?;
        let bytes = datagram(index, length);
        burst.extend_from_slice(&bytes);
        // The last one can be too short for a number; nothing else is as short.
        let key = if length < 4 { 0 } else { index };
        expected.insert(key, answer(&bytes));
    }
    socket.send(&burst).with_context(|| format!("send {} bytes in segments of {segment}", burst.len()))?;
    receive_all(socket, expected, |answer| Some(answered_index(answer).unwrap_or(0)), "number")?;
    Ok(count)
}

/// Receives until every expected answer has come, each once and with the right bytes.
fn receive_all<K: Ord + Copy + std::fmt::Display>(
    socket: &UdpSocket,
    mut expected: BTreeMap<K, Vec<u8>>,
    identify: impl Fn(&[u8]) -> Option<K>,
    label: &str,
) -> Result<()> {
    let mut buffer = vec![0; LARGEST];
    while let Some((&first, _)) = expected.first_key_value() {
        let count = match socket.recv(&mut buffer) {
            Ok(count) => count,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                bail!("{} datagrams lost, the first with {label} {first}", expected.len());
            }
            Err(error) => return Err(error).context("receive an answer"),
        };
        let bytes = buffer.get(..count).unwrap_or_default();
        let key = identify(bytes);
        let Some(wanted) = key.and_then(|key| expected.remove(&key)) else {
            bail!("an answer of {count} bytes came twice or unasked");
        };
        ensure!(bytes == wanted, "the answer of {count} bytes has the wrong content");
    }
    Ok(())
}

/// A socket in a namespace, bound to one address and port.
pub fn occupy(endpoint: Endpoint<'_>, address: Ipv4Addr, port: u16) -> Result<UdpSocket> {
    endpoint
        .netns
        .run(|| UdpSocket::bind((address, port)))?
        .with_context(|| format!("bind UDP port {port} of {address} in {}", endpoint.netns.name()))
}
