//! What the programs cost.

use std::{
    net::{SocketAddr, SocketAddrV4, UdpSocket},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use overlay_tests::sandbox::Sandbox;

use super::stage::{Book, Stage, VIP};

const CALLS: u32 = 4000;
const ROUNDS: u32 = 10;
/// Many times what it takes on a machine with nothing else to do.
const LIMIT: Duration = Duration::from_micros(20);

/// The time to connect a UDP socket, which sends nothing: the mean of the fastest round.
fn connect(stage: &Stage, address: SocketAddr) -> Result<Duration> {
    stage.netns.run(|| {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        let mut best = Duration::MAX;
        for _ in 0..ROUNDS {
            let start = Instant::now();
            for _ in 0..CALLS {
                socket.connect(address)?;
            }
            best = best.min(start.elapsed() / CALLS);
        }
        Ok(best)
    })?
}

pub(super) fn of_calls(sandbox: &Arc<Sandbox>) -> Result<()> {
    let mut stage = Stage::new(sandbox)?;
    let endpoints = stage.endpoints(1..=8)?;
    let direct = endpoints[0].address.into();
    let virtual_address = SocketAddrV4::new(VIP, 53).into();
    let mut rows = Vec::new();
    rows.push(("an address that is not virtual", connect(&stage, direct)?));
    for policy in ["round_robin", "random", "maglev", "least_conn"] {
        let book = Book::default().service("dns", VIP, &format!(r#","lb":{{"policy":"{policy}"}}"#));
        stage.reconcile(&book.endpoints("dns", 1..=8, "").catalog()?)?;
        rows.push((policy, connect(&stage, virtual_address)?));
    }
    stage.set.detach();
    let without = connect(&stage, direct)?;
    println!(
        "connect a UDP socket, fastest of {ROUNDS} means of {CALLS} calls: without programs {without:?}"
    );
    for (name, time) in rows {
        println!("  {name}: {time:?}, {:?} more", time.saturating_sub(without));
        ensure!(time < without + LIMIT, "{name}: {time:?} instead of {without:?}");
    }
    Ok(())
}
