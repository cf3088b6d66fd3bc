//! The servers in the container of the other host. They run in this process and end with it.

use std::{
    io::{ErrorKind, Read, Write},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    thread,
};

use anyhow::{Context, Result};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::{cpu, netns::Netns};

/// Takes a stream to its end and answers how many bytes it had, as 8 bytes in network byte order.
pub(super) const STREAM: u16 = 7001;
/// Answers one byte with the same and closes.
pub(super) const ECHO: u16 = 7002;
/// Answers each datagram with the same.
pub(super) const UDP: u16 = 7003;
/// Answers HTTP requests, over connections that are kept.
pub(super) const HTTP: u16 = 7004;

/// Bytes of the body of an HTTP response.
const BODY: usize = 128;
/// Longest request head.
const LONGEST_HEAD: usize = 4096;

/// Running servers.
pub(super) struct Servers {
    last_client: Arc<AtomicU32>,
}

impl Servers {
    /// Starts all at `address`.
    pub(super) fn start(netns: &Netns, address: Ipv4Addr) -> Result<Self> {
        let listen =
            |port| netns.run(|| TcpListener::bind((address, port)))?.context("listen in the container");
        let (stream, echo, http) = (listen(STREAM)?, listen(ECHO)?, listen(HTTP)?);
        let udp = netns.run(|| UdpSocket::bind((address, UDP)))?.context("bind in the container")?;
        let last_client = Arc::new(AtomicU32::new(0));
        // Another CPU than the sender's, as on another host.
        let far = cpu::last()?;
        thread::spawn(move || {
            let _ = cpu::stay_on(&far);
            for stream in stream.incoming().flatten() {
                thread::spawn(move || count(stream));
            }
        });
        // One CPU for both ends, as for all round trips.
        let (near, seen) = (cpu::first()?, Arc::clone(&last_client));
        thread::spawn(move || {
            let _ = cpu::stay_on(&near);
            while let Ok((stream, client)) = echo.accept() {
                if let IpAddr::V4(ip) = client.ip() {
                    seen.store(ip.to_bits(), Ordering::Relaxed);
                }
                let _ = answer_one(stream);
            }
        });
        thread::spawn(move || {
            let _ = cpu::stay_on(&near);
            answer_datagrams(&udp);
        });
        http.set_nonblocking(true).context("prepare the HTTP server")?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        thread::spawn(move || {
            let _ = cpu::stay_on(&far);
            runtime.block_on(serve_http(http))
        });
        Ok(Self { last_client })
    }

    /// The address from which the last connection to [`ECHO`] came.
    pub(super) fn last_client(&self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.last_client.load(Ordering::Relaxed))
    }
}

fn count(mut stream: TcpStream) {
    let mut buffer = vec![0; 1 << 17];
    let mut total: u64 = 0;
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(length) => total += length as u64,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
    // A client that is gone does not need it.
    let _ = stream.write_all(&total.to_be_bytes());
}

fn answer_one(mut stream: TcpStream) -> std::io::Result<()> {
    let mut byte = [0];
    stream.set_nodelay(true)?;
    stream.read_exact(&mut byte)?;
    stream.write_all(&byte)
}

fn answer_datagrams(socket: &UdpSocket) {
    let mut buffer = [0; 2048];
    loop {
        let received: std::io::Result<(usize, SocketAddr)> = socket.recv_from(&mut buffer);
        if let Ok((length, from)) = received {
            let _ = socket.send_to(buffer.get(..length).unwrap_or_default(), from);
        }
    }
}

async fn serve_http(listener: TcpListener) -> Result<()> {
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let head = format!("HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {BODY}\r\n\r\n");
    let response: Arc<[u8]> = [head.as_bytes(), &[b'x'; BODY]].concat().into();
    loop {
        let (stream, _) = listener.accept().await?;
        let response = Arc::clone(&response);
        tokio::spawn(async move {
            let _ = serve_connection(stream, &response).await;
        });
    }
}

/// Answers requests without bodies until the client closes.
async fn serve_connection(mut stream: tokio::net::TcpStream, response: &[u8]) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut buffer = Vec::with_capacity(LONGEST_HEAD);
    while stream.read_buf(&mut buffer).await? > 0 {
        while let Some(end) = head_end(&buffer) {
            if !buffer.starts_with(b"GET ") {
                return Ok(());
            }
            buffer.drain(..end);
            stream.write_all(response).await?;
        }
        if buffer.len() > LONGEST_HEAD {
            return Ok(());
        }
    }
    Ok(())
}

/// Where the head of an HTTP message ends: behind the empty line.
pub(super) fn head_end(bytes: &[u8]) -> Option<usize> {
    bytes.windows(4).position(|window| window == b"\r\n\r\n").map(|at| at + 4)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_ends_behind_its_empty_line() {
        assert_eq!(head_end(b"GET / HTTP/1.1\r\n\r\nbody"), Some(18));
        assert_eq!(head_end(b"GET / HTTP/1.1\r\nHost: x\r\n\r"), None);
    }
}
