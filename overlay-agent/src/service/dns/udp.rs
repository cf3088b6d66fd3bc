//! DNS over UDP. The loop waits for nothing but datagrams: questions for upstream servers are tasks of their own. Datagrams are
//! received and sent in batches, because system calls are most of the work.

use std::{
    io::{self, IoSlice, IoSliceMut},
    net::SocketAddr,
    os::fd::AsRawFd as _,
    sync::Arc,
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::socket::{MsgFlags, MultiHeaders, SockaddrStorage, recvmmsg, sendmmsg},
};
use tokio::{io::Interest, net::UdpSocket, task::JoinSet};

use super::{answer::Answer, memo::Memo, server::Shared};

/// Most datagrams in one system call.
const BATCH: usize = 32;
/// Longest query in bytes. More is cut off, and then malformed.
const LONGEST_QUERY: usize = 4096;
/// Pause after an error of the socket, such as a device that is down.
const PAUSE: Duration = Duration::from_millis(10);

/// A datagram that was received, and the response to it.
#[derive(Debug)]
struct Exchange {
    query: Vec<u8>,
    length: usize,
    client: Option<SockaddrStorage>,
    /// Empty for none.
    response: Vec<u8>,
}

/// Answers what arrives at a socket. Does not return.
pub(super) async fn serve(socket: UdpSocket, shared: Arc<Shared>) {
    let socket = Arc::new(socket);
    let mut forwarded = JoinSet::new();
    let mut memo = Memo::new(shared.records());
    let empty = || Exchange { query: vec![0; LONGEST_QUERY], length: 0, client: None, response: Vec::new() };
    let mut exchanges: Vec<Exchange> = (0..BATCH).map(|_| empty()).collect();
    loop {
        if socket.readable().await.is_err() {
            tokio::time::sleep(PAUSE).await;
        }
        let received = match receive(&socket, &mut exchanges) {
            Ok(received) => received,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(_) => {
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        memo.renew(&shared.records());
        let batch = exchanges.get_mut(..received).unwrap_or_default();
        for exchange in &mut *batch {
            respond(exchange, &socket, &shared, &mut memo, &mut forwarded);
        }
        send_all(batch, &socket, &shared);
        while forwarded.try_join_next().is_some() {}
        if received == BATCH {
            tokio::task::yield_now().await;
        }
    }
}

/// Receives datagrams that wait, and returns their number.
fn receive(socket: &UdpSocket, exchanges: &mut [Exchange]) -> io::Result<usize> {
    let mut headers = MultiHeaders::<SockaddrStorage>::preallocate(exchanges.len(), None);
    let mut origins = [(0, None); BATCH];
    let count = {
        let buffers = exchanges.iter_mut().map(|exchange| [IoSliceMut::new(&mut exchange.query)]);
        let mut buffers: Vec<_> = buffers.collect();
        let fd = socket.as_raw_fd();
        let flags = MsgFlags::MSG_DONTWAIT;
        let received = socket.try_io(Interest::READABLE, || {
            Ok(recvmmsg(fd, &mut headers, buffers.iter_mut(), flags, None)?)
        })?;
        let mut count = 0;
        for (origin, message) in origins.iter_mut().zip(received) {
            *origin = (message.bytes, message.address);
            count += 1;
        }
        count
    };
    for (exchange, (length, client)) in exchanges.iter_mut().zip(origins) {
        (exchange.length, exchange.client) = (length, client);
        exchange.response.clear();
    }
    Ok(count)
}

fn respond(
    exchange: &mut Exchange,
    socket: &Arc<UdpSocket>,
    shared: &Arc<Shared>,
    memo: &mut Memo,
    forwarded: &mut JoinSet<()>,
) {
    let query = exchange.query.get(..exchange.length).unwrap_or_default();
    let response = &mut exchange.response;
    let Some(client) = exchange.client.as_ref().and_then(address) else { return };
    if memo.recall(query, response) {
        shared.counters.queries.add();
        shared.counters.answered(response);
        return;
    }
    let is_truncated = match shared.answer(query, memo.records()) {
        Answer::None => return,
        Answer::Reply(reply) => memo.encode(query, reply, shared.udp_payload, response),
        Answer::Forward(question) => {
            let udp_payload = Some(shared.udp_payload);
            match shared.forward_at_once(&question, client.ip(), udp_payload, response) {
                Ok(is_truncated) => is_truncated,
                Err(permit) => {
                    let (shared, socket) = (Arc::clone(shared), Arc::clone(socket));
                    forwarded.spawn(async move {
                        let mut response = Vec::new();
                        let is_truncated =
                            permit.ask(&question, &shared.counters, udp_payload, &mut response).await;
                        count(&response, is_truncated, &shared);
                        if socket.try_send_to(&response, client).is_err() {
                            shared.counters.unsent.add();
                        }
                    });
                    return;
                }
            }
        }
    };
    count(response, is_truncated, shared);
}

fn count(response: &[u8], is_truncated: bool, shared: &Shared) {
    if is_truncated {
        shared.counters.truncated.add();
    }
    shared.counters.answered(response);
}

/// Sends the responses of a batch. What the kernel does not take is as lost: the client asks again.
fn send_all(batch: &[Exchange], socket: &UdpSocket, shared: &Shared) {
    let responses = batch.iter().filter(|exchange| !exchange.response.is_empty());
    let (buffers, clients): (Vec<_>, Vec<_>) =
        responses.map(|exchange| ([IoSlice::new(&exchange.response)], exchange.client)).unzip();
    let mut sent = 0;
    while let (Some(buffers), Some(clients)) = (buffers.get(sent..), clients.get(sent..))
        && !buffers.is_empty()
    {
        let mut headers = MultiHeaders::preallocate(buffers.len(), None);
        let result = sendmmsg(socket.as_raw_fd(), &mut headers, buffers, clients, [], MsgFlags::MSG_DONTWAIT);
        match result.map(Iterator::count) {
            Ok(count) if count > 0 => sent += count,
            Err(Errno::EINTR) => {}
            // An error belongs to the first one.
            Ok(_) | Err(_) => {
                shared.counters.unsent.add();
                sent += 1;
            }
        }
    }
}

/// The address of a client.
fn address(client: &SockaddrStorage) -> Option<SocketAddr> {
    let of_v4 = client.as_sockaddr_in().map(|address| SocketAddr::V4((*address).into()));
    of_v4.or_else(|| client.as_sockaddr_in6().map(|address| SocketAddr::V6((*address).into())))
}
