//! What the programs count of connections.

use std::{
    net::{Ipv4Addr, SocketAddrV4, TcpStream, UdpSocket},
    sync::Arc,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use nix::libc;
use overlay_agent::{
    datapath::ebpf::KernelEndpoint,
    service::{outcome::Outcome, record::Protocol},
};
use overlay_ebpf::service::abi::{Address, Counts, ServiceKey, TCP, UDP};
use overlay_tests::sandbox::Sandbox;

use super::{
    stage::{Book, Stage, TARGET, VIP, connect_and_ask},
    tcp::{WEB, error_of, mapped},
};

fn address(number: u8) -> Address {
    Address { ip: [10, 244, 1, number], port: TARGET.to_be_bytes() }
}

fn endpoint(stage: &Stage, protocol: u8, number: u8) -> Result<KernelEndpoint> {
    let counts = stage.set.counts()?;
    counts
        .endpoints
        .get(&(protocol, address(number)))
        .copied()
        .with_context(|| format!("no endpoint {number}"))
}

fn port(stage: &Stage, protocol: u8, port: u16) -> Result<Counts> {
    let key = ServiceKey::new(Address { ip: VIP.octets(), port: port.to_be_bytes() }, protocol);
    stage.set.counts()?.ports.get(&key).copied().with_context(|| format!("no port {port}"))
}

fn outcome(stage: &mut Stage, number: u8) -> Result<Outcome> {
    let address = SocketAddrV4::new(Ipv4Addr::new(10, 244, 1, number), TARGET);
    // Those of a port at which nothing has failed are not read.
    Ok(stage.set.outcomes()?.get(&(Protocol::Tcp, address)).copied().unwrap_or_default())
}

pub(super) fn exact(sandbox: &Arc<Sandbox>) -> Result<()> {
    let mut stage = Stage::new(sandbox)?;
    ensure!(stage.set.uncounted().is_none(), "{:?}", stage.set.uncounted());
    // Nothing listens at the third, and there is no way to the fourth.
    let endpoints = stage.endpoints(1..=2)?;
    stage.netns.tool("ip address add 10.244.1.3/32 dev lo")?;
    let book = Book::default().service("web", VIP, "").endpoints("web", 1..=3, "");
    stage.reconcile(&book.catalog()?)?;
    stage.netns.run(|| {
        for turn in 0..30 {
            let result = match turn % 2 {
                0 => TcpStream::connect(WEB),
                _ => TcpStream::connect(mapped(WEB)),
            };
            match turn % 3 {
                2 => ensure!(error_of(result)? == libc::ECONNREFUSED, "turn {turn}"),
                _ => drop(result.with_context(|| format!("turn {turn}"))?),
            }
        }
        // These are none of the services'.
        for _ in 0..5 {
            connect_and_ask(endpoints[0].address)?;
        }
        error_of(TcpStream::connect((Ipv4Addr::new(10, 244, 1, 3), TARGET)))?;
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        for _ in 0..4 {
            socket.connect((VIP, 53))?;
        }
        let sender = UdpSocket::bind("0.0.0.0:0")?;
        for _ in 0..4 {
            sender.send_to(b"x", (VIP, 53))?;
        }
        Ok(())
    })??;
    for (number, expected) in [(1, (10, 0)), (2, (10, 0)), (3, (0, 10))] {
        let counts = endpoint(&stage, TCP, number)?.counts;
        let established: u64 = counts.latency.iter().sum();
        ensure!((established, counts.failed, counts.picks) == (expected.0, expected.1, 10), "{counts:?}");
        ensure!((counts.latency_sum > 0) == (established > 0), "{counts:?}");
        let outcome = outcome(&mut stage, number)?;
        ensure!((outcome.established, outcome.failed) == expected, "{outcome:?}");
    }
    let web = port(&stage, TCP, 80)?;
    ensure!((web.picks, web.refused, web.failed) == (30, 0, 10), "{web:?}");
    ensure!(web.latency.iter().sum::<u64>() == 20, "{web:?}");
    // Loopback takes microseconds: no connection took a second, as it would if the clock were wrong.
    ensure!(web.latency.get(21..).is_some_and(|long| long.iter().all(|count| *count == 0)), "{web:?}");
    // Each connection of a UDP socket and each new destination of an unconnected one, not each datagram.
    let dns = port(&stage, UDP, 53)?;
    ensure!((dns.picks, dns.refused, dns.failed) == (5, 0, 0), "{dns:?}");
    let picks =
        (1..=3).map(|number| Ok(endpoint(&stage, UDP, number)?.counts.picks)).collect::<Result<Vec<_>>>()?;
    ensure!(picks == [2, 2, 1], "{picks:?}");

    // Without endpoints.
    stage.reconcile(&Book::default().service("web", VIP, "").catalog()?)?;
    stage.netns.run(|| {
        for _ in 0..7 {
            error_of(TcpStream::connect(WEB))?;
        }
        error_of(UdpSocket::bind("0.0.0.0:0")?.send_to(b"x", (VIP, 53)))
    })??;
    ensure!(port(&stage, TCP, 80)?.refused == 7 && port(&stage, UDP, 53)?.refused == 1);
    ensure!(port(&stage, TCP, 80)?.picks == 30, "a refused connection is no pick");

    // An endpoint that comes back after its number was free begins at 0, and so does the service.
    thread::sleep(Duration::from_millis(1100));
    stage.set.collect()?;
    ensure!(stage.set.counts()?.endpoints.is_empty(), "{:?}", stage.set.counts()?);
    stage.reconcile(&book.catalog()?)?;
    for number in 1..=3 {
        ensure!(endpoint(&stage, TCP, number)?.counts == Counts::default(), "endpoint {number}");
    }
    stage.reconcile(&Book::default().catalog()?)?;
    stage.reconcile(&book.catalog()?)?;
    ensure!(port(&stage, TCP, 80)? == Counts::default(), "{:?}", port(&stage, TCP, 80)?);
    Ok(())
}

/// An endpoint that answers nothing: who gives up after a moment says nothing about it, who waits for longer does.
pub(super) fn silent_endpoint(sandbox: &Arc<Sandbox>) -> Result<()> {
    let mut stage = Stage::new(sandbox)?;
    stage.netns.tool("ip link add v0 type veth peer name v1")?;
    for device in ["lo", "v0", "v1"] {
        stage.netns.tool(&format!("ip link set {device} up"))?;
    }
    // The neighbour's address is known, and no device has it.
    stage.netns.tool("ip route add 10.244.1.0/24 dev v0")?;
    stage.netns.tool("ip neigh add 10.244.1.1 lladdr 02:00:00:00:00:01 dev v0 nud permanent")?;
    stage.netns.tool("ip address add 10.9.9.9/32 dev v0")?;
    stage.reconcile(&Book::default().service("web", VIP, "").endpoints("web", [1], "").catalog()?)?;
    let netns = Arc::clone(&stage.netns);
    let wait = |time| netns.run(|| TcpStream::connect_timeout(&WEB.into(), time));
    let error = wait(Duration::from_millis(200))?.err().context("a silent endpoint answered")?;
    ensure!(error.kind() == std::io::ErrorKind::TimedOut, "{error}");
    ensure!(outcome(&mut stage, 1)? == Outcome::default(), "{:?}", outcome(&mut stage, 1)?);
    wait(Duration::from_millis(1300))?.err().context("a silent endpoint answered")?;
    ensure!(
        outcome(&mut stage, 1)? == Outcome { established: 0, failed: 1 },
        "{:?}",
        outcome(&mut stage, 1)?
    );
    // The kernel itself gives up, while the program still holds the socket.
    stage.netns.tool("sysctl -qw net.ipv4.tcp_syn_retries=1 net.ipv4.tcp_syn_linear_timeouts=0")?;
    let error = stage.netns.run(|| TcpStream::connect(WEB))?.err().context("a silent endpoint answered")?;
    ensure!(error.kind() == std::io::ErrorKind::TimedOut, "{error}");
    ensure!(
        outcome(&mut stage, 1)? == Outcome { established: 0, failed: 2 },
        "{:?}",
        outcome(&mut stage, 1)?
    );
    let counts = endpoint(&stage, TCP, 1)?;
    ensure!((counts.open, counts.counts.picks) == (0, 3), "{counts:?}");
    Ok(())
}
