//! DNS over TCP (RFC 7766): several queries on one connection, answered as their answers become known.

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream, tcp::OwnedReadHalf},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    task::JoinSet,
    time::timeout,
};

use super::{answer::Answer, server::Shared};

/// Most queries of a connection that wait for upstream servers or for the client to read. While there are so many, no more is read.
const PIPELINE: usize = 8;
/// Pause after an error of the listening socket, such as too many open files.
const PAUSE: Duration = Duration::from_millis(100);

/// A response and its place among the outstanding ones.
type Outgoing = (Vec<u8>, OwnedSemaphorePermit);

/// The open connections by client.
#[derive(Debug, Default)]
struct Open {
    count: usize,
    clients: HashMap<IpAddr, usize>,
}

/// One of them.
struct Slot {
    open: Arc<Mutex<Open>>,
    client: IpAddr,
}

impl Slot {
    /// `None` when too many are open, of all clients or of this one: a client may have a quarter, so that it does not lock out others.
    fn take(open: &Arc<Mutex<Open>>, client: IpAddr, max: usize) -> Option<Self> {
        let mut state = open.lock().unwrap_or_else(PoisonError::into_inner);
        let of_client = state.clients.get(&client).copied().unwrap_or(0);
        if state.count >= max || of_client >= max.div_ceil(4) {
            return None;
        }
        state.count += 1;
        state.clients.insert(client, of_client + 1);
        Some(Self { open: Arc::clone(open), client })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut state = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        state.count -= 1;
        match state.clients.get_mut(&self.client) {
            Some(count) if *count > 1 => *count -= 1,
            _ => {
                state.clients.remove(&self.client);
            }
        }
    }
}

/// Accepts connections and answers their queries. Does not return.
pub(super) async fn serve(listener: TcpListener, shared: Arc<Shared>) {
    let open = Arc::new(Mutex::new(Open::default()));
    let mut connections = JoinSet::new();
    loop {
        let Ok((stream, client)) = listener.accept().await else {
            tokio::time::sleep(PAUSE).await;
            continue;
        };
        while connections.try_join_next().is_some() {}
        let Some(slot) = Slot::take(&open, client.ip(), shared.max_connections) else {
            shared.counters.connections_refused.add();
            continue;
        };
        let shared = Arc::clone(&shared);
        connections.spawn(async move {
            // Clients go away as they like: the end of a connection is no event.
            let _ = converse(stream, client, &shared).await;
            drop(slot);
        });
    }
}

async fn converse(stream: TcpStream, client: SocketAddr, shared: &Arc<Shared>) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let (mut reader, mut writer) = stream.into_split();
    let (responses, mut outgoing) = mpsc::channel::<Outgoing>(PIPELINE);
    let idle = shared.tcp_idle;
    let write = async move {
        while let Some((response, place)) = outgoing.recv().await {
            timeout(idle, writer.write_all(&response)).await??;
            drop(place);
        }
        io::Result::Ok(())
    };
    let read = async move {
        let places = Arc::new(Semaphore::new(PIPELINE));
        // Ends when the client closes: what it has asked before is answered first.
        let mut forwarded = JoinSet::new();
        loop {
            let Ok(place) = Arc::clone(&places).acquire_owned().await else { break };
            let Ok(Ok(query)) = timeout(idle, read_message(&mut reader)).await else { break };
            while forwarded.try_join_next().is_some() {}
            let mut response = Vec::new();
            match shared.answer(&query, &shared.records()) {
                // Whatever sends responses or less than a header does not speak DNS as a client.
                Answer::None => break,
                Answer::Reply(reply) => {
                    reply.encode(None, &mut response);
                }
                Answer::Forward(question) => {
                    if let Err(permit) = shared.forward_at_once(&question, client.ip(), None, &mut response) {
                        let (shared, responses) = (Arc::clone(shared), responses.clone());
                        forwarded.spawn(async move {
                            let mut response = Vec::new();
                            permit.ask(&question, &shared.counters, None, &mut response).await;
                            send(response, place, &responses, &shared).await;
                        });
                        continue;
                    }
                }
            }
            send(response, place, &responses, shared).await;
        }
        drop(responses);
        while forwarded.join_next().await.is_some() {}
        // Only when all is sent, the writer ends.
        std::future::pending::<()>().await;
    };
    tokio::select! {
        result = write => result,
        () = read => Ok(()),
    }
}

async fn send(
    response: Vec<u8>,
    place: OwnedSemaphorePermit,
    responses: &mpsc::Sender<Outgoing>,
    shared: &Shared,
) {
    let Ok(length) = u16::try_from(response.len()) else { return };
    if length == 0 {
        return;
    }
    shared.counters.answered(&response);
    let framed = [&length.to_be_bytes(), response.as_slice()].concat();
    // The writer is gone when the client does not read.
    let _ = responses.send((framed, place)).await;
}

/// A message behind its length.
async fn read_message(reader: &mut OwnedReadHalf) -> io::Result<Vec<u8>> {
    let length = reader.read_u16().await?;
    let mut message = vec![0; usize::from(length)];
    reader.read_exact(&mut message).await?;
    Ok(message)
}
