//! Changes of the catalog while sockets connect.

use std::{
    net::{Ipv4Addr, TcpStream, UdpSocket},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use overlay_agent::service::{Catalog, front::Rules};
use overlay_ebpf::service::abi::{Address, MAX_SLOTS, ServiceKey, TCP, UDP};
use overlay_tests::sandbox::Sandbox;

use super::{
    stage::{Book, Stage, TARGET, VIP, ask, connect_and_ask},
    tcp::WEB,
};

/// The policies with tables of their own kinds.
const POLICIES: [&str; 3] = ["round_robin", "random", "least_conn"];

/// Connects all the time while the endpoints change: every connection succeeds, and none that begins after a change goes to an endpoint
/// that has left by then.
pub(super) fn removed_under_load(sandbox: &Arc<Sandbox>) -> Result<()> {
    let mut stage = Stage::new(sandbox)?;
    let _endpoints = stage.endpoints(1..=4)?;
    let catalog = |policy: &str, numbers: &[u8]| {
        let book = Book::default().service("web", VIP, &format!(r#","lb":{{"policy":"{policy}"}}"#));
        book.endpoints("web", numbers.iter().copied(), "").catalog()
    };
    stage.reconcile(&catalog("round_robin", &[1, 2])?)?;
    let mut kept = stage.netns.run(|| TcpStream::connect(WEB))??;
    let of_kept = ask(&mut kept)?;

    // For each endpoint, when it left.
    let left: Mutex<[Option<Instant>; 5]> = Mutex::new([None; 5]);
    let when_left = || *left.lock().unwrap_or_else(PoisonError::into_inner);
    let stop = AtomicBool::new(false);
    let connect = || -> Result<usize> {
        let mut connections = 0;
        while !stop.load(Ordering::Relaxed) {
            let before = when_left();
            let number = connect_and_ask(WEB).with_context(|| format!("connection {connections}"))?;
            // Unless it has come back meanwhile.
            let place = usize::from(number);
            let had_left = before[place].is_some() && before[place] == when_left()[place];
            ensure!(!had_left, "a new connection goes to endpoint {number}, which has left");
            connections += 1;
            thread::sleep(Duration::from_micros(200));
        }
        Ok(connections)
    };
    let (set, netns) = (&mut stage.set, &stage.netns);
    let mut change = || -> Result<usize> {
        let mut changes = 0;
        for round in 0..120 {
            let policy = POLICIES[round % POLICIES.len()];
            let numbers = [[1, 2], [2, 3], [3, 4], [4, 1]][round % 4];
            // Those that come back may be chosen before the change is complete.
            for number in numbers {
                left.lock().unwrap_or_else(PoisonError::into_inner)[usize::from(number)] = None;
            }
            changes += set.reconcile(&catalog(policy, &numbers)?, &Rules::default())?;
            let now = Instant::now();
            for number in (1..=4).filter(|number| !numbers.contains(number)) {
                left.lock().unwrap_or_else(PoisonError::into_inner)[usize::from(number)] = Some(now);
            }
            thread::sleep(Duration::from_millis(15));
        }
        Ok(changes)
    };
    let (connections, changes) = netns.run(|| {
        thread::scope(|scope| {
            let threads: Vec<_> = (0..2).map(|_| scope.spawn(connect)).collect();
            let changes = change();
            stop.store(true, Ordering::Relaxed);
            let mut connections = 0;
            for thread in threads {
                connections += thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            }
            Ok::<_, anyhow::Error>((connections, changes?))
        })
    })??;
    println!("{connections} connections during {changes} changes of virtual ports");
    ensure!(connections > 200 && changes >= 200, "{connections} connections, {changes} changes");
    ensure!(ask(&mut kept)? == of_kept, "an open connection has moved");

    // Two ports with two slots each are left, and what was replaced goes after a second.
    thread::sleep(Duration::from_millis(1100));
    stage.set.collect()?;
    ensure!(stage.set.slots()? == 4, "{} slots", stage.set.slots()?);
    Ok(())
}

/// UDP sockets connect as fast as they can while tables of many slots are replaced: a slot that is missing would refuse one.
pub(super) fn whole_tables(sandbox: &Arc<Sandbox>) -> Result<()> {
    let mut stage = Stage::new(sandbox)?;
    let catalog = |policy: &str, numbers: &[u8]| {
        let book = Book::default().service("dns", VIP, &format!(r#","lb":{{"policy":"{policy}"}}"#));
        book.endpoints("dns", numbers.iter().copied(), "").catalog()
    };
    stage.reconcile(&catalog("maglev", &[1, 2])?)?;
    // Endpoints need a route, and connecting sends nothing.
    stage.netns.tool("ip route add local 10.244.1.0/24 dev lo")?;
    let stop = AtomicBool::new(false);
    let connect = || -> Result<usize> {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        let mut connections = 0;
        while !stop.load(Ordering::Relaxed) {
            socket.connect((VIP, 53)).with_context(|| format!("connection {connections}"))?;
            connections += 1;
        }
        Ok(connections)
    };
    let (set, netns) = (&mut stage.set, &stage.netns);
    let mut change = || -> Result<usize> {
        let mut changes = 0;
        for round in 0..60 {
            let policy = ["maglev", "random", "maglev", "least_conn"][round % 4];
            let numbers: &[u8] = [&[1, 2][..], &[2, 3, 4], &[5], &[1, 2, 3, 4, 5, 6, 7]][round / 2 % 4];
            changes += set.reconcile(&catalog(policy, numbers)?, &Rules::default())?;
            // What is replaced has to be removed under load, too.
            thread::sleep(Duration::from_millis(20));
        }
        Ok(changes)
    };
    let (connections, changes) = netns.run(|| {
        thread::scope(|scope| {
            let threads: Vec<_> = (0..2).map(|_| scope.spawn(connect)).collect();
            let changes = change();
            stop.store(true, Ordering::Relaxed);
            let results = threads
                .into_iter()
                .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
            let connections = results.sum::<Result<usize>>()?;
            Ok::<_, anyhow::Error>((connections, changes?))
        })
    })??;
    println!("{connections} connections during {changes} changes of virtual ports");
    ensure!(connections > 10_000 && changes >= 100, "{connections} connections, {changes} changes");
    Ok(())
}

fn address(number: u8) -> Address {
    Address { ip: [10, 244, 1, number], port: TARGET.to_be_bytes() }
}

pub(super) fn read_back(sandbox: &Arc<Sandbox>) -> Result<()> {
    let mut stage = Stage::new(sandbox)?;
    let key = |vip: Ipv4Addr, port: u16, protocol| {
        ServiceKey::new(Address { ip: vip.octets(), port: port.to_be_bytes() }, protocol)
    };
    let second = Ipv4Addr::new(10, 251, 0, 2);
    let book = Book::default()
        .service("web", VIP, r#","affinity":{"client_ip":true,"ttl_s":77}"#)
        .endpoints("web", [1], "")
        .endpoints("web", [2], r#","weight":2"#)
        .service("api", second, r#","lb":{"policy":"maglev"}"#)
        .endpoints("api", 1..=5, "");
    let catalog = book.catalog()?;
    let start = Instant::now();
    ensure!(stage.reconcile(&catalog)? == 4, "not all ports are written");
    println!("wrote 2 Maglev tables and 2 others in {:?}", start.elapsed());
    ensure!(stage.reconcile(&catalog)? == 0, "what has not changed is written again");
    let services = stage.set.services()?;
    let keys = [key(VIP, 53, UDP), key(VIP, 80, TCP), key(second, 53, UDP), key(second, 80, TCP)];
    ensure!(keys.iter().all(|key| services.contains_key(key)) && services.len() == 4, "{services:?}");
    let web = &services[&key(VIP, 80, TCP)];
    ensure!(web.slots == [2, 1, 2].map(address), "{:?}", web.slots);
    ensure!(web.members == [1, 2].map(address) && web.entry.affinity_ttl_s == 77, "{web:?}");
    let api = &services[&key(second, 80, TCP)];
    ensure!(api.slots.len() == 1021 && api.members == [1, 2, 3, 4, 5].map(address), "{:?}", api.members);

    // An endpoint leaves: few of the other slots change.
    let fewer =
        Book::default().service("api", second, r#","lb":{"policy":"maglev"}"#).endpoints("api", 1..=4, "");
    ensure!(stage.reconcile(&fewer.catalog()?)? == 4, "two are removed, two are changed");
    let after = stage.set.services()?;
    let now = &after[&key(second, 80, TCP)];
    ensure!(after.len() == 2 && now.members == [1, 2, 3, 4].map(address), "{:?}", now.members);
    let moved =
        api.slots.iter().zip(&now.slots).filter(|(before, after)| before != after && **before != address(5));
    let moved = moved.count();
    ensure!(moved < 100, "{moved} of 1021 slots have moved");
    ensure!(stage.set.slots()? > 2 * 1021, "former slots are removed at once");

    stage.reconcile(&Catalog::default())?;
    thread::sleep(Duration::from_millis(1100));
    stage.set.collect()?;
    ensure!(stage.set.services()?.is_empty() && stage.set.slots()? == 0, "something is left");
    Ok(())
}

/// More Maglev tables than the kernel's map holds: those that fit are complete, the others are not there at all.
pub(super) fn too_many_slots(sandbox: &Arc<Sandbox>) -> Result<()> {
    let mut stage = Stage::new(sandbox)?;
    let _endpoints = stage.endpoints(1..=2)?;
    let book = |services: u8| {
        (1..=services).fold(Book::default(), |book, number| {
            let name = format!("s{number}");
            let vip = Ipv4Addr::new(10, 251, 0, number);
            book.service(&name, vip, r#","lb":{"policy":"maglev"}"#).endpoints(&name, [1, 2], "")
        })
    };
    // Two ports each: 128 services have 261,376 slots.
    let most = MAX_SLOTS as usize / 1021;
    let start = Instant::now();
    let error = match stage.reconcile(&book(140).catalog()?) {
        Ok(changes) => bail!("{changes} virtual ports fit"),
        Err(error) => format!("{error:#}"),
    };
    println!("wrote {} slots in {:?}: {error}", most * 1021, start.elapsed());
    ensure!(error.contains("is full") && error.contains(&format!("{} virtual ports", 280 - most)), "{error}");
    let services = stage.set.services()?;
    ensure!(services.len() == most && stage.set.slots()? == most * 1021, "{} services", services.len());
    ensure!(
        services.values().all(|service| service.slots.len() == 1021 && service.members.len() == 2),
        "parts"
    );
    // Services go, and with time there is room again.
    stage.reconcile(&book(100).catalog()?)?;
    thread::sleep(Duration::from_millis(1100));
    ensure!(stage.reconcile(&book(120).catalog()?)? == 40, "there is no room again");
    ensure!(stage.set.slots()? == 240 * 1021, "{} slots", stage.set.slots()?);
    ensure!(matches!(stage.netns.run(|| connect_and_ask(WEB))??, 1 | 2), "it does not work");
    Ok(())
}
