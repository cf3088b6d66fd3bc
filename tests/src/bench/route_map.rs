//! Reads the agent's route map in the kernel.

use std::{
    net::Ipv4Addr,
    sync::mpsc::{Receiver, Sender, channel},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use aya::maps::{HashMap, Map, MapData, MapError};
use overlay_ebpf::abi::{NextHop, Prefix};

use super::kernel_map;

/// Prefix length of the subnets here, also of the agent's own: their routes are in the map `ROUTES`.
const LENGTH: u8 = 24;
/// Poll interval: short compared to the measured times, long enough not to occupy the core.
const PAUSE: Duration = Duration::from_micros(200);
/// Limit for each wait.
const TIMEOUT: Duration = Duration::from_secs(60);

// aya moves map keys and values as plain bytes.
type Key = [u8; size_of::<Prefix>()];
type Value = [u8; size_of::<NextHop>()];

/// The kernel's map of routes.
pub(super) struct RouteMap(HashMap<MapData, Key, Value>);

impl RouteMap {
    /// The route map of the process `pid` that has a route for `subnet`; `None` while there is none. Other agents may run on
    /// this machine, and while one starts it has more than one such map.
    pub(super) fn find(pid: u32, subnet: Ipv4Addr) -> Result<Option<Self>> {
        for data in kernel_map::open(pid, "ROUTES")? {
            let map = Self(HashMap::try_from(Map::HashMap(data))?);
            if map.get(subnet)?.is_some() {
                return Ok(Some(map));
            }
        }
        Ok(None)
    }

    /// The peer that exactly `subnet` is routed to.
    pub(super) fn get(&self, subnet: Ipv4Addr) -> Result<Option<Ipv4Addr>> {
        let key: Key = bytemuck::cast(Prefix::new(subnet.octets(), LENGTH));
        match self.0.get(&key, 0) {
            Ok(value) => Ok(Some(bytemuck::cast::<Value, NextHop>(value).peer.into())),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(error).context("read the agent's route map"),
        }
    }

    /// Number of routes.
    pub(super) fn len(&self) -> Result<usize> {
        let mut count = 0;
        for key in self.0.keys() {
            key.context("read the agent's route map")?;
            count += 1;
        }
        Ok(count)
    }

    /// Waits until `subnet` is routed to `peer`, or has no route for `None`, and returns the time at which it was seen.
    pub(super) fn await_peer(&self, subnet: Ipv4Addr, peer: Option<Ipv4Addr>) -> Result<Instant> {
        let begun = Instant::now();
        loop {
            let found = self.get(subnet)?;
            let now = Instant::now();
            if found == peer {
                return Ok(now);
            }
            ensure!(
                now - begun < TIMEOUT,
                "the route for {subnet} is {found:?} after {TIMEOUT:?}, not {peer:?}"
            );
            thread::sleep(PAUSE);
        }
    }
}

/// Waits until a map of `pid` has a route for `subnet`.
pub(super) fn await_map(pid: u32, subnet: Ipv4Addr) -> Result<RouteMap> {
    let begun = Instant::now();
    while begun.elapsed() < TIMEOUT {
        if let Some(map) = RouteMap::find(pid, subnet)? {
            return Ok(map);
        }
        thread::sleep(Duration::from_millis(2));
    }
    bail!("the agent has no route for {subnet} after {TIMEOUT:?}")
}

/// A route to wait for.
type Expected = (Ipv4Addr, Option<Ipv4Addr>);

/// Polls a map in a separate thread, because the writer of a change waits for etcd's answer meanwhile.
pub(super) struct Observer {
    expectations: Sender<Expected>,
    seen: Receiver<Result<Instant>>,
}

impl Observer {
    pub(super) fn start(map: RouteMap) -> Self {
        let (expectations, expected_receiver) = channel::<Expected>();
        let (answers, seen) = channel();
        thread::spawn(move || {
            for (subnet, peer) in expected_receiver {
                if answers.send(map.await_peer(subnet, peer)).is_err() {
                    return;
                }
            }
        });
        Self { expectations, seen }
    }

    /// Starts to wait for `peer` as the peer of `subnet`.
    pub(super) fn watch(&self, subnet: Ipv4Addr, peer: Option<Ipv4Addr>) -> Result<()> {
        self.expectations.send((subnet, peer)).context("the thread that polls the route map ended")
    }

    /// The time at which it was seen.
    pub(super) fn seen(&self) -> Result<Instant> {
        self.seen.recv().context("the thread that polls the route map ended")?
    }
}
