//! The connection of a client: one request after the other.

use std::{convert::Infallible, net::SocketAddrV4, pin::pin, sync::Arc};

use hyper::{server::conn::http1::Builder, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use rustix::net::sockopt::set_socket_linger;
use tokio::{net::TcpStream, select};
use tracing::debug;

use super::{
    super::{balancer::VirtualPort, shared::Shared},
    Limits,
    exchange::exchange,
    io::{ClientIo, ClientState},
};

/// Smallest buffer that hyper takes in bytes.
const SMALLEST_BUFFER: usize = 8192;

impl Limits {
    /// Bytes that are kept of a connection: a header has to fit.
    pub(super) fn buffer(&self) -> usize {
        self.header_bytes.max(SMALLEST_BUFFER)
    }
}

/// What the requests of a connection share.
#[derive(Debug)]
pub(super) struct Client {
    pub(super) peer: SocketAddrV4,
    pub(super) port: Arc<VirtualPort>,
    pub(super) shared: Arc<Shared>,
    pub(super) state: Arc<ClientState>,
}

/// Serves the requests of a connection until it ends.
pub(in super::super) async fn serve(
    stream: TcpStream,
    peer: SocketAddrV4,
    port: &Arc<VirtualPort>,
    shared: &Arc<Shared>,
) {
    let _ = stream.set_nodelay(true);
    // Whether it is reset is decided at its end.
    let _ = set_socket_linger(&stream, None);
    let state = Arc::new(ClientState::new());
    let (port, shared) = (Arc::clone(port), Arc::clone(shared));
    let client = Client { peer, port, shared, state };
    match requests(stream, &client).await {
        Ok(()) => {}
        Err(error) => debug!(%peer, address = %client.port.address, error, "HTTP connection ended"),
    }
    if let Some(tunnel) = client.state.take_tunnel()
        && let Err(error) = tunnel.run(&client.shared).await
    {
        debug!(%peer, address = %client.port.address, %error, "tunnel reset");
    }
}

async fn requests(stream: TcpStream, client: &Client) -> Result<(), String> {
    let limits = &client.shared.options.http;
    let io = TokioIo::new(ClientIo::new(stream, Arc::clone(&client.state)));
    let service =
        service_fn(move |request| async move { Ok::<_, Infallible>(exchange(request, client).await) });
    let connection = Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.header_timeout)
        .max_header_size(limits.header_bytes)
        .max_buf_size(limits.buffer())
        .serve_connection(io, service)
        .with_upgrades();
    let mut connection = pin!(connection);
    let mut over = pin!(client.state.activity.limits(limits.idle, client.port.reset_time()));
    let mut removed = client.port.reset_time();
    let mut is_closing = false;
    loop {
        if !is_closing && removed.borrow_and_update().is_some() {
            connection.as_mut().graceful_shutdown();
            is_closing = true;
        }
        select! {
            ended = connection.as_mut() => {
                // hyper has sent what it could. Only a body that failed leaves a response that is not complete.
                if ended.as_ref().err().is_none_or(|error| !error.is_user()) {
                    client.state.set_ends_well();
                }
                return ended.map_err(|error| error.to_string());
            }
            () = over.as_mut() => return Err("nothing moved, or the port was removed".to_owned()),
            // It fails when the port is gone, which the client holds.
            _ = removed.changed(), if !is_closing => {}
        }
    }
}
