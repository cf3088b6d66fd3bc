//! `demo --serve`: a small HTTP server, which the demo starts in containers and kills.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    thread,
};

use anyhow::{Context, Result};

/// Answers every request with `name` and a line feed, one request for each connection. Returns only with an error.
pub(super) fn serve(address: SocketAddr, name: &str) -> Result<()> {
    let listener = TcpListener::bind(address).with_context(|| format!("listen at {address}"))?;
    loop {
        let (stream, _) = listener.accept().context("accept a connection")?;
        let name = name.to_owned();
        thread::spawn(move || answer(stream, &name));
    }
}

/// A client that goes away gets no answer.
fn answer(mut stream: TcpStream, name: &str) -> Option<()> {
    let mut lines = BufReader::new(stream.try_clone().ok()?).lines();
    while !lines.next()?.ok()?.is_empty() {}
    let length = name.len() + 1;
    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n");
    stream.write_all(format!("{head}{name}\n").as_bytes()).ok()
}
