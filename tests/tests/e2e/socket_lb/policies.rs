//! How endpoints are chosen, in the kernel.

use std::{net::TcpStream, sync::Arc, thread, time::Duration};

use anyhow::{Context as _, Result, ensure};
use overlay_ebpf::service::abi::{Address, TCP};
use overlay_tests::{netns::Netns, sandbox::Sandbox};

use super::{
    stage::{Book, Stage, TARGET, VIP, ask, connect_and_ask},
    tcp::WEB,
};

/// The numbers of the endpoints that so many connections reach.
fn connect(netns: &Netns, count: usize) -> Result<Vec<u8>> {
    netns.run(|| (0..count).map(|_| connect_and_ask(WEB)).collect())?
}

/// How many of them are `number`.
fn count(numbers: &[u8], number: u8) -> usize {
    numbers.iter().filter(|other| **other == number).count()
}

pub(super) fn affinity(sandbox: &Arc<Sandbox>) -> Result<()> {
    let mut stage = Stage::new(sandbox)?;
    let _endpoints = stage.endpoints(1..=3)?;
    let sticky = Book::default().service("web", VIP, r#","affinity":{"client_ip":true,"ttl_s":2}"#);
    stage.reconcile(&sticky.clone().endpoints("web", 1..=3, "").catalog()?)?;
    ensure!(connect(&stage.netns, 10)? == [1; 10], "a client has moved");
    // Each connection renews it: in all, this takes longer than it lasts.
    for _ in 0..3 {
        thread::sleep(Duration::from_millis(900));
        ensure!(connect(&stage.netns, 1)? == [1], "a client has moved although it did not pause");
    }
    thread::sleep(Duration::from_millis(2200));
    ensure!(connect(&stage.netns, 5)? == [2; 5], "a client that paused has stayed, or moves about");
    // Its endpoint leaves.
    stage.reconcile(&sticky.endpoints("web", [1, 3], "").catalog()?)?;
    let numbers = connect(&stage.netns, 5)?;
    ensure!(numbers[0] != 2 && numbers == [numbers[0]; 5], "{numbers:?}");
    Ok(())
}

pub(super) fn least_connections(sandbox: &Arc<Sandbox>) -> Result<()> {
    let mut stage = Stage::new(sandbox)?;
    let _endpoints = stage.endpoints(1..=3)?;
    let book = Book::default().service("web", VIP, r#","lb":{"policy":"least_conn"}"#);
    let book = book.endpoints("web", [1, 2], "").endpoints("web", [3], r#","weight":2"#);
    stage.reconcile(&book.catalog()?)?;
    let open = |stage: &Stage| -> Result<Vec<u64>> {
        let address = |number| Address { ip: [10, 244, 1, number], port: TARGET.to_be_bytes() };
        (1..=3)
            .map(|number| stage.set.connections(TCP, address(number))?.context("no such endpoint"))
            .collect()
    };
    let hold = |count: usize| {
        stage.netns.run(|| {
            let connect = || {
                let mut stream = TcpStream::connect(WEB)?;
                Ok((ask(&mut stream)?, stream))
            };
            (0..count).map(|_| connect()).collect::<Result<Vec<_>>>()
        })?
    };
    let mut held = hold(40)?;
    ensure!(open(&stage)? == [10, 10, 20], "{:?}", open(&stage)?);
    held.retain(|(number, _)| *number != 1);
    ensure!(open(&stage)? == [0, 10, 20], "closed sockets count: {:?}", open(&stage)?);
    let again = hold(10)?;
    ensure!(again.iter().all(|(number, _)| *number == 1), "not the one without connections");
    drop((held, again));
    ensure!(open(&stage)? == [0, 0, 0], "closed sockets count: {:?}", open(&stage)?);
    Ok(())
}

pub(super) fn shares(sandbox: &Arc<Sandbox>) -> Result<()> {
    const CONNECTIONS: usize = 600;
    let mut stage = Stage::new(sandbox)?;
    let _endpoints = stage.endpoints(1..=3)?;
    let mut numbers = |policy: &str| {
        let book = Book::default().service("web", VIP, &format!(r#","lb":{{"policy":"{policy}"}}"#));
        let book = book.endpoints("web", [1, 2], "").endpoints("web", [3], r#","weight":4"#);
        stage.reconcile(&book.catalog()?)?;
        connect(&stage.netns, CONNECTIONS)
    };
    let turns = numbers("round_robin")?;
    ensure!([1, 2, 3].map(|number| count(&turns, number)) == [100, 100, 400], "not by weight");
    ensure!(!turns.windows(5).any(|five| five == [3; 5]), "the heavy endpoint's turns are not spread out");
    let random = numbers("random")?;
    for (number, share) in [(1, 1.0 / 6.0), (2, 1.0 / 6.0), (3, 4.0 / 6.0)] {
        // Five standard deviations of a binomial distribution: once in a million runs, all is well and this fails.
        let (mean, deviation) =
            (CONNECTIONS as f64 * share, (CONNECTIONS as f64 * share * (1.0 - share)).sqrt());
        let got = count(&random, number) as f64;
        ensure!((got - mean).abs() < 5.0 * deviation, "{got} of {mean} to endpoint {number}");
    }
    ensure!(random != turns, "chance took turns");
    for policy in ["source_hash", "maglev"] {
        let hashed = numbers(policy)?;
        ensure!(
            hashed.iter().all(|number| *number == hashed[0]),
            "{policy}: one client at several endpoints"
        );
    }
    Ok(())
}

pub(super) fn exact_turns(sandbox: &Arc<Sandbox>) -> Result<()> {
    let mut stage = Stage::new(sandbox)?;
    let _endpoints = stage.endpoints(1..=4)?;
    stage.reconcile(&Book::default().service("web", VIP, "").endpoints("web", 1..=4, "").catalog()?)?;
    let all = stage.netns.run(|| {
        thread::scope(|scope| {
            let connect = || (0..250).map(|_| connect_and_ask(WEB)).collect::<Result<Vec<_>>>();
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(connect)).collect();
            let numbers = threads.into_iter().map(|thread| match thread.join() {
                Ok(numbers) => numbers,
                Err(panic) => std::panic::resume_unwind(panic),
            });
            numbers.collect::<Result<Vec<_>>>()
        })
    })??;
    let counts = [1, 2, 3, 4].map(|number| count(&all.concat(), number));
    ensure!(counts == [250; 4], "two CPUs got one turn: {counts:?}");
    Ok(())
}
