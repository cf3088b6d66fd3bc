//! An upstream server on loopback that answers as a test wants.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
};

use hickory_proto::{
    op::{Message, ResponseCode},
    rr::{RData, Record, RecordType, rdata::SOA},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, UdpSocket},
    task::JoinSet,
};

/// How an upstream server behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Behaviour {
    /// It answers A with 192.0.2.1 and a TTL of 60 s; names that begin with `no` do not exist, for 60 s.
    Good,
    /// It does not answer.
    Silent,
    /// It answers with SERVFAIL.
    Failing,
    /// It answers with another identifier, then with another question, then from another port; at last as it should, with 192.0.2.2.
    Forging,
    /// Over UDP it says that the answer is truncated; over TCP it answers with 100 addresses.
    Truncating,
    /// It does not understand EDNS.
    WithoutEdns,
}

/// A running upstream server.
#[derive(Debug)]
pub(super) struct Upstream {
    pub(super) address: SocketAddr,
    queries: Arc<AtomicUsize>,
    _tasks: JoinSet<()>,
}

impl Upstream {
    pub(super) async fn start(behaviour: Behaviour) -> Self {
        let (udp, tcp) = loop {
            let udp = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
            // A port that is free for UDP may be taken for TCP.
            if let Ok(tcp) = TcpListener::bind(udp.local_addr().unwrap()).await {
                break (udp, tcp);
            }
        };
        let address = udp.local_addr().unwrap();
        let queries = Arc::new(AtomicUsize::new(0));
        let mut tasks = JoinSet::new();
        let counter = Arc::clone(&queries);
        tasks.spawn(async move {
            let mut buffer = vec![0; 4096];
            loop {
                let (length, client) = udp.recv_from(&mut buffer).await.unwrap();
                counter.fetch_add(1, SeqCst);
                over_udp(behaviour, &Message::from_vec(&buffer[..length]).unwrap(), client, &udp).await;
            }
        });
        tasks.spawn(async move {
            loop {
                let (mut stream, _) = tcp.accept().await.unwrap();
                let length = stream.read_u16().await.unwrap();
                let mut query = vec![0; usize::from(length)];
                stream.read_exact(&mut query).await.unwrap();
                let mut response = good(&Message::from_vec(&query).unwrap());
                for last in 1..100 {
                    let mut record = response.answers[0].clone();
                    record.data = RData::A(Ipv4Addr::new(192, 0, 2, last).into());
                    response.add_answer(record);
                }
                let bytes = response.to_vec().unwrap();
                stream.write_u16(bytes.len().try_into().unwrap()).await.unwrap();
                stream.write_all(&bytes).await.unwrap();
            }
        });
        Self { address, queries, _tasks: tasks }
    }

    /// The number of queries over UDP so far.
    pub(super) fn queries(&self) -> usize {
        self.queries.load(SeqCst)
    }
}

async fn over_udp(behaviour: Behaviour, query: &Message, client: SocketAddr, socket: &UdpSocket) {
    let mut response = good(query);
    let send = async |message: &Message| {
        socket.send_to(&message.to_vec().unwrap(), client).await.unwrap();
    };
    match behaviour {
        Behaviour::Silent => return,
        Behaviour::Good => {}
        Behaviour::Failing => {
            response = Message::error_msg(query.metadata.id, query.metadata.op_code, ResponseCode::ServFail);
            response.queries.clone_from(&query.queries);
        }
        Behaviour::Forging => {
            let mut forged = response.clone();
            forged.metadata.id ^= 1;
            send(&forged).await;
            forged = response.clone();
            forged.queries[0].query_type = RecordType::AAAA;
            send(&forged).await;
            let other = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
            other.send_to(&response.to_vec().unwrap(), client).await.unwrap();
            response.answers[0].data = RData::A(Ipv4Addr::new(192, 0, 2, 2).into());
        }
        Behaviour::Truncating => {
            response.answers.clear();
            response.metadata.truncation = true;
        }
        Behaviour::WithoutEdns if query.edns.is_some() => {
            response = Message::error_msg(query.metadata.id, query.metadata.op_code, ResponseCode::FormErr);
            response.queries.clone_from(&query.queries);
        }
        Behaviour::WithoutEdns => {}
    }
    send(&response).await;
}

fn good(query: &Message) -> Message {
    let mut response = Message::response(query.metadata.id, query.metadata.op_code);
    response.queries.clone_from(&query.queries);
    response.edns.clone_from(&query.edns);
    let name = query.queries[0].name().clone();
    if name.to_ascii().starts_with("no") {
        response.metadata.response_code = ResponseCode::NXDomain;
        let soa = SOA::new(name.clone(), name.clone(), 1, 2, 3, 4, 60);
        response.add_authority(Record::from_rdata(name, 600, RData::SOA(soa)));
    } else {
        let address = RData::A(Ipv4Addr::new(192, 0, 2, 1).into());
        response.add_answer(Record::from_rdata(name, 60, address));
    }
    response
}
