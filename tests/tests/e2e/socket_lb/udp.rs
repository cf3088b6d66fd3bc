//! UDP sockets.

use std::{
    net::{Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket},
    sync::Arc,
};

use anyhow::{Context as _, Result, ensure};
use overlay_ebpf::service::{
    abi::{Address, UDP},
    translation::REMEMBERED,
};
use overlay_tests::sandbox::Sandbox;

use super::{
    stage::{Book, Stage, TARGET, TIMEOUT, VIP},
    tcp::mapped,
};

/// The virtual port of UDP.
pub(super) const DNS: SocketAddrV4 = SocketAddrV4::new(VIP, 53);

pub(super) fn socket(bind: &str) -> Result<UdpSocket> {
    let socket = UdpSocket::bind(bind)?;
    socket.set_read_timeout(Some(TIMEOUT))?;
    Ok(socket)
}

/// Receives the answer to a question; returns the number of the endpoint and the source address.
fn answer(socket: &UdpSocket, question: &[u8]) -> Result<(u8, SocketAddr)> {
    let mut buffer = [0; 64];
    let (length, from) = socket.recv_from(&mut buffer).context("wait for the answer")?;
    ensure!(
        length == question.len() + 1 && &buffer[1..length] == question,
        "the answer is not to the question"
    );
    Ok((buffer[0], from))
}

/// Sends a question to an address, and returns the number of the endpoint. Checks that the answer is from that address.
pub(super) fn ask_at(socket: &UdpSocket, address: impl Into<SocketAddr>) -> Result<u8> {
    let (address, question) = (address.into(), rand::random::<[u8; 16]>());
    socket.send_to(&question, address).with_context(|| format!("send to {address}"))?;
    let (number, from) = answer(socket, &question)?;
    ensure!(from == address, "the answer of {address} is from {from}");
    Ok(number)
}

/// The same over a connected socket.
pub(super) fn ask_peer(socket: &UdpSocket, address: impl Into<SocketAddr>) -> Result<u8> {
    let (address, question) = (address.into(), rand::random::<[u8; 16]>());
    ensure!(socket.peer_addr()? == address, "the peer is {} instead of {address}", socket.peer_addr()?);
    socket.send(&question)?;
    let (number, from) = answer(socket, &question)?;
    ensure!(from == address, "the answer of {address} is from {from}");
    Ok(number)
}

/// Open sockets to an endpoint, as the programs count them.
fn open(stage: &Stage, number: u8) -> Result<Option<u64>> {
    stage.set.connections(UDP, Address { ip: [10, 244, 1, number], port: TARGET.to_be_bytes() })
}

pub(super) fn connected(sandbox: &Arc<Sandbox>) -> Result<()> {
    let mut stage = Stage::new(sandbox)?;
    let endpoints = stage.endpoints(1..=2)?;
    stage.reconcile(&Book::default().service("dns", VIP, "").endpoints("dns", 1..=2, "").catalog()?)?;
    let sockets = stage.netns.run(|| {
        let mut sockets = Vec::new();
        for (bind, address) in
            [("0.0.0.0:0", SocketAddr::from(DNS)), ("[::]:0", SocketAddr::from(mapped(DNS)))]
        {
            for expected in [1, 2] {
                let socket = socket(bind)?;
                socket.connect(address)?;
                for _ in 0..3 {
                    let number = ask_peer(&socket, address).with_context(|| format!("from {bind}"))?;
                    ensure!(number == expected, "endpoint {number} instead of {expected}");
                }
                sockets.push(socket);
            }
        }
        // Connected elsewhere, it is a socket as any other, even to an endpoint that it was connected to before.
        let other = socket("0.0.0.0:0")?;
        other.connect(DNS)?;
        let number = ask_peer(&other, DNS)?;
        let endpoint = &endpoints[usize::from(number) - 1];
        other.connect(endpoint.address)?;
        ensure!(ask_peer(&other, endpoint.address)? == number, "another endpoint answers");
        Ok::<_, anyhow::Error>(sockets)
    })??;
    ensure!([open(&stage, 1)?, open(&stage, 2)?] == [Some(2), Some(2)], "{:?}", open(&stage, 1)?);
    drop(sockets);
    ensure!([open(&stage, 1)?, open(&stage, 2)?] == [Some(0), Some(0)], "{:?}", open(&stage, 1)?);
    Ok(())
}

pub(super) fn unconnected(sandbox: &Arc<Sandbox>) -> Result<()> {
    let mut stage = Stage::new(sandbox)?;
    let _endpoints = stage.endpoints(1..=3)?;
    let book = Book::default().service("dns", VIP, "");
    stage.reconcile(&book.clone().endpoints("dns", 1..=2, "").catalog()?)?;
    let (socket4, socket6) = stage.netns.run(|| {
        let (socket4, socket6) = (socket("0.0.0.0:0")?, socket("[::]:0")?);
        for _ in 0..5 {
            ensure!(ask_at(&socket4, DNS)? == 1, "the socket has moved");
            ensure!(ask_at(&socket6, mapped(DNS))? == 2, "the IPv6 socket has moved");
        }
        Ok::<_, anyhow::Error>((socket4, socket6))
    })??;
    ensure!([open(&stage, 1)?, open(&stage, 2)?] == [Some(1), Some(1)], "{:?}", open(&stage, 1)?);
    // The endpoint leaves while a question is under way: its answer still has the virtual address, the next is another's.
    let question = *b"under way";
    socket4.send_to(&question, DNS)?;
    stage.reconcile(&book.endpoints("dns", [2, 3], "").catalog()?)?;
    ensure!(answer(&socket4, &question)? == (1, DNS.into()), "a late answer");
    let numbers = (0..4).map(|_| ask_at(&socket4, DNS)).collect::<Result<Vec<_>>>()?;
    ensure!(numbers[0] != 1 && numbers.iter().all(|number| *number == numbers[0]), "{numbers:?}");
    ensure!(ask_at(&socket6, mapped(DNS))? == 2, "a socket whose endpoint stays has moved");
    drop((socket4, socket6));
    ensure!([open(&stage, 2)?, open(&stage, 3)?] == [Some(0), Some(0)], "{:?}", open(&stage, 2)?);
    Ok(())
}

/// The virtual address with this number.
fn vip(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 251, 0, number)
}

pub(super) fn many_services(sandbox: &Arc<Sandbox>) -> Result<()> {
    let mut stage = Stage::new(sandbox)?;
    let _endpoints = stage.endpoints(1..=3)?;
    // All have the same endpoints.
    let count = REMEMBERED as u8;
    let mut book = Book::default();
    for number in 1..=count {
        let name = format!("dns-{number}");
        book = book.service(&name, vip(number), "").endpoints(&name, 1..=3, "");
    }
    stage.reconcile(&book.catalog()?)?;
    stage.netns.run(|| {
        let socket = socket("0.0.0.0:0")?;
        for round in 0..3 {
            for number in 1..=count {
                let address = SocketAddrV4::new(vip(number), 53);
                ask_at(&socket, address).with_context(|| format!("round {round}"))?;
            }
        }
        Ok(())
    })?
}

pub(super) fn many_sockets(sandbox: &Arc<Sandbox>) -> Result<()> {
    const SOCKETS: usize = 400;
    let mut stage = Stage::new(sandbox)?;
    let _endpoints = stage.endpoints(1..=2)?;
    stage.reconcile(&Book::default().service("dns", VIP, "").endpoints("dns", 1..=2, "").catalog()?)?;
    let sockets = stage.netns.run(|| {
        let sockets = (0..SOCKETS).map(|_| socket("0.0.0.0:0")).collect::<Result<Vec<_>>>()?;
        let first = sockets.iter().map(|socket| ask_at(socket, DNS)).collect::<Result<Vec<_>>>()?;
        let again = sockets.iter().map(|socket| ask_at(socket, DNS)).collect::<Result<Vec<_>>>()?;
        ensure!(first == again, "a socket has moved");
        Ok::<_, anyhow::Error>(sockets)
    })??;
    let half = Some(SOCKETS as u64 / 2);
    ensure!([open(&stage, 1)?, open(&stage, 2)?] == [half; 2], "{:?}", open(&stage, 1)?);
    drop(sockets);
    ensure!([open(&stage, 1)?, open(&stage, 2)?] == [Some(0); 2], "{:?}", open(&stage, 1)?);
    Ok(())
}
