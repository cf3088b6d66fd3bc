//! TCP connections.

use std::{
    io,
    net::{Ipv4Addr, SocketAddrV4, SocketAddrV6, TcpStream, UdpSocket},
    sync::Arc,
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::libc;
use overlay_tests::sandbox::Sandbox;

use super::stage::{Book, Stage, VIP, ask, connect_and_ask, load};

/// The virtual port of TCP.
pub(super) const WEB: SocketAddrV4 = SocketAddrV4::new(VIP, 80);

/// A v4-mapped address.
pub(super) fn mapped(address: SocketAddrV4) -> SocketAddrV6 {
    SocketAddrV6::new(address.ip().to_ipv6_mapped(), address.port(), 0, 0)
}

/// The error number of a call that has to fail.
pub(super) fn error_of<T>(result: io::Result<T>) -> Result<i32> {
    match result {
        Ok(_) => bail!("a call succeeded that has to fail"),
        Err(error) => error.raw_os_error().with_context(|| format!("no error of the kernel: {error}")),
    }
}

pub(super) fn take_turns(sandbox: &Arc<Sandbox>) -> Result<()> {
    let mut stage = Stage::new(sandbox)?;
    let _endpoints = stage.endpoints(1..=3)?;
    stage.reconcile(&Book::default().service("web", VIP, "").endpoints("web", 1..=3, "").catalog()?)?;
    for (name, verified, bytes) in stage.set.sizes()? {
        println!("{name}: {verified} verified instructions, {bytes} bytes of machine code");
        // The kernel's limit is a million (BPF_COMPLEXITY_LIMIT_INSNS).
        ensure!((1..50_000).contains(&verified), "{name}: {verified} verified instructions");
    }
    let answers: Vec<u8> =
        stage.netns.run(|| (0..12).map(|_| connect_and_ask(WEB)).collect::<Result<_>>())??;
    ensure!(answers == [1, 2, 3].repeat(4), "{answers:?}");
    Ok(())
}

pub(super) fn ipv6_sockets(sandbox: &Arc<Sandbox>) -> Result<()> {
    let mut stage = Stage::new(sandbox)?;
    let endpoints = stage.endpoints(1..=2)?;
    stage.reconcile(&Book::default().service("web", VIP, "").endpoints("web", 1..=2, "").catalog()?)?;
    stage.netns.run(|| {
        let answers =
            (0..4).map(|_| connect_and_ask(mapped(WEB))).collect::<Result<Vec<_>>>().context("mapped")?;
        ensure!(answers == [1, 2, 1, 2], "{answers:?}");
        let direct = connect_and_ask(mapped(endpoints[1].address)).context("an endpoint")?;
        ensure!(direct == 2, "endpoint 2 is {direct}");
        // No v4-mapped address, though its end is the virtual one.
        let [_, _, _, _, _, _, high, low] = VIP.to_ipv6_mapped().segments();
        let other = SocketAddrV6::new([0, 0, 0, 0, 0, 0xfffe, high, low].into(), 80, 0, 0);
        let error = error_of(TcpStream::connect(other))?;
        ensure!(error == libc::ENETUNREACH, "error {error}");
        Ok(())
    })?
}

pub(super) fn refused(sandbox: &Arc<Sandbox>) -> Result<()> {
    let mut stage = Stage::new(sandbox)?;
    let _endpoints = stage.endpoints(1..=1)?;
    let without = Book::default().service("web", VIP, "");
    let draining = without.clone().endpoints("web", [1], r#","state":"draining""#);
    let refused = |stage: &Stage| {
        stage.netns.run(|| {
            let udp = UdpSocket::bind("0.0.0.0:0")?;
            let udp6 = UdpSocket::bind("[::]:0")?;
            let dns = SocketAddrV4::new(VIP, 53);
            let errors = [
                error_of(TcpStream::connect(WEB))?,
                error_of(TcpStream::connect(mapped(WEB)))?,
                error_of(udp.send_to(b"x", dns))?,
                error_of(udp6.send_to(b"x", mapped(dns)))?,
                error_of(udp.connect(dns))?,
            ];
            ensure!(errors == [libc::ECONNREFUSED; 5], "{errors:?}");
            Ok(())
        })?
    };
    stage.reconcile(&without.catalog()?)?;
    refused(&stage)?;
    stage.reconcile(&without.clone().endpoints("web", [1], "").catalog()?)?;
    let number = stage.netns.run(|| connect_and_ask(WEB))??;
    ensure!(number == 1, "{number}");
    stage.reconcile(&draining.catalog()?)?;
    refused(&stage)
}

pub(super) fn untouched(sandbox: &Arc<Sandbox>) -> Result<()> {
    let mut stage = Stage::new(sandbox)?;
    let endpoints = stage.endpoints(1..=2)?;
    stage.reconcile(&Book::default().service("web", VIP, "").endpoints("web", [1], "").catalog()?)?;
    stage.netns.run(|| {
        for endpoint in &endpoints {
            let number = connect_and_ask(endpoint.address)?;
            ensure!(endpoint.address.ip().octets()[3] == number, "{} is {number}", endpoint.address);
            let udp = UdpSocket::bind("0.0.0.0:0")?;
            udp.set_read_timeout(Some(super::stage::TIMEOUT))?;
            udp.send_to(b"x", endpoint.address)?;
            let (_, from) = udp.recv_from(&mut [0; 8])?;
            ensure!(from == endpoint.address.into(), "{} answers from {from}", endpoint.address);
        }
        // The namespace has no route: what is not translated fails so.
        let udp = UdpSocket::bind("0.0.0.0:0")?;
        let errors = [
            error_of(TcpStream::connect((VIP, 81)))?,
            // Port 53 is a virtual port of UDP only, port 80 of TCP.
            error_of(TcpStream::connect((VIP, 53)))?,
            error_of(udp.send_to(b"x", (VIP, 80)))?,
            error_of(TcpStream::connect((Ipv4Addr::new(10, 251, 0, 2), 80)))?,
        ];
        ensure!(errors == [libc::ENETUNREACH; 4], "{errors:?}");
        Ok(())
    })??;
    // A connection outlives the programs.
    let mut stream = stage.netns.run(|| TcpStream::connect(WEB))??;
    stage.set.detach()?;
    ensure!(ask(&mut stream)? == 1, "the connection has moved");
    let error = error_of(stage.netns.run(|| TcpStream::connect(WEB))?)?;
    ensure!(error == libc::ENETUNREACH, "detached programs translate: error {error}");
    Ok(())
}

pub(super) fn no_cgroup(_: &Arc<Sandbox>) -> Result<()> {
    let mut set = load()?;
    for (path, expected) in [("/proc", "no directory of cgroup v2"), ("/nowhere", "open the cgroup /nowhere")]
    {
        let error = match set.attach(Some(path.as_ref())) {
            Ok(()) => bail!("attached to {path}"),
            Err(error) => format!("{error:#}"),
        };
        ensure!(error.contains(expected), "{error}");
    }
    Ok(())
}
