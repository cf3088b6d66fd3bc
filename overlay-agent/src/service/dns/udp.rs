//! DNS over UDP. The loop itself waits for nothing but datagrams: questions for upstream servers are tasks of their own.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use tokio::{net::UdpSocket, task::JoinSet};

use super::{answer::Answer, server::Shared};

/// Most datagrams in a row before other tasks run.
const BATCH: usize = 64;
/// Longest query in bytes. More is cut off, and then malformed.
const LONGEST_QUERY: usize = 4096;
/// Pause after an error of the socket, such as a device that is down.
const PAUSE: Duration = Duration::from_millis(10);

/// Answers what arrives at a socket. Does not return.
pub(super) async fn serve(socket: UdpSocket, shared: Arc<Shared>) {
    let socket = Arc::new(socket);
    let mut forwarded = JoinSet::new();
    let (mut query, mut response) = (vec![0; LONGEST_QUERY], Vec::new());
    loop {
        if socket.readable().await.is_err() {
            tokio::time::sleep(PAUSE).await;
        }
        for _ in 0..BATCH {
            match socket.try_recv_from(&mut query) {
                Ok((length, client)) => {
                    let query = query.get(..length).unwrap_or_default();
                    respond(query, client, &socket, &shared, &mut response, &mut forwarded);
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
                Err(_) => {
                    tokio::time::sleep(PAUSE).await;
                    break;
                }
            }
        }
        while forwarded.try_join_next().is_some() {}
        tokio::task::yield_now().await;
    }
}

fn respond(
    query: &[u8],
    client: SocketAddr,
    socket: &Arc<UdpSocket>,
    shared: &Arc<Shared>,
    response: &mut Vec<u8>,
    forwarded: &mut JoinSet<()>,
) {
    let udp_payload = Some(shared.udp_payload);
    let is_truncated = match shared.answer(query) {
        Answer::None => return,
        Answer::Reply(reply) => reply.encode(udp_payload, response),
        Answer::Forward(question) => {
            match shared.forward_at_once(&question, client.ip(), udp_payload, response) {
                Ok(is_truncated) => is_truncated,
                Err(permit) => {
                    let (shared, socket) = (Arc::clone(shared), Arc::clone(socket));
                    forwarded.spawn(async move {
                        let mut response = Vec::new();
                        let is_truncated =
                            permit.ask(&question, &shared.counters, udp_payload, &mut response).await;
                        send(&response, is_truncated, client, &socket, &shared);
                    });
                    return;
                }
            }
        }
    };
    send(response, is_truncated, client, socket, shared);
}

fn send(response: &[u8], is_truncated: bool, client: SocketAddr, socket: &UdpSocket, shared: &Shared) {
    if response.is_empty() {
        return;
    }
    if is_truncated {
        shared.counters.truncated.add();
    }
    shared.counters.answered(response);
    // A full send buffer is as a lost datagram: the client asks again.
    if socket.try_send_to(response, client).is_err() {
        shared.counters.unsent.add();
    }
}
