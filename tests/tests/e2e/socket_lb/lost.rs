//! UDP sockets whose endpoint goes away, in several network namespaces.

use std::{
    net::{SocketAddr, UdpSocket},
    sync::Arc,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use nix::libc;
use overlay_agent::service::{front::Rules, sockets::SocketKeeper};
use overlay_tests::{netns::Netns, sandbox::Sandbox};

use super::{
    stage::{Book, Endpoint, Stage},
    tcp::mapped,
    udp::{DNS, ask_at, ask_peer, socket},
};
use crate::wait::wait_until;

/// Sockets of one namespace.
struct Sockets {
    /// Connected to the virtual address, with its address and their endpoint.
    connected: Vec<(UdpSocket, SocketAddr, u8)>,
    unconnected: UdpSocket,
    /// Connected to an endpoint itself.
    direct: Vec<(UdpSocket, SocketAddr, u8)>,
}

impl Sockets {
    /// Opens them in the present namespace of the thread.
    fn open(endpoints: &[Endpoint]) -> Result<Self> {
        let mut connected = Vec::new();
        for _ in 0..endpoints.len() {
            for (bind, address) in
                [("0.0.0.0:0", SocketAddr::from(DNS)), ("[::]:0", SocketAddr::from(mapped(DNS)))]
            {
                let socket = socket(bind)?;
                socket.connect(address)?;
                let number = ask_peer(&socket, address)?;
                connected.push((socket, address, number));
            }
        }
        let unconnected = socket("0.0.0.0:0")?;
        ask_at(&unconnected, DNS)?;
        let mut direct = Vec::new();
        for (number, endpoint) in (1..).zip(endpoints) {
            let socket = socket("0.0.0.0:0")?;
            // It was at the virtual address before, which counts no more.
            socket.connect(DNS)?;
            socket.connect(endpoint.address)?;
            direct.push((socket, endpoint.address.into(), number));
        }
        Ok(Self { connected, unconnected, direct })
    }

    /// Whether the connections to these endpoints have ended.
    fn have_ended(&self, numbers: &[u8]) -> bool {
        let mut of_gone = self.connected.iter().filter(|(.., number)| numbers.contains(number));
        of_gone.all(|(socket, ..)| socket.peer_addr().is_err())
    }

    /// Whether all work; those of the endpoints that are gone after they connect again, to these.
    fn check(&self, gone: &[u8], left: &[u8]) -> Result<()> {
        for (socket, address, number) in &self.connected {
            if gone.contains(number) {
                let error = socket.recv(&mut [0; 8]).err().context("the connection is there still")?;
                ensure!(error.raw_os_error() == Some(libc::ECONNABORTED), "endpoint {number}: {error}");
                socket.connect(address)?;
                let number = ask_peer(socket, *address)?;
                ensure!(left.contains(&number), "connected again to endpoint {number}");
            } else {
                ensure!(ask_peer(socket, *address)? == *number, "the socket of endpoint {number} has moved");
            }
        }
        ensure!(left.contains(&ask_at(&self.unconnected, DNS)?), "unconnected");
        for (socket, address, number) in &self.direct {
            ensure!(ask_peer(socket, *address)? == *number, "the direct connection to endpoint {number}");
        }
        Ok(())
    }
}

pub(super) fn connect_again(sandbox: &Arc<Sandbox>) -> Result<()> {
    let mut stage = Stage::new(sandbox)?;
    let other = Netns::create(sandbox, "lb-other")?;
    let endpoints = stage.endpoints(1..=4)?;
    let of_other = (1..=4).map(|number| Endpoint::start(&other, number)).collect::<Result<Vec<_>>>()?;
    let book = Book::default().service("dns", super::stage::VIP, "");
    let all = book.clone().endpoints("dns", 1..=4, "").catalog()?;
    stage.reconcile(&all)?;
    let sockets = [stage.netns.run(|| Sockets::open(&endpoints))??, other.run(|| Sockets::open(&of_other))??];
    for sockets in &sockets {
        for number in 1..=4 {
            let count = sockets.connected.iter().filter(|(.., of)| *of == number).count();
            ensure!(count == 2, "{count} sockets of endpoint {number}");
        }
    }

    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let keeper = runtime.block_on(async { SocketKeeper::start(stage.set.udp_sockets()) });
    let rules = Rules::default();
    keeper.update(&all, &rules);
    // One is draining, one is removed, one is down; its sockets have to leave as there is another one.
    let some = book
        .clone()
        .endpoints("dns", [1], "")
        .endpoints("dns", [2], r#","state":"draining""#)
        .endpoints("dns", [4], r#","state":"down""#)
        .catalog()?;
    stage.reconcile(&some)?;
    keeper.update(&some, &rules);
    let (gone, left) = (&[3, 4][..], &[1][..]);
    wait_until("connections to the endpoints that are gone have ended", || {
        Ok(sockets.iter().all(|sockets| sockets.have_ended(gone)))
    })?;
    ensure!(keeper.problem().is_none(), "{:?}", keeper.problem());
    for (netns, sockets) in [&stage.netns, &other].into_iter().zip(&sockets) {
        netns.run(|| sockets.check(gone, left))?.with_context(|| format!("in {}", netns.name()))?;
    }

    // An endpoint that comes, and one that only drains: no connection ends.
    let more = book.clone().endpoints("dns", [1], r#","state":"draining""#).endpoints("dns", [2, 3], "");
    let more = more.catalog()?;
    stage.reconcile(&more)?;
    keeper.update(&more, &rules);
    thread::sleep(Duration::from_millis(1500));
    for sockets in &sockets {
        for (socket, ..) in &sockets.connected {
            ensure!(socket.take_error()?.is_none() && socket.peer_addr().is_ok(), "a connection has ended");
        }
    }
    // Without any endpoint, those that are left end, too.
    let none = book.catalog()?;
    stage.reconcile(&none)?;
    keeper.update(&none, &rules);
    wait_until("all connections have ended", || {
        Ok(sockets.iter().all(|sockets| sockets.have_ended(&[1, 2, 3, 4])))
    })?;
    for sockets in &sockets {
        let mut direct = sockets.direct.iter();
        ensure!(direct.all(|(socket, ..)| socket.peer_addr().is_ok()), "a direct connection has ended");
    }
    Ok(())
}
