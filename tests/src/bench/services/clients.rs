//! One measurement of each metric, in the network namespace of the current thread.

use std::{
    io::{Read, Write},
    net::{Shutdown, SocketAddrV4, TcpStream, UdpSocket},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::servers::head_end;
use crate::cpu;

/// How long either end waits for the other.
const STALL: Duration = Duration::from_secs(5);
/// Bytes of one write of a stream.
const BLOCK: usize = 1 << 17;
/// HTTP connections at a time: enough that no CPU waits for a message while another has several.
pub(super) const CONNECTIONS: usize = 64;
/// The request. The name of the host is what a client of the service sends.
const REQUEST: &[u8] =
    b"GET / HTTP/1.1\r\nHost: all.bench.svc.overlay\r\nUser-Agent: bench\r\nAccept: */*\r\n\r\n";

fn connect(to: SocketAddrV4) -> Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&to.into(), STALL).with_context(|| format!("connect to {to}"))?;
    stream.set_nodelay(true).context("set TCP_NODELAY")?;
    stream.set_read_timeout(Some(STALL)).context("set the read timeout")?;
    Ok(stream)
}

/// Throughput of one stream in bits per second: from the first byte until the receiver has said how many arrived.
pub(super) fn stream(to: SocketAddrV4, duration: Duration) -> Result<f64> {
    cpu::stay_on(&cpu::first()?)?;
    let mut stream = connect(to)?;
    let block = vec![5; BLOCK];
    let start = Instant::now();
    let mut sent: u64 = 0;
    while start.elapsed() < duration {
        stream.write_all(&block).context("send")?;
        sent += BLOCK as u64;
    }
    stream.shutdown(Shutdown::Write).context("end the stream")?;
    let mut total = [0; 8];
    stream.read_exact(&mut total).context("wait for the receiver's count")?;
    let elapsed = start.elapsed();
    ensure!(u64::from_be_bytes(total) == sent, "{} of {sent} bytes arrived", u64::from_be_bytes(total));
    Ok(sent as f64 * 8.0 / elapsed.as_secs_f64())
}

/// Connects, sends a byte, waits for it to come back, and closes.
pub(super) fn connect_once(to: SocketAddrV4) -> Result<()> {
    let mut stream = connect(to)?;
    let mut byte = [7];
    stream.write_all(&byte).context("send")?;
    stream.read_exact(&mut byte).context("wait for the answer")?;
    ensure!(byte == [7], "another byte came back");
    Ok(())
}

/// The median time of [`connect_once`] in microseconds.
pub(super) fn connections(to: SocketAddrV4, duration: Duration) -> Result<f64> {
    cpu::stay_on(&cpu::first()?)?;
    let start = Instant::now();
    let mut times = Vec::new();
    while start.elapsed() < duration {
        let begun = Instant::now();
        connect_once(to)?;
        times.push(begun.elapsed());
    }
    median(times)
}

/// The median time of a datagram and its answer in microseconds, over a connected socket.
pub(super) fn datagrams(to: SocketAddrV4, duration: Duration) -> Result<f64> {
    cpu::stay_on(&cpu::first()?)?;
    let socket = UdpSocket::bind("0.0.0.0:0").context("bind")?;
    socket.connect(to).with_context(|| format!("connect to {to}"))?;
    socket.set_read_timeout(Some(STALL)).context("set the read timeout")?;
    let start = Instant::now();
    let mut times = Vec::new();
    let mut number: u64 = 0;
    while start.elapsed() < duration {
        number += 1;
        let mut answer = [0; 16];
        let begun = Instant::now();
        socket.send(&number.to_be_bytes()).context("send")?;
        let length = socket.recv(&mut answer).context("wait for the answer")?;
        times.push(begun.elapsed());
        ensure!(answer.get(..length) == Some(&number.to_be_bytes()[..]), "another datagram came back");
    }
    median(times)
}

/// HTTP requests per second over [`CONNECTIONS`] connections, each with one request at a time.
pub(super) fn requests(to: SocketAddrV4, duration: Duration) -> Result<f64> {
    cpu::stay_on(&cpu::first()?)?;
    let streams = (0..CONNECTIONS).map(|_| connect(to)).collect::<Result<Vec<_>>>()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let start = Instant::now();
        let deadline = start + duration;
        let mut clients = tokio::task::JoinSet::new();
        for stream in streams {
            clients.spawn(ask(stream, deadline));
        }
        let mut total = 0;
        while let Some(client) = clients.join_next().await {
            total += client.context("a client failed")??;
        }
        Ok(f64::from(total) / start.elapsed().as_secs_f64())
    })
}

/// Requests until the deadline over one connection. Returns their number.
async fn ask(stream: TcpStream, deadline: Instant) -> Result<u32> {
    stream.set_nonblocking(true).context("prepare a connection")?;
    let mut stream = tokio::net::TcpStream::from_std(stream).context("prepare a connection")?;
    let mut buffer = Vec::with_capacity(4096);
    let mut answered = 0;
    while Instant::now() < deadline {
        stream.write_all(REQUEST).await.context("send a request")?;
        buffer.clear();
        loop {
            let read = tokio::time::timeout(STALL, stream.read_buf(&mut buffer));
            ensure!(read.await.context("wait for a response")?? > 0, "the server closed the connection");
            if is_complete(&buffer)? {
                break;
            }
        }
        answered += 1;
    }
    Ok(answered)
}

/// Whether a response is there to its last byte. Fails when it is no success, or longer than it says.
fn is_complete(response: &[u8]) -> Result<bool> {
    let Some(end) = head_end(response) else { return Ok(false) };
    let head = String::from_utf8_lossy(response.get(..end).unwrap_or_default());
    ensure!(head.starts_with("HTTP/1.1 200 "), "the response is {:?}", head.lines().next());
    let length = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>().ok())?
    });
    let Some(length) = length else { bail!("the response has no length") };
    ensure!(response.len() <= end + length, "the response is longer than it says");
    Ok(response.len() == end + length)
}

fn median(mut times: Vec<Duration>) -> Result<f64> {
    times.sort_unstable();
    let middle = times.get(times.len() / 2).context("nothing was measured in the time given")?;
    Ok(middle.as_secs_f64() * 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_response_ends_where_it_says() {
        let response = b"HTTP/1.1 200 OK\r\ncontent-LENGTH: 3\r\n\r\nabc";
        for length in 0..response.len() {
            assert!(!is_complete(&response[..length]).unwrap(), "{length}");
        }
        assert!(is_complete(response).unwrap());
        assert!(is_complete(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabcd").is_err());
        assert!(is_complete(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n").is_err());
        assert!(is_complete(b"HTTP/1.1 200 OK\r\n\r\n").is_err());
    }
}
