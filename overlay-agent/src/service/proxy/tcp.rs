//! TCP: a listener for each port of a virtual address, and a task for each connection.

use std::{io, net::SocketAddr, net::SocketAddrV4, sync::Arc, time::Duration};

use rustix::net::sockopt::set_socket_linger;
use tokio::{
    io::AsyncWriteExt,
    net::{TcpListener, TcpSocket, TcpStream},
    select,
    time::{Instant, sleep, timeout},
};
use tracing::{debug, warn};

use super::{
    balancer::VirtualPort, counters::Opened, endpoint::Endpoint, header::tcp_over_ipv4, http, relay::relay,
    shared::Shared, threads::Thread,
};

/// Connections that the kernel may have accepted before the proxy sees them.
const BACKLOG: u32 = 4096;
/// The pause when the kernel has no file descriptor for another connection.
const PAUSE: Duration = Duration::from_millis(100);

/// Listens. Fails when another process does, or the address is not one of this host.
pub(super) fn bind(address: SocketAddrV4) -> io::Result<TcpListener> {
    let socket = TcpSocket::new_v4()?;
    // Without it, connections of an earlier run that linger in TIME_WAIT keep the port.
    socket.set_reuseaddr(true)?;
    socket.bind(SocketAddr::V4(address))?;
    socket.listen(BACKLOG)
}

/// Accepts connections on a thread until the task ends.
pub(super) async fn accept(
    listener: &TcpListener,
    thread: &Thread,
    port: &Arc<VirtualPort>,
    shared: &Arc<Shared>,
) {
    loop {
        let (client, peer) = match listener.accept().await {
            Ok((client, SocketAddr::V4(peer))) => (client, peer),
            Ok((_, SocketAddr::V6(_))) => continue,
            Err(error) if is_of_connection(&error) => continue,
            Err(error) => {
                if port.set_problem(Some(format!("accept: {error}"))) {
                    warn!(address = %port.address, %error, "the proxy of services cannot accept a connection");
                }
                sleep(PAUSE).await;
                continue;
            }
        };
        port.set_problem(None);
        // From here on, whatever ends the connection resets it, unless it ends well.
        let _ = set_socket_linger(&client, Some(Duration::ZERO));
        let Ok(place) = Arc::clone(&shared.places).try_acquire_owned() else {
            shared.count_refused();
            continue;
        };
        let (port, own) = (Arc::clone(port), Arc::clone(shared));
        shared.threads.serve(thread, client, |client| async move {
            let served = async {
                match port.table().http.is_some() {
                    true => http::serve(client, peer, &port, &own).await,
                    false => serve(client, peer, &port, &own).await,
                }
            };
            select! {
                () = served => {}
                () = own.stopped() => {}
            }
            drop(place);
        });
    }
}

/// Whether the connection failed before it was accepted, which says nothing about the listener (accept(2), "Error handling").
fn is_of_connection(error: &io::Error) -> bool {
    use io::ErrorKind as Kind;
    let kinds = [
        Kind::ConnectionAborted,
        Kind::ConnectionReset,
        Kind::ConnectionRefused,
        Kind::Interrupted,
        Kind::HostUnreachable,
        Kind::NetworkUnreachable,
        Kind::NetworkDown,
        Kind::TimedOut,
    ];
    kinds.contains(&error.kind())
}

async fn serve(mut client: TcpStream, peer: SocketAddrV4, port: &VirtualPort, shared: &Shared) {
    let Some((mut server, opened, endpoint)) = connect(peer, port, shared).await else { return };
    let _ = set_socket_linger(&server, Some(Duration::ZERO));
    let _ = client.set_nodelay(true);
    opened.count_connection();
    match relay(&mut client, &mut server, &opened, endpoint.reset_time(), shared).await {
        Ok(()) => {
            // Both directions have ended: what is still on its way is sent.
            let _ = set_socket_linger(&client, None);
            let _ = set_socket_linger(&server, None);
        }
        Err(error) => {
            debug!(%peer, address = %port.address, endpoint = %endpoint.address, %error, "connection reset");
        }
    }
}

/// Connects to the chosen endpoint, or to one behind it.
async fn connect(
    peer: SocketAddrV4,
    port: &VirtualPort,
    shared: &Shared,
) -> Option<(TcpStream, Opened, Arc<Endpoint>)> {
    let Some(mut choice) = port.choose(*peer.ip(), shared) else {
        port.table().tally.count_failure();
        return None;
    };
    while let Some(endpoint) = choice.next() {
        let table = &choice.table;
        let opened = Opened::new(&table.tally, &endpoint.tally);
        let header = table.proxy_protocol.then(|| tcp_over_ipv4(peer, port.address));
        let start = Instant::now();
        match connect_to(endpoint.address, header.as_ref().map(<[u8; _]>::as_slice), shared).await {
            Ok(server) => {
                opened.count_latency(start.elapsed());
                if choice.is_substitute() {
                    port.keep(*peer.ip(), table, endpoint.address, shared);
                }
                return Some((server, opened, endpoint));
            }
            Err(error) => {
                endpoint.tally.count_failure();
                debug!(address = %port.address, endpoint = %endpoint.address, %error, "endpoint cannot be reached");
            }
        }
    }
    choice.table.tally.count_failure();
    None
}

pub(super) async fn connect_to(
    address: SocketAddrV4,
    header: Option<&[u8]>,
    shared: &Shared,
) -> io::Result<TcpStream> {
    if shared.is_virtual(*address.ip()) {
        return Err(io::Error::other("the endpoint is a virtual address"));
    }
    let attempt = async {
        let mut server = TcpStream::connect(address).await?;
        // The kernel can give the socket the port that it connects to: then it is connected to itself.
        if server.local_addr()? == SocketAddr::V4(address) {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        server.set_nodelay(true)?;
        if let Some(header) = header {
            server.write_all(header).await?;
        }
        Ok(server)
    };
    timeout(shared.options.connect_timeout, attempt).await.map_err(|_| io::ErrorKind::TimedOut)?
}
