//! What follows after an upgrade: bytes both ways.

use std::{io, sync::Arc, time::Duration};

use hyper::{
    body::Bytes,
    upgrade::{OnUpgrade, Parts, Upgraded},
};
use hyper_util::rt::TokioIo;
use rustix::net::sockopt::set_socket_linger;
use tokio::{io::AsyncWriteExt, net::TcpStream, try_join};

use super::{
    super::{
        counters::{Direction, Opened},
        endpoint::Endpoint,
        relay::relay,
        shared::Shared,
    },
    io::ClientIo,
};

/// The two sides of a tunnel, and the request that it began with.
#[derive(Debug)]
pub(super) struct Tunnel {
    pub(super) client: OnUpgrade,
    pub(super) server: OnUpgrade,
    pub(super) opened: Arc<Opened>,
    pub(super) endpoint: Arc<Endpoint>,
}

impl Tunnel {
    /// Moves bytes until both sides have ended.
    pub(super) async fn run(self, shared: &Shared) -> io::Result<()> {
        let Self { client, server, opened, endpoint } = self;
        let (client, server) = try_join!(client, server).map_err(io::Error::other)?;
        let Parts { io, read_buf: from_client, .. } =
            client.downcast::<TokioIo<ClientIo>>().map_err(not_taken)?;
        let Some(mut client) = io.into_inner().into_stream() else {
            return Err(io::ErrorKind::NotConnected.into());
        };
        let Parts { io, read_buf: from_server, .. } =
            server.downcast::<TokioIo<TcpStream>>().map_err(not_taken)?;
        let mut server = io.into_inner();
        // From here on, whatever ends the tunnel resets it, unless it ends well.
        for stream in [&client, &server] {
            let _ = set_socket_linger(stream, Some(Duration::ZERO));
        }
        try_join!(
            write(&mut server, &from_client, &opened, Direction::ToEndpoint),
            write(&mut client, &from_server, &opened, Direction::ToClient)
        )?;
        relay(&mut client, &mut server, &opened, endpoint.reset_time(), shared).await?;
        for stream in [&client, &server] {
            let _ = set_socket_linger(stream, None);
        }
        Ok(())
    }
}

/// Passes on what was read behind the header.
async fn write(to: &mut TcpStream, bytes: &Bytes, opened: &Opened, direction: Direction) -> io::Result<()> {
    to.write_all(bytes).await?;
    opened.count_bytes(direction, bytes.len());
    Ok(())
}

fn not_taken(_: Upgraded) -> io::Error {
    io::Error::other("an upgraded connection is of another type")
}
