//! Asks a DNS server for A records, and checks every answer.

use std::{
    collections::BTreeMap,
    io::{ErrorKind, IoSlice, IoSliceMut},
    net::{Ipv4Addr, UdpSocket},
    os::fd::AsRawFd,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    errno::Errno,
    sys::socket::{MsgFlags, MultiHeaders, SockaddrIn, recvmmsg, sendmmsg},
};

use super::peer::Record;

/// Queries per second of [`Queries::latency`].
pub(super) const RATE: u32 = 5000;
/// How long each of both is measured.
const DURATION: Duration = Duration::from_millis(400);
/// Sockets, each with a port of its own.
const SOCKETS: usize = 8;
/// Queries in flight of each socket.
const IN_FLIGHT: usize = 8;
/// After this time without an answer, queries are lost.
const LOST: Duration = Duration::from_millis(500);
/// Largest answer in bytes.
const LONGEST: usize = 512;

/// Queries for some names, with the answers that are expected. The identifier of a query is the number of its name.
pub(super) struct Queries(Vec<(Vec<u8>, Ipv4Addr)>);

impl Queries {
    pub(super) fn new(records: &[Record]) -> Self {
        Self((0..).zip(records).map(|(id, (name, address))| (query(id, name), *address)).collect())
    }

    /// Asks for the first name, once.
    pub(super) fn ask_first(&self, socket: &UdpSocket) -> Result<()> {
        let (query, _) = self.0.first().context("there is no name")?;
        let mut answer = [0; LONGEST];
        socket.send(query).context("send")?;
        let length = socket.recv(&mut answer).context("wait for the answer")?;
        self.check(answer.get(..length).unwrap_or_default()).map(drop)
    }

    /// Answers per second with a fixed number of queries in flight.
    pub(super) fn throughput(&self, server: Ipv4Addr) -> Result<f64> {
        let mut sockets: Vec<Closed> = sockets(server)?.into_iter().map(Closed::new).collect();
        let mut next = 0;
        let start = Instant::now();
        let mut answered: u64 = 0;
        while start.elapsed() < DURATION {
            for socket in &mut sockets {
                answered += socket.receive(self)?;
                socket.send(self, &mut next)?;
            }
        }
        let rate = answered as f64 / start.elapsed().as_secs_f64();
        ensure!(answered > 0, "no query was answered");
        Ok(rate)
    }

    /// The 99th percentile of latency in microseconds, at [`RATE`]. A query is sent when it is due, whether others were answered or not.
    pub(super) fn latency(&self, server: Ipv4Addr) -> Result<f64> {
        let sockets = sockets(server)?;
        let pause = Duration::from_secs(1) / RATE;
        let mut sent: BTreeMap<(usize, u16), Instant> = BTreeMap::new();
        let mut times = Vec::new();
        let start = Instant::now();
        let (mut due, mut number) = (start, 0_usize);
        let mut buffer = [0; LONGEST];
        while start.elapsed() < DURATION {
            if Instant::now() >= due {
                let place = number % sockets.len();
                // Each socket asks for each name in turn, so an identifier is in flight once.
                let id = number / sockets.len() % self.0.len();
                let (Some(socket), Some((query, _))) = (sockets.get(place), self.0.get(id)) else {
                    bail!("there is no name");
                };
                sent.insert((place, u16::try_from(id)?), Instant::now());
                socket.send(query).context("send")?;
                due += pause;
                number += 1;
            }
            for (place, socket) in sockets.iter().enumerate() {
                match socket.recv(&mut buffer) {
                    Ok(length) => {
                        let now = Instant::now();
                        let id = self.check(buffer.get(..length).unwrap_or_default())?;
                        times.extend(sent.remove(&(place, id)).map(|sent| now - sent));
                    }
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                    Err(error) => return Err(error).context("wait for an answer"),
                }
            }
        }
        let is_lost = |sent: &&Instant| sent.elapsed() > LOST / 2;
        let lost = sent.values().filter(is_lost).count();
        ensure!(lost * 100 < number, "{lost} of {number} queries were not answered");
        times.sort_unstable();
        let rank = (times.len() * 99).div_ceil(100).max(1);
        Ok(times.get(rank - 1).context("no query was answered")?.as_secs_f64() * 1e6)
    }

    /// Checks an answer and returns its identifier.
    fn check(&self, answer: &[u8]) -> Result<u16> {
        let head = answer.first_chunk::<8>().context("an answer without a head")?;
        let [high, low, flags, code, _, _, answers @ ..] = head;
        let id = u16::from_be_bytes([*high, *low]);
        let expected = self.0.get(usize::from(id)).map(|(_, address)| address.octets());
        // A response without error, with one answer, which stands at its end.
        ensure!(flags & 0x80 != 0 && code & 0x0f == 0 && *answers == [0, 1], "the answer is {answer:02x?}");
        ensure!(answer.last_chunk::<4>().copied() == expected, "another address: {answer:02x?}");
        Ok(id)
    }
}

fn sockets(server: Ipv4Addr) -> Result<Vec<UdpSocket>> {
    let socket = || -> Result<UdpSocket> {
        let socket = UdpSocket::bind("0.0.0.0:0").context("bind")?;
        socket.connect((server, 53)).context("connect")?;
        socket.set_nonblocking(true).context("prepare a socket")?;
        Ok(socket)
    };
    (0..SOCKETS).map(|_| socket()).collect()
}

/// A socket that keeps a number of queries in flight.
struct Closed {
    socket: UdpSocket,
    in_flight: usize,
    last: Instant,
}

impl Closed {
    fn new(socket: UdpSocket) -> Self {
        Self { socket, in_flight: 0, last: Instant::now() }
    }

    /// Takes all answers that are there.
    fn receive(&mut self, queries: &Queries) -> Result<u64> {
        let mut buffers = [[0; LONGEST]; IN_FLIGHT];
        let lengths = receive_all(&self.socket, &mut buffers)?;
        for (buffer, length) in buffers.iter().zip(&lengths) {
            queries.check(buffer.get(..*length).unwrap_or_default())?;
        }
        if !lengths.is_empty() {
            self.last = Instant::now();
        } else if self.in_flight > 0 && self.last.elapsed() > LOST {
            bail!("{} queries were not answered within {LOST:?}", self.in_flight);
        }
        self.in_flight = self.in_flight.saturating_sub(lengths.len());
        Ok(lengths.len() as u64)
    }

    /// Fills up what is in flight, when half of it was answered.
    fn send(&mut self, queries: &Queries, next: &mut usize) -> Result<()> {
        if self.in_flight > IN_FLIGHT / 2 {
            return Ok(());
        }
        let missing = IN_FLIGHT - self.in_flight;
        let chosen = queries.0.iter().cycle().skip(*next % queries.0.len().max(1)).take(missing);
        let slices: Vec<_> = chosen.map(|(query, _)| [IoSlice::new(query)]).collect();
        let mut headers: MultiHeaders<SockaddrIn> = MultiHeaders::preallocate(IN_FLIGHT, None);
        let flags = MsgFlags::empty();
        let fd = self.socket.as_raw_fd();
        let sent = sendmmsg(fd, &mut headers, &slices, vec![None; slices.len()], [], flags)
            .context("send queries")?;
        let count = sent.count();
        if self.in_flight == 0 {
            self.last = Instant::now();
        }
        self.in_flight += count;
        *next += count;
        Ok(())
    }
}

/// Receives what is there, and returns the lengths.
fn receive_all(socket: &UdpSocket, buffers: &mut [[u8; LONGEST]; IN_FLIGHT]) -> Result<Vec<usize>> {
    let mut slices: Vec<_> = buffers.iter_mut().map(|buffer| [IoSliceMut::new(buffer)]).collect();
    let mut headers: MultiHeaders<SockaddrIn> = MultiHeaders::preallocate(IN_FLIGHT, None);
    let received =
        recvmmsg(socket.as_raw_fd(), &mut headers, slices.iter_mut(), MsgFlags::MSG_DONTWAIT, None);
    match received {
        Ok(received) => Ok(received.map(|message| message.bytes).collect()),
        Err(Errno::EAGAIN) => Ok(Vec::new()),
        Err(error) => Err(error).context("wait for answers"),
    }
}

/// A query for the A record of a name (RFC 1035 section 4.1), with recursion desired.
fn query(id: u16, name: &str) -> Vec<u8> {
    let mut query = [&id.to_be_bytes()[..], &[1, 0, 0, 1, 0, 0, 0, 0, 0, 0]].concat();
    for label in name.split('.') {
        // Labels are at most 63 bytes long.
        query.push(label.len() as u8);
        query.extend(label.bytes());
    }
    query.extend([0, 0, 1, 0, 1]);
    query
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_expected_answer_counts() {
        let records = [
            ("a.overlay".to_owned(), Ipv4Addr::new(10, 0, 0, 1)),
            ("b.overlay".to_owned(), Ipv4Addr::new(10, 0, 0, 2)),
        ];
        let queries = Queries::new(&records);
        assert_eq!(
            queries.0[1].0,
            b"\x00\x01\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x01b\x07overlay\x00\x00\x01\x00\x01"
        );
        let answer = |id: u8, flags: [u8; 2], count: u8, last: u8| {
            let mut answer = queries.0[1].0.clone();
            answer[1] = id;
            answer[2..4].copy_from_slice(&flags);
            answer[7] = count;
            answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 30, 0, 4, 10, 0, 0, last]);
            answer
        };
        assert_eq!(queries.check(&answer(1, [0x85, 0x80], 1, 2)).unwrap(), 1);
        // The query itself, an error, no answer, another name's address, an unknown identifier, a part.
        for wrong in [
            answer(1, [0x01, 0x00], 1, 2),
            answer(1, [0x85, 0x83], 1, 2),
            answer(1, [0x85, 0x80], 0, 2),
            answer(1, [0x85, 0x80], 1, 1),
            answer(7, [0x85, 0x80], 1, 2),
            vec![0, 1],
        ] {
            assert!(queries.check(&wrong).is_err(), "{wrong:02x?}");
        }
    }
}
